//! SparseGPT: prune one input column after the other and let the columns not yet visited make up
//! for it (Frantar and Alistarh 2023, arXiv 2301.00774).
//!
//! With `H = 2 X Xᵀ / sequences` damped and `H⁻¹ = Uᵀ U`, removing weight `w` of column `j` costs
//! `w² / (2 U[j,j]²)`. In every block of columns the cheapest weights *of all rows* are chosen, from
//! weights that earlier blocks have compensated; then GPTQ's sweep sets them to zero column by
//! column, divides what was removed by `U[i,i]` and subtracts it along row `i` of `U`.
//!
//! Rows are independent but for the threshold, so they are kept in chunks, each transposed, and all
//! threads meet once per block of columns: a histogram over all rows finds the threshold without a
//! sort. This file is the mathematics; collecting the Hessian is the runner's business.

use crate::gptq::{Factor, sweep::spread_error};
use crate::grid::Matrix;
use crate::mask::{Count, Mask, Structure, prune_block};
use crate::{Error, Result};
use rayon::prelude::*;
use tensor::kernels::{Matrix as View, Output, matmul_serial};

/// Options of SparseGPT, and of every pass that prunes by it.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct SparseGptOptions {
    /// Damping, as a fraction of the mean of the Hessian's diagonal; ten times as much is tried
    /// when the Hessian cannot be factorised, up to 1
    #[arg(long, default_value_t = 0.01)]
    pub damping: f64,
    /// Input columns pruned between two updates of the rest; the threshold is per block
    #[arg(long, default_value_t = 128)]
    pub block_size: usize,
}

impl Default for SparseGptOptions {
    fn default() -> Self {
        Self { damping: 0.01, block_size: 128 }
    }
}

impl SparseGptOptions {
    /// Refuses options that cannot work.
    pub fn check(&self, structure: Structure) -> Result<()> {
        if self.block_size == 0 {
            return Err(Error::Options("block size must be at least 1; 128 is usual".into()));
        }
        if let Structure::Blocks { of, .. } = structure
            && !self.block_size.is_multiple_of(of)
        {
            return Err(Error::Options(format!(
                "--block-size {} is not a multiple of {of}, so blocks would cut the groups of \
                 --pattern {structure}; 128 is usual",
                self.block_size
            )));
        }
        if !(self.damping > 0.0 && self.damping <= 1.0) {
            return Err(Error::Options(format!(
                "damping = {} must lie in (0, 1]; 0.01 is usual",
                self.damping
            )));
        }
        Ok(())
    }
}

/// What is to be pruned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// Share of weights of every block of columns.
    pub sparsity: f64,
    /// Pattern of the zeros.
    pub structure: Structure,
    /// How the share becomes a number of weights: [`Count::Threshold`] as the reference, or
    /// [`Count::Exact`].
    pub count: Count,
    /// Columns of a block.
    pub block_size: usize,
}

/// A pruned layer and what it cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Pruned {
    /// `[out, in]`: zeros where pruned, compensated weights elsewhere.
    pub values: Vec<f32>,
    /// Where the zeros were put.
    pub mask: Mask,
    /// `Σ (w - q)² / (2 U[i,i]²)`: the error that the method itself expects.
    pub loss: f64,
}

/// Rows processed together by one task; a multiple of the widest vector.
const ROWS: usize = 64;

/// Columns between two updates of the rest of a block: their errors reach it as one product.
const PANEL: usize = 16;

/// Bins of the histogram that finds a threshold: exponent and upper four bits of the mantissa.
const BINS: usize = 1 << 12;

