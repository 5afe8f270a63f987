//! Rotary position embedding.
use super::record::{Buffer, Call, Operand};
use super::{RopeTable, composed};
use crate::Tensor;
use crate::kernels::rope::rotate;

/// Rotates the first `rotary_dim` dimensions of every head of `x [tokens, heads * head_dim]` by the
/// angles of its token's position; dimension `i` is paired with `i + rotary_dim / 2`.
///
/// # Panics
/// If `head_dim` does not divide the rows or is below `rotary_dim`, or if there is not one position
/// per token inside the table.
pub fn rope(x: Tensor<2>, table: &RopeTable, positions: &[u32], head_dim: usize) -> Tensor<2> {
    let [tokens, width] = x.dims();
    assert!(
        head_dim > 0 && width.is_multiple_of(head_dim) && table.rotary_dim() <= head_dim,
        "rope: heads of {head_dim} (rotating {}) in rows of {width}",
        table.rotary_dim()
    );
    let furthest = positions.iter().max().map_or(0, |&position| position as usize + 1);
    assert!(
        positions.len() == tokens && furthest <= table.length(),
        "rope: {} positions up to {furthest} for {tokens} tokens and a table of {}",
        positions.len(),
        table.length()
    );
    let Some(x_in) = Operand::of(&x) else {
        return composed::rope(x, table, positions, head_dim);
    };
    drop(x);
    let y = rotate(&x_in.data, width, head_dim, table, positions, false);
    let call = Call::new([&x_in]);
    let (table, positions) = (table.clone(), positions.to_vec());
    call.finish("rope", Buffer::new(y, &[tokens, width]), move |dy, _| {
        let dx = rotate(&dy, width, head_dim, &table, &positions, true);
        [Some(Buffer::new(dx, &[tokens, width]))]
    })
}
