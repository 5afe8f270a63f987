//! Training under masks, on images or on text: what stands between two rounds.
//!
//! AdamW at a constant rate, as in the paper (learning rate 3e-4, batches of 100), with a fresh
//! optimiser every round; with rewinding plain Adam.

use super::iterate::{Finetune, Snapshot};
use super::layers::Place;
use super::masks::Mask;
use super::options::{LayerAdaptivePruningOptions, Rewind};
use super::output::stored_flags;
use crate::{Error, Result};
use nn::{Decoder, Input, Leaf, Network, Observed, Role, Weights};
use std::collections::BTreeMap;
use std::sync::Arc;
use store::Checkpoint;
use tensor::{host, ops, rng::Rng};
use train::config::OptimizerConfig;
use train::loader::{Corpus, Loader};
use train::masks::{KeepMasks, MaskGradients, Masks};
use train::{AdamW, Chain, ClipByNorm, Grads, Params, Step};

/// What is trained on.
pub enum Material<'a> {
    /// Labelled images: `[count, channels, height, width]`, normalised, and their classes.
    Images {
        /// The network.
        network: &'a dyn Network,
        /// Values, row-major.
        pixels: Vec<f32>,
        /// `[count, channels, height, width]`.
        shape: [usize; 4],
        /// The class of every image.
        labels: Vec<u32>,
    },
    /// Text for next-token prediction.
    Text {
        /// The network.
        decoder: &'a Decoder,
        /// Documents.
        corpus: Corpus,
        /// Tokens per window.
        length: usize,
    },
}

/// How it is trained.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Recipe {
    /// Images or windows per step.
    pub batch: usize,
    /// Learning rate.
    pub rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Seed of the order of the data.
    pub seed: u64,
}

impl Recipe {
    /// The recipe that options describe.
    pub fn new(options: &LayerAdaptivePruningOptions, seed: u64) -> Self {
        let weight_decay = if options.rewind == Rewind::None { 0.01 } else { 0.0 };
        Self { batch: options.finetune_batch, rate: options.finetune_rate, weight_decay, seed }
    }
}

/// Trains a network's parameters under masks.
pub struct Trainer<'a> {
    material: Material<'a>,
    recipe: Recipe,
    params: Params,
    places: Vec<Place>,
}

/// The parameters of a network as its weights hold them: everything but running statistics is
/// trainable. Convolutions are matrices `[out, in * height * width]`.
///
/// # Errors
/// A tensor that is not there.
pub fn params(network: &dyn Network, checkpoint: &Checkpoint) -> Result<Params> {
    let mut params = Params::empty();
    for name in network.modules() {
        for leaf in name.leaves() {
            let tensor = name.tensor(leaf);
            let shape = match leaf {
                Leaf::Weight if name.role.is_norm() => vec![name.shape[0]],
                Leaf::Weight if name.transposed => vec![name.shape[1], name.shape[0]],
                Leaf::Weight => name.shape.to_vec(),
                _ => vec![name.shape[0]],
            };
            params.insert(&tensor, &shape, checkpoint.f32(&tensor)?).map_err(train_error)?;
        }
    }
    freeze_statistics(network, &mut params)?;
    Ok(params)
}

/// Running statistics follow the batches, not the gradient.
pub fn freeze_statistics(network: &dyn Network, params: &mut Params) -> Result<()> {
    if network.modules().iter().any(|name| name.role == Role::BatchNorm) {
        let pattern = |text: &str| method::Pattern::new(text).map_err(Error::Options);
        let frozen = [pattern("*running_mean")?, pattern("*running_var")?];
        params.set_trainable(None, &frozen).map_err(train_error)?;
    }
    Ok(())
}

fn train_error(error: train::Error) -> Error {
    Error::Options(error.to_string())
}

