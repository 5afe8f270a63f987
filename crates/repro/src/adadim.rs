//! AdaDim against fixed directions, on rounding and on GPTQ (Heo et al. 2023; the planted weights
//! stand for the outliers of large models).
//!
//! Groups of 32 at 3 and 2 bits. Groups along the output do not notice a rescaling of input channels,
//! so what planting does to groups along the input is what there is to win.

use crate::arms::{self, SEEDS};
use crate::subjects::{self, Subject};
use crate::{Findings, Reproduction, Result, Settings};
use compress::adadim::{Base, Dim, Objective};
use compress::{Format, LayerResult, Method, QuantizeOptions};
use nn::Model;
use report::{Cell, Claim, Column, Table};
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "adadim",
    room: "compress",
    claim: "Choosing for every layer whether groups run along the input or the output loses less \
            than groups along the input everywhere, and more layers choose the output where there \
            are outliers.",
    run,
};

/// Weights per group in every arm.
const GROUP: usize = 32;

/// Windows of 128 tokens that calibrate, and that perplexity is measured on.
const CALIBRATION: usize = 64;
const EVALUATION: usize = 192;

/// What is done to the weights, by label.
type Arm = &'static str;

const RTN_OC: Arm = "rtn oc";
const RTN_IC: Arm = "rtn ic";
const RTN_HEURISTIC: Arm = "rtn heuristic";
const RTN_ADA: Arm = "rtn ada";
const RTN_LINEAR: Arm = "rtn ada, linear";
const GPTQ_OC: Arm = "gptq oc";
const GPTQ_IC: Arm = "gptq ic";
const GPTQ_ADA: Arm = "gptq ada";
const AWQ: Arm = "awq";

const ALL: [Arm; 9] =
    [RTN_OC, RTN_IC, RTN_HEURISTIC, RTN_ADA, RTN_LINEAR, GPTQ_OC, GPTQ_IC, GPTQ_ADA, AWQ];
const FAST: [Arm; 4] = [RTN_OC, RTN_IC, RTN_ADA, GPTQ_ADA];

fn options(arm: Arm, bits: u8) -> QuantizeOptions {
    let mut options = QuantizeOptions {
        method: if arm == AWQ { Method::Awq } else { Method::Adadim },
        format: Format::Dequantized,
        ..Default::default()
    };
    options.grid.bits = bits;
    options.grid.group_size = GROUP;
    options.adadim.dim = match arm {
        RTN_OC | GPTQ_OC => Dim::Oc,
        RTN_IC | GPTQ_IC => Dim::Ic,
        RTN_HEURISTIC => Dim::Heuristic,
        _ => Dim::Ada,
    };
    if [GPTQ_OC, GPTQ_IC, GPTQ_ADA].contains(&arm) {
        options.adadim.base = Base::Gptq;
    }
    if arm == RTN_LINEAR {
        options.adadim.objective = Objective::Linear;
    }
    options
}

/// What an arm gave under one condition, by seed (data-free arms repeat theirs).
#[derive(Debug, Clone, Default)]
struct Runs {
    perplexity: Vec<f64>,
    /// Share of the layers with groups along the output.
    share: Vec<f64>,
}

/// One model at one width.
struct Measured {
    model: String,
    weights: &'static str,
    bits: u8,
    full: f64,
    arms: BTreeMap<Arm, Runs>,
}

impl Measured {
    fn of(&self, arm: Arm) -> &[f64] {
        self.arms.get(arm).map(|runs| runs.perplexity.as_slice()).unwrap_or_default()
    }

    fn share(&self, arm: Arm) -> f64 {
        self.arms.get(arm).map_or(0.0, |runs| mean(&runs.share))
    }

    fn key(&self) -> String {
        format!("{} {} {} bits", self.model, self.weights, self.bits)
    }

