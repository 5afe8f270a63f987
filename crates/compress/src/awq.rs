//! AWQ: activation-aware weight quantisation (Lin et al. 2023, arXiv 2306.00978).
//!
//! Input channels that carry large activations are scaled up before rounding and the operator
//! that feeds them is scaled down by the same factor, so that the function stays the same while
//! the rounding error of those channels shrinks. The factor of a channel is `mean|x|^a`, `a` from
//! a grid search against the output of the module that reads it; a second search clips the range
//! of every group. No training.
//!
//! This file is the mathematics on matrices and vectors; `block` applies it to one block of a
//! network. Which layers share a scale is the architecture's table ([`nn::Decoder::mappings`]) or a
//! user's choice from it (`mappings`); `stored` keeps what a search found for later jobs.

use crate::grid::{Grid, Matrix};
use crate::statistics::{TokenSample, quadratic_error};
use crate::{Error, Result};
use rayon::prelude::*;
use tensor::kernels::{Matrix as View, Output, matmul_serial};

mod block;
mod mappings;
mod options;
mod stored;

pub use block::{finish, quantize_block, run_block};
pub use options::{AwqOptions, GqaFold, KeepBy, Objective, RatioGrid, Rounding, Search};
pub use stored::{
    BlockRecord, BlockSearch, ClipRecord, MappingRecord, Prepared, SEARCH_DIRECTORY, SEARCH_FILE,
    contents as search_contents,
};

/// One set of channel scales to be tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The exponent; `None` for the identity.
    pub ratio: Option<f64>,
    /// A positive factor per input channel, `[in]`.
    pub scales: Vec<f32>,
}

/// Share of the channels that a fixed scale is put on (the paper's salient 1 %).
pub const FIXED_SHARE: f64 = 0.01;

