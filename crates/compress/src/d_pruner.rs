//! D-Pruner: which weights serve one domain without losing the language (Zhang et al. 2024, arXiv
//! 2405.06275).
//!
//! Two passes score every weight, then the base model is masked by the scores and nothing else of
//! it changes:
//!
//! - `general`: a SparseGPT pass over open-domain text records `G = w² / U[j,j]²`, what removing a
//!   weight costs the layer's output;
//! - `domain`: gradients of the next-token loss on domain text, boosted where `G` says that the
//!   weight matters, add up to the importance `S`;
//! - `files`: both on disk, so that a stopped job goes on and other masks cost nothing.
//!
//! This file holds the options and the formulas of `S`, one matrix at a time.

use crate::{Error, Result};
use rayon::prelude::*;

pub mod domain;
pub mod files;
pub mod general;

/// Options of D-Pruner.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct DPrunerOptions {
    /// How gradients and general importance become a weight's score
    #[arg(long, value_enum, default_value_t = Mode::Normalised, visible_alias = "preset")]
    pub importance_mode: Mode,
    /// Strength of the general term [default: 1; 0.1 in the modes paper and reference]
    #[arg(long)]
    pub lambda: Option<f64>,
    /// Peak learning rate while scoring; 0 leaves the weights where they are [default: 0; 0.03 in
    /// the modes paper and reference, whose general term is proportional to its square]
    #[arg(long)]
    pub alpha: Option<f64>,
    /// Times that the domain text is gone through [default: 1; 5 in the modes paper and reference]
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Sign of the second-order term in the mode paper
    #[arg(long, value_enum, default_value_t = Sign::Plus)]
    pub second_order: Sign,
    /// Documents of the domain text that are used
    #[arg(long, default_value_t = 1000)]
    pub domain_samples: usize,
    /// Tokens of a document that are used; what is longer is cut
    #[arg(long, default_value_t = 1024)]
    pub domain_length: usize,
    /// Documents per gradient
    #[arg(long, default_value_t = 8)]
    pub domain_batch: usize,
    /// Largest norm of a gradient that moves the weights; scores use the gradient as it is
    #[arg(long, default_value_t = 1.0)]
    pub clip_norm: f64,
    /// Share of the steps over which the learning rate rises
    #[arg(long, default_value_t = 0.1)]
    pub warmup: f64,
    /// Sparsity of the pass that records the general importance
    #[arg(long, default_value_t = 0.52)]
    pub general_sparsity: f64,
    /// Keep the importance of every weight in this directory, and take from it what is there
    /// already; other sparsities and scopes then cost no second pass
    #[arg(long, value_name = "DIR")]
    pub importance: Option<std::path::PathBuf>,
}

impl Default for DPrunerOptions {
    fn default() -> Self {
        Self {
            importance_mode: Mode::Normalised,
            lambda: None,
            alpha: None,
            epochs: None,
            second_order: Sign::Plus,
            domain_samples: 1000,
            domain_length: 1024,
            domain_batch: 8,
            clip_norm: 1.0,
            warmup: 0.1,
            general_sparsity: 0.52,
            importance: None,
        }
    }
}

/// How gradients and general importance become a score.
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
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// `|g w| (1 + λ G/mean(G) · g²/mean(g²))`: free of the model's scale.
    #[default]
    Normalised,
    /// The paper's equations: `|g' w ± w² H / 2|` with `g' = g + 2 λ α² G g H`, `H` the mean of `g²`.
    Paper,
    /// What the authors' code computes, its loss scale and constants included.
    Reference,
    /// `|g w|`: the domain alone.
    Gradient,
    /// `G`: open-domain text alone.
    General,
}

impl Mode {
    /// Its name on the command line.
    pub fn label(self) -> &'static str {
        match self {
            Self::Normalised => "normalised",
            Self::Paper => "paper",
            Self::Reference => "reference",
            Self::Gradient => "gradient",
            Self::General => "general",
        }
    }

    /// Whether the mode looks at the general importance.
    pub fn needs_general(self) -> bool {
        self != Self::Gradient
    }

    /// Whether the mode looks at domain text.
    pub fn needs_domain(self) -> bool {
        self != Self::General
    }

    fn published(self) -> bool {
        matches!(self, Self::Paper | Self::Reference)
    }
}

