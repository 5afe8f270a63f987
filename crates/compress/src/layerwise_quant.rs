//! Layer-wise quantisation: which bits each layer gets, on top of any quantiser of the room
//! (Dumitru et al. 2024, arXiv 2406.17415).
//!
//! Two ways lead to a [`Schedule`]:
//!
//! - *By importance*, the paper's: one cheap score orders the blocks, and the less important ones
//!   get the lower of two (or three) widths until an average is met (`score`, `assign`).
//! - *By budget*: the error of every layer at every width is measured on calibration text, and the
//!   allocator finds the cheapest sum of errors within a number of bits or bytes (`budget`).
//!
//! A schedule becomes overrides of the job's grid before the job is planned, so that the quantiser
//! under it never knows.

use crate::grid::BITS;
use crate::options::{Format, Method, QuantizeOptions};
use crate::{Error, Result};

mod assign;
mod budget;
mod rounded;
mod schedule;
mod score;

pub use assign::{Goal, Widths, assign, low_count};
pub use budget::{LayerCurve, UnitCurve, curves};
pub use rounded::{Rounded, rounded_model, without_blocks};
pub use schedule::{FILE, LayerWidth, Point, Resolved, Schedule, Settings, resolve};
pub use score::{InputModification, Scores, cosine, scores, z_score_share};

/// Options of layer-wise quantisation: different bits for different layers, under any method.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct LayerwiseQuantOptions {
    /// Width of the less important blocks; the others get --bits. Needs --average-bits, --low-blocks or --budget
    #[arg(long, value_name = "BITS")]
    pub low_bits: Option<u8>,
    /// A third width between --bits and --low-bits
    #[arg(long, value_name = "BITS")]
    pub middle_bits: Option<u8>,
    /// Share of blocks held at the middle width; without it the middle width is filled before any block goes to the lowest
    #[arg(long, value_name = "SHARE")]
    pub middle_share: Option<f64>,
    /// Group size of the lowest width (default: as --group-size)
    #[arg(long, value_name = "SIZE")]
    pub low_group_size: Option<usize>,
    /// Average bits per weight over the blocks' linear layers, any number between the widths
    #[arg(long, value_name = "BITS")]
    pub average_bits: Option<f64>,
    /// What the average counts: codes alone (nominal), or scales and zero points too (effective)
    #[arg(long, value_enum, default_value_t = Count::Nominal)]
    pub average_count: Count,
    /// How many blocks get the lower width, as a number (10) or a share (25%)
    #[arg(long, value_name = "COUNT")]
    pub low_blocks: Option<Share>,
    /// What makes a block important
    #[arg(long, value_enum, default_value_t = LayerScore::Lim)]
    pub layer_score: LayerScore,
    /// Lower the most important blocks instead of the least (a baseline)
    #[arg(long)]
    pub reverse_order: bool,
    /// Seed of the random order
    #[arg(long, default_value_t = 0)]
    pub order_seed: u64,
    /// Calibration windows that scores look at
    #[arg(long, default_value_t = 64)]
    pub score_samples: usize,
    /// How lim compares hidden states: per token, flattened over the sequence, or the last token
    #[arg(long, value_enum, default_value_t = Cosine::Token)]
    pub lim_cosine: Cosine,
    /// Leave the first token of every window out of lim (it often carries a huge norm)
    #[arg(long)]
    pub lim_skip_first: bool,
    /// zd: count weights on both sides of the mean
    #[arg(long)]
    pub zd_two_sided: bool,
    /// zd: mean of the linears' own shares instead of one distribution per block
    #[arg(long)]
    pub zd_per_linear: bool,
    /// zd: standard deviations from which a weight counts
    #[arg(long, default_value_t = 1.0)]
    pub zd_threshold: f64,
    /// Try at most so many exchanges of a high and a low block, keeping those that bring predictions nearer to full precision
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub refine_swaps: usize,
    /// Measure the trade-off between average bits and perplexity at so many points (9 without a number)
    #[arg(long, value_name = "POINTS", default_value_t = 0, num_args = 0..=1, require_equals = true, default_missing_value = "9")]
    pub curve: usize,
    /// Size that bits are distributed for: bits per weight with scales and zero points (3.25bpw), or bytes of all tensors (3MiB)
    #[arg(long, value_name = "SIZE")]
    pub budget: Option<Budget>,
    /// Widths that a budget may use
    #[arg(long, value_name = "BITS", value_delimiter = ',', default_values_t = BITS)]
    pub budget_bits: Vec<u8>,
    /// What gets one width: a single linear layer, the layers that read the same input (loaders fuse them), or a block
    #[arg(long, value_enum, default_value_t = BudgetUnit::Input)]
    pub budget_unit: BudgetUnit,
    /// How a layer is quantised when its error is measured
    #[arg(long, value_enum, default_value_t = BudgetError::Rtn)]
    pub budget_error: BudgetError,
    /// What makes errors of different layers comparable
    #[arg(long, value_enum, default_value_t = BudgetWeight::Loss)]
    pub budget_weight: BudgetWeight,
    /// Calibration windows on which the effect of a layer on predictions is measured
    #[arg(long, default_value_t = 16)]
    pub probe_samples: usize,
    /// Width at which that effect is measured
    #[arg(long, value_name = "BITS", default_value_t = 3)]
    pub probe_bits: u8,
}

