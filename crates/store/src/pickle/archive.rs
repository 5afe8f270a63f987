//! The zip container of PyTorch files: a strict reader of the central directory that finds where
//! each entry's bytes lie. Nothing is extracted to disk, so entry names are only keys.
//!
//! Refused: encryption, methods other than stored and deflate, duplicate names, entries that
//! overlap or leave the file, and entries that claim to inflate beyond [`MAX_RATIO`].

use std::collections::HashMap;
use std::io::Read;

use crate::error::shorten;

/// Deflated entries may grow by this factor (weights hardly shrink at all), plus [`FREE_GROWTH`].
const MAX_RATIO: u64 = 100;
const FREE_GROWTH: u64 = 1 << 20;

const END: &[u8; 4] = b"PK\x05\x06";
const END64: &[u8; 4] = b"PK\x06\x06";
const LOCATOR64: &[u8; 4] = b"PK\x06\x07";
const CENTRAL: &[u8; 4] = b"PK\x01\x02";
const LOCAL: &[u8; 4] = b"PK\x03\x04";

/// Where an entry's bytes are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub start: usize,
    /// Bytes in the file.
    pub packed: usize,
    /// Bytes after decompression.
    pub len: usize,
    pub deflated: bool,
    crc: u32,
}

impl Place {
    /// Bytes that lie in the file as they are.
    pub(super) fn stored(start: usize, len: usize) -> Self {
        Self { start, packed: len, len, deflated: false, crc: 0 }
    }

    /// The contents, inflated if need be; never more than `len` bytes.
    pub(super) fn read(&self, file: &[u8]) -> Result<Vec<u8>, String> {
        let packed = self
            .start
            .checked_add(self.packed)
            .and_then(|end| file.get(self.start..end))
            .ok_or("an entry leaves the file")?;
        if !self.deflated {
            return Ok(packed.to_vec());
        }
        let header = self.local_header()?;
        let mut stream = header.as_slice().chain(packed);
        let entry = zip::read::read_zipfile_from_stream(&mut stream)
            .map_err(|error| format!("cannot be inflated ({error})"))?
            .ok_or("cannot be inflated")?;
        let mut out = Vec::new();
        // One byte more than declared is enough to catch a liar.
        entry
            .take(self.len as u64 + 1)
            .read_to_end(&mut out)
            .map_err(|error| format!("cannot be inflated ({error})"))?;
        if out.len() != self.len {
            return Err(format!("inflates to other than its declared {} bytes", self.len));
        }
        Ok(out)
    }

    /// The header that the inflater of the zip crate wants in front of the data. Made from the
    /// checked central entry, because the file's own local header may leave the sizes out.
    fn local_header(&self) -> Result<Vec<u8>, String> {
        let size = |n: usize| {
            u32::try_from(n).ok().filter(|&n| n != u32::MAX).ok_or(
                "deflated entries above 4 GiB are not supported; save the file again with torch.save",
            )
        };
        let mut header = LOCAL.to_vec();
        header.extend([20, 0, 0, 0, 8, 0, 0, 0, 0x21, 0]); // version, flags, method, time, date
        header.extend(self.crc.to_le_bytes());
        header.extend(size(self.packed)?.to_le_bytes());
        header.extend(size(self.len)?.to_le_bytes());
        header.extend([1, 0, 0, 0, b'x']); // lengths of name and extra field, name
        Ok(header)
    }
}

/// Whether the bytes look like a zip archive.
pub(super) fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(LOCAL) || bytes.starts_with(END)
}

/// Reads the central directory: places by entry name.
pub(super) fn directory(file: &[u8]) -> Result<HashMap<&str, Place>, String> {
    let (count, start, end) = find_directory(file)?;
    let records = file.get(start..end).ok_or("the zip directory lies outside the file")?;
    // The shortest record is 46 bytes long.
    if count > (records.len() / 46) as u64 {
        return Err(format!("the zip directory claims {count} entries in {} bytes", records.len()));
    }
    let mut entries = HashMap::with_capacity(count as usize);
    let mut cursor = Cursor { bytes: records, at: 0 };
    for _ in 0..count {
        let (name, place) = record(file, start, &mut cursor)?;
        if entries.insert(name, place).is_some() {
            return Err(format!("zip entry \"{}\" occurs twice", shorten(name)));
        }
    }
    refuse_overlaps(&entries)?;
    Ok(entries)
}

