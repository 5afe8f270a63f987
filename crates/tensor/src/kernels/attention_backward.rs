//! Attention backward: probabilities are computed again from the stored log-sum-exp, block of
//! queries by block of queries, and every key head is one task that owns its gradients.
use std::ops::Range;

use rayon::prelude::*;

use super::attention::{Geometry, QUERIES, block_range};
use super::matmul::{Matrix, Shared, product};
use super::simd::{dot, exp, scratch, simd, tanh};
use crate::ops::AttentionSpec;

/// What the forward pass read and left.
#[derive(Clone, Copy)]
pub(crate) struct Forward<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub out: &'a [f32],
    pub lse: &'a [f32],
}

/// Gradients of queries, keys and values, each only if asked for.
pub(crate) fn backward(
    forward: Forward,
    dout: &[f32],
    spec: &AttentionSpec,
    [want_q, want_k, want_v]: [bool; 3],
) -> [Option<Vec<f32>>; 3] {
    let mut dq = scratch(if want_q { forward.q.len() } else { 0 });
    let mut dk = scratch(if want_k { forward.k.len() } else { 0 });
    let mut dv = scratch(if want_v { forward.v.len() } else { 0 });
    let geometry = Geometry::new(spec);
    let blocks = spec.queries.div_ceil(QUERIES);
    let width =
        (0..blocks).map(|block| geometry.span(block_range(spec, block)).len()).max().unwrap_or(0);
    let pass = Pass {
        forward,
        dout,
        geometry,
        dq: want_q.then_some(Shared(dq.as_mut_ptr())),
        dk: want_k.then_some(Shared(dk.as_mut_ptr())),
        dv: want_v.then_some(Shared(dv.as_mut_ptr())),
    };
    let rows = QUERIES.min(spec.queries);
    (0..spec.batch * spec.kv_heads).into_par_iter().for_each_init(
        || (scratch(rows * width), scratch(rows * width)),
        |(pattern, slopes), index| {
            let (sequence, kv_head) = (index / spec.kv_heads, index % spec.kv_heads);
            pass.clear(sequence, kv_head);
            for head in kv_head * geometry.group..(kv_head + 1) * geometry.group {
                for block in 0..blocks {
                    let queries = block_range(spec, block);
                    // SAFETY: a task owns the gradients of its key head and of the query heads
                    // that read it.
                    unsafe { pass.block(sequence, head, queries, pattern, slopes) };
                }
            }
        },
    );
    [want_q.then_some(dq), want_k.then_some(dk), want_v.then_some(dv)]
}

#[derive(Clone, Copy)]
struct Pass<'a> {
    forward: Forward<'a>,
    dout: &'a [f32],
    geometry: Geometry<'a>,
    dq: Option<Shared>,
    dk: Option<Shared>,
    dv: Option<Shared>,
}

