//! Networks whose linear layers are rounded to nearest at the moment they compute: what a schedule
//! costs, without writing it. Nothing is kept, so any number of schedules fit into memory.

use crate::Result;
use crate::grid::{Grid, GridOptions, Matrix, ScaleType};
use crate::rtn;
use nn::{Decoder, Leaf, Model, Name, Weights};
use std::collections::BTreeMap;
use tensor::{Device, Tensor, host, ops};

/// `base` with some linear layers on integer grids, by module name.
pub struct Rounded {
    base: Box<dyn Weights + Send + Sync>,
    grids: BTreeMap<String, GridOptions>,
    scale_type: ScaleType,
}

impl Rounded {
    /// Rounds the modules of `grids`; the rest is as in `base`.
    pub fn new(
        base: Box<dyn Weights + Send + Sync>,
        grids: BTreeMap<String, GridOptions>,
        scale_type: ScaleType,
    ) -> Self {
        Self { base, grids, scale_type }
    }

    /// The same weights under other grids.
    pub fn set(&mut self, grids: BTreeMap<String, GridOptions>) {
        self.grids = grids;
    }
}

/// The values of a linear layer rounded to nearest.
///
/// # Errors
/// NaN or infinite weights, by layer.
pub fn round(
    name: &Name,
    values: Vec<f32>,
    options: &GridOptions,
    scale_type: ScaleType,
) -> Result<Vec<f32>> {
    let matrix = Matrix::new(name.out_features(), name.in_features(), values)?;
    matrix.check_finite(&name.module)?;
    let grid = Grid { scale_type, ..Grid::new(options)? };
    Ok(rtn::quantize(&matrix, &grid, options).dequantize())
}

impl Weights for Rounded {
    fn linear(&self, name: &Name, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        if !self.grids.contains_key(&name.module) {
            return self.base.linear(name, x);
        }
        nn::weights::check_input(name, &x)?;
        let bias = if name.bias { Some(self.vector(name, Leaf::Bias)?) } else { None };
        Ok(ops::linear(x, self.matrix(name)?, bias))
    }

    fn matrix(&self, name: &Name) -> nn::Result<Tensor<2>> {
        let matrix = self.base.matrix(name)?;
        let Some(options) = self.grids.get(&name.module) else { return Ok(matrix) };
        let values = round(name, host::into_vec(matrix), options, self.scale_type)
            .map_err(nn::Error::external)?;
        Ok(host::from_vec(values, name.shape, &self.device()))
    }

    fn vector(&self, name: &Name, leaf: Leaf) -> nn::Result<Tensor<1>> {
        self.base.vector(name, leaf)
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> nn::Result<Tensor<2>> {
        self.base.embed(name, ids)
    }

    fn device(&self) -> Device {
        self.base.device()
    }
}

/// `model` with the modules of `grids` rounded to nearest.
///
/// # Errors
/// When the checkpoint cannot be opened again.
pub fn rounded_model(
    model: &Model,
    grids: BTreeMap<String, GridOptions>,
    scale_type: ScaleType,
) -> Result<Model> {
    let Model { decoder, weights, checkpoint } = Model::from_checkpoint(model.checkpoint.clone())?;
    let weights = Box::new(Rounded::new(weights, grids, scale_type));
    Ok(Model { decoder, weights, checkpoint })
}

/// The network without some of its blocks: what pruning the same blocks would leave.
pub fn without_blocks(decoder: &Decoder, skipped: &[usize]) -> Decoder {
    fn keep<T>(items: &mut Vec<T>, skipped: &[usize]) {
        let mut index = 0;
        items.retain(|_| {
            index += 1;
            !skipped.contains(&(index - 1))
        });
    }
    let mut rest = decoder.clone();
    keep(&mut rest.blocks, skipped);
    keep(&mut rest.config.windows, skipped);
    rest.config.num_hidden_layers = rest.blocks.len();
    rest
}
