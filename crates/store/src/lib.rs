//! Checkpoints on disk: reading whatever people have (safetensors, PyTorch files, GGUF) by one
//! lazy, memory-mapped [`Checkpoint`], and writing safetensors directories that appear whole or
//! not at all through [`Writer`].
//!
//! A checkpoint is hostile until validated: every reader checks lengths, offsets, shapes and names
//! before it trusts them, and every refusal names the file, the tensor and the reason.
//!
//! What a tensor *means* (its role in a network) is left to the crates above.

pub mod atomic;
pub mod checkpoint;
pub mod convert;
pub mod dtype;
pub mod error;
pub mod gguf;
mod json;
pub mod packed;
pub mod pickle;
pub mod safetensors;
pub mod source;
pub mod writer;

pub use atomic::{sha256_bytes, sha256_file, write_atomic};
pub use checkpoint::{Checkpoint, Container, WeightView};
pub use dtype::{Dtype, GgmlType};
pub use error::{Error, Result};
pub use source::{Entry, Source, TensorInfo};
pub use writer::{JournalEntry, WriteOptions, Writer};
