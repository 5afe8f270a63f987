//! Wanda: prune by weight times the norm of its input (Sun et al. 2023, arXiv 2306.11695).
//!
//! The score of a weight is `|W[i,j]| · ‖X[j]‖₂`, compared within its output row; nothing is
//! updated. `‖X[j]‖₂` is the root of the mean, over calibration sequences, of the summed squares of
//! input `j`.
//!
//! ```
//! use strata_compress::{mask::*, wanda};
//! let scores = wanda::scores(&[4.0, 0.0, 1.0, -1.0, 3.0, -2.0, -1.0, -3.0], &[1.0, 2.0, 8.0, 3.0]);
//! assert_eq!(scores, [4.0, 0.0, 8.0, 3.0, 3.0, 4.0, 8.0, 9.0]);
//! let mask = build(&scores, [2, 4], 0.5, Structure::Unstructured, Scope::Row, Count::Floor);
//! assert_eq!((mask.kept_columns(0), mask.kept_columns(1)), (vec![0, 2], vec![2, 3]));
//! ```

use crate::mask::{Mask, mark_smallest};
use nn::{Batch, Point, Site, Tap};
use rayon::prelude::*;
use tensor::Tensor;

/// Options of Wanda.
#[derive(
    Debug,
    Clone,
    Default,
    PartialEq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::Args,
)]
#[serde(default)]
pub struct WandaOptions {
    /// Prune every row up to a common share of its summed score, found by bisection, instead of the
    /// same number of weights per row
    #[arg(long)]
    pub wanda_alpha: bool,
}

/// How close the bisection must come to the sparsity asked for, and where it starts.
const TOLERANCE: f64 = 0.001;
const LARGEST_ALPHA: f64 = 0.8;

/// `‖X[j]‖₂` of every input from its summed squares over all tokens.
pub fn norms(square_sums: &[f64], sequences: usize) -> Vec<f32> {
    square_sums.iter().map(|sum| (sum / sequences.max(1) as f64).sqrt() as f32).collect()
}

/// Scores of the weights `values` (`[out, in]`) for input norms `[in]`.
pub fn scores(values: &[f32], norms: &[f32]) -> Vec<f32> {
    let width = norms.len().max(1);
    let mut scores = vec![0f32; values.len()];
    scores.par_chunks_mut(width).zip(values.par_chunks(width)).for_each(|(scores, row)| {
        for ((score, w), norm) in scores.iter_mut().zip(row).zip(norms) {
            *score = w.abs() * norm;
        }
    });
    scores
}

/// The mask of the variant with a common `α`: in every row the smallest scores go whose sum does
/// not exceed `α` times the row's. Returns it with the `α` that comes closest to `sparsity`.
pub fn alpha_mask(scores: &[f32], [out, width]: [usize; 2], sparsity: f64) -> (Mask, f64) {
    let mut mask = Mask::keep_all([out, width]);
    if sparsity <= 0.0 || width == 0 {
        return (mask, 0.0);
    }
    // Sums of the sorted scores of every row, once for the whole search.
    let rows: Vec<Vec<f32>> = scores
        .par_chunks(width)
        .map(|row| {
            let mut sorted = row.to_vec();
            sorted.sort_unstable_by(f32::total_cmp);
            let mut sum = 0f64;
            sorted.iter_mut().for_each(|value| {
                sum += f64::from(*value);
                *value = sum as f32;
            });
            sorted
        })
        .collect();
    let pruned = |row: &Vec<f32>, alpha: f64| {
        let limit = (alpha * f64::from(row.last().copied().unwrap_or_default())) as f32;
        row.partition_point(|sum| *sum <= limit)
    };
    let reached = |alpha: f64| {
        let count: usize = rows.par_iter().map(|row| pruned(row, alpha)).sum();
        count as f64 / (out * width) as f64
    };
    let (mut low, mut high, mut alpha) = (0.0, LARGEST_ALPHA, LARGEST_ALPHA / 2.0);
    let mut now = reached(alpha);
    while (now - sparsity).abs() > TOLERANCE && high - low >= TOLERANCE {
        if now > sparsity {
            high = alpha;
        } else {
            low = alpha;
        }
        alpha = (low + high) / 2.0;
        now = reached(alpha);
    }
    mask.pruned
        .par_chunks_mut(width)
        .zip(scores.par_chunks(width))
        .zip(&rows)
        .for_each(|((marks, scores), row)| mark_smallest(scores, pruned(row, alpha), marks));
    (mask, alpha)
}

/// Tokens whose squares are added in single precision before they join the sum.
const STRIP: usize = 64;

/// A tap that adds up the squares of every input of a set of layers.
#[derive(Debug)]
pub struct SquareSums {
    point: Point,
    sums: Vec<f64>,
}

impl SquareSums {
    /// A tap at `point` of every block.
    pub fn new(point: Point) -> Self {
        Self { point, sums: Vec::new() }
    }

    /// The sums, `[in]`; `None` when no token came by.
    pub fn into_sums(self) -> Option<Vec<f64>> {
        (!self.sums.is_empty()).then_some(self.sums)
    }

