//! Softmax cross-entropy over rows of logits, and the output head fused with it.
use rayon::prelude::*;

use super::matmul::{Matrix, Output, matmul};
use super::simd::{BLOCK, exp, max, scratch, simd, sum};

/// The loss of every row (0 for ignored ones, in f64 for the mean) and its log-sum-exp.
pub(crate) fn forward(
    logits: &[f32],
    vocab: usize,
    targets: &[u32],
    ignore: Option<u32>,
) -> (f64, Vec<f32>) {
    let rows: Vec<(f32, f32)> = logits
        .par_chunks(vocab)
        .zip(targets)
        .map(|(row, &target)| {
            if Some(target) == ignore {
                return (0.0, 0.0);
            }
            let lse = log_sum_exp(row);
            (lse - row[target as usize], lse)
        })
        .collect();
    let total = rows.iter().map(|row| f64::from(row.0)).sum();
    (total, rows.into_iter().map(|row| row.1).collect())
}

/// Turns logits into `factor * (softmax - one-hot target)` in place; ignored rows become 0.
pub(crate) fn backward(
    logits: &mut [f32],
    vocab: usize,
    targets: &[u32],
    ignore: Option<u32>,
    lse: &[f32],
    factor: f32,
) {
    logits.par_chunks_mut(vocab).zip(targets.par_iter().zip(lse)).for_each(
        |(row, (&target, &lse))| {
            if Some(target) == ignore {
                row.fill(0.0);
            } else {
                softmax_row(row, lse, factor);
                row[target as usize] -= factor;
            }
        },
    );
}

simd! { fn log_sum_exp(row: &[f32]) -> f32 {
    let largest = max(row);
    largest + sum(row, |x| exp(x - largest)).ln()
} }

simd! { fn softmax_row(row: &mut [f32], lse: f32, factor: f32) {
    for value in row {
        *value = exp(*value - lse) * factor;
    }
} }

/// `x *= factor`, without touching memory for a factor of 1 (the usual upstream gradient).
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.par_chunks_mut(BLOCK).for_each(|x| x.iter_mut().for_each(|x| *x *= factor));
    }
}

/// What the fused head leaves: the mean loss and the gradients asked for.
pub(crate) struct HeadLoss {
    pub mean: f32,
    pub dx: Option<Vec<f32>>,
    pub dw: Option<Vec<f32>>,
}

/// The mean cross-entropy of `x wᵀ` (`x [tokens, width]`, `w [vocab, width]`) by chunks of tokens;
/// gradients of the mean are computed while a chunk's logits are at hand.
pub(crate) fn head(
    x: &[f32],
    w: &[f32],
    width: usize,
    targets: &[u32],
    ignore: Option<u32>,
    chunk: usize,
    [want_x, want_w]: [bool; 2],
) -> HeadLoss {
    let vocab = w.len() / width;
    let counted = targets.iter().filter(|&&target| Some(target) != ignore).count();
    let factor = 1.0 / counted.max(1) as f32;
    let mut logits = scratch(chunk.min(targets.len()) * vocab);
    let mut dx = scratch(if want_x { x.len() } else { 0 });
    let mut dw = scratch(if want_w { w.len() } else { 0 });
    let mut total = 0.0;
    for (piece, targets) in targets.chunks(chunk).enumerate() {
        let tokens = targets.len();
        let span = piece * chunk * width..(piece * chunk + tokens) * width;
        let x = &x[span.clone()];
        let logits = &mut logits[..tokens * vocab];
        let output = Output { data: &mut *logits, row: vocab, accumulate: false };
        let (x_rows, w_rows) = (Matrix::rows(x, width), Matrix::rows(w, width));
        let shape = [tokens, vocab, width];
        matmul(shape, x_rows, Matrix::columns(w, width), 1.0, output);
        let (loss, lse) = forward(logits, vocab, targets, ignore);
        total += loss;
        if !want_x && !want_w {
            continue;
        }
        backward(logits, vocab, targets, ignore, &lse, factor);
        if want_x {
            let output = Output { data: &mut dx[span], row: width, accumulate: false };
            matmul([tokens, width, vocab], Matrix::rows(logits, vocab), w_rows, 1.0, output);
        }
        if want_w {
            let output = Output { data: &mut dw, row: width, accumulate: piece > 0 };
            let transposed = Matrix::columns(logits, vocab);
            matmul([vocab, width, tokens], transposed, x_rows, 1.0, output);
        }
    }
    let mean = (total / counted.max(1) as f64) as f32;
    if targets.is_empty() {
        dw.fill(0.0);
    }
    HeadLoss { mean, dx: want_x.then_some(dx), dw: want_w.then_some(dw) }
}
