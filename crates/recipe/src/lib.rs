//! A job: plan, run, resume, report.
//!
//! - `quantize`: the main job, from a checkpoint to a smaller one with a report;
//! - `prune`: the same for pruning, with a `domain` where a method serves one;
//! - `layer_adaptive`: pruning with a sparsity of its own for every layer, of any family;
//! - `convert`: from one container to another;
//! - `measure`: the same evaluation before and after;
//! - `present`, `widths`: what a finished job looks like;
//! - `recipe`: jobs as YAML, stage after stage.
//!
//! Methods are in the rooms, files in `store`, flags in `cli`.

pub mod convert;
pub mod domain;
pub mod error;
pub mod layer_adaptive;
pub mod measure;
mod present;
pub mod prune;
pub mod quantize;
pub mod recipe;
mod widths;

pub use convert::{ContainerFormat, ConvertJob, ConvertOptions, Converted, NumberType};
pub use error::{Error, Result};
pub use measure::{MeasureOptions, Measurement, Measures};
pub use prune::{PruneJob, Pruned};
pub use quantize::{Finished, QuantizeJob};
pub use recipe::{Recipe, Stage, StageResult};
