//! Products of activations with weights `[out, in]` in f32, f16 or bf16: y = x Wᵀ + b.
//!
//! One to sixteen rows of x (decoding) take a path that streams every weight once from memory and
//! converts it in registers. More rows convert panels of the weights to f32 and multiply them with
//! the same register tiles, which need no packing, or with `gemm`, where its packing pays. All are
//! parallel over the outputs; every output is summed in an order that does not depend on the number
//! of threads. Quantised weights are in [`crate::lowbit`]; tensors with gradients are in
//! [`crate::ops`].

pub(crate) mod simd;

use half::{bf16, f16};
use rayon::prelude::*;
use simd::{Isa, Lane};
use std::cell::Cell;
use std::ops::Range;

/// Up to this many rows of x the weights are streamed through registers.
pub const SKINNY_ROWS: usize = 16;

/// Up to this many rows the register tiles beat `gemm`, which repacks the weights on every call.
const TILE_ROWS: usize = 1024;
/// Numbers in a panel of weights that stays in the second-level cache for all rows: 512 KiB.
const TILE_PANEL: usize = 1 << 17;

/// Work worth handing to another thread, in nanoseconds.
const TASK_NS: usize = 12_000;
/// Rough bytes of weights that one thread streams in a nanosecond.
const BYTES_PER_NS: usize = 12;
/// Rough multiply-adds of one thread in a nanosecond.
const MACS_PER_NS: usize = 24;
/// Numbers in the f32 copy of one panel of weights: 2 MiB, of which gemm makes good use.
const PANEL: usize = 1 << 19;

thread_local! {
    /// Reused memory for converted weights; taken out while in use.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `f` with a scratch of `len` numbers of any content that belongs to this thread and starts at
/// a multiple of 64 bytes.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.take();
    if buffer.len() < len + 16 {
        buffer.resize(len + 16, 0.0);
    }
    let start = buffer.as_ptr().align_offset(64).min(16);
    let result = f(&mut buffer[start..start + len]);
    SCRATCH.set(buffer);
    result
}

/// Numbers that start at a multiple of 64 bytes, so that no 512-bit load crosses a cache line.
pub(crate) struct Aligned {
    memory: Vec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn zeroed(len: usize) -> Self {
        let memory = vec![0.0f32; len + 16];
        let start = memory.as_ptr().align_offset(64).min(16);
        Self { memory, start, len }
    }

    /// A copy of `x`, which is aligned only by chance.
    fn copy(x: &[f32]) -> Self {
        let mut copy = Self::zeroed(x.len());
        copy.as_mut_slice().copy_from_slice(x);
        copy
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// The output `[rows, out]`, of which tasks write disjoint columns.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    pointer: *mut f32,
    out: usize,
}

// SAFETY: every task writes only the columns of its own range (see `for_outputs`).
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    pub(crate) fn new(y: &mut [f32], rows: usize, out: usize) -> Self {
        assert_eq!(
            Some(y.len()),
            rows.checked_mul(out),
            "y must hold [rows, out] = [{rows}, {out}]"
        );
        Self { pointer: y.as_mut_ptr(), out }
    }

    /// # Safety
    /// `row` and `column` must lie in the matrix, and no other thread may touch the place.
    #[inline(always)]
    pub(crate) unsafe fn set(self, row: usize, column: usize, value: f32) {
        // SAFETY: in bounds by the contract above.
        unsafe { *self.pointer.add(row * self.out + column) = value }
    }

    /// # Safety
    /// As for [`Output::set`], for all rows of the column range that the caller then touches.
    unsafe fn at(self, column: usize) -> *mut f32 {
        // SAFETY: in bounds by the contract above.
        unsafe { self.pointer.add(column) }
    }
}

