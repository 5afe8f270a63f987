//! AWQ on one block: statistics, scale search, folding, clipping, rounding.
//!
//! Every block sees full-precision inputs: errors of earlier blocks are not propagated (as in the
//! reference, and unlike GPTQ). All mappings are searched on the original weights, then applied
//! together.

use super::{
    AwqOptions, Candidate, GqaFold, Objective, Search, apply_clip, best, candidates, fits_half,
    linear_losses, scaled_fake_quantize, search_clip, tie_repeats, weight_mean,
};
use crate::block::{BlockJob, INPUT_POINTS};
use crate::grid::{Grid, GridOptions, Matrix, effective_group};
use crate::rtn;
use crate::statistics::{InputStatistics, Statistics, TokenSample, Wanted};
use crate::{Error, Result};
use nn::{Context, Inspect, Leaf, Mapping, Name, Overlay, Prev, Stage, Taps};
use std::collections::{BTreeMap, HashMap};
use store::packed::QuantizedMatrix;
use tensor::host;

/// A mapping that will be searched, with its layers' weights and grid.
struct SearchTask {
    mapping: Mapping,
    matrices: Vec<Matrix>,
    grid: Grid,
    group_size: usize,
    candidates: Vec<Candidate>,
}

/// What the search found for a mapping.
struct Found {
    ratio: Option<f64>,
    scales: Vec<f32>,
    loss: f64,
    rounding_loss: f64,
}

/// Quantises one block; the calibration activations leave it in full precision.
pub fn quantize_block(job: &mut BlockJob<'_>, options: &AwqOptions) -> Result<()> {
    let mappings = searchable(job, options);
    let inputs = collect(job, &mappings, options)?;
    let tasks: Vec<SearchTask> = mappings
        .into_iter()
        .map(|mapping| task(job, mapping, &inputs, options))
        .collect::<Result<_>>()?;
    let found = search(job, &tasks, &inputs, options)?;
    let scales = fold(job, &tasks, &found)?;
    // From here on the block's activations may move on: the working copy still computes the
    // original function, because folding does not change it.
    for stage in Stage::ALL {
        job.run_stage(stage, &mut Taps::none())?;
    }
    let notes = notes(&tasks, &found);
    for (set, layers) in job.sets.iter().enumerate() {
        let sample = inputs[set].sample.as_ref();
        for layer in layers {
            let Some(grid_options) = &layer.grid else { continue };
            let scale = scales.get(&layer.name.module);
            finish_layer(job, &layer.name, grid_options, sample, scale, &notes, options)?;
        }
    }
    Ok(())
}

/// The mappings of the block that can be scaled: all their layers are to be quantised, and what
/// absorbs the scale may be changed.
fn searchable(job: &mut BlockJob<'_>, options: &AwqOptions) -> Vec<Mapping> {
    if options.no_scale {
        return Vec::new();
    }
    let planned = |name: &Name| {
        job.sets.iter().flatten().any(|l| l.grid.is_some() && l.name.module == name.module)
    };
    let mut keep = Vec::new();
    for mapping in job.decoder.mappings(job.index) {
        let usable = mapping.layers.iter().all(&planned)
            && match &mapping.prev {
                Prev::Norm(_) => true,
                Prev::Linear { name, grouped, .. } => {
                    planned(name) && (!grouped || options.gqa_fold != GqaFold::None)
                }
                Prev::Activation => false,
            };
        if usable {
            keep.push(mapping);
        }
    }
    keep
}

