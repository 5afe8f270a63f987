//! The full-precision pass over calibration text, block by block, for jobs that look at a network
//! before they decide: scores, error curves, probes.
//!
//! Memory is what the runner's is: the activations at one block boundary (beyond the limit in a
//! file) and what the visitor keeps of one block.

use crate::activations::Activations;
use crate::block::Calibration;
use crate::{Error, Result};
use nn::{Batch, Context, Model, Taps, Weights};
use std::path::{Path, PathBuf};
use tensor::{Tensor, host};

/// The residual stream of all calibration batches at one block boundary.
pub struct Stream<'a> {
    model: &'a Model,
    calibration: &'a Calibration,
    resid: Activations,
    block: usize,
    _scratch: Scratch,
}

impl<'a> Stream<'a> {
    /// The stream entering block 0; beyond `memory` bytes it lies in a file in `scratch`.
    ///
    /// # Errors
    /// Without calibration text, or when the network cannot take it.
    pub fn new(
        model: &'a Model,
        calibration: &'a Calibration,
        memory: u64,
        scratch: &Path,
    ) -> Result<Self> {
        if calibration.tokens() == 0 {
            return Err(Error::Options(
                "this needs calibration text, and there is none: give --calibration and --samples"
                    .into(),
            ));
        }
        let mut resid = Activations::new(calibration.batches(), memory, scratch);
        for index in 0..calibration.batches() {
            let (tokens, batch) = calibration.batch(index);
            resid.put(index, host::into_vec(embed(model, tokens, batch)?))?;
        }
        let scratch = Scratch(scratch.to_path_buf());
        Ok(Self { model, calibration, resid, block: 0, _scratch: scratch })
    }

    /// Index of the block that the stream is about to enter.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Runs that block over all batches, with taps, and moves on.
    ///
    /// # Errors
    /// From the network or the taps.
    pub fn advance(&mut self, taps: &mut Taps<'_>) -> Result<()> {
        for index in 0..self.calibration.batches() {
            let batch = self.calibration.batch(index).1;
            let x = rows(self.resid.take(index)?, batch, &self.model.weights.device());
            let mut context = Context::new(batch);
            let weights = self.model.weights.as_ref();
            let x = self.model.decoder.block(self.block, weights, x, &mut context, taps)?;
            self.resid.put(index, host::into_vec(x))?;
        }
        self.block += 1;
        Ok(())
    }
}

/// How far predictions move when weights change, measured from the block where they change: a few
/// calibration windows whose final hidden states at full precision are kept.
pub struct Probe<'a> {
    model: &'a Model,
    windows: Calibration,
    /// Residual stream at the boundary, by batch.
    entry: Vec<Vec<f32>>,
    /// Input of the head at full precision, by batch.
    reference: Vec<Tensor<2>>,
    block: usize,
}

impl<'a> Probe<'a> {
    /// Prepares the first `windows` windows of `calibration`.
    ///
    /// # Errors
    /// Without calibration text, when the network cannot take it, or when its predictions are not
    /// finite.
    pub fn new(model: &'a Model, calibration: &Calibration, windows: usize) -> Result<Self> {
        let count = windows.min(calibration.windows());
        if count == 0 {
            return Err(Error::Options(
                "measuring the effect of a layer needs calibration text: give --calibration, and \
                 at least 1 window"
                    .into(),
            ));
        }
        let ids = calibration.ids().get(..count * calibration.length()).unwrap_or_default();
        let windows = Calibration::new(ids.to_vec(), calibration.length())?;
        let (mut entry, mut reference) = (Vec::new(), Vec::new());
        for index in 0..windows.batches() {
            let (tokens, batch) = windows.batch(index);
            let x = embed(model, tokens, batch)?;
            entry.push(host::into_vec(x.clone()));
            reference.push(suffix(model, model.weights.as_ref(), 0, x, batch)?);
        }
        let finite = |x: &Tensor<2>| host::read(x, |x| x.iter().all(|v| v.is_finite()));
        if !reference.iter().all(finite) {
            return Err(Error::Options(
                "the model's predictions on the calibration text are NaN or infinite".into(),
            ));
        }
        Ok(Self { model, windows, entry, reference, block: 0 })
    }

    /// Tokens that are compared.
    pub fn tokens(&self) -> usize {
        self.windows.tokens()
    }

    /// Mean `KL(full precision || changed)` per token, in nats, with `weights` from the current
    /// block on. Blocks before it are at full precision.
    ///
    /// # Errors
    /// From the network.
    pub fn divergence(&self, weights: &dyn Weights) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for (index, (entry, reference)) in self.entry.iter().zip(&self.reference).enumerate() {
            let batch = self.windows.batch(index).1;
            let x = rows(entry.clone(), batch, &weights.device());
            let hidden = suffix(self.model, weights, self.block, x, batch)?;
            let base = self.model.weights.as_ref();
            let (kl, rows) = eval::divergence(&self.model.decoder, base, reference, &hidden)?;
            sum += kl;
            count += rows;
        }
        Ok(sum / count.max(1) as f64)
    }

    /// Moves the boundary behind the current block, at full precision.
    ///
    /// # Errors
    /// From the network.
    pub fn advance(&mut self) -> Result<()> {
        for (index, entry) in self.entry.iter_mut().enumerate() {
            let batch = self.windows.batch(index).1;
            let weights = self.model.weights.as_ref();
            let x = rows(std::mem::take(entry), batch, &weights.device());
            let mut context = Context::new(batch);
            let decoder = &self.model.decoder;
            let x = decoder.block(self.block, weights, x, &mut context, &mut Taps::none())?;
            *entry = host::into_vec(x);
        }
        self.block += 1;
        Ok(())
    }
}

fn embed(model: &Model, tokens: &[u32], batch: Batch) -> Result<Tensor<2>> {
    let context = Context::new(batch);
    let weights = model.weights.as_ref();
    Ok(model.decoder.embed(weights, tokens, &context, &mut Taps::none())?)
}

/// From the residual stream entering block `first` to the input of the head.
fn suffix(
    model: &Model,
    weights: &dyn Weights,
    first: usize,
    mut x: Tensor<2>,
    batch: Batch,
) -> Result<Tensor<2>> {
    let mut context = Context::new(batch);
    for block in first..model.decoder.num_blocks() {
        x = model.decoder.block(block, weights, x, &mut context, &mut Taps::none())?;
    }
    Ok(model.decoder.finish(weights, x, &batch, &mut Taps::none())?)
}

fn rows(values: Vec<f32>, batch: Batch, device: &tensor::Device) -> Tensor<2> {
    let width = values.len() / batch.rows().max(1);
    host::from_vec(values, [batch.rows(), width], device)
}

/// The directory of the spill file, removed when it is empty.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Only an empty directory goes; it may hold somebody else's files.
        let _ = std::fs::remove_dir(&self.0);
    }
}
