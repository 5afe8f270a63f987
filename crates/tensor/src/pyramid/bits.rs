//! Fields of up to 128 bits in little-endian bit streams: field bit 0 is the lowest bit of the byte
//! where the field starts.

/// Reads `width <= 128` bits at `bit`; bits beyond the end of the stream are 0.
pub(super) fn read(stream: &[u8], bit: usize, width: u32) -> u128 {
    if width == 0 {
        return 0;
    }
    let (byte, shift) = (bit / 8, (bit % 8) as u32);
    let mut buffer = [0u8; 17];
    let rest = stream.get(byte..).unwrap_or_default();
    let n = rest.len().min(17);
    buffer[..n].copy_from_slice(&rest[..n]);
    let mut low = [0u8; 16];
    low.copy_from_slice(&buffer[..16]);
    let mut value = u128::from_le_bytes(low) >> shift;
    if shift > 0 {
        value |= u128::from(buffer[16]) << (128 - shift);
    }
    if width < 128 { value & ((1 << width) - 1) } else { value }
}

/// Reads `width <= 64` bits at `bit`.
#[inline(always)]
pub(super) fn read64(stream: &[u8], bit: usize, width: u32) -> u64 {
    let (byte, shift) = (bit / 8, (bit % 8) as u32);
    if width == 0 {
        return 0;
    }
    let mask = u64::MAX >> (64 - width);
    match stream.get(byte..byte + 16).and_then(|b| b.first_chunk::<16>()) {
        Some(bytes) => ((u128::from_le_bytes(*bytes) >> shift) as u64) & mask,
        None => read(stream, bit, width) as u64,
    }
}

/// Writes `width` bits of `value` at `bit`, where the stream is still 0. The field must lie inside.
pub(super) fn write(stream: &mut [u8], bit: usize, width: u32, value: u128) {
    let (byte, shift) = (bit / 8, (bit % 8) as u32);
    if width == 0 {
        return;
    }
    if shift + width <= 64
        && let Some(place) = stream.get_mut(byte..byte + 8).and_then(|b| b.first_chunk_mut::<8>())
    {
        *place = (u64::from_le_bytes(*place) | (value as u64) << shift).to_le_bytes();
        return;
    }
    let bytes = (shift + width).div_ceil(8) as usize;
    let low = value << shift;
    let high = if shift > 0 { value >> (128 - shift) } else { 0 };
    let all = low.to_le_bytes().into_iter().chain(high.to_le_bytes());
    for (place, part) in stream.iter_mut().skip(byte).zip(all).take(bytes) {
        *place |= part;
    }
}

/// Bytes of a row of `bits` bits, filled up to a multiple of 8.
pub(super) fn row_bytes(bits: usize) -> usize {
    bits.div_ceil(64) * 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn fields_round_trip_and_lie_where_they_should() {
        let mut rng = Rng::new(1);
        for width in 1..=128u32 {
            let count = 9;
            let mut stream = vec![0u8; row_bytes(3 + count * width as usize)];
            let mask = if width == 128 { u128::MAX } else { (1 << width) - 1 };
            let values: Vec<u128> = (0..count)
                .map(|_| (u128::from(rng.next_u64()) << 64 | u128::from(rng.next_u64())) & mask)
                .collect();
            for (i, &value) in values.iter().enumerate() {
                write(&mut stream, 3 + i * width as usize, width, value);
            }
            for (i, &value) in values.iter().enumerate() {
                let bit = 3 + i * width as usize;
                assert_eq!(read(&stream, bit, width), value, "width {width}");
                if width <= 64 {
                    assert_eq!(u128::from(read64(&stream, bit, width)), value);
                }
                for b in 0..width as usize {
                    let found = stream[(bit + b) / 8] >> ((bit + b) % 8) & 1;
                    assert_eq!(u128::from(found), value >> b & 1);
                }
            }
        }
        assert_eq!((row_bytes(0), row_bytes(1), row_bytes(64), row_bytes(65)), (0, 8, 8, 16));
        assert_eq!(read(&[0xFF], 4, 16), 0x0F);
    }
}
