//! Dense linear algebra over plain slices: Cholesky factors, triangular solves, and the upper factor
//! of the inverse that GPTQ-like methods walk along.
//!
//! All matrices are row-major and square unless said otherwise. The arithmetic is `faer`'s, with all
//! threads of the current rayon pool. Gathering the matrices (see [`crate::gram`]) and what to do
//! with dead columns is left to the callers.

use crate::{Error, Result};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltError, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::{triangular_inverse, triangular_solve};
use faer::{MatMut, MatRef, Par, Spec};
use rayon::prelude::*;

/// How often the damping is raised before a matrix is given up.
pub const MAX_ATTEMPTS: u32 = 49;

/// Side of the square blocks in which a matrix is transposed: two blocks of f64 fit in 32 KiB.
const BLOCK: usize = 32;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The two floating-point types that matrices may have.
pub trait Real: sealed::Sealed + faer::traits::RealField + Copy + Send + Sync + 'static {
    /// The value in f64 (exact).
    fn to_f64(self) -> f64;
    /// The nearest value of this type.
    fn from_f64(x: f64) -> Self;
}

impl Real for f32 {
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn from_f64(x: f64) -> Self {
        x as f32
    }
}

impl Real for f64 {
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(x: f64) -> Self {
        x
    }
}

/// The floating-point type in which a factorisation works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// Double precision: the default, and needed for ill-conditioned statistics.
    #[default]
    F64,
    /// Single precision: about twice as fast with half the memory.
    F32,
}

/// A factor in the type that it was computed in, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Factor {
    /// Computed in double precision.
    F64(Vec<f64>),
    /// Computed in single precision.
    F32(Vec<f32>),
}

impl Factor {
    /// The factor in single precision (no copy if it is already).
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(u) => u,
            Self::F64(u) => u.into_par_iter().map(|x| x as f32).collect(),
        }
    }

    /// The factor in double precision (no copy if it is already).
    pub fn into_f64(self) -> Vec<f64> {
        match self {
            Self::F64(u) => u,
            Self::F32(u) => u.into_par_iter().map(f64::from).collect(),
        }
    }
}

/// What [`inverse_cholesky_upper`] found.
#[derive(Clone, Debug)]
pub struct InverseCholesky {
    /// U `[n, n]`, row-major and upper triangular with zeros below: H⁻¹ = UᵀU.
    pub upper: Factor,
    /// What was added to every diagonal entry of H.
    pub damping: f64,
    /// How many factorisations were tried: 1 when the first damping sufficed.
    pub attempts: u32,
}

fn square<T>(what: &str, a: &[T], n: usize) -> Result<()> {
    if n.checked_mul(n) == Some(a.len()) {
        return Ok(());
    }
    let reason = format!("{} values given for a {n} x {n} matrix", a.len());
    Err(Error::Shape { what: what.into(), reason })
}

fn numeric(what: &str, reason: String) -> Error {
    Error::Numeric { what: what.into(), reason }
}

/// Factors the lower triangle of a column-major matrix in place; `Err(i)` names the first pivot that
/// is not positive.
fn factor_lower<T: Real>(a: &mut [T], n: usize, par: Par) -> std::result::Result<(), usize> {
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<T>(n, par, Spec::default()));
    let result = cholesky_in_place(
        MatMut::from_column_major_slice_mut(a, n, n),
        LltRegularization::default(),
        par,
        MemStack::new(&mut memory),
        Spec::default(),
    );
    if let Err(LltError::NonPositivePivot { index }) = result {
        return Err(index);
    }
    // A pivot that overflowed or turned into NaN is no factorisation either.
    match (0..n).find(|&i| !(a[i * n + i].to_f64().is_finite() && a[i * n + i].to_f64() > 0.0)) {
        Some(index) => Err(index),
        None => Ok(()),
    }
}

