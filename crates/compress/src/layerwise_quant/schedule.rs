//! A schedule: the width of every layer, how it came about, and what it means to other tools.

use super::assign::{Goal, Widths, assign};
use super::budget::{UnitCurve, curves, overlay};
use super::rounded::rounded_model;
use super::score::scores;
use super::{Budget, BudgetWeight, Count, LayerwiseQuantOptions};
use crate::allocate::{Choice, UNITS, allocate};
use crate::grid::{GridOptions, effective_group};
use crate::options::{Method, Override, QuantizeOptions};
use crate::plan::Plan;
use crate::quantize::container;
use crate::runner::scale_type;
use crate::stream::Probe;
use crate::{Calibration, Error, Result};
use nn::{Model, Name, Overlay, Role};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The file in the output directory.
pub const FILE: &str = "schedule.json";

/// What a schedule is made for.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// The model at full precision.
    pub model: &'a Model,
    /// The job.
    pub options: &'a QuantizeOptions,
    /// Calibration windows; may be empty for scores that need none.
    pub calibration: &'a Calibration,
    /// A directory for activations that do not fit into memory.
    pub scratch: &'a Path,
}

/// A linear layer whose width the schedule decides.
#[derive(Debug, Clone)]
struct Layer {
    name: Name,
    block: usize,
}

impl Layer {
    fn weights(&self) -> f64 {
        (self.name.out_features() * self.name.in_features()) as f64
    }
}

/// How widths are found.
#[derive(Debug, Clone)]
enum Rule {
    /// Blocks by importance.
    Importance { order: Vec<usize>, scores: Vec<f64>, widths: Widths },
    /// Units by error curves.
    Budget { units: Vec<UnitCurve> },
}

/// A width for every layer.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Schedule {
    /// `importance` or `budget`.
    pub by: &'static str,
    /// What made blocks important, or errors comparable.
    pub score: Value,
    /// What was asked for.
    pub target: String,
    /// Blocks, most important first; empty for a budget.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub order: Vec<usize>,
    /// Score of every block; empty for a budget.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub scores: BTreeMap<usize, f64>,
    /// Bits of every block whose layers all have the same.
    pub bits: BTreeMap<usize, u8>,
    /// Mean bits of the codes.
    pub average_bits: f64,
    /// Mean bits including scales and zero points.
    pub effective_bits_per_weight: f64,
    /// Bytes of all tensors of the output; absent where widths do not change its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The layers, in order.
    pub layers: Vec<LayerWidth>,
    /// Sum of the errors that the allocator chose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_error: Option<f64>,
    /// No choice within the budget has a smaller sum.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_bound: Option<f64>,
    /// Error curves of a budget.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<UnitCurve>,
    /// For llama.cpp's quantiser: arguments of `--tensor-type`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gguf_tensor_types: Vec<String>,
    /// What scores and errors were measured on.
    pub calibration: Value,
    /// Things the user should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The width of one layer.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LayerWidth {
    /// Module name.
    pub module: String,
    /// Role label.
    pub role: String,
    /// Block index.
    pub block: usize,
    /// Weights.
    pub weights: u64,
    /// Bits per code.
    pub bits: u8,
    /// Weights per scale.
    pub group_size: usize,
}

/// A decided job.
pub struct Resolved {
    /// The job with the schedule as overrides.
    pub options: QuantizeOptions,
    /// The schedule.
    pub schedule: Schedule,
    layers: Vec<Layer>,
    rule: Rule,
    original: QuantizeOptions,
    /// Bytes of the output outside the scheduled layers.
    other_bytes: Option<u64>,
}

/// One point of a trade-off curve.
#[derive(Debug, Clone)]
pub struct Point {
    /// The job at this point.
    pub options: QuantizeOptions,
    /// Grids by module.
    pub grids: BTreeMap<String, GridOptions>,
    /// Mean bits of the codes.
    pub average_bits: f64,
    /// Mean bits including scales and zero points.
    pub effective: f64,
    /// Blocks below the highest width, for a schedule by importance.
    pub lowered: Vec<usize>,
}

