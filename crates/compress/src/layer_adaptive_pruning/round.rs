//! One round: measure, allocate, mask, and see whether the parts add up.

use super::allocators::{self, Layer};
use super::cache::CurveCache;
use super::curves::{Curve, Distortion, Probe, Prunable};
use super::layers::dimensions;
use super::masks::{Mask, budget, relative_amount, rounded_budget};
use super::options::{Allocator, LayerAdaptivePruningOptions, PruneTarget, read_table};
use super::rd::{self, Terms};
use super::samples::Samples;
use crate::{Error, Result};
use method::Pattern;
use nn::{Network, Role, Weights};
use std::collections::{BTreeMap, HashMap};
use tensor::{Tensor, host};

/// Between these ratios of measured to predicted distortion layers count as additive.
pub const ADDITIVE: [f64; 2] = [0.5, 2.0];

/// How a round allocates.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who decides.
    pub allocator: Allocator,
    /// What samples' distortions become.
    pub kind: Distortion,
    /// Steps of the curves.
    pub points: usize,
    /// Never let a curve fall.
    pub monotone: bool,
    /// Resolution of the allocation's table.
    pub units: usize,
    /// What the sparsity counts.
    pub target: PruneTarget,
    /// `[smallest, largest]` sparsity of the layers that a pattern names.
    pub bounds: Vec<(Pattern, [f64; 2])>,
    /// Sparsities by pattern, for [`Allocator::Table`].
    pub table: Vec<(Pattern, f64)>,
    /// Accept a layer without weights although the output is constant.
    pub allow_dead_layers: bool,
    /// Measurements at once.
    pub workers: usize,
}

impl Settings {
    /// The settings that options describe; reads the table if there is one.
    ///
    /// # Errors
    /// Bounds or a table that cannot be read.
    pub fn new(options: &LayerAdaptivePruningOptions) -> Result<Self> {
        Ok(Self {
            allocator: options.allocator,
            kind: options.kind(),
            points: options.curve_points,
            monotone: options.monotone_curves,
            units: options.allocation_units,
            target: options.target,
            bounds: options.bounds()?,
            table: options.allocation_table.as_deref().map_or(Ok(Vec::new()), read_table)?,
            allow_dead_layers: options.allow_dead_layers,
            workers: rayon::current_num_threads(),
        })
    }
}

/// What a layer keeps.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerShare {
    /// Module name.
    pub module: String,
    /// Role label, e.g. `conv`.
    pub role: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Number of weights.
    pub total: usize,
    /// Weights that stay.
    pub kept: usize,
    /// Share of weights that are zero.
    pub sparsity: f64,
    /// Share of the weights left before this round that it prunes.
    pub of_survivors: f64,
    /// Distortion that the curves predict for this layer alone.
    pub predicted: Option<f64>,
    /// Multiplications that one sample makes with each weight, where they were counted.
    pub positions: Option<u64>,
    /// Outputs (filters, neurons) that no weight reaches any more.
    pub empty_outputs: usize,
}

/// What a round decided.
#[derive(Debug, Clone, Default)]
pub struct Round {
    /// What every layer keeps, in the order of computation.
    pub layers: Vec<LayerShare>,
    /// Sparsity asked for.
    pub requested: f64,
    /// Sparsity reached: the share of weights that are zero.
    pub reached: f64,
    /// Share of the multiplications that is left, where they were counted.
    pub operations: Option<f64>,
    /// Sum of the layers' predicted distortions.
    pub predicted: Option<f64>,
    /// Distortion of the network with all masks.
    pub measured: Option<f64>,
    /// What the budget had left, in its own units.
    pub unused: u64,
    /// Whether no choice of grid points has a smaller predicted sum (rd only).
    pub exact: Option<bool>,
    /// The curves, where they were measured.
    pub curves: Vec<Curve>,
    /// The masks by module.
    pub masks: BTreeMap<String, Mask>,
    /// Things the user should know.
    pub warnings: Vec<String>,
}