impl<'a> Trainer<'a> {
    /// Trains `params` on `material`.
    ///
    /// # Errors
    /// Material that is empty or does not fit.
    pub fn new(
        material: Material<'a>,
        recipe: Recipe,
        params: Params,
        places: &[Place],
    ) -> Result<Self> {
        let refuse = |why: String| Err(Error::Options(format!("nothing to train on: {why}")));
        match &material {
            Material::Images { network, pixels, shape, labels } => {
                if labels.is_empty() || labels.len() != shape[0] {
                    return refuse(format!("{} labels for {} images", labels.len(), shape[0]));
                }
                if pixels.len() != shape.iter().product::<usize>() {
                    return refuse(format!("{} values for images {shape:?}", pixels.len()));
                }
                let classes = network.classes();
                if let Some(label) = labels.iter().find(|l| **l as usize >= classes) {
                    return refuse(format!("label {label}, but the network has {classes} classes"));
                }
            }
            Material::Text { corpus, length, .. } => {
                if corpus.tokens.len() <= *length {
                    return refuse(format!("less than one window of {length} tokens of text"));
                }
            }
        }
        Ok(Self { material, recipe, params, places: places.to_vec() })
    }

    /// The parameters as they are.
    pub fn params(&self) -> &Params {
        &self.params
    }

    fn chain(&self, masks: &Masks) -> Result<Chain> {
        let config = OptimizerConfig {
            learning_rate: self.recipe.rate,
            betas: [0.9, 0.999],
            weight_decay: self.recipe.weight_decay,
            ..OptimizerConfig::default()
        };
        Ok(Chain::new(vec![
            Box::new(MaskGradients(masks.clone())),
            Box::new(ClipByNorm::new(1.0)),
            Box::new(AdamW::from_config(&config).map_err(train_error)?),
            Box::new(KeepMasks(masks.clone())),
        ]))
    }

    /// Trains `steps` steps in the data's order of round `round`; returns the mean loss of the last
    /// tenth.
    ///
    /// # Errors
    /// A loss that is not finite, by step.
    pub fn run(&mut self, masks: &BTreeMap<String, Mask>, steps: u64, round: u32) -> Result<f64> {
        let flags = self.places.iter().filter_map(|(_, name)| {
            Some((name.weight(), stored_flags(name, masks.get(&name.module)?)))
        });
        let masks: Masks = Arc::new(flags.collect());
        train::masks::apply(&masks, &mut self.params).map_err(train_error)?;
        let mut chain = self.chain(&masks)?;
        let mut order = Order::new(&self.material, &self.recipe, round)?;
        let progress = report::Progress::new("train", steps, "steps");
        let (mut sum, mut counted) = (0.0, 0u64);
        for index in 0..steps {
            let mut grads = Grads::new();
            let loss = order.step(&self.material, &mut self.params, &mut grads)?;
            if !loss.is_finite() {
                return Err(Error::Options(format!(
                    "training diverged at step {} (loss {loss}); lower --finetune-rate",
                    index + 1
                )));
            }
            let step = Step { index, total: steps, learning_rate: self.recipe.rate };
            chain.update(&step, &mut self.params, &mut grads).map_err(train_error)?;
            if index >= steps - steps.div_ceil(10) {
                sum += loss;
                counted += 1;
            }
            progress.message(&format!("loss {loss:.4}"));
            progress.inc(1);
        }
        progress.finish();
        Ok(sum / counted.max(1) as f64)
    }
}

/// The order of the data in one round.
enum Order {
    Images { rng: Rng, order: Vec<usize>, next: usize, batch: usize },
    Text { loader: Loader, batch: usize },
}

impl Order {
    fn new(material: &Material<'_>, recipe: &Recipe, round: u32) -> Result<Self> {
        match material {
            Material::Images { labels, .. } => {
                let mut rng = Rng::stream(recipe.seed, &format!("finetune round {round}"));
                let order = rng.permutation(labels.len());
                let batch = recipe.batch.clamp(1, labels.len());
                Ok(Self::Images { rng, order, next: 0, batch })
            }
            Material::Text { corpus, length, .. } => {
                let seed = recipe.seed.wrapping_add(u64::from(round) << 32);
                let loader = Loader::new(vec![(corpus.clone(), None)], *length, 0, seed)
                    .map_err(|_| Error::Options("the training text is too short".into()))?;
                Ok(Self::Text { loader, batch: recipe.batch.max(1) })
            }
        }
    }