/// Writes the triangle `row <= column` of `source` as the triangle `row >= column` of `target`
/// (the transposed matrix; `reverse`: with the order of rows and columns turned round as well) and
/// zeros elsewhere.
fn transpose_triangle<T: Real>(target: &mut [T], source: &[T], n: usize, reverse: bool) {
    target.par_chunks_mut((n * BLOCK).max(1)).enumerate().for_each(|(strip, rows)| {
        rows.fill(T::from_f64(0.0));
        let top = strip * BLOCK;
        let height = rows.len() / n;
        for left in (0..n).step_by(BLOCK) {
            for i in 0..height {
                let row = top + i;
                for column in left..(left + BLOCK).min(n) {
                    let (from_row, from_column) =
                        if reverse { (n - 1 - column, n - 1 - row) } else { (column, row) };
                    if from_row <= from_column {
                        rows[i * n + column] = source[from_row * n + from_column];
                    }
                }
            }
        }
    });
}

/// The lower Cholesky factor L of a symmetric positive definite matrix, A = LLᵀ.
///
/// `a`: `[n, n]`, of which the lower triangle is read. Returns L `[n, n]`, row-major, zeros above
/// the diagonal.
///
/// # Errors
/// [`Error::Shape`] when `a` is not `n * n` long, [`Error::Numeric`] when the matrix is not positive
/// definite in the precision of `T`.
pub fn cholesky_lower<T: Real>(a: &[T], n: usize) -> Result<Vec<T>> {
    square("cholesky", a, n)?;
    let mut work = vec![T::from_f64(0.0); n * n];
    // Row-major lower -> column-major lower is a transposition of the storage: rows turn to columns.
    work.par_chunks_mut((n * BLOCK).max(1)).enumerate().for_each(|(strip, columns)| {
        let first = strip * BLOCK;
        let count = columns.len() / n;
        for top in (first..n).step_by(BLOCK) {
            for c in 0..count {
                let column = first + c;
                for row in top.max(column)..(top + BLOCK).min(n) {
                    columns[c * n + row] = a[row * n + column];
                }
            }
        }
    });
    factor_lower(&mut work, n, Par::rayon(0)).map_err(|index| {
        let reason = format!(
            "the matrix is not positive definite: pivot {index} of {n} is not positive; add a \
             multiple of the identity (damping) to it or use more samples"
        );
        numeric("cholesky", reason)
    })?;
    // Column-major lower is row-major upper of the same bytes.
    let mut lower = vec![T::from_f64(0.0); n * n];
    transpose_triangle(&mut lower, &work, n, false);
    // transpose_triangle leaves (row >= column): exactly the lower triangle.
    Ok(lower)
}

/// U, upper triangular, with (H + damping I)⁻¹ = UᵀU: the matrix whose rows drive the error feedback
/// of GPTQ (Frantar et al. 2023, section 3.3).
///
/// `h`: `[n, n]` symmetric, of which the triangle row >= column is read; `damp_fraction` of the mean
/// of its diagonal is added to the diagonal. If the factorisation fails, that amount is added again,
/// up to [`MAX_ATTEMPTS`] times, starting each time from the untouched `h`.
///
/// One Cholesky factorisation and one triangular inverse give the answer: with J the reversal of the
/// order, JHJ = LLᵀ makes U = J L⁻¹ J. Needs 2 n² numbers of the working precision beside `h`.
///
/// ```
/// use strata_tensor::linalg::{Precision, inverse_cholesky_upper};
/// let u = inverse_cholesky_upper(&[4.0, 2.0, 2.0, 4.0], 2, 0.0, Precision::F64)?.upper.into_f64();
/// assert!((u[0] - 1.0 / 3f64.sqrt()).abs() < 1e-12 && (u[3] - 0.5).abs() < 1e-12);
/// # Ok::<(), strata_tensor::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] when `h` is not `n * n` long; [`Error::Numeric`] when it holds a value that is
/// not finite, or when no damping of the ladder makes it positive definite.
pub fn inverse_cholesky_upper<T: Real>(
    h: &[T],
    n: usize,
    damp_fraction: f64,
    precision: Precision,
) -> Result<InverseCholesky> {
    const WHAT: &str = "inverse Cholesky factor";
    square(WHAT, h, n)?;
    if !(damp_fraction.is_finite() && damp_fraction >= 0.0) {
        let reason =
            format!("the damping fraction is {damp_fraction}; use a number >= 0 like 0.01");
        return Err(numeric(WHAT, reason));
    }
    if let Some(at) = h.par_iter().position_first(|x| !x.to_f64().is_finite()) {
        let (row, column) = (at / n, at % n);
        let reason = format!(
            "entry ({row}, {column}) of the {n} x {n} statistics is not finite; the activations \
             overflowed or hold NaN: check the calibration data and the checkpoint"
        );
        return Err(numeric(WHAT, reason));
    }
    let mean = (0..n).map(|i| h[i * n + i].to_f64()).sum::<f64>() / n.max(1) as f64;
    let step = damp_fraction * mean;
    let (upper, damping, attempts) = match precision {
        Precision::F64 => {
            let (u, damping, attempts) = ladder::<T, f64>(h, n, step)?;
            (Factor::F64(u), damping, attempts)
        }
        Precision::F32 => {
            let (u, damping, attempts) = ladder::<T, f32>(h, n, step)?;
            (Factor::F32(u), damping, attempts)
        }
    };
    Ok(InverseCholesky { upper, damping, attempts })
}

