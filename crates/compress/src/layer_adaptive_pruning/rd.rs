//! The allocation itself: measured curves, a budget, the smallest sum of distortions.
//!
//! If the changes of different layers do not correlate, the squared output changes add up (Xu et
//! al. 2023, theorem 1), and the choice of one grid point per layer is a multiple-choice knapsack,
//! which `allocate` solves by dynamic programming.

use super::curves::Curve;
use crate::allocate::{self, Choice};
use crate::{Error, Result};

/// What the choice must respect.
#[derive(Debug, Clone)]
pub struct Terms {
    /// What may be spent: weights kept, or multiplications left.
    pub budget: u64,
    /// What one kept weight of each layer costs; 1 when the budget counts weights.
    pub costs: Vec<u64>,
    /// Smallest and largest sparsity of each layer.
    pub bounds: Vec<[f64; 2]>,
    /// Weights of each layer that are pruned already.
    pub pruned: Vec<usize>,
    /// Resolution of the table.
    pub units: usize,
}

/// A grid point for every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Weights kept, by layer.
    pub kept: Vec<usize>,
    /// Predicted distortion, by layer.
    pub distortion: Vec<f64>,
    /// Their sum.
    pub predicted: f64,
    /// What is left of the budget.
    pub unused: u64,
    /// Size of a unit of the table; rounding to it can leave one unit per layer unused.
    pub unit: u64,
    /// Whether the units are fine enough for the optimum.
    pub exact: bool,
    /// No allocation on these curves has a smaller sum.
    pub bound: f64,
}

