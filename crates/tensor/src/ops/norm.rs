//! RMSNorm and LayerNorm over the last dimension.
use super::composed;
use super::record::{Buffer, Call, Operand};
use crate::Tensor;
use crate::kernels::norm::{self, Wanted};

/// `x / sqrt(mean(x²) + eps) * gain` over the last dimension (Zhang & Sennrich 2019).
///
/// # Panics
/// If the gain's length is not the last dimension of `x`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, eps: f32) -> Tensor<D> {
    check("rms_norm", &x, &gain);
    let (Some(x_in), Some(gain_in)) = (Operand::of(&x), Operand::of(&gain)) else {
        return composed::rms_norm(x, gain, eps);
    };
    let shape = x.dims();
    drop((x, gain));
    let (y, scale) = norm::rms_forward(&x_in.data, &gain_in.data, eps);
    let call = Call::new([&x_in, &gain_in]);
    let (x, gain) = (x_in.data, gain_in.data);
    call.finish("rms_norm", Buffer::new(y, &shape), move |dy, [want_x, want_gain]| {
        let wanted = Wanted { x: want_x, gain: want_gain, bias: false };
        let gradients = norm::rms_backward(&x, &gain, &scale, &dy, wanted);
        [
            gradients.x.map(|dx| Buffer::new(dx, &shape)),
            gradients.gain.map(|dgain| Buffer::new(dgain, &[gain.len()])),
        ]
    })
}

/// `(x - mean) / sqrt(variance + eps) * gain + bias` over the last dimension (Ba et al. 2016).
///
/// # Panics
/// If the length of gain or bias is not the last dimension of `x`.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    gain: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f32,
) -> Tensor<D> {
    check("layer_norm", &x, &gain);
    if let Some(bias) = &bias {
        check("layer_norm", &x, bias);
    }
    let bias_in = match &bias {
        Some(bias) => Operand::of(bias),
        None => Some(Operand::nothing()),
    };
    let (Some(x_in), Some(gain_in), Some(bias_in)) = (Operand::of(&x), Operand::of(&gain), bias_in)
    else {
        return composed::layer_norm(x, gain, bias, eps);
    };
    let (shape, biased) = (x.dims(), bias.is_some());
    drop((x, gain, bias));
    let bias_values = biased.then_some(&*bias_in.data);
    let (y, mean, scale) = norm::layer_forward(&x_in.data, &gain_in.data, bias_values, eps);
    let call = Call::new([&x_in, &gain_in, &bias_in]);
    let (x, gain) = (x_in.data, gain_in.data);
    call.finish("layer_norm", Buffer::new(y, &shape), move |dy, wanted| {
        let wanted = Wanted { x: wanted[0], gain: wanted[1], bias: wanted[2] };
        let gradients = norm::layer_backward(&x, &gain, &mean, &scale, &dy, wanted);
        let vector = |values| Buffer::new(values, &[gain.len()]);
        [
            gradients.x.map(|dx| Buffer::new(dx, &shape)),
            gradients.gain.map(vector),
            gradients.bias.map(vector),
        ]
    })
}

fn check<const D: usize>(what: &str, x: &Tensor<D>, vector: &Tensor<1>) {
    let (shape, [length]) = (x.dims(), vector.dims());
    assert!(
        shape.last() == Some(&length) && length > 0,
        "{what}: a vector of {length} does not fit rows of {shape:?}"
    );
}
