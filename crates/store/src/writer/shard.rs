//! One shard in the making. Its data stream to disk in up to four lanes by size, so that tensors
//! can be added in any order and still end up aligned without gaps, as the format demands: sizes
//! that are multiples of 8 bytes, then of 4, of 2, and the rest. Nearly everything goes to the
//! first lane, which leaves room for the header at its start; at the end the (mostly absent) other
//! lanes are appended and the header is written into that room. Small shards, and those whose
//! header outgrows the room, are copied once instead, so that the room does not weigh.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::journal::TensorRecord;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::safetensors::{self, Tensor};

/// Name of an output of one shard.
pub(super) const SINGLE: &str = "model.safetensors";
/// Name of the index of several shards.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Room for the header in the first lane: about 2500 tensors. (Tests take all paths with less.)
const RESERVE: u64 = if cfg!(test) { 1 << 10 } else { 256 << 10 };
/// Shards up to this size are copied at the end rather than keep the room.
const COPY_BELOW: u64 = if cfg!(test) { 100 } else { 64 << 20 };
const LANES: usize = 4;

/// Final name of shard `index` of `count`.
pub(super) fn final_name(index: usize, count: usize) -> String {
    if count == 1 {
        SINGLE.to_string()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", index + 1)
    }
}

/// Puts a tensor into the current shard, or a new one when it would exceed `max` bytes. Returns
/// the shard's index and the lane. Only books are kept here; `Shard::write` moves the bytes.
pub(super) fn place(
    shards: &mut Vec<Shard>,
    work: &Path,
    max: u64,
    record: &TensorRecord,
) -> Result<(usize, usize)> {
    let full =
        |s: &Shard| s.total() > 0 && s.total().checked_add(record.bytes).is_none_or(|n| n > max);
    if shards.last().is_none_or(full) {
        shards.push(Shard::new(work, shards.len()));
    }
    let index = shards.len() - 1;
    let lane = match record.bytes {
        n if n % 8 == 0 => 0,
        n if n % 4 == 0 => 1,
        n if n % 2 == 0 => 2,
        _ => 3,
    };
    if let Some(lane) = shards.get_mut(index).and_then(|s| s.lanes.get_mut(lane)) {
        lane.tensors.push(record.clone());
        lane.length += record.bytes;
    }
    Ok((index, lane))
}

#[derive(Debug)]
struct Lane {
    path: PathBuf,
    /// Room before the data.
    offset: u64,
    /// Bytes of data that belong here.
    length: u64,
    tensors: Vec<TensorRecord>,
    /// Open while there are unsynced writes.
    file: Option<File>,
}

/// A shard: its lanes.
#[derive(Debug)]
pub(super) struct Shard {
    lanes: [Lane; LANES],
}

impl Shard {
    pub(super) fn new(work: &Path, index: usize) -> Self {
        let lane = |lane: usize| Lane {
            path: work.join(format!("shard-{:05}.{lane}", index + 1)),
            offset: if lane == 0 { RESERVE } else { 0 },
            length: 0,
            tensors: Vec::new(),
            file: None,
        };
        Self { lanes: std::array::from_fn(lane) }
    }

    fn total(&self) -> u64 {
        self.lanes.iter().map(|l| l.length).sum()
    }

    /// The files of the shard that hold something.
    pub(super) fn paths(&self) -> impl Iterator<Item = PathBuf> {
        self.lanes.iter().filter(|l| !l.tensors.is_empty()).map(|l| l.path.clone())
    }

    /// Appends bytes that `place` has just booked.
    pub(super) fn write(&mut self, lane: usize, bytes: &[u8]) -> Result<()> {
        match self.lanes.get_mut(lane) {
            Some(lane) => lane.write(bytes),
            None => Ok(()),
        }
    }

    /// Makes all written data durable and closes the files.
    pub(super) fn sync(&mut self) -> Result<()> {
        for lane in &mut self.lanes {
            if let Some(file) = lane.file.take() {
                file.sync_data().map_err(|e| Error::io(&lane.path, "sync", e))?;
            }
        }
        Ok(())
    }

    /// After an interruption: brings the files back to the booked lengths.
    pub(super) fn restore(&mut self, index: usize, partial: &Path) -> Result<()> {
        if let Some(first) = self.lanes.first()
            && !first.tensors.is_empty()
            && !first.path.exists()
            && let Some(renamed) = find_renamed(index, partial)?
        {
            fs::rename(&renamed, &first.path).map_err(|e| Error::io(&renamed, "rename", e))?;
        }
        for lane in self.lanes.iter().filter(|l| !l.tensors.is_empty()) {
            let wanted = lane.offset + lane.length;
            let file = OpenOptions::new()
                .write(true)
                .open(&lane.path)
                .map_err(|e| Error::io(&lane.path, "open", e))?;
            let there = file.metadata().map_err(|e| Error::io(&lane.path, "inspect", e))?.len();
            if there < wanted {
                let reason = format!("holds {there} bytes where the journal has {wanted}");
                return Err(Error::file(&lane.path, reason)
                    .with_remedy("delete the .partial directory and start again"));
            }
            file.set_len(wanted).map_err(|e| Error::io(&lane.path, "truncate", e))?;
            file.sync_all().map_err(|e| Error::io(&lane.path, "sync", e))?;
        }
        Ok(())
    }

