//! From an order of blocks and a target to a width for every block.

use crate::{Error, Result};

/// The widths on offer, widest first, and what one more block at each costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Widths {
    /// Bits, strictly falling: two or three of them.
    pub bits: Vec<u8>,
    /// Share of blocks held at the middle of three widths; `None` fills the middle width first and
    /// moves blocks to the lowest only when all are there.
    pub middle_share: Option<f64>,
}

/// What the target limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// The weighted mean of costs per unit comes nearest to this (blocks of equal size) or stays
    /// below it (blocks of different size).
    Average(f64),
    /// The sum of costs does not exceed this.
    Total(f64),
    /// So many blocks leave the widest width.
    Blocks(usize),
}

/// How many blocks, from the end of the order, are at the lower width: the nearest to `target`,
/// halves up, for `n` blocks of equal size (`n * (high - target) / (high - low)`).
pub fn low_count(n: usize, high: f64, low: f64, target: f64) -> usize {
    // A tolerance far below any target that can be written: 0.5 must not become 0.49999.
    let exact = n as f64 * (high - target) / (high - low);
    ((exact + 0.5 + 1e-9).floor().max(0.0) as usize).min(n)
}

/// Index into `widths.bits` for every block.
///
/// `order` lists blocks from the most important; `costs[w][b]` is the cost of block `b` at width
/// `w`, `weights[b]` its size (`Average` divides by their sum).
///
/// # Errors
/// A target outside what the widths can reach, naming the range.
pub fn assign(
    widths: &Widths,
    order: &[usize],
    weights: &[f64],
    costs: &[Vec<f64>],
    goal: Goal,
) -> Result<Vec<usize>> {
    let n = order.len();
    let size: f64 = weights.iter().sum();
    let total = |at: &[usize]| -> f64 { at.iter().enumerate().map(|(b, &w)| costs[w][b]).sum() };
    let last = widths.bits.len() - 1;
    // States from all blocks wide to all blocks narrow; each one moves a block further down.
    let states = states(widths, order);
    let (dearest, cheapest) = (total(&vec![0; n]), total(&vec![last; n]));
    let index = match goal {
        Goal::Blocks(count) if count <= n => count.min(states.len() - 1),
        Goal::Blocks(count) => {
            return Err(Error::Options(format!(
                "{count} blocks at the lower width were asked for; the model has {n}"
            )));
        }
        Goal::Average(target) => {
            let (most, least) = (dearest / size, cheapest / size);
            // Decimal targets at the very ends must not fail on rounding.
            if !(target > least - 1e-9 && target < most + 1e-9) {
                return Err(Error::Options(format!(
                    "an average of {target} bits is outside what these widths reach: {least:.4} \
                     to {most:.4}"
                )));
            }
            let equal = weights.windows(2).all(|w| w[0] == w[1]);
            let average = |s: &Vec<usize>| total(s) / size;
            if equal && last == 1 {
                low_count(n, most, least, target)
            } else if equal {
                // The nearest; of two equally near ones the smaller average.
                (0..states.len())
                    .rev()
                    .min_by(|&a, &b| {
                        let distance = |i: usize| (average(&states[i]) - target).abs();
                        (distance(a) - 1e-9).total_cmp(&distance(b))
                    })
                    .unwrap_or(0)
            } else {
                first_within(&states, |s| average(s) <= target + 1e-9)
            }
        }
        Goal::Total(limit) => {
            if cheapest > limit {
                return Err(Error::Options(format!(
                    "the target cannot be met: even with every block at {} bits it is exceeded by \
                     {:.1} %",
                    widths.bits[last],
                    100.0 * (cheapest / limit.max(1.0) - 1.0)
                )));
            }
            first_within(&states, |s| total(s) <= limit)
        }
    };
    Ok(states.into_iter().nth(index).unwrap_or_else(|| vec![last; n]))
}

fn first_within(states: &[Vec<usize>], fits: impl Fn(&Vec<usize>) -> bool) -> usize {
    states.iter().position(fits).unwrap_or(states.len() - 1)
}