impl Round {
    /// Measured over predicted distortion: 1 where the layers' errors add up exactly.
    pub fn additivity(&self) -> Option<f64> {
        match (self.measured, self.predicted) {
            (Some(measured), Some(predicted)) if predicted > 0.0 => Some(measured / predicted),
            _ => None,
        }
    }
}

/// A network and what a round may ask about it.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The network.
    pub network: &'a dyn Network,
    /// Its weights as they are, pruned as far as they are.
    pub weights: &'a (dyn Weights + Sync),
    /// The calibration inputs; without them only the allocators that look at weights work, and
    /// nothing is measured.
    pub samples: Option<&'a Samples>,
}

/// Runs one round at `sparsity` over `layers`.
///
/// # Errors
/// A sparsity that cannot be reached, an allocator that needs inputs without them, a network whose
/// output is constant afterwards, and from the measurement.
pub fn run(
    subject: Subject<'_>,
    layers: &[Prunable],
    sparsity: f64,
    settings: &Settings,
    cache: Option<&CurveCache>,
    progress: &report::Progress,
) -> Result<Round> {
    if layers.is_empty() {
        return Err(Error::Options("no layer is left to prune; loosen --only or --exclude".into()));
    }
    let mut round = Round { requested: sparsity, ..Round::default() };
    let inferred: usize = layers.iter().map(|l| l.ranking.zeros()).sum();
    let total: u64 = layers.iter().map(|l| l.total() as u64).sum();
    let available: u64 = layers.iter().map(|l| l.available() as u64).sum();
    let probe = subject.samples.map(|samples| Probe {
        network: subject.network,
        weights: subject.weights,
        samples,
        workers: settings.workers,
    });
    if subject.samples.is_some_and(|s| s.count() == 1) {
        round.warnings.push(
            "one calibration sample: mean and worst distortion are the same, and curves follow \
             that sample alone"
                .into(),
        );
    }
    let positions = match subject.samples.filter(|s| s.batches() > 0) {
        Some(samples) => {
            super::layers::positions(subject.network, subject.weights, &samples.batch(0))?
        }
        None => HashMap::new(),
    };
    let uses = |layer: &Prunable| positions.get(&layer.name.module).copied();
    let mut distortion: Vec<Option<f64>> = vec![None; layers.len()];
    let kept = match settings.allocator {
        Allocator::Rd => {
            let probe = probe.ok_or_else(|| {
                Error::Options(
                    "the rd allocator measures the network's output and needs calibration inputs; \
                     give some, use --synthetic-calibration, or another --allocator"
                        .into(),
                )
            })?;
            let mut curves =
                probe.curves(layers, settings.points, settings.kind, cache, progress)?;
            if settings.monotone {
                curves = curves.into_iter().map(Curve::monotone).collect();
            }
            let found = rd::choose(&curves, &terms(layers, sparsity, settings, uses)?)?;
            round.unused = found.unused;
            round.exact = Some(found.exact);
            round.predicted = Some(found.predicted);
            distortion = found.distortion.into_iter().map(Some).collect();
            round.curves = curves;
            found.kept
        }
        Allocator::Table => by_table(layers, &settings.table)?,
        other => {
            let mut keep = rounded_budget(sparsity, total);
            if keep > available {
                round.warnings.push(format!(
                    "the model is already sparser than {sparsity}: {} of {total} weights are zero, \
                     nothing is pruned",
                    total - available
                ));
                keep = available;
            }
            by_weights(other, layers, subject.weights, keep)?
        }
    };
    if inferred > 0 {
        round
            .warnings
            .push(format!("{inferred} weights are zero already; they count as pruned and stay so"));
    }
    let mut changed: HashMap<String, Tensor<2>> = HashMap::new();
    let mut kept_operations = 0u128;
    let mut all_operations = 0u128;
    for ((layer, &kept), distortion) in layers.iter().zip(&kept).zip(&distortion) {
        let kept = kept.min(layer.available());
        let mask = layer.ranking.mask(layer.total() - kept);
        let name = &layer.name;
        let share = LayerShare {
            module: name.module.clone(),
            role: name.role.label().to_string(),
            shape: name.shape,
            total: layer.total(),
            kept,
            sparsity: 1.0 - kept as f64 / layer.total() as f64,
            of_survivors: relative_amount(
                1.0 - kept as f64 / layer.total() as f64,
                layer.ranking.zeros() as f64 / layer.total() as f64,
            ),
            predicted: *distortion,
            positions: uses(layer),
            empty_outputs: mask.empty_rows(name.in_features()),
        };
        if kept == 0 {
            round.warnings.push(format!("layer {} is fully pruned", name.module));
        } else if let Some([height, width]) = name.kernel
            && name.role != Role::Stem
            && name.in_features() == height * width
            && share.empty_outputs > 0
        {
            round.warnings.push(format!(
                "{}: {} of its depthwise filters have lost all their weights; their channels are \
                 dead",
                name.module, share.empty_outputs
            ));
        }
        let uses = u128::from(uses(layer).unwrap_or(0));
        kept_operations += kept as u128 * uses;
        all_operations += layer.total() as u128 * uses;
        if kept < layer.available() && probe.is_some() {
            let mut matrix = subject.weights.matrix(name)?;
            host::write(&mut matrix, |values| mask.apply(values));
            changed.insert(name.weight(), matrix);
        }
        round.masks.insert(name.module.clone(), mask);
        round.layers.push(share);
    }
    let left: u64 = round.layers.iter().map(|l| l.kept as u64).sum();
    round.reached = 1.0 - left as f64 / total as f64;
    if all_operations > 0 {
        round.operations = Some(kept_operations as f64 / all_operations as f64);
    }
    let mut constant = None;
    if let Some(probe) = probe {
        let (measured, same) = probe.joint(&changed, settings.kind)?;
        round.measured = Some(measured);
        constant = (probe.samples.count() > 1).then_some(same);
    }
    dead_layers(&round, constant, settings)?;
    if let Some(ratio) = round.additivity().filter(|r| !(ADDITIVE[0]..=ADDITIVE[1]).contains(r)) {
        round.warnings.push(format!(
            "measured distortion is {ratio:.2} times the predicted sum: at this sparsity the \
             layers' errors do not add up, and the allocation is less than optimal; prune in \
             --rounds with training in between"
        ));
    }
    Ok(round)
}

