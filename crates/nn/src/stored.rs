//! Computing with compressed layers: from what is stored to the layout of the kernels.

use std::sync::Arc;

use store::packed::{QuantizedMatrix, Stored};
use tensor::lowbit::{LowBit, LowBitColumns};
use tensor::skinny;

use crate::Result;
use crate::pyramid::Pyramid;
use crate::weights::transpose;

/// The weights of a stored layer in f32, `[out, in]`.
///
/// # Errors
/// When a pyramid code is damaged or unknown to the engine.
pub fn dequantize(stored: &Stored) -> Result<Vec<f32>> {
    Ok(match stored {
        Stored::Grid(m) => m.dequantize(),
        Stored::Columns(m) => transpose(&m.dequantize(), m.out_features, m.in_features),
        Stored::Pyramid(m) => Pyramid::new(m)?.dequantize(),
    })
}

/// A layer in the layout of its product kernel.
#[derive(Clone)]
pub(crate) enum Kernel {
    /// Integer grid along the input.
    Grid(Arc<LowBit>),
    /// Integer grid along the output.
    Columns(Arc<LowBitColumns>),
    /// Pyramid codes.
    Pyramid(Arc<Pyramid>),
    /// f32, for what has no kernel of its own.
    Dense(Arc<Vec<f32>>),
}

impl Kernel {
    /// Prepares a layer.
    pub(crate) fn new(stored: &Stored) -> Result<Self> {
        match stored {
            Stored::Grid(m) => Ok(Self::Grid(Arc::new(low_bit(m)?))),
            // Groups of unusual sizes have no kernel.
            Stored::Columns(m) => Ok(match low_bit_columns(m) {
                Ok(kernel) => Self::Columns(Arc::new(kernel)),
                Err(_) => Self::Dense(Arc::new(dequantize(stored)?)),
            }),
            Stored::Pyramid(m) => Ok(Self::Pyramid(Arc::new(Pyramid::new(m)?))),
        }
    }

    /// `y = x Wᵀ + b`; `x`: `[rows, in]`, `y`: `[rows, out]`.
    pub(crate) fn linear(
        &self,
        [out, width]: [usize; 2],
        x: &[f32],
        rows: usize,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        match self {
            Self::Grid(m) => m.linear(x, rows, bias, y),
            Self::Columns(m) => m.linear(x, rows, bias, y),
            Self::Pyramid(m) => m.linear(x, rows, bias, y),
            Self::Dense(w) => skinny::linear_f32(x, rows, w, out, width, bias, y),
        }
    }
}

fn low_bit(m: &QuantizedMatrix) -> Result<LowBit> {
    let zeros: Vec<f32> = m.zeros.iter().map(|&z| f32::from(z)).collect();
    Ok(LowBit::new(
        m.bits,
        m.out_features,
        m.in_features,
        m.group_size,
        &m.codes,
        &m.scales,
        &zeros,
        m.group_index.as_deref(),
    )?)
}

/// `m` is the grid of the transposed weight, `[in, out]`.
fn low_bit_columns(m: &QuantizedMatrix) -> Result<LowBitColumns> {
    let zeros: Vec<f32> = m.zeros.iter().map(|&z| f32::from(z)).collect();
    let (inputs, out) = (m.out_features, m.in_features);
    Ok(LowBitColumns::new(m.bits, out, inputs, m.group_size, &m.codes, &m.scales, &zeros)?)
}
