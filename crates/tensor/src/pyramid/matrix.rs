//! Products with packed pyramid codes: y = x Ŵᵀ + b.
//!
//! Rows are decoded to small integers eight groups at a time (see `index`), scaled once per group into
//! a buffer that stays in the first-level cache, and multiplied there; for many rows of x a panel of
//! decoded rows is shared by all of them. The weights that are multiplied are the very f32 values of
//! [`PyramidWeights::dequantize`]; only the order of sums differs:
//! |y - exact| <= (in / 8 + 16) * 2⁻²³ * (Σ |x W| + |b|).

use super::codec::Codec;
use super::index::Pulse;
use super::lattice::refuse;
use crate::kernels::simd::simd;
use crate::skinny::simd::{self as tiles, Isa};
use crate::skinny::{Aligned, Output, Panels, for_outputs, many_rows, with_scratch};
use crate::{Error, Result};
use rayon::prelude::*;

/// Up to this many rows of x every decoded row of weights is multiplied at once.
const DIRECT_ROWS: usize = 16;
/// Rough weights that one thread decodes in a nanosecond, inverted: nanoseconds for four weights.
const NS_PER_4_WEIGHTS: usize = 4;

/// A packed matrix `[out, in]` with the tables to decode it.
#[derive(Debug)]
pub struct PyramidWeights {
    codec: Codec,
    out: usize,
    /// `[out, index_row_bytes]`, and bytes that let a field be read as a whole word.
    index: Vec<u8>,
    amplitude: Vec<u8>,
    norms: Vec<f32>,
}

/// Bytes behind the streams.
const SLACK: usize = 24;

