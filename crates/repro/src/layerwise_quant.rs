//! Layer-wise quantisation (Dumitru et al. 2024, arXiv 2406.17415): does the order by importance
//! beat chance, and does a budget by measured error beat the order?
//!
//! The plain models have no redundant block, so a deepened twin is tested beside them: after every
//! block comes a copy whose contributions to the residual stream are a tenth, the nearly idle late
//! blocks of large models.

use crate::subjects::{self, Subject};
use crate::{Findings, Reproduction, Result, Settings};
use compress::grid::GridOptions;
use compress::layerwise_quant::{
    Budget, BudgetUnit, BudgetWeight, LayerScore, Settings as Job, Share, resolve, rounded_model,
    without_blocks,
};
use compress::options::CalibrationOptions;
use compress::{Calibration, Format, Method, Plan, QuantizeOptions, Target};
use data::text;
use nn::{Decoder, Leaf, Model};
use report::{Cell, Claim, Column, Table};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use store::{Dtype, WriteOptions, Writer};
use tensor::host;

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "layerwise-quant",
    room: "compress",
    claim: "With the less important half of its blocks at 2 bits a model with redundant blocks loses \
            less than with a random half; without redundancy orders differ little; a budget by \
            measured error beats both.",
    run,
};

/// Seeds of calibration.
const SEEDS: [u64; 3] = [0, 1, 2];
/// Seeds of random orders.
const ORDERS: [u64; 6] = [0, 1, 2, 3, 4, 5];
/// The two widths.
const HIGH: u8 = 4;
const LOW: u8 = 2;
/// How much of a copied block's output the deepened twin keeps.
const IDLE: f32 = 0.1;

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = Findings::default();
    let subjects = subjects::subjects(settings, &mut findings.notes)?;
    let natural: Vec<&Subject> = subjects.iter().filter(|s| s.weights == "natural").collect();
    deepened(settings, &natural, &mut findings)?;
    for subject in &natural {
        plain(settings, subject, &mut findings)?;
    }
    for subject in &subjects {
        if subject.name == "almanac-3m" && (subject.weights == "natural" || !settings.fast) {
            budgets(settings, subject, &mut findings)?;
        }
    }
    Ok(findings)
}

/// A model whose blocks are lowered and measured, every set of blocks once.
struct Bench<'a> {
    subject: &'a Subject,
    model: Model,
    windows: Vec<(u64, Calibration)>,
    /// Perplexity by the bits of every layer.
    known: BTreeMap<Vec<u8>, f64>,
    tokens: usize,
    group: usize,
}

impl<'a> Bench<'a> {
    fn new(settings: &Settings, subject: &'a Subject, path: &Path) -> Result<Self> {
        let count = if settings.fast { 16 } else { 32 };
        let windows = SEEDS
            .iter()
            .map(|&seed| {
                let (texts, length) = (&subject.calibration, subject.window);
                let drawn =
                    text::calibration_random(texts, &subject.tokenizer, count, length, seed)?;
                Ok((seed, Calibration::new(drawn.tokens, drawn.length)?))
            })
            .collect::<Result<_>>()?;
        // Groups of 32 where they divide every width.
        let group = if subject.groups.contains(&0) { 0 } else { 32 };
        let model = Model::open(path)?;
        let tokens = if settings.fast { 4096 } else { 8192 };
        Ok(Self { subject, model, windows, known: BTreeMap::new(), tokens, group })
    }

    fn blocks(&self) -> usize {
        self.model.decoder.num_blocks()
    }

    fn options(&self) -> QuantizeOptions {
        let (windows, length) = (self.windows[0].1.windows(), self.windows[0].1.length());
        QuantizeOptions {
            grid: self.grid(HIGH),
            format: Format::Dequantized,
            calibration: CalibrationOptions {
                samples: windows,
                sequence_length: length,
                ..Default::default()
            },
            ..Default::default()
        }
    }

    fn grid(&self, bits: u8) -> GridOptions {
        GridOptions { bits, group_size: self.group, ..Default::default() }
    }

