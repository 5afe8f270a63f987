//! Tensors in and out of host memory, without copies where the layout allows it.
use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::TensorData;

use crate::{Device, Tensor};

/// A tensor of `shape` on `device` from its values in row-major order. On the CPU the vector
/// becomes the tensor's memory; nothing is copied.
///
/// # Panics
/// If `values.len()` is not the product of `shape`.
pub fn from_vec<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    assert_eq!(
        values.len(),
        shape.iter().product::<usize>(),
        "{} values do not fill the shape {shape:?}",
        values.len()
    );
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The values of a tensor in row-major order. Not copied if this handle is the only owner of
/// contiguous CPU memory.
pub fn into_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = match cpu_primitive(tensor.inner()) {
        Ok(primitive) => primitive.into_data(),
        Err(tensor) => tensor.into_data(),
    };
    data.try_into_vec_as::<f32>().unwrap_or_default()
}

/// Calls `f` on the values in row-major order; no copy for a contiguous CPU tensor.
pub fn read<const D: usize, R>(tensor: &Tensor<D>, f: impl FnOnce(&[f32]) -> R) -> R {
    match cpu_primitive(tensor.clone().inner()) {
        Ok(primitive) => f(slice(&primitive.to_contiguous())),
        Err(tensor) => f(&into_vec(tensor)),
    }
}

/// Calls `f` on the values in row-major order and keeps what it writes. In place for a contiguous
/// CPU tensor with no other owner (drop its clones and the gradient graph first), else on a copy.
/// A leaf that requires a gradient is a new leaf afterwards and still requires one: take its
/// gradient first.
pub fn write<const D: usize, R>(tensor: &mut Tensor<D>, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let device = tensor.device();
    let (autodiff, require_grad) = (device.is_autodiff(), tensor.is_require_grad());
    let placeholder = Tensor::zeros([0; D], &device);
    let owned = std::mem::replace(tensor, placeholder).inner();
    let (plain, result) = match cpu_primitive(owned) {
        Ok(primitive) => {
            let mut primitive = contiguous(primitive);
            let result = f(slice_mut(&mut primitive));
            (Tensor::from_primitive::<Flex>(primitive), result)
        }
        Err(other) => {
            let (shape, device) = (other.dims(), other.device());
            let mut values = into_vec(other);
            let result = f(&mut values);
            (from_vec(values, shape, &device), result)
        }
    };
    let plain = if autodiff { plain.autodiff() } else { plain };
    *tensor = if require_grad { plain.require_grad() } else { plain };
    result
}

type CpuTensor = FloatTensor<Flex>;

/// The CPU memory behind a tensor without a gradient graph, or the tensor back.
#[allow(clippy::result_large_err)] // Both sides are the tensor itself; boxing would only cost.
fn cpu_primitive<const D: usize>(tensor: Tensor<D>) -> Result<CpuTensor, Tensor<D>> {
    use burn::backend::DispatchDevice;
    use burn::tensor::DType;
    let on_cpu = matches!(tensor.device().as_dispatch(), DispatchDevice::Flex(_));
    if !on_cpu || tensor.dtype() != DType::F32 {
        return Err(tensor);
    }
    // Not a move: the conversion reports failure without giving the tensor back.
    match tensor.clone().try_into_primitive::<Flex>() {
        Ok(primitive) => {
            drop(tensor);
            Ok(primitive)
        }
        Err(_) => Err(tensor),
    }
}

/// Row-major from offset 0, without a second handle (a second handle would force a copy on write).
pub(crate) fn contiguous(primitive: CpuTensor) -> CpuTensor {
    let layout = primitive.layout();
    let whole = primitive.is_contiguous()
        && layout.start_offset() == 0
        && layout.num_elements() * size_of::<f32>() == primitive.bytes().len();
    if whole { primitive } else { primitive.to_contiguous() }
}

/// The values of a contiguous primitive.
pub(crate) fn slice(primitive: &CpuTensor) -> &[f32] {
    let start = primitive.layout().start_offset();
    &primitive.storage::<f32>()[start..start + primitive.layout().num_elements()]
}

pub(crate) fn slice_mut(primitive: &mut CpuTensor) -> &mut [f32] {
    let start = primitive.layout().start_offset();
    let length = primitive.layout().num_elements();
    &mut primitive.storage_mut::<f32>()[start..start + length]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;

    #[test]
    fn vectors_move_in_and_out() {
        let cpu = device("cpu").unwrap();
        let values = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let address = values.as_ptr();
        let tensor = from_vec(values, [2, 3], &cpu);
        assert_eq!(read(&tensor, |v| v.as_ptr()), address);
        assert_eq!(read(&tensor.clone().transpose(), <[f32]>::to_vec), [1., 4., 2., 5., 3., 6.]);
        let back = into_vec(tensor);
        assert_eq!(back.as_ptr(), address);
        assert_eq!(back, [1., 2., 3., 4., 5., 6.]);
    }

    #[test]
    fn read_of_a_narrowed_view() {
        let cpu = device("cpu").unwrap();
        let tensor = from_vec((0..12).map(|i| i as f32).collect(), [4, 3], &cpu);
        assert_eq!(
            read(&tensor.clone().narrow(0, 1, 2), <[f32]>::to_vec),
            [3., 4., 5., 6., 7., 8.]
        );
        assert_eq!(into_vec(tensor.narrow(0, 3, 1)), [9., 10., 11.]);
    }

    #[test]
    fn write_is_in_place_and_keeps_the_leaf() {
        let device = device("cpu").unwrap().autodiff();
        let mut leaf = from_vec(vec![1.0, 2.0], [2], &device).require_grad();
        let grads = leaf.clone().powi_scalar(2).sum().backward();
        let grad = into_vec(leaf.grad(&grads).unwrap());
        assert_eq!(grad, [2.0, 4.0]);
        let address = read(&leaf, |v| v.as_ptr());
        drop(grads);
        write(&mut leaf, |v| v[0] = 7.0);
        assert_eq!(read(&leaf, |v| (v.as_ptr(), v[0])), (address, 7.0));
        assert!(leaf.is_require_grad());
        let mut shared = from_vec(vec![1.0], [1], &device);
        let copy = shared.clone();
        write(&mut shared, |v| v[0] = 2.0);
        assert_eq!((into_vec(shared), into_vec(copy)), (vec![2.0], vec![1.0]));
    }
}
