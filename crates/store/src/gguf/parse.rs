//! The header of a GGUF file, read from a byte slice and checked before anything is trusted.
//!
//! Counts and lengths are compared with the bytes that are left before memory is taken for them;
//! tensors must be aligned, lie inside the file and not overlap.

use std::collections::HashSet;

use super::metadata::{Array, Metadata, Value};
use crate::dtype::{Dtype, GgmlType};
use crate::error::shorten;

/// Longest key that the format allows.
const MAX_KEY: usize = 65535;
/// Longest tensor name (ggml itself stops at 64).
const MAX_NAME: usize = 1024;
/// ggml tensors have at most four dimensions.
const MAX_DIMENSIONS: u32 = 4;
/// Arrays of arrays deeper than this are refused.
const MAX_DEPTH: usize = 4;
const DEFAULT_ALIGNMENT: usize = 32;

/// A validated GGUF header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// All key-value pairs.
    pub metadata: Metadata,
    /// Tensors in file order under their GGUF names.
    pub tensors: Vec<Tensor>,
}

/// A tensor as the header describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Name in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first (the file stores it the other way round).
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: usize,
    /// Number of bytes.
    pub len: usize,
}

impl Header {
    /// The tensor of this GGUF name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

/// What is wrong, and with which tensor if with one.
pub(super) struct Fault {
    pub tensor: Option<String>,
    pub reason: String,
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self { tensor: None, reason }
    }
}

fn tensor_fault(name: &str, reason: impl Into<String>) -> Fault {
    Fault { tensor: Some(name.to_owned()), reason: reason.into() }
}

pub(super) fn parse(bytes: &[u8]) -> Result<Header, Fault> {
    let mut reader = Reader { bytes, at: 0 };
    let version = magic_and_version(&mut reader)?;
    let tensor_count = reader.u64("the number of tensors")?;
    let pair_count = reader.u64("the number of metadata pairs")?;

    // The shortest pair: key length, type, one byte of value.
    let pairs = reader.count(pair_count, 13, "metadata pairs")?;
    let mut metadata = Metadata::default();
    for _ in 0..pairs {
        let key = reader.text(MAX_KEY, "a metadata key")?;
        let kind = reader.u32("a metadata type")?;
        let value = reader
            .value(kind)
            .map_err(|reason| format!("metadata key \"{}\": {reason}", shorten(&key)))?;
        let shown = shorten(&key);
        if !metadata.insert(key, value) {
            return Err(format!("metadata key \"{shown}\" occurs twice").into());
        }
    }
    let alignment = alignment(&metadata)?;

    // The shortest description: name length, dimensions (one), type, offset.
    let count = reader.count(tensor_count, 32, "tensors")?;
    let mut tensors = Vec::with_capacity(count);
    let mut seen = HashSet::with_capacity(count);
    for _ in 0..count {
        let tensor = tensor(&mut reader, alignment)?;
        if !seen.insert(tensor.name.clone()) {
            return Err(tensor_fault(&tensor.name, "is described twice"));
        }
        tensors.push(tensor);
    }

    place(&mut tensors, reader.at, alignment, bytes.len())?;
    Ok(Header { version, metadata, tensors })
}

fn magic_and_version(reader: &mut Reader<'_>) -> Result<u32, String> {
    let magic = reader.take(4, "the magic number")?;
    if magic != b"GGUF" {
        return Err("is no GGUF file (it does not begin with \"GGUF\")".into());
    }
    let version = reader.u32("the version")?;
    match version {
        2 | 3 => Ok(version),
        1 => Err("GGUF version 1 is not supported; convert the file to version 3".into()),
        _ if matches!(version.swap_bytes(), 1..=3) => {
            Err("big-endian GGUF is not supported; convert the file to little endian".into())
        }
        other => Err(format!("GGUF version {other} is not supported; versions 2 and 3 are")),
    }
}

