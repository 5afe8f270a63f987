//! Attention on `[tokens, heads * head_dim]` rows, forward: blocks of queries, strided products,
//! grouped heads, window, softcap. Keeps no pattern, only the log-sum-exp of every row.
//!
//! One query (decoding) takes a path of its own, without matrix products. Backward is in
//! [`super::attention_backward`].
use std::ops::Range;

use rayon::prelude::*;

use super::matmul::{Matrix, Shared, product};
use super::simd::{dot, exp, max, scratch, simd, sum, tanh};
use crate::ops::AttentionSpec;

/// Queries of one block: the products are large enough to be fast, the causal waste stays small.
pub(crate) const QUERIES: usize = 64;

/// Strides and places of heads in the rows, shared by forward and backward.
#[derive(Clone, Copy)]
pub(crate) struct Geometry<'a> {
    pub spec: &'a AttentionSpec,
    /// Values from one query row to the next.
    pub row: usize,
    /// Values from one key row to the next.
    pub kv_row: usize,
    /// Query heads for each key head.
    pub group: usize,
}

impl<'a> Geometry<'a> {
    pub fn new(spec: &'a AttentionSpec) -> Self {
        Self {
            spec,
            row: spec.heads * spec.head_dim,
            kv_row: spec.kv_heads * spec.head_dim,
            group: spec.heads / spec.kv_heads,
        }
    }

    /// Where query `query` of head `head` in sequence `sequence` starts.
    pub fn query(&self, sequence: usize, head: usize, query: usize) -> usize {
        (sequence * self.spec.queries + query) * self.row + head * self.spec.head_dim
    }

    /// Where key `key` of key head `head` in sequence `sequence` starts.
    pub fn key(&self, sequence: usize, head: usize, key: usize) -> usize {
        (sequence * self.spec.keys + key) * self.kv_row + head * self.spec.head_dim
    }

    /// Where the log-sum-exp of a row sits.
    pub fn lse(&self, sequence: usize, head: usize, query: usize) -> usize {
        (sequence * self.spec.heads + head) * self.spec.queries + query
    }

    /// The keys that any of these queries sees.
    pub fn span(&self, queries: Range<usize>) -> Range<usize> {
        let last = self.spec.visible(queries.end.saturating_sub(1));
        let first = self.spec.visible(queries.start);
        first.start.min(last.start)..last.end.max(first.end)
    }
}

/// The output `[batch * queries, heads * head_dim]` and the log-sum-exp of every row
/// `[batch, heads, queries]`. A row that sees no key gets 0 and -inf.
pub(crate) fn forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    spec: &AttentionSpec,
) -> (Vec<f32>, Vec<f32>) {
    let mut out = scratch(q.len());
    let mut lse = scratch(spec.batch * spec.heads * spec.queries);
    if out.is_empty() {
        return (out, lse);
    }
    if spec.keys == 0 {
        out.fill(0.0);
        lse.fill(f32::NEG_INFINITY);
        return (out, lse);
    }
    let geometry = Geometry::new(spec);
    let (out_at, lse_at) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    if spec.queries == 1 {
        decode(q, k, v, geometry, out_at, lse_at);
        return (out, lse);
    }
    let blocks = spec.queries.div_ceil(QUERIES);
    let width =
        (0..blocks).map(|block| geometry.span(block_range(spec, block)).len()).max().unwrap_or(0);
    let task = |scores: &mut Vec<f32>, index: usize| {
        let (pair, block) = (index / blocks, index % blocks);
        let (sequence, head) = (pair / spec.heads, pair % spec.heads);
        let queries = block_range(spec, block);
        // SAFETY: tasks write the rows of their own head and queries only.
        unsafe { block_forward(q, k, v, geometry, sequence, head, queries, scores, out_at, lse_at) }
    };
    let tasks = spec.batch * spec.heads * blocks;
    let buffer = || scratch(QUERIES.min(spec.queries) * width);
    (0..tasks).into_par_iter().for_each_init(buffer, task);
    (out, lse)
}

pub(crate) fn block_range(spec: &AttentionSpec, block: usize) -> Range<usize> {
    block * QUERIES..spec.queries.min((block + 1) * QUERIES)
}

