//! The walk over columns that GPTQ and its relatives share: replace some columns, let the columns
//! not yet replaced make up for the error.
//!
//! With `H` the damped Hessian and `H⁻¹ = Uᵀ U`, the columns `B` of one step are replaced, their
//! error `E = (W_B - Ŵ_B) U_BB⁻¹` is carried to the columns on their right, `W -= E U[B, right]`,
//! and `Σ E²` over all steps is `tr((W - Ŵ) H (W - Ŵ)ᵀ)`, the output error that the step caused
//! (Frantar et al. 2022, equations 2 and 3; a step of one column divides by `U[i,i]`). How columns
//! are replaced is a [`ColumnQuantizer`]: the walk knows nothing about codes.
//!
//! Rows are independent and processed in chunks, one per task. A chunk's working copy is kept
//! transposed, so that every step runs over contiguous vectors of rows; errors of a finished block
//! of columns reach the rest as one matrix product.

use super::{Factor, GptqOptions};
use crate::grid::Matrix;
use rayon::prelude::*;
use tensor::kernels::{Matrix as View, Output, matmul_serial};

/// Rows that one task processes together, at least; a multiple of the widest vector.
const ROWS: usize = 64;

/// Rows of a chunk when chunks must hold a multiple of `multiple` rows (groups that lie along the
/// output): the least such number that is not below the usual 64.
pub fn chunk_rows(multiple: usize) -> usize {
    ROWS.div_ceil(multiple.max(1)) * multiple.max(1)
}

/// How a step replaces columns.
pub trait ColumnQuantizer: Sync {
    /// What one chunk of rows keeps from step to step: its codes, its grids.
    type State: Send;

    /// Columns replaced together. The last step of a row may be shorter.
    fn step(&self) -> usize {
        1
    }

    /// End of the block of columns that starts at position `start`: `end` unless something has to
    /// see columns before the errors of this block reach them only in part. Positions in between
    /// must be whole steps.
    fn block_end(&self, start: usize, end: usize) -> usize {
        let _ = start;
        end
    }

    /// Called at the start of a block; all columns from here on are fully compensated.
    fn begin_block(&self, state: &mut Self::State, columns: &Columns<'_>) {
        let _ = (state, columns);
    }

    /// Replaces the first [`Columns::count`] columns of [`Columns::values`] by what is stored for
    /// them, and remembers it in `state`.
    fn replace(&self, state: &mut Self::State, columns: &mut Columns<'_>);
}

/// The columns of one chunk of rows, from the step's first to the last, in processing order.
pub struct Columns<'a> {
    /// Position of the first column in processing order.
    pub position: usize,
    /// How many columns this step replaces.
    pub count: usize,
    /// Rows of the chunk.
    pub rows: usize,
    /// `[width - position, rows]`. Columns of the running block have received all errors so far,
    /// the columns behind it those of earlier blocks.
    pub values: &'a mut [f32],
    /// Weights that stay zero, in the layout of `values`; of the columns to be replaced they are
    /// zero already. A quantiser that looks ahead treats them as zero.
    pub zeros: Option<&'a [bool]>,
    factor: &'a Factor,
}

impl Columns<'_> {
    /// Original index of the `j`-th column.
    #[inline]
    pub fn column(&self, j: usize) -> usize {
        self.factor.column(self.position + j)
    }

    /// `U[i, j]` relative to the step's first column: `U_BB` for `i, j` below `count`.
    #[inline]
    pub fn upper(&self, i: usize, j: usize) -> f32 {
        self.factor.upper[(self.position + i) * self.factor.width + self.position + j]
    }
}

/// What the walk itself has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SweepOptions {
    /// Columns between two lazy updates; rounded up to whole steps.
    pub block_size: usize,
    /// Weights that are exactly zero stay exactly zero.
    pub keep_zeros: bool,
}

impl From<&GptqOptions> for SweepOptions {
    fn from(options: &GptqOptions) -> Self {
        Self { block_size: options.block_size, keep_zeros: options.keep_zeros }
    }
}

/// Walks over all columns of `matrix` (`[out, in]`, as wide as `factor`) in chunks of `rows` rows;
/// `states` holds one state per chunk, in order. Columns that no calibration token excites are
/// replaced as zeros. Returns `Σ E² = tr((W - Ŵ) H_damped (W - Ŵ)ᵀ)`.
pub fn sweep<Q: ColumnQuantizer>(
    matrix: &Matrix,
    factor: &Factor,
    quantizer: &Q,
    states: &mut [Q::State],
    rows: usize,
    options: &SweepOptions,
) -> f64 {
    let walk = Walk { factor, quantizer, options };
    let losses: Vec<f64> = matrix
        .values
        .par_chunks(rows.max(1) * matrix.in_features)
        .zip(states.par_iter_mut())
        .map(|(values, state)| walk.chunk(values, state))
        .collect();
    losses.iter().sum()
}

struct Walk<'a, Q> {
    factor: &'a Factor,
    quantizer: &'a Q,
    options: &'a SweepOptions,
}

