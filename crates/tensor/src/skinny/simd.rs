//! The register tiles behind [`super`]: a few rows of x against a few rows of weights, for AVX-512,
//! AVX2 and portable code, chosen at run time.

use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Instruction sets with kernels of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F, BW, VL and DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// The best that this processor has (the answer is cached by the standard library).
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            if avx2 && avx512 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Everything that this processor can run, best first.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        match Self::detect() {
            Self::Avx512 => return vec![Self::Avx512, Self::Avx2, Self::Portable],
            Self::Avx2 => return vec![Self::Avx2, Self::Portable],
            Self::Portable => {}
        }
        vec![Self::Portable]
    }
}

/// A type of weights that can be loaded into f32 registers.
pub(crate) trait Lane: Copy + Send + Sync + 'static {
    /// The value in f32 (exact).
    fn widen(self) -> f32;

    /// The slice itself when it is f32.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    /// # Safety
    /// AVX-512 F; 16 values readable.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(p: *const Self) -> __m512;

    /// # Safety
    /// AVX-512 F, BW, VL; the values of the mask readable. The others become 0.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_some(p: *const Self, mask: u16) -> __m512;

    /// # Safety
    /// AVX2 and F16C; 8 values readable.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(p: *const Self) -> __m256;
}

impl Lane for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn as_f32(slice: &[Self]) -> Option<&[f32]> {
        Some(slice)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(p: *const Self) -> __m512 {
        // SAFETY: readable by contract.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_some(p: *const Self, mask: u16) -> __m512 {
        // SAFETY: masked lanes are not touched.
        unsafe { _mm512_maskz_loadu_ps(mask, p) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: readable by contract.
        unsafe { _mm256_loadu_ps(p) }
    }
}

impl Lane for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(p: *const Self) -> __m512 {
        // SAFETY: readable by contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_some(p: *const Self, mask: u16) -> __m512 {
        // SAFETY: masked lanes are not touched.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: readable by contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}

impl Lane for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        // Not `to_f32`, which branches on NaN to quieten it.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(p: *const Self) -> __m512 {
        // SAFETY: readable by contract.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_some(p: *const Self, mask: u16) -> __m512 {
        // SAFETY: masked lanes are not touched.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: readable by contract.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}

/// Runs every pair (row of x, row of w) through register tiles of at most `$rows` x 4. Rows of w are
/// the outer loop, so that each is read from memory once and then from the cache.
macro_rules! tiles {
    ($tile:ident, $x:expr, $rows:expr, $w:expr, $inputs:expr, $sink:expr, [$($r:literal),+]) => {{
        let (x, rows, w, inputs) = ($x, $rows, $w, $inputs);
        let count = if inputs == 0 { 0 } else { w.len() / inputs };
        let mut o = 0;
        while o < count {
            let wide = if count - o >= 4 { 4 } else { 1 };
            let mut r = 0;
            while r < rows {
                $(
                    while rows - r >= $r {
                        let xs = &x[r * inputs..(r + $r) * inputs];
                        let ws = &w[o * inputs..(o + wide) * inputs];
                        if wide == 4 {
                            // SAFETY: the features are present; xs and ws hold whole rows.
                            let sums = unsafe { $tile::<T, $r, 4>(xs, ws, inputs) };
                            for (i, line) in sums.iter().enumerate() {
                                for (j, &sum) in line.iter().enumerate() {
                                    $sink(r + i, o + j, sum);
                                }
                            }
                        } else {
                            // SAFETY: as above.
                            let sums = unsafe { $tile::<T, $r, 1>(xs, ws, inputs) };
                            for (i, line) in sums.iter().enumerate() {
                                $sink(r + i, o, line[0]);
                            }
                        }
                        r += $r;
                    }
                )+
            }
            o += wide;
        }
    }};
}

/// Gives `sink(row, output, sum)` for every row of `x` `[rows, inputs]` and every row of `w`
/// `[.., inputs]`.
pub(crate) fn rows_times<T: Lane>(
    isa: Isa,
    x: &[f32],
    rows: usize,
    w: &[T],
    inputs: usize,
    mut sink: impl FnMut(usize, usize, f32),
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => tiles!(tile_avx512, x, rows, w, inputs, sink, [4, 2, 1]),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => tiles!(tile_avx2, x, rows, w, inputs, sink, [2, 1]),
        Isa::Portable => tiles!(tile_portable, x, rows, w, inputs, sink, [2, 1]),
    }
}

/// # Safety
/// AVX-512 F, BW, VL, DQ; `x` holds R and `w` holds O rows of `n`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn tile_avx512<T: Lane, const R: usize, const O: usize>(
    x: &[f32],
    w: &[T],
    n: usize,
) -> [[f32; O]; R] {
    debug_assert!(x.len() == R * n && w.len() == O * n);
    let (x, w) = (x.as_ptr(), w.as_ptr());
    let mut acc = [[_mm512_setzero_ps(); O]; R];
    let full = n / 16 * 16;
    let mut k = 0;
    // SAFETY: k + 16 <= n in the loop; the tail loads only the values that are left.
    unsafe {
        while k < full {
            let mut ws = [_mm512_setzero_ps(); O];
            for (o, v) in ws.iter_mut().enumerate() {
                *v = T::load16(w.add(o * n + k));
            }
            for (r, line) in acc.iter_mut().enumerate() {
                let xs = _mm512_loadu_ps(x.add(r * n + k));
                for (a, &v) in line.iter_mut().zip(&ws) {
                    *a = _mm512_fmadd_ps(v, xs, *a);
                }
            }
            k += 16;
        }
        if k < n {
            let mask = (1u16 << (n - k)) - 1;
            for (r, line) in acc.iter_mut().enumerate() {
                let xs = _mm512_maskz_loadu_ps(mask, x.add(r * n + k));
                for (o, a) in line.iter_mut().enumerate() {
                    *a = _mm512_fmadd_ps(T::load_some(w.add(o * n + k), mask), xs, *a);
                }
            }
        }
    }
    let mut sums = [[0.0; O]; R];
    for (line, accs) in sums.iter_mut().zip(&acc) {
        for (sum, &a) in line.iter_mut().zip(accs) {
            *sum = _mm512_reduce_add_ps(a);
        }
    }
    sums
}

