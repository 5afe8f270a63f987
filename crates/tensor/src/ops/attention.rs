//! Attention, fused; and in pieces for whoever reads or edits scores and patterns.
use super::record::{Buffer, Call, Operand};
use super::{AttentionSpec, composed};
use crate::Tensor;
use crate::host;
use crate::kernels::attention::{forward, received};
use crate::kernels::attention_backward::{Forward, backward};

/// `softmax(scale * q kᵀ) v` per head on rows of heads: `q [batch * queries, heads * head_dim]`,
/// `k` and `v` `[batch * keys, kv_heads * head_dim]`, result like `q`. Blocks of queries, no
/// pattern kept (Dao et al. 2022); masks, window and softcap as the spec says.
///
/// # Panics
/// If the spec does not fit the shapes.
pub fn attention(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, spec: &AttentionSpec) -> Tensor<2> {
    spec.check(q.dims(), k.dims(), v.dims());
    let (Some(q_in), Some(k_in), Some(v_in)) = (Operand::of(&q), Operand::of(&k), Operand::of(&v))
    else {
        return composed::attention(q, k, v, spec);
    };
    let (q_shape, k_shape) = (q.dims(), k.dims());
    drop((q, k, v));
    let (out, lse) = forward(&q_in.data, &k_in.data, &v_in.data, spec);
    let out = Buffer::new(out, &q_shape);
    let call = Call::new([&q_in, &k_in, &v_in]);
    let (q, k, v, kept, spec) = (q_in.data, k_in.data, v_in.data, out.clone(), spec.clone());
    call.finish("attention", out, move |dout, wanted| {
        let pass = Forward { q: &q, k: &k, v: &v, out: &kept, lse: &lse };
        let [dq, dk, dv] = backward(pass, &dout, &spec, wanted);
        [
            dq.map(|dq| Buffer::new(dq, &q_shape)),
            dk.map(|dk| Buffer::new(dk, &k_shape)),
            dv.map(|dv| Buffer::new(dv, &k_shape)),
        ]
    })
}

/// Attention in pieces; see [`attention_parts`].
#[derive(Clone, Debug)]
pub struct AttentionParts {
    /// `[batch * heads * queries, keys]`, scaled, softcapped, -inf where masked.
    pub scores: Tensor<2>,
    /// Softmax of the scores over the keys.
    pub pattern: Tensor<2>,
    /// The weighted values `[batch * queries, heads * head_dim]`: what [`attention`] returns.
    pub z: Tensor<2>,
}

/// All pieces of an attention. To edit one, call [`attention_scores`], [`attention_pattern`] and
/// [`attention_mix`] in turn.
///
/// # Panics
/// If the spec does not fit the shapes.
pub fn attention_parts(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    spec: &AttentionSpec,
) -> AttentionParts {
    spec.check(q.dims(), k.dims(), v.dims());
    let scores = attention_scores(q, k, spec);
    let pattern = attention_pattern(scores.clone());
    let z = attention_mix(pattern.clone(), v, spec);
    AttentionParts { scores, pattern, z }
}

/// Scores `[batch * heads * queries, keys]`: scaled, softcapped, -inf where masked.
///
/// # Panics
/// If the spec does not fit the shapes.
pub fn attention_scores(q: Tensor<2>, k: Tensor<2>, spec: &AttentionSpec) -> Tensor<2> {
    spec.check(q.dims(), k.dims(), k.dims());
    composed::attention_scores(q, k, spec)
}

/// Softmax over the keys of scores `[batch * heads * queries, keys]`.
pub fn attention_pattern(scores: Tensor<2>) -> Tensor<2> {
    composed::attention_pattern(scores)
}

/// Attention that every key receives from all heads and queries, `[batch * keys]`: the column sums
/// of the pattern, accumulated over blocks of queries (the pattern itself is never kept). Records
/// no backward step.
///
/// # Panics
/// If the spec does not fit the shapes.
pub fn attention_received(q: &Tensor<2>, k: &Tensor<2>, spec: &AttentionSpec) -> Vec<f64> {
    spec.check(q.dims(), k.dims(), k.dims());
    host::read(q, |q| host::read(k, |k| received(q, k, spec)))
}

/// Values weighted by a pattern, `[batch * queries, heads * head_dim]`.
pub fn attention_mix(pattern: Tensor<2>, v: Tensor<2>, spec: &AttentionSpec) -> Tensor<2> {
    composed::attention_mix(pattern, v, spec)
}
