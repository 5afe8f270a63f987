//! RSQ: rotate, scale, quantise (Sung et al. 2025, arXiv 2503.01820).
//!
//! The network is rotated so that no channel carries outliers (`nn::rotate`, the part of QuaRot that
//! leaves an ordinary checkpoint), every calibration token of a block gets a weight by how much
//! attention it receives (`importance`), and GPTQ works with the weighted Hessian
//! `H = Σ w_t x_t x_tᵀ`. With rotation, importance and base switched one by one this file is also
//! its own ablation: rotation with rounding, rotation with GPTQ (QuaRot), importance alone (SQ).

pub mod importance;
mod weigh;

use crate::block::{BlockJob, Calibration, INPUT_POINTS, INPUT_STAGES, REPORT_TOKENS};
use crate::grid::GridOptions;
use crate::options::{Format, QuantizeOptions};
use crate::plan::Plan;
use crate::runner::{Job, Outcome, Source, Target, run_job};
use crate::statistics::{Statistics, Wanted, WeightedGram};
use crate::{Error, Result, gptq, rtn};
use importance::{Importance, PositionDebias};
use method::Pattern;
use nn::{Decoder, Model, Name, Rotated, RotationKind, Stage, Tap, Taps};
use std::collections::BTreeMap;
use store::Dtype;

/// Options of RSQ.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct RsqOptions {
    /// Rotation of the residual stream and the value heads before anything is quantised
    #[arg(long, value_enum, default_value_t = RotationChoice::Hadamard)]
    pub rotation: RotationChoice,
    /// Seed of the rotation
    #[arg(long, default_value_t = 0)]
    pub rotation_seed: u64,
    /// Rotate and quantise nothing: the same function as an ordinary checkpoint in f32
    #[arg(long)]
    pub rotate_only: bool,
    /// What rounds the rotated weights; with rtn, token importance has nothing to act on
    #[arg(long = "rsq-base", value_enum, default_value_t = Base::Gptq)]
    pub base: Base,
    /// What makes a calibration token important
    #[arg(long, value_enum, default_value_t = Importance::Attention)]
    pub importance: Importance,
    /// Relative weight of the least important token of a window (0.01 with rotation, 0.1 without)
    #[arg(long, default_value_t = 0.01)]
    pub r_min: f64,
    /// Relative weight of the most important token of a window
    #[arg(long, default_value_t = 1.0)]
    pub r_max: f64,
    /// Divide the attention a token receives by the number of queries that can see it
    #[arg(long, value_enum, default_value_t = PositionDebias::None)]
    pub position_debias: PositionDebias,
    /// Parts a window is cut into for first-n and first-last-n (8 and 32 when not given)
    #[arg(long)]
    pub importance_chunks: Option<usize>,
    /// Power of the weight in the Hessian: 1 as in the authors' code, 2 when features themselves
    /// are multiplied by the weight
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub weight_power: u8,
    /// Weigh tokens only for layers whose name matches this pattern (repeatable); all without it
    #[arg(long, value_name = "PATTERN")]
    pub weighting_modules: Vec<String>,
    /// Use every calibration window this many times, each time rolled on by an equal part of it
    #[arg(long, default_value_t = 1)]
    pub expand: usize,
}

impl Default for RsqOptions {
    fn default() -> Self {
        Self {
            rotation: RotationChoice::Hadamard,
            rotation_seed: 0,
            rotate_only: false,
            base: Base::Gptq,
            importance: Importance::Attention,
            r_min: 0.01,
            r_max: 1.0,
            position_debias: PositionDebias::None,
            importance_chunks: None,
            weight_power: 1,
            weighting_modules: Vec::new(),
            expand: 1,
        }
    }
}

/// Which rotation.
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
pub enum RotationChoice {
    /// A Hadamard matrix with random signs; a random orthogonal one where the width has none.
    #[default]
    Hadamard,
    /// A random orthogonal matrix.
    Random,
    /// No rotation.
    None,
}

