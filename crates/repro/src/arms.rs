//! One arm of an experiment: a quantisation job on a subject, and the perplexity that comes out.

use crate::subjects::Subject;
use crate::{Result, Settings};
use compress::awq::Search;
use compress::options::CalibrationOptions;
use compress::{Calibration, Format, LayerResult, Method, Plan, QuantizeOptions, Target};
use data::text;
use nn::Model;
use report::{Cell, Column, Table};
use std::collections::BTreeMap;

/// Calibration seeds of every experiment.
pub const SEEDS: [u64; 3] = [0, 1, 2];

/// Finished runs by what they were: perplexity, searched mappings, those worse than rounding.
pub type Memo = std::rc::Rc<std::cell::RefCell<BTreeMap<(Condition, Arm, u64), (f64, [usize; 2])>>>;

/// What is done to the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
    /// Round to nearest.
    Rtn,
    /// AWQ, scale search only.
    Scale,
    /// AWQ, clipping only.
    Clip,
    /// AWQ, scale and clipping (plain search, the paper's).
    ScaleClip,
    /// AWQ, scale and clipping (duo search).
    DuoClip,
    /// GPTQ.
    Gptq,
}

impl Arm {
    /// Name for tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Scale => "awq scale",
            Self::Clip => "awq clip",
            Self::ScaleClip => "awq scale+clip",
            Self::DuoClip => "awq duo+clip",
            Self::Gptq => "gptq",
        }
    }

    fn options(self, bits: u8, group_size: usize) -> QuantizeOptions {
        let mut options = QuantizeOptions { format: Format::Dequantized, ..Default::default() };
        options.grid.bits = bits;
        options.grid.group_size = group_size;
        options.method = match self {
            Self::Rtn => Method::Rtn,
            Self::Gptq => Method::Gptq,
            _ => Method::Awq,
        };
        options.awq.no_scale = self == Self::Clip;
        options.awq.no_clip = self == Self::Scale;
        if self == Self::DuoClip {
            options.awq.search = Search::Duo;
        }
        options
    }
}

/// A cell of an experiment: subject, bits, group size.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Condition {
    /// Model name.
    pub model: String,
    /// `natural` or `planted`.
    pub weights: &'static str,
    /// Bits per weight.
    pub bits: u8,
    /// Group size, 0 for rows.
    pub group: usize,
}

/// Perplexities of all arms under one condition.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The condition.
    pub condition: Condition,
    /// Perplexity of the unquantised model.
    pub full: f64,
    /// Perplexity by arm, one per seed (data-free arms repeat theirs).
    pub arms: BTreeMap<Arm, Vec<f64>>,
    /// Mappings whose searched loss exceeded that of rounding.
    pub worse_than_rounding: usize,
    /// Mappings searched.
    pub searched: usize,
}

impl Measured {
    /// Perplexities of an arm, by seed.
    pub fn of(&self, arm: Arm) -> &[f64] {
        self.arms.get(&arm).map(Vec::as_slice).unwrap_or_default()
    }

    /// Mean perplexity of an arm.
    pub fn mean(&self, arm: Arm) -> f64 {
        let of = self.of(arm);
        of.iter().sum::<f64>() / of.len().max(1) as f64
    }
}

/// Runs `arms` at every bit width and group size of every subject.
pub fn measure(
    settings: &Settings,
    subjects: &[Subject],
    bits: &[u8],
    arms: &[Arm],
) -> Result<Vec<Measured>> {
    let runs: usize = subjects
        .iter()
        .map(|s| {
            let seeds: usize =
                arms.iter().map(|a| if *a == Arm::Rtn { 1 } else { SEEDS.len() }).sum();
            bits.len() * s.groups.len() * seeds
        })
        .sum();
    let progress = report::Progress::new("quantise and evaluate", runs as u64, "runs");
    let mut all = Vec::new();
    for subject in subjects {
        let model = Model::open(&subject.path)?;
        let full = perplexity(&model, subject)?;
        let windows: Vec<(u64, Calibration)> = SEEDS
            .iter()
            .map(|&seed| Ok((seed, calibration(settings, subject, seed)?)))
            .collect::<Result<_>>()?;
        for &bits in bits {
            for &group in &subject.groups {
                let mut measured = Measured {
                    condition: Condition {
                        model: subject.name.clone(),
                        weights: subject.weights,
                        bits,
                        group,
                    },
                    full,
                    arms: BTreeMap::new(),
                    worse_than_rounding: 0,
                    searched: 0,
                };
                for &arm in arms {
                    let options = arm.options(bits, group);
                    let mut values = Vec::new();
                    for (seed, calibration) in &windows {
                        if arm == Arm::Rtn && !values.is_empty() {
                            values.push(values[0]);
                            continue;
                        }
                        let key = (measured.condition.clone(), arm, *seed);
                        let known = settings.memo.borrow().get(&key).copied();
                        let (value, [searched, worse]) = match known {
                            Some(known) => known,
                            None => {
                                let (value, layers) =
                                    run(settings, subject, &model, &options, calibration)?;
                                (value, count_losses(&layers))
                            }
                        };
                        settings.memo.borrow_mut().insert(key, (value, [searched, worse]));
                        measured.searched += searched;
                        measured.worse_than_rounding += worse;
                        values.push(value);
                        progress.inc(1);
                    }
                    measured.arms.insert(arm, values);
                }
                all.push(measured);
            }
        }
    }
    progress.finish();
    Ok(all)
}

