//! From what is known about the tokens of one window to their weights: scores, the map to
//! `[r_min, r_max]`, and the normalisation that keeps the sum (Sung et al. 2025, section 4).
//!
//! Pure functions of one sequence; where the scores of a strategy come from is `weigh`'s business.

use crate::{Error, Result};
use tensor::ops::AttentionSpec;

/// What makes a token important.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Importance {
    /// Attention it receives in this block, over all heads and queries (the paper's choice).
    #[default]
    Attention,
    /// All tokens alike: plain GPTQ on the rotated model.
    Uniform,
    /// Norm of its residual stream entering the block.
    ActNorm,
    /// How little the block changes its residual stream.
    ActDiff,
    /// How rare its id is in the calibration set.
    TokenFreq,
    /// Mean squared distance of its residual stream to those of the window's other tokens.
    TokenSim,
    /// Whether it stands in the first part of the window.
    FirstN,
    /// Whether it stands in the first or the last part of the window.
    FirstLastN,
}

impl Importance {
    /// Name for tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Uniform => "uniform",
            Self::ActNorm => "act-norm",
            Self::ActDiff => "act-diff",
            Self::TokenFreq => "token-freq",
            Self::TokenSim => "token-sim",
            Self::FirstN => "first-n",
            Self::FirstLastN => "first-last-n",
        }
    }

    /// Parts that a window is cut into.
    pub fn chunks(self, given: Option<usize>) -> usize {
        given.unwrap_or(if self == Self::FirstLastN { 32 } else { 8 })
    }
}

/// How the position of a token is taken out of the attention it receives: under a causal mask early
/// tokens are seen by more queries.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum PositionDebias {
    /// Not at all.
    #[default]
    None,
    /// Divided by the number of queries that see the token.
    Linear,
    /// Divided by the root of that number.
    Sqrt,
}

impl PositionDebias {
    /// Divides the attention that the keys of one sequence received under the masks of `spec`.
    pub fn apply(self, received: &mut [f64], spec: &AttentionSpec) {
        if self == Self::None {
            return;
        }
        let mut seen = vec![0usize; received.len()];
        for query in 0..spec.queries {
            if let Some(keys) = seen.get_mut(spec.visible(query)) {
                keys.iter_mut().for_each(|count| *count += 1);
            }
        }
        for (score, &count) in received.iter_mut().zip(&seen) {
            let count = count.max(1) as f64;
            *score /= if self == Self::Linear { count } else { count.sqrt() };
        }
    }
}

/// Weights of the tokens of one sequence from their scores: `r = r_min + (r_max - r_min) (s - min)
/// / (max - min)`, then `w = r T / Σ r`. Scores that are all alike give weights of exactly 1.
///
/// # Errors
/// Scores that are not finite, named as such.
pub fn weights(scores: &[f64], r_min: f64, r_max: f64) -> Result<Vec<f64>> {
    if let Some(at) = scores.iter().position(|s| !s.is_finite()) {
        return Err(Error::Options(format!(
            "the importance of token {at} of a calibration window is not a number; the model \
             overflows on the calibration text"
        )));
    }
    let low = scores.iter().copied().fold(f64::INFINITY, f64::min);
    let high = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if scores.is_empty() || low == high {
        return Ok(vec![1.0; scores.len()]);
    }
    let scale = (r_max - r_min) / (high - low);
    let mut r: Vec<f64> =
        scores.iter().map(|s| (r_min + scale * (s - low)).clamp(r_min, r_max)).collect();
    let factor = r.len() as f64 / r.iter().sum::<f64>();
    r.iter_mut().for_each(|r| *r *= factor);
    Ok(r)
}

/// `‖x_t‖` of every row of `x` `[tokens, width]`.
pub fn norms(x: &[f32], width: usize) -> Vec<f64> {
    let norm = |row: &[f32]| row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    x.chunks_exact(width.max(1)).map(norm).collect()
}

/// `-‖x_t - y_t‖` of every row.
pub fn closeness(x: &[f32], y: &[f32], width: usize) -> Vec<f64> {
    let difference: Vec<f32> = x.iter().zip(y).map(|(a, b)| a - b).collect();
    norms(&difference, width).into_iter().map(|norm| -norm).collect()
}

/// `mean_u ‖x_t - x_u‖²` of every row: `‖x_t‖² + mean ‖x_u‖² - 2 x_t · mean x_u`, so that no pair
/// is ever formed.
pub fn dissimilarity(x: &[f32], width: usize) -> Vec<f64> {
    let tokens = (x.len() / width.max(1)).max(1) as f64;
    let mut mean = vec![0f64; width];
    for row in x.chunks_exact(width.max(1)) {
        mean.iter_mut().zip(row).for_each(|(m, &v)| *m += f64::from(v) / tokens);
    }
    // Distances do not change when the mean is taken out, and less cancels.
    let squares: Vec<f64> = x
        .chunks_exact(width.max(1))
        .map(|row| row.iter().zip(&mean).map(|(&v, m)| (f64::from(v) - m).powi(2)).sum())
        .collect();
    let all = squares.iter().sum::<f64>() / tokens;
    squares.into_iter().map(|square| square + all).collect()
}

