//! Batch normalisation (Ioffe & Szegedy 2015) over columns: rows are pixels of all images.
use rayon::prelude::*;

use super::simd::{add_into, scratch, simd};

/// Rows of one parallel piece. Fixed, so that the sums over rows do not depend on the threads.
const ROWS: usize = 512;

/// Mean and biased variance of every column; two passes, so that a large mean costs no digits.
pub(crate) fn moments(x: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = (x.len() / width.max(1)).max(1) as f64;
    let over = |total: Vec<f64>| -> Vec<f32> { total.iter().map(|t| (t / rows) as f32).collect() };
    let mean = over(pieces(x, width, column_sums));
    let centre = &mean;
    let variance = over(pieces(x, width, |x, total| square_sums(x, centre, total)));
    (mean, variance)
}

/// Sums of `piece` over fixed pieces of rows, in order, in f64.
fn pieces(x: &[f32], width: usize, piece: impl Fn(&[f32], &mut [f32]) + Sync) -> Vec<f64> {
    let sums: Vec<Vec<f32>> = x
        .par_chunks(width.max(1) * ROWS)
        .map(|x| {
            let mut total = vec![0.0; width];
            piece(x, &mut total);
            total
        })
        .collect();
    let mut total = vec![0.0f64; width];
    for sum in &sums {
        total.iter_mut().zip(sum).for_each(|(t, s)| *t += f64::from(*s));
    }
    total
}

simd! { fn column_sums(x: &[f32], total: &mut [f32]) {
    for row in x.chunks_exact(total.len()) {
        for (t, x) in total.iter_mut().zip(row) {
            *t += x;
        }
    }
} }

simd! { fn square_sums(x: &[f32], centre: &[f32], total: &mut [f32]) {
    for row in x.chunks_exact(total.len()) {
        for ((t, x), c) in total.iter_mut().zip(row).zip(centre) {
            *t += (x - c) * (x - c);
        }
    }
} }

/// `x scale + shift + residual`, cut at 0 if `relu`.
pub(crate) fn forward(
    x: &[f32],
    scale: &[f32],
    shift: &[f32],
    residual: Option<&[f32]>,
    relu: bool,
) -> Vec<f32> {
    let mut y = scratch(x.len());
    let chunk = scale.len().max(1) * ROWS;
    y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(i, (y, x))| {
        let residual = residual.map(|r| &r[i * chunk..i * chunk + x.len()]);
        affine(x, scale, shift, residual, relu, y);
    });
    y
}

simd! { fn affine(
    x: &[f32], scale: &[f32], shift: &[f32], residual: Option<&[f32]>, relu: bool, y: &mut [f32]
) {
    let width = scale.len();
    let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
    match residual {
        Some(residual) => {
            let rows = x.chunks_exact(width).zip(residual.chunks_exact(width));
            for ((x, residual), y) in rows.zip(y.chunks_exact_mut(width)) {
                let terms = x.iter().zip(scale).zip(shift).zip(residual);
                for ((((x, scale), shift), r), y) in terms.zip(y) {
                    let value = x * scale + shift + r;
                    // A NaN stays one: it must not look like a cut value.
                    *y = if value < floor { floor } else { value };
                }
            }
        }
        None => for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            for (((x, scale), shift), y) in x.iter().zip(scale).zip(shift).zip(y) {
                let value = x * scale + shift;
                *y = if value < floor { floor } else { value };
            }
        },
    }
} }

/// Zeroes the gradient where the result `y` of a cut at 0 is 0.
pub(crate) fn cut(dz: &mut [f32], y: &[f32]) {
    const BLOCK: usize = super::simd::BLOCK;
    dz.par_chunks_mut(BLOCK).zip(y.par_chunks(BLOCK)).for_each(|(dz, y)| cut_block(dz, y));
}

simd! { fn cut_block(dz: &mut [f32], y: &[f32]) {
    for (dz, &y) in dz.iter_mut().zip(y) {
        *dz = if y > 0.0 { *dz } else { 0.0 };
    }
} }

/// What the backward pass knows of the forward one.
pub(crate) struct Backward<'a> {
    pub x: &'a [f32],
    pub gain: &'a [f32],
    pub mean: &'a [f32],
    /// `1 / sqrt(variance + eps)`.
    pub deviation: &'a [f32],
}

impl Backward<'_> {
    /// Gradients of gain and bias: `Σ dz x̂` and `Σ dz`.
    pub fn sums(&self, dz: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let width = self.gain.len();
        let chunk = width.max(1) * ROWS;
        let sums: Vec<(Vec<f32>, Vec<f32>)> = dz
            .par_chunks(chunk)
            .zip(self.x.par_chunks(chunk))
            .map(|(dz, x)| {
                let (mut dgain, mut dbias) = (vec![0.0; width], vec![0.0; width]);
                gradient_sums(dz, x, self.mean, self.deviation, &mut dgain, &mut dbias);
                (dgain, dbias)
            })
            .collect();
        let (mut dgain, mut dbias) = (vec![0.0; width], vec![0.0; width]);
        for (gain, bias) in &sums {
            add_into(&mut dgain, gain);
            add_into(&mut dbias, bias);
        }
        (dgain, dbias)
    }

    /// Gradient of the input. `sums` (those of [`Backward::sums`]) if the statistics are the
    /// batch's own: then `dx = gain / σ (dz - mean(dz) - x̂ mean(dz x̂))`.
    pub fn input(&self, dz: &[f32], sums: Option<(&[f32], &[f32])>) -> Vec<f32> {
        let width = self.gain.len();
        let rows = (dz.len() / width.max(1)).max(1) as f32;
        let factor: Vec<f32> = self.gain.iter().zip(self.deviation).map(|(g, d)| g * d).collect();
        let mut dx = scratch(dz.len());
        let chunk = width.max(1) * ROWS;
        // dx = dz factor + x slope + level, column by column.
        let (mut slope, mut level) = (vec![0.0; width], vec![0.0; width]);
        if let Some((dgain, dbias)) = sums {
            for c in 0..width {
                slope[c] = -factor[c] * self.deviation[c] * dgain[c] / rows;
                level[c] = -factor[c] * dbias[c] / rows - slope[c] * self.mean[c];
            }
        }
        dx.par_chunks_mut(chunk)
            .zip(dz.par_chunks(chunk).zip(self.x.par_chunks(chunk)))
            .for_each(|(dx, (dz, x))| gradient_input(dz, x, &factor, &slope, &level, dx));
        dx
    }
}

simd! { fn gradient_sums(
    dz: &[f32], x: &[f32], mean: &[f32], deviation: &[f32], dgain: &mut [f32], dbias: &mut [f32]
) {
    let width = mean.len();
    for (dz, x) in dz.chunks_exact(width).zip(x.chunks_exact(width)) {
        let columns = dz.iter().zip(x).zip(mean).zip(deviation);
        for ((((dz, x), mean), deviation), (dgain, dbias)) in
            columns.zip(dgain.iter_mut().zip(dbias.iter_mut()))
        {
            *dgain += dz * ((x - mean) * deviation);
            *dbias += dz;
        }
    }
} }

simd! { fn gradient_input(
    dz: &[f32], x: &[f32], factor: &[f32], slope: &[f32], level: &[f32], dx: &mut [f32]
) {
    let width = factor.len();
    let rows = dz.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for ((dz, x), dx) in rows {
        let columns = dz.iter().zip(x).zip(factor).zip(slope).zip(level);
        for (((((dz, x), factor), slope), level), dx) in columns.zip(dx) {
            *dx = dz * factor + x * slope + level;
        }
    }
} }
