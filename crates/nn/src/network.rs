//! [`Network`]: any architecture as a chain of segments between inputs and logits.
//!
//! A decoder, a residual network and a vision transformer differ in everything but this: rows come
//! in, a list of segments is run one after the other, and rows of logits come out. Whoever wants to
//! know what changing one layer does to the output runs the chain up to the segment that owns the
//! layer once, keeps the [`State`], and repeats only the rest. What segments compute is left to the
//! architectures; taps and stages stay with [`Decoder`], which has them.

use store::Checkpoint;
use tensor::Tensor;

use crate::validate::check_module;
use crate::{Batch, Context, Decoder, Error, Name, Result, Taps, Weights};

/// What goes into a network.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Token ids, row-major by sequence.
    Tokens {
        /// The ids.
        ids: &'a [u32],
        /// Sequences and their length.
        batch: Batch,
    },
    /// Images as the network wants them: resized and normalised already (see [`ImageSpec`]).
    Images {
        /// Values, row-major.
        pixels: &'a [f32],
        /// `[images, channels, height, width]`.
        shape: [usize; 4],
    },
}

impl Input<'_> {
    /// Images or sequences in the input.
    pub fn samples(&self) -> usize {
        match self {
            Input::Tokens { batch, .. } => batch.sequences,
            Input::Images { shape, .. } => shape[0],
        }
    }
}

/// What flows between segments. Cheap to clone: tensors are shared.
#[derive(Clone, Debug)]
pub struct State {
    /// The activation, one row per position: a token, a patch, a pixel or (after pooling) an image.
    pub x: Tensor<2>,
    /// The geometry of the rows: `[sequences, length]` of tokens or patches,
    /// `[images, height, width]` of pixels, `[images]` of pooled features. Its product is the
    /// number of rows.
    pub shape: Vec<usize>,
    /// Whether batch normalisation uses running statistics or those of the batch.
    pub mode: Mode,
    /// With [`Mode::Train`]: the batch statistics that normalisations saw so far, for the update of
    /// their running statistics.
    pub observed: Vec<Observed>,
}

/// How layers that behave differently in training behave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Batch normalisation with running statistics: what a finished network computes.
    #[default]
    Evaluate,
    /// Batch normalisation with the statistics of the batch.
    Train,
}

/// The statistics of one batch at one batch normalisation.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The normalisation's module.
    pub module: String,
    /// Mean of every channel.
    pub mean: Vec<f32>,
    /// Unbiased variance of every channel (what running variances average).
    pub variance: Vec<f32>,
    /// Weight of this batch in the running average.
    pub momentum: f32,
}

impl Observed {
    /// Moves running statistics towards this batch: `(1 - momentum) running + momentum batch`.
    pub fn update(&self, mean: &mut [f32], variance: &mut [f32]) {
        let average = |running: &mut [f32], batch: &[f32]| {
            for (running, batch) in running.iter_mut().zip(batch) {
                *running += self.momentum * (batch - *running);
            }
        };
        average(mean, &self.mean);
        average(variance, &self.variance);
    }
}

impl State {
    /// The state that enters a network in evaluation mode.
    pub fn new(x: Tensor<2>, shape: Vec<usize>) -> Self {
        State { x, shape, mode: Mode::Evaluate, observed: Vec::new() }
    }

    /// This state with another activation of another geometry.
    pub fn with(self, x: Tensor<2>, shape: Vec<usize>) -> Self {
        State { x, shape, ..self }
    }

    /// This state in another mode.
    pub fn mode(self, mode: Mode) -> Self {
        State { mode, ..self }
    }
}

/// The images that a network takes.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageSpec {
    /// Colour channels.
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// What is subtracted from every channel of values in 0..=1; one number per channel.
    pub mean: Vec<f32>,
    /// What it is divided by then; one number per channel.
    pub deviation: Vec<f32>,
    /// Names of the classes, if the config gives them.
    pub labels: Vec<String>,
}

/// A network: a chain of segments over named weights.
pub trait Network: Send + Sync {
    /// The family, as `open_network` lists it.
    fn family(&self) -> &str;

