//! f32 values to ggml block formats, by ggml's published reference rules: the same rounding, the
//! same scale searches, the same order of sums, so that a file written here holds what other tools
//! would have written from the same weights (bit for bit against ggml's Python package for the
//! types it quantises; K-quants up to the fused multiply-adds of a compiled ggml).
//!
//! Every routine encodes one block; [`quantize`] checks values and sizes and spreads long runs over
//! the cores. Codes that exist already are stored by `codes`.

use half::f16;
use rayon::prelude::*;

use super::GgmlType;
use crate::convert;
use crate::dtype::Dtype;

/// Elements that one task encodes; a multiple of every block size.
const CHUNK: usize = 1 << 13;

/// The block types that [`quantize`] writes.
pub const WRITABLE: [GgmlType; 11] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
];

type Encode = fn(&[f32], &mut [u8]);

/// Encodes `values` (whole rows, each a whole number of blocks) as `ty`.
///
/// # Errors
/// The reason, for the caller to put the tensor before: a type that is not written, values that
/// fill no whole blocks, or a value that the type cannot hold (not finite, or its scale beyond f16).
pub fn quantize(ty: GgmlType, values: &[f32]) -> Result<Vec<u8>, String> {
    let plain = match ty {
        GgmlType::F32 => Some(Dtype::F32),
        GgmlType::F16 => Some(Dtype::F16),
        GgmlType::BF16 => Some(Dtype::BF16),
        _ => None,
    };
    if let Some(dtype) = plain {
        if let Some(at) = convert::overflows(values, dtype) {
            return Err(format!("value {at} is {:e}, which {ty} cannot hold", values[at]));
        }
        return convert::from_f32(values, dtype).ok_or_else(|| format!("{ty} is not written"));
    }
    let routine = routine(ty).ok_or_else(|| {
        let known = WRITABLE.map(GgmlType::name).join(", ");
        format!("GGML type {} is not written; written are {known}", ty.name())
    })?;
    let (block, block_bytes) = (ty.block_size(), ty.block_bytes());
    if !values.len().is_multiple_of(block) {
        let n = values.len();
        return Err(format!("{n} elements are no whole number of {ty} blocks of {block}"));
    }
    // All scales and minima are at most the largest value, so f16 holds them when it holds that.
    let limit = f16::MAX.to_f32();
    if let Some(at) = values.par_iter().position_first(|v| v.is_nan() || v.abs() > limit) {
        return Err(format!(
            "value {at} is {:e}; {ty} holds finite values up to {limit}",
            values[at]
        ));
    }
    let mut out = vec![0u8; values.len() / block * block_bytes];
    out.par_chunks_mut(CHUNK / block * block_bytes)
        .zip(values.par_chunks(CHUNK))
        .for_each(|(out, values)| routine(values, out));
    Ok(out)
}

fn routine(ty: GgmlType) -> Option<Encode> {
    Some(match ty {
        GgmlType::Q8_0 => |v, o| blocks(v, o, q8_0),
        GgmlType::Q4_0 => |v, o| blocks(v, o, q4_0),
        GgmlType::Q4_1 => |v, o| blocks(v, o, q4_1),
        GgmlType::Q5_0 => |v, o| blocks(v, o, q5_0),
        GgmlType::Q5_1 => |v, o| blocks(v, o, q5_1),
        GgmlType::Q4_K => |v, o| blocks(v, o, q4_k),
        GgmlType::Q5_K => |v, o| blocks(v, o, q5_k),
        GgmlType::Q6_K => |v, o| blocks(v, o, q6_k),
        _ => return None,
    })
}

/// Blocks of `N` values that encode to `B` bytes each.
fn blocks<const N: usize, const B: usize>(
    values: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; N], &mut [u8; B]),
) {
    let (values, _) = values.as_chunks::<N>();
    let (blocks, _) = out.as_chunks_mut::<B>();
    for (o, v) in blocks.iter_mut().zip(values) {
        encode(v, o);
    }
}

