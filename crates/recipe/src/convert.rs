//! Converting a checkpoint from one container to another.
//!
//! What can be kept exactly is kept: codes, scales and zero points move from one layout to the next
//! as they are. Where a format has no place for something, the job refuses before any work, names the
//! layers and says what would work; `--lossy` rounds them to the nearest grid instead. Writing
//! ordinary weights (`safetensors`) dequantises, and a `--type` rounds: both are asked for, so
//! neither is refused.
//!
//! - `layers`: what a layer is in the source, and whether a format can hold it;
//! - `directory`: model directories of safetensors files;
//! - `gguf`, `architecture`: GGUF files, and what their metadata say about a network.

mod architecture;
mod directory;
mod gguf;
mod layers;

use std::collections::BTreeMap;
use std::path::PathBuf;

use compress::grid::GridOptions;
use compress::options::MemoryLimit;
use store::GgmlType;
use store::packed::Layout;
use store::packed::sparse::SparseLayout;

use crate::{Error, Result};

/// A container that a checkpoint can be written as. (PyTorch files are read, never written.)
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
pub enum ContainerFormat {
    /// Safetensors with ordinary weights; packed layers are dequantised
    #[default]
    #[value(alias = "dequantized", alias = "dense")]
    #[serde(alias = "dequantized", alias = "dense")]
    Safetensors,
    /// One GGUF file for llama.cpp
    Gguf,
    /// compressed-tensors `pack-quantized`: integer grids with groups along the input, 1 to 8 bits
    CompressedTensors,
    /// AutoAWQ GEMM: 4 bits
    Awq,
    /// GPTQ, checkpoint format v1: 2, 3, 4 or 8 bits
    Gptq,
    /// GPTQ, checkpoint format v2 (zero points stored as they are)
    GptqV2,
    /// Strata's own container: everything that Strata can store packed
    Strata,
    /// compressed-tensors `sparse-bitmask`: pruned layers as their values and one bit per weight
    SparseBitmask,
    /// compressed-tensors `sparse-24-bitmask`: layers with two zeros in every four columns
    #[value(name = "sparse-24-bitmask")]
    #[serde(rename = "sparse-24-bitmask")]
    Sparse24Bitmask,
}

impl ContainerFormat {
    /// Name as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Gguf => "gguf",
            Self::CompressedTensors => "compressed-tensors",
            Self::Awq => "awq",
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq-v2",
            Self::Strata => "strata",
            Self::SparseBitmask => "sparse-bitmask",
            Self::Sparse24Bitmask => "sparse-24-bitmask",
        }
    }

    /// The packed layout, for formats that are one.
    pub(crate) fn layout(self) -> Option<Layout> {
        match self {
            Self::CompressedTensors => Some(Layout::CompressedTensors),
            Self::Awq => Some(Layout::AutoAwq),
            Self::Gptq => Some(Layout::Gptq { v2: false }),
            Self::GptqV2 => Some(Layout::Gptq { v2: true }),
            Self::Strata => Some(Layout::Strata),
            _ => None,
        }
    }

    /// The sparse layout, for formats that are one.
    pub(crate) fn sparse(self) -> Option<SparseLayout> {
        match self {
            Self::SparseBitmask => Some(SparseLayout::Bitmask),
            Self::Sparse24Bitmask => Some(SparseLayout::TwoFour),
            _ => None,
        }
    }
}

