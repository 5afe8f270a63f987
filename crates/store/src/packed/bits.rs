//! Bit fields in rows of 32-bit words: element `i` of a row stands at bit `i * bits`, least
//! significant first, across word boundaries. All layouts are this, after a transposition or a
//! reordering of eight neighbours.

use rayon::prelude::*;

/// Calls `$f::<BITS>` with the run-time number of bits, so that shifts and word boundaries are
/// constants in the loop.
macro_rules! with_bits {
    ($bits:expr, $f:ident, $($argument:expr),*) => {
        match $bits {
            1 => $f::<1>($($argument),*),
            2 => $f::<2>($($argument),*),
            3 => $f::<3>($($argument),*),
            4 => $f::<4>($($argument),*),
            5 => $f::<5>($($argument),*),
            6 => $f::<6>($($argument),*),
            7 => $f::<7>($($argument),*),
            _ => $f::<8>($($argument),*),
        }
    };
}
/// Words that `count` elements of `bits` bits take.
pub(super) fn words_for(count: usize, bits: u8) -> usize {
    (count * usize::from(bits)).div_ceil(32)
}

/// Packs every row of `codes` (`[rows, width]`) into `words_for(width, bits)` words.
pub(super) fn pack_rows(codes: &[u8], width: usize, bits: u8) -> Vec<u32> {
    if width == 0 {
        return Vec::new();
    }
    let per_row = words_for(width, bits);
    let mut words = vec![0u32; codes.len() / width * per_row];
    words
        .par_chunks_mut(per_row)
        .zip(codes.par_chunks(width))
        .with_min_len(min_rows(width))
        .for_each(|(words, codes)| with_bits!(bits, pack_row, codes, words));
    words
}

/// The inverse of [`pack_rows`]: `words` is `[rows, words_for(width, bits)]`.
pub(super) fn unpack_rows(words: &[u32], width: usize, bits: u8) -> Vec<u8> {
    let per_row = words_for(width, bits);
    if per_row == 0 {
        return Vec::new();
    }
    let mut codes = vec![0u8; words.len() / per_row * width];
    codes
        .par_chunks_mut(width)
        .zip(words.par_chunks(per_row))
        .with_min_len(min_rows(width))
        .for_each(|(codes, words)| with_bits!(bits, unpack_row, words, codes));
    codes
}

/// Rows that make a parallel task worth while.
fn min_rows(width: usize) -> usize {
    (1 << 15) / width.max(1) + 1
}

/// 32 elements fill exactly `BITS` words.
#[inline]
fn pack_32<const BITS: usize>(codes: &[u8; 32]) -> [u32; BITS] {
    let mut words = [0u32; BITS];
    for (i, code) in codes.iter().enumerate() {
        let bit = i * BITS;
        let wide = u64::from(*code) << (bit % 32);
        words[bit / 32] |= wide as u32;
        if bit % 32 + BITS > 32 {
            words[bit / 32 + 1] |= (wide >> 32) as u32;
        }
    }
    words
}

#[inline]
fn unpack_32<const BITS: usize>(words: &[u32; BITS]) -> [u8; 32] {
    let mask = ((1u32 << BITS) - 1) as u8;
    let mut codes = [0u8; 32];
    for (i, code) in codes.iter_mut().enumerate() {
        let bit = i * BITS;
        let mut field = words[bit / 32] >> (bit % 32);
        if bit % 32 + BITS > 32 {
            field |= words[bit / 32 + 1] << (32 - bit % 32);
        }
        *code = field as u8 & mask;
    }
    codes
}

