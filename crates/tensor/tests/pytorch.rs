//! Values and gradients against PyTorch (2.x, float64). Inputs follow one exact sequence, so that
//! the numbers can be computed again: value `i` is `((37 i + shift) mod 23 - 11) / 8`; every result
//! is weighted by such a sequence and summed before differentiating.
#![allow(clippy::unwrap_used)] // Helpers of tests, outside of test functions.

use strata_tensor::ops::{self, Activation, AttentionSpec, RopeTable};
use strata_tensor::{Device, Tensor, device, host};

fn cpu() -> Device {
    device("cpu").unwrap().autodiff()
}

fn sequence(count: usize, shift: usize) -> Vec<f32> {
    (0..count).map(|i| (((i * 37 + shift) % 23) as f32 - 11.0) / 8.0).collect()
}

fn leaf<const D: usize>(shape: [usize; D], shift: usize) -> Tensor<D> {
    host::from_vec(sequence(shape.iter().product(), shift), shape, &cpu()).require_grad()
}

fn close(what: &str, got: Vec<f32>, wanted: &[f64]) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (got, wanted) in got.iter().zip(wanted) {
        let error = (f64::from(*got) - wanted).abs();
        assert!(error < 1e-6 * wanted.abs().max(0.5), "{what}: {got} instead of {wanted}");
    }
}

#[test]
fn activations() {
    let cases: [(Activation, [f64; 6], [f64; 6]); 3] = [
        (
            Activation::Gelu,
            [-0.116277868, 0.242313663, -0.169970514, 0.841344746, -0.0562827219, -0.132062217],
            [0.096432107, 0.785615427, -9.67847826e-05, -1.35414434, 0.200391032, 0.0766634894],
        ),
        (
            Activation::GeluTanh,
            [-0.116511447, 0.242307767, -0.170039445, 0.841191991, -0.0562828014, -0.132285797],
            [0.0964452391, 0.785555692, -0.000132717983, -1.3537051, 0.200392297, 0.0765578952],
        ),
        (
            Activation::Silu,
            [-0.277493181, 0.222249975, -0.240615976, 0.731058579, -0.0585988283, -0.278375174],
            [0.0147586241, 0.683196438, -0.0196750069, -1.15958814, 0.21883119, -0.00394947193],
        ),
    ];
    for (activation, value, slope) in cases {
        let x = leaf([1, 6], 0);
        let y = ops::activate(x.clone(), activation);
        close("value", host::into_vec(y.clone()), &value);
        let grads = (y * host::from_vec(sequence(6, 5), [1, 6], &cpu())).sum().backward();
        close("slope", host::into_vec(x.grad(&grads).unwrap()), &slope);
    }
}

#[test]
fn rms_norm() {
    let (x, gain) = (leaf([2, 5], 0), leaf([5], 3));
    let y = ops::rms_norm(x.clone(), gain.clone(), 1e-5);
    let wanted = [
        1.61833598,
        0.331023268,
        0.331023268,
        1.61833598,
        -0.0367803631,
        1.50073975,
        0.450221924,
        0.281388703,
        1.85716544,
        0.0,
    ];
    close("rms_norm", host::into_vec(y.clone()), &wanted);
    let grads = (y * host::from_vec(sequence(10, 7), [2, 5], &cpu())).sum().backward();
    let wanted = [
        -0.173382587,
        1.31119318,
        -0.470735125,
        -1.06424987,
        0.151421416,
        -0.0897323977,
        1.45409202,
        -0.382532642,
        -0.958503117,
        0.262629456,
    ];
    close("dx", host::into_vec(x.grad(&grads).unwrap()), &wanted);
    let wanted = [1.37194539, 1.37711231, -0.297933558, -2.35880417, -0.110341089];
    close("dgain", host::into_vec(gain.grad(&grads).unwrap()), &wanted);
}

#[test]
fn layer_norm() {
    let (x, gain, bias) = (leaf([2, 5], 0), leaf([5], 3), leaf([5], 9));
    let y = ops::layer_norm(x.clone(), gain.clone(), Some(bias.clone()), 1e-5);
    let row = [1.19331303, -0.878861146, 0.63434531, 1.19321051, 1.01503451];
    close("layer_norm", host::into_vec(y.clone()), &[row, row].concat());
    let grads = (y * host::from_vec(sequence(10, 7), [2, 5], &cpu())).sum().backward();
    let wanted = [
        -0.142212887,
        1.39714459,
        -0.438133588,
        -1.02240075,
        0.205602633,
        -0.142215497,
        1.39714579,
        -0.438134838,
        -1.02239819,
        0.205602741,
    ];
    close("dx", host::into_vec(x.grad(&grads).unwrap()), &wanted);
    let wanted = [1.2628989, 1.73648599, -0.25934531, -2.64983252, 0.0977243198];
    close("dgain", host::into_vec(gain.grad(&grads).unwrap()), &wanted);
    let wanted = [-0.875, 2.625, 0.375, -1.875, 1.625];
    close("dbias", host::into_vec(bias.grad(&grads).unwrap()), &wanted);
}

