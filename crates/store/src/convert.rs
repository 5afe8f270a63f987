//! Numbers in and out of stored element types: any float or integer type to f32 (in parallel when
//! large), f32 to f32/f16/bf16 bytes. GGML blocks are decoded by `gguf`.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::dtype::Dtype;

/// Elements per parallel task, and the size below which threads are not worth waking. A multiple
/// of 4 so that packed 4- and 6-bit types split on whole bytes.
const CHUNK: usize = 1 << 16;

/// Decodes little-endian `bytes` of `count` elements to f32. `Bool` gives 0 or 1, integers and F64
/// are rounded to the nearest f32. `None` for complex and GGML types, or when `bytes` is not
/// exactly `count` elements.
pub fn to_f32(dtype: Dtype, bytes: &[u8], count: usize) -> Option<Vec<f32>> {
    if dtype.bytes_for(count as u64)? != bytes.len() as u64 {
        return None;
    }
    if matches!(dtype, Dtype::C64 | Dtype::Ggml(_)) {
        return None;
    }
    let mut out = vec![0f32; count];
    if count <= CHUNK {
        decode(dtype, bytes, &mut out);
    } else {
        // CHUNK elements fill whole bytes in every type.
        let chunk_bytes = usize::try_from(dtype.bytes_for(CHUNK as u64)?).ok()?;
        out.par_chunks_mut(CHUNK)
            .zip(bytes.par_chunks(chunk_bytes))
            .for_each(|(out, bytes)| decode(dtype, bytes, out));
    }
    Some(out)
}

macro_rules! each {
    ($bytes:expr, $out:expr, $type:ty, $convert:expr) => {{
        let (whole, _) = $bytes.as_chunks::<{ size_of::<$type>() }>();
        for (o, b) in $out.iter_mut().zip(whole) {
            *o = $convert(<$type>::from_le_bytes(*b));
        }
    }};
}

fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => each!(bytes, out, f32, |v| v),
        Dtype::F64 => each!(bytes, out, f64, |v| v as f32),
        Dtype::F16 => decode_f16(bytes, out),
        Dtype::BF16 => each!(bytes, out, u16, |v: u16| f32::from_bits(u32::from(v) << 16)),
        Dtype::I64 => each!(bytes, out, i64, |v| v as f32),
        Dtype::I32 => each!(bytes, out, i32, |v| v as f32),
        Dtype::I16 => each!(bytes, out, i16, f32::from),
        Dtype::I8 => each!(bytes, out, i8, f32::from),
        Dtype::U64 => each!(bytes, out, u64, |v| v as f32),
        Dtype::U32 => each!(bytes, out, u32, |v| v as f32),
        Dtype::U16 => each!(bytes, out, u16, f32::from),
        Dtype::U8 => each!(bytes, out, u8, f32::from),
        Dtype::Bool => each!(bytes, out, u8, |v| f32::from(u8::from(v != 0))),
        Dtype::F8E4M3 => each!(bytes, out, u8, |v| small_float(v, 4, 3, 7, Special::Fn)),
        Dtype::F8E5M2 => each!(bytes, out, u8, |v| small_float(v, 5, 2, 15, Special::Ieee)),
        Dtype::F8E4M3Fnuz => each!(bytes, out, u8, |v| small_float(v, 4, 3, 8, Special::Fnuz)),
        Dtype::F8E5M2Fnuz => each!(bytes, out, u8, |v| small_float(v, 5, 2, 16, Special::Fnuz)),
        Dtype::F8E8M0 => each!(bytes, out, u8, e8m0),
        Dtype::F4 => {
            for (pair, b) in out.chunks_mut(2).zip(bytes) {
                for (o, nibble) in pair.iter_mut().zip([b & 15, b >> 4]) {
                    *o = small_float(nibble, 2, 1, 1, Special::None);
                }
            }
        }
        Dtype::F6E2M3 => decode_f6(bytes, out, |v| small_float(v, 2, 3, 1, Special::None)),
        Dtype::F6E3M2 => decode_f6(bytes, out, |v| small_float(v, 3, 2, 3, Special::None)),
        // Refused by the caller.
        Dtype::C64 | Dtype::Ggml(_) => {}
    }
}