/// Runs the block once in full precision and collects, for every set of linears, what the searches
/// need. The residual stream stays at the block's input.
fn collect(
    job: &mut BlockJob<'_>,
    mappings: &[Mapping],
    options: &AwqOptions,
) -> Result<[InputStatistics; 4]> {
    let total = job.calibration.tokens();
    let mut statistics = Statistics::new((0..4).map(|set| {
        let mapping = mappings.iter().find(|m| m.set == set);
        let gram = mapping.is_some_and(|m| judged_by_gram(m, options));
        let wanted = Wanted {
            gram,
            absolute_mean: mapping.is_some(),
            sample: Some((total, options.clip_tokens.max(1))),
        };
        (INPUT_POINTS[set], wanted)
    }));
    for batch in 0..job.calibration.batches() {
        let geometry = job.calibration.batch(batch).1;
        let mut context = Context::new(geometry);
        let mut state = nn::BlockState::new(job.tensor(job.resid.get(batch)?, geometry.rows()));
        for stage in &Stage::ALL[..4] {
            let mut taps = Taps::one(&mut statistics);
            let (decoder, index) = (job.decoder, job.index);
            state = decoder.stage(index, *stage, &job.weights, state, &mut context, &mut taps)?;
        }
    }
    let mut inputs: [InputStatistics; 4] = Default::default();
    for (set, input) in inputs.iter_mut().enumerate() {
        *input = statistics.take(INPUT_POINTS[set]).unwrap_or_default();
        if let Some(mean) = &input.absolute_mean
            && let Some(bad) = mean.mean().iter().position(|m| !m.is_finite())
        {
            // A damaged weight is the usual cause; it is named rather than what it ruined.
            for layer in job.sets.iter().flatten() {
                job.matrix(&layer.name)?;
            }
            let layer = job.sets[set].first().map_or("", |l| l.name.module.as_str());
            return Err(Error::layer(
                layer,
                format!(
                    "activations of input {bad} are NaN or infinite; the model overflows on the \
                     calibration text"
                ),
            ));
        }
    }
    Ok(inputs)
}

fn judged_by_gram(mapping: &Mapping, options: &AwqOptions) -> bool {
    mapping.inspect == Inspect::Linear || options.objective == Objective::Linear
}

fn task(
    job: &BlockJob<'_>,
    mapping: Mapping,
    inputs: &[InputStatistics; 4],
    options: &AwqOptions,
) -> Result<SearchTask> {
    let first = &mapping.layers[0];
    let grid_options = job
        .sets
        .iter()
        .flatten()
        .find(|layer| layer.name.module == first.module)
        .and_then(|layer| layer.grid.clone())
        .unwrap_or_default();
    let grid = job.grid(&grid_options)?;
    let group_size = effective_group(&grid_options, first.in_features());
    let matrices: Vec<Matrix> =
        mapping.layers.iter().map(|name| job.matrix(name)).collect::<Result<_>>()?;
    let Some(mean) = &inputs[mapping.set].absolute_mean else {
        return Err(Error::layer(&first.module, "no calibration token reached this layer"));
    };
    let x_mean = mean.mean();
    let w_mean = (options.search == Search::Duo)
        .then(|| weight_mean(&matrices.iter().collect::<Vec<_>>(), group_size));
    let config = &job.decoder.config;
    let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
    let grouped = matches!(&mapping.prev, Prev::Linear { grouped: true, .. });
    let candidates = candidates(&x_mean, w_mean.as_deref(), options, |scales| {
        if grouped {
            tie_repeats(scales, kv_heads, head_dim, options.gqa_fold);
        }
    });
    Ok(SearchTask { mapping, matrices, grid, group_size, candidates })
}

/// Losses of all candidates of all mappings, and the best of each.
fn search(
    job: &mut BlockJob<'_>,
    tasks: &[SearchTask],
    inputs: &[InputStatistics; 4],
    options: &AwqOptions,
) -> Result<Vec<Found>> {
    let mut losses: Vec<Vec<f64>> = Vec::with_capacity(tasks.len());
    for task in tasks {
        let gram = inputs[task.mapping.set].gram.as_ref();
        losses.push(match gram {
            Some(gram) if judged_by_gram(&task.mapping, options) => {
                let layers: Vec<&Matrix> = task.matrices.iter().collect();
                let covariance = gram.covariance();
                linear_losses(&layers, &task.candidates, &covariance, &task.grid, task.group_size)
            }
            _ => vec![0.0; task.candidates.len()],
        });
    }
    let by_tokens: Vec<usize> =
        (0..tasks.len()).filter(|&t| !judged_by_gram(&tasks[t].mapping, options)).collect();
    if !by_tokens.is_empty() {
        token_losses(job, tasks, &by_tokens, &mut losses)?;
    }
    tasks
        .iter()
        .zip(losses)
        .map(|(task, losses)| {
            let chosen = best(&task.mapping.layers[0].module, &losses)?;
            Ok(Found {
                ratio: task.candidates[chosen].ratio,
                scales: task.candidates[chosen].scales.clone(),
                loss: losses[chosen],
                rounding_loss: losses[0],
            })
        })
        .collect()
}

