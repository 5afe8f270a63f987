//! What can go wrong between a path and a tensor. Every message names the file, the tensor where
//! there is one, what is wrong with it, and (after a semicolon) what would work.

use std::io;
use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io {
        /// File or directory concerned.
        path: PathBuf,
        /// What was tried, as a verb phrase ("read the header").
        action: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is nothing usable at the path.
    #[error("{}: {reason}{}", .path.display(), hint(.remedy))]
    NotFound {
        /// The path as given.
        path: PathBuf,
        /// What is missing.
        reason: String,
        /// What would work (may be empty).
        remedy: String,
    },
    /// A file as a whole is malformed or of an unsupported kind.
    #[error("{}: {reason}{}", .file.display(), hint(.remedy))]
    File {
        /// The offending file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
        /// What would work (may be empty).
        remedy: String,
    },
    /// One tensor of a file is malformed or cannot be used as asked.
    #[error("{}: tensor \"{tensor}\": {reason}{}", .file.display(), hint(.remedy))]
    Tensor {
        /// The file that holds (or claims to hold) the tensor.
        file: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
        /// What would work (may be empty).
        remedy: String,
    },
    /// A quantised layout cannot hold, or a checkpoint does not hold, the given matrix.
    #[error("module \"{module}\": {reason}{}", hint(.remedy))]
    Packed {
        /// Name of the linear layer.
        module: String,
        /// What is wrong.
        reason: String,
        /// What would work (may be empty).
        remedy: String,
    },
    /// The `quantization_config` of a `config.json` is not usable.
    #[error("config.json: quantization_config: {reason}{}", hint(.remedy))]
    Config {
        /// What is wrong.
        reason: String,
        /// What would work (may be empty).
        remedy: String,
    },
    /// The output directory cannot be written as asked.
    #[error("{}: {reason}{}", .path.display(), hint(.remedy))]
    Output {
        /// The output path.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What would work (may be empty).
        remedy: String,
    },
    /// Asked to resume a job whose output already stands complete.
    #[error("{}: the output is already complete; there is nothing to resume", .path.display())]
    Complete {
        /// The finished output directory.
        path: PathBuf,
    },
}

fn hint(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("; {text}") }
}

impl Error {
    /// An operating system error with the path it happened at.
    pub fn io(path: &Path, action: impl Into<String>, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), action: action.into(), source }
    }

    /// A malformed or unsupported file.
    pub fn file(file: &Path, reason: impl Into<String>) -> Self {
        Self::File { file: file.to_path_buf(), reason: reason.into(), remedy: String::new() }
    }

    /// A malformed or unusable tensor.
    pub fn tensor(file: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Self::Tensor {
            file: file.to_path_buf(),
            tensor: shorten(tensor),
            reason: reason.into(),
            remedy: String::new(),
        }
    }

    /// A quantised module that cannot be packed or unpacked.
    pub fn packed(module: &str, reason: impl Into<String>) -> Self {
        Self::Packed { module: shorten(module), reason: reason.into(), remedy: String::new() }
    }

    /// An unusable `quantization_config`.
    pub fn config(reason: impl Into<String>) -> Self {
        Self::Config { reason: reason.into(), remedy: String::new() }
    }

    /// An output path that cannot be used.
    pub fn output(path: &Path, reason: impl Into<String>) -> Self {
        Self::Output { path: path.to_path_buf(), reason: reason.into(), remedy: String::new() }
    }

    /// Nothing usable at a path.
    pub fn not_found(path: &Path, reason: impl Into<String>) -> Self {
        Self::NotFound { path: path.to_path_buf(), reason: reason.into(), remedy: String::new() }
    }

    /// The same error with a hint of what would work.
    #[must_use]
    pub fn with_remedy(mut self, hint: impl Into<String>) -> Self {
        match &mut self {
            Self::NotFound { remedy, .. }
            | Self::File { remedy, .. }
            | Self::Tensor { remedy, .. }
            | Self::Packed { remedy, .. }
            | Self::Config { remedy, .. }
            | Self::Output { remedy, .. } => *remedy = hint.into(),
            Self::Io { .. } | Self::Complete { .. } => {}
        }
        self
    }
}

/// Names come from hostile files: keep messages readable and free of control characters.
pub(crate) fn shorten(name: &str) -> String {
    const LIMIT: usize = 200;
    let mut clean = String::new();
    for character in name.chars().take(LIMIT) {
        if character.is_control() {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
    }
    if name.chars().nth(LIMIT).is_some() {
        clean.push('…');
    }
    clean
}
