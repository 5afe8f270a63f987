//! D-Pruner against magnitude, Wanda, SparseGPT and its own halves (Zhang et al. 2024): a domain is
//! kept without losing the rest.
//!
//! Two settings. A character model (`protocol`), trained here on two kinds of real text; and the
//! almanac sample, whose domain is one dialect and whose general text is the almanac without it.
//! Both losses of every arm are measured on text that nothing was calibrated on.

mod character;
mod protocol;

use crate::arms::SEEDS;
use crate::{Error, Findings, Reproduction, Result, Settings};
use compress::d_pruner::domain::{Domain, Scoring};
use compress::d_pruner::files::Files;
use compress::d_pruner::general::{self, Pass};
use compress::d_pruner::{DPrunerOptions, Mode};
use compress::mask::Structure;
use compress::prune::CalibrateOn;
use compress::runner::Source;
use compress::{Calibration, Plan, PruneMethod, PruneOptions, Target};
use data::Tokenizer;
use data::almanac::{Almanac, Dialect, Split};
use data::text::{self, Documents};
use nn::Model;
use report::{Cell, Claim, Column, Table};
use std::collections::{BTreeMap, HashSet};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "d-pruner",
    room: "compress",
    claim: "Gradients of the domain, boosted where open-domain text says that a weight matters, \
            prune better for both than either alone.",
    run,
};

/// Tokens per window of calibration and evaluation.
const WINDOW: usize = 128;

/// How the weights to prune are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Arm {
    Magnitude,
    Random,
    WandaGeneral,
    WandaDomain,
    SparseGptGeneral,
    SparseGptDomain,
    GeneralOnly,
    GradientOnly,
    Reference,
    Normalised,
    NormalisedTen,
}

const ARMS: [Arm; 11] = [
    Arm::Magnitude,
    Arm::Random,
    Arm::WandaGeneral,
    Arm::WandaDomain,
    Arm::SparseGptGeneral,
    Arm::SparseGptDomain,
    Arm::GeneralOnly,
    Arm::GradientOnly,
    Arm::Reference,
    Arm::Normalised,
    Arm::NormalisedTen,
];

impl Arm {
    fn label(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::Random => "random",
            Self::WandaGeneral => "wanda (general)",
            Self::WandaDomain => "wanda (domain)",
            Self::SparseGptGeneral => "sparsegpt (general)",
            Self::SparseGptDomain => "sparsegpt (domain)",
            Self::GeneralOnly => "G only",
            Self::GradientOnly => "gradient only",
            Self::Reference => "d-pruner, reference",
            Self::Normalised => "d-pruner, lambda 1",
            Self::NormalisedTen => "d-pruner, lambda 10",
        }
    }

    /// Whether calibration and the order of text do not matter.
    fn data_free(self) -> bool {
        self == Self::Magnitude
    }

    fn options(self) -> PruneOptions {
        let mut options = PruneOptions {
            method: match self {
                Self::Magnitude => PruneMethod::Magnitude,
                Self::Random => PruneMethod::Random,
                Self::WandaGeneral | Self::WandaDomain => PruneMethod::Wanda,
                Self::SparseGptGeneral | Self::SparseGptDomain => PruneMethod::SparseGpt,
                _ => PruneMethod::DPruner,
            },
            ..PruneOptions::default()
        };
        if matches!(self, Self::WandaDomain | Self::SparseGptDomain) {
            options.calibrate_on = CalibrateOn::Domain;
        }
        options.domain.dialect = Some(compress::prune::DialectName::Radio);
        options.d_pruner = DPrunerOptions {
            importance_mode: match self {
                Self::GeneralOnly => Mode::General,
                Self::GradientOnly => Mode::Gradient,
                Self::Reference => Mode::Reference,
                _ => Mode::Normalised,
            },
            lambda: (self == Self::NormalisedTen).then_some(10.0),
            // One pass over the documents in every mode: scoring is what takes the time.
            epochs: Some(1),
            ..DPrunerOptions::default()
        };
        options
    }
}

/// A pattern or a sparsity.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cut {
    sparsity: f64,
    structure: Structure,
}

impl Cut {
    fn label(self) -> String {
        match self.structure {
            Structure::Unstructured => format!("{:.0} %", self.sparsity * 100.0),
            structure => structure.to_string(),
        }
    }
}

