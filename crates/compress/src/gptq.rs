//! GPTQ: quantise one input column after the other and let the columns not yet quantised make up
//! for the error (Frantar et al. 2022, arXiv 2210.17323).
//!
//! With `H = 2 X Xᵀ / tokens` damped and `H⁻¹ = Uᵀ U`, column `i` is rounded, its error divided
//! by `U[i,i]`, and row `i` of `U` carries it to the columns on its right. Rows of the weight are
//! independent, so they are processed in chunks, one per task; inside a chunk a block of columns
//! is kept transposed, so that every step runs over a contiguous vector of rows. Errors of a
//! finished block reach the rest of the row as one matrix product.
//!
//! This file is the mathematics: weight and Gram matrix in, codes out. Collecting the Gram matrix
//! is the runner's business.

use crate::block::{BlockJob, INPUT_POINTS, INPUT_STAGES, REPORT_TOKENS};
use crate::grid::{Grid, GridOptions, GroupGrid, Matrix, assemble, effective_group};
use crate::rtn;
use crate::statistics::{Gram, Statistics, Wanted};
use crate::{Error, Result};
use nn::{Stage, Taps};
use rayon::prelude::*;
use std::collections::BTreeMap;
use store::packed::{QuantizedMatrix, Stored};
use tensor::kernels::{Matrix as View, Output, matmul_serial};
use tensor::linalg::Precision;

/// Options of GPTQ.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct GptqOptions {
    /// Quantise columns in the order of decreasing activation energy
    #[arg(long)]
    pub act_order: bool,
    /// Fix the grids of all groups before quantising (keeps groups contiguous under --act-order)
    #[arg(long)]
    pub static_groups: bool,
    /// Damping, as a fraction of the mean of the Hessian's diagonal
    #[arg(long, default_value_t = 0.01)]
    pub damping: f64,
    /// Columns quantised between two lazy updates
    #[arg(long, default_value_t = 128)]
    pub block_size: usize,
    /// Search the clipping of every group's range for the smallest error
    #[arg(long)]
    pub mse: bool,
    /// Precision of the Hessian's factorisation: f64 or f32
    #[arg(long, value_enum, default_value_t = Factorization::F64)]
    pub factorization: Factorization,
    /// Compute the grid of a group that starts inside a block from weights not yet updated by that
    /// block (bit comparison with the reference code)
    #[arg(long)]
    pub stale_group_grid: bool,
    /// What to do when a Hessian cannot be factorised: `rtn` rounds that layer to nearest with a warning
    #[arg(long, value_enum, default_value_t = OnFailure::Error)]
    pub on_failure: OnFailure,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self {
            act_order: false,
            static_groups: false,
            damping: 0.01,
            block_size: 128,
            mse: false,
            factorization: Factorization::F64,
            stale_group_grid: false,
            on_failure: OnFailure::Error,
        }
    }
}

/// Floating-point type of the Hessian's factorisation.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Factorization {
    /// Double precision.
    #[default]
    F64,
    /// Single precision: half the memory and time; may need more damping.
    F32,
}

/// What happens when a Hessian cannot be factorised.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// Stop with an error that names the layer.
    #[default]
    Error,
    /// Round that layer to nearest and warn.
    Rtn,
}

impl GptqOptions {
    /// Refuses options that contradict each other.
    pub fn check(&self, grid: &GridOptions) -> Result<()> {
        if self.static_groups && grid.group_size == 0 {
            return Err(Error::Options(
                "static groups need groups: give --group-size, or drop --static-groups".into(),
            ));
        }
        if self.block_size == 0 {
            return Err(Error::Options("block size must be at least 1; 128 is usual".into()));
        }
        if !(self.damping > 0.0 && self.damping <= 1.0) {
            return Err(Error::Options(format!(
                "damping = {} must lie in (0, 1]; 0.01 is usual",
                self.damping
            )));
        }
        Ok(())
    }
}

/// What the linears that read the same input share: column order and factor of the Hessian.
#[derive(Debug)]
pub struct Factor {
    /// Position -> original column; `None` means as stored.
    order: Option<Vec<usize>>,
    /// Original columns that no token excites (`diag H = 0`).
    dead: Vec<usize>,
    /// Upper factor `U` with `H⁻¹ = Uᵀ U`, `[in, in]` row-major, in the processing order.
    upper: Vec<f32>,
    /// Value added to the diagonal.
    damping: f64,
    width: usize,
}

impl Factor {
    /// Factorises the Hessian of `gram` (`[in, in]`).
    pub fn new(layer: &str, gram: &Gram, options: &GptqOptions) -> Result<Self> {
        Self::of_hessian(layer, gram.hessian(), gram.width(), gram.tokens(), options)
    }

