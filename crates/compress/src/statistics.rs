//! What calibration leaves behind: Gram matrices, mean magnitudes, token samples.
//!
//! Statistics are accumulated, activations are never hoarded: a [`Statistics`] tap sits at the
//! points where linears read their input and folds every batch into fixed-size sums.

use nn::{Batch, Point, Site, Tap};
use std::collections::BTreeMap;
use tensor::Tensor;
use tensor::gram::{gram_add_upper, mirror_upper};

/// Sum of `x xᵀ` over the tokens that a linear layer read.
#[derive(Debug, Clone)]
pub struct Gram {
    width: usize,
    tokens: usize,
    /// Only the triangle row <= column is kept up.
    upper: Vec<f64>,
}

impl Gram {
    /// An empty sum for inputs of `width`.
    pub fn new(width: usize) -> Self {
        Self { width, tokens: 0, upper: vec![0.0; width * width] }
    }

    /// Adds the rows of `x` (`[tokens, width]`).
    pub fn add(&mut self, x: &[f32]) {
        let tokens = x.len() / self.width;
        gram_add_upper(x, tokens, self.width, &mut self.upper, 1.0);
        self.tokens += tokens;
    }

    /// Adds the rows of `x` (`[tokens, width]`), each multiplied by its entry of `roots`: `Σ r² x xᵀ`.
    /// A row with root 1 counts exactly as in [`Gram::add`].
    pub fn add_scaled(&mut self, x: &[f32], roots: &[f32]) {
        let mut scaled = Vec::with_capacity(x.len());
        for (row, &root) in x.chunks_exact(self.width).zip(roots) {
            scaled.extend(row.iter().map(|&x| x * root));
        }
        self.add(&scaled);
    }

    /// Width of the input.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Tokens seen so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// `XᵀX` in full, `[width, width]` row-major.
    pub fn full(&self) -> Vec<f64> {
        let mut full = self.upper.clone();
        mirror_upper(&mut full, self.width);
        full
    }

    /// GPTQ's Hessian `2 XᵀX / tokens`, `[width, width]` row-major.
    pub fn hessian(&self) -> Vec<f64> {
        self.clone().into_hessian()
    }

    /// As [`Gram::hessian`], without a copy.
    pub fn into_hessian(self) -> Vec<f64> {
        let factor = 2.0 / self.tokens().max(1) as f64;
        let mut hessian = self.upper;
        mirror_upper(&mut hessian, self.width);
        hessian.iter_mut().for_each(|h| *h *= factor);
        hessian
    }

    /// `XᵀX / tokens` in single precision, for the quadratic form of an output error.
    pub fn covariance(&self) -> Vec<f32> {
        let factor = 1.0 / self.tokens().max(1) as f64;
        self.full().iter().map(|g| (g * factor) as f32).collect()
    }
}

/// Mean of `|x|` per input channel.
#[derive(Debug, Clone)]
pub struct AbsoluteMean {
    sums: Vec<f64>,
    tokens: usize,
}

impl AbsoluteMean {
    /// An empty mean for inputs of `width`.
    pub fn new(width: usize) -> Self {
        Self { sums: vec![0.0; width], tokens: 0 }
    }

    /// Adds the rows of `x` (`[tokens, width]`).
    pub fn add(&mut self, x: &[f32]) {
        for row in x.chunks_exact(self.sums.len()) {
            for (sum, &x) in self.sums.iter_mut().zip(row) {
                *sum += f64::from(x.abs());
            }
            self.tokens += 1;
        }
    }

    /// The mean magnitudes, `[width]`.
    pub fn mean(&self) -> Vec<f32> {
        self.sums.iter().map(|&sum| (sum / self.tokens.max(1) as f64) as f32).collect()
    }
}

/// Every `stride`-th token of the calibration set, so that at most about `limit` rows are kept.
#[derive(Debug, Clone)]
pub struct TokenSample {
    width: usize,
    stride: usize,
    seen: usize,
    rows: Vec<f32>,
}

impl TokenSample {
    /// A sample of about `limit` of `total` tokens of `width` channels; all of them when there are
    /// fewer.
    pub fn new(width: usize, total: usize, limit: usize) -> Self {
        Self { width, stride: (total / limit.max(1)).max(1), seen: 0, rows: Vec::new() }
    }

