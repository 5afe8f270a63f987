//! Plain chains: linear layers with a non-linearity between them, no more.
//!
//! Sizes come from the tensors: every `<module>.weight` of two dimensions, modules in natural order
//! (`2` before `10`), each as wide as the one before it is high.

use serde_json::Value;
use store::Checkpoint;
use tensor::ops::{self, Activation};
use tensor::{Tensor, host};

use crate::images::{channels, check_state, expect, image_size};
use crate::keys::Keys;
use crate::network::{ImageSpec, Input, Network, State, no_segment};
use crate::{Error, Name, Result, Role, Spelling, Weights};

/// A chain as a description. Every layer but the last is a segment; the last is the exit.
#[derive(Clone, Debug)]
pub struct Mlp {
    images: ImageSpec,
    activation: Activation,
    hidden: Vec<Name>,
    head: Name,
}

impl Mlp {
    /// The chain `widths[0] -> widths[1] -> ...` with modules `layers.0`, `layers.1`, ..., ReLU
    /// between them, on images of one channel (square, if the input width is a square).
    ///
    /// # Errors
    /// Fewer than two widths, or one that is 0.
    pub fn of_widths(widths: &[usize]) -> Result<Self> {
        let layers = widths.windows(2).enumerate();
        let layers = layers.map(|(i, pair)| (format!("layers.{i}"), [pair[1], pair[0]], true));
        Self::of(layers.collect(), Activation::Relu)
    }

    fn of(layers: Vec<(String, [usize; 2], bool)>, activation: Activation) -> Result<Self> {
        let last = layers.len().saturating_sub(1);
        let mut names: Vec<Name> = layers
            .into_iter()
            .enumerate()
            .map(|(i, (module, shape, bias))| Name {
                module,
                role: if i == last { Role::Head } else { Role::Hidden },
                block: (i != last).then_some(i),
                transposed: false,
                shape,
                kernel: None,
                spelling: Spelling::Dotted,
                bias,
                plus_one: false,
            })
            .collect();
        for pair in names.windows(2) {
            if pair[0].shape[0] != pair[1].shape[1] {
                return Err(Error::Shape {
                    name: pair[1].weight(),
                    found: pair[1].shape.to_vec(),
                    expected: vec![pair[1].shape[0], pair[0].shape[0]],
                });
            }
        }
        if let Some(name) = names.iter().find(|n| n.shape.contains(&0)) {
            return Err(Error::config(&name.module, "has a width of 0"));
        }
        let Some(head) = names.pop() else {
            return Err(Error::Missing {
                name: "layers.0.weight".into(),
                hint: "a chain has at least one linear layer".into(),
            });
        };
        let input = names.first().unwrap_or(&head).shape[1];
        let side = (input as f64).sqrt() as usize;
        let [height, width] = if side * side == input { [side, side] } else { [1, input] };
        Ok(Mlp { images: ImageSpec::new(1, height, width), activation, hidden: names, head })
    }

    /// Whether the checkpoint holds linear layers and nothing else.
    pub(crate) fn is_here(checkpoint: &Checkpoint) -> bool {
        !checkpoint.is_empty()
            && checkpoint.infos().all(|info| match info.name.rsplit_once('.') {
                Some((_, "weight")) => info.shape.len() == 2,
                Some((module, "bias")) => {
                    info.shape.len() == 1 && checkpoint.contains(&format!("{module}.weight"))
                }
                _ => false,
            })
    }

    /// Reads the chain of a checkpoint; its config may state `activation`, `image_size` (a number
    /// or `[height, width]`), `channels` and a normalisation.
    ///
    /// # Errors
    /// Layers that do not follow each other, or a config that does not fit them.
    pub fn from_checkpoint(checkpoint: &Checkpoint, config: &Value) -> Result<Self> {
        let keys = Keys(config);
        let mut modules: Vec<(String, [usize; 2], bool)> = Vec::new();
        for info in checkpoint.infos() {
            let Some(module) = info.name.strip_suffix(".weight") else { continue };
            let [out, input] = info.shape[..] else { continue };
            let bias = checkpoint.contains(&format!("{module}.bias"));
            modules.push((module.to_string(), [out, input], bias));
        }
        modules.sort_by_key(|module| natural(&module.0));
        let mut network = Self::of(modules, keys.activation("activation", "relu")?)?;
        let input = network.images.values();
        let channels = channels(config, "channels")?.unwrap_or(1);
        let size = image_size(config, "image_size")?;
        if channels != 1 || size.is_some() {
            let [height, width] = size.unwrap_or([1, input / channels]);
            network.images = ImageSpec::new(channels, height, width);
            if network.images.values() != input {
                let reason = format!(
                    "{channels} channels of {height} x {width} are not the {input} inputs of the first layer"
                );
                return Err(Error::config("image_size", reason));
            }
        }
        network.images = network.images.described(config, checkpoint)?;
        network.check(checkpoint)?;
        Ok(network)
    }
}