    /// As [`Factor::new`], from the Hessian itself: a large layer's is held once, not twice.
    fn of_hessian(
        layer: &str,
        mut hessian: Vec<f64>,
        width: usize,
        tokens: usize,
        options: &GptqOptions,
    ) -> Result<Self> {
        if let Some(bad) = (0..width).find(|&i| !hessian[i * width + i].is_finite()) {
            return Err(Error::layer(
                layer,
                format!(
                    "activations of input {bad} are NaN or infinite; the model overflows on the \
                     calibration text"
                ),
            ));
        }
        let dead: Vec<usize> = (0..width).filter(|&i| hessian[i * width + i] == 0.0).collect();
        if dead.len() == width {
            return Err(Error::layer(
                layer,
                "no calibration token excites any input; give calibration text".to_string(),
            ));
        }
        for &i in &dead {
            hessian[i * width + i] = 1.0;
        }
        let order = options.act_order.then(|| {
            let mut order: Vec<usize> = (0..width).collect();
            order.sort_by(|&a, &b| {
                hessian[b * width + b].total_cmp(&hessian[a * width + a]).then(a.cmp(&b))
            });
            order
        });
        if let Some(order) = &order {
            let source = hessian;
            hessian = Vec::with_capacity(width * width);
            for &row in order {
                hessian.extend(order.iter().map(|&column| source[row * width + column]));
            }
        }
        let precision = match options.factorization {
            Factorization::F64 => Precision::F64,
            Factorization::F32 => Precision::F32,
        };
        let factored =
            tensor::linalg::inverse_cholesky_upper(&hessian, width, options.damping, precision)
                .map_err(|error| {
                    Error::layer(
                        layer,
                        format!(
                            "{error}; the Hessian of {width} inputs was made from {} tokens: use \
                             more or longer calibration samples, raise --damping, or pass \
                             --on-failure rtn",
                            tokens
                        ),
                    )
                })?;
        let (damping, upper) = (factored.damping, factored.upper.into_f32());
        Ok(Self { order, dead, upper, damping, width })
    }

    /// Original column at a position of the processing order.
    #[inline]
    fn column(&self, position: usize) -> usize {
        self.order.as_ref().map_or(position, |order| order[position])
    }

    /// Value that was added to the Hessian's diagonal.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// Number of inputs that no calibration token excites.
    pub fn dead_columns(&self) -> usize {
        self.dead.len()
    }
}

/// A quantised layer and what it cost.
#[derive(Debug)]
pub struct GptqResult {
    /// Codes, scales, zeros.
    pub matrix: QuantizedMatrix,
    /// `Σ Err²  = tr((W - Q) H_damped (W - Q)ᵀ)`; GPTQ's own report is half of it.
    pub loss: f64,
}

/// Rows processed together by one task; a multiple of the widest vector.
const ROWS: usize = 64;

/// Quantises `matrix` (`[out, in]`) under the Hessian that `factor` holds.
pub fn quantize(
    layer: &str,
    matrix: &Matrix,
    factor: &Factor,
    grid: &Grid,
    grid_options: &GridOptions,
    options: &GptqOptions,
) -> Result<GptqResult> {
    let (out, width) = (matrix.out_features, matrix.in_features);
    if width != factor.width {
        return Err(Error::layer(
            layer,
            format!("weight has {width} inputs but the Hessian has {}", factor.width),
        ));
    }
    let grid = &Grid { mse: grid.mse || options.mse, ..*grid };
    let group_size = effective_group(grid_options, width);
    let groups = width.div_ceil(group_size);
    let per_tensor = grid_options.granularity == crate::grid::Granularity::Tensor;
    // Grids that are known beforehand: static groups, or one grid for the whole tensor.
    let fixed: Option<Vec<GroupGrid>> = (options.static_groups || per_tensor).then(|| {
        let mut alive = matrix.clone();
        for row in alive.values.chunks_mut(width) {
            for &column in &factor.dead {
                row[column] = 0.0;
            }
        }
        rtn::group_grids(&alive, grid, grid_options, group_size)
    });
    let plan = Plan {
        factor,
        grid,
        group_size,
        groups,
        block_size: options.block_size,
        stale: options.stale_group_grid,
        fixed: fixed.as_deref(),
    };
    let mut codes = vec![0u8; out * width];
    let mut grids = vec![GroupGrid { scale: 1.0, zero: 0.0 }; out * groups];
    let losses: Vec<f64> = codes
        .par_chunks_mut(ROWS * width)
        .zip(grids.par_chunks_mut(ROWS * groups))
        .zip(matrix.values.par_chunks(ROWS * width))
        .enumerate()
        .map(|(chunk, ((codes, grids), values))| plan.chunk(chunk * ROWS, values, codes, grids))
        .collect();
    let contiguous = factor.order.is_none() || fixed.is_some() || groups == 1;
    let group_index = (!contiguous).then(|| {
        let mut index = vec![0u32; width];
        for position in 0..width {
            index[factor.column(position)] = (position / group_size) as u32;
        }
        index
    });
    let matrix = assemble(grid, out, width, group_size, codes, &grids, group_index);
    Ok(GptqResult { matrix, loss: losses.iter().sum() })
}