    /// Loss and gradients of the next batch.
    fn step(
        &mut self,
        material: &Material<'_>,
        params: &mut Params,
        grads: &mut Grads,
    ) -> Result<f64> {
        match (self, material) {
            (Self::Text { loader, batch }, Material::Text { decoder, .. }) => {
                let batch = loader.batch(*batch);
                train::loss::gradients(decoder, params, &[batch], grads).map_err(train_error)
            }
            (
                Self::Images { rng, order, next, batch },
                Material::Images { network, pixels, shape, labels },
            ) => {
                if *next + *batch > order.len() {
                    rng.shuffle(order);
                    *next = 0;
                }
                let chosen = order.get(*next..*next + *batch).unwrap_or_default();
                *next += *batch;
                let size: usize = shape.iter().skip(1).product();
                let mut batch_pixels = Vec::with_capacity(chosen.len() * size);
                let mut targets = Vec::with_capacity(chosen.len());
                for &i in chosen {
                    batch_pixels.extend_from_slice(
                        pixels.get(i * size..(i + 1) * size).unwrap_or_default(),
                    );
                    targets.extend(labels.get(i));
                }
                let shape = [chosen.len(), shape[1], shape[2], shape[3]];
                let input = Input::Images { pixels: &batch_pixels, shape };
                image_step(*network, params, &input, &targets, grads)
            }
            _ => Err(Error::Options("the training data changed their kind".into())),
        }
    }
}

/// Cross-entropy of one batch of images and its gradients; running statistics follow the batch.
fn image_step(
    network: &dyn Network,
    params: &mut Params,
    input: &Input<'_>,
    targets: &[u32],
    grads: &mut Grads,
) -> Result<f64> {
    let (logits, observed) = network.train(&*params, input)?;
    let loss = ops::cross_entropy(logits, targets, None);
    let value = f64::from(host::read(&loss, |v| v.first().copied().unwrap_or(f32::NAN)));
    params.backward(&loss, grads);
    for seen in &observed {
        follow(params, seen)?;
    }
    Ok(value)
}

fn follow(params: &mut Params, seen: &Observed) -> Result<()> {
    for (leaf, new) in [("running_mean", &seen.mean), ("running_var", &seen.variance)] {
        let name = format!("{}.{leaf}", seen.module);
        params
            .write(&name, |values| {
                for (value, new) in values.iter_mut().zip(new) {
                    *value += seen.momentum * (new - *value);
                }
            })
            .map_err(train_error)?;
    }
    Ok(())
}

impl Finetune for Trainer<'_> {
    fn weights(&self) -> Box<dyn Weights + Sync + '_> {
        Box::new(self.params.constants())
    }

    fn train(&mut self, masks: &BTreeMap<String, Mask>, steps: u64, round: u32) -> Result<f64> {
        self.run(masks, steps, round)
    }

    fn snapshot(&self) -> Snapshot {
        let names: Vec<String> = self.params.names().map(str::to_string).collect();
        names
            .into_iter()
            .filter_map(|name| {
                let values = self.params.read(&name, <[f32]>::to_vec).ok()?;
                Some((name, values))
            })
            .collect()
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        for (name, saved) in snapshot {
            let fits = self
                .params
                .write(name, |values| {
                    let fits = values.len() == saved.len();
                    if fits {
                        values.copy_from_slice(saved);
                    }
                    fits
                })
                .map_err(train_error)?;
            if !fits {
                return Err(Error::layer(name, "the saved round is of another network"));
            }
        }
        Ok(())
    }

    fn identity(&self) -> serde_json::Value {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        match &self.material {
            Material::Images { pixels, shape, labels, .. } => {
                hash.update(format!("images {shape:?}\n"));
                hash.update(bytemuck::cast_slice(pixels));
                hash.update(bytemuck::cast_slice(labels));
            }
            Material::Text { corpus, length, .. } => {
                hash.update(format!("text {length}\n"));
                hash.update(bytemuck::cast_slice(&corpus.tokens));
            }
        }
        let hash: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        serde_json::json!({ "data": hash, "recipe": self.recipe })
    }
}
