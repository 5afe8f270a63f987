//! Options of AWQ: flags, recipe keys, schema and docs in one definition, and what they refuse.

use crate::{Error, Result};
use std::path::PathBuf;

/// Options of AWQ.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct AwqOptions {
    /// How a channel's scale follows from the statistics: `plain` is the paper's, `duo` divides by the weights' own magnitude
    #[arg(long, value_enum, default_value_t = Search::Plain)]
    pub search: Search,
    /// Exponents tried: `reference` is 0, 0.05, ..., 0.95; `closed` reaches 1
    #[arg(long = "search-grid", value_enum, default_value_t = RatioGrid::Reference)]
    pub search_grid: RatioGrid,
    /// Number of exponents tried
    #[arg(long, default_value_t = 20)]
    pub search_points: usize,
    /// Skip the scale search
    #[arg(long)]
    pub no_scale: bool,
    /// Skip the clipping search
    #[arg(long)]
    pub no_clip: bool,
    /// Tokens on which clipping is judged
    #[arg(long, default_value_t = 512)]
    pub clip_tokens: usize,
    /// Scale the value projection for the output projection under grouped queries, sharing a scale over the repeats
    #[arg(long, value_enum, default_value_t = GqaFold::None)]
    pub gqa_fold: GqaFold,
    /// What the scale search compares: the output of the `module` that reads the layers, or of the `linear` layers alone (faster; a deviation from the paper)
    #[arg(long, value_enum, default_value_t = Objective::Module)]
    pub objective: Objective,
    /// What rounds after the scales are folded: `rtn` clips and rounds to nearest, `gptq` quantises the folded block with the options of GPTQ, which then sees what the quantised blocks before it produce
    #[arg(long = "awq-rounding", value_enum, default_value_t = Rounding::Rtn)]
    pub rounding: Rounding,
    /// JSON list of the mappings to search, names relative to the block: `[{"prev": "input_layernorm", "layers": ["self_attn.q_proj", ...], "inspect": "self_attn" | "mlp" | "self" | "block", "gqa": bool}]`; without it the architecture's own
    #[arg(long, value_name = "FILE")]
    pub mappings: Option<PathBuf>,
    /// Write what the search found to OUT/awq-search, for --apply-search
    #[arg(long)]
    pub save_search: bool,
    /// Apply the search that an earlier job saved there instead of searching; needs no calibration text
    #[arg(long, value_name = "DIR")]
    pub apply_search: Option<PathBuf>,
    /// Instead of searching, scale the 1 % of channels with the largest activations by this factor (ablation)
    #[arg(long, value_name = "S")]
    pub fixed_scale: Option<f32>,
    /// Keep this percentage of the input channels of every layer out of rounding (ablation; dequantized format only)
    #[arg(long, value_name = "PERCENT")]
    pub keep_channels: Option<f64>,
    /// Which channels --keep-channels keeps
    #[arg(long, value_enum, default_value_t = KeepBy::Activation)]
    pub keep_by: KeepBy,
}

impl Default for AwqOptions {
    fn default() -> Self {
        Self {
            search: Search::Plain,
            search_grid: RatioGrid::Reference,
            search_points: 20,
            no_scale: false,
            no_clip: false,
            clip_tokens: 512,
            gqa_fold: GqaFold::None,
            objective: Objective::Module,
            rounding: Rounding::Rtn,
            mappings: None,
            save_search: false,
            apply_search: None,
            fixed_scale: None,
            keep_channels: None,
            keep_by: KeepBy::Activation,
        }
    }
}

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::ValueEnum)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }
    };
}

choice! {
    /// How scales follow from statistics.
    Search {
        /// `s = mean|x|^a` (the paper).
        #[default]
        Plain,
        /// `s = mean|x|^a / mean|w|^(1-a)` (AutoAWQ's default), with the identity added.
        Duo,
    }
}
choice! {
    /// Which exponents are tried.
    RatioGrid {
        /// `k / n`: 0 to below 1.
        #[default]
        Reference,
        /// `k / (n - 1)`: 0 to 1.
        Closed,
    }
}
choice! {
    /// How one scale is shared by the query heads that read the same value head.
    GqaFold {
        /// Such layers are not scaled.
        #[default]
        None,
        /// The mean over the repeats.
        Mean,
        /// The maximum over the repeats.
        Max,
    }
}
choice! {
    /// What the scale search compares.
    Objective {
        /// Output of the module that reads the scaled layers.
        #[default]
        Module,
        /// Output of the scaled layers themselves, through their Gram matrix.
        Linear,
    }
}

choice! {
    /// What rounds the folded block.
    Rounding {
        /// Clipping, then rounding to nearest (the paper).
        #[default]
        Rtn,
        /// GPTQ on the folded weights; ranges are not clipped, unless by its own `mse`.
        Gptq,
    }
}
choice! {
    /// Which channels stay in full precision.
    KeepBy {
        /// Those with the largest `mean|x|`.
        #[default]
        Activation,
        /// Those whose column of the weight has the largest norm.
        Weight,
        /// Any, drawn with the job's seed.
        Random,
    }
}

impl AwqOptions {
    /// Whether these options need calibration text: a stored search does not.
    pub fn calibrates(&self) -> bool {
        self.apply_search.is_none() || self.rounding == Rounding::Gptq
    }

    /// Whether groups are clipped.
    pub(super) fn clips(&self) -> bool {
        !self.no_clip && self.rounding == Rounding::Rtn
    }

    /// Refuses options that cannot work.
    pub fn check(&self) -> Result<()> {
        if self.apply_search.is_some() {
            for (given, flag) in [
                (self.no_scale, "--no-scale"),
                (self.mappings.is_some(), "--mappings"),
                (self.fixed_scale.is_some(), "--fixed-scale"),
                (self.save_search, "--save-search"),
            ] {
                if given {
                    return Err(Error::Options(format!(
                        "--apply-search takes the scales of an earlier job: drop {flag}, or search \
                         again without --apply-search"
                    )));
                }
            }
            if self.keep_channels.is_some() && self.keep_by == KeepBy::Activation {
                return Err(Error::Options(
                    "--apply-search sees no activations: use --keep-by weight or random".into(),
                ));
            }
        }
        if let Some(factor) = self.fixed_scale {
            if !(factor > 0.0 && factor.is_finite()) {
                return Err(Error::Options(format!(
                    "--fixed-scale {factor} must be a positive number; 2 is usual"
                )));
            }
            if self.no_scale {
                return Err(Error::Options(
                    "--fixed-scale scales and --no-scale does not: give one of them".into(),
                ));
            }
        }
        if let Some(percent) = self.keep_channels {
            if !(percent > 0.0 && percent <= 100.0) {
                return Err(Error::Options(format!(
                    "--keep-channels {percent} must lie in (0, 100]; 1 is usual"
                )));
            }
            if self.rounding == Rounding::Gptq {
                return Err(Error::Options(
                    "--keep-channels keeps channels out of rounding to nearest: use --awq-rounding \
                     rtn"
                    .into(),
                ));
            }
        }
        if self.search_points < 2 {
            return Err(Error::Options(
                "the scale search needs at least 2 points; 20 is usual".into(),
            ));
        }
        if self.clip_tokens == 0 && self.clips() {
            return Err(Error::Options(
                "clipping needs tokens: give --clip-tokens 512, or --no-clip".into(),
            ));
        }
        Ok(())
    }
}