#[test]
fn attention() {
    let spec = AttentionSpec {
        batch: 1,
        queries: 3,
        keys: 3,
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        scale: 0.5,
        causal: true,
        offset: 0,
        window: None,
        softcap: None,
    };
    let (q, k, v) = (leaf([3, 4], 0), leaf([3, 2], 4), leaf([3, 2], 8));
    let y = ops::attention(q.clone(), k.clone(), v.clone(), &spec);
    let wanted = [
        -0.375,
        1.375,
        -0.375,
        1.375,
        0.123078357,
        -0.418082087,
        0.0640812859,
        -0.205692629,
        0.393545507,
        -0.0841276412,
        -0.0165509968,
        0.604875096,
    ];
    close("attention", host::into_vec(y.clone()), &wanted);
    let grads = (y * host::from_vec(sequence(12, 2), [3, 4], &cpu())).sum().backward();
    let wanted = [
        0.0,
        0.0,
        0.0,
        0.0,
        0.11774152,
        -0.423869471,
        0.0857150995,
        -0.308574358,
        0.136886897,
        -0.0870778884,
        -0.273877053,
        0.588422724,
    ];
    close("dq", host::into_vec(q.grad(&grads).unwrap()), &wanted);
    let wanted = [-0.470083822, 0.508654612, 0.155768758, -0.422234032, 0.314315064, -0.0864205796];
    close("dk", host::into_vec(k.grad(&grads).unwrap()), &wanted);
    let wanted = [-1.5984431, 2.14818442, 0.881401467, -0.795241503, 0.467041629, 0.272057084];
    close("dv", host::into_vec(v.grad(&grads).unwrap()), &wanted);
}

#[test]
fn cross_entropy() {
    let logits = leaf([3, 5], 0);
    let loss = ops::cross_entropy(logits.clone(), &[4, ops::IGNORE, 1], Some(ops::IGNORE));
    close("loss", host::into_vec(loss.clone()), &[1.62957258]);
    let grads = loss.backward();
    let wanted = [
        0.0218682436,
        0.125843053,
        0.0408552577,
        0.235105775,
        -0.42367233,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0218682436,
        -0.374156947,
        0.0408552577,
        0.235105775,
        0.0763276701,
    ];
    close("dlogits", host::into_vec(logits.grad(&grads).unwrap()), &wanted);
}

#[test]
fn attention_with_window_and_softcap() {
    let spec = AttentionSpec {
        batch: 1,
        queries: 4,
        keys: 4,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
        scale: 0.5,
        causal: true,
        offset: 0,
        window: Some(2),
        softcap: Some(1.5),
    };
    let (q, k, v) = (leaf([4, 2], 0), leaf([4, 2], 4), leaf([4, 2], 8));
    let y = ops::attention(q.clone(), k.clone(), v.clone(), &spec);
    let wanted = [
        -0.375,
        1.375,
        -0.237961214,
        0.881660369,
        0.50761402,
        -0.61738598,
        -0.228935206,
        0.0566486684,
    ];
    close("attention", host::into_vec(y.clone()), &wanted);
    let grads = (y * host::from_vec(sequence(8, 2), [4, 2], &cpu())).sum().backward();
    let wanted = [
        0.0,
        0.0,
        -0.124887205,
        0.497966588,
        -0.0347730022,
        -0.0204248796,
        -0.145567245,
        -0.142830606,
    ];
    close("dq", host::into_vec(q.grad(&grads).unwrap()), &wanted);
    let wanted = [
        -0.156243457,
        0.20832461,
        0.166192425,
        -0.289567901,
        0.122100037,
        -0.0672117297,
        -0.115724026,
        0.144655032,
    ];
    close("dk", host::into_vec(k.grad(&grads).unwrap()), &wanted);
    let wanted = [
        -1.51536897,
        1.60092243,
        -0.036153833,
        -0.313739996,
        0.433544402,
        -0.603193231,
        0.367978402,
        -0.183989201,
    ];
    close("dv", host::into_vec(v.grad(&grads).unwrap()), &wanted);
}

/// Against `apply_rotary_pos_emb` of the Hugging Face Llama.
#[test]
fn rope() {
    let table = RopeTable::from_base(100.0, 4, 4);
    let y = ops::rope(leaf([2, 4], 0), &table, &[3, 1], 4);
    let wanted = [
        1.46707969,
        0.0627309768,
        0.548454361,
        1.06615657,
        -0.488273281,
        -1.18135932,
        0.16496728,
        -0.746669374,
    ];
    close("rope", host::into_vec(y), &wanted);
}
