//! The safetensors container: header validation, reading by memory map, header writing.
//!
//! Layout: 8 bytes little-endian header length, a JSON object (padded with spaces), then the data;
//! offsets count from the start of the data. The reader accepts a file only if the tensors tile
//! the data exactly: no overlap, no gap, nothing behind the last one, every size equal to what
//! dtype and shape say, every start aligned for its dtype.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::json;
use crate::source::{Entry, Source, TensorInfo, map_file};

/// Largest header the format allows, in bytes.
pub const MAX_HEADER: u64 = 100_000_000;

/// A validated tensor of a header; offsets count from the start of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A validated header.
#[derive(Debug)]
pub struct Header {
    /// The free-form `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Tensors in the order of their data.
    pub tensors: Vec<Tensor>,
    /// Offset of the data in the file.
    pub data_start: usize,
}

/// Opens a `.safetensors` file: validates the header, maps the data.
///
/// # Errors
/// When the file cannot be read or is malformed in any way.
pub fn open(file: &Path) -> Result<Vec<Entry>> {
    let map = map_file(file)?;
    let header = parse(file, &map)?;
    Ok(header
        .tensors
        .into_iter()
        .map(|t| {
            let len = t.end - t.start;
            Entry {
                info: TensorInfo {
                    name: t.name,
                    dtype: t.dtype,
                    shape: t.shape,
                    file: file.to_path_buf(),
                    nbytes: len as u64,
                },
                source: Source::Map {
                    map: Arc::clone(&map),
                    start: header.data_start + t.start,
                    len,
                },
            }
        })
        .collect())
}

/// The `__metadata__` of a file.
///
/// # Errors
/// As [`open`].
pub fn metadata(file: &Path) -> Result<BTreeMap<String, String>> {
    let map = map_file(file)?;
    Ok(parse(file, &map)?.metadata)
}

/// Parses an index (`model.safetensors.index.json`) given as bytes: pairs of tensor and shard in
/// file order, names not yet checked against any file.
///
/// # Errors
/// When it is not an object with one `weight_map` of strings without repeated tensors.
pub fn parse_index(file: &Path, bytes: &[u8]) -> Result<Vec<(String, String)>> {
    json::weight_map(bytes).map_err(|e| {
        let reason = format!("malformed index: {}", e.reason);
        match e.key {
            Some(name) => Error::tensor(file, &name, reason),
            None => Error::file(file, reason),
        }
    })
}

/// Parses and validates the header of a whole file given as bytes; `file` only names it in errors.
///
/// # Errors
/// When anything about the header is inconsistent with itself or with the length of the file.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<Header> {
    let truncated = "download or copy it again";
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let reason = format!("{} bytes are too few for a safetensors file", bytes.len());
        return Err(Error::file(file, reason).with_remedy(truncated));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        let reason = format!("the header claims {length} bytes, the format allows {MAX_HEADER}");
        return Err(Error::file(file, reason).with_remedy("this is not a safetensors file"));
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let Some((header, data)) = rest.split_at_checked(length) else {
        let reason =
            format!("the header claims {length} bytes, but only {} bytes follow", rest.len());
        return Err(Error::file(file, reason).with_remedy(truncated));
    };
    if header.first() != Some(&b'{') {
        return Err(Error::file(file, "the header does not start with '{'")
            .with_remedy("this is not a safetensors file"));
    }
    let raw = json::header(header).map_err(|e| match e.key {
        Some(name) => Error::tensor(file, &name, format!("malformed header: {}", e.reason)),
        None => Error::file(file, format!("malformed header: {}", e.reason)),
    })?;
    let mut tensors = raw
        .tensors
        .into_iter()
        .map(|t| check(file, t, data.len()))
        .collect::<Result<Vec<Tensor>>>()?;
    tensors.sort_by_key(|t| (t.start, t.end));
    check_tiling(file, &tensors, data.len())?;
    Ok(Header { metadata: raw.metadata, tensors, data_start: 8 + length })
}

/// One tensor against its own claims and the length of the data.
fn check(file: &Path, raw: json::RawTensor, data: usize) -> Result<Tensor> {
    let bad = |reason: String| Error::tensor(file, &raw.name, reason);
    let dtype = Dtype::parse(&raw.dtype).ok_or_else(|| {
        bad(format!("unknown dtype \"{}\"", crate::error::shorten(&raw.dtype)))
            .with_remedy(format!("known are {}", Dtype::known_names()))
    })?;
    let elements = raw
        .shape
        .iter()
        .try_fold(1u64, |product, dim| product.checked_mul(*dim))
        .ok_or_else(|| bad(format!("the shape {} overflows", show(&raw.shape))))?;
    let shape = raw
        .shape
        .iter()
        .map(|dim| usize::try_from(*dim).ok())
        .collect::<Option<Vec<usize>>>()
        .ok_or_else(|| bad(format!("the shape {} overflows", show(&raw.shape))))?;
    let [start, end] = raw.offsets;
    if start > end {
        return Err(bad(format!("data_offsets {start}..{end} run backwards")));
    }
    if end > data as u64 {
        return Err(bad(format!(
            "data_offsets {start}..{end} lie outside the {data} bytes of data in the file"
        ))
        .with_remedy("the file may be truncated: download or copy it again"));
    }
    let bytes = dtype.bytes_for(elements).ok_or_else(|| {
        let reason = if elements.checked_mul(8).is_none() {
            "overflows"
        } else {
            "is misaligned: it does not fill whole bytes"
        };
        bad(format!("{elements} elements of {dtype}, shape {}, {reason}", show(&raw.shape)))
    })?;
    if end - start != bytes {
        return Err(bad(format!(
            "data_offsets {start}..{end} hold {} bytes, but {dtype} of shape {} takes {bytes}",
            end - start,
            show(&raw.shape)
        )));
    }
    if start % dtype.alignment() as u64 != 0 {
        return Err(bad(format!(
            "data_offsets {start}..{end} are misaligned: {dtype} needs a multiple of {}",
            dtype.alignment()
        ))
        .with_remedy("save the file again with a current safetensors library"));
    }
    // Both fit: they are at most `data`, a usize.
    let (start, end) = (start as usize, end as usize);
    Ok(Tensor { name: raw.name, dtype, shape, start, end })
}