impl<Q: ColumnQuantizer> Walk<'_, Q> {
    /// Replaces the columns of one chunk of rows (`[rows, in]`); returns its share of `Σ E²`.
    fn chunk(&self, values: &[f32], state: &mut Q::State) -> f64 {
        let (factor, width) = (self.factor, self.factor.width);
        let rows = values.len() / width;
        let step = self.quantizer.step().max(1);
        let block = self.options.block_size.max(1).div_ceil(step) * step;
        let mut work = self.transposed(values, rows);
        let zeros: Option<Vec<bool>> =
            self.options.keep_zeros.then(|| work.iter().map(|&w| w == 0.0).collect());
        let mut errors = vec![0f32; block.min(width) * rows];
        let mut before = vec![0f32; step * rows];
        let mut loss = 0f64;
        let mut start = 0;
        while start < width {
            let end = (start + block).min(width);
            let end = self.quantizer.block_end(start, end).clamp(start + 1, end);
            for position in (start..end).step_by(step) {
                let count = step.min(width - position);
                let rest = &mut work[position * rows..];
                let zeros = zeros.as_ref().map(|zeros| &zeros[position * rows..]);
                let mut columns = Columns { position, count, rows, values: rest, zeros, factor };
                if position == start {
                    self.quantizer.begin_block(state, &columns);
                }
                let current = count * rows;
                before[..current].copy_from_slice(&columns.values[..current]);
                if let Some(zeros) = columns.zeros {
                    for (w, _) in columns.values.iter_mut().zip(&zeros[..current]).filter(|p| *p.1)
                    {
                        *w = 0.0;
                    }
                }
                self.quantizer.replace(state, &mut columns);
                let (head, tail) = columns.values.split_at_mut(current);
                let errors = &mut errors[(position - start) * rows..][..current];
                loss += self.step_errors(position, rows, &before[..current], head, errors);
                for (j, error) in errors.chunks_exact(rows).enumerate() {
                    let row = (position + j) * width;
                    let upper = &factor.upper[row + (position + count).min(end)..row + end];
                    spread_error(&mut tail[..upper.len() * rows], error, upper);
                }
            }
            if end < width {
                // work[end.., :] -= U[start..end, end..]ᵀ · E   ([rest, rows])
                let block = end - start;
                matmul_serial(
                    [width - end, rows, block],
                    View::columns(&factor.upper[start * width + end..], width),
                    View::rows(&errors[..block * rows], rows),
                    -1.0,
                    Output { data: &mut work[end * rows..], row: rows, accumulate: true },
                );
            }
            start = end;
        }
        loss
    }

    /// The working copy `[in, rows]` in processing order, dead columns zeroed.
    fn transposed(&self, values: &[f32], rows: usize) -> Vec<f32> {
        let (factor, width) = (self.factor, self.factor.width);
        let mut work = vec![0f32; width * rows];
        for (row, values) in values.chunks_exact(width).enumerate() {
            for position in 0..width {
                work[position * rows + row] = values[factor.column(position)];
            }
        }
        if !factor.dead.is_empty() {
            let mut is_dead = vec![false; width];
            factor.dead.iter().for_each(|&column| is_dead[column] = true);
            for position in 0..width {
                if is_dead[factor.column(position)] {
                    work[position * rows..(position + 1) * rows].fill(0.0);
                }
            }
        }
        work
    }

    /// `E U_BB = W_B - Ŵ_B`, solved column by column (`U_BB` is upper triangular); returns `Σ E²`.
    fn step_errors(
        &self,
        position: usize,
        rows: usize,
        before: &[f32],
        after: &[f32],
        errors: &mut [f32],
    ) -> f64 {
        let (upper, width) = (&self.factor.upper, self.factor.width);
        let mut loss = 0f64;
        for (j, (before, after)) in
            before.chunks_exact(rows).zip(after.chunks_exact(rows)).enumerate()
        {
            let (solved, error) = errors.split_at_mut(j * rows);
            let error = &mut error[..rows];
            for ((error, before), after) in error.iter_mut().zip(before).zip(after) {
                *error = before - after;
            }
            for (i, solved) in solved.chunks_exact(rows).enumerate() {
                let factor = upper[(position + i) * width + position + j];
                for (error, solved) in error.iter_mut().zip(solved) {
                    *error -= factor * solved;
                }
            }
            loss += divide(error, upper[(position + j) * width + position + j]);
        }
        loss
    }
}

tensor::simd! {
    /// Divides by `diagonal`; returns the sum of squares.
    fn divide(error: &mut [f32], diagonal: f32) -> f64 {
        for e in error.iter_mut() {
            *e /= diagonal;
        }
        let mut sum = 0f64;
        for &e in error.iter() {
            sum += f64::from(e) * f64::from(e);
        }
        sum
    }
}

