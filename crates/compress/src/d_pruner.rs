//! D-Pruner (Zhang et al. 2024, arXiv 2405.06275).

/// Options of D-Pruner.
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
pub struct DPrunerOptions {}
