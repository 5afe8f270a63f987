//! Rate-distortion curves: how far the output moves when one layer alone is thinned.
//!
//! For every layer and every point of a grid the layer's smallest weights are zeroed, everything
//! else stays, and the logits are compared with those of the network as it is (Xu et al. 2023,
//! section 3). A pass over a batch goes down the chain once; the state that enters a segment is kept
//! while the layers of that segment are measured, and only the rest of the chain is run again. A
//! worker goes through the grid upwards, so that each point only zeroes the next slice of a
//! magnitude order that was sorted once. Points that round to the same number of weights are
//! measured once, points that change nothing not at all.
//!
//! Memory: one batch's state at one boundary, and per worker one layer's copy and one suffix pass.

use super::cache::CurveCache;
use super::masks::{Ranking, pruned_at};
use super::samples::Samples;
use crate::{Error, Result};
use nn::{Mode, Name, Network, Overlay, State, Weights};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tensor::{Tensor, host};

/// How the distortions of the samples become one number.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Distortion {
    /// The mean over samples.
    #[default]
    Mean,
    /// The largest of all samples (the paper's command lines).
    Worst,
}

/// A layer that may be thinned.
#[derive(Debug, Clone)]
pub struct Prunable {
    /// Its weights' name.
    pub name: Name,
    /// The segment of the network that computes it; `None` when it is read on entering (an
    /// embedding that is also the head).
    pub segment: Option<usize>,
    /// Its weights by magnitude, those that are pruned already first.
    pub ranking: Ranking,
}

impl Prunable {
    /// Number of weights.
    pub fn total(&self) -> usize {
        self.ranking.len()
    }

    /// Weights that are not pruned yet.
    pub fn available(&self) -> usize {
        self.ranking.len() - self.ranking.zeros()
    }

    /// Weights pruned at every point of a grid of `points` steps; never fewer than are pruned
    /// already, for masks only grow.
    pub fn counts(&self, points: usize) -> Vec<usize> {
        (0..=points).map(|k| pruned_at(k, points, self.total()).max(self.ranking.zeros())).collect()
    }
}

/// The curve of one layer over the grid `0, 1/K, ..., 1`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Curve {
    /// Module name.
    pub module: String,
    /// Number of weights.
    pub total: usize,
    /// Share of the weights that each point asks for.
    pub amount: Vec<f64>,
    /// Weights that are zero at each point.
    pub pruned: Vec<usize>,
    /// Distortion of the output at each point.
    pub distortion: Vec<f64>,
}

impl Curve {
    /// The curve with every distortion raised to the largest before it.
    pub fn monotone(mut self) -> Self {
        let mut largest = f64::NEG_INFINITY;
        for value in &mut self.distortion {
            largest = largest.max(*value);
            *value = largest;
        }
        self
    }
}

/// A network, its weights as they are, and what to measure on.
#[derive(Clone, Copy)]
pub struct Probe<'a> {
    /// The network.
    pub network: &'a dyn Network,
    /// Its weights, pruned as far as they are.
    pub weights: &'a (dyn Weights + Sync),
    /// The inputs.
    pub samples: &'a Samples,
    /// Layers or grid points measured at once, each with a copy of one layer and of the activations
    /// of one batch.
    pub workers: usize,
}

/// Where in a pass over a batch a measurement starts.
struct Place<'a> {
    /// The segment whose layers are measured; `None` at the entrance.
    segment: Option<usize>,
    input: &'a nn::Input<'a>,
    /// What enters the segment.
    state: &'a State,
    /// The logits of the network as it is.
    reference: &'a [f32],
    samples: usize,
}

/// What one variant of the network did to the samples seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Effect {
    /// Sum over samples of the mean squared change of the output.
    pub sum: f64,
    /// The largest of them.
    pub largest: f64,
}

impl Effect {
    fn add(&mut self, other: Effect) {
        self.sum += other.sum;
        self.largest = self.largest.max(other.largest);
    }

