//! Sixteen f32 lanes as one value, for kernels whose accumulators must stay in registers.
//!
//! Loops over plain arrays mostly vectorise by themselves (see `simd`); tiles of a matrix product do
//! not reliably. A kernel is written once over [`Lanes`] and instantiated per instruction set.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values. Methods are always inlined, so that they take the instruction set of the
/// function they are used in.
pub(crate) trait Lanes: Copy {
    /// # Safety
    /// 16 values readable at `p`; the processor has the instruction set.
    unsafe fn load(p: *const f32) -> Self;
    /// # Safety
    /// 16 values writable at `p`; the processor has the instruction set.
    unsafe fn store(self, p: *mut f32);
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn splat(value: f32) -> Self;
    /// `self + a * b`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
}

impl Lanes for [f32; LANES] {
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: readable by contract; the array has no alignment beyond f32's.
        unsafe { p.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: writable by contract.
        unsafe { p.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for ((sum, a), b) in self.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for __m512 {
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: by contract.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: by contract.
        unsafe { _mm512_storeu_ps(p, self) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: by contract.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: by contract.
        unsafe { _mm512_fmadd_ps(a, b, self) }
    }
}

/// Sixteen lanes in two AVX registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

#[cfg(target_arch = "x86_64")]
impl Lanes for Pair {
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: by contract.
        unsafe { Pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: by contract.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: by contract.
        unsafe { Pair(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: by contract.
        unsafe { Pair(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
    }
}
