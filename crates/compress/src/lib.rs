//! The compress room: quantisers on one streaming block runner.
//!
//! - `rtn`, `gptq`, `awq`: one method, one file: options, mathematics, what it does to a block;
//! - `grid`: bits, groups, symmetry, rounding, shared by all;
//! - `statistics`: what calibration accumulates, as a tap;
//! - `options`, `plan`, `calibration`: a job's definition, what it will do, its text;
//! - `runner`, `block`, `activations`: the walk over blocks, within the memory contract.
//!
//! Evaluation and reports are not here: a job with its before and after is `recipe`'s.

pub mod activations;
pub mod allocate;
pub mod awq;
pub mod block;
pub mod calibration;
pub mod error;
pub mod gptq;
pub mod grid;
pub mod options;
pub mod plan;
pub mod rtn;
pub mod runner;
pub mod statistics;

pub use block::{Calibration, LayerResult};
pub use error::{Error, Result};
pub use options::{Format, Method, QuantizeOptions};
pub use plan::Plan;
pub use runner::{Outcome, Target, run};

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
];
