//! The streaming runner from checkpoint to checkpoint, on tiny random networks of every family:
//! what it writes, that methods keep their contracts inside it, that nothing is lost, and what it
//! refuses. The mathematics of the methods is tested beside it, in the crate.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod adadim;
mod awq;
mod common;
mod d_pruner;
mod durable;
mod families;
mod gptq;
mod layerwise;
mod packed;
mod prune;
mod refuse;
mod rsq;
mod survive;
