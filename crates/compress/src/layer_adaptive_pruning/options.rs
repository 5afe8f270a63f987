//! Options of layer-adaptive pruning.

use super::curves::Distortion;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How the sparsity is spread over the layers.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Allocator {
    /// Measured rate-distortion curves and dynamic programming (the method).
    #[default]
    Rd,
    /// One threshold on the LAMP score.
    Lamp,
    /// Erdős–Rényi kernel: survivors in proportion to the sum of a weight's dimensions.
    Erk,
    /// The same share everywhere.
    Uniform,
    /// Uniform, but a first convolution stays whole and the last layer keeps a fifth.
    UniformPlus,
    /// One threshold on the magnitude.
    Global,
    /// The sparsities of a file.
    Table,
}

impl Allocator {
    /// Name as in options.
    pub fn label(self) -> &'static str {
        match self {
            Self::Rd => "rd",
            Self::Lamp => "lamp",
            Self::Erk => "erk",
            Self::Uniform => "uniform",
            Self::UniformPlus => "uniform-plus",
            Self::Global => "global",
            Self::Table => "table",
        }
    }
}

/// What the sparsity counts.
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
pub enum PruneTarget {
    /// Weights.
    #[default]
    Weights,
    /// Multiplications of one input: a convolution's weight counts once per output position.
    Operations,
}

/// From where the weights go on after new masks were chosen.
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
pub enum Rewind {
    /// From where training left them.
    #[default]
    None,
    /// From what they were before the round's predecessor trained them.
    Previous,
    /// From the original checkpoint.
    Start,
}

/// Which mask files are written beside the pruned checkpoint.
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
pub enum MaskExport {
    /// Boolean `<module>.weight_mask` for every pruned layer.
    #[default]
    Masks,
    /// The pair `<module>.weight_orig`, `<module>.weight_mask` that PyTorch's prune modules load.
    Pytorch,
    /// None: zeros say it all.
    None,
}

/// Defaults of another setting than this room's.
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
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// What the paper's command lines use: the worst sample decides.
    Paper,
}

/// Options of layer-adaptive pruning.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct LayerAdaptivePruningOptions {
    /// How the sparsity is spread over the layers
    #[arg(long, value_enum, default_value_t = Allocator::Rd)]
    pub allocator: Allocator,
    /// What the samples' distortions become: their mean or the worst [default: mean]
    #[arg(long, value_enum)]
    pub distortion: Option<Distortion>,
    /// Defaults of the paper's command lines
    #[arg(long, value_enum)]
    pub curve_preset: Option<Preset>,
    /// Steps of every layer's rate-distortion curve
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub curve_points: usize,
    /// Calibration samples for the curves, spread evenly over the images of --calibration, or drawn
    /// as token windows [default: 256 images, or windows of 2,048 tokens in all]
    #[arg(long, value_name = "N")]
    pub curve_samples: Option<usize>,
    /// Never let a curve fall before allocating
    #[arg(long)]
    pub monotone_curves: bool,
    /// Where measured curves are kept for later runs
    #[arg(long, value_name = "DIR")]
    pub curve_cache: Option<PathBuf>,
    /// Resolution of the allocation's table
    #[arg(long, value_name = "N", default_value_t = crate::allocate::UNITS)]
    pub allocation_units: usize,
    /// What the sparsity counts
    #[arg(long, value_enum, default_value_t = PruneTarget::Weights)]
    pub target: PruneTarget,
    /// Sparsity of single layers: JSON of name pattern to sparsity; layers that no pattern names stay dense
    #[arg(long, value_name = "FILE")]
    pub allocation_table: Option<PathBuf>,
    /// Smallest sparsity of the layers that a pattern names, as PATTERN=SPARSITY (repeatable; rd only)
    #[arg(long, value_name = "PATTERN=SPARSITY")]
    pub layer_min: Vec<String>,
    /// Largest sparsity of the layers that a pattern names, as PATTERN=SPARSITY (repeatable; rd only)
    #[arg(long, value_name = "PATTERN=SPARSITY")]
    pub layer_max: Vec<String>,
    /// Go on when a layer that loses all its weights makes the output constant
    #[arg(long)]
    pub allow_dead_layers: bool,
    /// Prune an output head that is tied to the embedding; both see the mask
    #[arg(long)]
    pub tied_head: bool,
    /// Calibrate on noise instead of data: normal pixels, evenly drawn token ids
    #[arg(long)]
    pub synthetic_calibration: bool,
    /// Rounds of pruning and training; round t prunes to 1 - (1 - sparsity)^(t/rounds)
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub rounds: u32,
    /// Training steps after every round
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub finetune_steps: u64,
    /// What the training reads: labelled images, or text [default: --calibration, or the almanac]
    #[arg(long, value_name = "FILE")]
    pub finetune_data: Option<PathBuf>,
    /// Samples per training step
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub finetune_batch: usize,
    /// Learning rate of the training (AdamW, constant)
    #[arg(long, value_name = "RATE", default_value_t = 3e-4)]
    pub finetune_rate: f64,
    /// From where the weights go on after a round's masks were chosen
    #[arg(long, value_enum, default_value_t = Rewind::None)]
    pub rewind: Rewind,
    /// Mask files beside the checkpoint
    #[arg(long, value_enum, default_value_t = MaskExport::Masks)]
    pub mask_export: MaskExport,
}