/// Quantises one block, set after set in the order in which they compute: every set sees inputs
/// that the already quantised sets (and blocks) produce.
pub fn quantize_block(job: &mut BlockJob<'_>, options: &GptqOptions) -> Result<()> {
    let total = job.calibration.tokens();
    for (set, layers) in job.sets.iter().enumerate() {
        let (point, stage) = (INPUT_POINTS[set], INPUT_STAGES[set]);
        let planned = layers.iter().filter_map(|layer| Some((&layer.name, layer.grid.as_ref()?)));
        let planned: Vec<_> = planned.collect();
        if planned.is_empty() {
            job.run_stage(stage, &mut Taps::none())?;
            continue;
        }
        let wanted =
            Wanted { gram: true, absolute_mean: false, sample: Some((total, REPORT_TOKENS)) };
        let mut statistics = Statistics::new([(point, wanted)]);
        job.run_stage(stage, &mut Taps::one(&mut statistics))?;
        let collected = statistics.take(point).unwrap_or_default();
        let first = &planned[0].0.module;
        let Some(gram) = collected.gram else {
            return Err(Error::layer(first, "no calibration token reached this layer"));
        };
        let (width, tokens) = (gram.width(), gram.tokens());
        let hessian = gram.into_hessian();
        let factor = match Factor::of_hessian(first, hessian, width, tokens, options) {
            Ok(factor) => Some(factor),
            Err(error) if options.on_failure == OnFailure::Rtn => {
                job.warnings.push(format!("{error}; rounded to nearest instead"));
                None
            }
            Err(error) => return Err(error),
        };
        for (name, grid_options) in planned {
            let matrix = job.matrix(name)?;
            let grid = job.grid(grid_options)?;
            let mut details = BTreeMap::new();
            let quantized = match &factor {
                Some(factor) => {
                    let result =
                        quantize(&name.module, &matrix, factor, &grid, grid_options, options)?;
                    details.insert("loss".into(), (result.loss / 2.0).into());
                    details.insert("damping".into(), factor.damping().into());
                    details.insert("dead_columns".into(), factor.dead_columns().into());
                    result.matrix
                }
                None => {
                    details.insert("fallback".into(), "rtn".into());
                    rtn::quantize(&matrix, &grid, grid_options)
                }
            };
            let sample = collected.sample.as_ref();
            job.hand_in(name, &matrix, Stored::Grid(quantized), sample, details)?;
        }
    }
    job.run_stage(Stage::Contract, &mut Taps::none())
}

/// Everything a chunk of rows needs.
struct Plan<'a> {
    factor: &'a Factor,
    grid: &'a Grid,
    group_size: usize,
    groups: usize,
    block_size: usize,
    stale: bool,
    fixed: Option<&'a [GroupGrid]>,
}