    /// Whether `a` stays below `b` with every seed.
    fn below(&self, a: Arm, b: Arm) -> bool {
        !self.of(a).is_empty() && self.of(a).iter().zip(self.of(b)).all(|(a, b)| a < b)
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = Findings::default();
    let tokens = if settings.fast { 8192 } else { EVALUATION * 128 };
    let subjects = subjects::evaluated_on(settings, tokens, &mut findings.notes)?;
    let arms: &[Arm] = if settings.fast { &FAST } else { &ALL };
    let mut measured = Vec::new();
    let count = subjects.len() * 2 * arms.len();
    let progress = report::Progress::new("quantise and evaluate", count as u64, "arms");
    for subject in &subjects {
        for bits in [3, 2] {
            measured.push(measure(settings, subject, bits, arms, &progress)?);
        }
    }
    progress.finish();
    if measured.iter().any(|m| !m.arms.contains_key(AWQ)) && arms.contains(&AWQ) {
        findings.notes.push(
            "AWQ needs whole groups: groups of 32 do not divide the 172 inputs of stories260k's \
             down projections"
                .into(),
        );
    }
    findings.notes.push(
        "The rows of stories260k's query and key projections differ up to fivefold in norm (the slow \
         pairs of the rotation are strong), which groups along the output mix: there the input \
         direction is better whatever its channels carry."
            .into(),
    );
    findings.tables.push(table(&measured, arms));
    findings.tables.push(choices(&measured));
    findings.claims = vec![
        beats_input(&measured),
        outliers(&measured),
        share_rises(&measured),
        compensation(&measured),
        invariance(&measured),
        against_output(&measured),
    ];
    Ok(findings)
}

fn measure(
    settings: &Settings,
    subject: &Subject,
    bits: u8,
    arms: &[Arm],
    progress: &report::Progress,
) -> Result<Measured> {
    let model = Model::open(&subject.path)?;
    let mut measured = Measured {
        model: subject.name.clone(),
        weights: subject.weights,
        bits,
        full: arms::perplexity(&model, subject)?,
        arms: BTreeMap::new(),
    };
    let whole =
        model.decoder.linears(0).iter().all(|name| name.in_features().is_multiple_of(GROUP));
    // Rounding is the same network whenever the directions are: seeds often agree on them.
    let mut known: BTreeMap<Vec<bool>, f64> = BTreeMap::new();
    for &arm in arms {
        progress.inc(1);
        // The other objective is an ablation, one width is enough.
        if (arm == AWQ && !whole) || (arm == RTN_LINEAR && bits == 2) {
            continue;
        }
        let options = options(arm, bits);
        let mut runs = Runs::default();
        for seed in SEEDS {
            if !options.calibrates() && !runs.perplexity.is_empty() {
                runs.perplexity.push(runs.perplexity[0]);
                runs.share.push(runs.share[0]);
                continue;
            }
            let windows = if settings.fast { CALIBRATION / 4 } else { CALIBRATION };
            let calibration = arms::windows(subject, windows, seed)?;
            let outcome = arms::quantize(settings, &model, &options, &calibration)?;
            let directions = along_output(&outcome.layers);
            let rounds = options.method == Method::Adadim && options.adadim.base == Base::Rtn;
            let perplexity = match known.get(&directions).filter(|_| rounds) {
                Some(&known) => known,
                None => arms::perplexity(&Model::open(&outcome.path)?, subject)?,
            };
            let count = directions.iter().filter(|along| **along).count();
            runs.share.push(count as f64 / directions.len().max(1) as f64);
            runs.perplexity.push(perplexity);
            if rounds {
                known.insert(directions, perplexity);
            }
        }
        measured.arms.insert(arm, runs);
    }
    Ok(measured)
}

/// For every layer whether its groups run along the output.
fn along_output(layers: &[LayerResult]) -> Vec<bool> {
    layers.iter().map(|l| l.details.get("dim").is_some_and(|v| v == "ic")).collect()
}

fn table(measured: &[Measured], arms: &[Arm]) -> Table {
    let mut columns = vec![
        Column::left("model"),
        Column::left("weights"),
        Column::right("bits"),
        Column::right("full precision"),
    ];
    columns.extend(arms.iter().map(|arm| Column::right(*arm)));
    let title = "Perplexity in groups of 32, mean of 3 calibration seeds";
    let mut table = Table::new(title, columns);
    for m in measured {
        let mut row = vec![
            Cell::text(&m.model),
            Cell::text(m.weights),
            Cell::Int(i64::from(m.bits)),
            Cell::Float(m.full, 4),
        ];
        for arm in arms {
            let of = m.of(arm);
            let spread = arms::spread(of);
            row.push(match (of.is_empty(), spread > 0.0) {
                (true, _) => Cell::Empty,
                (_, true) => Cell::text(format!("{:.4} ±{:.4}", mean(of), spread / 2.0)),
                _ => Cell::Float(mean(of), 4),
            });
        }
        table.push(row);
    }
    table
}

fn choices(measured: &[Measured]) -> Table {
    let columns = vec![
        Column::left("model"),
        Column::right("bits"),
        Column::right("natural"),
        Column::right("planted"),
    ];
    let mut table =
        Table::new("Share of the layers with groups along the output (rtn ada)", columns);
    for (natural, planted) in pairs(measured) {
        table.push(vec![
            Cell::text(&natural.model),
            Cell::Int(i64::from(natural.bits)),
            Cell::Percent(natural.share(RTN_ADA)),
            Cell::Percent(planted.share(RTN_ADA)),
        ]);
    }
    table
}

/// Natural and planted weights of the same model at the same width.
fn pairs(measured: &[Measured]) -> Vec<(&Measured, &Measured)> {
    let planted = |n: &Measured| {
        measured.iter().find(|p| p.weights == "planted" && p.model == n.model && p.bits == n.bits)
    };
    measured
        .iter()
        .filter(|m| m.weights == "natural")
        .filter_map(|n| Some((n, planted(n)?)))
        .collect()
}

fn perplexities<'a>(measured: impl IntoIterator<Item = &'a Measured>, arm: Arm) -> Value {
    Value::Object(measured.into_iter().map(|m| (m.key(), json!(m.of(arm)))).collect())
}

