//! What can stop a reproduction.

/// An error of a reproduction.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something the reproduction needs is not there, or cannot be set up.
    #[error("{0}")]
    Setup(String),
    /// From the compress room.
    #[error(transparent)]
    Compress(#[from] compress::Error),
    /// From an evaluation.
    #[error(transparent)]
    Eval(#[from] eval::Error),
    /// From a network.
    #[error(transparent)]
    Network(#[from] nn::Error),
    /// From a checkpoint.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// From text or tokenizer.
    #[error(transparent)]
    Data(#[from] data::Error),
}

/// Result of a reproduction.
pub type Result<T> = std::result::Result<T, Error>;