    /// Offers the rows of `x` (`[tokens, width]`).
    pub fn add(&mut self, x: &[f32]) {
        for row in x.chunks_exact(self.width) {
            if self.seen.is_multiple_of(self.stride) {
                self.rows.extend_from_slice(row);
            }
            self.seen += 1;
        }
    }

    /// The kept rows, `[kept, width]`.
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Width of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The sample with channel `c` divided by `scales[c]`.
    pub fn divided(&self, scales: &[f32]) -> Self {
        let mut copy = self.clone();
        for row in copy.rows.chunks_exact_mut(self.width) {
            row.iter_mut().zip(scales).for_each(|(x, s)| *x /= s);
        }
        copy
    }
}

/// Which statistics a method needs at a point.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// Gram matrix.
    pub gram: bool,
    /// Mean magnitudes.
    pub absolute_mean: bool,
    /// Token sample: tokens in the whole calibration set, and how many to keep.
    pub sample: Option<(usize, usize)>,
}

/// The statistics of one input.
#[derive(Debug, Clone, Default)]
pub struct InputStatistics {
    /// Gram matrix, if wanted.
    pub gram: Option<Gram>,
    /// Mean magnitudes, if wanted.
    pub absolute_mean: Option<AbsoluteMean>,
    /// Token sample, if wanted.
    pub sample: Option<TokenSample>,
}

/// A tap that accumulates statistics at chosen points of a block and changes nothing.
#[derive(Debug, Default)]
pub struct Statistics {
    wanted: BTreeMap<Point, Wanted>,
    collected: BTreeMap<Point, InputStatistics>,
}

impl Statistics {
    /// A tap at `points`.
    pub fn new(points: impl IntoIterator<Item = (Point, Wanted)>) -> Self {
        Self { wanted: points.into_iter().collect(), collected: BTreeMap::new() }
    }

    /// What was collected at `point`.
    pub fn at(&self, point: Point) -> Option<&InputStatistics> {
        self.collected.get(&point)
    }

    /// Takes what was collected at `point`.
    pub fn take(&mut self, point: Point) -> Option<InputStatistics> {
        self.collected.remove(&point)
    }

    fn add(&mut self, point: Point, x: &[f32], width: usize) {
        let wanted = self.wanted.get(&point).copied().unwrap_or_default();
        let entry = self.collected.entry(point).or_default();
        if wanted.gram {
            entry.gram.get_or_insert_with(|| Gram::new(width)).add(x);
        }
        if wanted.absolute_mean {
            entry.absolute_mean.get_or_insert_with(|| AbsoluteMean::new(width)).add(x);
        }
        if let Some((total, limit)) = wanted.sample {
            entry.sample.get_or_insert_with(|| TokenSample::new(width, total, limit)).add(x);
        }
    }
}

impl Tap for Statistics {
    fn wants(&self, site: Site) -> bool {
        site.block.is_some() && self.wanted.contains_key(&site.point)
    }

    fn at(&mut self, site: Site, _batch: &Batch, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        let width = x.dims()[1];
        tensor::host::read(&x, |x| self.add(site.point, x, width));
        Ok(x)
    }
}

/// A tap that adds up `Σ r² x xᵀ` at one point of a block over batches that come in order, `r` being
/// every token's own factor (the root of its weight), and changes nothing.
#[derive(Debug)]
pub struct WeightedGram {
    point: Point,
    roots: std::sync::Arc<[f32]>,
    seen: usize,
    gram: Option<Gram>,
}

impl WeightedGram {
    /// A tap at `point`; `roots` holds one factor per token of the calibration set.
    pub fn new(point: Point, roots: std::sync::Arc<[f32]>) -> Self {
        Self { point, roots, seen: 0, gram: None }
    }

    /// Adds the next rows of the input, `[tokens, width]`.
    pub fn add(&mut self, x: &[f32], width: usize) {
        let end = self.seen + x.len() / width.max(1);
        let roots = self.roots.get(self.seen..end).unwrap_or_default();
        self.gram.get_or_insert_with(|| Gram::new(width)).add_scaled(x, roots);
        self.seen = end;
    }

    /// The sum, if any token was seen.
    pub fn finish(self) -> Option<Gram> {
        self.gram
    }
}

impl Tap for WeightedGram {
    fn wants(&self, site: Site) -> bool {
        site.block.is_some() && site.point == self.point
    }

