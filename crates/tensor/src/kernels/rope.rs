//! Rotary position embedding over rows of heads.
use rayon::prelude::*;

use super::simd::{scratch, simd};
use crate::ops::RopeTable;

/// Rows of one parallel piece.
const ROWS: usize = 32;

/// Rotates the first `rotary_dim` dimensions of every head of every row by its position's angle,
/// backwards for `inverse` (the gradient of a rotation is the inverse rotation).
pub(crate) fn rotate(
    x: &[f32],
    width: usize,
    head_dim: usize,
    table: &RopeTable,
    positions: &[u32],
    inverse: bool,
) -> Vec<f32> {
    let mut y = scratch(x.len());
    y.par_chunks_mut(width * ROWS)
        .zip(x.par_chunks(width * ROWS))
        .zip(positions.par_chunks(ROWS))
        .for_each(|((y, x), positions)| {
            rotate_rows(x, y, width, head_dim, table, positions, inverse);
        });
    y
}

simd! { fn rotate_rows(
    x: &[f32], y: &mut [f32], width: usize, head_dim: usize,
    table: &RopeTable, positions: &[u32], inverse: bool
) {
    let half = table.rotary_dim() / 2;
    let sign = if inverse { -1.0 } else { 1.0 };
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(positions);
    for ((x, y), &position) in rows {
        let at = position as usize * half;
        let (cos, sin) = (&table.cos()[at..at + half], &table.sin()[at..at + half]);
        for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
            let (x1, rest) = x.split_at(half);
            let (x2, x3) = rest.split_at(half);
            let (y1, rest) = y.split_at_mut(half);
            let (y2, y3) = rest.split_at_mut(half);
            for i in 0..half {
                let s = sin[i] * sign;
                y1[i] = x1[i] * cos[i] - x2[i] * s;
                y2[i] = x2[i] * cos[i] + x1[i] * s;
            }
            y3.copy_from_slice(x3);
        }
    }
} }
