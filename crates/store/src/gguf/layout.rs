//! Values of a GGUF tensor brought back to Hugging Face order, from bytes to bytes.
//!
//! Row orders are changed on the stored bytes, whatever the block type, because a row is always a
//! whole number of blocks. Only a transposition of quantised values and the `+1` of Gemma norms
//! leave the stored type, for F32.

use half::{bf16, f16};

use super::dequant::dequantize;
use super::names::Change;
use super::parse::Tensor;
use crate::dtype::Dtype;

/// Checks that `change` fits the tensor and says what type and shape undoing it gives.
pub(super) fn plan(tensor: &Tensor, change: Change) -> Result<(Dtype, Vec<usize>), String> {
    let shape = tensor.shape.clone();
    let rows = shape.first().copied().unwrap_or(0);
    let want = |multiple: Option<usize>, what: &str| match multiple {
        Some(m) if m > 0 && rows.is_multiple_of(m) => Ok(()),
        _ => Err(format!("{rows} rows do not divide into {what}")),
    };
    match change {
        Change::None => Ok((tensor.dtype, shape)),
        Change::RotaryRows { heads } => {
            want(heads.checked_mul(2), &format!("two halves of {heads} heads"))?;
            row_bytes(tensor)?;
            Ok((tensor.dtype, shape))
        }
        Change::FusedRows { heads } => {
            want(heads.checked_mul(3), &format!("q, k and v of {heads} heads"))?;
            row_bytes(tensor)?;
            Ok((tensor.dtype, shape))
        }
        Change::Transposed => match shape[..] {
            [rows, columns] => {
                let dtype = match tensor.dtype {
                    Dtype::Ggml(_) => Dtype::F32,
                    plain => plain,
                };
                Ok((dtype, vec![columns, rows]))
            }
            _ => Err(format!("has shape {shape:?} where a matrix was expected")),
        },
        Change::PlusOne => match tensor.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::Ggml(_) => Ok((Dtype::F32, shape)),
            other => Err(format!("is {other} where floats were expected")),
        },
    }
}

/// Undoes `change` on the stored bytes of `tensor`; [`plan`] has accepted it.
pub(super) fn undo(tensor: &Tensor, change: Change, bytes: &[u8]) -> Result<Vec<u8>, String> {
    if bytes.len() != tensor.len {
        return Err(format!("has {} bytes where {} were expected", bytes.len(), tensor.len));
    }
    match change {
        Change::None => Ok(bytes.to_vec()),
        Change::RotaryRows { .. } | Change::FusedRows { .. } => {
            gather(tensor, bytes, |row| stored_row(change, tensor.shape[0], row))
        }
        Change::Transposed => match tensor.dtype {
            Dtype::Ggml(_) => Ok(transpose::<4>(tensor, &f32_bytes(values(tensor, bytes)?))),
            plain => match plain.bits() as u32 {
                64 => Ok(transpose::<8>(tensor, bytes)),
                32 => Ok(transpose::<4>(tensor, bytes)),
                16 => Ok(transpose::<2>(tensor, bytes)),
                _ => Ok(transpose::<1>(tensor, bytes)),
            },
        },
        Change::PlusOne => {
            let mut values = values(tensor, bytes)?;
            values.iter_mut().for_each(|value| *value -= 1.0);
            Ok(f32_bytes(values))
        }
    }
}

/// Where row `row` of the Hugging Face order stands in the file; [`plan`] has accepted the change.
fn stored_row(change: Change, rows: usize, row: usize) -> usize {
    match change {
        Change::RotaryRows { heads } => {
            let half = rows / heads / 2;
            let (head, inside) = (row / (2 * half), row % (2 * half));
            head * 2 * half + 2 * (inside % half) + inside / half
        }
        Change::FusedRows { heads } => {
            let size = rows / heads / 3;
            let (head, part) = (row / (3 * size), row / size % 3);
            (part * heads + head) * size + row % size
        }
        _ => row,
    }
}

impl Change {
    /// Puts the rows of `values` (`rows` rows in Hugging Face order) where the file has them; for
    /// values, codes, scales or the bytes of blocks.
    ///
    /// # Errors
    /// The reason, when the rows do not divide as the change needs.
    pub fn arrange<T: Copy>(self, values: &[T], rows: usize) -> Result<Vec<T>, String> {
        let heads = match self {
            Self::RotaryRows { heads } => heads.checked_mul(2),
            Self::FusedRows { heads } => heads.checked_mul(3),
            _ => return Ok(values.to_vec()),
        };
        let fits = heads.is_some_and(|n| n > 0 && rows.is_multiple_of(n));
        if !fits || rows == 0 || !values.len().is_multiple_of(rows) {
            return Err(format!("{rows} rows do not divide into the parts of {heads:?} heads"));
        }
        let width = values.len() / rows;
        let mut out = values.to_vec();
        for (row, values) in values.chunks_exact(width.max(1)).enumerate() {
            let at = stored_row(self, rows, row) * width;
            out[at..at + width].copy_from_slice(values);
        }
        Ok(out)
    }
}