/// Tries growing multiples of `step` on the diagonal until the factor exists and is finite.
fn ladder<T: Real, P: Real>(h: &[T], n: usize, step: f64) -> Result<(Vec<P>, f64, u32)> {
    let par = Par::rayon(0);
    let zero = P::from_f64(0.0);
    let mut work = vec![zero; n * n];
    let mut inverse: Vec<P> = Vec::new();
    let attempts = if step > 0.0 { MAX_ATTEMPTS } else { 1 };
    let mut pivot = 0;
    for attempt in 1..=attempts {
        let damping = step * f64::from(attempt);
        // The flat reversal of a symmetric matrix is JHJ; its column-major lower triangle is the
        // row-major lower triangle of h, backwards.
        let chunk = (n * BLOCK).max(1);
        work.par_chunks_mut(chunk).enumerate().for_each(|(i, target)| {
            let end = h.len() - i * chunk;
            let source = h[end - target.len()..end].iter().rev();
            for (t, &s) in target.iter_mut().zip(source) {
                *t = P::from_f64(s.to_f64());
            }
        });
        for i in 0..n {
            work[i * n + i] = P::from_f64(h[(n - 1 - i) * (n + 1)].to_f64() + damping);
        }
        if let Err(index) = factor_lower(&mut work, n, par) {
            pivot = n - 1 - index;
            continue;
        }
        inverse.clear();
        inverse.resize(n * n, zero);
        triangular_inverse::invert_lower_triangular(
            MatMut::from_column_major_slice_mut(&mut inverse, n, n),
            MatRef::from_column_major_slice(&work, n, n),
            par,
        );
        reverse_transpose_upper(&mut work, &inverse, n);
        if work.par_iter().all(|x| x.to_f64().is_finite()) {
            return Ok((work, damping, attempt));
        }
    }
    let reason = format!(
        "the {n} x {n} matrix is not positive definite at column {pivot}, even with {:.3e} added to \
         its diagonal ({attempts} attempt(s)); use more calibration tokens, a larger damping \
         fraction (0.01 to 0.1), or double precision",
        step * f64::from(attempts)
    );
    Err(numeric("inverse Cholesky factor", reason))
}

/// U[i, j] = L⁻¹[n-1-i, n-1-j] from the column-major inverse factor, for j >= i; zeros below.
fn reverse_transpose_upper<P: Real>(target: &mut [P], inverse: &[P], n: usize) {
    target.par_chunks_mut((n * BLOCK).max(1)).enumerate().for_each(|(strip, rows)| {
        rows.fill(P::from_f64(0.0));
        let top = strip * BLOCK;
        let height = rows.len() / n;
        for left in (top..n).step_by(BLOCK) {
            for i in 0..height {
                let row = top + i;
                for column in left.max(row)..(left + BLOCK).min(n) {
                    rows[i * n + column] = inverse[(n - 1 - column) * n + (n - 1 - row)];
                }
            }
        }
    });
}