/// Adds up `mean (M_q(X) - M(X))²` over all batches for the mappings that are judged by the output
/// of a whole module. Batch by batch, so that only one batch of activations is ever held.
fn token_losses(
    job: &mut BlockJob<'_>,
    tasks: &[SearchTask],
    which: &[usize],
    losses: &mut [Vec<f64>],
) -> Result<()> {
    let elements = (job.calibration.tokens() * job.decoder.config.hidden_size) as f64;
    for batch in 0..job.calibration.batches() {
        let geometry = job.calibration.batch(batch).1;
        let mut context = Context::new(geometry);
        let mut state = nn::BlockState::new(job.tensor(job.resid.get(batch)?, geometry.rows()));
        for (set, stage) in crate::block::INPUT_STAGES.iter().enumerate().take(3) {
            let (decoder, index) = (job.decoder, job.index);
            let mut taps = Taps::none();
            state = decoder.stage(index, *stage, &job.weights, state, &mut context, &mut taps)?;
            for &t in which.iter().filter(|&&t| tasks[t].mapping.set == set) {
                let task = &tasks[t];
                let inspect = |weights: &dyn nn::Weights| -> Result<Vec<f32>> {
                    let x = state.x.clone();
                    let y = match task.mapping.inspect {
                        Inspect::Attention => {
                            decoder.attention(index, weights, x, &mut Context::new(geometry))?
                        }
                        _ => decoder.mlp(index, weights, x, &geometry)?,
                    };
                    Ok(host::into_vec(y))
                };
                let original = inspect(&job.weights)?;
                for (candidate, loss) in task.candidates.iter().zip(&mut losses[t]) {
                    if task.matrices.iter().any(|m| !fits_half(m, &candidate.scales)) {
                        *loss = f64::INFINITY;
                        continue;
                    }
                    let mut trial = Overlay::new(&job.weights);
                    for (name, matrix) in task.mapping.layers.iter().zip(&task.matrices) {
                        let values = scaled_fake_quantize(
                            matrix,
                            &candidate.scales,
                            &task.grid,
                            task.group_size,
                        );
                        let device = nn::Weights::device(&job.weights);
                        trial
                            .matrices
                            .insert(name.weight(), host::from_vec(values, name.shape, &device));
                    }
                    *loss += squared_distance(&inspect(&trial)?, &original) / elements;
                }
            }
        }
    }
    Ok(())
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    use rayon::prelude::*;
    let parts: Vec<f64> = a
        .par_chunks(4096)
        .zip(b.par_chunks(4096))
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum())
        .collect();
    parts.iter().sum()
}

/// Folds the found scales into the working copy; returns the input scale of every scaled layer.
fn fold(
    job: &mut BlockJob<'_>,
    tasks: &[SearchTask],
    found: &[Found],
) -> Result<HashMap<String, Vec<f32>>> {
    let mut scales = HashMap::new();
    for (task, found) in tasks.iter().zip(found) {
        fold_mapping(job, &task.mapping, &found.scales)?;
        for name in &task.mapping.layers {
            scales.insert(name.module.clone(), found.scales.clone());
        }
    }
    Ok(scales)
}

