//! The parts of a sparse matrix: three bytes of shape and type, the rest split into bitmask, values
//! and offsets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use store::Dtype;
use store::packed::sparse::{Parts, SparseLayout, pack, unpack};

fuzz_target!(|data: &[u8]| {
    let [rows, columns, kind, rest @ ..] = data else { return };
    let shape = [usize::from(*rows), usize::from(*columns)];
    let dtype = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I8][usize::from(kind & 3)];
    let (bitmask, rest) = rest.split_at(rest.len().min(shape[0] * shape[1].div_ceil(8)));
    let offsets = (kind & 4 != 0).then(|| rest.len().min(8 * shape[0]));
    let (row_offsets, compressed) = rest.split_at(offsets.unwrap_or(0));
    let row_offsets = offsets.map(|_| row_offsets);
    let Ok(dense) = unpack(&Parts { dtype, shape, compressed, bitmask, row_offsets }) else { return };
    // What was read can be written, and gives the same again (negative zeros aside).
    let tensors = pack(SparseLayout::Bitmask, "m", dtype, shape, &dense).expect("a whole matrix");
    let part = |leaf: &str| {
        let name = format!("m.{leaf}");
        tensors.iter().find(|(n, ..)| *n == name).map(|(.., bytes)| bytes.as_slice())
    };
    let parts = Parts {
        dtype,
        shape,
        compressed: part("compressed").unwrap_or_default(),
        bitmask: part("bitmask").unwrap_or_default(),
        row_offsets: part("row_offsets"),
    };
    assert_eq!(unpack(&parts).expect("own parts").len(), dense.len());
});
