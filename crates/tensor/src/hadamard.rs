//! Hadamard matrices (entries ±1, orthogonal rows) and products with them in `n log n` additions.
//!
//! An order `n = k · 2^m` is a Kronecker product of a Paley matrix of order `k` and Sylvester's of
//! order `2^m`. Paley's first construction gives `k = q + 1` for primes `q ≡ 3 (mod 4)`, the second
//! `k = 2 (q + 1)` for primes `q ≡ 1 (mod 4)`. Orders that need a field of prime-power size (52, 100)
//! and those without a known construction of this kind have none here: [`Hadamard::new`] says so
//! and the caller takes another orthogonal matrix (see [`crate::rotation`]).

/// Largest order of the dense factor: beyond it the product would no longer be fast.
const LARGEST_DENSE: usize = 2048;

/// A Hadamard matrix `H = P ⊗ S` of order `n`: `P` a Paley matrix of order `k`, `S` Sylvester's.
///
/// ```
/// use strata_tensor::hadamard::Hadamard;
/// let h = Hadamard::new(12).ok_or("no such order")?;
/// let mut x = vec![0.0; 12];
/// x[3] = 1.0;
/// h.apply(&mut x);
/// h.apply_transposed(&mut x);
/// assert_eq!((x[3], x[4]), (12.0, 0.0)); // HᵀH = 12 I
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hadamard {
    order: usize,
    /// Order of the dense factor; 1 when Sylvester's alone suffices.
    dense: usize,
    /// `[dense, dense]` row-major.
    paley: Vec<i8>,
}

impl Hadamard {
    /// The Hadamard matrix of an order, if one of the two constructions gives it: the smallest
    /// possible dense factor, so that as much as possible is fast.
    pub fn new(order: usize) -> Option<Self> {
        if order == 0 {
            return None;
        }
        let powers = order.trailing_zeros();
        let odd = order >> powers;
        if odd == 1 {
            return Some(Self { order, dense: 1, paley: vec![1] });
        }
        (2..=powers).map(|m| odd << m).take_while(|&k| k <= LARGEST_DENSE).find_map(|dense| {
            let paley = paley_one(dense).or_else(|| paley_two(dense))?;
            Some(Self { order, dense, paley })
        })
    }

    /// Number of rows.
    pub fn order(&self) -> usize {
        self.order
    }

    /// How the matrix is made, e.g. `Paley 12 x Sylvester 64`.
    pub fn description(&self) -> String {
        match (self.dense, self.order / self.dense) {
            (1, n) => format!("Sylvester {n}"),
            (k, 1) => format!("Paley {k}"),
            (k, n) => format!("Paley {k} x Sylvester {n}"),
        }
    }

    /// Entry `(row, column)`, 1 or -1; 0 outside the matrix.
    pub fn entry(&self, row: usize, column: usize) -> i8 {
        let two = self.order / self.dense;
        let at = (row / two) * self.dense + column / two;
        if row >= self.order || column >= self.order {
            return 0;
        }
        let both = (row % two) & (column % two);
        let sign = if both.count_ones().is_multiple_of(2) { 1 } else { -1 };
        sign * self.paley.get(at).copied().unwrap_or(0)
    }

    /// `x ← H x` for one vector of `n` numbers.
    ///
    /// # Panics
    /// When the length is not `n`.
    pub fn apply(&self, x: &mut [f64]) {
        self.product(x, |row, column| row * self.dense + column);
    }

    /// `x ← Hᵀ x`.
    ///
    /// # Panics
    /// When the length is not `n`.
    pub fn apply_transposed(&self, x: &mut [f64]) {
        self.product(x, |row, column| column * self.dense + row);
    }

    fn product(&self, x: &mut [f64], at: impl Fn(usize, usize) -> usize) {
        assert_eq!(x.len(), self.order, "a vector for a Hadamard matrix of order {}", self.order);
        let two = self.order / self.dense;
        for part in x.chunks_exact_mut(two) {
            walsh_hadamard(part);
        }
        if self.dense == 1 {
            return;
        }
        let source = x.to_vec();
        for (row, target) in x.chunks_exact_mut(two).enumerate() {
            target.fill(0.0);
            for (column, part) in source.chunks_exact(two).enumerate() {
                if self.paley[at(row, column)] > 0 {
                    target.iter_mut().zip(part).for_each(|(t, p)| *t += p);
                } else {
                    target.iter_mut().zip(part).for_each(|(t, p)| *t -= p);
                }
            }
        }
    }
}

