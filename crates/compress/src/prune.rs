//! Options of a pruning job: the one definition behind flags, recipe keys, schema and docs.

use crate::d_pruner::DPrunerOptions;
use crate::layer_adaptive_pruning::LayerAdaptivePruningOptions;
use crate::options::{CalibrationOptions, MemoryLimit};

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

/// Everything that decides what a pruning job writes.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct PruneOptions {
    /// Which weights go
    #[arg(long, value_enum)]
    pub method: PruneMethod,
    /// Share of the prunable weights that become zero, 0 to 1
    #[arg(long, default_value_t = 0.5)]
    pub sparsity: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub calibration: CalibrationOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub d_pruner: DPrunerOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub layer_adaptive: LayerAdaptivePruningOptions,
    /// Leave layers whose name matches this pattern as they are (repeatable)
    #[arg(long, value_name = "PATTERN", visible_alias = "keep")]
    pub exclude: Vec<String>,
    /// Prune only layers whose name matches this pattern (repeatable)
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,
    /// Memory for calibration activations; beyond it they go to a temporary file
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub memory: MemoryLimit,
    /// Largest size of one output shard
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub max_shard_size: MemoryLimit,
}

impl Default for PruneOptions {
    /// The defaults of the flags.
    fn default() -> Self {
        Self {
            method: PruneMethod::default(),
            sparsity: 0.5,
            calibration: CalibrationOptions::default(),
            d_pruner: DPrunerOptions::default(),
            layer_adaptive: LayerAdaptivePruningOptions::default(),
            exclude: Vec::new(),
            only: Vec::new(),
            memory: MemoryLimit::default(),
            max_shard_size: MemoryLimit(5_000_000_000),
        }
    }
}
