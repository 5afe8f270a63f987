//! Rows of an embedding by token id.
use super::composed;
use super::record::{Buffer, Call, Operand};
use crate::Tensor;
use crate::kernels::simd::add_into;

/// Rows `ids` of `w [vocab, width]` as `[ids.len(), width]`; backward adds them up again.
///
/// # Panics
/// If an id is not below `vocab`.
pub fn embedding(w: Tensor<2>, ids: &[u32]) -> Tensor<2> {
    let [vocab, width] = w.dims();
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        // An assertion rather than a wrong row: ids come from a tokenizer that fits the model.
        assert!((*id as usize) < vocab, "embedding: id {id} in a vocabulary of {vocab}");
    }
    let Some(w_in) = Operand::of(&w) else {
        return composed::embedding(w, ids);
    };
    drop(w);
    let mut y = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        y.extend_from_slice(&w_in.data[id as usize * width..][..width]);
    }
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