impl Default for LayerAdaptivePruningOptions {
    fn default() -> Self {
        Self {
            allocator: Allocator::Rd,
            distortion: None,
            curve_preset: None,
            curve_points: 100,
            curve_samples: None,
            monotone_curves: false,
            curve_cache: None,
            allocation_units: crate::allocate::UNITS,
            target: PruneTarget::Weights,
            allocation_table: None,
            layer_min: Vec::new(),
            layer_max: Vec::new(),
            allow_dead_layers: false,
            tied_head: false,
            synthetic_calibration: false,
            rounds: 1,
            finetune_steps: 0,
            finetune_data: None,
            finetune_batch: 100,
            finetune_rate: 3e-4,
            rewind: Rewind::None,
            mask_export: MaskExport::Masks,
        }
    }
}

impl LayerAdaptivePruningOptions {
    /// Refuses options that cannot work, before any file is touched.
    ///
    /// # Errors
    /// The option and what would work.
    pub fn check(&self, sparsity: f64) -> Result<()> {
        let refuse = |message: String| Err(Error::Options(message));
        if self.allocator != Allocator::Table && !(0.0..1.0).contains(&sparsity) {
            return refuse(format!(
                "a sparsity of {sparsity} is not possible: give the share of weights to prune, at \
                 least 0 and less than 1"
            ));
        }
        if self.curve_points < 2 {
            return refuse(format!(
                "--curve-points {} leaves nothing to choose from; give at least 2 (100 in the \
                 paper)",
                self.curve_points
            ));
        }
        if self.curve_points > usize::from(u16::MAX) {
            return refuse(format!("--curve-points {} is more than 65535", self.curve_points));
        }
        if self.allocation_units == 0 {
            return refuse("--allocation-units must be at least 1".into());
        }
        if self.curve_samples == Some(0) {
            return refuse("--curve-samples must be at least 1".into());
        }
        if self.rounds == 0 {
            return refuse("--rounds must be at least 1".into());
        }
        if self.rounds > 1 && self.allocator == Allocator::Table {
            return refuse("a table says what one round prunes: leave --rounds at 1".into());
        }
        if self.finetune_steps > 0 && self.finetune_batch == 0 {
            return refuse("--finetune-batch must be at least 1".into());
        }
        if !(self.finetune_rate.is_finite() && self.finetune_rate > 0.0) {
            return refuse(format!("--finetune-rate {} is not positive", self.finetune_rate));
        }
        if self.rewind != Rewind::None && self.finetune_steps == 0 {
            return refuse("--rewind undoes training: give --finetune-steps too".into());
        }
        match (self.allocator == Allocator::Table, self.allocation_table.is_some()) {
            (true, false) => {
                return refuse("--allocator table needs --allocation-table FILE".into());
            }
            (false, true) => return refuse("--allocation-table needs --allocator table".into()),
            _ => {}
        }
        if self.allocator != Allocator::Rd {
            if !(self.layer_min.is_empty() && self.layer_max.is_empty()) {
                return refuse(format!(
                    "--layer-min and --layer-max bound the choice of --allocator rd; {} has none",
                    self.allocator.label()
                ));
            }
            if self.target == PruneTarget::Operations {
                return refuse(format!(
                    "--target operations needs --allocator rd; {} counts weights",
                    self.allocator.label()
                ));
            }
        }
        self.bounds().map(|_| ())
    }

    /// The kind of distortion, with the preset's default.
    pub fn kind(&self) -> Distortion {
        self.distortion.unwrap_or(match self.curve_preset {
            Some(Preset::Paper) => Distortion::Worst,
            None => Distortion::Mean,
        })
    }