/// The number type of weights.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum NumberType {
    /// IEEE single
    F32,
    /// IEEE half
    F16,
    /// bfloat16
    Bf16,
    /// GGUF: 8 bits, 32 weights to a scale (8.5 bits per weight)
    #[serde(rename = "q8_0")]
    #[value(name = "q8_0")]
    Q8_0,
    /// GGUF: 4 bits, symmetric (4.5 bits per weight)
    #[serde(rename = "q4_0")]
    #[value(name = "q4_0")]
    Q4_0,
    /// GGUF: 4 bits with a minimum (5 bits per weight)
    #[serde(rename = "q4_1")]
    #[value(name = "q4_1")]
    Q4_1,
    /// GGUF: 5 bits, symmetric (5.5 bits per weight)
    #[serde(rename = "q5_0")]
    #[value(name = "q5_0")]
    Q5_0,
    /// GGUF: 5 bits with a minimum (6 bits per weight)
    #[serde(rename = "q5_1")]
    #[value(name = "q5_1")]
    Q5_1,
    /// GGUF: 4 bits in super-blocks of 256 (4.5 bits per weight)
    #[serde(rename = "q4_k")]
    #[value(name = "q4_k", alias = "q4_k_s")]
    Q4K,
    /// GGUF: `q4_k`, with `q6_k` for half of the value and down projections
    #[serde(rename = "q4_k_m")]
    #[value(name = "q4_k_m")]
    Q4KM,
    /// GGUF: 5 bits in super-blocks of 256 (5.5 bits per weight)
    #[serde(rename = "q5_k")]
    #[value(name = "q5_k", alias = "q5_k_s")]
    Q5K,
    /// GGUF: 6 bits in super-blocks of 256 (6.56 bits per weight)
    #[serde(rename = "q6_k")]
    #[value(name = "q6_k")]
    Q6K,
}

impl NumberType {
    /// The block type of most layers.
    pub(crate) fn ggml(self) -> GgmlType {
        match self {
            Self::F32 => GgmlType::F32,
            Self::F16 => GgmlType::F16,
            Self::Bf16 => GgmlType::BF16,
            Self::Q8_0 => GgmlType::Q8_0,
            Self::Q4_0 => GgmlType::Q4_0,
            Self::Q4_1 => GgmlType::Q4_1,
            Self::Q5_0 => GgmlType::Q5_0,
            Self::Q5_1 => GgmlType::Q5_1,
            Self::Q4K | Self::Q4KM => GgmlType::Q4_K,
            Self::Q5K => GgmlType::Q5_K,
            Self::Q6K => GgmlType::Q6_K,
        }
    }

    /// Whether it is an ordinary floating-point type.
    pub(crate) fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }
}

/// Options of a conversion.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct ConvertOptions {
    /// Container to write
    #[arg(long, value_enum)]
    pub to: ContainerFormat,
    /// Number type of the weights: f32, f16 or bf16; for GGUF also its block types [default: as stored]
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    #[serde(rename = "type")]
    pub number: Option<NumberType>,
    /// Round layers that the format cannot hold as they are to its nearest grid
    #[arg(long)]
    pub lossy: bool,
    #[command(flatten, next_help_heading = "Grid of layers rounded with --lossy")]
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub grid: GridOptions,
    /// GGUF: leave the tokenizer out
    #[arg(long)]
    pub without_tokenizer: bool,
    /// Largest size of one output shard
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub max_shard_size: MemoryLimit,
}

impl Default for ConvertOptions {
    /// The defaults of the flags.
    fn default() -> Self {
        Self {
            to: ContainerFormat::default(),
            number: None,
            lossy: false,
            grid: GridOptions::default(),
            without_tokenizer: false,
            max_shard_size: MemoryLimit(5_000_000_000),
        }
    }
}

/// A conversion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConvertJob {
    /// Model directory or file.
    pub model: PathBuf,
    /// Output: a directory, or for GGUF a file.
    pub out: PathBuf,
    /// What to write.
    pub options: ConvertOptions,
    /// Replace an existing output.
    pub overwrite: bool,
}

