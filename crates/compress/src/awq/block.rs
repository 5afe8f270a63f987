//! AWQ on one block: statistics, scale search, folding, clipping, rounding.
//!
//! Every block sees full-precision inputs: errors of earlier blocks are not propagated (as in the
//! reference, and unlike GPTQ). All mappings are searched on the original weights, then applied
//! together. When GPTQ rounds, a block is searched on the activations that enter it, which the
//! quantised blocks before it produced, and GPTQ goes on from the same ones.

use super::mappings::Chosen;
use super::stored::{BlockSearch, Fold, Limits, Prepared};
use super::{
    AwqOptions, Candidate, GqaFold, KeepBy, Objective, Rounding, Search, apply_clip, best,
    candidates, column_norms, fits_half, largest_channels, linear_losses, scaled_fake_quantize,
    search_clip, tie_repeats, weight_mean,
};
use crate::block::{BlockJob, INPUT_POINTS};
use crate::grid::{Grid, GridOptions, Matrix, effective_group};
use crate::options::QuantizeOptions;
use crate::statistics::{InputStatistics, Statistics, TokenSample, Wanted};
use crate::{Error, Result, gptq, rtn};
use nn::{Context, Inspect, Leaf, Mapping, Name, Overlay, Prev, Stage, Taps};
use std::collections::{BTreeMap, HashMap};
use store::packed::{QuantizedMatrix, Stored};
use tensor::{Rng, host};

/// A mapping that will be searched, with its layers' weights and grid.
struct SearchTask {
    mapping: Mapping,
    matrices: Vec<Matrix>,
    grid: Grid,
    group_size: usize,
    candidates: Vec<Candidate>,
}

/// Quantises one block and returns what the search found. Unless GPTQ rounds, the calibration
/// activations leave the block in full precision.
pub fn quantize_block(
    job: &mut BlockJob<'_>,
    options: &QuantizeOptions,
    prepared: &Prepared,
) -> Result<BlockSearch> {
    let awq = &options.awq;
    let mut inputs = Default::default();
    let mut found = match prepared.stored(job, awq)? {
        Some(stored) => stored,
        None => {
            let chosen = searchable(job, awq, prepared)?;
            inputs = collect(job, &chosen, awq)?;
            let tasks: Vec<SearchTask> = chosen
                .into_iter()
                .map(|chosen| task(job, chosen, &inputs, awq))
                .collect::<Result<_>>()?;
            BlockSearch { folds: search(job, tasks, &inputs, awq)?, clips: BTreeMap::new() }
        }
    };
    keep_channels(job, &inputs, options)?;
    for fold in &found.folds {
        fold_mapping(job, &fold.mapping, &fold.scales)?;
    }
    let notes = notes(&found.folds);
    if awq.rounding == Rounding::Gptq {
        gptq::quantize_block(job, &options.gptq)?;
        for result in &mut job.results {
            result.details.extend(notes.get(&result.module).cloned().unwrap_or_default());
        }
        return Ok(found);
    }
    // From here on the block's activations may move on: the working copy still computes the
    // original function, because folding does not change it.
    if options.calibrates() {
        for stage in Stage::ALL {
            job.run_stage(stage, &mut Taps::none())?;
        }
    }
    let scales: HashMap<&str, &[f32]> = found
        .folds
        .iter()
        .flat_map(|fold| fold.mapping.layers.iter().map(|l| (l.module.as_str(), &fold.scales[..])))
        .collect();
    for (set, layers) in job.sets.iter().enumerate() {
        for layer in layers {
            let Some(grid_options) = &layer.grid else { continue };
            let module = &layer.name.module;
            let sample = inputs[set].sample.as_ref().map(|sample| match scales.get(&**module) {
                Some(scales) => sample.divided(scales),
                None => sample.clone(),
            });
            let details = notes.get(module).cloned().unwrap_or_default();
            let stored = found.clips.get(module);
            let new = finish_layer(job, &layer.name, grid_options, (sample, stored), details, awq)?;
            found.clips.extend(new.map(|limits| (module.clone(), limits)));
        }
    }
    Ok(found)
}

/// [`quantize_block`] as a step of a job: keeps the search record when it is wanted.
pub fn run_block(
    job: &mut BlockJob<'_>,
    options: &QuantizeOptions,
    prepared: &Prepared,
) -> Result<()> {
    let found = quantize_block(job, options, prepared)?;
    if options.awq.save_search {
        let (record, file, bytes) = found.record(job.index)?;
        job.files.push((file, bytes));
        job.record = Some(
            serde_json::to_value(record)
                .map_err(|e| Error::Options(format!("the search cannot be written: {e}")))?,
        );
    }
    Ok(())
}

