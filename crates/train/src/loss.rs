//! The language-modelling loss of a batch: cross-entropy of the next token, averaged over the
//! targets that count.

use crate::{
    error::Result,
    gradients::Grads,
    loader::{IGNORE, TokenBatch},
    params::Params,
};
use nn::{Batch, Context, Decoder, Taps, Weights};
use tensor::{Tensor, host, ops};

/// Mean loss of a batch in nats per counted target, as a scalar that can be backpropagated.
pub fn batch_loss(
    decoder: &Decoder,
    weights: &dyn Weights,
    batch: &TokenBatch,
) -> Result<Tensor<1>> {
    let mut context = Context::new(Batch::new(batch.rows, batch.length));
    let hidden = decoder.hidden(weights, &batch.tokens, &mut context, &mut Taps::none())?;
    let head = weights.matrix(&decoder.head)?;
    Ok(match decoder.config.final_softcap {
        // The fused head computes plain products; a cap on the logits needs the logits.
        Some(cap) => {
            let logits = ops::linear(hidden, head, None);
            let logits = logits.div_scalar(cap).tanh().mul_scalar(cap);
            ops::cross_entropy(logits, &batch.targets, Some(IGNORE))
        }
        None => ops::linear_cross_entropy(hidden, head, &batch.targets, 0),
    })
}

/// Mean loss over the counted targets of all micro batches, and its gradients.
///
/// Micro batches weigh as much as they have targets, so that accumulation equals one large batch.
pub fn gradients(
    decoder: &Decoder,
    params: &Params,
    batches: &[TokenBatch],
    grads: &mut Grads,
) -> Result<f64> {
    let total: usize = batches.iter().map(TokenBatch::counted).sum();
    let mut mean = 0.0;
    for batch in batches {
        let share = batch.counted() as f64 / total.max(1) as f64;
        if share == 0.0 {
            continue;
        }
        let loss = batch_loss(decoder, params, batch)?;
        let value = f64::from(host::read(&loss, |v| v[0]));
        mean += share * value;
        let scaled = if share == 1.0 { loss } else { loss.mul_scalar(share as f32) };
        params.backward(&scaled, grads);
    }
    Ok(mean)
}

/// Mean loss over the counted targets of batches, without gradients.
pub fn evaluate(decoder: &Decoder, weights: &dyn Weights, batches: &[TokenBatch]) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0usize);
    for batch in batches {
        let counted = batch.counted();
        if counted > 0 {
            let loss = batch_loss(decoder, weights, batch)?;
            sum += counted as f64 * f64::from(host::read(&loss, |v| v[0]));
            count += counted;
        }
    }
    Ok(sum / count.max(1) as f64)
}
