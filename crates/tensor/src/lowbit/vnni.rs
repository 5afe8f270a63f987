//! Integer kernels for few rows: codes times 16-bit activations with AVX-512 VNNI.
//!
//! The f32 kernels are limited by what the processor multiplies, not by what the memory delivers. Here
//! every block of 128 activations becomes 16-bit integers with one f32 scale, each split into a high
//! and a low byte: x = scale * (256 hi + lo). One instruction then multiplies 64 codes with 64 bytes
//! and adds them up exactly in 32 bits. The zero point comes off by the sum of the activations:
//! Σ (q - z) x = Σ q x - z Σ x. Only the rounding of x is lost, half a step of its block's scale.

use super::RowView;
use super::layout::{BLOCK, VECTOR, block_bytes};
use crate::skinny::Aligned;
use std::arch::x86_64::*;

/// The largest magnitude whose two bytes both fit: 127 * 256 + 127.
pub(super) const LARGEST: f32 = 32639.0;
/// Bytes of one part of a block of activations: high and low bytes for two registers of codes.
const PART: usize = 4 * 64;
/// How far in front of the block in hand memory is asked for, in bytes.
const AHEAD: usize = 2048;

/// Whether the processor has what these kernels need beyond the AVX-512 that is detected already.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi")
}

/// Activations `[rows, slots]` as integers.
pub(super) struct Quantized {
    /// For every row, block and part: high bytes for both code registers, then low bytes.
    bytes: Aligned,
    /// Scale of every row and block.
    scales: Vec<f32>,
    /// Sum of the activations of every row, block and part.
    sums: Vec<f32>,
    blocks: usize,
    parts: usize,
}

impl Quantized {
    /// Rounds `x` (`[rows, slots]`) for codes of `bits`; `parts` is how many groups share a block.
    pub(super) fn new(bits: u8, x: &[f32], rows: usize, parts: usize) -> Self {
        let blocks = x.len() / rows.max(1) / BLOCK;
        let count = rows * blocks;
        let mut bytes = Aligned::zeroed(count * parts * PART / 4);
        let mut scales = vec![0f32; count];
        let mut sums = vec![0f32; count * parts];
        let target: &mut [u32] = bytemuck::cast_slice_mut(bytes.as_mut_slice());
        let blocks_of = x.chunks_exact(BLOCK).zip(target.chunks_exact_mut(parts * PART / 4));
        for ((x, to), (scale, sums)) in
            blocks_of.zip(scales.iter_mut().zip(sums.chunks_exact_mut(parts)))
        {
            // SAFETY: the caller has detected AVX-512 before it comes here.
            unsafe { quantize_block(bits, x, to, scale, sums) };
        }
        Self { bytes, scales, sums, blocks, parts }
    }
}

/// One block of 128 activations into the registers of every part.
///
/// # Safety
/// AVX-512; `x` holds a block, `to` one part for every sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn quantize_block(bits: u8, x: &[f32], to: &mut [u32], scale: &mut f32, sums: &mut [f32]) {
    /// NaN of both kinds and infinity of both signs.
    const NOT_FINITE: i32 = 0x99;
    const VECTORS: usize = BLOCK / VECTOR;
    let zero = _mm512_setzero_si512();
    let mut lines = [_mm512_setzero_ps(); VECTORS];
    let (mut most, mut bad) = (_mm512_setzero_ps(), 0);
    for (v, line) in lines.iter_mut().enumerate() {
        // SAFETY: the block is readable.
        *line = unsafe { _mm512_loadu_ps(x.as_ptr().add(v * VECTOR)) };
        most = _mm512_max_ps(most, _mm512_abs_ps(*line));
        bad |= _mm512_fpclass_ps_mask::<NOT_FINITE>(*line);
    }
    let most = _mm512_reduce_max_ps(most);
    *scale = if bad == 0 { most / LARGEST } else { f32::NAN };
    // Blocks of nothing but the smallest numbers count as zero.
    let inverse = Some(LARGEST / most).filter(|i| i.is_finite()).unwrap_or(0.0);
    let (mut high, mut low, mut q) = ([zero; VECTORS], [zero; VECTORS], [zero; VECTORS]);
    for v in 0..VECTORS {
        q[v] = _mm512_cvtps_epi32(_mm512_mul_ps(lines[v], _mm512_set1_ps(inverse)));
        high[v] = _mm512_srai_epi32::<8>(_mm512_add_epi32(q[v], _mm512_set1_epi32(128)));
        low[v] = _mm512_sub_epi32(q[v], _mm512_slli_epi32::<8>(high[v]));
    }
    let vectors = VECTORS / sums.len();
    for (part, (to, sum)) in to.chunks_exact_mut(PART / 4).zip(sums).enumerate() {
        let to: *mut u8 = to.as_mut_ptr().cast();
        let mut total = zero;
        let mut registers = [zero; 4];
        for v in part * vectors..(part + 1) * vectors {
            total = _mm512_add_epi32(total, q[v]);
            if bits == 8 {
                // Slots in their own order.
                // SAFETY: 16 bytes for each of 8 vectors, high bytes before low ones.
                unsafe {
                    _mm_storeu_si128(to.add(16 * v).cast(), _mm512_cvtepi32_epi8(high[v]));
                    _mm_storeu_si128(to.add(128 + 16 * v).cast(), _mm512_cvtepi32_epi8(low[v]));
                }
                continue;
            }
            // Byte v / 2 of lane l: the activation of vector v, lane l; odd vectors in a register of
            // their own.
            let shift = _mm512_set1_epi32(8 * (v / 2) as i32);
            for (half, values) in [high[v], low[v]].into_iter().enumerate() {
                let byte = _mm512_and_si512(values, _mm512_set1_epi32(0xFF));
                let place = &mut registers[2 * half + v % 2];
                *place = _mm512_or_si512(*place, _mm512_sllv_epi32(byte, shift));
            }
        }
        if bits != 8 {
            for (i, register) in registers.into_iter().enumerate() {
                // SAFETY: a part holds four registers.
                unsafe { _mm512_storeu_si512(to.add(64 * i).cast(), register) };
            }
        }
        *sum = _mm512_reduce_add_epi32(total) as f32 * *scale;
    }
}

