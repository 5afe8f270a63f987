//! Every fused operation against its composed version: values and gradients on odd shapes, each
//! pattern of tracked operands, plain and autodiff devices mixed; and gradients by differences.
#![allow(clippy::unwrap_used)] // Helpers of tests, outside of test functions.

use strata_tensor::ops::{self, Activation, AttentionSpec, IGNORE, RopeTable, composed};
use strata_tensor::{Tensor, device, host};

const TOLERANCE: f32 = 2e-5;

/// Values in (-1, 1), the same on every run.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state =
                state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
            ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        })
        .collect()
}

/// An operand: two dimensions, or one if the first is 0.
#[derive(Clone)]
struct Input {
    shape: [usize; 2],
    values: Vec<f32>,
}

fn input(rows: usize, columns: usize, seed: u64) -> Input {
    Input { shape: [rows, columns], values: values(rows.max(1) * columns, seed) }
}

/// Turns operands `[rows, columns]` into an output; vectors arrive as `[1, columns]`.
type Op<'a> = &'a dyn Fn(&[Tensor<2>]) -> Tensor<2>;

/// The output and the gradients of operands under `sum(output * weights)`.
fn run(op: Op, inputs: &[Input], tracked: &[bool]) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
    let plain = device("cpu").unwrap();
    let autodiff = plain.clone().autodiff();
    let tensors: Vec<Tensor<2>> = inputs
        .iter()
        .zip(tracked)
        .enumerate()
        .map(|(i, (input, &tracked))| {
            let shape = [input.shape[0].max(1), input.shape[1]];
            // Untracked operands alternate between the two kinds of device.
            let device = if tracked || i % 2 == 1 { &autodiff } else { &plain };
            let tensor = host::from_vec(input.values.clone(), shape, device);
            if tracked { tensor.require_grad() } else { tensor }
        })
        .collect();
    let y = op(&tensors);
    let output = host::into_vec(y.clone());
    if !tracked.contains(&true) {
        assert!(!y.is_tracked());
        return (output, vec![None; inputs.len()]);
    }
    assert!(y.is_tracked());
    let weights = host::from_vec(values(output.len(), 99), y.dims(), &plain);
    let grads = (y * weights).sum().backward();
    let gradients = tensors.iter().map(|t| t.grad(&grads).map(host::into_vec)).collect();
    (output, gradients)
}