/// Prunes `matrix` (`[out, in]`) under the Hessian that `factor` holds. `importance`, `[out, in]`,
/// receives `w² / U[j,j]²` of the weights as they stand when their block's turn comes.
pub fn prune(
    layer: &str,
    matrix: &Matrix,
    factor: &Factor,
    target: &Target,
    importance: Option<&mut [f32]>,
) -> Result<Pruned> {
    let (out, width) = (matrix.out_features, matrix.in_features);
    let upper = factor.upper();
    factor.check_width(layer, width)?;
    target.structure.check(layer, width)?;
    let nothing = target.structure == Structure::Unstructured && target.sparsity <= 0.0;
    let mut chunks: Vec<Chunk> = matrix
        .values
        .par_chunks(ROWS * width)
        .map(|values| Chunk::new(values, width, importance.is_some()))
        .collect();
    if !nothing {
        // Weights of inputs that are never excited cost nothing; their scores become 0.
        chunks.par_iter_mut().for_each(|chunk| chunk.clear(factor.dead()));
    }
    let mut start = 0;
    while start < width {
        let end = (start + target.block_size).min(width);
        if importance.is_some() || target.structure == Structure::Unstructured {
            chunks.par_iter_mut().for_each(|chunk| chunk.score(start, end, upper, width));
            if let Some(bad) = chunks.iter().position(|c| c.scores.iter().any(|s| !s.is_finite())) {
                return Err(Error::layer(
                    layer,
                    format!(
                        "the compensated weights of rows {} and on overflow at input {start}; \
                         raise --damping or use more calibration text",
                        bad * ROWS
                    ),
                ));
            }
        }
        if target.structure == Structure::Unstructured {
            let count = target.count.of(out * (end - start), target.sparsity);
            choose(&mut chunks, count, start, end - start);
        }
        if !nothing {
            // Even subtracting zeros would turn -0 into 0.
            let structure = target.structure;
            chunks.par_iter_mut().for_each(|c| c.sweep(start, end, upper, width, structure));
        }
        start = end;
    }
    if let Some(importance) = importance {
        let rows = importance.par_chunks_mut(ROWS * width).zip(&chunks);
        rows.for_each(|(target, chunk)| transpose(&chunk.importance, chunk.rows, target));
    }
    let mut values = vec![0f32; out * width];
    let mut mask = Mask::keep_all([out, width]);
    values
        .par_chunks_mut(ROWS * width)
        .zip(mask.pruned.par_chunks_mut(ROWS * width))
        .zip(&chunks)
        .for_each(|((values, pruned), chunk)| {
            transpose(&chunk.work, chunk.rows, values);
            transpose(&chunk.pruned, chunk.rows, pruned);
        });
    let loss = chunks.iter().map(|chunk| chunk.loss).sum::<f64>() / 2.0;
    Ok(Pruned { values, mask, loss })
}

/// A few rows of the layer, transposed: column after column, `rows` values each.
struct Chunk {
    rows: usize,
    /// Weights, `[in, rows]`.
    work: Vec<f32>,
    /// What is pruned, `[in, rows]`.
    pruned: Vec<bool>,
    /// `w² / U²` of all columns seen so far, `[in, rows]`; empty unless wanted.
    importance: Vec<f32>,
    /// Scores of the current block, `[block, rows]`.
    scores: Vec<f32>,
    /// `(w - q) / U[i,i]` of the current block, `[block, rows]`.
    errors: Vec<f32>,
    /// How many scores of the current block lie in each bin.
    histogram: Vec<u32>,
    loss: f64,
}

impl Chunk {
    fn new(values: &[f32], width: usize, importance: bool) -> Self {
        let rows = values.len() / width;
        let mut work = vec![0f32; values.len()];
        transpose(values, width, &mut work);
        Self {
            rows,
            pruned: vec![false; work.len()],
            importance: if importance { vec![0.0; work.len()] } else { Vec::new() },
            work,
            scores: Vec::new(),
            errors: Vec::new(),
            histogram: vec![0; BINS],
            loss: 0.0,
        }
    }

    fn clear(&mut self, columns: &[usize]) {
        for &column in columns {
            self.work[column * self.rows..(column + 1) * self.rows].fill(0.0);
        }
    }