/// The distortion that the masks of `round` make, by another kind than the round's own.
///
/// # Errors
/// As [`Probe::joint`]; without samples there is nothing to measure.
pub fn distortion(
    subject: Subject<'_>,
    layers: &[Prunable],
    round: &Round,
    kind: Distortion,
) -> Result<f64> {
    let Subject { network, weights, samples } = subject;
    let samples = samples.ok_or_else(|| Error::Options("there are no samples".into()))?;
    let mut changed = HashMap::new();
    for layer in layers {
        if let Some(mask) = round.masks.get(&layer.name.module) {
            let mut matrix = weights.matrix(&layer.name)?;
            host::write(&mut matrix, |values| mask.apply(values));
            changed.insert(layer.name.weight(), matrix);
        }
    }
    let probe = Probe { network, weights, samples, workers: 1 };
    Ok(probe.joint(&changed, kind)?.0)
}

/// The terms of the choice by curves.
fn terms(
    layers: &[Prunable],
    sparsity: f64,
    settings: &Settings,
    uses: impl Fn(&Prunable) -> Option<u64>,
) -> Result<Terms> {
    let costs: Vec<u64> = match settings.target {
        PruneTarget::Weights => vec![1; layers.len()],
        PruneTarget::Operations => layers
            .iter()
            .map(|layer| {
                uses(layer).filter(|&u| u > 0).ok_or_else(|| {
                    Error::layer(
                        &layer.name.module,
                        "its multiplications cannot be counted on this network; use --target \
                         weights",
                    )
                })
            })
            .collect::<Result<_>>()?,
    };
    let full: u128 =
        layers.iter().zip(&costs).map(|(l, &c)| l.total() as u128 * u128::from(c)).sum();
    let full = u64::try_from(full).map_err(|_| {
        Error::Options("the network makes more multiplications than can be counted".into())
    })?;
    let bounds = |layer: &Prunable| {
        settings
            .bounds
            .iter()
            .filter(|(p, _)| p.matches(&layer.name.module))
            .fold([0.0f64, 1.0f64], |[low, high], (_, [l, h])| [low.max(*l), high.min(*h)])
    };
    for (pattern, _) in &settings.bounds {
        if !layers.iter().any(|l| pattern.matches(&l.name.module)) {
            return Err(Error::Options(format!(
                "the bound `{pattern}` matches none of the layers that are pruned"
            )));
        }
    }
    Ok(Terms {
        budget: budget(sparsity, full),
        costs,
        bounds: layers.iter().map(bounds).collect(),
        pruned: layers.iter().map(|l| l.ranking.zeros()).collect(),
        units: settings.units,
    })
}

