//! Where a tensor's bytes are: the one type that all readers fill and [`crate::Checkpoint`] reads.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// What is known about a tensor without reading it.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Full dotted name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first, in elements.
    pub shape: Vec<usize>,
    /// File that holds the data.
    pub file: PathBuf,
    /// Size of the data in bytes.
    pub nbytes: u64,
}

impl TensorInfo {
    /// Number of elements. Readers have checked that the product does not overflow.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Reads bytes that cannot be mapped (compressed or strided data). The returned vector must have
/// exactly the tensor's `nbytes`, contiguous and little-endian.
pub type LazyBytes = Arc<dyn Fn() -> Result<Vec<u8>> + Send + Sync>;

/// The bytes behind a tensor: contiguous, row-major, little-endian.
#[derive(Clone)]
pub enum Source {
    /// A range of a memory-mapped file.
    Map {
        /// The whole file.
        map: Arc<Mmap>,
        /// First byte.
        start: usize,
        /// Number of bytes.
        len: usize,
    },
    /// Bytes already in memory (small, or rearranged at open).
    Owned(Arc<[u8]>),
    /// Bytes produced on demand, each time they are asked for.
    Lazy(LazyBytes),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map { start, len, .. } => write!(f, "Map({start}+{len})"),
            Self::Owned(bytes) => write!(f, "Owned({})", bytes.len()),
            Self::Lazy(_) => f.write_str("Lazy"),
        }
    }
}

/// A tensor as a reader found it: description and bytes.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Name, type, shape, file and size.
    pub info: TensorInfo,
    /// Where the bytes are.
    pub source: Source,
}

impl Entry {
    /// The raw bytes, borrowed when they are in memory or mapped.
    ///
    /// # Errors
    /// When the source cannot be read or does not yield exactly `info.nbytes` bytes.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        let bytes = match &self.source {
            Source::Map { map, start, len } => {
                let end = start.checked_add(*len);
                match end.and_then(|end| map.get(*start..end)) {
                    Some(slice) => Cow::Borrowed(slice),
                    None => {
                        return Err(Error::tensor(
                            &self.info.file,
                            &self.info.name,
                            format!(
                                "bytes {start}..{} lie outside the file of {} bytes",
                                start.saturating_add(*len),
                                map.len()
                            ),
                        ));
                    }
                }
            }
            Source::Owned(bytes) => Cow::Borrowed(&bytes[..]),
            Source::Lazy(read) => Cow::Owned(read()?),
        };
        if bytes.len() as u64 == self.info.nbytes {
            Ok(bytes)
        } else {
            Err(Error::tensor(
                &self.info.file,
                &self.info.name,
                format!("holds {} bytes where {} were expected", bytes.len(), self.info.nbytes),
            ))
        }
    }
}

/// Maps a whole file into memory.
///
/// The mapping is only valid while nobody truncates the file; as every memory-mapped reader,
/// Strata takes that as given while a job runs.
///
/// # Errors
/// When the file cannot be opened, is empty, or is a Git LFS pointer instead of the real file.
pub fn map_file(path: &Path) -> Result<Arc<Mmap>> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let length = file.metadata().map_err(|e| Error::io(path, "inspect", e))?.len();
    if length == 0 {
        return Err(Error::file(path, "the file is empty").with_remedy("download it again"));
    }
    // SAFETY: the mapping is read-only and private to this process's view; concurrent truncation by
    // another process is excluded by the contract above.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, "map into memory", e))?;
    if map.starts_with(b"version https://git-lfs") {
        return Err(Error::file(path, "is a Git LFS pointer, not the file itself")
            .with_remedy("run `git lfs pull` where it was cloned"));
    }
    Ok(Arc::new(map))
}