/// Decides the widths that `options` ask for; `None` when they ask for none.
///
/// # Errors
/// Targets out of reach, missing calibration text, NaN or infinite weights or activations.
pub fn resolve(settings: &Settings<'_>) -> Result<Option<Resolved>> {
    let options = settings.options;
    if !options.layerwise.active() {
        return Ok(None);
    }
    let plan = plan(settings)?;
    let layers: Vec<Layer> = plan
        .layers()
        .filter(|l| l.grid.as_ref() == Some(&options.grid))
        .map(|l| Layer { name: l.name.clone(), block: l.name.block.unwrap_or(0) })
        .collect();
    if layers.is_empty() {
        return Err(Error::Options(
            "every layer has an override of its own: there is nothing left to schedule".into(),
        ));
    }
    let mut notes = Vec::new();
    let rule = match options.layerwise.low_bits {
        Some(_) => importance(settings, &layers, &mut notes)?,
        None => {
            let kind = scale_type(&settings.model.checkpoint, container(options));
            let progress =
                report::Progress::new("error curves", plan.blocks.len() as u64, "blocks");
            let Settings { model, calibration, scratch, .. } = *settings;
            let units = curves(model, &plan, options, calibration, kind, scratch, &progress)?;
            Rule::Budget { units }
        }
    };
    let other_bytes = other_bytes(settings, &plan, &layers)?;
    let mut resolved = Resolved {
        options: options.clone(),
        schedule: Schedule::empty(options, settings.calibration),
        layers,
        rule,
        original: options.clone(),
        other_bytes,
    };
    resolved.decide(settings, notes)?;
    Ok(Some(resolved))
}

/// The plan of the job without the schedule: what may be quantised at all.
fn plan(settings: &Settings<'_>) -> Result<Plan> {
    let model = settings.model;
    Plan::new(&model.decoder, &model.checkpoint, settings.options)
}

fn importance(settings: &Settings<'_>, layers: &[Layer], notes: &mut Vec<String>) -> Result<Rule> {
    let options = settings.options;
    let own = &options.layerwise;
    let widths = Widths { bits: own.widths(options.grid.bits), middle_share: own.middle_share };
    let low = grid_at(options, &widths, widths.bits.len() - 1);
    let kind = scale_type(&settings.model.checkpoint, container(options));
    let round = |changed: &mut Overlay<'_>, block: usize| -> Result<()> {
        let mut here = layers.iter().filter(|l| l.block == block);
        here.try_for_each(|layer| overlay(changed, &layer.name, &low, kind))
    };
    let Settings { model, calibration, scratch, .. } = *settings;
    let found = scores(model, own, calibration, options.memory.0, scratch, &round)?;
    notes.extend(found.notes.iter().cloned());
    let mut order = found.order();
    // Blocks without a layer to schedule have no place in the order.
    order.retain(|block| layers.iter().any(|l| l.block == *block));
    if own.reverse_order {
        order.reverse();
    }
    Ok(Rule::Importance { order, scores: found.values, widths })
}

/// The grid of a width of a schedule by importance.
fn grid_at(options: &QuantizeOptions, widths: &Widths, width: usize) -> GridOptions {
    let mut grid = options.grid.clone();
    if let Some(&bits) = widths.bits.get(width) {
        grid.bits = bits;
    }
    if width + 1 == widths.bits.len() {
        grid.group_size = options.layerwise.low_group_size.unwrap_or(grid.group_size);
    }
    grid
}

