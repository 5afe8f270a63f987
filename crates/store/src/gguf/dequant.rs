//! ggml block formats to f32, bit for bit as ggml's reference routines compute them.
//!
//! Every routine decodes a run of whole blocks; [`dequantize`] checks sizes and spreads long runs
//! over the cores. All sums are formed in ggml's order without fused multiply-add.

use half::{bf16, f16};
use rayon::prelude::*;

use super::GgmlType;

/// Elements that one task decodes; a multiple of every block size.
const CHUNK: usize = 1 << 15;

type Decode = fn(&[u8], &mut [f32]);

/// Whether [`dequantize`] knows the block type.
pub fn readable(ty: GgmlType) -> bool {
    routine(ty).is_some()
}

/// Decodes `n` values of block type `ty` from `bytes`, which must hold exactly their blocks.
///
/// # Errors
/// The reason, for the caller to put file and tensor before: a type that cannot be decoded, a
/// number of values that fills no whole blocks, or a wrong number of bytes.
pub fn dequantize(ty: GgmlType, bytes: &[u8], n: usize) -> Result<Vec<f32>, String> {
    let name = ty.name();
    let routine = routine(ty).ok_or_else(|| {
        format!(
            "GGML type {name} cannot be dequantised; convert the file to one of F32, F16, BF16, \
             Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K"
        )
    })?;
    let (block, block_bytes) = (ty.block_size(), ty.block_bytes());
    if !n.is_multiple_of(block) {
        return Err(format!("{n} elements are no whole number of {name} blocks of {block}"));
    }
    // Compared in blocks, so that nothing can overflow before the sizes are known to agree.
    if !bytes.len().is_multiple_of(block_bytes) || bytes.len() / block_bytes != n / block {
        return Err(format!(
            "{n} elements of {name} take {} blocks of {block_bytes} bytes; there are {} bytes",
            n / block,
            bytes.len()
        ));
    }
    let mut out = vec![0f32; n];
    if n <= CHUNK {
        routine(bytes, &mut out);
    } else {
        out.par_chunks_mut(CHUNK)
            .zip(bytes.par_chunks(CHUNK / block * block_bytes))
            .for_each(|(out, bytes)| routine(bytes, out));
    }
    Ok(out)
}

fn routine(ty: GgmlType) -> Option<Decode> {
    Some(match ty {
        GgmlType::F32 => |b, o| blocks(b, o, |b, o: &mut [f32; 1]| o[0] = f32::from_le_bytes(*b)),
        GgmlType::F16 => |b, o| blocks(b, o, |b: &[u8; 2], o: &mut [f32; 1]| o[0] = half_at(b, 0)),
        GgmlType::BF16 => {
            |b, o| blocks(b, o, |b, o: &mut [f32; 1]| o[0] = bf16::from_le_bytes(*b).to_f32())
        }
        GgmlType::Q8_0 => |b, o| blocks(b, o, q8_0),
        GgmlType::Q4_0 => |b, o| blocks(b, o, q4_0),
        GgmlType::Q4_1 => |b, o| blocks(b, o, q4_1),
        GgmlType::Q5_0 => |b, o| blocks(b, o, q5_0),
        GgmlType::Q5_1 => |b, o| blocks(b, o, q5_1),
        GgmlType::Q4_K => |b, o| blocks(b, o, q4_k),
        GgmlType::Q5_K => |b, o| blocks(b, o, q5_k),
        GgmlType::Q6_K => |b, o| blocks(b, o, q6_k),
        _ => return None,
    })
}

