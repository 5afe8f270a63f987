//! Magnitude order and masks: which weights of a layer go when it is said how many.
//!
//! The order is total: by magnitude, weights that are zero already first, equal magnitudes by
//! position. Every allocator shares it, so that allocators differ in nothing but the counts.

use crate::{Error, Result};
use rayon::prelude::*;

/// The positions of a layer's weights from the smallest magnitude to the largest.
#[derive(Debug, Clone)]
pub struct Ranking {
    order: Vec<u32>,
    zeros: usize,
}

impl Ranking {
    /// Ranks the flattened weights of `layer`; equal magnitudes keep their order.
    ///
    /// # Errors
    /// A weight that is not a number, by position; a layer without weights or with more than 2³².
    pub fn new(layer: &str, values: &[f32]) -> Result<Self> {
        Self::keyed(layer, values, |_| false)
    }

    /// As [`Ranking::new`] with the weights that `mask` drops first, whatever their values are (a
    /// weight that training let grow under its mask is still a pruned weight).
    ///
    /// # Errors
    /// As [`Ranking::new`], and a mask of another length.
    pub fn masked(layer: &str, values: &[f32], mask: &Mask) -> Result<Self> {
        if mask.len() != values.len() {
            return Err(Error::layer(
                layer,
                format!("has {} weights, its mask {}", values.len(), mask.len()),
            ));
        }
        Self::keyed(layer, values, |i| !mask.keeps(i))
    }

    fn keyed(layer: &str, values: &[f32], pruned: impl Fn(usize) -> bool + Sync) -> Result<Self> {
        if values.is_empty() || u32::try_from(values.len()).is_err() {
            return Err(Error::layer(
                layer,
                format!("has {} weights; 1 to 4,294,967,295 can be ranked", values.len()),
            ));
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::layer(
                layer,
                format!(
                    "weight {at} is {}; a network with such weights cannot be ranked, mend the \
                     checkpoint or exclude the layer",
                    values.get(at).copied().unwrap_or_default()
                ),
            ));
        }
        // The bits of a non-negative float sort as the float does; the position below them makes
        // the order total, so that an unstable sort gives the stable result.
        let mut keys: Vec<u64> = values
            .par_iter()
            .enumerate()
            .map(|(i, v)| {
                let magnitude = if pruned(i) { 0 } else { v.abs().to_bits() };
                (u64::from(magnitude) << 32) | i as u64
            })
            .collect();
        keys.par_sort_unstable();
        let zeros = keys.partition_point(|key| key >> 32 == 0);
        Ok(Self { order: keys.into_iter().map(|key| key as u32).collect(), zeros })
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there are no weights (never true of a value that [`Ranking::new`] made).
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Weights that are zero already: pruned earlier.
    pub fn zeros(&self) -> usize {
        self.zeros
    }

    /// Positions of the `count` smallest weights.
    pub fn smallest(&self, count: usize) -> &[u32] {
        self.order.get(..count).unwrap_or(&self.order)
    }

    /// `values` in the order of the ranking, smallest magnitude first.
    pub fn sorted(&self, values: &[f32]) -> Vec<f32> {
        self.order.iter().filter_map(|&i| values.get(i as usize).copied()).collect()
    }

    /// The mask that drops the `count` smallest weights.
    pub fn mask(&self, count: usize) -> Mask {
        let mut keep = vec![true; self.len()];
        for &i in self.smallest(count) {
            if let Some(place) = keep.get_mut(i as usize) {
                *place = false;
            }
        }
        Mask { keep }
    }

    /// Zeroes the `count` smallest weights of `values`.
    pub fn prune(&self, values: &mut [f32], count: usize) {
        for &i in self.smallest(count) {
            if let Some(value) = values.get_mut(i as usize) {
                *value = 0.0;
            }
        }
    }
}

/// Which weights of a layer stay, in the flattened order of its matrix `[out, in]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    keep: Vec<bool>,
}

impl Mask {
    /// A mask from one flag per weight.
    pub fn new(keep: Vec<bool>) -> Self {
        Self { keep }
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.keep.len()
    }

    /// Whether the mask covers no weight.
    pub fn is_empty(&self) -> bool {
        self.keep.is_empty()
    }

    /// Whether weight `i` stays.
    pub fn keeps(&self, i: usize) -> bool {
        self.keep.get(i).copied().unwrap_or(false)
    }

    /// Number of weights that stay.
    pub fn kept(&self) -> usize {
        self.keep.iter().filter(|k| **k).count()
    }

    /// The flags.
    pub fn flags(&self) -> &[bool] {
        &self.keep
    }

    /// Zeroes what the mask drops.
    pub fn apply(&self, values: &mut [f32]) {
        for (value, keep) in values.iter_mut().zip(&self.keep) {
            if !keep {
                *value = 0.0;
            }
        }
    }

    /// Whether every weight that `self` keeps is kept by `earlier` too: masks only grow.
    pub fn grows_from(&self, earlier: &Mask) -> bool {
        self.len() == earlier.len() && self.keep.iter().zip(&earlier.keep).all(|(a, b)| !a || *b)
    }

    /// Rows of `width` weights that keep nothing: filters or neurons that compute a constant.
    pub fn empty_rows(&self, width: usize) -> usize {
        self.keep.chunks(width.max(1)).filter(|row| row.iter().all(|k| !k)).count()
    }
}

/// How many of `total` weights grid point `k` of `grid` prunes: `⌊k/grid · total⌋`, exactly.
pub fn pruned_at(k: usize, grid: usize, total: usize) -> usize {
    (k as u128 * total as u128 / grid.max(1) as u128) as usize
}