impl Default for LayerwiseQuantOptions {
    fn default() -> Self {
        Self {
            low_bits: None,
            middle_bits: None,
            middle_share: None,
            low_group_size: None,
            average_bits: None,
            average_count: Count::Nominal,
            low_blocks: None,
            layer_score: LayerScore::Lim,
            reverse_order: false,
            order_seed: 0,
            score_samples: 64,
            lim_cosine: Cosine::Token,
            lim_skip_first: false,
            zd_two_sided: false,
            zd_per_linear: false,
            zd_threshold: 1.0,
            refine_swaps: 0,
            curve: 0,
            budget: None,
            budget_bits: BITS.to_vec(),
            budget_unit: BudgetUnit::Input,
            budget_error: BudgetError::Rtn,
            budget_weight: BudgetWeight::Loss,
            probe_samples: 16,
            probe_bits: 3,
        }
    }
}

/// A value of an option with a fixed set of words.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $word:ident),* $(,)? }) => {
        $(#[$meta])*
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
        pub enum $name {
            $($(#[$doc])* $word),*
        }
    };
}

words! {
    /// What an average counts.
    Count {
        /// Codes alone.
        Nominal,
        /// Codes, scales and zero points.
        Effective,
    }
}

words! {
    /// What orders the blocks.
    LayerScore {
        /// Layer input modification: how much a block changes the residual stream.
        Lim,
        /// Z-score distribution: how few weights lie far out (no data).
        Zd,
        /// The mean of the ranks by lim and zd.
        LimZd,
        /// Measured: divergence of predictions when the block alone is at the lowest width.
        Sensitivity,
        /// Mean norm of the residual stream entering the block.
        ActivationNorm,
        /// Earlier blocks are more important.
        First,
        /// Later blocks are more important.
        Last,
        /// A seeded random order.
        Random,
    }
}

words! {
    /// What lim compares.
    Cosine {
        /// Hidden states token by token, averaged.
        Token,
        /// All hidden states of a window as one vector.
        Flat,
        /// The last token of a window.
        Last,
    }
}

words! {
    /// What gets one width in a budget.
    BudgetUnit {
        /// Every linear layer by itself.
        Linear,
        /// The linear layers that read the same input: q, k, v; gate and up.
        Input,
        /// A whole block.
        Block,
    }
}

words! {
    /// How a layer is quantised when its error is measured.
    BudgetError {
        /// Rounded to nearest.
        Rtn,
        /// By GPTQ, on inputs at full precision.
        Gptq,
    }
}

words! {
    /// What makes errors of different layers comparable.
    BudgetWeight {
        /// Relative output error times the divergence of predictions that it causes, measured once per unit.
        Loss,
        /// The divergence of predictions itself, measured at every width.
        Measured,
        /// Relative output error: every layer counts the same.
        Relative,
        /// Squared output error as it is.
        Absolute,
    }
}

/// A number of blocks, or a share of them.
#[derive(Debug, Clone, Copy, PartialEq, schemars::JsonSchema)]
#[schemars(with = "String")]
pub enum Share {
    /// So many.
    Count(usize),
    /// This fraction, between 0 and 1, rounded half up.
    Fraction(f64),
}

impl Share {
    /// How many of `n`.
    pub fn of(self, n: usize) -> usize {
        match self {
            Self::Count(count) => count,
            Self::Fraction(share) => (share * n as f64 + 0.5 + 1e-9).floor() as usize,
        }
    }
}

impl std::str::FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refuse = || format!("`{text}` is neither a number of blocks (10) nor a share (25%)");
        match text.trim().strip_suffix('%') {
            None => text.trim().parse().map(Self::Count).map_err(|_| refuse()),
            Some(percent) => {
                let share: f64 = percent.trim().parse().map_err(|_| refuse())?;
                if !(0.0..=100.0).contains(&share) {
                    return Err(format!("`{text}` is not between 0% and 100%"));
                }
                Ok(Self::Fraction(share / 100.0))
            }
        }
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Fraction(share) => write!(f, "{}%", share * 100.0),
        }
    }
}

