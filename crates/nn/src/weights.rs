//! The seam between a network and what it computes with, and the plain implementation: a
//! checkpoint, read where it lies.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use store::{Checkpoint, Dtype, WeightView};
use tensor::{Device, Tensor, host, ops, skinny};

use crate::validate::leaf_name;
use crate::{Error, Leaf, Name, Result};

/// What a network computes with, by name. Wrapping one `Weights` in another is how a method
/// changes a network.
pub trait Weights {
    /// `y = x Wᵀ + b` for the linear layer `name`: `x` is `[rows, in]`, `y` is `[rows, out]`. The
    /// bias is added when [`Name::bias`] is set.
    ///
    /// # Errors
    /// When the layer is not there or does not fit `x`.
    fn linear(&self, name: &Name, x: Tensor<2>) -> Result<Tensor<2>>;

    /// The matrix of `name` as f32 `[out, in]`, however it is stored.
    ///
    /// # Errors
    /// When it is not there.
    fn matrix(&self, name: &Name) -> Result<Tensor<2>>;

    /// A vector of `name` as stored: a norm's gain, a bias.
    ///
    /// # Errors
    /// When it is not there.
    fn vector(&self, name: &Name, leaf: Leaf) -> Result<Tensor<1>>;

    /// Rows `ids` of the embedding `name`, `[ids, width]`.
    ///
    /// # Errors
    /// When it is not there or an id is outside it.
    fn embed(&self, name: &Name, ids: &[u32]) -> Result<Tensor<2>>;

    /// Where the tensors live.
    fn device(&self) -> Device;
}

impl<W: Weights + ?Sized> Weights for &W {
    fn linear(&self, name: &Name, x: Tensor<2>) -> Result<Tensor<2>> {
        (**self).linear(name, x)
    }

    fn matrix(&self, name: &Name) -> Result<Tensor<2>> {
        (**self).matrix(name)
    }

    fn vector(&self, name: &Name, leaf: Leaf) -> Result<Tensor<1>> {
        (**self).vector(name, leaf)
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> Result<Tensor<2>> {
        (**self).embed(name, ids)
    }

    fn device(&self) -> Device {
        (**self).device()
    }
}

/// Refuses an `x` that the linear layer `name` cannot take.
///
/// # Errors
/// [`Error::Shape`] with the width that is needed.
pub fn check_input(name: &Name, x: &Tensor<2>) -> Result<()> {
    let [rows, width] = x.dims();
    if width != name.in_features() {
        return Err(Error::Shape {
            name: format!("input of {}", name.module),
            found: vec![rows, width],
            expected: vec![rows, name.in_features()],
        });
    }
    Ok(())
}

/// The weights of a checkpoint. Linear layers multiply straight from the mapped file in its stored
/// type (f32, f16, bf16); other types and transposed layers are converted once and kept.
pub struct CheckpointWeights {
    checkpoint: Checkpoint,
    device: Device,
    /// Multiply from the file: only on the plain CPU device, where the result needs no gradient.
    direct: bool,
    vectors: Mutex<HashMap<String, Tensor<1>>>,
    matrices: Mutex<HashMap<String, Tensor<2>>>,
}

impl CheckpointWeights {
    /// Weights on the CPU.
    ///
    /// # Errors
    /// When the engine has no CPU device.
    pub fn new(checkpoint: Checkpoint) -> Result<Self> {
        Ok(Self::on(checkpoint, tensor::device("cpu")?))
    }

    /// Weights on `device`. With an autodiff device, gradients reach the activations (never the
    /// weights); matrices are then kept as f32 tensors.
    pub fn on(checkpoint: Checkpoint, device: Device) -> Self {
        let cpu = tensor::device("cpu").is_ok_and(|cpu| cpu == device);
        let direct = cpu && !device.is_autodiff();
        let (vectors, matrices) = Default::default();
        CheckpointWeights { checkpoint, device, direct, vectors, matrices }
    }

    /// The checkpoint behind the weights.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    fn kept(&self, name: &Name) -> Option<Tensor<2>> {
        let kept = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(&name.module).cloned()
    }

    fn keep(&self, name: &Name) -> Result<Tensor<2>> {
        let matrix = self.matrix(name)?;
        let mut kept = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert(name.module.clone(), matrix.clone());
        Ok(matrix)
    }

    /// Whether the tensor's stored type is one that products read directly.
    fn readable(&self, tensor: &str) -> Result<bool> {
        let dtype = self.checkpoint.info(tensor)?.dtype;
        Ok(matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16))
    }
}

impl Weights for CheckpointWeights {
    fn linear(&self, name: &Name, x: Tensor<2>) -> Result<Tensor<2>> {
        check_input(name, &x)?;
        let bias = if name.bias { Some(self.vector(name, Leaf::Bias)?) } else { None };
        if let Some(matrix) = self.kept(name) {
            return Ok(ops::linear(x, matrix, bias));
        }
        let weight = name.weight();
        if self.direct && !name.transposed && self.readable(&weight)? {
            let view = self.checkpoint.half_view(&weight)?;
            if view.len() != name.shape.iter().product::<usize>() {
                return Err(shape_error(&self.checkpoint, name));
            }
            // Values that could not be borrowed (misaligned, compressed) are better kept as f32.
            if !matches!(view, WeightView::Owned(_)) {
                return Ok(product(name, &view, x, bias, &self.device));
            }
        }
        Ok(ops::linear(x, self.keep(name)?, bias))
    }

