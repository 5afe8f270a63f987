//! Every operation of [`crate::ops`] written with burn's own tensor operations.
//!
//! These run wherever burn runs: they are the fallback on devices without fused kernels, and the
//! oracle that the fused kernels are tested against. They keep every intermediate for backward.
use burn::tensor::activation::softmax;
use burn::tensor::{Int, TensorData, s};

use super::{Activation, AttentionSpec, BatchNorm, Conv2d, Moments, RopeTable, Seen};
use crate::{Device, Tensor, host};

/// See [`crate::ops::rms_norm`].
pub fn rms_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, eps: f32) -> Tensor<D> {
    let mean_square = x.clone().powi_scalar(2).mean_dim(D - 1);
    x / (mean_square + eps).sqrt() * gain.unsqueeze()
}

/// See [`crate::ops::layer_norm`].
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    gain: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f32,
) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = centred.clone().powi_scalar(2).mean_dim(D - 1);
    let y = centred / (variance + eps).sqrt() * gain.unsqueeze();
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// See [`crate::ops::activate`].
pub fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    match activation {
        Activation::Relu => burn::tensor::activation::relu(x),
        Activation::Silu => x.clone() * burn::tensor::activation::sigmoid(x),
        Activation::Gelu => x.clone() * ((x * std::f32::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
        Activation::GeluTanh => {
            let cubic = x.clone().powi_scalar(3) * 0.044_715;
            let inner = (x.clone() + cubic) * std::f64::consts::FRAC_2_PI.sqrt();
            x * (inner.tanh() + 1.0) * 0.5
        }
    }
}

/// See [`crate::ops::swiglu`].
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activate(gate, Activation::Silu) * up
}

/// See [`crate::ops::gelu_glu`].
pub fn gelu_glu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activate(gate, Activation::GeluTanh) * up
}

