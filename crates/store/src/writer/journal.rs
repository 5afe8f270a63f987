//! The journal of an unfinished output: one JSON line when the job begins, one for every sealed
//! step, one when everything is written. A line counts only if it is complete; every line is
//! fsynced before the job goes on.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// Name of the journal in the working directory.
pub(super) const FILE: &str = "journal.jsonl";
/// Version of the format below.
pub(super) const FORMAT: u32 = 1;

/// A tensor as the journal knows it; its place follows from the order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TensorRecord {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: u64,
}

/// A sealed step: done and durable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Name of the step, unique within the job ("block 3").
    pub key: String,
    /// What the caller noted with it.
    pub note: Value,
    pub(super) tensors: Vec<TensorRecord>,
    pub(super) files: Vec<String>,
}

impl JournalEntry {
    /// Names of the tensors that the step wrote.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub(super) enum Line {
    Begin { format: u32, fingerprint: String, max_shard_size: u64 },
    Seal(JournalEntry),
    Finished,
}

/// The journal file and what it says.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    entries: Vec<JournalEntry>,
}

impl Journal {
    pub(super) fn new(work: &Path) -> Self {
        Self { path: work.join(FILE), entries: Vec::new() }
    }

    pub(super) fn entries(&self) -> &[JournalEntry] {
        &self.entries
    }

    /// Starts afresh with `line`.
    pub(super) fn begin(&mut self, line: &Line) -> Result<()> {
        self.entries.clear();
        let file = File::create(&self.path).map_err(|e| Error::io(&self.path, "create", e))?;
        self.write(file, line)
    }

    /// Adds a sealed step.
    pub(super) fn append(&mut self, entry: JournalEntry) -> Result<()> {
        self.write(self.open()?, &Line::Seal(entry.clone()))?;
        self.entries.push(entry);
        Ok(())
    }

    /// Notes that everything is written under its final name.
    pub(super) fn end(&self) -> Result<()> {
        self.write(self.open()?, &Line::Finished)
    }

    fn open(&self) -> Result<File> {
        OpenOptions::new()
            .append(true)
            .open(&self.path)
            .map_err(|e| Error::io(&self.path, "open", e))
    }

    fn write(&self, mut file: File, line: &Line) -> Result<()> {
        let failed = |e| Error::io(&self.path, "write", e);
        let mut text = serde_json::to_vec(line).map_err(|e| failed(e.into()))?;
        text.push(b'\n');
        file.write_all(&text).map_err(failed)?;
        file.sync_all().map_err(failed)
    }

    /// Reads the journal of an interrupted job: its first line (none if even that was not
    /// complete) and whether the job had finished. A torn last line is cut off.
    pub(super) fn load(&mut self) -> Result<(Option<Line>, bool)> {
        self.entries.clear();
        let text = fs::read(&self.path).map_err(|e| Error::io(&self.path, "read", e))?;
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if whole < text.len() {
            let file = self.open()?;
            file.set_len(whole as u64).map_err(|e| Error::io(&self.path, "truncate", e))?;
            file.sync_all().map_err(|e| Error::io(&self.path, "sync", e))?;
        }
        let (mut first, mut finished) = (None, false);
        let lines = text.get(..whole).unwrap_or_default();
        for (number, line) in lines.split(|b| *b == b'\n').filter(|l| !l.is_empty()).enumerate() {
            let damaged = |what: String| {
                Error::file(&self.path, format!("line {} of the journal {what}", number + 1))
                    .with_remedy("delete the .partial directory and start again")
            };
            let line = serde_json::from_slice(line)
                .map_err(|e| damaged(format!("is not readable: {e}")))?;
            match line {
                Line::Begin { .. } if number == 0 => first = Some(line),
                Line::Seal(entry) if number > 0 && !finished => self.entries.push(entry),
                Line::Finished if number > 0 => finished = true,
                _ => return Err(damaged("is out of place".into())),
            }
        }
        Ok((first, finished))
    }
}
