//! Sums over weights that can be added up over tensors: norms, extremes, outliers, zeros.

use rayon::prelude::*;
use report::Cell;
use serde_json::{Value, json};

/// Values per unit of parallel work. Partial sums are added in order, so that the result does not
/// depend on the number of threads.
const CHUNK: usize = 1 << 16;
/// Weights beyond this many standard deviations (around the mean of their tensor) are outliers.
const OUTLIER: f64 = 6.0;

/// What is known about some weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Number of values.
    pub count: u64,
    sum: f64,
    squares: f64,
    /// Largest absolute value.
    pub max_abs: f64,
    outliers: u64,
    zeros: u64,
    /// Values that are NaN or infinite; they count in nothing else.
    pub not_finite: u64,
}

impl Statistics {
    /// Of the values of one tensor.
    pub fn of(values: &[f32]) -> Self {
        let parts: Vec<Self> = values.par_chunks(CHUNK).map(Self::sums).collect();
        let mut all = parts.into_iter().fold(Self::default(), Self::plus);
        let finite = (all.count - all.not_finite).max(1) as f64;
        let mean = all.sum / finite;
        let deviation = (all.squares / finite - mean * mean).max(0.0).sqrt();
        let limit = OUTLIER * deviation;
        let beyond = |v: &&f32| {
            let distance = (f64::from(**v) - mean).abs();
            distance.is_finite() && distance > limit
        };
        // A constant tensor deviates by rounding only.
        if deviation > 1e-6 * all.max_abs {
            let parts = values.par_chunks(CHUNK).map(|c| c.iter().filter(beyond).count() as u64);
            all.outliers = parts.sum();
        }
        all
    }

    fn sums(values: &[f32]) -> Self {
        let mut s = Self { count: values.len() as u64, ..Self::default() };
        for &value in values {
            let v = f64::from(value);
            if !v.is_finite() {
                s.not_finite += 1;
                continue;
            }
            s.sum += v;
            s.squares += v * v;
            s.max_abs = s.max_abs.max(v.abs());
            s.zeros += u64::from(v == 0.0);
        }
        s
    }

    /// Of both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            sum: self.sum + other.sum,
            squares: self.squares + other.squares,
            max_abs: self.max_abs.max(other.max_abs),
            outliers: self.outliers + other.outliers,
            zeros: self.zeros + other.zeros,
            not_finite: self.not_finite + other.not_finite,
        }
    }

    /// Root of the sum of squares (Frobenius).
    pub fn norm(&self) -> f64 {
        self.squares.sqrt()
    }

    fn share(&self, part: u64) -> f64 {
        part as f64 / self.count.max(1) as f64
    }

    /// Cells for norm, largest absolute value, outliers, sparsity.
    pub fn cells(this: Option<&Self>) -> [Cell; 4] {
        let Some(s) = this else { return [const { Cell::Empty }; 4] };
        [
            Cell::Float(s.norm(), 3),
            Cell::Float(s.max_abs, 4),
            Cell::Percent(s.share(s.outliers)),
            Cell::Percent(s.share(s.zeros)),
        ]
    }

    /// The same for scripts.
    pub fn json(this: Option<&Self>) -> Value {
        let Some(s) = this else { return Value::Null };
        json!({
            "norm": s.norm(),
            "max_abs": s.max_abs,
            "mean": s.sum / (s.count - s.not_finite).max(1) as f64,
            "outliers": s.share(s.outliers),
            "sparsity": s.share(s.zeros),
            "not_finite": s.not_finite,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let s = Statistics::of(&[3.0, -4.0, 0.0, 0.0]);
        assert_eq!((s.norm(), s.max_abs, s.zeros, s.outliers), (5.0, 4.0, 2, 0));
        // 999 values of ±1 and one of 100: mean about 0.1, deviation about 3.3, limit about 20.
        let mut values: Vec<f32> = (0..999).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        values.push(100.0);
        assert_eq!(Statistics::of(&values).outliers, 1);
        assert_eq!(Statistics::of(&[0.1; 1000]).outliers, 0);
        assert_eq!(Statistics::of(&[f32::NAN, 2.0]).not_finite, 1);
        assert_eq!(Statistics::of(&[]).norm(), 0.0);
    }

    #[test]
    fn parts_add_up() {
        let both = Statistics::of(&[3.0]).plus(Statistics::of(&[4.0]));
        assert_eq!((both.count, both.norm(), both.max_abs), (2, 5.0, 4.0));
    }
}
