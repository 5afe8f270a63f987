//! [`Writer`]: a model directory that appears whole or not at all, and that a killed job can take
//! up again. Everything is written below `<out>.partial`; [`Writer::finish`] renames it to `<out>`.
//!
//! While a job runs, `<out>.partial/.strata/` holds the journal (`journal.jsonl`, see `journal`)
//! and the data of the shards (see `shard`). Only whole, sealed steps survive a kill; the final
//! bytes depend on what was added and in which order, never on where the job was interrupted.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::atomic::{copy_atomic, parent, sha256_bytes, sync_directory, write_atomic};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::safetensors;

mod journal;
mod shard;

pub use journal::JournalEntry;
use journal::{Journal, Line, TensorRecord};
use shard::Shard;

/// How to write.
#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// Largest shard in bytes of tensor data (a single larger tensor gets a shard of its own).
    pub max_shard_size: u64,
    /// Take up an interrupted job if there is one.
    pub resume: bool,
    /// Replace an existing output.
    pub overwrite: bool,
    /// What the job is (command, options, input hashes), in any form. An interrupted job can only
    /// be resumed under the same fingerprint.
    pub fingerprint: String,
    /// Directories or files that the job reads; the output may not lie in or above them.
    pub inputs: Vec<PathBuf>,
}

impl Default for WriteOptions {
    /// Shards of 5 GB, no resume, no overwrite.
    fn default() -> Self {
        Self {
            max_shard_size: 5_000_000_000,
            resume: false,
            overwrite: false,
            fingerprint: String::new(),
            inputs: Vec::new(),
        }
    }
}

/// Name of the working directory inside `<out>.partial`.
const WORK: &str = ".strata";
/// Key of the fingerprint's hash in the `__metadata__` of every shard.
const FINGERPRINT_KEY: &str = "strata_job";

/// An output directory in the making. Dropping it without [`Writer::finish`] leaves the partial
/// directory for a later resume.
#[derive(Debug)]
pub struct Writer {
    out: PathBuf,
    partial: PathBuf,
    work: PathBuf,
    options: WriteOptions,
    journal: Journal,
    shards: Vec<Shard>,
    names: HashSet<String>,
    /// Tensors and files since the last seal.
    pending: Vec<TensorRecord>,
    pending_files: Vec<String>,
    /// Holds the lock on the working directory.
    _lock: File,
}

impl Writer {
    /// Starts (or, with `resume`, takes up) the output directory `out`.
    ///
    /// # Errors
    /// [`Error::Complete`] when asked to resume a job that has finished. [`Error::Output`] when the
    /// output exists, lies in or above an input, is being written by another process, or when the
    /// interrupted job there was a different one.
    pub fn create(out: &Path, options: WriteOptions) -> Result<Self> {
        if options.max_shard_size == 0 {
            return Err(Error::output(out, "the maximal shard size is 0")
                .with_remedy("give at least a few megabytes"));
        }
        let Some(name) = out.file_name().filter(|_| !out.ends_with("..")) else {
            return Err(Error::output(out, "is not a name for a new directory"));
        };
        let directory = resolve(&parent(out))?;
        let out = directory.join(name);
        refuse_inputs(&out, &options.inputs)?;
        fs::create_dir_all(&directory).map_err(|e| Error::io(&directory, "create", e))?;
        let partial = sibling(&out, ".partial");
        settle(&out)?;
        let unfinished = partial.join(WORK).join(journal::FILE).exists();
        if out.exists() {
            if options.resume && !unfinished && is_result_of(&out, &options.fingerprint) {
                return Err(Error::Complete { path: out });
            }
            if !options.overwrite {
                return Err(Error::output(&out, "already exists")
                    .with_remedy("choose another name, or allow overwriting"));
            }
        }
        let work = partial.join(WORK);
        fs::create_dir_all(&work).map_err(|e| Error::io(&work, "create", e))?;
        let lock = lock(&work, &out)?;
        let mut writer = Self {
            journal: Journal::new(&work),
            out,
            partial,
            work,
            options,
            shards: Vec::new(),
            names: HashSet::new(),
            pending: Vec::new(),
            pending_files: Vec::new(),
            _lock: lock,
        };
        if unfinished {
            writer.take_up()?;
        } else {
            writer.start()?;
        }
        Ok(writer)
    }

