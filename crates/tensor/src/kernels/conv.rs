//! Two-dimensional convolution of images whose channels lie side by side (`[n, h, w, c]`).
//!
//! With the channels innermost, the values that one row of a kernel reads are contiguous: a
//! convolution is a matrix product whose left rows overlap in memory, and no patch is ever copied.
//! Tiles of pixels by channels stay in registers. Work is parallel over images; sums over images run
//! in fixed groups, so that the bytes do not depend on the threads.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m512;

use rayon::prelude::*;

use super::simd::{add_into, scratch};
use super::vector::LANES;
#[cfg(target_arch = "x86_64")]
use super::vector::Pair;
use crate::ops::Conv2d;

mod tiles;

use tiles::{products, tiles};

/// Images whose weight gradients are summed in one buffer.
const GROUP: usize = 8;

/// What is done to a sum before it is stored, besides the shift.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// Added to every value of a channel.
    pub shift: Option<&'a [f32]>,
    /// Added value by value, laid out as the output.
    pub residual: Option<&'a [f32]>,
    /// Negative results become 0.
    pub relu: bool,
}

/// The instruction sets that the tiles are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best that this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// A convolution of stride `stride` over an input that is padded already.
#[derive(Clone, Copy)]
struct Plan {
    /// Rows and columns of the padded input.
    padded: [usize; 2],
    channels: usize,
    filters: usize,
    kernel: [usize; 2],
    stride: usize,
    /// Rows and columns of the output.
    out: [usize; 2],
}

impl Plan {
    /// Values from one row of the padded input to the next.
    fn row(&self) -> usize {
        self.padded[1] * self.channels
    }

    /// Values that one row of a kernel reads: contiguous.
    fn span(&self) -> usize {
        self.kernel[1] * self.channels
    }

    /// Values from one output pixel's input to the next one's.
    fn step(&self) -> usize {
        self.stride * self.channels
    }

    fn blocks(&self) -> usize {
        self.filters.div_ceil(LANES)
    }

    /// Packed weights of one block of filters.
    fn block(&self) -> usize {
        self.kernel[0] * self.span() * LANES
    }

    /// The accesses of [`tiles`] and [`products`] stay inside.
    fn holds(&self, input: usize, weights: usize, output: usize) -> bool {
        let [height, width] = self.out;
        let reach = |n: usize, kernel: usize| n.saturating_sub(1) * self.stride + kernel;
        reach(height, self.kernel[0]) <= self.padded[0]
            && reach(width, self.kernel[1]) <= self.padded[1]
            && input == self.padded[0] * self.row()
            && weights == self.blocks() * self.block()
            && output == height * width * self.filters
    }
}

/// `y[n, oy, ox, f] = Σ x[n, oy s + ky - p, ox s + kx - p, c] w[f, c, ky, kx]` and the epilogue.
/// `scale` multiplies the weights of every filter.
pub(crate) fn forward(
    x: &[f32],
    w: &[f32],
    scale: Option<&[f32]>,
    spec: &Conv2d,
    epilogue: Epilogue<'_>,
) -> Vec<f32> {
    let plan = Plan {
        padded: [spec.height + 2 * spec.padding, spec.width + 2 * spec.padding],
        channels: spec.channels,
        filters: spec.filters,
        kernel: spec.kernel,
        stride: spec.stride,
        out: spec.out(),
    };
    let packed = pack(w, scale, &plan, |f, c, ky, kx| {
        ((f * spec.channels + c) * spec.kernel[0] + ky) * spec.kernel[1] + kx
    });
    let source = [spec.height, spec.width];
    run(x, source, [spec.padding; 2], 1, &packed, plan, epilogue)
}

