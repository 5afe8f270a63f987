//! AVX-512 kernels: 16 codes at a time become weights in a register.
//!
//! Up to 5 bits the weights of a group are a table of at most 32 numbers in one or two registers, and
//! the lane's low bits look them up, so decoding 16 weights is a shift and a permutation. Wider codes
//! are converted. Nothing is read beyond the row but for masked lanes.

use super::RowView;
use super::layout::block_bytes;
use std::arch::x86_64::*;

/// How far in front of the block in hand memory is asked for, in bytes.
const AHEAD: usize = 2048;

/// How the codes of one width become numbers.
trait Codec {
    const BITS: u8;
    type Block: Copy;
    type Table: Copy;
    /// # Safety
    /// AVX-512 F and BW; a whole block readable.
    unsafe fn load(p: *const u8) -> Self::Block;
    /// # Safety
    /// AVX-512 F.
    unsafe fn table(scale: f32, zero: f32) -> Self::Table;
    /// The weights of vector `j` of the block.
    /// # Safety
    /// AVX-512 F; the block must still be readable.
    unsafe fn decode(block: Self::Block, table: Self::Table, j: u32) -> __m512;
}

/// (code - zero) * scale for the codes 0..16, which repeat above `mask`.
#[inline]
#[target_feature(enable = "avx512f")]
fn table16(scale: f32, zero: f32, mask: i32, add: i32) -> __m512 {
    let index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let code =
        _mm512_add_epi32(_mm512_and_si512(index, _mm512_set1_epi32(mask)), _mm512_set1_epi32(add));
    values(code, [_mm512_set1_ps(scale), _mm512_set1_ps(zero)])
}

/// (code - zero) * scale.
#[inline]
#[target_feature(enable = "avx512f")]
fn values(code: __m512i, [scale, zero]: [__m512; 2]) -> __m512 {
    _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero), scale)
}

/// Every lane shifted right; `by` is a constant after inlining.
#[inline]
#[target_feature(enable = "avx512f")]
fn down(v: __m512i, by: u32) -> __m512i {
    _mm512_srlv_epi32(v, _mm512_set1_epi32(by as i32))
}

