//! Axis scales: from values to positions, with ticks at round numbers.

use crate::human;

/// Maps values to positions along an axis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Scale {
    /// A scale that covers the finite `values` (for `log`: the positive ones), drawn between the
    /// positions `from` and `to`. `zero` makes a linear scale include zero, `rounded` extends it to
    /// round numbers.
    pub(crate) fn new(
        values: impl Iterator<Item = f64>,
        log: bool,
        zero: bool,
        rounded: bool,
        (from, to): (f64, f64),
    ) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|v| v.is_finite() && (!log || *v > 0.0)) {
            low = low.min(value);
            high = high.max(value);
        }
        if low > high {
            (low, high) = if log { (0.1, 1.0) } else { (0.0, 1.0) };
        }
        if log {
            if rounded {
                // Out to the next 1, 2 or 5 of the decade on both sides.
                let steps = [1.0, 2.0, 5.0, 10.0];
                let decade = 10f64.powf(low.log10().floor());
                let below = steps.iter().rev().map(|m| m * decade).find(|t| *t <= low * 1.0001);
                low = below.unwrap_or(low).max(f64::MIN_POSITIVE);
                let decade = 10f64.powf(high.log10().floor());
                high = steps.iter().map(|m| m * decade).find(|t| *t >= high).unwrap_or(high);
            }
            if high <= low {
                high = low * 10.0;
            }
            return Self { low, high, log, from, to };
        }
        if zero {
            low = low.min(0.0);
            high = high.max(0.0);
        }
        if high - low <= f64::EPSILON * high.abs().max(low.abs()) {
            let room = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            // A flat line at zero or of one value still needs an axis.
            (low, high) =
                if zero && low >= 0.0 { (low, low + room) } else { (low - room, high + room) };
        }
        if rounded {
            let step = nice_step((high - low) / 5.0);
            low = (low / step + 1e-9).floor() * step;
            high = (high / step - 1e-9).ceil() * step;
        }
        Self { low, high, log, from, to }
    }

    /// The position of `value`; `None` when it cannot be drawn.
    pub(crate) fn at(&self, value: f64) -> Option<f64> {
        if !value.is_finite() || (self.log && value <= 0.0) {
            return None;
        }
        let share = if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        let at = self.from + share.clamp(-0.02, 1.02) * (self.to - self.from);
        at.is_finite().then_some(at)
    }

    /// The position bars grow from: zero, or the low end.
    pub(crate) fn base(&self) -> f64 {
        if self.log {
            self.from
        } else {
            self.at(0.0_f64.clamp(self.low, self.high)).unwrap_or(self.from)
        }
    }

    /// Round values for about `count` ticks, with their labels.
    pub(crate) fn ticks(&self, count: usize) -> Vec<(f64, String)> {
        let values = if self.log && self.high / self.low >= 10.0 {
            self.log_ticks(count)
        } else {
            self.linear_ticks(count)
        };
        values.into_iter().map(|v| (v, label(v))).collect()
    }

    fn linear_ticks(&self, count: usize) -> Vec<f64> {
        let step = nice_step((self.high - self.low) / count.max(1) as f64);
        let first = (self.low / step - 1e-9).ceil();
        let last = (self.high / step + 1e-9).floor();
        if !(last - first).is_finite() || last - first > 100.0 {
            return vec![self.low, self.high];
        }
        (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect()
    }

    fn log_ticks(&self, count: usize) -> Vec<f64> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let decades = (last - first).max(1) as usize;
        let within: &[f64] = if decades * 3 <= count + 1 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let stride = decades.div_ceil(count.max(1)).max(1);
        (first..=last)
            .step_by(stride)
            .flat_map(|e| within.iter().map(move |m| m * 10f64.powi(e)))
            .filter(|v| *v >= self.low * 0.9999 && *v <= self.high * 1.0001)
            .collect()
    }
}

/// The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `rough`.
fn nice_step(rough: f64) -> f64 {
    if !(rough.is_finite() && rough > 0.0) {
        return 1.0;
    }
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0];
    steps.iter().map(|m| m * power).find(|s| *s >= rough * 0.9999).unwrap_or(10.0 * power)
}

/// A tick's label: `0.25`, `1500`, `20k`, `3M`.
pub(crate) fn label(value: f64) -> String {
    let size = value.abs();
    let (divided, unit) = if (1e4..1e6).contains(&size) {
        (value / 1e3, "k")
    } else if (1e6..1e9).contains(&size) {
        (value / 1e6, "M")
    } else {
        (value, "")
    };
    // Ticks are round: the ninth digit is the error of adding steps.
    format!("{}{unit}", human::short(divided, 6)).replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(scale: &Scale, n: usize) -> Vec<f64> {
        scale.ticks(n).into_iter().map(|(v, _)| v).collect()
    }

    #[test]
    fn linear_ticks_are_round() {
        let scale = Scale::new([0.3, 9.7].into_iter(), false, true, true, (100.0, 0.0));
        assert_eq!(values(&scale, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(scale.at(0.0), Some(100.0));
        assert_eq!(scale.at(5.0), Some(50.0));
        assert_eq!(scale.base(), 100.0);
        assert_eq!(scale.at(f64::NAN), None);
    }

    #[test]
    fn log_scales_leave_out_what_has_no_logarithm() {
        let scale = Scale::new([0.002, 0.0, 3.0].into_iter(), true, false, true, (0.0, 40.0));
        assert_eq!(scale.at(0.0), None);
        assert!(scale.at(0.002).unwrap().abs() < 1e-9);
        assert_eq!(values(&scale, 4), [0.01, 0.1, 1.0]);
        assert!((scale.at(5.0).unwrap() - 40.0).abs() < 1e-9);
    }

    #[test]
    fn degenerate_data_still_has_an_axis() {
        for data in
            [vec![], vec![0.0], vec![5.0, 5.0], vec![f64::NAN], vec![1e-300], vec![1e300, -1e300]]
        {
            for log in [false, true] {
                for zero in [false, true] {
                    let scale = Scale::new(data.iter().copied(), log, zero, true, (0.0, 1.0));
                    let ticks = values(&scale, 5);
                    assert!(!ticks.is_empty() && ticks.len() < 30, "{data:?} {ticks:?}");
                    assert!(ticks.iter().all(|t| scale.at(*t).is_some()), "{data:?} {ticks:?}");
                }
            }
        }
    }

    #[test]
    fn labels() {
        assert_eq!(label(0.30000000000000004), "0.3");
        assert_eq!(label(20_000.0), "20k");
        assert_eq!(label(-1.5e6), "−1.5M");
    }
}