/// Which triangular system is solved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Triangle {
    /// L X = B with L lower triangular.
    Lower,
    /// Lᵀ X = B with L lower triangular (L is given, not its transpose).
    LowerTransposed,
    /// U X = B with U upper triangular.
    Upper,
    /// Uᵀ X = B with U upper triangular (U is given, not its transpose).
    UpperTransposed,
}

/// Solves a triangular system in place.
///
/// `t`: `[n, n]`, of which only the named triangle is read; `b`: `[n, columns]`, row-major, replaced
/// by X.
///
/// # Errors
/// [`Error::Shape`] when the lengths do not fit; [`Error::Numeric`] when a diagonal entry is 0 or not
/// finite.
pub fn solve_triangular<T: Real>(
    kind: Triangle,
    t: &[T],
    n: usize,
    b: &mut [T],
    columns: usize,
) -> Result<()> {
    const WHAT: &str = "triangular solve";
    square(WHAT, t, n)?;
    if n.checked_mul(columns) != Some(b.len()) {
        let reason = format!("{} values given for an {n} x {columns} right-hand side", b.len());
        return Err(Error::Shape { what: WHAT.into(), reason });
    }
    let bad = |i: &usize| {
        let pivot = t[i * n + i].to_f64();
        pivot == 0.0 || !pivot.is_finite()
    };
    if let Some(i) = (0..n).find(bad) {
        let reason = format!("diagonal entry {i} of {n} is {}", t[i * n + i].to_f64());
        return Err(numeric(WHAT, reason));
    }
    let matrix = MatRef::from_row_major_slice(t, n, n);
    let rhs = MatMut::from_row_major_slice_mut(b, n, columns);
    let par = Par::rayon(0);
    match kind {
        Triangle::Lower => triangular_solve::solve_lower_triangular_in_place(matrix, rhs, par),
        Triangle::LowerTransposed => {
            triangular_solve::solve_upper_triangular_in_place(matrix.transpose(), rhs, par);
        }
        Triangle::Upper => triangular_solve::solve_upper_triangular_in_place(matrix, rhs, par),
        Triangle::UpperTransposed => {
            triangular_solve::solve_lower_triangular_in_place(matrix.transpose(), rhs, par);
        }
    }
    Ok(())
}

