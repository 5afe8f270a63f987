//! Pruning as a job of the runner: which method does a block, and what it leaves behind.

use super::sets::{self, Inputs, Needs};
use super::{PruneMethod, PruneOptions};
use crate::block::{BlockJob, LayerResult};
use crate::d_pruner::files::Files;
use crate::grid::Matrix;
use crate::mask::{self, Mask, Structure};
use crate::plan::{LayerPlan, Plan};
use crate::runner::{Container, Job, Limits, Outcome, Source, Target, run_job};
use crate::statistics::TokenSample;
use crate::{Calibration, Error, Result, sparsegpt, wanda};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use store::packed::{own, sparse};

/// Cells of a layer's picture along one side.
pub const MAP_SIDE: usize = 16;

/// Prunes as planned. `scores` are the importance files of D-Pruner; `inputs` is recorded as what
/// decided the output besides the options. `progress` counts blocks.
#[allow(clippy::too_many_arguments)]
pub fn run(
    source: Source<'_>,
    plan: &Plan,
    options: &PruneOptions,
    calibration: &Calibration,
    scores: Option<Files>,
    inputs: Value,
    target: &Target<'_>,
    progress: &report::Progress,
) -> Result<Outcome> {
    let mut stored_bits = BTreeMap::new();
    for layer in plan.layers().filter(|layer| layer.sparsity.is_some()) {
        let info = source.checkpoint.info(&layer.name.weight())?;
        stored_bits.insert(layer.name.module.clone(), info.dtype.bits());
    }
    let mut job = Pruner { options, scores, inputs, stored_bits, masks: BTreeMap::new() };
    run_job(source, plan, &mut job, calibration, target, progress)
}

/// The pruning job.
pub struct Pruner<'a> {
    options: &'a PruneOptions,
    scores: Option<Files>,
    inputs: Value,
    /// Bits of a stored value, by module.
    stored_bits: BTreeMap<String, f64>,
    /// The masks of the current block.
    masks: BTreeMap<String, Mask>,
}