impl Resolved {
    /// Applies the rule to the job's target.
    fn decide(&mut self, settings: &Settings<'_>, mut notes: Vec<String>) -> Result<()> {
        let own = self.original.layerwise.clone();
        let mut predicted = None;
        let grids = match &self.rule {
            Rule::Importance { widths, order, .. } => {
                let (goal, bits) = self.goal(&own, order.len())?;
                let mut state = self.assign(goal, bits)?;
                if own.refine_swaps > 0 {
                    let tried = self.refine(settings, &mut state)?;
                    notes.push(tried);
                }
                let grids = self.grids_of(&state);
                if let (Goal::Average(target), 1) = (goal, order.len()) {
                    notes.push(format!(
                        "a single block cannot average {target} bits; the nearest width is {}",
                        widths.bits[state.first().copied().unwrap_or(0)]
                    ));
                }
                grids
            }
            Rule::Budget { .. } => {
                let budget = own.budget.unwrap_or(Budget::BitsPerWeight(4.0));
                let (grids, found) = self.allocated(budget)?;
                predicted = Some((found.error, found.bound));
                grids
            }
        };
        let base = match self.rule {
            Rule::Importance { .. } => self.original.clone(),
            Rule::Budget { .. } => self.common_base(&grids),
        };
        self.options = with_grids(&base, &self.layers, &grids);
        // The whole job must be possible, not only the schedule.
        Plan::new(&settings.model.decoder, &settings.model.checkpoint, &self.options)?;
        self.describe(&grids, predicted, notes);
        Ok(())
    }

    /// What the target limits, and whether sizes count scales and zero points.
    fn goal(&self, own: &LayerwiseQuantOptions, blocks: usize) -> Result<(Goal, Counted)> {
        let all: f64 = self.layers.iter().map(Layer::weights).sum();
        Ok(match (own.average_bits, own.low_blocks, own.budget) {
            (Some(target), _, _) if own.average_count == Count::Effective => {
                (Goal::Total(target * all), Counted::Bits)
            }
            (Some(target), _, _) => (Goal::Average(target), Counted::Codes),
            (_, Some(share), _) => (Goal::Blocks(share.of(blocks)), Counted::Codes),
            (_, _, Some(Budget::BitsPerWeight(bits))) => (Goal::Total(bits * all), Counted::Bits),
            (_, _, Some(Budget::Bytes(bytes))) => {
                (Goal::Total(self.free_bytes(bytes)? as f64), Counted::Bytes)
            }
            _ => return Err(Error::Options("a schedule needs a target".into())),
        })
    }

    /// Bytes left for the scheduled layers.
    fn free_bytes(&self, budget: u64) -> Result<u64> {
        let other = self.other_bytes.unwrap_or(0);
        budget.checked_sub(other).ok_or_else(|| {
            Error::Options(format!(
                "a budget of {} cannot be met: what is not quantised (embeddings, norms, excluded \
                 layers) takes {}",
                report::human::bytes(budget),
                report::human::bytes(other)
            ))
        })
    }

    /// Widths of the blocks in `order`, as indices.
    fn assign(&self, goal: Goal, counted: Counted) -> Result<Vec<usize>> {
        let Rule::Importance { order, widths, .. } = &self.rule else { return Ok(Vec::new()) };
        // `assign` numbers blocks from 0; blocks without layers are left out.
        let blocks = self.blocks();
        let index = |block: &usize| blocks.iter().position(|b| b == block);
        let order: Vec<usize> = order.iter().filter_map(index).collect();
        let sum = |block: usize, f: &dyn Fn(&Layer) -> f64| -> f64 {
            self.layers.iter().filter(|l| l.block == block).map(f).sum()
        };
        let weights: Vec<f64> = blocks.iter().map(|&b| sum(b, &Layer::weights)).collect();
        let costs: Vec<Vec<f64>> = (0..widths.bits.len())
            .map(|width| {
                let grid = grid_at(&self.original, widths, width);
                let cost = |layer: &Layer| counted.cost(&self.original, &layer.name, &grid);
                blocks.iter().map(|&block| sum(block, &cost)).collect()
            })
            .collect();
        assign(widths, &order, &weights, &costs, goal)
    }

