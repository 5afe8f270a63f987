//! Pyramid vector quantisation (van der Ouderaa et al. 2024, arXiv 2410.16926).

/// Options of Pyramid vector quantisation.
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
pub struct PvqOptions {}
