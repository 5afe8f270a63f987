//! Allocation by measured curves against LAMP, ERK, global and uniform magnitude pruning (Xu et al.
//! 2023): a small MLP on two tasks, ResNet-20 on CIFAR-10, the almanac's decoder.
//!
//! One mask rule for all allocators (smallest magnitudes), so that they differ in nothing but how
//! many weights each layer keeps.

mod measure;
mod tasks;

use crate::arms::SEEDS;
use crate::{Error, Findings, Reproduction, Result, Settings};
use compress::layer_adaptive_pruning::Samples;
use compress::layer_adaptive_pruning::finetune::{Material, Recipe, Trainer};
use compress::layer_adaptive_pruning::iterate::{self, Finetune};
use compress::layer_adaptive_pruning::layers::select;
use data::almanac::{Almanac, Split};
use data::{Images, Tokenizer, text};
use measure::{ARMS, Arm, Outcomes, Patient, mean, measure};
use nn::{Mlp, Mode, Model, Network, Weights};
use report::{Cell, Claim, Column, Table};
use tasks::Task;
use train::classify::{self, finetune};
use train::loader::TokenBatch;
use train::schedule::Decay;
use train::{Params, Schedule};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "layer-adaptive-pruning",
    room: "compress",
    claim: "Spreading one sparsity over the layers by how far each moves the output distorts it \
            less than uniform or global magnitude pruning, and no more than LAMP or ERK.",
    run,
};

const SLUG: &str = "layer-adaptive-pruning";
/// Sparsities of the small networks.
const SMALL: [f64; 4] = [0.4, 0.5, 0.6, 0.7];
/// Sparsities of the residual network.
const RESNET: [f64; 3] = [0.5, 0.7, 0.8];
/// Sparsities of the decoder.
const DECODER: [f64; 3] = [0.3, 0.5, 0.6];
/// Calibration images, as in the original experiment.
const IMAGES: usize = 256;

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut makers: Vec<Box<dyn Fn(u64) -> Result<Task>>> =
        vec![Box::new(|seed| Ok(tasks::generated(seed)))];
    let mnist = settings.shared.as_ref().map(|s| s.join("data/mnist")).filter(|d| d.is_dir());
    match mnist.filter(|_| !settings.fast) {
        Some(directory) => makers.push(Box::new(move |seed| tasks::mnist(&directory, seed))),
        None if settings.fast => findings.notes.push("fast: only the generated task".into()),
        None => findings.notes.push("skipped: MNIST is not there (set STRATA_SHARED)".into()),
    }
    for make in makers {
        small_networks(settings, &make, &mut findings)?;
    }
    residual_network(settings, &mut findings)?;
    decoder(settings, &mut findings)?;
    Ok(findings)
}

fn setup(error: impl std::fmt::Display) -> Error {
    Error::Setup(error.to_string())
}

/// The MLP 64-256-128-64-10: training, all allocators, training under masks.
fn small_networks(
    settings: &Settings,
    make: &dyn Fn(u64) -> Result<Task>,
    findings: &mut Findings,
) -> Result<()> {
    let network = Mlp::of_widths(&[64, 256, 128, 64, 10])?;
    let (mut outcomes, mut dense) = (Outcomes::new(), Vec::new());
    let mut retrained = Vec::new();
    let mut name = "";
    for seed in SEEDS {
        let task = make(seed)?;
        name = task.name;
        report::note(&format!("{name}, seed {seed}"));
        let mut params = Params::fresh(&network, seed).map_err(setup)?;
        let steps = if settings.fast { 800 } else { 1500 };
        let (decay, floor) = (Decay::Constant, 0.0);
        let options = classify::Finetune {
            steps,
            batch: 100,
            learning_rate: 1e-3,
            weight_decay: 0.01,
            schedule: Schedule { decay, warmup_steps: 0, total_steps: steps, floor },
            clip_norm: 0.0,
            mode: Mode::Evaluate,
            seed,
        };
        finetune(&network, &mut params, &task.train, None, &options).map_err(setup)?;
        let samples = calibration(&network, &task.train, IMAGES, 0)?;
        let judge = |w: &dyn Weights| Ok(eval::classify(&network, w, &task.test)?.accuracy);
        {
            let weights = params.constants();
            dense.push(judge(&weights)?);
            let patient = Patient {
                network: &network,
                weights: &weights,
                points: if settings.fast { 50 } else { 100 },
                cache: &settings.scratch.join("curves"),
                judge: &judge,
            };
            measure(&patient, &samples, &SMALL, &ARMS, true, &mut outcomes)?;
        }
        if !settings.fast {
            retrained.push(retraining(&network, &params, &task, &samples, seed)?);
        }
    }
    let title = format!("MLP on {name}: mean of {} seeds", SEEDS.len());
    let accuracy = dense.iter().sum::<f64>() / dense.len().max(1) as f64;
    findings.tables.push(table(&title, "accuracy", &outcomes, &SMALL, &ARMS, accuracy));
    let subject = format!("MLP on {name}");
    findings.claims.extend(distortion_claims(&subject, &outcomes, &SMALL));
    let last = SMALL.len() - 1;
    let score = |arm| mean(&outcomes, (last, arm), |o| o.score);
    findings.claims.push(Claim {
        slug: SLUG.into(),
        claim: format!("{subject}, sparsity 0.7: accuracy of rd >= that of uniform + 0.05"),
        measured: serde_json::json!({ "rd": score(Arm::RdMean), "rd worst": score(Arm::RdWorst) }),
        baselines: serde_json::json!({
            "dense": accuracy, "uniform": score(Arm::Uniform), "lamp": score(Arm::Lamp),
            "erk": score(Arm::Erk), "global": score(Arm::Global),
        }),
        seeds: SEEDS.to_vec(),
        holds: Some(score(Arm::RdMean) >= score(Arm::Uniform) + 0.05),
    });
    if !retrained.is_empty() {
        findings.claims.push(retraining_claim(&subject, &retrained));
    }
    Ok(())
}

