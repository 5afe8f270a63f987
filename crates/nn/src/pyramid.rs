//! Layers stored as pyramid codes: from the container to the engine, with the rotation of the input.
//!
//! The engine holds `W' = W Q` for the orthogonal `Q` of the description, so that
//! `x Wᵀ = (x Q) W'ᵀ`: the input is turned, the weights stay packed.

use store::packed::pyramid::{AmpMode, PyramidCode, PyramidMatrix, RotationInfo, RotationType};
use tensor::Rng;
use tensor::pyramid::{AmplitudeMode, Code, Codec, PyramidWeights, Tail};
use tensor::rotation::Rotation;

use crate::{Error, Result};

/// The label under which rotations draw their random numbers.
const STREAM: &str = "input rotation";

/// The rotation of `info`: the same matrix for every layer with the same description.
///
/// # Errors
/// When the order has no Hadamard matrix, or is too large for a dense one.
pub fn input_rotation(info: &RotationInfo) -> Result<Rotation> {
    let mut rng = Rng::stream(info.seed, STREAM);
    match info.kind {
        RotationType::Hadamard => {
            Rotation::hadamard(info.order, &mut rng, false).ok_or_else(|| {
                Error::Input(format!(
                    "a rotation by a Hadamard matrix of order {}, which has no construction",
                    info.order
                ))
            })
        }
        RotationType::Random => Ok(Rotation::random(info.order, &mut rng, false)?),
    }
}

/// What the engine needs to know of a description.
pub fn pyramid_code(code: &PyramidCode) -> Code {
    Code {
        inputs: code.shape[1],
        dimension: code.dimension,
        pulses: code.pulses,
        tail: code.tail.map(|t| Tail { dimension: t.dimension, pulses: t.pulses }),
        amplitude: match code.amp_mode {
            AmpMode::BetaCdf => AmplitudeMode::BetaCdf,
            AmpMode::BetaLloyd => AmplitudeMode::BetaLloyd,
            AmpMode::BetaCond => AmplitudeMode::BetaCond,
            AmpMode::Uniform => AmplitudeMode::Uniform,
            AmpMode::Log => AmplitudeMode::Log,
            AmpMode::Fp16 => AmplitudeMode::F16,
        },
        amp_bits: code.amp_bits,
        amp_zero: code.amp_zero,
    }
}

/// A layer ready to be multiplied with.
pub(crate) struct Pyramid {
    weights: PyramidWeights,
    rotation: Option<Rotation>,
}

impl Pyramid {
    /// Brings a stored layer into the engine.
    pub(crate) fn new(m: &PyramidMatrix) -> Result<Self> {
        let codec = Codec::new(pyramid_code(&m.code))?;
        let (index, amplitude, norms) = (m.index.clone(), m.amplitude.clone(), m.norms.clone());
        Ok(Self {
            weights: PyramidWeights::new(codec, index, amplitude, norms)?,
            rotation: m.code.rotation.as_ref().map(input_rotation).transpose()?,
        })
    }

    /// The weights `[out, in]`, turned back.
    pub(crate) fn dequantize(&self) -> Vec<f32> {
        let mut w = self.weights.dequantize();
        if let Some(rotation) = &self.rotation {
            rotation.unrotate_rows_f32(&mut w);
        }
        w
    }

    /// `y = x Wᵀ + b`.
    pub(crate) fn linear(&self, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        match &self.rotation {
            None => self.weights.linear(x, rows, bias, y),
            Some(rotation) => {
                let mut turned = x.to_vec();
                rotation.rotate_rows_f32(&mut turned);
                self.weights.linear(&turned, rows, bias, y);
            }
        }
    }
}
