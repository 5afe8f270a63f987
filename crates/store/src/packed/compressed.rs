//! compressed-tensors "pack-quantized": `weight_packed` int32 `[out, ceil(in*bits/32)]`, dense
//! along the input in natural order, element = signed code + 2^(bits-1); `weight_scale`
//! `[out, groups]`; `weight_shape` int64 `[2]`; if asymmetric, `weight_zero_point` int32
//! `[ceil(out*bits/32), groups]`, dense along the output with the same offset.

use super::bits::{pack_rows, transpose, unpack_rows, words_for, words_to_bytes};
use super::config::{QuantConfig, Scheme};
use super::fetch::{bad, expect_shape, matrix, scale_bytes, words};
use super::{PackedTensor, QuantizedMatrix};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

pub(super) fn check(module: &str, m: &QuantizedMatrix) -> Result<()> {
    if !(1..=8).contains(&m.bits) {
        let reason = format!("compressed-tensors holds 1 to 8 bits, not {}", m.bits);
        return Err(Error::packed(module, reason));
    }
    let consecutive = m.group_index.as_ref().is_none_or(|index| {
        index.iter().enumerate().all(|(k, group)| k / m.group_size.max(1) == *group as usize)
    });
    if !consecutive {
        // Current versions of compressed-tensors refuse a group index.
        return Err(Error::packed(module, "compressed-tensors has no place for reordered groups")
            .with_remedy("use static groups with act-order, or write gptq"));
    }
    Ok(())
}

pub(super) fn pack(module: &str, m: &QuantizedMatrix) -> Result<Vec<PackedTensor>> {
    let (rows, columns, groups) = (m.out_features, m.in_features, m.groups());
    // Our codes are unsigned, which is just what the offset makes of the signed ones.
    let codes = pack_rows(&m.codes, columns, m.bits);
    let name = |leaf: &str| format!("{module}.{leaf}");
    let shape = [rows as i64, columns as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
    let mut tensors = vec![
        (
            name("weight_packed"),
            Dtype::I32,
            vec![rows, words_for(columns, m.bits)],
            words_to_bytes(&codes),
        ),
        (name("weight_scale"), Dtype::F16, vec![rows, groups], scale_bytes(module, &m.scales)?),
        (name("weight_shape"), Dtype::I64, vec![2], shape),
    ];
    if !m.symmetric {
        let per_group = words_for(rows, m.bits);
        let zeros = pack_rows(&transpose(&m.zeros, rows, groups), rows, m.bits);
        let zeros = transpose(&zeros, groups, per_group);
        let shape = vec![per_group, groups];
        tensors.push((name("weight_zero_point"), Dtype::I32, shape, words_to_bytes(&zeros)));
    }
    Ok(tensors)
}

pub(super) fn unpack(
    checkpoint: &Checkpoint,
    module: &str,
    config: &QuantConfig,
) -> Result<QuantizedMatrix> {
    let (info, [rows, per_row]) = matrix(checkpoint, module, "weight_packed")?;
    let shape_name = format!("{module}.weight_shape");
    let shape_info = checkpoint.info(&shape_name)?;
    let columns = match checkpoint.i32(&shape_name)?.as_slice() {
        [r, c] if usize::try_from(*r) == Ok(rows) && *c > 0 => *c as usize,
        other => {
            let reason = format!("is {other:?}, but weight_packed has {rows} rows");
            return Err(bad(shape_info, reason));
        }
    };
    let (scale_info, [scale_rows, groups]) = matrix(checkpoint, module, "weight_scale")?;
    if scale_rows != rows || groups == 0 || columns % groups != 0 {
        let reason = format!(
            "has the shape {:?}, which does not fit a weight of [{rows}, {columns}]",
            scale_info.shape
        );
        return Err(bad(scale_info, reason));
    }
    let group_size = columns / groups;
    let zeros_name = format!("{module}.weight_zero_point");
    let symmetric = !checkpoint.contains(&zeros_name);
    let fits = |s: &&Scheme| {
        words_for(columns, s.bits) == per_row
            && s.group_size.unwrap_or(columns) == group_size
            && s.symmetric == symmetric
    };
    // Targets may be patterns, which are not interpreted here: the shapes tell which grid it is.
    let common = config.scheme();
    let bits = match config.scheme_of(module) {
        Some(scheme) => Some(scheme).filter(fits),
        None => std::iter::once(&common).chain(config.schemes()).find(fits),
    };
    let bits = bits.map(|scheme| scheme.bits).ok_or_else(|| {
        let kind = if symmetric { "no zero points" } else { "zero points" };
        let reason = format!(
            "{per_row} words per row, groups of {group_size} and {kind} fit no grid of the \
             quantization_config (inputs: {columns})"
        );
        bad(info, reason)
    })?;
    let codes = unpack_rows(&words(checkpoint, info)?, columns, bits);
    let middle = 1u8 << (bits - 1);
    let zeros = if symmetric {
        vec![middle; rows * groups]
    } else {
        let (zeros_info, _) = matrix(checkpoint, module, "weight_zero_point")?;
        let per_group = words_for(rows, bits);
        expect_shape(zeros_info, [per_group, groups], "the module's weight_packed")?;
        let packed = transpose(&words(checkpoint, zeros_info)?, per_group, groups);
        transpose(&unpack_rows(&packed, rows, bits), groups, rows)
    };
    let index_name = format!("{module}.weight_g_idx");
    let group_index = if checkpoint.contains(&index_name) {
        let index = checkpoint.i32(&index_name)?;
        // Uninitialised indices are stored as -1.
        let used = index.iter().any(|g| *g >= 0);
        let consecutive = index.iter().enumerate().all(|(k, g)| *g as usize == k / group_size);
        (used && !consecutive).then(|| index.iter().map(|g| *g as u32).collect::<Vec<u32>>())
    } else {
        None
    };
    Ok(QuantizedMatrix {
        bits,
        group_size,
        out_features: rows,
        in_features: columns,
        codes,
        scales: checkpoint.f32(&scale_info.name)?,
        zeros,
        symmetric,
        group_index,
    })
}