    /// Blocks with layers to schedule, rising.
    fn blocks(&self) -> Vec<usize> {
        let mut blocks: Vec<usize> = self.layers.iter().map(|l| l.block).collect();
        blocks.dedup();
        blocks
    }

    fn grids_of(&self, state: &[usize]) -> BTreeMap<String, GridOptions> {
        let Rule::Importance { widths, .. } = &self.rule else { return BTreeMap::new() };
        let blocks = self.blocks();
        let width = |block: usize| {
            let index = blocks.iter().position(|b| *b == block);
            index.and_then(|i| state.get(i)).copied().unwrap_or(0)
        };
        self.layers
            .iter()
            .map(|l| (l.name.module.clone(), grid_at(&self.original, widths, width(l.block))))
            .collect()
    }

    /// The allocator's choice for a budget.
    fn allocated(
        &self,
        budget: Budget,
    ) -> Result<(BTreeMap<String, GridOptions>, crate::allocate::Allocation)> {
        let Rule::Budget { units } = &self.rule else {
            return Err(Error::Options("there are no error curves to allocate by".into()));
        };
        let (limit, counted) = match budget {
            Budget::BitsPerWeight(bits) => {
                let all: f64 = self.layers.iter().map(Layer::weights).sum();
                ((bits * all).floor() as u64, Counted::Bits)
            }
            Budget::Bytes(bytes) => (self.free_bytes(bytes)?, Counted::Bytes),
        };
        let names: BTreeMap<&str, &Name> =
            self.layers.iter().map(|l| (l.name.module.as_str(), &l.name)).collect();
        let grid = |bits: u8| GridOptions { bits, ..self.original.grid.clone() };
        let choices: Vec<Vec<Choice>> = units
            .iter()
            .map(|unit| {
                let cost = |bits: u8| -> f64 {
                    let layers = unit.layers.iter().filter_map(|l| names.get(l.module.as_str()));
                    layers.map(|name| counted.cost(&self.original, name, &grid(bits))).sum()
                };
                let pairs = unit.bits.iter().zip(&unit.error);
                pairs.map(|(&b, &error)| Choice { cost: cost(b).ceil() as u64, error }).collect()
            })
            .collect();
        let found = allocate(&choices, limit, UNITS).map_err(|error| {
            let least: u64 = choices.iter().filter_map(|c| c.iter().map(|c| c.cost).min()).sum();
            if least <= limit {
                return error;
            }
            let all: f64 = self.layers.iter().map(Layer::weights).sum();
            let needed = match counted {
                Counted::Bytes => {
                    report::human::bytes(least + self.other_bytes.unwrap_or(0)).to_string()
                }
                _ => format!("{:.3}bpw", least as f64 / all),
            };
            Error::Options(format!(
                "a budget of {budget} cannot be met: the lowest widths need {needed}; allow lower \
                 --budget-bits or larger groups"
            ))
        })?;
        let mut grids = BTreeMap::new();
        for (unit, &choice) in units.iter().zip(&found.choice) {
            for layer in &unit.layers {
                grids.insert(layer.module.clone(), grid(unit.bits[choice]));
            }
        }
        Ok((grids, found))
    }

