//! [`Checkpoint`]: any model directory or weight file as a set of named tensors, opened lazily and
//! read by name. Finding and validating the files is left to `locate`, decoding to `convert` and
//! `gguf`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use serde_json::Value;

use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gguf;
use crate::packed::sparse;
use crate::source::{Entry, Source, TensorInfo};

mod locate;

/// Which kind of file the tensors come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// One or several `.safetensors` files.
    Safetensors,
    /// PyTorch files (zip or legacy pickle).
    Pickle,
    /// A GGUF file.
    Gguf,
}

impl Container {
    /// Name for tables: "safetensors", "pytorch", "gguf".
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Pickle => "pytorch",
            Self::Gguf => "gguf",
        }
    }
}

/// Values of a tensor without a copy where possible.
#[derive(Debug)]
pub enum WeightView<'a> {
    /// f32 values as stored.
    F32(&'a [f32]),
    /// f16 values as stored.
    F16(&'a [f16]),
    /// bfloat16 values as stored.
    BF16(&'a [bf16]),
    /// Converted to f32 (any other type, or data that is not aligned).
    Owned(Vec<f32>),
}

impl WeightView<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::BF16(v) => v.len(),
            Self::Owned(v) => v.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A set of named tensors on disk. Cheap to clone; can be shared between threads.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    directory: PathBuf,
    container: Container,
    /// Sorted by name.
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    /// Bytes on disk of tensors that take other than their own number (sparse ones).
    stored: HashMap<String, u64>,
    config: OnceLock<Value>,
    /// Metadata and configuration of a GGUF file; its entries stand above.
    gguf: Option<gguf::Gguf>,
}

impl Checkpoint {
    /// Opens a model directory (safetensors preferred, then PyTorch files, then a single GGUF) or
    /// one file (`.safetensors`, `.pt`, `.pth`, `.bin`, `.th`, `.gguf`). Only headers are read.
    ///
    /// # Errors
    /// When nothing usable is there, or any file is malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let found = locate::find(path)?;
        let (mut entries, stored) = sparse::merge(found.entries)?;
        entries.sort_by(|a, b| a.info.name.cmp(&b.info.name));
        let mut by_name = HashMap::with_capacity(entries.len());
        for (i, entry) in entries.iter().enumerate() {
            if let Some(first) = by_name.insert(entry.info.name.clone(), i) {
                let other = entries.get(first).map(|e| e.info.file.display().to_string());
                let reason = format!("appears twice (also in {})", other.unwrap_or_default());
                return Err(Error::tensor(&entry.info.file, &entry.info.name, reason));
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                path: path.to_path_buf(),
                directory: found.directory,
                container: found.container,
                entries,
                by_name,
                stored,
                config: OnceLock::new(),
                gguf: found.gguf,
            }),
        })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.inner.entries.iter().map(|e| e.info.name.as_str())
    }

    /// Descriptions of all tensors, sorted by name.
    pub fn infos(&self) -> impl Iterator<Item = &TensorInfo> {
        self.inner.entries.iter().map(|e| &e.info)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.inner.entries.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.inner.entries.is_empty()
    }

    /// Whether a tensor of that name exists.
    pub fn contains(&self, name: &str) -> bool {
        self.inner.by_name.contains_key(name)
    }

    /// Type, shape and size of a tensor.
    ///
    /// # Errors
    /// When there is no such tensor; the message names the nearest one.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.entry(name)?.info)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let index = self.inner.by_name.get(name).copied();
        index.and_then(|i| self.inner.entries.get(i)).ok_or_else(|| {
            let error = Error::tensor(&self.inner.path, name, "is not in the checkpoint");
            match locate::nearest(name, self.names()) {
                Some(near) => error.with_remedy(format!("the nearest name is \"{near}\"")),
                None => error,
            }
        })
    }

    /// Raw little-endian bytes, borrowed from the mapping when possible.
    ///
    /// # Errors
    /// When there is no such tensor or it cannot be read.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        self.entry(name)?.bytes()
    }

    /// All values as f32, row-major: any float type, GGML type, integer or truth value. Large
    /// tensors are converted in parallel, and their mapped pages are released afterwards, so that
    /// walking through a checkpoint keeps memory flat.
    ///
    /// # Errors
    /// When there is no such tensor, it cannot be read, or it is complex.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        const RELEASE: u64 = 1 << 20;
        let entry = self.entry(name)?;
        let values = decode(entry, &entry.bytes()?, entry.info.elements())?;
        if entry.info.nbytes >= RELEASE {
            release(entry);
        }
        Ok(values)
    }

    /// The values of rows `rows` (along the first dimension) as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::f32`]; also when the rows do not exist or do not start on whole bytes.
    pub fn f32_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        let info = &entry.info;
        let bad = |reason: String| Error::tensor(&info.file, name, reason);
        let Some((&count, rest)) = info.shape.split_first() else {
            return Err(bad("is a scalar and has no rows".into()));
        };
        if rows.start > rows.end || rows.end > count {
            return Err(bad(format!("has {count} rows; {}..{} asked", rows.start, rows.end)));
        }
        let width: usize = rest.iter().product();
        let row_bytes = info.dtype.bytes_for(width as u64).ok_or_else(|| {
            bad(format!("rows of {width} {} elements do not fill whole bytes", info.dtype))
        })? as usize;
        let bytes = entry.bytes()?;
        // In range: rows.end <= count and count * row_bytes == nbytes.
        let slice = bytes
            .get(rows.start * row_bytes..rows.end * row_bytes)
            .ok_or_else(|| bad("is shorter than its shape".into()))?;
        decode(entry, slice, rows.len() * width)
    }

    /// All values as i32, from any integer type (or truth values) as long as they fit.
    ///
    /// # Errors
    /// When there is no such tensor, it is not of an integer type, or a value does not fit.
    pub fn i32(&self, name: &str) -> Result<Vec<i32>> {
        let entry = self.entry(name)?;
        let bytes = entry.bytes()?;
        let too_large = |v: String| {
            Error::tensor(&entry.info.file, name, format!("the value {v} does not fit in 32 bits"))
        };
        macro_rules! cast {
            ($type:ty) => {{
                let (whole, _) = bytes.as_chunks::<{ size_of::<$type>() }>();
                whole
                    .iter()
                    .map(|b| {
                        let value = <$type>::from_le_bytes(*b);
                        i32::try_from(value).map_err(|_| too_large(value.to_string()))
                    })
                    .collect()
            }};
        }
        match entry.info.dtype {
            Dtype::I32 => {
                let (whole, _) = bytes.as_chunks::<4>();
                Ok(whole.iter().map(|b| i32::from_le_bytes(*b)).collect())
            }
            Dtype::I64 => cast!(i64),
            Dtype::I16 => cast!(i16),
            Dtype::I8 => cast!(i8),
            Dtype::U64 => cast!(u64),
            Dtype::U32 => cast!(u32),
            Dtype::U16 => cast!(u16),
            Dtype::U8 | Dtype::Bool => cast!(u8),
            other => Err(Error::tensor(
                &entry.info.file,
                name,
                format!("is {other}, where an integer type is needed"),
            )),
        }
    }

    /// The values without a copy if they are f32, f16 or bf16 and aligned; otherwise as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::f32`].
    pub fn half_view(&self, name: &str) -> Result<WeightView<'_>> {
        let entry = self.entry(name)?;
        let bytes = entry.bytes()?;
        if cfg!(target_endian = "little")
            && let Cow::Borrowed(bytes) = bytes
        {
            let view = match entry.info.dtype {
                Dtype::F32 => bytemuck::try_cast_slice(bytes).ok().map(WeightView::F32),
                Dtype::F16 => bytemuck::try_cast_slice(bytes).ok().map(WeightView::F16),
                Dtype::BF16 => bytemuck::try_cast_slice(bytes).ok().map(WeightView::BF16),
                _ => None,
            };
            if let Some(view) = view {
                return Ok(view);
            }
        }
        Ok(WeightView::Owned(decode(entry, &bytes, entry.info.elements())?))
    }

    /// Tells the system that the tensor's mapped pages are not needed now. They are read from the
    /// file again when touched; resident memory shrinks.
    pub fn release(&self, name: &str) {
        if let Ok(entry) = self.entry(name) {
            release(entry);
        }
    }

    /// `config.json` of the directory; synthesised from the metadata of a GGUF file.
    ///
    /// # Errors
    /// When there is none or it is not a JSON object.
    pub fn config(&self) -> Result<&Value> {
        if let Some(gguf) = &self.inner.gguf {
            return gguf.config();
        }
        if let Some(value) = self.inner.config.get() {
            return Ok(value);
        }
        let value = read_config(&self.inner.directory)?;
        Ok(self.inner.config.get_or_init(|| value))
    }

    /// The path as given to [`Checkpoint::open`].
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The directory: the path itself, or the one that holds the file.
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// The weight files, sorted.
    pub fn files(&self) -> Vec<&Path> {
        let mut files: Vec<&Path> = self.infos().map(|i| i.file.as_path()).collect();
        files.sort_unstable();
        files.dedup();
        files
    }

    /// Bytes that a tensor takes on disk: [`TensorInfo::nbytes`], except for matrices that are stored
    /// sparse.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn stored_bytes(&self, name: &str) -> Result<u64> {
        let info = self.info(name)?;
        Ok(self.inner.stored.get(name).copied().unwrap_or(info.nbytes))
    }

    /// Sum of the sizes of all tensors on disk, in bytes.
    pub fn total_bytes(&self) -> u64 {
        let stored = |i: &TensorInfo| self.inner.stored.get(&i.name).copied().unwrap_or(i.nbytes);
        self.infos().map(stored).fold(0, u64::saturating_add)
    }

    /// Metadata of a GGUF file.
    pub fn gguf_metadata(&self) -> Option<&gguf::Metadata> {
        self.inner.gguf.as_ref().map(|g| &g.metadata)
    }

    /// Which kind of file the tensors come from.
    pub fn container(&self) -> Container {
        self.inner.container
    }
}

