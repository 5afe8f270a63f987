//! Pruning: options of a job, and its parts.
//!
//! - this file: the one definition behind flags, recipe keys, schema and docs;
//! - `plan`: which layer loses which share of its weights;
//! - `sets`: how calibration inputs reach the layers of a block;
//! - `job`: pruning as a job of the runner.

use crate::d_pruner::{DPrunerOptions, Mode};
use crate::layer_adaptive_pruning::LayerAdaptivePruningOptions;
use crate::mask::{Count, Scope, Structure};
use crate::options::{CalibrationOptions, MemoryLimit};
use crate::sparsegpt::SparseGptOptions;
use crate::wanda::WandaOptions;
use crate::{Error, Result};
use std::path::PathBuf;
use store::packed::sparse::SparseLayout;

mod job;
mod plan;
pub mod sets;

pub use job::{MAP_SIDE, Pruner, run, total_sparsity};

/// Which weights go.
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
pub enum PruneMethod {
    /// The smallest magnitudes; needs no data.
    #[default]
    Magnitude,
    /// Random ones: the control.
    Random,
    /// The smallest products of magnitude and input norm.
    Wanda,
    /// Second-order choice, the other weights make up for what goes.
    #[value(name = "sparsegpt")]
    #[serde(rename = "sparsegpt")]
    SparseGpt,
    /// Domain and general importance in one score.
    DPruner,
    /// The smallest magnitudes, with a sparsity of its own for every layer.
    LayerAdaptivePruning,
}

impl PruneMethod {
    /// The method's slug.
    pub fn slug(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::Random => "random",
            Self::Wanda => "wanda",
            Self::SparseGpt => "sparsegpt",
            Self::DPruner => "d-pruner",
            Self::LayerAdaptivePruning => "layer-adaptive-pruning",
        }
    }
}

/// How pruned layers are written.
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
pub enum PruneFormat {
    /// Ordinary weights with zeros in them: any loader, no saving in size.
    #[default]
    Dense,
    /// compressed-tensors `sparse-bitmask`: the kept values and a bit per weight.
    SparseBitmask,
    /// compressed-tensors `sparse-24-bitmask`: two values of every four.
    #[serde(rename = "sparse-24-bitmask")]
    #[value(name = "sparse-24-bitmask")]
    Sparse24Bitmask,
}

impl PruneFormat {
    /// The sparse layout; `None` for ordinary weights.
    pub fn layout(self) -> Option<SparseLayout> {
        match self {
            Self::Dense => None,
            Self::SparseBitmask => Some(SparseLayout::Bitmask),
            Self::Sparse24Bitmask => Some(SparseLayout::TwoFour),
        }
    }
}

/// What `--sparsity` is a share of.
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
pub enum ShareOf {
    /// The weights of the pruned layers.
    #[default]
    Layers,
    /// All parameters of the model; the pruned layers lose more to make up for the rest.
    Model,
}

/// Which text calibration draws from.
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
pub enum CalibrateOn {
    /// The general text (`--calibration`).
    #[default]
    General,
    /// The domain's text.
    Domain,
    /// Half of the windows from each.
    Both,
}

/// A professional dialect of the almanac.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum DialectName {
    /// Radio network operations.
    Radio,
    /// Contract law.
    Law,
    /// Pharmacy.
    Pharmacy,
}

impl DialectName {
    /// The almanac's dialect.
    pub fn dialect(self) -> data::almanac::Dialect {
        match self {
            Self::Radio => data::almanac::Dialect::Radio,
            Self::Law => data::almanac::Dialect::Law,
            Self::Pharmacy => data::almanac::Dialect::Pharmacy,
        }
    }
}

/// The domain that the model is to serve.
#[derive(
    Debug,
    Clone,
    Default,
    PartialEq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::Args,
)]
#[serde(default)]
pub struct DomainOptions {
    /// Text of the domain, one document per sample: .txt, .jsonl (key `text`), .json
    #[arg(id = "domain_file", long = "domain", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// A dialect of the almanac as the domain
    #[arg(long, value_enum, conflicts_with = "domain_file")]
    pub dialect: Option<DialectName>,
    /// Held-out text of the domain for the measurement; without it every tenth document of --domain
    /// is held out
    #[arg(long, value_name = "FILE", requires = "domain_file")]
    pub domain_test: Option<PathBuf>,
}

