//! How far the predictions of two models lie apart on the same tokens: what a change of weights
//! costs before any task is asked.

use crate::{
    error::{Result, option},
    scan::{BATCH_TOKENS, LOGITS, log_sum_exp, logits_of},
};
use nn::{Batch, Decoder, Model, Taps, Weights};
use rayon::prelude::*;
use report::{Cell, Column, Table};
use serde::Serialize;
use tensor::{Tensor, host};

/// Distances between the next-token predictions of a reference and another model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Mean Kullback-Leibler divergence `KL(reference || other)` in nats per token.
    pub kl_divergence: f64,
    /// Share of positions where both have the same likeliest token.
    pub agreement: f64,
    /// Mean absolute difference of the logits.
    pub mean_logit_difference: f64,
    /// Largest absolute difference of a logit.
    pub max_logit_difference: f64,
    /// Positions compared.
    pub tokens: usize,
}

impl Comparison {
    /// The comparison as a table of one row.
    pub fn table(&self) -> Table {
        let columns =
            ["KL divergence", "same next token", "mean |logit difference|", "largest", "tokens"];
        Table::new("Predictions compared", columns.map(Column::right).to_vec()).row(vec![
            Cell::Float(self.kl_divergence, 5),
            Cell::Percent(self.agreement),
            Cell::Float(self.mean_logit_difference, 5),
            Cell::Float(self.max_logit_difference, 4),
            Cell::Count(self.tokens as u64),
        ])
    }
}

/// Compares the predictions of `other` with those of `reference` over consecutive windows of
/// `window` tokens; a rest that fills no window is left out unless it is all there is.
///
/// # Errors
/// No tokens, vocabularies of different size, and the networks' own.
pub fn compare(
    reference: &Model,
    other: &Model,
    tokens: &[u32],
    window: usize,
) -> Result<Comparison> {
    if tokens.is_empty() || window == 0 {
        return Err(option("text", "no tokens to compare on"));
    }
    let (a, b) = (reference.decoder.config.vocab_size, other.decoder.config.vocab_size);
    if a != b {
        return Err(option("models", format!("vocabularies of {a} and {b} cannot be compared")));
    }
    let window = window.min(tokens.len());
    let whole = &tokens[..tokens.len() / window * window];
    let mut sums = Sums::default();
    // The reference's logits of a whole group are kept.
    let group = BATCH_TOKENS.min(4 * LOGITS / a.max(1));
    for group in whole.chunks((group / window).max(1) * window) {
        let rows: Vec<usize> = (0..group.len()).collect();
        let sequences = group.len() / window;
        // Both models see the same pieces, so the second pass can take the first one's logits in
        // order.
        let mut references = std::collections::VecDeque::new();
        logits_of(reference, group, sequences, &rows, |_, logits| {
            references.push_back(logits);
            Ok(())
        })?;
        logits_of(other, group, sequences, &rows, |_, logits| {
            if let Some(reference) = references.pop_front() {
                host::read(&reference, |p| host::read(&logits, |q| sums.add(p, q, a)));
            }
            Ok(())
        })?;
    }
    let n = sums.rows as f64;
    Ok(Comparison {
        kl_divergence: sums.kl / n,
        agreement: sums.same as f64 / n,
        mean_logit_difference: sums.difference / (n * a as f64),
        max_logit_difference: f64::from(sums.largest),
        tokens: sums.rows,
    })
}

/// `Σ KL(reference || other)` in nats over the rows of two final hidden states (the input of the
/// head, `[rows, embed_size]`) under one head, and the number of rows.
///
/// # Errors
/// From the head.
pub fn divergence(
    decoder: &Decoder,
    head: &dyn Weights,
    reference: &Tensor<2>,
    other: &Tensor<2>,
) -> Result<(f64, usize)> {
    let vocabulary = decoder.config.vocab_size;
    let piece = (LOGITS / vocabulary.max(1)).max(1);
    let rows = reference.dims()[0].min(other.dims()[0]);
    let mut sums = Sums::default();
    for first in (0..rows).step_by(piece) {
        let count = piece.min(rows - first);
        let logits = |hidden: &Tensor<2>| {
            let part = hidden.clone().narrow(0, first, count);
            decoder.head_logits(head, part, &Batch::new(1, count), &mut Taps::none())
        };
        let (p, q) = (logits(reference)?, logits(other)?);
        host::read(&p, |p| host::read(&q, |q| sums.add(p, q, vocabulary)));
    }
    Ok((sums.kl, sums.rows))
}

#[derive(Clone, Copy, Default)]
struct Sums {
    kl: f64,
    same: usize,
    difference: f64,
    largest: f32,
    rows: usize,
}

impl Sums {
    fn add(&mut self, p: &[f32], q: &[f32], vocabulary: usize) {
        let rows: Vec<Sums> = p
            .par_chunks(vocabulary)
            .zip(q.par_chunks(vocabulary))
            .map(|(p, q)| Sums::row(p, q))
            .collect();
        // Added in order, so that the result does not depend on the threads.
        for row in rows {
            self.kl += row.kl;
            self.same += row.same;
            self.difference += row.difference;
            self.largest = self.largest.max(row.largest);
            self.rows += 1;
        }
    }

    fn row(p: &[f32], q: &[f32]) -> Sums {
        let (zp, zq) = (log_sum_exp(p), log_sum_exp(q));
        let (mut kl, mut difference, mut largest) = (0.0f64, 0.0f64, 0.0f32);
        let (mut best_p, mut best_q) = (0, 0);
        for (i, (a, b)) in p.iter().zip(q).enumerate() {
            let log_p = (f64::from(*a) - zp) as f32;
            let apart = a - b;
            // p (log p - log q), with the two normalisers taken together.
            kl += f64::from(log_p.exp()) * (f64::from(apart) - zp + zq);
            difference += f64::from(apart.abs());
            largest = largest.max(apart.abs());
            if *a > p[best_p] {
                best_p = i;
            }
            if *b > q[best_q] {
                best_q = i;
            }
        }
        Sums { kl: kl.max(0.0), same: usize::from(best_p == best_q), difference, largest, rows: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = log 2 - log(3)/2 = 0.143841.
        let mut sums = Sums::default();
        sums.add(&[0.0, 0.0], &[0.0, 3.0f32.ln()], 2);
        assert!((sums.kl - (2f64.ln() - 3f64.ln() / 2.0)).abs() < 1e-6);
        assert!((sums.difference - 3f64.ln()).abs() < 1e-6);
        assert_eq!((sums.same, sums.rows), (0, 1));
        // A shift of all logits changes nothing but the logits.
        let mut shifted = Sums::default();
        shifted.add(&[1.0, 2.0, 3.0], &[6.0, 7.0, 8.0], 3);
        assert!(shifted.kl < 1e-6 && shifted.same == 1 && shifted.largest == 5.0);
    }
}