    /// Scores of the columns `start..end`, and their histogram.
    fn score(&mut self, start: usize, end: usize, upper: &[f32], width: usize) {
        let rows = self.rows;
        self.scores.resize((end - start) * rows, 0.0);
        for (at, scores) in (start..end).zip(self.scores.chunks_exact_mut(rows)) {
            let diagonal = upper[at * width + at];
            score_column(&self.work[at * rows..(at + 1) * rows], diagonal * diagonal, scores);
        }
        if !self.importance.is_empty() {
            self.importance[start * rows..end * rows].copy_from_slice(&self.scores);
        }
        self.histogram.fill(0);
        for score in &self.scores {
            self.histogram[bin(*score)] += 1;
        }
    }

    /// Prunes the columns `start..end` and carries their errors to the right.
    fn sweep(
        &mut self,
        start: usize,
        end: usize,
        upper: &[f32],
        width: usize,
        structure: Structure,
    ) {
        let rows = self.rows;
        self.errors.resize((end - start) * rows, 0.0);
        let mut panel = start;
        while panel < end {
            let panel_end = (panel + panel_width(structure)).min(end);
            for at in panel..panel_end {
                if let Structure::Blocks { keep, of } = structure
                    && (at - start).is_multiple_of(of)
                {
                    self.choose_block(at, of, of - keep, upper, width);
                }
                let diagonal = upper[at * width + at];
                let (head, tail) = self.work.split_at_mut((at + 1) * rows);
                let current = &mut head[at * rows..];
                let error = &mut self.errors[(at - start) * rows..(at - start + 1) * rows];
                let pruned = &self.pruned[at * rows..(at + 1) * rows];
                self.loss += prune_column(current, pruned, diagonal, error);
                let upper = &upper[at * width + at + 1..at * width + panel_end];
                spread_error(&mut tail[..upper.len() * rows], error, upper);
            }
            // The rest of the block sees a panel's errors as one product.
            let errors = &self.errors[(panel - start) * rows..(panel_end - start) * rows];
            carry(&mut self.work, errors, rows, upper, width, panel..panel_end, end);
            panel = panel_end;
        }
        let errors = &self.errors[..(end - start) * rows];
        carry_from(&mut self.work, errors, rows, upper, width, start..end, end..width);
    }

    /// Chooses in every row the `count` cheapest of the `of` columns from `at` on.
    fn choose_block(&mut self, at: usize, of: usize, count: usize, upper: &[f32], width: usize) {
        let rows = self.rows;
        let mut scores = vec![0f32; of];
        let mut pruned = vec![false; of];
        for row in 0..rows {
            for (i, score) in scores.iter_mut().enumerate() {
                let (w, d) = (self.work[(at + i) * rows + row], upper[(at + i) * (width + 1)]);
                *score = w * w / (d * d);
            }
            pruned.fill(false);
            prune_block(&scores, count, &mut pruned);
            for (i, &pruned) in pruned.iter().enumerate() {
                self.pruned[(at + i) * rows + row] = pruned;
            }
        }
    }
}

/// Columns between two products inside a block. Patterns choose from compensated weights, so their
/// groups must not be cut.
fn panel_width(structure: Structure) -> usize {
    match structure {
        Structure::Unstructured => PANEL,
        Structure::Blocks { of, .. } => PANEL.next_multiple_of(of),
    }
}

/// `work[panel.end..end, :] -= U[panel, panel.end..end]ᵀ errors`.
fn carry(
    work: &mut [f32],
    errors: &[f32],
    rows: usize,
    upper: &[f32],
    width: usize,
    panel: std::ops::Range<usize>,
    end: usize,
) {
    let rest = panel.end..end;
    carry_from(work, errors, rows, upper, width, panel, rest);
}

/// `work[rest, :] -= U[columns, rest]ᵀ errors` for errors `[columns, rows]`.
fn carry_from(
    work: &mut [f32],
    errors: &[f32],
    rows: usize,
    upper: &[f32],
    width: usize,
    columns: std::ops::Range<usize>,
    rest: std::ops::Range<usize>,
) {
    if rest.is_empty() {
        return;
    }
    matmul_serial(
        [rest.len(), rows, columns.len()],
        View::columns(&upper[columns.start * width + rest.start..], width),
        View::rows(errors, rows),
        -1.0,
        Output { data: &mut work[rest.start * rows..], row: rows, accumulate: true },
    );
}