/// f16 through the vectorised conversion of `half` (hardware F16C where present).
fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    if cfg!(target_endian = "little")
        && let Ok(halves) = bytemuck::try_cast_slice::<u8, f16>(bytes)
        && halves.len() == out.len()
    {
        halves.convert_to_f32_slice(out);
        return;
    }
    let mut buffer = [f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
        let (whole, _) = bytes.as_chunks::<2>();
        for (h, b) in buffer.iter_mut().zip(whole) {
            *h = f16::from_le_bytes(*b);
        }
        let n = out.len().min(whole.len());
        buffer[..n].convert_to_f32_slice(&mut out[..n]);
    }
}

fn decode_f6(bytes: &[u8], out: &mut [f32], convert: impl Fn(u8) -> f32) {
    for (quad, b) in out.chunks_mut(4).zip(bytes.chunks(3)) {
        let word = b.iter().rev().fold(0u32, |w, byte| (w << 8) | u32::from(*byte));
        for (i, o) in quad.iter_mut().enumerate() {
            *o = convert(((word >> (6 * i)) & 63) as u8);
        }
    }
}

/// Which codes of a small float are not numbers.
#[derive(Clone, Copy, PartialEq)]
enum Special {
    /// All codes are finite.
    None,
    /// Exponent all ones: infinity or NaN.
    Ieee,
    /// Only exponent and mantissa all ones: NaN.
    Fn,
    /// Only the code of negative zero: NaN.
    Fnuz,
}

/// Value of a float of at most 8 bits: sign, `exponent` bits, `mantissa` bits, `bias`.
fn small_float(code: u8, exponent: u32, mantissa: u32, bias: i32, special: Special) -> f32 {
    let code = u32::from(code);
    let m = code & ((1 << mantissa) - 1);
    let e = (code >> mantissa) & ((1 << exponent) - 1);
    let negative = (code >> (mantissa + exponent)) & 1 == 1;
    let top = (1 << exponent) - 1;
    match special {
        Special::Ieee if e == top => {
            return match (m, negative) {
                (0, false) => f32::INFINITY,
                (0, true) => f32::NEG_INFINITY,
                _ => f32::NAN,
            };
        }
        Special::Fn if e == top && m == (1 << mantissa) - 1 => return f32::NAN,
        Special::Fnuz if negative && e == 0 && m == 0 => return f32::NAN,
        _ => {}
    }
    let fraction = m as f32 / (1u32 << mantissa) as f32;
    let value = if e == 0 {
        fraction * 2f32.powi(1 - bias)
    } else {
        (1.0 + fraction) * 2f32.powi(e as i32 - bias)
    };
    if negative { -value } else { value }
}

fn e8m0(code: u8) -> f32 {
    if code == 255 { f32::NAN } else { 2f64.powi(i32::from(code) - 127) as f32 }
}

/// Encodes f32 values as little-endian bytes of `dtype` (F32, F16 or BF16; rounding to nearest
/// even). `None` for other types. Values beyond the range become infinities, as IEEE says; see
/// [`overflows`].
pub fn from_f32(values: &[f32], dtype: Dtype) -> Option<Vec<u8>> {
    fn fill<const N: usize>(values: &[f32], encode: impl Fn(f32) -> [u8; N] + Sync) -> Vec<u8> {
        let mut bytes = vec![0u8; values.len() * N];
        bytes.par_chunks_mut(CHUNK * N).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
            let (whole, _) = out.as_chunks_mut::<N>();
            for (o, v) in whole.iter_mut().zip(values) {
                *o = encode(*v);
            }
        });
        bytes
    }
    match dtype {
        Dtype::F32 => Some(fill(values, f32::to_le_bytes)),
        Dtype::F16 => Some(fill(values, |v| f16::from_f32(v).to_le_bytes())),
        Dtype::BF16 => Some(fill(values, |v| bf16::from_f32(v).to_le_bytes())),
        _ => None,
    }
}

