//! Columns replaced by integer grids whose groups lie along the output, inside one input channel.
//!
//! Such a group holds weights of one column only, so its grid is found when its column is reached,
//! from weights that have received every error so far, and any column order leaves the parameters
//! of a group side by side.

use crate::gptq::sweep::{ColumnQuantizer, Columns, SweepOptions, chunk_rows, sweep};
use crate::gptq::{Factor, GptqOptions};
use crate::grid::{Granularity, Grid, GridOptions, GroupGrid, Matrix, assemble, effective_group};
use store::packed::QuantizedMatrix;

/// Groups of consecutive rows within every column.
struct OutputGroups<'a> {
    grid: &'a Grid,
    /// Rows per group.
    group_size: usize,
    /// The one grid of all weights, where a scale covers the whole tensor.
    fixed: Option<GroupGrid>,
}

/// Codes and grids of one chunk of rows, by original column.
struct ChunkCodes {
    /// `[in, rows]`.
    codes: Vec<u8>,
    /// `[in, groups of the chunk]`.
    grids: Vec<GroupGrid>,
}

impl ColumnQuantizer for OutputGroups<'_> {
    type State = ChunkCodes;

    fn replace(&self, state: &mut Self::State, columns: &mut Columns<'_>) {
        let (rows, column) = (columns.rows, columns.column(0));
        let groups = rows.div_ceil(self.group_size);
        let max_code = self.grid.max_code();
        let values = columns.values[..rows].chunks_mut(self.group_size);
        let codes = state.codes[column * rows..][..rows].chunks_mut(self.group_size);
        let grids = &mut state.grids[column * groups..][..groups];
        for ((values, codes), grid) in values.zip(codes).zip(grids) {
            *grid = self.fixed.unwrap_or_else(|| self.grid.find(values));
            for (w, code) in values.iter_mut().zip(codes) {
                let chosen = grid.code(*w, max_code);
                *code = chosen as u8;
                *w = grid.value(chosen);
            }
        }
    }
}

/// GPTQ with groups along the output. Returns the grid of the transposed weight, `[in, out]`, and
/// `Σ E²` (see [`sweep`]).
///
/// # Errors
/// A weight of another width than the Hessian's.
pub fn quantize(
    layer: &str,
    matrix: &Matrix,
    factor: &Factor,
    grid: &Grid,
    grid_options: &GridOptions,
    options: &GptqOptions,
) -> crate::Result<(QuantizedMatrix, f64)> {
    let (out, width) = (matrix.out_features, matrix.in_features);
    factor.check_width(layer, width)?;
    let grid = &Grid { mse: grid.mse || options.mse, ..*grid };
    let group_size = effective_group(grid_options, out);
    let fixed = (grid_options.granularity == Granularity::Tensor).then(|| {
        let (low, high) = crate::grid::min_max(&matrix.values);
        grid.from_range(low, high)
    });
    let quantizer = OutputGroups { grid, group_size, fixed };
    let chunk = chunk_rows(group_size);
    let mut states: Vec<ChunkCodes> = (0..out)
        .step_by(chunk)
        .map(|first| {
            let rows = chunk.min(out - first);
            let groups = rows.div_ceil(group_size);
            ChunkCodes {
                codes: vec![0; width * rows],
                grids: vec![GroupGrid { scale: 1.0, zero: 0.0 }; width * groups],
            }
        })
        .collect();
    let sweeping = SweepOptions::from(options);
    let loss = sweep(matrix, factor, &quantizer, &mut states, chunk, &sweeping);
    let (mut codes, mut grids) = (Vec::new(), Vec::new());
    if let [only] = &mut states[..] {
        (codes, grids) = (std::mem::take(&mut only.codes), std::mem::take(&mut only.grids));
    } else {
        codes.reserve_exact(width * out);
        grids.reserve_exact(width * out.div_ceil(group_size));
        for column in 0..width {
            for state in &states {
                let (rows, groups) = (state.codes.len() / width, state.grids.len() / width);
                codes.extend_from_slice(&state.codes[column * rows..][..rows]);
                grids.extend_from_slice(&state.grids[column * groups..][..groups]);
            }
        }
    }
    Ok((assemble(grid, width, out, group_size, codes, &grids, None), loss))
}
