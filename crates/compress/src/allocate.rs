//! The one allocator of the house: a budget over layers, each of which offers several sizes at
//! several errors (multiple-choice knapsack), solved by dynamic programming.
//!
//! Minimise `Σ error` over one choice per layer subject to `Σ cost <= budget`. What a cost counts
//! (weights kept, bits, bytes, operations) and what an error means is the caller's business; errors
//! must be additive for the answer to mean anything.
//!
//! The table over spent budget has as many entries as the caller grants (`units`). A layer's
//! cheapest choice is paid in full beforehand and the rest is counted in whole units, rounded up:
//! the budget is never exceeded, every budget that can be met is met, and at most one unit per layer
//! is lost. With enough units, or with costs that are multiples of one, the answer is the optimum.
//!
//! ```
//! use strata_compress::allocate::{Choice, allocate};
//! let layer = |errors: [f64; 3]| -> Vec<Choice> {
//!     [2, 3, 4].into_iter().zip(errors).map(|(cost, error)| Choice { cost, error }).collect()
//! };
//! let found = allocate(&[layer([9.0, 4.0, 1.0]), layer([3.0, 2.0, 1.5])], 6, 100)?;
//! assert_eq!((found.choice, found.error, found.cost), (vec![2, 0], 4.0, 6));
//! # Ok::<(), strata_compress::Error>(())
//! ```

use crate::{Error, Result};
use rayon::prelude::*;

/// Units that are enough for budgets of millions over hundreds of layers.
pub const UNITS: usize = 20_000;

/// Table entries that may exist at once, over all layers (two bytes each).
const MAX_STATES: usize = 1 << 31;

/// Table entries that one task works on: what fits into the first-level cache.
const CHUNK: usize = 2048;

/// One way to treat a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// What it costs.
    pub cost: u64,
    /// What it does to the result.
    pub error: f64,
}

/// A choice for every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// Index of the choice taken, by layer.
    pub choice: Vec<usize>,
    /// Cost of the choices.
    pub cost: u64,
    /// Sum of their errors.
    pub error: f64,
    /// What is left of the budget.
    pub unused: u64,
    /// Size of a unit; 1, or the common divisor of all costs, when the answer is the optimum.
    pub unit: u64,
    /// Whether the answer is the optimum, up to floating-point addition.
    pub exact: bool,
    /// No allocation within the budget has a smaller error (linear relaxation).
    pub bound: f64,
}

/// A layer's choices that are not dominated, by increasing cost and decreasing error; costs count
/// from the cheapest.
struct Frontier {
    layer: usize,
    base: u64,
    /// Extra cost, error, index among the layer's choices.
    points: Vec<(u64, f64, usize)>,
}

impl Frontier {
    fn new(layer: usize, choices: &[Choice]) -> Result<Self> {
        if choices.is_empty() || choices.len() > usize::from(u16::MAX) {
            return Err(Error::Options(format!(
                "layer {layer} offers {} choices; 1 to {} can be allocated",
                choices.len(),
                u16::MAX
            )));
        }
        if let Some(bad) = choices.iter().find(|c| !c.error.is_finite()) {
            return Err(Error::Options(format!(
                "layer {layer} has an error of {} at cost {}; errors must be finite",
                bad.error, bad.cost
            )));
        }
        let mut order: Vec<usize> = (0..choices.len()).collect();
        order.sort_by(|&a, &b| {
            let (a, b) = (&choices[a], &choices[b]);
            a.cost.cmp(&b.cost).then(a.error.total_cmp(&b.error))
        });
        let base = choices[order[0]].cost;
        let mut points: Vec<(u64, f64, usize)> = Vec::new();
        for index in order {
            let Choice { cost, error } = choices[index];
            if points.last().is_none_or(|&(_, best, _)| error < best) {
                points.push((cost - base, error, index));
            }
        }
        Ok(Self { layer, base, points })
    }