    /// Exchanges a higher and a lower block of equal size as long as predictions come nearer to
    /// full precision, nearest to the boundary first.
    fn refine(&self, settings: &Settings<'_>, state: &mut Vec<usize>) -> Result<String> {
        let own = &self.original.layerwise;
        let kind = scale_type(&settings.model.checkpoint, container(&self.original));
        let probe = Probe::new(settings.model, settings.calibration, own.probe_samples)?;
        let measure = |state: &[usize]| -> Result<f64> {
            let model = rounded_model(settings.model, self.grids_of(state), kind)?;
            probe.divergence(model.weights.as_ref())
        };
        let blocks = self.blocks();
        let Rule::Importance { order, .. } = &self.rule else { return Ok(String::new()) };
        let place: Vec<usize> =
            order.iter().filter_map(|b| blocks.iter().position(|x| x == b)).collect();
        let size = |i: usize| -> f64 {
            let here = self.layers.iter().filter(|l| l.block == blocks[i]);
            here.map(Layer::weights).sum()
        };
        let first = measure(state)?;
        let (mut best, mut tried, mut kept) = (first, 0, 0);
        let mut seen = vec![state.clone()];
        'search: loop {
            // Pairs whose places in the order are near: the score is least sure about them.
            let mut pairs: Vec<(usize, usize, usize)> = Vec::new();
            for (a, &high) in place.iter().enumerate() {
                for (b, &low) in place.iter().enumerate() {
                    if state[high] < state[low] && size(high) == size(low) {
                        pairs.push((a.abs_diff(b), high, low));
                    }
                }
            }
            pairs.sort_unstable();
            for (_, high, low) in pairs {
                let mut other = state.clone();
                other.swap(high, low);
                if seen.contains(&other) {
                    continue;
                }
                if tried == own.refine_swaps {
                    break 'search;
                }
                seen.push(other.clone());
                tried += 1;
                let found = measure(&other)?;
                if found < best {
                    best = found;
                    kept += 1;
                    *state = other;
                    continue 'search;
                }
            }
            break;
        }
        Ok(format!(
            "{kept} of {tried} exchanges kept: divergence from full precision {first:.5} → \
             {best:.5} nats per token (rounded to nearest, {} tokens)",
            probe.tokens()
        ))
    }

    fn describe(
        &mut self,
        grids: &BTreeMap<String, GridOptions>,
        predicted: Option<(f64, f64)>,
        notes: Vec<String>,
    ) {
        let (average, effective) = averages(&self.original, &self.layers, grids);
        let layers: Vec<LayerWidth> = self
            .layers
            .iter()
            .map(|layer| {
                let grid = grids.get(&layer.name.module).unwrap_or(&self.original.grid);
                LayerWidth {
                    module: layer.name.module.clone(),
                    role: layer.name.role.label().into(),
                    block: layer.block,
                    weights: layer.weights() as u64,
                    bits: grid.bits,
                    group_size: effective_group(grid, layer.name.in_features()),
                }
            })
            .collect();
        let schedule = &mut self.schedule;
        for block in layers.chunk_by(|a, b| a.block == b.block) {
            if block.windows(2).all(|w| w[0].bits == w[1].bits) {
                schedule.bits.insert(block[0].block, block[0].bits);
            }
        }
        match &self.rule {
            Rule::Importance { order, scores, .. } => {
                schedule.order.clone_from(order);
                schedule.scores = scores.iter().copied().enumerate().collect();
            }
            Rule::Budget { units } => schedule.units.clone_from(units),
        }
        schedule.average_bits = average;
        schedule.effective_bits_per_weight = effective;
        schedule.bytes = self.other_bytes.map(|other| {
            let bytes = |layer: &Layer| {
                let grid = grids.get(&layer.name.module).unwrap_or(&self.original.grid);
                Counted::Bytes.cost(&self.original, &layer.name, grid)
            };
            other + self.layers.iter().map(bytes).sum::<f64>() as u64
        });
        schedule.predicted_error = predicted.map(|p| p.0);
        schedule.error_bound = predicted.map(|p| p.1);
        schedule.gguf_tensor_types = tensor_types(&self.layers, &layers);
        schedule.layers = layers;
        schedule.notes = notes;
    }

    /// At most `count` points of the trade-off between bits and quality, from the highest width to
    /// the lowest.
    ///
    /// # Errors
    /// From the allocator.
    pub fn points(&self, count: usize) -> Result<Vec<Point>> {
        let count = count.max(2);
        let mut all = Vec::new();
        match &self.rule {
            Rule::Importance { order, widths, .. } => {
                let states = order.len() * (widths.bits.len() - 1);
                let mut steps: Vec<usize> =
                    (0..count).map(|i| (i * states + (count - 1) / 2) / (count - 1)).collect();
                steps.dedup();
                for step in steps {
                    all.push(self.at_blocks(step)?);
                }
            }
            Rule::Budget { units } => {
                let at = |most: bool| -> f64 {
                    let bits = |unit: &UnitCurve| {
                        if most { unit.bits.last() } else { unit.bits.first() }.copied()
                    };
                    let mut grids = BTreeMap::new();
                    for unit in units {
                        let bits = bits(unit).unwrap_or(self.original.grid.bits);
                        for layer in &unit.layers {
                            let grid = GridOptions { bits, ..self.original.grid.clone() };
                            grids.insert(layer.module.clone(), grid);
                        }
                    }
                    averages(&self.original, &self.layers, &grids).1
                };
                let (most, least) = (at(true), at(false));
                for i in 0..count {
                    // Denser where bits are few: that is where the curve bends.
                    let share = (i as f64 / (count - 1) as f64).sqrt();
                    let budget = most - (most - least) * share + 1e-6;
                    all.push(self.at_budget(Budget::BitsPerWeight(budget))?);
                }
            }
        }
        Ok(all)
    }

    /// The schedule with another number of blocks below the highest width.
    ///
    /// # Errors
    /// When there are fewer blocks, or the schedule is not by importance.
    pub fn at_blocks(&self, count: usize) -> Result<Point> {
        if matches!(self.rule, Rule::Budget { .. }) {
            return Err(Error::Options("a budget does not count blocks".into()));
        }
        let state = self.assign(Goal::Blocks(count), Counted::Codes)?;
        let blocks = self.blocks();
        let lowered = state.iter().zip(&blocks).filter(|(width, _)| **width > 0);
        let lowered = lowered.map(|(_, block)| *block).collect();
        Ok(self.point(&self.original, self.grids_of(&state), lowered))
    }

    /// The distribution of another budget over the same error curves.
    ///
    /// # Errors
    /// From the allocator.
    pub fn at_budget(&self, budget: Budget) -> Result<Point> {
        let (grids, _) = self.allocated(budget)?;
        Ok(self.point(&self.common_base(&grids), grids, Vec::new()))
    }

    /// The same curves with another measure of what makes errors comparable, or fewer widths.
    ///
    /// # Errors
    /// When the curves do not hold what the measure needs.
    pub fn reweighed(&self, weight: BudgetWeight, widths: &[u8]) -> Result<Self> {
        let Rule::Budget { units } = &self.rule else {
            return Err(Error::Options("there are no error curves to weigh".into()));
        };
        let units =
            units.iter().map(|unit| unit.reweighed(weight, widths)).collect::<Result<_>>()?;
        Ok(Self {
            options: self.options.clone(),
            schedule: self.schedule.clone(),
            layers: self.layers.clone(),
            rule: Rule::Budget { units },
            original: self.original.clone(),
            other_bytes: self.other_bytes,
        })
    }

    /// The job with the commonest width as its own: the others become its exceptions.
    fn common_base(&self, grids: &BTreeMap<String, GridOptions>) -> QuantizeOptions {
        let mut base = self.original.clone();
        base.grid.bits = commonest(&self.layers, grids).unwrap_or(base.grid.bits);
        base
    }

    /// `model` at a point, rounded to nearest as it computes.
    ///
    /// # Errors
    /// When the checkpoint cannot be opened again.
    pub fn rounded(&self, model: &Model, point: &Point) -> Result<Model> {
        let kind = scale_type(&model.checkpoint, container(&self.original));
        rounded_model(model, point.grids.clone(), kind)
    }

    fn point(
        &self,
        base: &QuantizeOptions,
        grids: BTreeMap<String, GridOptions>,
        lowered: Vec<usize>,
    ) -> Point {
        let (average_bits, effective) = averages(&self.original, &self.layers, &grids);
        let options = with_grids(base, &self.layers, &grids);
        Point { options, grids, average_bits, effective, lowered }
    }
}