/// The bin of a score that is not negative.
#[inline]
fn bin(score: f32) -> usize {
    // `+ 0.0` turns -0 into 0. The sign bit is 0, so the bin is below 2^12.
    ((score + 0.0).to_bits() >> 19) as usize & (BINS - 1)
}

/// Marks the `count` smallest scores of a block over all chunks, the first in row-major order of
/// equal ones.
fn choose(chunks: &mut [Chunk], count: usize, start: usize, columns: usize) {
    if count == 0 {
        return;
    }
    let mut before = 0usize;
    let mut found = BINS - 1;
    for bin in 0..BINS {
        let here: usize = chunks.iter().map(|chunk| chunk.histogram[bin] as usize).sum();
        if before + here >= count {
            found = bin;
            break;
        }
        before += here;
    }
    // Only the scores of one bin, a 16th of an octave, are looked at one by one.
    let mut candidates: Vec<f32> = chunks
        .par_iter()
        .flat_map_iter(|chunk| chunk.scores.iter().copied().filter(|s| bin(*s) == found))
        .collect();
    let place = (count - before - 1).min(candidates.len().saturating_sub(1));
    if candidates.is_empty() {
        return;
    }
    let threshold = *candidates.select_nth_unstable_by(place, f32::total_cmp).1;
    let below = before + candidates.iter().filter(|s| **s < threshold).count();
    let equal = candidates.iter().filter(|s| **s == threshold).count();
    let all = below + equal == count;
    chunks.par_iter_mut().for_each(|chunk| {
        let range = start * chunk.rows..(start + columns) * chunk.rows;
        for (pruned, score) in chunk.pruned[range].iter_mut().zip(&chunk.scores) {
            *pruned = *score < threshold || (all && *score == threshold);
        }
    });
    if all {
        return;
    }
    let mut ties = count - below;
    for chunk in chunks {
        for row in 0..chunk.rows {
            for column in 0..columns {
                if ties > 0 && chunk.scores[column * chunk.rows + row] == threshold {
                    chunk.pruned[(start + column) * chunk.rows + row] = true;
                    ties -= 1;
                }
            }
        }
    }
}

/// `target[j, i] = source[i, j]` for a source of rows of `width` values.
fn transpose<T: Copy>(source: &[T], width: usize, target: &mut [T]) {
    let height = source.len() / width.max(1);
    // Blocks keep both sides in the cache.
    const SIDE: usize = 16;
    for top in (0..height).step_by(SIDE) {
        for left in (0..width).step_by(SIDE) {
            for i in top..(top + SIDE).min(height) {
                for j in left..(left + SIDE).min(width) {
                    target[j * height + i] = source[i * width + j];
                }
            }
        }
    }
}

tensor::simd! {
    /// `scores = w² / square`.
    fn score_column(column: &[f32], square: f32, scores: &mut [f32]) {
        for (score, &w) in scores.iter_mut().zip(column) {
            *score = w * w / square;
        }
    }
}

tensor::simd! {
    /// Sets pruned weights of one column to zero, writes `error = (w - q) / diagonal`; returns
    /// `Σ error²`.
    fn prune_column(current: &mut [f32], pruned: &[bool], diagonal: f32, error: &mut [f32]) -> f64 {
        let n = current.len();
        let (pruned, error) = (&pruned[..n], &mut error[..n]);
        let mut sum = 0f64;
        for i in 0..n {
            let w = current[i];
            let removed = if pruned[i] { w } else { 0.0 };
            error[i] = removed / diagonal;
            current[i] = if pruned[i] { 0.0 } else { w };
        }
        for &e in error.iter() {
            sum += f64::from(e) * f64::from(e);
        }
        sum
    }
}

#[cfg(test)]
mod tests;
