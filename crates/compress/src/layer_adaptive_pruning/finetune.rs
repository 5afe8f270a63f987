//! Training under masks, on images or on text: what stands between two rounds.
//!
//! AdamW at a constant rate, as in the paper (learning rate 3e-4, batches of 100), with a fresh
//! optimiser every round; with rewinding plain Adam. Masks are those of `train::classify`: pruned
//! weights get no gradient, gather no moments, and stay zero.

use super::iterate::{Finetune, Snapshot};
use super::layers::Place;
use super::masks::Mask;
use super::options::{LayerAdaptivePruningOptions, Rewind};
use super::output::stored_flags;
use crate::{Error, Result};
use data::Images;
use nn::{Decoder, Mode, Network, Weights};
use std::collections::BTreeMap;
use train::config::OptimizerConfig;
use train::loader::{Corpus, Loader};
use train::schedule::Decay;
use train::{AdamW, Chain, ClipByNorm, Grads, Params, Schedule, Step, classify};

/// What is trained on.
pub enum Material<'a> {
    /// Labelled images.
    Images {
        /// The network.
        network: &'a dyn Network,
        /// Images and their classes.
        images: Images,
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
    /// Learning rate, constant.
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

    /// The seed of a round: the order of the data must not depend on what ran before.
    fn of_round(&self, round: u32) -> u64 {
        self.seed.wrapping_add(u64::from(round) << 32)
    }
}

/// Trains a network's parameters under masks.
pub struct Trainer<'a> {
    material: Material<'a>,
    recipe: Recipe,
    params: Params,
    places: Vec<Place>,
}

fn train_error(error: train::Error) -> Error {
    Error::Options(error.to_string())
}

impl<'a> Trainer<'a> {
    /// Trains `params` on `material`; `places` are the layers that masks may cover.
    ///
    /// # Errors
    /// Material that is empty.
    pub fn new(
        material: Material<'a>,
        recipe: Recipe,
        params: Params,
        places: &[Place],
    ) -> Result<Self> {
        let missing = match &material {
            Material::Images { images, .. } if images.is_empty() => Some("no images".to_string()),
            Material::Text { corpus, length, .. } if corpus.tokens.len() <= *length => {
                Some(format!("less than one window of {length} tokens of text"))
            }
            _ => None,
        };
        match missing {
            Some(why) => Err(Error::Options(format!("nothing to train on: {why}"))),
            None => Ok(Self { material, recipe, params, places: places.to_vec() }),
        }
    }

    /// The parameters as they are.
    pub fn params(&self) -> &Params {
        &self.params
    }

    fn masks(&self, masks: &BTreeMap<String, Mask>) -> classify::Mask {
        let mut all = classify::Mask::default();
        for (_, name) in &self.places {
            if let Some(mask) = masks.get(&name.module) {
                all.insert(&name.weight(), stored_flags(name, mask));
            }
        }
        all
    }
}