    /// Writes the shard under its final name and returns its tensors in file order.
    pub(super) fn finish(
        &mut self,
        target: &Path,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Vec<Tensor>> {
        self.sync()?;
        let tensors = self.tensors(target)?;
        let mut header = safetensors::header_bytes(target, metadata, &tensors, 0)?;
        let [main, rest @ ..] = &self.lanes;
        let in_place =
            self.total() > COPY_BELOW && header.len() as u64 <= RESERVE && !main.tensors.is_empty();
        let failed = |e| Error::io(target, "write", e);
        let mut file = if in_place {
            header = safetensors::header_bytes(target, metadata, &tensors, RESERVE as usize)?;
            let mut file = OpenOptions::new()
                .write(true)
                .open(&main.path)
                .map_err(|e| Error::io(&main.path, "open", e))?;
            file.write_all(&header).map_err(failed)?;
            file.seek(SeekFrom::Start(main.offset + main.length)).map_err(failed)?;
            file
        } else {
            let mut file = File::create(target).map_err(failed)?;
            file.write_all(&header).map_err(failed)?;
            main.copy_to(&mut file)?;
            file
        };
        for lane in rest {
            lane.copy_to(&mut file)?;
        }
        let (written, wanted) =
            (file.metadata().map_err(failed)?.len(), header.len() as u64 + self.total());
        if written != wanted {
            let reason = format!("has {written} bytes where {wanted} were to be written");
            return Err(Error::file(target, reason));
        }
        file.sync_all().map_err(failed)?;
        if in_place {
            fs::rename(&main.path, target).map_err(failed)?;
        }
        Ok(tensors)
    }

    /// Tensors in the order of the lanes, with their offsets.
    fn tensors(&self, target: &Path) -> Result<Vec<Tensor>> {
        let mut start = 0usize;
        let mut tensors = Vec::new();
        for record in self.lanes.iter().flat_map(|l| &l.tensors) {
            let dtype = Dtype::parse(&record.dtype);
            let end = usize::try_from(record.bytes).ok().and_then(|n| start.checked_add(n));
            let (Some(dtype), Some(end)) = (dtype, end) else {
                return Err(Error::tensor(target, &record.name, "cannot be described"));
            };
            tensors.push(Tensor {
                name: record.name.clone(),
                dtype,
                shape: record.shape.clone(),
                start,
                end,
            });
            start = end;
        }
        Ok(tensors)
    }
}

impl Lane {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let failed = |e| Error::io(&self.path, "write", e);
        let mut file = match self.file.take() {
            Some(file) => file,
            None => {
                let mut file = OpenOptions::new()
                    .create(true)
                    .truncate(false)
                    .write(true)
                    .open(&self.path)
                    .map_err(failed)?;
                let before = self.length.saturating_sub(bytes.len() as u64);
                file.seek(SeekFrom::Start(self.offset + before)).map_err(failed)?;
                file
            }
        };
        file.write_all(bytes).map_err(failed)?;
        if bytes.is_empty() {
            // An empty tensor alone must still leave a file of the booked length.
            let there = file.metadata().map_err(failed)?.len();
            file.set_len(there.max(self.offset + self.length)).map_err(failed)?;
        }
        self.file = Some(file);
        Ok(())
    }

    /// Appends the lane's data to `to`.
    fn copy_to(&self, to: &mut File) -> Result<()> {
        if self.tensors.is_empty() {
            return Ok(());
        }
        let failed = |e| Error::io(&self.path, "copy", e);
        let mut from = File::open(&self.path).map_err(failed)?;
        from.seek(SeekFrom::Start(self.offset)).map_err(failed)?;
        std::io::copy(&mut from, to).map(|_| ()).map_err(failed)
    }
}

/// The file of shard `index` if an interrupted finish has already renamed it.
fn find_renamed(index: usize, partial: &Path) -> Result<Option<PathBuf>> {
    let prefix = format!("model-{:05}-of-", index + 1);
    for entry in fs::read_dir(partial).map_err(|e| Error::io(partial, "list", e))? {
        let entry = entry.map_err(|e| Error::io(partial, "list", e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let single = index == 0 && name == SINGLE;
        if single || (name.starts_with(&prefix) && name.ends_with(".safetensors")) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