/// What a size counts.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Counted {
    /// Bits of codes.
    Codes,
    /// Bits of codes, scales and zero points.
    Bits,
    /// Bytes of tensors as the format stores them.
    Bytes,
}

impl Counted {
    fn cost(self, options: &QuantizeOptions, name: &Name, grid: &GridOptions) -> f64 {
        let shape = crate::plan::stored_shape(name, grid);
        if options.method == Method::Pvq
            && self != Self::Codes
            && let Ok(code) = options.pvq.layer(name, grid.bits, options.grid.bits)
        {
            let weights = (name.out_features() * name.in_features()) as f64;
            // Rows of indices are padded on disk only.
            return match self {
                Self::Bytes => code.stored_bits_per_weight() * weights / 8.0,
                _ => code.bits_per_weight() * weights,
            };
        }
        match (self, options.format.layout()) {
            (Self::Codes, _) => {
                f64::from(grid.bits) * (shape.out_features * shape.in_features) as f64
            }
            (Self::Bytes, Some(layout)) => store::packed::stored_bytes(layout, &shape) as f64,
            _ => shape.bits_per_weight() * (shape.out_features * shape.in_features) as f64,
        }
    }
}

/// Nominal and effective mean bits.
fn averages(
    options: &QuantizeOptions,
    layers: &[Layer],
    grids: &BTreeMap<String, GridOptions>,
) -> (f64, f64) {
    let all: f64 = layers.iter().map(Layer::weights).sum();
    let mean = |counted: Counted| {
        let cost = |layer: &Layer| {
            let grid = grids.get(&layer.name.module).unwrap_or(&options.grid);
            counted.cost(options, &layer.name, grid)
        };
        layers.iter().map(cost).sum::<f64>() / all.max(1.0)
    };
    (mean(Counted::Codes), mean(Counted::Bits))
}

