//! Checking a checkpoint against the description before anything is computed.

use store::Checkpoint;
use store::packed::parse_config;

use crate::{Decoder, Error, Leaf, Name, Result};

impl Decoder {
    /// Checks that every tensor the network reads is in the checkpoint, with the shape the config
    /// implies and a floating-point type. Modules that the checkpoint stores in a packed integer
    /// layout are left to the reader of that layout.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Shape`] naming the first tensor at fault.
    pub fn validate(&self, checkpoint: &Checkpoint) -> Result<()> {
        let packed = match checkpoint.config() {
            Ok(config) => parse_config(config)?.is_some(),
            Err(_) => false,
        };
        for name in self.all_names() {
            let weight = name.weight();
            if packed && !checkpoint.contains(&weight) && is_packed(checkpoint, &name.module) {
                continue;
            }
            check_module(checkpoint, name)?;
        }
        Ok(())
    }
}

/// Checks that the tensors of `name` are in the checkpoint with their shapes.
pub(crate) fn check_module(checkpoint: &Checkpoint, name: &Name) -> Result<()> {
    for leaf in name.leaves() {
        expect(checkpoint, &name.tensor(leaf), &name.leaf_shape(leaf))?;
    }
    Ok(())
}

/// Whether one of the known packed layouts stores `module`.
pub(crate) fn is_packed(checkpoint: &Checkpoint, module: &str) -> bool {
    ["weight_packed", "qweight", "pvq_index"]
        .iter()
        .any(|leaf| checkpoint.contains(&format!("{module}.{leaf}")))
}

fn expect(checkpoint: &Checkpoint, tensor: &str, shape: &[usize]) -> Result<()> {
    if !checkpoint.contains(tensor) {
        let leaf = tensor.rsplit('.').next().unwrap_or(tensor);
        return Err(Error::Missing {
            name: tensor.to_string(),
            hint: format!(
                "the config of {} asks for it with shape {shape:?}; check that the {leaf} was \
                 saved and that config.json belongs to these weights",
                checkpoint.path().display()
            ),
        });
    }
    let info = checkpoint.info(tensor)?;
    if info.shape != shape {
        return Err(Error::Shape {
            name: tensor.to_string(),
            found: info.shape.clone(),
            expected: shape.to_vec(),
        });
    }
    Ok(())
}

/// The stored name of a leaf, with a readable error when it is absent.
pub(crate) fn leaf_name(name: &crate::Name, leaf: Leaf) -> Result<String> {
    if leaf == Leaf::Bias && !name.bias {
        return Err(Error::Weights { name: name.module.clone(), reason: "has no bias".into() });
    }
    Ok(name.tensor(leaf))
}
