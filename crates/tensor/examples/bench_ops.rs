//! Times every operation at the shapes of a 15M-parameter Llama (dim 288, 6 heads on 2 key heads,
//! feed-forward 768, vocabulary 32000, 4 sequences of 256 tokens): forward alone on plain tensors,
//! and forward with backward when everything is tracked. Best of several runs.
//!
//! `cargo run --release -p strata-tensor --example bench_ops [name filter]`
use std::time::Instant;

use strata_tensor::kernels::{AdamwStep, adamw};
use strata_tensor::ops::{self, Activation, AttentionSpec, RopeTable};
use strata_tensor::{Tensor, device, host, memory};

const TOKENS: usize = 1024;
const DIM: usize = 288;
const HIDDEN: usize = 768;
const VOCAB: usize = 32_000;

struct Bench {
    filter: String,
}

impl Bench {
    /// `flops`: of the forward pass; backward counts twice that.
    fn run(&self, name: &str, flops: f64, shapes: &[[usize; 2]], op: impl Fn(&[Tensor<2>])) {
        self.tracked(name, flops, shapes, &|t| {
            op(t);
            None
        });
    }

    fn tracked(
        &self,
        name: &str,
        flops: f64,
        shapes: &[[usize; 2]],
        op: &dyn Fn(&[Tensor<2>]) -> Option<Tensor<2>>,
    ) {
        if !name.contains(&self.filter) {
            return;
        }
        let plain = device("cpu").unwrap_or_default();
        let values = |[rows, columns]: [usize; 2]| -> Vec<f32> {
            (0..rows * columns).map(|i| ((i * 7919) % 1013) as f32 / 4000.0 - 0.125).collect()
        };
        let make = |device: &strata_tensor::Device| -> Vec<Tensor<2>> {
            shapes.iter().map(|&shape| host::from_vec(values(shape), shape, device)).collect()
        };
        let inputs = make(&plain);
        let forward = best(|| drop(op(&inputs)));
        let mut line = format!("{name:28} forward {:8.3} ms", forward * 1e3);
        if flops > 0.0 {
            line += &format!(" {:6.1} GFLOP/s", flops / forward / 1e9);
        }
        let leaves: Vec<_> =
            make(&plain.autodiff()).into_iter().map(Tensor::require_grad).collect();
        if op(&leaves).is_some() {
            let both = best(|| drop(op(&leaves).map(|y| y.backward())));
            line += &format!("   with backward {:8.3} ms", both * 1e3);
            if flops > 0.0 {
                line += &format!(" {:6.1} GFLOP/s", 3.0 * flops / both / 1e9);
            }
        }
        println!("{line}");
    }
}

fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (mut best, begin) = (f64::MAX, Instant::now());
    for run in 0.. {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
        if run >= 4 && begin.elapsed().as_secs_f64() > 0.4 {
            break;
        }
    }
    best
}

