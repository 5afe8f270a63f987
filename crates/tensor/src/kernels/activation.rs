//! Elementwise non-linearities and gated units, forward and backward.
use rayon::prelude::*;

use super::simd::{BLOCK, erf, exp, scratch, sigmoid, simd};
use crate::ops::Activation;

/// A scalar function and its derivative. A trait rather than closures: its methods are always
/// inlined into the loop that the instruction set was picked for.
trait Curve {
    fn value(x: f32) -> f32;
    /// Value and derivative.
    fn slope(x: f32) -> (f32, f32);
}

struct Relu;
struct Silu;
struct Gelu;
struct GeluTanh;

impl Curve for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        if x > 0.0 { x } else { 0.0 }
    }
    #[inline(always)]
    fn slope(x: f32) -> (f32, f32) {
        if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) }
    }
}

impl Curve for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x)
    }
    #[inline(always)]
    fn slope(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        let value = x * s;
        (value, s + value * (1.0 - s))
    }
}

impl Curve for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
    }
    #[inline(always)]
    fn slope(x: f32) -> (f32, f32) {
        // Φ(x) + x φ(x) with φ(x) = e^(-x²/2) / √(2π).
        const DENSITY: f32 = 0.398_942_3;
        let cumulative = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        (x * cumulative, cumulative + x * exp(-0.5 * x * x) * DENSITY)
    }
}

/// `(1 + tanh(u)) / 2 = sigmoid(2u)`: twice `√(2/π)` and twice `√(2/π) * 0.044715`.
const LINEAR: f32 = 1.595_769;
const CUBIC: f32 = 0.071_354_82;

impl Curve for GeluTanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x * (x * x).mul_add(CUBIC, LINEAR))
    }
    #[inline(always)]
    fn slope(x: f32) -> (f32, f32) {
        let square = x * x;
        let s = sigmoid(x * square.mul_add(CUBIC, LINEAR));
        let value = x * s;
        (value, s + value * (1.0 - s) * square.mul_add(3.0 * CUBIC, LINEAR))
    }
}

macro_rules! by_curve {
    ($activation:expr, $function:ident($($arg:expr),*)) => {
        match $activation {
            Activation::Relu => $function::<Relu>($($arg),*),
            Activation::Silu => $function::<Silu>($($arg),*),
            Activation::Gelu => $function::<Gelu>($($arg),*),
            Activation::GeluTanh => $function::<GeluTanh>($($arg),*),
        }
    };
}

/// `act(x)`.
pub(crate) fn forward(x: &[f32], activation: Activation) -> Vec<f32> {
    let mut y = scratch(x.len());
    y.par_chunks_mut(BLOCK)
        .zip(x.par_chunks(BLOCK))
        .for_each(|(y, x)| forward_block(x, y, activation));
    y
}

simd! { fn forward_block(x: &[f32], y: &mut [f32], activation: Activation) {
    by_curve!(activation, map(x, y))
} }

#[inline(always)]
fn map<C: Curve>(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = C::value(x);
    }
}

/// Turns `dy` into `dx = dy * act'(x)` in place.
pub(crate) fn backward(x: &[f32], dy: &mut [f32], activation: Activation) {
    dy.par_chunks_mut(BLOCK)
        .zip(x.par_chunks(BLOCK))
        .for_each(|(dy, x)| backward_block(x, dy, activation));
}

simd! { fn backward_block(x: &[f32], dy: &mut [f32], activation: Activation) {
    by_curve!(activation, map_backward(x, dy))
} }

#[inline(always)]
fn map_backward<C: Curve>(x: &[f32], dy: &mut [f32]) {
    for (dy, &x) in dy.iter_mut().zip(x) {
        *dy *= C::slope(x).1;
    }
}

/// `act(gate) * up`.
pub(crate) fn glu_forward(gate: &[f32], up: &[f32], activation: Activation) -> Vec<f32> {
    let mut y = scratch(gate.len());
    y.par_chunks_mut(BLOCK)
        .zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)))
        .for_each(|(y, (gate, up))| glu_block(gate, up, y, activation));
    y
}

simd! { fn glu_block(gate: &[f32], up: &[f32], y: &mut [f32], activation: Activation) {
    by_curve!(activation, gated(gate, up, y))
} }

#[inline(always)]
fn gated<C: Curve>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
        *y = C::value(gate) * up;
    }
}

/// Turns `dy` into the gradient of the gate in place and returns that of `up`.
pub(crate) fn glu_backward(
    gate: &[f32],
    up: &[f32],
    dy: &mut [f32],
    activation: Activation,
) -> Vec<f32> {
    let mut dup = scratch(gate.len());
    dy.par_chunks_mut(BLOCK)
        .zip(dup.par_chunks_mut(BLOCK))
        .zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)))
        .for_each(|((dy, dup), (gate, up))| glu_backward_block(gate, up, dy, dup, activation));
    dup
}

simd! { fn glu_backward_block(
    gate: &[f32], up: &[f32], dy: &mut [f32], dup: &mut [f32], activation: Activation
) {
    by_curve!(activation, gated_backward(gate, up, dy, dup))
} }

#[inline(always)]
fn gated_backward<C: Curve>(gate: &[f32], up: &[f32], dy: &mut [f32], dup: &mut [f32]) {
    for (((dy, dup), &gate), &up) in dy.iter_mut().zip(dup).zip(gate).zip(up) {
        let (value, slope) = C::slope(gate);
        *dup = *dy * value;
        *dy *= up * slope;
    }
}
