//! Keys and values of one sequence's past, and attention of a single new position over them.

use rayon::prelude::*;
use tensor::ops::AttentionSpec;
use tensor::{Device, Tensor, host};

use crate::{Decoder, Error, Result};

/// Keys and values of all blocks for one sequence, in buffers that never move while they grow.
pub struct KvCache {
    layers: Vec<LayerCache>,
    capacity: usize,
}

/// Keys and values of one block, rows of `kv_heads * head_dim` (keys already rotated).
pub(crate) struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    width: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for up to `capacity` positions of `decoder`. Memory is reserved, not touched.
    ///
    /// # Errors
    /// When that much memory cannot be reserved.
    pub fn new(decoder: &Decoder, capacity: usize) -> Result<Self> {
        let width = decoder.config.key_width();
        let layers = (0..decoder.num_blocks())
            .map(|_| LayerCache::new(width, capacity))
            .collect::<Result<_>>()?;
        Ok(KvCache { layers, capacity })
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.layers.iter().map(LayerCache::len).min().unwrap_or(0)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets everything from position `length` on.
    pub fn truncate(&mut self, length: usize) {
        for layer in &mut self.layers {
            layer.keys.truncate(length * layer.width);
            layer.values.truncate(length * layer.width);
        }
    }

    pub(crate) fn layer(&mut self, i: usize) -> Result<&mut LayerCache> {
        self.layers.get_mut(i).ok_or_else(|| {
            Error::Input(format!("the cache has no block {i}; was it made for this network?"))
        })
    }
}

impl LayerCache {
    fn new(width: usize, capacity: usize) -> Result<Self> {
        let reserve = || {
            let mut buffer = Vec::new();
            let size = width.checked_mul(capacity);
            match size.map(|size| buffer.try_reserve_exact(size)) {
                Some(Ok(())) => Ok(buffer),
                _ => Err(Error::Input(format!(
                    "no memory for a cache of {capacity} positions; ask for fewer tokens"
                ))),
            }
        };
        Ok(LayerCache { keys: reserve()?, values: reserve()?, width, capacity })
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.len().checked_div(self.width).unwrap_or(0)
    }

    pub(crate) fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<()> {
        let room = self.capacity * self.width - self.keys.len();
        if keys.len() > room || keys.len() != values.len() {
            return Err(Error::Input(format!(
                "the cache is full: {} of {} positions are taken",
                self.len(),
                self.capacity
            )));
        }
        self.keys.extend_from_slice(keys);
        self.values.extend_from_slice(values);
        Ok(())
    }

    /// All keys and values as tensors (copies).
    pub(crate) fn tensors(&self, device: &Device) -> (Tensor<2>, Tensor<2>) {
        let shape = [self.len(), self.width];
        let tensor = |data: &[f32]| host::from_vec(data.to_vec(), shape, device);
        (tensor(&self.keys), tensor(&self.values))
    }

    /// Attention of one query row `[heads * head_dim]` over the visible positions.
    pub(crate) fn attend(&self, q: &[f32], spec: &AttentionSpec) -> Vec<f32> {
        let dim = spec.head_dim;
        let group = spec.heads / spec.kv_heads * dim;
        let visible = spec.visible(0);
        let mut z = vec![0.0; q.len()];
        let one = |(kv, (q, z)): (usize, (&[f32], &mut [f32]))| {
            let column = kv * dim;
            let mut scores = Vec::with_capacity(visible.len());
            for (q, z) in q.chunks_exact(dim).zip(z.chunks_exact_mut(dim)) {
                self.attend_head(q, z, column, visible.clone(), spec, &mut scores);
            }
        };
        let heads = q.chunks_exact(group).zip(z.chunks_exact_mut(group)).enumerate();
        // Below this the work is shorter than waking the other threads.
        if visible.len() * q.len() < 1 << 17 {
            heads.for_each(one);
        } else {
            heads.collect::<Vec<_>>().into_par_iter().for_each(one);
        }
        z
    }

    fn attend_head(
        &self,
        q: &[f32],
        z: &mut [f32],
        column: usize,
        visible: std::ops::Range<usize>,
        spec: &AttentionSpec,
        scores: &mut Vec<f32>,
    ) {
        let dim = spec.head_dim;
        let rows = visible.start * self.width..visible.end * self.width;
        let keys = self.keys.get(rows.clone()).unwrap_or_default();
        let values = self.values.get(rows).unwrap_or_default();
        scores.clear();
        scores.extend(keys.chunks_exact(self.width).map(|key| {
            let score = dot(q, &key[column..column + dim]) * spec.scale;
            spec.softcap.map_or(score, |cap| (score / cap).tanh() * cap)
        }));
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in scores.iter_mut() {
            *score = (*score - max).exp();
            sum += *score;
        }
        for (value, p) in values.chunks_exact(self.width).zip(scores.iter()) {
            let p = p / sum;
            for (z, v) in z.iter_mut().zip(&value[column..column + dim]) {
                *z += p * v;
            }
        }
    }
}

/// Dot product with eight running sums, so that it vectorises.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for ((s, x), y) in sums.iter_mut().zip(x).zip(y) {
            *s += x * y;
        }
    }
    sums.iter().sum::<f32>() + tail
}