    /// A fresh job: nothing of an earlier one remains.
    fn start(&mut self) -> Result<()> {
        self.journal = Journal::new(&self.work);
        self.discard_all_but(&HashSet::new())?;
        let directory = parent(&self.partial);
        self.journal.begin(&self.header_line())?;
        sync_directory(&self.work)?;
        sync_directory(&self.partial)?;
        sync_directory(&directory)
    }

    fn header_line(&self) -> Line {
        Line::Begin {
            format: journal::FORMAT,
            fingerprint: self.options.fingerprint.clone(),
            max_shard_size: self.options.max_shard_size,
        }
    }

    /// An interrupted job: compare, restore the sealed state, drop the rest.
    fn take_up(&mut self) -> Result<()> {
        let (first, finished) = self.journal.load()?;
        let Some(first) = first else {
            // Killed before the first line was durable: nothing was done yet.
            return self.start();
        };
        if !self.options.resume {
            if self.journal.entries().is_empty() || self.options.overwrite {
                return self.start();
            }
            return Err(Error::output(&self.partial, "holds an interrupted job")
                .with_remedy("resume it, or delete that directory"));
        }
        if first != self.header_line() {
            return Err(Error::output(
                &self.partial,
                "the interrupted job there was started with other options or inputs",
            )
            .with_remedy("repeat the original command to resume it, or delete that directory"));
        }
        if finished {
            self.publish()?;
            return Err(Error::Complete { path: self.out.clone() });
        }
        let mut files = HashSet::new();
        for entry in self.journal.entries() {
            files.extend(entry.files.iter().cloned());
            for record in &entry.tensors {
                shard::place(&mut self.shards, &self.work, self.options.max_shard_size, record)?;
                self.names.insert(record.name.clone());
            }
        }
        for (index, shard) in self.shards.iter_mut().enumerate() {
            shard.restore(index, &self.partial)?;
        }
        self.discard_all_but(&files)
    }

    /// Removes everything that no sealed step wrote, except the journal, the lock, the scratch
    /// directory of a resumed job and the data of its shards.
    fn discard_all_but(&self, files: &HashSet<String>) -> Result<()> {
        let mut kept: HashSet<PathBuf> = files.iter().map(|f| self.partial.join(f)).collect();
        kept.insert(self.work.join(journal::FILE));
        kept.insert(self.work.join(LOCK));
        if !self.shards.is_empty() || !self.journal.entries().is_empty() {
            kept.insert(self.scratch_path());
        }
        kept.extend(self.shards.iter().flat_map(Shard::paths));
        prune(&self.partial, &kept)
    }

