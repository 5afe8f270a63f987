//! Reading the tensors of a packed module with their shapes checked.

use half::f16;

use super::QuantizedMatrix;
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::TensorInfo;

/// An error about one tensor of the checkpoint.
pub(super) fn bad(info: &TensorInfo, reason: impl Into<String>) -> Error {
    Error::tensor(&info.file, &info.name, reason)
}

/// Description of `module.leaf`, which must have two dimensions.
pub(super) fn matrix<'a>(
    checkpoint: &'a Checkpoint,
    module: &str,
    leaf: &str,
) -> Result<(&'a TensorInfo, [usize; 2])> {
    let info = checkpoint.info(&format!("{module}.{leaf}"))?;
    match info.shape.as_slice() {
        [rows, columns] => Ok((info, [*rows, *columns])),
        other => {
            Err(bad(info, format!("has the shape {other:?}, where two dimensions are needed")))
        }
    }
}

/// The 32-bit words of a tensor.
pub(super) fn words(checkpoint: &Checkpoint, info: &TensorInfo) -> Result<Vec<u32>> {
    if !matches!(info.dtype, Dtype::I32 | Dtype::U32) {
        return Err(bad(info, format!("is {}, where I32 is needed", info.dtype)));
    }
    let bytes = checkpoint.bytes(&info.name)?;
    let (whole, _) = bytes.as_chunks::<4>();
    Ok(whole.iter().map(|b| u32::from_le_bytes(*b)).collect())
}

/// Requires a shape.
pub(super) fn expect_shape(info: &TensorInfo, shape: [usize; 2], why: &str) -> Result<()> {
    if info.shape == shape {
        Ok(())
    } else {
        Err(bad(info, format!("has the shape {:?}; {why} needs {shape:?}", info.shape)))
    }
}

/// Scales as f16 bytes; refuses values that f16 would change, because the codes were chosen for
/// the exact ones.
pub(super) fn scale_bytes(module: &str, scales: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(scales.len() * 2);
    for scale in scales {
        let rounded = f16::from_f32(*scale);
        if rounded.to_f32() != *scale {
            let reason = format!("the scale {scale:e} is not representable in f16");
            return Err(Error::packed(module, reason)
                .with_remedy("round scales to f16 before choosing codes"));
        }
        bytes.extend(rounded.to_le_bytes());
    }
    Ok(bytes)
}

/// Whether every zero point is the middle of the grid.
pub(super) fn all_middle(m: &QuantizedMatrix) -> bool {
    m.zeros.iter().all(|z| *z == m.middle())
}