fn alignment(metadata: &Metadata) -> Result<usize, String> {
    if metadata.get("general.alignment").is_none() {
        return Ok(DEFAULT_ALIGNMENT);
    }
    metadata
        .get_u32("general.alignment")
        .filter(|a| a.is_power_of_two())
        .map(|a| a as usize)
        .ok_or_else(|| "general.alignment is no power of two".to_owned())
}

/// One tensor description; `start` is still relative to the data section.
fn tensor(reader: &mut Reader<'_>, alignment: usize) -> Result<Tensor, Fault> {
    let name = reader.text(MAX_NAME, "a tensor name")?;
    let fault = |reason: String| tensor_fault(&name, reason);
    let dimensions = reader.u32("the number of dimensions").map_err(fault)?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(fault(format!("has {dimensions} dimensions; 1 to 4 are allowed")));
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        let size = reader.u64("a dimension").map_err(fault)?;
        shape.push(
            usize::try_from(size).map_err(|_| fault(format!("dimension {size} is too large")))?,
        );
    }
    let id = reader.u32("the type").map_err(fault)?;
    let dtype = dtype(id).ok_or_else(|| fault(format!("has the unknown GGML type {id}")))?;
    let row = shape[0];
    let len = (shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size)))
        .and_then(|elements| dtype.bytes_for(elements as u64))
        .and_then(|bytes| usize::try_from(bytes).ok());
    shape.reverse();
    let len = len.ok_or_else(|| fault(format!("has the impossible size {shape:?}")))?;
    if let Dtype::Ggml(kind) = dtype
        && !row.is_multiple_of(kind.block_size())
    {
        return Err(fault(format!(
            "rows of {row} elements are no whole number of {} blocks of {}",
            kind.name(),
            kind.block_size()
        )));
    }
    let offset = reader.u64("the offset").map_err(fault)?;
    let start = usize::try_from(offset)
        .ok()
        .filter(|start| start.is_multiple_of(alignment))
        .ok_or_else(|| fault(format!("offset {offset} is no multiple of {alignment}")))?;
    Ok(Tensor { name, dtype, shape, start, len })
}

/// Turns relative offsets into absolute ones; refuses what leaves the file or overlaps.
fn place(
    tensors: &mut [Tensor],
    header_end: usize,
    alignment: usize,
    file_len: usize,
) -> Result<(), Fault> {
    let data = header_end
        .checked_next_multiple_of(alignment)
        .ok_or_else(|| "general.alignment is too large".to_owned())?;
    for tensor in tensors.iter_mut() {
        let end = data
            .checked_add(tensor.start)
            .and_then(|start| Some((start, start.checked_add(tensor.len)?)));
        match end {
            Some((start, end)) if end <= file_len || tensor.len == 0 => tensor.start = start,
            _ => {
                return Err(tensor_fault(
                    &tensor.name,
                    format!(
                        "{} bytes at offset {} of the data section lie outside the file of \
                         {file_len} bytes; the file may be truncated",
                        tensor.len, tensor.start
                    ),
                ));
            }
        }
    }
    let mut order: Vec<&Tensor> = tensors.iter().filter(|tensor| tensor.len > 0).collect();
    order.sort_by_key(|tensor| tensor.start);
    for pair in order.windows(2) {
        if pair[0].start + pair[0].len > pair[1].start {
            let other = shorten(&pair[0].name);
            return Err(tensor_fault(&pair[1].name, format!("overlaps tensor \"{other}\"")));
        }
    }
    // An empty tensor may stand past the end; give it a place that can be sliced.
    for tensor in tensors.iter_mut().filter(|tensor| tensor.len == 0) {
        tensor.start = 0;
    }
    Ok(())
}