fn close(what: &str, got: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(got.len(), wanted.len(), "{what}: length");
    let size = wanted.iter().fold(0.1f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(wanted).enumerate() {
        assert!((g - w).abs() <= tolerance * size, "{what}[{i}]: {g} instead of {w}");
    }
}

/// Compares with the composed version for every pattern of tracked operands.
fn check(what: &str, fused: Op, oracle: Op, inputs: &[Input]) {
    for pattern in 0..1u32 << inputs.len() {
        let tracked: Vec<bool> = (0..inputs.len()).map(|i| pattern >> i & 1 == 1).collect();
        let (y, gradients) = run(fused, inputs, &tracked);
        let (wanted, wanted_gradients) = run(oracle, inputs, &tracked);
        close(&format!("{what} {tracked:?}"), &y, &wanted, TOLERANCE);
        for (i, (g, w)) in gradients.iter().zip(&wanted_gradients).enumerate() {
            let what = format!("{what} {tracked:?}, gradient {i}");
            assert_eq!(g.is_some(), tracked[i], "{what}: present");
            if let (Some(g), Some(w)) = (g, w) {
                close(&what, g, w, TOLERANCE);
            }
        }
        let again = run(fused, inputs, &tracked);
        assert_eq!((y, gradients), again, "{what}: two runs differ");
    }
}

/// Checks gradients at a few places against central differences of the fused forward pass.
fn differences(what: &str, op: Op, inputs: &[Input]) {
    let (_, gradients) = run(op, inputs, &vec![true; inputs.len()]);
    let loss = |inputs: &[Input]| -> f64 {
        let (y, _) = run(op, inputs, &vec![false; inputs.len()]);
        let weights = values(y.len(), 99);
        y.iter().zip(weights).map(|(y, w)| f64::from(*y) * f64::from(w)).sum()
    };
    const STEP: f32 = 1e-2;
    for operand in 0..inputs.len() {
        let gradient = gradients[operand].as_ref().unwrap();
        let size = gradient.iter().fold(0.1f32, |m, v| m.max(v.abs()));
        for at in [0, gradient.len() / 3, gradient.len() / 2, gradient.len() - 1] {
            let mut sides = [0.0; 2];
            for (side, sign) in sides.iter_mut().zip([1.0, -1.0]) {
                let mut moved = inputs.to_vec();
                moved[operand].values[at] += sign * STEP;
                *side = loss(&moved);
            }
            let slope = ((sides[0] - sides[1]) / (2.0 * f64::from(STEP))) as f32;
            let got = gradient[at];
            assert!((got - slope).abs() < 5e-3 * size, "{what}, {operand}[{at}]: {got} {slope}");
        }
    }
}

fn vector(t: &Tensor<2>) -> Tensor<1> {
    t.clone().reshape([-1])
}

#[test]
fn norms() {
    for (rows, width) in [(7, 5), (1, 1), (70, 33), (3, 64)] {
        let inputs = [input(rows, width, 1), input(0, width, 2), input(0, width, 3)];
        check(
            "rms_norm",
            &|t| ops::rms_norm(t[0].clone(), vector(&t[1]), 1e-5),
            &|t| composed::rms_norm(t[0].clone(), vector(&t[1]), 1e-5),
            &inputs[..2],
        );
        // One value is its own mean: the quotient of two zeros amplifies rounding, nothing to see.
        if width == 1 {
            continue;
        }
        check(
            "layer_norm",
            &|t| ops::layer_norm(t[0].clone(), vector(&t[1]), None, 1e-5),
            &|t| composed::layer_norm(t[0].clone(), vector(&t[1]), None, 1e-5),
            &inputs[..2],
        );
        let biased: Op =
            &|t| ops::layer_norm(t[0].clone(), vector(&t[1]), Some(vector(&t[2])), 1e-5);
        check(
            "layer_norm with bias",
            biased,
            &|t| composed::layer_norm(t[0].clone(), vector(&t[1]), Some(vector(&t[2])), 1e-5),
            &inputs,
        );
        differences("layer_norm", biased, &inputs);
    }
}

#[test]
fn norms_keep_more_dimensions() {
    let cpu = device("cpu").unwrap();
    let x = host::from_vec(values(30, 1), [2, 3, 5], &cpu);
    let gain = host::from_vec(values(5, 2), [5], &cpu);
    let wanted = host::into_vec(composed::rms_norm(x.clone(), gain.clone(), 1e-5));
    close("rms_norm of [2, 3, 5]", &host::into_vec(ops::rms_norm(x, gain, 1e-5)), &wanted, 1e-6);
}

#[test]
fn activations() {
    let mut wide = input(9, 37, 4);
    wide.values.iter_mut().for_each(|v| *v *= 6.0);
    let up = input(9, 37, 5);
    for activation in [Activation::Relu, Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        let fused: Op = &|t| ops::activate(t[0].clone(), activation);
        let oracle: Op = &|t| composed::activate(t[0].clone(), activation);
        check(&format!("{activation:?}"), fused, oracle, std::slice::from_ref(&wide));
    }
    let gated: Op = &|t| ops::swiglu(t[0].clone(), t[1].clone());
    let both = [wide, up];
    check("swiglu", gated, &|t| composed::swiglu(t[0].clone(), t[1].clone()), &both);
    differences("swiglu", gated, &both);
    let gated: Op = &|t| ops::gelu_glu(t[0].clone(), t[1].clone());
    check("gelu_glu", gated, &|t| composed::gelu_glu(t[0].clone(), t[1].clone()), &both);
}

#[test]
fn linear() {
    for (tokens, inner, outer) in [(7, 5, 3), (1, 37, 19), (16, 33, 50), (130, 70, 129)] {
        let inputs = [input(tokens, inner, 1), input(outer, inner, 2), input(0, outer, 3)];
        let what = format!("linear {tokens}x{inner}x{outer}");
        check(
            &what,
            &|t| ops::linear(t[0].clone(), t[1].clone(), None),
            &|t| composed::linear(t[0].clone(), t[1].clone(), None),
            &inputs[..2],
        );
        check(
            &what,
            &|t| ops::linear(t[0].clone(), t[1].clone(), Some(vector(&t[2]))),
            &|t| composed::linear(t[0].clone(), t[1].clone(), Some(vector(&t[2]))),
            &inputs,
        );
        // A transposed view as the weight.
        let turned = [inputs[0].clone(), input(inner, outer, 4)];
        check(
            &what,
            &|t| ops::linear(t[0].clone(), t[1].clone().transpose(), None),
            &|t| composed::linear(t[0].clone(), t[1].clone().transpose(), None),
            &turned,
        );
    }
}

#[test]
fn embedding_adds_up_repeated_ids() {
    let ids = [3, 0, 3, 36, 3, 1];
    check(
        "embedding",
        &|t| ops::embedding(t[0].clone(), &ids),
        &|t| composed::embedding(t[0].clone(), &ids),
        &[input(37, 5, 1)],
    );
}

#[test]
fn rope() {
    for (heads, head_dim, rotary_dim) in [(3, 6, 6), (2, 10, 4), (1, 5, 2)] {
        let table = RopeTable::from_base(100.0, rotary_dim, 40);
        let positions = [0, 1, 39, 5, 5, 17, 2];
        let fused: Op = &|t| ops::rope(t[0].clone(), &table, &positions, head_dim);
        let inputs = [input(7, heads * head_dim, 1)];
        let oracle: Op = &|t| composed::rope(t[0].clone(), &table, &positions, head_dim);
        check("rope", fused, oracle, &inputs);
        differences("rope", fused, &inputs);
    }
}

fn spec(batch: usize, queries: usize, keys: usize, heads: [usize; 3]) -> AttentionSpec {
    AttentionSpec {
        batch,
        queries,
        keys,
        heads: heads[0],
        kv_heads: heads[1],
        head_dim: heads[2],
        scale: 0.7,
        causal: true,
        offset: keys - queries,
        window: None,
        softcap: None,
    }
}

fn attention_inputs(spec: &AttentionSpec) -> [Input; 3] {
    let mut q = input(spec.batch * spec.queries, spec.heads * spec.head_dim, 1);
    q.values.iter_mut().for_each(|v| *v *= 4.0);
    let width = spec.kv_heads * spec.head_dim;
    [q, input(spec.batch * spec.keys, width, 2), input(spec.batch * spec.keys, width, 3)]
}

#[test]
fn attention() {
    let base = spec(2, 7, 7, [3, 1, 5]);
    let specs = [
        base.clone(),
        AttentionSpec { window: Some(3), ..base.clone() },
        AttentionSpec { softcap: Some(1.5), ..base.clone() },
        AttentionSpec { causal: false, ..base.clone() },
        AttentionSpec { causal: false, window: Some(4), ..base },
        spec(1, 3, 11, [4, 2, 8]),
        spec(1, 150, 150, [2, 2, 3]),
        AttentionSpec { window: Some(20), softcap: Some(2.0), ..spec(1, 130, 140, [2, 1, 4]) },
        spec(3, 1, 9, [6, 2, 5]),
        AttentionSpec { window: Some(2), softcap: Some(1.0), ..spec(2, 1, 9, [4, 4, 16]) },
        spec(2, 1, 700, [6, 2, 48]),
    ];
    for spec in specs {
        let inputs = attention_inputs(&spec);
        let fused: Op = &|t| ops::attention(t[0].clone(), t[1].clone(), t[2].clone(), &spec);
        let oracle: Op = &|t| composed::attention(t[0].clone(), t[1].clone(), t[2].clone(), &spec);
        check(&format!("{spec:?}"), fused, oracle, &inputs);
        let parts: Op =
            &|t| ops::attention_parts(t[0].clone(), t[1].clone(), t[2].clone(), &spec).z;
        check("attention_parts", parts, oracle, &inputs);
    }
}

/// The column sums of the pattern, blocks of queries against the whole pattern; every row of a
/// pattern sums to 1.
#[test]
fn attention_received_is_the_column_sum() {
    let base = spec(2, 7, 7, [3, 1, 5]);
    let specs = [
        base.clone(),
        AttentionSpec { window: Some(3), ..base.clone() },
        AttentionSpec { softcap: Some(1.5), causal: false, ..base },
        AttentionSpec { window: Some(70), softcap: Some(2.0), ..spec(2, 200, 210, [4, 2, 8]) },
        spec(3, 150, 150, [2, 2, 3]),
    ];
    for spec in specs {
        let [q, k, _] = attention_inputs(&spec)
            .map(|input| host::from_vec(input.values, input.shape, &device("cpu").unwrap()));
        let received = ops::attention_received(&q, &k, &spec);
        let pattern = ops::attention_pattern(ops::attention_scores(q, k, &spec));
        let pattern = host::into_vec(pattern);
        let per_sequence = spec.heads * spec.queries;
        for (sequence, sums) in received.chunks(spec.keys).enumerate() {
            let rows = &pattern[sequence * per_sequence * spec.keys..][..per_sequence * spec.keys];
            for (key, &sum) in sums.iter().enumerate() {
                let wanted: f64 =
                    rows.iter().skip(key).step_by(spec.keys).map(|&p| f64::from(p)).sum();
                assert!((sum - wanted).abs() < 1e-4, "{spec:?} {sequence} {key}: {sum} {wanted}");
            }
            let total: f64 = sums.iter().sum();
            assert!((total - per_sequence as f64).abs() < 1e-3, "{total}");
        }
    }
}

#[test]
fn attention_by_differences() {
    let spec = AttentionSpec { window: Some(3), softcap: Some(2.0), ..spec(1, 7, 7, [3, 1, 5]) };
    let fused: Op = &|t| ops::attention(t[0].clone(), t[1].clone(), t[2].clone(), &spec);
    differences("attention", fused, &attention_inputs(&spec));
}

#[test]
fn attention_rows_without_keys_are_zero() {
    // Without a causal mask queries may lie behind the window of every key.
    let spec =
        AttentionSpec { causal: false, window: Some(2), offset: 0, ..spec(1, 6, 6, [1, 1, 2]) };
    let spec = AttentionSpec { keys: 3, ..spec };
    let cpu = device("cpu").unwrap().autodiff();
    let make =
        |rows: usize, seed| host::from_vec(values(rows * 2, seed), [rows, 2], &cpu).require_grad();
    let (q, k, v) = (make(6, 1), make(3, 2), make(3, 3));
    let y = ops::attention(q.clone(), k.clone(), v.clone(), &spec);
    assert_eq!(host::into_vec(y.clone())[8..], [0.0; 4]);
    let grads = y.sum().backward();
    assert_eq!(host::into_vec(q.grad(&grads).unwrap())[8..], [0.0; 4]);
    for gradient in [k.grad(&grads), v.grad(&grads)] {
        assert!(host::into_vec(gradient.unwrap()).iter().all(|g| g.is_finite()));
    }
}

#[test]
fn losses() {
    let (tokens, vocab, width) = (9, 37, 5);
    let targets = [4, IGNORE, 0, 36, 7, 7, IGNORE, 1, 12];
    let one = |t: Tensor<1>| t.reshape([1, 1]);
    check(
        "cross_entropy",
        &|t| one(ops::cross_entropy(t[0].clone(), &targets, Some(IGNORE))),
        &|t| one(composed::cross_entropy(t[0].clone(), &targets, Some(IGNORE))),
        &[input(tokens, vocab, 1)],
    );
    let inputs = [input(tokens, width, 1), input(vocab, width, 2)];
    for chunk in [0, 1, 4, 9, 100] {
        check(
            "linear_cross_entropy",
            &|t| one(ops::linear_cross_entropy(t[0].clone(), t[1].clone(), &targets, chunk)),
            &|t| one(composed::linear_cross_entropy(t[0].clone(), t[1].clone(), &targets)),
            &inputs,
        );
    }
    let all = [IGNORE; 9];
    let op: Op = &|t| one(ops::linear_cross_entropy(t[0].clone(), t[1].clone(), &all, 4));
    let (loss, gradients) = run(op, &inputs, &[true, true]);
    assert_eq!(loss, [0.0]);
    assert!(gradients.iter().flatten().flatten().all(|&g| g == 0.0));
}

#[test]
fn logits_that_others_hold_survive_the_loss() {
    let device = device("cpu").unwrap().autodiff();
    let logits = host::from_vec(values(10, 1), [2, 5], &device).require_grad();
    let before = host::read(&logits, <[f32]>::to_vec);
    let grads = ops::cross_entropy(logits.clone(), &[1, 2], None).backward();
    assert_eq!(host::read(&logits, <[f32]>::to_vec), before);
    assert!(logits.grad(&grads).is_some());
}

#[test]
fn frozen_tensors_get_no_gradient() {
    let device = device("cpu").unwrap().autodiff();
    let make =
        |shape: [usize; 2], seed| host::from_vec(values(shape[0] * shape[1], seed), shape, &device);
    let embedding = make([11, 6], 1);
    let frozen = make([8, 6], 2);
    let trained = make([8, 6], 3).require_grad();
    let head = make([11, 8], 4);
    let x = ops::embedding(embedding.clone(), &[1, 5, 9]);
    assert!(!x.is_tracked(), "nothing below is trained");
    let gate = ops::linear(x.clone(), trained.clone(), None);
    let up = ops::linear(x.clone(), frozen.clone(), None);
    assert!(gate.is_tracked() && !up.is_tracked());
    let loss = ops::linear_cross_entropy(ops::swiglu(gate, up), head.clone(), &[5, 9, 2], 2);
    let grads = loss.backward();
    assert!(trained.grad(&grads).is_some());
    for tensor in [embedding, frozen, head, x] {
        assert!(tensor.grad(&grads).is_none());
    }
}

#[test]
fn one_tensor_used_twice_gets_the_sum() {
    // A tied embedding: its rows go in, and it is the head.
    let targets = [5, 9, 2];
    let tied: Op = &|t| {
        let x = ops::embedding(t[0].clone(), &[1, 5, 9]);
        ops::linear_cross_entropy(x, t[0].clone(), &targets, 2).reshape([1, 1])
    };
    let oracle: Op = &|t| {
        let x = composed::embedding(t[0].clone(), &[1, 5, 9]);
        composed::linear_cross_entropy(x, t[0].clone(), &targets).reshape([1, 1])
    };
    check("tied", tied, oracle, &[input(11, 6, 1)]);
}
