//! Quantisers of group lengths.
//!
//! In a unit vector of dimension `n` that is uniform on the sphere, the squared length of a group of
//! `D` coordinates follows `Beta(D/2, (n-D)/2)`. Levels are designed for the length itself, the root;
//! its conditional means have a closed form, since `E[√r; r <= x]` is again an incomplete beta
//! function. Levels follow from `(D, n, bits, mode)` and are never stored.

use super::beta;
use super::lattice::refuse;
use crate::Result;
use half::f16;
use std::sync::{Arc, Mutex, PoisonError};

/// Most bits of a length that is quantised by its law.
pub const MAX_AMPLITUDE_BITS: u8 = 10;

/// How a length becomes a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AmplitudeMode {
    /// Cells of equal probability, levels at their medians (the probability integral transform).
    BetaCdf,
    /// Lloyd-Max levels: the smallest squared error under the law.
    #[default]
    BetaLloyd,
    /// Cells of equal probability, levels at their conditional means.
    BetaCond,
    /// Equal steps between the quantiles 0.001 and 0.999.
    Uniform,
    /// Equal ratios between the same quantiles.
    Log,
    /// No quantisation beyond half precision: 16 bits.
    F16,
}

impl AmplitudeMode {
    /// All of them with their names.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::BetaCdf, "beta_cdf"),
        (Self::BetaLloyd, "beta_lloyd"),
        (Self::BetaCond, "beta_cond"),
        (Self::Uniform, "uniform"),
        (Self::Log, "log"),
        (Self::F16, "fp16"),
    ];

    /// Name as in files and on the command line.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(mode, _)| *mode == self).map_or("", |(_, name)| name)
    }

    /// The mode of a name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(mode, _)| *mode)
    }
}

/// The levels of one group shape.
#[derive(Clone, Debug)]
pub struct Amplitudes {
    mode: AmplitudeMode,
    bits: u8,
    /// Ascending; empty for half precision.
    levels: Vec<f32>,
    /// One less than there are levels: the code is the number of thresholds not above the length.
    thresholds: Vec<f32>,
}

/// The law of the length of a group.
struct Law {
    a: f64,
    b: f64,
    /// `E √r = B(a + 1/2, b) / B(a, b)`.
    mean: f64,
}

impl Law {
    fn new(dimension: usize, n: usize) -> Self {
        let (a, b) = (dimension as f64 / 2.0, (n - dimension) as f64 / 2.0);
        Self { a, b, mean: (beta::ln_beta(a + 0.5, b) - beta::ln_beta(a, b)).exp() }
    }

    fn quantile(&self, p: f64) -> f64 {
        beta::inverse(p, self.a, self.b).sqrt()
    }

    /// Probability of a length below `s`.
    fn below(&self, s: f64) -> f64 {
        beta::incomplete(s * s, self.a, self.b)
    }

    /// `E[length; length < s]`.
    fn mean_below(&self, s: f64) -> f64 {
        self.mean * beta::incomplete(s * s, self.a + 0.5, self.b)
    }

    fn density(&self, s: f64) -> f64 {
        2.0 * s * beta::density(s * s, self.a, self.b)
    }

    /// Cells of equal probability and their conditional means.
    fn equal_cells(&self, count: usize) -> (Vec<f64>, Vec<f64>) {
        let edges: Vec<f64> = (0..=count).map(|c| self.quantile(c as f64 / count as f64)).collect();
        let partial: Vec<f64> = edges.iter().map(|&s| self.mean_below(s)).collect();
        let means = partial.windows(2).map(|w| (w[1] - w[0]) * count as f64).collect();
        (edges[1..count].to_vec(), means)
    }

    /// Lloyd-Max levels: every level is the mean of its cell, every threshold the middle between two
    /// levels. Lloyd's iteration is linear, Newton's (the Jacobian is tridiagonal) quadratic; steps
    /// of the first lead to where the second converges.
    fn lloyd(&self, count: usize) -> Vec<f64> {
        let mut levels = self.equal_cells(count).1;
        let mut state = self.residuals(&levels);
        for round in 0..400 {
            let size = state.size();
            if size < 1e-14 {
                break;
            }
            let newton = (round >= 8).then(|| self.newton(&levels, &state)).flatten();
            let accepted = newton.and_then(|step| {
                [1.0, 0.5, 0.25].into_iter().find_map(|share| {
                    let moved: Vec<f64> =
                        levels.iter().zip(&step).map(|(l, s)| l + share * s).collect();
                    let ordered = moved.windows(2).all(|w| w[0] < w[1])
                        && moved.first().is_some_and(|&l| l > 0.0)
                        && moved.last().is_some_and(|&l| l < 1.0);
                    let next = ordered.then(|| self.residuals(&moved))?;
                    (next.size() < size).then_some((moved, next))
                })
            });
            match accepted {
                Some((moved, next)) => (levels, state) = (moved, next),
                None if round > 8 && size < 1e-12 => break,
                None => {
                    levels = state.means.clone();
                    state = self.residuals(&levels);
                }
            }
        }
        levels
    }

