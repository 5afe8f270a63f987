//! Activations between two blocks: kept in memory up to a budget, beyond it in a temporary file.
//!
//! The streaming runner holds the calibration set's activations at one block boundary. That is
//! the only quantity of a job that grows with the number of samples, so it is the one that spills.

use crate::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Spill files made by this process.
static STORES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// Named rows of `f32`, one slot per calibration batch.
#[derive(Debug)]
pub struct Activations {
    slots: Vec<Slot>,
    in_memory: u64,
    budget: u64,
    directory: PathBuf,
    spill: Option<Spill>,
}

#[derive(Debug)]
enum Slot {
    Empty,
    Memory(Vec<f32>),
    Disk { offset: u64, length: usize },
}

#[derive(Debug)]
struct Spill {
    file: File,
    path: PathBuf,
    end: u64,
    /// Freed places, by length.
    free: Vec<(u64, usize)>,
}

impl Activations {
    /// `slots` empty slots that hold at most `budget` bytes in memory; the rest goes to a file in
    /// `directory`, which is removed when the value is dropped.
    pub fn new(slots: usize, budget: u64, directory: &Path) -> Self {
        Self {
            slots: (0..slots).map(|_| Slot::Empty).collect(),
            in_memory: 0,
            budget,
            directory: directory.to_path_buf(),
            spill: None,
        }
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are no slots.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Bytes that lie in the temporary file.
    pub fn spilled_bytes(&self) -> u64 {
        self.slots
            .iter()
            .map(|slot| match slot {
                Slot::Disk { length, .. } => 4 * *length as u64,
                _ => 0,
            })
            .sum()
    }

    /// Puts `values` into slot `index`.
    pub fn put(&mut self, index: usize, values: Vec<f32>) -> Result<()> {
        drop(self.release(index));
        let bytes = 4 * values.len() as u64;
        let slot = if self.in_memory + bytes <= self.budget {
            self.in_memory += bytes;
            Slot::Memory(values)
        } else {
            let offset = self.spill()?.place(values.len());
            let spill = self.spill()?;
            let raw: &[u8] = bytemuck::cast_slice(&values);
            spill.file.write_all_at(raw, offset).map_err(|e| io(&spill.path, e))?;
            Slot::Disk { offset, length: values.len() }
        };
        match self.slots.get_mut(index) {
            Some(place) => *place = slot,
            None => return Err(Error::Options(format!("there is no activation slot {index}"))),
        }
        Ok(())
    }

    /// A copy of slot `index`; empty if nothing was put there.
    pub fn get(&self, index: usize) -> Result<Vec<f32>> {
        match self.slots.get(index) {
            Some(Slot::Memory(values)) => Ok(values.clone()),
            Some(Slot::Disk { offset, length }) => self.read(*offset, *length),
            _ => Ok(Vec::new()),
        }
    }

    /// A second store with the same values, budget and directory.
    pub fn duplicate(&self) -> Result<Self> {
        let mut copy = Self::new(self.slots.len(), self.budget, &self.directory);
        for index in 0..self.slots.len() {
            copy.put(index, self.get(index)?)?;
        }
        Ok(copy)
    }

    /// Takes the values out of slot `index`, leaving it empty.
    pub fn take(&mut self, index: usize) -> Result<Vec<f32>> {
        match self.release(index) {
            Slot::Memory(values) => Ok(values),
            Slot::Disk { offset, length } => self.read(offset, length),
            Slot::Empty => Ok(Vec::new()),
        }
    }

    fn release(&mut self, index: usize) -> Slot {
        let Some(slot) = self.slots.get_mut(index) else { return Slot::Empty };
        let slot = std::mem::replace(slot, Slot::Empty);
        match &slot {
            Slot::Memory(values) => self.in_memory -= 4 * values.len() as u64,
            Slot::Disk { offset, length } => {
                if let Some(spill) = &mut self.spill {
                    spill.free.push((*offset, *length));
                }
            }
            Slot::Empty => {}
        }
        slot
    }

    fn read(&self, offset: u64, length: usize) -> Result<Vec<f32>> {
        let Some(spill) = &self.spill else { return Ok(Vec::new()) };
        let mut values = vec![0f32; length];
        spill
            .file
            .read_exact_at(bytemuck::cast_slice_mut(&mut values), offset)
            .map_err(|e| io(&spill.path, e))?;
        Ok(values)
    }

    fn spill(&mut self) -> Result<&mut Spill> {
        if self.spill.is_none() {
            // The number keeps stores apart wherever they are moved to.
            let number = STORES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let process = std::process::id();
            let path = self.directory.join(format!("activations-{process}-{number}.tmp"));
            std::fs::create_dir_all(&self.directory).map_err(|e| io(&self.directory, e))?;
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path)
                .map_err(|e| io(&path, e))?;
            self.spill = Some(Spill { file, path, end: 0, free: Vec::new() });
        }
        self.spill.as_mut().ok_or_else(|| Error::Options("no spill file".into()))
    }
}

impl Spill {
    /// A place for `length` values: a freed one of that length, or the end of the file.
    fn place(&mut self, length: usize) -> u64 {
        if let Some(found) = self.free.iter().position(|&(_, l)| l == length) {
            return self.free.swap_remove(found).0;
        }
        let offset = self.end;
        self.end += 4 * length as u64;
        offset
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        // A leftover file costs disk, not correctness.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spills_beyond_the_budget_and_reuses_places() {
        let directory = std::env::temp_dir().join(format!("strata-act-{}", std::process::id()));
        let mut store = Activations::new(3, 32, &directory);
        for i in 0..3 {
            store.put(i, vec![i as f32; 8]).unwrap();
        }
        assert_eq!(store.spilled_bytes(), 64);
        assert_eq!(store.get(2).unwrap(), [2.0; 8]);
        assert_eq!(store.take(1).unwrap(), [1.0; 8]);
        assert!(store.get(1).unwrap().is_empty());
        store.put(1, vec![7.0; 8]).unwrap();
        assert_eq!(store.spill.as_ref().unwrap().end, 64, "the freed place is used again");
        assert_eq!(store.take(0).unwrap(), [0.0; 8]);
        let copy = store.duplicate().unwrap();
        assert_eq!(copy.get(2).unwrap(), [2.0; 8]);
        assert_eq!(copy.get(1).unwrap(), [7.0; 8]);
        drop(copy);
        store.put(2, vec![9.0; 4]).unwrap();
        assert_eq!(store.get(2).unwrap(), [9.0; 4]);
        assert_eq!(store.get(1).unwrap(), [7.0; 8]);
        drop(store);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        std::fs::remove_dir_all(directory).unwrap();
    }
}
