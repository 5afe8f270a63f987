//! What can go wrong in training, each with the thing to change in its message.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the training configuration cannot work.
    #[error("training configuration: `{field}`: {reason}")]
    Config {
        /// Dotted name of the field.
        field: String,
        /// What is wrong and what would work.
        reason: String,
    },
    /// A training document cannot be used.
    #[error("{}: line {line}: {reason}", .path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// One-based line.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A name that the parameters do not hold.
    #[error("no parameter named `{name}`{hint}")]
    UnknownParameter {
        /// The name asked for.
        name: String,
        /// A leading ", did you mean ...?" or nothing.
        hint: String,
    },
    /// A parameter, gradient or state of the wrong shape.
    #[error("`{name}`: expected {expected}, found {found}")]
    Shape {
        /// The parameter.
        name: String,
        /// What the network needs.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Training left the finite numbers.
    #[error(
        "training diverged at step {step}: {what}; lower \
         `optimizer.learning_rate`, lengthen `schedule.warmup_steps` or set `clip_norm`"
    )]
    Diverged {
        /// The optimiser step (one-based) whose loss or gradient was not finite.
        step: u64,
        /// Which number it was.
        what: String,
    },
    /// Saved training state that does not fit this run.
    #[error("{}: {reason}", .path.display())]
    State {
        /// The state file or directory.
        path: PathBuf,
        /// Why it cannot be continued, and what to do.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// From the engine.
    #[error(transparent)]
    Tensor(#[from] tensor::Error),
    /// From the checkpoint store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// From the network.
    #[error(transparent)]
    Nn(#[from] nn::Error),
    /// From the data.
    #[error(transparent)]
    Data(#[from] data::Error),
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A configuration error.
pub(crate) fn config(field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Config { field: field.into(), reason: reason.into() }
}

/// An I/O error at a path.
pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { path, source }
}