fn pack_row<const BITS: usize>(codes: &[u8], words: &mut [u32]) {
    let (whole, rest) = codes.as_chunks::<32>();
    let (blocks, tail) = words.as_chunks_mut::<BITS>();
    for (block, codes) in blocks.iter_mut().zip(whole) {
        *block = pack_32::<BITS>(codes);
    }
    if !rest.is_empty() {
        let mut padded = [0u8; 32];
        padded[..rest.len()].copy_from_slice(rest);
        let packed = pack_32::<BITS>(&padded);
        // The last words may or may not fill a block.
        let tail = if tail.is_empty() {
            blocks.last_mut().map_or(&mut [][..], |b| &mut b[..])
        } else {
            tail
        };
        let count = tail.len();
        tail.copy_from_slice(&packed[..count]);
    }
}

fn unpack_row<const BITS: usize>(words: &[u32], codes: &mut [u8]) {
    let (whole, rest) = codes.as_chunks_mut::<32>();
    let used = whole.len() * BITS;
    let (blocks, _) = words.as_chunks::<BITS>();
    for (codes, block) in whole.iter_mut().zip(blocks) {
        *codes = unpack_32::<BITS>(block);
    }
    if !rest.is_empty() {
        let mut block = [0u32; BITS];
        for (b, word) in block.iter_mut().zip(words.iter().skip(used)) {
            *b = *word;
        }
        let unpacked = unpack_32::<BITS>(&block);
        let count = rest.len();
        rest.copy_from_slice(&unpacked[..count]);
    }
}

/// Transposes a row-major `[rows, columns]` matrix.
pub(super) fn transpose<T: Copy + Default + Send + Sync>(
    values: &[T],
    rows: usize,
    columns: usize,
) -> Vec<T> {
    const TILE: usize = 32;
    let mut out = vec![T::default(); rows * columns];
    if rows == 0 || columns == 0 {
        return out;
    }
    // Each task writes TILE rows of the result, reading the source in tiles that stay in cache.
    out.par_chunks_mut(TILE * rows).enumerate().for_each(|(tile, out)| {
        let first = tile * TILE;
        for start in (0..rows).step_by(TILE) {
            let end = (start + TILE).min(rows);
            for (j, out) in out.chunks_mut(rows).enumerate() {
                for (i, o) in out[start..end].iter_mut().enumerate() {
                    *o = values[(start + i) * columns + first + j];
                }
            }
        }
    });
    out
}

/// Little-endian bytes of words.
pub(super) fn words_to_bytes(words: &[u32]) -> Vec<u8> {
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice(words).to_vec()
    } else {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_bits_dense() {
        let codes: Vec<u8> = (0..32).map(|i| (5 * i + 3) % 8).collect();
        let words = pack_rows(&codes, 32, 3);
        assert_eq!(words, [0x43C6_7543, 0x7543_C675, 0xC675_43C6]);
        assert_eq!(unpack_rows(&words, 32, 3), codes);
    }

    #[test]
    fn every_width_and_size_round_trips() {
        let mut state = 1u32;
        for bits in 1..=8u8 {
            for width in 1..=100 {
                let codes: Vec<u8> = (0..3 * width)
                    .map(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 24) as u8 & ((1u16 << bits) - 1) as u8
                    })
                    .collect();
                let words = pack_rows(&codes, width, bits);
                assert_eq!(words.len(), 3 * words_for(width, bits));
                assert_eq!(unpack_rows(&words, width, bits), codes, "{bits} bits, width {width}");
                // The definition, bit by bit.
                for (row, line) in words.chunks(words_for(width, bits)).enumerate() {
                    for i in 0..width * usize::from(bits) {
                        let code = codes[row * width + i / usize::from(bits)];
                        let bit = (code >> (i % usize::from(bits))) & 1;
                        assert_eq!((line[i / 32] >> (i % 32)) as u8 & 1, bit);
                    }
                }
            }
        }
    }

    #[test]
    fn transposes() {
        assert_eq!(transpose(&[1, 2, 3, 4, 5, 6], 2, 3), [1, 4, 2, 5, 3, 6]);
        let values: Vec<u32> = (0..70 * 45).collect();
        assert_eq!(transpose(&transpose(&values, 70, 45), 45, 70), values);
    }
}