/// The gradient of the input: the gradient of the output, spread by the stride, under the kernel
/// turned around.
pub(crate) fn backward_input(dy: &[f32], w: &[f32], spec: &Conv2d) -> Vec<f32> {
    let [kh, kw] = spec.kernel;
    let plan = Plan {
        padded: [spec.height + kh - 1, spec.width + kw - 1],
        channels: spec.filters,
        filters: spec.channels,
        kernel: spec.kernel,
        stride: 1,
        out: [spec.height, spec.width],
    };
    let packed = pack(w, None, &plan, |c, f, ky, kx| {
        ((f * spec.channels + c) * kh + (kh - 1 - ky)) * kw + (kw - 1 - kx)
    });
    let offset = [kh - 1 - spec.padding, kw - 1 - spec.padding];
    run(dy, spec.out(), offset, spec.stride, &packed, plan, Epilogue::default())
}

/// Weights by block of 16 filters, kernel row, kernel column, channel; filters innermost, missing
/// ones 0.
fn pack(
    w: &[f32],
    scale: Option<&[f32]>,
    plan: &Plan,
    at: impl Fn(usize, usize, usize, usize) -> usize,
) -> Vec<f32> {
    let mut packed = vec![0.0; plan.blocks() * plan.block()];
    for f in 0..plan.filters {
        let factor = scale.map_or(1.0, |scale| scale[f]);
        let base = f / LANES * plan.block() + f % LANES;
        for ky in 0..plan.kernel[0] {
            for kx in 0..plan.kernel[1] {
                for c in 0..plan.channels {
                    let tap = (ky * plan.kernel[1] + kx) * plan.channels + c;
                    packed[base + tap * LANES] = w[at(f, c, ky, kx)] * factor;
                }
            }
        }
    }
    packed
}

/// All images of `x`, each `source` rows and columns of the plan's channels, placed at `offset` with
/// `spread` between pixels.
fn run(
    x: &[f32],
    source: [usize; 2],
    offset: [usize; 2],
    spread: usize,
    packed: &[f32],
    plan: Plan,
    epilogue: Epilogue<'_>,
) -> Vec<f32> {
    let image = source[0] * source[1] * plan.channels;
    let pixels = plan.out[0] * plan.out[1] * plan.filters;
    if image == 0 || pixels == 0 {
        return Vec::new();
    }
    let mut y = scratch(x.len() / image * pixels);
    let mut shift = vec![0.0; plan.blocks() * LANES];
    if let Some(values) = epilogue.shift {
        shift[..plan.filters].copy_from_slice(values);
    }
    let isa = Isa::detect();
    y.par_chunks_mut(pixels).zip(x.par_chunks(image)).enumerate().for_each_init(
        || vec![0.0; plan.padded[0] * plan.row()],
        |buffer, (n, (y, x))| {
            place(x, source, buffer, &plan, offset, spread);
            let residual = epilogue.residual.map(|r| &r[n * pixels..(n + 1) * pixels]);
            let sum = Sum { packed, shift: &shift, residual, relu: epilogue.relu };
            image_forward(isa, buffer, &sum, y, &plan);
        },
    );
    y
}

/// Copies an image into its padded place; the rest of `buffer` is 0 and stays so.
fn place(
    x: &[f32],
    [height, width]: [usize; 2],
    buffer: &mut [f32],
    plan: &Plan,
    offset: [usize; 2],
    spread: usize,
) {
    let channels = plan.channels;
    for (y, line) in x.chunks_exact(width * channels).take(height).enumerate() {
        let start = (offset[0] + y * spread) * plan.row() + offset[1] * channels;
        if spread == 1 {
            buffer[start..start + line.len()].copy_from_slice(line);
            continue;
        }
        for (pixel, values) in line.chunks_exact(channels).enumerate() {
            let at = start + pixel * spread * channels;
            buffer[at..at + channels].copy_from_slice(values);
        }
    }
}

/// What a tile computes with besides its input.
#[derive(Clone, Copy)]
struct Sum<'a> {
    packed: &'a [f32],
    /// One value per filter, whole blocks.
    shift: &'a [f32],
    residual: Option<&'a [f32]>,
    relu: bool,
}