impl Plan<'_> {
    /// Quantises up to [`ROWS`] rows; returns their share of `Σ Err²`.
    fn chunk(
        &self,
        first_row: usize,
        values: &[f32],
        codes: &mut [u8],
        grids: &mut [GroupGrid],
    ) -> f64 {
        let width = self.factor.width;
        let rows = values.len() / width;
        // The working copy is transposed, [in, rows], in processing order.
        let mut work = vec![0f32; width * rows];
        for (row, values) in values.chunks_exact(width).enumerate() {
            for position in 0..width {
                work[position * rows + row] = values[self.factor.column(position)];
            }
        }
        if !self.factor.dead.is_empty() {
            let mut is_dead = vec![false; width];
            self.factor.dead.iter().for_each(|&column| is_dead[column] = true);
            for position in 0..width {
                if is_dead[self.factor.column(position)] {
                    work[position * rows..(position + 1) * rows].fill(0.0);
                }
            }
        }
        if let Some(fixed) = self.fixed {
            grids.copy_from_slice(&fixed[first_row * self.groups..][..rows * self.groups]);
        }
        let mut errors = vec![0f32; self.block_size.min(width) * rows];
        let mut scales = vec![1f32; rows];
        let mut zeros = vec![0f32; rows];
        let mut column_codes = vec![0f32; rows];
        let mut snapshot = Vec::new();
        let mut loss = 0f64;
        let max_code = self.grid.max_code();
        let mut start = 0;
        while start < width {
            let end = self.block_end(start);
            if self.stale {
                snapshot.clear();
                snapshot.extend_from_slice(&work[start * rows..]);
            }
            for position in start..end {
                let column = self.factor.column(position);
                let group = if self.fixed.is_some() {
                    column / self.group_size
                } else {
                    position / self.group_size
                };
                if self.fixed.is_none() && position % self.group_size == 0 {
                    let last = (position + self.group_size).min(width);
                    let source = if self.stale {
                        &snapshot[(position - start) * rows..(last - start) * rows]
                    } else {
                        &work[position * rows..last * rows]
                    };
                    self.find_grids(source, rows, group, grids);
                }
                for row in 0..rows {
                    let grid = grids[row * self.groups + group];
                    (scales[row], zeros[row]) = (grid.scale, grid.zero);
                }
                let diagonal = self.factor.upper[position * width + position];
                let (head, tail) = work.split_at_mut((position + 1) * rows);
                let current = &mut head[position * rows..];
                let error = &mut errors[(position - start) * rows..(position - start + 1) * rows];
                loss += quantize_column(
                    current,
                    &scales,
                    &zeros,
                    max_code,
                    diagonal,
                    error,
                    &mut column_codes,
                );
                for (row, &code) in column_codes.iter().enumerate() {
                    codes[row * width + column] = code as u8;
                }
                let upper =
                    &self.factor.upper[position * width + position + 1..position * width + end];
                spread_error(&mut tail[..upper.len() * rows], error, upper);
            }
            if end < width {
                // work[end.., :] -= U[start..end, end..]ᵀ · Err   ([rest, rows])
                let block = end - start;
                matmul_serial(
                    [width - end, rows, block],
                    View::columns(&self.factor.upper[start * width + end..], width),
                    View::rows(&errors[..block * rows], rows),
                    -1.0,
                    Output { data: &mut work[end * rows..], row: rows, accumulate: true },
                );
            }
            start = end;
        }
        loss
    }

    /// End of the block of columns that starts at `start`. A block is cut short where a group
    /// begins inside it and ends behind it, so that the group's grid sees fully updated weights
    /// whatever the block size.
    fn block_end(&self, start: usize) -> usize {
        let width = self.factor.width;
        let end = (start + self.block_size).min(width);
        if self.stale || self.fixed.is_some() {
            return end;
        }
        let first = (start / self.group_size + 1) * self.group_size;
        (first..end)
            .step_by(self.group_size)
            .find(|&group| (group + self.group_size).min(width) > end)
            .unwrap_or(end)
    }

    /// Grids of one group for all rows of the chunk; `source` is `[group, rows]`.
    fn find_grids(&self, source: &[f32], rows: usize, group: usize, grids: &mut [GroupGrid]) {
        let mut values = vec![0f32; source.len() / rows];
        for row in 0..rows {
            for (value, column) in values.iter_mut().zip(source.chunks_exact(rows)) {
                *value = column[row];
            }
            grids[row * self.groups + group] = self.grid.find(&values);
        }
    }
}

tensor::simd! {
    /// Rounds one column (`current`, one value per row) to its grid, replaces it by the grid value,
    /// writes codes and `error = (w - q) / diagonal`; returns `Σ error²`.
    fn quantize_column(
        current: &mut [f32],
        scales: &[f32],
        zeros: &[f32],
        max_code: f32,
        diagonal: f32,
        error: &mut [f32],
        codes: &mut [f32]
    ) -> f64 {
        let n = current.len();
        let (scales, zeros, error, codes) =
            (&scales[..n], &zeros[..n], &mut error[..n], &mut codes[..n]);
        for i in 0..n {
            let w = current[i];
            let code = ((w / scales[i]).round_ties_even() + zeros[i]).max(0.0).min(max_code);
            let value = (code - zeros[i]) * scales[i];
            codes[i] = code;
            error[i] = (w - value) / diagonal;
            current[i] = value;
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
    fn spread_error(work: &mut [f32], error: &[f32], upper: &[f32]) {
        for (column, &factor) in work.chunks_exact_mut(error.len()).zip(upper) {
            for (w, &e) in column.iter_mut().zip(error) {
                *w -= factor * e;
            }
        }
    }
}

#[cfg(test)]
mod tests;
