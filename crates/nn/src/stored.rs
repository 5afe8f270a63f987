//! Computing with compressed layers: from what is stored to the layout of the kernels.

use std::sync::Arc;

use store::packed::{QuantizedMatrix, Stored};
use tensor::lowbit::LowBit;
use tensor::skinny;

use crate::Result;
use crate::weights::transpose;

/// The weights of a stored layer in f32, `[out, in]`.
pub fn dequantize(stored: &Stored) -> Vec<f32> {
    match stored {
        Stored::Grid(m) => m.dequantize(),
        Stored::Columns(m) => transpose(&m.dequantize(), m.out_features, m.in_features),
    }
}

/// A layer in the layout of its product kernel.
#[derive(Clone)]
pub(crate) enum Kernel {
    /// Integer grid along the input.
    Grid(Arc<LowBit>),
    /// f32, for what has no kernel of its own.
    Dense(Arc<Vec<f32>>),
}

impl Kernel {
    /// Prepares a layer.
    pub(crate) fn new(stored: &Stored) -> Result<Self> {
        match stored {
            Stored::Grid(m) => Ok(Self::Grid(Arc::new(low_bit(m)?))),
            Stored::Columns(_) => Ok(Self::Dense(Arc::new(dequantize(stored)))),
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