    /// Appends a tensor: `bytes` are row-major and little-endian.
    ///
    /// # Errors
    /// When the name is taken or reserved, the size does not fit dtype and shape, the type has no
    /// place in safetensors, or the disk refuses.
    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let bad = |reason: String| Error::tensor(&self.out, name, reason);
        if name.is_empty() || name == "__metadata__" {
            return Err(bad("the name is reserved".into()));
        }
        if matches!(dtype, Dtype::Ggml(_)) {
            return Err(bad(format!("safetensors has no place for the GGML type {dtype}"))
                .with_remedy("write it dequantised"));
        }
        let expected = shape
            .iter()
            .try_fold(1u64, |product, dim| product.checked_mul(*dim as u64))
            .and_then(|elements| dtype.bytes_for(elements));
        if expected != Some(bytes.len() as u64) {
            return Err(bad(format!("{} bytes given for {dtype} of shape {shape:?}", bytes.len())));
        }
        if self.names.contains(name) {
            return Err(bad("was already written".into()));
        }
        let record = TensorRecord {
            name: name.to_string(),
            dtype: dtype.name().to_string(),
            shape: shape.to_vec(),
            bytes: bytes.len() as u64,
        };
        let (shard, lane) =
            shard::place(&mut self.shards, &self.work, self.options.max_shard_size, &record)?;
        let (older, current) = self.shards.split_at_mut(shard);
        for shard in older {
            // Done with; also keeps the number of open files small.
            shard.sync()?;
        }
        if let Some(shard) = current.first_mut() {
            shard.write(lane, bytes)?;
        }
        self.names.insert(record.name.clone());
        self.pending.push(record);
        Ok(())
    }

    /// Makes everything added since the last seal durable and notes it in the journal under `key`,
    /// with whatever the caller wants to find again.
    ///
    /// # Errors
    /// When the key was sealed before, or the disk refuses.
    pub fn seal(&mut self, key: &str, note: Value) -> Result<()> {
        if self.journal.entries().iter().any(|e| e.key == key) {
            return Err(Error::output(&self.out, format!("the step \"{key}\" is already done")));
        }
        for shard in &mut self.shards {
            shard.sync()?;
        }
        sync_directory(&self.work)?;
        sync_directory(&self.partial)?;
        let entry = JournalEntry {
            key: key.to_string(),
            note,
            tensors: std::mem::take(&mut self.pending),
            files: std::mem::take(&mut self.pending_files),
        };
        self.journal.append(entry)
    }

    /// The steps sealed so far, by this process and, after a resume, by those before it.
    pub fn sealed(&self) -> &[JournalEntry] {
        self.journal.entries()
    }

    /// The sealed step `key`, if it is done.
    pub fn sealed_step(&self, key: &str) -> Option<&JournalEntry> {
        self.sealed().iter().find(|e| e.key == key)
    }

    /// Whether a tensor of that name was written (and, after a resume, kept).
    pub fn contains(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Copies every file of the directory `from` that is not a weight file (configuration,
    /// tokenizer, generation settings, licence, ...) and not named in `skip`. Subdirectories and
    /// hidden files stay behind.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn carry(&mut self, from: &Path, skip: &[&str]) -> Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(from).map_err(|e| Error::io(from, "list", e))? {
            let entry = entry.map_err(|e| Error::io(from, "list", e))?;
            names.push(entry.file_name());
        }
        names.sort();
        for name in names {
            let source = from.join(&name);
            let Some(name) = name.to_str() else { continue };
            if skip.contains(&name) || !is_companion(name) || !source.is_file() {
                continue;
            }
            copy_atomic(&source, &self.partial.join(name))?;
            self.note_file(name);
        }
        Ok(())
    }

    /// Writes `value` as an indented JSON file.
    ///
    /// # Errors
    /// As [`Writer::put_file`].
    pub fn put_json(&mut self, name: &str, value: &Value) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(value)
            .map_err(|e| Error::io(&self.partial.join(name), "write", e.into()))?;
        text.push(b'\n');
        self.put_file(name, &text)
    }

    /// Writes a file into the output directory, replacing one of that name.
    ///
    /// # Errors
    /// When the name leaves the directory or belongs to the weights, or the disk refuses.
    pub fn put_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = Path::new(name);
        let inside = path.components().all(|c| matches!(c, Component::Normal(_)));
        if name.is_empty() || !inside || path.starts_with(WORK) || is_own_weight_name(name) {
            return Err(Error::output(&self.out.join(name), "is not a name for a companion file"));
        }
        let target = self.partial.join(path);
        let directory = parent(&target);
        fs::create_dir_all(&directory).map_err(|e| Error::io(&directory, "create", e))?;
        write_atomic(&target, bytes)?;
        self.note_file(name);
        Ok(())
    }

    fn note_file(&mut self, name: &str) {
        if !self.pending_files.iter().any(|n| n == name) {
            self.pending_files.push(name.to_string());
        }
    }

    /// A directory for the caller's own temporary files. It survives a kill (what is in it is the
    /// caller's to judge) and disappears at [`Writer::finish`].
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn scratch_dir(&self) -> Result<PathBuf> {
        let path = self.scratch_path();
        fs::create_dir_all(&path).map_err(|e| Error::io(&path, "create", e))?;
        Ok(path)
    }

    fn scratch_path(&self) -> PathBuf {
        self.work.join("scratch")
    }

    /// Writes headers and index, makes everything durable and renames the directory to its final
    /// name. Returns that.
    ///
    /// # Errors
    /// When the disk refuses; the job can then be resumed.
    pub fn finish(mut self) -> Result<PathBuf> {
        let mut metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        if !self.options.fingerprint.is_empty() {
            let hash = sha256_bytes(self.options.fingerprint.as_bytes());
            metadata.insert(FINGERPRINT_KEY.to_string(), hash);
        }
        if self.shards.is_empty() {
            self.shards.push(Shard::new(&self.work, 0));
        }
        let count = self.shards.len();
        let (mut weight_map, mut total) = (BTreeMap::new(), 0u64);
        for (index, shard) in self.shards.iter_mut().enumerate() {
            let name = shard::final_name(index, count);
            let tensors = shard.finish(&self.partial.join(&name), &metadata)?;
            for t in tensors {
                total += (t.end - t.start) as u64;
                weight_map.insert(t.name, Value::from(name.clone()));
            }
        }
        if count > 1 {
            let index = serde_json::json!({
                "metadata": { "total_size": total },
                "weight_map": weight_map.into_iter().collect::<serde_json::Map<_, _>>(),
            });
            let mut text = serde_json::to_vec_pretty(&index)
                .map_err(|e| Error::io(&self.partial, "write the index in", e.into()))?;
            text.push(b'\n');
            write_atomic(&self.partial.join(shard::INDEX), &text)?;
        }
        sync_directory(&self.partial)?;
        self.journal.end()?;
        self.publish()
    }

    /// The last steps, which [`settle`] takes up again if they are interrupted: the working
    /// directory moves out of the way as the sign that the rest is whole, then the names change.
    fn publish(&self) -> Result<PathBuf> {
        if self.out.exists() && !self.options.overwrite {
            return Err(Error::output(&self.out, "appeared while the job ran")
                .with_remedy("move it away and resume, or allow overwriting"));
        }
        let done = sibling(&self.out, ".done");
        remove(&done)?;
        rename(&self.work, &done)?;
        sync_directory(&self.partial)?;
        sync_directory(&parent(&self.out))?;
        settle(&self.out)?;
        Ok(self.out.clone())
    }
}

