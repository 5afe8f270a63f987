//! How near the weight products are to what the memory and the processor give.
//!
//! `cargo run --release -p strata-tensor --example bench_lowbit [seconds per measurement]`
//!
//! For one row the weights have to stream from memory, so GB/s of weights (as stored) are compared
//! with reading and copying; for 64 rows GFLOP/s are compared with a parallel f32 `gemm`. Small
//! matrices fit in the cache, unless several copies take turns, as the layers of a network do.

use half::{bf16, f16};
use std::time::Instant;
use strata_tensor::gram::{TOKEN_BLOCK, gram_add_upper};
use strata_tensor::linalg::{Precision, inverse_cholesky_upper};
use strata_tensor::lowbit::LowBit;
use strata_tensor::rng::Rng;
use strata_tensor::{bandwidth, skinny};

/// Best and median seconds of a call; `f` gets the number of the call.
fn time(budget: f64, mut f: impl FnMut(usize)) -> (f64, f64) {
    f(0);
    let begin = Instant::now();
    let mut seconds = Vec::new();
    while begin.elapsed().as_secs_f64() < budget || seconds.len() < 3 {
        let start = Instant::now();
        f(seconds.len());
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    (seconds[0], seconds[seconds.len() / 2])
}

struct Line<'a> {
    name: &'a str,
    bytes: usize,
    rows: usize,
    shape: [usize; 2],
}

fn print(line: &Line<'_>, (best, median): (f64, f64), memory: &bandwidth::Bandwidth, peak: f64) {
    let [out, inputs] = line.shape;
    let speed = line.bytes as f64 / best / 1e9;
    let flops = 2.0 * (line.rows * out * inputs) as f64 / best / 1e9;
    println!(
        "  {:<6} {:>8.1} us best {:>8.1} us median {:>7.2} GB/s {:>4.0} % of read {:>4.0} % of copy \
         {:>7.1} GFLOP/s {:>4.0} % of gemm",
        line.name,
        best * 1e6,
        median * 1e6,
        speed,
        100.0 * speed / memory.read,
        100.0 * speed / memory.copy,
        flops,
        100.0 * flops / peak
    );
}

/// GFLOP/s of `gemm` on all threads, y = x Wᵀ.
fn gemm_rate(rows: usize, out: usize, inputs: usize, budget: f64) -> f64 {
    let (x, w) = (vec![1.0f32; rows * inputs], vec![1.0f32; out * inputs]);
    let mut y = vec![0.0f32; rows * out];
    let threads = rayon::current_num_threads();
    let (best, _) = time(budget, |_| {
        // SAFETY: the shapes are those of the vectors.
        unsafe {
            gemm::gemm(
                rows,
                out,
                inputs,
                y.as_mut_ptr(),
                1,
                out as isize,
                false,
                x.as_ptr(),
                1,
                inputs as isize,
                w.as_ptr(),
                inputs as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(threads),
            );
        }
    });
    2.0 * (rows * out * inputs) as f64 / best / 1e9
}

fn main() -> strata_tensor::Result<()> {
    let budget = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0.3);
    let memory = bandwidth::measure();
    println!(
        "{} threads: read {:.1} GB/s, copy {:.1} GB/s (read + written)",
        memory.threads, memory.read, memory.copy
    );
    let mut rng = Rng::new(1);
    for [out, inputs] in [[4096, 4096], [768, 2048]] {
        let mut wide = vec![0.0f32; out * inputs];
        rng.fill_normal(&mut wide, 0.02);
        let half: Vec<f16> = wide.iter().map(|&v| f16::from_f32(v)).collect();
        let brain: Vec<bf16> = wide.iter().map(|&v| bf16::from_f32(v)).collect();
        // Enough copies that together they exceed the cache.
        let copies = |bytes: usize| (96usize << 20).div_ceil(bytes).max(1);
        for rows in [1, 4, 16, 64, 512] {
            let peak = gemm_rate(rows, out, inputs, budget);
            println!("{out} x {inputs}, {rows} row(s); gemm gives {peak:.1} GFLOP/s");
            let mut x = vec![0.0f32; rows * inputs];
            rng.fill_normal(&mut x, 1.0);
            let mut y = vec![0.0f32; rows * out];
            let shape = [out, inputs];
            {
                let sets = vec![wide.clone(); copies(wide.len() * 4)];
                let t = time(budget, |i| {
                    let w = &sets[i % sets.len()];
                    skinny::linear_f32(&x, rows, w, out, inputs, None, &mut y);
                });
                print(&Line { name: "f32", bytes: wide.len() * 4, rows, shape }, t, &memory, peak);
                let sets = vec![half.clone(); copies(wide.len() * 2)];
                let t = time(budget, |i| {
                    let w = &sets[i % sets.len()];
                    skinny::linear_f16(&x, rows, w, out, inputs, None, &mut y);
                });
                print(&Line { name: "f16", bytes: wide.len() * 2, rows, shape }, t, &memory, peak);
                let sets = vec![brain.clone(); copies(wide.len() * 2)];
                let t = time(budget, |i| {
                    let w = &sets[i % sets.len()];
                    skinny::linear_bf16(&x, rows, w, out, inputs, None, &mut y);
                });
                print(&Line { name: "bf16", bytes: wide.len() * 2, rows, shape }, t, &memory, peak);
            }
            for bits in [8u8, 6, 5, 4, 3, 2] {
                let groups = out * inputs / 128;
                let codes: Vec<u8> =
                    (0..out * inputs).map(|i| ((i * 7 + i / 128) % (1 << bits)) as u8).collect();
                let (scales, zeros) = (vec![0.0625; groups], vec![2.0; groups]);
                let new = || LowBit::new(bits, out, inputs, 128, &codes, &scales, &zeros, None);
                let first = new()?;
                let bytes = first.bytes();
                let mut sets = vec![first];
                while sets.len() < copies(bytes) {
                    sets.push(new()?);
                }
                let t = time(budget, |i| sets[i % sets.len()].linear(&x, rows, None, &mut y));
                let name = format!("{bits}-bit");
                print(&Line { name: &name, bytes, rows, shape }, t, &memory, peak);
            }
        }
    }
    for n in [288, 1024, 2048, 4096] {
        let tokens = 2 * TOKEN_BLOCK;
        let mut x = vec![0.0f32; tokens * n];
        rng.fill_normal(&mut x, 1.0);
        let mut sum = vec![0.0f64; n * n];
        let (best, _) = time(budget, |_| gram_add_upper(&x, tokens, n, &mut sum, 1.0));
        let rate = (tokens * n * (n + 1)) as f64 / best / 1e9;
        let peak = gemm_rate(n, n, tokens, budget);
        println!(
            "gram {n}: {:.1} ms for {tokens} tokens, {rate:.1} GFLOP/s of the triangle, {:.0} % of gemm's {peak:.1}",
            best * 1e3,
            100.0 * rate / peak
        );
        strata_tensor::gram::mirror_upper(&mut sum, n);
        for precision in [Precision::F64, Precision::F32] {
            let start = Instant::now();
            let found = inverse_cholesky_upper(&sum, n, 0.01, precision)?;
            let seconds = start.elapsed().as_secs_f64();
            let flops = 2.0 / 3.0 * (n as f64).powi(3) / seconds / 1e9;
            println!(
                "inverse Cholesky {n} {precision:?}: {:.1} ms, {flops:.1} GFLOP/s, {} attempt(s)",
                seconds * 1e3,
                found.attempts
            );
        }
    }
    Ok(())
}