/// Sum of the eight lanes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn reduce8(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// # Safety
/// AVX2, FMA, F16C; `x` holds R and `w` holds O rows of `n`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_avx2<T: Lane, const R: usize, const O: usize>(
    x: &[f32],
    w: &[T],
    n: usize,
) -> [[f32; O]; R] {
    debug_assert!(x.len() == R * n && w.len() == O * n);
    let mut acc = [[_mm256_setzero_ps(); O]; R];
    let full = n / 8 * 8;
    let mut k = 0;
    // SAFETY: k + 8 <= n.
    unsafe {
        while k < full {
            let mut ws = [_mm256_setzero_ps(); O];
            for (o, v) in ws.iter_mut().enumerate() {
                *v = T::load8(w.as_ptr().add(o * n + k));
            }
            for (r, line) in acc.iter_mut().enumerate() {
                let xs = _mm256_loadu_ps(x.as_ptr().add(r * n + k));
                for (a, &v) in line.iter_mut().zip(&ws) {
                    *a = _mm256_fmadd_ps(v, xs, *a);
                }
            }
            k += 8;
        }
    }
    let mut sums = [[0.0; O]; R];
    for (r, line) in sums.iter_mut().enumerate() {
        for (o, sum) in line.iter_mut().enumerate() {
            *sum = reduce8(acc[r][o]);
            for k in full..n {
                *sum += x[r * n + k] * w[o * n + k].widen();
            }
        }
    }
    sums
}

/// Eight lanes that any compiler can keep in vector registers. Unsafe only to look like the others.
unsafe fn tile_portable<T: Lane, const R: usize, const O: usize>(
    x: &[f32],
    w: &[T],
    n: usize,
) -> [[f32; O]; R] {
    let mut sums = [[0.0; O]; R];
    for (r, line) in sums.iter_mut().enumerate() {
        for (o, sum) in line.iter_mut().enumerate() {
            let xs = x[r * n..(r + 1) * n].chunks_exact(8);
            let ws = w[o * n..(o + 1) * n].chunks_exact(8);
            let rest = xs.remainder().iter().zip(ws.remainder());
            let tail: f32 = rest.map(|(&a, &b)| a * b.widen()).sum();
            let mut lanes = [0.0f32; 8];
            for (a, b) in xs.zip(ws) {
                for i in 0..8 {
                    lanes[i] += a[i] * b[i].widen();
                }
            }
            *sum = lanes.iter().sum::<f32>() + tail;
        }
    }
    sums
}

/// Converts to f32. The slices must be of one length; surplus is left alone.
pub(crate) fn widen<T: Lane>(isa: Isa, from: &[T], to: &mut [f32]) {
    match isa {
        // SAFETY: detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { widen_avx512(from, to) },
        // SAFETY: detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { widen_avx2(from, to) },
        Isa::Portable => widen_plain(from, to),
    }
}

#[inline(always)]
fn widen_plain<T: Lane>(from: &[T], to: &mut [f32]) {
    for (t, &f) in to.iter_mut().zip(from) {
        *t = f.widen();
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen_avx512<T: Lane>(from: &[T], to: &mut [f32]) {
    let n = from.len().min(to.len());
    let full = n / 16 * 16;
    for k in (0..full).step_by(16) {
        // SAFETY: k + 16 <= n.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr().add(k), T::load16(from.as_ptr().add(k))) };
    }
    widen_plain(&from[full..n], &mut to[full..n]);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn widen_avx2<T: Lane>(from: &[T], to: &mut [f32]) {
    let n = from.len().min(to.len());
    let full = n / 8 * 8;
    for k in (0..full).step_by(8) {
        // SAFETY: k + 8 <= n.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr().add(k), T::load8(from.as_ptr().add(k))) };
    }
    widen_plain(&from[full..n], &mut to[full..n]);
}