/// Calibration windows: 32 random ones of 128 tokens (16 when fast).
pub fn calibration(settings: &Settings, subject: &Subject, seed: u64) -> Result<Calibration> {
    windows(subject, if settings.fast { 16 } else { 32 }, seed)
}

/// `count` random calibration windows.
pub fn windows(subject: &Subject, count: usize, seed: u64) -> Result<Calibration> {
    let (length, documents) = (subject.window, &subject.calibration);
    let windows = text::calibration_random(documents, &subject.tokenizer, count, length, seed)?;
    Ok(Calibration::new(windows.tokens, windows.length)?)
}

/// Runs one arm; returns its perplexity and what every layer cost.
pub fn run(
    settings: &Settings,
    subject: &Subject,
    model: &Model,
    options: &QuantizeOptions,
    calibration: &Calibration,
) -> Result<(f64, Vec<LayerResult>)> {
    let outcome = quantize(settings, model, options, calibration)?;
    let value = perplexity(&Model::open(&outcome.path)?, subject)?;
    Ok((value, outcome.layers))
}

/// Quantises a model into the scratch directory; a later arm replaces it.
pub fn quantize(
    settings: &Settings,
    model: &Model,
    options: &QuantizeOptions,
    calibration: &Calibration,
) -> Result<compress::Outcome> {
    let options = QuantizeOptions {
        calibration: CalibrationOptions {
            samples: calibration.windows().max(1),
            sequence_length: calibration.length(),
            ..Default::default()
        },
        ..options.clone()
    };
    let plan = Plan::new(&model.decoder, &model.checkpoint, &options)?;
    let out = settings.scratch.join("arm");
    let target =
        Target { out: &out, resume: false, overwrite: true, provenance: serde_json::Value::Null };
    let progress = report::Progress::hidden();
    Ok(compress::run(model, &plan, &options, calibration, &target, &progress)?)
}

/// Perplexity of a model on the subject's held-out text.
pub fn perplexity(model: &Model, subject: &Subject) -> Result<f64> {
    let tokens = &subject.evaluation;
    Ok(eval::perplexity(model, tokens, subject.window, subject.window)?.perplexity)
}

/// Mappings searched, and those whose searched loss exceeds that of rounding.
fn count_losses(layers: &[LayerResult]) -> [usize; 2] {
    let mut counts = [0; 2];
    for layer in layers {
        let number = |key: &str| layer.details.get(key).and_then(|v| v.as_f64());
        if let (Some(found), Some(rounding)) = (number("search_loss"), number("rounding_loss")) {
            counts[0] += 1;
            counts[1] += usize::from(found > rounding);
        }
    }
    counts
}

/// The numbers of an experiment as a table: mean over seeds and the spread (largest - smallest).
pub fn table(title: &str, measured: &[Measured], arms: &[Arm]) -> Table {
    let mut columns = vec![
        Column::left("model"),
        Column::left("weights"),
        Column::right("bits"),
        Column::right("group"),
        Column::right("full precision"),
    ];
    columns.extend(arms.iter().map(|arm| Column::right(arm.label())));
    let mut table = Table::new(title, columns);
    for m in measured {
        let group =
            if m.condition.group == 0 { "row".into() } else { m.condition.group.to_string() };
        let mut row = vec![
            Cell::text(&m.condition.model),
            Cell::text(m.condition.weights),
            Cell::Int(i64::from(m.condition.bits)),
            Cell::text(group),
            Cell::Float(m.full, 4),
        ];
        for &arm in arms {
            let spread = spread(m.of(arm));
            row.push(Cell::text(if spread > 0.0 {
                format!("{:.4} ±{:.4}", m.mean(arm), spread / 2.0)
            } else {
                format!("{:.4}", m.mean(arm))
            }));
        }
        table.push(row);
    }
    table
}

/// Largest minus smallest.
pub fn spread(values: &[f64]) -> f64 {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.is_empty() { 0.0 } else { high - low }
}

/// Perplexities of an arm under every condition, as JSON keyed by condition.
pub fn json(measured: &[&Measured], arm: Arm) -> serde_json::Value {
    let entry = |m: &&Measured| {
        let c = &m.condition;
        let key = format!("{} {} {} bits group {}", c.model, c.weights, c.bits, c.group);
        (key, serde_json::json!(m.of(arm)))
    };
    serde_json::Value::Object(measured.iter().map(entry).collect())
}
