//! The way back: products with `Qᵀ` from the right, and rotations of single precision rows.

use super::{Kind, ROWS, Rotation};
use rayon::prelude::*;

impl Rotation {
    /// `x ← x Qᵀ` for every vector of `x` `[rows, n]`: undoes [`Rotation::rotate_rows`].
    ///
    /// # Panics
    /// When `x` does not hold whole vectors.
    pub fn unrotate_rows(&self, x: &mut [f64]) {
        let n = self.order;
        if n == 0 || x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(n), "{} numbers are no vectors of {n}", x.len());
        match &self.kind {
            // Q = diag(s) H / √n, so that Q x = s · (H x) / √n.
            Kind::Signed { hadamard, signs } => {
                let factor = 1.0 / (n as f64).sqrt();
                x.par_chunks_exact_mut(n).with_min_len(4).for_each(|x| {
                    hadamard.apply(x);
                    x.iter_mut().zip(signs).for_each(|(x, s)| *x *= s * factor);
                });
            }
            // Symmetric, hence its own inverse.
            Kind::Conjugated { .. } => self.rotate_rows(x),
            Kind::Dense(q) => {
                x.par_chunks_mut(n * ROWS).for_each(|x| {
                    let mut products = vec![0f64; x.len()];
                    for (x, to) in x.chunks_exact(n).zip(products.chunks_exact_mut(n)) {
                        for (to, q) in to.iter_mut().zip(q.chunks_exact(n)) {
                            *to = x.iter().zip(q).map(|(x, q)| x * q).sum();
                        }
                    }
                    x.copy_from_slice(&products);
                });
            }
        }
    }

    /// [`Rotation::rotate_rows`] for single precision: computed in f64, rounded once.
    ///
    /// # Panics
    /// When `x` does not hold whole vectors.
    pub fn rotate_rows_f32(&self, x: &mut [f32]) {
        self.in_f64(x, |part| self.rotate_rows(part));
    }

    /// [`Rotation::unrotate_rows`] for single precision: computed in f64, rounded once.
    ///
    /// # Panics
    /// When `x` does not hold whole vectors.
    pub fn unrotate_rows_f32(&self, x: &mut [f32]) {
        self.in_f64(x, |part| self.unrotate_rows(part));
    }

    fn in_f64(&self, x: &mut [f32], turn: impl Fn(&mut [f64]) + Sync) {
        let n = self.order;
        if n == 0 || x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(n), "{} numbers are no vectors of {n}", x.len());
        x.par_chunks_mut(n * ROWS).for_each(|x| {
            let mut wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            turn(&mut wide);
            x.iter_mut().zip(wide).for_each(|(x, w)| *x = w as f32);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_way_back_is_the_inverse() {
        for n in [1, 12, 43, 64, 172] {
            for keep in [false, true] {
                let mut rng = Rng::new(n as u64);
                let hadamard = Rotation::hadamard(n, &mut rng, keep);
                let random = Rotation::random(n, &mut rng, keep).unwrap();
                for rotation in hadamard.into_iter().chain([random]) {
                    let x: Vec<f64> = (0..70 * n).map(|_| rng.normal()).collect();
                    let mut turned = x.clone();
                    rotation.rotate_rows(&mut turned);
                    let mut single: Vec<f32> = x.iter().map(|&x| x as f32).collect();
                    rotation.rotate_rows_f32(&mut single);
                    assert!(
                        turned.iter().zip(&single).all(|(t, s)| (t - f64::from(*s)).abs() < 1e-5)
                    );
                    assert!(n == 1 || turned.iter().zip(&x).any(|(t, x)| (t - x).abs() > 0.1));
                    rotation.unrotate_rows(&mut turned);
                    rotation.unrotate_rows_f32(&mut single);
                    for ((t, s), x) in turned.iter().zip(&single).zip(&x) {
                        assert!((t - x).abs() < 1e-12 && (f64::from(*s) - x).abs() < 1e-5);
                    }
                }
            }
        }
    }
}
