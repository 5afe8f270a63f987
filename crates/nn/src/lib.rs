//! Networks as functions over named weights.
//!
//! A network here owns no weights. [`Decoder`] is a description read from `config.json` plus one
//! forward function that asks a [`Weights`] for what it needs, by [`Name`]; every activation passes
//! the [`Taps`], which may record or replace it at a [`Site`]. A method changes a network by
//! wrapping one `Weights` in another or by adding a [`Tap`].
//!
//! - `site`, `tap`: the places activations can be seen, and who sees them;
//! - `name`, `weights`, `overlay`, `quantized`, `stored`: the weights seam and its implementations;
//! - `config`, `keys`, `family`: architectures as data, read from `config.json`;
//! - `decoder`, `forward`, `attend`, `rope`, `cache`: names, the staged block, positions, KV cache;
//! - `mapping`: which norm or linear can absorb a scale (what AWQ and rotations fold through);
//! - `network`: any architecture as a chain of segments; `resnet`, `vit`, `mlp` are the families of
//!   images, `open` finds the family of a checkpoint;
//! - `rotate`: the same network in a rotated basis of its residual stream;
//! - `model`, `generate`: opening a checkpoint and sampling from it.
//!
//! Losses, optimisers and evaluation live above; containers on disk and kernels live below.

mod attend;
pub mod cache;
pub mod config;
pub mod decoder;
pub mod error;
pub mod family;
mod forward;
pub mod generate;
mod images;
mod keys;
pub mod mapping;
pub mod mlp;
pub mod model;
pub mod name;
pub mod network;
mod open;
pub mod overlay;
pub mod pyramid;
pub mod quantized;
pub mod resnet;
mod rope;
pub mod rotate;
pub mod site;
pub mod stored;
pub mod tap;
#[doc(hidden)]
pub mod testing;
mod validate;
pub mod vit;
pub mod weights;

pub use cache::KvCache;
pub use config::DecoderConfig;
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use family::Family;
pub use forward::{BlockState, Context, Stage};
pub use generate::{Sampling, generate};
pub use mapping::{Inspect, Mapping, NormFold, Prev};
pub use mlp::Mlp;
pub use model::Model;
pub use name::{Leaf, Name, Role, Spelling};
pub use network::{ImageSpec, Input, Mode, Network, Observed, State};
pub use open::{OpenNetwork, known_families, network_of, open_network};
pub use overlay::Overlay;
pub use quantized::Quantized;
pub use resnet::ResNet;
pub use rotate::{Rotated, RotationKind};
pub use site::{Point, Site};
pub use store::packed::Stored;
pub use stored::dequantize;
pub use tap::{Batch, Record, Replace, Tap, Taps};
pub use vit::Vit;
pub use weights::{CheckpointWeights, Weights};