/// The tensors, sorted by offset, must cover the data exactly once.
fn check_tiling(file: &Path, tensors: &[Tensor], data: usize) -> Result<()> {
    let mut expected = 0;
    let mut before: Option<&Tensor> = None;
    for t in tensors {
        if t.start < expected {
            let other = before.map_or("", |b| b.name.as_str());
            return Err(Error::tensor(
                file,
                &t.name,
                format!(
                    "data_offsets {}..{} overlap tensor \"{}\", which ends at {expected}",
                    t.start,
                    t.end,
                    crate::error::shorten(other)
                ),
            ));
        }
        if t.start > expected {
            let reason = format!(
                "data_offsets {}..{} leave a gap: bytes {expected}..{} belong to no tensor",
                t.start, t.end, t.start
            );
            return Err(Error::tensor(file, &t.name, reason));
        }
        expected = t.end;
        before = Some(t);
    }
    if expected != data {
        let reason = format!(
            "{} bytes follow the last tensor (which ends at {expected} of {data})",
            data - expected
        );
        return Err(Error::file(file, reason)
            .with_remedy("the file is damaged or hides data; save it again"));
    }
    Ok(())
}

/// A shape for a message, shortened when hostile.
fn show(shape: &[u64]) -> String {
    if shape.len() <= 8 {
        format!("{shape:?}")
    } else {
        format!("{:?}... of {} dimensions", &shape[..8], shape.len())
    }
}

/// Writes the header (length, JSON, padding with spaces) for tensors whose data follow one another
/// in the given order. The result has at least `at_least` bytes and a multiple of 8.
///
/// # Errors
/// When the header would exceed [`MAX_HEADER`].
pub fn header_bytes(
    file: &Path,
    metadata: &BTreeMap<String, String>,
    tensors: &[Tensor],
    at_least: usize,
) -> Result<Vec<u8>> {
    let mut object = serde_json::Map::new();
    if !metadata.is_empty() {
        object.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    for t in tensors {
        let value = serde_json::json!({
            "dtype": t.dtype.name(),
            "shape": t.shape,
            "data_offsets": [t.start, t.end],
        });
        object.insert(t.name.clone(), value);
    }
    let mut bytes = vec![0u8; 8];
    serde_json::to_writer(&mut bytes, &object)
        .map_err(|e| Error::io(file, "write the header of", e.into()))?;
    let total = bytes.len().max(at_least).next_multiple_of(8);
    bytes.resize(total, b' ');
    let length = (total - 8) as u64;
    if length > MAX_HEADER {
        let reason = format!("{} tensors need a header of {length} bytes", tensors.len());
        return Err(Error::output(file, reason).with_remedy("lower the maximal shard size"));
    }
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// A small file in memory: name, type, shape and little-endian bytes of every tensor. Types of the
/// largest alignment come first, so that every tensor is aligned; otherwise the order is kept.
///
/// # Errors
/// When the bytes of a tensor do not fit its type and shape, or the header is too long.
pub fn file_bytes<B: AsRef<[u8]>>(
    file: &Path,
    tensors: &[(String, Dtype, Vec<usize>, B)],
) -> Result<Vec<u8>> {
    let mut header = Vec::with_capacity(tensors.len());
    let mut end = 0;
    let mut sorted: Vec<&(String, Dtype, Vec<usize>, B)> = tensors.iter().collect();
    sorted.sort_by_key(|(_, dtype, _, _)| std::cmp::Reverse(dtype.alignment()));
    for (name, dtype, shape, bytes) in &sorted {
        let start = end;
        end += bytes.as_ref().len();
        if dtype.bytes_for(shape.iter().product::<usize>() as u64) != Some((end - start) as u64) {
            let reason = format!(
                "{} bytes do not make `{name}`, {} of shape {shape:?}",
                end - start,
                dtype.name()
            );
            return Err(Error::output(file, reason));
        }
        let (name, shape) = (name.clone(), shape.clone());
        header.push(Tensor { name, dtype: *dtype, shape, start, end });
    }
    let mut out = header_bytes(file, &BTreeMap::new(), &header, 0)?;
    sorted.iter().for_each(|(_, _, _, bytes)| out.extend_from_slice(bytes.as_ref()));
    Ok(out)
}

#[cfg(test)]
pub(crate) mod tests;