tensor::simd! {
    /// `work[j, :] -= upper[j] * error` for every column `j` to the right inside the block.
    pub(crate) fn spread_error(work: &mut [f32], error: &[f32], upper: &[f32]) {
        for (column, &factor) in work.chunks_exact_mut(error.len()).zip(upper) {
            for (w, &e) in column.iter_mut().zip(error) {
                *w -= factor * e;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::factor::Factor;
    use super::*;
    use crate::statistics::Gram;

    /// Rounds `step` columns to multiples of a half and remembers what it stored.
    struct Halves(usize);

    impl ColumnQuantizer for Halves {
        type State = Vec<(usize, Vec<f32>)>;

        fn step(&self) -> usize {
            self.0
        }

        fn replace(&self, state: &mut Self::State, columns: &mut Columns<'_>) {
            for j in 0..columns.count {
                let column = &mut columns.values[j * columns.rows..(j + 1) * columns.rows];
                column.iter_mut().for_each(|w| *w = (*w * 2.0).round() / 2.0);
                let column = column.to_vec();
                state.push((columns.column(j), column));
            }
        }
    }

    fn problem(out: usize, width: usize) -> (Matrix, Gram) {
        let mut rng = tensor::Rng::new(5);
        let values = (0..out * width).map(|_| rng.normal() as f32).collect();
        let mut x = vec![0f32; 60 * width];
        for row in x.chunks_mut(width) {
            let shared = rng.normal() as f32;
            row.iter_mut().for_each(|x| *x = shared + 0.5 * rng.normal() as f32);
        }
        let mut gram = Gram::new(width);
        gram.add(&x);
        (Matrix::new(out, width, values).unwrap(), gram)
    }

    /// The replaced matrix and the loss.
    fn run(
        matrix: &Matrix,
        factor: &Factor,
        step: usize,
        options: SweepOptions,
    ) -> (Vec<f32>, f64) {
        let (out, width) = (matrix.out_features, matrix.in_features);
        let rows = 4;
        let mut states = vec![Vec::new(); out.div_ceil(rows)];
        let loss = sweep(matrix, factor, &Halves(step), &mut states, rows, &options);
        let mut replaced = vec![f32::NAN; out * width];
        for (chunk, state) in states.iter().enumerate() {
            for (column, values) in state {
                for (row, value) in values.iter().enumerate() {
                    replaced[(chunk * rows + row) * width + column] = *value;
                }
            }
        }
        (replaced, loss)
    }

    #[test]
    fn loss_is_the_damped_output_error_for_every_step() {
        let (matrix, gram) = problem(6, 13);
        for act_order in [false, true] {
            let gptq = GptqOptions { act_order, ..Default::default() };
            let factor = Factor::new("t", &gram, &gptq).unwrap();
            for step in [1, 2, 4, 13] {
                for block_size in [1, 6, 128] {
                    let options = SweepOptions { block_size, keep_zeros: false };
                    let (replaced, loss) = run(&matrix, &factor, step, options);
                    let direct = super::super::tests::damped_error(
                        &matrix,
                        &replaced,
                        &gram,
                        factor.damping(),
                    );
                    assert!((loss / direct - 1.0).abs() < 1e-4, "{step} {block_size}: {loss}");
                }
            }
        }
    }

    #[test]
    fn lazy_updates_change_nothing() {
        let (matrix, gram) = problem(9, 24);
        let factor = Factor::new("t", &gram, &GptqOptions::default()).unwrap();
        for step in [1, 4] {
            let all =
                run(&matrix, &factor, step, SweepOptions { block_size: 24, keep_zeros: false });
            for block_size in [1, 5, 8] {
                let options = SweepOptions { block_size, keep_zeros: false };
                let lazy = run(&matrix, &factor, step, options);
                // Sums in another order may move a value across a rounding boundary.
                let moved = lazy.0.iter().zip(&all.0).filter(|(a, b)| a != b).count();
                assert!(moved <= 1, "step {step}, block {block_size}: {moved}");
            }
        }
    }

    #[test]
    fn kept_zeros_stay_and_their_error_is_compensated() {
        let (mut matrix, gram) = problem(60, 32);
        for (i, w) in matrix.values.iter_mut().enumerate() {
            if i % 3 != 0 {
                *w = 0.0;
            }
        }
        let factor = Factor::new("t", &gram, &GptqOptions::default()).unwrap();
        for step in [1, 4] {
            let (free, _) =
                run(&matrix, &factor, step, SweepOptions { block_size: 8, keep_zeros: false });
            let (kept, loss) =
                run(&matrix, &factor, step, SweepOptions { block_size: 8, keep_zeros: true });
            let zeros =
                |q: &[f32]| matrix.values.iter().zip(q).all(|(w, q)| *w != 0.0 || *q == 0.0);
            assert!(zeros(&kept) && !zeros(&free));
            let direct = super::super::tests::damped_error(&matrix, &kept, &gram, factor.damping());
            assert!((loss / direct - 1.0).abs() < 1e-4, "{loss} {direct}");
        }
    }

    #[test]
    fn chunks_hold_whole_groups() {
        assert_eq!([1, 16, 48, 64, 128].map(chunk_rows), [64, 64, 96, 64, 128]);
    }
}
