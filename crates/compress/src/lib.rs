//! The compress room: quantisers on one streaming block runner.
//!
//! - `rtn`, `gptq`, `awq`, ...: one method, one file: options, mathematics, what it does to a block;
//! - `grid`: bits, groups, symmetry, rounding, shared by all;
//! - `statistics`: what calibration accumulates, as a tap;
//! - `options`, `plan`, `calibration`: a job's definition, what it will do, its text;
//! - `quantize`, `prune`: quantising and pruning as jobs of the runner;
//! - `mask`: which weights go, shared by all pruners (`wanda`, `sparsegpt`, `d_pruner`, ...);
//! - `allocate`: a budget over layers; `stream`: looking at a network before deciding;
//! - `runner`, `block`, `activations`: the walk over blocks, within the memory contract.
//!
//! Evaluation and reports are not here: a job with its before and after is `recipe`'s.

pub mod activations;
pub mod adadim;
pub mod allocate;
pub mod awq;
pub mod block;
pub mod calibration;
pub mod d_pruner;
pub mod error;
pub mod gptq;
pub mod grid;
pub mod layer_adaptive_pruning;
pub mod layerwise_quant;
pub mod mask;
pub mod options;
pub mod plan;
pub mod prune;
pub mod pvq;
pub mod quantize;
pub mod rsq;
pub mod rtn;
pub mod runner;
pub mod sparsegpt;
pub mod statistics;
pub mod stream;
pub mod wanda;

pub use block::{Calibration, LayerResult};
pub use error::{Error, Result};
pub use options::{Format, Method, QuantizeOptions};
pub use plan::Plan;
pub use prune::{PruneMethod, PruneOptions};
pub use quantize::run;
pub use runner::{Outcome, Target};

use method::MethodCard;

/// The methods of this room.
pub const METHODS: &[MethodCard] = &[
    MethodCard {
        slug: "rtn",
        title: "Round to nearest",
        room: "compress",
        paper: "baseline",
        summary: "Every weight takes the nearest value of its group's integer grid. Needs no data.",
        schema: || schemars::schema_for!(grid::GridOptions),
    },
    MethodCard {
        slug: "gptq",
        title: "GPTQ",
        room: "compress",
        paper: "Frantar et al. 2022, arXiv 2210.17323",
        summary: "Quantises column by column; the columns still to come make up for the error, \
                  weighted by the calibration inputs.",
        schema: || schemars::schema_for!(gptq::GptqOptions),
    },
    MethodCard {
        slug: "awq",
        title: "Activation-aware weight quantisation",
        room: "compress",
        paper: "Lin et al. 2023, arXiv 2306.00978",
        summary: "Scales up the input channels that carry large activations before rounding, and \
                  clips every group's range; the function stays the same.",
        schema: || schemars::schema_for!(awq::AwqOptions),
    },
    MethodCard {
        slug: "adadim",
        title: "AdaDim",
        room: "compress",
        paper: "Heo et al. 2023, arXiv 2309.15531",
        summary: "Groups weights along the input or along the output of every layer, whichever hurts its output less.",
        schema: || schemars::schema_for!(adadim::AdadimOptions),
    },
    MethodCard {
        slug: "rsq",
        title: "RSQ",
        room: "compress",
        paper: "Sung et al. 2025, arXiv 2503.01820",
        summary: "Rotates the model so that outliers vanish, then GPTQ that listens to the tokens that matter.",
        schema: || schemars::schema_for!(rsq::RsqOptions),
    },
    MethodCard {
        slug: "pvq",
        title: "Pyramid vector quantisation",
        room: "compress",
        paper: "van der Ouderaa et al. 2024, arXiv 2410.16926",
        summary: "Stores groups of weights as a direction on a pyramid lattice and a length; any rate, no codebook.",
        schema: || schemars::schema_for!(pvq::PvqOptions),
    },
    MethodCard {
        slug: "layerwise-quant",
        title: "Layer-wise quantisation",
        room: "compress",
        paper: "Dumitru et al. 2024, arXiv 2406.17415",
        summary: "Gives important layers more bits, for any average, on top of any quantiser.",
        schema: || schemars::schema_for!(layerwise_quant::LayerwiseQuantOptions),
    },
    MethodCard {
        slug: "layer-adaptive-pruning",
        title: "Layer-adaptive pruning",
        room: "compress",
        paper: "Xu et al. 2023, arXiv 2308.10438",
        summary: "Finds the sparsity of every layer that hurts the output least in total.",
        schema: || schemars::schema_for!(layer_adaptive_pruning::LayerAdaptivePruningOptions),
    },
    MethodCard {
        slug: "d-pruner",
        title: "D-Pruner",
        room: "compress",
        paper: "Zhang et al. 2024, arXiv 2405.06275",
        summary: "Prunes for one domain without losing the general language: two importances in one score.",
        schema: || schemars::schema_for!(d_pruner::DPrunerOptions),
    },
];