/// The table of contents of the search records that the blocks left.
pub fn finish(
    grid: &GridOptions,
    records: Vec<serde_json::Value>,
) -> Result<Vec<(String, serde_json::Value)>> {
    let records = records
        .into_iter()
        .map(serde_json::from_value)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::Options(format!("the journal of the job is damaged: {e}")))?;
    Ok(vec![(super::SEARCH_FILE.into(), super::search_contents(grid, records)?)])
}

/// The mappings of the block that can be scaled: all their layers are to be quantised, and what
/// absorbs the scale may be changed.
fn searchable(
    job: &BlockJob<'_>,
    options: &AwqOptions,
    prepared: &Prepared,
) -> Result<Vec<Chosen>> {
    if options.no_scale {
        return Ok(Vec::new());
    }
    let mut chosen = match &prepared.mappings {
        Some(file) => file.choose(job.decoder, job.index, options)?,
        None => {
            let fold = options.gqa_fold;
            let table = job.decoder.mappings(job.index).into_iter();
            table.map(|mapping| Chosen { mapping, fold }).collect()
        }
    };
    let planned = |name: &Name| {
        job.sets.iter().flatten().any(|l| l.grid.is_some() && l.name.module == name.module)
    };
    chosen.retain(|Chosen { mapping, fold }| {
        mapping.layers.iter().all(&planned)
            && match &mapping.prev {
                Prev::Norm(_) => true,
                Prev::Linear { name, grouped, .. } => {
                    planned(name) && (!grouped || *fold != GqaFold::None)
                }
                Prev::Activation => false,
            }
    });
    Ok(chosen)
}

/// Chooses the input channels of every layer that stay out of rounding.
fn keep_channels(
    job: &mut BlockJob<'_>,
    inputs: &[InputStatistics; 4],
    options: &QuantizeOptions,
) -> Result<()> {
    let Some(percent) = options.awq.keep_channels else { return Ok(()) };
    let mut rng = Rng::stream(options.calibration.seed, &format!("kept channels {}", job.index));
    for (set, layers) in job.sets.iter().enumerate() {
        for layer in layers.iter().filter(|layer| layer.grid.is_some()) {
            let scores = match (options.awq.keep_by, &inputs[set].absolute_mean) {
                (KeepBy::Activation, Some(mean)) => mean.mean(),
                (KeepBy::Activation, None) => {
                    let reason = "no calibration token reached this layer";
                    return Err(Error::layer(&layer.name.module, reason));
                }
                (KeepBy::Weight, _) => column_norms(&job.matrix(&layer.name)?),
                (KeepBy::Random, _) => {
                    (0..layer.name.in_features()).map(|_| rng.uniform() as f32).collect()
                }
            };
            let kept = largest_channels(&scores, percent / 100.0);
            job.kept.insert(layer.name.module.clone(), kept);
        }
    }
    Ok(())
}

