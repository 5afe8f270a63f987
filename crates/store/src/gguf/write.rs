//! Writing a GGUF file (version 3, little endian): header, metadata, tensors one after another,
//! whole or not at all. Memory holds one tensor at a time. What the tensors are called and what
//! the metadata say is the caller's business.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::metadata::{Array, Value};
use crate::atomic::replace;
use crate::dtype::{Dtype, GgmlType};
use crate::error::{Error, Result};

/// Tensors start at multiples of this.
const ALIGNMENT: u64 = 32;
/// ggml's limit for tensor names, terminating zero included.
const MAX_NAME: usize = 64;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorPlan {
    /// Name in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Element type.
    pub ty: GgmlType,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorPlan {
    /// Bytes of the tensor.
    ///
    /// # Errors
    /// The reason: rows that are no whole number of blocks, or an impossible size.
    fn bytes(&self) -> std::result::Result<u64, String> {
        let row = self.shape.last().copied().unwrap_or(0);
        if self.shape.is_empty()
            || self.shape.len() > 4
            || !row.is_multiple_of(self.ty.block_size())
        {
            return Err(format!("the shape {:?} cannot be stored as {}", self.shape, self.ty));
        }
        let elements = self.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64));
        elements
            .and_then(|n| Dtype::Ggml(self.ty).bytes_for(n))
            .ok_or_else(|| format!("the shape {:?} is too large", self.shape))
    }
}

/// Writes the file `path`; `fill` gives the bytes of one tensor after another. Returns the size of the
/// file.
///
/// # Errors
/// When the file exists and may not be replaced, a tensor cannot be stored as planned, `fill` fails
/// or gives another number of bytes, or the disk refuses; nothing is left behind then.
pub fn write<E: From<Error>>(
    path: &Path,
    overwrite: bool,
    metadata: &[(String, Value)],
    tensors: &[TensorPlan],
    mut fill: impl FnMut(&TensorPlan) -> std::result::Result<Vec<u8>, E>,
) -> std::result::Result<u64, E> {
    if path.exists() && !overwrite {
        return Err(E::from(
            Error::output(path, "already exists")
                .with_remedy("choose another name, or allow overwriting"),
        ));
    }
    if path.is_dir() {
        return Err(E::from(Error::output(path, "is a directory; GGUF is one file")));
    }
    let directory = crate::atomic::parent(path);
    std::fs::create_dir_all(&directory).map_err(|e| Error::io(&directory, "create", e))?;
    let header = header(path, metadata, tensors)?;
    let mut size = 0;
    replace(path, |file: &mut File| {
        let io = |e| E::from(Error::io(path, "write", e));
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&header).map_err(io)?;
        let mut at = header.len() as u64;
        for tensor in tensors {
            pad(&mut out, &mut at).map_err(io)?;
            let bytes = fill(tensor)?;
            let expected = tensor.bytes().map_err(|e| Error::tensor(path, &tensor.name, e))?;
            if bytes.len() as u64 != expected {
                let reason = format!("{} bytes given where {expected} belong", bytes.len());
                return Err(E::from(Error::tensor(path, &tensor.name, reason)));
            }
            out.write_all(&bytes).map_err(io)?;
            at += expected;
        }
        pad(&mut out, &mut at).map_err(io)?;
        out.flush().map_err(io)?;
        size = at;
        Ok(())
    })?;
    Ok(size)
}

fn pad(out: &mut impl Write, at: &mut u64) -> std::io::Result<()> {
    let missing = at.next_multiple_of(ALIGNMENT) - *at;
    out.write_all(&[0; ALIGNMENT as usize][..missing as usize])?;
    *at += missing;
    Ok(())
}

fn header(path: &Path, metadata: &[(String, Value)], tensors: &[TensorPlan]) -> Result<Vec<u8>> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(value.kind().to_le_bytes());
        value.put(&mut out);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        let bad = |reason: String| Error::tensor(path, &tensor.name, reason);
        if tensor.name.len() >= MAX_NAME {
            return Err(bad(format!("ggml holds names of up to {} bytes", MAX_NAME - 1)));
        }
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for dimension in tensor.shape.iter().rev() {
            out.extend((*dimension as u64).to_le_bytes());
        }
        out.extend(tensor.ty.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = (offset + tensor.bytes().map_err(bad)?).next_multiple_of(ALIGNMENT);
    }
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Appends the numbers of an array.
macro_rules! numbers {
    ($out:expr, $values:expr) => {
        for value in $values {
            $out.extend(value.to_le_bytes());
        }
    };
}

