//! Operations of image networks against burn's own, forward and backward, and by hand.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used)]
use strata_tensor::ops::{self, BatchNorm, Conv2d, Moments, composed};
use strata_tensor::{Device, Rng, Tensor, device, host};

fn random<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    let mut values = vec![0.0; shape.iter().product()];
    Rng::stream(seed, "conv").fill_normal(&mut values, 1.0);
    host::from_vec(values, shape, device)
}

fn close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let scale = b.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "{what}: value {i} is {a}, wanted {b}");
    }
}

/// Values and gradients of `f` at `inputs`, under a loss that weighs every output differently.
fn gradients(
    inputs: &[Tensor<2>],
    vectors: &[Tensor<1>],
    f: impl Fn(&[Tensor<2>], &[Tensor<1>]) -> Tensor<2>,
) -> Vec<Vec<f32>> {
    let tape = device("cpu").unwrap().autodiff();
    let leaf = |t: &Tensor<2>| t.clone().autodiff().require_grad();
    let inputs: Vec<Tensor<2>> = inputs.iter().map(leaf).collect();
    let vectors: Vec<Tensor<1>> =
        vectors.iter().map(|t| t.clone().autodiff().require_grad()).collect();
    let y = f(&inputs, &vectors);
    let weights = random(99, y.dims(), &tape);
    let grads = (y.clone() * weights).sum().backward();
    let mut all = vec![host::into_vec(y)];
    all.extend(inputs.iter().map(|t| host::into_vec(t.grad(&grads).unwrap())));
    all.extend(vectors.iter().map(|t| host::into_vec(t.grad(&grads).unwrap())));
    all
}

const CASES: [Conv2d; 6] = {
    const fn case(
        images: usize,
        [height, width]: [usize; 2],
        [channels, filters]: [usize; 2],
        kernel: [usize; 2],
        stride: usize,
        padding: usize,
    ) -> Conv2d {
        Conv2d { images, height, width, channels, filters, kernel, stride, padding }
    }
    [
        case(3, [8, 8], [16, 16], [3, 3], 1, 1),
        case(2, [9, 7], [5, 33], [3, 3], 2, 1),
        case(17, [6, 6], [3, 16], [3, 3], 1, 1),
        case(2, [8, 8], [16, 32], [1, 1], 2, 0),
        case(1, [12, 8], [2, 20], [4, 4], 4, 0),
        case(2, [5, 11], [4, 8], [2, 5], 1, 1),
    ]
};

#[test]
fn convolution_by_hand() {
    // One 3 x 3 image, one 2 x 2 kernel that takes the diagonal.
    let cpu = device("cpu").unwrap();
    let x = host::from_vec((1..=9).map(|v| v as f32).collect(), [9, 1], &cpu);
    let w = host::from_vec(vec![1.0, 0.0, 0.0, 10.0], [1, 4], &cpu);
    let bias = host::from_vec(vec![0.5], [1], &cpu);
    let spec = Conv2d {
        images: 1,
        height: 3,
        width: 3,
        channels: 1,
        filters: 1,
        kernel: [2, 2],
        stride: 1,
        padding: 0,
    };
    let y = ops::conv2d(x.clone(), w.clone(), Some(bias), &spec);
    assert_eq!(host::into_vec(y), [51.5, 62.5, 84.5, 95.5]);
    // With padding 1 and stride 2 the windows start at (-1, -1), (-1, 1), (1, -1), (1, 1).
    let padded = Conv2d { stride: 2, padding: 1, ..spec };
    assert_eq!(host::into_vec(ops::conv2d(x, w, None, &padded)), [10.0, 30.0, 70.0, 95.0]);
}