/// Minus the count of every token of `window` in the whole calibration set `all`.
pub fn rarity(window: &[u32], counts: &std::collections::HashMap<u32, usize>) -> Vec<f64> {
    window.iter().map(|id| -(counts.get(id).copied().unwrap_or(0) as f64)).collect()
}

/// How often every id occurs.
pub fn counts(all: &[u32]) -> std::collections::HashMap<u32, usize> {
    let mut counts = std::collections::HashMap::new();
    for &id in all {
        *counts.entry(id).or_insert(0) += 1;
    }
    counts
}

/// 1 for tokens in the first (and, with `last`, the last) of `chunks` parts of a window.
pub fn ends(tokens: usize, chunks: usize, last: bool) -> Vec<f64> {
    let chunks = chunks.max(1);
    let (first, end) = (tokens.div_ceil(chunks), tokens * (chunks - 1) / chunks);
    (0..tokens).map(|t| f64::from(u8::from(t < first || (last && t >= end)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(tokens: usize, window: Option<usize>) -> AttentionSpec {
        AttentionSpec {
            batch: 1,
            queries: tokens,
            keys: tokens,
            heads: 2,
            kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
            causal: true,
            offset: 0,
            window,
            softcap: None,
        }
    }

    fn close(got: &[f64], wanted: &[f64], within: f64) {
        assert_eq!(got.len(), wanted.len());
        for (g, w) in got.iter().zip(wanted) {
            assert!((g - w).abs() < within, "{got:?} {wanted:?}");
        }
    }

    /// Two heads, three tokens, patterns given: column sums, map and weights by hand.
    #[test]
    fn attention_concentration_by_hand() {
        let heads = [
            [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]],
            [[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.6, 0.2, 0.2]],
        ];
        let scores: Vec<f64> =
            (0..3).map(|key| heads.iter().flatten().map(|row| row[key]).sum()).collect();
        close(&scores, &[4.2, 1.1, 0.7], 1e-12);
        assert!((scores.iter().sum::<f64>() - 6.0).abs() < 1e-12);
        let w = weights(&scores, 0.01, 1.0).unwrap();
        close(&w, &[2.647504, 0.326021, 0.026475], 1e-6);
        assert!((w.iter().sum::<f64>() - 3.0).abs() < 1e-12);
        let ratio: Vec<f64> = w.iter().map(|v| v / w[0]).collect();
        close(&ratio, &[1.0, 0.123143, 0.01], 1e-6);
    }

    #[test]
    fn equal_scores_are_weights_of_one_and_bad_ones_are_refused() {
        assert_eq!(weights(&[3.0; 4], 0.01, 1.0).unwrap(), [1.0; 4]);
        assert_eq!(weights(&[], 0.01, 1.0).unwrap(), [] as [f64; 0]);
        assert_eq!(weights(&[1.0, 5.0], 0.3, 0.3).unwrap(), [1.0; 2]);
        for bad in [f64::NAN, f64::INFINITY] {
            let error = weights(&[1.0, bad], 0.01, 1.0).unwrap_err().to_string();
            assert!(error.contains("token 1") && error.contains("overflow"), "{error}");
        }
    }

    #[test]
    fn strategies_by_hand() {
        let x = [3.0f32, 4.0, 0.0, 0.0, 6.0, 8.0];
        close(&norms(&x, 2), &[5.0, 0.0, 10.0], 1e-12);
        close(&closeness(&x, &[0.0; 6], 2), &[-5.0, 0.0, -10.0], 1e-12);
        // Token 0: (0 + 25 + 25) / 3; token 1: (25 + 0 + 100) / 3.
        close(&dissimilarity(&x, 2), &[50.0 / 3.0, 125.0 / 3.0, 125.0 / 3.0], 1e-9);
        let all = [7, 7, 9, 7, 8, 9];
        assert_eq!(rarity(&[7, 8, 9, 1], &counts(&all)), [-3.0, -1.0, -2.0, 0.0]);
        assert_eq!(ends(8, 4, false), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(ends(8, 4, true), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(ends(5, 4, true), [1.0, 1.0, 0.0, 1.0, 1.0]);
        assert_eq!((Importance::FirstN.chunks(None), Importance::FirstLastN.chunks(None)), (8, 32));
        assert_eq!(Importance::FirstN.chunks(Some(3)), 3);
    }

    /// Token `t` of `T` is seen by `T - t` queries, with a window by no more than the window.
    #[test]
    fn positions_are_taken_out_by_the_layers_own_mask() {
        let mut s = [4.0; 4];
        PositionDebias::Linear.apply(&mut s, &spec(4, None));
        close(&s, &[1.0, 4.0 / 3.0, 2.0, 4.0], 1e-12);
        let mut s = [4.0; 4];
        PositionDebias::Linear.apply(&mut s, &spec(4, Some(2)));
        close(&s, &[2.0, 2.0, 2.0, 4.0], 1e-12);
        let mut s = [4.0; 4];
        PositionDebias::Sqrt.apply(&mut s, &spec(4, None));
        close(&s, &[2.0, 4.0 / 3f64.sqrt(), 4.0 / 2f64.sqrt(), 4.0], 1e-12);
        let mut s = [4.0; 4];
        PositionDebias::None.apply(&mut s, &spec(4, None));
        assert_eq!(s, [4.0; 4]);
    }
}
