//! The numbering of the points of a pyramid, without floating point.
//!
//! Points are in lexicographic order, where a coordinate takes the values 0, +1, -1, +2, -2, ...
//! Index `b` and `r = N - b` (1 for the last point) say the same; `r` is what the tables are made for.
//! With `l` coordinates behind the current one, `k` pulses before it and `m` behind it:
//!
//! ```text
//! 2 C(l, m-1) < r <= 2 C(l, m)        finds m, hence |y| = k - m, in one sorted row
//! x = r - 2 C(l, m-1)                 1 ..= 2 N(l, m), the positive half on top
//! y > 0 exactly if x > N(l, m);       the next r is x, less N(l, m) if positive
//! ```
//!
//! (For y = 0, m = k and x <= N(l, k) always.) So `r = 1 + Σ_i 2 C(l_i, m_i - 1) + [y_i > 0] N(l_i, m_i)`.

use super::bits;
use super::lattice::{LAST, Lattice, PAD, refuse};
use crate::skinny::simd::Isa;
use crate::{Error, Result};

/// Integers that hold the coordinates of a point.
pub trait Pulse: Copy + Default + Send + Sync + 'static {
    /// From a coordinate that fits.
    fn of(value: i32) -> Self;
    /// The coordinate.
    fn get(self) -> i32;
    /// Places the ending of a point, when the type is that of the table.
    #[doc(hidden)]
    fn ending(table: &[i8]) -> Option<&[Self]>;
}

impl Pulse for i8 {
    #[inline(always)]
    fn of(value: i32) -> Self {
        value as i8
    }
    #[inline(always)]
    fn get(self) -> i32 {
        i32::from(self)
    }
    #[inline(always)]
    fn ending(table: &[i8]) -> Option<&[Self]> {
        Some(table)
    }
}

impl Pulse for i16 {
    #[inline(always)]
    fn of(value: i32) -> Self {
        value as i16
    }
    #[inline(always)]
    fn get(self) -> i32 {
        i32::from(self)
    }
    #[inline(always)]
    fn ending(_: &[i8]) -> Option<&[Self]> {
        None
    }
}

/// Points that are decoded in lockstep, so that their dependent steps overlap.
pub(super) const BATCH: usize = 8;

impl Lattice {
    /// The index of a point, `0 .. N`. `y` must have `D` coordinates with magnitudes that sum to `K`.
    ///
    /// # Panics
    /// In debug builds, when `y` is not a point of this pyramid.
    pub fn encode<P: Pulse>(&self, y: &[P]) -> u128 {
        debug_assert_eq!(y.len(), self.dimension);
        debug_assert_eq!(
            y.iter().map(|v| v.get().unsigned_abs() as usize).sum::<usize>(),
            self.pulses
        );
        let (mut left, mut low, mut high) = (0usize, 0u64, 0u128);
        let (sums, counts) = (PAD + self.pulses, self.pulses + 1);
        for (l, v) in y.iter().rev().enumerate() {
            let v = v.get();
            // `left` is m, the pulses behind this coordinate.
            if l < self.narrow {
                // Signs are a coin's: no branch.
                let positive = self.counts[l * counts + left] & u64::from(v > 0).wrapping_neg();
                low = low.wrapping_add(self.sums[l * sums + PAD + left - 1]).wrapping_add(positive);
            } else {
                let l = l - self.narrow;
                let positive = if v > 0 { self.wide_counts[l * counts + left] } else { 0 };
                high += self.wide_sums[l * sums + PAD + left - 1] + positive;
            }
            left += v.unsigned_abs() as usize;
        }
        // The sum of the narrow rows is below N(narrow, K), hence has not wrapped.
        self.count - 1 - high - u128::from(low)
    }

    /// The point of an index.
    ///
    /// # Errors
    /// When the index is not below `N`, or `y` has not `D` places.
    pub fn decode<P: Pulse>(&self, index: u128, y: &mut [P]) -> Result<()> {
        if y.len() != self.dimension {
            return refuse(format!("{} places for {} coordinates", y.len(), self.dimension));
        }
        if index >= self.count {
            return Err(Error::Numeric {
                what: "pyramid index".into(),
                reason: format!("{index} is not below {}; the data is damaged", self.count),
            });
        }
        let mut rest = self.count - index;
        let mut left = self.pulses;
        self.wide_steps(&mut rest, &mut left, y);
        self.finish(&mut (rest as u64), &mut left, y);
        Ok(())
    }

