//! Pyramid vector quantisation: groups of weights as a direction on an integer lattice and a length
//! (van der Ouderaa et al. 2024, arXiv 2410.16926).
//!
//! A layer is turned so that its rows look like normal noise (`W' = W Q`), every row is divided by its
//! norm and cut into groups of `D`; a group becomes the nearest direction `y / ‖y‖` with integer `y`,
//! `Σ|y| = K`, and a code for its length, whose levels follow from the law of lengths on the sphere.
//! With calibration text the columns still to come make up for the error, group after group (the
//! vector version of GPTQ). Rates are exact and need no power of two.
//!
//! This file is options and what the method does to a block; `code` turns one matrix into codes,
//! `measure` checks the assumption about the rows and counts bits. Lattice, search and numbering are
//! the engine's (`tensor::pyramid`), the container the store's.

use crate::block::{BlockJob, INPUT_POINTS, INPUT_STAGES, REPORT_TOKENS};
use crate::gptq::{Factor, GptqOptions, OnFailure};
use crate::grid::Matrix;
use crate::options::{Format, QuantizeOptions};
use crate::statistics::{Gram, InputStatistics, Statistics, Wanted};
use crate::{Error, Result};
use nn::{Name, Stage, Taps};
use std::collections::BTreeMap;
use store::packed::Stored;
use store::packed::pyramid::{AmpMode, NormType, PyramidCode, RotationInfo, RotationType};
use tensor::hadamard::Hadamard;
use tensor::rotation::Rotation;

mod code;
mod measure;
#[cfg(test)]
mod tests;

pub use code::{Quantized, layer_code, quantize};
pub use measure::{Normality, index_entropy, normality};

/// Options of Pyramid vector quantisation.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct PvqOptions {
    /// Weights that share one direction and one length (D): 4, 8, 16 or 32, or any that divides the inputs
    #[arg(id = "pvq-group", long = "pvq-group", default_value_t = 16)]
    pub group: usize,
    /// Bits per weight for directions, fractions allowed; without it --bits (lengths and norms come on top)
    #[arg(id = "pvq-rate", long = "pvq-rate", value_name = "BITS")]
    pub rate: Option<f64>,
    /// Pulses of a direction (K), instead of a rate
    #[arg(id = "pvq-pulses", long = "pvq-pulses", value_name = "K")]
    pub pulses: Option<usize>,
    /// Bits of a length
    #[arg(id = "pvq-length-bits", long = "pvq-length-bits", default_value_t = 4)]
    pub length_bits: u8,
    /// How lengths are quantised
    #[arg(id = "pvq-levels", long = "pvq-levels", value_enum, default_value_t = Levels::BetaLloyd)]
    pub levels: Levels,
    /// Which length a group gets: cheapest under the Hessian, that of its projection, or its own
    #[arg(id = "pvq-length", long = "pvq-length", value_enum, default_value_t = Length::Metric)]
    pub length: Length,
    /// Keep one code for the length 0, so that groups of zeros stay zero
    #[arg(id = "pvq-zero-length", long = "pvq-zero-length")]
    pub zero_length: bool,
    /// How directions are searched
    #[arg(id = "pvq-search", long = "pvq-search", value_enum, default_value_t = Search::Auto)]
    pub search: Search,
    /// Move single pulses afterwards: while the angle shrinks, or while the Hessian's error does
    #[arg(id = "pvq-refine", long = "pvq-refine", value_enum, default_value_t = Refine::None)]
    pub refine: Refine,
    /// What makes the weights look like noise: a rotation of every layer's input, of the model as a whole, or nothing
    #[arg(id = "pvq-rotation", long = "pvq-rotation", value_enum, default_value_t = Coherence::PerMatrix)]
    pub rotation: Coherence,
    /// Seed of the rotations
    #[arg(id = "pvq-rotation-seed", long = "pvq-rotation-seed", default_value_t = 0)]
    pub rotation_seed: u64,
    /// No calibration text and no error compensation
    #[arg(id = "pvq-data-free", long = "pvq-data-free")]
    pub data_free: bool,
    /// Allow a smaller last group where the group does not divide the inputs
    #[arg(id = "pvq-ragged", long = "pvq-ragged")]
    pub ragged: bool,
    /// Type of the norms of rows
    #[arg(id = "pvq-norms", long = "pvq-norms", value_enum, default_value_t = Norms::F16)]
    pub norms: Norms,
}

