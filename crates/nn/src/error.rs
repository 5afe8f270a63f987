//! What can go wrong between a checkpoint and its logits.

/// Errors of this crate; each message names the config key, tensor or token at fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The architecture is not one this crate computes.
    #[error("model_type `{found}` is not known; known: {known}")]
    UnknownArchitecture {
        /// The `model_type` of the config.
        found: String,
        /// The known ones, comma separated.
        known: String,
    },
    /// A value of `config.json` is missing, of the wrong type, or impossible.
    #[error("config: `{key}`: {reason}")]
    Config {
        /// The key at fault.
        key: String,
        /// What is wrong and what would work.
        reason: String,
    },
    /// A tensor the architecture needs is not there.
    #[error("tensor `{name}` is missing: {hint}")]
    Missing {
        /// The tensor's name.
        name: String,
        /// Where it was looked for.
        hint: String,
    },
    /// A tensor or activation has another shape than the config says.
    #[error("`{name}` has shape {found:?}, but the config asks for {expected:?}")]
    Shape {
        /// The tensor's or activation's name.
        name: String,
        /// The shape that was found.
        found: Vec<usize>,
        /// The shape that is needed.
        expected: Vec<usize>,
    },
    /// Input (token ids, positions, geometry, options) the network cannot take.
    #[error("{0}")]
    Input(String),
    /// The operation needs something this kind of weights cannot give.
    #[error("`{name}`: {reason}")]
    Weights {
        /// The module or tensor.
        name: String,
        /// Why it cannot be served.
        reason: String,
    },
    /// A failure in a tap or another user of the seams, passed through.
    #[error("{0}")]
    External(Box<dyn std::error::Error + Send + Sync>),
    /// From the checkpoint layer.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// From the engine.
    #[error(transparent)]
    Tensor(#[from] tensor::Error),
}

impl Error {
    /// Wraps an error of a caller (a tap, another `Weights`) so that it travels through the forward.
    pub fn external(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Error::External(Box::new(error))
    }
    pub(crate) fn config(key: &str, reason: impl Into<String>) -> Self {
        Error::Config { key: key.to_string(), reason: reason.into() }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