/// Sign of the second-order term.
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
#[serde(rename_all = "lowercase")]
pub enum Sign {
    /// As printed.
    #[default]
    Plus,
    /// As the expansion of the loss around the removed weight gives it.
    Minus,
}

impl DPrunerOptions {
    /// λ.
    pub fn lambda(&self) -> f64 {
        self.lambda.unwrap_or(if self.importance_mode.published() { 0.1 } else { 1.0 })
    }

    /// The peak learning rate α.
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(if self.importance_mode.published() { 0.03 } else { 0.0 })
    }

    /// Passes over the domain text.
    pub fn epochs(&self) -> usize {
        self.epochs.unwrap_or(if self.importance_mode.published() { 5 } else { 1 })
    }

    /// Refuses options that cannot work.
    pub fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::Options(reason));
        for (flag, value) in
            [("lambda", self.lambda()), ("alpha", self.alpha()), ("clip-norm", self.clip_norm)]
        {
            if !(value.is_finite() && value >= 0.0) {
                return refuse(format!("--{flag} {value} must be a number that is not negative"));
            }
        }
        if !(0.0..=1.0).contains(&self.warmup) {
            return refuse(format!("--warmup {} must lie in 0 to 1", self.warmup));
        }
        if !(0.0..1.0).contains(&self.general_sparsity) {
            return refuse(format!(
                "--general-sparsity {} must lie in 0 to 1 (0.52 in the paper)",
                self.general_sparsity
            ));
        }
        for (flag, value) in [
            ("epochs", self.epochs()),
            ("domain-samples", self.domain_samples),
            ("domain-batch", self.domain_batch),
        ] {
            if value == 0 {
                return refuse(format!("--{flag} must be at least 1"));
            }
        }
        if self.domain_length < 2 {
            return refuse(
                "--domain-length must be at least 2: one token predicts the next".into(),
            );
        }
        Ok(())
    }

    /// The formula of a step at learning rate `alpha`.
    pub fn formula(&self, alpha: f64) -> Formula {
        let lambda = self.lambda();
        match self.importance_mode {
            Mode::Normalised => Formula::Normalised { lambda: lambda as f32 },
            Mode::Gradient | Mode::General => Formula::Normalised { lambda: 0.0 },
            Mode::Paper => Formula::Paper {
                factor: (2.0 * lambda * alpha * alpha) as f32,
                sign: if self.second_order == Sign::Plus { 1.0 } else { -1.0 },
            },
            Mode::Reference => {
                Formula::Reference { factor: (2.0 * lambda * alpha * alpha / 1000.0) as f32 }
            }
        }
    }
}

/// The score that a step adds, with its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Formula {
    /// `|g w| (1 + λ Gn h)`, `Gn = G / mean(G)`, `h = g² / mean(g²)`.
    Normalised {
        /// λ.
        lambda: f32,
    },
    /// `|g' w ± w² H / 2|`, `g' = g (1 + factor G H)`, factor `2 λ α²`.
    Paper {
        /// `2 λ α²`.
        factor: f32,
        /// 1 or -1.
        sign: f32,
    },
    /// `|p + p²/2000 + w³|`, `p = (t + factor G t²) w`, `t` the gradient times the loss scale.
    Reference {
        /// `2 λ α² / 1000`.
        factor: f32,
    },
}

/// The loss scale that the reference's half-precision training starts from.
pub const LOSS_SCALE: f32 = 65536.0;

/// Values handled by one task.
const CHUNK: usize = 1 << 14;