/// # Safety
/// Nothing else may touch the output and log-sum-exp rows of this head and these queries.
#[allow(clippy::too_many_arguments)]
unsafe fn block_forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    geometry: Geometry,
    sequence: usize,
    head: usize,
    queries: Range<usize>,
    scores: &mut [f32],
    out: Shared,
    lse: Shared,
) {
    let spec = geometry.spec;
    let (dim, kv_head) = (spec.head_dim, head / geometry.group);
    let keys = geometry.span(queries.clone());
    let (rows, columns) = (queries.len(), keys.len());
    let first = geometry.query(sequence, head, queries.start);
    if columns == 0 {
        for row in 0..rows {
            // SAFETY: rows of this task.
            unsafe { std::slice::from_raw_parts_mut(out.at(first + row * geometry.row), dim) }
                .fill(0.0);
            // SAFETY: as above.
            unsafe {
                *lse.at(geometry.lse(sequence, head, queries.start + row)) = f32::NEG_INFINITY
            };
        }
        return;
    }
    let start = geometry.key(sequence, kv_head, keys.start);
    let q_block = Matrix::rows(&q[first..], geometry.row);
    let k_block = Matrix::columns(&k[start..], geometry.kv_row);
    let v_block = Matrix::rows(&v[start..], geometry.kv_row);
    let scores = &mut scores[..rows * columns];
    let shape = [rows, columns, dim];
    // SAFETY: the scratch holds rows * columns; q and k hold these rows by the caller's check.
    unsafe { product(shape, q_block, k_block, spec.scale, scores.as_mut_ptr(), columns, false) };
    let mut inverse = [0f32; QUERIES];
    for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
        let visible = spec.visible(queries.start + row);
        let visible = visible.start - keys.start..visible.end - keys.start;
        scores[..visible.start].fill(0.0);
        scores[visible.end..].fill(0.0);
        let (total, log) = softmax_row(&mut scores[visible], spec.softcap);
        inverse[row] = if total > 0.0 { 1.0 / total } else { 0.0 };
        // SAFETY: the row of this task.
        unsafe { *lse.at(geometry.lse(sequence, head, queries.start + row)) = log };
    }
    let shape = [rows, dim, columns];
    let pattern = Matrix::rows(scores, columns);
    // SAFETY: rows of this task, `geometry.row` apart.
    unsafe { product(shape, pattern, v_block, 1.0, out.at(first), geometry.row, false) };
    // Dividing head_dim outputs is cheaper than dividing all keys' weights.
    for (row, &factor) in inverse[..rows].iter().enumerate() {
        // SAFETY: as above.
        let out =
            unsafe { std::slice::from_raw_parts_mut(out.at(first + row * geometry.row), dim) };
        for value in out {
            *value *= factor;
        }
    }
}

/// Attention that every key receives, `[batch * keys]`: the column sums of the patterns of all heads
/// and queries. Nothing larger than one block of queries is kept.
pub(crate) fn received(q: &[f32], k: &[f32], spec: &AttentionSpec) -> Vec<f64> {
    let mut sums = vec![0f64; spec.batch * spec.keys];
    if sums.is_empty() || spec.queries == 0 {
        return sums;
    }
    let geometry = Geometry::new(spec);
    let blocks = spec.queries.div_ceil(QUERIES);
    let span = |block: usize| geometry.span(block_range(spec, block));
    let width = (0..blocks).map(|block| span(block).len()).max().unwrap_or(0);
    let task = |buffer: &mut Vec<f32>, index: usize| -> Vec<f64> {
        let (sequence, head) = (index / spec.heads, index % spec.heads);
        let mut received = vec![0f64; spec.keys];
        for block in 0..blocks {
            let queries = block_range(spec, block);
            let keys = span(block);
            let (rows, columns) = (queries.len(), keys.len());
            if columns == 0 {
                continue;
            }
            let first = geometry.query(sequence, head, queries.start);
            let start = geometry.key(sequence, head / geometry.group, keys.start);
            let scores = &mut buffer[..rows * columns];
            let shape = [rows, columns, spec.head_dim];
            let q = Matrix::rows(&q[first..], geometry.row);
            let k = Matrix::columns(&k[start..], geometry.kv_row);
            // SAFETY: the buffer holds rows * columns; q and k hold these rows by the caller's check.
            unsafe { product(shape, q, k, spec.scale, scores.as_mut_ptr(), columns, false) };
            for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
                let visible = spec.visible(queries.start + row);
                let local = visible.start - keys.start..visible.end - keys.start;
                let scores = &mut scores[local];
                let (total, _) = softmax_row(scores, spec.softcap);
                let factor = if total > 0.0 { 1.0 / total } else { 0.0 };
                add_scaled(&mut received[visible], scores, factor);
            }
        }
        received
    };
    let buffer = || scratch(QUERIES.min(spec.queries) * width);
    let heads: Vec<Vec<f64>> =
        (0..spec.batch * spec.heads).into_par_iter().map_init(buffer, task).collect();
    // Heads are added in their order, whichever thread was first.
    for (sums, heads) in sums.chunks_exact_mut(spec.keys).zip(heads.chunks(spec.heads)) {
        for head in heads {
            sums.iter_mut().zip(head).for_each(|(sum, v)| *sum += v);
        }
    }
    sums
}

