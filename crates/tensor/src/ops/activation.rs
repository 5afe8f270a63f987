//! Elementwise non-linearities and gated units.
use super::record::{Buffer, Call, Operand};
use super::{Activation, composed};
use crate::Tensor;
use crate::kernels::activation as kernel;

/// The non-linearity, elementwise.
pub fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    let Some(x_in) = Operand::of(&x) else {
        return composed::activate(x, activation);
    };
    let shape = x.dims();
    drop(x);
    let y = Buffer::new(kernel::forward(&x_in.data, activation), &shape);
    let call = Call::new([&x_in]);
    let x = x_in.data;
    call.finish("activate", y, move |dy, _| {
        let mut dx = dy.into_vec();
        kernel::backward(&x, &mut dx, activation);
        [Some(Buffer::new(dx, &shape))]
    })
}

/// `silu(gate) * up` (Shazeer 2020), both of one shape.
///
/// # Panics
/// If the shapes differ.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    glu(gate, up, Activation::Silu)
}

/// `gelu_tanh(gate) * up`, both of one shape (Gemma's feed-forward).
///
/// # Panics
/// If the shapes differ.
pub fn gelu_glu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    glu(gate, up, Activation::GeluTanh)
}

fn glu(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims(), "gated unit: gate and up differ in shape");
    let (Some(gate_in), Some(up_in)) = (Operand::of(&gate), Operand::of(&up)) else {
        return composed::activate(gate, activation) * up;
    };
    let shape = gate.dims();
    drop((gate, up));
    let y = Buffer::new(kernel::glu_forward(&gate_in.data, &up_in.data, activation), &shape);
    let call = Call::new([&gate_in, &up_in]);
    let (gate, up) = (gate_in.data, up_in.data);
    call.finish("glu", y, move |dy, [want_gate, want_up]| {
        let mut dgate = dy.into_vec();
        let dup = kernel::glu_backward(&gate, &up, &mut dgate, activation);
        [want_gate.then(|| Buffer::new(dgate, &shape)), want_up.then(|| Buffer::new(dup, &shape))]
    })
}
