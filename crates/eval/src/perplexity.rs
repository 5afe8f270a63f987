//! Perplexity by the sliding-window procedure of the transformers documentation ("Perplexity of
//! fixed-length models").
//!
//! Windows of `window` tokens start every `stride` tokens; in each, only the tokens that no earlier
//! window scored are targets, the rest is context. Per window the loss is the mean over its targets
//! (the first token of a window has no prediction); windows are weighted by their number of new
//! tokens minus one, as the documentation does for the shift of labels, even where the context
//! makes the first new token predictable. The result is `exp(sum / tokens)`.

use crate::{
    error::{Result, option},
    scan::{BATCH_TOKENS, logits_of},
};
use nn::Model;
use report::{Cell, Column, Progress, Table};
use serde::Serialize;
use std::time::Instant;
use tensor::{host, ops};

/// Perplexity of a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Mean negative log-likelihood in nats per token.
    pub nll: f64,
    /// Tokens that count.
    pub tokens: usize,
    /// Windows computed.
    pub windows: usize,
    /// Largest tokens per window.
    pub window: usize,
    /// Tokens between the starts of windows.
    pub stride: usize,
    /// Wall time.
    pub seconds: f64,
}

impl Perplexity {
    /// The result as a table of one row.
    pub fn table(&self) -> Table {
        let columns = ["perplexity", "nats/token", "tokens", "window", "stride", "time"];
        Table::new("Perplexity", columns.map(Column::right).to_vec()).row(vec![
            Cell::Float(self.perplexity, 4),
            Cell::Float(self.nll, 5),
            Cell::Count(self.tokens as u64),
            Cell::Int(self.window as i64),
            Cell::Int(self.stride as i64),
            Cell::Seconds(self.seconds),
        ])
    }
}

/// One window: `tokens[begin..end]`, of which the last `new` are targets.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    begin: usize,
    end: usize,
    new: usize,
}

impl Window {
    fn len(&self) -> usize {
        self.end - self.begin
    }
}

/// The windows over a text of `length` tokens.
fn windows(length: usize, window: usize, stride: usize) -> Vec<Window> {
    let mut all = Vec::new();
    let mut previous = 0;
    for begin in (0..length).step_by(stride) {
        let end = (begin + window).min(length);
        all.push(Window { begin, end, new: end - previous });
        previous = end;
        if end == length {
            break;
        }
    }
    all
}

/// Perplexity of `tokens` with windows of `window` tokens every `stride` tokens.
///
/// # Errors
/// A window or stride of 0, a stride longer than the window, fewer than two tokens, and the
/// network's own.
pub fn perplexity(
    model: &Model,
    tokens: &[u32],
    window: usize,
    stride: usize,
) -> Result<Perplexity> {
    perplexity_with(model, tokens, window, stride, &Progress::hidden())
}

/// As [`perplexity`], with a progress display that counts windows.
///
/// # Errors
/// As [`perplexity`].
pub fn perplexity_with(
    model: &Model,
    tokens: &[u32],
    window: usize,
    stride: usize,
    progress: &Progress,
) -> Result<Perplexity> {
    let started = Instant::now();
    if window < 2 {
        return Err(option(
            "window",
            format!("{window} token(s) predict nothing; give at least 2"),
        ));
    }
    if stride == 0 || stride > window {
        return Err(option("stride", format!("{stride} is not in 1..={window} (the window)")));
    }
    if tokens.len() < 2 {
        return Err(option("text", format!("{} token(s) are too few to predict", tokens.len())));
    }
    let all = windows(tokens.len(), window, stride);
    let (mut sum, mut counted) = (0.0f64, 0usize);
    let batch = (BATCH_TOKENS / window).max(1);
    let mut at = 0;
    while at < all.len() {
        // Windows of equal length go together; only the last may be shorter.
        let length = all[at].len();
        let group = all[at..].iter().take(batch).take_while(|w| w.len() == length).count();
        let group = &all[at..at + group];
        for (window, loss) in group.iter().zip(losses(model, tokens, group)?) {
            let weight = window.new - 1;
            if weight > 0 {
                sum += loss * weight as f64;
                counted += weight;
            }
        }
        at += group.len();
        progress.inc(group.len() as u64);
    }
    if counted == 0 {
        return Err(option("stride", "windows of one new token each leave nothing that counts"));
    }
    let nll = sum / counted as f64;
    Ok(Perplexity {
        perplexity: nll.exp(),
        nll,
        tokens: counted,
        windows: all.len(),
        window,
        stride,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Mean loss of every window of a group of equally long ones.
fn losses(model: &Model, tokens: &[u32], group: &[Window]) -> Result<Vec<f64>> {
    let length = group[0].len();
    let joined: Vec<u32> =
        group.iter().flat_map(|w| tokens[w.begin..w.end].iter().copied()).collect();
    // Row `r` of a window predicts token `r + 1`, a target when it is among the last `new`.
    let targets_from = |w: &Window| (length - w.new).max(1);
    let rows: Vec<usize> = group
        .iter()
        .enumerate()
        .flat_map(|(i, w)| (targets_from(w)..length).map(move |t| i * length + t - 1))
        .collect();
    let mut sums = vec![0.0f64; group.len()];
    logits_of(model, &joined, group.len(), &rows, |rows, logits| {
        let mut from = 0;
        for (window, part) in
            rows.chunk_by(|a, b| a / length == b / length).map(|p| (p[0] / length, p))
        {
            let targets: Vec<u32> = part.iter().map(|row| joined[row + 1]).collect();
            let piece = logits.clone().narrow(0, from, part.len());
            let mean = ops::cross_entropy(piece, &targets, None);
            sums[window] += host::read(&mean, |v| f64::from(v[0])) * part.len() as f64;
            from += part.len();
        }
        Ok(())
    })?;
    let mean = |(sum, w): (f64, &Window)| sum / (length - targets_from(w)) as f64;
    Ok(sums.into_iter().zip(group).map(mean).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_token_once() {
        let w = |begin, end, new| Window { begin, end, new };
        assert_eq!(windows(10, 4, 4), [w(0, 4, 4), w(4, 8, 4), w(8, 10, 2)]);
        assert_eq!(windows(10, 4, 3), [w(0, 4, 4), w(3, 7, 3), w(6, 10, 3)]);
        assert_eq!(windows(9, 6, 2), [w(0, 6, 6), w(2, 8, 2), w(4, 9, 1)]);
        assert_eq!(windows(3, 8, 8), [w(0, 3, 3)]);
        for (n, window, stride) in [(100, 17, 5), (64, 16, 16), (65, 16, 1)] {
            assert_eq!(windows(n, window, stride).iter().map(|w| w.new).sum::<usize>(), n);
        }
    }
}
