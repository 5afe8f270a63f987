//! Gram matrices: the sum over tokens of xᵀx, which second-order pruning and quantisation need.
//!
//! Only the triangle row <= column is computed, in tiles: a tile is multiplied in f32 over a block of
//! [`TOKEN_BLOCK`] tokens and then added into the (usually f64) sum. Tiles run in parallel; each is
//! summed in the order of the tokens, so the result does not depend on the number of threads. What
//! the sum is good for is left to [`crate::linalg`] and the methods.

use crate::skinny::simd::Isa;
use crate::skinny::with_scratch;
use crate::{Error, Result};
use rayon::prelude::*;

/// Tokens whose products are summed in f32 before they are added into the accumulator.
pub const TOKEN_BLOCK: usize = 1024;

/// Largest side of a tile: its f32 product and both inputs stay in the second-level cache.
const TILE: usize = 384;

/// A number that products are accumulated in: f64, or f32 when memory matters more.
pub trait Accumulator: Copy + Send + Sync + 'static {
    /// Zero.
    const ZERO: Self;
    /// `self + scale * x`.
    #[must_use]
    fn plus(self, scale: f32, x: f32) -> Self;
}

impl Accumulator for f64 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn plus(self, scale: f32, x: f32) -> Self {
        self + f64::from(scale) * f64::from(x)
    }
}

impl Accumulator for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn plus(self, scale: f32, x: f32) -> Self {
        self + scale * x
    }
}

/// Rows and columns of a piece of the triangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    top: usize,
    height: usize,
    left: usize,
    width: usize,
}

/// Covers the triangle row <= column of `n` columns from `start` on: squares of `side` off the
/// diagonal, ever smaller ones along it, so that little is computed twice.
fn cover(start: usize, n: usize, side: usize, tiles: &mut Vec<Tile>) {
    for top in (start..start + n).step_by(side) {
        let height = side.min(start + n - top);
        for left in (top + side..start + n).step_by(side) {
            tiles.push(Tile { top, height, left, width: side.min(start + n - left) });
        }
        if height > 64 {
            cover(top, height, (height / 2).next_multiple_of(16), tiles);
        } else {
            tiles.push(Tile { top, height, left: top, width: height });
        }
    }
}

/// The tiles of an `n` x `n` triangle, the largest first.
fn tiles_of(n: usize) -> Vec<Tile> {
    let mut tiles = Vec::new();
    // At least about ten large tiles, so that a few threads are evenly busy.
    let side = n.div_ceil(5).next_multiple_of(16).clamp(16, TILE);
    cover(0, n, side, &mut tiles);
    tiles.sort_by_key(|t| std::cmp::Reverse(t.height * t.width));
    tiles
}

struct Shared<A>(*mut A);
// SAFETY: every task writes only its own tile.
unsafe impl<A: Send> Send for Shared<A> {}
// SAFETY: as above.
unsafe impl<A: Send> Sync for Shared<A> {}