impl Pruner<'_> {
    /// Masks by a score of each weight alone.
    fn by_scores(&mut self, job: &mut BlockJob<'_>) -> Result<()> {
        let importance = match &self.scores {
            Some(files) => Some(files.open(job.index)?),
            None => None,
        };
        let sets = job.sets;
        for layer in sets.iter().flatten().filter(|layer| layer.sparsity.is_some()) {
            let name = &layer.name;
            let matrix = job.matrix(name)?;
            let count = matrix.values.len();
            let scores = match (self.options.method, &importance) {
                (PruneMethod::Random, _) => {
                    mask::random_scores(&name.module, count, self.options.calibration.seed)
                }
                (PruneMethod::DPruner, Some(importance)) => {
                    importance.read(&name.module, count, <[f32]>::to_vec)?
                }
                (PruneMethod::DPruner, None) => {
                    return Err(Error::layer(&name.module, "has no importance"));
                }
                _ => mask::magnitude_scores(&matrix.values),
            };
            let mask = self.mask(layer, &scores)?;
            self.hand_in_masked(job, layer, &matrix, mask, None, BTreeMap::new());
        }
        Ok(())
    }

    /// The mask of a layer by the options' rules.
    fn mask(&self, layer: &LayerPlan, scores: &[f32]) -> Result<Mask> {
        let (name, options) = (&layer.name, self.options);
        mask::check_scores(&name.module, scores)?;
        let sparsity = layer.sparsity.unwrap_or(0.0);
        let scope = options.scope().for_role(name.role, name.in_features());
        Ok(mask::build(scores, name.shape, sparsity, options.pattern, scope, options.count()))
    }

    fn wanda(
        &mut self,
        job: &mut BlockJob<'_>,
        layers: &[&LayerPlan],
        inputs: Inputs,
    ) -> Result<()> {
        let sequences = job.calibration.windows();
        for layer in layers {
            let name = &layer.name;
            let matrix = job.matrix(name)?;
            let squares = inputs.squares.as_ref().ok_or_else(|| sets::unreached(&name.module))?;
            let scores = wanda::scores(&matrix.values, &wanda::norms(squares, sequences));
            let mut details = BTreeMap::new();
            let mask = if self.options.wanda.wanda_alpha {
                mask::check_scores(&name.module, &scores)?;
                let sparsity = layer.sparsity.unwrap_or(0.0);
                let (mask, alpha) = wanda::alpha_mask(&scores, name.shape, sparsity);
                details.insert("alpha".into(), json!(alpha));
                mask
            } else {
                self.mask(layer, &scores)?
            };
            let sample = inputs.statistics.sample.as_ref();
            self.hand_in_masked(job, layer, &matrix, mask, sample, details);
        }
        Ok(())
    }

    fn sparsegpt(
        &mut self,
        job: &mut BlockJob<'_>,
        layers: &[&LayerPlan],
        mut inputs: Inputs,
    ) -> Result<()> {
        let options = self.options;
        let tokens = job.calibration.tokens();
        let factor = sets::factor(layers, &mut inputs, options.sparsegpt.damping)?;
        if tokens < factor.width() {
            let names: Vec<&str> = layers.iter().map(|l| l.name.module.as_str()).collect();
            job.warnings.push(format!(
                "{}: {tokens} calibration tokens for {} inputs leave the Hessian without full \
                 rank, and damping decides; give more --samples",
                names.join(", "),
                factor.width()
            ));
        }
        for layer in layers {
            let name = &layer.name;
            let matrix = job.matrix(name)?;
            let target = sparsegpt::Target {
                sparsity: layer.sparsity.unwrap_or(0.0),
                structure: options.pattern,
                count: options.count(),
                block_size: options.sparsegpt.block_size,
            };
            let pruned = sparsegpt::prune(&name.module, &matrix, &factor, &target, None)?;
            let details = BTreeMap::from([
                ("loss".to_string(), json!(pruned.loss)),
                ("damping".to_string(), json!(factor.damping())),
                ("dead_columns".to_string(), json!(factor.dead_columns())),
            ]);
            let sample = inputs.statistics.sample.as_ref();
            self.hand_in(job, layer, &matrix, pruned.values, pruned.mask, sample, details);
        }
        Ok(())
    }

    /// Hands in the original weights with the mask's zeros.
    fn hand_in_masked(
        &mut self,
        job: &mut BlockJob<'_>,
        layer: &LayerPlan,
        original: &Matrix,
        mask: Mask,
        sample: Option<&TokenSample>,
        details: BTreeMap<String, Value>,
    ) {
        let mut values = original.values.clone();
        mask.apply(&mut values);
        self.hand_in(job, layer, original, values, mask, sample, details);
    }

    #[allow(clippy::too_many_arguments)]
    fn hand_in(
        &mut self,
        job: &mut BlockJob<'_>,
        layer: &LayerPlan,
        original: &Matrix,
        values: Vec<f32>,
        mask: Mask,
        sample: Option<&TokenSample>,
        mut details: BTreeMap<String, Value>,
    ) {
        let name = &layer.name;
        let bits = self.stored_bits.get(&name.module).copied().unwrap_or(16.0);
        let bits_per_weight = match self.options.format.layout() {
            // The kept values and one bit for each place; row offsets are left out.
            Some(_) => bits * (1.0 - mask.sparsity()) + 1.0,
            None => bits,
        };
        details.insert("map".into(), json!(map(&mask)));
        job.hand_in_dense(name, original, values, bits_per_weight, sample, details);
        self.masks.insert(name.module.clone(), mask);
    }
}