    /// Blocks, most important first.
    fn order(&self, score: LayerScore, seed: u64, order_seed: u64) -> Result<Vec<usize>> {
        let mut options = self.options();
        options.layerwise.low_bits = Some(LOW);
        options.layerwise.low_blocks = Some(Share::Count(1));
        options.layerwise.layer_score = score;
        options.layerwise.order_seed = order_seed;
        options.layerwise.probe_samples = 8;
        Ok(self.resolve(&options, seed)?.schedule.order)
    }

    fn resolve(
        &self,
        options: &QuantizeOptions,
        seed: u64,
    ) -> Result<compress::layerwise_quant::Resolved> {
        let scratch = std::env::temp_dir();
        let calibration = &self.windows[seed as usize].1;
        let job = Job { model: &self.model, options, calibration, scratch: &scratch };
        resolve(&job)?.ok_or_else(|| {
            crate::Error::Setup("the schedule that was asked for was not made".into())
        })
    }

    fn perplexity(&self, model: &Model) -> Result<f64> {
        let (tokens, window) = (&self.subject.evaluation, self.subject.window);
        let tokens = tokens.get(..self.tokens.min(tokens.len())).unwrap_or_default();
        Ok(eval::perplexity(model, tokens, window, window)?.perplexity)
    }

    /// Perplexity with `lowered` blocks at the lower width, rounded to nearest.
    fn lowered(&mut self, lowered: &[usize]) -> Result<f64> {
        let grids = (0..self.blocks())
            .flat_map(|block| {
                self.model.decoder.linears(block).into_iter().map(move |n| (block, n))
            })
            .map(|(block, name)| {
                (name.module, self.grid(if lowered.contains(&block) { LOW } else { HIGH }))
            })
            .collect();
        self.rounded(grids)
    }

    /// Perplexity under these grids, rounded to nearest; every set of grids is measured once.
    fn rounded(&mut self, grids: BTreeMap<String, GridOptions>) -> Result<f64> {
        let key: Vec<u8> = grids.values().map(|g| g.bits).collect();
        if let Some(known) = self.known.get(&key) {
            return Ok(*known);
        }
        let model = rounded_model(&self.model, grids, compress::grid::ScaleType::F16)?;
        let value = self.perplexity(&model)?;
        self.known.insert(key, value);
        Ok(value)
    }

    /// Perplexity with `skipped` blocks left out, the others at the higher width.
    fn skipped(&self, skipped: &[usize]) -> Result<f64> {
        let names = (0..self.blocks()).flat_map(|block| self.model.decoder.linears(block));
        let grids = names.map(|n| (n.module, self.grid(HIGH))).collect();
        let mut model = rounded_model(&self.model, grids, compress::grid::ScaleType::F16)?;
        model.decoder = without_blocks(&model.decoder, skipped);
        self.perplexity(&model)
    }

    /// Perplexity of the job that `options` describe, written and read back.
    fn job(&self, settings: &Settings, options: &QuantizeOptions, seed: u64) -> Result<f64> {
        let plan = Plan::new(&self.model.decoder, &self.model.checkpoint, options)?;
        let out = settings.scratch.join("layerwise");
        let target = Target {
            out: &out,
            resume: false,
            overwrite: true,
            provenance: serde_json::Value::Null,
        };
        let (hidden, text) = (report::Progress::hidden(), &self.windows[seed as usize].1);
        let outcome = compress::run(&self.model, &plan, options, text, &target, &hidden)?;
        self.perplexity(&Model::open(&outcome.path)?)
    }
}

fn tail(order: &[usize], count: usize) -> &[usize] {
    order.get(order.len() - count.min(order.len())..).unwrap_or_default()
}