    /// Corners of the lower convex hull, as indices into `points`.
    fn hull(&self) -> Vec<usize> {
        let mut hull: Vec<usize> = Vec::new();
        for (index, &(cost, error, _)) in self.points.iter().enumerate() {
            while let [.., a, b] = hull[..] {
                let ((ca, ea, _), (cb, eb, _)) = (self.points[a], self.points[b]);
                let (before, after) = (gain(ca, ea, cb, eb), gain(cb, eb, cost, error));
                if after < before {
                    break;
                }
                hull.pop();
            }
            hull.push(index);
        }
        hull
    }
}

/// Error saved per unit of cost between two points.
fn gain(cost_a: u64, error_a: f64, cost_b: u64, error_b: f64) -> f64 {
    (error_a - error_b) / (cost_b - cost_a) as f64
}

/// Chooses for every layer so that the sum of errors is smallest and costs stay within `budget`.
///
/// `units` is the resolution of the table ([`UNITS`] is a good number): time is
/// `O(choices * units)`, memory two bytes per layer and unit.
///
/// # Errors
/// When there are no layers, a layer has no choice or an error that is not finite, when even the
/// cheapest choices exceed the budget (the message names what they cost), or when the table would
/// not fit into memory.
pub fn allocate(layers: &[Vec<Choice>], budget: u64, units: usize) -> Result<Allocation> {
    if layers.is_empty() || units == 0 {
        return Err(Error::Options(
            "there is nothing to allocate: no layers, or no units to count the budget in".into(),
        ));
    }
    let mut frontiers: Vec<Frontier> = layers
        .iter()
        .enumerate()
        .map(|(layer, choices)| Frontier::new(layer, choices))
        .collect::<Result<_>>()?;
    let base: u128 = frontiers.iter().map(|f| u128::from(f.base)).sum();
    if base > u128::from(budget) {
        return Err(Error::Options(format!(
            "a budget of {budget} cannot be met: the cheapest choices cost {base}"
        )));
    }
    let free = budget - base as u64;
    let most = |f: &Frontier| f.points.last().map_or(0, |p| p.0);
    let whole: u128 = frontiers.iter().map(|f| u128::from(most(f))).sum();
    let room = u128::from(free).min(whole) as u64;
    // Costs that are multiples of one number need only that many states.
    let divisor = frontiers.iter().flat_map(|f| &f.points).fold(0, |d, p| gcd(d, p.0)).max(1);
    let unit = (room / divisor).div_ceil(units as u64).max(1) * divisor;
    // Small layers first: the table only grows as far as the layers seen so far can spend.
    frontiers.sort_by_key(|f| (most(f), f.layer));
    let mut picks = dynamic_programme(&frontiers, unit, (room / unit) as usize)?;
    let (greedy, bound) = relaxation(&frontiers, free);
    let exact = unit == divisor;
    if !exact {
        let error = |picks: &[usize]| -> f64 {
            frontiers.iter().zip(picks).map(|(f, &p)| f.points[p].1).sum()
        };
        if error(&greedy) < error(&picks) {
            picks = greedy;
        }
        spend(&frontiers, &mut picks, free);
    }
    let mut choice = vec![0; layers.len()];
    for (frontier, &pick) in frontiers.iter().zip(&picks) {
        choice[frontier.layer] = frontier.points[pick].2;
    }
    let taken = || layers.iter().zip(&choice).map(|(layer, &index)| layer[index]);
    let cost = taken().map(|c| c.cost).sum();
    let error = taken().map(|c| c.error).sum();
    // Two sums in different orders: never report a bound above what was reached.
    let bound = f64::min(bound, error);
    Ok(Allocation { error, cost, unused: budget - cost, unit, exact, bound, choice })
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// `g_l(s) = min_k [ d_l(k) + g_{l-1}(s - r_l(k)) ]` over budgets of at most `s` units; returns the
/// points taken.
fn dynamic_programme(frontiers: &[Frontier], unit: u64, room: usize) -> Result<Vec<usize>> {
    // Where the table of each layer ends: beyond what all layers so far can spend nothing changes.
    let mut reach = Vec::with_capacity(frontiers.len());
    let mut end = 0usize;
    for frontier in frontiers {
        let most = frontier.points.last().map_or(0, |p| p.0.div_ceil(unit));
        end = end.saturating_add(usize::try_from(most).unwrap_or(usize::MAX)).min(room);
        reach.push(end);
    }
    let states = reach.iter().fold(0usize, |sum, &end| sum.saturating_add(end + 1));
    if states > MAX_STATES {
        return Err(Error::Options(format!(
            "{} layers in {room} units need a table of {states} entries; use fewer units",
            frontiers.len()
        )));
    }
    let mut table = vec![0f64];
    let mut tables: Vec<Vec<u16>> = Vec::with_capacity(frontiers.len());
    for (frontier, &end) in frontiers.iter().zip(&reach) {
        let last = table.last().copied().unwrap_or(0.0);
        table.resize(end + 1, last);
        let mut next = vec![f64::INFINITY; end + 1];
        let mut taken = vec![0u16; end + 1];
        next.par_chunks_mut(CHUNK).zip(taken.par_chunks_mut(CHUNK)).enumerate().for_each(
            |(chunk, (next, taken))| {
                let first = chunk * CHUNK;
                for (pick, &(cost, error, _)) in frontier.points.iter().enumerate() {
                    let shift = cost.div_ceil(unit) as usize;
                    let from = first.max(shift);
                    if let Some(skip) = Some(from - first).filter(|&skip| skip < next.len()) {
                        let source = &table[from - shift..first + next.len() - shift];
                        relax(&mut next[skip..], &mut taken[skip..], source, error, pick as u16);
                    }
                }
            },
        );
        table = next;
        tables.push(taken);
    }
    let mut state = room;
    let mut picks = vec![0; frontiers.len()];
    for (index, taken) in tables.iter().enumerate().rev() {
        let pick = usize::from(taken[state.min(taken.len() - 1)]);
        state -= frontiers[index].points[pick].0.div_ceil(unit) as usize;
        picks[index] = pick;
    }
    Ok(picks)
}

tensor::simd! {
    /// The shifted addition and the running minimum.
    fn relax(next: &mut [f64], taken: &mut [u16], source: &[f64], error: f64, pick: u16) {
        for ((next, taken), source) in next.iter_mut().zip(taken).zip(source) {
            let sum = source + error;
            let better = sum < *next;
            *next = if better { sum } else { *next };
            *taken = if better { pick } else { *taken };
        }
    }
}

/// Walks down the convex hulls of all layers by error saved per cost until `free` is spent: the
/// points reached, and the error with the last step taken in part, which no allocation beats.
fn relaxation(frontiers: &[Frontier], free: u64) -> (Vec<usize>, f64) {
    let mut steps: Vec<(f64, usize, usize, usize)> = Vec::new();
    let mut bound = 0.0;
    for (index, frontier) in frontiers.iter().enumerate() {
        bound += frontier.points[0].1;
        for pair in frontier.hull().windows(2) {
            let ((ca, ea, _), (cb, eb, _)) = (frontier.points[pair[0]], frontier.points[pair[1]]);
            steps.push((gain(ca, ea, cb, eb), index, pair[0], pair[1]));
        }
    }
    // On one hull gains fall strictly, so the steps of a layer stay in order.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut picks = vec![0; frontiers.len()];
    let mut left = free;
    for (gain, index, from, to) in steps {
        let cost = frontiers[index].points[to].0 - frontiers[index].points[from].0;
        if cost > left {
            return (picks, bound - gain * left as f64);
        }
        left -= cost;
        bound -= gain * cost as f64;
        picks[index] = to;
    }
    (picks, bound)
}

/// Spends what rounding left over: the single change that saves most, as long as one fits.
fn spend(frontiers: &[Frontier], picks: &mut [usize], free: u64) {
    let mut left = frontiers
        .iter()
        .zip(&*picks)
        .fold(free, |left, (f, &p)| left.saturating_sub(f.points[p].0));
    loop {
        let candidates = frontiers.iter().enumerate().filter_map(|(index, frontier)| {
            let (cost, error, _) = frontier.points[picks[index]];
            // Errors fall along a frontier: the dearest that fits is the best.
            let to = frontier.points.iter().rposition(|p| p.0 <= cost.saturating_add(left))?;
            let saved = error - frontier.points[to].1;
            (to > picks[index]).then_some((saved, index, to))
        });
        let Some((_, index, to)) = candidates.max_by(|a, b| a.0.total_cmp(&b.0)) else { return };
        left -= frontiers[index].points[to].0 - frontiers[index].points[picks[index]].0;
        picks[index] = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::Rng;

    fn choices(costs: &[u64], errors: &[f64]) -> Vec<Choice> {
        costs.iter().zip(errors).map(|(&cost, &error)| Choice { cost, error }).collect()
    }

    /// Smallest error over all combinations.
    fn brute(layers: &[Vec<Choice>], budget: u64) -> Option<f64> {
        match layers.split_first() {
            None => Some(0.0),
            Some((first, rest)) => first
                .iter()
                .filter(|c| c.cost <= budget)
                .filter_map(|c| Some(c.error + brute(rest, budget - c.cost)?))
                .min_by(f64::total_cmp),
        }
    }

    fn random(rng: &mut Rng, layers: usize, options: usize, scale: u64) -> Vec<Vec<Choice>> {
        (0..layers)
            .map(|_| {
                (0..options)
                    .map(|_| Choice {
                        cost: 1 + rng.below(scale as usize) as u64,
                        error: rng.uniform(),
                    })
                    .collect()
            })
            .collect()
    }

    #[test]
    fn weights_kept_in_two_layers_by_hand() {
        // Layers of 4 and 8 weights pruned to 0, 25, 50, 75, 100 %; the budget counts weights kept.
        let small = choices(&[4, 3, 2, 1, 0], &[0.0, 0.1, 0.5, 2.0, 9.0]);
        let large = choices(&[8, 6, 4, 2, 0], &[0.0, 0.05, 0.2, 0.6, 4.0]);
        let layers = [small, large];
        for (budget, choice, error) in
            [(12, [0, 0], 0.0), (8, [0, 2], 0.2), (6, [0, 3], 0.6), (4, [2, 3], 1.1)]
        {
            let found = allocate(&layers, budget, 100).unwrap();
            assert_eq!(found.choice, choice, "budget {budget}");
            assert!((found.error - error).abs() < 1e-12 && found.exact, "{found:?}");
            assert_eq!(found.cost + found.unused, budget);
        }
        // Everything pruned costs nothing, so a budget of nothing can be met.
        assert_eq!(allocate(&layers, 0, 1).unwrap().choice, [4, 4]);
    }

    #[test]
    fn equals_exhaustive_search_when_units_suffice() {
        let mut rng = Rng::stream(7, "allocate");
        for trial in 0..200 {
            let (count, options) = (1 + trial % 4, 1 + trial % 10);
            let layers = random(&mut rng, count, options, 30);
            let budget = rng.below(30 * count) as u64 + 1;
            match brute(&layers, budget) {
                Some(best) => {
                    let found = allocate(&layers, budget, budget as usize).unwrap();
                    assert!((found.error - best).abs() < 1e-12, "{trial}: {found:?} {best}");
                    assert!(found.exact && found.cost <= budget);
                    assert!(found.bound <= best + 1e-12, "{trial}");
                }
                None => {
                    let message = allocate(&layers, budget, 100).unwrap_err().to_string();
                    assert!(message.contains("cheapest"), "{message}");
                }
            }
        }
    }

    #[test]
    fn coarse_units_never_exceed_the_budget_nor_beat_the_optimum() {
        let mut rng = Rng::stream(8, "allocate");
        let (mut worse, mut feasible) = (0, 0);
        for trial in 0..200 {
            let layers = random(&mut rng, 4, 6, 1000);
            let budget = 400 + rng.below(3600) as u64;
            let Some(best) = brute(&layers, budget) else { continue };
            feasible += 1;
            for units in [1, 3, 17, 200] {
                let found = allocate(&layers, budget, units).unwrap();
                assert!(found.cost <= budget, "{trial}");
                assert_eq!(found.unused, budget - found.cost);
                assert!(found.error >= best - 1e-12 && found.bound <= best + 1e-12, "{trial}");
                worse += usize::from(found.error > best + 1e-12);
            }
        }
        assert!(feasible > 100 && worse > 0, "{feasible} {worse}: the comparison says nothing");
    }

    #[test]
    fn common_multiples_make_few_units_exact() {
        let mut rng = Rng::stream(9, "allocate");
        for _ in 0..50 {
            let mut layers = random(&mut rng, 3, 5, 12);
            layers.iter_mut().flatten().for_each(|c| c.cost *= 4096);
            let Some(best) = brute(&layers, 20 * 4096 + 17) else { continue };
            let found = allocate(&layers, 20 * 4096 + 17, 36).unwrap();
            assert!(found.exact, "{found:?}");
            assert!((found.error - best).abs() < 1e-12);
        }
    }

    #[test]
    fn the_bound_is_tight_on_convex_curves_of_equal_steps() {
        let layer = |scale: f64| choices(&[1, 2, 3, 4], &[8.0, 4.0, 2.0, 1.0].map(|e| e * scale));
        let layers = [layer(1.0), layer(3.0), layer(0.2)];
        for budget in 3..=12 {
            let found = allocate(&layers, budget, 100).unwrap();
            assert!((found.error - found.bound).abs() < 1e-12, "{budget}: {found:?}");
        }
    }

    #[test]
    fn dominated_choices_and_order_do_not_matter() {
        let plain = [choices(&[1, 2], &[6.0, 1.0]), choices(&[1, 3], &[4.0, 0.0])];
        let found = allocate(&plain, 4, 10).unwrap();
        let more =
            [choices(&[2, 9, 2, 1], &[1.0, 2.0, 1.0, 6.0]), choices(&[3, 1, 2], &[0.0, 4.0, 4.0])];
        let again = allocate(&more, 4, 10).unwrap();
        assert_eq!((found.error, found.cost), (again.error, again.cost));
        // Of equal choices the first and cheapest is taken.
        assert_eq!(again.choice, [0, 1]);
        let same = [choices(&[5, 2, 2, 7], &[1.0; 4])];
        assert_eq!(allocate(&same, 100, 10).unwrap().choice, [1]);
    }

    #[test]
    fn what_cannot_be_allocated_is_refused() {
        let one = || choices(&[3], &[0.0]);
        for (layers, budget, units, word) in [
            (vec![], 1, 1, "nothing to allocate"),
            (vec![one()], 3, 0, "nothing to allocate"),
            (vec![one(), vec![]], 3, 1, "layer 1"),
            (vec![choices(&[1, 2], &[f64::NAN, 0.0])], 3, 1, "finite"),
            (vec![one(), one()], 5, 9, "cost 6"),
            (vec![choices(&[0, 1 << 40], &[1.0, 0.0]); 3], u64::MAX, 1 << 40, "fewer units"),
        ] {
            // A prime keeps the common divisor of the last case at 1.
            let layers: Vec<Vec<Choice>> = layers
                .into_iter()
                .enumerate()
                .map(|(i, mut l)| {
                    if let Some(c) = l.last_mut().filter(|c| c.cost > 1 << 30) {
                        c.cost += i as u64;
                    }
                    l
                })
                .collect();
            let message = allocate(&layers, budget, units).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
        let huge = vec![choices(&[u64::MAX], &[0.0]); 2];
        assert!(allocate(&huge, u64::MAX, 10).is_err());
    }
}
