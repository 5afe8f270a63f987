//! The claims on a character model: trained on two kinds of text in equal parts, pruned for one.
//!
//! General text is WikiText-2 and the domain Shakespeare where they are at hand, otherwise the
//! almanac and one of its dialects. The six block matrices are pruned in the order in which they
//! compute; Wanda and SparseGPT see inputs that the matrices before them, pruned, produce.

use super::character::{Alphabet, Character, Positions};
use crate::arms::SEEDS;
use crate::{Error, Findings, Result, Settings};
use compress::d_pruner::{DPrunerOptions, Mode, accumulate};
use compress::gptq::Factor;
use compress::grid::Matrix;
use compress::mask::{self, Count, Mask, Scope, Structure};
use compress::statistics::Gram;
use compress::{sparsegpt, wanda};
use data::almanac::{Almanac, Dialect, Split};
use report::{Cell, Claim, Column, Table};
use std::collections::BTreeMap;
use tensor::Rng;

/// Calibration positions, domain positions that are scored, positions that are measured.
const CALIBRATION: usize = 3000;
const SCORED: usize = 8000;
const MEASURED: usize = 8000;
/// Positions per gradient.
const BATCH: usize = 64;
/// Sparsity of the pass that records G.
const GENERAL_SPARSITY: f64 = 0.52;
const DAMPING: f64 = 0.01;

const ARMS: [&str; 9] = [
    "magnitude",
    "wanda (general)",
    "wanda (domain)",
    "sparsegpt (general)",
    "sparsegpt (domain)",
    "G only",
    "gradient only",
    "reference",
    "normalised, lambda 1",
];
const TEN: &str = "normalised, lambda 10";
const OURS: &str = "normalised, lambda 1";

