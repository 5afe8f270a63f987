//! Layer-wise quantisation (Dumitru et al. 2024, arXiv 2406.17415).

/// Options of Layer-wise quantisation.
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
pub struct LayerwiseQuantOptions {}
