//! AutoAWQ "GEMM": `qweight` int32 `[in, out/8]`, `qzeros` int32 `[groups, out/8]`, `scales` f16
//! `[groups, out]`. Both integer tensors are packed along the output, eight nibbles to a word in
//! the order [`ORDER`]; zero points are stored as they are.

use rayon::prelude::*;

use super::bits::{transpose, words_to_bytes};
use super::fetch::{all_middle, bad, expect_shape, matrix, scale_bytes, words};
use super::{PackedTensor, QuantizedMatrix};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Nibble `i` of a word holds output `8c + ORDER[i]`.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Columns handled together, so that reads and writes stay in cache.
const TILE: usize = 64;

pub(super) fn check(module: &str, m: &QuantizedMatrix) -> Result<()> {
    if m.bits != 4 {
        return Err(Error::packed(module, format!("AutoAWQ holds 4 bits, not {}", m.bits))
            .with_remedy("use 4 bits, or write compressed-tensors"));
    }
    if !m.out_features.is_multiple_of(8) {
        let reason = format!("AutoAWQ needs out to be a multiple of 8; it is {}", m.out_features);
        return Err(Error::packed(module, reason)
            .with_remedy("exclude the layer, or write compressed-tensors"));
    }
    let consecutive = m.group_index.as_ref().is_none_or(|index| {
        index.iter().enumerate().all(|(k, group)| k / m.group_size.max(1) == *group as usize)
    });
    if !consecutive {
        return Err(Error::packed(module, "AutoAWQ has no place for reordered groups")
            .with_remedy("use static groups, or write gptq"));
    }
    Ok(())
}

pub(super) fn pack(module: &str, m: &QuantizedMatrix) -> Result<Vec<PackedTensor>> {
    let (rows, columns, groups) = (m.out_features, m.in_features, m.groups());
    let scales = transpose(&m.scales, rows, groups);
    let codes = pack_transposed(&m.codes, rows, columns);
    let zeros = pack_transposed(&m.zeros, rows, groups);
    let tensor = |leaf: &str, dtype, shape: [usize; 2], bytes| {
        (format!("{module}.{leaf}"), dtype, shape.to_vec(), bytes)
    };
    Ok(vec![
        tensor("qweight", Dtype::I32, [columns, rows / 8], words_to_bytes(&codes)),
        tensor("qzeros", Dtype::I32, [groups, rows / 8], words_to_bytes(&zeros)),
        tensor("scales", Dtype::F16, [groups, rows], scale_bytes(module, &scales)?),
    ])
}

/// `[rows, columns]` codes to `[columns, rows/8]` words.
fn pack_transposed(codes: &[u8], rows: usize, columns: usize) -> Vec<u32> {
    let per_row = rows / 8;
    let mut words = vec![0u32; columns * per_row];
    words.par_chunks_mut(TILE * per_row).enumerate().for_each(|(tile, words)| {
        let first = tile * TILE;
        let width = words.len() / per_row;
        for c in 0..per_row {
            let mut column = [0u32; TILE];
            for (i, order) in ORDER.iter().enumerate() {
                let start = (8 * c + order) * columns + first;
                for (word, code) in column.iter_mut().zip(&codes[start..start + width]) {
                    *word |= u32::from(*code) << (4 * i);
                }
            }
            for (row, word) in words.chunks_mut(per_row).zip(column) {
                row[c] = word;
            }
        }
    });
    words
}

/// `[columns, rows/8]` words to `[rows, columns]` codes.
fn unpack_transposed(words: &[u32], rows: usize, columns: usize) -> Vec<u8> {
    let per_row = rows / 8;
    let mut codes = vec![0u8; rows * columns];
    codes.par_chunks_mut(8 * columns).enumerate().for_each(|(c, codes)| {
        for first in (0..columns).step_by(TILE) {
            let last = (first + TILE).min(columns);
            for (i, order) in ORDER.iter().enumerate() {
                let start = order * columns;
                for (k, code) in codes[start + first..start + last].iter_mut().enumerate() {
                    *code = ((words[(first + k) * per_row + c] >> (4 * i)) & 15) as u8;
                }
            }
        }
    });
    codes
}

pub(super) fn unpack(checkpoint: &Checkpoint, module: &str) -> Result<QuantizedMatrix> {
    let (info, [columns, packed]) = matrix(checkpoint, module, "qweight")?;
    let (zeros_info, [groups, _]) = matrix(checkpoint, module, "qzeros")?;
    let (scales_info, _) = matrix(checkpoint, module, "scales")?;
    let rows = packed.checked_mul(8).ok_or_else(|| bad(info, "is too large"))?;
    if groups == 0 || columns == 0 || columns % groups != 0 {
        return Err(bad(zeros_info, format!("{groups} groups do not divide in = {columns}")));
    }
    expect_shape(zeros_info, [groups, packed], "the module's qweight")?;
    expect_shape(scales_info, [groups, rows], "the module's qweight")?;
    let codes = unpack_transposed(&words(checkpoint, info)?, rows, columns);
    let zeros = unpack_transposed(&words(checkpoint, zeros_info)?, rows, groups);
    let scales = transpose(&checkpoint.f32(&scales_info.name)?, groups, rows);
    let mut m = QuantizedMatrix {
        bits: 4,
        group_size: columns / groups,
        out_features: rows,
        in_features: columns,
        codes,
        scales,
        zeros,
        symmetric: false,
        group_index: None,
    };
    m.symmetric = all_middle(&m);
    Ok(m)
}
