//! Seeded orthogonal matrices `Q` that spread every direction over all coordinates: randomised
//! Hadamard matrices where the order has one, otherwise the orthogonal factor of a random matrix.
//!
//! A rotation may be asked to keep the all-ones vector (`Q 1 = 1`). It then maps vectors of mean 0
//! to vectors of mean 0, so that a LayerNorm without gain and bias commutes with it.
//!
//! Everything is in f64. What a network does with a rotation is left to the floors above.

mod inverse;

use crate::hadamard::Hadamard;
use crate::{Error, Result, Rng};
use rayon::prelude::*;

/// Largest dense matrix that is made, `8 n²` bytes: 2 GiB.
const LARGEST_DENSE: usize = 16384;

/// Vectors of one piece of work.
const ROWS: usize = 64;

/// An orthogonal matrix `Q` of order `n`.
///
/// ```
/// use strata_tensor::{Rng, rotation::Rotation};
/// let q = Rotation::hadamard(256, &mut Rng::new(0), false).ok_or("no Hadamard matrix")?;
/// let mut x = vec![0.0; 256];
/// x[7] = 16.0;
/// q.rotate_rows(&mut x); // one large coordinate becomes 256 of ±1
/// assert!(x.iter().all(|v| (v.abs() - 1.0).abs() < 1e-12));
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rotation {
    order: usize,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// `Q = diag(s) H / √n`.
    Signed { hadamard: Hadamard, signs: Vec<f64> },
    /// `Q = D Hᵀ diag(s) H D / n` with `D` the signs of the first row of `H` and `s₀ = 1`: the
    /// first column of `D Hᵀ` is constant, so the all-ones vector is an eigenvector. Symmetric.
    Conjugated { hadamard: Hadamard, first: Vec<f64>, signs: Vec<f64> },
    /// `[n, n]` row-major.
    Dense(Vec<f64>),
}

impl Rotation {
    /// A Hadamard matrix with random signs; `None` when the order has none.
    pub fn hadamard(order: usize, rng: &mut Rng, keep_ones: bool) -> Option<Self> {
        let hadamard = Hadamard::new(order)?;
        let mut signs: Vec<f64> =
            (0..order).map(|_| if rng.next_u64() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        let kind = if keep_ones {
            if let Some(first) = signs.first_mut() {
                *first = 1.0;
            }
            let first = (0..order).map(|column| f64::from(hadamard.entry(0, column))).collect();
            Kind::Conjugated { hadamard, first, signs }
        } else {
            Kind::Signed { hadamard, signs }
        };
        Some(Self { order, kind })
    }

    /// An orthogonal matrix drawn evenly from all of them: the factor `Q` of the QR decomposition
    /// of a matrix of normal numbers, columns multiplied by the signs of R's diagonal. With
    /// `keep_ones`, evenly from those that keep the all-ones vector.
    ///
    /// # Errors
    /// [`Error::Shape`] when the matrix would not fit in 2 GiB.
    pub fn random(order: usize, rng: &mut Rng, keep_ones: bool) -> Result<Self> {
        if order > LARGEST_DENSE {
            let reason = format!(
                "a random orthogonal matrix of order {order} would be dense and is not made beyond \
                 {LARGEST_DENSE}"
            );
            return Err(Error::Shape { what: "rotation".into(), reason });
        }
        let dense = if keep_ones && order > 0 {
            keeping_ones(&orthogonal(order - 1, rng), order)
        } else {
            orthogonal(order, rng)
        };
        Ok(Self { order, kind: Kind::Dense(dense) })
    }

    /// Number of rows.
    pub fn order(&self) -> usize {
        self.order
    }

    /// What the matrix is, for a report.
    pub fn description(&self) -> String {
        match &self.kind {
            Kind::Signed { hadamard, .. } => {
                format!("randomised Hadamard ({})", hadamard.description())
            }
            Kind::Conjugated { hadamard, .. } => {
                format!("randomised Hadamard that keeps the mean ({})", hadamard.description())
            }
            Kind::Dense(_) => format!("random orthogonal matrix of order {}", self.order),
        }
    }

    /// `x ← Qᵀ x` for every vector of `x` `[rows, n]`: as row vectors, `x ← x Q`.
    ///
    /// # Panics
    /// When `x` does not hold whole vectors.
    pub fn rotate_rows(&self, x: &mut [f64]) {
        let n = self.order;
        if n == 0 || x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(n), "{} numbers are no vectors of {n}", x.len());
        match &self.kind {
            Kind::Signed { hadamard, signs } => {
                let factor = 1.0 / (n as f64).sqrt();
                x.par_chunks_exact_mut(n).with_min_len(4).for_each(|x| {
                    x.iter_mut().zip(signs).for_each(|(x, s)| *x *= s * factor);
                    hadamard.apply_transposed(x);
                });
            }
            Kind::Conjugated { hadamard, first, signs } => {
                let factor = 1.0 / n as f64;
                x.par_chunks_exact_mut(n).with_min_len(4).for_each(|x| {
                    x.iter_mut().zip(first).for_each(|(x, d)| *x *= d * factor);
                    hadamard.apply(x);
                    x.iter_mut().zip(signs).for_each(|(x, s)| *x *= s);
                    hadamard.apply_transposed(x);
                    x.iter_mut().zip(first).for_each(|(x, d)| *x *= d);
                });
            }
            Kind::Dense(q) => {
                x.par_chunks_mut(ROWS * n).for_each(|x| {
                    let source = x.to_vec();
                    product(&source, q, n, x);
                });
            }
        }
    }

