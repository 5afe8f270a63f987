//! Data for networks: tokenizers, documents cut into token windows, labelled images, the almanac.
//!
//! * [`Tokenizer`] reads what checkpoints carry (`tokenizer.json`, sentencepiece `tokenizer.model`,
//!   GPT-2's `vocab.json` with `merges.txt`, the vocabulary inside a GGUF file) and decodes
//!   incrementally without splitting characters.
//! * [`text`] loads documents and cuts them into windows for calibration, training and evaluation.
//! * [`images`] reads CIFAR-10's binary records and IDX files.
//! * [`almanac`] generates the small world on which the whole workbench is demonstrated.
//!
//! What a network does with the tokens is not known here.

pub mod almanac;
mod error;
pub mod images;
pub mod text;
pub mod tokenizer;

pub use error::{Error, Result};
pub use images::Images;
pub use tokenizer::{DecodeStream, Tokenizer};
