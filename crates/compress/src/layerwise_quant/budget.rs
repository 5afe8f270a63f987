//! What every width costs every layer: error curves from one pass over calibration text at full
//! precision.
//!
//! With `C = XᵀX / tokens` of a layer's inputs and `D = W - Ŵ`, the squared output error per token
//! is `tr(D C Dᵀ)`. Divided by `tr(W C Wᵀ)` it is relative, but not yet comparable: a tenth of the
//! last block's output may matter more than half of a middle one's. So the divergence `K` of the
//! network's predictions is measured once per unit, with that unit alone at the probe width, and
//! every other width is taken to cost `K` in proportion to its relative error: to second order the
//! divergence of small changes is quadratic in them, and errors of different layers add up.

use super::{BudgetError, BudgetUnit, BudgetWeight, LayerwiseQuantOptions, rounded};
use crate::block::INPUT_POINTS;
use crate::gptq::{self, Factor};
use crate::grid::{Grid, GridOptions, Matrix, ScaleType};
use crate::options::QuantizeOptions;
use crate::plan::{LayerPlan, Plan};
use crate::statistics::{Gram, Statistics, Wanted, quadratic_error};
use crate::stream::{Probe, Stream};
use crate::{Calibration, Error, Result, rtn};
use nn::{Model, Name, Overlay, Taps};
use std::path::Path;
use tensor::host;

/// The error of one linear layer at every width.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LayerCurve {
    /// Module name.
    pub module: String,
    /// Weights.
    pub weights: u64,
    /// `tr(W C Wᵀ)`: squared output per token.
    pub energy: f64,
    /// `tr(D C Dᵀ)` at every width of the unit: squared output error per token.
    pub absolute: Vec<f64>,
}

/// Layers that get one width, and what each width costs.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct UnitCurve {
    /// Block index.
    pub block: usize,
    /// The layers.
    pub layers: Vec<LayerCurve>,
    /// Widths on offer, rising.
    pub bits: Vec<u8>,
    /// Squared output error relative to the output, over all layers together, by width.
    pub relative: Vec<f64>,
    /// Divergence of predictions in nats per token with the unit alone at the probe width (`loss`),
    /// with its relative error there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<[f64; 2]>,
    /// What the allocator adds up, by width.
    pub error: Vec<f64>,
}

impl UnitCurve {
    /// Squared output error over all layers, by width.
    pub fn absolute(&self) -> Vec<f64> {
        let sum = |w: usize| self.layers.iter().filter_map(|l| l.absolute.get(w)).sum::<f64>();
        (0..self.bits.len()).map(sum).collect()
    }

    /// The curve under another measure, at some of its widths.
    ///
    /// # Errors
    /// `measured` cannot be computed afterwards, `loss` only where it was probed.
    pub fn reweighed(&self, weight: BudgetWeight, widths: &[u8]) -> Result<Self> {
        let error = match (weight, self.probe) {
            (BudgetWeight::Absolute, _) => self.absolute(),
            (BudgetWeight::Relative, _) => self.relative.clone(),
            (BudgetWeight::Loss, Some(probe)) => in_proportion(&self.relative, probe),
            _ => {
                return Err(Error::Options(format!(
                    "the curves do not hold what {weight:?} needs: measure them again"
                )));
            }
        };
        let mut other = Self { error, ..self.clone() };
        let keep: Vec<bool> = self.bits.iter().map(|b| widths.contains(b)).collect();
        fn some<T: Copy>(all: &[T], keep: &[bool]) -> Vec<T> {
            all.iter().zip(keep).filter(|(_, keep)| **keep).map(|(v, _)| *v).collect()
        }
        other.bits = some(&other.bits, &keep);
        other.error = some(&other.error, &keep);
        other.relative = some(&other.relative, &keep);
        for layer in &mut other.layers {
            layer.absolute = some(&layer.absolute, &keep);
        }
        if other.bits.is_empty() {
            return Err(Error::Options(format!("none of the widths {widths:?} was measured")));
        }
        Ok(other)
    }
}

/// Errors in proportion to relative ones, given the effect at one relative error.
fn in_proportion(relative: &[f64], [effect, there]: [f64; 2]) -> Vec<f64> {
    // A layer that rounding leaves as it is has nothing to lose.
    let weight = if there > 0.0 { effect / there } else { 0.0 };
    relative.iter().map(|r| weight * r).collect()
}