fn head(order: &[usize], count: usize) -> &[usize] {
    order.get(..count.min(order.len())).unwrap_or_default()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn deviation(values: &[f64]) -> f64 {
    let m = mean(values);
    (values.iter().map(|v| (v - m) * (v - m)).sum::<f64>() / values.len().max(1) as f64).sqrt()
}

/// Half of a deepened model's blocks at the lower width.
fn deepened(settings: &Settings, subjects: &[&Subject], findings: &mut Findings) -> Result<()> {
    let mut columns = vec![Column::left("model"), Column::left("method")];
    columns.extend(["lim", "zd", "sensitivity", "random", "reverse lim"].map(Column::right));
    let mut table =
        Table::new("Deepened models, half of the blocks at 2 bits, the rest at 4", columns);
    for subject in subjects {
        let path = settings.scratch.join(format!("{}-deepened", subject.name));
        let original = Model::open(&subject.path)?;
        deepen(&original, &path)?;
        let mut bench = Bench::new(settings, subject, &path)?;
        let half = bench.blocks() / 2;
        let idle: BTreeSet<usize> = (0..bench.blocks()).filter(|b| b % 2 == 1).collect();
        let orders: Vec<Vec<usize>> =
            SEEDS.iter().map(|&s| bench.order(LayerScore::Lim, s, 0)).collect::<Result<_>>()?;
        let found =
            orders.iter().all(|o| tail(o, half).iter().copied().collect::<BTreeSet<_>>() == idle);
        findings.claims.push(Claim {
            slug: "layerwise-quant".into(),
            claim: format!(
                "{}, deepened: the idle blocks are the less important half by lim",
                subject.name
            ),
            measured: json!(orders),
            baselines: json!({"idle": idle, "zd": bench.order(LayerScore::Zd, 0, 0)?}),
            seeds: SEEDS.to_vec(),
            holds: Some(found),
        });
        let random: Vec<Vec<usize>> =
            ORDERS.iter().map(|&s| bench.order(LayerScore::Random, 0, s)).collect::<Result<_>>()?;
        let zd = bench.order(LayerScore::Zd, 0, 0)?;
        let sensitivity = bench.order(LayerScore::Sensitivity, 0, 0)?;
        let methods: &[Method] =
            if settings.fast { &[Method::Rtn] } else { &[Method::Rtn, Method::Gptq] };
        for &method in methods {
            let mut value = |blocks: &[usize], seed: u64| -> Result<f64> {
                if method == Method::Rtn {
                    return bench.lowered(blocks);
                }
                let mut options = bench.options();
                options.method = method;
                for block in blocks {
                    options.overrides.push(compress::options::Override {
                        pattern: format!("layers.{block}.*"),
                        bits: Some(LOW),
                        group_size: None,
                        symmetric: None,
                    });
                }
                bench.job(settings, &options, seed)
            };
            let pairs = || SEEDS.iter().zip(&orders);
            let lim: Vec<f64> =
                pairs().map(|(&s, o)| value(tail(o, half), s)).collect::<Result<_>>()?;
            let reverse: Vec<f64> =
                pairs().map(|(&s, o)| value(head(o, half), s)).collect::<Result<_>>()?;
            let chance: Vec<f64> =
                random.iter().map(|o| value(tail(o, half), 0)).collect::<Result<_>>()?;
            let (by_zd, by_effect) =
                (value(tail(&zd, half), 0)?, value(tail(&sensitivity, half), 0)?);
            // The mean of random orders is known to within its standard error.
            let error = deviation(&chance) / (chance.len() as f64).sqrt();
            let spread = [&lim, &reverse].map(|v| crate::arms::spread(v));
            let gaps = [mean(&chance) - mean(&lim), mean(&reverse) - mean(&chance)];
            let holds = gaps.iter().zip(spread).all(|(gap, s)| *gap > s.max(error));
            table.push(vec![
                Cell::text(&subject.name),
                Cell::text(method.slug()),
                Cell::text(format!("{:.4} ±{:.4}", mean(&lim), spread[0] / 2.0)),
                Cell::Float(by_zd, 4),
                Cell::Float(by_effect, 4),
                Cell::text(format!("{:.4} ±{error:.4}", mean(&chance))),
                Cell::text(format!("{:.4} ±{:.4}", mean(&reverse), spread[1] / 2.0)),
            ]);
            findings.claims.push(Claim {
                slug: "layerwise-quant".into(),
                claim: format!(
                    "{}, deepened, {}: lim < mean of random orders < reverse lim, by more than the \
                     spread over seeds and the standard error of the mean",
                    subject.name,
                    method.slug()
                ),
                measured: json!({"lim": lim, "reverse": reverse}),
                baselines: json!({"random": chance, "zd": by_zd, "sensitivity": by_effect}),
                seeds: SEEDS.to_vec(),
                holds: Some(holds),
            });
        }
    }
    findings.tables.push(table);
    Ok(())
}

/// Every number of lowered blocks of a plain model.
fn plain(settings: &Settings, subject: &Subject, findings: &mut Findings) -> Result<()> {
    let mut bench = Bench::new(settings, subject, &subject.path)?;
    let blocks = bench.blocks();
    let order = |bench: &Bench<'_>, score| bench.order(score, 0, 0);
    let lim = order(&bench, LayerScore::Lim)?;
    let zd = order(&bench, LayerScore::Zd)?;
    let sensitivity = order(&bench, LayerScore::Sensitivity)?;
    let random: Vec<Vec<usize>> =
        ORDERS.iter().map(|&s| bench.order(LayerScore::Random, 0, s)).collect::<Result<_>>()?;
    let names = [
        "blocks at 2 bits",
        "lim",
        "reverse lim",
        "zd",
        "reverse zd",
        "sensitivity",
        "mean of 6 random",
        "best of all sets",
        "lim, blocks left out",
    ];
    let title = format!("{}: perplexity with blocks at 2 bits, the rest at 4", subject.name);
    let mut table = Table::new(title, names.map(Column::right).to_vec());
    let mut sums = [0.0; 3];
    let (mut quantised, mut pruned) = (Vec::new(), Vec::new());
    for count in 1..blocks {
        let by = [
            bench.lowered(tail(&lim, count))?,
            bench.lowered(head(&lim, count))?,
            bench.lowered(tail(&zd, count))?,
            bench.lowered(head(&zd, count))?,
            bench.lowered(tail(&sensitivity, count))?,
        ];
        let chance: Vec<f64> =
            random.iter().map(|o| bench.lowered(tail(o, count))).collect::<Result<_>>()?;
        let mut best = f64::INFINITY;
        for set in subsets(blocks, count) {
            best = best.min(bench.lowered(&set)?);
        }
        let skipped = bench.skipped(tail(&lim, count))?;
        for (sum, value) in sums.iter_mut().zip([by[0], by[2], mean(&chance)]) {
            *sum += value;
        }
        quantised.push(by[0]);
        pruned.push(skipped);
        let mut row = vec![Cell::Int(count as i64)];
        row.extend(by.map(|v| Cell::Float(v, 4)));
        row.extend([mean(&chance), best, skipped].map(|v| Cell::Float(v, 4)));
        table.push(row);
    }
    findings.tables.push(table);
    let [by_lim, by_zd, chance] = sums;
    let all = format!("{}: summed over 1 to {} blocks at 2 bits", subject.name, blocks - 1);
    for (name, sum, slack) in [("lim", by_lim, 0.02), ("zd", by_zd, 0.0)] {
        let slack_text = if slack > 0.0 { " + 0.02" } else { "" };
        findings.claims.push(Claim {
            slug: "layerwise-quant".into(),
            claim: format!("{all}, {name} <= mean of random orders{slack_text}"),
            measured: json!(sum),
            baselines: json!({"random": chance}),
            seeds: ORDERS.to_vec(),
            holds: Some(sum <= chance + slack),
        });
    }
    findings.claims.push(Claim {
        slug: "layerwise-quant".into(),
        claim: format!(
            "{}: lowering blocks to 2 bits loses less than leaving the same blocks out",
            subject.name
        ),
        measured: json!(quantised),
        baselines: json!({"left out": pruned}),
        seeds: vec![0],
        holds: Some(quantised.iter().zip(&pruned).all(|(a, b)| a < b)),
    });
    Ok(())
}

fn subsets(n: usize, count: usize) -> Vec<Vec<usize>> {
    (0..1usize << n)
        .filter(|mask| mask.count_ones() as usize == count)
        .map(|mask| (0..n).filter(|i| mask & (1 << i) != 0).collect())
        .collect()
}

/// Ways to spend the same effective bits.
const ARMS: [&str; 10] = [
    "lim (4, 2)",
    "zd (4, 2)",
    "3 bits everywhere",
    "loss",
    "relative",
    "absolute",
    "loss, 2 and 4 only",
    "measured",
    "loss, by linear",
    "loss, by block",
];

/// Orders against budgets at the same effective bits per weight.
fn budgets(settings: &Settings, subject: &Subject, findings: &mut Findings) -> Result<()> {
    let mut bench = Bench::new(settings, subject, &subject.path)?;
    let blocks = bench.blocks();
    let counts: Vec<usize> = (1..blocks).collect();
    let group = if bench.group == 0 { f64::INFINITY } else { bench.group as f64 };
    let effective = |count: usize| {
        let share = count as f64 / blocks as f64;
        let bits = f64::from(HIGH) - f64::from(HIGH - LOW) * share;
        bits + (16.0 + bits) / group
    };
    let seeds: &[u64] = if settings.fast { &SEEDS[..1] } else { &SEEDS };
    let methods: &[Method] = if settings.fast || subject.weights == "planted" {
        &[Method::Rtn]
    } else {
        &[Method::Rtn, Method::Gptq]
    };
    let all_widths = compress::grid::BITS;
    // Perplexity by method, number of lowered blocks and arm, a seed each.
    let mut found: BTreeMap<(&str, usize, &str), Vec<f64>> = BTreeMap::new();
    for &seed in seeds {
        let orders = [LayerScore::Lim, LayerScore::Zd].map(|score| {
            let mut options = bench.options();
            options.layerwise.low_bits = Some(LOW);
            options.layerwise.low_blocks = Some(Share::Count(1));
            options.layerwise.layer_score = score;
            bench.resolve(&options, seed)
        });
        let budget = |unit: BudgetUnit, weight: BudgetWeight| {
            let mut options = bench.options();
            options.layerwise.budget = Some(Budget::BitsPerWeight(effective(0)));
            options.layerwise.budget_unit = unit;
            options.layerwise.budget_weight = weight;
            options.layerwise.probe_samples = 8;
            bench.resolve(&options, seed)
        };
        let loss = budget(BudgetUnit::Input, BudgetWeight::Loss)?;
        let mut arms: Vec<(&str, compress::layerwise_quant::Resolved)> = Vec::new();
        for (order, name) in orders.into_iter().zip(ARMS) {
            arms.push((name, order?));
        }
        arms.push(("relative", loss.reweighed(BudgetWeight::Relative, &all_widths)?));
        arms.push(("absolute", loss.reweighed(BudgetWeight::Absolute, &all_widths)?));
        arms.push(("loss, 2 and 4 only", loss.reweighed(BudgetWeight::Loss, &[LOW, HIGH])?));
        if seed == 0 && !settings.fast {
            arms.push(("measured", budget(BudgetUnit::Input, BudgetWeight::Measured)?));
            arms.push(("loss, by linear", budget(BudgetUnit::Linear, BudgetWeight::Loss)?));
            arms.push(("loss, by block", budget(BudgetUnit::Block, BudgetWeight::Loss)?));
        }
        arms.push(("loss", loss));
        for &method in methods {
            for (arm, resolved) in &arms {
                // Another method writes a model for every point: the arms that matter most.
                if method != Method::Rtn && !["lim (4, 2)", "loss", "relative"].contains(arm) {
                    continue;
                }
                for &count in &counts {
                    let point = match resolved.schedule.by {
                        "importance" => resolved.at_blocks(count)?,
                        _ => resolved.at_budget(Budget::BitsPerWeight(effective(count) + 1e-9))?,
                    };
                    let value = if method == Method::Rtn {
                        bench.rounded(point.grids)?
                    } else {
                        bench.job(settings, &QuantizeOptions { method, ..point.options }, seed)?
                    };
                    found.entry((method.slug(), count, arm)).or_default().push(value);
                }
            }
        }
    }
    // Between 4 and 2 lies 3, which needs no schedule at all.
    if let Some(&middle) = counts.iter().find(|&&count| 2 * count == blocks) {
        let names: Vec<_> = (0..blocks).flat_map(|b| bench.model.decoder.linears(b)).collect();
        let grids = names.into_iter().map(|n| (n.module, bench.grid(3))).collect();
        found
            .insert((Method::Rtn.slug(), middle, "3 bits everywhere"), vec![bench.rounded(grids)?]);
        for &method in methods.iter().filter(|m| **m != Method::Rtn) {
            let options = QuantizeOptions { method, grid: bench.grid(3), ..bench.options() };
            let values: Vec<f64> =
                seeds.iter().map(|&s| bench.job(settings, &options, s)).collect::<Result<_>>()?;
            found.insert((method.slug(), middle, "3 bits everywhere"), values);
        }
    }
    let mut columns =
        vec![Column::right("average bits"), Column::right("effective"), Column::left("method")];
    columns.extend(ARMS.map(Column::right));
    let title = format!(
        "{} ({}): perplexity at the effective bits of 1 to {} blocks at 2 bits; schedules by \
         importance, and budgets by what makes errors comparable",
        subject.name,
        subject.weights,
        blocks - 1
    );
    let mut table = Table::new(title, columns);
    for method in methods.iter().map(|m| m.slug()) {
        for &count in &counts {
            let share = count as f64 / blocks as f64;
            let mut row = vec![
                Cell::Float(4.0 - 2.0 * share, 3),
                Cell::Float(effective(count), 3),
                Cell::text(method),
            ];
            row.extend(ARMS.map(|arm| match found.get(&(method, count, arm)) {
                Some(values) if values.len() > 1 => Cell::text(format!(
                    "{:.4} ±{:.4}",
                    mean(values),
                    crate::arms::spread(values) / 2.0
                )),
                Some(values) => Cell::Float(mean(values), 4),
                None => Cell::Empty,
            }));
            table.push(row);
        }
        let of = |arm: &'static str| -> Vec<Vec<f64>> {
            counts.iter().filter_map(|&n| found.get(&(method, n, arm)).cloned()).collect()
        };
        let budget = of("loss");
        let beats = |other: &Vec<Vec<f64>>| {
            budget.iter().zip(other).all(|(a, b)| a.iter().zip(b).all(|(a, b)| a < b))
        };
        let orders: BTreeMap<&str, Vec<Vec<f64>>> =
            ARMS[..2].iter().map(|&arm| (arm, of(arm))).filter(|(_, v)| !v.is_empty()).collect();
        let place = format!("{} ({}), {method}", subject.name, subject.weights);
        findings.claims.push(Claim {
            slug: "layerwise-quant".into(),
            claim: format!(
                "{place}: at the same effective bits the budget by loss beats {}, every point and \
                 seed",
                orders.keys().copied().collect::<Vec<_>>().join(" and ")
            ),
            measured: json!(budget),
            baselines: json!(orders),
            seeds: seeds.to_vec(),
            holds: Some(orders.values().all(beats)),
        });
        let means = |arm: &'static str| of(arm).iter().map(|v| mean(v)).collect::<Vec<f64>>();
        let others: BTreeMap<&str, Vec<f64>> = ARMS
            .iter()
            .filter(|a| !a.ends_with("2)") && **a != "loss")
            .map(|&arm| (arm, means(arm)))
            .filter(|(_, v)| !v.is_empty())
            .collect();
        findings.claims.push(Claim {
            slug: "layerwise-quant".into(),
            claim: format!("{place}: mean perplexity of budgets by what makes errors comparable"),
            measured: json!(means("loss")),
            baselines: json!(others),
            seeds: seeds.to_vec(),
            holds: None,
        });
    }
    findings.tables.push(table);
    if subject.weights == "natural" { accounting(settings, &bench, findings) } else { Ok(()) }
}