/// Blocks of `B` bytes that decode to `N` values each.
fn blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    let (blocks, _) = bytes.as_chunks::<B>();
    let (values, _) = out.as_chunks_mut::<N>();
    for (o, b) in values.iter_mut().zip(blocks) {
        decode(b, o);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(b: &[u8; 34], o: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for (o, &q) in o.iter_mut().zip(&b[2..]) {
        *o = f32::from(q as i8) * d;
    }
}

fn q4_0(b: &[u8; 18], o: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for j in 0..16 {
        let q = b[2 + j];
        o[j] = (i32::from(q & 15) - 8) as f32 * d;
        o[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

fn q4_1(b: &[u8; 20], o: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for j in 0..16 {
        let q = b[4 + j];
        o[j] = f32::from(q & 15) * d + m;
        o[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The two 5-bit codes at place `j` (elements j and j + 16): nibbles plus their bit of `high`.
fn five_bits(nibbles: u8, high: u32, j: usize) -> (u8, u8) {
    let low_bit = ((high >> j) & 1) as u8;
    let high_bit = ((high >> (j + 16)) & 1) as u8;
    ((nibbles & 15) | (low_bit << 4), (nibbles >> 4) | (high_bit << 4))
}

fn q5_0(b: &[u8; 22], o: &mut [f32; 32]) {
    let d = half_at(b, 0);
    let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..16 {
        let (x, y) = five_bits(b[6 + j], high, j);
        o[j] = (i32::from(x) - 16) as f32 * d;
        o[j + 16] = (i32::from(y) - 16) as f32 * d;
    }
}

fn q5_1(b: &[u8; 24], o: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        let (x, y) = five_bits(b[8 + j], high, j);
        o[j] = f32::from(x) * d + m;
        o[j + 16] = f32::from(y) * d + m;
    }
}

/// Scale and minimum (6 bits each) of sub-block `j` of 8, packed into 12 bytes.
fn scale_min(j: usize, packed: &[u8]) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4),
            (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
        )
    }
}

fn q4_k(b: &[u8; 144], o: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (scales, codes) = (&b[4..16], &b[16..]);
    for (pair, codes) in codes.chunks_exact(32).enumerate() {
        let (s1, m1) = scale_min(2 * pair, scales);
        let (s2, m2) = scale_min(2 * pair + 1, scales);
        let (d1, m1) = (d * f32::from(s1), dmin * f32::from(m1));
        let (d2, m2) = (d * f32::from(s2), dmin * f32::from(m2));
        for (l, &q) in codes.iter().enumerate() {
            o[64 * pair + l] = d1 * f32::from(q & 15) - m1;
            o[64 * pair + 32 + l] = d2 * f32::from(q >> 4) - m2;
        }
    }
}

fn q5_k(b: &[u8; 176], o: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (scales, high, codes) = (&b[4..16], &b[16..48], &b[48..]);
    for (pair, codes) in codes.chunks_exact(32).enumerate() {
        let (s1, m1) = scale_min(2 * pair, scales);
        let (s2, m2) = scale_min(2 * pair + 1, scales);
        let (d1, m1) = (d * f32::from(s1), dmin * f32::from(m1));
        let (d2, m2) = (d * f32::from(s2), dmin * f32::from(m2));
        for (l, (&q, &h)) in codes.iter().zip(high).enumerate() {
            let low = (q & 15) | (((h >> (2 * pair)) & 1) << 4);
            let up = (q >> 4) | (((h >> (2 * pair + 1)) & 1) << 4);
            o[64 * pair + l] = d1 * f32::from(low) - m1;
            o[64 * pair + 32 + l] = d2 * f32::from(up) - m2;
        }
    }
}

fn q6_k(b: &[u8; 210], o: &mut [f32; 256]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half_at(b, 208);
    let scale = |at: usize| d * f32::from(scales[at] as i8);
    for part in 0..2 {
        let (low, high, o) = (&low[64 * part..], &high[32 * part..], &mut o[128 * part..]);
        for l in 0..32 {
            let first = 8 * part + l / 16;
            let h = high[l];
            let code =
                |nibble: u8, shift: u8| f32::from((nibble | (((h >> shift) & 3) << 4)) as i8 - 32);
            o[l] = scale(first) * code(low[l] & 15, 0);
            o[l + 32] = scale(first + 2) * code(low[l + 32] & 15, 2);
            o[l + 64] = scale(first + 4) * code(low[l] >> 4, 4);
            o[l + 96] = scale(first + 6) * code(low[l + 32] >> 4, 6);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q8_0_by_hand() {
        let mut block = vec![0u8; 34];
        block[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        (block[2], block[3], block[33]) = (3, 0xff, 0x80);
        let got = dequantize(GgmlType::Q8_0, &block, 32).unwrap();
        assert_eq!((got[0], got[1], got[2], got[31]), (1.5, -0.5, 0.0, -64.0));
    }

    #[test]
    fn four_bit_blocks_by_hand() {
        // Byte j holds element j low and element j + 16 high.
        let mut block = f16::from_f32(2.0).to_le_bytes().to_vec();
        block.extend([0x8f; 16]);
        let got = dequantize(GgmlType::Q4_0, &block, 32).unwrap();
        assert_eq!((got[0], got[15], got[16], got[31]), (14.0, 14.0, 0.0, 0.0));

        block.splice(2..2, f16::from_f32(-1.0).to_le_bytes());
        let got = dequantize(GgmlType::Q4_1, &block, 32).unwrap();
        assert_eq!((got[0], got[16]), (29.0, 15.0));
    }

    #[test]
    fn five_bit_blocks_by_hand() {
        // Fifth bits of elements 0 and 17 only.
        let high = (1u32 | 1 << 17).to_le_bytes();
        let mut block = f16::from_f32(1.0).to_le_bytes().to_vec();
        block.extend(high);
        block.extend([0x21; 16]);
        let got = dequantize(GgmlType::Q5_0, &block, 32).unwrap();
        assert_eq!((got[0], got[1], got[16], got[17]), (1.0, -15.0, -14.0, 2.0));

        block.splice(2..2, f16::from_f32(0.25).to_le_bytes());
        let got = dequantize(GgmlType::Q5_1, &block, 32).unwrap();
        assert_eq!((got[0], got[1], got[16], got[17]), (17.25, 1.25, 2.25, 18.25));
    }

    #[test]
    fn super_blocks_by_hand() {
        // Q4_K: d = 1, dmin = 2; sub-block 0 has scale 3, minimum 1; sub-block 4 has scale
        // 5 | 1 << 4 = 21 and minimum 2.
        let mut block = vec![0u8; 144];
        block[..2].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        block[4] = 3 | 1 << 6;
        block[8] = 1;
        block[12] = 5 | 2 << 4;
        block[16] = 0x74; // elements 0 and 32
        block[16 + 64] = 0x02; // element 128
        let got = dequantize(GgmlType::Q4_K, &block, 256).unwrap();
        assert_eq!((got[0], got[1], got[32]), (10.0, -2.0, 0.0));
        assert_eq!((got[128], got[129]), (2.0 * 21.0 - 4.0, -4.0));

        // Q6_K: scale 2 for elements 0..16, -1 for 64..80; d = 0.5.
        let mut block = vec![0u8; 210];
        block[208..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        (block[192], block[196]) = (2, 0xff);
        block[0] = 0xf1; // low nibbles of elements 0 (1) and 64 (15)
        block[128] = 0b01_11; // high bits: element 0 has 3, element 32 has 1, element 64 has 0
        let got = dequantize(GgmlType::Q6_K, &block, 256).unwrap();
        assert_eq!((got[0], got[1], got[64], got[65]), (17.0, -32.0, 8.5, 16.0));
    }

    /// Values and hashes by the Python package of ggml (tests/fixtures/make.py --blocks).
    #[rustfmt::skip]
    #[allow(clippy::excessive_precision)]
    const EXPECTED: [(GgmlType, u64, [f32; 8]); 8] = [
        (GgmlType::Q8_0, 0x50c97c7b871cddbc, [7.407958984375, -0.9747314453125, -6.53070068359375, 5.6534423828125, 11.3721923828125, -5.37109375, -3.05859375, -2.705322265625]),
        (GgmlType::Q4_0, 0xd51b6fa72c689ca8, [-0.779296875, 0.487060546875, 0.292236328125, -0.292236328125, 0.0, -0.413818359375, -0.6060791015625, 0.70538330078125]),
        (GgmlType::Q4_1, 0x5ea89639de42e442, [0.30218505859375, 1.37371826171875, 1.37371826171875, 0.49700927734375, 1.4403076171875, 1.14471435546875, 0.6097412109375, 0.20343017578125]),
        (GgmlType::Q5_0, 0xdad249a75348771e, [1.3646240234375, -1.26715087890625, 0.1949462890625, -0.1949462890625, 1.50421142578125, 1.34967041015625, -1.3577880859375, -0.75048828125]),
        (GgmlType::Q5_1, 0x8543f6d70a51f537, [0.20074462890625, 1.17547607421875, 1.56536865234375, 1.17547607421875, 3.1922607421875, 2.00714111328125, 0.68170166015625, 2.39007568359375]),
        (GgmlType::Q4_K, 0x71b812cf3b091ce3, [32.74237060546875, 42.3922119140625, 19.87591552734375, 13.44268798828125, 18.24334716796875, 21.609130859375, 17.28765869140625, 58.24951171875]),
        (GgmlType::Q5_K, 0x70ec32a574fb44b8, [8.54736328125, 13.22607421875, 2.698974609375, 31.94091796875, 38.2542724609375, -2.504638671875, 39.513671875, 32.1507568359375]),
        (GgmlType::Q6_K, 0x82eac8e50b05ae7d, [-42.52850341796875, 13.085693359375, 318.27783203125, 379.485107421875, 99.72564697265625, 11.397216796875, -10.552978515625, 113.97216796875]),
    ];

    /// The generator of make.py: bytes of a linear congruential sequence, scales near 0.1.
    fn pseudo_blocks(ty: GgmlType, elements: usize) -> Vec<u8> {
        let mut state = ty.id();
        let mut raw: Vec<u8> = (0..ty.bytes_for(elements).unwrap())
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 24) as u8
            })
            .collect();
        let places: &[usize] = match ty {
            GgmlType::Q6_K => &[208],
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
            _ => &[0],
        };
        for block in raw.chunks_exact_mut(ty.block_bytes()) {
            for place in places {
                block[place + 1] = 0x2e;
            }
        }
        raw
    }

    #[test]
    fn every_type_agrees_with_ggml_bit_for_bit() {
        for (ty, hash, picks) in EXPECTED {
            let got = dequantize(ty, &pseudo_blocks(ty, 512), 512).unwrap();
            let places = [0, 1, 17, 31, 32, 100, 200, 255];
            assert_eq!(places.map(|i| got[i]), picks, "{ty}");
            let digest = got
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .fold(0xcbf29ce484222325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3));
            assert_eq!(digest, hash, "{ty}");
        }
    }

    #[test]
    fn long_runs_equal_their_blocks() {
        for (ty, ..) in EXPECTED {
            let n = 2 * CHUNK + 512;
            let raw = pseudo_blocks(ty, n);
            let whole = dequantize(ty, &raw, n).unwrap();
            let half = n / 2 / 256 * 256;
            let (left, right) = raw.split_at(ty.bytes_for(half).unwrap());
            let mut parts = dequantize(ty, left, half).unwrap();
            parts.extend(dequantize(ty, right, n - half).unwrap());
            assert!(whole.iter().zip(&parts).all(|(a, b)| a.to_bits() == b.to_bits()), "{ty}");
        }
    }

    #[test]
    fn wrong_sizes_and_types_are_refused() {
        assert!(dequantize(GgmlType::Q4_0, &[0; 18], 31).is_err());
        assert!(dequantize(GgmlType::Q4_0, &[0; 17], 32).is_err());
        assert!(dequantize(GgmlType::Q4_0, &[0; 36], 32).is_err());
        assert!(dequantize(GgmlType::F32, &[0; 4], usize::MAX).is_err());
        let error = dequantize(GgmlType::IQ2_XS, &[0; 74], 256).unwrap_err();
        assert!(error.contains("IQ2_XS"), "{error}");
        assert!(!readable(GgmlType::Q2_K) && readable(GgmlType::Q6_K));
    }

    #[test]
    fn nan_scales_give_nan_not_panic() {
        let mut block = vec![0xffu8; 144];
        assert!(dequantize(GgmlType::Q4_K, &block, 256).unwrap()[0].is_nan());
        block.resize(210, 0xff);
        assert!(dequantize(GgmlType::Q6_K, &block, 256).unwrap()[255].is_nan());
    }
}