/// Sorts `layer10` behind `layer2`.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (before, after) = rest.split_at(text);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        parts.push((before.to_string(), number.parse().unwrap_or(u64::MAX)));
        rest = after;
    }
    parts
}

impl Network for Mlp {
    fn family(&self) -> &str {
        "mlp"
    }

    fn modules(&self) -> Vec<&Name> {
        self.hidden.iter().chain([&self.head]).collect()
    }

    fn layers(&self) -> Vec<(usize, Name)> {
        self.modules().into_iter().cloned().enumerate().collect()
    }

    fn segments(&self) -> usize {
        self.hidden.len()
    }

    fn classes(&self) -> usize {
        self.head.shape[0]
    }

    fn images(&self) -> Option<&ImageSpec> {
        Some(&self.images)
    }

    fn enter(&self, w: &dyn Weights, input: &Input<'_>) -> Result<State> {
        let (pixels, images) = expect(self.family(), &self.images, input)?;
        let x = host::from_vec(pixels.to_vec(), [images, self.images.values()], &w.device());
        Ok(State::new(x, vec![images]))
    }

    fn segment(&self, i: usize, w: &dyn Weights, state: State) -> Result<State> {
        let name = self.hidden.get(i).ok_or_else(|| no_segment(i, self.segments()))?;
        check_state(&name.module, &state.x, &state.shape, 1, name.shape[1])?;
        let x = ops::activate(w.linear(name, state.x.clone())?, self.activation);
        let shape = state.shape.clone();
        Ok(state.with(x, shape))
    }

    fn exit(&self, w: &dyn Weights, state: State) -> Result<Tensor<2>> {
        check_state("exit", &state.x, &state.shape, 1, self.head.shape[1])?;
        w.linear(&self.head, state.x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random_network, write_safetensors};
    use crate::{CheckpointWeights, open_network};
    use serde_json::json;

    #[test]
    fn a_chain_by_hand() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [
            ("net.10.weight".to_string(), vec![1, 2], vec![1.0, 10.0]),
            ("net.2.bias".to_string(), vec![2], vec![0.5, -5.0]),
            ("net.2.weight".to_string(), vec![2, 3], vec![1.0, 2.0, 3.0, -1.0, 0.0, 1.0]),
        ];
        write_safetensors(&dir.path().join("model.safetensors"), &tensors).unwrap();
        let model = open_network(dir.path()).unwrap();
        assert_eq!((model.network.family(), model.network.segments()), ("mlp", 1));
        let input = Input::Images { pixels: &[1.0, 1.0, 1.0, 0.0, 0.0, 6.0], shape: [2, 1, 1, 3] };
        let logits = model.network.predict(model.weights.as_ref(), &input).unwrap();
        // relu(6.5, -5) and relu(18.5, 1).
        assert_eq!(host::into_vec(logits), [6.5, 28.5]);
    }

    #[test]
    fn widths_and_configs() {
        let network = Mlp::of_widths(&[64, 256, 128, 64, 10]).unwrap();
        assert_eq!(network.layers().len(), 4);
        assert_eq!((network.images.height, network.images.width), (8, 8));
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"architecture": "mlp", "image_size": [4, 16], "mean": [0.5]});
        random_network(dir.path(), &network, Some(&config), 1).unwrap();
        let model = open_network(dir.path()).unwrap();
        let images = model.network.images().unwrap();
        assert_eq!((images.height, images.width, &images.mean[..]), (4, 16, &[0.5][..]));
        let config = json!({"architecture": "mlp", "image_size": 5});
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        assert!(open_network(dir.path()).err().unwrap().to_string().contains("64 inputs"));
        assert!(Mlp::of_widths(&[3]).is_err());
        assert!(Mlp::of_widths(&[3, 0, 2]).is_err());
    }

    #[test]
    fn layers_that_do_not_follow_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [
            ("a.weight".to_string(), vec![2, 3], vec![0.0; 6]),
            ("b.weight".to_string(), vec![2, 3], vec![0.0; 6]),
        ];
        write_safetensors(&dir.path().join("model.safetensors"), &tensors).unwrap();
        let error = open_network(dir.path()).err().unwrap().to_string();
        assert!(error.contains("`b.weight`") && error.contains("[2, 2]"), "{error}");
        let w = CheckpointWeights::new(Checkpoint::open(dir.path()).unwrap()).unwrap();
        let network = Mlp::of_widths(&[3, 2]).unwrap();
        let input = Input::Images { pixels: &[0.0; 3], shape: [1, 1, 1, 3] };
        assert!(network.predict(&w, &input).is_err(), "the layer is not there");
    }
}