/// A size to stay within.
#[derive(Debug, Clone, Copy, PartialEq, schemars::JsonSchema)]
#[schemars(with = "String")]
pub enum Budget {
    /// Mean bits per weight of the quantised layers, scales and zero points included.
    BitsPerWeight(f64),
    /// Bytes of all tensors of the output.
    Bytes(u64),
}

impl std::str::FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let text = text.trim();
        if let Some(number) = text.strip_suffix("bpw") {
            let bits: f64 = number
                .trim()
                .parse()
                .map_err(|_| format!("`{text}` is not a number of bits per weight (3.25bpw)"))?;
            if !(bits.is_finite() && bits > 0.0) {
                return Err(format!("`{text}`: bits per weight must be positive"));
            }
            return Ok(Self::BitsPerWeight(bits));
        }
        // A bare number would be bytes; whoever writes 3.5 means bits.
        if text.parse::<f64>().is_ok_and(|number| number < 64.0) {
            return Err(format!("`{text}` has no unit: write {text}bpw, or bytes as 3MiB"));
        }
        report::human::parse_bytes(text).map(Self::Bytes)
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::BitsPerWeight(bits) => write!(f, "{bits}bpw"),
            Self::Bytes(bytes) => write!(f, "{bytes}B"),
        }
    }
}