fn row_bytes(tensor: &Tensor) -> Result<usize, String> {
    let rows = tensor.shape.first().copied().unwrap_or(0);
    match tensor.len.checked_div(rows) {
        Some(bytes) if bytes * rows == tensor.len => Ok(bytes),
        _ => Err(format!("{} bytes do not divide into {rows} rows", tensor.len)),
    }
}

/// Row `i` of the result is row `from(i)` of `bytes`.
fn gather(tensor: &Tensor, bytes: &[u8], from: impl Fn(usize) -> usize) -> Result<Vec<u8>, String> {
    let width = row_bytes(tensor)?;
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..tensor.shape[0] {
        let start = from(row) * width;
        out.extend_from_slice(&bytes[start..start + width]);
    }
    Ok(out)
}

/// `[rows, columns]` elements of `B` bytes to `[columns, rows]`.
fn transpose<const B: usize>(tensor: &Tensor, bytes: &[u8]) -> Vec<u8> {
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let (source, _) = bytes.as_chunks::<B>();
    let mut out = vec![0u8; bytes.len()];
    let (target, _) = out.as_chunks_mut::<B>();
    const TILE: usize = 32; // both sides of a tile stay in cache
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..columns).step_by(TILE) {
            for r in r0..rows.min(r0 + TILE) {
                for c in c0..columns.min(c0 + TILE) {
                    target[c * rows + r] = source[r * columns + c];
                }
            }
        }
    }
    out
}

fn values(tensor: &Tensor, bytes: &[u8]) -> Result<Vec<f32>, String> {
    Ok(match tensor.dtype {
        Dtype::Ggml(ty) => dequantize(ty, bytes, tensor.shape.iter().product())?,
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => {
            bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect()
        }
        other => return Err(format!("is {other} where floats were expected")),
    })
}

fn f32_bytes(values: Vec<f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], dtype: Dtype) -> Tensor {
        let n: usize = shape.iter().product();
        let len = dtype.bytes_for(n as u64).unwrap() as usize;
        Tensor { name: "t".into(), dtype, shape: shape.to_vec(), start: 0, len }
    }

    #[test]
    fn rotary_rows_return_to_half_split_order() {
        // 2 heads of size 4. Converters store rows 0 2 1 3 of every head.
        let t = tensor(&[8], Dtype::I8);
        let change = Change::RotaryRows { heads: 2 };
        assert_eq!(plan(&t, change).unwrap(), (Dtype::I8, vec![8]));
        assert_eq!(undo(&t, change, &[0, 2, 1, 3, 4, 6, 5, 7]).unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
        let hf: Vec<u32> = (0..8).collect();
        assert_eq!(change.arrange(&hf, 8).unwrap(), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert!(Change::RotaryRows { heads: 3 }.arrange(&hf, 8).is_err());
        assert_eq!(Change::PlusOne.arrange(&hf, 8).unwrap(), hf);
        assert!(plan(&t, Change::RotaryRows { heads: 3 }).is_err());
        assert!(plan(&t, Change::RotaryRows { heads: 0 }).is_err());
    }

    #[test]
    fn fused_rows_return_to_qkv_per_head() {
        // 2 heads of size 1: stored q0 q1 k0 k1 v0 v1.
        let t = tensor(&[6, 2], Dtype::I8);
        let stored = [0, 0, 3, 3, 1, 1, 4, 4, 2, 2, 5, 5];
        let got = undo(&t, Change::FusedRows { heads: 2 }, &stored).unwrap();
        assert_eq!(got, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
        assert_eq!(Change::FusedRows { heads: 2 }.arrange(&got, 6).unwrap(), stored);
    }

    #[test]
    fn transposition_and_plus_one() {
        let t = tensor(&[2, 3], Dtype::I8);
        assert_eq!(plan(&t, Change::Transposed).unwrap().1, [3, 2]);
        assert_eq!(undo(&t, Change::Transposed, &[1, 2, 3, 4, 5, 6]).unwrap(), [1, 4, 2, 5, 3, 6]);

        let t = tensor(&[1], Dtype::F16);
        let got = undo(&t, Change::PlusOne, &f16::from_f32(1.5).to_le_bytes()).unwrap();
        assert_eq!(got, 0.5f32.to_le_bytes());
    }
}
