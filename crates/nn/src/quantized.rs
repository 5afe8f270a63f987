//! Checkpoints whose linear layers are packed (compressed-tensors, AutoAWQ, GPTQ, Strata's own):
//! products run on the packed form, nothing is dequantised as a whole.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use store::Checkpoint;
use store::packed::{QuantConfig, Stored, load};
use tensor::{Device, Tensor, host};

use crate::stored::{Kernel, dequantize};
use crate::validate::is_packed;
use crate::weights::check_input;
use crate::{CheckpointWeights, Error, Leaf, Name, Result, Weights};

/// Weights of a quantised checkpoint. Packed modules are brought into the layout of the integer
/// kernels at first use and kept; everything else is served as by [`CheckpointWeights`].
pub struct Quantized {
    plain: CheckpointWeights,
    config: QuantConfig,
    modules: Mutex<HashMap<String, Kernel>>,
}

impl Quantized {
    /// The weights of `checkpoint`, packed as `config` (from its `quantization_config`) says.
    ///
    /// # Errors
    /// When the engine has no CPU device.
    pub fn new(checkpoint: Checkpoint, config: QuantConfig) -> Result<Self> {
        Ok(Quantized {
            plain: CheckpointWeights::new(checkpoint)?,
            config,
            modules: Mutex::default(),
        })
    }

    /// How the checkpoint is packed.
    pub fn config(&self) -> &QuantConfig {
        &self.config
    }

    /// Whether `name` is stored as packed integers.
    pub fn is_packed(&self, name: &Name) -> bool {
        let checkpoint = self.plain.checkpoint();
        !checkpoint.contains(&name.weight()) && is_packed(checkpoint, &name.module)
    }

    /// A packed module as it is stored.
    ///
    /// # Errors
    /// When the module is not packed, or its tensors do not fit together or the config.
    pub fn packed(&self, name: &Name) -> Result<Stored> {
        let stored = load(self.plain.checkpoint(), &name.module, &self.config)?;
        if stored.shape() != name.shape {
            return Err(Error::Shape {
                name: name.module.clone(),
                found: stored.shape().to_vec(),
                expected: name.shape.to_vec(),
            });
        }
        Ok(stored)
    }

    /// Builds the kernels' layout of every packed module of `names` now rather than at first use.
    ///
    /// # Errors
    /// As [`Quantized::packed`].
    pub fn prepare<'n>(&self, names: impl IntoIterator<Item = &'n Name>) -> Result<()> {
        for name in names {
            if self.is_packed(name) {
                self.module(name)?;
            }
        }
        Ok(())
    }

    /// The module in the layout of its kernel.
    fn module(&self, name: &Name) -> Result<Kernel> {
        let modules = || self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules().get(&name.module) {
            return Ok(module.clone());
        }
        let module = Kernel::new(&self.packed(name)?)?;
        modules().insert(name.module.clone(), module.clone());
        Ok(module)
    }
}

impl Weights for Quantized {
    fn linear(&self, name: &Name, x: Tensor<2>) -> Result<Tensor<2>> {
        let known = {
            let modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
            modules.get(&name.module).cloned()
        };
        let module = match known {
            Some(module) => module,
            None if self.is_packed(name) => self.module(name)?,
            None => return self.plain.linear(name, x),
        };
        check_input(name, &x)?;
        let (rows, out) = (x.dims()[0], name.out_features());
        let bias = if name.bias { Some(self.vector(name, Leaf::Bias)?) } else { None };
        let bias = bias.map(host::into_vec);
        let mut y = vec![0.0; rows * out];
        host::read(&x, |x| module.linear(name.shape, x, rows, bias.as_deref(), &mut y));
        Ok(host::from_vec(y, [rows, out], &self.device()))
    }

    fn matrix(&self, name: &Name) -> Result<Tensor<2>> {
        if self.is_packed(name) {
            return Ok(host::from_vec(
                dequantize(&self.packed(name)?)?,
                name.shape,
                &self.device(),
            ));
        }
        self.plain.matrix(name)
    }

    fn vector(&self, name: &Name, leaf: Leaf) -> Result<Tensor<1>> {
        self.plain.vector(name, leaf)
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> Result<Tensor<2>> {
        if self.is_packed(name) {
            return Err(Error::Weights {
                name: name.module.clone(),
                reason: "packed embeddings are not supported; keep the embedding in f16".into(),
            });
        }
        self.plain.embed(name, ids)
    }

    fn device(&self) -> Device {
        self.plain.device()
    }
}