/// Bytes of the codes of even and of odd vectors (8 bits: of the first and the second 64 slots).
///
/// # Safety
/// AVX-512 with VBMI; a whole block and the slack behind it readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn codes<const BITS: u8>(p: *const u8) -> [__m512i; 2] {
    // SAFETY: by the contract above; widths as in the table of `layout`.
    unsafe {
        match BITS {
            2 => nibbled::<2>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))),
            3 => {
                // 48 bytes; 12 to each 128-bit part, then 3 to each lane.
                let bytes = _mm512_maskz_loadu_epi32(0x0FFF, p.cast());
                let parts = _mm512_set_epi32(15, 11, 10, 9, 15, 8, 7, 6, 15, 5, 4, 3, 15, 2, 1, 0);
                let lanes = _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0);
                let lanes = _mm512_broadcast_i32x4(lanes);
                nibbled::<3>(_mm512_shuffle_epi8(_mm512_permutexvar_epi32(parts, bytes), lanes))
            }
            4 => four(_mm512_loadu_si512(p.cast())),
            5 => {
                let [even, odd] = four(_mm512_loadu_si512(p.cast()));
                // Byte l of the plane to all four bytes of lane l, then each byte's own bit.
                let plane = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.add(64).cast()));
                let plane = _mm512_mullo_epi32(plane, _mm512_set1_epi32(0x0101_0101));
                let sixteen = _mm512_set1_epi8(16);
                let bit = |of: i32| _mm512_test_epi8_mask(plane, _mm512_set1_epi32(of));
                let (e, o) = (bit(0x4010_0401), bit(0x8020_0802_u32 as i32));
                [
                    _mm512_mask_add_epi8(even, e, even, sixteen),
                    _mm512_mask_add_epi8(odd, o, odd, sixteen),
                ]
            }
            6 => {
                let [even, odd] = four(_mm512_loadu_si512(p.cast()));
                let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.add(64).cast()));
                let [e, o] = nibbled::<2>(high);
                [
                    _mm512_or_si512(even, _mm512_slli_epi32::<4>(e)),
                    _mm512_or_si512(odd, _mm512_slli_epi32::<4>(o)),
                ]
            }
            _ => [_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast())],
        }
    }
}

/// 4-bit codes: the nibbles of every byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn four(block: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    [_mm512_and_si512(block, mask), _mm512_and_si512(_mm512_srli_epi32::<4>(block), mask)]
}

/// Narrow codes at bits `WIDTH * j` of every 32-bit lane: even and odd `j` into bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn nibbled<const WIDTH: i64>(lanes: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8((1 << WIDTH) - 1);
    let pick = |first: i64| {
        let mut control = 0i64;
        for byte in 0..8 {
            let at = 32 * (byte / 4) + WIDTH * (2 * (byte % 4) + first);
            control |= at << (8 * byte);
        }
        _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(control), lanes), mask)
    };
    [pick(0), pick(1)]
}