/// Every schedule from all wide to all narrow, moving one block at a time from the least important.
fn states(widths: &Widths, order: &[usize]) -> Vec<Vec<usize>> {
    let n = order.len();
    let last = widths.bits.len() - 1;
    let mut all = vec![vec![0; n]];
    let step = |all: &mut Vec<Vec<usize>>, moves: &[(usize, usize)]| {
        let mut next = all.last().cloned().unwrap_or_default();
        for &(block, width) in moves {
            next[block] = width;
        }
        all.push(next);
    };
    let tail: Vec<usize> = order.iter().rev().copied().collect();
    match widths.middle_share {
        Some(share) if last == 2 => {
            let middle = ((share * n as f64).round() as usize).min(n);
            // The middle range slides: its far end goes lowest as its near end takes a block in.
            for i in 0..n + middle {
                let mut moves = Vec::new();
                if let Some(&block) = tail.get(i) {
                    moves.push((block, 1));
                }
                if let Some(&block) = i.checked_sub(middle).and_then(|i| tail.get(i)) {
                    moves.push((block, 2));
                }
                step(&mut all, &moves);
            }
        }
        _ => {
            for width in 1..=last {
                for &block in &tail {
                    step(&mut all, &[(block, width)]);
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two(high: u8, low: u8) -> Widths {
        Widths { bits: vec![high, low], middle_share: None }
    }

    fn equal(widths: &Widths, n: usize, goal: Goal) -> Result<Vec<usize>> {
        let order: Vec<usize> = (0..n).collect();
        let costs: Vec<Vec<f64>> = widths.bits.iter().map(|&b| vec![f64::from(b); n]).collect();
        assign(widths, &order, &vec![1.0; n], &costs, goal)
    }

    fn low(state: &[usize]) -> usize {
        state.iter().filter(|&&w| w > 0).count()
    }

    #[test]
    fn counts_by_hand() {
        for (n, high, low_bits, target, count) in [
            (40, 4, 2, 3.5, 10),
            (40, 4, 2, 2.85, 23),
            (40, 4, 2, 4.0, 0),
            (40, 4, 2, 2.0, 40),
            (32, 4, 2, 3.0, 16),
            (32, 4, 2, 2.9, 18),
            (1, 4, 2, 3.2, 0),
            (1, 4, 2, 3.0, 1),
            (2, 8, 4, 7.0, 1),
        ] {
            let found = equal(&two(high, low_bits), n, Goal::Average(target)).unwrap();
            assert_eq!(low(&found), count, "{n} {target}");
            let average = found.iter().map(|&w| f64::from([high, low_bits][w])).sum::<f64>();
            let slack = f64::from(high - low_bits) / (2 * n) as f64;
            assert!(average / n as f64 <= target + slack + 1e-9);
        }
        // The least important, at the end of the order, go first.
        assert_eq!(equal(&two(4, 2), 4, Goal::Average(3.5)).unwrap(), [0, 0, 0, 1]);
        assert_eq!(low(&equal(&two(4, 2), 8, Goal::Blocks(3)).unwrap()), 3);
    }

    #[test]
    fn smaller_targets_only_add_low_blocks() {
        let mut before = vec![0; 13];
        for step in 0..=40 {
            let target = 4.0 - 0.05 * f64::from(step);
            let now = equal(&two(4, 2), 13, Goal::Average(target)).unwrap();
            assert!(before.iter().zip(&now).all(|(a, b)| a <= b), "{target}");
            before = now;
        }
        assert_eq!(low(&before), 13);
    }

    #[test]
    fn unequal_blocks_stay_below_the_target() {
        let weights = [10.0, 1.0, 5.0, 4.0];
        let costs: Vec<Vec<f64>> =
            [4.0, 2.0].map(|b: f64| weights.iter().map(|w| w * b).collect()).to_vec();
        let order = [2, 0, 1, 3];
        let average = |state: &[usize]| {
            let sum: f64 = state.iter().enumerate().map(|(b, &w)| costs[w][b]).sum();
            sum / 20.0
        };
        let found = assign(&two(4, 2), &order, &weights, &costs, Goal::Average(3.5)).unwrap();
        // Blocks 3 and 1 together reach exactly 3.5.
        assert_eq!(found, [0, 1, 0, 1]);
        assert_eq!(average(&found), 3.5);
        let found = assign(&two(4, 2), &order, &weights, &costs, Goal::Average(3.49)).unwrap();
        assert_eq!(found, [1, 1, 0, 1]);
        let found = assign(&two(4, 2), &order, &weights, &costs, Goal::Total(60.0)).unwrap();
        assert!(average(&found) * 20.0 <= 60.0 && found == [1, 1, 0, 1]);
    }

    #[test]
    fn three_widths() {
        let widths = Widths { bits: vec![8, 4, 2], middle_share: None };
        // 7 is three blocks of four at 8 bits; below 4 the tail goes to 2.
        assert_eq!(equal(&widths, 4, Goal::Average(7.0)).unwrap(), [0, 0, 0, 1]);
        assert_eq!(equal(&widths, 4, Goal::Average(4.0)).unwrap(), [1, 1, 1, 1]);
        assert_eq!(equal(&widths, 4, Goal::Average(3.0)).unwrap(), [1, 1, 2, 2]);
        let shared = Widths { middle_share: Some(0.5), ..widths };
        assert_eq!(equal(&shared, 4, Goal::Average(4.5)).unwrap(), [0, 1, 1, 2]);
        assert_eq!(equal(&shared, 4, Goal::Average(8.0)).unwrap(), [0, 0, 0, 0]);
        assert_eq!(equal(&shared, 4, Goal::Average(2.0)).unwrap(), [2, 2, 2, 2]);
        // Widths never rise along the order.
        for tenth in 20..=80 {
            let found = equal(&shared, 9, Goal::Average(f64::from(tenth) / 10.0)).unwrap();
            assert!(found.windows(2).all(|w| w[0] <= w[1]), "{found:?}");
        }
    }

    #[test]
    fn targets_out_of_reach_name_the_range() {
        for target in [1.9, 4.1, f64::NAN] {
            let message = equal(&two(4, 2), 8, Goal::Average(target)).unwrap_err().to_string();
            assert!(message.contains("2.0000 to 4.0000"), "{message}");
        }
        assert!(equal(&two(4, 2), 8, Goal::Total(15.0)).is_err());
        let message = equal(&two(4, 2), 8, Goal::Blocks(9)).unwrap_err().to_string();
        assert!(message.contains("has 8"), "{message}");
    }
}