/// The width of most weights.
fn commonest(layers: &[Layer], grids: &BTreeMap<String, GridOptions>) -> Option<u8> {
    let mut counts: BTreeMap<u8, f64> = BTreeMap::new();
    for layer in layers {
        if let Some(grid) = grids.get(&layer.name.module) {
            *counts.entry(grid.bits).or_default() += layer.weights();
        }
    }
    counts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(bits, _)| bits)
}

/// The job with the grids that differ from its own as overrides, after those of the user.
fn with_grids(
    options: &QuantizeOptions,
    layers: &[Layer],
    grids: &BTreeMap<String, GridOptions>,
) -> QuantizeOptions {
    let mut options = options.clone();
    for layer in layers {
        let Some(grid) = grids.get(&layer.name.module) else { continue };
        if *grid != options.grid {
            options.overrides.push(Override {
                pattern: layer.name.module.clone(),
                bits: Some(grid.bits),
                group_size: Some(grid.group_size),
                symmetric: None,
            });
        }
    }
    options
}

/// Bytes of the output outside the scheduled layers; `None` where widths do not change its size.
fn other_bytes(settings: &Settings<'_>, plan: &Plan, layers: &[Layer]) -> Result<Option<u64>> {
    let options = settings.options;
    let Some(layout) = options.format.layout() else { return Ok(None) };
    if matches!(options.method, Method::Rsq | Method::Pvq) {
        // A rotation may untie the head; a pyramid's tensors depend on the weights.
        return Ok(None);
    }
    let Settings { model, .. } = settings;
    let scheduled: std::collections::BTreeSet<String> =
        layers.iter().map(|l| l.name.weight()).collect();
    let mut bytes = 0u64;
    for layer in plan.layers() {
        if let Some(grid) = layer.grid.as_ref().filter(|grid| **grid != options.grid) {
            let shape = crate::plan::stored_shape(&layer.name, grid);
            bytes += store::packed::stored_bytes(layout, &shape);
        }
    }
    let packed: std::collections::BTreeSet<String> = plan
        .layers()
        .filter(|l| l.grid.is_some())
        .map(|l| l.name.weight())
        .chain(scheduled)
        .collect();
    let tied = model.decoder.config.tie_word_embeddings;
    for info in model.checkpoint.infos() {
        let duplicate = tied
            && info.name.ends_with("lm_head.weight")
            && info.name != model.decoder.embed.weight();
        if packed.contains(&info.name) || model.decoder.is_buffer(&info.name) || duplicate {
            continue;
        }
        let count = info.shape.iter().product::<usize>() as u64;
        let dtype = crate::runner::dense_type(container(options), info.dtype);
        bytes += dtype.bytes_for(count).unwrap_or(info.nbytes);
    }
    Ok(Some(bytes))
}