/// Calls `task` with ranges that cover `0..out` once, in parallel when the work is worth it. Ranges
/// start at multiples of 4.
pub(crate) fn for_outputs(out: usize, ns_per_output: usize, task: impl Fn(Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    let total = out.saturating_mul(ns_per_output.max(1));
    let tasks = (total / TASK_NS).clamp(1, threads * 4);
    if tasks <= 1 || threads <= 1 {
        task(0..out);
        return;
    }
    let chunk = out.div_ceil(tasks).next_multiple_of(4);
    (0..out.div_ceil(chunk))
        .into_par_iter()
        .with_max_len(1)
        .for_each(|i| task(i * chunk..((i + 1) * chunk).min(out)));
}

/// y = x Wᵀ + b for f32 weights.
///
/// `x`: `[rows, inputs]`, `w`: `[out, inputs]`, `bias`: `[out]`, `y`: `[rows, out]`; all row-major.
///
/// # Panics
/// When a length does not fit.
pub fn linear_f32(
    x: &[f32],
    rows: usize,
    w: &[f32],
    out: usize,
    inputs: usize,
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    linear(Isa::detect(), x, rows, w, [out, inputs], bias, y);
}

/// y = x Wᵀ + b for f16 weights; they are converted exactly, sums are f32. Shapes and panics as for
/// [`linear_f32`].
pub fn linear_f16(
    x: &[f32],
    rows: usize,
    w: &[f16],
    out: usize,
    inputs: usize,
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    linear(Isa::detect(), x, rows, w, [out, inputs], bias, y);
}

/// y = x Wᵀ + b for bf16 weights; they are converted exactly, sums are f32. Shapes and panics as for
/// [`linear_f32`].
pub fn linear_bf16(
    x: &[f32],
    rows: usize,
    w: &[bf16],
    out: usize,
    inputs: usize,
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    linear(Isa::detect(), x, rows, w, [out, inputs], bias, y);
}

/// Converts f16 to f32 (exact). `from` and `to` must be of one length.
pub fn widen_f16(from: &[f16], to: &mut [f32]) {
    simd::widen(Isa::detect(), from, to);
}

/// Converts bf16 to f32 (exact). `from` and `to` must be of one length.
pub fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    simd::widen(Isa::detect(), from, to);
}

fn check(x: &[f32], rows: usize, [out, inputs]: [usize; 2], bias: Option<&[f32]>) {
    assert_eq!(
        Some(x.len()),
        rows.checked_mul(inputs),
        "x must hold [rows, inputs] = [{rows}, {inputs}]"
    );
    assert!(bias.is_none_or(|b| b.len() == out), "the bias must hold {out} numbers");
}

fn linear<T: Lane>(
    isa: Isa,
    x: &[f32],
    rows: usize,
    w: &[T],
    [out, inputs]: [usize; 2],
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    check(x, rows, [out, inputs], bias);
    assert_eq!(
        Some(w.len()),
        out.checked_mul(inputs),
        "w must hold [out, inputs] = [{out}, {inputs}]"
    );
    if rows == 0 || out == 0 {
        return;
    }
    if rows > SKINNY_ROWS {
        return if let Some(w) = T::as_f32(w) {
            let ready = Panels::<fn(usize, &mut [f32])>::Ready(w);
            many_rows(isa, x, rows, [out, inputs], bias, y, ready);
        } else {
            let fill = |o: usize, to: &mut [f32]| {
                simd::widen(isa, &w[o * inputs..][..to.len()], to);
            };
            many_rows(isa, x, rows, [out, inputs], bias, y, Panels::Made(fill));
        };
    }
    let x = Aligned::copy(x);
    let x = x.as_slice();
    let output = Output::new(y, rows, out);
    let bytes = inputs * size_of::<T>();
    let ns = (bytes / BYTES_PER_NS).max(rows * inputs / MACS_PER_NS);
    for_outputs(out, ns, |range| {
        let (first, count) = (range.start, range.len());
        let part = &w[first * inputs..(first + count) * inputs];
        simd::rows_times(isa, x, rows, part, inputs, |row, o, sum| {
            let sum = sum + bias.map_or(0.0, |b| b[first + o]);
            // SAFETY: row < rows and first + o lies in this task's own range.
            unsafe { output.set(row, first + o, sum) }
        });
    });
}

/// Where [`many_rows`] finds its weights.
pub(crate) enum Panels<'a, F> {
    /// They are f32 `[out, inputs]` already.
    Ready(&'a [f32]),
    /// The function writes whole rows, the first of which is given, as f32.
    Made(F),
}