    fn distortion(self, kind: Distortion, samples: usize) -> f64 {
        match kind {
            Distortion::Mean => self.sum / samples.max(1) as f64,
            Distortion::Worst => self.largest,
        }
    }
}

impl Probe<'_> {
    /// Measures the curves of `layers` on a grid of `points` steps. With a cache, what an earlier
    /// run measured under the same weights, data and grid is taken up. `progress` counts
    /// measurements, see [`Probe::measurements`].
    ///
    /// # Errors
    /// Fewer than two steps, no layers, logits that are not finite (by layer and grid point), and
    /// from the network.
    pub fn curves(
        &self,
        layers: &[Prunable],
        points: usize,
        kind: Distortion,
        cache: Option<&CurveCache>,
        progress: &report::Progress,
    ) -> Result<Vec<Curve>> {
        if points < 2 {
            return Err(Error::Options(format!(
                "a curve of {points} steps says nothing about the points between: give at least 2 \
                 (100 in the paper)"
            )));
        }
        if layers.is_empty() {
            return Err(Error::Options(
                "there are no layers to measure; loosen --only or --exclude".into(),
            ));
        }
        let grids: Vec<Vec<usize>> = layers.iter().map(|l| distinct(l, points)).collect();
        let mut effects: Vec<Vec<Effect>> =
            grids.iter().map(|g| vec![Effect::default(); g.len()]).collect();
        let mut session = match cache {
            Some(cache) => Some(cache.open(&self.key(layers, points)?, &mut effects)?),
            None => None,
        };
        let mut done = session.as_ref().map_or(0, |s| s.done());
        let per_batch: u64 = grids.iter().map(|g| g.len() as u64).sum();
        // Stage 0 is the entrance, the last one the exit.
        let stages = self.network.segments() + 2;
        for batch in done / stages..self.samples.batches() {
            progress.set(batch as u64 * per_batch);
            let input = self.samples.batch(batch);
            let samples = input.samples();
            let mut state = self.enter(&input)?;
            let reference =
                host::into_vec(self.network.finish_from(0, self.weights, state.clone())?);
            if let Some(bad) = reference.iter().find(|v| !v.is_finite()) {
                return Err(Error::Options(format!(
                    "the network's own output on calibration batch {batch} is {bad}: there is \
                     nothing to compare with"
                )));
            }
            for stage in 0..stages {
                if batch * stages + stage >= done {
                    let place = Place {
                        segment: stage.checked_sub(1),
                        input: &input,
                        state: &state,
                        reference: &reference,
                        samples,
                    };
                    let measured = self.stage(&place, layers, &grids, progress)?;
                    for (layer, point, effect) in measured {
                        if let Some(place) = effects.get_mut(layer).and_then(|e| e.get_mut(point)) {
                            place.add(effect);
                        }
                    }
                    done = batch * stages + stage + 1;
                    if let Some(session) = &mut session {
                        session.save(done, &effects, false)?;
                    }
                }
                if stage > 0 && stage + 1 < stages {
                    state = self.network.segment(stage - 1, self.weights, state)?;
                }
            }
        }
        if let Some(session) = &mut session {
            session.save(done, &effects, true)?;
        }
        progress.set(per_batch * self.samples.batches() as u64);
        let count = self.samples.count();
        Ok(layers
            .iter()
            .zip(grids.iter().zip(&effects))
            .map(|(layer, (grid, effects))| {
                let found: HashMap<usize, f64> = grid
                    .iter()
                    .zip(effects)
                    .map(|(n, effect)| (*n, effect.distortion(kind, count)))
                    .collect();
                let pruned = layer.counts(points);
                Curve {
                    module: layer.name.module.clone(),
                    total: layer.total(),
                    amount: (0..=points).map(|k| k as f64 / points as f64).collect(),
                    // What was zero before changes nothing.
                    distortion: pruned
                        .iter()
                        .map(|n| found.get(n).copied().unwrap_or(0.0))
                        .collect(),
                    pruned,
                }
            })
            .collect())
    }

    /// Measurements that [`Probe::curves`] makes.
    pub fn measurements(&self, layers: &[Prunable], points: usize) -> u64 {
        let once: usize = layers.iter().map(|l| distinct(l, points).len()).sum();
        (once * self.samples.batches()) as u64
    }

    /// The distortion of the whole network when the matrices of `changed` (by tensor name, `[out,
    /// in]`) replace its own, and whether all its outputs are then the same whatever the input.
    ///
    /// # Errors
    /// Logits that are not finite, and from the network.
    pub fn joint(
        &self,
        changed: &HashMap<String, Tensor<2>>,
        kind: Distortion,
    ) -> Result<(f64, bool)> {
        let mut weights = Overlay::new(self.weights);
        weights.matrices = changed.clone();
        let mut effect = Effect::default();
        let mut first: Option<Vec<f32>> = None;
        let mut constant = true;
        for batch in 0..self.samples.batches() {
            let input = self.samples.batch(batch);
            let state = self.enter(&input)?;
            let reference = host::into_vec(self.network.finish_from(0, self.weights, state)?);
            // From the entrance: an embedding may be among what changed.
            let output = host::into_vec(self.network.predict(&weights, &input)?);
            let found = compare(&reference, &output, input.samples()).ok_or_else(|| {
                Error::Options(format!(
                    "the pruned network's output on calibration batch {batch} is not finite"
                ))
            })?;
            effect.add(found);
            let classes = self.network.classes().max(1);
            for row in output.chunks(classes) {
                match &first {
                    Some(first) => constant &= first == row,
                    None => first = Some(row.to_vec()),
                }
            }
        }
        Ok((effect.distortion(kind, self.samples.count()), constant))
    }

    fn enter(&self, input: &nn::Input<'_>) -> Result<State> {
        let state = self.network.enter(self.weights, input)?;
        if state.mode != Mode::Evaluate {
            return Err(Error::Options(
                "the network enters in training mode: batch statistics would change every curve, \
                 measure in evaluation mode"
                    .into(),
            ));
        }
        Ok(state)
    }

    /// Measures every grid point of the layers of one segment, from the state that enters it.
    fn stage(
        &self,
        place: &Place<'_>,
        layers: &[Prunable],
        grids: &[Vec<usize>],
        progress: &report::Progress,
    ) -> Result<Vec<(usize, usize, Effect)>> {
        let tasks: Vec<(usize, usize)> = layers
            .iter()
            .enumerate()
            .filter(|(_, layer)| layer.segment == place.segment)
            .flat_map(|(l, _)| (0..grids.get(l).map_or(0, Vec::len)).map(move |p| (l, p)))
            .collect();
        if tasks.is_empty() {
            return Ok(Vec::new());
        }
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = || -> Result<Vec<(usize, usize, Effect)>> {
            let mut found = Vec::new();
            let mut overlay = Overlay::new(self.weights);
            // Layer in the overlay and how many of its weights are zeroed there.
            let mut current: Option<(usize, usize)> = None;
            while let Some(&(l, p)) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let (Some(layer), Some(grid)) = (layers.get(l), grids.get(l)) else { break };
                let count = grid.get(p).copied().unwrap_or(0);
                let tensor = layer.name.weight();
                let before = match current {
                    Some((at, before)) if at == l => before,
                    _ => {
                        overlay.matrices.clear();
                        let matrix = self.weights.matrix(&layer.name)?;
                        overlay.matrices.insert(tensor.clone(), matrix);
                        0
                    }
                };
                if let Some(matrix) = overlay.matrices.get_mut(&tensor) {
                    let slice = layer.ranking.smallest(count).get(before..).unwrap_or_default();
                    host::write(matrix, |values| {
                        for &i in slice {
                            if let Some(value) = values.get_mut(i as usize) {
                                *value = 0.0;
                            }
                        }
                    });
                }
                current = Some((l, count));
                let output = match place.segment {
                    Some(segment) => {
                        self.network.finish_from(segment, &overlay, place.state.clone())?
                    }
                    None => self.network.predict(&overlay, place.input)?,
                };
                let effect = host::read(&output, |y| compare(place.reference, y, place.samples));
                let effect = effect.ok_or_else(|| {
                    stop.store(true, Ordering::Relaxed);
                    Error::layer(
                        &layer.name.module,
                        format!(
                            "the output is not finite with {count} of its {} weights pruned",
                            layer.total()
                        ),
                    )
                })?;
                found.push((l, p, effect));
                progress.inc(1);
            }
            Ok(found)
        };
        let workers = self.workers.clamp(1, tasks.len());
        if workers == 1 {
            return work();
        }
        // Every worker computes on threads of its own: a thread that waits for a product would
        // otherwise take up another measurement and hold two sets of activations.
        let threads = (rayon::current_num_threads() / workers).max(1);
        let results: Vec<Result<Vec<(usize, usize, Effect)>>> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..workers)
                .map(|_| {
                    scope.spawn(|| {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                        let result = match pool {
                            Ok(pool) => pool.install(work),
                            Err(_) => work(),
                        };
                        if result.is_err() {
                            stop.store(true, Ordering::Relaxed);
                        }
                        result
                    })
                })
                .collect();
            let lost = || Error::Options("a worker of the curve measurement died".into());
            handles.into_iter().map(|h| h.join().unwrap_or_else(|_| Err(lost()))).collect()
        });
        let mut all = Vec::with_capacity(tasks.len());
        for result in results {
            all.extend(result?);
        }
        Ok(all)
    }

    /// What the curves depend on, as a hash: weights, masks, samples, grid. The output on the first
    /// batch stands for the tensors that are no layers (norms, biases, embeddings).
    fn key(&self, layers: &[Prunable], points: usize) -> Result<String> {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        hash.update(format!("strata curves 1\ngrid {points}\nfamily {}\n", self.network.family()));
        self.samples.digest(&mut hash);
        for layer in layers {
            let name = &layer.name;
            let zeros = layer.ranking.zeros();
            hash.update(format!("{} {:?} {zeros}\n", name.module, name.shape));
            host::read(&self.weights.matrix(name)?, |w| hash.update(bytemuck::cast_slice(w)));
            hash.update(bytemuck::cast_slice(layer.ranking.smallest(zeros)));
        }
        let output = self.network.predict(self.weights, &self.samples.batch(0))?;
        host::read(&output, |y| hash.update(bytemuck::cast_slice(y)));
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// The numbers of pruned weights that a layer is measured at: rising, without repetition, without
/// those that change nothing.
fn distinct(layer: &Prunable, points: usize) -> Vec<usize> {
    let mut counts = layer.counts(points);
    counts.dedup();
    counts.retain(|&n| n > layer.ranking.zeros());
    counts
}

/// For every sample the mean over its outputs of the squared difference; their sum and largest.
/// `None` when the output is not finite.
fn compare(reference: &[f32], output: &[f32], samples: usize) -> Option<Effect> {
    if reference.len() != output.len() || samples == 0 {
        return None;
    }
    let size = (reference.len() / samples).max(1);
    let mut effect = Effect::default();
    for (a, b) in reference.chunks(size).zip(output.chunks(size)) {
        let mut sum = 0f64;
        for (a, b) in a.iter().zip(b) {
            let difference = f64::from(*a) - f64::from(*b);
            sum += difference * difference;
        }
        if !sum.is_finite() {
            return None;
        }
        let mean = sum / size as f64;
        effect.add(Effect { sum: mean, largest: mean });
    }
    Some(effect)
}
