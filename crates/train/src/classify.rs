//! Gradients of any network's loss against labels, and fine-tuning with them.
//!
//! The network is an [`nn::Network`], so that what works for a decoder's next token works for the
//! class of an image. [`gradients`] is the floor: whoever needs the sensitivity of weights (pruning,
//! Fisher information) takes them from there. [`finetune`] is the loop that goes with it: epochs in a
//! seeded order, AdamW, and optionally a mask of weights that stay zero.

use std::collections::BTreeMap;

use data::Images;
use nn::{Input, Mode, Network, Observed, Weights};
use tensor::{Rng, Tensor, host, ops};

use crate::{
    adamw::AdamW,
    config::OptimizerConfig,
    error::{Error, Result, config},
    gradients::Grads,
    loader::IGNORE,
    params::Params,
    schedule::Schedule,
    transform::{Chain, ClipByNorm, Step, Transform},
};

/// An input with the label of every row of logits; rows labelled [`IGNORE`] do not count.
#[derive(Clone, Copy, Debug)]
pub struct Labelled<'a> {
    /// What goes into the network.
    pub input: Input<'a>,
    /// One label per row of logits: per image, or per token.
    pub labels: &'a [u32],
}

impl Labelled<'_> {
    /// Rows that count.
    pub fn counted(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE).count()
    }
}

/// Mean cross-entropy in nats per counted row, as a scalar that can be backpropagated, and what
/// batch normalisations saw (in [`Mode::Train`]).
///
/// # Errors
/// Labels that do not fit the rows or the classes; from the network.
pub fn loss(
    network: &dyn Network,
    weights: &dyn Weights,
    batch: &Labelled<'_>,
    mode: Mode,
) -> Result<(Tensor<1>, Vec<Observed>)> {
    let classes = network.classes();
    if let Some(label) = batch.labels.iter().find(|&&l| l != IGNORE && l as usize >= classes) {
        return Err(config("labels", format!("{label} is none of the {classes} classes")));
    }
    let (logits, observed) = match mode {
        Mode::Train => network.train(weights, &batch.input)?,
        Mode::Evaluate => (network.predict(weights, &batch.input)?, Vec::new()),
    };
    let [rows, _] = logits.dims();
    if rows != batch.labels.len() {
        let reason = format!("{} labels for {rows} rows of logits", batch.labels.len());
        return Err(config("labels", reason));
    }
    Ok((ops::cross_entropy(logits, batch.labels, Some(IGNORE)), observed))
}

/// Mean loss over the counted rows of all batches; its gradients with respect to the trainable
/// parameters (see [`Params::set_trainable`]) are added to `grads`. Batches weigh as much as they
/// have counted rows, so that accumulation equals one large batch.
///
/// # Errors
/// As [`loss`].
pub fn gradients(
    network: &dyn Network,
    params: &Params,
    batches: &[Labelled<'_>],
    mode: Mode,
    grads: &mut Grads,
) -> Result<(f64, Vec<Observed>)> {
    let total: usize = batches.iter().map(Labelled::counted).sum();
    let (mut mean, mut seen) = (0.0, Vec::new());
    for batch in batches {
        let share = batch.counted() as f64 / total.max(1) as f64;
        if share == 0.0 {
            continue;
        }
        let (loss, observed) = loss(network, params, batch, mode)?;
        mean += share * f64::from(host::read(&loss, |v| v[0]));
        seen.extend(observed);
        let scaled = if share == 1.0 { loss } else { loss.mul_scalar(share as f32) };
        params.backward(&scaled, grads);
    }
    Ok((mean, seen))
}

/// Which weights of a matrix are kept, by tensor name, in its row-major order.
#[derive(Clone, Debug, Default)]
pub struct Mask {
    kept: BTreeMap<String, Vec<bool>>,
}

impl Mask {
    /// Keeps what is not zero in the parameters called `names`.
    ///
    /// # Errors
    /// A name that is not there.
    pub fn of_zeros<'n>(params: &Params, names: impl IntoIterator<Item = &'n str>) -> Result<Self> {
        let mut mask = Mask::default();
        for name in names {
            let kept = params.read(name, |values| values.iter().map(|v| *v != 0.0).collect())?;
            mask.kept.insert(name.to_string(), kept);
        }
        Ok(mask)
    }

    /// Keeps the weights of `name` where `kept` says so.
    pub fn insert(&mut self, name: &str, kept: Vec<bool>) {
        self.kept.insert(name.to_string(), kept);
    }

    /// Zeroes what is not kept.
    ///
    /// # Errors
    /// A name that is not there, or another number of weights.
    pub fn apply(&self, params: &mut Params) -> Result<()> {
        for (name, kept) in &self.kept {
            self.check(params, name, kept)?;
            params.write(name, |values| clear(values, kept))?;
        }
        Ok(())
    }

    fn check(&self, params: &Params, name: &str, kept: &[bool]) -> Result<()> {
        let count: usize = params.shape(name)?.iter().product();
        if count == kept.len() {
            return Ok(());
        }
        let (expected, found) = (format!("a mask of {count} weights"), format!("{}", kept.len()));
        Err(Error::Shape { name: name.to_string(), expected, found })
    }
}