/// y = x Wᵀ + b for more rows than the streaming paths take.
pub(crate) fn many_rows<F: Fn(usize, &mut [f32]) + Sync>(
    isa: Isa,
    x: &[f32],
    rows: usize,
    [out, inputs]: [usize; 2],
    bias: Option<&[f32]>,
    y: &mut [f32],
    panels: Panels<'_, F>,
) {
    if rows <= TILE_ROWS && isa != Isa::Portable {
        tile_panels(isa, x, rows, [out, inputs], bias, y, panels);
    } else {
        gemm_panels(x, rows, [out, inputs], bias, y, panels);
    }
}

/// y = x Wᵀ + b with register tiles: a panel of W in the cache meets sixteen rows of x at a time.
fn tile_panels<F: Fn(usize, &mut [f32]) + Sync>(
    isa: Isa,
    x: &[f32],
    rows: usize,
    [out, inputs]: [usize; 2],
    bias: Option<&[f32]>,
    y: &mut [f32],
    panels: Panels<'_, F>,
) {
    let output = Output::new(y, rows, out);
    let aligned = Aligned::copy(x);
    let x = aligned.as_slice();
    let panel = (TILE_PANEL / inputs.max(1)).clamp(4, 256) / 4 * 4;
    for_outputs(out, (rows + 8) * inputs / MACS_PER_NS, |range| {
        for first in range.clone().step_by(panel) {
            let count = panel.min(range.end - first);
            let multiply = |w: &[f32]| {
                for top in (0..rows).step_by(SKINNY_ROWS) {
                    let height = SKINNY_ROWS.min(rows - top);
                    let part = &x[top * inputs..(top + height) * inputs];
                    simd::rows_times(isa, part, height, w, inputs, |r, o, sum| {
                        let sum = sum + bias.map_or(0.0, |b| b[first + o]);
                        // SAFETY: top + r < rows and first + o lies in this task's own range.
                        unsafe { output.set(top + r, first + o, sum) }
                    });
                }
            };
            match &panels {
                Panels::Ready(w) => multiply(&w[first * inputs..(first + count) * inputs]),
                Panels::Made(fill) => with_scratch(count * inputs, |scratch| {
                    fill(first, scratch);
                    multiply(scratch);
                }),
            }
        }
    });
}