/// The averages that a schedule announces are what its files hold.
fn accounting(settings: &Settings, bench: &Bench<'_>, findings: &mut Findings) -> Result<()> {
    let mut options = bench.options();
    options.format = Format::CompressedTensors;
    options.layerwise.low_bits = Some(LOW);
    options.layerwise.average_bits = Some(3.5);
    options.layerwise.layer_score = LayerScore::Zd;
    let resolved = bench.resolve(&options, 0)?;
    let plan = Plan::new(&bench.model.decoder, &bench.model.checkpoint, &resolved.options)?;
    let out = settings.scratch.join("layerwise");
    let target =
        Target { out: &out, resume: false, overwrite: true, provenance: serde_json::Value::Null };
    let (hidden, none) = (report::Progress::hidden(), Calibration::none());
    let done = compress::run(&bench.model, &plan, &resolved.options, &none, &target, &hidden)?;
    let size = |l: &compress::LayerResult| (l.shape[0] * l.shape[1]) as f64;
    let all: f64 = done.layers.iter().map(size).sum();
    let sum = |f: &dyn Fn(&compress::LayerResult) -> f64| -> f64 {
        done.layers.iter().map(|l| f(l) * size(l)).sum::<f64>() / all
    };
    let nominal = sum(&|l| f64::from(l.bits.unwrap_or(0)));
    let effective = sum(&|l| l.bits_per_weight);
    let bytes = Model::open(&done.path)?.checkpoint.total_bytes();
    let schedule = &resolved.schedule;
    let holds = (nominal - schedule.average_bits).abs() < 1e-12
        && (nominal - 3.5).abs() < 1e-12
        && (effective - schedule.effective_bits_per_weight).abs() < 1e-9
        && schedule.bytes == Some(bytes);
    findings.claims.push(Claim {
        slug: "layerwise-quant".into(),
        claim: format!(
            "{} ({}): announced average bits and bytes are those of the files",
            bench.subject.name, bench.subject.weights
        ),
        measured: json!({"nominal": nominal, "effective": effective, "bytes": bytes}),
        baselines: json!({
            "nominal": schedule.average_bits,
            "effective": schedule.effective_bits_per_weight,
            "bytes": schedule.bytes,
        }),
        seeds: vec![],
        holds: Some(holds),
    });
    Ok(())
}