/// Runs the block once in full precision and collects, for every set of linears, what the searches
/// need. The residual stream stays at the block's input.
fn collect(
    job: &mut BlockJob<'_>,
    chosen: &[Chosen],
    options: &AwqOptions,
) -> Result<[InputStatistics; 4]> {
    let total = job.calibration.tokens();
    let ranked = options.keep_channels.is_some() && options.keep_by == KeepBy::Activation;
    let mut statistics = Statistics::new((0..4).map(|set| {
        let mapping = chosen.iter().map(|c| &c.mapping).find(|m| m.set == set);
        let wanted = Wanted {
            gram: mapping.is_some_and(|m| judged_by_gram(m, options)),
            absolute_mean: mapping.is_some() || ranked,
            // GPTQ collects what it needs itself.
            sample: (options.rounding == Rounding::Rtn)
                .then_some((total, options.clip_tokens.max(1))),
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
    Chosen { mapping, fold }: Chosen,
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
            tie_repeats(scales, kv_heads, head_dim, fold);
        }
    });
    Ok(SearchTask { mapping, matrices, grid, group_size, candidates })
}

/// Losses of all candidates of all mappings, and the best of each.
fn search(
    job: &mut BlockJob<'_>,
    tasks: Vec<SearchTask>,
    inputs: &[InputStatistics; 4],
    options: &AwqOptions,
) -> Result<Vec<Fold>> {
    let mut losses: Vec<Vec<f64>> = Vec::with_capacity(tasks.len());
    for task in &tasks {
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
        token_losses(job, &tasks, &by_tokens, &mut losses)?;
    }
    tasks
        .into_iter()
        .zip(losses)
        .map(|(mut task, losses)| {
            let module = &task.mapping.layers[0].module;
            // A fixed scale stands whatever its loss, as long as there is one.
            let chosen = match options.fixed_scale {
                Some(_) => losses.len() - 1,
                None => 0,
            };
            let chosen = chosen + best(module, &losses[chosen..])?;
            let Candidate { ratio, scales } = task.candidates.swap_remove(chosen);
            let (search_loss, rounding_loss) = (losses[chosen], losses[0]);
            Ok(Fold { mapping: task.mapping, scales, ratio, search_loss, rounding_loss })
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
    let sets = which.iter().map(|&t| tasks[t].mapping.set + 1).max().unwrap_or_default();
    for batch in 0..job.calibration.batches() {
        let geometry = job.calibration.batch(batch).1;
        let mut context = Context::new(geometry);
        let mut state = nn::BlockState::new(job.tensor(job.resid.get(batch)?, geometry.rows()));
        for (set, stage) in crate::block::INPUT_STAGES.iter().enumerate().take(sets) {
            let (decoder, index) = (job.decoder, job.index);
            let mut taps = Taps::none();
            state = decoder.stage(index, *stage, &job.weights, state, &mut context, &mut taps)?;
            for &t in which.iter().filter(|&&t| tasks[t].mapping.set == set) {
                let task = &tasks[t];
                let inspect = |weights: &dyn nn::Weights| -> Result<Vec<f32>> {
                    let x = state.x.clone();
                    let mut context = Context::new(geometry);
                    let y = match task.mapping.inspect {
                        Inspect::Attention => decoder.attention(index, weights, x, &mut context)?,
                        Inspect::Mlp => decoder.mlp(index, weights, x, &geometry)?,
                        Inspect::Linear | Inspect::Block => {
                            let mut state = state.clone();
                            for stage in Stage::ALL.into_iter().skip(set + 1) {
                                let (context, taps) = (&mut context, &mut Taps::none());
                                state =
                                    decoder.stage(index, stage, weights, state, context, taps)?;
                            }
                            state.resid
                        }
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

/// What the search says about a layer.
type Details = BTreeMap<String, serde_json::Value>;

/// What the search says about every layer of a mapping.
fn notes(folds: &[Fold]) -> HashMap<String, Details> {
    let mut notes = HashMap::new();
    for fold in folds {
        for name in &fold.mapping.layers {
            notes.insert(
                name.module.clone(),
                BTreeMap::from([
                    ("ratio".to_string(), serde_json::json!(fold.ratio)),
                    ("search_loss".to_string(), fold.search_loss.into()),
                    ("rounding_loss".to_string(), fold.rounding_loss.into()),
                ]),
            );
        }
    }
    notes
}

/// Clips and rounds one layer of the folded block, by `stored` limits or by those that a search on
/// `sample` finds; returns the latter.
fn finish_layer(
    job: &mut BlockJob<'_>,
    name: &Name,
    grid_options: &GridOptions,
    (sample, stored): (Option<TokenSample>, Option<&Limits>),
    mut details: Details,
    options: &AwqOptions,
) -> Result<Option<Limits>> {
    let matrix = job.matrix(name)?;
    let grid = job.grid(grid_options)?;
    let group_size = effective_group(grid_options, name.in_features());
    let mut clipped = matrix.clone();
    let mut found = None;
    // Query and key interact through their product, so clipping one alone is no improvement.
    let clippable = !matches!(name.role, nn::Role::Query | nn::Role::Key | nn::Role::QueryKeyValue);
    if let Some(limits) = stored {
        apply_clip(&mut clipped, &limits.values, group_size);
    } else if let Some(sample) = &sample
        && clippable
        && options.clips()
    {
        let clip = search_clip(&matrix, sample, &grid, group_size);
        apply_clip(&mut clipped, &clip.limits, group_size);
        details.insert("clip_histogram".into(), serde_json::json!(clip.histogram));
        found = Some(Limits { group_size, rows: matrix.out_features, values: clip.limits });
    }
    let quantized: QuantizedMatrix = rtn::quantize(&clipped, &grid, grid_options);
    job.hand_in(name, &matrix, Stored::Grid(quantized), sample.as_ref(), details)?;
    Ok(found)
}
