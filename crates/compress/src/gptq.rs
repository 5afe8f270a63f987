//! GPTQ: quantise one input column after the other and let the columns not yet quantised make up
//! for the error (Frantar et al. 2022, arXiv 2210.17323).
//!
//! This file is the method: options, weight and Hessian in, codes out, and what it does to a block.
//! `factor` is the Hessian's factor, [`sweep`] the walk over columns with its compensation, which
//! other quantisers use with their own rule for replacing columns, `grids` that rule for integer
//! grids with groups along the input.

use crate::block::{BlockJob, INPUT_POINTS, INPUT_STAGES, REPORT_TOKENS};
use crate::grid::{Grid, GridOptions, GroupGrid, Matrix, assemble, effective_group};
use crate::rtn;
use crate::statistics::{Gram, Statistics, TokenSample, Wanted};
use crate::{Error, Result};
use nn::{Name, Stage, Taps};
use std::collections::BTreeMap;
use store::packed::{QuantizedMatrix, Stored};

mod factor;
mod grids;
pub mod sweep;

pub use factor::Factor;
use grids::{InputGroupState, InputGroups};

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
    /// Weights that are exactly zero stay exactly zero, as after pruning (rounding to nearest always
    /// keeps them; GPTQ's compensation does not)
    #[arg(long)]
    pub keep_zeros: bool,
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
            keep_zeros: false,
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

/// A quantised layer and what it cost.
#[derive(Debug)]
pub struct GptqResult {
    /// Codes, scales, zeros.
    pub matrix: QuantizedMatrix,
    /// `Σ Err²  = tr((W - Q) H_damped (W - Q)ᵀ)`; GPTQ's own report is half of it.
    pub loss: f64,
}

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
    factor.check_width(layer, width)?;
    let grid = &Grid { mse: grid.mse || options.mse, ..*grid };
    let group_size = effective_group(grid_options, width);
    let groups = width.div_ceil(group_size);
    let per_tensor = grid_options.granularity == crate::grid::Granularity::Tensor;
    // Grids that are known beforehand: static groups, or one grid for the whole tensor.
    let fixed: Option<Vec<GroupGrid>> = (options.static_groups || per_tensor).then(|| {
        let mut alive = matrix.clone();
        for row in alive.values.chunks_mut(width) {
            for &column in factor.dead() {
                row[column] = 0.0;
            }
        }
        rtn::group_grids(&alive, grid, grid_options, group_size)
    });
    let quantizer = InputGroups {
        factor,
        grid,
        group_size,
        groups,
        stale: options.stale_group_grid,
        fixed: fixed.is_some(),
    };
    let rows = sweep::chunk_rows(1);
    let mut codes = vec![0u8; out * width];
    let mut grids =
        fixed.clone().unwrap_or_else(|| vec![GroupGrid { scale: 1.0, zero: 0.0 }; out * groups]);
    let mut states: Vec<InputGroupState<'_>> = codes
        .chunks_mut(rows * width)
        .zip(grids.chunks_mut(rows * groups))
        .map(|(codes, grids)| InputGroupState::new(codes, grids))
        .collect();
    let loss = sweep::sweep(matrix, factor, &quantizer, &mut states, rows, &options.into());
    let contiguous = factor.keeps_order() || quantizer.fixed || groups == 1;
    let group_index = (!contiguous).then(|| {
        let mut index = vec![0u32; width];
        for position in 0..width {
            index[factor.column(position)] = (position / group_size) as u32;
        }
        index
    });
    let matrix = assemble(grid, out, width, group_size, codes, &grids, group_index);
    Ok(GptqResult { matrix, loss })
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
        let sample = collected.sample.as_ref();
        quantize_set(job, &planned, collected.gram, sample, options, &BTreeMap::new())?;
    }
    job.run_stage(Stage::Contract, &mut Taps::none())
}

/// Quantises linears that read the same input, whose Gram matrix is `gram`, and hands them in.
/// `notes` go to the details of each.
///
/// # Errors
/// A Hessian that cannot be factorised (unless rounding is the answer to that), naming the layer.
pub fn quantize_set(
    job: &mut BlockJob<'_>,
    planned: &[(&Name, &GridOptions)],
    gram: Option<Gram>,
    sample: Option<&TokenSample>,
    options: &GptqOptions,
    notes: &BTreeMap<String, serde_json::Value>,
) -> Result<()> {
    let Some((first, _)) = planned.first() else { return Ok(()) };
    let first = &first.module;
    let Some(gram) = gram else {
        return Err(Error::layer(first, "no calibration token reached this layer"));
    };
    let (width, tokens) = (gram.width(), gram.tokens());
    if tokens < width {
        job.warnings.push(format!(
            "{first}: {tokens} calibration tokens for {width} inputs: the Hessian has at most rank \
             {tokens} and lives on its damping; more or longer samples would help"
        ));
    }
    let hessian = gram.into_hessian();
    let factor = match Factor::of_hessian(first, hessian, width, tokens, options) {
        Ok(factor) => Some(factor),
        Err(error) if options.on_failure == OnFailure::Rtn => {
            job.warnings.push(format!("{error}; rounded to nearest instead"));
            None
        }
        Err(error) => return Err(error),
    };
    for &(name, grid_options) in planned {
        let matrix = job.matrix(name)?;
        let grid = job.grid(grid_options)?;
        let mut details = notes.clone();
        let quantized = match &factor {
            Some(factor) => {
                let result = quantize(&name.module, &matrix, factor, &grid, grid_options, options)?;
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
        job.hand_in(name, &matrix, Stored::Grid(quantized), sample, details)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