impl Pass<'_> {
    /// Zeroes the gradients of one key head, which the blocks add to.
    fn clear(&self, sequence: usize, kv_head: usize) {
        let spec = self.geometry.spec;
        for target in [self.dk, self.dv].into_iter().flatten() {
            for key in 0..spec.keys {
                let at = target.at(self.geometry.key(sequence, kv_head, key));
                // SAFETY: a row of this task's key head.
                unsafe { std::slice::from_raw_parts_mut(at, spec.head_dim) }.fill(0.0);
            }
        }
    }

    /// # Safety
    /// Nothing else may touch the gradients of this head's block of queries nor those of its keys.
    unsafe fn block(
        &self,
        sequence: usize,
        head: usize,
        queries: Range<usize>,
        pattern: &mut [f32],
        slopes: &mut [f32],
    ) {
        let (geometry, spec) = (self.geometry, self.geometry.spec);
        let (dim, row, kv_row) = (spec.head_dim, geometry.row, geometry.kv_row);
        let keys = geometry.span(queries.clone());
        let (rows, columns) = (queries.len(), keys.len());
        let first = geometry.query(sequence, head, queries.start);
        if columns == 0 {
            if let Some(dq) = self.dq {
                for query in 0..rows {
                    // SAFETY: a row of this block.
                    unsafe { std::slice::from_raw_parts_mut(dq.at(first + query * row), dim) }
                        .fill(0.0);
                }
            }
            return;
        }
        let start = geometry.key(sequence, head / geometry.group, keys.start);
        let Forward { q, k, v, out, lse } = self.forward;
        let (pattern, slopes) = (&mut pattern[..rows * columns], &mut slopes[..rows * columns]);
        let inner = [rows, columns, dim];
        let q_rows = Matrix::rows(&q[first..], row);
        let dout_rows = Matrix::rows(&self.dout[first..], row);
        let k_columns = Matrix::columns(&k[start..], kv_row);
        let v_columns = Matrix::columns(&v[start..], kv_row);
        let (pattern_at, slopes_at) = (pattern.as_mut_ptr(), slopes.as_mut_ptr());
        // SAFETY: both scratch matrices hold rows * columns.
        unsafe {
            product(inner, q_rows, k_columns, spec.scale, pattern_at, columns, false);
            product(inner, dout_rows, v_columns, 1.0, slopes_at, columns, false);
        }
        let both = pattern.chunks_exact_mut(columns).zip(slopes.chunks_exact_mut(columns));
        for (query, (pattern, slopes)) in both.enumerate() {
            let visible = spec.visible(queries.start + query);
            let visible = visible.start - keys.start..visible.end - keys.start;
            for side in [0..visible.start, visible.end..columns] {
                pattern[side.clone()].fill(0.0);
                slopes[side].fill(0.0);
            }
            let at = first + query * row;
            slopes_row(
                &mut pattern[visible.clone()],
                &mut slopes[visible],
                &out[at..at + dim],
                &self.dout[at..at + dim],
                lse[geometry.lse(sequence, head, queries.start + query)],
                spec.scale,
                spec.softcap,
            );
        }
        let slopes_rows = Matrix::rows(slopes, columns);
        let outer = [columns, dim, rows];
        if let Some(dv) = self.dv {
            let transposed = Matrix::columns(pattern, columns);
            // SAFETY: rows of this task's key head, `kv_row` apart.
            unsafe { product(outer, transposed, dout_rows, 1.0, dv.at(start), kv_row, true) };
        }
        if let Some(dq) = self.dq {
            let k_rows = Matrix::rows(&k[start..], kv_row);
            // SAFETY: rows of this block, `row` apart.
            unsafe {
                let shape = [rows, dim, columns];
                product(shape, slopes_rows, k_rows, 1.0, dq.at(first), row, false);
            }
        }
        if let Some(dk) = self.dk {
            let transposed = Matrix::columns(slopes, columns);
            // SAFETY: as for dv.
            unsafe { product(outer, transposed, q_rows, 1.0, dk.at(start), kv_row, true) };
        }
    }
}

simd! { /// Turns scores into probabilities, and `dout · v` into gradients of `q · k`.
fn slopes_row(
    pattern: &mut [f32], slopes: &mut [f32], out: &[f32], dout: &[f32],
    lse: f32, scale: f32, softcap: Option<f32>
) {
    // Σ_j p_j dp_j = dout · out, known without the row.
    let level = dot(out, dout);
    match softcap {
        None => for (p, slope) in pattern.iter_mut().zip(slopes) {
            *p = exp(*p - lse);
            *slope = *p * (*slope - level) * scale;
        },
        Some(cap) => {
            let inverse = 1.0 / cap;
            for (p, slope) in pattern.iter_mut().zip(slopes) {
                let t = tanh(*p * inverse);
                *p = exp(cap * t - lse);
                *slope = *p * (*slope - level) * scale * (1.0 - t * t);
            }
        }
    }
} }