struct Two;
impl Codec for Two {
    const BITS: u8 = 2;
    type Block = __m512i;
    type Table = __m512;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(p: *const u8) -> __m512i {
        // SAFETY: 32 bytes are readable.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn table(scale: f32, zero: f32) -> __m512 {
        // The look-up takes 4 bits of the lane, two of which belong to the next code.
        table16(scale, zero, 3, 0)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn decode(block: __m512i, table: __m512, j: u32) -> __m512 {
        _mm512_permutexvar_ps(down(block, 2 * j), table)
    }
}

struct Three;
impl Codec for Three {
    const BITS: u8 = 3;
    type Block = __m512i;
    type Table = __m512;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(p: *const u8) -> __m512i {
        // 48 bytes; 12 to each 128-bit part, then 3 to each lane.
        // SAFETY: only the 12 doublewords of the mask are read.
        let bytes = unsafe { _mm512_maskz_loadu_epi32(0x0FFF, p.cast()) };
        let parts = _mm512_set_epi32(15, 11, 10, 9, 15, 8, 7, 6, 15, 5, 4, 3, 15, 2, 1, 0);
        let lanes = _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0);
        _mm512_shuffle_epi8(_mm512_permutexvar_epi32(parts, bytes), _mm512_broadcast_i32x4(lanes))
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn table(scale: f32, zero: f32) -> __m512 {
        table16(scale, zero, 7, 0)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn decode(block: __m512i, table: __m512, j: u32) -> __m512 {
        _mm512_permutexvar_ps(down(block, 3 * j), table)
    }
}

struct Four;
impl Codec for Four {
    const BITS: u8 = 4;
    type Block = __m512i;
    type Table = __m512;
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(p: *const u8) -> __m512i {
        // SAFETY: 64 bytes are readable.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn table(scale: f32, zero: f32) -> __m512 {
        table16(scale, zero, 15, 0)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn decode(block: __m512i, table: __m512, j: u32) -> __m512 {
        _mm512_permutexvar_ps(down(block, 4 * j), table)
    }
}

struct Five;
impl Codec for Five {
    const BITS: u8 = 5;
    type Block = [__m512i; 2];
    type Table = [__m512; 2];
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(p: *const u8) -> [__m512i; 2] {
        // SAFETY: 64 + 16 bytes are readable.
        let (low, high) =
            unsafe { (_mm512_loadu_si512(p.cast()), _mm_loadu_si128(p.add(64).cast())) };
        [low, _mm512_slli_epi32::<4>(_mm512_cvtepu8_epi32(high))]
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn table(scale: f32, zero: f32) -> [__m512; 2] {
        [table16(scale, zero, 15, 0), table16(scale, zero, 15, 16)]
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn decode([low, high]: [__m512i; 2], table: [__m512; 2], j: u32) -> __m512 {
        // Bit 4 from the second plane, the others from the first: mask ? high : low.
        let index = _mm512_ternarylogic_epi32::<0xCA>(
            _mm512_set1_epi32(16),
            down(high, j),
            down(low, 4 * j),
        );
        _mm512_permutex2var_ps(table[0], index, table[1])
    }
}

struct Six;
impl Codec for Six {
    const BITS: u8 = 6;
    type Block = [__m512i; 2];
    type Table = [__m512; 2];
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(p: *const u8) -> [__m512i; 2] {
        // SAFETY: 64 + 32 bytes are readable.
        let (low, high) =
            unsafe { (_mm512_loadu_si512(p.cast()), _mm256_loadu_si256(p.add(64).cast())) };
        [low, _mm512_slli_epi32::<4>(_mm512_cvtepu16_epi32(high))]
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn table(scale: f32, zero: f32) -> [__m512; 2] {
        [_mm512_set1_ps(scale), _mm512_set1_ps(zero)]
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn decode([low, high]: [__m512i; 2], table: [__m512; 2], j: u32) -> __m512 {
        let code = _mm512_ternarylogic_epi32::<0xCA>(
            _mm512_set1_epi32(0x30),
            down(high, 2 * j),
            down(low, 4 * j),
        );
        values(_mm512_and_si512(code, _mm512_set1_epi32(0x3F)), table)
    }
}

struct Eight;
impl Codec for Eight {
    const BITS: u8 = 8;
    type Block = *const u8;
    type Table = [__m512; 2];
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(p: *const u8) -> *const u8 {
        p
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn table(scale: f32, zero: f32) -> [__m512; 2] {
        [_mm512_set1_ps(scale), _mm512_set1_ps(zero)]
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn decode(block: *const u8, table: [__m512; 2], j: u32) -> __m512 {
        // SAFETY: vector j of the block is readable.
        let codes = unsafe { _mm_loadu_si128(block.add(16 * j as usize).cast()) };
        values(_mm512_cvtepu8_epi32(codes), table)
    }
}

/// Walks over the vectors of a row: `$body` sees the slot and the 16 weights. STEP says how many
/// vectors share a group for certain.
macro_rules! walk {
    ($c:ty, $step:expr, $row:expr, |$vector:ident, $slot:ident, $w:ident| $body:expr) => {{
        let row: RowView<'_> = $row;
        let blocks = row.codes.len() / block_bytes(<$c>::BITS);
        let (codes, params, groups) = (row.codes.as_ptr(), row.params.as_ptr(), row.groups.as_ptr());
        let mut current = u32::MAX;
        let mut table = <$c>::table(0.0, 0.0);
        for b in 0..blocks {
            let place = codes.add(b * block_bytes(<$c>::BITS));
            // Rows are short and lie one after the other; the hardware starts afresh at every page.
            // A hint may point behind the matrix.
            let mut ahead = 0;
            while ahead < block_bytes(<$c>::BITS) {
                _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(AHEAD + ahead).cast());
                ahead += 64;
            }
            let block = <$c>::load(place);
            walk!(@vectors $c, $step, b, block, current, table, params, groups,
                |$vector, $slot, $w| $body, [0, 1, 2, 3, 4, 5, 6, 7]);
        }
    }};
    (@vectors $c:ty, $step:expr, $b:ident, $block:ident, $current:ident, $table:ident,
     $params:ident, $groups:ident, |$vector:ident, $slot:ident, $w:ident| $body:expr,
     [$($j:literal),+]) => {
        $(
            if $j % $step == 0 {
                let group = *$groups.add($b * 8 + $j);
                if group != $current {
                    $current = group;
                    let at = $params.add(2 * group as usize);
                    $table = <$c>::table(*at, *at.add(1));
                }
            }
            {
                let $vector = $j;
                let $slot = $b * 128 + $j * 16;
                let $w = <$c>::decode($block, $table, $j as u32);
                $body
            }
        )+
    };
}

/// # Safety
/// AVX-512; a view of whole blocks whose groups have parameters; `x` holds R rows of all slots.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn kernel<C: Codec, const R: usize, const A: usize, const STEP: usize>(
    row: RowView<'_>,
    x: &[f32],
    sums: &mut [f32],
) {
    let slots = row.groups.len() * 16;
    let xs = x.as_ptr();
    let mut acc = [[_mm512_setzero_ps(); A]; R];
    // SAFETY: by the contract above.
    unsafe {
        walk!(C, STEP, row, |vector, slot, w| {
            for (r, line) in acc.iter_mut().enumerate() {
                let a = &mut line[vector % A];
                *a = _mm512_fmadd_ps(w, _mm512_loadu_ps(xs.add(r * slots + slot)), *a);
            }
        });
    }
    for (sum, line) in sums.iter_mut().zip(&acc) {
        let mut total = line[0];
        for &a in &line[1..] {
            total = _mm512_add_ps(total, a);
        }
        *sum = _mm512_reduce_add_ps(total);
    }
}

/// # Safety
/// As for [`kernel`]; `to` holds all slots.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn store<C: Codec, const STEP: usize>(row: RowView<'_>, to: &mut [f32]) {
    let to = to.as_mut_ptr();
    // SAFETY: by the contract above.
    unsafe {
        walk!(C, STEP, row, |_vector, slot, w| _mm512_storeu_ps(to.add(slot), w));
    }
}

/// # Safety
/// As for [`store`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn store_any<C: Codec>(row: RowView<'_>, to: &mut [f32]) {
    // SAFETY: by the contract above.
    unsafe { if row.whole_blocks { store::<C, 8>(row, to) } else { store::<C, 1>(row, to) } }
}

/// # Safety
/// As for [`kernel`], with `rows` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn rows_of<C: Codec, const STEP: usize>(
    row: RowView<'_>,
    x: &[f32],
    rows: usize,
    sums: &mut [f32],
) {
    let slots = row.groups.len() * 16;
    // SAFETY: by the contract above.
    unsafe {
        match rows {
            1 => kernel::<C, 1, 4, STEP>(row, x, sums),
            2 => kernel::<C, 2, 2, STEP>(row, x, sums),
            3 => {
                kernel::<C, 2, 2, STEP>(row, &x[..2 * slots], sums);
                kernel::<C, 1, 4, STEP>(row, &x[2 * slots..], &mut sums[2..]);
            }
            _ => kernel::<C, 4, 2, STEP>(row, x, sums),
        }
    }
}

/// # Safety
/// As for [`kernel`], with `rows` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn any_step<C: Codec>(row: RowView<'_>, x: &[f32], rows: usize, sums: &mut [f32]) {
    // SAFETY: by the contract above.
    unsafe {
        if row.whole_blocks {
            rows_of::<C, 8>(row, x, rows, sums);
        } else {
            rows_of::<C, 1>(row, x, rows, sums);
        }
    }
}

/// Products of one output with `rows` (1 to 4) rows of x.
///
/// # Safety
/// AVX-512 F, BW, VL, DQ; the view must hold whole blocks of this width, a group for every vector
/// and parameters for every group; `x` must hold `rows` times all slots.
pub(super) unsafe fn dots(bits: u8, row: RowView<'_>, x: &[f32], rows: usize, sums: &mut [f32; 4]) {
    debug_assert!((1..=4).contains(&rows) && x.len() == rows * row.groups.len() * 16);
    debug_assert!(row.codes.len() / block_bytes(bits) * 8 == row.groups.len());
    // SAFETY: by the contract above.
    unsafe {
        match bits {
            2 => any_step::<Two>(row, x, rows, sums),
            3 => any_step::<Three>(row, x, rows, sums),
            4 => any_step::<Four>(row, x, rows, sums),
            5 => any_step::<Five>(row, x, rows, sums),
            6 => any_step::<Six>(row, x, rows, sums),
            _ => any_step::<Eight>(row, x, rows, sums),
        }
    }
}

/// # Safety
/// As for [`panel`], with R rows and PARTS parts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn panel_kernel<C: Codec, const R: usize, const PARTS: usize>(
    codes: &[u8],
    params: &[f32],
    x: &[f32],
    inputs: usize,
    sums: &mut [f32],
) {
    let (codes, params, x) = (codes.as_ptr(), params.as_ptr(), x.as_ptr());
    let sums = sums.as_mut_ptr();
    let mut acc = [[_mm512_setzero_ps(); 8]; R];
    // SAFETY: by the contract above.
    unsafe {
        for k in 0..inputs {
            let place = codes.add(k * block_bytes(C::BITS));
            _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(AHEAD).cast());
            let block = C::load(place);
            for part in 0..PARTS {
                let pair = params.add(2 * (k * PARTS + part));
                let table = C::table(*pair, *pair.add(1));
                for j in part * (8 / PARTS)..(part + 1) * (8 / PARTS) {
                    let w = C::decode(block, table, j as u32);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        acc[j] = _mm512_fmadd_ps(w, _mm512_set1_ps(*x.add(r * inputs + k)), acc[j]);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (j, &a) in acc.iter().enumerate() {
                let to = sums.add(r * 128 + 16 * j);
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), a));
            }
        }
    }
}

