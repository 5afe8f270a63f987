//! The register tiles of a convolution: pixels by filters forward, taps by filters for the gradient
//! of the weights. Instantiated per instruction set by the file above.

use super::{Plan, Sum};
use crate::kernels::vector::{LANES, Lanes};

/// One image in tiles of `P` pixels by `B` blocks of filters.
///
/// # Safety
/// The plan holds the buffers, and the processor has `V`'s instruction set.
#[inline(always)]
pub(super) unsafe fn tiles<V: Lanes, const P: usize, const B: usize>(
    input: &[f32],
    sum: &Sum<'_>,
    y: &mut [f32],
    plan: &Plan,
) {
    let (blocks, width) = (plan.blocks(), plan.out[1]);
    let mut block = 0;
    while block < blocks {
        let several = block + B <= blocks;
        for oy in 0..plan.out[0] {
            let mut ox = 0;
            while ox < width {
                let left = width - ox;
                let at = [block, oy, ox];
                // SAFETY: the pixels and blocks of the tile exist; the rest is passed on.
                unsafe {
                    ox += match (several, left) {
                        (true, left) if left >= P => {
                            tile::<V, P, B>(input, sum, y, plan, at);
                            P
                        }
                        (true, left) if left >= 4 => {
                            tile::<V, 4, B>(input, sum, y, plan, at);
                            4
                        }
                        (true, _) => {
                            tile::<V, 1, B>(input, sum, y, plan, at);
                            1
                        }
                        (false, left) if left >= 4 => {
                            tile::<V, 4, 1>(input, sum, y, plan, at);
                            4
                        }
                        (false, _) => {
                            tile::<V, 1, 1>(input, sum, y, plan, at);
                            1
                        }
                    };
                }
            }
        }
        block += if several { B } else { 1 };
    }
}

/// `P` pixels from `ox` of row `oy`, `B` blocks of filters from `block`.
///
/// # Safety
/// As [`tiles`]; the pixels and blocks exist.
#[inline(always)]
unsafe fn tile<V: Lanes, const P: usize, const B: usize>(
    input: &[f32],
    sum: &Sum<'_>,
    y: &mut [f32],
    plan: &Plan,
    [block, oy, ox]: [usize; 3],
) {
    let (span, step, row) = (plan.span(), plan.step(), plan.row());
    // SAFETY: rows oy s .. oy s + kh and columns of the P pixels are inside the padded input, and
    // the blocks inside the packed weights (`Plan::holds`).
    unsafe {
        let mut shift = [V::splat(0.0); B];
        for (b, shift) in shift.iter_mut().enumerate() {
            *shift = V::load(sum.shift.as_ptr().add((block + b) * LANES));
        }
        let mut sums = [shift; P];
        let weights = sum.packed.as_ptr().add(block * plan.block());
        let corner = input.as_ptr().add(oy * plan.stride * row + ox * step);
        for ky in 0..plan.kernel[0] {
            let line = corner.add(ky * row);
            let weights = weights.add(ky * span * LANES);
            for tap in 0..span {
                let mut w = [V::splat(0.0); B];
                for (b, w) in w.iter_mut().enumerate() {
                    *w = V::load(weights.add(b * plan.block() + tap * LANES));
                }
                for (p, sums) in sums.iter_mut().enumerate() {
                    let value = V::splat(*line.add(p * step + tap));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = sum.add_product(value, w);
                    }
                }
            }
        }
        for (p, sums) in sums.iter().enumerate() {
            for (b, value) in sums.iter().enumerate() {
                let first = (block + b) * LANES;
                let count = (plan.filters - first).min(LANES);
                let start = (oy * plan.out[1] + ox + p) * plan.filters + first;
                let mut values = [0.0; LANES];
                value.store(values.as_mut_ptr());
                let out = &mut y[start..start + count];
                match sum.residual {
                    Some(residual) => {
                        let residual = &residual[start..start + count];
                        for ((out, value), r) in out.iter_mut().zip(values).zip(residual) {
                            *out = value + r;
                        }
                    }
                    None => out.copy_from_slice(&values[..count]),
                }
                if sum.relu {
                    // A NaN stays one: it must not look like a cut value.
                    out.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v });
                }
            }
        }
    }
}

/// Adds one image's `Σ x[.., tap] dy[.., filter]` to `total`, `T` taps by `B` blocks at a time.
///
/// # Safety
/// The plan (with whole blocks of filters) holds the buffers, and the processor has `V`'s
/// instruction set.
#[inline(always)]
pub(super) unsafe fn products<V: Lanes, const T: usize, const B: usize>(
    input: &[f32],
    dy: &[f32],
    total: &mut [f32],
    plan: &Plan,
) {
    let (blocks, span) = (plan.blocks(), plan.span());
    let mut block = 0;
    while block < blocks {
        let several = block + B <= blocks;
        for ky in 0..plan.kernel[0] {
            let mut tap = 0;
            while tap < span {
                let at = [block, ky, tap];
                let left = span - tap;
                // SAFETY: the taps and blocks exist; the rest is passed on.
                unsafe {
                    tap += match (several, left) {
                        (true, left) if left >= T => {
                            product::<V, T, B>(input, dy, total, plan, at);
                            T
                        }
                        (true, left) if left >= 4 => {
                            product::<V, 4, B>(input, dy, total, plan, at);
                            4
                        }
                        (true, _) => {
                            product::<V, 1, B>(input, dy, total, plan, at);
                            1
                        }
                        (false, left) if left >= 4 => {
                            product::<V, 4, 1>(input, dy, total, plan, at);
                            4
                        }
                        (false, _) => {
                            product::<V, 1, 1>(input, dy, total, plan, at);
                            1
                        }
                    };
                }
            }
        }
        block += if several { B } else { 1 };
    }
}

/// # Safety
/// As [`products`]; the taps and blocks exist.
#[inline(always)]
unsafe fn product<V: Lanes, const T: usize, const B: usize>(
    input: &[f32],
    dy: &[f32],
    total: &mut [f32],
    plan: &Plan,
    [block, ky, tap]: [usize; 3],
) {
    let (row, step) = (plan.row(), plan.step());
    // SAFETY: every output pixel's taps lie inside the padded input, its gradients inside dy, the
    // blocks inside total (`Plan::holds`).
    unsafe {
        let mut sums = [[V::splat(0.0); B]; T];
        for oy in 0..plan.out[0] {
            let mut values = input.as_ptr().add((oy * plan.stride + ky) * row + tap);
            let mut dy = dy.as_ptr().add(oy * plan.out[1] * plan.filters + block * LANES);
            for _ in 0..plan.out[1] {
                let mut gradient = [V::splat(0.0); B];
                for (b, gradient) in gradient.iter_mut().enumerate() {
                    *gradient = V::load(dy.add(b * LANES));
                }
                for (t, sums) in sums.iter_mut().enumerate() {
                    let value = V::splat(*values.add(t));
                    for (sum, gradient) in sums.iter_mut().zip(gradient) {
                        *sum = sum.add_product(value, gradient);
                    }
                }
                values = values.wrapping_add(step);
                dy = dy.wrapping_add(plan.filters);
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            for (b, sum) in sums.iter().enumerate() {
                let start = (block + b) * plan.block() + (ky * plan.span() + tap + t) * LANES;
                let at = total.as_mut_ptr().add(start);
                V::load(at).add_product(*sum, V::splat(1.0)).store(at);
            }
        }
    }
}