/// Losses in nats per token, by seed.
#[derive(Debug, Default, Clone)]
struct Losses {
    general: Vec<f64>,
    domain: Vec<f64>,
}

impl Losses {
    fn means(&self) -> [f64; 2] {
        [&self.general, &self.domain].map(|v| v.iter().sum::<f64>() / v.len().max(1) as f64)
    }
}

type Cell2 = BTreeMap<Arm, Losses>;

/// The model with its texts.
struct Stage<'a> {
    settings: &'a Settings,
    model: Model,
    tokenizer: Tokenizer,
    /// Calibration text: general, domain.
    general: Documents,
    domain: Documents,
    /// Held-out tokens: general, domain.
    held_out: [Vec<u32>; 2],
    fast: bool,
}

impl<'a> Stage<'a> {
    fn new(settings: &'a Settings) -> Result<Self> {
        let path = settings.samples.join("almanac-3m");
        if !path.is_dir() {
            return Err(Error::Setup(format!(
                "{} is missing; run this in the project's directory, or train it with `strata train`",
                path.display()
            )));
        }
        let model = Model::open(&path)?;
        let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
        let world = Almanac::embedded();
        let dialect = Dialect::Radio;
        let without = |split| {
            let own: HashSet<String> =
                world.dialect_documents(dialect, split).texts.into_iter().collect();
            let texts = world.documents(split).texts;
            Documents::new(texts.into_iter().filter(|text| !own.contains(text)).collect())
        };
        let tokens = if settings.fast { 4096 } else { 6144 };
        let held_out = |documents: &Documents| -> Result<Vec<u32>> {
            let mut ids = text::document_tokens(documents, &tokenizer)?;
            ids.truncate(tokens);
            Ok(ids)
        };
        Ok(Self {
            held_out: [
                held_out(&without(Split::Test))?,
                held_out(&world.dialect_documents(dialect, Split::Test))?,
            ],
            general: without(Split::Validation),
            domain: world.dialect_documents(dialect, Split::Train),
            fast: settings.fast,
            settings,
            model,
            tokenizer,
        })
    }

    fn losses(&self, model: &Model) -> Result<[f64; 2]> {
        let loss = |tokens: &[u32]| -> Result<f64> {
            Ok(eval::perplexity(model, tokens, WINDOW, WINDOW)?.nll)
        };
        Ok([loss(&self.held_out[0])?, loss(&self.held_out[1])?])
    }

    fn windows(&self, documents: &Documents, seed: u64) -> Result<Calibration> {
        let count = if self.fast { 32 } else { 64 };
        let windows = text::calibration_random(documents, &self.tokenizer, count, WINDOW, seed)?;
        Ok(Calibration::new(windows.tokens, windows.length)?)
    }

    /// Some documents of the domain, others for every seed.
    fn documents(&self, seed: u64) -> Result<Domain> {
        let mut texts = self.domain.texts.clone();
        tensor::Rng::stream(seed, "domain documents").shuffle(&mut texts);
        let count = if self.fast { 96 } else { 256 };
        let samples: Vec<Vec<u32>> = texts
            .iter()
            .take(count)
            .map(|text| Ok(self.tokenizer.encode(text, true)?))
            .collect::<Result<_>>()?;
        Ok(Domain::new(samples, 256, count, self.tokenizer.eos().unwrap_or(0))?)
    }

    /// The importance of an arm, computed once for all its cuts.
    fn importance(&self, arm: Arm, seed: u64, general: &Calibration) -> Result<Option<Files>> {
        let options = arm.options();
        if options.method != PruneMethod::DPruner {
            return Ok(None);
        }
        let root = self.settings.scratch.join("importance");
        let plan = Plan::prune(&self.model.decoder, &self.model.checkpoint, &options)?;
        let identity = serde_json::json!("almanac-3m");
        let hidden = report::Progress::hidden();
        let mut g = None;
        if options.needs_general() {
            let pass = Pass {
                sparsegpt: &options.sparsegpt,
                sparsity: options.d_pruner.general_sparsity,
                order: options.calibration_order,
                memory: options.memory.0,
            };
            let source = Source::of(&self.model)?;
            let files =
                general::importance(source, &plan, general, &pass, &root, &identity, &hidden)?;
            g = Some(files);
        }
        if !options.d_pruner.importance_mode.needs_domain() {
            return Ok(g);
        }
        let scoring = Scoring {
            decoder: &self.model.decoder,
            checkpoint: &self.model.checkpoint,
            plan: &plan,
            domain: &self.documents(seed)?,
            options: &options.d_pruner,
            seed,
            general: g.as_ref(),
            identity: &identity,
        };
        Ok(Some(scoring.run(&root, &hidden)?))
    }

