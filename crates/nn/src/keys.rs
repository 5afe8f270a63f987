//! Typed reading of a config's values, with errors that name the key.

use serde_json::Value;
use tensor::ops::Activation;

use crate::{Error, Result};

/// Largest size of any one dimension that is believed.
const MAX_SIZE: usize = 1 << 28;
/// Largest number of blocks that is believed.
const MAX_LAYERS: usize = 10_000;

/// Typed reading of a JSON object, with errors that name the key.
pub(crate) struct Keys<'a>(pub(crate) &'a Value);

impl Keys<'_> {
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.get(key).is_some()
    }

    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.0.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(0) if key == "max_window_layers" => Ok(Some(0)),
            Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(Some(n)),
            _ => Err(Error::config(key, format!("{value} is not a size in 1..={MAX_SIZE}"))),
        }
    }

    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| Error::config(key, "is missing"))
    }

    pub(crate) fn layers(&self, key: &str) -> Result<usize> {
        let n = self.size(key)?;
        if n > MAX_LAYERS {
            return Err(Error::config(
                key,
                format!("{n} blocks; at most {MAX_LAYERS} are believed"),
            ));
        }
        Ok(n)
    }

    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.0.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
        match value.as_f64().filter(|x| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(Error::config(key, format!("{value} is not a number"))),
        }
    }

    pub(crate) fn number(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(Error::config(key, format!("{other} is not true or false"))),
        }
    }

    pub(crate) fn activation(&self, key: &str, default: &str) -> Result<Activation> {
        let name = match self.0.get(key) {
            None | Some(Value::Null) => default,
            Some(value) => value
                .as_str()
                .ok_or_else(|| Error::config(key, format!("{value} is not a name")))?,
        };
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            "relu" => Ok(Activation::Relu),
            "gelu" | "gelu_python" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" => {
                Ok(Activation::GeluTanh)
            }
            other => Err(Error::config(
                key,
                format!(
                    "activation `{other}` is not known; known: silu, relu, gelu, gelu_new, \
                     gelu_pytorch_tanh"
                ),
            )),
        }
    }
}