/// y = x Wᵀ + b for many rows: panels of W in f32, one `gemm` each, parallel over panels.
fn gemm_panels<F: Fn(usize, &mut [f32]) + Sync>(
    x: &[f32],
    rows: usize,
    [out, inputs]: [usize; 2],
    bias: Option<&[f32]>,
    y: &mut [f32],
    panels: Panels<'_, F>,
) {
    let output = Output::new(y, rows, out);
    let threads = rayon::current_num_threads();
    // Large panels pack x less often; three tasks for each thread even out the load.
    let widest = (PANEL / inputs.max(1)).clamp(16, 512);
    let panel = out.div_ceil(threads * 3).clamp(16.min(widest), widest).next_multiple_of(16);
    let run = |i: usize| {
        let first = i * panel;
        let count = panel.min(out - first);
        let multiply = |w: &[f32]| {
            // SAFETY: x is [rows, inputs], w is [count, inputs]; the columns first..first + count
            // of y belong to this task alone.
            unsafe {
                gemm::gemm(
                    rows,
                    count,
                    inputs,
                    output.at(first),
                    1,
                    out as isize,
                    false,
                    x.as_ptr(),
                    1,
                    inputs as isize,
                    w.as_ptr(),
                    inputs as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
                if let Some(bias) = bias {
                    for row in 0..rows {
                        let line = output.at(first).add(row * out);
                        for (o, b) in bias[first..first + count].iter().enumerate() {
                            *line.add(o) += b;
                        }
                    }
                }
            }
        };
        match &panels {
            Panels::Ready(w) => multiply(&w[first * inputs..(first + count) * inputs]),
            Panels::Made(fill) => with_scratch(count * inputs, |scratch| {
                fill(first, scratch);
                multiply(scratch);
            }),
        }
    };
    let tasks = out.div_ceil(panel);
    if threads > 1 && tasks > 1 && rows * out * inputs / MACS_PER_NS > TASK_NS {
        (0..tasks).into_par_iter().with_max_len(1).for_each(run);
    } else {
        (0..tasks).for_each(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const SHAPES: [[usize; 2]; 9] =
        [[1, 1], [4, 16], [5, 17], [3, 7], [13, 33], [64, 288], [50, 100], [257, 130], [31, 1000]];

    fn normal(n: usize, seed: u64) -> Vec<f32> {
        let mut v = vec![0.0; n];
        Rng::new(seed).fill_normal(&mut v, 1.0);
        v
    }

    /// Checks y against f64 sums: |error| <= 2 (n / 8 + 8) eps sum |w x|.
    fn verify(x: &[f32], rows: usize, w: &[f32], shape: [usize; 2], bias: &[f32], y: &[f32]) {
        let [out, inputs] = shape;
        for r in 0..rows {
            for o in 0..out {
                let terms = || {
                    (0..inputs).map(|k| f64::from(x[r * inputs + k]) * f64::from(w[o * inputs + k]))
                };
                let exact = terms().sum::<f64>() + f64::from(bias[o]);
                let size = terms().map(f64::abs).sum::<f64>() + f64::from(bias[o].abs());
                let bound = (inputs as f64 / 8.0 + 8.0) * f64::from(f32::EPSILON) * size;
                let got = f64::from(y[r * out + o]);
                assert!((got - exact).abs() <= bound, "{rows} {shape:?} ({r},{o}): {got} {exact}");
            }
        }
    }

    fn all_paths<T: Lane>(convert: impl Fn(f32) -> T) {
        for (seed, shape) in SHAPES.into_iter().enumerate() {
            let [out, inputs] = shape;
            let w: Vec<T> = normal(out * inputs, seed as u64).into_iter().map(&convert).collect();
            let exact: Vec<f32> = w.iter().map(|&x| x.widen()).collect();
            let bias = normal(out, 77);
            for isa in Isa::available() {
                for rows in [1, 2, 3, 4, 7, 16, 17, 40, TILE_ROWS + 1] {
                    if rows > 40 && out * inputs > 500 {
                        continue;
                    }
                    let x = normal(rows * inputs, 100 + seed as u64);
                    let mut y = vec![f32::NAN; rows * out];
                    linear(isa, &x, rows, &w, shape, Some(&bias), &mut y);
                    verify(&x, rows, &exact, shape, &bias, &y);
                    linear(isa, &x, rows, &w, shape, None, &mut y);
                    verify(&x, rows, &exact, shape, &vec![0.0; out], &y);
                }
            }
        }
    }

    #[test]
    fn f32_against_f64() {
        all_paths(|x| x);
    }

    #[test]
    fn f16_against_f64() {
        all_paths(f16::from_f32);
    }

    #[test]
    fn bf16_against_f64() {
        all_paths(bf16::from_f32);
    }

    #[test]
    fn conversion_is_exact_for_every_value() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|h| !h.is_nan()).collect();
        let brains: Vec<bf16> =
            (0..=u16::MAX).map(bf16::from_bits).filter(|h| !h.is_nan()).collect();
        for isa in Isa::available() {
            let mut wide = vec![0.0; halves.len()];
            simd::widen(isa, &halves, &mut wide);
            assert!(wide.iter().zip(&halves).all(|(w, h)| w.to_bits() == h.to_f32().to_bits()));
            let mut wide = vec![0.0; brains.len()];
            simd::widen(isa, &brains, &mut wide);
            assert!(wide.iter().zip(&brains).all(|(w, h)| w.to_bits() == h.to_f32().to_bits()));
        }
    }

    #[test]
    fn outputs_are_covered_once() {
        for out in [1, 3, 4, 5, 1000, 4097] {
            for ns in [0, 1, 100, 1_000_000] {
                let hits: Vec<_> = (0..out).map(|_| std::sync::atomic::AtomicU32::new(0)).collect();
                for_outputs(out, ns, |range| {
                    for o in range {
                        hits[o].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                });
                assert!(hits.into_iter().all(|h| h.into_inner() == 1));
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let [out, inputs] = [700, 900];
        let w = normal(out * inputs, 1);
        let x = normal(3 * inputs, 2);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut y = vec![0.0; 3 * out];
            pool.install(|| linear_f32(&x, 3, &w, out, inputs, None, &mut y));
            y
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    #[should_panic(expected = "w must hold")]
    fn wrong_weights_are_refused() {
        linear_f32(&[1.0; 4], 1, &[1.0; 7], 2, 4, None, &mut [0.0; 2]);
    }
}