fn claim(text: &str, measured: Value, baselines: Value, holds: Option<bool>) -> Claim {
    let (slug, claim) = ("adadim".into(), text.into());
    Claim { slug, claim, measured, baselines, seeds: SEEDS.to_vec(), holds }
}

/// Claim 1: at 3 bits AdaDim < rounding along the input, natural and planted.
fn beats_input(measured: &[Measured]) -> Claim {
    let here = || measured.iter().filter(|m| m.bits == 3);
    let baselines: serde_json::Map<String, Value> = [RTN_IC, RTN_HEURISTIC, AWQ]
        .into_iter()
        .map(|arm| (arm.to_string(), perplexities(here(), arm)))
        .chain([(RTN_OC.to_string(), perplexities(here(), RTN_OC))])
        .collect();
    claim(
        "3 bits: rounding with AdaDim < rounding along the input in perplexity, natural and \
         planted, every model and seed",
        perplexities(here(), RTN_ADA),
        baselines.into(),
        Some(here().all(|m| m.below(RTN_ADA, RTN_OC))),
    )
}

/// Claim 2, first half: with outliers, groups along the output are at least as good.
fn outliers(measured: &[Measured]) -> Claim {
    let here = || measured.iter().filter(|m| m.weights == "planted");
    claim(
        "planted: rounding along the output <= rounding along the input, 3 and 2 bits",
        perplexities(here(), RTN_IC),
        json!({ RTN_OC: perplexities(here(), RTN_OC) }),
        Some(here().all(|m| mean(m.of(RTN_IC)) <= mean(m.of(RTN_OC)))),
    )
}

/// Claim 2, second half: more layers choose the output where there are outliers.
fn share_rises(measured: &[Measured]) -> Claim {
    let pairs = pairs(measured);
    let shares = |which: fn(&(&Measured, &Measured)) -> f64| -> Value {
        let entry = |pair: &(&Measured, &Measured)| {
            (format!("{} {} bits", pair.0.model, pair.0.bits), json!(which(pair)))
        };
        Value::Object(pairs.iter().map(entry).collect())
    };
    claim(
        "the share of layers that choose groups along the output rises from natural to planted \
         weights, 3 and 2 bits (mean over seeds)",
        shares(|(_, planted)| planted.share(RTN_ADA)),
        json!({ "natural": shares(|(natural, _)| natural.share(RTN_ADA)) }),
        Some(!pairs.is_empty() && pairs.iter().all(|(n, p)| p.share(RTN_ADA) > n.share(RTN_ADA))),
    )
}

/// Claim 3: compensation helps in every direction.
fn compensation(measured: &[Measured]) -> Claim {
    claim(
        "GPTQ with AdaDim < rounding with AdaDim, every condition and seed",
        perplexities(measured, GPTQ_ADA),
        json!({
            RTN_ADA: perplexities(measured, RTN_ADA),
            GPTQ_OC: perplexities(measured, GPTQ_OC),
            GPTQ_IC: perplexities(measured, GPTQ_IC),
        }),
        Some(measured.iter().all(|m| m.below(GPTQ_ADA, RTN_ADA))),
    )
}

/// Planting rescales channels by a power of two, which groups along the output follow exactly; what
/// differs is the order in which the network rounds.
fn invariance(measured: &[Measured]) -> Claim {
    let moved =
        |(n, p): &(&Measured, &Measured), arm: Arm| (mean(p.of(arm)) / mean(n.of(arm)) - 1.0).abs();
    let pairs = pairs(measured);
    let largest = |arm: Arm| pairs.iter().map(|pair| moved(pair, arm)).fold(0.0, f64::max);
    claim(
        "planting moves the perplexity of rounding along the output by less than 1e-4 of it",
        json!({ RTN_IC: largest(RTN_IC) }),
        json!({ RTN_OC: largest(RTN_OC) }),
        Some(!pairs.is_empty() && largest(RTN_IC) < 1e-4),
    )
}

/// Claim 4, reported only: the choice is made on the output of single modules, so that the whole
/// network may still be better off with one direction for all.
fn against_output(measured: &[Measured]) -> Claim {
    let gap = |m: &Measured| mean(m.of(RTN_ADA)) - mean(m.of(RTN_IC));
    let gaps = measured.iter().map(|m| (m.key(), json!(gap(m)))).collect();
    claim(
        "rounding with AdaDim minus rounding along the output, perplexity (reported only)",
        Value::Object(gaps),
        json!({ RTN_IC: perplexities(measured, RTN_IC) }),
        None,
    )
}