impl RotationChoice {
    fn kind(self) -> Option<RotationKind> {
        match self {
            Self::Hadamard => Some(RotationKind::Hadamard),
            Self::Random => Some(RotationKind::Random),
            Self::None => None,
        }
    }
}

/// What rounds.
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
pub enum Base {
    /// Error compensation, with weighted tokens.
    #[default]
    Gptq,
    /// Round to nearest: no calibration, no importance.
    Rtn,
}

impl RsqOptions {
    /// Whether the job looks at activations.
    pub fn calibrates(&self) -> bool {
        self.base == Base::Gptq && !self.rotate_only
    }

    /// Refuses options that cannot work.
    ///
    /// # Errors
    /// Naming the option and what would work.
    pub fn check(&self, options: &QuantizeOptions) -> Result<()> {
        let refuse = |text: String| Err(Error::Options(text));
        if !(self.r_min > 0.0 && self.r_min <= 1.0) {
            return refuse(format!("--r-min {} must lie in (0, 1]; 0.01 is usual", self.r_min));
        }
        if !(self.r_max.is_finite() && self.r_min <= self.r_max) {
            let (low, high) = (self.r_min, self.r_max);
            return refuse(format!("--r-min {low} must not exceed --r-max {high}"));
        }
        if !matches!(self.weight_power, 1 | 2) {
            return refuse(format!("--weight-power {} must be 1 or 2", self.weight_power));
        }
        if !(1..=64).contains(&self.expand) {
            return refuse(format!("--expand {} must lie in 1..=64; 8 is usual", self.expand));
        }
        let chunked = matches!(self.importance, Importance::FirstN | Importance::FirstLastN);
        let (chunks, length) =
            (self.importance.chunks(self.importance_chunks), options.calibration.sequence_length);
        if self.calibrates() && chunked && !(2..=length).contains(&chunks) {
            return refuse(format!(
                "windows of {length} tokens cannot be cut into {chunks} parts: give \
                 --importance-chunks between 2 and {length}"
            ));
        }
        for text in &self.weighting_modules {
            Pattern::new(text).map_err(Error::Options)?;
        }
        if self.rotate_only {
            if self.rotation == RotationChoice::None {
                return refuse("--rotate-only with --rotation none would do nothing".into());
            }
            if !matches!(options.format, Format::CompressedTensors | Format::Dequantized) {
                return refuse(
                    "--rotate-only quantises nothing, so there is nothing to pack: use --format \
                     dequantized"
                        .into(),
                );
            }
        }
        Ok(())
    }

    /// Whether tokens are weighed in the layer's Hessian.
    fn weighs(&self, patterns: &[Pattern], name: &Name) -> bool {
        patterns.is_empty() || patterns.iter().any(|p| p.matches(&name.module))
    }
}

/// Runs an RSQ job: the runner reads the model through the rotation.
pub(crate) fn run(
    model: &Model,
    plan: &Plan,
    (options, job): (&RsqOptions, &mut dyn Job),
    calibration: &Calibration,
    target: &Target<'_>,
    progress: &report::Progress,
) -> Result<Outcome> {
    known_patterns(&model.decoder, options)?;
    let expanded;
    let calibration = if options.expand > 1 && options.calibrates() {
        expanded = calibration.expanded(options.expand)?;
        &expanded
    } else {
        calibration
    };
    let Some(kind) = options.rotation.kind() else {
        return run_job(Source::of(model)?, plan, job, calibration, target, progress);
    };
    let base = Box::new(model.weights.as_ref());
    let rotated = Rotated::new(base, &model.decoder, kind, options.rotation_seed)?;
    rotated.warnings().iter().for_each(|warning| report::warn(warning));
    let mut config = rotated.config(model.checkpoint.config()?);
    if let Some(object) = config.as_object_mut().filter(|_| options.rotate_only) {
        for key in ["torch_dtype", "dtype"] {
            if key == "torch_dtype" || object.contains_key(key) {
                object.insert(key.into(), "float32".into());
            }
        }
    }
    let source = Source {
        decoder: rotated.decoder(),
        weights: &rotated,
        checkpoint: &model.checkpoint,
        config: &config,
        rewritten: true,
        // The identity of a rotation holds to the precision that it is stored in.
        dense: options.rotate_only.then_some(Dtype::F32),
    };
    let plan = plan.renamed(rotated.decoder());
    let mut outcome = run_job(source, &plan, job, calibration, target, progress)?;
    outcome.notes.push(format!("Rotated: {}.", rotated.description()));
    outcome.warnings.splice(0..0, rotated.warnings().iter().cloned());
    Ok(outcome)
}