simd! { fn add_scaled(sums: &mut [f64], values: &[f32], factor: f32) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += f64::from(value * factor);
    }
} }

simd! { /// Replaces scores by `e^(score - max)`; returns their sum and the log-sum-exp.
fn softmax_row(row: &mut [f32], softcap: Option<f32>) -> (f32, f32) {
    if let Some(cap) = softcap {
        let inverse = 1.0 / cap;
        for score in row.iter_mut() {
            *score = cap * tanh(*score * inverse);
        }
    }
    let largest = max(row);
    for score in row.iter_mut() {
        *score = exp(*score - largest);
    }
    let total = sum(row, |x| x);
    (total, largest + total.ln())
} }

/// One query per sequence: dot products with the keys and a weighted sum of the values, each pass
/// reading the cache once for all query heads of a key head.
fn decode(q: &[f32], k: &[f32], v: &[f32], geometry: Geometry, out: Shared, lse: Shared) {
    let spec = geometry.spec;
    let visible = spec.visible(0);
    let task = |index: usize| {
        let (sequence, kv_head) = (index / spec.kv_heads, index % spec.kv_heads);
        let head = kv_head * geometry.group;
        let values = geometry.group * spec.head_dim;
        let first = geometry.query(sequence, head, 0);
        // SAFETY: each task writes the heads of its own group.
        let out = unsafe { std::slice::from_raw_parts_mut(out.at(first), values) };
        // SAFETY: as above; with one query the group's values are next to each other.
        let lse = unsafe {
            std::slice::from_raw_parts_mut(lse.at(geometry.lse(sequence, head, 0)), geometry.group)
        };
        let start = geometry.key(sequence, kv_head, visible.start);
        decode_group(
            &q[first..first + values],
            k.get(start..).unwrap_or(&[]),
            v.get(start..).unwrap_or(&[]),
            geometry.kv_row,
            visible.len(),
            spec.scale,
            spec.softcap,
            out,
            lse,
        );
    };
    let tasks = spec.batch * spec.kv_heads;
    // Waking a thread costs as much as some ten thousand multiplications.
    if tasks > 1 && spec.batch * spec.heads * spec.head_dim * visible.len() > 1 << 15 {
        (0..tasks).into_par_iter().for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}

simd! { fn decode_group(
    q: &[f32], k: &[f32], v: &[f32], kv_row: usize, keys: usize, scale: f32, softcap: Option<f32>,
    out: &mut [f32], lse: &mut [f32]
) {
    let group = lse.len();
    let dim = q.len() / group;
    out.fill(0.0);
    let mut scores = vec![0f32; group * keys];
    for key in 0..keys {
        let k = &k[key * kv_row..][..dim];
        for (head, q) in q.chunks_exact(dim).enumerate() {
            scores[head * keys + key] = dot(q, k) * scale;
        }
    }
    for (head, lse) in lse.iter_mut().enumerate() {
        let row = &mut scores[head * keys..(head + 1) * keys];
        let (total, log) = softmax_row(row, softcap);
        *lse = log;
        let factor = if total > 0.0 { 1.0 / total } else { 0.0 };
        for score in row {
            *score *= factor;
        }
    }
    // Values are added in their order; four keys at a time keep the sums in registers longer.
    let mut key = 0;
    while key < keys {
        let count = (keys - key).min(4);
        for (head, out) in out.chunks_exact_mut(dim).enumerate() {
            let weights = &scores[head * keys + key..][..count];
            if let [a, b, c, d] = *weights {
                let rows = &v[key * kv_row..];
                let (v0, v1) = (&rows[..dim], &rows[kv_row..][..dim]);
                let (v2, v3) = (&rows[2 * kv_row..][..dim], &rows[3 * kv_row..][..dim]);
                for i in 0..dim {
                    out[i] += a * v0[i] + b * v1[i] + (c * v2[i] + d * v3[i]);
                }
            } else {
                for (offset, &weight) in weights.iter().enumerate() {
                    let v = &v[(key + offset) * kv_row..][..dim];
                    for (out, &v) in out.iter_mut().zip(v) {
                        *out += weight * v;
                    }
                }
            }
        }
        key += count;
    }
} }