impl PyramidWeights {
    /// Takes over packed rows: `index` `[out, index_row_bytes]`, `amplitude`
    /// `[out, amplitude_row_bytes]`, `norms` `[out]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not fit; [`Error::Numeric`] for an index out of range or a
    /// norm or length that is not finite.
    pub fn new(
        codec: Codec,
        mut index: Vec<u8>,
        mut amplitude: Vec<u8>,
        norms: Vec<f32>,
    ) -> Result<Self> {
        let out = norms.len();
        for (what, found, row) in [
            ("indices", index.len(), codec.index_row_bytes()),
            ("lengths", amplitude.len(), codec.amplitude_row_bytes()),
        ] {
            if Some(found) != out.checked_mul(row) {
                return refuse(format!("{found} bytes of {what} for {out} rows of {row} bytes"));
            }
        }
        if let Some(row) = norms.iter().position(|n| !n.is_finite()) {
            let reason = format!("the norm of row {row} is {}", norms[row]);
            return Err(Error::Numeric { what: "pyramid code".into(), reason });
        }
        let (index_row, amp_row) = (codec.index_row_bytes(), codec.amplitude_row_bytes());
        let bad = (0..out).into_par_iter().with_min_len(16).find_map_first(|row| {
            let amplitude = &amplitude[row * amp_row..(row + 1) * amp_row];
            let found = codec.first_bad(&index[row * index_row..(row + 1) * index_row], amplitude);
            found.map(|group| (row, group))
        });
        if let Some((row, group)) = bad {
            return Err(Error::Numeric {
                what: "pyramid code".into(),
                reason: format!(
                    "group {group} of row {row} holds an index or length out of range; the data is \
                     damaged"
                ),
            });
        }
        index.resize(index.len() + SLACK, 0);
        amplitude.resize(amplitude.len() + SLACK, 0);
        Ok(Self { codec, out, index, amplitude, norms })
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.codec.code().inputs]
    }

    /// The tables.
    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Bytes of memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.index.len() + self.amplitude.len() + self.norms.len() * 4
    }

    /// The weights `[out, in]` in f32.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut w = vec![0f32; self.out * self.codec.code().inputs];
        self.dequantize_into(&mut w);
        w
    }

    /// As [`PyramidWeights::dequantize`], into memory that is there already.
    ///
    /// # Panics
    /// When `w` does not hold `[out, in]`.
    pub fn dequantize_into(&self, w: &mut [f32]) {
        let width = self.codec.code().inputs;
        assert_eq!(w.len(), self.out * width, "w must hold [{}, {width}]", self.out);
        let isa = Isa::detect();
        w.par_chunks_mut(width).enumerate().with_min_len((1 << 14) / width + 1).for_each_init(
            || Buffers::new(&self.codec),
            |buffers, (row, to)| self.expand_row(isa, row, buffers, to),
        );
    }

    /// y = x Ŵᵀ + b for `x` `[rows, in]`, `bias` `[out]`, `y` `[rows, out]`; row-major.
    ///
    /// # Panics
    /// When a length does not fit.
    pub fn linear(&self, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        self.linear_with(Isa::detect(), x, rows, bias, y);
    }

    pub(super) fn linear_with(
        &self,
        isa: Isa,
        x: &[f32],
        rows: usize,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let [out, width] = self.shape();
        assert_eq!(Some(x.len()), rows.checked_mul(width), "x must hold [{rows}, {width}]");
        assert!(bias.is_none_or(|b| b.len() == out), "the bias must hold {out} numbers");
        assert_eq!(Some(y.len()), rows.checked_mul(out), "y must hold [{rows}, {out}]");
        if rows == 0 || out == 0 {
            return;
        }
        if rows > DIRECT_ROWS {
            let fill = |first: usize, panel: &mut [f32]| {
                let mut buffers = Buffers::new(&self.codec);
                for (i, row) in panel.chunks_exact_mut(width).enumerate() {
                    self.expand_row(isa, first + i, &mut buffers, row);
                }
            };
            return many_rows(isa, x, rows, [out, width], bias, y, Panels::Made(fill));
        }
        let mut aligned = Aligned::zeroed(x.len());
        aligned.as_mut_slice().copy_from_slice(x);
        let x = aligned.as_slice();
        let output = Output::new(y, rows, out);
        for_outputs(out, width / 4 * NS_PER_4_WEIGHTS, |range| {
            let mut buffers = Buffers::new(&self.codec);
            // Four rows of weights make a register tile.
            for first in range.clone().step_by(4) {
                let count = 4.min(range.end - first);
                with_scratch(count * width, |panel| {
                    for (i, row) in panel.chunks_exact_mut(width).enumerate() {
                        self.expand_row(isa, first + i, &mut buffers, row);
                    }
                    tiles::rows_times(isa, x, rows, panel, width, |r, o, sum| {
                        let sum = sum + bias.map_or(0.0, |b| b[first + o]);
                        // SAFETY: r < rows and first + o lies in this task's own range.
                        unsafe { output.set(r, first + o, sum) }
                    });
                });
            }
        });
    }

    /// Decodes row `row` to `to` `[in]`.
    fn expand_row(&self, isa: Isa, row: usize, buffers: &mut Buffers, to: &mut [f32]) {
        let codec = &self.codec;
        // Up to the end of everything, so that fields are read as whole words.
        let index = &self.index[row * codec.index_row_bytes()..];
        let amplitude = &self.amplitude[row * codec.amplitude_row_bytes()..];
        codec.unpack_amplitudes(amplitude, &mut buffers.codes);
        let norm = self.norms[row];
        let Buffers { small, large, codes, scales } = buffers;
        if small.is_empty() {
            codec.unpack_points_with(isa, index, large);
            scale_groups(codec, norm, codes, scales, large, to, squares_large, times_large);
        } else {
            codec.unpack_points_with(isa, index, small);
            scale_groups(codec, norm, codes, scales, small, to, squares_small, times_small);
        }
    }
}

/// Reused memory of one task.
struct Buffers {
    /// Points, when all pulses fit i8; otherwise those of `large` are used.
    small: Vec<i8>,
    large: Vec<i16>,
    codes: Vec<u16>,
    scales: Vec<f32>,
}

