//! Strided matrix products over slices, on all threads.
//!
//! The product itself is the crate `gemm`. Splitting the output into pieces that each run on one
//! thread keeps every core busy; the pieces depend only on the shape and the number of threads.
use rayon::prelude::*;

/// A matrix inside a slice: element `(i, j)` sits at `i * row + j * column`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// The values.
    pub data: &'a [f32],
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub column: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major with `row` values from one row to the next.
    pub fn rows(data: &'a [f32], row: usize) -> Self {
        Self { data, row, column: 1 }
    }

    /// The transpose of a row-major matrix with `row` values from one row to the next.
    pub fn columns(data: &'a [f32], row: usize) -> Self {
        Self { data, row: 1, column: row }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || {
            let last = (rows - 1) * self.row + (columns - 1) * self.column;
            last < self.data.len()
        }
    }
}

/// Where a product goes: row-major with `row` values from one row to the next.
#[derive(Debug)]
pub struct Output<'a> {
    /// The values.
    pub data: &'a mut [f32],
    /// Distance between rows, at least the number of columns.
    pub row: usize,
    /// Add to what is there instead of replacing it.
    pub accumulate: bool,
}

/// `c = scale * a b` (or `c += ...`) for `a [m, k]`, `b [k, n]`, `c [m, n]` with `shape = [m, n, k]`,
/// on all threads of the current rayon pool.
///
/// # Panics
/// If a slice is too short for its shape.
pub fn matmul(shape: [usize; 3], a: Matrix, b: Matrix, scale: f32, c: Output) {
    let [m, n, k] = shape;
    check(shape, a, b, &c);
    let threads = rayon::current_num_threads();
    // Below this a product takes less time than waking a thread.
    const WORTH_SPLITTING: usize = 1 << 18;
    if threads == 1 || m * n * k < WORTH_SPLITTING {
        // SAFETY: `check` has seen the bounds.
        unsafe { product(shape, a, b, scale, c.data.as_mut_ptr(), c.row, c.accumulate) }
        return;
    }
    // Twice as many pieces as threads, so that a core that is held up elsewhere does not hold up the
    // product.
    let pieces = 2 * threads;
    let destination = Shared(c.data.as_mut_ptr());
    let (row, accumulate) = (c.row, c.accumulate);
    if by_columns(shape, &a, &b, pieces) {
        let cuts = cuts(n, COLUMN_TILE, pieces);
        (0..cuts.len() - 1).into_par_iter().with_max_len(1).for_each(|piece| {
            let (start, end) = (cuts[piece], cuts[piece + 1]);
            let shape = [m, end - start, k];
            let b = Matrix { data: &b.data[start * b.column..], ..b };
            // SAFETY: in bounds by `check`; pieces are disjoint columns.
            unsafe { product(shape, a, b, scale, destination.at(start), row, accumulate) }
        });
    } else {
        let cuts = cuts(m, ROW_TILE, pieces);
        (0..cuts.len() - 1).into_par_iter().with_max_len(1).for_each(|piece| {
            let (start, end) = (cuts[piece], cuts[piece + 1]);
            let shape = [end - start, n, k];
            let a = Matrix { data: &a.data[start * a.row..], ..a };
            // SAFETY: in bounds by `check`; pieces are disjoint rows.
            unsafe { product(shape, a, b, scale, destination.at(start * row), row, accumulate) }
        });
    }
}

/// One vector of columns and the rows of the micro-kernel's tile with AVX-512; pieces are multiples.
const COLUMN_TILE: usize = 16;
const ROW_TILE: usize = 8;

/// Whether to split the output by columns rather than by rows, as measured: every piece packs the
/// whole of the operand that is not split, which is dear if that one is stored transposed.
fn by_columns([m, n, _]: [usize; 3], a: &Matrix, b: &Matrix, pieces: usize) -> bool {
    let plain = a.column == 1 && b.column == 1;
    let tall = m > 16 * n;
    let (columns, rows) = (n.div_ceil(COLUMN_TILE), m.div_ceil(ROW_TILE));
    if columns < pieces || rows < pieces { columns >= rows } else { !plain && !tall }
}

/// Where to cut `length` into at most `pieces` pieces of whole tiles, as equal as can be.
fn cuts(length: usize, tile: usize, pieces: usize) -> Vec<usize> {
    let tiles = length.div_ceil(tile);
    let pieces = pieces.min(tiles).max(1);
    (0..=pieces).map(|piece| (piece * tiles / pieces * tile).min(length)).collect()
}

/// [`matmul`] on the calling thread alone, for pieces of work that are already parallel.
pub fn matmul_serial(shape: [usize; 3], a: Matrix, b: Matrix, scale: f32, c: Output) {
    check(shape, a, b, &c);
    // SAFETY: `check` has seen the bounds.
    unsafe { product(shape, a, b, scale, c.data.as_mut_ptr(), c.row, c.accumulate) }
}

fn check([m, n, k]: [usize; 3], a: Matrix, b: Matrix, c: &Output) {
    assert!(a.holds(m, k), "matmul: the left matrix is shorter than [{m}, {k}]");
    assert!(b.holds(k, n), "matmul: the right matrix is shorter than [{k}, {n}]");
    let fits = m == 0 || n == 0 || (m - 1) * c.row + n <= c.data.len();
    assert!(fits && (c.row >= n || m < 2), "matmul: the output does not hold [{m}, {n}]");
}

/// A pointer that several threads write disjoint places through.
#[derive(Clone, Copy)]
pub(crate) struct Shared(pub(crate) *mut f32);

// SAFETY: whoever uses it writes disjoint places only.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// One product on this thread.
///
/// # Safety
/// `a`, `b` hold their shapes, and `c` points to `m` rows of `n` values, `row` apart, that nothing
/// else uses meanwhile.
pub(crate) unsafe fn product(
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    scale: f32,
    c: *mut f32,
    row: usize,
    accumulate: bool,
) {
    // SAFETY: strides and bounds are the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            row as isize,
            accumulate,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_cover_once() {
        assert_eq!(cuts(288, 48, 4), [0, 48, 144, 192, 288]);
        assert_eq!(cuts(10, 48, 4), [0, 10]);
        assert_eq!(cuts(17, 8, 4), [0, 8, 16, 17]);
    }

    #[test]
    fn pieces_agree_with_the_definition() {
        for shape @ [m, n, k] in [[1, 1, 1], [3, 5, 2], [70, 130, 90], [200, 37, 64], [5, 0, 3]] {
            let a: Vec<f32> = (0..m * k).map(|i| ((i * 7) % 13) as f32 - 6.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| ((i * 5) % 11) as f32 - 5.0).collect();
            let mut c = vec![1.0; m * (n + 3)];
            let output = Output { data: &mut c, row: n + 3, accumulate: true };
            // b is given transposed: [n, k] row-major.
            matmul(shape, Matrix::rows(&a, k), Matrix::columns(&b, k), 0.5, output);
            for i in 0..m {
                for j in 0..n {
                    let dot: f32 = (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum();
                    assert_eq!(c[i * (n + 3) + j], 1.0 + 0.5 * dot, "{shape:?} {i} {j}");
                }
                assert_eq!(c[i * (n + 3) + n..][..3], [1.0; 3], "wrote past the columns");
            }
        }
    }
}