/// Refuses weighting patterns that match no layer.
fn known_patterns(decoder: &Decoder, options: &RsqOptions) -> Result<()> {
    for text in &options.weighting_modules {
        let pattern = Pattern::new(text).map_err(Error::Options)?;
        let known = (0..decoder.num_blocks())
            .flat_map(|i| decoder.linears(i))
            .any(|name| pattern.matches(&name.module));
        if !known {
            return Err(Error::Options(format!("pattern `{text}` matches no layer to weigh")));
        }
    }
    Ok(())
}

/// Quantises one block.
pub(crate) fn quantize_block(job: &mut BlockJob<'_>, options: &QuantizeOptions) -> Result<()> {
    let rsq = &options.rsq;
    match (rsq.base, rsq.importance) {
        _ if rsq.rotate_only => Ok(()),
        (Base::Rtn, _) => rtn::quantize_block(job),
        (Base::Gptq, Importance::Uniform) => gptq::quantize_block(job, &options.gptq),
        (Base::Gptq, _) => weighted_block(job, options),
    }
}

/// GPTQ on one block, set after set, with the Hessians of weighted tokens. All weights are decided
/// before any layer of the block changes.
fn weighted_block(job: &mut BlockJob<'_>, options: &QuantizeOptions) -> Result<()> {
    let rsq = &options.rsq;
    let patterns: Vec<Pattern> = rsq
        .weighting_modules
        .iter()
        .map(|text| Pattern::new(text).map_err(Error::Options))
        .collect::<Result<_>>()?;
    let total = job.calibration.tokens();
    let mut weights = weigh::TokenWeights::default();
    for (set, layers) in job.sets.iter().enumerate() {
        let (point, stage) = (INPUT_POINTS[set], INPUT_STAGES[set]);
        type Planned<'a> = Vec<(&'a Name, &'a GridOptions)>;
        let (weighted, plain): (Planned<'_>, Planned<'_>) = layers
            .iter()
            .filter_map(|layer| Some((&layer.name, layer.grid.as_ref()?)))
            .partition(|(name, _)| rsq.weighs(&patterns, name));
        let wanted = Wanted {
            gram: !plain.is_empty(),
            absolute_mean: false,
            sample: (!plain.is_empty() || !weighted.is_empty()).then_some((total, REPORT_TOKENS)),
        };
        let mut statistics = Statistics::new([(point, wanted)]);
        let gram = if set == 0 {
            job.run_stage(stage, &mut Taps::one(&mut statistics))?;
            weights = weigh::weigh(job, rsq)?;
            let mut gram = WeightedGram::new(point, weights.roots.clone());
            let width = job.decoder.config.hidden_size;
            for batch in 0..if weighted.is_empty() { 0 } else { job.calibration.batches() } {
                gram.add(&job.branch.get(batch)?, width);
            }
            gram.finish()
        } else {
            let mut gram = WeightedGram::new(point, weights.roots.clone());
            let mut taps = Taps::one(&mut statistics);
            if !weighted.is_empty() {
                taps.0.push(&mut gram as &mut dyn Tap);
            }
            job.run_stage(stage, &mut taps)?;
            gram.finish()
        };
        let collected = statistics.take(point).unwrap_or_default();
        let sample = collected.sample.as_ref();
        let gptq = &options.gptq;
        gptq::quantize_set(job, &weighted, gram, sample, gptq, &weights.notes())?;
        gptq::quantize_set(job, &plain, collected.gram, sample, gptq, &BTreeMap::new())?;
    }
    job.run_stage(Stage::Contract, &mut Taps::none())
}

#[cfg(test)]
mod tests;