/// Sparsity in [`MAP_SIDE`] × [`MAP_SIDE`] cells of the matrix (fewer where it is smaller), for the
/// report's pictures.
fn map(mask: &Mask) -> Vec<Vec<f64>> {
    let cells = |length: usize| -> Vec<std::ops::Range<usize>> {
        let count = length.clamp(1, MAP_SIDE);
        (0..count).map(|i| i * length / count..(i + 1) * length / count).collect()
    };
    let columns = cells(mask.in_features);
    cells(mask.out_features)
        .into_iter()
        .map(|rows| {
            columns
                .iter()
                .map(|columns| {
                    let mut pruned = 0usize;
                    for row in rows.clone() {
                        let start = row * mask.in_features;
                        let cell = mask.pruned.get(start + columns.start..start + columns.end);
                        pruned += cell.unwrap_or_default().iter().filter(|p| **p).count();
                    }
                    let share = pruned as f64 / (rows.len() * columns.len()).max(1) as f64;
                    (share * 1e4).round() / 1e4
                })
                .collect()
        })
        .collect()
}

impl Job for Pruner<'_> {
    fn verb(&self) -> &'static str {
        "prune"
    }

    fn slug(&self) -> &'static str {
        self.options.method.slug()
    }

    fn calibrates(&self) -> bool {
        self.options.calibrates()
    }

    fn container(&self) -> Container {
        self.options.format.layout().map_or(Container::Dense, Container::Sparse)
    }

    fn limits(&self) -> Limits {
        Limits { memory: self.options.memory.0, max_shard_size: self.options.max_shard_size.0 }
    }

    fn options(&self) -> Result<Value> {
        serde_json::to_value(self.options)
            .map_err(|e| Error::Options(format!("the options cannot be written: {e}")))
    }

    fn inputs(&self) -> Value {
        self.inputs.clone()
    }

    fn block(&mut self, job: &mut BlockJob<'_>) -> Result<()> {
        self.masks.clear();
        let order = self.options.calibration_order;
        match self.options.method {
            PruneMethod::Wanda => {
                let needs = Needs { squares: true, sample: true, gram: false };
                sets::visit(job, needs, order, &mut |job, layers, inputs| {
                    self.wanda(job, layers, inputs)
                })?;
            }
            PruneMethod::SparseGpt => {
                let needs = Needs { gram: true, sample: true, squares: false };
                sets::visit(job, needs, order, &mut |job, layers, inputs| {
                    self.sparsegpt(job, layers, inputs)
                })?;
            }
            _ => self.by_scores(job)?,
        }
        if self.options.pattern != Structure::Unstructured
            && let Some((module, _)) =
                self.masks.iter().find(|(_, mask)| !mask.fits(self.options.pattern))
        {
            return Err(Error::layer(module, format!("is not {}", self.options.pattern)));
        }
        let file = mask::file(job.index, &self.masks)?;
        job.files.push(file);
        Ok(())
    }

    fn quantization_config(
        &self,
        plan: &Plan,
        layers: &[LayerResult],
        _modules: own::Modules,
    ) -> Result<Option<Value>> {
        let Some(layout) = self.options.format.layout() else { return Ok(None) };
        let mut ignored: Vec<String> = plan
            .layers()
            .filter(|layer| layer.sparsity.is_none())
            .map(|layer| layer.name.module.clone())
            .collect();
        ignored.push("lm_head".into());
        Ok(Some(sparse::config_json(layout, total_sparsity(layers), &ignored)))
    }
}

/// Share of zeros in all pruned layers together.
pub fn total_sparsity(layers: &[LayerResult]) -> f64 {
    let weights = |layer: &LayerResult| (layer.shape[0] * layer.shape[1]) as f64;
    let pruned = || layers.iter().filter_map(|layer| Some((layer, layer.sparsity?)));
    let total: f64 = pruned().map(|(layer, _)| weights(layer)).sum();
    pruned().map(|(layer, sparsity)| sparsity * weights(layer)).sum::<f64>() / total.max(1.0)
}