/// The share of the *surviving* weights that takes a layer from sparsity `before` to sparsity
/// `target`: `max(0, 1 - (1 - target)/(1 - before))`.
pub fn relative_amount(target: f64, before: f64) -> f64 {
    if before >= 1.0 {
        return 0.0;
    }
    (1.0 - (1.0 - target) / (1.0 - before)).max(0.0)
}

/// The target sparsity of iteration `t` (from 1) of the iterative schedule: `1 - (1 - amount)^t`.
pub fn schedule(amount: f64, t: u32) -> f64 {
    1.0 - (1.0 - amount).powi(t.min(i32::MAX as u32) as i32)
}

/// The number of weights that may stay: `⌊(1 - sparsity) · total⌋`, not fooled by products that
/// fall short of a whole number by their last bit.
pub fn budget(sparsity: f64, total: u64) -> u64 {
    let pruned = (sparsity * total as f64 * (1.0 - 1e-12)).ceil();
    total.saturating_sub(pruned as u64)
}

/// The number of weights that baselines keep: `round((1 - sparsity) · total)`, halves to even.
pub fn rounded_budget(sparsity: f64, total: u64) -> u64 {
    total.saturating_sub((sparsity * total as f64).round_ties_even() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_go_first_and_ties_by_position() {
        let values = [3.0, -1.0, 0.5, 1.0, -0.0, 0.5];
        let ranking = Ranking::new("l", &values).unwrap();
        assert_eq!(ranking.smallest(6), [4, 2, 5, 1, 3, 0]);
        assert_eq!(ranking.zeros(), 1);
        assert_eq!(ranking.sorted(&values), [0.0, 0.5, 0.5, -1.0, 1.0, 3.0]);
        let mask = ranking.mask(2);
        assert_eq!(mask.flags(), [true, true, false, true, false, true]);
        let mut pruned = values;
        ranking.prune(&mut pruned, 2);
        assert_eq!(pruned, [3.0, -1.0, 0.0, 1.0, 0.0, 0.5]);
        let mut again = values;
        mask.apply(&mut again);
        assert_eq!(again, pruned);
        assert_eq!(ranking.mask(99).kept(), 0);
    }

    #[test]
    fn a_large_layer_is_ranked_as_by_a_stable_sort() {
        let mut rng = tensor::Rng::new(4);
        let values: Vec<f32> = (0..5000).map(|_| (rng.below(40) as f32 - 20.0) / 8.0).collect();
        let mut expected: Vec<u32> = (0..5000).collect();
        expected.sort_by(|a, b| values[*a as usize].abs().total_cmp(&values[*b as usize].abs()));
        assert_eq!(Ranking::new("l", &values).unwrap().smallest(5000), expected);
    }

    #[test]
    fn masked_weights_go_first_whatever_their_value() {
        let mask = Mask::new(vec![true, false, true]);
        let ranking = Ranking::masked("l", &[0.1, 9.0, 0.2], &mask).unwrap();
        assert_eq!(ranking.smallest(3), [1, 0, 2]);
        assert_eq!(ranking.zeros(), 1);
        assert!(ranking.mask(2).grows_from(&mask));
        assert!(!Mask::new(vec![true; 3]).grows_from(&mask));
        assert!(Ranking::masked("l", &[0.1], &mask).is_err());
    }

    #[test]
    fn what_cannot_be_ranked_is_named() {
        let message = Ranking::new("fc1", &[1.0, f32::NAN]).unwrap_err().to_string();
        assert!(message.contains("fc1") && message.contains("weight 1"), "{message}");
        assert!(Ranking::new("fc1", &[f32::INFINITY]).is_err());
        assert!(Ranking::new("fc1", &[]).is_err());
    }

    #[test]
    fn grid_points_are_exact() {
        assert_eq!(pruned_at(29, 100, 100), 29, "0.29 * 100 is 28.999... in floating point");
        assert_eq!(pruned_at(1, 4, 7), 1);
        assert_eq!((pruned_at(0, 4, 7), pruned_at(4, 4, 7)), (0, 7));
        assert_eq!(pruned_at(99, 100, 4_000_000_000), 3_960_000_000);
    }

    #[test]
    fn amounts_relative_to_survivors() {
        assert!((relative_amount(0.36, 0.2) - 0.2).abs() < 1e-15);
        assert_eq!(relative_amount(0.1, 0.2), 0.0);
        assert_eq!(relative_amount(0.5, 1.0), 0.0);
        // Pruning that share of the survivors is pruning to the target, zeros first.
        let values: Vec<f32> = (0..100).map(|i| if i % 5 == 0 { 0.0 } else { i as f32 }).collect();
        let ranking = Ranking::new("l", &values).unwrap();
        let more = (relative_amount(0.36, 0.2) * 80.0).round() as usize;
        assert_eq!(ranking.zeros() + more, 36);
    }

    #[test]
    fn the_schedule_of_the_paper() {
        assert!((schedule(0.2, 14) - 0.9560).abs() < 5e-5);
        assert!((schedule(0.2, 20) - 0.9885).abs() < 5e-5);
        assert!((schedule(0.2, 2) - 0.36).abs() < 1e-15);
        assert_eq!(schedule(0.7, 1), 0.7);
    }

    #[test]
    fn budgets() {
        assert_eq!(budget(0.0, 10), 10);
        assert_eq!(budget(0.9, 10), 1);
        assert_eq!(budget(0.7, 10), 3);
        assert_eq!(budget(0.75, 10), 2);
        assert_eq!(budget(0.8, 5360), 1072);
        assert_eq!(rounded_budget(0.75, 10), 2, "7.5 rounds to 8 pruned, as Python does");
        assert_eq!(rounded_budget(0.8, 5360), 1072);
    }

    #[test]
    fn empty_rows_are_counted() {
        let mask = Mask::new(vec![false, false, true, false, false, false]);
        assert_eq!(mask.empty_rows(2), 2);
    }
}