/// acc += scale * XᵀX in the triangle row <= column; what lies below the diagonal is not touched.
///
/// `x`: `[tokens, n]`, row-major; `acc`: `[n, n]`. Give a thousand tokens or more at a time where
/// possible: every call passes once over the accumulator.
///
/// # Panics
/// When a length does not fit.
pub fn gram_add_upper<A: Accumulator>(
    x: &[f32],
    tokens: usize,
    n: usize,
    acc: &mut [A],
    scale: f32,
) {
    assert_eq!(Some(x.len()), tokens.checked_mul(n), "x must hold [{tokens}, {n}]");
    assert_eq!(Some(acc.len()), n.checked_mul(n), "the sum must hold [{n}, {n}]");
    if tokens == 0 || n == 0 {
        return;
    }
    let isa = Isa::detect();
    let target = Shared(acc.as_mut_ptr());
    let target = &target;
    let run = |tile: &Tile| {
        with_scratch(tile.height * tile.width, |product| {
            for first in (0..tokens).step_by(TOKEN_BLOCK) {
                let count = TOKEN_BLOCK.min(tokens - first);
                // SAFETY: the tile lies in the n columns of x, and the rows are in bounds.
                unsafe {
                    let block = x.as_ptr().add(first * n);
                    gemm::gemm(
                        tile.height,
                        tile.width,
                        count,
                        product.as_mut_ptr(),
                        1,
                        tile.width as isize,
                        false,
                        block.add(tile.top),
                        n as isize,
                        1,
                        block.add(tile.left),
                        1,
                        n as isize,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                }
                for (i, line) in product.chunks_exact(tile.width).enumerate() {
                    let row = tile.top + i;
                    // On the diagonal only what is not below it.
                    let skip = row.saturating_sub(tile.left).min(tile.width);
                    // SAFETY: row < n, left + width <= n, and this tile belongs to this task.
                    let sums = unsafe {
                        std::slice::from_raw_parts_mut(
                            target.0.add(row * n + tile.left + skip),
                            tile.width - skip,
                        )
                    };
                    add_line(isa, sums, &line[skip..], scale);
                }
            }
        });
    };
    let tiles = tiles_of(n);
    if tokens * n * n < 1 << 20 {
        tiles.iter().for_each(run);
    } else {
        tiles.par_iter().with_max_len(1).for_each(run);
    }
}

#[inline(always)]
fn add_plain<A: Accumulator>(sums: &mut [A], line: &[f32], scale: f32) {
    for (sum, &x) in sums.iter_mut().zip(line) {
        *sum = sum.plus(scale, x);
    }
}

/// The plain loop, compiled for wider registers as well.
fn add_line<A: Accumulator>(isa: Isa, sums: &mut [A], line: &[f32], scale: f32) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
    fn avx512<A: Accumulator>(sums: &mut [A], line: &[f32], scale: f32) {
        add_plain(sums, line, scale);
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn avx2<A: Accumulator>(sums: &mut [A], line: &[f32], scale: f32) {
        add_plain(sums, line, scale);
    }
    match isa {
        // SAFETY: detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(sums, line, scale) },
        // SAFETY: detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(sums, line, scale) },
        Isa::Portable => add_plain(sums, line, scale),
    }
}

/// Copies the triangle above the diagonal of `[n, n]` to the one below.
///
/// # Panics
/// When the length does not fit.
pub fn mirror_upper<A: Accumulator>(acc: &mut [A], n: usize) {
    const BLOCK: usize = 32;
    assert_eq!(Some(acc.len()), n.checked_mul(n), "the matrix must hold [{n}, {n}]");
    let pairs: Vec<(usize, usize)> = (0..n)
        .step_by(BLOCK)
        .flat_map(|top| (top..n).step_by(BLOCK).map(move |left| (top, left)))
        .collect();
    let matrix = Shared(acc.as_mut_ptr());
    let matrix = &matrix;
    pairs.par_iter().with_min_len(64).for_each(|&(top, left)| {
        for row in top..(top + BLOCK).min(n) {
            for column in left.max(row + 1)..(left + BLOCK).min(n) {
                // SAFETY: in bounds; the block below the diagonal is written by this task only and
                // the one above is read by it only.
                unsafe { *matrix.0.add(column * n + row) = *matrix.0.add(row * n + column) };
            }
        }
    });
}

/// acc += scale * XᵀX, both triangles; `acc` must be symmetric (its lower triangle is overwritten).
/// Shapes and panics as for [`gram_add_upper`].
pub fn gram_add<A: Accumulator>(x: &[f32], tokens: usize, n: usize, acc: &mut [A], scale: f32) {
    gram_add_upper(x, tokens, n, acc, scale);
    mirror_upper(acc, n);
}

/// Accumulates XᵀX over any number of calls in `8 n²` bytes.
///
/// ```
/// use strata_tensor::gram::GramAccumulator;
/// let mut gram = GramAccumulator::new(2)?;
/// gram.add(&[1.0, 2.0, 3.0, 4.0], 1.0)?;
/// assert_eq!((gram.tokens(), gram.finish()), (2, vec![10.0, 14.0, 14.0, 20.0]));
/// # Ok::<(), strata_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GramAccumulator {
    n: usize,
    tokens: u64,
    sum: Vec<f64>,
}

impl GramAccumulator {
    /// An empty sum over vectors of `n` numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] when `n` is so large that `n * n` numbers cannot be addressed.
    pub fn new(n: usize) -> Result<Self> {
        let len = n.checked_mul(n).filter(|&len| len <= isize::MAX as usize / 8);
        let Some(len) = len else {
            let reason = format!("{n} x {n} numbers do not fit in memory");
            return Err(Error::Shape { what: "gram matrix".into(), reason });
        };
        Ok(Self { n, tokens: 0, sum: vec![0.0; len] })
    }

    /// Adds `scale` times the products of the tokens in `x` `[.., n]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `x` does not hold whole vectors.
    pub fn add(&mut self, x: &[f32], scale: f32) -> Result<()> {
        if self.n == 0 || !x.len().is_multiple_of(self.n) {
            let reason = format!("{} numbers are no whole vectors of {}", x.len(), self.n);
            return Err(Error::Shape { what: "gram matrix".into(), reason });
        }
        let tokens = x.len() / self.n;
        gram_add_upper(x, tokens, self.n, &mut self.sum, scale);
        self.tokens += tokens as u64;
        Ok(())
    }