pub(super) fn put_f16(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

pub(super) fn get_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Byte `j` takes code `j` low and code `j + 16` high.
pub(super) fn put_nibbles(bytes: &mut [u8], codes: &[u8; 32]) {
    for (j, byte) in bytes.iter_mut().enumerate().take(16) {
        *byte = (codes[j] & 15) | (codes[j + 16] << 4);
    }
}

/// The fifth bits of all codes in 32 bits, then the nibbles.
pub(super) fn put_five_bits(bytes: &mut [u8], codes: &[u8; 32]) {
    let high = codes.iter().enumerate().fold(0u32, |h, (j, c)| h | u32::from(c >> 4 & 1) << j);
    bytes[..4].copy_from_slice(&high.to_le_bytes());
    put_nibbles(&mut bytes[4..], codes);
}

/// `1 / x`, and 0 for 0.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The value of largest magnitude, the first of equals, with its sign.
fn peak(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |peak: f32, &v| if v.abs() > peak.abs() { v } else { peak })
}

fn q8_0(x: &[f32; 32], block: &mut [u8; 34]) {
    let scale = peak(x).abs() / 127.0;
    let inverse = inverse(scale);
    put_f16(block, 0, scale);
    for (o, &v) in block[2..].iter_mut().zip(x) {
        *o = (v * inverse).round() as i8 as u8;
    }
}

/// Codes of the symmetric types: the peak falls on the lowest code, `-half`.
fn symmetric_codes(x: &[f32; 32], half: f32) -> (f32, [u8; 32]) {
    let scale = peak(x) / -half;
    let inverse = inverse(scale);
    // In range and never negative, so truncation rounds to nearest.
    let code = |v: f32| ((v * inverse + (half + 0.5)) as u8).min(2 * half as u8 - 1);
    (scale, x.map(code))
}

fn q4_0(x: &[f32; 32], block: &mut [u8; 18]) {
    let (scale, codes) = symmetric_codes(x, 8.0);
    put_f16(block, 0, scale);
    put_nibbles(&mut block[2..], &codes);
}

fn q5_0(x: &[f32; 32], block: &mut [u8; 22]) {
    let (scale, codes) = symmetric_codes(x, 16.0);
    put_f16(block, 0, scale);
    put_five_bits(&mut block[2..], &codes);
}

/// Codes of the types with a minimum: the range of values over `0..=top`.
fn affine_codes(x: &[f32; 32], top: f32) -> (f32, f32, [u8; 32]) {
    let low = x.iter().copied().fold(f32::MAX, |a, b| if b < a { b } else { a });
    let high = x.iter().copied().fold(-f32::MAX, |a, b| if b > a { b } else { a });
    let scale = (high - low) / top;
    let inverse = inverse(scale);
    let code = |v: f32| (((v - low) * inverse + 0.5) as u8).min(top as u8);
    (scale, low, x.map(code))
}

fn q4_1(x: &[f32; 32], block: &mut [u8; 20]) {
    let (scale, low, codes) = affine_codes(x, 15.0);
    put_f16(block, 0, scale);
    put_f16(block, 2, low);
    put_nibbles(&mut block[4..], &codes);
}

fn q5_1(x: &[f32; 32], block: &mut [u8; 24]) {
    let (scale, low, codes) = affine_codes(x, 31.0);
    put_f16(block, 0, scale);
    put_f16(block, 2, low);
    put_five_bits(&mut block[4..], &codes);
}