#[test]
fn convolution_agrees_with_burn() {
    let cpu = device("cpu").unwrap();
    for (i, spec) in CASES.iter().enumerate() {
        let x = random(1, [spec.images * spec.height * spec.width, spec.channels], &cpu);
        let w = random(2, [spec.filters, spec.channels * spec.kernel[0] * spec.kernel[1]], &cpu);
        let bias = random(3, [spec.filters], &cpu);
        let own = gradients(&[x.clone(), w.clone()], std::slice::from_ref(&bias), |m, v| {
            ops::conv2d(m[0].clone(), m[1].clone(), Some(v[0].clone()), spec)
        });
        let burn = gradients(&[x.clone(), w.clone()], std::slice::from_ref(&bias), |m, v| {
            composed::conv2d(m[0].clone(), m[1].clone(), Some(v[0].clone()), spec)
        });
        for (what, (own, burn)) in ["y", "dx", "dw", "dbias"].iter().zip(own.iter().zip(&burn)) {
            close(own, burn, 2e-6, &format!("case {i}: {what}"));
        }
        let plain = host::into_vec(ops::conv2d(x, w, Some(bias), spec));
        assert_eq!(plain, own[0], "case {i}: recording changes nothing");
    }
}

#[test]
fn only_wanted_gradients_flow() {
    let cpu = device("cpu").unwrap();
    let spec = CASES[0];
    let x = random(1, [spec.images * 64, 16], &cpu);
    let w = random(2, [16, 144], &cpu).autodiff().require_grad();
    let grads = ops::conv2d(x, w.clone(), None, &spec).sum().backward();
    assert!(w.grad(&grads).is_some());
}

fn norm(v: &[Tensor<1>], moments: Moments) -> BatchNorm {
    BatchNorm { gain: v[0].clone(), bias: v[1].clone(), moments, eps: 1e-5 }
}

#[test]
fn batch_norm_by_hand() {
    // Columns 1, 3 and 2, 2: means 2 and 2, variances 1 and 0.
    let cpu = device("cpu").unwrap();
    let x = host::from_vec(vec![1.0, 2.0, 3.0, 2.0], [2, 2], &cpu);
    let vectors = [vec![2.0, 2.0], vec![0.5, -0.5]].map(|v| host::from_vec(v, [2], &cpu));
    let exact = BatchNorm { eps: 0.0, ..norm(&vectors, Moments::Batch) };
    let shifted = BatchNorm { eps: 1.0, ..exact.clone() };
    let (y, seen) = ops::batch_norm(x.clone(), shifted, None, true);
    assert_eq!(seen, Some((vec![2.0, 2.0], vec![1.0, 0.0])));
    let root = 2f32.sqrt();
    close(&host::into_vec(y), &[0.0, 0.0, 0.5 + root, 0.0], 1e-6, "cut at 0");
    let given = Moments::Given {
        mean: host::from_vec(vec![0.0, 1.0], [2], &cpu),
        variance: host::from_vec(vec![4.0, 1.0], [2], &cpu),
    };
    let (y, seen) =
        ops::batch_norm(x.clone(), BatchNorm { moments: given, ..exact }, Some(x), false);
    assert!(seen.is_none());
    assert_eq!(host::into_vec(y), [2.5, 3.5, 6.5, 3.5]);
}