/// Recipes and records hold the text of the flag.
macro_rules! as_text {
    ($name:ident, $what:literal) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(
                &self,
                s: S,
            ) -> std::result::Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(
                d: D,
            ) -> std::result::Result<Self, D::Error> {
                // YAML reads `10` as a number.
                #[derive(serde::Deserialize)]
                #[serde(untagged, expecting = $what)]
                enum Form {
                    Number(u64),
                    Text(String),
                }
                let text = match Form::deserialize(d)? {
                    Form::Number(number) => number.to_string(),
                    Form::Text(text) => text,
                };
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(Share, "a number of blocks or a share such as 25%");
as_text!(Budget, "a size such as 3.25bpw or 3MiB");

impl LayerwiseQuantOptions {
    /// Whether layers get widths of their own.
    pub fn active(&self) -> bool {
        self.low_bits.is_some() || self.budget.is_some()
    }

    /// Whether deciding looks at activations.
    pub fn calibrates(&self) -> bool {
        let scored = self.low_bits.is_some()
            && matches!(
                self.layer_score,
                LayerScore::Lim
                    | LayerScore::LimZd
                    | LayerScore::Sensitivity
                    | LayerScore::ActivationNorm
            );
        let budgeted = self.budget.is_some() && self.low_bits.is_none();
        scored || budgeted || (self.active() && self.refine_swaps > 0)
    }

    /// The widths of a schedule by importance, widest first.
    fn widths(&self, high: u8) -> Vec<u8> {
        [Some(high), self.middle_bits, self.low_bits].into_iter().flatten().collect()
    }

    /// Refuses what cannot work with the rest of the job, before any file is touched.
    pub fn check(&self, job: &QuantizeOptions) -> Result<()> {
        let refuse = |reason: String| Err(Error::Options(reason));
        if !self.active() {
            let stray = [
                ("--average-bits", self.average_bits.is_some()),
                ("--low-blocks", self.low_blocks.is_some()),
                ("--middle-bits", self.middle_bits.is_some()),
                ("--low-group-size", self.low_group_size.is_some()),
                ("--refine-swaps", self.refine_swaps > 0),
                ("--curve", self.curve > 0),
            ];
            return match stray.iter().find(|(_, given)| *given) {
                Some((flag, _)) => refuse(format!(
                    "{flag} belongs to a schedule of several widths: give --low-bits (blocks by \
                     importance), or --budget (layers by measured error)"
                )),
                None => Ok(()),
            };
        }
        if job.format == Format::Awq {
            return refuse(
                "the awq format holds one width, 4 bits, for all layers (or 16 bits for some, with \
                 --exclude): for a schedule use --format compressed-tensors, gptq-v2, strata or \
                 dequantized"
                    .into(),
            );
        }
        if job.method == Method::Pvq && (job.pvq.rate.is_some() || job.pvq.pulses.is_some()) {
            return refuse(
                "--pvq-rate and --pvq-pulses fix one rate for every layer: drop them, and the \
                 schedule's bits become rates"
                    .into(),
            );
        }
        if !(self.zd_threshold.is_finite() && self.zd_threshold > 0.0) {
            return refuse(format!("--zd-threshold {} must be positive", self.zd_threshold));
        }
        if let Some(share) = self.middle_share
            && !(0.0..=1.0).contains(&share)
        {
            return refuse(format!("--middle-share {share} is not between 0 and 1"));
        }
        let Some(low) = self.low_bits else { return self.check_budget(job) };
        let widths = self.widths(job.grid.bits);
        for &bits in &widths {
            if !supported(job.format).contains(&bits) {
                return refuse(format!(
                    "{bits} bits cannot be written as {:?}; it holds {:?}",
                    job.format,
                    supported(job.format)
                ));
            }
        }
        if !widths.windows(2).all(|w| w[0] > w[1]) {
            return refuse(format!(
                "widths must fall: --bits {}{} --low-bits {low}",
                job.grid.bits,
                self.middle_bits.map(|b| format!(" --middle-bits {b}")).unwrap_or_default()
            ));
        }
        let targets =
            [self.average_bits.is_some(), self.low_blocks.is_some(), self.budget.is_some()];
        match targets.iter().filter(|given| **given).count() {
            1 => {}
            0 => {
                return refuse(
                    "how many blocks should get --low-bits? give --average-bits, --low-blocks or \
                     --budget"
                        .into(),
                );
            }
            _ => {
                return refuse(
                    "--average-bits, --low-blocks and --budget are three ways to set one target; \
                     give one"
                        .into(),
                );
            }
        }
        if let Some(target) = self.average_bits {
            let (low, high) = (f64::from(low), f64::from(job.grid.bits));
            let nominal = self.average_count == Count::Nominal;
            if nominal && !(low..=high).contains(&target) {
                return refuse(format!(
                    "an average of {target} bits is outside what {low} and {high} bits reach: give \
                     --average-bits from {low} to {high}"
                ));
            }
        }
        self.check_bytes(job)
    }

    fn check_budget(&self, job: &QuantizeOptions) -> Result<()> {
        if self.average_bits.is_some() || self.low_blocks.is_some() || self.refine_swaps > 0 {
            return Err(Error::Options(
                "--average-bits, --low-blocks and --refine-swaps order whole blocks and need \
                 --low-bits; --budget alone distributes bits by measured error"
                    .into(),
            ));
        }
        let supported = supported(job.format);
        for &bits in self.budget_bits.iter().chain([&self.probe_bits]) {
            if !BITS.contains(&bits) {
                return Err(Error::Options(format!(
                    "{bits} bits are not supported; choose from {BITS:?}"
                )));
            }
        }
        if !self.budget_bits.iter().any(|b| supported.contains(b)) {
            return Err(Error::Options(format!(
                "none of --budget-bits {:?} can be written as {:?}; it holds {supported:?}",
                self.budget_bits, job.format
            )));
        }
        self.check_bytes(job)
    }

    fn check_bytes(&self, job: &QuantizeOptions) -> Result<()> {
        let bytes = matches!(self.budget, Some(Budget::Bytes(_)));
        if bytes && matches!(job.method, Method::Rsq | Method::Pvq) {
            return Err(Error::Options(format!(
                "what {} writes besides codes depends on the weights, so bytes cannot be promised: \
                 give the budget as bits per weight (3.25bpw)",
                job.method.slug()
            )));
        }
        if bytes && job.format == Format::Dequantized {
            return Err(Error::Options(
                "the dequantized format is as large as the original whatever the bits: give the \
                 budget as bits per weight (3.25bpw), or another --format"
                    .into(),
            ));
        }
        Ok(())
    }
}

/// Widths that a format holds.
pub(crate) fn supported(format: Format) -> &'static [u8] {
    match format {
        Format::Awq => &[4],
        Format::Gptq | Format::GptqV2 => &[2, 3, 4, 8],
        Format::CompressedTensors | Format::Strata | Format::Dequantized => &BITS,
    }
}

#[cfg(test)]
mod tests;