/// Adds one or two rows of x times a panel of 128 outputs to `sums`.
///
/// # Safety
/// AVX-512 F, BW, VL, DQ; `codes` holds a block of this width for every input and the slack behind the
/// last, `params` `parts` (1, 2, 4 or 8) pairs for every input, `x` one or two rows of all inputs,
/// `sums` 128 places for every row.
pub(super) unsafe fn panel(
    bits: u8,
    parts: usize,
    codes: &[u8],
    params: &[f32],
    x: &[f32],
    inputs: usize,
    sums: &mut [f32],
) {
    debug_assert!(codes.len() >= inputs * block_bytes(bits) && params.len() >= 2 * inputs * parts);
    debug_assert!(x.len() / inputs == sums.len() / 128 && matches!(sums.len() / 128, 1 | 2));
    macro_rules! parts {
        ($codec:ty, $rows:literal) => {
            match parts {
                1 => panel_kernel::<$codec, $rows, 1>(codes, params, x, inputs, sums),
                2 => panel_kernel::<$codec, $rows, 2>(codes, params, x, inputs, sums),
                4 => panel_kernel::<$codec, $rows, 4>(codes, params, x, inputs, sums),
                _ => panel_kernel::<$codec, $rows, 8>(codes, params, x, inputs, sums),
            }
        };
    }
    macro_rules! rows {
        ($codec:ty) => {
            if sums.len() == 128 { parts!($codec, 1) } else { parts!($codec, 2) }
        };
    }
    // SAFETY: by the contract above.
    unsafe {
        match bits {
            2 => rows!(Two),
            3 => rows!(Three),
            4 => rows!(Four),
            5 => rows!(Five),
            6 => rows!(Six),
            _ => rows!(Eight),
        }
    }
}

/// Decodes a row.
///
/// # Safety
/// As for [`dots`]; `to` must hold all slots.
pub(super) unsafe fn expand(bits: u8, row: RowView<'_>, to: &mut [f32]) {
    debug_assert!(to.len() == row.groups.len() * 16);
    // SAFETY: by the contract above.
    unsafe {
        match bits {
            2 => store_any::<Two>(row, to),
            3 => store_any::<Three>(row, to),
            4 => store_any::<Four>(row, to),
            5 => store_any::<Five>(row, to),
            6 => store_any::<Six>(row, to),
            _ => store_any::<Eight>(row, to),
        }
    }
}
