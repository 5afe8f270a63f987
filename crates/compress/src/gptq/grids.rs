//! Columns replaced by integer grids whose groups lie along the input, as in ordinary GPTQ.

use super::Factor;
use super::sweep::{ColumnQuantizer, Columns};
use crate::grid::{Grid, GroupGrid};

/// Groups of consecutive columns, each row with its own grid per group.
pub(super) struct InputGroups<'a> {
    pub factor: &'a Factor,
    pub grid: &'a Grid,
    /// Columns per group.
    pub group_size: usize,
    /// Groups per row.
    pub groups: usize,
    /// Grids of groups inside a block come from weights as they were when the block began.
    pub stale: bool,
    /// Grids are known beforehand and belong to original columns.
    pub fixed: bool,
}

/// Codes and grids of one chunk of rows.
pub(super) struct InputGroupState<'a> {
    /// `[rows, in]`, by original column.
    codes: &'a mut [u8],
    /// `[rows, groups]`.
    grids: &'a mut [GroupGrid],
    /// Columns as they were at the start of the block, `[rest, rows]`, and that position.
    snapshot: (usize, Vec<f32>),
    scales: Vec<f32>,
    zeros: Vec<f32>,
    column_codes: Vec<f32>,
}

impl<'a> InputGroupState<'a> {
    /// A chunk whose codes (`[rows, in]`) and grids (`[rows, groups]`) are to be filled.
    pub fn new(codes: &'a mut [u8], grids: &'a mut [GroupGrid]) -> Self {
        let snapshot = (0, Vec::new());
        let (scales, zeros, column_codes) = (Vec::new(), Vec::new(), Vec::new());
        Self { codes, grids, snapshot, scales, zeros, column_codes }
    }
}

impl InputGroups<'_> {
    /// Grids of one group for all rows of the chunk; `source` is `[group, rows]`.
    fn find_grids(
        &self,
        source: &[f32],
        kept: Option<&[bool]>,
        rows: usize,
        group: usize,
        grids: &mut [GroupGrid],
    ) {
        let mut values = vec![0f32; source.len() / rows];
        for row in 0..rows {
            for (value, column) in values.iter_mut().zip(source.chunks_exact(rows)) {
                *value = column[row];
            }
            if let Some(kept) = kept {
                for (value, kept) in values.iter_mut().zip(kept.chunks_exact(rows)) {
                    *value = if kept[row] { 0.0 } else { *value };
                }
            }
            grids[row * self.groups + group] = self.grid.find(&values);
        }
    }
}

impl<'a> ColumnQuantizer for InputGroups<'a> {
    type State = InputGroupState<'a>;

    /// A block is cut short where a group begins inside it and ends behind it, so that the group's
    /// grid sees fully updated weights whatever the block size.
    fn block_end(&self, start: usize, end: usize) -> usize {
        if self.stale || self.fixed {
            return end;
        }
        let first = (start / self.group_size + 1) * self.group_size;
        (first..end)
            .step_by(self.group_size)
            .find(|&group| (group + self.group_size).min(self.factor.width()) > end)
            .unwrap_or(end)
    }

    fn begin_block(&self, state: &mut Self::State, columns: &Columns<'_>) {
        if self.stale {
            state.snapshot.0 = columns.position;
            state.snapshot.1.clear();
            state.snapshot.1.extend_from_slice(columns.values);
        }
    }

    fn replace(&self, state: &mut Self::State, columns: &mut Columns<'_>) {
        let (position, rows) = (columns.position, columns.rows);
        let width = self.factor.width();
        let column = columns.column(0);
        let group = if self.fixed { column } else { position } / self.group_size;
        if !self.fixed && position.is_multiple_of(self.group_size) {
            let length = self.group_size.min(width - position) * rows;
            let source = if self.stale {
                &state.snapshot.1[(position - state.snapshot.0) * rows..][..length]
            } else {
                &columns.values[..length]
            };
            let kept = columns.zeros.map(|zeros| &zeros[..length]);
            self.find_grids(source, kept, rows, group, state.grids);
        }
        state.scales.resize(rows, 1.0);
        state.zeros.resize(rows, 0.0);
        state.column_codes.resize(rows, 0.0);
        for row in 0..rows {
            let grid = state.grids[row * self.groups + group];
            (state.scales[row], state.zeros[row]) = (grid.scale, grid.zero);
        }
        round_column(
            &mut columns.values[..rows],
            &state.scales,
            &state.zeros,
            self.grid.max_code(),
            &mut state.column_codes,
        );
        for (row, &code) in state.column_codes.iter().enumerate() {
            state.codes[row * width + column] = code as u8;
        }
    }
}

tensor::simd! {
    /// Rounds one column (one value per row) to its grids, replaces it by the grid values and
    /// writes the codes.
    fn round_column(
        current: &mut [f32],
        scales: &[f32],
        zeros: &[f32],
        max_code: f32,
        codes: &mut [f32],
    ) {
        let n = current.len();
        let (scales, zeros, codes) = (&scales[..n], &zeros[..n], &mut codes[..n]);
        for i in 0..n {
            let w = current[i];
            let code = ((w / scales[i]).round_ties_even() + zeros[i]).max(0.0).min(max_code);
            codes[i] = code;
            current[i] = (code - zeros[i]) * scales[i];
        }
    }
}