/// Number of entries, first byte and end of the central directory.
fn find_directory(file: &[u8]) -> Result<(u64, usize, usize), String> {
    const MISSING: &str = "the zip archive has no directory at its end; the file may be truncated";
    let earliest = file.len().saturating_sub(22 + usize::from(u16::MAX));
    let end = (earliest..=file.len().saturating_sub(22))
        .rev()
        .find(|&at| {
            let mut cursor = Cursor { bytes: file, at };
            cursor.take(4).is_ok_and(|magic| magic == END)
                && cursor
                    .skip(16)
                    .and_then(|()| cursor.number::<2>())
                    .is_ok_and(|comment| comment == (file.len() - at - 22) as u64)
        })
        .ok_or(MISSING)?;
    let mut cursor = Cursor { bytes: file, at: end + 4 };
    let (disk, directory_disk) = (cursor.number::<2>()?, cursor.number::<2>()?);
    let _on_this_disk = cursor.number::<2>()?;
    let (mut count, mut size, mut start) =
        (cursor.number::<2>()?, cursor.number::<4>()?, cursor.number::<4>()?);
    let mut limit = end;
    let wants64 = count == 0xffff || size == 0xffff_ffff || start == 0xffff_ffff;
    let locator = end.checked_sub(20).filter(|&at| file[at..].starts_with(LOCATOR64));
    match locator {
        Some(at) if wants64 => {
            let mut cursor = Cursor { bytes: file, at: at + 8 };
            let record = usize::try_from(cursor.number::<8>()?).map_err(|_| MISSING)?;
            let mut cursor = Cursor { bytes: &file[..at], at: record.min(at) };
            if cursor.take(4)? != END64 {
                return Err(MISSING.into());
            }
            cursor.skip(28)?;
            count = cursor.number::<8>()?;
            size = cursor.number::<8>()?;
            start = cursor.number::<8>()?;
            limit = record;
        }
        // 65535 entries exactly, or a writer that fills fields without need.
        _ if disk != 0 || directory_disk != 0 => {
            return Err("the zip archive is one part of several".into());
        }
        _ => {}
    }
    let range = usize::try_from(start).ok().zip(usize::try_from(size).ok());
    match range.and_then(|(start, size)| Some((start, start.checked_add(size)?))) {
        Some((start, end)) if end <= limit => Ok((count, start, end)),
        _ => Err("the zip directory lies outside the file".into()),
    }
}

/// One record of the central directory, with its data located through the local header.
fn record<'a>(
    file: &[u8],
    directory: usize,
    cursor: &mut Cursor<'a>,
) -> Result<(&'a str, Place), String> {
    if cursor.take(4)? != CENTRAL {
        return Err("the zip directory is damaged".into());
    }
    cursor.skip(4)?;
    let flags = cursor.number::<2>()?;
    let method = cursor.number::<2>()?;
    cursor.skip(4)?;
    let crc = cursor.number::<4>()? as u32;
    let (mut packed, mut len) = (cursor.number::<4>()?, cursor.number::<4>()?);
    let (name_len, extra_len, comment_len) =
        (cursor.number::<2>()?, cursor.number::<2>()?, cursor.number::<2>()?);
    cursor.skip(8)?;
    let mut offset = cursor.number::<4>()?;
    let name = std::str::from_utf8(cursor.take(name_len as usize)?)
        .map_err(|_| "a zip entry whose name is not UTF-8")?;
    let fault = |reason: &str| format!("zip entry \"{}\" {reason}", shorten(name));
    let extra = cursor.take(extra_len as usize)?;
    cursor.skip(comment_len as usize)?;

    wide_fields(extra, [&mut len, &mut packed, &mut offset])
        .map_err(|_| fault("has a damaged zip64 field"))?;
    if flags & 1 != 0 {
        return Err(fault("is encrypted"));
    }
    let deflated = match method {
        0 => false,
        8 => true,
        _ => return Err(fault("is compressed by a method other than deflate")),
    };
    if !deflated && packed != len {
        return Err(fault("is stored but claims two sizes"));
    }
    if deflated && len > packed.saturating_mul(MAX_RATIO).saturating_add(FREE_GROWTH) {
        return Err(fault(&format!("claims to inflate {packed} bytes to {len}, a zip bomb")));
    }

    let outside = || fault("lies outside the file");
    let mut local = Cursor {
        bytes: &file[..directory],
        at: usize::try_from(offset).ok().filter(|&at| at <= directory).ok_or_else(outside)?,
    };
    if local.take(4).map_err(|_| outside())? != LOCAL {
        return Err(fault("has no local header"));
    }
    local.skip(22).map_err(|_| outside())?;
    let (name_len, extra_len) = (local.number::<2>()?, local.number::<2>()?);
    if local.take(name_len as usize).map_err(|_| outside())? != name.as_bytes() {
        return Err(fault("goes by another name in its local header"));
    }
    local.skip(extra_len as usize).map_err(|_| outside())?;
    let start = local.at;
    let packed = usize::try_from(packed).map_err(|_| outside())?;
    let len = usize::try_from(len).map_err(|_| outside())?;
    local.skip(packed).map_err(|_| outside())?;
    Ok((name, Place { start, packed, len, deflated, crc }))
}