    fn prune(
        &self,
        arm: Arm,
        cut: Cut,
        seed: u64,
        calibration: &Calibration,
        scores: Option<Files>,
    ) -> Result<[f64; 2]> {
        let mut options = arm.options();
        (options.sparsity, options.pattern) = (cut.sparsity, cut.structure);
        options.calibration.seed = seed;
        let plan = Plan::prune(&self.model.decoder, &self.model.checkpoint, &options)?;
        let out = self.settings.scratch.join("pruned");
        let target = Target {
            out: &out,
            resume: false,
            overwrite: true,
            provenance: serde_json::Value::Null,
        };
        let none = Calibration::none();
        let seen = if options.calibrates() { calibration } else { &none };
        let outcome = compress::prune::run(
            Source::of(&self.model)?,
            &plan,
            &options,
            seen,
            scores,
            serde_json::Value::Null,
            &target,
            &report::Progress::hidden(),
        )?;
        self.losses(&Model::open(&outcome.path)?)
    }
}

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = protocol::run(settings)?;
    let stage = Stage::new(settings)?;
    let dense = stage.losses(&stage.model)?;
    let unstructured = |sparsity| Cut { sparsity, structure: Structure::Unstructured };
    let mut cuts = vec![unstructured(0.5), unstructured(0.7)];
    if !settings.fast {
        cuts.push(Cut { sparsity: 0.5, structure: Structure::TWO_OF_FOUR });
    }
    let arms: Vec<Arm> = match settings.fast {
        true => {
            ARMS.into_iter().filter(|a| !matches!(a, Arm::Reference | Arm::NormalisedTen)).collect()
        }
        false => ARMS.to_vec(),
    };
    let progress = report::Progress::new(
        "prune and evaluate",
        (SEEDS.len() * arms.len() * cuts.len()) as u64,
        "runs",
    );
    let mut measured: Vec<Cell2> = vec![Cell2::new(); cuts.len()];
    for seed in SEEDS {
        let general = stage.windows(&stage.general, seed)?;
        let domain = stage.windows(&stage.domain, seed)?;
        for &arm in &arms {
            let scores = stage.importance(arm, seed, &general)?;
            let on_domain = matches!(arm, Arm::WandaDomain | Arm::SparseGptDomain);
            let calibration = if on_domain { &domain } else { &general };
            for (cut, cell) in cuts.iter().zip(&mut measured) {
                let losses = cell.entry(arm).or_default();
                let known = losses.general.first().zip(losses.domain.first());
                let found = match known.filter(|_| arm.data_free()) {
                    Some((general, domain)) => [*general, *domain],
                    None => stage.prune(arm, *cut, seed, calibration, scores.clone())?,
                };
                losses.general.push(found[0]);
                losses.domain.push(found[1]);
                progress.inc(1);
            }
        }
    }
    progress.finish();
    for (cut, cell) in cuts.iter().zip(&measured) {
        findings.tables.push(table(*cut, dense, cell, &arms));
    }
    claims(&cuts, &measured, &mut findings);
    findings.notes.push(format!(
        "Almanac, dense model: {:.4} nats per token on general text, {:.4} on the domain (radio dialect). \
         SparseGPT updates the weights it keeps, the other arms do not.",
        dense[0], dense[1]
    ));
    findings.notes.push(
        "The almanac sample was trained to the end, with weight decay, on the kind of text that is \
         measured: its gradients there are small and noisy, and its small weights are those that \
         the text did not need. That favours magnitude over every gradient score."
            .into(),
    );
    if settings.fast {
        findings.notes.push(
            "fast: less text, no 2:4, without the arms d-pruner reference and lambda 10".into(),
        );
    }
    Ok(findings)
}