/// The channels with the largest scores, `share` of all and at least one, in ascending order; of
/// equal scores the first count.
pub fn largest_channels(scores: &[f32], share: f64) -> Vec<usize> {
    let count = (share * scores.len() as f64).ceil().max(1.0) as usize;
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Norm of every column of `matrix`, `[in]`.
pub fn column_norms(matrix: &Matrix) -> Vec<f32> {
    let mut sums = vec![0f64; matrix.in_features];
    for row in matrix.values.chunks(matrix.in_features) {
        for (sum, &w) in sums.iter_mut().zip(row) {
            *sum += f64::from(w) * f64::from(w);
        }
    }
    sums.iter().map(|sum| sum.sqrt() as f32).collect()
}

/// The candidates of one search, the identity first; with a fixed scale only that one follows.
///
/// `x_mean` is `mean|x|` per channel, `w_mean` the weights' relative magnitude per channel
/// (only `duo` needs it). `tie` reduces scales to those that an architecture can fold.
pub fn candidates(
    x_mean: &[f32],
    w_mean: Option<&[f32]>,
    options: &AwqOptions,
    tie: impl Fn(&mut [f32]),
) -> Vec<Candidate> {
    let mut all = vec![Candidate { ratio: None, scales: vec![1.0; x_mean.len()] }];
    if options.no_scale {
        return all;
    }
    if let Some(factor) = options.fixed_scale {
        let mut scales = vec![1.0; x_mean.len()];
        for channel in largest_channels(x_mean, FIXED_SHARE) {
            scales[channel] = factor;
        }
        tie(&mut scales);
        all.push(Candidate { ratio: None, scales });
        return all;
    }
    let points = options.search_points;
    for k in 0..points {
        let ratio = match options.search_grid {
            RatioGrid::Reference => k as f64 / points as f64,
            RatioGrid::Closed => k as f64 / (points - 1) as f64,
        };
        let mut scales = scales(x_mean, w_mean, options.search, ratio as f32);
        tie(&mut scales);
        all.push(Candidate { ratio: Some(ratio), scales });
    }
    all
}

/// Scales of one exponent, normalised so that `max * min = 1`. Channels without activation keep
/// the factor 1 and stay out of the normalisation.
pub fn scales(x_mean: &[f32], w_mean: Option<&[f32]>, search: Search, ratio: f32) -> Vec<f32> {
    let mut scales: Vec<f32> = match (search, w_mean) {
        (Search::Duo, Some(w_mean)) => x_mean
            .iter()
            .zip(w_mean)
            .map(|(&x, &w)| (x.powf(ratio) / (w.powf(1.0 - ratio) + 1e-4)).max(1e-4))
            .collect(),
        _ => x_mean.iter().map(|&x| x.powf(ratio).max(1e-4)).collect(),
    };
    let (mut low, mut high) = (f32::INFINITY, 0f32);
    for (&scale, _) in scales.iter().zip(x_mean).filter(|(s, x)| **x > 0.0 && s.is_finite()) {
        low = low.min(scale);
        high = high.max(scale);
    }
    let norm = if high > 0.0 { (high * low).sqrt() } else { 1.0 };
    for (scale, &x) in scales.iter_mut().zip(x_mean) {
        *scale /= norm;
        if x <= 0.0 || !scale.is_finite() || *scale <= 0.0 {
            *scale = 1.0;
        }
    }
    scales
}

/// Mean over all output rows of `|w| / (group maximum + 1e-6)`, per input channel (`duo`).
pub fn weight_mean(layers: &[&Matrix], group_size: usize) -> Vec<f32> {
    let width = layers.first().map_or(0, |layer| layer.in_features);
    let mut sums = vec![0f64; width];
    let mut rows = 0usize;
    for layer in layers {
        for row in layer.values.chunks(width) {
            for (sums, group) in sums.chunks_mut(group_size).zip(row.chunks(group_size)) {
                let largest = group.iter().fold(0f32, |m, w| m.max(w.abs())) + 1e-6;
                for (sum, w) in sums.iter_mut().zip(group) {
                    *sum += f64::from(w.abs() / largest);
                }
            }
            rows += 1;
        }
    }
    sums.iter().map(|&sum| (sum / rows.max(1) as f64) as f32).collect()
}

/// `Q(W diag(s)) / diag(s)`: what the layer would compute with if `scales` were folded.
pub fn scaled_fake_quantize(
    matrix: &Matrix,
    scales: &[f32],
    grid: &Grid,
    group_size: usize,
) -> Vec<f32> {
    let mut values = matrix.values.clone();
    values.par_chunks_mut(matrix.in_features).for_each(|row| {
        for (w, s) in row.iter_mut().zip(scales) {
            *w *= s;
        }
        for group in row.chunks_mut(group_size) {
            grid.fake_quantize(group);
        }
        for (w, s) in row.iter_mut().zip(scales) {
            *w /= s;
        }
    });
    values
}

/// The largest magnitude that half precision holds; a scale that pushes a weight beyond it is no
/// candidate.
const F16_MAX: f32 = 65504.0;

/// Whether folding `scales` into `matrix` stays inside half precision.
pub fn fits_half(matrix: &Matrix, scales: &[f32]) -> bool {
    matrix
        .values
        .par_chunks(matrix.in_features)
        .all(|row| row.iter().zip(scales).all(|(w, s)| (w * s).abs() <= F16_MAX))
}

/// Mean squared output error, per token and output, of every candidate for layers that are judged
/// by their own output: `Σ tr((W - Wq) C (W - Wq)ᵀ) / Σ out`, `covariance` = `XᵀX / tokens`.
pub fn linear_losses(
    layers: &[&Matrix],
    candidates: &[Candidate],
    covariance: &[f32],
    grid: &Grid,
    group_size: usize,
) -> Vec<f64> {
    let outputs: usize = layers.iter().map(|layer| layer.out_features).sum();
    candidates
        .iter()
        .map(|candidate| {
            let mut loss = 0.0;
            for layer in layers {
                if !fits_half(layer, &candidate.scales) {
                    return f64::INFINITY;
                }
                let mut difference =
                    scaled_fake_quantize(layer, &candidate.scales, grid, group_size);
                difference
                    .par_chunks_mut(4096)
                    .zip(layer.values.par_chunks(4096))
                    .for_each(|(d, w)| d.iter_mut().zip(w).for_each(|(d, w)| *d = w - *d));
                loss += quadratic_error(&difference, covariance, layer.in_features);
            }
            loss / outputs.max(1) as f64
        })
        .collect()
}

/// The first candidate of the smallest finite loss.
pub fn best(layer: &str, losses: &[f64]) -> Result<usize> {
    let mut best: Option<usize> = None;
    for (i, loss) in losses.iter().enumerate() {
        if loss.is_finite() && best.is_none_or(|b| *loss < losses[b]) {
            best = Some(i);
        }
    }
    best.ok_or_else(|| {
        Error::layer(
            layer,
            "no scale gives a finite loss; the weights or the calibration activations overflow \
             (check the checkpoint for NaN, or shorten the calibration text)",
        )
    })
}

/// Clipping thresholds of every group, `[out, groups]`, and how often each shrink step won.
#[derive(Debug, Clone)]
pub struct Clip {
    /// Largest magnitude kept, per row and group.
    pub limits: Vec<f32>,
    /// How many groups chose step `i` (range shrunk by `i / 20`).
    pub histogram: [u64; CLIP_STEPS],
}

/// Shrink steps of the clipping search: 1, 0.95, ..., 0.55 of the group's largest magnitude.
pub const CLIP_STEPS: usize = 10;

/// Rows of a weight that are searched together; their candidates make one matrix product.
const CLIP_ROWS: usize = 16;

/// Searches the clipping of every group of `matrix` (already scaled) on a sample of its (already
/// scaled) inputs: the threshold with the smallest `Σ_t (x_t · (Q(clamp(w)) - w))²` wins.
pub fn search_clip(matrix: &Matrix, sample: &TokenSample, grid: &Grid, group_size: usize) -> Clip {
    let (out, width) = (matrix.out_features, matrix.in_features);
    let groups = width.div_ceil(group_size);
    let covariances: Vec<Vec<f32>> = (0..groups)
        .into_par_iter()
        .map(|g| group_covariance(sample, g * group_size, group_size.min(width - g * group_size)))
        .collect();
    let mut limits = vec![0f32; out * groups];
    let histograms: Vec<[u64; CLIP_STEPS]> = limits
        .par_chunks_mut(CLIP_ROWS * groups)
        .zip(matrix.values.par_chunks(CLIP_ROWS * width))
        .map(|(limits, values)| clip_rows(values, width, grid, group_size, &covariances, limits))
        .collect();
    let mut histogram = [0u64; CLIP_STEPS];
    for part in &histograms {
        for (total, count) in histogram.iter_mut().zip(part) {
            *total += count;
        }
    }
    Clip { limits, histogram }
}

/// `XᵀX` over the columns `start..start + size` of the sample.
fn group_covariance(sample: &TokenSample, start: usize, size: usize) -> Vec<f32> {
    let tokens = sample.rows().len() / sample.width();
    let mut covariance = vec![0f32; size * size];
    if tokens > 0 {
        let x = &sample.rows()[start..];
        matmul_serial(
            [size, size, tokens],
            View::columns(x, sample.width()),
            View::rows(x, sample.width()),
            1.0,
            Output { data: &mut covariance, row: size, accumulate: false },
        );
    }
    covariance
}

fn clip_rows(
    values: &[f32],
    width: usize,
    grid: &Grid,
    group_size: usize,
    covariances: &[Vec<f32>],
    limits: &mut [f32],
) -> [u64; CLIP_STEPS] {
    let groups = covariances.len();
    let rows = values.len() / width;
    let mut histogram = [0u64; CLIP_STEPS];
    let mut differences = vec![0f32; rows * CLIP_STEPS * group_size];
    let mut products = vec![0f32; rows * CLIP_STEPS * group_size];
    let mut clipped = vec![0f32; group_size];
    for (g, covariance) in covariances.iter().enumerate() {
        let (start, size) = (g * group_size, group_size.min(width - g * group_size));
        let count = rows * CLIP_STEPS;
        for row in 0..rows {
            let group = &values[row * width + start..][..size];
            let largest = group.iter().fold(0f32, |m, w| m.max(w.abs()));
            for step in 0..CLIP_STEPS {
                let limit = clip_limit(largest, step);
                let clipped = &mut clipped[..size];
                for (c, w) in clipped.iter_mut().zip(group) {
                    *c = w.clamp(-limit, limit);
                }
                grid.fake_quantize(clipped);
                let difference = &mut differences[(row * CLIP_STEPS + step) * size..][..size];
                for ((d, c), w) in difference.iter_mut().zip(clipped.iter()).zip(group) {
                    *d = c - w;
                }
            }
        }
        matmul_serial(
            [count, size, size],
            View::rows(&differences[..count * size], size),
            View::rows(covariance, size),
            1.0,
            Output { data: &mut products[..count * size], row: size, accumulate: false },
        );
        for row in 0..rows {
            let mut best = (0usize, f64::INFINITY);
            for step in 0..CLIP_STEPS {
                let at = (row * CLIP_STEPS + step) * size;
                let error: f64 = differences[at..at + size]
                    .iter()
                    .zip(&products[at..at + size])
                    .map(|(&d, &p)| f64::from(d) * f64::from(p))
                    .sum();
                if error < best.1 {
                    best = (step, error);
                }
            }
            histogram[best.0] += 1;
            let group = &values[row * width + start..][..size];
            let largest = group.iter().fold(0f32, |m, w| m.max(w.abs()));
            limits[row * groups + g] = clip_limit(largest, best.0);
        }
    }
    histogram
}

/// Threshold of a shrink step for a group whose largest magnitude is `largest`.
fn clip_limit(largest: f32, step: usize) -> f32 {
    largest * (1.0 - step as f32 / (2 * CLIP_STEPS) as f32)
}

/// Clamps every group of `matrix` to its limit (`[out, groups]`).
pub fn apply_clip(matrix: &mut Matrix, limits: &[f32], group_size: usize) {
    let groups = matrix.in_features.div_ceil(group_size);
    matrix.values.par_chunks_mut(matrix.in_features).zip(limits.par_chunks(groups)).for_each(
        |(row, limits)| {
            for (group, &limit) in row.chunks_mut(group_size).zip(limits) {
                group.iter_mut().for_each(|w| *w = w.clamp(-limit, limit));
            }
        },
    );
}

/// Shares one scale among the query heads that read the same value head. Index of an input of the
/// output projection: `(kv * repeats + r) * head_dim + c`.
pub fn tie_repeats(scales: &mut [f32], kv_heads: usize, head_dim: usize, fold: GqaFold) {
    let repeats = scales.len() / (kv_heads * head_dim).max(1);
    for kv in 0..kv_heads {
        for c in 0..head_dim {
            let index = |r: usize| (kv * repeats + r) * head_dim + c;
            let shared = match fold {
                GqaFold::None => continue,
                GqaFold::Mean => {
                    (0..repeats).map(|r| scales[index(r)]).sum::<f32>() / repeats as f32
                }
                GqaFold::Max => (0..repeats).map(|r| scales[index(r)]).fold(0.0, f32::max),
            };
            (0..repeats).for_each(|r| scales[index(r)] = shared);
        }
    }
}

#[cfg(test)]
mod job_tests;
#[cfg(test)]
mod tests;