fn clear(values: &mut [f32], kept: &[bool]) {
    for (value, kept) in values.iter_mut().zip(kept) {
        if !kept {
            *value = 0.0;
        }
    }
}

/// Zeroes the gradients of masked weights. Before AdamW in a chain: a weight that is zero and gets no
/// gradient has no moments and no decay, so it stays exactly zero.
impl Transform for Mask {
    fn name(&self) -> &'static str {
        "mask"
    }

    fn update(&mut self, _step: &Step, params: &mut Params, grads: &mut Grads) -> Result<()> {
        for (name, kept) in &self.kept {
            if let Some(gradient) = grads.get_mut(name) {
                self.check(params, name, kept)?;
                clear(gradient, kept);
            }
        }
        Ok(())
    }
}

/// How [`finetune`] trains.
#[derive(Clone, Debug)]
pub struct Finetune {
    /// Optimiser steps.
    pub steps: u64,
    /// Images per step.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// The shape of the learning rate over time.
    pub schedule: Schedule,
    /// Largest global norm of the gradient; 0: no limit.
    pub clip_norm: f64,
    /// Batch statistics in batch normalisation, whose running statistics follow; otherwise they
    /// stay as they are.
    pub mode: Mode,
    /// Seed of the order of images.
    pub seed: u64,
}

/// Trains `params` on labelled images; returns the loss of every step. Masked weights are zeroed
/// first and stay zero.
///
/// # Errors
/// Images that the network does not take, options that cannot work, divergence.
pub fn finetune(
    network: &dyn Network,
    params: &mut Params,
    images: &Images,
    mask: Option<&Mask>,
    options: &Finetune,
) -> Result<Vec<f64>> {
    let Some(spec) = network.images() else {
        return Err(config("images", format!("a {} network takes tokens", network.family())));
    };
    let [channels, height, width] = images.shape;
    if [channels, height, width] != [spec.channels, spec.height, spec.width] || images.is_empty() {
        let (found, wanted) = (images.shape, [spec.channels, spec.height, spec.width]);
        let reason = format!("{} images of {found:?}; the network takes {wanted:?}", images.len());
        return Err(config("images", reason));
    }
    let batch = options.batch.min(images.len());
    if batch == 0 {
        return Err(config("batch", "is 0"));
    }
    let optimizer = OptimizerConfig {
        learning_rate: options.learning_rate,
        weight_decay: options.weight_decay,
        ..OptimizerConfig::default()
    };
    let mut links: Vec<Box<dyn Transform>> = Vec::new();
    if let Some(mask) = mask {
        mask.apply(params)?;
        links.push(Box::new(mask.clone()));
    }
    links.push(Box::new(ClipByNorm::new(options.clip_norm)));
    links.push(Box::new(AdamW::from_config(&optimizer)?));
    let mut chain = Chain::new(links);
    let (mut losses, mut order) = (Vec::new(), Vec::new());
    for index in 0..options.steps {
        if order.len() < batch {
            let epoch = index.wrapping_mul(batch as u64) / images.len() as u64;
            let mut rng = Rng::stream(options.seed, &format!("images/{epoch}"));
            order = rng.permutation(images.len());
        }
        let chosen = order.split_off(order.len() - batch);
        let pixels = images.normalised(&chosen, &spec.mean, &spec.deviation)?;
        let labels: Vec<u32> =
            chosen.iter().filter_map(|&i| images.labels.get(i).copied()).collect();
        let shape = [chosen.len(), channels, height, width];
        let input = Input::Images { pixels: &pixels, shape };
        let mut grads = Grads::new();
        let batch = Labelled { input, labels: &labels };
        let (loss, observed) = gradients(network, params, &[batch], options.mode, &mut grads)?;
        if !loss.is_finite() {
            return Err(Error::Diverged { step: index + 1, what: format!("the loss is {loss}") });
        }
        let learning_rate = options.learning_rate * options.schedule.factor(index);
        let step = Step { index, total: options.steps, learning_rate };
        chain.update(&step, params, &mut grads)?;
        params.observe(&observed)?;
        losses.push(loss);
    }
    Ok(losses)
}