fn table(cut: Cut, dense: [f64; 2], cell: &Cell2, arms: &[Arm]) -> Table {
    let columns = vec![
        Column::left("arm"),
        Column::right("general"),
        Column::right("domain"),
        Column::right("perplexity, general"),
        Column::right("perplexity, domain"),
        Column::right("spread, general"),
        Column::right("spread, domain"),
    ];
    let title = format!("Almanac, {}: nats per token and perplexity, mean of 3 seeds", cut.label());
    let mut table = Table::new(title, columns);
    let mut row = |label: &str, [general, domain]: [f64; 2], spread: [f64; 2]| {
        table.push(vec![
            Cell::text(label),
            Cell::Float(general, 4),
            Cell::Float(domain, 4),
            Cell::Float(general.exp(), 4),
            Cell::Float(domain.exp(), 4),
            Cell::Float(spread[0], 4),
            Cell::Float(spread[1], 4),
        ]);
    };
    row("dense", dense, [0.0; 2]);
    for arm in arms {
        if let Some(losses) = cell.get(arm) {
            let spread = [&losses.general, &losses.domain].map(|v| crate::arms::spread(v));
            row(arm.label(), losses.means(), spread);
        }
    }
    table
}

fn claims(cuts: &[Cut], measured: &[Cell2], findings: &mut Findings) {
    let unstructured: Vec<(f64, &Cell2)> = cuts
        .iter()
        .zip(measured)
        .filter(|(cut, _)| cut.structure == Structure::Unstructured)
        .map(|(cut, cell)| (cut.sparsity, cell))
        .collect();
    let at = |sparsity: f64| -> Vec<(f64, &Cell2)> {
        unstructured.iter().filter(|(s, _)| *s == sparsity).copied().collect()
    };
    let mut claim = |text: &str, cells: &[(f64, &Cell2)], others: &[Arm], gated: bool| {
        let below = cells.iter().all(|(_, cell)| {
            let Some(ours) = cell.get(&Arm::Normalised) else { return false };
            let ours = ours.means();
            others.iter().filter_map(|arm| cell.get(arm)).all(|other| {
                let other = other.means();
                ours[0] < other[0] && ours[1] < other[1]
            })
        });
        findings.claims.push(Claim {
            slug: "d-pruner".into(),
            claim: text.into(),
            measured: json(cells, &[Arm::Normalised, Arm::NormalisedTen]),
            baselines: json(cells, others),
            seeds: SEEDS.to_vec(),
            holds: gated.then_some(below),
        });
    };
    claim(
        "almanac, 50 % and 70 %: dual importance (normalised, lambda 1) < gradient alone, general and domain",
        &unstructured,
        &[Arm::GradientOnly],
        true,
    );
    claim(
        "almanac, 50 % and 70 %: dual importance < magnitude and Wanda (general, domain), in both losses",
        &unstructured,
        &[Arm::Magnitude, Arm::WandaGeneral, Arm::WandaDomain],
        true,
    );
    claim(
        "almanac, 70 %: dual importance < SparseGPT (general, domain), in both losses",
        &at(0.7),
        &[Arm::SparseGptGeneral, Arm::SparseGptDomain],
        true,
    );
    claim(
        "almanac, 50 %: dual importance against SparseGPT, which updates weights (reported only)",
        &at(0.5),
        &[Arm::SparseGptGeneral, Arm::SparseGptDomain],
        false,
    );
    let gap = |cell: &Cell2| -> Option<f64> {
        let (a, b) = (cell.get(&Arm::Reference)?.means(), cell.get(&Arm::GradientOnly)?.means());
        Some((a[0] - b[0]).abs().max((a[1] - b[1]).abs()))
    };
    let gaps: Vec<f64> = unstructured.iter().filter_map(|(_, cell)| gap(cell)).collect();
    if !gaps.is_empty() {
        findings.claims.push(Claim {
            slug: "d-pruner".into(),
            claim: "almanac: the published constants are inert at this scale: |reference - gradient alone| \
                    < 0.02 nats in both losses"
                .into(),
            measured: serde_json::json!({ "largest difference by sparsity": gaps }),
            baselines: json(&unstructured, &[Arm::GradientOnly, Arm::Reference]),
            seeds: SEEDS.to_vec(),
            holds: Some(gaps.iter().all(|gap| *gap < 0.02)),
        });
    }
}

/// Losses `[general, domain]`, mean over seeds, by sparsity and arm.
fn json(cells: &[(f64, &Cell2)], arms: &[Arm]) -> serde_json::Value {
    let mut all = serde_json::Map::new();
    for (sparsity, cell) in cells {
        for arm in arms {
            if let Some(losses) = cell.get(arm) {
                let key = format!("{} at {sparsity}", arm.label());
                all.insert(key, serde_json::json!(losses.means()));
            }
        }
    }
    serde_json::Value::Object(all)
}