impl Finetune for Trainer<'_> {
    fn weights(&self) -> Box<dyn Weights + Sync + '_> {
        Box::new(self.params.constants())
    }

    fn train(&mut self, masks: &BTreeMap<String, Mask>, steps: u64, round: u32) -> Result<f64> {
        let mask = self.masks(masks);
        let seed = self.recipe.of_round(round);
        let losses = match &self.material {
            Material::Images { network, images } => {
                let (decay, floor) = (Decay::Constant, 0.0);
                let schedule = Schedule { decay, warmup_steps: 0, total_steps: steps, floor };
                let options = classify::Finetune {
                    steps,
                    batch: self.recipe.batch,
                    learning_rate: self.recipe.rate,
                    weight_decay: self.recipe.weight_decay,
                    schedule,
                    clip_norm: 1.0,
                    mode: Mode::Train,
                    seed,
                };
                classify::finetune(*network, &mut self.params, images, Some(&mask), &options)
                    .map_err(train_error)?
            }
            Material::Text { decoder, corpus, length } => {
                let loader = Loader::new(vec![(corpus.clone(), None)], *length, 0, seed)
                    .map_err(|_| Error::Options("the training text is too short".into()))?;
                text(decoder, &mut self.params, loader, &mask, &self.recipe, steps)
                    .map_err(train_error)?
            }
        };
        let last = losses.len() - losses.len().div_ceil(10);
        let tail = losses.get(last..).unwrap_or_default();
        Ok(tail.iter().sum::<f64>() / tail.len().max(1) as f64)
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
            let fits = |values: &mut [f32]| {
                let fits = values.len() == saved.len();
                if fits {
                    values.copy_from_slice(saved);
                }
                fits
            };
            if !self.params.write(name, fits).map_err(train_error)? {
                return Err(Error::layer(name, "the saved round is of another network"));
            }
        }
        Ok(())
    }

    fn identity(&self) -> serde_json::Value {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        match &self.material {
            Material::Images { images, .. } => {
                hash.update(format!("images {:?}\n", images.shape));
                hash.update(&images.pixels);
                hash.update(bytemuck::cast_slice(&images.labels));
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

/// Next-token training under a mask; returns the loss of every step.
fn text(
    decoder: &Decoder,
    params: &mut Params,
    mut loader: Loader,
    mask: &classify::Mask,
    recipe: &Recipe,
    steps: u64,
) -> train::Result<Vec<f64>> {
    let config = OptimizerConfig {
        learning_rate: recipe.rate,
        weight_decay: recipe.weight_decay,
        ..OptimizerConfig::default()
    };
    mask.apply(params)?;
    let mut chain = Chain::new(vec![
        Box::new(mask.clone()),
        Box::new(ClipByNorm::new(1.0)),
        Box::new(AdamW::from_config(&config)?),
    ]);
    let progress = report::Progress::new("train", steps, "steps");
    let mut losses = Vec::new();
    for index in 0..steps {
        let batch = loader.batch(recipe.batch.max(1));
        let mut grads = Grads::new();
        let loss = train::loss::gradients(decoder, params, &[batch], &mut grads)?;
        if !loss.is_finite() {
            let what = format!("the loss is {loss}; lower the learning rate");
            return Err(train::Error::Diverged { step: index + 1, what });
        }
        let step = Step { index, total: steps, learning_rate: recipe.rate };
        chain.update(&step, params, &mut grads)?;
        losses.push(loss);
        progress.message(&format!("loss {loss:.4}"));
        progress.inc(1);
    }
    progress.finish();
    Ok(losses)
}

#[cfg(test)]
mod tests {
    use super::super::layers::select;
    use super::super::masks::Ranking;
    use super::*;
    use nn::testing::tiny_checkpoint;
    use nn::{Family, Mlp, Model, ResNet};
    use tensor::Rng;

    fn half(network: &dyn Network, weights: &dyn Weights) -> (Vec<Place>, BTreeMap<String, Mask>) {
        let places = select(network, &[], &[], false).unwrap();
        let mask = |name: &nn::Name| {
            let values = tensor::host::into_vec(weights.matrix(name).unwrap());
            Ranking::new(&name.module, &values).unwrap().mask(values.len() / 2)
        };
        let masks = places.iter().map(|(_, n)| (n.module.clone(), mask(n))).collect();
        (places, masks)
    }

    fn zeros_hold(trainer: &Trainer<'_>, masks: &BTreeMap<String, Mask>) {
        let snapshot = trainer.snapshot();
        for (_, name) in &trainer.places {
            let flags = stored_flags(name, &masks[&name.module]);
            let values = &snapshot[&name.weight()];
            let fits = flags.iter().zip(values).all(|(keep, v)| *keep || v.to_bits() == 0);
            assert!(fits, "{}", name.module);
            assert!(values.iter().any(|v| *v != 0.0));
        }
    }

    fn bars(shape: [usize; 3], count: usize) -> Images {
        let values: usize = shape.iter().product();
        let mut rng = Rng::new(8);
        let labels: Vec<u32> = (0..count).map(|_| rng.below(2) as u32).collect();
        let mut pixels = Vec::new();
        for label in &labels {
            pixels.extend((0..values).map(|_| (90 * *label as usize + rng.below(120)) as u8));
        }
        Images { shape, pixels, labels }
    }

    #[test]
    fn images_train_under_masks_and_rounds_repeat() {
        let mlp = Mlp::of_widths(&[16, 12, 2]).unwrap();
        let resnet = ResNet::cifar(8, 2).unwrap();
        let networks: [(&dyn Network, [usize; 3]); 2] = [(&mlp, [1, 4, 4]), (&resnet, [3, 32, 32])];
        for (network, shape) in networks {
            let params = Params::fresh(network, 3).unwrap();
            let (places, masks) = half(network, &params.constants());
            let images = bars(shape, 24);
            let recipe = Recipe { batch: 8, rate: 3e-3, weight_decay: 0.01, seed: 1 };
            let material = Material::Images { network, images };
            let mut trainer = Trainer::new(material, recipe, params, &places).unwrap();
            let start = trainer.snapshot();
            let first = trainer.train(&masks, 4, 1).unwrap();
            zeros_hold(&trainer, &masks);
            let after = trainer.snapshot();
            trainer.restore(&start).unwrap();
            assert_eq!(trainer.train(&masks, 4, 1).unwrap(), first);
            assert_eq!(trainer.snapshot(), after);
            trainer.restore(&start).unwrap();
            trainer.train(&masks, 4, 2).unwrap();
            assert!(trainer.snapshot() != after, "another round sees another order");
        }
    }

    #[test]
    fn text_trains_under_masks_also_where_weights_are_stored_transposed() {
        for family in [Family::Llama, Family::Gpt2] {
            let dir = tempfile::tempdir().unwrap();
            tiny_checkpoint(dir.path(), family, 5).unwrap();
            let model = Model::open(dir.path()).unwrap();
            let (places, masks) = half(&model.decoder, model.weights.as_ref());
            let params = Params::from_checkpoint(&model.decoder, &model.checkpoint).unwrap();
            let mut corpus = Corpus::new(false);
            let tokens: Vec<u32> = (0..400).map(|i| (i * i % 89) as u32).collect();
            corpus.push(&tokens, None);
            let material = Material::Text { decoder: &model.decoder, corpus, length: 16 };
            let recipe = Recipe { batch: 4, rate: 3e-3, weight_decay: 0.0, seed: 0 };
            let mut trainer = Trainer::new(material, recipe, params, &places).unwrap();
            let first = trainer.train(&masks, 2, 1).unwrap();
            let later = trainer.train(&masks, 20, 2).unwrap();
            assert!(later < first, "{family:?}: {later} {first}");
            zeros_hold(&trainer, &masks);
        }
    }

    #[test]
    fn nothing_to_train_on_is_refused() {
        let network = Mlp::of_widths(&[4, 2]).unwrap();
        let params = Params::fresh(&network, 1).unwrap();
        let images = Images { shape: [1, 2, 2], pixels: Vec::new(), labels: Vec::new() };
        let material = Material::Images { network: &network, images };
        let recipe = Recipe { batch: 4, rate: 1e-3, weight_decay: 0.0, seed: 0 };
        let error = Trainer::new(material, recipe, params, &[]).err().unwrap();
        assert!(error.to_string().contains("no images"), "{error}");
    }
}
