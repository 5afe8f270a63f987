//! RTN: round to nearest. Data-free; the baseline of every other quantiser.
//!
//! Each group of a row gets its grid from its own range and every weight its nearest code.

use crate::Result;
use crate::block::BlockJob;
use crate::grid::{
    Granularity, Grid, GridOptions, GroupGrid, Matrix, effective_group, encode, min_max,
};
use rayon::prelude::*;
use std::collections::BTreeMap;
use store::packed::{QuantizedMatrix, Stored};

/// Options of RTN: none beyond the grid.
#[derive(
    Debug,
    Clone,
    Default,
    PartialEq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::Args,
)]
pub struct RtnOptions {}

/// Quantises `matrix` (`[out, in]`) by rounding to nearest.
pub fn quantize(matrix: &Matrix, grid: &Grid, options: &GridOptions) -> QuantizedMatrix {
    let group_size = effective_group(options, matrix.in_features);
    let grids = group_grids(matrix, grid, options, group_size);
    encode(matrix, grid, group_size, &grids)
}

/// Quantises every planned layer of a block.
pub fn quantize_block(job: &mut BlockJob<'_>) -> Result<()> {
    for layer in job.sets.iter().flatten() {
        let Some(options) = &layer.grid else { continue };
        let matrix = job.matrix(&layer.name)?;
        let quantized = quantize(&matrix, &job.grid(options)?, options);
        job.hand_in(&layer.name, &matrix, Stored::Grid(quantized), None, BTreeMap::new())?;
    }
    Ok(())
}

/// The grids of all groups, `[out, groups]` row-major.
pub fn group_grids(
    matrix: &Matrix,
    grid: &Grid,
    options: &GridOptions,
    group_size: usize,
) -> Vec<GroupGrid> {
    if options.granularity == Granularity::Tensor {
        let (low, high) = min_max(&matrix.values);
        return vec![grid.from_range(low, high); matrix.out_features];
    }
    matrix
        .values
        .par_chunks(matrix.in_features)
        .flat_map_iter(|row| row.chunks(group_size).map(|group| grid.find(group)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(out: usize, width: usize, seed: u64) -> Matrix {
        let mut rng = tensor::Rng::new(seed);
        Matrix::new(out, width, (0..out * width).map(|_| rng.normal() as f32).collect()).unwrap()
    }

    #[test]
    fn error_is_at_most_half_a_step() {
        let matrix = random(5, 48, 1);
        for symmetric in [false, true] {
            for (granularity, groups) in
                [(Granularity::Group, 3), (Granularity::Channel, 1), (Granularity::Tensor, 1)]
            {
                let options = GridOptions {
                    group_size: 16,
                    symmetric,
                    granularity,
                    bits: 4,
                    ..Default::default()
                };
                let grid = Grid::new(&options).unwrap();
                let quantized = quantize(&matrix, &grid, &options);
                assert_eq!(quantized.scales.len(), 5 * groups);
                let back = quantized.dequantize();
                for (i, (a, b)) in matrix.values.iter().zip(&back).enumerate() {
                    let scale = quantized.scales[i / 48 * groups + (i % 48) / (48 / groups)];
                    // Half a step, and half a step more at the upper end of a rounded-down range.
                    assert!((a - b).abs() <= scale * 0.51, "{i}: {a} {b} {scale}");
                }
            }
        }
    }

    #[test]
    fn per_tensor_uses_one_scale() {
        let matrix = random(4, 8, 2);
        let options = GridOptions { granularity: Granularity::Tensor, ..Default::default() };
        let quantized = quantize(&matrix, &Grid::new(&options).unwrap(), &options);
        assert!(quantized.scales.windows(2).all(|w| w[0] == w[1]));
    }

    #[test]
    fn ragged_last_group_is_kept() {
        let matrix = random(2, 20, 3);
        let options = GridOptions { group_size: 16, bits: 8, ..Default::default() };
        let quantized = quantize(&matrix, &Grid::new(&options).unwrap(), &options);
        assert_eq!(quantized.scales.len(), 4);
        let (error, norm) = matrix.squared_error(&quantized.dequantize());
        assert!(error / norm < 1e-4);
    }
}
