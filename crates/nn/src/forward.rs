//! The forward function of all decoders: embedding, blocks in five stages, head.
//!
//! A block can be stopped between its stages, which is how calibration sees the input of one set of
//! linear layers before it changes them and goes on. Attention itself is in `attend`.

use tensor::{Tensor, ops};

use crate::config::{NormKind, Placement};
use crate::{Batch, Decoder, Error, KvCache, Leaf, Name, Point, Result, Role, Site, Taps, Weights};

/// Where in the sequences the rows of a pass are, and the cache they extend.
pub struct Context<'a> {
    /// Geometry of the rows.
    pub batch: Batch,
    /// Position of the first row of every sequence.
    pub start: usize,
    /// Keys and values of earlier positions; one sequence only.
    pub cache: Option<&'a mut KvCache>,
    pub(crate) positions: Vec<u32>,
}

impl<'a> Context<'a> {
    /// Whole sequences, starting at position 0.
    pub fn new(batch: Batch) -> Self {
        Self::at(batch, 0, None)
    }

    /// The next `rows` positions of the one sequence whose past is in `cache`.
    pub fn cached(cache: &'a mut KvCache, rows: usize) -> Self {
        let start = cache.len();
        Self::at(Batch::new(1, rows), start, Some(cache))
    }

    fn at(batch: Batch, start: usize, cache: Option<&'a mut KvCache>) -> Self {
        let one = (start..start.saturating_add(batch.length)).map(|p| p as u32);
        let positions = (0..batch.sequences).flat_map(|_| one.clone()).collect();
        Context { batch, start, cache, positions }
    }
}

/// The five stages of a block; each leaves the input of the next set of linear layers (see
/// [`Decoder::linear_sets`]) in [`BlockState::x`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// First norm; leaves the input of q, k, v.
    Norm1,
    /// q, k, v and attention; leaves the input of the output projection.
    Attend,
    /// Output projection, residual, second norm; leaves the input of gate/up or fc1.
    Project,
    /// First half of the MLP; leaves the input of down or fc2.
    Expand,
    /// Second half of the MLP, residual; leaves the block's output in `resid` and `x`.
    Contract,
}

impl Stage {
    /// The stages in order.
    pub const ALL: [Stage; 5] =
        [Stage::Norm1, Stage::Attend, Stage::Project, Stage::Expand, Stage::Contract];
}

/// What flows between the stages of a block.
#[derive(Clone, Debug)]
pub struct BlockState {
    /// The residual stream, `[rows, hidden]`.
    pub resid: Tensor<2>,
    /// The branch: after a stage, the input of the next linear layers.
    pub x: Tensor<2>,
}

impl BlockState {
    /// The state of a block about to start from `resid`.
    pub fn new(resid: Tensor<2>) -> Self {
        BlockState { x: resid.clone(), resid }
    }
}

impl Decoder {
    /// Residual stream entering block 0 for `tokens` (row-major by sequence), `[rows, hidden]`.
    ///
    /// # Errors
    /// Token ids or positions the network does not have, by value.
    pub fn embed(
        &self,
        w: &dyn Weights,
        tokens: &[u32],
        ctx: &Context<'_>,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        self.check_tokens(tokens, ctx)?;
        let mut x = w.embed(&self.embed, tokens)?;
        if let Some(project) = &self.project_in {
            x = w.linear(project, x)?;
        }
        if let Some(scale) = self.config.embed_scale {
            x = x * scale;
        }
        x = taps.at(Site::outer(Point::Embed), &ctx.batch, x)?;
        if let Some(position) = &self.position {
            let offset = position.shape[0] - self.config.max_position_embeddings;
            let rows: Vec<u32> = ctx.positions.iter().map(|p| p + offset as u32).collect();
            x = x + w.embed(position, &rows)?;
        }
        Ok(x)
    }

