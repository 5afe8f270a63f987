//! GPTQ: `qweight` int32 `[in*bits/32, out]` packed along the input, `qzeros` int32
//! `[groups, out*bits/32]` packed along the output, both in natural order and dense; `scales` f16
//! `[groups, out]`; `g_idx` int32 `[in]`, the group of each input column. Version 1 stores zero
//! points minus one.

use super::bits::{pack_rows, transpose, unpack_rows, words_to_bytes};
use super::config::QuantConfig;
use super::fetch::{all_middle, bad, expect_shape, matrix, scale_bytes, words};
use super::{PackedTensor, QuantizedMatrix};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Sizes must be multiples of this for that many bits: whole words, or for 3 bits whole triples.
fn multiple(bits: u8) -> usize {
    if bits == 3 { 32 } else { 32 / usize::from(bits.max(1)) }
}

pub(super) fn check(module: &str, m: &QuantizedMatrix) -> Result<()> {
    if ![2, 3, 4, 8].contains(&m.bits) {
        return Err(Error::packed(module, format!("GPTQ holds 2, 3, 4 or 8 bits, not {}", m.bits))
            .with_remedy("use one of these, or write compressed-tensors"));
    }
    for (what, size) in [("in", m.in_features), ("out", m.out_features)] {
        if size % multiple(m.bits) != 0 {
            let reason = format!(
                "GPTQ at {} bits needs {what} to be a multiple of {}; it is {size}",
                m.bits,
                multiple(m.bits)
            );
            return Err(Error::packed(module, reason)
                .with_remedy("exclude the layer, or write compressed-tensors"));
        }
    }
    Ok(())
}

pub(super) fn pack(module: &str, m: &QuantizedMatrix, v2: bool) -> Result<Vec<PackedTensor>> {
    let (rows, columns, groups) = (m.out_features, m.in_features, m.groups());
    let words = pack_rows(&m.codes, columns, m.bits);
    let per_row = words.len() / rows;
    let qweight = transpose(&words, rows, per_row);
    let mut zeros = transpose(&m.zeros, rows, groups);
    if !v2 {
        for zero in &mut zeros {
            *zero = zero.checked_sub(1).ok_or_else(|| {
                Error::packed(module, "a zero point is 0, which GPTQ v1 (zero - 1) cannot hold")
                    .with_remedy("write gptq_v2")
            })?;
        }
    }
    let qzeros = pack_rows(&zeros, rows, m.bits);
    let index: Vec<u32> = match &m.group_index {
        Some(index) => index.clone(),
        None => (0..columns).map(|k| (k / m.group_size) as u32).collect(),
    };
    let scales = transpose(&m.scales, rows, groups);
    let name = |leaf: &str| format!("{module}.{leaf}");
    let zeros_shape = vec![groups, qzeros.len() / groups];
    Ok(vec![
        (name("qweight"), Dtype::I32, vec![per_row, rows], words_to_bytes(&qweight)),
        (name("qzeros"), Dtype::I32, zeros_shape, words_to_bytes(&qzeros)),
        (name("scales"), Dtype::F16, vec![groups, rows], scale_bytes(module, &scales)?),
        (name("g_idx"), Dtype::I32, vec![columns], words_to_bytes(&index)),
    ])
}

pub(super) fn unpack(
    checkpoint: &Checkpoint,
    module: &str,
    config: &QuantConfig,
    v2: bool,
) -> Result<QuantizedMatrix> {
    let (info, [packed, rows]) = matrix(checkpoint, module, "qweight")?;
    let (zeros_info, [groups, _]) = matrix(checkpoint, module, "qzeros")?;
    let (scales_info, _) = matrix(checkpoint, module, "scales")?;
    let index_name = format!("{module}.g_idx");
    let index =
        if checkpoint.contains(&index_name) { Some(checkpoint.i32(&index_name)?) } else { None };
    let total_bits = packed.checked_mul(32).ok_or_else(|| bad(info, "is too large"))?;
    // With the group index the number of bits follows from the shapes, whatever the configuration
    // says about this module.
    let (columns, bits) = match &index {
        Some(index) if !index.is_empty() && total_bits % index.len() == 0 => {
            (index.len(), total_bits / index.len())
        }
        Some(index) => {
            let reason = format!("{packed} words per output do not fit {} inputs", index.len());
            return Err(bad(info, reason));
        }
        None => (total_bits / usize::from(config.bits.max(1)), usize::from(config.bits)),
    };
    let Some(bits) = u8::try_from(bits).ok().filter(|b| [2, 3, 4, 8].contains(b)) else {
        return Err(bad(info, format!("holds {bits} bits per weight; GPTQ has 2, 3, 4 or 8")));
    };
    if rows == 0 || groups == 0 || groups > columns || rows % multiple(bits) != 0 {
        return Err(bad(info, format!("[{rows}, {columns}] in {groups} groups is not possible")));
    }
    expect_shape(zeros_info, [groups, rows * usize::from(bits) / 32], "the module's qweight")?;
    expect_shape(scales_info, [groups, rows], "the module's qweight")?;

    let group_size = match config.group_size {
        Some(size) if size > 0 && columns.div_ceil(size) == groups => size,
        _ => columns.div_ceil(groups),
    };
    let group_index = index.and_then(|index| {
        let consecutive = index.iter().enumerate().all(|(k, g)| *g as usize == k / group_size);
        // Negative numbers become large ones, which the final check refuses.
        (!consecutive).then(|| index.iter().map(|g| *g as u32).collect::<Vec<u32>>())
    });
    let qweight = transpose(&words(checkpoint, info)?, packed, rows);
    let codes = unpack_rows(&qweight, columns, bits);
    let mut zeros = unpack_rows(&words(checkpoint, zeros_info)?, rows, bits);
    if !v2 {
        let top = (1u16 << bits) - 1;
        for zero in &mut zeros {
            if u16::from(*zero) == top {
                let reason = format!("a zero point is {}, outside the {bits}-bit grid", top + 1);
                return Err(bad(zeros_info, reason)
                    .with_remedy("the file may be gptq_v2: set checkpoint_format accordingly"));
            }
            *zero += 1;
        }
    }
    let mut m = QuantizedMatrix {
        bits,
        group_size,
        out_features: rows,
        in_features: columns,
        codes,
        scales: transpose(&checkpoint.f32(&scales_info.name)?, groups, rows),
        zeros: transpose(&zeros, groups, rows),
        symmetric: false,
        group_index,
    };
    m.symmetric = all_middle(&m);
    Ok(m)
}
