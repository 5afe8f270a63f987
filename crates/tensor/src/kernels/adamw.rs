//! One step of AdamW (Loshchilov & Hutter 2019, algorithm 2) over slices, in place.
use rayon::prelude::*;

use super::simd::{BLOCK, simd};

/// The numbers of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwStep {
    /// Decay of the mean of gradients (β₁).
    pub beta1: f32,
    /// Decay of the mean of squared gradients (β₂).
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Learning rate of this step.
    pub lr: f32,
    /// Decoupled weight decay: parameters shrink by `lr * weight_decay`.
    pub weight_decay: f32,
    /// Which step this is, counted from 1 (for the bias correction).
    pub step: u64,
}

/// Updates parameters `p` and moments `m`, `v` with gradient `g`.
///
/// # Panics
/// If the slices differ in length.
pub fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamwStep) {
    assert!(
        p.len() == g.len() && p.len() == m.len() && p.len() == v.len(),
        "adamw: {} parameters, {} gradients, {} and {} moments",
        p.len(),
        g.len(),
        m.len(),
        v.len()
    );
    let exponent = step.step.clamp(1, i32::MAX as u64) as i32;
    // In f64: 1 - β₂ᵗ cancels in f32 at the first steps.
    let correction1 = (1.0 / (1.0 - f64::from(step.beta1).powi(exponent))) as f32;
    let correction2 = (1.0 / (1.0 - f64::from(step.beta2).powi(exponent))) as f32;
    p.par_chunks_mut(BLOCK)
        .zip(g.par_chunks(BLOCK))
        .zip(m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK)))
        .for_each(|((p, g), (m, v))| update(p, g, m, v, step, correction1, correction2));
}

simd! { fn update(
    p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32],
    step: &AdamwStep, correction1: f32, correction2: f32
) {
    let (keep1, keep2) = (step.beta1, step.beta2);
    let (take1, take2) = (1.0 - keep1, 1.0 - keep2);
    let shrink = 1.0 - step.lr * step.weight_decay;
    let rate = step.lr * correction1;
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *m = keep1 * *m + take1 * g;
        *v = keep2 * *v + take2 * g * g;
        *p = *p * shrink - rate * *m / ((*v * correction2).sqrt() + step.eps);
    }
} }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_step_moves_by_the_learning_rate() {
        // At step 1 the corrected moments are g and g², so the move is lr * sign(g).
        let (mut p, mut m, mut v) = (vec![1.0f32, -2.0, 0.5], vec![0.0; 3], vec![0.0; 3]);
        let step =
            AdamwStep { beta1: 0.9, beta2: 0.999, eps: 0.0, lr: 0.1, weight_decay: 0.5, step: 1 };
        adamw(&mut p, &[2.0, -0.01, 7.0], &mut m, &mut v, &step);
        for (p, wanted) in p.iter().zip([0.95 - 0.1, -1.9 + 0.1, 0.475 - 0.1]) {
            assert!((p - wanted).abs() < 1e-5, "{p} {wanted}");
        }
        assert!((m[0] - 0.2).abs() < 1e-6 && (v[0] - 0.004).abs() < 1e-6);
    }
}