/// Accuracy after 200 training steps at 90 and 95 %, one-shot, and in four rounds of 50 steps.
fn retraining(
    network: &Mlp,
    params: &Params,
    task: &Task,
    samples: &Samples,
    seed: u64,
) -> Result<Vec<(String, f64)>> {
    let places = select(network, &[], &[], false)?;
    let weights = params.constants();
    let mut found = Vec::new();
    for (arm, sparsity, rounds) in [
        (Arm::RdMean, 0.9, 1),
        (Arm::Lamp, 0.9, 1),
        (Arm::Uniform, 0.9, 1),
        (Arm::RdMean, 0.95, 1),
        (Arm::Lamp, 0.95, 1),
        (Arm::Uniform, 0.95, 1),
        (Arm::RdMean, 0.95, 4),
        (Arm::Lamp, 0.95, 4),
    ] {
        let mut options = measure::options(arm, 100);
        options.rounds = rounds;
        if arm == Arm::RdMean {
            // A layer without weights could not be trained back; LAMP never empties one.
            options.layer_max = vec!["*=0.98".into()];
        }
        options.finetune_steps = 200 / u64::from(rounds);
        let mut copy = Params::fresh(network, seed).map_err(setup)?;
        let names: Vec<String> = params.names().map(str::to_string).collect();
        for name in &names {
            let values = params.read(name, <[f32]>::to_vec).map_err(setup)?;
            copy.write(name, |v| v.copy_from_slice(&values)).map_err(setup)?;
        }
        let recipe = Recipe { batch: 100, rate: 1e-3, weight_decay: 0.01, seed };
        let material = Material::Images { network, images: task.train.clone() };
        let mut trainer = Trainer::new(material, recipe, copy, &places)?;
        let finetune: &mut dyn Finetune = &mut trainer;
        let (samples, finetune) = (Some(samples), Some(finetune));
        iterate::rounds(network, &weights, &places, samples, finetune, sparsity, &options, None)?;
        let after = eval::classify(network, trainer.weights().as_ref(), &task.test)?.accuracy;
        let how = if rounds == 1 { "one round".into() } else { format!("{rounds} rounds") };
        found.push((format!("{} at {sparsity}, {how}", arm.label()), after));
    }
    Ok(found)
}

fn retraining_claim(subject: &str, seeds: &[Vec<(String, f64)>]) -> Claim {
    let mut means = serde_json::Map::new();
    let mut others = serde_json::Map::new();
    for (i, (label, _)) in seeds.first().into_iter().flatten().enumerate() {
        let all: Vec<f64> = seeds.iter().filter_map(|s| s.get(i)).map(|(_, a)| *a).collect();
        let mean = all.iter().sum::<f64>() / all.len().max(1) as f64;
        let place = if label.starts_with("rd") { &mut means } else { &mut others };
        place.insert(label.clone(), mean.into());
    }
    Claim {
        slug: SLUG.into(),
        claim: format!(
            "{subject}: accuracy after 200 training steps in all, layers of rd bounded to 98 % \
             (reported only)"
        ),
        measured: means.into(),
        baselines: others.into(),
        seeds: SEEDS.to_vec(),
        holds: None,
    }
}

