//! Codes that exist already, as ggml blocks and back: a symmetric grid with 32 weights (or a multiple) to a
//! scale is what `Q4_0`, `Q5_0` and `Q8_0` hold, so its codes and scales are kept exactly.

use super::GgmlType;
use super::quantize::{get_f16, put_f16, put_five_bits, put_nibbles};
use crate::packed::QuantizedMatrix;

/// The block type that holds a symmetric grid of so many bits exactly.
pub fn grid_type(bits: u8) -> Option<GgmlType> {
    match bits {
        1..=4 => Some(GgmlType::Q4_0),
        5 => Some(GgmlType::Q5_0),
        6..=8 => Some(GgmlType::Q8_0),
        _ => None,
    }
}

/// Stores the codes of a symmetric grid as they are: `codes` below `2^bits` with their zero point
/// at `2^(bits-1)`, one scale (exact in f16) for every 32 codes, as the block type of
/// [`grid_type`] or a wider one of the same kind (`Q4_0`, `Q5_0`, `Q8_0`).
///
/// # Errors
/// The reason: a type too narrow or of another kind, or sizes that do not fit together.
pub fn encode_grid(
    ty: GgmlType,
    bits: u8,
    codes: &[u8],
    scales: &[f32],
) -> Result<Vec<u8>, String> {
    let middle = match ty {
        GgmlType::Q4_0 if (1..=4).contains(&bits) => 8,
        GgmlType::Q5_0 if (1..=5).contains(&bits) => 16,
        GgmlType::Q8_0 if (1..=8).contains(&bits) => 0,
        _ => return Err(format!("{ty} has no place for codes of {bits} bits")),
    };
    if codes.len() != scales.len() * 32 {
        return Err(format!("{} codes with {} scales of 32", codes.len(), scales.len()));
    }
    let offset = middle - (1i16 << (bits - 1));
    let mut out = vec![0u8; scales.len() * ty.block_bytes()];
    let (groups, _) = codes.as_chunks::<32>();
    for ((block, group), scale) in out.chunks_mut(ty.block_bytes()).zip(groups).zip(scales) {
        put_f16(block, 0, *scale);
        let moved = group.map(|code| (i16::from(code) + offset) as u8);
        match ty {
            GgmlType::Q4_0 => put_nibbles(&mut block[2..], &moved),
            GgmlType::Q5_0 => put_five_bits(&mut block[2..], &moved),
            _ => block[2..].copy_from_slice(&moved),
        }
    }
    Ok(out)
}

/// The symmetric grid behind a matrix `[rows, columns]` of a block type that is one (`Q4_0`, `Q5_0`,
/// `Q8_0`): 32 columns per scale. `None` for other types and sizes that do not fit.
pub fn decode_grid(
    ty: GgmlType,
    bytes: &[u8],
    rows: usize,
    columns: usize,
) -> Option<QuantizedMatrix> {
    let bits = match ty {
        GgmlType::Q4_0 => 4,
        GgmlType::Q5_0 => 5,
        GgmlType::Q8_0 => 8,
        _ => return None,
    };
    if ty.bytes_for(rows.checked_mul(columns)?)? != bytes.len() || !columns.is_multiple_of(32) {
        return None;
    }
    let blocks = bytes.chunks_exact(ty.block_bytes());
    let mut codes = Vec::with_capacity(rows * columns);
    let mut scales = Vec::with_capacity(rows * columns / 32);
    for block in blocks {
        scales.push(get_f16(block, 0));
        match ty {
            GgmlType::Q8_0 => codes.extend(block[2..].iter().map(|q| q ^ 0x80)),
            _ => {
                let at = block.len() - 16;
                let high = if bits == 5 {
                    u32::from_le_bytes([block[2], block[3], block[4], block[5]])
                } else {
                    0
                };
                let nibble = |j: usize| {
                    let byte = block[at + j % 16];
                    (if j < 16 { byte & 15 } else { byte >> 4 }) | ((high >> j & 1) as u8) << 4
                };
                codes.extend((0..32).map(nibble));
            }
        }
    }
    let middle = 1u8 << (bits - 1);
    Some(QuantizedMatrix {
        bits,
        group_size: 32,
        out_features: rows,
        in_features: columns,
        zeros: vec![middle; scales.len()],
        codes,
        scales,
        symmetric: true,
        group_index: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::dequantize;

    #[test]
    fn codes_of_a_grid_are_kept() {
        let mut state = 3u32;
        for (bits, ty) in [
            (2, GgmlType::Q4_0),
            (3, GgmlType::Q4_0),
            (4, GgmlType::Q4_0),
            (4, GgmlType::Q8_0),
            (5, GgmlType::Q5_0),
            (8, GgmlType::Q8_0),
        ] {
            let codes: Vec<u8> = (0..96)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8 >> (8 - bits)
                })
                .collect();
            let scales = [0.5f32, -0.25, 3.0];
            let bytes = encode_grid(ty, bits, &codes, &scales).unwrap();
            let values = dequantize(ty, &bytes, 96).unwrap();
            for (i, (value, code)) in values.iter().zip(&codes).enumerate() {
                let centred = i16::from(*code) - (1 << (bits - 1));
                assert_eq!(*value, f32::from(centred) * scales[i / 32], "{bits} bits in {ty}");
            }
            let back = decode_grid(ty, &bytes, 3, 32).unwrap();
            back.check("m").unwrap();
            assert_eq!((&back.dequantize(), &back.scales[..]), (&values, &scales[..]));
        }
        assert_eq!(grid_type(3), Some(GgmlType::Q4_0));
        assert_eq!(grid_type(9), None);
        assert!(decode_grid(GgmlType::Q4_1, &[0; 20], 1, 32).is_none());
        assert!(decode_grid(GgmlType::Q4_0, &[0; 18], 2, 16).is_none());
        assert!(encode_grid(GgmlType::Q4_0, 5, &[0; 32], &[1.0]).is_err());
        assert!(encode_grid(GgmlType::Q4_0, 4, &[0; 31], &[1.0]).is_err());
    }
}