    /// Adds the rows of `x` (`[tokens, width]`).
    pub fn add(&mut self, x: &[f32], width: usize) {
        self.sums.resize(width, 0.0);
        let strips: Vec<Vec<f32>> = x
            .par_chunks(STRIP * width.max(1))
            .map(|rows| {
                let mut sums = vec![0f32; width];
                rows.chunks_exact(width).for_each(|row| add_squares(&mut sums, row));
                sums
            })
            .collect();
        for strip in strips {
            self.sums.iter_mut().zip(strip).for_each(|(sum, part)| *sum += f64::from(part));
        }
    }
}

impl Tap for SquareSums {
    fn wants(&self, site: Site) -> bool {
        site.block.is_some() && site.point == self.point
    }

    fn at(&mut self, _site: Site, _batch: &Batch, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        let width = x.dims()[1];
        tensor::host::read(&x, |x| self.add(x, width));
        Ok(x)
    }
}

tensor::simd! {
    fn add_squares(sums: &mut [f32], row: &[f32]) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += x * x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::{Count, Scope, Structure, build};

    const VALUES: [f32; 8] = [4.0, 0.0, 1.0, -1.0, 3.0, -2.0, -1.0, -3.0];
    const NORMS: [f32; 4] = [1.0, 2.0, 8.0, 3.0];

    #[test]
    fn rows_and_blocks_by_hand() {
        let scores = scores(&VALUES, &NORMS);
        for structure in [Structure::Unstructured, Structure::TWO_OF_FOUR] {
            let mask = build(&scores, [2, 4], 0.5, structure, Scope::Row, Count::Floor);
            assert_eq!(mask.kept_columns(0), [0, 2], "{structure}");
            assert_eq!(mask.kept_columns(1), [2, 3], "{structure}");
        }
    }

    #[test]
    fn scores_of_four_samples_by_hand() {
        // X: [1,0,1], [0,1,1], [1,1,0], [2,0,1], four sequences of one token.
        let norms = norms(&[6.0, 2.0, 3.0], 4);
        let scores = scores(&[1.0, -2.0, 0.5, 0.3, 0.4, -1.0], &norms);
        let wanted = [
            1.224_744_9,
            std::f32::consts::SQRT_2,
            0.433_012_7,
            0.367_423_5,
            0.282_842_7,
            0.866_025_4f32,
        ];
        for (found, wanted) in scores.iter().zip(wanted) {
            assert!((found - wanted).abs() < 1e-6, "{scores:?}");
        }
    }

    #[test]
    fn square_sums_by_hand() {
        let mut sums = SquareSums::new(Point::AttnIn);
        sums.add(&[1.0, 0.0, 1.0, 0.0, 1.0, 1.0], 3);
        sums.add(&[1.0, 1.0, 0.0, 2.0, 0.0, 1.0], 3);
        assert_eq!(sums.into_sums().unwrap(), [6.0, 2.0, 3.0]);
        assert_eq!(SquareSums::new(Point::AttnIn).into_sums(), None);
        let mut many = SquareSums::new(Point::AttnIn);
        many.add(&[3.0; 5 * 200], 5);
        assert_eq!(many.into_sums().unwrap(), [1800.0; 5]);
    }

    #[test]
    fn rows_prune_the_floor_of_their_share() {
        let scores: Vec<f32> = (0..3 * 11).map(|i| (i * 7 % 13) as f32).collect();
        let mask = build(&scores, [3, 11], 0.5, Structure::Unstructured, Scope::Row, Count::Floor);
        for row in 0..3 {
            assert_eq!(mask.kept_columns(row).len(), 6);
        }
    }

    #[test]
    fn a_common_alpha_reaches_the_sparsity_and_prunes_flat_rows_less() {
        let mut rng = tensor::Rng::new(5);
        let mut scores = vec![0f32; 64 * 256];
        rng.fill_uniform(&mut scores, 0.0, 1.0);
        // Half of the rows have a few large scores that hold most of the sum.
        for (row, scores) in scores.chunks_mut(256).enumerate().filter(|(row, _)| row % 2 == 1) {
            scores.iter_mut().skip(row % 7).step_by(16).for_each(|s| *s *= 40.0);
        }
        for sparsity in [0.5, 0.6] {
            let (mask, alpha) = alpha_mask(&scores, [64, 256], sparsity);
            assert!((mask.sparsity() - sparsity).abs() <= 0.002, "{}", mask.sparsity());
            assert!(alpha > 0.0 && alpha < 0.8);
            let kept = |parity: usize| -> usize {
                (0..64).filter(|r| r % 2 == parity).map(|r| mask.kept_columns(r).len()).sum()
            };
            assert!(kept(1) < kept(0), "rows with a few large scores lose more weights");
            // Every row: the pruned sum fits under the limit, one more would not.
            for row in 0..64 {
                let scores = &scores[row * 256..(row + 1) * 256];
                let pruned = &mask.pruned[row * 256..(row + 1) * 256];
                let total: f64 = scores.iter().map(|s| f64::from(*s)).sum();
                let removed = scores.iter().zip(pruned).filter(|(_, p)| **p);
                let removed: f64 = removed.map(|(s, _)| f64::from(*s)).sum();
                assert!(removed <= alpha * total * (1.0 + 1e-5));
                let next = scores.iter().zip(pruned).filter(|(_, p)| !**p).map(|(s, _)| *s);
                let next = f64::from(next.fold(f32::INFINITY, f32::min));
                assert!(removed + next > alpha * total * (1.0 - 1e-5));
            }
        }
        let (mask, _) = alpha_mask(&scores, [64, 256], 0.0);
        assert_eq!(mask.count(), 0);
    }
}