impl DomainOptions {
    /// Whether a domain is given.
    pub fn given(&self) -> bool {
        self.file.is_some() || self.dialect.is_some()
    }
}

/// Everything that decides what a pruning job writes.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct PruneOptions {
    /// Which weights go
    #[arg(long, value_enum)]
    pub method: PruneMethod,
    /// Share of the weights that become zero, 0 to 1
    #[arg(long, default_value_t = 0.5)]
    pub sparsity: f64,
    /// What --sparsity is a share of
    #[arg(long, value_enum, default_value_t = ShareOf::Layers)]
    pub sparsity_of: ShareOf,
    /// Pattern of the zeros: unstructured, or N:M to keep N of every M neighbours in a row
    #[arg(long, default_value = "unstructured")]
    pub pattern: Structure,
    /// Which weights compete: matrix, row, columns (blocks of 128 inputs; a 32nd of the inputs in
    /// the MLP's last projection), columns:WIDTH [default: row for wanda, matrix otherwise]
    #[arg(long)]
    pub scope: Option<Scope>,
    /// Prune exactly the share asked for; without it counts are those of the reference codes, which
    /// differ by one weight
    #[arg(long)]
    pub exact: bool,
    /// Whose outputs calibrate the layers of a block
    #[arg(long, value_enum, default_value_t = sets::Order::Sets)]
    pub calibration_order: sets::Order,
    /// File format of the pruned weights
    #[arg(long, value_enum, default_value_t = PruneFormat::Dense)]
    pub format: PruneFormat,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub calibration: CalibrationOptions,
    /// Text that calibration draws from
    #[arg(long, value_enum, default_value_t = CalibrateOn::General)]
    pub calibrate_on: CalibrateOn,
    #[command(flatten, next_help_heading = "Domain")]
    #[allow(missing_docs)]
    pub domain: DomainOptions,
    #[command(flatten, next_help_heading = "SparseGPT (and the general pass of D-Pruner)")]
    #[allow(missing_docs)]
    pub sparsegpt: SparseGptOptions,
    #[command(flatten, next_help_heading = "Wanda")]
    #[allow(missing_docs)]
    pub wanda: WandaOptions,
    #[command(flatten, next_help_heading = "D-Pruner")]
    #[allow(missing_docs)]
    pub d_pruner: DPrunerOptions,
    #[command(flatten, next_help_heading = "Layer-adaptive pruning")]
    #[allow(missing_docs)]
    pub layer_adaptive: LayerAdaptivePruningOptions,
    /// Leave layers whose name matches this pattern as they are (repeatable)
    #[arg(long, value_name = "PATTERN", visible_alias = "keep", help_heading = "Options")]
    pub exclude: Vec<String>,
    /// Prune only layers whose name matches this pattern (repeatable)
    #[arg(long, value_name = "PATTERN", help_heading = "Options")]
    pub only: Vec<String>,
    /// Memory for calibration activations; beyond it they go to a temporary file
    #[arg(long, value_name = "SIZE", default_value = "4GiB", help_heading = "Options")]
    pub memory: MemoryLimit,
    /// Largest size of one output shard
    #[arg(long, value_name = "SIZE", default_value = "5GB", help_heading = "Options")]
    pub max_shard_size: MemoryLimit,
}

impl Default for PruneOptions {
    /// The defaults of the flags.
    fn default() -> Self {
        Self {
            method: PruneMethod::default(),
            sparsity: 0.5,
            sparsity_of: ShareOf::Layers,
            pattern: Structure::Unstructured,
            scope: None,
            exact: false,
            calibration_order: sets::Order::Sets,
            format: PruneFormat::Dense,
            calibration: CalibrationOptions::default(),
            calibrate_on: CalibrateOn::General,
            domain: DomainOptions::default(),
            sparsegpt: SparseGptOptions::default(),
            wanda: WandaOptions::default(),
            d_pruner: DPrunerOptions::default(),
            layer_adaptive: LayerAdaptivePruningOptions::default(),
            exclude: Vec::new(),
            only: Vec::new(),
            memory: MemoryLimit::default(),
            max_shard_size: MemoryLimit(5_000_000_000),
        }
    }
}

impl PruneOptions {
    /// Whether blocks see calibration text while they are pruned (the general pass of D-Pruner is
    /// a walk of its own).
    pub fn calibrates(&self) -> bool {
        matches!(self.method, PruneMethod::Wanda | PruneMethod::SparseGpt)
    }