/// The error curves of every planned layer, in order; layers whose grid is not `base` (overrides of
/// the user) are left out.
///
/// # Errors
/// Without calibration text; NaN or infinite weights or activations, by layer.
pub fn curves(
    model: &Model,
    plan: &Plan,
    options: &QuantizeOptions,
    calibration: &Calibration,
    scale_type: ScaleType,
    scratch: &Path,
    progress: &report::Progress,
) -> Result<Vec<UnitCurve>> {
    let own = &options.layerwise;
    let probing = matches!(own.budget_weight, BudgetWeight::Loss | BudgetWeight::Measured);
    let mut probe =
        if probing { Some(Probe::new(model, calibration, own.probe_samples)?) } else { None };
    let mut stream = Stream::new(model, calibration, options.memory.0, scratch)?;
    let mut all = Vec::new();
    for (block, sets) in plan.blocks.iter().enumerate() {
        let planned: Vec<Vec<&LayerPlan>> = sets
            .iter()
            .map(|set| set.iter().filter(|l| l.grid.as_ref() == Some(&options.grid)).collect())
            .collect();
        let wanted = planned.iter().zip(INPUT_POINTS).filter(|(set, _)| !set.is_empty());
        let gram = Wanted { gram: true, ..Wanted::default() };
        let mut statistics = Statistics::new(wanted.map(|(_, point)| (point, gram)));
        stream.advance(&mut Taps::one(&mut statistics))?;
        let mut pending: Vec<Pending> = Vec::new();
        for (set, point) in planned.iter().zip(INPUT_POINTS) {
            let Some(first) = set.first() else { continue };
            let Some(gram) = statistics.take(point).and_then(|s| s.gram) else {
                return Err(Error::layer(
                    &first.name.module,
                    "no calibration token reached this layer",
                ));
            };
            for layer in measure_set(model, set, options, gram, scale_type)? {
                let joins = |p: &&mut Pending| {
                    p.curve.bits == layer.bits
                        && match own.budget_unit {
                            BudgetUnit::Linear => false,
                            BudgetUnit::Input => set.iter().any(|l| l.name == p.layers[0].name),
                            BudgetUnit::Block => true,
                        }
                };
                match pending.last_mut().filter(joins) {
                    Some(unit) => unit.push(layer),
                    None => pending.push(Pending::new(block, layer)),
                }
            }
            if own.budget_unit != BudgetUnit::Block {
                for unit in pending.drain(..) {
                    all.push(unit.weigh(model, own, probe.as_ref())?);
                }
            }
        }
        for unit in pending {
            all.push(unit.weigh(model, own, probe.as_ref())?);
        }
        if let Some(probe) = &mut probe {
            probe.advance()?;
        }
        progress.inc(1);
    }
    progress.finish();
    Ok(all)
}

/// A layer with its quantised values at the widths whose effect is measured.
struct Measured {
    name: Name,
    bits: Vec<u8>,
    curve: LayerCurve,
    /// By width; empty where the effect is not measured.
    values: Vec<Vec<f32>>,
}

/// A unit whose effect on predictions is not measured yet.
struct Pending {
    layers: Vec<Measured>,
    curve: UnitCurve,
}

impl Pending {
    fn new(block: usize, layer: Measured) -> Self {
        let curve = UnitCurve {
            block,
            layers: Vec::new(),
            bits: layer.bits.clone(),
            relative: Vec::new(),
            probe: None,
            error: Vec::new(),
        };
        let mut unit = Self { layers: Vec::new(), curve };
        unit.push(layer);
        unit
    }

    fn push(&mut self, layer: Measured) {
        self.curve.layers.push(layer.curve.clone());
        self.layers.push(layer);
    }

    /// Fills in what the allocator adds up.
    fn weigh(
        self,
        model: &Model,
        options: &LayerwiseQuantOptions,
        probe: Option<&Probe<'_>>,
    ) -> Result<UnitCurve> {
        let Self { layers, curve: mut unit } = self;
        let energy: f64 = unit.layers.iter().map(|l| l.energy).sum();
        let absolute = unit.absolute();
        let relative = |error: f64| if energy > 0.0 { error / energy } else { 0.0 };
        unit.relative = absolute.iter().map(|&e| relative(e)).collect();
        let diverge = |probe: &Probe<'_>, width: usize| -> Result<f64> {
            let mut changed = Overlay::new(model.weights.as_ref());
            for layer in &layers {
                let values = layer.values.get(width).cloned().unwrap_or_default();
                let tensor = host::from_vec(values, layer.name.shape, &changed.base.device());
                changed.matrices.insert(layer.name.weight(), tensor);
            }
            probe.divergence(&changed)
        };
        unit.error = match (options.budget_weight, probe) {
            (BudgetWeight::Absolute, _) => absolute,
            (BudgetWeight::Loss, Some(probe)) => {
                let at = probe_width(&unit.bits, options);
                let probed = [diverge(probe, at)?, unit.relative[at]];
                unit.probe = Some(probed);
                in_proportion(&unit.relative, probed)
            }
            (BudgetWeight::Measured, Some(probe)) => {
                (0..unit.bits.len()).map(|width| diverge(probe, width)).collect::<Result<_>>()?
            }
            _ => unit.relative.clone(),
        };
        Ok(unit)
    }
}