    fn residuals(&self, levels: &[f64]) -> Cells {
        let mut edges = vec![0.0];
        edges.extend(levels.windows(2).map(|w| 0.5 * (w[0] + w[1])));
        edges.push(1.0);
        let below: Vec<f64> = edges.iter().map(|&s| self.below(s)).collect();
        let partial: Vec<f64> = edges.iter().map(|&s| self.mean_below(s)).collect();
        let mass: Vec<f64> = below.windows(2).map(|w| w[1] - w[0]).collect();
        let means: Vec<f64> = partial
            .windows(2)
            .zip(&mass)
            .zip(edges.windows(2))
            .map(|((m, &mass), e)| {
                // A cell that holds nothing keeps its middle.
                if mass > 1e-300 { (m[1] - m[0]) / mass } else { 0.5 * (e[0] + e[1]) }
            })
            .collect();
        let residual = levels.iter().zip(&means).map(|(l, m)| l - m).collect();
        Cells { edges, mass, means, residual }
    }

    /// Solves `J step = -residual`.
    fn newton(&self, levels: &[f64], cells: &Cells) -> Option<Vec<f64>> {
        let n = levels.len();
        let (mut lower, mut middle, mut upper) = (vec![0.0; n], vec![1.0; n], vec![0.0; n]);
        for i in 0..n {
            let (low, high, mean) = (cells.edges[i], cells.edges[i + 1], cells.means[i]);
            if cells.mass[i] <= 1e-300 {
                return None;
            }
            if i + 1 < n {
                let slope = self.density(high) * (high - mean) / cells.mass[i] / 2.0;
                middle[i] -= slope;
                upper[i] = -slope;
            }
            if i > 0 {
                let slope = self.density(low) * (mean - low) / cells.mass[i] / 2.0;
                middle[i] -= slope;
                lower[i] = -slope;
            }
        }
        let mut step: Vec<f64> = cells.residual.iter().map(|r| -r).collect();
        for i in 1..n {
            let factor = lower[i] / middle[i - 1];
            middle[i] -= factor * upper[i - 1];
            step[i] -= factor * step[i - 1];
        }
        for i in (0..n).rev() {
            let behind = if i + 1 < n { upper[i] * step[i + 1] } else { 0.0 };
            step[i] = (step[i] - behind) / middle[i];
        }
        step.iter().all(|s| s.is_finite()).then_some(step)
    }
}

/// The cells of given levels and how far these are from the means.
struct Cells {
    edges: Vec<f64>,
    mass: Vec<f64>,
    means: Vec<f64>,
    residual: Vec<f64>,
}

impl Cells {
    fn size(&self) -> f64 {
        self.residual.iter().fold(0f64, |m, r| m.max(r.abs()))
    }
}

fn middles(levels: &[f64]) -> Vec<f64> {
    levels.windows(2).map(|w| 0.5 * (w[0] + w[1])).collect()
}