    /// The bounds by pattern: `[smallest, largest]` sparsity.
    ///
    /// # Errors
    /// A bound that is not PATTERN=SPARSITY with a sparsity of 0 to 1.
    pub fn bounds(&self) -> Result<Vec<(method::Pattern, [f64; 2])>> {
        let both = [(&self.layer_min, 0), (&self.layer_max, 1)];
        let mut bounds = Vec::new();
        for (list, side) in both {
            for text in list {
                let flag = if side == 0 { "--layer-min" } else { "--layer-max" };
                let refuse = |why: String| Error::Options(format!("{flag} {text}: {why}"));
                let (pattern, value) = text
                    .rsplit_once('=')
                    .ok_or_else(|| refuse("write PATTERN=SPARSITY, e.g. *.down_proj=0.5".into()))?;
                let value: f64 = value
                    .parse()
                    .ok()
                    .filter(|v| (0.0..=1.0).contains(v))
                    .ok_or_else(|| refuse(format!("`{value}` is no sparsity of 0 to 1")))?;
                let pattern = method::Pattern::new(pattern).map_err(refuse)?;
                bounds.push((pattern, if side == 0 { [value, 1.0] } else { [0.0, value] }));
            }
        }
        Ok(bounds)
    }
}

/// Reads an allocation table: a JSON object of name pattern to sparsity.
///
/// # Errors
/// A file that is not that, or a sparsity outside 0 to 1, by key.
pub fn read_table(path: &Path) -> Result<Vec<(method::Pattern, f64)>> {
    let refuse = |why: String| Error::Options(format!("{}: {why}", path.display()));
    let bytes = std::fs::read(path)
        .map_err(|source| Error::Io { path: path.display().to_string(), source })?;
    let table: BTreeMap<String, f64> = serde_json::from_slice(&bytes).map_err(|e| {
        refuse(format!("is no table of sparsities ({e}); write {{\"*.fc1\": 0.5, \"head\": 0}}"))
    })?;
    table
        .into_iter()
        .map(|(key, value)| {
            if !(0.0..=1.0).contains(&value) {
                return Err(refuse(format!("`{key}`: {value} is no sparsity of 0 to 1")));
            }
            let pattern =
                method::Pattern::new(&key).map_err(|e| refuse(format!("`{key}`: {e}")))?;
            Ok((pattern, value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut LayerAdaptivePruningOptions), sparsity: f64, word: &str) {
        let mut options = LayerAdaptivePruningOptions::default();
        change(&mut options);
        let message = options.check(sparsity).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    }

    #[test]
    fn impossible_options_are_refused() {
        refused(|_| {}, -0.1, "-0.1");
        refused(|_| {}, 1.0, "less than 1");
        refused(|_| {}, f64::NAN, "sparsity");
        refused(|o| o.curve_points = 1, 0.5, "at least 2");
        refused(|o| o.rounds = 0, 0.5, "--rounds");
        refused(|o| o.allocation_units = 0, 0.5, "--allocation-units");
        refused(|o| o.rewind = Rewind::Start, 0.5, "--finetune-steps");
        refused(|o| o.finetune_rate = -1.0, 0.5, "--finetune-rate");
        refused(|o| o.allocator = Allocator::Table, 0.5, "--allocation-table");
        refused(|o| o.allocation_table = Some("t".into()), 0.5, "--allocator table");
        refused(|o| o.layer_min = vec!["a".into()], 0.5, "PATTERN=SPARSITY");
        refused(|o| o.layer_max = vec!["a=1.5".into()], 0.5, "1.5");
        let lamp = |o: &mut LayerAdaptivePruningOptions| {
            o.allocator = Allocator::Lamp;
            o.layer_max = vec!["a=0.5".into()];
        };
        refused(lamp, 0.5, "lamp has none");
        let operations = |o: &mut LayerAdaptivePruningOptions| {
            o.allocator = Allocator::Erk;
            o.target = PruneTarget::Operations;
        };
        refused(operations, 0.5, "counts weights");
        LayerAdaptivePruningOptions::default().check(0.0).unwrap();
    }

    #[test]
    fn the_papers_preset_takes_the_worst_sample() {
        let mut options = LayerAdaptivePruningOptions::default();
        assert_eq!(options.kind(), Distortion::Mean);
        options.curve_preset = Some(Preset::Paper);
        assert_eq!(options.kind(), Distortion::Worst);
        options.distortion = Some(Distortion::Mean);
        assert_eq!(options.kind(), Distortion::Mean);
    }

    #[test]
    fn tables_are_read_or_refused_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.json");
        std::fs::write(&path, r#"{"*.fc1": 0.5, "head": 0}"#).unwrap();
        let table = read_table(&path).unwrap();
        assert_eq!(table.len(), 2);
        assert!(table[0].0.matches("net.fc1") && table[0].1 == 0.5);
        for (text, word) in [(r#"{"a": 2}"#, "`a`"), ("[1]", "no table"), ("{", "no table")] {
            std::fs::write(&path, text).unwrap();
            assert!(read_table(&path).unwrap_err().to_string().contains(word));
        }
        assert!(read_table(&dir.path().join("none")).is_err());
    }
}
