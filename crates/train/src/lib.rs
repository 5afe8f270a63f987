//! The trainer: named parameters, chains of gradient transforms, data order, exact resume.
//!
//! ```text
//! TrainConfig --> Trainer::run
//!    Params   named f32 leaves; an nn::Weights, so the network itself is nn's
//!    Loader   documents -> token windows, a pure function of (seed, epoch)
//!    loss     hidden states -> head fused with cross-entropy -> Grads
//!    Chain    Grads -> clip -> ... -> AdamW, in place on Params
//!    classify labels of any nn::Network instead of next tokens; masks; fine-tuning
//!    state    parameters + optimiser + position on disk, so that a kill costs nothing but time
//! ```
//! What a network computes is `nn`'s business, what a kernel computes is `tensor`'s, how a
//! checkpoint lies on disk is `store`'s; this crate decides only how a gradient becomes an update
//! and in which order data comes.

pub mod adamw;
pub mod chat;
pub mod classify;
pub mod config;
pub mod error;
pub mod gradients;
pub mod init;
pub mod loader;
pub mod loss;
mod output;
pub mod params;
pub mod schedule;
pub mod sources;
pub mod state;
pub mod trainer;
pub mod transform;

pub use adamw::AdamW;
pub use config::TrainConfig;
pub use error::{Error, Result};
pub use gradients::Grads;
pub use params::Params;
pub use schedule::Schedule;
pub use trainer::{TrainOutcome, Trainer};
pub use transform::{Chain, ClipByNorm, ClipByValue, Freeze, Step, Transform};
