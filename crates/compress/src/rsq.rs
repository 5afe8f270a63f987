//! RSQ (Sung et al. 2025, arXiv 2503.01820).

/// Options of RSQ.
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
pub struct RsqOptions {}