fn decode(entry: &Entry, bytes: &[u8], count: usize) -> Result<Vec<f32>> {
    let info = &entry.info;
    if let Dtype::Ggml(kind) = info.dtype {
        return gguf::dequantize(kind, bytes, count)
            .map_err(|e| Error::tensor(&info.file, &info.name, e.to_string()));
    }
    convert::to_f32(info.dtype, bytes, count).ok_or_else(|| {
        Error::tensor(&info.file, &info.name, format!("{} has no conversion to f32", info.dtype))
    })
}

fn release(entry: &Entry) {
    #[cfg(unix)]
    if let Source::Map { map, start, len } = &entry.source {
        // SAFETY: the mapping is read-only and backed by a file, so dropped pages come back with
        // the same content when they are touched again. Failure only keeps memory resident.
        let _ =
            unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, *start, *len) };
    }
}

/// Largest `config.json` that is read; real ones have a few kilobytes.
const MAX_CONFIG: u64 = 64 << 20;

fn read_config(directory: &Path) -> Result<Value> {
    let path = directory.join("config.json");
    let length = match fs::metadata(&path) {
        Ok(m) if m.is_file() => m.len(),
        _ => {
            return Err(Error::not_found(&path, "no config.json stands beside the weights")
                .with_remedy("give the model directory that holds config.json"));
        }
    };
    if length > MAX_CONFIG {
        return Err(Error::file(&path, format!("{length} bytes are too many for a config.json")));
    }
    let bytes = fs::read(&path).map_err(|e| Error::io(&path, "read", e))?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::file(&path, format!("is not valid JSON: {e}")))?;
    if value.is_object() { Ok(value) } else { Err(Error::file(&path, "is not a JSON object")) }
}

#[cfg(test)]
mod tests;
