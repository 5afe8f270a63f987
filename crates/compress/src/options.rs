//! Options of a quantisation job: the one definition behind flags, recipe keys, schema and docs.

use crate::adadim::{AdadimOptions, Base};
use crate::awq::{AwqOptions, Rounding};
use crate::gptq::GptqOptions;
use crate::grid::GridOptions;
use crate::layerwise_quant::LayerwiseQuantOptions;
use crate::pvq::PvqOptions;
use crate::rsq::RsqOptions;
use crate::{Error, Result};
use store::packed::Layout;

/// Which quantiser.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Round to nearest; needs no calibration text.
    #[default]
    Rtn,
    /// Column by column with error compensation.
    Gptq,
    /// Activation-aware scaling and clipping.
    Awq,
    /// Groups along the input or the output, by measured error.
    Adadim,
    /// Rotation, token importance, GPTQ.
    Rsq,
    /// Pyramid vector quantisation.
    Pvq,
}

impl Method {
    /// The method's slug.
    pub fn slug(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Gptq => "gptq",
            Self::Awq => "awq",
            Self::Adadim => "adadim",
            Self::Rsq => "rsq",
            Self::Pvq => "pvq",
        }
    }

    /// Whether the method looks at activations.
    pub fn calibrates(self) -> bool {
        self != Self::Rtn
    }
}

/// How quantised weights are written.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// compressed-tensors `pack-quantized`: transformers, vLLM.
    #[default]
    CompressedTensors,
    /// AutoAWQ GEMM: 4 bits only.
    Awq,
    /// GPTQ, checkpoint format v1.
    Gptq,
    /// GPTQ, checkpoint format v2 (zero points stored as they are).
    GptqV2,
    /// Strata's own container: holds what no other tool's format can.
    Strata,
    /// Ordinary weights on the quantised grid: any loader, no saving in size.
    Dequantized,
}

impl Format {
    /// The integer layout; `None` for ordinary weights.
    pub fn layout(self) -> Option<Layout> {
        match self {
            Self::CompressedTensors => Some(Layout::CompressedTensors),
            Self::Awq => Some(Layout::AutoAwq),
            Self::Gptq => Some(Layout::Gptq { v2: false }),
            Self::GptqV2 => Some(Layout::Gptq { v2: true }),
            Self::Strata => Some(Layout::Strata),
            Self::Dequantized => None,
        }
    }

    /// Name as on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::Awq => "awq",
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq-v2",
            Self::Strata => "strata",
            Self::Dequantized => "dequantized",
        }
    }
}

/// Another grid for the layers that a pattern names.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// Name pattern, e.g. `*.down_proj` or `model.layers.0.*`
    pub pattern: String,
    /// Bits per weight
    #[serde(default)]
    pub bits: Option<u8>,
    /// Group size; 0 for whole rows
    #[serde(default)]
    pub group_size: Option<usize>,
    /// Symmetric grid
    #[serde(default)]
    pub symmetric: Option<bool>,
}

/// Everything that decides what a quantisation job writes.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct QuantizeOptions {
    /// Quantiser
    #[arg(long, value_enum)]
    pub method: Method,
    #[command(flatten)]
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub grid: GridOptions,
    /// File format of the quantised weights
    #[arg(long, value_enum, default_value_t = Format::CompressedTensors)]
    pub format: Format,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub calibration: CalibrationOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub gptq: GptqOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub awq: AwqOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub adadim: AdadimOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub rsq: RsqOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub pvq: PvqOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub layerwise: LayerwiseQuantOptions,
    /// Leave layers whose name matches this pattern as they are (repeatable)
    #[arg(long, value_name = "PATTERN", visible_alias = "keep")]
    pub exclude: Vec<String>,
    /// Quantise only layers whose name matches this pattern (repeatable)
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,
    /// Other grids for some layers, first match wins (recipe only)
    #[arg(skip)]
    pub overrides: Vec<Override>,
    /// Memory for calibration activations; beyond it they go to a temporary file
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub memory: MemoryLimit,
    /// Largest size of one output shard
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub max_shard_size: MemoryLimit,
}

impl Default for QuantizeOptions {
    /// The defaults of the flags.
    fn default() -> Self {
        Self {
            method: Method::default(),
            grid: GridOptions::default(),
            format: Format::default(),
            calibration: CalibrationOptions::default(),
            gptq: GptqOptions::default(),
            awq: AwqOptions::default(),
            adadim: AdadimOptions::default(),
            rsq: RsqOptions::default(),
            pvq: PvqOptions::default(),
            layerwise: LayerwiseQuantOptions::default(),
            exclude: Vec::new(),
            only: Vec::new(),
            overrides: Vec::new(),
            memory: MemoryLimit::default(),
            max_shard_size: MemoryLimit(5_000_000_000),
        }
    }
}

/// Where calibration windows come from.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct CalibrationOptions {
    /// Calibration text: .txt, .jsonl (key `text`), .json (list of strings, or of token id lists); without it the embedded almanac is used
    #[arg(long = "calibration", value_name = "FILE")]
    pub file: Option<std::path::PathBuf>,
    /// Number of calibration samples
    #[arg(long, default_value_t = 128)]
    pub samples: usize,
    /// Tokens per calibration window
    #[arg(long, default_value_t = 512)]
    pub sequence_length: usize,
    /// How windows are drawn; `auto` takes the rule of the method's reference code
    #[arg(long, value_enum, default_value_t = Sampling::Auto)]
    pub sampling: Sampling,
    /// Seed of the draw
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self { file: None, samples: 128, sequence_length: 512, sampling: Sampling::Auto, seed: 0 }
    }
}