/// `count` images spread over `images` from `first` on, as the network wants them.
fn calibration(
    network: &dyn Network,
    images: &Images,
    count: usize,
    first: usize,
) -> Result<Samples> {
    let spec = network.images().ok_or_else(|| setup("the network takes no images"))?;
    let last = images.len().saturating_sub(1);
    let chosen: Vec<usize> =
        images.spread(count).into_iter().map(|i| (i + first).min(last)).collect();
    let pixels = images.normalised(&chosen, &spec.mean, &spec.deviation)?;
    let shape = [chosen.len(), spec.channels, spec.height, spec.width];
    Ok(Samples::images(pixels, shape)?)
}

/// ResNet-20 on CIFAR-10: three draws of calibration images.
fn residual_network(settings: &Settings, findings: &mut Findings) -> Result<()> {
    let data = settings.shared.as_ref().map(|s| s.join("data"));
    let found = data.filter(|d| {
        d.join("cifar10-resnets/resnet20").is_dir() && d.join("cifar10-lossless").is_dir()
    });
    let Some(data) = found.filter(|_| !settings.fast) else {
        findings.notes.push(match settings.fast {
            true => "fast: without ResNet-20".into(),
            false => "skipped: ResNet-20 and CIFAR-10 are not there (set STRATA_SHARED)".into(),
        });
        return Ok(());
    };
    let open = nn::open_network(&data.join("cifar10-resnets/resnet20"))?;
    let network = open.network.as_ref();
    let test = Images::load(&data.join("cifar10-lossless/test_1017.bin.gz"), None)?;
    let train = Images::load(&data.join("cifar10-lossless/train_8068.bin.gz"), None)?;
    let judge = |w: &dyn Weights| Ok(eval::classify(network, w, &test)?.accuracy);
    let dense = judge(open.weights.as_ref())?;
    let mut outcomes = Outcomes::new();
    for seed in SEEDS {
        report::note(&format!("resnet-20, calibration {seed}"));
        let samples = calibration(network, &train, RESNET_IMAGES, 7 * seed as usize)?;
        let patient = Patient {
            network,
            weights: open.weights.as_ref(),
            points: 40,
            cache: &settings.scratch.join("curves"),
            judge: &judge,
        };
        measure(&patient, &samples, &RESNET, &ARMS, false, &mut outcomes)?;
    }
    let title = format!("ResNet-20 on CIFAR-10 ({} test images), 3 calibration draws", test.len());
    findings.tables.push(table(&title, "top-1", &outcomes, &RESNET, &ARMS, dense));
    findings.claims.extend(distortion_claims("ResNet-20", &outcomes, &RESNET));
    Ok(())
}

/// Calibration images of one draw on the residual network.
const RESNET_IMAGES: usize = 64;

/// The almanac's decoder: perplexity by allocator. Reported, for the original experiment has no
/// language model.
fn decoder(settings: &Settings, findings: &mut Findings) -> Result<()> {
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
    let held_out = text::document_tokens(&world.documents(Split::Test), &tokenizer)?;
    let test = windows(&held_out, if settings.fast { 16 } else { 64 }, 128);
    let judge = |w: &dyn Weights| {
        let loss = train::loss::evaluate(&model.decoder, w, std::slice::from_ref(&test));
        Ok(loss.map_err(setup)?.exp())
    };
    let weights = model.weights.as_ref();
    let dense = judge(weights)?;
    let (points, count, length) = if settings.fast { (8, 2, 64) } else { (20, 4, 128) };
    let (seeds, arms): (&[u64], &[Arm]) = match settings.fast {
        true => (&SEEDS[..1], &[Arm::RdMean, Arm::Lamp, Arm::Global, Arm::Uniform]),
        false => (&SEEDS, &ARMS),
    };
    let mut outcomes = Outcomes::new();
    for &seed in seeds {
        report::note(&format!("almanac-3m, calibration {seed}"));
        let documents = world.documents(Split::Validation);
        let drawn = text::calibration_random(&documents, &tokenizer, count, length, seed)?;
        let samples = Samples::tokens(drawn.tokens, drawn.length)?;
        let patient = Patient {
            network: &model.decoder,
            weights,
            points,
            cache: &settings.scratch.join("curves"),
            judge: &judge,
        };
        measure(&patient, &samples, &DECODER, arms, false, &mut outcomes)?;
    }
    let title = format!("almanac-3m: perplexity on {} tokens", test.tokens.len());
    findings.tables.push(table(&title, "perplexity", &outcomes, &DECODER, arms, dense));
    let score = |s, arm| mean(&outcomes, (s, arm), |o| o.score);
    let all = |arm: Arm| -> Vec<f64> { (0..DECODER.len()).map(|s| score(s, arm)).collect() };
    let mut baselines = serde_json::Map::new();
    baselines.insert("dense".into(), dense.into());
    for arm in arms.iter().filter(|a| **a != Arm::RdMean) {
        baselines.insert(arm.label().into(), all(*arm).into());
    }
    findings.claims.push(Claim {
        slug: SLUG.into(),
        claim: format!(
            "almanac-3m, sparsities {DECODER:?}: perplexity by allocator (reported only)"
        ),
        measured: serde_json::json!({ "rd": all(Arm::RdMean) }),
        baselines: baselines.into(),
        seeds: seeds.to_vec(),
        holds: None,
    });
    Ok(())
}