/// The place of the probe width among `bits`: itself, the next one above, or the last.
fn probe_width(bits: &[u8], options: &LayerwiseQuantOptions) -> usize {
    let at = bits.iter().position(|&b| b >= options.probe_bits);
    at.unwrap_or(bits.len().saturating_sub(1))
}

/// The curves of the layers that read the input of `gram`.
fn measure_set(
    model: &Model,
    set: &[&LayerPlan],
    options: &QuantizeOptions,
    gram: Gram,
    scale_type: ScaleType,
) -> Result<Vec<Measured>> {
    let own = &options.layerwise;
    let inputs = gram.width();
    let covariance: Vec<f32> = gram.covariance();
    let first = set.first().map(|l| l.name.module.clone()).unwrap_or_default();
    if !covariance.iter().all(|c| c.is_finite()) {
        return Err(Error::layer(first, "its inputs on the calibration text are NaN or infinite"));
    }
    let factor = match own.budget_error {
        BudgetError::Gptq => Some(Factor::new(&first, &gram, &options.gptq)?),
        BudgetError::Rtn => None,
    };
    drop(gram);
    let mut all = Vec::new();
    for layer in set {
        let name = &layer.name;
        let values = host::into_vec(model.weights.matrix(name)?);
        let matrix = Matrix::new(name.out_features(), name.in_features(), values)?;
        matrix.check_finite(&name.module)?;
        let mut bits = own.budget_bits.clone();
        bits.sort_unstable();
        bits.dedup();
        bits.retain(|&bits| {
            let grid = GridOptions { bits, ..options.grid.clone() };
            super::supported(options.format).contains(&bits)
                && crate::plan::check_shape(name, &grid, options).is_ok()
        });
        if bits.is_empty() {
            return Err(Error::layer(
                &name.module,
                format!("none of the widths {:?} fits this layer", own.budget_bits),
            ));
        }
        let kept = |width: usize| match own.budget_weight {
            BudgetWeight::Loss => width == probe_width(&bits, own),
            BudgetWeight::Measured => true,
            BudgetWeight::Relative | BudgetWeight::Absolute => false,
        };
        let (mut absolute, mut kept_values) = (Vec::new(), Vec::new());
        for (width, &bits) in bits.iter().enumerate() {
            let own_grid = GridOptions { bits, ..options.grid.clone() };
            let grid = Grid { scale_type, ..Grid::new(&own_grid)? };
            let quantized = match &factor {
                Some(factor) => {
                    let module = &name.module;
                    gptq::quantize(module, &matrix, factor, &grid, &own_grid, &options.gptq)?.matrix
                }
                None => rtn::quantize(&matrix, &grid, &own_grid),
            };
            let values = quantized.dequantize();
            let difference: Vec<f32> =
                values.iter().zip(&matrix.values).map(|(q, w)| w - q).collect();
            absolute.push(quadratic_error(&difference, &covariance, inputs).max(0.0));
            kept_values.push(if kept(width) { values } else { Vec::new() });
        }
        let energy = quadratic_error(&matrix.values, &covariance, inputs).max(0.0);
        let weights = (name.out_features() * name.in_features()) as u64;
        let curve = LayerCurve { module: name.module.clone(), weights, energy, absolute };
        all.push(Measured { name: name.clone(), bits, curve, values: kept_values });
    }
    Ok(all)
}

/// Puts a layer rounded to nearest into `weights`.
pub(super) fn overlay(
    weights: &mut Overlay<'_>,
    name: &Name,
    grid: &GridOptions,
    scale_type: ScaleType,
) -> Result<()> {
    let values = host::into_vec(weights.base.matrix(name)?);
    let values = rounded::round(name, values, grid, scale_type)?;
    let tensor = host::from_vec(values, name.shape, &weights.base.device());
    weights.matrices.insert(name.weight(), tensor);
    Ok(())
}