/// What a conversion did.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Converted {
    /// What was written.
    pub path: PathBuf,
    /// Container that was read, and the one that was written.
    pub containers: (String, String),
    /// Bytes of tensors before and after.
    pub bytes: (u64, u64),
    /// What became of how many tensors, such as "gptq 4 bits -> Q4_0, same codes".
    pub changes: BTreeMap<String, usize>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Converted {
    fn count(&mut self, from: &str, to: &str, how: &str) {
        let line = match (from == to, how) {
            (true, "") => format!("{from}: unchanged"),
            (_, "") => format!("{from} -> {to}"),
            _ => format!("{from} -> {to}, {how}"),
        };
        *self.changes.entry(line).or_insert(0) += 1;
    }

    /// Sizes, what was kept and what changed.
    pub fn report(&self) -> report::Report {
        let mut page = report::Report::new("Convert", self.path.display().to_string());
        page.fact("from", &self.containers.0);
        page.fact("to", &self.containers.1);
        let (before, after) = self.bytes;
        page.fact(
            "size",
            format!("{} -> {}", report::human::bytes(before), report::human::bytes(after)),
        );
        let mut table = report::Table::new(
            "What became of the tensors",
            vec![report::Column::left("change"), report::Column::right("tensors")],
        );
        for (change, count) in &self.changes {
            table.push(vec![
                report::Cell::text(change.as_str()),
                report::Cell::text(count.to_string()),
            ]);
        }
        let section = page.section("");
        section.push(table);
        for note in &self.notes {
            section.text(format!("Note: {note}."));
        }
        page
    }

    fn note(&mut self, text: String) {
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }
}

impl ConvertJob {
    /// Runs the conversion.
    ///
    /// # Errors
    /// When the source cannot be read, information would be lost that was not asked to be, or the
    /// output cannot be written.
    pub fn run(&self) -> Result<Converted> {
        let options = &self.options;
        if self.out.as_os_str().is_empty() {
            return Err(Error::Recipe("convert needs `out`, what to write".into()));
        }
        if let Some(number) = options.number
            && !number.is_float()
            && options.to != ContainerFormat::Gguf
        {
            return Err(Error::Recipe(format!(
                "--type {} is a block type of GGUF; {} holds f32, f16 and bf16",
                number.ggml().name().to_lowercase(),
                options.to.name()
            )));
        }
        let partial = self.out.with_added_extension("partial");
        let fresh = !partial.exists();
        let result = self.write();
        if result.is_err() && fresh && partial.is_dir() {
            // A conversion is not resumed: nothing of a failed one may stay.
            let _ = std::fs::remove_dir_all(&partial);
        }
        result
    }

    fn write(&self) -> Result<Converted> {
        match self.options.to {
            ContainerFormat::Gguf => gguf::convert(self),
            ContainerFormat::Safetensors => directory::dense(self),
            to => match (to.layout(), to.sparse()) {
                (Some(layout), _) => directory::packed(self, layout),
                (None, Some(layout)) => directory::sparse(self, layout),
                (None, None) => Err(Error::Recipe(format!("{} is not written", to.name()))),
            },
        }
    }
}

/// Layers that a format cannot hold, collected before any work.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    layers: Vec<(String, String)>,
}

impl Refused {
    fn add(&mut self, layer: &str, reason: impl std::fmt::Display) {
        // Packing errors name the module themselves.
        let reason = reason.to_string();
        let prefix = format!("module \"{layer}\": ");
        let reason = reason.strip_prefix(&prefix).unwrap_or(&reason).to_string();
        self.layers.push((layer.to_string(), reason));
    }

    /// An error that names the layers, if there are any.
    fn check(&self, to: &str, advice: &str) -> Result<()> {
        const SHOWN: usize = 3;
        let Some((_, first)) = self.layers.first() else { return Ok(()) };
        let same = self.layers.iter().all(|(_, reason)| reason == first);
        let mut lines: Vec<String> = self
            .layers
            .iter()
            .take(SHOWN)
            .map(|(layer, reason)| if same { layer.clone() } else { format!("{layer} ({reason})") })
            .collect();
        if self.layers.len() > SHOWN {
            lines.push(format!("and {} more", self.layers.len() - SHOWN));
        }
        let reason = if same { format!(": {first}") } else { String::new() };
        Err(Error::Recipe(format!(
            "{} layer(s) cannot go into {to} without losing information{reason}: {}; {advice}",
            self.layers.len(),
            lines.join(", ")
        )))
    }
}

#[cfg(test)]
mod tests;