    fn check_tokens(&self, tokens: &[u32], ctx: &Context<'_>) -> Result<()> {
        if tokens.is_empty() || tokens.len() != ctx.batch.rows() {
            return Err(Error::Input(format!(
                "{} tokens do not fill {} sequences of {}",
                tokens.len(),
                ctx.batch.sequences,
                ctx.batch.length
            )));
        }
        let vocab = self.config.vocab_size;
        if let Some((at, id)) = tokens.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
            return Err(Error::Input(format!(
                "token id {id} at index {at} is outside the vocabulary of {vocab}; was the text \
                 encoded with this model's tokenizer?"
            )));
        }
        let end = ctx.start.saturating_add(ctx.batch.length);
        let limit = self.max_positions();
        if end > limit {
            return Err(Error::Input(format!(
                "positions up to {end} are asked for, but the network has {limit}; use shorter \
                 windows"
            )));
        }
        Ok(())
    }

    /// The number of positions that can be computed at all: the context length with learned
    /// positions; rotary networks also compute beyond the length they were trained for.
    pub fn max_positions(&self) -> usize {
        match self.position {
            Some(_) => self.config.max_position_embeddings,
            None => self.config.max_position_embeddings.max(1 << 20),
        }
    }

    /// Runs block `i` on the residual stream `x` `[rows, hidden]`.
    ///
    /// # Errors
    /// From the weights or the taps, or shapes that do not fit.
    pub fn block(
        &self,
        i: usize,
        w: &dyn Weights,
        x: Tensor<2>,
        ctx: &mut Context<'_>,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let mut state = BlockState::new(x);
        for stage in Stage::ALL {
            state = self.stage(i, stage, w, state, ctx, taps)?;
        }
        Ok(state.resid)
    }

    /// Runs one stage of block `i`.
    ///
    /// # Errors
    /// As [`Decoder::block`].
    pub fn stage(
        &self,
        i: usize,
        stage: Stage,
        w: &dyn Weights,
        state: BlockState,
        ctx: &mut Context<'_>,
        taps: &mut Taps<'_>,
    ) -> Result<BlockState> {
        let names = self.names(i)?;
        let batch = ctx.batch;
        let BlockState { mut resid, x } = state;
        let shape = [batch.rows(), self.config.hidden_size];
        if resid.dims() != shape || x.dims()[0] != shape[0] {
            return Err(Error::Shape {
                name: format!("block {i}, {stage:?}: residual stream"),
                found: resid.dims().to_vec(),
                expected: shape.to_vec(),
            });
        }
        let placement = self.config.placement;
        let x = match stage {
            Stage::Norm1 => {
                resid = taps.at(Site::block(i, Point::ResidPre), &batch, resid)?;
                let x = match placement {
                    Placement::Post => resid.clone(),
                    _ => self.norm(&names.norm1, w, resid.clone())?,
                };
                taps.at(Site::block(i, Point::AttnIn), &batch, x)?
            }
            Stage::Attend => self.attend(i, w, x, ctx, taps)?,
            Stage::Project => {
                let mut out = w.linear(&names.output, x)?;
                if let Some(post) = &names.norm1_post {
                    out = self.norm(post, w, out)?;
                }
                let out = taps.at(Site::block(i, Point::AttnOut), &batch, out)?;
                let before = resid.clone();
                resid = resid + out;
                if placement == Placement::Post {
                    resid = self.norm(&names.norm1, w, resid)?;
                }
                if placement != Placement::Parallel {
                    resid = taps.at(Site::block(i, Point::ResidMid), &batch, resid)?;
                }
                let x = match placement {
                    Placement::Post => resid.clone(),
                    Placement::Parallel => self.norm(&names.norm2, w, before)?,
                    _ => self.norm(&names.norm2, w, resid.clone())?,
                };
                taps.at(Site::block(i, Point::MlpIn), &batch, x)?
            }
            Stage::Expand => self.expand(i, w, x, &batch, taps)?,
            Stage::Contract => {
                let mut out = w.linear(&names.down, x)?;
                if let Some(post) = &names.norm2_post {
                    out = self.norm(post, w, out)?;
                }
                let out = taps.at(Site::block(i, Point::MlpOut), &batch, out)?;
                resid = resid + out;
                if placement == Placement::Post {
                    resid = self.norm(&names.norm2, w, resid)?;
                }
                resid = taps.at(Site::block(i, Point::ResidPost), &batch, resid)?;
                resid.clone()
            }
        };
        Ok(BlockState { resid, x })
    }

    /// The first half of block `i`'s MLP: from its input to the input of down or fc2.
    ///
    /// # Errors
    /// From the weights or the taps.
    pub fn expand(
        &self,
        i: usize,
        w: &dyn Weights,
        x: Tensor<2>,
        batch: &Batch,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let names = self.names(i)?;
        let activation = self.config.activation;
        let post = match &names.gate {
            Some(gate) => {
                let pre = w.linear(gate, x.clone())?;
                let pre = taps.at(Site::block(i, Point::MlpPre), batch, pre)?;
                let up = w.linear(&names.up, x)?;
                let up = taps.at(Site::block(i, Point::MlpPreLinear), batch, up)?;
                match activation {
                    ops::Activation::Silu => ops::swiglu(pre, up),
                    ops::Activation::GeluTanh => ops::gelu_glu(pre, up),
                    other => ops::activate(pre, other) * up,
                }
            }
            None => {
                let pre = w.linear(&names.up, x)?;
                let pre = taps.at(Site::block(i, Point::MlpPre), batch, pre)?;
                ops::activate(pre, activation)
            }
        };
        taps.at(Site::block(i, Point::MlpPost), batch, post)
    }

    /// The whole MLP of block `i` on its own: from the input of gate/up to the output of down,
    /// without norms and residual. What a search over an MLP's weights compares.
    ///
    /// # Errors
    /// From the weights.
    pub fn mlp(&self, i: usize, w: &dyn Weights, x: Tensor<2>, batch: &Batch) -> Result<Tensor<2>> {
        let post = self.expand(i, w, x, batch, &mut Taps::none())?;
        w.linear(&self.names(i)?.down, post)
    }

    /// The whole attention of block `i` on its own: from the input of q, k, v to the output of the
    /// output projection, without norms and residual.
    ///
    /// # Errors
    /// From the weights.
    pub fn attention(
        &self,
        i: usize,
        w: &dyn Weights,
        x: Tensor<2>,
        ctx: &mut Context<'_>,
    ) -> Result<Tensor<2>> {
        let z = self.attend(i, w, x, ctx, &mut Taps::none())?;
        w.linear(&self.names(i)?.output, z)
    }

    /// Applies the norm `name` to `x` `[rows, width]`.
    ///
    /// # Errors
    /// From the weights.
    pub fn norm(&self, name: &Name, w: &dyn Weights, x: Tensor<2>) -> Result<Tensor<2>> {
        let mut gain = w.vector(name, Leaf::Weight)?;
        if name.plus_one {
            gain = gain + 1.0;
        }
        let eps = self.config.norm_eps;
        // Norms on heads are RMSNorms in every family that has them.
        let per_head = matches!(name.role, Role::QueryNorm | Role::KeyNorm);
        Ok(match self.config.norm {
            NormKind::Layer if !per_head => {
                let bias = if name.bias { Some(w.vector(name, Leaf::Bias)?) } else { None };
                ops::layer_norm(x, gain, bias, eps)
            }
            _ => ops::rms_norm(x, gain, eps),
        })
    }

    /// Final norm on the residual stream `x`, `[rows, hidden]`, then the projection to the
    /// embedding width where there is one.
    ///
    /// # Errors
    /// From the weights or the taps.
    pub fn finish(
        &self,
        w: &dyn Weights,
        x: Tensor<2>,
        batch: &Batch,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let mut x = x;
        if let Some(norm) = &self.final_norm {
            x = self.norm(norm, w, x)?;
            x = taps.at(Site::outer(Point::FinalNorm), batch, x)?;
        }
        match &self.project_out {
            Some(project) => w.linear(project, x),
            None => Ok(x),
        }
    }

    /// Logits `[rows, vocab]` of what [`Decoder::finish`] returned.
    ///
    /// # Errors
    /// From the weights or the taps.
    pub fn head_logits(
        &self,
        w: &dyn Weights,
        x: Tensor<2>,
        batch: &Batch,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let mut logits = w.linear(&self.head, x)?;
        if let Some(cap) = self.config.final_softcap {
            logits = (logits / cap).tanh() * cap;
        }
        taps.at(Site::outer(Point::Logits), batch, logits)
    }

    /// Embedding, all blocks, final norm: the input of the head, `[rows, embed_size]`.
    ///
    /// # Errors
    /// As [`Decoder::embed`] and [`Decoder::block`].
    pub fn hidden(
        &self,
        w: &dyn Weights,
        tokens: &[u32],
        ctx: &mut Context<'_>,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let mut x = self.embed(w, tokens, ctx, taps)?;
        for i in 0..self.num_blocks() {
            x = self.block(i, w, x, ctx, taps)?;
        }
        self.finish(w, x, &ctx.batch, taps)
    }

    /// The whole network: logits `[rows, vocab]`.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn logits(
        &self,
        w: &dyn Weights,
        tokens: &[u32],
        ctx: &mut Context<'_>,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let x = self.hidden(w, tokens, ctx, taps)?;
        self.head_logits(w, x, &ctx.batch, taps)
    }
}