impl Buffers {
    fn new(codec: &Codec) -> Self {
        let groups = codec.groups();
        let most = codec.part(0).lattice.pulses().max(codec.part(groups - 1).lattice.pulses());
        let width = codec.code().inputs;
        let small = most <= i8::MAX as usize;
        Self {
            small: vec![0; if small { width } else { 0 }],
            large: vec![0; if small { 0 } else { width }],
            codes: vec![0; groups],
            scales: vec![0.0; groups],
        }
    }
}

/// Points to weights: one factor per group.
#[allow(clippy::too_many_arguments)]
fn scale_groups<P: Pulse>(
    codec: &Codec,
    norm: f32,
    codes: &[u16],
    scales: &mut [f32],
    y: &[P],
    to: &mut [f32],
    squares: fn(&[P], usize, &mut [f32]),
    times: fn(&[P], usize, &[f32], &mut [f32]),
) {
    let whole = codec.whole_groups();
    let d = codec.code().dimension;
    let split = whole * d;
    // Whole groups, then the smaller one.
    let part = codec.part(0);
    squares(&y[..split], d, &mut scales[..whole]);
    for (scale, &code) in scales[..whole].iter_mut().zip(codes) {
        *scale = Codec::scale(part, norm, code, *scale as u32);
    }
    times(&y[..split], d, &scales[..whole], &mut to[..split]);
    if codec.groups() > whole {
        let part = codec.part(whole);
        let (y, to, scale) = (&y[split..], &mut to[split..], &mut scales[whole..]);
        squares(y, y.len(), scale);
        scale[0] = Codec::scale(part, norm, codes[whole], scale[0] as u32);
        times(y, y.len(), scale, to);
    }
}

/// Compiles the two passes over groups for one type of integers.
macro_rules! passes {
    ($squares:ident, $times:ident, $ty:ty) => {
        simd! {
            /// `‖y‖²` of every group.
            fn $squares(y: &[$ty], d: usize, squares: &mut [f32]) {
                match d {
                    16 => squares_of(y.as_chunks::<16>().0, squares),
                    8 => squares_of(y.as_chunks::<8>().0, squares),
                    32 => squares_of(y.as_chunks::<32>().0, squares),
                    4 => squares_of(y.as_chunks::<4>().0, squares),
                    _ => {
                        for (square, y) in squares.iter_mut().zip(y.chunks_exact(d)) {
                            let sum: i32 = y.iter().map(|y| i32::from(*y) * i32::from(*y)).sum();
                            *square = sum as f32;
                        }
                    }
                }
            }
        }
        simd! {
            /// Groups times their factors.
            fn $times(y: &[$ty], d: usize, scales: &[f32], to: &mut [f32]) {
                match d {
                    16 => times_of(y.as_chunks::<16>().0, scales, to.as_chunks_mut::<16>().0),
                    8 => times_of(y.as_chunks::<8>().0, scales, to.as_chunks_mut::<8>().0),
                    32 => times_of(y.as_chunks::<32>().0, scales, to.as_chunks_mut::<32>().0),
                    4 => times_of(y.as_chunks::<4>().0, scales, to.as_chunks_mut::<4>().0),
                    _ => {
                        let groups = y.chunks_exact(d).zip(to.chunks_exact_mut(d));
                        for ((y, to), &scale) in groups.zip(scales) {
                            for (to, y) in to.iter_mut().zip(y) {
                                *to = y.get() as f32 * scale;
                            }
                        }
                    }
                }
            }
        }
    };
}

passes!(squares_small, times_small, i8);
passes!(squares_large, times_large, i16);

#[inline(always)]
fn squares_of<P: Pulse, const D: usize>(y: &[[P; D]], squares: &mut [f32]) {
    for (square, y) in squares.iter_mut().zip(y) {
        let mut sum = 0i32;
        for y in y {
            sum += y.get() * y.get();
        }
        *square = sum as f32;
    }
}

#[inline(always)]
fn times_of<P: Pulse, const D: usize>(y: &[[P; D]], scales: &[f32], to: &mut [[f32; D]]) {
    for ((y, to), &scale) in y.iter().zip(to).zip(scales) {
        for i in 0..D {
            to[i] = y[i].get() as f32 * scale;
        }
    }
}
