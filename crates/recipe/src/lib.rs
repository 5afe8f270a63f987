//! A job: plan, run, resume, report.
//!
//! - `quantize`: the main job, from a checkpoint to a smaller one with a report;
//! - `convert`: from one container to another;
//! - `measure`: the same evaluation before and after;
//! - `present`, `widths`: what a finished job looks like;
//! - `recipe`: jobs as YAML, stage after stage.
//!
//! Methods are in the rooms, files in `store`, flags in `cli`.

pub mod convert;
pub mod error;
pub mod measure;
mod present;
pub mod quantize;
pub mod recipe;
mod widths;

pub use convert::{ContainerFormat, ConvertJob, ConvertOptions, Converted, NumberType};
pub use error::{Error, Result};
pub use measure::{MeasureOptions, Measurement, Measures};
pub use quantize::{Finished, QuantizeJob};
pub use recipe::{Recipe, Stage, StageResult};
