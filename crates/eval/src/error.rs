//! What can go wrong in an evaluation.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option that cannot work.
    #[error("{what}: {reason}")]
    Option {
        /// The option or input.
        what: String,
        /// Why, and what would work.
        reason: String,
    },
    /// A file of questions that cannot be used.
    #[error("{}: line {line}: {reason}", .path.display())]
    Question {
        /// The file.
        path: PathBuf,
        /// One-based line.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Reading failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// From the network.
    #[error(transparent)]
    Nn(#[from] nn::Error),
    /// From the data.
    #[error(transparent)]
    Data(#[from] data::Error),
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An option error.
pub(crate) fn option(what: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Option { what: what.into(), reason: reason.into() }
}