    /// The coordinates whose counts exceed 64 bits.
    fn wide_steps<P: Pulse>(&self, rest: &mut u128, left: &mut usize, y: &mut [P]) {
        let (width, counts) = (PAD + self.pulses, self.pulses + 1);
        for l in (self.narrow..self.dimension).rev() {
            let row = &self.wide_sums[(l - self.narrow) * width..][..PAD + *left];
            // Magnitudes are small: m is near the pulses that were left.
            let mut m = *left;
            while m > 0 && row[PAD + m - 1] >= *rest {
                m -= 1;
            }
            let below = row[PAD + m - 1];
            let points = self.wide_counts[(l - self.narrow) * counts + m];
            let x = rest.wrapping_sub(below);
            let magnitude = (*left - m) as i32;
            let positive = x > points;
            *rest = if positive { x - points } else { x };
            *left = m;
            y[self.dimension - 1 - l] = P::of(if positive { magnitude } else { -magnitude });
        }
    }

    /// The other coordinates.
    fn finish<P: Pulse>(&self, rest: &mut u64, left: &mut usize, y: &mut [P]) {
        for l in (0..self.narrow).rev() {
            y[self.dimension - 1 - l] = P::of(self.step(l, rest, left));
        }
    }

    /// One coordinate with `l` behind it.
    #[inline(always)]
    pub(super) fn step(&self, l: usize, rest: &mut u64, left: &mut usize) -> i32 {
        let row = &self.sums[l * (PAD + self.pulses)..][..PAD + *left];
        let mut m = *left;
        while m > 0 && row[PAD + m - 1] >= *rest {
            m -= 1;
        }
        let points = self.counts[l * (self.pulses + 1) + m];
        let x = rest.wrapping_sub(row[PAD + m - 1]);
        let magnitude = (*left - m) as i32;
        let positive = u64::from(x > points);
        *rest = x.wrapping_sub(points & positive.wrapping_neg());
        *left = m;
        let negative = positive as i32 - 1;
        (magnitude ^ negative) - negative
    }

    /// Decodes `points` neighbouring indices of a bit stream into `y` `[points, D]`. Indices are not
    /// checked: one that is out of range gives some point (see [`Lattice::first_bad`]).
    pub(super) fn decode_stream<P: Pulse>(
        &self,
        isa: Isa,
        stream: &[u8],
        first_bit: usize,
        points: usize,
        y: &mut [P],
    ) {
        let d = self.dimension;
        let width = self.index_bits();
        let mut done = 0;
        while done < points {
            let n = BATCH.min(points - done);
            let y = &mut y[done * d..(done + n) * d];
            let mut rest = [1u64; BATCH];
            let mut left = [0usize; BATCH];
            for (g, (rest, left)) in rest.iter_mut().zip(&mut left).take(n).enumerate() {
                let bit = first_bit + (done + g) * width as usize;
                *left = self.pulses;
                if self.narrow == d {
                    *rest = (self.count as u64).wrapping_sub(bits::read64(stream, bit, width));
                } else {
                    let mut wide = self.count.wrapping_sub(bits::read(stream, bit, width));
                    self.wide_steps(&mut wide, left, &mut y[g * d..(g + 1) * d]);
                    *rest = wide as u64;
                }
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: detected.
                Isa::Avx512 if n == BATCH => unsafe {
                    // One window holds the magnitudes up to 7.
                    if self.pulses <= 2 * d {
                        self.lockstep::<P, 1>(&mut rest, &mut left, y);
                    } else {
                        self.lockstep::<P, 2>(&mut rest, &mut left, y);
                    }
                },
                _ => {
                    for (g, y) in y.chunks_exact_mut(d).enumerate() {
                        self.end(d, &mut rest[g], &mut left[g], y);
                    }
                }
            }
            done += n;
        }
    }

    /// Finishes a point of which `from <= narrow` coordinates are to come: steps, then the table.
    #[inline(always)]
    fn end<P: Pulse>(&self, d: usize, rest: &mut u64, left: &mut usize, y: &mut [P]) {
        for l in (self.last..self.narrow).rev() {
            y[d - 1 - l] = P::of(self.step(l, rest, left));
        }
        self.ending(*rest, *left, y);
    }