/// Adds one step to the importance `scores` of a matrix. All slices have the matrix's length, in
/// any common order; `general` is G, empty where the formula does not need it (`factor` or λ 0);
/// `fisher` is the running mean of `g²`, this step included, empty but for the paper's formula.
pub fn accumulate(
    formula: Formula,
    weights: &[f32],
    gradient: &[f32],
    general: &[f32],
    fisher: &[f32],
    scores: &mut [f32],
) {
    let parts = |values: &'_ [f32]| -> Vec<std::ops::Range<usize>> {
        // An empty slice stays empty in every part.
        let n = values.len();
        let parts = scores_parts(weights.len());
        parts.into_iter().map(|r| if n == 0 { 0..0 } else { r }).collect()
    };
    let (general_parts, fisher_parts) = (parts(general), parts(fisher));
    let (inverse_rms, boost) = match formula {
        Formula::Normalised { lambda } => {
            let square = mean(gradient, |g| f64::from(g) * f64::from(g));
            let general = mean(general, f64::from);
            let inverse_rms = if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 };
            let boost = if general > 0.0 { f64::from(lambda) / general } else { 0.0 };
            (inverse_rms as f32, boost as f32)
        }
        _ => (0.0, 0.0),
    };
    scores
        .par_chunks_mut(CHUNK)
        .zip(weights.par_chunks(CHUNK))
        .zip(gradient.par_chunks(CHUNK))
        .zip(general_parts)
        .zip(fisher_parts)
        .for_each(|((((s, w), g), general_part), fisher_part)| {
            let general = general.get(general_part).unwrap_or_default();
            let fisher = fisher.get(fisher_part).unwrap_or_default();
            match formula {
                _ if general.is_empty() && matches!(formula, Formula::Normalised { .. }) => {
                    gradient_only(s, w, g);
                }
                Formula::Normalised { .. } => normalised(s, w, g, general, inverse_rms, boost),
                Formula::Paper { factor, sign } => {
                    let factor = if general.is_empty() { 0.0 } else { factor };
                    let general = if general.is_empty() { w } else { general };
                    paper(s, w, g, general, fisher, factor, 0.5 * sign);
                }
                Formula::Reference { factor } => {
                    let factor = if general.is_empty() { 0.0 } else { factor };
                    let general = if general.is_empty() { w } else { general };
                    reference(s, w, g, general, factor);
                }
            }
        });
}

fn scores_parts(length: usize) -> Vec<std::ops::Range<usize>> {
    (0..length).step_by(CHUNK).map(|start| start..(start + CHUNK).min(length)).collect()
}

/// Moves the running mean of `g²` on to its `count`-th batch.
pub fn update_fisher(fisher: &mut [f32], gradient: &[f32], count: u64) {
    let share = 1.0 / count.max(1) as f32;
    fisher.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).for_each(|(h, g)| {
        for (h, g) in h.iter_mut().zip(g) {
            *h += (g * g - *h) * share;
        }
    });
}

/// Mean of `f` over `values` in f64; the same for every number of threads.
fn mean(values: &[f32], f: impl Fn(f32) -> f64 + Sync) -> f64 {
    let parts: Vec<f64> =
        values.par_chunks(CHUNK).map(|part| part.iter().map(|v| f(*v)).sum()).collect();
    parts.iter().sum::<f64>() / values.len().max(1) as f64
}

tensor::simd! {
    fn gradient_only(s: &mut [f32], w: &[f32], g: &[f32]) {
        for ((s, w), g) in s.iter_mut().zip(w).zip(g) {
            *s += (g * w).abs();
        }
    }
}

tensor::simd! {
    fn normalised(s: &mut [f32], w: &[f32], g: &[f32], general: &[f32], inverse_rms: f32, boost: f32) {
        for (((s, w), g), general) in s.iter_mut().zip(w).zip(g).zip(general) {
            let r = g * inverse_rms;
            *s += (g * w).abs() * (1.0 + boost * general * (r * r));
        }
    }
}

tensor::simd! {
    fn paper(s: &mut [f32], w: &[f32], g: &[f32], general: &[f32], fisher: &[f32], factor: f32, half: f32) {
        for ((((s, w), g), general), h) in s.iter_mut().zip(w).zip(g).zip(general).zip(fisher) {
            let dual = g + factor * general * g * h;
            *s += (dual * w + half * w * w * h).abs();
        }
    }
}

tensor::simd! {
    fn reference(s: &mut [f32], w: &[f32], g: &[f32], general: &[f32], factor: f32) {
        for (((s, w), g), general) in s.iter_mut().zip(w).zip(g).zip(general) {
            let t = g * LOSS_SCALE;
            let p = (t + factor * general * t * t) * w;
            *s += (p + p * p / 2000.0 + w * w * w).abs();
        }
    }
}

#[cfg(test)]
mod tests;