fn main() {
    memory::tune_allocator();
    let bench = Bench { filter: std::env::args().nth(1).unwrap_or_default() };
    println!("{} threads", rayon::current_num_threads());
    for (inner, outer) in [(DIM, DIM), (DIM, HIDDEN), (HIDDEN, DIM), (256, 640), (DIM, VOCAB)] {
        let name = format!("linear {TOKENS}x{inner}x{outer}");
        let flops = 2.0 * (TOKENS * inner * outer) as f64;
        bench.tracked(&name, flops, &[[TOKENS, inner], [outer, inner]], &|t| {
            Some(ops::linear(t[0].clone(), t[1].clone(), None))
        });
    }
    for rows in [1, 4, 16] {
        let flops = 2.0 * (rows * DIM * VOCAB) as f64;
        bench.run(
            &format!("linear {rows}x{DIM}x{VOCAB}"),
            flops,
            &[[rows, DIM], [VOCAB, DIM]],
            |t| {
                ops::linear(t[0].clone(), t[1].clone(), None);
            },
        );
    }
    bench.tracked("rms_norm", 0.0, &[[TOKENS, DIM], [1, DIM]], &|t| {
        Some(ops::rms_norm(t[0].clone(), t[1].clone().reshape([DIM]), 1e-5))
    });
    bench.tracked("layer_norm", 0.0, &[[TOKENS, DIM], [1, DIM], [1, DIM]], &|t| {
        let (gain, bias) = (t[1].clone().reshape([DIM]), t[2].clone().reshape([DIM]));
        Some(ops::layer_norm(t[0].clone(), gain, Some(bias), 1e-5))
    });
    let gated = [[TOKENS, HIDDEN]; 2];
    bench.tracked("swiglu", 0.0, &gated, &|t| Some(ops::swiglu(t[0].clone(), t[1].clone())));
    bench.tracked("gelu_glu", 0.0, &gated, &|t| Some(ops::gelu_glu(t[0].clone(), t[1].clone())));
    for activation in [Activation::Relu, Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        bench.tracked(&format!("{activation:?}"), 0.0, &gated[..1], &|t| {
            Some(ops::activate(t[0].clone(), activation))
        });
    }
    let table = RopeTable::from_base(10_000.0, 48, 4096);
    let positions: Vec<u32> = (0..TOKENS as u32).map(|i| i % 256).collect();
    bench.tracked("rope", 0.0, &[[TOKENS, DIM]], &|t| {
        Some(ops::rope(t[0].clone(), &table, &positions, 48))
    });
    for (name, batch, queries, keys, window) in [
        ("attention 4x256", 4, 256, 256, None),
        ("attention 1x1024", 1, 1024, 1024, None),
        ("attention 1x1024 window 128", 1, 1024, 1024, Some(128)),
        ("attention decode 1 on 256", 1, 1, 256, None),
        ("attention decode 1 on 4096", 1, 1, 4096, None),
    ] {
        let spec = AttentionSpec {
            batch,
            queries,
            keys,
            heads: 6,
            kv_heads: 2,
            head_dim: 48,
            scale: 1.0 / 48f32.sqrt(),
            causal: true,
            offset: keys - queries,
            window,
            softcap: None,
        };
        let seen: usize = (0..queries).map(|query| spec.visible(query).len()).sum();
        let flops = 4.0 * (batch * seen * spec.heads * spec.head_dim) as f64;
        let kv = [batch * keys, 96];
        bench.tracked(name, flops, &[[batch * queries, DIM], kv, kv], &|t| {
            Some(ops::attention(t[0].clone(), t[1].clone(), t[2].clone(), &spec))
        });
    }
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7919 % VOCAB as u32).collect();
    bench.tracked("embedding", 0.0, &[[VOCAB, DIM]], &|t| Some(ops::embedding(t[0].clone(), &ids)));
    bench.tracked("cross_entropy", 0.0, &[[TOKENS, VOCAB]], &|t| {
        Some(ops::cross_entropy(t[0].clone(), &ids, None).reshape([1, 1]))
    });
    let flops = 2.0 * (TOKENS * DIM * VOCAB) as f64;
    for chunk in [128, 256, 512, 1024] {
        let name = format!("linear_cross_entropy by {chunk}");
        bench.tracked(&name, flops, &[[TOKENS, DIM], [VOCAB, DIM]], &|t| {
            let loss = ops::linear_cross_entropy(t[0].clone(), t[1].clone(), &ids, chunk);
            Some(loss.reshape([1, 1]))
        });
    }
    if "adamw".contains(&bench.filter) {
        let count = 15_000_000;
        let (mut p, g) = (vec![0.1f32; count], vec![0.01f32; count]);
        let (mut m, mut v) = (vec![0f32; count], vec![0f32; count]);
        let step =
            AdamwStep { beta1: 0.9, beta2: 0.95, eps: 1e-8, lr: 1e-3, weight_decay: 0.1, step: 3 };
        let time = best(|| adamw(&mut p, &g, &mut m, &mut v, &step));
        let bandwidth = 28.0 * count as f64 / time / 1e9;
        println!("{:28} {:16.3} ms {bandwidth:6.1} GB/s", "adamw 15M", time * 1e3);
    }
}
