//! AVX2 kernels: 8 codes at a time are masked, converted, shifted by the zero and scaled.

use super::RowView;
use super::layout::block_bytes;
use crate::skinny::simd::reduce8;
use std::arch::x86_64::*;

/// The codes of half a block: lanes 0..8 or 8..16 of its vectors.
#[derive(Clone, Copy)]
struct Half<const BITS: u8> {
    low: __m256i,
    high: __m256i,
}

impl<const BITS: u8> Half<BITS> {
    /// # Safety
    /// AVX2; the block must be readable, and for width 3 the 4 bytes behind it.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(block: *const u8, half: usize) -> Self {
        let zero = _mm256_setzero_si256();
        // SAFETY: all loads stay in the block, but for the last 4 bytes of width 3 (see above).
        unsafe {
            match BITS {
                2 => {
                    let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(block.add(16 * half).cast()));
                    Self { low, high: zero }
                }
                3 => {
                    let p = block.add(24 * half);
                    let bytes = _mm256_set_m128i(
                        _mm_loadu_si128(p.add(12).cast()),
                        _mm_loadu_si128(p.cast()),
                    );
                    let lanes = _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0);
                    let lanes = _mm256_broadcastsi128_si256(lanes);
                    Self { low: _mm256_shuffle_epi8(bytes, lanes), high: zero }
                }
                4 => Self { low: _mm256_loadu_si256(block.add(32 * half).cast()), high: zero },
                5 => Self {
                    low: _mm256_loadu_si256(block.add(32 * half).cast()),
                    high: _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(64 + 8 * half).cast())),
                },
                _ => Self {
                    low: _mm256_loadu_si256(block.add(32 * half).cast()),
                    high: _mm256_cvtepu16_epi32(_mm_loadu_si128(block.add(64 + 16 * half).cast())),
                },
            }
        }
    }

    /// The codes of vector `j`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn codes(self, j: i32) -> __m256i {
        let field = |v, by: i32, mask| {
            _mm256_and_si256(_mm256_srlv_epi32(v, _mm256_set1_epi32(by)), _mm256_set1_epi32(mask))
        };
        match BITS {
            2 => field(self.low, 2 * j, 3),
            3 => field(self.low, 3 * j, 7),
            4 => field(self.low, 4 * j, 15),
            5 => {
                let high = _mm256_slli_epi32::<4>(field(self.high, j, 1));
                _mm256_or_si256(field(self.low, 4 * j, 15), high)
            }
            _ => {
                let high = _mm256_slli_epi32::<4>(field(self.high, 2 * j, 3));
                _mm256_or_si256(field(self.low, 4 * j, 15), high)
            }
        }
    }
}

/// Gives `sink(slot, weights)` for every 8 slots of a row.
///
/// # Safety
/// AVX2; a view of whole blocks whose groups have parameters, with slack behind the codes.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn walk<const BITS: u8>(row: RowView<'_>, mut sink: impl FnMut(usize, __m256)) {
    for (b, groups) in row.groups.chunks_exact(8).enumerate() {
        // SAFETY: one block for every eight groups.
        unsafe {
            let block = row.codes.as_ptr().add(b * block_bytes(BITS));
            let halves = if BITS == 8 {
                [Half::<BITS> { low: _mm256_setzero_si256(), high: _mm256_setzero_si256() }; 2]
            } else {
                [Half::<BITS>::load(block, 0), Half::<BITS>::load(block, 1)]
            };
            for (j, &group) in groups.iter().enumerate() {
                let at = row.params.as_ptr().add(2 * group as usize);
                let (scale, zero) = (_mm256_set1_ps(*at), _mm256_set1_ps(*at.add(1)));
                for (half, packed) in halves.into_iter().enumerate() {
                    let codes = if BITS == 8 {
                        _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(16 * j + 8 * half).cast()))
                    } else {
                        packed.codes(j as i32)
                    };
                    let centred = _mm256_sub_ps(_mm256_cvtepi32_ps(codes), zero);
                    sink(b * 128 + 16 * j + 8 * half, _mm256_mul_ps(centred, scale));
                }
            }
        }
    }
}

/// # Safety
/// As for [`walk`]; `x` holds all slots.
#[target_feature(enable = "avx2,fma")]
unsafe fn sum<const BITS: u8>(row: RowView<'_>, x: &[f32]) -> f32 {
    let mut acc = [_mm256_setzero_ps(); 4];
    let x = x.as_ptr();
    // SAFETY: by the contract above.
    unsafe {
        walk::<BITS>(row, |slot, w| {
            let a = &mut acc[slot / 8 % 4];
            *a = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.add(slot)), *a);
        });
    }
    reduce8(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])))
}

/// # Safety
/// As for [`walk`]; `to` holds all slots.
#[target_feature(enable = "avx2,fma")]
unsafe fn store<const BITS: u8>(row: RowView<'_>, to: &mut [f32]) {
    let to = to.as_mut_ptr();
    // SAFETY: by the contract above.
    unsafe { walk::<BITS>(row, |slot, w| _mm256_storeu_ps(to.add(slot), w)) }
}

/// The product of one output with one row of x.
///
/// # Safety
/// AVX2 and FMA; the view must hold whole blocks of this width with slack behind them, a group for
/// every vector and parameters for every group; `x` must hold all slots.
pub(super) unsafe fn dot(bits: u8, row: RowView<'_>, x: &[f32]) -> f32 {
    debug_assert!(x.len() == row.groups.len() * 16);
    debug_assert!(row.codes.len() / block_bytes(bits) * 8 == row.groups.len());
    // SAFETY: by the contract above.
    unsafe {
        match bits {
            2 => sum::<2>(row, x),
            3 => sum::<3>(row, x),
            4 => sum::<4>(row, x),
            5 => sum::<5>(row, x),
            6 => sum::<6>(row, x),
            _ => sum::<8>(row, x),
        }
    }
}

/// Decodes a row.
///
/// # Safety
/// As for [`dot`]; `to` must hold all slots.
pub(super) unsafe fn expand(bits: u8, row: RowView<'_>, to: &mut [f32]) {
    debug_assert!(to.len() == row.groups.len() * 16);
    // SAFETY: by the contract above.
    unsafe {
        match bits {
            2 => store::<2>(row, to),
            3 => store::<3>(row, to),
            4 => store::<4>(row, to),
            5 => store::<5>(row, to),
            6 => store::<6>(row, to),
            _ => store::<8>(row, to),
        }
    }
}