/// `<out><suffix>`, beside the output.
fn sibling(out: &Path, suffix: &str) -> PathBuf {
    let mut text = out.as_os_str().to_os_string();
    text.push(suffix);
    PathBuf::from(text)
}

/// Completes what a kill during the last renames left behind. `<out>.done` says that
/// `<out>.partial`, if it exists, is complete; `<out>.replaced` is the output that it replaces.
fn settle(out: &Path) -> Result<()> {
    let (partial, done) = (sibling(out, ".partial"), sibling(out, ".done"));
    let replaced = sibling(out, ".replaced");
    if done.exists() {
        if partial.exists() {
            if out.exists() {
                remove(&replaced)?;
                rename(out, &replaced)?;
            }
            rename(&partial, out)?;
            sync_directory(&parent(out))?;
        }
        remove(&done)?;
        remove(&replaced)?;
        sync_directory(&parent(out))?;
    }
    Ok(())
}

/// Whether `out` is the result of the job with that fingerprint.
fn is_result_of(out: &Path, fingerprint: &str) -> bool {
    let first = |name: &String| name == shard::SINGLE || name.starts_with("model-00001-of-");
    let Ok(entries) = fs::read_dir(out) else { return false };
    let name = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| n.ends_with(".safetensors"))
        .find(first);
    let Some(metadata) = name.and_then(|n| safetensors::metadata(&out.join(n)).ok()) else {
        return false;
    };
    !fingerprint.is_empty()
        && metadata.get(FINGERPRINT_KEY) == Some(&sha256_bytes(fingerprint.as_bytes()))
}