/// Replaces the fields that are all ones by their 64-bit values, in the order of the format.
fn wide_fields(extra: &[u8], fields: [&mut u64; 3]) -> Result<(), String> {
    let mut cursor = Cursor { bytes: extra, at: 0 };
    while extra.len() - cursor.at >= 4 {
        let (id, size) = (cursor.number::<2>()?, cursor.number::<2>()?);
        let body = cursor.take(size as usize)?;
        if id == 1 {
            let mut body = Cursor { bytes: body, at: 0 };
            for field in fields {
                if *field == 0xffff_ffff {
                    *field = body.number::<8>()?;
                }
            }
            return Ok(());
        }
    }
    Ok(())
}

fn refuse_overlaps(entries: &HashMap<&str, Place>) -> Result<(), String> {
    let mut order: Vec<(&str, &Place)> =
        entries.iter().filter(|(_, place)| place.packed > 0).map(|(&n, p)| (n, p)).collect();
    order.sort_by_key(|(_, place)| place.start);
    for pair in order.windows(2) {
        if pair[0].1.start + pair[0].1.packed > pair[1].1.start {
            return Err(format!(
                "zip entries \"{}\" and \"{}\" overlap",
                shorten(pair[0].0),
                shorten(pair[1].0)
            ));
        }
    }
    Ok(())
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let slice = self
            .at
            .checked_add(n)
            .and_then(|end| self.bytes.get(self.at..end))
            .ok_or("the zip directory is cut short")?;
        self.at += n;
        Ok(slice)
    }

    fn skip(&mut self, n: usize) -> Result<(), String> {
        self.take(n).map(drop)
    }

    /// A little-endian number of `N` bytes.
    fn number<const N: usize>(&mut self) -> Result<u64, String> {
        Ok(self.take(N)?.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Cursor as IoCursor, Write};
    use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

    fn archive(entries: &[(&str, CompressionMethod, &[u8])]) -> Vec<u8> {
        let mut writer = ZipWriter::new(IoCursor::new(Vec::new()));
        for (name, method, bytes) in entries {
            let options = SimpleFileOptions::default().compression_method(*method);
            writer.start_file(*name, options).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    #[test]
    fn stored_and_deflated_entries_are_found() {
        let text = b"the quick brown fox the quick brown fox the quick brown fox";
        let file = archive(&[
            ("a/x", CompressionMethod::Stored, b"hello"),
            ("a/y", CompressionMethod::Deflated, text),
        ]);
        let directory = directory(&file).unwrap();
        let (x, y) = (directory["a/x"], directory["a/y"]);
        assert_eq!(&file[x.start..x.start + 5], b"hello");
        assert!(y.deflated && y.packed < y.len);
        assert_eq!(y.read(&file).unwrap(), text);
        // One flipped bit in the compressed bytes is caught.
        let mut bad = file.clone();
        bad[y.start + 3] ^= 0x10;
        assert!(y.read(&bad).is_err());
    }

    #[test]
    fn bombs_and_lies_are_refused() {
        let zeros = vec![0u8; 4 << 20];
        let mut file = archive(&[("bomb", CompressionMethod::Deflated, &zeros)]);
        let error = directory(&file).unwrap_err();
        assert!(error.contains("bomb") && error.contains("inflate"), "{error}");
        // The same bomb under a modest declared size stops at that size.
        let at = file.windows(4).position(|w| w == CENTRAL).unwrap();
        file[at + 24..at + 28].copy_from_slice(&1000u32.to_le_bytes());
        let place = directory(&file).unwrap()["bomb"];
        assert!(place.read(&file).unwrap_err().contains("1000"));
    }

    #[test]
    fn duplicates_and_overlaps_are_refused() {
        let file = archive(&[
            ("aa", CompressionMethod::Stored, b"1111"),
            ("bb", CompressionMethod::Stored, b"2222"),
        ]);
        let renamed: Vec<u8> = {
            let mut copy = file.clone();
            while let Some(at) = copy.windows(2).position(|w| w == b"bb") {
                copy[at..at + 2].copy_from_slice(b"aa");
            }
            copy
        };
        assert!(directory(&renamed).unwrap_err().contains("twice"));
        // The second record pointed at the first entry's local header: another name.
        let mut crossed = file.clone();
        let second = crossed.windows(4).rposition(|w| w == CENTRAL).unwrap();
        crossed[second + 42..second + 46].copy_from_slice(&0u32.to_le_bytes());
        assert!(directory(&crossed).unwrap_err().contains("another name"));
        assert!(directory(&file[..file.len() - 1]).unwrap_err().contains("truncated"));
    }
}
