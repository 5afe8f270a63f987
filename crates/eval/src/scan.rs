//! Logits of chosen positions, some rows at a time, so that a large vocabulary never fills the
//! memory.

use crate::error::Result;
use nn::{Batch, Model, Taps};
use rayon::prelude::*;
use tensor::{Tensor, host};

/// Most logits (numbers, not bytes) that exist at one time.
pub(crate) const LOGITS: usize = 1 << 23;
/// Tokens that go through the network together.
pub(crate) const BATCH_TOKENS: usize = 4096;

/// Runs `sequences` equally long sequences through the model and calls `f` with the logits `[n,
/// vocab]` of the positions `rows` (sorted, indices into `tokens`), in order and in pieces:
/// `f(piece of rows, logits)`.
pub(crate) fn logits_of(
    model: &Model,
    tokens: &[u32],
    sequences: usize,
    rows: &[usize],
    mut f: impl FnMut(&[usize], Tensor<2>) -> Result<()>,
) -> Result<()> {
    let hidden = model.hidden(tokens, sequences)?;
    let [_, width] = hidden.dims();
    let piece = (LOGITS / model.decoder.config.vocab_size.max(1)).max(1);
    for rows in rows.chunks(piece) {
        let chosen = host::read(&hidden, |values| {
            let mut chosen = Vec::with_capacity(rows.len() * width);
            for row in rows {
                chosen.extend_from_slice(&values[row * width..(row + 1) * width]);
            }
            chosen
        });
        let chosen = host::from_vec(chosen, [rows.len(), width], &hidden.device());
        let batch = Batch::new(1, rows.len());
        let weights = model.weights.as_ref();
        let logits = model.decoder.head_logits(weights, chosen, &batch, &mut Taps::none())?;
        f(rows, logits)?;
    }
    Ok(())
}

/// The index of the largest value of every row; the first of equals.
pub(crate) fn argmax(logits: &[f32], vocabulary: usize) -> Vec<u32> {
    let best = |row: &[f32]| {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter().position(|v| *v == largest).unwrap_or(0) as u32
    };
    logits.par_chunks(vocabulary.max(1)).map(best).collect()
}

/// `log softmax(row)[target]` for one row.
pub(crate) fn log_probability(row: &[f32], target: u32) -> f64 {
    f64::from(row.get(target as usize).copied().unwrap_or(f32::NAN)) - log_sum_exp(row)
}

/// `log sum exp` of a row, by subtracting the largest value first.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f64;
    for chunk in row.chunks(256) {
        sum += f64::from(chunk.iter().map(|v| (v - largest).exp()).sum::<f32>());
    }
    f64::from(largest) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argmax_takes_the_first_of_equals() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, -1.0, -2.0, -1.0], 3), [1, 0]);
    }

    #[test]
    fn log_probabilities_by_hand() {
        let row = [0.0f32, 2.0f32.ln(), 1000.0];
        assert!((log_probability(&row[..2], 1) - (2.0f64 / 3.0).ln()).abs() < 1e-6);
        assert!((log_probability(&row, 2)).abs() < 1e-12, "large logits do not overflow");
        assert!(log_probability(&row, 7).is_nan());
    }
}
