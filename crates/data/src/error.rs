//! What can go wrong with text, tokenizers, images and generated data; every message names its file.

use std::path::{Path, PathBuf};

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of reading text, tokenizers and images, and of writing the almanac.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file as a whole is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would work.
        message: String,
    },
    /// One line of a text file is not what it should be.
    #[error("{}:{line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number, counted from 1.
        line: usize,
        /// What is wrong and what would work.
        message: String,
    },
    /// A tokenizer could not be built or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The text is too short for what was asked.
    #[error(
        "{needed} tokens are needed for {purpose}, but the text gives only {found}{hint}; \
         use more text or a shorter window"
    )]
    TooFewTokens {
        /// Tokens needed.
        needed: usize,
        /// Tokens found.
        found: usize,
        /// What the tokens are for.
        purpose: String,
        /// An explanation of the number found; starts with a space, a comma or a parenthesis.
        hint: String,
    },
    /// An argument is out of range.
    #[error("{0}")]
    Argument(String),
    /// The checkpoint could not be read.
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Error {
        Error::File { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn line(path: &Path, line: usize, message: impl Into<String>) -> Error {
        Error::Line { path: path.to_path_buf(), line, message: message.into() }
    }
}
