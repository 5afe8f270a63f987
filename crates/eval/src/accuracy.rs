//! How often the likeliest next token is the right one.

use crate::{
    error::{Result, option},
    scan::{BATCH_TOKENS, argmax, logits_of},
};
use nn::Model;
use report::{Cell, Column, Table};
use serde::Serialize;
use std::time::Instant;
use tensor::host;

/// Share of tokens that are predicted by the largest logit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct NextTokenAccuracy {
    /// `correct / tokens`.
    pub accuracy: f64,
    /// Right predictions.
    pub correct: usize,
    /// Predictions.
    pub tokens: usize,
    /// Tokens per window.
    pub window: usize,
    /// Wall time.
    pub seconds: f64,
}

impl NextTokenAccuracy {
    /// The result as a table of one row.
    pub fn table(&self) -> Table {
        let columns = ["next-token accuracy", "correct", "tokens", "window", "time"];
        Table::new("Next-token accuracy", columns.map(Column::right).to_vec()).row(vec![
            Cell::Percent(self.accuracy),
            Cell::Int(self.correct as i64),
            Cell::Int(self.tokens as i64),
            Cell::Int(self.window as i64),
            Cell::Seconds(self.seconds),
        ])
    }
}

/// Next-token accuracy over consecutive windows of `window` tokens; the first token of each is
/// context only.
///
/// # Errors
/// A window below 2, fewer than two tokens, and the network's own.
pub fn next_token_accuracy(
    model: &Model,
    tokens: &[u32],
    window: usize,
) -> Result<NextTokenAccuracy> {
    let started = Instant::now();
    if window < 2 || tokens.len() < 2 {
        return Err(option("window", "window and text need at least 2 tokens"));
    }
    let (mut correct, mut total) = (0, 0);
    let whole = tokens.len() / window * window;
    let batch = (BATCH_TOKENS / window).max(1) * window;
    let groups = tokens[..whole].chunks(batch).map(|group| (group, window));
    let rest = &tokens[whole..];
    for (group, length) in groups.chain((rest.len() > 1).then_some((rest, rest.len()))) {
        let rows: Vec<usize> = (0..group.len()).filter(|r| r % length != length - 1).collect();
        logits_of(model, group, group.len() / length, &rows, |rows, logits| {
            let vocabulary = logits.dims()[1];
            let best = host::read(&logits, |v| argmax(v, vocabulary));
            correct += rows.iter().zip(best).filter(|(row, best)| group[*row + 1] == *best).count();
            total += rows.len();
            Ok(())
        })?;
    }
    Ok(NextTokenAccuracy {
        accuracy: correct as f64 / total as f64,
        correct,
        tokens: total,
        window,
        seconds: started.elapsed().as_secs_f64(),
    })
}