fn by_table(layers: &[Prunable], table: &[(Pattern, f64)]) -> Result<Vec<usize>> {
    for (pattern, _) in table {
        if !layers.iter().any(|l| pattern.matches(&l.name.module)) {
            let near =
                method::nearest(pattern.as_str(), layers.iter().map(|l| l.name.module.as_str()));
            return Err(Error::Options(format!(
                "the table's `{pattern}` matches none of the layers that are pruned{}",
                near.map(|n| format!("; the nearest name is `{n}`")).unwrap_or_default()
            )));
        }
    }
    let kept = |layer: &Prunable| {
        let sparsity = table.iter().find(|(p, _)| p.matches(&layer.name.module));
        let sparsity = sparsity.map_or(0.0, |(_, s)| *s);
        let pruned = (sparsity * layer.total() as f64).round_ties_even() as usize;
        (layer.total() - pruned.min(layer.total())).min(layer.available())
    };
    Ok(layers.iter().map(kept).collect())
}

fn by_weights(
    allocator: Allocator,
    layers: &[Prunable],
    weights: &dyn Weights,
    keep: u64,
) -> Result<Vec<usize>> {
    let seen: Vec<Layer<'_>> = layers
        .iter()
        .map(|layer| Layer {
            name: &layer.name.module,
            total: layer.total(),
            available: layer.available(),
            dimensions: dimensions(&layer.name),
            convolution: layer.name.kernel.is_some(),
        })
        .collect();
    match allocator {
        Allocator::Lamp | Allocator::Global => {
            let mut scores = Vec::with_capacity(layers.len());
            for layer in layers {
                let matrix = weights.matrix(&layer.name)?;
                scores.push(host::read(&matrix, |values| match allocator {
                    Allocator::Lamp => allocators::lamp_scores(&layer.ranking.sorted(values)),
                    _ => allocators::magnitudes(&layer.ranking.sorted(values)),
                }));
            }
            allocators::by_threshold(&seen, &scores, keep)
        }
        Allocator::Erk => allocators::erk(&seen, keep),
        Allocator::UniformPlus => allocators::uniform_plus(&seen, keep),
        _ => allocators::uniform(&seen, keep),
    }
}

/// Refuses masks under which the network computes nothing: a layer without weights in a chain.
fn dead_layers(round: &Round, constant: Option<bool>, settings: &Settings) -> Result<()> {
    let dead: Vec<&str> =
        round.layers.iter().filter(|l| l.kept == 0).map(|l| l.module.as_str()).collect();
    if dead.is_empty() || settings.allow_dead_layers || constant == Some(false) {
        return Ok(());
    }
    let why = match constant {
        Some(_) => "and the output no longer depends on the input",
        None => {
            "and without at least two calibration inputs it cannot be seen whether the output \
                 still depends on the input"
        }
    };
    Err(Error::Options(format!(
        "at this sparsity {} {} no weight, {why}: lower the sparsity, bound the layer with \
         --layer-max, or give --allow-dead-layers",
        dead.join(", "),
        if dead.len() == 1 { "keeps" } else { "keep" }
    )))
}