    /// The network's size in a few words.
    fn summary(&self) -> String {
        let classes = self.classes();
        match self.images() {
            Some(ImageSpec { channels, height, width, .. }) => format!(
                "{} segments, images of {channels} x {height} x {width}, {classes} classes",
                self.segments()
            ),
            None => format!("{} segments, {classes} outputs", self.segments()),
        }
    }

    /// Every module that the network reads, in the order of computation; a tied head once.
    fn modules(&self) -> Vec<&Name>;

    /// The layers whose weights can be thinned, quantised or trained as matrices (linear layers and
    /// convolutions; no embeddings, no norms), in the order of computation, each with the segment
    /// that computes it. A layer of [`Network::exit`] stands at index [`Network::segments`]; a head
    /// that is tied to the embedding is not listed.
    fn layers(&self) -> Vec<(usize, Name)>;

    /// Number of segments.
    fn segments(&self) -> usize;

    /// Width of the logits.
    fn classes(&self) -> usize;

    /// The images it takes; `None` for networks of tokens.
    fn images(&self) -> Option<&ImageSpec> {
        None
    }

    /// Turns an input into the state that enters segment 0. Reads embeddings, but no weight of
    /// [`Network::layers`].
    ///
    /// # Errors
    /// An input of the wrong kind or shape, or from the weights.
    fn enter(&self, w: &dyn Weights, input: &Input<'_>) -> Result<State>;

    /// Runs segment `i`.
    ///
    /// # Errors
    /// When there is no such segment, the state does not fit, or from the weights.
    fn segment(&self, i: usize, w: &dyn Weights, state: State) -> Result<State>;

    /// What comes after the last segment: final norm, pooling, head. Logits `[rows, classes]`; rows
    /// are tokens or images.
    ///
    /// # Errors
    /// From the weights.
    fn exit(&self, w: &dyn Weights, state: State) -> Result<Tensor<2>>;

    /// The rest of the chain: segments `from..` and the exit.
    ///
    /// # Errors
    /// As [`Network::segment`] and [`Network::exit`].
    fn finish_from(&self, from: usize, w: &dyn Weights, mut state: State) -> Result<Tensor<2>> {
        for i in from..self.segments() {
            state = self.segment(i, w, state)?;
        }
        self.exit(w, state)
    }

    /// The whole network in evaluation mode.
    ///
    /// # Errors
    /// As [`Network::enter`], [`Network::segment`] and [`Network::exit`].
    fn predict(&self, w: &dyn Weights, input: &Input<'_>) -> Result<Tensor<2>> {
        self.finish_from(0, w, self.enter(w, input)?)
    }

    /// The whole network in training mode, and what its batch normalisations saw.
    ///
    /// # Errors
    /// As [`Network::predict`].
    fn train(&self, w: &dyn Weights, input: &Input<'_>) -> Result<(Tensor<2>, Vec<Observed>)> {
        let mut state = self.enter(w, input)?.mode(Mode::Train);
        for i in 0..self.segments() {
            state = self.segment(i, w, state)?;
        }
        let observed = std::mem::take(&mut state.observed);
        Ok((self.exit(w, state)?, observed))
    }

    /// Checks that every tensor the network reads is in the checkpoint with its shape.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Shape`] naming the first tensor at fault.
    fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.modules().into_iter().try_for_each(|name| check_module(checkpoint, name))
    }
}

/// The error of a segment that is not there.
pub(crate) fn no_segment(i: usize, segments: usize) -> Error {
    Error::Input(format!("there is no segment {i}: the network has {segments}"))
}

/// The error of an input of the wrong kind.
pub(crate) fn wrong_input(family: &str, wants: &str) -> Error {
    Error::Input(format!("a {family} network takes {wants}"))
}

/// The batch of token rows that a state describes.
fn batch(state: &State) -> Result<Batch> {
    match state.shape[..] {
        [sequences, length] => Ok(Batch::new(sequences, length)),
        _ => Err(Error::Shape {
            name: "state of a decoder (sequences, length)".into(),
            found: state.shape.clone(),
            expected: vec![0, 0],
        }),
    }
}

/// Segments are blocks; embedding is the entrance, final norm and head are the exit.
impl Network for Decoder {
    fn family(&self) -> &str {
        self.config.family.model_type()
    }