/// Chooses a point of every curve so that the sum of distortions is smallest within the budget.
///
/// # Errors
/// A layer whose bounds leave no grid point, by name; a budget below what the bounds allow.
pub fn choose(curves: &[Curve], terms: &Terms) -> Result<Found> {
    let mut options: Vec<Vec<Choice>> = Vec::with_capacity(curves.len());
    let mut points: Vec<Vec<usize>> = Vec::with_capacity(curves.len());
    let mut dense: u64 = 0;
    for (l, curve) in curves.iter().enumerate() {
        let cost = terms.costs.get(l).copied().unwrap_or(1);
        let [low, high] = terms.bounds.get(l).copied().unwrap_or([0.0, 1.0]);
        let pruned = terms.pruned.get(l).copied().unwrap_or(0);
        let mut own = Vec::new();
        for (k, (&amount, &n)) in curve.amount.iter().zip(&curve.pruned).enumerate() {
            // What a layer has lost already counts towards its lower bound and cannot be undone
            // for its upper one.
            let within = amount >= low - 1e-9 || n as f64 >= low * curve.total as f64;
            let fits = within && (amount <= high + 1e-9 || n == pruned);
            if fits && own.last().and_then(|&p: &usize| curve.pruned.get(p)) != Some(&n) {
                own.push(k);
            }
        }
        if own.is_empty() {
            return Err(Error::layer(
                &curve.module,
                format!(
                    "no grid point lies between its bounds {low} and {high}; widen them or take a \
                     finer grid than {} steps",
                    curve.amount.len().saturating_sub(1)
                ),
            ));
        }
        let choice = |&k: &usize| Choice {
            cost: (curve.total - curve.pruned.get(k).copied().unwrap_or(0)) as u64 * cost,
            error: curve.distortion.get(k).copied().unwrap_or(0.0),
        };
        let choices: Vec<Choice> = own.iter().map(choice).collect();
        dense = dense.saturating_add(choices.iter().map(|c| c.cost).max().unwrap_or(0));
        options.push(choices);
        points.push(own);
    }
    let (choice, unit, exact, bound) = if dense <= terms.budget {
        // Nothing has to go: a layer that could lose weights without harm keeps them all the same.
        (vec![0; curves.len()], 1, true, 0.0)
    } else {
        let found = allocate::allocate(&options, terms.budget, terms.units)?;
        (found.choice, found.unit, found.exact, found.bound)
    };
    let mut found = Found {
        kept: Vec::new(),
        distortion: Vec::new(),
        predicted: 0.0,
        unused: terms.budget,
        unit,
        exact,
        bound,
    };
    for (l, (curve, choice)) in curves.iter().zip(choice).enumerate() {
        let k = points.get(l).and_then(|p| p.get(choice)).copied().unwrap_or(0);
        let kept = curve.total - curve.pruned.get(k).copied().unwrap_or(0);
        let distortion = curve.distortion.get(k).copied().unwrap_or(0.0);
        let cost = kept as u64 * terms.costs.get(l).copied().unwrap_or(1);
        found.unused = found.unused.saturating_sub(cost);
        found.predicted += distortion;
        found.kept.push(kept);
        found.distortion.push(distortion);
    }
    found.bound = found.bound.min(found.predicted);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::masks::pruned_at;
    use super::*;
    use tensor::Rng;

    fn curve(module: &str, total: usize, distortion: &[f64]) -> Curve {
        let points = distortion.len() - 1;
        Curve {
            module: module.into(),
            total,
            amount: (0..=points).map(|k| k as f64 / points as f64).collect(),
            pruned: (0..=points).map(|k| pruned_at(k, points, total)).collect(),
            distortion: distortion.to_vec(),
        }
    }

    fn terms(curves: &[Curve], budget: u64, units: usize) -> Terms {
        Terms {
            budget,
            costs: vec![1; curves.len()],
            bounds: vec![[0.0, 1.0]; curves.len()],
            pruned: vec![0; curves.len()],
            units,
        }
    }

    fn two() -> Vec<Curve> {
        vec![curve("a", 4, &[0.0, 0.1, 0.5, 2.0, 9.0]), curve("b", 8, &[0.0, 0.05, 0.2, 0.6, 4.0])]
    }

    /// Smallest sum over all combinations of grid points within the budget.
    fn brute(curves: &[Curve], terms: &Terms, layer: usize, budget: u64) -> Option<f64> {
        let Some(curve) = curves.get(layer) else { return Some(0.0) };
        (0..curve.amount.len())
            .filter_map(|k| {
                let cost = (curve.total - curve.pruned[k]) as u64 * terms.costs[layer];
                let [low, high] = terms.bounds[layer];
                if curve.amount[k] < low || curve.amount[k] > high {
                    return None;
                }
                let rest = brute(curves, terms, layer + 1, budget.checked_sub(cost)?)?;
                Some(curve.distortion[k] + rest)
            })
            .min_by(f64::total_cmp)
    }

    #[test]
    fn two_layers_by_hand() {
        let curves = two();
        for (budget, kept, predicted) in
            [(12, [4, 8], 0.0), (8, [4, 4], 0.2), (6, [4, 2], 0.6), (4, [2, 2], 1.1)]
        {
            let found = choose(&curves, &terms(&curves, budget, 1000)).unwrap();
            assert_eq!(found.kept, kept, "budget {budget}");
            assert!((found.predicted - predicted).abs() < 1e-12);
            assert_eq!((found.unused, found.exact), (0, true));
        }
    }

    #[test]
    fn equals_exhaustive_search_and_coarse_units_stay_within_the_budget() {
        let mut rng = Rng::stream(5, "rd");
        for trial in 0..120 {
            let layers = 1 + trial % 4;
            let points = 2 + trial % 9;
            let curves: Vec<Curve> = (0..layers)
                .map(|_| {
                    let total = 1 + rng.below(40);
                    let by_count: Vec<f64> = (0..=total).map(|_| rng.uniform()).collect();
                    let at = |k| match pruned_at(k, points, total) {
                        0 => 0.0,
                        n => by_count[n],
                    };
                    curve("l", total, &(0..=points).map(at).collect::<Vec<_>>())
                })
                .collect();
            let total: u64 = curves.iter().map(|c| c.total as u64).sum();
            let budget = rng.below(total as usize + 1) as u64;
            let mut terms = terms(&curves, budget, 1_000_000);
            if trial % 3 == 0 {
                terms.costs = (0..layers).map(|_| 1 + rng.below(5) as u64).collect();
            }
            let best = brute(&curves, &terms, 0, budget).unwrap();
            let found = choose(&curves, &terms).unwrap();
            assert!((found.predicted - best).abs() < 1e-9, "{trial}: {found:?} {best}");
            for units in [1, 2, 7, 25] {
                terms.units = units;
                let coarse = choose(&curves, &terms).unwrap();
                let spent: u64 =
                    coarse.kept.iter().zip(&terms.costs).map(|(k, c)| *k as u64 * c).sum();
                assert!(spent <= budget && coarse.unused == budget - spent);
                assert!(coarse.predicted >= best - 1e-9);
            }
        }
    }

    #[test]
    fn a_budget_for_everything_prunes_nothing() {
        // Losing weights for nothing is possible here, but was not asked for.
        let curves = vec![curve("a", 4, &[0.0; 5]), curve("b", 8, &[0.0; 5])];
        assert_eq!(choose(&curves, &terms(&curves, 12, 100)).unwrap().kept, [4, 8]);
        assert!(choose(&curves, &terms(&curves, 11, 100)).unwrap().kept.iter().sum::<usize>() < 12);
    }

    #[test]
    fn bounds_drop_grid_points() {
        let curves = two();
        let mut terms = terms(&curves, 6, 1000);
        terms.bounds = vec![[0.25, 1.0], [0.0, 0.5]];
        let found = choose(&curves, &terms).unwrap();
        assert_eq!(found.kept, [2, 4], "a loses at least a quarter, b at most a half");
        assert!((found.predicted - brute(&curves, &terms, 0, 6).unwrap()).abs() < 1e-12);
        terms.budget = 3;
        let message = choose(&curves, &terms).unwrap_err().to_string();
        assert!(message.contains("cannot be met"), "{message}");
        terms.bounds = vec![[0.3, 0.4], [0.0, 1.0]];
        let message = choose(&curves, &terms).unwrap_err().to_string();
        assert!(message.contains("a: no grid point"), "{message}");
    }

    #[test]
    fn operations_weigh_layers_differently() {
        // The same curves; a weight of `a` is used at 10 positions, one of `b` at 1.
        let curves = two();
        let mut terms = terms(&curves, 24, 1000);
        terms.costs = vec![10, 1];
        // 4 * 10 + 8 = 48 dense. Half of it: a keeps 2 (20), b 4.
        let found = choose(&curves, &terms).unwrap();
        assert_eq!((found.kept.as_slice(), found.unused), (&[2, 4][..], 0));
    }

    #[test]
    fn what_is_pruned_already_is_not_given_back() {
        let mut curves = two();
        // Half of `b` is gone: its first three points are one, and cost nothing.
        curves[1].pruned = vec![4, 4, 4, 6, 8];
        curves[1].distortion = vec![0.0, 0.0, 0.0, 0.4, 3.8];
        let mut terms = terms(&curves, 8, 1000);
        terms.pruned = vec![0, 4];
        assert_eq!(choose(&curves, &terms).unwrap().kept, [4, 4]);
        terms.budget = 6;
        assert_eq!(choose(&curves, &terms).unwrap().kept, [4, 2]);
        // A bound below what is gone already cannot ask for weights back.
        terms.bounds[1] = [0.0, 0.25];
        assert_eq!(choose(&curves, &terms).unwrap().kept, [2, 4]);
    }
}
