//! Opening a checkpoint of any known architecture as a [`Network`].

use std::path::Path;

use serde_json::{Map, Value};
use store::Checkpoint;
use store::packed::parse_config;

use crate::mlp::Mlp;
use crate::resnet::ResNet;
use crate::vit::Vit;
use crate::{CheckpointWeights, Decoder, Error, Family, Network, Quantized, Result, Weights};

/// A network of any family with its weights.
pub struct OpenNetwork {
    /// The description.
    pub network: Box<dyn Network>,
    /// The weights, plain or packed.
    pub weights: Box<dyn Weights + Send + Sync>,
    /// The checkpoint they come from.
    pub checkpoint: Checkpoint,
}

/// Opens a model directory or file of any known architecture; reads no weight yet.
///
/// # Errors
/// When the checkpoint cannot be read, the architecture is not known (the message lists those that
/// are), or a tensor is missing or has another shape.
pub fn open_network(path: &Path) -> Result<OpenNetwork> {
    OpenNetwork::from_checkpoint(Checkpoint::open(path)?)
}

impl OpenNetwork {
    /// As [`open_network`], for a checkpoint that is open already.
    ///
    /// # Errors
    /// As [`open_network`].
    pub fn from_checkpoint(checkpoint: Checkpoint) -> Result<Self> {
        let network = network_of(&checkpoint)?;
        let packed = match config_of(&checkpoint)? {
            Some(config) => parse_config(&config)?,
            None => None,
        };
        let weights: Box<dyn Weights + Send + Sync> = match packed {
            Some(config) => Box::new(Quantized::new(checkpoint.clone(), config)?),
            None => Box::new(CheckpointWeights::new(checkpoint.clone())?),
        };
        Ok(OpenNetwork { network, weights, checkpoint })
    }
}

/// The families that [`open_network`] knows.
pub fn known_families() -> Vec<&'static str> {
    let decoders = Family::ALL.into_iter().map(Family::model_type);
    decoders.chain(["resnet", "vit", "mlp"]).collect()
}

/// The config, if the checkpoint has one.
fn config_of(checkpoint: &Checkpoint) -> Result<Option<Value>> {
    match checkpoint.config() {
        Ok(config) => Ok(Some(config.clone())),
        Err(store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The description of a checkpoint: by `model_type`, else by `architecture`, else by its names.
///
/// # Errors
/// As [`open_network`].
pub fn network_of(checkpoint: &Checkpoint) -> Result<Box<dyn Network>> {
    let config = config_of(checkpoint)?.unwrap_or_else(|| Value::Object(Map::new()));
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    let kind = text("model_type");
    if kind.is_some_and(|kind| Family::parse(kind).is_some()) {
        return Ok(Box::new(Decoder::from_checkpoint(checkpoint)?));
    }
    if kind == Some("vit") {
        return Ok(Box::new(Vit::from_checkpoint(checkpoint, &config)?));
    }
    let architecture = text("architecture").unwrap_or_default().to_ascii_lowercase();
    if kind.is_none() {
        let resnet = architecture.starts_with("resnet");
        if resnet || (architecture.is_empty() && ResNet::is_here(checkpoint)) {
            return Ok(Box::new(ResNet::from_checkpoint(checkpoint, &config)?));
        }
        // `ViT`, `MNISTViT (post-LN, ...)`.
        let word = architecture.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or("");
        if word.ends_with("vit") {
            return Ok(Box::new(Vit::from_checkpoint(checkpoint, &config)?));
        }
        let mlp = word == "mlp";
        if mlp || (architecture.is_empty() && Mlp::is_here(checkpoint)) {
            return Ok(Box::new(Mlp::from_checkpoint(checkpoint, &config)?));
        }
    }
    let found = kind.map(str::to_string).or_else(|| text("architecture").map(str::to_string));
    let found = found.unwrap_or_else(|| "(none stated, and the tensor names do not tell)".into());
    Err(Error::UnknownArchitecture { found, known: known_families().join(", ") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{tiny_checkpoint, write_safetensors};
    use serde_json::json;

    #[test]
    fn decoders_open_and_unknown_architectures_are_refused_with_the_known_ones() {
        let dir = tempfile::tempdir().unwrap();
        tiny_checkpoint(dir.path(), Family::Qwen2, 1).unwrap();
        let model = open_network(dir.path()).unwrap();
        assert_eq!(model.network.family(), "qwen2");
        assert!(model.network.images().is_none());
        for config in [json!({"model_type": "t5"}), json!({"architecture": "Mamba"})] {
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            let error = open_network(dir.path()).err().unwrap().to_string();
            assert!(error.contains("llama") && error.contains("resnet, vit, mlp"), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let tensors = [("what.ever".to_string(), vec![2], vec![1.0, 2.0])];
        write_safetensors(&dir.path().join("model.safetensors"), &tensors).unwrap();
        let error = open_network(dir.path()).err().unwrap().to_string();
        assert!(error.contains("tensor names do not tell"), "{error}");
    }
}
