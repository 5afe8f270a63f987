//! What can go wrong in a job.

/// An error of a job; messages name the stage, file or key and what would work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A recipe or option that cannot work.
    #[error("{0}")]
    Recipe(String),
    /// From the compress room.
    #[error(transparent)]
    Compress(#[from] compress::Error),
    /// From an evaluation.
    #[error(transparent)]
    Eval(#[from] eval::Error),
    /// From the trainer.
    #[error(transparent)]
    Train(#[from] train::Error),
    /// From a network.
    #[error(transparent)]
    Network(#[from] nn::Error),
    /// From a checkpoint or an output directory.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// From text or tokenizer.
    #[error(transparent)]
    Data(#[from] data::Error),
}

/// Result of a job.
pub type Result<T> = std::result::Result<T, Error>;