/// Solves A X = B for a symmetric positive definite A, in place.
///
/// `a`: `[n, n]`, lower triangle read; `b`: `[n, columns]`, row-major, replaced by X.
///
/// # Errors
/// As [`cholesky_lower`] and [`solve_triangular`].
pub fn solve_spd<T: Real>(a: &[T], n: usize, b: &mut [T], columns: usize) -> Result<()> {
    let lower = cholesky_lower(a, n)?;
    solve_triangular(Triangle::Lower, &lower, n, b, columns)?;
    solve_triangular(Triangle::LowerTransposed, &lower, n, b, columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// A random SPD matrix XᵀX of `tokens` rows.
    fn gram(n: usize, tokens: usize, seed: u64) -> Vec<f64> {
        let mut rng = Rng::new(seed);
        let x: Vec<f64> = (0..n * tokens).map(|_| rng.normal()).collect();
        let mut h = vec![0.0; n * n];
        for t in 0..tokens {
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += x[t * n + i] * x[t * n + j];
                }
            }
        }
        h
    }

    /// C = op(A) B by definition.
    fn product(a: &[f64], transposed: bool, b: &[f64], n: usize, columns: usize) -> Vec<f64> {
        let mut c = vec![0.0; n * columns];
        for i in 0..n {
            for k in 0..n {
                let a_ik = if transposed { a[k * n + i] } else { a[i * n + k] };
                for j in 0..columns {
                    c[i * columns + j] += a_ik * b[k * columns + j];
                }
            }
        }
        c
    }

    /// The route of the definition: L, then A⁻¹ = L⁻ᵀL⁻¹, then its lower factor, transposed.
    fn naive_upper(h: &[f64], n: usize) -> Vec<f64> {
        fn cholesky(a: &[f64], n: usize) -> Vec<f64> {
            let mut l = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..=i {
                    let dot: f64 = (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum();
                    let rest = a[i * n + j] - dot;
                    l[i * n + j] = if i == j { rest.sqrt() } else { rest / l[j * n + j] };
                }
            }
            l
        }
        let l = cholesky(h, n);
        let mut inverse = vec![0.0; n * n];
        for c in 0..n {
            let mut y = vec![0.0; n];
            for i in 0..n {
                let dot: f64 = (0..i).map(|k| l[i * n + k] * y[k]).sum();
                y[i] = (f64::from(u8::from(i == c)) - dot) / l[i * n + i];
            }
            for i in (0..n).rev() {
                let dot: f64 = (i + 1..n).map(|k| l[k * n + i] * inverse[k * n + c]).sum();
                inverse[i * n + c] = (y[i] - dot) / l[i * n + i];
            }
        }
        // A⁻¹ = MMᵀ with M lower, and U = Mᵀ.
        let m = cholesky(&inverse, n);
        (0..n * n).map(|at| m[(at % n) * n + at / n]).collect()
    }

    #[test]
    fn oracle_of_four_tokens() {
        let x = [[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 0.0, 3.0]];
        let mut h = vec![0.0f64; 9];
        for row in x {
            for i in 0..3 {
                for j in 0..3 {
                    h[i * 3 + j] += 2.0 * row[i] * row[j];
                }
            }
        }
        let found = inverse_cholesky_upper(&h, 3, 0.01, Precision::F64).unwrap();
        let expected =
            [0.483219, -0.261852, -0.170845, 0.0, 0.295771, -0.053404, 0.0, 0.0, 0.212462];
        for (i, diagonal) in [12.153333, 12.153333, 22.153333].into_iter().enumerate() {
            assert!((h[i * 4] + found.damping - diagonal).abs() < 1e-6);
        }
        assert_eq!(found.attempts, 1);
        for (u, e) in found.upper.into_f64().iter().zip(expected) {
            assert!((u - e).abs() < 1e-6, "{u} {e}");
        }
        let h32: Vec<f32> = h.iter().map(|&x| x as f32).collect();
        let found = inverse_cholesky_upper(&h32, 3, 0.01, Precision::F32).unwrap();
        for (u, e) in found.upper.into_f32().iter().zip(expected) {
            assert!((f64::from(*u) - e).abs() < 2e-6, "{u} {e}");
        }
    }

    #[test]
    fn two_by_two_without_damping() {
        let found =
            inverse_cholesky_upper(&[4.0f64, 2.0, 2.0, 4.0], 2, 0.0, Precision::F64).unwrap();
        assert_eq!(found.damping, 0.0);
        for (u, e) in found.upper.into_f64().iter().zip([1.0 / 3f64.sqrt(), -0.288675, 0.0, 0.5]) {
            assert!((u - e).abs() < 1e-6);
        }
    }

    #[test]
    fn agrees_with_the_naive_route() {
        for (n, seed) in [(1, 1), (2, 2), (33, 3), (97, 4), (200, 5)] {
            let h = gram(n, 2 * n + 3, seed);
            let expected = naive_upper(&h, n);
            let scale = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let u = inverse_cholesky_upper(&h, n, 0.0, Precision::F64).unwrap().upper.into_f64();
            let single =
                inverse_cholesky_upper(&h, n, 0.0, Precision::F32).unwrap().upper.into_f64();
            for i in 0..n * n {
                assert!((u[i] - expected[i]).abs() < 1e-12 * scale, "{n} {i}");
                assert!((single[i] - expected[i]).abs() < 3e-4 * scale, "{n} {i}");
            }
            assert!((0..n).all(|i| u[i * n..i * n + i].iter().all(|&x| x == 0.0)));
            // U H Uᵀ = I.
            let uh = product(&u, false, &h, n, n);
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = (0..n).map(|k| uh[i * n + k] * u[j * n + k]).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-9);
                }
            }
        }
    }

    #[test]
    fn reads_only_the_lower_triangle() {
        let mut h = gram(40, 90, 9);
        let expected = inverse_cholesky_upper(&h, 40, 0.01, Precision::F64).unwrap();
        for i in 0..40 {
            h[i * 40 + i + 1..(i + 1) * 40].fill(123.0);
        }
        let got = inverse_cholesky_upper(&h, 40, 0.01, Precision::F64).unwrap();
        assert_eq!(expected.upper, got.upper);
    }

    #[test]
    fn damping_climbs_and_gives_up() {
        // Eigenvalues 1 +- 1.35: positive definite only when more than 0.35 is added. The mean of
        // the diagonal is 1, so 0.1 has to be added four times.
        let h = [1.0f64, 1.35, 1.35, 1.0];
        let found = inverse_cholesky_upper(&h, 2, 0.1, Precision::F64).unwrap();
        assert_eq!(found.attempts, 4);
        assert!((found.damping - 0.4).abs() < 1e-12);
        let inverse_00 = 1.4 / (1.4 * 1.4 - 1.35 * 1.35);
        let u = found.upper.into_f64();
        assert!((u[0] * u[0] - inverse_00).abs() < 1e-9);
        let error = inverse_cholesky_upper(&[1.0f64, 1.5, 1.5, 1.0], 2, 0.001, Precision::F64);
        assert!(error.unwrap_err().to_string().contains("damping"));
        assert!(inverse_cholesky_upper(&h, 2, 0.0, Precision::F64).is_err());
        assert!(inverse_cholesky_upper(&[0.0f64], 1, 0.01, Precision::F64).is_err());
        let nan = [1.0f64, f64::NAN, f64::NAN, 1.0];
        let message = inverse_cholesky_upper(&nan, 2, 0.01, Precision::F64).unwrap_err();
        assert!(message.to_string().contains("(0, 1)"));
        assert!(inverse_cholesky_upper(&h, 3, 0.01, Precision::F64).is_err());
        assert!(inverse_cholesky_upper(&h, 2, -1.0, Precision::F64).is_err());
        assert!(inverse_cholesky_upper::<f64>(&[], 0, 0.01, Precision::F64).is_ok());
    }

    #[test]
    fn cholesky_and_solves() {
        let l = cholesky_lower(&[4.0f64, 99.0, 2.0, 10.0], 2).unwrap();
        assert_eq!(l, [2.0, 0.0, 1.0, 3.0]);
        assert!(cholesky_lower(&[1.0f64, 0.0, 0.0, -1.0], 2).is_err());
        let (n, columns) = (70, 3);
        let a = gram(n, 200, 6);
        let l = cholesky_lower(&a, n).unwrap();
        for i in 0..n {
            for j in 0..n {
                let dot: f64 = (0..n).map(|k| l[i * n + k] * l[j * n + k]).sum();
                assert!((dot - a[i * n + j]).abs() < 1e-10 * a[0]);
            }
        }
        let mut rng = Rng::new(8);
        let x: Vec<f64> = (0..n * columns).map(|_| rng.normal()).collect();
        let close = |got: &[f64]| got.iter().zip(&x).all(|(g, e)| (g - e).abs() < 1e-9);
        let u: Vec<f64> = (0..n * n).map(|at| l[(at % n) * n + at / n]).collect();
        for (kind, matrix, transposed) in [
            (Triangle::Lower, &l, false),
            (Triangle::LowerTransposed, &l, true),
            (Triangle::Upper, &u, false),
            (Triangle::UpperTransposed, &u, true),
        ] {
            let mut b = product(matrix, transposed, &x, n, columns);
            solve_triangular(kind, matrix, n, &mut b, columns).unwrap();
            assert!(close(&b), "{kind:?}");
        }
        let mut b = product(&a, false, &x, n, columns);
        solve_spd(&a, n, &mut b, columns).unwrap();
        assert!(close(&b));
        assert!(solve_triangular(Triangle::Lower, &[0.0f64], 1, &mut [1.0], 1).is_err());
        assert!(solve_triangular(Triangle::Lower, &l, n, &mut b, 2).is_err());
    }
}