/// Divides what produces the input by `scales` and multiplies the columns that read it: the
/// network's function stays the same.
pub(crate) fn fold_mapping(
    job: &mut BlockJob<'_>,
    mapping: &Mapping,
    scales: &[f32],
) -> Result<()> {
    match &mapping.prev {
        Prev::Norm(name) => {
            let offset = if name.plus_one { 1.0 } else { 0.0 };
            let mut gain = job.vector(name, Leaf::Weight)?;
            gain.iter_mut().zip(scales).for_each(|(g, s)| *g = (*g + offset) / s - offset);
            job.set_vector(name, Leaf::Weight, gain);
            if name.bias {
                let mut bias = job.vector(name, Leaf::Bias)?;
                bias.iter_mut().zip(scales).for_each(|(b, s)| *b /= s);
                job.set_vector(name, Leaf::Bias, bias);
            }
        }
        Prev::Linear { name, rows, .. } => {
            let mut matrix = job.matrix(name)?;
            let width = matrix.in_features;
            // Several columns may read one row; they share its scale, so it is divided once.
            let mut factor = vec![1f32; matrix.out_features];
            for (&row, &scale) in rows.iter().zip(scales) {
                factor[row] = scale;
            }
            for (row, s) in matrix.values.chunks_mut(width).zip(&factor) {
                row.iter_mut().for_each(|w| *w /= s);
            }
            job.set_matrix(name, matrix.values);
            if name.bias {
                let mut bias = job.vector(name, Leaf::Bias)?;
                bias.iter_mut().zip(&factor).for_each(|(b, s)| *b /= s);
                job.set_vector(name, Leaf::Bias, bias);
            }
        }
        Prev::Activation => {
            return Err(Error::layer(
                &mapping.layers[0].module,
                "its input comes from an activation that cannot absorb a scale",
            ));
        }
    }
    for name in &mapping.layers {
        let mut matrix = job.matrix(name)?;
        for row in matrix.values.chunks_mut(scales.len()) {
            row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
        }
        job.set_matrix(name, matrix.values);
    }
    Ok(())
}

/// What the search says about every layer of a mapping.
fn notes(
    tasks: &[SearchTask],
    found: &[Found],
) -> HashMap<String, BTreeMap<String, serde_json::Value>> {
    let mut notes = HashMap::new();
    for (task, found) in tasks.iter().zip(found) {
        for name in &task.mapping.layers {
            notes.insert(
                name.module.clone(),
                BTreeMap::from([
                    ("ratio".to_string(), serde_json::json!(found.ratio)),
                    ("search_loss".to_string(), found.loss.into()),
                    ("rounding_loss".to_string(), found.rounding_loss.into()),
                ]),
            );
        }
    }
    notes
}

/// Clips and rounds one layer of the folded block.
fn finish_layer(
    job: &mut BlockJob<'_>,
    name: &Name,
    grid_options: &GridOptions,
    sample: Option<&TokenSample>,
    scales: Option<&Vec<f32>>,
    notes: &HashMap<String, BTreeMap<String, serde_json::Value>>,
    options: &AwqOptions,
) -> Result<()> {
    let matrix = job.matrix(name)?;
    let grid = job.grid(grid_options)?;
    let group_size = effective_group(grid_options, name.in_features());
    let sample = sample.map(|sample| match scales {
        Some(scales) => sample.divided(scales),
        None => sample.clone(),
    });
    let mut details = notes.get(&name.module).cloned().unwrap_or_default();
    let mut clipped = matrix.clone();
    // Query and key interact through their product, so clipping one alone is no improvement.
    let clippable = !matches!(name.role, nn::Role::Query | nn::Role::Key | nn::Role::QueryKeyValue);
    if let Some(sample) = &sample
        && clippable
        && !options.no_clip
    {
        let clip = search_clip(&matrix, sample, &grid, group_size);
        apply_clip(&mut clipped, &clip, group_size);
        details.insert("clip_histogram".into(), serde_json::json!(clip.histogram));
    }
    let quantized: QuantizedMatrix = rtn::quantize(&clipped, &grid, grid_options);
    job.hand_in(name, grid_options, &matrix, quantized, sample.as_ref(), details)
}
