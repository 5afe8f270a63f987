//! GGUF files (versions 2 and 3, little endian): header, metadata, tensors, dequantisation and
//! quantisation.
//!
//! The rest of the crate sees a GGUF file as a checkpoint in Hugging Face layout: [`open`] renames
//! tensors, undoes what the usual converters did to the values (rotary row order of Llama, fused
//! qkv of GPT-NeoX, the `+1` of Gemma norms, the transposition of GPT-2), lazily, and writes a
//! `config.json` from the metadata. What a tokenizer does with the vocabulary is left to `data`.
//! [`write()`] writes a file, [`Export`] gives the names for it, [`quantize`] the blocks.

mod codes;
mod config;
mod dequant;
mod layout;
mod metadata;
mod names;
mod parse;
pub mod quantize;
mod write;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

pub use self::codes::{decode_grid, encode_grid, grid_type};
pub use self::dequant::{dequantize, readable};
pub use self::metadata::{Array, Metadata, Tokenizer, Value};
pub use self::names::{Change, Export};
pub use self::parse::{Header, Tensor};
pub use self::write::{TensorPlan, write};
pub use crate::dtype::GgmlType;

use self::names::{Family, Heads};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::{Entry, Source, TensorInfo};

/// An opened GGUF file.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// All key-value pairs of the header.
    pub metadata: Metadata,
    /// Tensors under Hugging Face names where the architecture is known, else under GGUF names.
    pub entries: Vec<Entry>,
    config: std::result::Result<serde_json::Value, String>,
    file: PathBuf,
}

impl Gguf {
    /// The configuration in the words of a Hugging Face `config.json`.
    ///
    /// # Errors
    /// When the architecture has no such configuration here, or metadata it needs is missing.
    pub fn config(&self) -> Result<&serde_json::Value> {
        self.config.as_ref().map_err(|reason| Error::file(&self.file, reason))
    }
}

/// Opens a file, checks its header and prepares every tensor; values are read when asked for.
///
/// # Errors
/// When the file cannot be read or its header does not hold together; the message names the tensor
/// or the metadata key.
pub fn open(file: &Path) -> Result<Gguf> {
    let handle = File::open(file).map_err(|e| Error::io(file, "open the file", e))?;
    // SAFETY: the map is only read; a file that another process truncates meanwhile can fault, as
    // with every memory-mapped checkpoint.
    let map = unsafe { Mmap::map(&handle) }.map_err(|e| Error::io(file, "map the file", e))?;
    from_map(Arc::new(map), file)
}

/// As [`open`], for a file that is in memory already; `file` is a name for messages only.
///
/// # Errors
/// As [`open`].
pub fn from_bytes(bytes: &[u8], file: &Path) -> Result<Gguf> {
    let copy = || {
        let mut map = MmapMut::map_anon(bytes.len())?;
        map.copy_from_slice(bytes);
        map.make_read_only()
    };
    from_map(Arc::new(copy().map_err(|e| Error::io(file, "copy into memory", e))?), file)
}

fn from_map(map: Arc<Mmap>, file: &Path) -> Result<Gguf> {
    let header = parse_bytes(&map, file)?;
    if header.metadata.get_u64("split.count").is_some_and(|count| count > 1) {
        return Err(Error::file(file, "is one part of a split GGUF")
            .with_remedy("merge the parts with `llama-gguf-split --merge` first"));
    }
    assemble(header, &map, file)
}

/// Reads and checks the header at the start of `bytes`, the whole contents of `file` (a name for
/// messages only).
///
/// # Errors
/// When anything in it does not hold together.
pub fn parse_bytes(bytes: &[u8], file: &Path) -> Result<Header> {
    parse::parse(bytes).map_err(|fault| match fault.tensor {
        Some(tensor) => Error::tensor(file, &tensor, fault.reason),
        None => Error::file(file, fault.reason),
    })
}

fn synthesise(header: &Header, bytes: &[u8]) -> std::result::Result<serde_json::Value, String> {
    let factors = header
        .tensor("rope_freqs.weight")
        .filter(|tensor| tensor.dtype == Dtype::F32)
        .and_then(|tensor| bytes.get(tensor.start..tensor.start + tensor.len))
        .map(|raw| raw.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect::<Vec<_>>());
    config::synthesise(header, factors.as_deref())
}

fn assemble(header: Header, map: &Arc<Mmap>, file: &Path) -> Result<Gguf> {
    let family = match Family::of(&header.metadata) {
        Some(family) if !header.tensors.is_empty() => {
            let (query, key) =
                config::heads(&header.metadata).map_err(|reason| Error::file(file, reason))?;
            let size = |heads: u64| {
                usize::try_from(heads)
                    .map_err(|_| Error::file(file, format!("claims {heads} heads")))
            };
            Some((family, Heads { query: size(query)?, key: size(key)? }))
        }
        _ => None,
    };
    let config = synthesise(&header, map);
    let mut taken: HashMap<String, String> = HashMap::with_capacity(header.tensors.len());
    let mut entries = Vec::with_capacity(header.tensors.len());
    for tensor in header.tensors {
        let (name, change) = family
            .and_then(|(family, heads)| names::hugging_face(family, heads, &tensor.name))
            .unwrap_or_else(|| (tensor.name.clone(), Change::None));
        if let Some(other) = taken.insert(name.clone(), tensor.name.clone()) {
            return Err(Error::tensor(
                file,
                &tensor.name,
                format!("is called \"{name}\", as \"{other}\" already is"),
            ));
        }
        entries.push(entry(tensor, name, change, map, file)?);
    }
    Ok(Gguf { metadata: header.metadata, entries, config, file: file.to_path_buf() })
}

fn entry(
    tensor: Tensor,
    name: String,
    change: Change,
    map: &Arc<Mmap>,
    file: &Path,
) -> Result<Entry> {
    let fault = |reason: String| Error::tensor(file, &name, reason);
    let (dtype, shape) = layout::plan(&tensor, change).map_err(fault)?;
    let elements: usize = shape.iter().product();
    let nbytes = dtype
        .bytes_for(elements as u64)
        .ok_or_else(|| fault(format!("has the impossible size {shape:?}")))?;
    let (start, len) = (tensor.start, tensor.len);
    let source = if change == Change::None || len == 0 {
        Source::Map { map: Arc::clone(map), start, len }
    } else {
        let (map, path, name) = (Arc::clone(map), file.to_path_buf(), name.clone());
        Source::Lazy(Arc::new(move || {
            let stored = map.get(start..start + len).unwrap_or_default();
            layout::undo(&tensor, change, stored)
                .map_err(|reason| Error::tensor(&path, &name, reason))
        }))
    };
    Ok(Entry { info: TensorInfo { name, dtype, shape, file: file.to_path_buf(), nbytes }, source })
}
