//! The learning rate over time: linear warm-up, then a decay to a floor.
//!
//! With `peak` 1, 2 warm-up steps and a linear decay over 6 steps to 0 the factors are
//! 0.5, 1, 1, 0.75, 0.5, 0.25:
//! ```
//! use strata_train::schedule::{Decay, Schedule};
//! let schedule = Schedule { decay: Decay::Linear, warmup_steps: 2, total_steps: 6, floor: 0.0 };
//! let factors: Vec<f64> = (0..6).map(|step| schedule.factor(step)).collect();
//! assert_eq!(factors, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
//! ```

use serde::{Deserialize, Serialize};

/// The shape of the decay after the warm-up.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Half a cosine from the peak to the floor.
    #[default]
    Cosine,
    /// A straight line from the peak to the floor.
    Linear,
    /// The peak until the end.
    Constant,
}

/// A learning-rate schedule: a factor in `floor..=1` on the peak rate for every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape of the decay.
    pub decay: Decay,
    /// Steps over which the rate grows linearly; the first step already has `1 / warmup_steps`.
    pub warmup_steps: u64,
    /// Steps of the whole run, warm-up included.
    pub total_steps: u64,
    /// The smallest factor of the decay, a fraction of the peak.
    pub floor: f64,
}

impl Schedule {
    /// The factor at a zero-based step.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
        let shape = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Decay::Linear => 1.0 - progress,
            Decay::Constant => return 1.0,
        };
        self.floor + (1.0 - self.floor) * shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay, floor: f64) -> Schedule {
        Schedule { decay, warmup_steps: 10, total_steps: 110, floor }
    }

    #[test]
    fn warm_up_ends_at_the_peak() {
        let s = schedule(Decay::Cosine, 0.1);
        assert_eq!(s.factor(0), 0.1);
        assert_eq!(s.factor(4), 0.5);
        assert_eq!(s.factor(9), 1.0);
        assert_eq!(s.factor(10), 1.0);
    }

    #[test]
    fn cosine_is_halfway_in_the_middle_and_keeps_its_floor() {
        let s = schedule(Decay::Cosine, 0.1);
        assert!((s.factor(60) - 0.55).abs() < 1e-12);
        // cos(pi/4) = 0.70710678: 0.1 + 0.9 * 0.5 * 1.70710678
        assert!((s.factor(35) - 0.868_198_051_5).abs() < 1e-9);
        assert!((s.factor(110) - 0.1).abs() < 1e-12);
        assert!((s.factor(10_000) - 0.1).abs() < 1e-12, "steps after the end stay at the floor");
    }

    #[test]
    fn linear_and_constant() {
        assert!((schedule(Decay::Linear, 0.2).factor(60) - 0.6).abs() < 1e-12);
        assert_eq!(schedule(Decay::Constant, 0.2).factor(109), 1.0);
    }

    #[test]
    fn no_warm_up_and_one_step() {
        let s = Schedule { decay: Decay::Linear, warmup_steps: 0, total_steps: 1, floor: 0.0 };
        assert_eq!(s.factor(0), 1.0);
    }
}
