//! The packed layout and its plain-Rust reader.
//!
//! A row is cut into blocks of [`BLOCK`] = 128 slots: 8 vectors of 16 lanes, slot = 16 * vector +
//! lane. A block takes 16 * bits bytes, for every width the exact size of the codes:
//!
//! | bits | bytes of a block |
//! |---|---|
//! | 2, 3, 4 | 16 lanes of `bits` bytes each, a little-endian number with the code of vector j at bit `bits * j` |
//! | 5 | the low 4 bits of the codes as for width 4 (64 bytes), then 16 bytes: bit j of byte l is bit 4 of the code at (j, l) |
//! | 6 | the low 4 bits of the codes as for width 4 (64 bytes), then the high 2 bits as for width 2 (32 bytes) |
//! | 8 | the codes in the order of the slots |
//!
//! So one shift brings the codes of 16 neighbouring slots to the bottom of 16 lanes, where a table
//! look-up (2 to 5 bits) or a conversion turns them into numbers, and x is read in its own order.

use super::{NO_COLUMN, RowView};

/// Slots of a vector: lanes of a 512-bit register of f32.
pub(super) const VECTOR: usize = 16;
/// Slots of a block.
pub(super) const BLOCK: usize = 128;
/// The widths that there are.
pub(super) const BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];
/// Bytes behind the last row that a wide load may touch.
pub(super) const SLACK: usize = 64;

/// Bytes of a packed block.
pub(super) const fn block_bytes(bits: u8) -> usize {
    BLOCK / 8 * bits as usize
}

/// Packs one row of codes; `columns` says which column a slot holds.
pub(super) fn pack_row(bits: u8, row: &[u8], columns: &[u32], target: &mut [u8]) {
    for (block, columns) in target.chunks_exact_mut(block_bytes(bits)).zip(columns.chunks(BLOCK)) {
        for (slot, &column) in columns.iter().enumerate() {
            let code = if column == NO_COLUMN { 0 } else { row[column as usize] };
            put(bits, block, slot, code);
        }
    }
}

/// Puts a code into a block that holds zeros.
fn put(bits: u8, block: &mut [u8], slot: usize, code: u8) {
    let (vector, lane) = (slot / VECTOR, slot % VECTOR);
    match bits {
        2..=4 => {
            let width = usize::from(bits);
            let shift = width * vector;
            // A 3-bit code may straddle two bytes.
            let wide = u16::from(code) << (shift % 8);
            let at = lane * width + shift / 8;
            block[at] |= wide as u8;
            if wide > 0xFF {
                block[at + 1] |= (wide >> 8) as u8;
            }
        }
        5 => {
            put(4, &mut block[..64], slot, code & 15);
            block[64 + lane] |= (code >> 4) << vector;
        }
        6 => {
            put(4, &mut block[..64], slot, code & 15);
            put(2, &mut block[64..], slot, code >> 4);
        }
        _ => block[slot] = code,
    }
}

/// The code of a slot.
#[inline(always)]
fn get(bits: u8, block: &[u8], slot: usize) -> u8 {
    let (vector, lane) = (slot / VECTOR, slot % VECTOR);
    match bits {
        2..=4 => {
            let width = usize::from(bits);
            let shift = width * vector;
            let at = lane * width + shift / 8;
            let low = u16::from(block[at]);
            let straddles = shift % 8 + width > 8;
            let high = if straddles { u16::from(block[at + 1]) << 8 } else { 0 };
            (((low | high) >> (shift % 8)) & ((1 << width) - 1)) as u8
        }
        5 => get(4, &block[..64], slot) | (((block[64 + lane] >> vector) & 1) << 4),
        6 => get(4, &block[..64], slot) | (get(2, &block[64..], slot) << 4),
        _ => block[slot],
    }
}

/// Decodes a block into f32.
pub(super) fn decode(bits: u8, block: &[u8], params: &[f32], groups: &[u32], to: &mut [f32]) {
    for (vector, (line, &group)) in to.chunks_exact_mut(VECTOR).zip(groups).enumerate() {
        let (scale, zero) = (params[2 * group as usize], params[2 * group as usize + 1]);
        for (lane, value) in line.iter_mut().enumerate() {
            *value = (f32::from(get(bits, block, vector * VECTOR + lane)) - zero) * scale;
        }
    }
}

/// Decodes a row: one number for every slot.
pub(super) fn expand(bits: u8, row: RowView<'_>, to: &mut [f32]) {
    let blocks = row.codes.chunks_exact(block_bytes(bits));
    for ((block, groups), to) in
        blocks.zip(row.groups.chunks_exact(BLOCK / VECTOR)).zip(to.chunks_exact_mut(BLOCK))
    {
        decode(bits, block, row.params, groups, to);
    }
}

/// The product of a row with x, both by slots.
pub(super) fn dot(bits: u8, row: RowView<'_>, x: &[f32]) -> f32 {
    let blocks = row.codes.chunks_exact(block_bytes(bits));
    let mut weights = [0.0; BLOCK];
    let mut lanes = [0.0f32; VECTOR];
    for ((block, groups), x) in
        blocks.zip(row.groups.chunks_exact(BLOCK / VECTOR)).zip(x.chunks_exact(BLOCK))
    {
        decode(bits, block, row.params, groups, &mut weights);
        for (w, x) in weights.chunks_exact(VECTOR).zip(x.chunks_exact(VECTOR)) {
            for lane in 0..VECTOR {
                lanes[lane] += w[lane] * x[lane];
            }
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table in the head of this file, by hand.
    #[test]
    fn bytes_of_a_block() {
        let packed = |bits: u8, slot: usize, code: u8| {
            let mut block = vec![0u8; block_bytes(bits)];
            put(bits, &mut block, slot, code);
            let set: Vec<(usize, u8)> =
                block.iter().copied().enumerate().filter(|&(_, b)| b != 0).collect();
            set
        };
        // Vector 1, lane 3 is slot 19.
        assert_eq!(packed(4, 19, 13), [(12, 0xD0)]);
        assert_eq!(packed(2, 19, 3), [(6, 0b1100)]);
        // Vector 2 of width 3 starts at bit 6 and straddles two bytes.
        assert_eq!(packed(3, 32, 0b101), [(0, 0b0100_0000), (1, 0b1)]);
        assert_eq!(packed(5, 19, 0b10001), [(12, 0x10), (67, 0b10)]);
        assert_eq!(packed(6, 19, 0b11_0001), [(12, 0x10), (64 + 6, 0b1100)]);
        assert_eq!(packed(8, 19, 200), [(19, 200)]);
    }

    #[test]
    fn packing_is_reversible() {
        for bits in BITS {
            let row: Vec<u8> =
                (0..256u32).map(|i| ((i * 37 + i / 7) % (1 << bits)) as u8).collect();
            let columns: Vec<u32> = (0..256).collect();
            let mut packed = vec![0; 2 * block_bytes(bits)];
            pack_row(bits, &row, &columns, &mut packed);
            for (slot, &code) in row.iter().enumerate() {
                let block = &packed[slot / BLOCK * block_bytes(bits)..][..block_bytes(bits)];
                assert_eq!(get(bits, block, slot % BLOCK), code, "{bits} {slot}");
            }
        }
    }
}
