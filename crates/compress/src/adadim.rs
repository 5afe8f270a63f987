//! AdaDim (Heo et al. 2023, arXiv 2309.15531).

/// Options of AdaDim.
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
pub struct AdadimOptions {}
