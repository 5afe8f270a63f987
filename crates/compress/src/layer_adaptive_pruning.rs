//! Layer-adaptive pruning: one sparsity for the whole network, spread over its layers so that the
//! output moves least (Xu et al. 2023, arXiv 2308.10438).
//!
//! It is an allocator: which weights inside a layer go is always "smallest magnitude first", how
//! many is what allocators differ in.
//!
//! - `masks`: magnitude order, masks, counts, the iterative schedule;
//! - `allocators`: those that look only at weights: uniform, uniform-plus, global, ERK, LAMP;
//! - `samples`, `curves`, `cache`: how far the output moves per layer and amount, measured;
//! - `rd`: the choice by these curves;
//! - `layers`: which layers of a network take part, ties, operations per weight;
//! - `round`: one round: curves, allocation, masks, the additivity monitor;
//! - `iterate`: rounds with training in between;
//! - `finetune`: that training, on images or text;
//! - `output`: the files that come out.

pub mod allocators;
pub mod cache;
pub mod curves;
pub mod finetune;
pub mod iterate;
pub mod layers;
pub mod masks;
pub mod options;
pub mod output;
pub mod rd;
pub mod round;
pub mod samples;

#[cfg(test)]
mod nets;
#[cfg(test)]
mod tests;

pub use cache::CurveCache;
pub use curves::{Curve, Distortion, Probe, Prunable};
pub use options::{Allocator, LayerAdaptivePruningOptions, PruneTarget};
pub use round::{LayerShare, Round, Settings};
pub use samples::Samples;