impl Amplitudes {
    /// Levels for groups of `dimension` of `n` coordinates. With `zero`, code 0 is the length 0 and
    /// the other codes share the law. A group that is the whole row has length 1 and no bits.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for more than [`MAX_AMPLITUDE_BITS`] bits, for `zero` without a bit,
    /// and for groups larger than the row.
    pub fn new(
        mode: AmplitudeMode,
        dimension: usize,
        n: usize,
        bits: u8,
        zero: bool,
    ) -> Result<Self> {
        if dimension == 0 || dimension > n {
            return refuse(format!("groups of {dimension} in rows of {n} are not possible"));
        }
        if dimension == n {
            // The whole row: its length is the norm.
            return Ok(Self { mode, bits: 0, levels: vec![1.0], thresholds: Vec::new() });
        }
        if mode == AmplitudeMode::F16 {
            return Ok(Self { mode, bits: 16, levels: Vec::new(), thresholds: Vec::new() });
        }
        if bits > MAX_AMPLITUDE_BITS {
            return refuse(format!(
                "{bits} bits for a length; use at most {MAX_AMPLITUDE_BITS}, or fp16"
            ));
        }
        if zero && bits == 0 {
            return refuse("a code for the length 0 needs at least one bit".into());
        }
        if bits == 0 {
            let level = (dimension as f64 / n as f64).sqrt() as f32;
            return Ok(Self { mode, bits, levels: vec![level], thresholds: Vec::new() });
        }
        let law = Law::new(dimension, n);
        let count = (1usize << bits) - usize::from(zero);
        let steps = |low: f64, high: f64| {
            let width = (high - low) / count as f64;
            (0..count).map(|c| low + (c as f64 + 0.5) * width).collect::<Vec<f64>>()
        };
        let (low, high) = (law.quantile(0.001), law.quantile(0.999));
        let (mut thresholds, mut levels) = match mode {
            AmplitudeMode::BetaCdf => {
                let levels =
                    (0..count).map(|c| law.quantile((c as f64 + 0.5) / count as f64)).collect();
                (law.equal_cells(count).0, levels)
            }
            AmplitudeMode::BetaCond => law.equal_cells(count),
            AmplitudeMode::BetaLloyd => {
                let levels = law.lloyd(count);
                (middles(&levels), levels)
            }
            AmplitudeMode::Uniform => {
                let levels = steps(low, high);
                (middles(&levels), levels)
            }
            AmplitudeMode::Log | AmplitudeMode::F16 => {
                let levels: Vec<f64> =
                    steps(low.ln(), high.ln()).into_iter().map(f64::exp).collect();
                (middles(&levels), levels)
            }
        };
        if zero {
            thresholds.insert(0, levels.first().copied().unwrap_or(0.0) / 2.0);
            levels.insert(0, 0.0);
        }
        let single = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
        Ok(Self { mode, bits, levels: single(levels), thresholds: single(thresholds) })
    }

