//! A checkpoint opened for computing: its description and its weights, plain or packed.

use std::path::Path;

use store::Checkpoint;
use store::packed::parse_config;
use tensor::Tensor;

use crate::{Batch, CheckpointWeights, Context, Decoder, Quantized, Result, Taps, Weights};

/// A network and the weights to run it with.
pub struct Model {
    /// The description.
    pub decoder: Decoder,
    /// The weights.
    pub weights: Box<dyn Weights + Send + Sync>,
    /// The checkpoint they come from.
    pub checkpoint: Checkpoint,
}

impl Model {
    /// Opens a model directory or file, plain or quantised; reads no weight yet.
    ///
    /// # Errors
    /// When the checkpoint cannot be read, the architecture is not known, or a tensor is missing or
    /// has another shape than the config says.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_checkpoint(Checkpoint::open(path)?)
    }

    /// As [`Model::open`], for a checkpoint that is open already.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_checkpoint(checkpoint: Checkpoint) -> Result<Self> {
        let decoder = Decoder::from_checkpoint(&checkpoint)?;
        let weights: Box<dyn Weights + Send + Sync> = match parse_config(checkpoint.config()?)? {
            Some(config) => Box::new(Quantized::new(checkpoint.clone(), config)?),
            None => Box::new(CheckpointWeights::new(checkpoint.clone())?),
        };
        Ok(Model { decoder, weights, checkpoint })
    }

    /// Logits `[tokens, vocab]` of `sequences` sequences of equal length, row-major by sequence.
    ///
    /// # Errors
    /// Token ids or lengths the network cannot take, or failing weights.
    pub fn logits(&self, tokens: &[u32], sequences: usize) -> Result<Tensor<2>> {
        self.tapped_logits(tokens, sequences, &mut Taps::none())
    }

    /// As [`Model::logits`], with taps.
    ///
    /// # Errors
    /// As [`Model::logits`], and from the taps.
    pub fn tapped_logits(
        &self,
        tokens: &[u32],
        sequences: usize,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let mut ctx = Context::new(Batch::of(tokens.len(), sequences)?);
        self.decoder.logits(self.weights.as_ref(), tokens, &mut ctx, taps)
    }

    /// The input of the head, `[tokens, embed_size]`: for losses that fuse the head.
    ///
    /// # Errors
    /// As [`Model::logits`].
    pub fn hidden(&self, tokens: &[u32], sequences: usize) -> Result<Tensor<2>> {
        let mut ctx = Context::new(Batch::of(tokens.len(), sequences)?);
        self.decoder.hidden(self.weights.as_ref(), tokens, &mut ctx, &mut Taps::none())
    }
}
