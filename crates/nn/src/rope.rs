//! Rotation tables: the inverse frequencies of every supported scaling, and a table that grows with
//! the positions asked for.

use std::sync::{Arc, PoisonError};

use tensor::ops::RopeTable;

use crate::config::{Positions, RopeScaling};
use crate::{Decoder, Error, Result};

impl Decoder {
    /// A rotation table for at least `length` positions, shared by all blocks.
    pub(crate) fn rope_table(&self, length: usize) -> Result<Arc<RopeTable>> {
        let Positions::Rotary { theta, dim, scaling } = self.config.positions else {
            return Err(Error::Input("the network has no rotary positions".into()));
        };
        let mut slot = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = slot.as_ref().filter(|table| table.length() >= length) {
            return Ok(table.clone());
        }
        // Doubling keeps decoding from rebuilding the table at every step.
        let length = length.next_power_of_two().max(256);
        let table =
            Arc::new(RopeTable::new(&inverse_frequencies(theta, dim, scaling), length, 1.0));
        *slot = Some(table.clone());
        Ok(table)
    }
}

/// Radians per position of the `dim / 2` rotated pairs, in the f32 steps of the transformers
/// library (angles grow with the position, so a last-bit difference here would show).
pub(crate) fn inverse_frequencies(theta: f64, dim: usize, scaling: RopeScaling) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            let frequency = 1.0 / (theta.powf(exponent as f64) as f32);
            scale(frequency, scaling)
        })
        .collect()
}

fn scale(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => {
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        // Wavelengths: 6.28 (kept), 4096 (ramp: 8192/4096 = 2, smooth = 1/3), 1e5 (divided).
        assert_eq!(scale(1.0, scaling), 1.0);
        let middle = 2.0 * std::f32::consts::PI / 4096.0;
        let expected = middle * (2.0 / 3.0 / 8.0 + 1.0 / 3.0);
        assert!((scale(middle, scaling) - expected).abs() < 1e-9);
        let low = 2.0 * std::f32::consts::PI / 1e5;
        assert_eq!(scale(low, scaling), low / 8.0);
    }

    #[test]
    fn linear_divides_and_default_follows_theta() {
        let plain = inverse_frequencies(10_000.0, 4, RopeScaling::Default);
        assert_eq!(plain[0], 1.0);
        assert!((plain[1] - 0.01).abs() < 1e-8);
        let linear = inverse_frequencies(10_000.0, 4, RopeScaling::Linear { factor: 2.0 });
        assert_eq!(linear, vec![0.5, plain[1] / 2.0]);
    }
}