    /// As [`Amplitudes::new`], made once for every set of arguments and kept.
    ///
    /// # Errors
    /// As [`Amplitudes::new`].
    pub fn shared(
        mode: AmplitudeMode,
        dimension: usize,
        n: usize,
        bits: u8,
        zero: bool,
    ) -> Result<Arc<Self>> {
        type Key = (AmplitudeMode, usize, usize, u8, bool);
        static KNOWN: Mutex<Vec<(Key, Arc<Amplitudes>)>> = Mutex::new(Vec::new());
        let key = (mode, dimension, n, bits, zero);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, made)) = known.iter().find(|(k, _)| *k == key) {
            return Ok(made.clone());
        }
        let made = Arc::new(Self::new(mode, dimension, n, bits, zero)?);
        if known.len() >= 256 {
            known.clear();
        }
        known.push((key, made.clone()));
        Ok(made)
    }

    /// Stored bits of a code.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// The levels in ascending order; none for half precision.
    pub fn levels(&self) -> &[f32] {
        &self.levels
    }

    /// The code of a length. Negative lengths count as 0.
    #[inline]
    pub fn encode(&self, amplitude: f32) -> u16 {
        if self.levels.is_empty() {
            return f16::from_f32(amplitude.max(0.0)).to_bits();
        }
        if self.thresholds.len() < 64 {
            // Counting all of them has no branch to mispredict.
            return self.thresholds.iter().map(|t| u16::from(*t <= amplitude)).sum();
        }
        self.thresholds.partition_point(|t| *t <= amplitude) as u16
    }

    /// The length of a code; a code that is out of range counts as the last level.
    #[inline]
    pub fn level(&self, code: u16) -> f32 {
        if self.levels.is_empty() {
            return f16::from_bits(code).to_f32();
        }
        let last = self.levels.len() - 1;
        self.levels[usize::from(code).min(last)]
    }

    /// How the levels were made.
    pub fn mode(&self) -> AmplitudeMode {
        self.mode
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use AmplitudeMode::*;

    fn levels(mode: AmplitudeMode, d: usize, n: usize, bits: u8) -> Vec<f32> {
        Amplitudes::new(mode, d, n, bits, false).unwrap().levels().to_vec()
    }

    fn close(found: &[f32], wanted: &[f32]) {
        assert_eq!(found.len(), wanted.len());
        assert!(found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 2e-6), "{found:?}");
    }

    #[test]
    fn levels_of_small_cases() {
        close(&levels(BetaCdf, 4, 16, 2), &[0.299_660, 0.427_339, 0.528_470, 0.654_195]);
        close(&levels(BetaCdf, 16, 128, 2), &[0.281_828, 0.329_366, 0.366_748, 0.416_172]);
        close(&levels(BetaLloyd, 16, 128, 2), &[0.264_677, 0.324_251, 0.376_770, 0.438_981]);
    }

    /// `E (s - level)² / E s²` with the law integrated numerically.
    fn relative_error(amplitudes: &Amplitudes, d: usize, n: usize) -> f64 {
        let law = Law::new(d, n);
        let (mut error, mut energy) = (0f64, 0f64);
        let steps = 40_000;
        for i in 0..steps {
            let s = (f64::from(i) + 0.5) / f64::from(steps);
            let weight = law.density(s) / f64::from(steps);
            let level = f64::from(amplitudes.level(amplitudes.encode(s as f32)));
            error += weight * (s - level).powi(2);
            energy += weight * s * s;
        }
        error / energy
    }

    #[test]
    fn errors_by_bits() {
        for (bits, cdf, lloyd) in
            [(2, 0.0038, 0.0031), (3, 0.0015, 0.0009), (4, 0.0006, 0.00025), (5, 0.00025, 0.00007)]
        {
            let error = |mode| {
                relative_error(&Amplitudes::new(mode, 16, 128, bits, false).unwrap(), 16, 128)
            };
            let (by_cdf, by_lloyd, by_cond) = (error(BetaCdf), error(BetaLloyd), error(BetaCond));
            assert!((by_cdf / cdf - 1.0).abs() < 0.12, "{bits} bits, cdf: {by_cdf}");
            assert!((by_lloyd / lloyd - 1.0).abs() < 0.12, "{bits} bits, lloyd: {by_lloyd}");
            assert!(by_lloyd < by_cond && by_cond < by_cdf, "{by_lloyd} {by_cond} {by_cdf}");
            assert!(by_lloyd < error(Uniform) && by_lloyd < error(Log));
        }
    }

    #[test]
    fn lloyd_levels_are_means_of_their_cells() {
        for (d, n, bits) in [(1, 64, 6), (4, 16, 3), (16, 4096, 8), (32, 64, 4), (16, 128, 10)] {
            let law = Law::new(d, n);
            let levels = law.lloyd(1 << bits);
            let off = law.residuals(&levels).size();
            assert!(off < 1e-9, "{d} {n} {bits}: {off}");
            assert!(levels.windows(2).all(|w| w[0] < w[1]));
        }
    }

    #[test]
    fn nearest_level_is_never_worse_than_the_cell() {
        let cdf = Amplitudes::new(BetaCdf, 16, 128, 4, false).unwrap();
        for i in 0..1000 {
            let s = i as f32 / 1000.0;
            let nearest = cdf.levels().iter().map(|l| (l - s).abs()).fold(f32::MAX, f32::min);
            assert!(nearest <= (cdf.level(cdf.encode(s)) - s).abs());
            // The cell is that of the distribution function.
            let law = Law::new(16, 128);
            let place = law.below(f64::from(s)) * 16.0;
            if (place - place.round()).abs() > 1e-4 {
                assert_eq!(f64::from(cdf.encode(s)), place.floor().min(15.0), "{s}");
            }
        }
        let lloyd = Amplitudes::new(BetaLloyd, 16, 128, 3, false).unwrap();
        for (code, &level) in lloyd.levels().iter().enumerate() {
            assert_eq!(usize::from(lloyd.encode(level)), code);
        }
    }

    #[test]
    fn special_cases() {
        let none = Amplitudes::new(BetaLloyd, 16, 128, 0, false).unwrap();
        close(none.levels(), &[0.125f32.sqrt()]);
        assert_eq!((none.encode(0.9), none.bits()), (0, 0));
        // One group: the length is 1 and takes no bits, whatever was asked for.
        for mode in AmplitudeMode::ALL.map(|(mode, _)| mode) {
            let whole = Amplitudes::new(mode, 16, 16, 4, true).unwrap();
            assert_eq!((whole.bits(), whole.level(whole.encode(0.3))), (0, 1.0));
        }
        let zero = Amplitudes::new(BetaLloyd, 16, 128, 3, true).unwrap();
        assert_eq!((zero.levels().len(), zero.level(0), zero.encode(0.0)), (8, 0.0, 0));
        assert!(zero.level(1) > 0.1 && zero.encode(zero.level(1)) == 1);
        let half = Amplitudes::new(F16, 16, 128, 3, false).unwrap();
        assert_eq!((half.bits(), half.level(half.encode(0.25))), (16, 0.25));
        assert_eq!(half.level(half.encode(-1.0)), 0.0);
        assert!(Amplitudes::new(BetaCdf, 16, 128, 11, false).is_err());
        assert!(Amplitudes::new(BetaCdf, 16, 128, 0, true).is_err());
        assert!(Amplitudes::new(BetaCdf, 16, 8, 4, false).is_err());
        assert_eq!(AmplitudeMode::of_name("beta_cond"), Some(BetaCond));
        assert_eq!((F16.name(), AmplitudeMode::of_name("beta")), ("fp16", None));
    }
}