    fn matrix(&self, name: &Name) -> Result<Tensor<2>> {
        let weight = name.weight();
        if self.checkpoint.info(&weight)?.shape != name.stored_shape() {
            return Err(shape_error(&self.checkpoint, name));
        }
        let data = self.checkpoint.f32(&weight)?;
        let [out, input] = name.shape;
        let data = if name.transposed { transpose(&data, input, out) } else { data };
        Ok(host::from_vec(data, name.shape, &self.device))
    }

    fn vector(&self, name: &Name, leaf: Leaf) -> Result<Tensor<1>> {
        let key = leaf_name(name, leaf)?;
        let mut kept = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vector) = kept.get(&key) {
            return Ok(vector.clone());
        }
        let data = self.checkpoint.f32(&key)?;
        if data.len() != name.shape[0] {
            return Err(Error::Shape {
                name: key,
                found: self.checkpoint.info(&name.tensor(leaf))?.shape.clone(),
                expected: vec![name.shape[0]],
            });
        }
        let length = data.len();
        let vector = host::from_vec(data, [length], &self.device);
        kept.insert(key, vector.clone());
        Ok(vector)
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> Result<Tensor<2>> {
        let weight = name.weight();
        let [count, width] = name.shape;
        if self.checkpoint.info(&weight)?.shape != name.shape {
            return Err(shape_error(&self.checkpoint, name));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= count) {
            return Err(Error::Input(format!("`{weight}` has {count} rows, none is {id}")));
        }
        let mut rows = Vec::with_capacity(ids.len() * width);
        if self.readable(&weight)? {
            match self.checkpoint.half_view(&weight)? {
                WeightView::F32(w) => gather(w, ids, width, |v| v, &mut rows),
                WeightView::F16(w) => gather(w, ids, width, half::f16::to_f32, &mut rows),
                WeightView::BF16(w) => gather(w, ids, width, half::bf16::to_f32, &mut rows),
                WeightView::Owned(w) => gather(&w, ids, width, |v| v, &mut rows),
            }
        } else {
            // Dequantising the whole table for every call would be far more work.
            for &id in ids {
                let id = id as usize;
                rows.extend(self.checkpoint.f32_rows(&weight, id..id + 1)?);
            }
        }
        Ok(host::from_vec(rows, [ids.len(), width], &self.device))
    }

    fn device(&self) -> Device {
        self.device.clone()
    }
}

fn gather<T: Copy>(w: &[T], ids: &[u32], width: usize, f: impl Fn(T) -> f32, out: &mut Vec<f32>) {
    for &id in ids {
        let start = id as usize * width;
        out.extend(w.get(start..start + width).unwrap_or_default().iter().map(|&v| f(v)));
    }
}

/// `y = x Wᵀ + b` with `w` in its stored type.
fn product(
    name: &Name,
    w: &WeightView<'_>,
    x: Tensor<2>,
    bias: Option<Tensor<1>>,
    device: &Device,
) -> Tensor<2> {
    let (rows, [out, input]) = (x.dims()[0], name.shape);
    let mut y = vec![0.0; rows * out];
    let bias = bias.map(host::into_vec);
    let bias = bias.as_deref();
    host::read(&x, |x| match w {
        WeightView::F32(w) => skinny::linear_f32(x, rows, w, out, input, bias, &mut y),
        WeightView::F16(w) => skinny::linear_f16(x, rows, w, out, input, bias, &mut y),
        WeightView::BF16(w) => skinny::linear_bf16(x, rows, w, out, input, bias, &mut y),
        WeightView::Owned(w) => skinny::linear_f32(x, rows, w, out, input, bias, &mut y),
    });
    host::from_vec(y, [rows, out], device)
}

fn shape_error(checkpoint: &Checkpoint, name: &Name) -> Error {
    let found = checkpoint.info(&name.weight()).map(|info| info.shape.clone()).unwrap_or_default();
    Error::Shape { name: name.weight(), found, expected: name.stored_shape() }
}

/// The transpose of `data` `[rows, columns]`.
pub(crate) fn transpose(data: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut out = vec![0.0; data.len()];
    // Tiles keep both sides in cache; one side alone would miss on every element.
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..columns).step_by(TILE) {
            for r in r0..rows.min(r0 + TILE) {
                for c in c0..columns.min(c0 + TILE) {
                    if let (Some(to), Some(from)) =
                        (out.get_mut(c * rows + r), data.get(r * columns + c))
                    {
                        *to = *from;
                    }
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes() {
        assert_eq!(transpose(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3), [1., 4., 2., 5., 3., 6.]);
        let wide: Vec<f32> = (0..70 * 33).map(|v| v as f32).collect();
        let t = transpose(&wide, 70, 33);
        assert_eq!(t[32 * 70 + 69], (69 * 33 + 32) as f32);
        assert_eq!(transpose(&t, 33, 70), wide);
    }
}