impl Default for PvqOptions {
    fn default() -> Self {
        Self {
            group: 16,
            rate: None,
            pulses: None,
            length_bits: 4,
            levels: Levels::BetaLloyd,
            length: Length::Metric,
            zero_length: false,
            search: Search::Auto,
            refine: Refine::None,
            rotation: Coherence::PerMatrix,
            rotation_seed: 0,
            data_free: false,
            ragged: false,
            norms: Norms::F16,
        }
    }
}

/// Defines an option with a fixed set of values.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident),* $(,)? }) => {
        $(#[$meta])*
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
        pub enum $name { $($(#[$doc])* $variant),* }
    };
}

choice! {
    /// How lengths of groups are quantised.
    Levels {
        /// Cells of equal probability under the Beta law, levels at their medians (the paper's).
        BetaCdf,
        /// Lloyd-Max levels of the law: the smallest squared error.
        #[default]
        BetaLloyd,
        /// Cells of equal probability, levels at their conditional means.
        BetaCond,
        /// Equal steps.
        Uniform,
        /// Equal ratios.
        Log,
        /// Half precision, 16 bits.
        Fp16,
    }
}

choice! {
    /// Which length a group gets.
    Length {
        /// The cheapest under the Hessian; that of the projection without calibration.
        #[default]
        Metric,
        /// The length of the projection on the direction: the smallest squared error.
        Projection,
        /// The length of the group itself.
        Norm,
    }
}

choice! {
    /// How directions are searched.
    Search {
        /// Greedy for fewer than two pulses per weight, projection otherwise.
        #[default]
        Auto,
        /// Scale, round, mend the sum.
        Project,
        /// Round down, then place every missing pulse where it helps most.
        Greedy,
        /// Both, and the better of the two.
        Both,
    }
}

choice! {
    /// Moves of single pulses after the search.
    Refine {
        /// None.
        #[default]
        None,
        /// While the cosine grows.
        Angle,
        /// While the error under the Hessian shrinks; as `angle` without calibration.
        Metric,
    }
}

choice! {
    /// Which rotation makes the weights look like noise.
    Coherence {
        /// Every layer's input by a seeded rotation, undone when the layer computes.
        #[default]
        PerMatrix,
        /// The residual stream of the model, folded into its weights.
        Fused,
        /// None.
        None,
    }
}

choice! {
    /// Type of the norms of rows.
    Norms {
        /// Half precision.
        #[default]
        F16,
        /// Single precision: for rows whose norm does not fit half precision.
        F32,
    }
}

impl Levels {
    fn stored(self) -> AmpMode {
        match self {
            Self::BetaCdf => AmpMode::BetaCdf,
            Self::BetaLloyd => AmpMode::BetaLloyd,
            Self::BetaCond => AmpMode::BetaCond,
            Self::Uniform => AmpMode::Uniform,
            Self::Log => AmpMode::Log,
            Self::Fp16 => AmpMode::Fp16,
        }
    }
}

impl Norms {
    fn stored(self) -> NormType {
        match self {
            Self::F16 => NormType::F16,
            Self::F32 => NormType::F32,
        }
    }
}

impl Search {
    fn engine(self) -> tensor::pyramid::Search {
        match self {
            Self::Auto => tensor::pyramid::Search::Auto,
            Self::Project => tensor::pyramid::Search::Project,
            Self::Greedy => tensor::pyramid::Search::Greedy,
            Self::Both => tensor::pyramid::Search::Both,
        }
    }
}

impl PvqOptions {
    /// Whether the method looks at activations.
    pub fn calibrates(&self) -> bool {
        !self.data_free
    }

    /// Refuses options that contradict each other.
    ///
    /// # Errors
    /// [`Error::Options`] with what would work.
    pub fn check(&self, job: &QuantizeOptions) -> Result<()> {
        let refuse = |reason: String| Err(Error::Options(reason));
        if !matches!(job.format, Format::Strata | Format::Dequantized) {
            return refuse(
                "no other tool's format holds pyramid codes: use --format strata, or dequantized"
                    .into(),
            );
        }
        if self.calibrates() {
            job.gptq.check(&job.grid)?;
        }
        if self.rate.is_some() && self.pulses.is_some() {
            return refuse("give --pvq-rate or --pvq-pulses, not both".into());
        }
        if self.rate.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
            return refuse("--pvq-rate must be a positive number of bits per weight".into());
        }
        if self.length_bits > tensor::pyramid::MAX_AMPLITUDE_BITS {
            return refuse(format!(
                "--pvq-length-bits {} is more than {}; use --pvq-levels fp16 for exact lengths",
                self.length_bits,
                tensor::pyramid::MAX_AMPLITUDE_BITS
            ));
        }
        if self.zero_length && self.length_bits == 0 && self.levels != Levels::Fp16 {
            return refuse(
                "--pvq-zero-length needs a code: give --pvq-length-bits 1 or more".into(),
            );
        }
        if job.gptq.act_order && self.calibrates() {
            return refuse(
                "--act-order would tear apart the neighbouring columns that pvq codes together: \
                 leave it out"
                    .into(),
            );
        }
        if self.data_free && self.refine == Refine::Metric {
            return refuse(
                "--pvq-refine metric needs calibration: use --pvq-refine angle, or leave out \
                 --pvq-data-free"
                    .into(),
            );
        }
        Ok(())
    }

    /// How a layer is coded: a layer with `bits` of its own, other than the `common` ones, takes them as
    /// its rate.
    ///
    /// # Errors
    /// As [`layer_code`].
    pub fn layer(&self, name: &Name, bits: u8, common: u8) -> Result<PyramidCode> {
        let own = bits != common;
        let rate = self.rate.filter(|_| !own).unwrap_or(f64::from(bits));
        let pulses = self.pulses.filter(|_| !own);
        layer_code(&name.module, name.shape, self, rate, pulses)
    }

    /// How finely layers are coded, in words.
    pub fn precision(&self, bits: u8) -> String {
        let lengths = match self.levels {
            Levels::Fp16 => 16,
            _ => self.length_bits,
        };
        let of_lengths = format!("{lengths} for the length of every {} weights", self.group);
        match self.pulses {
            Some(pulses) => format!("{pulses} pulses + {of_lengths}"),
            None => format!("{} bits + {of_lengths}", self.rate.unwrap_or(f64::from(bits))),
        }
    }

    /// The rotation of layers with `width` inputs, if there is one for each layer: a Hadamard matrix of
    /// the whole width where there is one; else a random matrix up to [`LARGEST_RANDOM`] inputs; else
    /// the largest Hadamard matrix whose order divides the width, for one run of inputs after another.
    pub fn rotation(&self, width: usize) -> Option<RotationInfo> {
        if self.rotation != Coherence::PerMatrix || width < 2 {
            return None;
        }
        let hadamard = |order: &usize| Hadamard::new(*order).is_some();
        let (kind, order) = if hadamard(&width) {
            (RotationType::Hadamard, width)
        } else if width <= LARGEST_RANDOM {
            (RotationType::Random, width)
        } else {
            let divisors = (2..=width).rev().filter(|d| width.is_multiple_of(*d));
            (RotationType::Hadamard, divisors.into_iter().find(hadamard)?)
        };
        Some(RotationInfo { kind, order, seed: self.rotation_seed })
    }
}

/// Largest dense rotation: beyond it turning an input would cost as much as the layer.
pub const LARGEST_RANDOM: usize = 1024;

/// Quantises every planned layer of a block, set after set in the order in which they compute.
pub(crate) fn quantize_block(job: &mut BlockJob<'_>, all: &QuantizeOptions) -> Result<()> {
    let (options, gptq) = (&all.pvq, &all.gptq);
    for (set, layers) in job.sets.iter().enumerate() {
        let planned = layers.iter().filter_map(|layer| Some((&layer.name, layer.grid.as_ref()?)));
        let planned: Vec<_> = planned.collect();
        let stage = INPUT_STAGES[set];
        let mut collected = InputStatistics::default();
        if options.calibrates() {
            if planned.is_empty() {
                job.run_stage(stage, &mut Taps::none())?;
            } else {
                let point = INPUT_POINTS[set];
                let sample = Some((job.calibration.tokens(), REPORT_TOKENS));
                let wanted = Wanted { gram: true, sample, ..Wanted::default() };
                let mut statistics = Statistics::new([(point, wanted)]);
                job.run_stage(stage, &mut Taps::one(&mut statistics))?;
                collected = statistics.take(point).unwrap_or_default();
            }
        }
        let Some((first, _)) = planned.first() else { continue };
        let rotation = options.rotation(first.in_features());
        let turn = rotation.as_ref().map(nn::pyramid::input_rotation).transpose()?;
        let factor = match collected.gram.take() {
            Some(gram) => factor(job, &first.module, gram, turn.as_ref(), gptq)?,
            None if options.calibrates() => {
                return Err(Error::layer(&first.module, "no calibration token reached this layer"));
            }
            None => None,
        };
        for (name, grid) in planned {
            let code = options.layer(name, grid.bits, all.grid.bits)?;
            let original = job.matrix(name)?;
            let mut matrix = original.clone();
            if let Some(turn) = &turn {
                turn.rotate_rows_f32(&mut matrix.values);
            }
            let quantized = quantize(&name.module, &matrix, &code, factor.as_ref(), options)?;
            let turned = turn.as_ref().map(Rotation::description);
            let details = details(job, name, &matrix, &quantized, factor.as_ref(), turned);
            let stored = Stored::Pyramid(quantized.matrix);
            job.hand_in(name, &original, stored, collected.sample.as_ref(), details)?;
        }
    }
    if options.calibrates() {
        job.run_stage(Stage::Contract, &mut Taps::none())?;
    }
    Ok(())
}

/// The factor of the Hessian of a set of layers, in the turned basis: `H' = Qᵀ H Q`. `None` where it
/// cannot be factorised and rounding without it is allowed.
fn factor(
    job: &mut BlockJob<'_>,
    layer: &str,
    gram: Gram,
    turn: Option<&Rotation>,
    gptq: &GptqOptions,
) -> Result<Option<Factor>> {
    let (width, tokens) = (gram.width(), gram.tokens());
    let mut hessian = gram.into_hessian();
    if let Some(turn) = turn {
        turn_hessian(&mut hessian, width, turn);
    }
    match Factor::of_hessian(layer, hessian, width, tokens, gptq) {
        Ok(factor) => Ok(Some(factor)),
        Err(error) if gptq.on_failure == OnFailure::Rtn => {
            job.warnings.push(format!("{error}; coded without error compensation instead"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// `H ← Qᵀ H Q`, where `Q` turns one run of inputs after another.
fn turn_hessian(hessian: &mut [f64], width: usize, turn: &Rotation) {
    turn.rotate_rows(hessian);
    let order = turn.order();
    for rows in hessian.chunks_exact_mut(order * width) {
        turn.rotate_columns(rows, width);
    }
    // Rounding must not leave the matrix less symmetric than it was.
    for row in 0..width {
        for column in 0..row {
            let mean = 0.5 * (hessian[row * width + column] + hessian[column * width + row]);
            hessian[row * width + column] = mean;
            hessian[column * width + row] = mean;
        }
    }
}

/// Kurtosis and distance beyond which the law of lengths does not hold.
const LARGEST_KURTOSIS: f64 = 4.0;
const LARGEST_DISTANCE: f64 = 0.1;

/// What the report says about a layer; doubts about its rows become warnings.
fn details(
    job: &mut BlockJob<'_>,
    name: &Name,
    matrix: &Matrix,
    quantized: &Quantized,
    factor: Option<&Factor>,
    turned: Option<String>,
) -> BTreeMap<String, serde_json::Value> {
    let code = &quantized.matrix.code;
    let width = code.shape[1] as f64;
    let found = normality(matrix, code.dimension);
    let mut details: BTreeMap<String, serde_json::Value> = BTreeMap::new();
    let mut put = |key: &str, value: serde_json::Value| details.insert(key.into(), value);
    put("dimension", code.dimension.into());
    put("pulses", code.pulses.into());
    put("direction_bits_per_weight", (code.row_index_bits() as f64 / width).into());
    put("entropy_bound_per_weight", (quantized.entropy_bound / width).into());
    put("index_entropy_per_weight", quantized.index_entropy.into());
    put("length_bits_per_weight", (code.row_amp_bits() as f64 / width).into());
    put("stored_bits_per_weight", code.stored_bits_per_weight().into());
    put("kurtosis", found.kurtosis.into());
    put("ks_distance", found.distance.into());
    put("zero_groups", quantized.zero_groups.into());
    put("round_trip_failures", quantized.round_trip_failures.into());
    put("rotation", turned.clone().unwrap_or_else(|| "none".into()).into());
    if let (Some(factor), Some(loss)) = (factor, quantized.loss) {
        put("loss", (loss / 2.0).into());
        put("damping", factor.damping().into());
        put("dead_columns", factor.dead_columns().into());
    }
    if found.kurtosis > LARGEST_KURTOSIS || found.distance > LARGEST_DISTANCE {
        let advice = match turned {
            None => "; rotate: --pvq-rotation per-matrix",
            Some(_) => "; --pvq-levels fp16 does not rely on it",
        };
        job.warnings.push(format!(
            "{}: weights are not like normal noise (kurtosis {:.2}, distance of group energies to \
             their law {:.3}), so that the levels of lengths fit badly{advice}",
            name.module, found.kurtosis, found.distance
        ));
    }
    if quantized.zero_groups > 0 && !code.amp_zero {
        job.warnings.push(format!(
            "{}: {} groups of zeros in rows that are not zero get the smallest length instead of 0; \
             --pvq-zero-length keeps them",
            name.module, quantized.zero_groups
        ));
    }
    details
}