#[test]
fn batch_norm_agrees_with_burn() {
    let cpu = device("cpu").unwrap();
    let x = random(1, [1100, 19], &cpu) * 3.0 + 2.0;
    let residual = random(2, [1100, 19], &cpu);
    let vectors = [random(3, [19], &cpu), random(4, [19], &cpu)];
    for (given, with_residual, relu) in
        [(true, true, true), (true, false, false), (false, true, true), (false, false, true)]
    {
        let moments = || match given {
            true => Moments::Given {
                mean: random(5, [19], &cpu),
                variance: random(6, [19], &cpu).powi_scalar(2) + 0.3,
            },
            false => Moments::Batch,
        };
        let inputs =
            if with_residual { vec![x.clone(), residual.clone()] } else { vec![x.clone()] };
        let own = gradients(&inputs, &vectors, |m, v| {
            ops::batch_norm(m[0].clone(), norm(v, moments()), m.get(1).cloned(), relu).0
        });
        let burn = gradients(&inputs, &vectors, |m, v| {
            composed::batch_norm(m[0].clone(), norm(v, moments()), m.get(1).cloned(), relu).0
        });
        for (i, (own, burn)) in own.iter().zip(&burn).enumerate() {
            close(own, burn, 2e-5, &format!("given {given}, relu {relu}: output or gradient {i}"));
        }
        let seen = |(_, seen)| seen;
        let own = seen(ops::batch_norm(x.clone(), norm(&vectors, moments()), None, relu));
        let burn = seen(composed::batch_norm(x.clone(), norm(&vectors, moments()), None, relu));
        assert_eq!(own.is_some(), !given);
        if let (Some((mean, variance)), Some((mean2, variance2))) = (own, burn) {
            close(&mean, &mean2, 1e-5, "mean");
            close(&variance, &variance2, 1e-5, "variance");
        }
    }
}

#[test]
fn a_norm_in_the_weights_changes_nothing() {
    let cpu = device("cpu").unwrap();
    for (i, spec) in CASES.iter().enumerate() {
        let x = random(1, [spec.images * spec.height * spec.width, spec.channels], &cpu);
        let w = random(2, [spec.filters, spec.channels * spec.kernel[0] * spec.kernel[1]], &cpu);
        let vectors = [random(3, [spec.filters], &cpu), random(4, [spec.filters], &cpu)];
        let moments = Moments::Given {
            mean: random(5, [spec.filters], &cpu),
            variance: random(6, [spec.filters], &cpu).powi_scalar(2) + 0.3,
        };
        let residual = random(7, [spec.out_rows(), spec.filters], &cpu);
        let n = norm(&vectors, moments);
        let (fused, _) =
            ops::conv2d_norm(x.clone(), w.clone(), spec, n.clone(), Some(residual.clone()), true);
        let y = ops::conv2d(x, w, None, spec);
        let (apart, _) = ops::batch_norm(y, n, Some(residual), true);
        close(&host::into_vec(fused), &host::into_vec(apart), 5e-6, &format!("case {i}"));
    }
}

#[test]
fn shortcuts_and_pooling() {
    let cpu = device("cpu").unwrap();
    let x = random(1, [2 * 5 * 4, 3], &cpu);
    let own = gradients(std::slice::from_ref(&x), &[], |m, _| {
        ops::subsample(m[0].clone(), [2, 5, 4], 2, 1, 6)
    });
    let burn = gradients(std::slice::from_ref(&x), &[], |m, _| {
        composed::subsample(m[0].clone(), [2, 5, 4], 2, 1, 6)
    });
    assert_eq!(own, burn);
    // Pixel (4, 2) of image 1 is row 11 of the result: 0, its three channels, 0, 0.
    let values = host::into_vec(x.clone());
    let from = (20 + 4 * 4 + 2) * 3;
    assert_eq!(
        own[0][11 * 6..][..6],
        [0.0, values[from], values[from + 1], values[from + 2], 0., 0.]
    );
    let own = gradients(std::slice::from_ref(&x), &[], |m, _| ops::mean_pool(m[0].clone(), 20));
    let burn = gradients(&[x], &[], |m, _| composed::mean_pool(m[0].clone(), 20));
    for (own, burn) in own.iter().zip(&burn) {
        close(own, burn, 1e-6, "pooling");
    }
}

#[test]
#[should_panic(expected = "the kernel does not fit")]
fn a_kernel_larger_than_the_image_is_refused() {
    let cpu = device("cpu").unwrap();
    let spec = Conv2d { kernel: [9, 9], padding: 0, ..CASES[0] };
    let _ = ops::conv2d(random(1, [3 * 64, 16], &cpu), random(2, [16, 16 * 81], &cpu), None, &spec);
}