fn image_forward(isa: Isa, input: &[f32], sum: &Sum<'_>, y: &mut [f32], plan: &Plan) {
    assert!(
        plan.holds(input.len(), sum.packed.len(), y.len())
            && sum.residual.is_none_or(|r| r.len() == y.len()),
        "convolution: the plan does not fit its buffers"
    );
    match isa {
        // SAFETY: the instruction set was detected, the plan holds.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { forward_avx512(input, sum, y, plan) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { forward_avx2(input, sum, y, plan) },
        // SAFETY: the plan holds.
        Isa::Portable => unsafe { tiles::<[f32; LANES], 4, 1>(input, sum, y, plan) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn forward_avx512(input: &[f32], sum: &Sum<'_>, y: &mut [f32], plan: &Plan) {
    // SAFETY: passed on.
    unsafe {
        if plan.blocks() > 1 {
            tiles::<__m512, 8, 2>(input, sum, y, plan);
        } else {
            tiles::<__m512, 8, 1>(input, sum, y, plan);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn forward_avx2(input: &[f32], sum: &Sum<'_>, y: &mut [f32], plan: &Plan) {
    // SAFETY: passed on.
    unsafe { tiles::<Pair, 4, 1>(input, sum, y, plan) }
}

/// The gradient of the weights, `[filters, channels * kh * kw]`.
pub(crate) fn backward_weights(x: &[f32], dy: &[f32], spec: &Conv2d) -> Vec<f32> {
    let [kh, kw] = spec.kernel;
    let plan = Plan {
        padded: [spec.height + 2 * spec.padding, spec.width + 2 * spec.padding],
        channels: spec.channels,
        filters: spec.filters,
        kernel: spec.kernel,
        stride: spec.stride,
        out: spec.out(),
    };
    let image = spec.height * spec.width * spec.channels;
    let pixels = plan.out[0] * plan.out[1];
    let mut dw = vec![0.0; spec.filters * spec.channels * kh * kw];
    if image == 0 || pixels == 0 || dw.is_empty() {
        return dw;
    }
    let isa = Isa::detect();
    let lanes = plan.blocks() * LANES;
    let groups: Vec<Vec<f32>> = x
        .par_chunks(GROUP * image)
        .zip(dy.par_chunks(GROUP * pixels * plan.filters))
        .map(|(x, dy)| {
            let mut total = vec![0.0; plan.blocks() * plan.block()];
            let mut input = vec![0.0; plan.padded[0] * plan.row()];
            let whole = plan.filters == lanes;
            let mut wide = vec![0.0; if whole { 0 } else { pixels * lanes }];
            let images = x.chunks_exact(image).zip(dy.chunks_exact(pixels * plan.filters));
            for (x, dy) in images {
                place(x, [spec.height, spec.width], &mut input, &plan, [spec.padding; 2], 1);
                if whole {
                    image_products(isa, &input, dy, &mut total, &plan);
                    continue;
                }
                for (wide, dy) in wide.chunks_exact_mut(lanes).zip(dy.chunks_exact(plan.filters)) {
                    wide[..plan.filters].copy_from_slice(dy);
                }
                image_products(isa, &input, &wide, &mut total, &plan);
            }
            total
        })
        .collect();
    let mut total = vec![0.0; plan.blocks() * plan.block()];
    groups.iter().for_each(|group| add_into(&mut total, group));
    for (f, dw) in dw.chunks_exact_mut(spec.channels * kh * kw).enumerate() {
        let base = f / LANES * plan.block() + f % LANES;
        for c in 0..spec.channels {
            for ky in 0..kh {
                for kx in 0..kw {
                    let tap = (ky * kw + kx) * spec.channels + c;
                    dw[(c * kh + ky) * kw + kx] = total[base + tap * LANES];
                }
            }
        }
    }
    dw
}

fn image_products(isa: Isa, input: &[f32], dy: &[f32], total: &mut [f32], plan: &Plan) {
    // Gradients have whole blocks of filters here.
    let wide = Plan { filters: plan.blocks() * LANES, ..*plan };
    assert!(
        wide.holds(input.len(), total.len(), dy.len()),
        "convolution: the plan does not fit its buffers"
    );
    match isa {
        // SAFETY: the instruction set was detected, the plan holds.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { products_avx512(input, dy, total, &wide) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { products_avx2(input, dy, total, &wide) },
        // SAFETY: the plan holds.
        Isa::Portable => unsafe { products::<[f32; LANES], 4, 1>(input, dy, total, &wide) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn products_avx512(input: &[f32], dy: &[f32], total: &mut [f32], plan: &Plan) {
    // SAFETY: passed on.
    unsafe {
        if plan.blocks() > 1 {
            products::<__m512, 12, 2>(input, dy, total, plan);
        } else {
            products::<__m512, 12, 1>(input, dy, total, plan);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn products_avx2(input: &[f32], dy: &[f32], total: &mut [f32], plan: &Plan) {
    // SAFETY: passed on.
    unsafe { products::<Pair, 6, 1>(input, dy, total, plan) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_isa() -> Vec<Isa> {
        let mut all = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        match Isa::detect() {
            Isa::Avx512 => all.extend([Isa::Avx2, Isa::Avx512]),
            Isa::Avx2 => all.push(Isa::Avx2),
            Isa::Portable => {}
        }
        all
    }

    /// Small whole numbers, so that every order of summation gives the same bits.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7 + seed * 13) % 9) as f32 - 4.0).collect()
    }

    #[test]
    fn every_instruction_set_agrees_with_the_definition() {
        // Blocks: half a one, one, one and a half, three; rows of 1 to 17 pixels; strides.
        for (filters, channels, width, stride) in
            [(3, 2, 1, 1), (16, 4, 9, 1), (24, 1, 17, 2), (48, 5, 8, 1), (33, 3, 13, 3)]
        {
            let plan = Plan {
                padded: [5, (width - 1) * stride + 3],
                channels,
                filters,
                kernel: [2, 3],
                stride,
                out: [(5 - 2) / stride + 1, width],
            };
            let input = numbers(plan.padded[0] * plan.row(), 1);
            let w = numbers(filters * channels * 6, 2);
            let at =
                |f: usize, c: usize, ky: usize, kx: usize| ((f * channels + c) * 2 + ky) * 3 + kx;
            let packed = pack(&w, None, &plan, at);
            let shift: Vec<f32> = (0..plan.blocks() * LANES).map(|i| i as f32).collect();
            let mut wanted = Vec::new();
            let residual = numbers(plan.out[0] * width * filters, 3);
            for oy in 0..plan.out[0] {
                for ox in 0..width {
                    for f in 0..filters {
                        let mut sum = f as f32 + residual[wanted.len()];
                        for ky in 0..2 {
                            for kx in 0..3 {
                                for c in 0..channels {
                                    let from = (oy * stride + ky) * plan.row()
                                        + (ox * stride + kx) * channels
                                        + c;
                                    sum += input[from] * w[at(f, c, ky, kx)];
                                }
                            }
                        }
                        wanted.push(sum.max(0.0));
                    }
                }
            }
            let lanes = plan.blocks() * LANES;
            let dy = numbers(plan.out[0] * width * lanes, 4);
            let mut dw = vec![0.0; plan.blocks() * plan.block()];
            for (pixel, dy) in dy.chunks_exact(lanes).enumerate() {
                let (oy, ox) = (pixel / width, pixel % width);
                for (f, dy) in dy.iter().enumerate() {
                    for ky in 0..2 {
                        for tap in 0..plan.span() {
                            let from = (oy * stride + ky) * plan.row() + ox * plan.step() + tap;
                            let to = f / LANES * plan.block() + (ky * plan.span() + tap) * LANES;
                            dw[to + f % LANES] += dy * input[from];
                        }
                    }
                }
            }
            for isa in every_isa() {
                let mut y = vec![0.0; wanted.len()];
                let sum =
                    Sum { packed: &packed, shift: &shift, residual: Some(&residual), relu: true };
                image_forward(isa, &input, &sum, &mut y, &plan);
                assert_eq!(y, wanted, "{isa:?} {filters} {channels} {width} {stride}");
                let mut total = vec![0.0; dw.len()];
                image_products(isa, &input, &dy, &mut total, &plan);
                assert_eq!(total, dw, "{isa:?} {filters} {channels} {width} {stride}");
            }
        }
    }
}