    fn at(&mut self, _site: Site, _batch: &Batch, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        let width = x.dims()[1];
        tensor::host::read(&x, |x| self.add(x, width));
        Ok(x)
    }
}

/// `tr(D C Dᵀ)` for `difference` `D` (`[out, in]`) and symmetric `covariance` `C` (`[in, in]`):
/// the squared output error, per token, of changing a weight by `D`.
pub fn quadratic_error(difference: &[f32], covariance: &[f32], width: usize) -> f64 {
    use rayon::prelude::*;
    use tensor::kernels::{Matrix, Output, matmul_serial};
    const ROWS: usize = 64;
    let partial: Vec<f64> = difference
        .par_chunks(ROWS * width)
        .map(|rows| {
            let n = rows.len() / width;
            let mut product = vec![0f32; n * width];
            matmul_serial(
                [n, width, width],
                Matrix::rows(rows, width),
                Matrix::rows(covariance, width),
                1.0,
                Output { data: &mut product, row: width, accumulate: false },
            );
            rows.iter().zip(&product).map(|(&d, &p)| f64::from(d) * f64::from(p)).sum()
        })
        .collect();
    partial.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_by_hand() {
        let x = [1.0f32, -2.0, 3.0, 4.0];
        let mut gram = Gram::new(2);
        gram.add(&x);
        assert_eq!(gram.full(), [10.0, 10.0, 10.0, 20.0]);
        assert_eq!(gram.hessian(), [10.0, 10.0, 10.0, 20.0]);
        assert_eq!(gram.covariance(), [5.0, 5.0, 5.0, 10.0]);
        let mut mean = AbsoluteMean::new(2);
        mean.add(&x);
        assert_eq!(mean.mean(), [2.0, 3.0]);
        // D = [1, -1]: 5 - 5 - 5 + 10
        assert_eq!(quadratic_error(&[1.0, -1.0], &gram.covariance(), 2), 5.0);
    }

    #[test]
    fn sample_strides_over_batches() {
        let mut sample = TokenSample::new(1, 10, 4);
        sample.add(&[0.0, 1.0, 2.0]);
        sample.add(&[3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert_eq!(sample.rows(), [0.0, 2.0, 4.0, 6.0, 8.0]);
        let mut all = TokenSample::new(1, 3, 512);
        all.add(&[0.0, 1.0, 2.0]);
        assert_eq!(all.rows().len(), 3);
    }

    /// Duplicating a token's row k times is weight k, weight 1 changes no bit, weight 0 drops it.
    #[test]
    fn weights_count_tokens() {
        let x = [1.0f32, 2.0, -3.0, 0.5, 4.0, 1.0];
        let gram = |x: &[f32]| {
            let mut gram = Gram::new(2);
            gram.add(x);
            gram.full()
        };
        let scaled = |roots: &[f32]| {
            let mut gram = Gram::new(2);
            gram.add_scaled(&x, roots);
            gram.full()
        };
        assert_eq!(scaled(&[1.0; 3]), gram(&x));
        assert_eq!(scaled(&[1.0, 0.0, 1.0]), gram(&[1.0, 2.0, 4.0, 1.0]));
        // Four times the second token: a root of 2 is exact.
        let four = [1.0f32, 2.0, -3.0, 0.5, -3.0, 0.5, -3.0, 0.5, -3.0, 0.5, 4.0, 1.0];
        assert_eq!(scaled(&[1.0, 2.0, 1.0]), gram(&four));
        // In two batches through the tap.
        let mut tap = WeightedGram::new(Point::AttnIn, [1.0, 2.0, 1.0].into());
        tap.add(&x[..2], 2);
        tap.add(&x[2..], 2);
        assert_eq!(tap.finish().map(|g| (g.full(), g.tokens())), Some((gram(&four), 3)));
    }

    #[test]
    fn repeated_token_counts_twice() {
        let (mut twice, mut weighted) = (Gram::new(2), Gram::new(2));
        twice.add(&[1.0, 2.0, 1.0, 2.0]);
        let root = 2f32.sqrt();
        weighted.add(&[root, 2.0 * root]);
        for (a, b) in twice.full().iter().zip(weighted.full()) {
            assert!((a - b).abs() < 1e-5);
        }
    }
}
