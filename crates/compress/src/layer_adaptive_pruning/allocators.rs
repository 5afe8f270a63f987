//! The allocators that look only at weights: how many weights each layer keeps under a common
//! target. Which ones is `masks`' business.
//!
//! All of them count in *survivors*: a layer that is sparse already brings what it still has, so
//! that the same functions serve one-shot and iterative pruning.

use crate::{Error, Result};

/// A layer as allocators see it.
#[derive(Debug, Clone)]
pub struct Layer<'a> {
    /// Module name, for messages.
    pub name: &'a str,
    /// Number of weights.
    pub total: usize,
    /// Weights that have not been pruned yet.
    pub available: usize,
    /// Sum of the dimensions of its weight: out + in, for convolutions out + in + kernel height +
    /// kernel width.
    pub dimensions: usize,
    /// Whether the weight has four dimensions.
    pub convolution: bool,
}

impl Layer<'_> {
    /// Weights that are pruned already.
    pub fn pruned(&self) -> usize {
        self.total - self.available.min(self.total)
    }
}

fn available(layers: &[Layer<'_>]) -> u64 {
    layers.iter().map(|l| l.available as u64).sum()
}

/// Refuses a target that asks for weights that are not there.
fn check(layers: &[Layer<'_>], keep: u64) -> Result<()> {
    if layers.is_empty() {
        return Err(Error::Options("no layer is left to prune; loosen --only or --exclude".into()));
    }
    let there = available(layers);
    if keep > there {
        return Err(Error::Options(format!(
            "{keep} weights are to be kept, but only {there} are left: the model is already \
             sparser than that"
        )));
    }
    Ok(())
}

/// The same share of every layer's surviving weights is pruned (rounded, halves to even); `keep`
/// is the number of weights that stay in all.
///
/// # Errors
/// No layers, or a target that asks for more weights than there are.
pub fn uniform(layers: &[Layer<'_>], keep: u64) -> Result<Vec<usize>> {
    check(layers, keep)?;
    let there = available(layers);
    let amount = 1.0 - keep as f64 / there.max(1) as f64;
    let keep =
        |l: &Layer<'_>| l.available - (amount * l.available as f64).round_ties_even() as usize;
    Ok(layers.iter().map(keep).collect())
}

/// Uniform, but a first convolution stays whole and the last layer keeps at least a fifth of its
/// weights; the others share the rest.
///
/// # Errors
/// As [`uniform`], and a target that the layers in between cannot reach.
pub fn uniform_plus(layers: &[Layer<'_>], keep: u64) -> Result<Vec<usize>> {
    check(layers, keep)?;
    let to_prune = (available(layers) - keep) as f64;
    let count = layers.len();
    let spared = layers.first().is_some_and(|l| l.convolution);
    let first = usize::from(spared);
    let mut kept: Vec<usize> = layers.iter().map(|l| l.available).collect();
    let rest: f64 = layers.iter().skip(first).map(|l| l.available as f64).sum();
    let mut amount = share(to_prune, rest)?;
    let mut end = count;
    if let Some(last) = layers.last().filter(|_| count > first) {
        let floor = ((0.2 * last.total as f64).round_ties_even() as usize).min(last.available);
        let left = (1.0 - amount) * last.available as f64;
        if left < 0.2 * last.total as f64 {
            end = count - 1;
            if let Some(place) = kept.last_mut() {
                *place = floor;
            }
            let to_prune = to_prune - (last.available - floor) as f64;
            amount = share(to_prune, rest - last.available as f64)?;
        }
    }
    for (kept, layer) in kept.iter_mut().zip(layers).take(end).skip(first) {
        *kept = layer.available - (amount * layer.available as f64).round_ties_even() as usize;
    }
    Ok(kept)
}

/// `to_prune / there`, refused above 1.
fn share(to_prune: f64, there: f64) -> Result<f64> {
    if to_prune <= 0.0 {
        return Ok(0.0);
    }
    if to_prune > there {
        return Err(Error::Options(format!(
            "uniform-plus spares a first convolution and a fifth of the last layer; the other \
             layers would have to lose {to_prune:.0} of their {there:.0} weights: lower the \
             sparsity or take another allocator"
        )));
    }
    Ok(to_prune / there)
}

/// Erdős–Rényi kernel: survivors in proportion to the sum of a weight's dimensions; a layer that
/// would get more weights than it has stays dense and the others share the rest.
///
/// # Errors
/// As [`uniform`].
pub fn erk(layers: &[Layer<'_>], keep: u64) -> Result<Vec<usize>> {
    check(layers, keep)?;
    let mut dense = vec![false; layers.len()];
    loop {
        let open = || layers.iter().zip(&dense).filter(|(_, d)| !**d).map(|(l, _)| l);
        let held: u64 =
            layers.iter().zip(&dense).filter(|(_, d)| **d).map(|(l, _)| l.available as u64).sum();
        // More is held dense than may stay only if rounding made the last layer dense: no more
        // than one weight per layer, and then nothing is left for the others.
        let share = keep.saturating_sub(held) as f64;
        let weight: f64 = open().map(|l| l.dimensions as f64).sum();
        let survivors =
            |l: &Layer<'_>| (share * l.dimensions as f64 / weight.max(1.0)).round_ties_even();
        let ratio = |l: &Layer<'_>| match (survivors(l), l.available) {
            (s, 0) if s > 0.0 => f64::INFINITY,
            (_, 0) => 0.0,
            (s, available) => s / available as f64,
        };
        let mut largest: Option<(usize, f64)> = None;
        for (i, layer) in layers.iter().enumerate() {
            let excess = ratio(layer);
            if dense.get(i) == Some(&false)
                && excess > 1.0
                && largest.is_none_or(|(_, best)| excess > best)
            {
                largest = Some((i, excess));
            }
        }
        match largest {
            Some((i, _)) => {
                if let Some(place) = dense.get_mut(i) {
                    *place = true;
                }
            }
            None => {
                let kept = layers.iter().zip(&dense);
                return Ok(kept
                    .map(|(l, d)| if *d { l.available } else { survivors(l) as usize })
                    .collect());
            }
        }
    }
}

/// LAMP scores of a layer in the order of its ranking, rising: the square of a weight over the sum
/// of the squares of all that are at least as large (Lee et al. 2021, equation 4). Zeros score 0.
pub fn lamp_scores(sorted: &[f32]) -> Vec<f64> {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let mut scores = vec![0.0; sorted.len()];
    let mut suffix = 0.0;
    for (score, &value) in scores.iter_mut().zip(sorted).rev() {
        let square = square(value);
        suffix += square;
        *score = if suffix > 0.0 { square / suffix } else { 0.0 };
    }
    scores
}

/// Magnitudes of a layer in the order of its ranking: the scores of global magnitude pruning.
pub fn magnitudes(sorted: &[f32]) -> Vec<f64> {
    sorted.iter().map(|v| f64::from(v.abs())).collect()
}

/// One threshold over all layers: keeps the `keep` largest of their scores, which rise in the order
/// of a layer's ranking and are not negative; equal scores at the threshold go in the order of the
/// layers. With [`lamp_scores`] the largest weight of every layer scores 1, so that no layer dies
/// while `keep` is at least the number of layers.
///
/// # Errors
/// As [`uniform`].
pub fn by_threshold(layers: &[Layer<'_>], scores: &[Vec<f64>], keep: u64) -> Result<Vec<usize>> {
    check(layers, keep)?;
    let pruned: u64 = layers.iter().map(|l| l.pruned() as u64).sum();
    let total: u64 = layers.iter().map(|l| l.total as u64).sum();
    let drop = total - keep;
    // What is pruned already stays so, whatever training made of the value under its mask.
    let open: Vec<&[f64]> =
        scores.iter().zip(layers).map(|(s, l)| s.get(l.pruned()..).unwrap_or_default()).collect();
    let left = drop.saturating_sub(pruned);
    // The bits of non-negative numbers sort as the numbers do: bisection on bits finds the largest
    // threshold below which no more than `left` scores lie.
    let below = |bits: u64| -> u64 {
        open.iter().map(|s| s.partition_point(|v| v.to_bits() < bits) as u64).sum()
    };
    let (mut low, mut high) = (0u64, f64::INFINITY.to_bits());
    while low < high {
        let middle = high - (high - low) / 2;
        if below(middle) <= left {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    let mut kept = Vec::with_capacity(layers.len());
    let mut ties = left - below(low);
    for (scores, layer) in open.iter().zip(layers) {
        let under = scores.partition_point(|v| v.to_bits() < low);
        let equal = scores.partition_point(|v| v.to_bits() <= low) - under;
        let also = (equal as u64).min(ties);
        ties -= also;
        kept.push(layer.available.saturating_sub(under + also as usize));
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::super::masks::Ranking;
    use super::*;

    fn scores(weights: &[(&Ranking, &[f32])], score: fn(&[f32]) -> Vec<f64>) -> Vec<Vec<f64>> {
        weights.iter().map(|(ranking, values)| score(&ranking.sorted(values))).collect()
    }

    fn lamp(layers: &[Layer<'_>], weights: &[(&Ranking, &[f32])], keep: u64) -> Result<Vec<usize>> {
        by_threshold(layers, &scores(weights, lamp_scores), keep)
    }

    fn global(
        layers: &[Layer<'_>],
        weights: &[(&Ranking, &[f32])],
        keep: u64,
    ) -> Result<Vec<usize>> {
        by_threshold(layers, &scores(weights, magnitudes), keep)
    }

    fn layer(name: &'static str, dims: &[usize]) -> Layer<'static> {
        let total = dims.iter().product();
        Layer {
            name,
            total,
            available: total,
            dimensions: dims.iter().sum(),
            convolution: dims.len() == 4,
        }
    }

    fn close(a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 5e-7), "{a:?} {b:?}");
    }

    #[test]
    fn lamp_scores_by_hand() {
        close(&lamp_scores(&[1.0, 2.0, 3.0]), &[1.0 / 14.0, 4.0 / 13.0, 1.0]);
        close(&lamp_scores(&[0.1, 0.2, 0.9, 1.0]), &[0.005376, 0.021622, 0.447514, 1.0]);
        close(&lamp_scores(&[0.5, 0.6, 0.7, 0.8]), &[0.143678, 0.241611, 0.433628, 1.0]);
        assert_eq!(lamp_scores(&[0.0, 0.0, 2.0]), [0.0, 0.0, 1.0]);
        assert_eq!(lamp_scores(&[0.0, 0.0]), [0.0, 0.0]);
    }

    #[test]
    fn lamp_keeps_the_best_scores_of_all_layers() {
        let (a, b) = ([0.1, 0.2, 0.9, 1.0], [0.5, 0.6, 0.7, 0.8]);
        let rankings = [Ranking::new("a", &a).unwrap(), Ranking::new("b", &b).unwrap()];
        let weights = [(&rankings[0], &a[..]), (&rankings[1], &b[..])];
        let layers = [layer("a", &[2, 2]), layer("b", &[2, 2])];
        assert_eq!(lamp(&layers, &weights, 4).unwrap(), [2, 2]);
        assert_eq!(lamp(&layers, &weights, 3).unwrap(), [2, 1], "0.4336 falls before 0.4475");
        assert_eq!(lamp(&layers, &weights, 2).unwrap(), [1, 1], "no layer dies");
        assert_eq!(lamp(&layers, &weights, 8).unwrap(), [4, 4]);
        // Magnitudes alone: 0.1, 0.2, 0.5 and 0.6 go.
        assert_eq!(global(&layers, &weights, 4).unwrap(), [2, 2]);
        assert_eq!(global(&layers, &weights, 3).unwrap(), [2, 1]);
        assert_eq!(global(&layers, &weights, 0).unwrap(), [0, 0]);
    }

    #[test]
    fn threshold_ties_go_in_the_order_of_the_layers() {
        let (a, b) = ([1.0, 1.0], [1.0, 2.0]);
        let rankings = [Ranking::new("a", &a).unwrap(), Ranking::new("b", &b).unwrap()];
        let weights = [(&rankings[0], &a[..]), (&rankings[1], &b[..])];
        let layers = [layer("a", &[1, 2]), layer("b", &[1, 2])];
        for (keep, expected) in [(4, [2, 2]), (3, [1, 2]), (2, [0, 2]), (1, [0, 1]), (0, [0, 0])] {
            assert_eq!(global(&layers, &weights, keep).unwrap(), expected);
        }
    }

    #[test]
    fn thresholds_equal_a_full_sort() {
        let mut rng = tensor::Rng::new(11);
        for round in 0..20 {
            let values: Vec<Vec<f32>> = (0..3)
                .map(|l| (0..7 + 5 * l).map(|_| (rng.below(9) as f32 - 4.0) / 2.0).collect())
                .collect();
            let rankings: Vec<Ranking> =
                values.iter().map(|v| Ranking::new("l", v).unwrap()).collect();
            let weights: Vec<(&Ranking, &[f32])> =
                rankings.iter().zip(&values).map(|(r, v)| (r, v.as_slice())).collect();
            let layers: Vec<Layer<'_>> = rankings
                .iter()
                .map(|r| Layer {
                    name: "l",
                    total: r.len(),
                    available: r.len() - r.zeros(),
                    dimensions: 1,
                    convolution: false,
                })
                .collect();
            let there = available(&layers);
            for keep in 0..=there {
                for scored in [false, true] {
                    let mut all: Vec<(f64, usize, usize)> = Vec::new();
                    for (l, (ranking, values)) in weights.iter().enumerate() {
                        let sorted = ranking.sorted(values);
                        let scores = if scored {
                            lamp_scores(&sorted)
                        } else {
                            sorted.iter().map(|v| f64::from(v.abs())).collect()
                        };
                        all.extend(scores.into_iter().enumerate().map(|(i, s)| (s, l, i)));
                    }
                    all.sort_by(|a, b| a.partial_cmp(b).unwrap());
                    let mut expected = vec![0; 3];
                    for (_, l, _) in all.iter().rev().take(keep as usize) {
                        expected[*l] += 1;
                    }
                    let allocator = if scored { lamp } else { global };
                    let found = allocator(&layers, &weights, keep).unwrap();
                    assert_eq!(found, expected, "round {round}, keep {keep}, lamp {scored}");
                }
            }
        }
    }

    #[test]
    fn erk_by_hand() {
        let layers =
            [layer("a", &[16, 3, 3, 3]), layer("b", &[32, 16, 3, 3]), layer("fc", &[10, 32])];
        let kept = erk(&layers, 1072).unwrap();
        assert_eq!(kept, [238, 514, 320]);
        let amounts: Vec<f64> =
            kept.iter().zip(&layers).map(|(k, l)| 1.0 - *k as f64 / l.total as f64).collect();
        close(&amounts, &[0.449074, 0.888455, 0.0]);
        assert_eq!(erk(&layers, 5360).unwrap(), [432, 4608, 320]);
    }

    #[test]
    fn uniform_is_the_same_everywhere() {
        let layers = [layer("a", &[10, 10]), layer("b", &[4, 5])];
        assert_eq!(uniform(&layers, 60).unwrap(), [50, 10]);
        let mut sparse = layers.clone();
        sparse[0].available = 80;
        // 80 + 20 survivors, half of them stay.
        assert_eq!(uniform(&sparse, 50).unwrap(), [40, 10]);
        assert_eq!(uniform(&layers, 120).unwrap(), [100, 20]);
    }

    #[test]
    fn uniform_plus_spares_both_ends() {
        let conv = [layer("a", &[2, 1, 3, 3]), layer("b", &[10, 10]), layer("c", &[10, 5])];
        // 168 weights, keep 84: b and c lose 84 of 150 = 0.56; c keeps 22 of 50, more than a fifth.
        assert_eq!(uniform_plus(&conv, 84).unwrap(), [18, 44, 22]);
        // keep 40: 128/150 would leave c 7.3 < 10, so c keeps 10 and b loses the other 88.
        assert_eq!(uniform_plus(&conv, 40).unwrap(), [18, 12, 10]);
        // A linear first layer has no privilege.
        let linear = [layer("a", &[5, 10]), layer("b", &[10, 5])];
        assert_eq!(uniform_plus(&linear, 50).unwrap(), [25, 25]);
        assert_eq!(uniform_plus(&linear, 12).unwrap(), [2, 10]);
        let message = uniform_plus(&conv, 20).unwrap_err().to_string();
        assert!(message.contains("uniform-plus"), "{message}");
    }

    #[test]
    fn impossible_targets_are_refused() {
        assert!(uniform(&[], 0).is_err());
        let mut layers = [layer("a", &[2, 2])];
        layers[0].available = 2;
        let message = erk(&layers, 3).unwrap_err().to_string();
        assert!(message.contains("already sparser"), "{message}");
    }
}
