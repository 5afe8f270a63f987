//! Rows of an embedding by token id.
use rayon::prelude::*;

use super::composed;
use super::record::{Buffer, Call, Operand};
use crate::Tensor;
use crate::kernels::simd::{add_into, scratch};

/// Rows of one parallel piece.
const ROWS: usize = 128;

/// Rows `ids` of `w [vocab, width]` as `[ids.len(), width]`; backward adds them up again.
///
/// # Panics
/// If an id is not below `vocab`.
pub fn embedding(w: Tensor<2>, ids: &[u32]) -> Tensor<2> {
    let [vocab, width] = w.dims();
    let outside = ids.iter().find(|&&id| id as usize >= vocab);
    assert!(outside.is_none(), "embedding: id {outside:?} in a vocabulary of {vocab}");
    let Some(w_in) = Operand::of(&w) else {
        return composed::embedding(w, ids);
    };
    drop(w);
    let mut y = scratch(ids.len() * width);
    let table: &[f32] = &w_in.data;
    y.par_chunks_mut(width.max(1) * ROWS).zip(ids.par_chunks(ROWS)).for_each(|(y, ids)| {
        for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
            y.copy_from_slice(&table[id as usize * width..][..width]);
        }
    });
    let call = Call::new([&w_in]);
    let kept: Vec<u32> = if w_in.tracked { ids.to_vec() } else { Vec::new() };
    call.finish("embedding", Buffer::new(y, &[ids.len(), width]), move |dy, _| {
        // One thread, in the order of the tokens: a repeated id always adds up the same way.
        let mut dw = vec![0.0; vocab * width];
        for (dy, &id) in dy.chunks_exact(width.max(1)).zip(&kept) {
            add_into(&mut dw[id as usize * width..][..width], dy);
        }
        [Some(Buffer::new(dw, &[vocab, width]))]
    })
}
