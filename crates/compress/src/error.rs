//! What can go wrong while compressing a checkpoint.

/// An error of the compress room; messages name the layer and what would work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Options that contradict each other or the model.
    #[error("{0}")]
    Options(String),
    /// A layer that cannot be processed.
    #[error("{layer}: {reason}")]
    Layer {
        /// Module name of the layer.
        layer: String,
        /// What is wrong and what would work.
        reason: String,
    },
    /// An engine error.
    #[error(transparent)]
    Tensor(#[from] tensor::Error),
    /// A checkpoint error.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A network error.
    #[error(transparent)]
    Network(#[from] nn::Error),
    /// An error of the trainer's machinery.
    #[error(transparent)]
    Train(#[from] train::Error),
    /// A data error.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// An error of a measurement.
    #[error(transparent)]
    Evaluation(#[from] eval::Error),
    /// A file of the job's own working area.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl Error {
    /// An error that names a layer.
    pub fn layer(layer: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Layer { layer: layer.into(), reason: reason.into() }
    }
}

/// Result of the compress room.
pub type Result<T> = std::result::Result<T, Error>;