/// See [`crate::ops::linear`].
pub fn linear(x: Tensor<2>, w: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let y = x.matmul(w.transpose());
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// See [`crate::ops::embedding`].
pub fn embedding(w: Tensor<2>, ids: &[u32]) -> Tensor<2> {
    let index = indices(ids, &w.device());
    w.select(0, index)
}

fn indices(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}

/// See [`crate::ops::rope`].
pub fn rope(x: Tensor<2>, table: &RopeTable, positions: &[u32], head_dim: usize) -> Tensor<2> {
    let ([tokens, width], device) = (x.dims(), x.device());
    let (heads, half) = (width / head_dim, table.rotary_dim() / 2);
    let rows = |values: &[f32]| {
        let gathered = positions
            .iter()
            .flat_map(|&p| values[p as usize * half..][..half].iter().copied())
            .collect();
        host::from_vec(gathered, [tokens, 1, half], &device)
    };
    let (cos, sin) = (rows(table.cos()), rows(table.sin()));
    let x = x.reshape([tokens, heads, head_dim]);
    let first = x.clone().narrow(2, 0, half);
    let second = x.clone().narrow(2, half, half);
    let mut parts = vec![
        first.clone() * cos.clone() - second.clone() * sin.clone(),
        second * cos + first * sin,
    ];
    if head_dim > 2 * half {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 2).reshape([tokens, width])
}

/// See [`crate::ops::attention_scores`].
pub fn attention_scores(q: Tensor<2>, k: Tensor<2>, spec: &AttentionSpec) -> Tensor<2> {
    let device = q.device();
    let q = q.reshape([spec.batch, spec.queries, spec.heads, spec.head_dim]).swap_dims(1, 2);
    let scores = q.matmul(spread(k, spec).transpose()) * spec.scale;
    let scores = match spec.softcap {
        Some(cap) => (scores / cap).tanh() * cap,
        None => scores,
    };
    let mut mask = vec![f32::NEG_INFINITY; spec.queries * spec.keys];
    for query in 0..spec.queries {
        mask[query * spec.keys..][spec.visible(query)].fill(0.0);
    }
    let mask = host::from_vec(mask, [spec.queries, spec.keys], &device).unsqueeze::<4>();
    (scores + mask).reshape([spec.batch * spec.heads * spec.queries, spec.keys])
}

/// Keys or values `[batch * keys, kv_heads * head_dim]` as `[batch, heads, keys, head_dim]`.
fn spread(x: Tensor<2>, spec: &AttentionSpec) -> Tensor<4> {
    let group = spec.heads / spec.kv_heads;
    let x = x.reshape([spec.batch, spec.keys, spec.kv_heads, spec.head_dim]).swap_dims(1, 2);
    let shape = [spec.batch, spec.heads, spec.keys, spec.head_dim];
    x.unsqueeze_dim::<5>(2).repeat_dim(2, group).reshape(shape)
}

/// See [`crate::ops::attention_pattern`].
pub fn attention_pattern(scores: Tensor<2>) -> Tensor<2> {
    softmax(scores, 1)
}

/// See [`crate::ops::attention_mix`].
pub fn attention_mix(pattern: Tensor<2>, v: Tensor<2>, spec: &AttentionSpec) -> Tensor<2> {
    let pattern = pattern.reshape([spec.batch, spec.heads, spec.queries, spec.keys]);
    let z = pattern.matmul(spread(v, spec)).swap_dims(1, 2);
    z.reshape([spec.batch * spec.queries, spec.heads * spec.head_dim])
}

/// See [`crate::ops::attention`].
pub fn attention(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, spec: &AttentionSpec) -> Tensor<2> {
    attention_mix(attention_pattern(attention_scores(q, k, spec)), v, spec)
}

/// See [`crate::ops::cross_entropy`].
pub fn cross_entropy(logits: Tensor<2>, targets: &[u32], ignore: Option<u32>) -> Tensor<1> {
    let device = logits.device();
    let counted = targets.iter().filter(|&&t| Some(t) != ignore).count();
    let weight = 1.0 / counted.max(1) as f32;
    let weights: Vec<f32> =
        targets.iter().map(|&t| if Some(t) == ignore { 0.0 } else { -weight }).collect();
    let safe: Vec<u32> = targets.iter().map(|&t| if Some(t) == ignore { 0 } else { t }).collect();
    let index = indices(&safe, &device).unsqueeze_dim::<2>(1);
    let picked = burn::tensor::activation::log_softmax(logits, 1).gather(1, index);
    (picked * host::from_vec(weights, [targets.len(), 1], &device)).sum()
}

/// See [`crate::ops::linear_cross_entropy`]. Holds the logits of all tokens.
pub fn linear_cross_entropy(x: Tensor<2>, w: Tensor<2>, targets: &[u32]) -> Tensor<1> {
    cross_entropy(linear(x, w, None), targets, Some(super::IGNORE))
}

/// Rows of pixels as burn's `[images, channels, height, width]`, and back.
fn planes(x: Tensor<2>, [images, height, width]: [usize; 3]) -> Tensor<4> {
    let channels = x.dims()[1];
    x.reshape([images, height, width, channels]).permute([0, 3, 1, 2])
}

fn pixels(x: Tensor<4>) -> Tensor<2> {
    let [images, channels, height, width] = x.dims();
    x.permute([0, 2, 3, 1]).reshape([images * height * width, channels])
}

/// See [`crate::ops::conv2d`].
pub fn conv2d(x: Tensor<2>, w: Tensor<2>, bias: Option<Tensor<1>>, spec: &Conv2d) -> Tensor<2> {
    let [kh, kw] = spec.kernel;
    let options =
        burn::tensor::ops::ConvOptions::new([spec.stride; 2], [spec.padding; 2], [1, 1], 1);
    let x = planes(x, [spec.images, spec.height, spec.width]);
    let w = w.reshape([spec.filters, spec.channels, kh, kw]);
    pixels(burn::tensor::module::conv2d(x, w, bias, options))
}

/// See [`crate::ops::batch_norm`].
pub fn batch_norm(
    x: Tensor<2>,
    n: BatchNorm,
    residual: Option<Tensor<2>>,
    relu: bool,
) -> (Tensor<2>, Seen) {
    let (mean, variance, seen) = match n.moments {
        Moments::Given { mean, variance } => (mean.unsqueeze(), variance.unsqueeze(), None),
        Moments::Batch => {
            let mean = x.clone().mean_dim(0);
            let variance = (x.clone() - mean.clone()).powi_scalar(2).mean_dim(0);
            let seen = (host::into_vec(mean.clone()), host::into_vec(variance.clone()));
            (mean, variance, Some(seen))
        }
    };
    let mut y = (x - mean) / (variance + n.eps).sqrt() * n.gain.unsqueeze() + n.bias.unsqueeze();
    if let Some(residual) = residual {
        y = y + residual;
    }
    (if relu { activate(y, Activation::Relu) } else { y }, seen)
}

/// See [`crate::ops::subsample`].
pub fn subsample(
    x: Tensor<2>,
    shape: [usize; 3],
    stride: usize,
    before: usize,
    filters: usize,
) -> Tensor<2> {
    let step = stride as isize;
    let planes = planes(x, shape).slice([s![..], s![..], s![..;step], s![..;step]]);
    let kept = pixels(planes);
    let [rows, channels] = kept.dims();
    let zeros = |width| Tensor::zeros([rows, width], &kept.device());
    let (first, last) = (zeros(before), zeros(filters - before - channels));
    let parts = [first, kept, last].into_iter().filter(|part| part.dims()[1] > 0);
    Tensor::cat(parts.collect(), 1)
}

/// See [`crate::ops::mean_pool`].
pub fn mean_pool(x: Tensor<2>, group: usize) -> Tensor<2> {
    let [rows, channels] = x.dims();
    x.reshape([rows / group, group, channels]).mean_dim(1).reshape([rows / group, channels])
}
