//! Layer-adaptive pruning (Xu et al. 2023, arXiv 2308.10438).

/// Options of Layer-adaptive pruning.
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
pub struct LayerAdaptivePruningOptions {}
