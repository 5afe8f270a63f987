//! What curves are measured on: images or token windows, cut into batches.

use crate::{Error, Result};
use nn::{Batch, Input, Network};
use sha2::{Digest, Sha256};

/// Images that are computed together.
const BATCH_IMAGES: usize = 32;

/// Tokens that are computed together.
const BATCH_TOKENS: usize = 1024;

/// Calibration inputs; labels play no part.
#[derive(Debug, Clone, PartialEq)]
pub enum Samples {
    /// Windows of `length` token ids, end to end.
    Tokens {
        /// The ids.
        ids: Vec<u32>,
        /// Tokens per window.
        length: usize,
    },
    /// Images as the network wants them: `[count, channels, height, width]`, normalised.
    Images {
        /// Values, row-major.
        pixels: Vec<f32>,
        /// `[count, channels, height, width]`.
        shape: [usize; 4],
    },
}

impl Samples {
    /// Token windows.
    ///
    /// # Errors
    /// When there are none, or the ids are not whole windows.
    pub fn tokens(ids: Vec<u32>, length: usize) -> Result<Self> {
        if length == 0 || ids.is_empty() || !ids.len().is_multiple_of(length) {
            return Err(Error::Options(format!(
                "{} token ids are not whole calibration windows of {length}; curves need at least \
                 one window",
                ids.len()
            )));
        }
        Ok(Self::Tokens { ids, length })
    }

    /// Images.
    ///
    /// # Errors
    /// When there are none, or the values do not fill the shape.
    pub fn images(pixels: Vec<f32>, shape: [usize; 4]) -> Result<Self> {
        if pixels.is_empty() || pixels.len() != shape.iter().product::<usize>() {
            return Err(Error::Options(format!(
                "{} values are not calibration images of shape {shape:?}; curves need at least one \
                 image",
                pixels.len()
            )));
        }
        Ok(Self::Images { pixels, shape })
    }

    /// Inputs without data: standard normal pixels, or token ids drawn evenly (ids have no normal
    /// distribution) in windows of `length`.
    ///
    /// # Errors
    /// When `count` is 0.
    pub fn synthetic(
        network: &dyn Network,
        count: usize,
        length: usize,
        seed: u64,
    ) -> Result<Self> {
        let mut rng = tensor::Rng::stream(seed, "synthetic calibration");
        match network.images() {
            Some(spec) => {
                let shape = [count, spec.channels, spec.height, spec.width];
                let mut pixels = vec![0.0; shape.iter().product()];
                rng.fill_normal(&mut pixels, 1.0);
                Self::images(pixels, shape)
            }
            None => {
                let vocabulary = network.classes();
                Self::tokens(
                    (0..count * length).map(|_| rng.below(vocabulary) as u32).collect(),
                    length,
                )
            }
        }
    }

    /// Number of samples: images or windows.
    pub fn count(&self) -> usize {
        match self {
            Self::Tokens { ids, length } => ids.len() / (*length).max(1),
            Self::Images { shape, .. } => shape[0],
        }
    }

    /// Samples per batch.
    fn per_batch(&self) -> usize {
        match self {
            Self::Tokens { length, .. } => (BATCH_TOKENS / (*length).max(1)).max(1),
            Self::Images { .. } => BATCH_IMAGES,
        }
    }

    /// Number of batches.
    pub fn batches(&self) -> usize {
        self.count().div_ceil(self.per_batch())
    }

    /// Batch `index` as a network takes it.
    pub fn batch(&self, index: usize) -> Input<'_> {
        let first = (index * self.per_batch()).min(self.count());
        let count = self.per_batch().min(self.count() - first);
        match self {
            Self::Tokens { ids, length } => Input::Tokens {
                ids: ids.get(first * length..(first + count) * length).unwrap_or_default(),
                batch: Batch::new(count, *length),
            },
            Self::Images { pixels, shape } => {
                let size: usize = shape.iter().skip(1).product();
                Input::Images {
                    pixels: pixels.get(first * size..(first + count) * size).unwrap_or_default(),
                    shape: [count, shape[1], shape[2], shape[3]],
                }
            }
        }
    }

    /// What the samples are, for a job's record: how many, their shape, a hash of their values.
    pub fn identity(&self) -> serde_json::Value {
        let mut hash = Sha256::new();
        self.digest(&mut hash);
        let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Tokens { length, .. } => {
                serde_json::json!({"windows": self.count(), "length": length, "sha256": hash})
            }
            Self::Images { shape, .. } => serde_json::json!({"images": shape, "sha256": hash}),
        }
    }

    /// Adds everything that decides the inputs to a hash.
    pub(super) fn digest(&self, hash: &mut Sha256) {
        match self {
            Self::Tokens { ids, length } => {
                hash.update(format!("tokens {} {length}\n", ids.len()));
                hash.update(bytemuck::cast_slice(ids));
            }
            Self::Images { pixels, shape } => {
                hash.update(format!("images {shape:?}\n"));
                hash.update(bytemuck::cast_slice(pixels));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_every_sample_once() {
        let samples = Samples::tokens((0..3000).collect(), 100).unwrap();
        assert_eq!((samples.count(), samples.batches()), (30, 3));
        let mut seen = Vec::new();
        for index in 0..samples.batches() {
            let Input::Tokens { ids, batch } = samples.batch(index) else { panic!() };
            assert_eq!(ids.len(), batch.rows());
            seen.extend_from_slice(ids);
        }
        assert_eq!(seen, (0..3000).collect::<Vec<u32>>());
        let images =
            Samples::images((0..70 * 4).map(|v| v as f32).collect(), [70, 1, 2, 2]).unwrap();
        let Input::Images { pixels, shape } = images.batch(2) else { panic!() };
        assert_eq!((pixels[0], shape, images.batches()), (256.0, [6, 1, 2, 2], 3));
    }

    #[test]
    fn no_samples_are_refused() {
        assert!(Samples::tokens(Vec::new(), 4).is_err());
        assert!(Samples::tokens(vec![1, 2, 3], 2).is_err());
        assert!(Samples::images(Vec::new(), [0, 1, 2, 2]).is_err());
        assert!(Samples::images(vec![0.0; 3], [1, 1, 2, 2]).is_err());
    }
}