    /// The last coordinates, from the table where it has them.
    #[inline(always)]
    fn ending<P: Pulse>(&self, mut rest: u64, mut left: usize, y: &mut [P]) {
        let last = self.last;
        if last == 0 {
            return;
        }
        let from = self.dimension - last;
        let span = self.last_start.get(left..left + 2);
        let place = span.map(|s| s[0] as usize + (rest as usize).wrapping_sub(1));
        if let Some(ending) = place.and_then(|at| self.last_points.get(at))
            && let Some(ending) = P::ending(&ending[..last])
        {
            y[from..].copy_from_slice(ending);
            return;
        }
        for l in (0..last).rev() {
            y[self.dimension - 1 - l] = P::of(self.step(l, &mut rest, &mut left));
        }
    }

    /// [`BATCH`] points in lockstep: rows are searched in `W` windows of eight entries at once.
    ///
    /// # Safety
    /// AVX-512 F and VL, popcnt.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,popcnt,bmi1,bmi2")]
    unsafe fn lockstep<P: Pulse, const W: usize>(
        &self,
        rest: &mut [u64; BATCH],
        left: &mut [usize; BATCH],
        y: &mut [P],
    ) {
        use std::arch::x86_64::{_mm512_cmplt_epu64_mask, _mm512_loadu_epi64, _mm512_set1_epi64};
        const { assert!(8 * W <= PAD) };
        let d = self.dimension;
        assert!(y.len() == BATCH * d && left.iter().all(|&k| k <= self.pulses));
        let (width, counts) = (PAD + self.pulses, self.pulses + 1);
        for l in (self.last..self.narrow).rev() {
            let row = &self.sums[l * width..(l + 1) * width];
            let points = &self.counts[l * counts..(l + 1) * counts];
            let place = d - 1 - l;
            for g in 0..BATCH {
                let (k, r) = (left[g], rest[g]);
                let mut below = 0;
                for w in 0..W {
                    // SAFETY: k <= K: entries up to PAD + k - 1 of a row of PAD + K.
                    let window = unsafe {
                        _mm512_loadu_epi64(row.as_ptr().add(PAD - 8 * W + 8 * w + k).cast())
                    };
                    let mask = _mm512_cmplt_epu64_mask(window, _mm512_set1_epi64(r as i64));
                    below += mask.count_ones() as usize;
                }
                // The entries below r come first; those before the row are 0 and always below.
                let mut m = (k + below).wrapping_sub(8 * W);
                if below == 0 {
                    m = search_down(row, k.saturating_sub(8 * W), r);
                }
                // SAFETY: m <= k <= K, and PAD entries precede the row.
                let (sum, n) = unsafe {
                    debug_assert!(m <= k);
                    (*row.get_unchecked(PAD + m - 1), *points.get_unchecked(m))
                };
                let x = r.wrapping_sub(sum);
                // A sign is a coin's: no branch.
                let positive = u64::from(x > n);
                rest[g] = x.wrapping_sub(n & positive.wrapping_neg());
                left[g] = m;
                let negative = positive as i32 - 1;
                let value = ((k - m) as i32 ^ negative) - negative;
                // SAFETY: y holds BATCH * d places.
                unsafe { *y.get_unchecked_mut(g * d + place) = P::of(value) };
            }
        }
        for (g, y) in y.chunks_exact_mut(d).enumerate() {
            self.ending(rest[g], left[g], y);
        }
    }

    /// The first of `points` neighbouring indices of a stream that is not below `N`.
    pub fn first_bad(&self, stream: &[u8], first_bit: usize, points: usize) -> Option<usize> {
        let width = self.index_bits();
        if self.count.is_power_of_two() {
            return None;
        }
        (0..points)
            .find(|p| bits::read(stream, first_bit + p * width as usize, width) >= self.count)
    }
}

/// The pulses behind a coordinate whose magnitude no window holds: at most `from`.
#[cfg(target_arch = "x86_64")]
#[cold]
#[inline(never)]
fn search_down(row: &[u64], from: usize, r: u64) -> usize {
    let mut m = from;
    while m > 0 && row[PAD + m - 1] >= r {
        m -= 1;
    }
    m
}

const _: () = assert!(LAST == 4, "endings are packed as four bytes");