/// Writes `model` with a nearly idle copy of every block behind it.
fn deepen(model: &Model, out: &Path) -> Result<()> {
    let mut config = model.checkpoint.config()?.clone();
    let blocks = model.decoder.num_blocks();
    if let Some(object) = config.as_object_mut() {
        object.insert("num_hidden_layers".into(), (2 * blocks).into());
    }
    let mut twin = Decoder::from_config(&config)?;
    // A tied head has no tensor of its own.
    twin.head.module.clone_from(&model.decoder.head.module);
    let options = WriteOptions { overwrite: true, ..WriteOptions::default() };
    let mut writer = Writer::create(out, options)?;
    let mut add = |name: &nn::Name, source: &nn::Name, factor: f32| -> Result<()> {
        let weights = model.weights.as_ref();
        let (mut values, shape) = if name.role.is_norm() {
            (host::into_vec(weights.vector(source, Leaf::Weight)?), vec![name.shape[0]])
        } else {
            (host::into_vec(weights.matrix(source)?), name.shape.to_vec())
        };
        values.iter_mut().for_each(|v| *v *= factor);
        writer.add(&name.weight(), Dtype::F32, &shape, bytemuck::cast_slice(&values))?;
        if let Some(bias) = name.bias_name() {
            let mut values = host::into_vec(weights.vector(source, Leaf::Bias)?);
            values.iter_mut().for_each(|v| *v *= factor);
            writer.add(&bias, Dtype::F32, &[values.len()], bytemuck::cast_slice(&values))?;
        }
        Ok(())
    };
    for (name, source) in twin.other_names().into_iter().zip(model.decoder.other_names()) {
        add(name, source, 1.0)?;
    }
    for block in 0..blocks {
        let source = model.decoder.names(block)?;
        for (index, scale) in [(2 * block, 1.0), (2 * block + 1, IDLE)] {
            for (name, source) in twin.names(index)?.all().into_iter().zip(source.all()) {
                let contributes = matches!(name.role, nn::Role::Output | nn::Role::Down);
                add(name, source, if contributes { scale } else { 1.0 })?;
            }
        }
    }
    writer.carry(model.checkpoint.directory(), &["config.json"])?;
    writer.put_json("config.json", &config)?;
    writer.finish()?;
    Ok(())
}
