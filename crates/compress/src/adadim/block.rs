//! AdaDim on one block: both directions of every layer, the error of each, and the better one kept.
//!
//! Layers are taken in the order in which they compute. A layer is compared with what its module
//! computes *now*: layers of the module that were quantised before it are in place, so that the
//! choice is greedy. With the full-precision stream the block's working copy stays as it was until
//! the last layer has been chosen, and the quantised layers lie over it.

use super::{AdadimOptions, Base, Dim, Direction, Objective, Stream};
use super::{choose, compensate, linear_error, round, short_group};
use crate::block::{BlockJob, INPUT_POINTS, INPUT_STAGES, REPORT_TOKENS};
use crate::gptq::{Factor, GptqOptions, OnFailure};
use crate::grid::{Grid, GridOptions, Matrix};
use crate::options::QuantizeOptions;
use crate::statistics::{AbsoluteMean, Statistics, TokenSample, Wanted};
use crate::{Error, Result};
use nn::{Context, Name, Overlay, Role, Stage, Taps};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use store::packed::Stored;
use tensor::{Tensor, host};

/// What a layer's error is measured at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judge {
    Attention,
    Mlp,
    Linear,
}

impl Judge {
    fn of(role: Role, objective: Objective) -> Self {
        match (objective, role) {
            (Objective::Linear, _) => Self::Linear,
            (_, Role::Query | Role::Key | Role::Value | Role::QueryKeyValue) => Self::Attention,
            (_, Role::Gate | Role::Up) => Self::Mlp,
            _ => Self::Linear,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Mlp => "mlp",
            Self::Linear => "linear",
        }
    }
}

/// A layer that is done but not yet in the working copy.
struct Done {
    name: Name,
    original: Matrix,
    stored: Stored,
    sample: Option<TokenSample>,
    details: BTreeMap<String, Value>,
}

/// What the linears of one set share.
struct SetInputs {
    /// `XᵀX / tokens`, where some error is measured at a layer's own output.
    covariance: Option<Vec<f32>>,
    /// For GPTQ; absent when it failed and rounding takes over.
    factor: Option<Factor>,
    sample: Option<TokenSample>,
    /// Largest mean magnitude of an input channel over the median one.
    outlier: Option<f64>,
    /// No calibration token came here.
    silent: bool,
}

/// Quantises one block.
///
/// # Errors
/// Weights or activations that are not finite, a Hessian that cannot be factorised; naming the
/// layer.
pub fn quantize_block(job: &mut BlockJob<'_>, options: &QuantizeOptions) -> Result<()> {
    let ada = &options.adadim;
    let gptq = ada.gptq(&options.gptq, &options.grid);
    let mut run = Run { ada, gptq, quantized: HashMap::new(), done: Vec::new() };
    for (set, layers) in job.sets.iter().enumerate() {
        let planned: Vec<_> =
            layers.iter().filter_map(|layer| Some((&layer.name, layer.grid.as_ref()?))).collect();
        let inputs = if options.calibrates() { run.collect(job, set, &planned)? } else { None };
        for (name, grid_options) in planned {
            run.layer(job, name, grid_options, inputs.as_ref())?;
        }
    }
    if options.calibrates() {
        job.run_stage(Stage::Contract, &mut Taps::none())?;
    }
    for layer in run.done {
        layer.hand_in(job)?;
    }
    Ok(())
}

impl Done {
    fn hand_in(self, job: &mut BlockJob<'_>) -> Result<()> {
        let sample = self.sample.as_ref();
        job.hand_in(&self.name, &self.original, self.stored, sample, self.details)
    }
}

struct Run<'o> {
    ada: &'o AdadimOptions,
    gptq: GptqOptions,
    /// Values of layers that are quantised but not in the working copy, by weight name.
    quantized: HashMap<String, Tensor<2>>,
    done: Vec<Done>,
}