/// Absolute path of a directory that need not exist yet, with the links of its existing part
/// followed.
fn resolve(directory: &Path) -> Result<PathBuf> {
    let mut existing =
        std::path::absolute(directory).map_err(|e| Error::io(directory, "resolve", e))?;
    let mut missing = Vec::new();
    while !existing.exists() {
        match existing.file_name() {
            Some(name) => missing.push(name.to_os_string()),
            None => break,
        }
        existing.pop();
    }
    let mut real = fs::canonicalize(&existing).map_err(|e| Error::io(&existing, "resolve", e))?;
    real.extend(missing.iter().rev());
    Ok(real)
}

/// The output must not touch what the job reads.
fn refuse_inputs(out: &Path, inputs: &[PathBuf]) -> Result<()> {
    for input in inputs {
        // An input that is not there is its reader's error to report.
        let Ok(real) = fs::canonicalize(input) else { continue };
        let target = fs::canonicalize(out).unwrap_or_else(|_| out.to_path_buf());
        let inside = real.is_dir() && target.starts_with(&real);
        if inside || real.starts_with(&target) {
            let reason = format!("would write into the input {}", input.display());
            return Err(Error::output(out, reason).with_remedy("choose a directory outside it"));
        }
    }
    Ok(())
}

const LOCK: &str = "lock";

/// Takes the lock of a working directory; it is released when the process ends, however it ends.
fn lock(work: &Path, out: &Path) -> Result<File> {
    let path = work.join(LOCK);
    let file = File::create(&path).map_err(|e| Error::io(&path, "create", e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            Err(Error::output(out, "another process is writing this output")
                .with_remedy("wait for it, or choose another name"))
        }
        // A file system without locks: go on unguarded.
        Err(fs::TryLockError::Error(_)) => Ok(file),
    }
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io(from, format!("rename to {}", to.display()), e))
}

/// Removes a file or directory, if there is one.
fn remove(path: &Path) -> Result<()> {
    let outcome = match fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    outcome.map_err(|e| Error::io(path, "remove", e))
}

/// Removes everything below `directory` except the paths in `kept` and what lies below them.
fn prune(directory: &Path, kept: &HashSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(|e| Error::io(directory, "list", e))? {
        let path = entry.map_err(|e| Error::io(directory, "list", e))?.path();
        if kept.contains(&path) {
            continue;
        }
        if kept.iter().any(|k| k.starts_with(&path)) {
            prune(&path, kept)?;
        } else {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Files that weights come in; everything else of a model directory is carried along.
fn is_companion(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default();
    let weights = [
        "safetensors",
        "bin",
        "pt",
        "pth",
        "th",
        "ckpt",
        "h5",
        "msgpack",
        "onnx",
        "gguf",
        "ot",
        "npz",
        "tflite",
    ];
    !name.starts_with('.')
        && !weights.contains(&extension.to_lowercase().as_str())
        && !name.ends_with(".safetensors.index.json")
        && !name.ends_with(".bin.index.json")
}

/// Names that [`Writer::finish`] gives to the weights.
fn is_own_weight_name(name: &str) -> bool {
    name == shard::SINGLE
        || name == shard::INDEX
        || (name.starts_with("model-") && name.ends_with(".safetensors"))
}

#[cfg(test)]
mod tests;