/// How calibration windows are drawn.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// `documents` for AWQ and AdaDim, `windows` otherwise.
    #[default]
    Auto,
    /// Shuffled documents that fit one window, joined and cut (AWQ reference).
    Documents,
    /// Random windows of the joined text (GPTQ reference).
    Windows,
}

/// A number of bytes, written with a unit: `512MiB`, `4GiB`, `5GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, schemars::JsonSchema)]
#[schemars(with = "String")]
pub struct MemoryLimit(pub u64);

impl Default for MemoryLimit {
    fn default() -> Self {
        Self(4 << 30)
    }
}

impl std::str::FromStr for MemoryLimit {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        report::human::parse_bytes(text).map(Self)
    }
}

impl std::fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", report::human::bytes(self.0))
    }
}

impl serde::Serialize for MemoryLimit {
    /// The exact number of bytes.
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for MemoryLimit {
    /// A number of bytes, or text with a unit.
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Size {
            Bytes(u64),
            Text(String),
        }
        match Size::deserialize(d)? {
            Size::Bytes(bytes) => Ok(Self(bytes)),
            Size::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl QuantizeOptions {
    /// Whether this job looks at activations.
    pub fn calibrates(&self) -> bool {
        match self.method {
            Method::Awq => self.awq.calibrates(),
            Method::Adadim => self.adadim.calibrates(),
            Method::Rsq => self.rsq.calibrates(),
            Method::Pvq => self.pvq.calibrates(),
            method => method.calibrates(),
        }
    }

    /// Whether the job needs calibration text at all: for its method, or to decide widths.
    pub fn needs_text(&self) -> bool {
        self.calibrates() || self.layerwise.calibrates()
    }

    /// Whether any layer is put on a grid.
    pub fn quantises(&self) -> bool {
        !(self.method == Method::Rsq && self.rsq.rotate_only)
    }

    /// How finely layers are quantised, in words.
    pub fn precision(&self) -> String {
        match self.method {
            Method::Pvq => self.pvq.precision(self.grid.bits),
            _ => format!("{} bits", self.grid.bits),
        }
    }

    /// Whether GPTQ chooses the codes.
    pub(crate) fn rounds_by_gptq(&self) -> bool {
        match self.method {
            Method::Gptq => true,
            Method::Awq => self.awq.rounding == Rounding::Gptq,
            Method::Adadim => self.adadim.base == Base::Gptq,
            Method::Rsq => self.rsq.calibrates(),
            Method::Rtn | Method::Pvq => false,
        }
    }

    /// The options of GPTQ as the method uses them.
    pub(crate) fn used_gptq(&self) -> GptqOptions {
        match self.method {
            Method::Adadim => self.adadim.gptq(&self.gptq, &self.grid),
            _ => self.gptq.clone(),
        }
    }

    /// Refuses options that cannot work, before any file is touched.
    pub fn check(&self) -> Result<()> {
        crate::grid::Grid::new(&self.grid)?;
        if self.rounds_by_gptq() {
            self.used_gptq().check(&self.grid)?;
        }
        if self.method == Method::Adadim {
            self.adadim.check(self)?;
        }
        if self.method == Method::Rsq {
            self.rsq.check(self)?;
        }
        if self.method == Method::Pvq {
            self.pvq.check(self)?;
        }
        if self.method == Method::Awq {
            self.awq.check()?;
            if self.awq.keep_channels.is_some() && self.format != Format::Dequantized {
                return Err(Error::Options(
                    "--keep-channels mixes precisions within a layer, which packed formats cannot \
                     hold: use --format dequantized"
                        .into(),
                ));
            }
        }
        if self.needs_text() {
            if self.calibration.samples == 0 {
                return Err(Error::Options(
                    "no calibration samples: give --samples 128, or use --method rtn".into(),
                ));
            }
            if self.calibration.sequence_length < 2 {
                return Err(Error::Options("calibration windows need at least 2 tokens".into()));
            }
        }
        if self.format == Format::Awq && self.grid.bits != 4 {
            return Err(Error::Options(format!(
                "the awq format holds 4 bits only, not {}; use --format compressed-tensors or \
                 dequantized",
                self.grid.bits
            )));
        }
        if self.format == Format::Gptq && !self.grid.symmetric {
            return Err(Error::Options(
                "the gptq v1 format cannot hold a zero point of 0, which asymmetric grids need: \
                 use --format gptq-v2, or --symmetric"
                    .into(),
            ));
        }
        if self.format == Format::Awq && !self.overrides.is_empty() {
            return Err(Error::Options(
                "the awq format holds one grid for all layers: per-layer overrides need --format \
                 compressed-tensors, gptq-v2, strata or dequantized"
                    .into(),
            ));
        }
        self.layerwise.check(self)?;
        let reordered = self.rounds_by_gptq()
            && self.used_gptq().act_order
            && !self.used_gptq().static_groups
            && self.grid.granularity == crate::grid::Granularity::Group
            && self.grid.group_size > 0;
        if reordered && matches!(self.format, Format::Awq | Format::CompressedTensors) {
            return Err(Error::Options(
                "with --act-order the columns of a group are not neighbours, which this format \
                 cannot hold: add --static-groups, or use --format gptq-v2"
                    .into(),
            ));
        }
        Ok(())
    }
}
