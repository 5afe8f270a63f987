//! RSQ against its parts (Sung et al. 2025): rounding and GPTQ on rotated weights, importance with
//! and without rotation, every strategy of importance.
//!
//! The claims, fixed before anything was measured (seeds decide calibration windows and rotation):
//! 1. the rotated, unquantised model gives the original's logits (1e-4 of the largest);
//! 2. planted outliers, 3 bits: rotation + GPTQ < GPTQ by more than the spread of the seeds;
//! 3. rotation + GPTQ < rotation + RTN everywhere;
//! 4. RSQ with weights of 1 is rotation + GPTQ, bit for bit;
//! 5. (reported only) at 3 bits on the almanac the best strategy beats uniform weights by more than
//!    the spread of the seeds.

use crate::arms::{self, SEEDS, spread};
use crate::subjects::{self, Subject};
use crate::{Findings, Reproduction, Result, Settings};
use compress::rsq::importance::Importance;
use compress::rsq::{Base, RotationChoice, RsqOptions};
use compress::{Calibration, Format, Method, Plan, QuantizeOptions, Target};
use data::almanac::Almanac;
use data::text;
use nn::Model;
use report::{Cell, Claim, Column, Table};
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "rsq",
    room: "compress",
    claim: "Rotating outliers away makes GPTQ better where there are outliers; on top of that, \
            tokens that receive attention should count more.",
    run,
};

/// What is done to the weights.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Arm {
    Rtn,
    Gptq,
    RotatedRtn,
    RotatedGptq,
    /// Importance without rotation.
    Scaled(Importance, f64),
    Rsq(Importance, f64),
}

impl Arm {
    fn label(self) -> String {
        match self {
            Self::Rtn => "rtn".into(),
            Self::Gptq => "gptq".into(),
            Self::RotatedRtn => "rotation + rtn".into(),
            Self::RotatedGptq => "rotation + gptq".into(),
            Self::Scaled(_, r_min) => format!("sq {r_min}"),
            Self::Rsq(Importance::Attention, r_min) => format!("rsq {r_min}"),
            Self::Rsq(importance, r_min) => format!("rsq {} {r_min}", importance.label()),
        }
    }

    /// Symmetric grids, with GPTQ's clipping search, as in the paper's runs.
    fn options(self, (bits, group): (u8, usize), seed: u64) -> QuantizeOptions {
        let mut options = QuantizeOptions {
            method: Method::Rsq,
            format: Format::Dequantized,
            ..QuantizeOptions::default()
        };
        options.grid.bits = bits;
        options.grid.group_size = group;
        options.grid.symmetric = true;
        options.gptq.mse = true;
        options.rsq.rotation_seed = seed;
        options.rsq.importance = Importance::Uniform;
        let rsq = &mut options.rsq;
        match self {
            Self::Rtn | Self::RotatedRtn => rsq.base = Base::Rtn,
            Self::Gptq | Self::RotatedGptq => {}
            Self::Scaled(importance, r_min) | Self::Rsq(importance, r_min) => {
                (rsq.importance, rsq.r_min) = (importance, r_min);
            }
        }
        if matches!(self, Self::Rtn | Self::Gptq | Self::Scaled(..)) {
            rsq.rotation = RotationChoice::None;
        }
        options
    }

    /// Whether the seed changes anything.
    fn draws(self) -> bool {
        self != Self::Rtn
    }
}

const ATTENTION: Importance = Importance::Attention;

/// Tokens of a long window.
const LONG: usize = 256;

/// Arms of every condition.
const ARMS: [Arm; 7] = [
    Arm::Rtn,
    Arm::RotatedRtn,
    Arm::Gptq,
    Arm::RotatedGptq,
    Arm::Scaled(ATTENTION, 0.1),
    Arm::Rsq(ATTENTION, 0.01),
    Arm::Rsq(ATTENTION, 0.1),
];

/// Strategies beside attention at 0.01 and 0.1, on the almanac at 3 bits.
const STRATEGIES: [Arm; 8] = [
    Arm::Rsq(ATTENTION, 0.005),
    Arm::Rsq(ATTENTION, 0.05),
    Arm::Rsq(Importance::ActNorm, 0.01),
    Arm::Rsq(Importance::ActDiff, 0.01),
    Arm::Rsq(Importance::TokenFreq, 0.01),
    Arm::Rsq(Importance::TokenSim, 0.01),
    Arm::Rsq(Importance::FirstN, 0.01),
    Arm::Rsq(Importance::FirstLastN, 0.01),
];

/// Perplexities of the arms on one subject, at one width and group.
struct Measured {
    model: String,
    weights: &'static str,
    bits: u8,
    group: usize,
    full: f64,
    arms: Vec<(Arm, Vec<f64>)>,
}

