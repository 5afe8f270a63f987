//! The arithmetic of folding and rotating on rows in f64: norms into their readers, means out of
//! writers, Hadamard products inside heads.

use rayon::prelude::*;
use tensor::hadamard::walsh_hadamard;

/// Gain and bias of a norm that goes into its readers.
pub(super) struct NormValues {
    /// The gain that is applied (`1 + weight` where the family says so).
    pub gain: Vec<f64>,
    /// LayerNorm's bias.
    pub bias: Option<Vec<f64>>,
    /// The norm's bias becomes 1 everywhere: readers must not see it but for the constant that
    /// they are to add.
    pub centred: bool,
}

impl NormValues {
    /// `W β` of one row: what the norm's bias adds to the row's output.
    pub fn constant(&self, row: &[f64]) -> f64 {
        let bias = self.bias.as_deref().unwrap_or_default();
        row.iter().zip(bias).map(|(w, b)| w * b).sum()
    }

    /// Rows of `W` become those of `W diag(γ)`. When the norm's bias is to be 1 everywhere, the
    /// rows' means are removed (no reader sees the mean direction otherwise) and, with `constant`,
    /// replaced by `W β / width`, so that the ones add `W β`.
    pub fn fold(&self, rows: &mut [f64], width: usize, constant: bool) {
        rows.par_chunks_exact_mut(width.max(1)).with_min_len(16).for_each(|row| {
            let carried = if constant { self.constant(row) } else { 0.0 };
            row.iter_mut().zip(&self.gain).for_each(|(w, g)| *w *= g);
            if self.centred {
                let shift = (carried - row.iter().sum::<f64>()) / width as f64;
                row.iter_mut().for_each(|w| *w += shift);
            }
        });
    }
}

/// Subtracts every row's own mean.
pub(super) fn centre_rows(rows: &mut [f64], width: usize) {
    rows.par_chunks_exact_mut(width.max(1)).with_min_len(16).for_each(|row| {
        let mean = row.iter().sum::<f64>() / width as f64;
        row.iter_mut().for_each(|v| *v -= mean);
    });
}

/// Subtracts every column's mean from a matrix `[rows, columns]`: what the rows write then has mean
/// 0. A vector is one column.
pub(super) fn centre_columns(matrix: &mut [f64], columns: usize) {
    let rows = matrix.len() / columns.max(1);
    let mut means = vec![0f64; columns];
    for row in matrix.chunks_exact(columns.max(1)) {
        means.iter_mut().zip(row).for_each(|(m, v)| *m += v);
    }
    means.iter_mut().for_each(|m| *m /= rows.max(1) as f64);
    for row in matrix.chunks_exact_mut(columns.max(1)) {
        row.iter_mut().zip(&means).for_each(|(v, m)| *v -= m);
    }
}

/// `W ← (H / √h) W` for the `h` rows of one head, `[h, columns]`; `h` is a power of two.
pub(super) fn mix_rows(head: &mut [f64], columns: usize) {
    let rows = head.len() / columns.max(1);
    let factor = 1.0 / (rows as f64).sqrt();
    head.iter_mut().for_each(|v| *v *= factor);
    let mut half = 1;
    while half < rows {
        for pair in head.chunks_exact_mut(2 * half * columns) {
            let (low, high) = pair.split_at_mut(half * columns);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// `w ← w (I ⊗ H / √h)` for every row: the inputs of every head of `h` features, a power of two,
/// are turned back.
pub(super) fn mix_columns(matrix: &mut [f64], h: usize) {
    let factor = 1.0 / (h as f64).sqrt();
    matrix.par_chunks_exact_mut(h.max(1)).with_min_len(64).for_each(|head| {
        head.iter_mut().for_each(|v| *v *= factor);
        walsh_hadamard(head);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gains_biases_and_means_by_hand() {
        let norm = NormValues { gain: vec![2.0, 4.0], bias: Some(vec![1.0, -1.0]), centred: false };
        let mut w = [1.0, 3.0];
        assert_eq!(norm.constant(&w), -2.0);
        norm.fold(&mut w, 2, true);
        assert_eq!(w, [2.0, 12.0]);
        // Carried: the row of W diag(γ) loses its mean 7 and gets Wβ / 2 = -1.
        let norm = NormValues { centred: true, ..norm };
        let mut w = [1.0, 3.0];
        norm.fold(&mut w, 2, true);
        assert_eq!(w, [-6.0, 4.0]);
        let mut w = [1.0, 3.0];
        norm.fold(&mut w, 2, false);
        assert_eq!(w, [-5.0, 5.0]);
        let mut m = [1.0, 2.0, 3.0, 6.0];
        centre_columns(&mut m, 2);
        assert_eq!(m, [-1.0, -2.0, 1.0, 2.0]);
        let mut m = [1.0, 2.0, 3.0, 6.0];
        centre_rows(&mut m, 2);
        assert_eq!(m, [-0.5, 0.5, -1.5, 1.5]);
    }

    #[test]
    fn heads_turn_and_turn_back() {
        let root = 0.5f64.sqrt();
        let mut rows = [1.0, 2.0, 3.0, 5.0];
        mix_rows(&mut rows, 2);
        for (got, wanted) in rows.iter().zip([4.0, 7.0, -2.0, -3.0]) {
            assert!((got - wanted * root).abs() < 1e-12);
        }
        mix_rows(&mut rows, 2);
        for (got, wanted) in rows.iter().zip([1.0, 2.0, 3.0, 5.0]) {
            assert!((got - wanted).abs() < 1e-12);
        }
        // Two heads of two: each pair on its own.
        let mut columns = [1.0, 3.0, 5.0, 1.0];
        mix_columns(&mut columns, 2);
        for (got, wanted) in columns.iter().zip([4.0, -2.0, 6.0, 4.0]) {
            assert!((got - wanted * root).abs() < 1e-12);
        }
    }
}