/// Nearest integer, ties to even, for |x| below 2^22: adding 1.5 * 2^23 leaves no fraction bits.
fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    ((x + SHIFT).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

/// How the search for scale and minimum of a sub-block goes: inverse scales
/// `(top + start + 0.1 step) / range` for steps `0..=steps`.
struct Search {
    top: f32,
    start: f32,
    steps: u32,
}

/// Scale and (negated) minimum for 32 values: for every tried scale the codes are chosen, then
/// scale and minimum by weighted least squares for these codes; the smallest weighted error wins.
/// Large values weigh more (root mean square plus magnitude). The minimum is never above zero.
fn search_affine(x: &[f32; 32], search: &Search, codes: &mut [u8; 32]) -> (f32, f32) {
    let top = search.top;
    let squares = x.iter().fold(0f32, |s, v| s + v * v);
    let level = (squares / 32.0).sqrt();
    let weights = x.map(|v| level + v.abs());
    let (mut low, mut high) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (&v, &w) in x.iter().zip(&weights).skip(1) {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
        sum_w += w;
        sum_x += w * v;
    }
    low = low.min(0.0);
    if high == low {
        codes.fill(0);
        return (0.0, -low);
    }
    let range = high - low;
    let choose =
        |inverse: f32, low: f32| x.map(|v| nearest(inverse * (v - low)).clamp(0, top as i32) as u8);
    let error = |codes: &[u8; 32], scale: f32, low: f32| {
        let terms = x.iter().zip(codes).zip(&weights);
        terms.fold(0f32, |sum, ((&v, &code), &w)| {
            let difference = scale * f32::from(code) + low - v;
            sum + w * (difference * difference)
        })
    };
    let first = top / range;
    let mut scale = 1.0 / first;
    *codes = choose(first, low);
    let mut best = error(codes, scale, low);
    // Later tries start from the minimum of the best so far.
    let mut offset = low;
    for step in 0..=search.steps {
        let tried = choose((search.start + 0.1 * step as f32 + top) / (high - offset), offset);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for ((&v, &code), &w) in x.iter().zip(&tried).zip(&weights) {
            let l = f32::from(code);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * v;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_low > 0.0 {
                this_low = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let this_error = error(&tried, this_scale, this_low);
            if this_error < best {
                (best, *codes, scale, offset) = (this_error, tried, this_scale, this_low);
            }
        }
    }
    (scale, -offset)
}

/// Scales and minima of the eight sub-blocks, rounded to six bits against their largest, then the
/// codes for the rounded ones. Writes the first 16 bytes of the block.
fn affine_super_block(x: &[f32; 256], search: &Search, head: &mut [u8]) -> [u8; 256] {
    let mut codes = [0u8; 256];
    let mut fits = [(0f32, 0f32); 8];
    let (subs, _) = x.as_chunks::<32>();
    let (sub_codes, _) = codes.as_chunks_mut::<32>();
    for ((x, codes), fit) in subs.iter().zip(sub_codes.iter_mut()).zip(&mut fits) {
        *fit = search_affine(x, search, codes);
    }
    let largest = |pick: fn(&(f32, f32)) -> f32| fits.iter().map(pick).fold(0f32, f32::max);
    let (max_scale, max_low) = (largest(|f| f.0), largest(|f| f.1));
    let rate = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let (scale_rate, low_rate) = (rate(max_scale), rate(max_low));
    put_f16(head, 0, max_scale / 63.0);
    put_f16(head, 2, max_low / 63.0);
    let (d, d_low) = (get_f16(head, 0), get_f16(head, 2));
    for (j, ((x, codes), (scale, low))) in
        subs.iter().zip(sub_codes.iter_mut()).zip(fits).enumerate()
    {
        let s = (nearest(scale_rate * scale) as u8).min(63);
        let m = (nearest(low_rate * low) as u8).min(63);
        put_scale_min(&mut head[4..16], j, s, m);
        let (scale, low) = (d * f32::from(s), d_low * f32::from(m));
        if scale != 0.0 {
            *codes = x.map(|v| nearest((v + low) / scale).clamp(0, search.top as i32) as u8);
        }
    }
    codes
}

/// Six bits of scale and of minimum of sub-block `j` of 8 into 12 bytes: the first four have bytes
/// of their own, whose upper bits take the upper bits of the last four.
fn put_scale_min(packed: &mut [u8], j: usize, scale: u8, min: u8) {
    if j < 4 {
        packed[j] |= scale;
        packed[j + 4] |= min;
    } else {
        packed[j + 4] |= (scale & 15) | (min & 15) << 4;
        packed[j - 4] |= (scale >> 4) << 6;
        packed[j] |= (min >> 4) << 6;
    }
}

fn q4_k(x: &[f32; 256], block: &mut [u8; 144]) {
    block.fill(0);
    let search = Search { top: 15.0, start: -1.0, steps: 20 };
    let codes = affine_super_block(x, &search, &mut block[..16]);
    for (bytes, codes) in block[16..].chunks_mut(32).zip(codes.chunks(64)) {
        for (l, byte) in bytes.iter_mut().enumerate() {
            *byte = codes[l] | codes[l + 32] << 4;
        }
    }
}

fn q5_k(x: &[f32; 256], block: &mut [u8; 176]) {
    block.fill(0);
    let search = Search { top: 31.0, start: -0.5, steps: 15 };
    let codes = affine_super_block(x, &search, &mut block[..16]);
    let (high, low) = block[16..].split_at_mut(32);
    for (pair, (bytes, codes)) in low.chunks_mut(32).zip(codes.chunks(64)).enumerate() {
        for (l, (byte, high)) in bytes.iter_mut().zip(high.iter_mut()).enumerate() {
            *byte = (codes[l] & 15) | (codes[l + 32] & 15) << 4;
            *high |= (codes[l] >> 4) << (2 * pair) | (codes[l + 32] >> 4) << (2 * pair + 1);
        }
    }
}

/// Below this magnitude a group counts as zero.
const NOTHING: f32 = 1e-15;

/// Scale for 16 values and codes from `-32` to `31` around zero: least squares weighted by the
/// squared values, over inverse scales that put the peak at `-(32 + 0.1 step)` for steps -9 to 9.
fn search_symmetric(x: &[f32; 16], codes: &mut [u8; 16]) -> f32 {
    let peak = peak(x);
    if peak.abs() < NOTHING {
        codes.fill(0);
        return 0.0;
    }
    let choose = |inverse: f32| x.map(|v| nearest(inverse * v).clamp(-32, 31));
    let sums = |chosen: &[i32; 16]| {
        x.iter().zip(chosen).fold((0f32, 0f32), |(xl, ll), (&v, &l)| {
            let (w, l) = (v * v, l as f32);
            (xl + w * v * l, ll + w * l * l)
        })
    };
    let store = |chosen: &[i32; 16]| chosen.map(|l| (l + 32) as u8);
    let chosen = choose(-32.0 / peak);
    *codes = store(&chosen);
    let (sum_xl, sum_ll) = sums(&chosen);
    let mut scale = if sum_ll == 0.0 { 0.0 } else { sum_xl / sum_ll };
    let mut best = scale * sum_xl;
    for step in (-9..=9).filter(|step| *step != 0) {
        let chosen = choose(-(32.0 + 0.1 * step as f32) / peak);
        let (sum_xl, sum_ll) = sums(&chosen);
        if sum_ll > 0.0 && sum_xl * sum_xl > best * sum_ll {
            *codes = store(&chosen);
            scale = sum_xl / sum_ll;
            best = scale * sum_xl;
        }
    }
    scale
}

fn q6_k(x: &[f32; 256], block: &mut [u8; 210]) {
    block.fill(0);
    let mut codes = [0u8; 256];
    let mut scales = [0f32; 16];
    let (subs, _) = x.as_chunks::<16>();
    let (sub_codes, _) = codes.as_chunks_mut::<16>();
    for ((x, codes), scale) in subs.iter().zip(sub_codes.iter_mut()).zip(&mut scales) {
        *scale = search_symmetric(x, codes);
    }
    let largest = peak(&scales);
    if largest.abs() < NOTHING {
        return;
    }
    let rate = -128.0 / largest;
    put_f16(block, 208, 1.0 / rate);
    let d = get_f16(block, 208);
    for (j, ((x, codes), scale)) in subs.iter().zip(sub_codes.iter_mut()).zip(scales).enumerate() {
        let s = nearest(rate * scale).min(127) as i8;
        block[192 + j] = s as u8;
        let scale = d * f32::from(s);
        if scale != 0.0 {
            *codes = x.map(|v| (nearest(v / scale).clamp(-32, 31) + 32) as u8);
        }
    }
    for (part, codes) in codes.chunks(128).enumerate() {
        for l in 0..32 {
            let [a, b, c, e] = [0, 32, 64, 96].map(|at| codes[l + at]);
            block[64 * part + l] = (a & 15) | (c & 15) << 4;
            block[64 * part + 32 + l] = (b & 15) | (e & 15) << 4;
            block[128 + 32 * part + l] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::dequantize;

    /// 1024 values: blocks of 256 with growing scales, one of them positive, with outliers and zeros.
    fn values() -> Vec<f32> {
        let mut state = 1u32;
        (0..1024u32)
            .map(|i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let unit = (state >> 8) as f32 / 16_777_216.0;
                let scale = 0.01 * (1 + i / 256 * 3) as f32;
                match i {
                    512..768 => unit * scale,
                    _ if i % 97 == 5 => 6.0 * scale * (unit - 0.5),
                    _ if i % 64 < 3 || (32..64).contains(&i) => 0.0,
                    _ => (unit - 0.5) * scale,
                }
            })
            .collect()
    }

    fn digest(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    /// Of what ggml itself (its compiled library, and its Python package where that quantises the
    /// type) makes of [`values`].
    const EXPECTED: [(GgmlType, u64); 10] = [
        (GgmlType::F16, 0xb659_f121_fcb5_1e29),
        (GgmlType::BF16, 0x229a_fbe2_25ed_4e12),
        (GgmlType::Q8_0, 0x681d_19d4_3fd5_b60f),
        (GgmlType::Q4_0, 0x3865_a520_44c3_30a1),
        (GgmlType::Q4_1, 0x1e42_c794_97c6_4be6),
        (GgmlType::Q5_0, 0x7656_4769_6e3a_3c8f),
        (GgmlType::Q5_1, 0x6fcc_aced_be6b_47d0),
        (GgmlType::Q4_K, 0x9c8d_9b04_9ae3_7843),
        (GgmlType::Q5_K, 0x7703_4242_d1ce_40c7),
        (GgmlType::Q6_K, 0x609f_37ba_de3d_2075),
    ];

    #[test]
    fn every_type_agrees_with_ggml_bit_for_bit() {
        let values = values();
        for (ty, expected) in EXPECTED {
            assert_eq!(digest(&quantize(ty, &values).unwrap()), expected, "{ty}");
        }
    }

    #[test]
    fn more_bits_come_closer_and_decoding_agrees() {
        let values = values();
        let error = |ty| {
            let decoded = dequantize(ty, &quantize(ty, &values).unwrap(), values.len()).unwrap();
            values.iter().zip(&decoded).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        };
        for (better, worse) in [
            (GgmlType::F32, GgmlType::F16),
            (GgmlType::F16, GgmlType::Q8_0),
            (GgmlType::Q8_0, GgmlType::Q6_K),
            (GgmlType::Q6_K, GgmlType::Q5_K),
            (GgmlType::Q5_1, GgmlType::Q5_0),
            (GgmlType::Q5_0, GgmlType::Q4_K),
            (GgmlType::Q4_K, GgmlType::Q4_1),
            (GgmlType::Q4_1, GgmlType::Q4_0),
        ] {
            assert!(error(better) < error(worse), "{better} against {worse}");
        }
        assert_eq!(error(GgmlType::F32), 0.0);
    }

    #[test]
    fn long_runs_equal_their_blocks() {
        let values: Vec<f32> = values().repeat(20);
        for ty in [GgmlType::Q4_0, GgmlType::Q6_K] {
            let whole = quantize(ty, &values).unwrap();
            let parts: Vec<u8> =
                values.chunks(256).flat_map(|v| quantize(ty, v).unwrap()).collect();
            assert!(whole == parts, "{ty}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |ty, values: &[f32], what: &str| {
            let message = quantize(ty, values).unwrap_err();
            assert!(message.contains(what), "{message}");
        };
        refused(GgmlType::Q4_0, &[0.0; 31], "31 elements");
        refused(GgmlType::Q4_K, &[0.0; 128], "blocks of 256");
        refused(GgmlType::IQ2_XS, &[0.0; 256], "IQ2_XS");
        let mut values = [0.0; 256];
        values[3] = f32::NAN;
        refused(GgmlType::Q4_K, &values, "value 3 is NaN");
        values[3] = 1e5;
        refused(GgmlType::Q8_0, &values, "value 3 is 1e5");
        refused(GgmlType::F16, &values, "value 3 is 1e5");
        assert!(quantize(GgmlType::BF16, &values).is_ok());
        // All zero, and constant blocks.
        for ty in WRITABLE {
            let zero = dequantize(ty, &quantize(ty, &[0.0; 256]).unwrap(), 256).unwrap();
            assert!(zero.iter().all(|v| *v == 0.0), "{ty}");
            let one = dequantize(ty, &quantize(ty, &[1.0; 256]).unwrap(), 256).unwrap();
            assert!(one.iter().all(|v| (v - 1.0).abs() < 0.01), "{ty}");
        }
    }
}