/// Products of one output with R rows.
///
/// # Safety
/// AVX-512 with VNNI and VBMI; a view of whole blocks whose groups have parameters; `x` made for this
/// width, for as many blocks, and PARTS parts; rows `first..first + R` exist.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
unsafe fn kernel<const BITS: u8, const R: usize, const PARTS: usize>(
    row: RowView<'_>,
    x: &Quantized,
    first: usize,
    sums: &mut [f32],
) {
    let blocks = x.blocks;
    let base: *const u8 = x.bytes.as_slice().as_ptr().cast();
    let (scales, totals) = (x.scales.as_ptr(), x.sums.as_ptr());
    let (place, params, groups) = (row.codes.as_ptr(), row.params.as_ptr(), row.groups.as_ptr());
    // Two chains of sums for every row: one alone would wait for itself.
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    let mut correction = [[0f32; 2]; R];
    // SAFETY: by the contract above.
    unsafe {
        // A macro, because a closure of this size is called, and its sums go through memory.
        macro_rules! one {
            ($b:expr, $chain:literal) => {{
                let b = $b;
            let place = place.add(b * block_bytes(BITS));
            // Rows are short and lie one after the other; the hardware starts afresh at every page.
            // A hint may point behind the matrix.
            let mut ahead = 0;
            while ahead < block_bytes(BITS) {
                _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(AHEAD + ahead).cast());
                ahead += 64;
            }
            let [even, odd] = codes::<BITS>(place);
            for part in 0..PARTS {
                let group = *groups.add(b * 8 + part * (8 / PARTS)) as usize;
                let (scale, zero) = (*params.add(2 * group), *params.add(2 * group + 1));
                for r in 0..R {
                    let at = (first + r) * blocks + b;
                    let p = base.add((at * PARTS + part) * PART);
                    let load = |i: usize| _mm512_load_si512(p.add(64 * i).cast());
                    let none = _mm512_setzero_si512();
                    let high = _mm512_dpbusd_epi32(none, even, load(0));
                    let high = _mm512_dpbusd_epi32(high, odd, load(1));
                    let low = _mm512_dpbusd_epi32(none, even, load(2));
                    let low = _mm512_dpbusd_epi32(low, odd, load(3));
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
                    let factor = _mm512_set1_ps(scale * *scales.add(at));
                    let acc = &mut acc[r][$chain];
                    *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, *acc);
                    correction[r][$chain] += scale * zero * *totals.add(at * PARTS + part);
                }
            }
        }};
        }
        for b in (0..blocks / 2 * 2).step_by(2) {
            one!(b, 0);
            one!(b + 1, 1);
        }
        if blocks % 2 == 1 {
            one!(blocks - 1, 0);
        }
    }
    for ((sum, acc), correction) in sums.iter_mut().zip(acc).zip(correction) {
        let acc = _mm512_add_ps(acc[0], acc[1]);
        *sum = _mm512_reduce_add_ps(acc) - (correction[0] + correction[1]);
    }
}

/// Products of one output with rows `first..first + sums.len()` (1 to 4 of them) of `x`.
///
/// # Safety
/// AVX-512 F, BW, VL, DQ, VBMI and VNNI; the view must hold as many whole blocks of this width as `x`,
/// a group for every vector (one for all of a part) and parameters for every group; the rows exist.
pub(super) unsafe fn dots(
    bits: u8,
    row: RowView<'_>,
    x: &Quantized,
    first: usize,
    sums: &mut [f32],
) {
    debug_assert!(row.codes.len() == x.blocks * block_bytes(bits));
    debug_assert!((first + sums.len()) * x.blocks <= x.scales.len());
    macro_rules! rows {
        ($bits:literal, $parts:literal) => {
            match sums.len() {
                1 => kernel::<$bits, 1, $parts>(row, x, first, sums),
                2 => kernel::<$bits, 2, $parts>(row, x, first, sums),
                3 => kernel::<$bits, 3, $parts>(row, x, first, sums),
                _ => kernel::<$bits, 4, $parts>(row, x, first, sums),
            }
        };
    }
    macro_rules! parts {
        ($bits:literal) => {
            match x.parts {
                1 => rows!($bits, 1),
                2 => rows!($bits, 2),
                _ => rows!($bits, 4),
            }
        };
    }
    // SAFETY: by the contract above.
    unsafe {
        match bits {
            2 => parts!(2),
            3 => parts!(3),
            4 => parts!(4),
            5 => parts!(5),
            6 => parts!(6),
            _ => parts!(8),
        }
    }
}