/// Losses `[general, domain]` by sparsity and arm, one per seed.
type Losses = BTreeMap<(String, &'static str), Vec<[f64; 2]>>;

struct Text {
    train: Vec<u8>,
    test: Vec<u8>,
}

impl Text {
    /// Nine tenths to train and calibrate, the end to measure.
    fn new(text: Vec<u8>) -> Self {
        let cut = text.len() / 10 * 9;
        Self {
            train: text.get(..cut).unwrap_or_default().to_vec(),
            test: text.get(cut..).unwrap_or_default().to_vec(),
        }
    }

    fn encoded(&self, alphabet: &Alphabet) -> Self {
        Self { train: alphabet.encode(&self.train), test: alphabet.encode(&self.test) }
    }
}

/// General and domain text, and what they are.
fn texts(settings: &Settings) -> Result<(Text, Text, &'static str)> {
    let shared = settings.shared.as_ref().map(|shared| shared.join("data"));
    if let Some(shared) = shared
        && let (Ok(general), Ok(domain)) = (
            std::fs::read(shared.join("wikitext2/valid.txt")),
            std::fs::read(shared.join("tinyshakespeare/input.txt")),
        )
    {
        return Ok((Text::new(general), Text::new(domain), "WikiText-2 and Shakespeare"));
    }
    let world = Almanac::embedded();
    let domain = world.dialect_documents(Dialect::Radio, Split::Train).joined();
    let general = world.documents(Split::Train).joined();
    let general: Vec<u8> = general.into_bytes().into_iter().take(1_000_000).collect();
    Ok((Text::new(general), Text::new(domain.into_bytes()), "the almanac and its radio dialect"))
}

pub(super) fn run(settings: &Settings) -> Result<Findings> {
    let (general, domain, what) = texts(settings)?;
    let alphabet = Alphabet::new(&[general.train.as_slice(), domain.train.as_slice()].concat());
    let (general, domain) = (general.encoded(&alphabet), domain.encoded(&alphabet));
    let steps = if settings.fast { 1500 } else { 4000 };
    let progress = report::Progress::new("character model", SEEDS.len() as u64, "seeds");
    let mut losses = Losses::new();
    let mut dense = Vec::new();
    for seed in SEEDS {
        let model = Character::train(&[&general.train, &domain.train], &alphabet, steps, seed)?;
        let mut rng = Rng::stream(seed, "protocol");
        let mut draw = |text: &[u8], count| Positions::draw(text, count, &mut rng);
        let trial = Trial {
            calibration: [draw(&general.train, CALIBRATION), draw(&domain.train, CALIBRATION)],
            scored: draw(&domain.train, SCORED),
            measured: [draw(&general.test, MEASURED), draw(&domain.test, MEASURED)],
            model,
        };
        dense.push(trial.measure(&trial.model));
        let scores = trial.scores()?;
        for sparsity in [0.5, 0.7] {
            for arm in ARMS.into_iter().chain([TEN]) {
                let pruned = trial.prune(arm, sparsity, &scores)?;
                let entry = losses.entry((format!("{sparsity}"), arm)).or_default();
                entry.push(trial.measure(&pruned));
            }
        }
        progress.inc(1);
    }
    progress.finish();
    let mut findings = Findings::default();
    for sparsity in ["0.5", "0.7"] {
        findings.tables.push(table(sparsity, what, &dense, &losses));
    }
    claims(&losses, &mut findings);
    Ok(findings)
}

/// A trained model with its texts.
struct Trial {
    model: Character,
    /// General, domain.
    calibration: [Positions; 2],
    scored: Positions,
    /// General, domain.
    measured: [Positions; 2],
}

/// Scores of all matrices, by arm.
type Scores = BTreeMap<&'static str, Vec<Vec<f32>>>;

impl Trial {
    fn measure(&self, model: &Character) -> [f64; 2] {
        [model.loss(&self.measured[0]), model.loss(&self.measured[1])]
    }

    fn matrix(model: &Character, layer: usize) -> Result<Matrix> {
        let dense = &model.layers[layer];
        Ok(Matrix::new(dense.shape()[0], dense.shape()[1], dense.weight.clone())?)
    }

    fn gram(model: &Character, layer: usize, positions: &Positions) -> Gram {
        let mut gram = Gram::new(model.layers[layer].shape()[1]);
        gram.add(&model.input(layer, positions));
        gram
    }

    /// Prunes every matrix by SparseGPT in turn; returns the model and G.
    fn sparsegpt(
        &self,
        positions: &Positions,
        sparsity: f64,
    ) -> Result<(Character, Vec<Vec<f32>>)> {
        let mut model = self.model.clone();
        let mut importance = Vec::new();
        for layer in 0..model.layers.len() {
            let gram = Self::gram(&model, layer, positions);
            let (width, tokens) = (gram.width(), gram.tokens());
            let name = format!("layer {layer}");
            let factor = Factor::tenfold(&name, gram.into_hessian(), width, tokens, DAMPING)?;
            let matrix = Self::matrix(&model, layer)?;
            let mut g = vec![0f32; matrix.values.len()];
            let target = sparsegpt::Target {
                sparsity,
                structure: Structure::Unstructured,
                count: Count::Threshold,
                block_size: 128,
            };
            let pruned = sparsegpt::prune(&name, &matrix, &factor, &target, Some(&mut g))?;
            model.layers[layer].weight = pruned.values;
            importance.push(g);
        }
        Ok((model, importance))
    }

    /// G, and S in the modes that do not depend on the sparsity.
    fn scores(&self) -> Result<Scores> {
        let (_, general) = self.sparsegpt(&self.calibration[0], GENERAL_SPARSITY)?;
        let mut scores = Scores::new();
        let none: Vec<Vec<f32>> = general.iter().map(|_| Vec::new()).collect();
        let of = |mode, lambda| DPrunerOptions {
            importance_mode: mode,
            lambda,
            ..DPrunerOptions::default()
        };
        scores.insert("gradient only", self.score(&of(Mode::Gradient, None), &none)?);
        scores.insert(OURS, self.score(&of(Mode::Normalised, Some(1.0)), &general)?);
        scores.insert(TEN, self.score(&of(Mode::Normalised, Some(10.0)), &general)?);
        let reference = DPrunerOptions { epochs: Some(1), ..of(Mode::Reference, None) };
        scores.insert("reference", self.score(&reference, &general)?);
        scores.insert("G only", general);
        Ok(scores)
    }

    fn score(&self, options: &DPrunerOptions, general: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
        let mut model = self.model.clone();
        let mut scores: Vec<Vec<f32>> =
            model.layers.iter().map(|layer| vec![0f32; layer.weight.len()]).collect();
        let batches = self.scored.batches(BATCH);
        for (step, batch) in batches.iter().enumerate() {
            let alpha = options.alpha() * (1.0 - step as f64 / batches.len() as f64);
            let (loss, grads) = model.gradient(batch);
            if !loss.is_finite() {
                return Err(Error::Setup(format!("the loss is {loss} in batch {step}")));
            }
            if options.importance_mode != Mode::Reference || step > 0 {
                let layers = model.layers.iter().zip(&grads.layers).zip(general).zip(&mut scores);
                for (((layer, grads), general), scores) in layers {
                    let formula = options.formula(alpha);
                    accumulate(formula, &layer.weight, &grads.weight, general, &[], scores);
                }
            }
            if alpha > 0.0 {
                model.descend(grads, alpha as f32, options.clip_norm);
            }
        }
        Ok(scores)
    }

    fn prune(&self, arm: &'static str, sparsity: f64, scores: &Scores) -> Result<Character> {
        let on = |name: &str| &self.calibration[usize::from(name.contains("domain"))];
        if arm.starts_with("sparsegpt") {
            return Ok(self.sparsegpt(on(arm), sparsity)?.0);
        }
        let mut model = self.model.clone();
        for layer in 0..model.layers.len() {
            let shape = model.layers[layer].shape();
            let values = &self.model.layers[layer].weight;
            let mask: Mask = if arm.starts_with("wanda") {
                let full = Self::gram(&model, layer, on(arm)).full();
                let squares: Vec<f64> = (0..shape[1]).map(|j| full[j * shape[1] + j]).collect();
                let scores = wanda::scores(values, &wanda::norms(&squares, CALIBRATION));
                let rule = (Structure::Unstructured, Scope::Row, Count::Floor);
                mask::build(&scores, shape, sparsity, rule.0, rule.1, rule.2)
            } else {
                let magnitude;
                let (scores, count) = match scores.get(arm) {
                    Some(scores) => (&scores[layer], Count::Percentile),
                    None => {
                        magnitude = mask::magnitude_scores(values);
                        (&magnitude, Count::Threshold)
                    }
                };
                mask::build(scores, shape, sparsity, Structure::Unstructured, Scope::Matrix, count)
            };
            mask.apply(&mut model.layers[layer].weight);
        }
        Ok(model)
    }
}

fn mean(values: &[[f64; 2]]) -> [f64; 2] {
    let n = values.len().max(1) as f64;
    [0, 1].map(|i| values.iter().map(|v| v[i]).sum::<f64>() / n)
}

fn table(sparsity: &str, what: &str, dense: &[[f64; 2]], losses: &Losses) -> Table {
    let columns = vec![
        Column::left("arm"),
        Column::right("general"),
        Column::right("domain"),
        Column::right("spread, general"),
        Column::right("spread, domain"),
    ];
    let title = format!(
        "Character model, {what}, sparsity {sparsity}: nats per character, mean of 3 seeds"
    );
    let mut table = Table::new(title, columns);
    let mut row = |label: &str, values: &[[f64; 2]]| {
        let of = |i: usize| values.iter().map(|v| v[i]).collect::<Vec<f64>>();
        let [general, domain] = mean(values);
        table.push(vec![
            Cell::text(label),
            Cell::Float(general, 4),
            Cell::Float(domain, 4),
            Cell::Float(crate::arms::spread(&of(0)), 4),
            Cell::Float(crate::arms::spread(&of(1)), 4),
        ]);
    };
    row("dense", dense);
    for arm in ARMS.into_iter().chain([TEN]) {
        if let Some(values) = losses.get(&(sparsity.to_string(), arm)) {
            row(arm, values);
        }
    }
    table
}

fn claims(losses: &Losses, findings: &mut Findings) {
    let of = |sparsity: &str, arm| {
        losses.get(&(sparsity.to_string(), arm)).map(|v| mean(v)).unwrap_or([f64::NAN; 2])
    };
    let json = |sparsities: &[&str], arms: &[&'static str]| {
        let mut all = serde_json::Map::new();
        for sparsity in sparsities {
            for arm in arms {
                all.insert(format!("{arm} at {sparsity}"), serde_json::json!(of(sparsity, arm)));
            }
        }
        serde_json::Value::Object(all)
    };
    let mut claim = |text: &str, sparsities: &[&str], others: &[&'static str], gated: bool| {
        let below = sparsities.iter().all(|sparsity| {
            let ours = of(sparsity, OURS);
            others.iter().all(|other| {
                let other = of(sparsity, other);
                ours[0] < other[0] && ours[1] < other[1]
            })
        });
        findings.claims.push(Claim {
            slug: "d-pruner".into(),
            claim: format!("character model, {text}"),
            measured: json(sparsities, &[OURS, TEN]),
            baselines: json(sparsities, others),
            seeds: SEEDS.to_vec(),
            holds: gated.then_some(below),
        });
    };
    let both = ["0.5", "0.7"];
    claim(
        "50 % and 70 %: dual importance (normalised, lambda 1) < gradient alone, in both losses",
        &both,
        &["gradient only"],
        true,
    );
    claim(
        "50 % and 70 %: dual importance < magnitude and Wanda (general, domain), in both losses",
        &both,
        &["magnitude", "wanda (general)", "wanda (domain)"],
        true,
    );
    let sparsegpt = ["sparsegpt (general)", "sparsegpt (domain)"];
    claim(
        "70 %: dual importance < SparseGPT (general, domain), in both losses",
        &["0.7"],
        &sparsegpt,
        true,
    );
    claim(
        "50 %: dual importance against SparseGPT, which updates weights (reported only)",
        &["0.5"],
        &sparsegpt,
        false,
    );
    let gap = |sparsity: &&str| {
        let (a, b) = (of(sparsity, "reference"), of(sparsity, "gradient only"));
        (a[0] - b[0]).abs().max((a[1] - b[1]).abs())
    };
    let gaps: Vec<f64> = both.iter().map(gap).collect();
    findings.claims.push(Claim {
        slug: "d-pruner".into(),
        claim: "character model: the published constants are inert: |reference - gradient alone| \
                < 0.02 nats in both losses"
            .into(),
        measured: serde_json::json!({ "largest difference by sparsity": gaps }),
        baselines: json(&both, &["gradient only", "reference"]),
        seeds: SEEDS.to_vec(),
        holds: Some(gaps.iter().all(|gap| *gap < 0.02)),
    });
}