/// Arguments of `llama-quantize --tensor-type`: regular expressions over GGUF tensor names, whole
/// blocks where one width holds all of a block.
fn tensor_types(names: &[Layer], layers: &[LayerWidth]) -> Vec<String> {
    let kind = |bits: u8| match bits {
        2 => "q2_k",
        3 => "q3_k",
        4 => "q4_k",
        5 => "q5_k",
        6 => "q6_k",
        _ => "q8_0",
    };
    let part = |role: Role| match role {
        Role::Query => Some("attn_q"),
        Role::Key => Some("attn_k"),
        Role::Value => Some("attn_v"),
        Role::QueryKeyValue => Some("attn_qkv"),
        Role::Output => Some("attn_output"),
        Role::Gate => Some("ffn_gate"),
        Role::Up => Some("ffn_up"),
        Role::Down => Some("ffn_down"),
        _ => None,
    };
    let mut all = Vec::new();
    let pairs: Vec<(&Layer, &LayerWidth)> = names.iter().zip(layers).collect();
    for block in pairs.chunk_by(|a, b| a.1.block == b.1.block) {
        let (index, bits) = (block[0].1.block, block[0].1.bits);
        if block.iter().all(|(_, l)| l.bits == bits) {
            all.push(format!("blk\\.{index}\\.={}", kind(bits)));
            continue;
        }
        for (layer, width) in block {
            if let Some(part) = part(layer.name.role) {
                all.push(format!("blk\\.{index}\\.{part}={}", kind(width.bits)));
            }
        }
    }
    all
}

impl Schedule {
    fn empty(options: &QuantizeOptions, calibration: &Calibration) -> Self {
        let own = &options.layerwise;
        let importance = own.low_bits.is_some();
        let target = match (own.average_bits, own.low_blocks, own.budget) {
            (Some(bits), _, _) => format!("{bits} bits on average"),
            (_, Some(share), _) => format!("{share} of the blocks at the lower width"),
            (_, _, Some(budget)) => budget.to_string(),
            _ => String::new(),
        };
        let windows = if importance { own.score_samples } else { usize::MAX };
        Self {
            by: if importance { "importance" } else { "budget" },
            score: if importance {
                json!(own.layer_score)
            } else {
                json!({"error": own.budget_error, "weight": own.budget_weight, "unit": own.budget_unit})
            },
            target,
            order: Vec::new(),
            scores: BTreeMap::new(),
            bits: BTreeMap::new(),
            average_bits: 0.0,
            effective_bits_per_weight: 0.0,
            bytes: None,
            layers: Vec::new(),
            predicted_error: None,
            error_bound: None,
            units: Vec::new(),
            gguf_tensor_types: Vec::new(),
            calibration: json!({
                "windows": calibration.windows().min(windows),
                "length": if calibration.windows() > 0 { calibration.length() } else { 0 },
                "samples": options.calibration,
            }),
            notes: Vec::new(),
        }
    }

    /// The contents of `schedule.json`.
    pub fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}
