//! What can go wrong in the engine.

/// An engine error; messages say what was wrong and what would work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device name that is unknown or not compiled in.
    #[error("device `{name}`: {reason}")]
    Device {
        /// The name as given.
        name: String,
        /// Why it cannot be used and what would work.
        reason: String,
    },
    /// Shapes that do not fit together.
    #[error("{what}: {reason}")]
    Shape {
        /// The operation or tensor.
        what: String,
        /// What does not fit.
        reason: String,
    },
    /// A numerical failure (not positive definite, not finite).
    #[error("{what}: {reason}")]
    Numeric {
        /// The operation.
        what: String,
        /// What failed.
        reason: String,
    },
}

/// Result of engine operations.
pub type Result<T> = std::result::Result<T, Error>;