impl Value {
    /// The type's number in a file.
    fn kind(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => out.push(*v),
            Self::I8(v) => out.extend(v.to_le_bytes()),
            Self::U16(v) => out.extend(v.to_le_bytes()),
            Self::I16(v) => out.extend(v.to_le_bytes()),
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::I32(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push(u8::from(*v)),
            Self::String(v) => text(out, v),
            Self::Array(v) => v.put(out),
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::I64(v) => out.extend(v.to_le_bytes()),
            Self::F64(v) => out.extend(v.to_le_bytes()),
        }
    }
}

impl Array {
    fn put(&self, out: &mut Vec<u8>) {
        let kind: u32 = match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        };
        out.extend(kind.to_le_bytes());
        out.extend((self.len() as u64).to_le_bytes());
        match self {
            Self::U8(v) => out.extend(v),
            Self::I8(v) => numbers!(out, v),
            Self::U16(v) => numbers!(out, v),
            Self::I16(v) => numbers!(out, v),
            Self::U32(v) => numbers!(out, v),
            Self::I32(v) => numbers!(out, v),
            Self::F32(v) => numbers!(out, v),
            Self::Bool(v) => out.extend(v.iter().map(|b| u8::from(*b))),
            Self::String(v) => v.iter().for_each(|t| text(out, t)),
            Self::Array(v) => v.iter().for_each(|a| a.put(out)),
            Self::U64(v) => numbers!(out, v),
            Self::I64(v) => numbers!(out, v),
            Self::F64(v) => numbers!(out, v),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse_bytes;
    use super::*;

    fn every_value() -> Vec<(String, Value)> {
        let arrays = [
            Array::U8(vec![1, 255]),
            Array::I8(vec![-1]),
            Array::U16(vec![300]),
            Array::I16(vec![-300]),
            Array::U32(vec![1 << 20]),
            Array::I32(vec![-(1 << 20)]),
            Array::F32(vec![0.5, -1.5]),
            Array::Bool(vec![true, false]),
            Array::String(vec!["ä".into(), String::new()]),
            Array::Array(vec![Array::U8(vec![7]), Array::U8(vec![])]),
            Array::U64(vec![1 << 40]),
            Array::I64(vec![-(1 << 40)]),
            Array::F64(vec![0.1]),
        ];
        let scalars = [
            Value::U8(1),
            Value::I8(-1),
            Value::U16(2),
            Value::I16(-2),
            Value::U32(3),
            Value::I32(-3),
            Value::F32(1.25),
            Value::Bool(true),
            Value::String("text".into()),
            Value::U64(4),
            Value::I64(-4),
            Value::F64(0.1),
        ];
        scalars
            .into_iter()
            .chain(arrays.map(Value::Array))
            .enumerate()
            .map(|(i, value)| (format!("key.{i}"), value))
            .collect()
    }

    #[test]
    fn what_is_written_is_parsed_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/x.gguf");
        let metadata = every_value();
        let plan = |name: &str, ty, shape: &[usize]| TensorPlan {
            name: name.into(),
            ty,
            shape: shape.to_vec(),
        };
        let tensors = [
            plan("a", GgmlType::F16, &[3]),
            plan("b", GgmlType::Q4_0, &[2, 64]),
            plan("c", GgmlType::F32, &[2, 3, 1, 5]),
        ];
        let fill = |t: &TensorPlan| {
            Ok::<_, Error>(vec![t.name.as_bytes()[0]; t.bytes().unwrap() as usize])
        };
        let size = write(&path, false, &metadata, &tensors, fill).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, size);
        let header = parse_bytes(&bytes, &path).unwrap();
        assert_eq!(header.version, 3);
        for (key, value) in &metadata {
            assert_eq!(header.metadata.get(key), Some(value));
        }
        for (read, written) in header.tensors.iter().zip(&tensors) {
            assert_eq!((&read.name, &read.shape), (&written.name, &written.shape));
            assert_eq!(read.start % 32, 0);
            let fill = written.name.as_bytes()[0];
            assert!(bytes[read.start..read.start + read.len].iter().all(|b| *b == fill));
        }
        let error = write(&path, false, &metadata, &tensors, fill).unwrap_err();
        assert!(error.to_string().contains("already exists"), "{error}");
        write(&path, true, &metadata, &tensors, fill).unwrap();
    }

    #[test]
    fn bad_plans_leave_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.gguf");
        let mut tensor = TensorPlan { name: "t".into(), ty: GgmlType::Q4_K, shape: vec![2, 128] };
        let short = |_: &TensorPlan| Ok::<_, Error>(vec![0; 3]);
        let refused = |tensor: &TensorPlan, what: &str| {
            let error = write(&path, false, &[], std::slice::from_ref(tensor), short).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        };
        refused(&tensor, "cannot be stored as Q4_K");
        tensor.ty = GgmlType::F32;
        refused(&tensor, "3 bytes given where 1024");
        tensor.name = "n".repeat(64);
        refused(&tensor, "up to 63 bytes");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
