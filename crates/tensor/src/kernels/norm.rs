//! RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) over rows.
use rayon::prelude::*;

use super::simd::{add_into, dot, scratch, simd, sum, sum3};

/// Rows of one parallel piece. Fixed, so that the sums over rows do not depend on the threads.
const ROWS: usize = 32;

/// Gradients of a norm, each only if asked for.
pub(crate) struct NormGradients {
    pub x: Option<Vec<f32>>,
    pub gain: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
}

/// Which gradients are asked for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub x: bool,
    pub gain: bool,
    pub bias: bool,
}

/// The normalised rows, and `1 / rms` of every row.
pub(crate) fn rms_forward(x: &[f32], gain: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let width = gain.len();
    let (mut y, mut scale) = (scratch(x.len()), scratch(x.len() / width));
    y.par_chunks_mut(width * ROWS)
        .zip(x.par_chunks(width * ROWS))
        .zip(scale.par_chunks_mut(ROWS))
        .for_each(|((y, x), scale)| rms_rows(x, gain, eps, y, scale));
    (y, scale)
}

simd! { fn rms_rows(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32], scale: &mut [f32]) {
    let width = gain.len();
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(scale);
    for ((x, y), scale) in rows {
        let factor = 1.0 / (sum(x, |x| x * x) / width as f32 + eps).sqrt();
        for ((y, &x), &gain) in y.iter_mut().zip(x).zip(gain) {
            *y = x * factor * gain;
        }
        *scale = factor;
    }
} }

pub(crate) fn rms_backward(
    x: &[f32],
    gain: &[f32],
    scale: &[f32],
    dy: &[f32],
    wanted: Wanted,
) -> NormGradients {
    backward(x, gain, &[], scale, dy, wanted)
}

/// The normalised rows, and the mean and `1 / deviation` of every row.
pub(crate) fn layer_forward(
    x: &[f32],
    gain: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let width = gain.len();
    let rows = x.len() / width;
    let (mut y, mut mean, mut scale) = (scratch(x.len()), scratch(rows), scratch(rows));
    y.par_chunks_mut(width * ROWS)
        .zip(x.par_chunks(width * ROWS))
        .zip(mean.par_chunks_mut(ROWS).zip(scale.par_chunks_mut(ROWS)))
        .for_each(|((y, x), (mean, scale))| layer_rows(x, gain, bias, eps, y, mean, scale));
    (y, mean, scale)
}

simd! { fn layer_rows(
    x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32,
    y: &mut [f32], mean: &mut [f32], scale: &mut [f32]
) {
    let width = gain.len();
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(mean.iter_mut().zip(scale));
    for ((x, y), (mean, scale)) in rows {
        let centre = sum(x, |x| x) / width as f32;
        let variance = sum(x, |x| (x - centre) * (x - centre)) / width as f32;
        let factor = 1.0 / (variance + eps).sqrt();
        match bias {
            Some(bias) => for (((y, &x), &gain), &bias) in y.iter_mut().zip(x).zip(gain).zip(bias) {
                *y = (x - centre) * factor * gain + bias;
            },
            None => for ((y, &x), &gain) in y.iter_mut().zip(x).zip(gain) {
                *y = (x - centre) * factor * gain;
            },
        }
        *mean = centre;
        *scale = factor;
    }
} }

pub(crate) fn layer_backward(
    x: &[f32],
    gain: &[f32],
    mean: &[f32],
    scale: &[f32],
    dy: &[f32],
    wanted: Wanted,
) -> NormGradients {
    backward(x, gain, mean, scale, dy, wanted)
}

/// Both norms backward; RMSNorm is the case without means.
fn backward(
    x: &[f32],
    gain: &[f32],
    mean: &[f32],
    scale: &[f32],
    dy: &[f32],
    wanted: Wanted,
) -> NormGradients {
    let width = gain.len();
    let mut dx = if wanted.x { scratch(x.len()) } else { Vec::new() };
    let mut pieces: Vec<Option<&mut [f32]>> = if wanted.x {
        dx.chunks_mut(width * ROWS).map(Some).collect()
    } else {
        (0..scale.len().div_ceil(ROWS)).map(|_| None).collect()
    };
    let (dgains, dbiases): (Vec<Vec<f32>>, Vec<Vec<f32>>) = pieces
        .par_iter_mut()
        .enumerate()
        .map(|(piece, dx)| {
            let rows = piece * ROWS..scale.len().min((piece + 1) * ROWS);
            let values = rows.start * width..rows.end * width;
            let mut dgain = vec![0.0; if wanted.gain { width } else { 0 }];
            let mut dbias = vec![0.0; if wanted.bias { width } else { 0 }];
            let mean = mean.get(rows.clone()).unwrap_or(&[]);
            backward_rows(
                &x[values.clone()],
                gain,
                mean,
                &scale[rows],
                &dy[values],
                dx.as_deref_mut(),
                &mut dgain,
                &mut dbias,
            );
            (dgain, dbias)
        })
        .unzip();
    // In the order of the pieces, so that the bytes do not depend on who was first.
    let total = |pieces: &[Vec<f32>]| {
        let mut total = vec![0.0; width];
        for piece in pieces {
            add_into(&mut total, piece);
        }
        total
    };
    NormGradients {
        gain: wanted.gain.then(|| total(&dgains)),
        bias: wanted.bias.then(|| total(&dbiases)),
        x: wanted.x.then_some(dx),
    }
}

simd! { fn backward_rows(
    x: &[f32], gain: &[f32], mean: &[f32], scale: &[f32], dy: &[f32],
    dx: Option<&mut [f32]>, dgain: &mut [f32], dbias: &mut [f32]
) {
    let width = gain.len();
    let mut dx = dx;
    for (row, &factor) in scale.iter().enumerate() {
        let span = row * width..(row + 1) * width;
        let (x, dy) = (&x[span.clone()], &dy[span.clone()]);
        let centre = mean.get(row).copied().unwrap_or(0.0);
        if let Some(dx) = dx.as_deref_mut() {
            let dx = &mut dx[span];
            // With x̂ = (x - mean) * factor and a = dy * gain:
            // dx = factor * (a - mean(a) - x̂ * mean(a x̂)); RMSNorm has no mean to subtract.
            let along =
                sum3(x, dy, gain, |x, dy, gain| dy * gain * (x - centre)) * factor / width as f32;
            let level = if mean.is_empty() {
                0.0
            } else {
                dot(dy, gain) / width as f32
            };
            for (((dx, &x), &dy), &gain) in dx.iter_mut().zip(x).zip(dy).zip(gain) {
                *dx = factor * (dy * gain - level - (x - centre) * factor * along);
            }
        }
        if dgain.len() == dbias.len() {
            for (((dgain, dbias), &x), &dy) in dgain.iter_mut().zip(&mut *dbias).zip(x).zip(dy) {
                *dgain += dy * (x - centre) * factor;
                *dbias += dy;
            }
            continue;
        }
        for ((dgain, &x), &dy) in dgain.iter_mut().zip(x).zip(dy) {
            *dgain += dy * (x - centre) * factor;
        }
        for (dbias, &dy) in dbias.iter_mut().zip(dy) {
            *dbias += dy;
        }
    }
} }
