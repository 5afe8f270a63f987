//! Lengths and pulse moves under a quadratic form: the cost of an error `d` is `d M dᵀ`.
//!
//! In a column sweep with `H⁻¹ = UᵀU` the error of the columns `B` costs `‖d U_BB⁻¹‖²`, so that
//! `M = (U_BBᵀ U_BB)⁻¹` (step 8 of the vector version of GPTQ).

use super::index::Pulse;

/// A symmetric positive definite form `[D, D]`.
#[derive(Clone, Debug)]
pub struct Metric {
    dimension: usize,
    values: Vec<f64>,
}

impl Metric {
    /// `(UᵀU)⁻¹` for an upper triangular `U` `[D, D]`, row-major, whose diagonal is positive.
    pub fn of_upper(upper: &[f32], dimension: usize) -> Self {
        let d = dimension;
        // R = U⁻¹, upper triangular, column by column.
        let mut inverse = vec![0f64; d * d];
        for column in 0..d {
            inverse[column * d + column] = 1.0 / f64::from(upper[column * d + column]);
            for row in (0..column).rev() {
                let sum: f64 = (row + 1..=column)
                    .map(|k| f64::from(upper[row * d + k]) * inverse[k * d + column])
                    .sum();
                inverse[row * d + column] = -sum / f64::from(upper[row * d + row]);
            }
        }
        // M = R Rᵀ.
        let mut values = vec![0f64; d * d];
        for i in 0..d {
            for j in 0..d {
                let from = i.max(j);
                values[i * d + j] =
                    (from..d).map(|k| inverse[i * d + k] * inverse[j * d + k]).sum();
            }
        }
        Self { dimension, values }
    }

    /// `x M`, `[D]`.
    fn apply(&self, x: impl Fn(usize) -> f64) -> Vec<f64> {
        let d = self.dimension;
        let mut product = vec![0f64; d];
        for i in 0..d {
            let x = x(i);
            if x != 0.0 {
                let row = &self.values[i * d..(i + 1) * d];
                product.iter_mut().zip(row).for_each(|(p, m)| *p += x * m);
            }
        }
        product
    }
}

/// The length `α` that makes `α y / ‖y‖` cheapest: `(x M p) / (p M p)` with `p = y / ‖y‖`.
pub fn amplitude_under<P: Pulse>(metric: &Metric, x: &[f32], y: &[P]) -> f32 {
    let product = metric.apply(|i| f64::from(y[i].get()));
    let (mut dot, mut form, mut square) = (0f64, 0f64, 0f64);
    for ((p, x), y) in product.iter().zip(x).zip(y) {
        let y = f64::from(y.get());
        dot += p * f64::from(*x);
        form += p * y;
        square += y * y;
    }
    if form > 0.0 { (dot / form * square.sqrt()) as f32 } else { 0.0 }
}

/// Moves single pulses while the error of the cheapest length shrinks, that is while
/// `(x M y)² / (y M y)` grows; always the best move, ties to the lower coordinates.
pub fn refine_under<P: Pulse>(metric: &Metric, x: &[f32], y: &mut [P]) {
    let d = metric.dimension;
    let mut point: Vec<f64> = y.iter().map(|y| f64::from(y.get())).collect();
    let target = metric.apply(|i| f64::from(x[i]));
    let m = |i: usize, j: usize| metric.values[i * d + j];
    let pulses: f64 = point.iter().map(|p| p.abs()).sum();
    // Every move gains, so the loop ends; the bound is for rounding.
    for _ in 0..4 * pulses as usize + 16 {
        let gradient = metric.apply(|i| point[i]);
        let dot: f64 = target.iter().zip(&point).map(|(t, p)| t * p).sum();
        let form: f64 = gradient.iter().zip(&point).map(|(g, p)| g * p).sum();
        if dot < 0.0 {
            return;
        }
        let (mut best_num, mut best_den) = (dot * dot * (1.0 + 1e-9), form);
        let mut best = None;
        for from in 0..d {
            if point[from] == 0.0 {
                continue;
            }
            let taken = -point[from].signum();
            for to in 0..d {
                let signs: &[f64] = match () {
                    () if to == from => continue,
                    () if point[to] > 0.0 => &[1.0],
                    () if point[to] < 0.0 => &[-1.0],
                    () => &[1.0, -1.0],
                };
                for &given in signs {
                    let sum = dot + taken * target[from] + given * target[to];
                    let den = form
                        + m(from, from)
                        + m(to, to)
                        + 2.0
                            * (taken * gradient[from]
                                + given * gradient[to]
                                + taken * given * m(from, to));
                    if sum > 0.0 && den > 0.0 && sum * sum * best_den > best_num * den {
                        (best_num, best_den) = (sum * sum, den);
                        best = Some((from, taken, to, given));
                    }
                }
            }
        }
        let Some((from, taken, to, given)) = best else { break };
        point[from] += taken;
        point[to] += given;
    }
    for (y, p) in y.iter_mut().zip(&point) {
        *y = P::of(*p as i32);
    }
}