    /// Adds another sum over vectors of the same length.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.n != other.n {
            let reason = format!("a sum over {} numbers cannot take one over {}", self.n, other.n);
            return Err(Error::Shape { what: "gram matrix".into(), reason });
        }
        self.sum.par_iter_mut().zip(&other.sum).for_each(|(a, &b)| *a += b);
        self.tokens += other.tokens;
        Ok(())
    }

    /// Length of a vector.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Tokens added so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The diagonal: sums of squares of every column.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.sum[i * (self.n + 1)]).collect()
    }

    /// The whole symmetric matrix `[n, n]`, without another copy.
    pub fn finish(mut self) -> Vec<f64> {
        mirror_upper(&mut self.sum, self.n);
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn reference(x: &[f32], tokens: usize, n: usize, scale: f64) -> Vec<f64> {
        let mut sum = vec![0.0; n * n];
        for t in 0..tokens {
            let row = &x[t * n..(t + 1) * n];
            for i in 0..n {
                for j in 0..n {
                    sum[i * n + j] += scale * f64::from(row[i]) * f64::from(row[j]);
                }
            }
        }
        sum
    }

    fn normal(n: usize, seed: u64) -> Vec<f32> {
        let mut x = vec![0.0; n];
        Rng::new(seed).fill_normal(&mut x, 1.0);
        x
    }

    #[test]
    fn tiles_cover_the_triangle() {
        for n in [1, 15, 16, 17, 64, 65, 100, 130, 288, 700] {
            let mut hits = vec![0u8; n * n];
            let mut computed = 0;
            for t in tiles_of(n) {
                computed += t.height * t.width;
                for i in t.top..t.top + t.height {
                    for j in t.left..t.left + t.width {
                        hits[i * n + j] += 1;
                    }
                }
            }
            for i in 0..n {
                assert!((i..n).all(|j| hits[i * n + j] == 1), "{n}");
            }
            assert!(n < 288 || computed < n * n * 5 / 8, "{n}: {computed}");
        }
    }

    #[test]
    fn agrees_with_loops() {
        for (tokens, n) in [(1, 1), (3, 2), (70, 33), (257, 100), (2100, 67), (130, 300)] {
            let x = normal(tokens * n, n as u64);
            let expected = reference(&x, tokens, n, 2.0);
            let mut double = vec![1.0f64; n * n];
            gram_add(&x, tokens, n, &mut double, 2.0);
            let mut single = vec![1.0f32; n * n];
            gram_add(&x, tokens, n, &mut single, 2.0);
            let limit = 2.0 * tokens as f64;
            for i in 0..n * n {
                assert!((double[i] - 1.0 - expected[i]).abs() < 2e-6 * limit, "{tokens} {n}");
                assert!((f64::from(single[i]) - 1.0 - expected[i]).abs() < 4e-6 * limit);
                assert_eq!(double[i], double[(i % n) * n + i / n]);
            }
        }
    }

    #[test]
    fn accumulates_and_merges() {
        let x = normal(90 * 40, 1);
        let mut whole = GramAccumulator::new(40).unwrap();
        whole.add(&x, 1.0).unwrap();
        let (mut a, mut b) = (whole.clone(), GramAccumulator::new(40).unwrap());
        a.add(&x[..400], 0.5).unwrap();
        b.add(&x[400..], 0.5).unwrap();
        a.merge(&b).unwrap();
        assert_eq!((whole.tokens(), a.tokens(), a.n()), (90, 180, 40));
        let diagonal = whole.diagonal();
        let (whole, a) = (whole.finish(), a.finish());
        for i in 0..1600 {
            assert!((1.5 * whole[i] - a[i]).abs() < 1e-4);
        }
        assert!((0..40).all(|i| diagonal[i] == whole[i * 41]));
        assert!(GramAccumulator::new(3).unwrap().add(&[1.0; 4], 1.0).is_err());
        assert!(GramAccumulator::new(3).unwrap().merge(&GramAccumulator::new(2).unwrap()).is_err());
        assert!(GramAccumulator::new(usize::MAX).is_err());
    }

    /// The upper triangle alone is touched, and more threads change nothing.
    #[test]
    fn leaves_the_lower_triangle_and_is_deterministic() {
        let (tokens, n) = (1500, 150);
        let x = normal(tokens * n, 3);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut sum = vec![7.0f64; n * n];
            pool.install(|| gram_add_upper(&x, tokens, n, &mut sum, 1.0));
            sum
        };
        let one = run(1);
        assert_eq!(one, run(3));
        assert!((0..n).all(|i| one[i * n..i * n + i].iter().all(|&v| v == 7.0)));
    }
}