    /// Whether D-Pruner's general pass is needed.
    pub fn needs_general(&self) -> bool {
        self.method == PruneMethod::DPruner && self.d_pruner.importance_mode.needs_general()
    }

    /// Whether the domain's text decides what is pruned.
    pub fn needs_domain(&self) -> bool {
        match self.method {
            PruneMethod::DPruner => self.d_pruner.importance_mode.needs_domain(),
            PruneMethod::Wanda | PruneMethod::SparseGpt => {
                self.calibrate_on != CalibrateOn::General
            }
            _ => false,
        }
    }

    /// The scope, by the method's rule where none is given.
    pub fn scope(&self) -> Scope {
        let rule = if self.method == PruneMethod::Wanda { Scope::Row } else { Scope::Matrix };
        self.scope.unwrap_or(rule)
    }

    /// How the share becomes a number of weights.
    pub fn count(&self) -> Count {
        match self.method {
            _ if self.exact => Count::Exact,
            PruneMethod::Magnitude | PruneMethod::SparseGpt => Count::Threshold,
            PruneMethod::Wanda => Count::Floor,
            PruneMethod::DPruner => Count::Percentile,
            PruneMethod::Random | PruneMethod::LayerAdaptivePruning => Count::Exact,
        }
    }

    /// Refuses options that cannot work, before any file is touched.
    pub fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::Options(reason));
        if !(0.0..1.0).contains(&self.sparsity) {
            return refuse(format!(
                "--sparsity {} must lie in 0 to 1; 0.5 prunes every second weight",
                self.sparsity
            ));
        }
        if let Some(share) = self.pattern.sparsity() {
            let asked = self.sparsity;
            if asked != 0.5 && (asked - share).abs() > 1e-9 {
                return refuse(format!(
                    "--pattern {} prunes {share} of the weights: leave --sparsity {asked} out",
                    self.pattern
                ));
            }
            if self.scope.is_some() || self.wanda.wanda_alpha || self.sparsity_of == ShareOf::Model
            {
                return refuse(format!(
                    "--pattern {} fixes which weights compete and how many go: leave --scope, \
                     --wanda-alpha and --sparsity-of model out",
                    self.pattern
                ));
            }
            if self.method == PruneMethod::LayerAdaptivePruning {
                return refuse(
                    "layer-adaptive-pruning gives every layer a share of its own, which a pattern \
                     does not allow; use --pattern unstructured"
                        .into(),
                );
            }
        }
        if self.method == PruneMethod::SparseGpt && self.scope.is_some() {
            return refuse(
                "sparsegpt chooses within blocks of --block-size columns; leave --scope out".into(),
            );
        }
        if self.wanda.wanda_alpha && self.scope.is_some_and(|scope| scope != Scope::Row) {
            return refuse("--wanda-alpha compares within rows; leave --scope out".into());
        }
        if self.format == PruneFormat::Sparse24Bitmask && self.pattern != Structure::TWO_OF_FOUR {
            return refuse(
                "the format sparse-24-bitmask holds two of every four weights: add --pattern 2:4, \
                 or use --format sparse-bitmask"
                    .into(),
            );
        }
        if self.method == PruneMethod::SparseGpt || self.needs_general() {
            self.sparsegpt.check(self.pattern)?;
        }
        if self.method == PruneMethod::DPruner {
            self.d_pruner.check()?;
        }
        if self.needs_domain() && !self.domain.given() {
            let hint = match self.method {
                PruneMethod::DPruner => ", or --importance-mode general, which needs none",
                _ => ", or leave --calibrate-on out",
            };
            return refuse(format!(
                "{} needs text of the domain: give --domain FILE or --dialect radio|law|pharmacy{hint}",
                match self.method {
                    PruneMethod::DPruner =>
                        format!("the importance mode {}", self.d_pruner.importance_mode.label()),
                    _ => "--calibrate-on domain or both".to_string(),
                }
            ));
        }
        if self.calibrates() || self.needs_general() {
            if self.calibration.samples == 0 {
                return refuse("no calibration samples: give --samples 128".into());
            }
            if self.calibration.sequence_length < 2 {
                return refuse("calibration windows need at least 2 tokens".into());
            }
        }
        if self.method == PruneMethod::DPruner
            && self.d_pruner.importance_mode == Mode::General
            && self.calibrate_on != CalibrateOn::General
        {
            return refuse("--calibrate-on is for wanda and sparsegpt".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