impl Run<'_> {
    fn uses_gptq(&self) -> bool {
        self.ada.base == Base::Gptq
    }

    /// Runs the block up to the input of a set and gathers what its layers need. `None` when nothing
    /// of the set is to be quantised.
    fn collect(
        &self,
        job: &mut BlockJob<'_>,
        set: usize,
        planned: &[(&Name, &GridOptions)],
    ) -> Result<Option<SetInputs>> {
        let (point, stage) = (INPUT_POINTS[set], INPUT_STAGES[set]);
        let Some((first, _)) = planned.first() else {
            job.run_stage(stage, &mut Taps::none())?;
            return Ok(None);
        };
        let chooses = self.ada.dim == Dim::Ada;
        let by_gram = chooses
            && planned.iter().any(|(n, _)| Judge::of(n.role, self.ada.objective) == Judge::Linear);
        let total = job.calibration.tokens();
        let wanted = Wanted {
            gram: by_gram || self.uses_gptq(),
            absolute_mean: chooses,
            sample: Some((total, REPORT_TOKENS)),
        };
        let mut statistics = Statistics::new([(point, wanted)]);
        job.run_stage(stage, &mut Taps::one(&mut statistics))?;
        let collected = statistics.take(point).unwrap_or_default();
        let outlier = match &collected.absolute_mean {
            Some(mean) => Some(outlier(&first.module, mean)?),
            None => None,
        };
        let silent = collected.sample.is_none();
        if silent {
            job.warnings.push(format!(
                "{}: no calibration token reached this layer; groups along the input, rounded to \
                 nearest",
                first.module
            ));
        }
        let mut inputs =
            SetInputs { covariance: None, factor: None, sample: collected.sample, outlier, silent };
        let Some(gram) = collected.gram else { return Ok(Some(inputs)) };
        if by_gram {
            inputs.covariance = Some(gram.covariance());
        }
        if self.uses_gptq() {
            let (width, tokens) = (gram.width(), gram.tokens());
            let hessian = gram.into_hessian();
            match Factor::of_hessian(&first.module, hessian, width, tokens, &self.gptq) {
                Ok(factor) => inputs.factor = Some(factor),
                Err(error) if self.gptq.on_failure == OnFailure::Rtn => {
                    job.warnings.push(format!("{error}; rounded to nearest instead"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Some(inputs))
    }

    /// Quantises one layer in the better direction.
    fn layer(
        &mut self,
        job: &mut BlockJob<'_>,
        name: &Name,
        grid_options: &GridOptions,
        inputs: Option<&SetInputs>,
    ) -> Result<()> {
        let original = job.matrix(name)?;
        let grid = job.grid(grid_options)?;
        let mut details = BTreeMap::new();
        let silent = inputs.is_some_and(|inputs| inputs.silent);
        let factor = inputs.and_then(|inputs| inputs.factor.as_ref());
        let (direction, candidate) = match (self.ada.dim.fixed(name.role), inputs) {
            (Some(direction), _) => (direction, None),
            (None, Some(inputs)) if !silent => {
                let judge = Judge::of(name.role, self.ada.objective);
                let by = if self.ada.select_by == Base::Gptq { factor } else { None };
                let mut candidates = Vec::new();
                for direction in Direction::BOTH {
                    let by = by.map(|factor| (factor, direction));
                    candidates.push(match by {
                        Some((factor, direction)) => {
                            self.by_gptq(name, &original, factor, &grid, grid_options, direction)?
                        }
                        None => (round(&original, &grid, grid_options, direction), None),
                    });
                }
                let values: Vec<Vec<f32>> = candidates
                    .iter()
                    .map(|(stored, _)| nn::dequantize(stored))
                    .collect::<nn::Result<_>>()?;
                let errors = match (judge, &inputs.covariance) {
                    (Judge::Linear, Some(covariance)) => {
                        let error = |v: &Vec<f32>| linear_error(&original, v, covariance);
                        [values.first().map_or(0.0, error), values.get(1).map_or(0.0, error)]
                    }
                    _ => self.module_errors(job, name, judge, values)?,
                };
                let direction = choose(&name.module, errors)?;
                details.insert("error_oc".into(), errors[0].into());
                details.insert("error_ic".into(), errors[1].into());
                details.insert("judged_by".into(), judge.label().into());
                if let Some(outlier) = inputs.outlier {
                    details.insert("outlier".into(), outlier.into());
                }
                details.insert("row_outlier".into(), row_outlier(&original).into());
                let chosen = candidates.swap_remove(usize::from(direction == Direction::Ic));
                // What rounding compared is not what GPTQ writes.
                let final_codes = by.is_some() || factor.is_none();
                (direction, final_codes.then_some(chosen))
            }
            _ => (Direction::Oc, None),
        };
        let (stored, loss) = match (candidate, factor) {
            (Some(candidate), _) => candidate,
            (None, Some(factor)) => {
                self.by_gptq(name, &original, factor, &grid, grid_options, direction)?
            }
            (None, None) => (round(&original, &grid, grid_options, direction), None),
        };
        details.insert("dim".into(), direction.label().into());
        if let (Some(loss), Some(factor)) = (loss, factor) {
            details.insert("loss".into(), (loss / 2.0).into());
            details.insert("damping".into(), factor.damping().into());
            details.insert("dead_columns".into(), factor.dead_columns().into());
        } else if self.uses_gptq() {
            details.insert("fallback".into(), "rtn".into());
        }
        if let Some(note) = short_group(name, grid_options, direction) {
            // Blocks are alike; once is enough for the eye, the results hold it for every layer.
            if job.index == 0 {
                job.warnings.push(format!("{}: {note} (other blocks alike)", name.module));
            }
            details.insert("short_group".into(), note.into());
        }
        let sample = inputs.and_then(|inputs| inputs.sample.clone());
        let done = Done { name: name.clone(), original, stored, sample, details };
        if self.ada.stream == Stream::Quantized || inputs.is_none() {
            return done.hand_in(job);
        }
        let device = nn::Weights::device(&job.weights);
        let values = host::from_vec(nn::dequantize(&done.stored)?, name.shape, &device);
        self.quantized.insert(name.weight(), values);
        self.done.push(done);
        Ok(())
    }

    fn by_gptq(
        &self,
        name: &Name,
        original: &Matrix,
        factor: &Factor,
        grid: &Grid,
        options: &GridOptions,
        direction: Direction,
    ) -> Result<(Stored, Option<f64>)> {
        let module = &name.module;
        let (stored, loss) =
            compensate(module, original, factor, grid, options, &self.gptq, direction)?;
        Ok((stored, Some(loss)))
    }

    /// Mean squared change of the module's output by each candidate for layer `name`, over all
    /// calibration tokens.
    fn module_errors(
        &self,
        job: &mut BlockJob<'_>,
        name: &Name,
        judge: Judge,
        candidates: Vec<Vec<f32>>,
    ) -> Result<[f64; 2]> {
        let device = nn::Weights::device(&job.weights);
        let candidates: Vec<Tensor<2>> =
            candidates.into_iter().map(|v| host::from_vec(v, name.shape, &device)).collect();
        let (decoder, index) = (job.decoder, job.index);
        let mut now = Overlay::new(&job.weights);
        now.matrices.clone_from(&self.quantized);
        let mut sums = [0f64; 2];
        let mut elements = 0usize;
        for batch in 0..job.calibration.batches() {
            let geometry = job.calibration.batch(batch).1;
            let x = job.branch.get(batch)?;
            let width = x.len() / geometry.rows().max(1);
            let x = host::from_vec(x, [geometry.rows(), width], &device);
            let inspect = |weights: &dyn nn::Weights| -> Result<Vec<f32>> {
                let y = match judge {
                    Judge::Attention => {
                        decoder.attention(index, weights, x.clone(), &mut Context::new(geometry))?
                    }
                    Judge::Mlp => decoder.mlp(index, weights, x.clone(), &geometry)?,
                    Judge::Linear => nn::Weights::linear(weights, name, x.clone())?,
                };
                Ok(host::into_vec(y))
            };
            now.matrices.remove(&name.weight());
            let original = inspect(&now)?;
            elements += original.len();
            for (sum, candidate) in sums.iter_mut().zip(&candidates) {
                now.matrices.insert(name.weight(), candidate.clone());
                *sum += squared_distance(&original, &inspect(&now)?);
            }
        }
        Ok(sums.map(|sum| sum / elements.max(1) as f64))
    }
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum()
}

/// Largest mean magnitude of an input channel over the median one.
fn outlier(layer: &str, mean: &AbsoluteMean) -> Result<f64> {
    let mut mean = mean.mean();
    if let Some(bad) = mean.iter().position(|m| !m.is_finite()) {
        return Err(Error::layer(
            layer,
            format!(
                "activations of input {bad} are NaN or infinite; the model overflows on the \
                 calibration text"
            ),
        ));
    }
    Ok(largest_over_median(&mut mean))
}

/// Largest norm of a row over the median one: what groups along the output have to put up with.
fn row_outlier(matrix: &Matrix) -> f64 {
    let norm = |row: &[f32]| row.iter().map(|w| w * w).sum::<f32>().sqrt();
    let mut norms: Vec<f32> = matrix.values.chunks(matrix.in_features).map(norm).collect();
    largest_over_median(&mut norms)
}

fn largest_over_median(values: &mut [f32]) -> f64 {
    values.sort_by(f32::total_cmp);
    let largest = values.last().copied().unwrap_or(0.0);
    let median = values.get(values.len() / 2).copied().unwrap_or(0.0);
    if median > 0.0 { f64::from(largest) / f64::from(median) } else { 0.0 }
}