/// Index of the first finite value that `dtype` can only store as an infinity.
pub fn overflows(values: &[f32], dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F16 => values.iter().position(|v| v.is_finite() && f16::from_f32(*v).is_infinite()),
        Dtype::BF16 => {
            values.iter().position(|v| v.is_finite() && bf16::from_f32(*v).is_infinite())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(dtype: Dtype, bytes: &[u8], count: usize) -> Vec<f32> {
        to_f32(dtype, bytes, count).unwrap()
    }

    #[test]
    fn known_codes() {
        assert_eq!(one(Dtype::F16, &[0x00, 0x3c, 0x00, 0xc0], 2), [1.0, -2.0]);
        assert_eq!(one(Dtype::BF16, &[0x80, 0x3f, 0x40, 0xc0], 2), [1.0, -3.0]);
        assert_eq!(one(Dtype::F64, &2.5f64.to_le_bytes(), 1), [2.5]);
        // E4M3: 0x38 = 1, 0x7e = 448 (largest), 0x01 = 2^-9 (smallest), 0xb8 = -1.
        assert_eq!(
            one(Dtype::F8E4M3, &[0x38, 0x7e, 0x01, 0xb8], 4),
            [1.0, 448.0, 2f32.powi(-9), -1.0]
        );
        assert!(one(Dtype::F8E4M3, &[0x7f], 1)[0].is_nan());
        // E5M2: 0x3c = 1, 0x7b = 57344 (largest), 0x7c = infinity.
        assert_eq!(one(Dtype::F8E5M2, &[0x3c, 0x7b, 0x7c], 3), [1.0, 57344.0, f32::INFINITY]);
        // FNUZ: bias one larger, 0x7f = 240, 0x80 = NaN.
        assert_eq!(one(Dtype::F8E4M3Fnuz, &[0x40, 0x7f], 2), [1.0, 240.0]);
        assert!(one(Dtype::F8E5M2Fnuz, &[0x80], 1)[0].is_nan());
        assert_eq!(one(Dtype::F8E8M0, &[127, 128, 0], 3), [1.0, 2.0, 2f32.powi(-127)]);
        // E2M1 codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; low nibble first.
        assert_eq!(
            one(Dtype::F4, &[0x10, 0x32, 0x54, 0xf6], 8),
            [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -6.0]
        );
        // E2M3: 0x08 = 1, 0x1f = 7.5; E3M2: 0x0c = 1, 0x1f = 28. Packed little-endian.
        let word = |codes: [u32; 4]| {
            let w = codes.iter().rev().fold(0, |w, c| (w << 6) | c);
            [w as u8, (w >> 8) as u8, (w >> 16) as u8]
        };
        assert_eq!(one(Dtype::F6E2M3, &word([8, 0x1f, 0x28, 1]), 4), [1.0, 7.5, -1.0, 0.125]);
        assert_eq!(one(Dtype::F6E3M2, &word([12, 0x1f, 0, 1]), 4), [1.0, 28.0, 0.0, 0.0625]);
        assert_eq!(one(Dtype::I8, &[0xff, 3], 2), [-1.0, 3.0]);
        assert_eq!(one(Dtype::Bool, &[0, 7], 2), [0.0, 1.0]);
    }

    #[test]
    fn refuses_wrong_sizes_and_complex() {
        assert!(to_f32(Dtype::F16, &[0; 3], 2).is_none());
        assert!(to_f32(Dtype::C64, &[0; 8], 1).is_none());
    }

    #[test]
    fn parallel_equals_serial_on_odd_and_misaligned_sizes() {
        let count = 3 * CHUNK + 5;
        let mut bytes = vec![0u8];
        bytes.extend((0..count).flat_map(|i| f16::from_f32((i % 2000) as f32).to_le_bytes()));
        let values = one(Dtype::F16, &bytes[1..], count);
        assert!(values.iter().enumerate().all(|(i, v)| *v == (i % 2000) as f32));
        let packed: Vec<u8> = (0..count.div_ceil(2)).map(|i| (i % 251) as u8).collect();
        let values = one(Dtype::F4, &packed, packed.len() * 2);
        let last = small_float(packed[packed.len() - 1] >> 4, 2, 1, 1, Special::None);
        assert_eq!(values[values.len() - 1], last);
    }

    #[test]
    fn encodes_and_reports_overflow() {
        assert_eq!(from_f32(&[1.0, -2.0], Dtype::F16).unwrap(), [0x00, 0x3c, 0x00, 0xc0]);
        assert!(from_f32(&[1.0], Dtype::F8E4M3).is_none());
        assert_eq!(overflows(&[1.0, 65504.0, 1e6], Dtype::F16), Some(2));
        assert_eq!(overflows(&[f32::INFINITY], Dtype::F16), None);
    }
}