fn dtype(id: u32) -> Option<Dtype> {
    Some(match id {
        0 => Dtype::F32,
        1 => Dtype::F16,
        24 => Dtype::I8,
        25 => Dtype::I16,
        26 => Dtype::I32,
        27 => Dtype::I64,
        28 => Dtype::F64,
        30 => Dtype::BF16,
        other => Dtype::Ggml(GgmlType::from_id(other)?),
    })
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], String> {
        let slice =
            self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end)).ok_or_else(
                || format!("the file ends inside {what} (byte {})", self.bytes.len()),
            )?;
        self.at += n;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A claimed count, refused when so many items of at least `least` bytes cannot follow.
    fn count(&self, claimed: u64, least: usize, what: &str) -> Result<usize, String> {
        usize::try_from(claimed)
            .ok()
            .filter(|&count| count.checked_mul(least).is_some_and(|need| need <= self.left()))
            .ok_or_else(|| {
                format!("claims {claimed} {what} with {} bytes of file left", self.left())
            })
    }

    fn raw_text(&mut self, what: &str) -> Result<&'a [u8], String> {
        let claimed = self.u64(what)?;
        let len = self.count(claimed, 1, &format!("bytes for {what}"))?;
        self.take(len, what)
    }

    fn text(&mut self, limit: usize, what: &str) -> Result<String, String> {
        let raw = self.raw_text(what)?;
        if raw.len() > limit {
            return Err(format!("{what} has {} bytes; {limit} are allowed", raw.len()));
        }
        let text = std::str::from_utf8(raw).map_err(|_| format!("{what} is not UTF-8"))?;
        Ok(text.to_owned())
    }

    fn value(&mut self, kind: u32) -> Result<Value, String> {
        let what = "a metadata value";
        Ok(match kind {
            0 => Value::U8(self.array(what).map(u8::from_le_bytes)?),
            1 => Value::I8(self.array(what).map(i8::from_le_bytes)?),
            2 => Value::U16(self.array(what).map(u16::from_le_bytes)?),
            3 => Value::I16(self.array(what).map(i16::from_le_bytes)?),
            4 => Value::U32(self.u32(what)?),
            5 => Value::I32(self.array(what).map(i32::from_le_bytes)?),
            6 => Value::F32(self.array(what).map(f32::from_le_bytes)?),
            7 => Value::Bool(self.array::<1>(what)? != [0]),
            8 => Value::String(String::from_utf8_lossy(self.raw_text(what)?).into_owned()),
            9 => Value::Array(self.array_value(0)?),
            10 => Value::U64(self.u64(what)?),
            11 => Value::I64(self.array(what).map(i64::from_le_bytes)?),
            12 => Value::F64(self.array(what).map(f64::from_le_bytes)?),
            other => return Err(format!("has the unknown type {other}")),
        })
    }

    fn array_value(&mut self, depth: usize) -> Result<Array, String> {
        if depth >= MAX_DEPTH {
            return Err(format!("arrays are nested deeper than {MAX_DEPTH}"));
        }
        let kind = self.u32("an array type")?;
        let claimed = self.u64("an array length")?;
        Ok(match kind {
            0 => Array::U8(self.numbers(claimed, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(claimed, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(claimed, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(claimed, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(claimed, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(claimed, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(claimed, f32::from_le_bytes)?),
            7 => Array::Bool(self.numbers(claimed, |b: [u8; 1]| b != [0])?),
            8 => {
                let count = self.count(claimed, 8, "texts")?;
                let mut texts = Vec::with_capacity(count);
                for _ in 0..count {
                    let raw = self.raw_text("a text of an array")?;
                    texts.push(String::from_utf8_lossy(raw).into_owned());
                }
                Array::String(texts)
            }
            9 => {
                let count = self.count(claimed, 12, "arrays")?;
                let mut arrays = Vec::with_capacity(count);
                for _ in 0..count {
                    arrays.push(self.array_value(depth + 1)?);
                }
                Array::Array(arrays)
            }
            10 => Array::U64(self.numbers(claimed, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(claimed, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(claimed, f64::from_le_bytes)?),
            other => return Err(format!("holds elements of the unknown type {other}")),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        claimed: u64,
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, String> {
        let count = self.count(claimed, N, "array elements")?;
        let (values, _) = self.take(count * N, "an array")?.as_chunks::<N>();
        Ok(values.iter().map(|&bytes| decode(bytes)).collect())
    }
}
