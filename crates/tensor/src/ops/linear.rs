//! The linear layer over weights stored `[out, in]`.
use rayon::prelude::*;

use super::composed;
use super::record::{Buffer, Call, Operand};
use crate::Tensor;
use crate::kernels::simd::{add_into, scratch};
use crate::kernels::{Matrix, Output, linear_f32, matmul};

/// `x wᵀ + bias` for `x [tokens, in]`, `w [out, in]`, `bias [out]`.
///
/// # Panics
/// If the shapes do not fit.
pub fn linear(x: Tensor<2>, w: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let ([tokens, inner], [outer, w_inner]) = (x.dims(), w.dims());
    assert_eq!(inner, w_inner, "linear: x [{tokens}, {inner}] against w [{outer}, {w_inner}]");
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [outer], "linear: bias against w [{outer}, {inner}]");
    }
    let bias_in = match &bias {
        Some(bias) => Operand::of(bias),
        None => Some(Operand::nothing()),
    };
    let (Some(x_in), Some(w_in), Some(bias_in)) = (Operand::of(&x), Operand::of(&w), bias_in)
    else {
        return composed::linear(x, w, bias);
    };
    let biased = bias.is_some();
    drop((x, w, bias));
    let y = forward(&x_in.data, &w_in.data, biased.then_some(&*bias_in.data), [tokens, outer]);
    let call = Call::new([&x_in, &w_in, &bias_in]);
    // x is needed for dw only, w for dx only: keep no memory that backward will not read.
    let (x, w) = (w_in.tracked.then_some(x_in.data), x_in.tracked.then_some(w_in.data));
    call.finish("linear", Buffer::new(y, &[tokens, outer]), move |dy, wanted| {
        let dx = w.filter(|_| wanted[0]).map(|w| {
            let mut dx = scratch(tokens * inner);
            let output = Output { data: &mut dx, row: inner, accumulate: false };
            let shape = [tokens, inner, outer];
            matmul(shape, Matrix::rows(&dy, outer), Matrix::rows(&w, inner), 1.0, output);
            Buffer::new(dx, &[tokens, inner])
        });
        let dw = x.filter(|_| wanted[1]).map(|x| {
            let mut dw = scratch(outer * inner);
            let output = Output { data: &mut dw, row: inner, accumulate: false };
            let shape = [outer, inner, tokens];
            matmul(shape, Matrix::columns(&dy, outer), Matrix::rows(&x, inner), 1.0, output);
            Buffer::new(dw, &[outer, inner])
        });
        let db = wanted[2].then(|| Buffer::new(column_sums(&dy, outer), &[outer]));
        [dx, dw, db]
    })
}

/// Up to here the weights are streamed once instead of packed for a matrix product.
const FEW_ROWS: usize = 16;

fn forward(x: &[f32], w: &[f32], bias: Option<&[f32]>, [tokens, outer]: [usize; 2]) -> Vec<f32> {
    let mut y = scratch(tokens * outer);
    if y.is_empty() {
        return y;
    }
    let inner = w.len() / outer;
    if tokens <= FEW_ROWS {
        linear_f32(x, tokens, w, outer, inner, bias, &mut y);
        return y;
    }
    if let Some(bias) = bias {
        y.chunks_exact_mut(outer).for_each(|row| row.copy_from_slice(bias));
    }
    let output = Output { data: &mut y, row: outer, accumulate: bias.is_some() };
    let shape = [tokens, outer, inner];
    matmul(shape, Matrix::rows(x, inner), Matrix::columns(w, inner), 1.0, output);
    y
}

/// Sums over rows, by fixed blocks of rows so that the bytes do not depend on the threads.
pub(super) fn column_sums(x: &[f32], width: usize) -> Vec<f32> {
    const ROWS: usize = 64;
    let blocks: Vec<Vec<f32>> = x
        .par_chunks(width.max(1) * ROWS)
        .map(|rows| {
            let mut total = vec![0.0; width];
            rows.chunks_exact(width).for_each(|row| add_into(&mut total, row));
            total
        })
        .collect();
    let mut total = vec![0.0; width];
    blocks.iter().for_each(|block| add_into(&mut total, block));
    total
}