impl Measured {
    fn of(&self, arm: Arm) -> &[f64] {
        self.arms.iter().find(|(a, _)| *a == arm).map(|(_, v)| v.as_slice()).unwrap_or_default()
    }

    fn key(&self) -> String {
        let group = if self.group == 0 { "row".to_string() } else { self.group.to_string() };
        format!("{} {} {} bits {group}", self.model, self.weights, self.bits)
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The conditions of a subject: planted outliers at 3 bits, natural weights also at 2.
fn conditions(subject: &Subject, fast: bool) -> Vec<(u8, usize)> {
    let mut all = vec![(3, 0)];
    if !fast && subject.weights == "natural" {
        all.push((2, 0));
        if subject.groups.contains(&32) {
            all.push((2, 32));
        }
    }
    all
}

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut subjects = subjects::subjects(settings, &mut findings.notes)?;
    if settings.fast {
        // The claims on natural weights need more text than a fast run has time for.
        subjects.retain(|subject| subject.weights == "planted");
    }
    let arms: &[Arm] = if settings.fast {
        &[Arm::RotatedRtn, Arm::Gptq, Arm::RotatedGptq, Arm::Rsq(ATTENTION, 0.01)]
    } else {
        &ARMS
    };
    let strategies = |subject: &Subject, bits: u8| {
        let here = almanac(subject) && bits == 3;
        if here && !settings.fast { &STRATEGIES[..] } else { &[] }
    };
    let mut runs = 0;
    for subject in &subjects {
        for (bits, _) in conditions(subject, settings.fast) {
            let arms = arms.iter().chain(strategies(subject, bits));
            runs += arms.map(|a| if a.draws() { SEEDS.len() } else { 1 }).sum::<usize>();
        }
    }
    let progress = report::Progress::new("quantise and evaluate", runs as u64, "runs");
    let (mut measured, mut rotations, mut identical) = (Vec::new(), BTreeMap::new(), Vec::new());
    for subject in &subjects {
        let model = Model::open(&subject.path)?;
        let label = format!("{} {}", subject.name, subject.weights);
        rotations.insert(label.clone(), rotation_distance(settings, subject, &model)?);
        let full = arms::perplexity(&model, subject)?;
        let windows: Vec<Calibration> = SEEDS
            .iter()
            .map(|&seed| arms::calibration(settings, subject, seed))
            .collect::<Result<_>>()?;
        if let Some(text) = windows.first() {
            identical.push((label, ones_are_uniform(settings, &model, text)?));
        }
        for condition in conditions(subject, settings.fast) {
            let mut here = Measured {
                model: subject.name.clone(),
                weights: subject.weights,
                bits: condition.0,
                group: condition.1,
                full,
                arms: Vec::new(),
            };
            for &arm in arms.iter().chain(strategies(subject, condition.0)) {
                let mut values = Vec::new();
                for (&seed, calibration) in SEEDS.iter().zip(&windows) {
                    if !arm.draws() && !values.is_empty() {
                        values.push(mean(&values));
                        continue;
                    }
                    let options = arm.options(condition, seed);
                    values.push(arms::run(settings, subject, &model, &options, calibration)?.0);
                    progress.inc(1);
                }
                here.arms.push((arm, values));
            }
            measured.push(here);
        }
    }
    progress.finish();
    if let Some(subject) = subjects.iter().find(|s| almanac(s) && !settings.fast) {
        findings.tables.push(facts_and_windows(settings, subject)?);
    }
    findings.tables.insert(0, table(&measured, arms));
    if let Some(strategies) = strategy_table(&measured) {
        findings.tables.push(strategies);
    }
    findings.claims.push(same_logits(&rotations));
    findings.claims.push(rotation_helps(&measured));
    findings.claims.push(beats_rounding(&measured));
    findings.claims.push(Claim {
        slug: "rsq".into(),
        claim: "RSQ with weights of 1 writes the bytes of rotation + GPTQ".into(),
        measured: json!(identical.iter().cloned().collect::<BTreeMap<_, _>>()),
        baselines: Value::Null,
        seeds: vec![SEEDS[0]],
        holds: Some(identical.iter().all(|(_, same)| *same)),
    });
    findings.claims.extend(importance_helps(&measured));
    Ok(findings)
}

/// The almanac model as it is.
fn almanac(subject: &Subject) -> bool {
    subject.name.starts_with("almanac") && subject.weights == "natural"
}

/// Where importance could differ from what short windows show: facts that are recalled after
/// quantising to 2 bits, and windows as long as the model was trained on, twice the usual.
fn facts_and_windows(settings: &Settings, subject: &Subject) -> Result<Table> {
    let arms = [Arm::RotatedGptq, Arm::Rsq(ATTENTION, 0.01), Arm::Rsq(ATTENTION, 0.1)];
    let model = Model::open(&subject.path)?;
    let world = Almanac::embedded();
    let columns = vec![
        Column::left("weights of tokens"),
        Column::right("2 bits row: held-out facts"),
        Column::right("3 bits row, windows of 256: perplexity"),
    ];
    let mut table = Table::new("Facts and long windows, almanac-3m", columns);
    let progress = report::Progress::new("facts and long windows", 18, "runs");
    for arm in arms {
        let (mut known, mut long) = (Vec::new(), Vec::new());
        for &seed in &SEEDS {
            let text = arms::calibration(settings, subject, seed)?;
            let path = job(settings, &model, &arm.options((2, 0), seed), &text, "facts")?;
            let quantised = Model::open(&path)?;
            let scores = eval::facts(&quantised, &subject.tokenizer, world.facts())?;
            known.push(scores.heldout.accuracy());
            progress.inc(1);
            // As many tokens in half of the windows.
            let count = text.windows() / 2;
            let (source, tokenizer) = (&subject.calibration, &subject.tokenizer);
            let windows = text::calibration_random(source, tokenizer, count, LONG, seed)?;
            let text = Calibration::new(windows.tokens, windows.length)?;
            let path = job(settings, &model, &arm.options((3, 0), seed), &text, "long")?;
            let tokens = &subject.evaluation;
            let measured = eval::perplexity(&Model::open(&path)?, tokens, LONG, LONG)?;
            long.push(measured.perplexity);
            progress.inc(1);
        }
        let label = if arm == Arm::RotatedGptq { "uniform".into() } else { arm.label() };
        let half = spread(&known) / 2.0 * 100.0;
        let facts = format!("{:.1} % ±{half:.1}", mean(&known) * 100.0);
        table.push(vec![Cell::text(label), Cell::text(facts), cell(&long)]);
    }
    progress.finish();
    Ok(table)
}

/// Quantises or rotates into a folder of its own.
fn job(
    settings: &Settings,
    model: &Model,
    options: &QuantizeOptions,
    calibration: &Calibration,
    folder: &str,
) -> Result<std::path::PathBuf> {
    let mut options = options.clone();
    options.calibration.samples = calibration.windows().max(1);
    options.calibration.sequence_length = calibration.length();
    let plan = Plan::new(&model.decoder, &model.checkpoint, &options)?;
    let out = settings.scratch.join(folder);
    let target = Target { out: &out, resume: false, overwrite: true, provenance: Value::Null };
    let progress = report::Progress::hidden();
    Ok(compress::run(model, &plan, &options, calibration, &target, &progress)?.path)
}

/// Largest difference of the logits of the rotated, unquantised model, relative to the largest logit.
fn rotation_distance(settings: &Settings, subject: &Subject, model: &Model) -> Result<f64> {
    let mut options = Arm::RotatedRtn.options((4, 0), 0);
    options.rsq.rotate_only = true;
    let path = job(settings, model, &options, &Calibration::none(), "rotated")?;
    let rotated = Model::open(&path)?;
    let count = subject.window.min(subject.evaluation.len());
    let tokens = subject.evaluation.get(..count).unwrap_or_default();
    let before = tensor::host::into_vec(model.logits(tokens, 1)?);
    let after = tensor::host::into_vec(rotated.logits(tokens, 1)?);
    let largest = before.iter().fold(0f32, |m, v| m.max(v.abs()));
    let off = before.iter().zip(&after).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    Ok(f64::from(off / largest))
}

/// Whether the weighted path with all weights 1 writes the same tensors as the plain one.
fn ones_are_uniform(settings: &Settings, model: &Model, text: &Calibration) -> Result<bool> {
    let plain = Arm::RotatedGptq.options((3, 0), 0);
    let mut ones = Arm::Rsq(ATTENTION, 1.0).options((3, 0), 0);
    ones.rsq = RsqOptions { r_max: 1.0, ..ones.rsq };
    let plain = Model::open(&job(settings, model, &plain, text, "plain")?)?;
    let ones = Model::open(&job(settings, model, &ones, text, "ones")?)?;
    for info in plain.checkpoint.infos() {
        if plain.checkpoint.bytes(&info.name)? != ones.checkpoint.bytes(&info.name)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn cell(values: &[f64]) -> Cell {
    let half = spread(values) / 2.0;
    if half > 0.0 {
        Cell::text(format!("{:.4} ±{half:.4}", mean(values)))
    } else {
        Cell::text(format!("{:.4}", mean(values)))
    }
}

fn table(measured: &[Measured], arms: &[Arm]) -> Table {
    let mut columns = vec![Column::left("condition"), Column::right("full precision")];
    columns.extend(arms.iter().map(|arm| Column::right(arm.label())));
    let mut table = Table::new("Perplexity, mean of 3 seeds (calibration and rotation)", columns);
    for m in measured {
        let mut row = vec![Cell::text(m.key()), Cell::Float(m.full, 4)];
        row.extend(arms.iter().map(|&arm| cell(m.of(arm))));
        table.push(row);
    }
    table
}

/// The condition under which all strategies were run.
fn with_strategies(measured: &[Measured]) -> Option<&Measured> {
    measured.iter().find(|m| STRATEGIES.iter().any(|&arm| !m.of(arm).is_empty()))
}

fn strategy_table(measured: &[Measured]) -> Option<Table> {
    let m = with_strategies(measured)?;
    let columns = vec![Column::left("importance, r_min"), Column::right("perplexity")];
    let mut table = Table::new(format!("Importance on {}", m.key()), columns);
    table.push(vec![Cell::text("uniform"), cell(m.of(Arm::RotatedGptq))]);
    for (arm, values) in m.arms.iter().filter(|(arm, _)| matches!(arm, Arm::Rsq(..))) {
        table.push(vec![Cell::text(arm.label()), cell(values)]);
    }
    Some(table)
}

fn same_logits(rotations: &BTreeMap<String, f64>) -> Claim {
    Claim {
        slug: "rsq".into(),
        claim: "the rotated, unquantised model gives the original's logits (1e-4 of the largest)"
            .into(),
        measured: json!(rotations),
        baselines: Value::Null,
        seeds: vec![0],
        holds: Some(rotations.values().all(|off| *off < 1e-4)),
    }
}

fn arms_json(measured: &[&Measured], arm: Arm) -> Value {
    let entry = |m: &&Measured| (m.key(), json!(m.of(arm)));
    Value::Object(measured.iter().map(entry).collect())
}

/// Claim 2.
fn rotation_helps(measured: &[Measured]) -> Claim {
    let here: Vec<&Measured> =
        measured.iter().filter(|m| m.weights == "planted" && m.bits == 3).collect();
    let beats = |m: &&Measured| {
        let (plain, rotated) = (m.of(Arm::Gptq), m.of(Arm::RotatedGptq));
        mean(plain) - mean(rotated) > spread(plain).max(spread(rotated))
    };
    Claim {
        slug: "rsq".into(),
        claim: "planted, 3 bits: rotation + GPTQ < GPTQ by more than the spread of the seeds"
            .into(),
        measured: arms_json(&here, Arm::RotatedGptq),
        baselines: json!({
            "gptq": arms_json(&here, Arm::Gptq),
            "rotation + rtn": arms_json(&here, Arm::RotatedRtn),
        }),
        seeds: SEEDS.to_vec(),
        holds: Some(!here.is_empty() && here.iter().all(beats)),
    }
}

/// Claim 3.
fn beats_rounding(measured: &[Measured]) -> Claim {
    let all: Vec<&Measured> = measured.iter().collect();
    let beats = |m: &&Measured| {
        m.of(Arm::RotatedGptq).iter().zip(m.of(Arm::RotatedRtn)).all(|(gptq, rtn)| gptq < rtn)
    };
    Claim {
        slug: "rsq".into(),
        claim: "rotation + GPTQ < rotation + RTN under every condition, every seed".into(),
        measured: arms_json(&all, Arm::RotatedGptq),
        baselines: json!({ "rotation + rtn": arms_json(&all, Arm::RotatedRtn) }),
        seeds: SEEDS.to_vec(),
        holds: Some(all.iter().all(beats)),
    }
}

/// Claim 5, reported only.
fn importance_helps(measured: &[Measured]) -> Option<Claim> {
    let m = with_strategies(measured)?;
    let uniform = m.of(Arm::RotatedGptq);
    let strategies = m.arms.iter().filter(|(arm, _)| matches!(arm, Arm::Rsq(..)));
    let (best, values) = strategies.min_by(|a, b| mean(&a.1).total_cmp(&mean(&b.1)))?;
    let held = mean(uniform) - mean(values) > spread(uniform).max(spread(values));
    Some(Claim {
        slug: "rsq".into(),
        claim: format!(
            "{}: the best strategy of importance beats uniform weights by more than the spread of \
             the seeds (reported only): {}",
            m.key(),
            if held { "held" } else { "did not hold" }
        ),
        measured: json!({ "strategy": best.label(), "perplexity": values }),
        baselines: json!({ "uniform": uniform }),
        seeds: SEEDS.to_vec(),
        holds: None,
    })
}