    /// `x ← Qᵀ x` for a matrix `x` `[n, columns]` row-major: every column is rotated.
    ///
    /// # Panics
    /// When the length is not `n * columns`.
    pub fn rotate_columns(&self, x: &mut [f64], columns: usize) {
        let n = self.order;
        assert_eq!(x.len(), n * columns, "a matrix [{n}, {columns}]");
        // Some columns at a time, as rows of a scratch matrix.
        let mut scratch = vec![0f64; n * ROWS.min(columns.max(1)) * rayon::current_num_threads()];
        let width = scratch.len() / n.max(1);
        for left in (0..columns).step_by(width.max(1)) {
            let count = width.min(columns - left);
            let part = &mut scratch[..n * count];
            for (row, values) in x.chunks_exact(columns).enumerate() {
                for (column, &value) in values[left..left + count].iter().enumerate() {
                    part[column * n + row] = value;
                }
            }
            self.rotate_rows(part);
            for (row, values) in x.chunks_exact_mut(columns).enumerate() {
                for (column, value) in values[left..left + count].iter_mut().enumerate() {
                    *value = part[column * n + row];
                }
            }
        }
    }
}

/// `c = a q` for `a` `[rows, n]`, `q` `[n, n]`.
fn product(a: &[f64], q: &[f64], n: usize, c: &mut [f64]) {
    let rows = a.len() / n;
    assert!(a.len() == rows * n && c.len() == a.len() && q.len() == n * n, "shapes of a product");
    // SAFETY: the shapes were checked above; the strides are those of row-major matrices.
    unsafe {
        gemm::gemm(
            rows,
            n,
            n,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            n as isize,
            q.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// An orthogonal matrix `[n, n]`, row-major, evenly distributed.
fn orthogonal(n: usize, rng: &mut Rng) -> Vec<f64> {
    let normal: Vec<f64> = (0..n * n).map(|_| rng.normal()).collect();
    let qr = faer::MatRef::from_row_major_slice(&normal, n, n).qr();
    let (q, r) = (qr.compute_Q(), qr.R());
    let mut out = vec![0f64; n * n];
    for (row, values) in out.chunks_exact_mut(n.max(1)).enumerate() {
        for (column, value) in values.iter_mut().enumerate() {
            *value = if r[(column, column)] < 0.0 { -q[(row, column)] } else { q[(row, column)] };
        }
    }
    out
}

/// `R diag(1, B) R` with the reflection `R` that swaps the first axis and the all-ones direction;
/// `inner`: `B` `[n - 1, n - 1]`.
fn keeping_ones(inner: &[f64], n: usize) -> Vec<f64> {
    let mut q = vec![0f64; n * n];
    q[0] = 1.0;
    for (row, values) in inner.chunks_exact((n - 1).max(1)).enumerate() {
        q[(row + 1) * n + 1..(row + 2) * n].copy_from_slice(values);
    }
    let even = 1.0 / (n as f64).sqrt();
    let mut u = vec![-even; n];
    u[0] += 1.0;
    let norm: f64 = u.iter().map(|u| u * u).sum();
    if norm == 0.0 {
        return q;
    }
    let factor = 2.0 / norm;
    for row in q.chunks_exact_mut(n) {
        let dot: f64 = row.iter().zip(&u).map(|(q, u)| q * u).sum();
        row.iter_mut().zip(&u).for_each(|(q, u)| *q -= factor * dot * u);
    }
    let mut dots = vec![0f64; n];
    for (row, &u) in q.chunks_exact(n).zip(&u) {
        dots.iter_mut().zip(row).for_each(|(d, q)| *d += u * q);
    }
    for (row, &u) in q.chunks_exact_mut(n).zip(&u) {
        row.iter_mut().zip(&dots).for_each(|(q, d)| *q -= factor * u * d);
    }
    q
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(order: usize, seed: u64) -> Vec<(Rotation, bool)> {
        let mut rotations = Vec::new();
        for keep in [false, true] {
            let rng = Rng::new(seed);
            rotations.extend(Rotation::hadamard(order, &mut rng.clone(), keep).map(|r| (r, keep)));
            rotations.push((Rotation::random(order, &mut rng.clone(), keep).unwrap(), keep));
        }
        rotations
    }

    /// Qᵀ as a matrix `[n, n]`: row `i` is eᵢ Q.
    fn matrix(rotation: &Rotation) -> Vec<f64> {
        let n = rotation.order();
        let mut q = vec![0f64; n * n];
        (0..n).for_each(|i| q[i * n + i] = 1.0);
        rotation.rotate_rows(&mut q);
        q
    }

    #[test]
    fn rotations_are_orthogonal_and_keep_the_ones_when_asked() {
        for n in [1, 2, 12, 28, 32, 52, 72] {
            for (rotation, keep) in all(n, 3) {
                let q = matrix(&rotation);
                for i in 0..n {
                    for j in 0..n {
                        let dot: f64 = (0..n).map(|k| q[i * n + k] * q[j * n + k]).sum();
                        let expected = f64::from(u8::from(i == j));
                        assert!((dot - expected).abs() < 1e-12, "{n} {}", rotation.description());
                    }
                }
                let mut ones = vec![1.0; n];
                rotation.rotate_rows(&mut ones);
                let kept = ones.iter().all(|v| (v - 1.0).abs() < 1e-12);
                assert!(kept == keep || n == 1, "{n} {}", rotation.description());
            }
        }
    }

    /// Every coordinate direction is spread: no entry of a Hadamard rotation is far above 1/√n.
    #[test]
    fn rotations_are_incoherent() {
        for keep in [false, true] {
            let q = matrix(&Rotation::hadamard(768, &mut Rng::new(1), keep).unwrap());
            let largest = q.iter().fold(0f64, |m, v| m.max(v.abs())) * 768f64.sqrt();
            assert!(largest < if keep { 5.0 } else { 1.0 + 1e-9 }, "{largest}");
        }
    }

    #[test]
    fn columns_and_rows_agree() {
        for n in [12, 52] {
            for (rotation, _) in all(n, 9) {
                let columns = 150;
                let mut rng = Rng::new(4);
                let x: Vec<f64> = (0..n * columns).map(|_| rng.normal()).collect();
                let mut by_columns = x.clone();
                rotation.rotate_columns(&mut by_columns, columns);
                let mut transposed: Vec<f64> =
                    (0..columns * n).map(|at| x[(at % n) * columns + at / n]).collect();
                rotation.rotate_rows(&mut transposed);
                for row in 0..n {
                    for column in 0..columns {
                        let other = transposed[column * n + row];
                        assert!((by_columns[row * columns + column] - other).abs() < 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn seeds_decide() {
        let draw = |seed| matrix(&Rotation::hadamard(64, &mut Rng::new(seed), false).unwrap());
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(Rotation::hadamard(52, &mut Rng::new(0), false).is_none());
        assert!(Rotation::random(LARGEST_DENSE + 1, &mut Rng::new(0), false).is_err());
    }
}