/// `x ← S x` with Sylvester's matrix, in place; the length must be a power of two.
///
/// # Panics
/// When the length is not a power of two.
pub fn walsh_hadamard(x: &mut [f64]) {
    assert!(x.len().is_power_of_two(), "{} is not a power of two", x.len());
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Whether `n` is a prime; for the small numbers that occur here.
fn is_prime(n: usize) -> bool {
    n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// The quadratic character of `0..q`: 0 for 0, 1 for squares, -1 for the rest.
fn quadratic_character(q: usize) -> Vec<i8> {
    let mut chi = vec![-1i8; q];
    for i in 1..q {
        chi[i * i % q] = 1;
    }
    chi[0] = 0;
    chi
}

/// Paley's first construction: `H = I + S` with the skew matrix of the quadratic character.
fn paley_one(order: usize) -> Option<Vec<i8>> {
    let q = order.checked_sub(1)?;
    if q % 4 != 3 || !is_prime(q) {
        return None;
    }
    let chi = quadratic_character(q);
    let mut h = vec![0i8; order * order];
    for (row, values) in h.chunks_exact_mut(order).enumerate() {
        for (column, value) in values.iter_mut().enumerate() {
            *value = match (row, column) {
                (i, j) if i == j => 1,
                (0, _) => 1,
                (_, 0) => -1,
                (i, j) => chi[(q + i - j) % q],
            };
        }
    }
    Some(h)
}

/// Paley's second construction: `H = C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]` with the
/// symmetric conference matrix `C` of the quadratic character.
fn paley_two(order: usize) -> Option<Vec<i8>> {
    let q = (order / 2).checked_sub(1)?;
    if !order.is_multiple_of(4) || q % 4 != 1 || !is_prime(q) {
        return None;
    }
    let chi = quadratic_character(q);
    let mut h = vec![0i8; order * order];
    for (row, values) in h.chunks_exact_mut(order).enumerate() {
        for (column, value) in values.iter_mut().enumerate() {
            let (i, j) = (row / 2, column / 2);
            let both = row % 2 == 1 && column % 2 == 1;
            *value = if i == j {
                // [[1, -1], [-1, -1]]; the diagonal of C is 0.
                if row % 2 == 0 && column % 2 == 0 { 1 } else { -1 }
            } else {
                let c = if i == 0 || j == 0 { 1 } else { chi[(q + i - j) % q] };
                if both { -c } else { c }
            };
        }
    }
    Some(h)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const FIRST: [usize; 13] = [12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104, 108, 140];
    const SECOND: [usize; 9] = [12, 28, 36, 60, 76, 84, 108, 124, 148];

    /// HHᵀ = n I in whole numbers.
    fn is_hadamard(h: &[i8], n: usize) -> bool {
        let dot = |i: usize, j: usize| -> i64 {
            let (a, b) = (&h[i * n..(i + 1) * n], &h[j * n..(j + 1) * n]);
            a.iter().zip(b).map(|(&a, &b)| i64::from(a) * i64::from(b)).sum()
        };
        h.len() == n * n
            && h.iter().all(|v| v.abs() == 1)
            && (0..n).all(|i| (0..n).all(|j| dot(i, j) == if i == j { n as i64 } else { 0 }))
    }

    #[test]
    fn both_constructions_are_orthogonal_for_every_listed_order() {
        for order in FIRST {
            assert!(is_hadamard(&paley_one(order).unwrap(), order), "first, {order}");
        }
        for order in SECOND {
            assert!(is_hadamard(&paley_two(order).unwrap(), order), "second, {order}");
        }
    }

    #[test]
    fn whole_matrices_are_orthogonal_and_fast_equals_dense() {
        let orders = [1, 2, 4, 8, 64, 24, 40, 56, 96, 144, 208, 224, 256, 288, 312, 512, 896];
        for order in orders.into_iter().chain(FIRST).chain(SECOND) {
            let h = Hadamard::new(order).unwrap();
            let dense: Vec<i8> =
                (0..order * order).map(|at| h.entry(at / order, at % order)).collect();
            assert!(is_hadamard(&dense, order), "{order}: {}", h.description());
            let mut rng = Rng::new(order as u64);
            let x: Vec<f64> = (0..order).map(|_| rng.normal()).collect();
            let (mut fast, mut transposed) = (x.clone(), x.clone());
            h.apply(&mut fast);
            h.apply_transposed(&mut transposed);
            for i in 0..order {
                let row: f64 = (0..order).map(|j| f64::from(dense[i * order + j]) * x[j]).sum();
                let column: f64 = (0..order).map(|j| f64::from(dense[j * order + i]) * x[j]).sum();
                assert!((fast[i] - row).abs() < 1e-12 * order as f64, "{order}");
                assert!((transposed[i] - column).abs() < 1e-12 * order as f64, "{order}");
            }
        }
    }

    /// Orders of four divisors without a construction, orders that cannot exist, and one (6 656 =
    /// 104 · 64, where 52 · 128 would need a field of 25 elements) that a larger factor rescues.
    #[test]
    fn orders_without_a_construction_are_said_to_have_none() {
        for order in [0, 3, 6, 10, 18, 52, 92, 100, 116, 156, 172] {
            assert!(Hadamard::new(order).is_none(), "{order}");
        }
        assert_eq!(Hadamard::new(6656).unwrap().description(), "Paley 104 x Sylvester 64");
        assert_eq!(Hadamard::new(768).unwrap().description(), "Paley 12 x Sylvester 64");
        assert_eq!(Hadamard::new(256).unwrap().description(), "Sylvester 256");
        assert_eq!(Hadamard::new(12).unwrap().description(), "Paley 12");
        let three = Hadamard::new(12).unwrap();
        assert_eq!((three.entry(12, 0), three.order()), (0, 12));
    }
}