/// The first `rows` windows of `length` tokens with the token after each.
fn windows(tokens: &[u32], rows: usize, length: usize) -> TokenBatch {
    let rows = rows.min(tokens.len().saturating_sub(1) / length);
    TokenBatch {
        rows,
        length,
        tokens: tokens[..rows * length].to_vec(),
        targets: tokens[1..=rows * length].to_vec(),
    }
}

/// The claims on distortion, means over seeds at every sparsity.
fn distortion_claims(subject: &str, outcomes: &Outcomes, sparsities: &[f64]) -> Vec<Claim> {
    let all = |arm: Arm| -> Vec<f64> {
        (0..sparsities.len()).map(|s| mean(outcomes, (s, arm), |o| o.distortion)).collect()
    };
    let rd = all(Arm::RdMean);
    let against = |others: &[(Arm, f64)], what: String| {
        let holds = others
            .iter()
            .all(|(arm, factor)| rd.iter().zip(all(*arm)).all(|(rd, other)| *rd <= factor * other));
        let baselines: serde_json::Map<String, serde_json::Value> =
            others.iter().map(|(arm, _)| (arm.label().to_string(), all(*arm).into())).collect();
        Claim {
            slug: SLUG.into(),
            claim: format!("{subject}, sparsities {sparsities:?}: {what}"),
            measured: serde_json::json!({ "rd": rd }),
            baselines: baselines.into(),
            seeds: SEEDS.to_vec(),
            holds: Some(holds),
        }
    };
    let ratios: Vec<f64> = (0..sparsities.len())
        .map(|s| mean(outcomes, (s, Arm::RdMean), |o| o.additivity.unwrap_or(f64::NAN)))
        .collect();
    vec![
        against(&[(Arm::Uniform, 0.75)], "distortion of rd <= 0.75 times uniform's".into()),
        against(&[(Arm::Global, 0.92)], "distortion of rd <= 0.92 times global magnitude's".into()),
        against(
            &[(Arm::Lamp, 1.05), (Arm::Erk, 1.05)],
            "distortion of rd <= 1.05 times LAMP's and ERK's".into(),
        ),
        Claim {
            slug: SLUG.into(),
            claim: format!("{subject}: measured over predicted distortion (reported only)"),
            measured: serde_json::json!({ "sparsity": sparsities, "ratio": ratios }),
            baselines: serde_json::Value::Null,
            seeds: SEEDS.to_vec(),
            holds: None,
        },
    ]
}

/// Distortion and score of every arm at every sparsity.
fn table(
    title: &str,
    score: &str,
    outcomes: &Outcomes,
    sparsities: &[f64],
    arms: &[Arm],
    dense: f64,
) -> Table {
    let mut columns = vec![Column::right("sparsity"), Column::left("measure")];
    columns.push(Column::right("dense"));
    columns.extend(arms.iter().map(|arm| Column::right(arm.label())));
    let mut table = Table::new(title, columns);
    for (s, sparsity) in sparsities.iter().enumerate() {
        let mut distortion =
            vec![Cell::Float(*sparsity, 2), Cell::text("distortion"), Cell::Float(0.0, 0)];
        let mut scores = vec![Cell::Empty, Cell::text(score), Cell::Float(dense, 4)];
        for &arm in arms {
            distortion.push(Cell::Float(mean(outcomes, (s, arm), |o| o.distortion), 3));
            scores.push(Cell::Float(mean(outcomes, (s, arm), |o| o.score), 4));
        }
        table.push(distortion);
        table.push(scores);
    }
    table
}