    fn summary(&self) -> String {
        let c = &self.config;
        format!(
            "{} blocks, hidden size {}, {} heads ({} for keys and values), vocabulary {}",
            c.num_hidden_layers,
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.vocab_size
        )
    }

    fn modules(&self) -> Vec<&Name> {
        self.all_names()
    }

    fn layers(&self) -> Vec<(usize, Name)> {
        let blocks = 0..self.num_blocks();
        let mut layers: Vec<_> =
            blocks.flat_map(|i| self.linears(i).into_iter().map(move |name| (i, name))).collect();
        let end = self.num_blocks();
        layers.extend(self.project_out.iter().map(|name| (end, name.clone())));
        if self.head.module != self.embed.module {
            layers.push((end, self.head.clone()));
        }
        layers
    }

    fn segments(&self) -> usize {
        self.num_blocks()
    }

    fn classes(&self) -> usize {
        self.config.vocab_size
    }

    fn enter(&self, w: &dyn Weights, input: &Input<'_>) -> Result<State> {
        let Input::Tokens { ids, batch } = input else {
            return Err(wrong_input(Network::family(self), "token ids"));
        };
        let x = self.embed(w, ids, &Context::new(*batch), &mut Taps::none())?;
        Ok(State::new(x, vec![batch.sequences, batch.length]))
    }

    fn segment(&self, i: usize, w: &dyn Weights, state: State) -> Result<State> {
        let mut ctx = Context::new(batch(&state)?);
        let x = self.block(i, w, state.x.clone(), &mut ctx, &mut Taps::none())?;
        let shape = state.shape.clone();
        Ok(state.with(x, shape))
    }

    fn exit(&self, w: &dyn Weights, state: State) -> Result<Tensor<2>> {
        let batch = batch(&state)?;
        let x = self.finish(w, state.x, &batch, &mut Taps::none())?;
        self.head_logits(w, x, &batch, &mut Taps::none())
    }

    fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.validate(checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_checkpoint;
    use crate::{Family, Model};
    use tensor::host;

    #[test]
    fn a_decoder_as_a_chain_computes_the_decoder() {
        for family in Family::ALL {
            let dir = tempfile::tempdir().unwrap();
            tiny_checkpoint(dir.path(), family, 3).unwrap();
            let model = Model::open(dir.path()).unwrap();
            let (network, w): (&dyn Network, _) = (&model.decoder, model.weights.as_ref());
            let ids: Vec<u32> = (0..12).map(|i| (i * 7) % 97).collect();
            let input = Input::Tokens { ids: &ids, batch: Batch::new(2, 6) };
            let whole = host::into_vec(model.logits(&ids, 2).unwrap());
            assert_eq!(host::into_vec(network.predict(w, &input).unwrap()), whole, "{family:?}");
            let mut state = network.enter(w, &input).unwrap();
            state = network.segment(0, w, state).unwrap();
            let rest = network.finish_from(1, w, state.clone()).unwrap();
            assert_eq!(host::into_vec(rest), whole, "{family:?}, restarted");
            assert_eq!((state.shape, state.observed.len()), (vec![2, 6], 0));
            assert_eq!((network.segments(), network.classes()), (2, 97));
            let layers = network.layers();
            assert!(layers.iter().all(|(i, name)| name.block.unwrap_or(2) == *i));
            let tied = model.decoder.head.module == model.decoder.embed.module;
            assert_eq!(layers.iter().any(|(_, name)| name.role == crate::Role::Head), !tied);
            network.check(&model.checkpoint).unwrap();
        }
    }

    #[test]
    fn a_decoder_refuses_images() {
        let dir = tempfile::tempdir().unwrap();
        tiny_checkpoint(dir.path(), Family::Llama, 3).unwrap();
        let model = Model::open(dir.path()).unwrap();
        let input = Input::Images { pixels: &[0.0; 12], shape: [1, 3, 2, 2] };
        let error = model.decoder.predict(model.weights.as_ref(), &input).unwrap_err();
        assert!(error.to_string().contains("takes token ids"), "{error}");
        assert_eq!(input.samples(), 1);
    }
}
