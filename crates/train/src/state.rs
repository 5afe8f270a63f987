//! The training state on disk: one safetensors file that is replaced atomically, and the loss log.
//!
//! The state holds everything the next step depends on: parameters in f32, the links' tensors, the
//! step. The order of data is a pure function of seed and position, so the step number is all that
//! has to be kept of it.

use crate::error::{Error, Result, io};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};
use tensor::{Tensor, host};

/// One tensor of the state, still in its owner's memory.
pub struct StateTensor<'a> {
    /// Name within the owner.
    pub name: String,
    /// The values.
    pub values: Values<'a>,
}

/// Values in row-major order, wherever they live.
pub enum Values<'a> {
    /// In host memory.
    Slice(&'a [f32]),
    /// In a vector (a second handle, not a copy).
    Vector(Tensor<1>),
    /// In a matrix (a second handle, not a copy).
    Matrix(Tensor<2>),
}

impl Values<'_> {
    /// Number of values.
    pub fn count(&self) -> usize {
        match self {
            Self::Slice(values) => values.len(),
            Self::Vector(tensor) => tensor.dims()[0],
            Self::Matrix(tensor) => tensor.dims().iter().product(),
        }
    }

    /// Shows the values.
    pub fn read<R>(&self, f: impl FnOnce(&[f32]) -> R) -> R {
        match self {
            Self::Slice(values) => f(values),
            Self::Vector(tensor) => host::read(tensor, f),
            Self::Matrix(tensor) => host::read(tensor, f),
        }
    }
}

/// Tensors read back from a state file.
#[derive(Debug, Default)]
pub struct Saved {
    tensors: BTreeMap<String, Vec<f32>>,
}

impl Saved {
    /// Takes a tensor out.
    pub fn take_any(&mut self, name: &str) -> Result<Vec<f32>> {
        self.tensors.remove(name).ok_or_else(|| Error::UnknownParameter {
            name: name.to_string(),
            hint: " in the training state".to_string(),
        })
    }

    /// Takes a tensor of `len` values out.
    pub fn take(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values = self.take_any(name)?;
        if values.len() != len {
            return Err(Error::Shape {
                name: name.to_string(),
                expected: format!("{len} values"),
                found: format!("{} values", values.len()),
            });
        }
        Ok(values)
    }

    /// Takes out all tensors whose names start with `prefix`, without it.
    pub fn take_prefix(&mut self, prefix: &str) -> Saved {
        let mut taken = BTreeMap::new();
        let names: Vec<String> =
            self.tensors.keys().filter(|n| n.starts_with(prefix)).cloned().collect();
        for name in names {
            if let Some(values) = self.tensors.remove(&name) {
                taken.insert(name[prefix.len()..].to_string(), values);
            }
        }
        Saved { tensors: taken }
    }

    /// The names that are left.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

/// What the state file says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Steps done.
    pub step: u64,
    /// The run's configuration.
    pub config: serde_json::Value,
    /// SHA-256 of the training data's tokens.
    pub data: String,
    /// The links' numbers.
    pub notes: serde_json::Value,
}

/// The files of a run in progress, inside one directory.
pub struct StateDir {
    directory: PathBuf,
}

impl StateDir {
    /// The state lies in `directory`, which must exist.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_path_buf() }
    }

    /// The state file.
    pub fn file(&self) -> PathBuf {
        self.directory.join("state.safetensors")
    }

    /// Writes the state: to a new file, synced, renamed over the old one. A kill at any time leaves
    /// the old or the new state, never a mixture.
    pub fn write(&self, header: &Header, tensors: &[StateTensor<'_>]) -> Result<()> {
        let mut table = serde_json::Map::new();
        let note = serde_json::to_string(header).map_err(|e| self.broken(e.to_string()))?;
        table.insert("__metadata__".into(), serde_json::json!({ "strata": note }));
        let mut offset = 0usize;
        for tensor in tensors {
            let end = offset + tensor.values.count() * 4;
            table.insert(
                tensor.name.clone(),
                serde_json::json!({
                    "dtype": "F32", "shape": [tensor.values.count()], "data_offsets": [offset, end],
                }),
            );
            offset = end;
        }
        let mut json = serde_json::Value::Object(table).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let new = self.directory.join("state.safetensors.new");
        let file = File::create(&new).map_err(io(&new))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&(json.len() as u64).to_le_bytes()).map_err(io(&new))?;
        out.write_all(&json).map_err(io(&new))?;
        for tensor in tensors {
            tensor.values.read(|values| write_values(&mut out, values)).map_err(io(&new))?;
        }
        let file = out.into_inner().map_err(|e| io(&new)(e.into_error()))?;
        file.sync_all().map_err(io(&new))?;
        let path = self.file();
        std::fs::rename(&new, &path).map_err(io(&path))?;
        sync_directory(&self.directory)
    }

    /// Reads the state; `None` when nothing was saved yet.
    pub fn read(&self) -> Result<Option<(Header, Saved)>> {
        let path = self.file();
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(io(&path))?;
        let length = bytes
            .first_chunk::<8>()
            .and_then(|b| usize::try_from(u64::from_le_bytes(*b)).ok())
            .ok_or_else(|| self.broken("shorter than its header".into()))?;
        let json = bytes
            .get(8..)
            .and_then(|rest| rest.get(..length))
            .ok_or_else(|| self.broken("the header is longer than the file".into()))?;
        let table: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(json).map_err(|e| self.broken(e.to_string()))?;
        let note = table
            .get("__metadata__")
            .and_then(|m| m["strata"].as_str())
            .ok_or_else(|| self.broken("no training header; not a training state".into()))?;
        let header: Header = serde_json::from_str(note).map_err(|e| self.broken(e.to_string()))?;
        let data = &bytes[8 + length..];
        let mut saved = Saved::default();
        for (name, entry) in table.iter().filter(|(n, _)| *n != "__metadata__") {
            let bound =
                |i: usize| entry["data_offsets"][i].as_u64().and_then(|v| usize::try_from(v).ok());
            let values = bound(0)
                .zip(bound(1))
                .filter(|(a, b)| a <= b && (b - a) % 4 == 0)
                .and_then(|(a, b)| data.get(a..b))
                .ok_or_else(|| self.broken(format!("`{name}` lies outside the file")))?;
            let values = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            saved.tensors.insert(name.clone(), values);
        }
        Ok(Some((header, saved)))
    }

    fn broken(&self, reason: String) -> Error {
        Error::State {
            path: self.file(),
            reason: format!("{reason}; delete it and start again without --resume"),
        }
    }
}

fn write_values(out: &mut impl Write, values: &[f32]) -> std::io::Result<()> {
    if cfg!(target_endian = "little") {
        return out.write_all(bytemuck::cast_slice(values));
    }
    values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))
}

/// Makes a rename durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|d| d.sync_all()).map_err(io(directory))
}

/// One line of the loss log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossRecord {
    /// One-based optimiser step.
    pub step: u64,
    /// Mean loss of the step's batch in nats per counted token.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global L2 norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Evaluation loss after the step, when it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<f64>,
}

/// The loss log: one JSON object per line, appended.
pub struct LossLog {
    path: PathBuf,
    file: File,
    records: Vec<LossRecord>,
}

impl LossLog {
    /// Opens the log and drops what lies after `step` (the steps that will be done again) or is cut
    /// off.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let old = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io(path)(e)),
        };
        let mut records: Vec<LossRecord> = Vec::new();
        for line in old.lines() {
            match serde_json::from_str::<LossRecord>(line) {
                Ok(r) if r.step <= step && r.step == records.len() as u64 + 1 => records.push(r),
                _ => break,
            }
        }
        if records.len() as u64 != step {
            return Err(Error::State {
                path: path.to_path_buf(),
                reason: format!(
                    "holds {} steps where the state is at step {step}; start again without --resume",
                    records.len()
                ),
            });
        }
        let mut text = String::new();
        for record in &records {
            push_line(&mut text, record);
        }
        store::write_atomic(path, text.as_bytes())?;
        let file = std::fs::OpenOptions::new().append(true).open(path).map_err(io(path))?;
        Ok(Self { path: path.to_path_buf(), file, records })
    }

    /// Appends a record.
    pub fn append(&mut self, record: LossRecord) -> Result<()> {
        let mut line = String::new();
        push_line(&mut line, &record);
        self.file.write_all(line.as_bytes()).map_err(io(&self.path))?;
        self.records.push(record);
        Ok(())
    }

    /// Makes everything appended durable.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(io(&self.path))
    }

    /// All records so far.
    pub fn records(&self) -> &[LossRecord] {
        &self.records
    }

    /// The whole log as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for record in &self.records {
            push_line(&mut text, record);
        }
        text
    }
}

fn push_line(text: &mut String, record: &LossRecord) {
    // A struct of numbers always serialises.
    if let Ok(line) = serde_json::to_string(record) {
        text.push_str(&line);
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(step: u64) -> Header {
        Header { step, config: 1.into(), data: "d".into(), notes: serde_json::json!({"a": 2}) }
    }

    fn record(step: u64) -> LossRecord {
        LossRecord {
            step,
            loss: 1.0 / step as f64,
            learning_rate: 0.1,
            gradient_norm: 0.3,
            tokens: step * 10,
            evaluation: (step == 2).then_some(0.7),
        }
    }

    #[test]
    fn state_round_trip_and_replacement() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        assert!(state.read().unwrap().is_none());
        for step in [1u64, 2] {
            let values = [step as f32, f32::MIN_POSITIVE];
            let tensors = [
                StateTensor { name: "params.a".into(), values: Values::Slice(&values) },
                StateTensor { name: "adamw.m.a".into(), values: Values::Slice(&values[..1]) },
            ];
            state.write(&header(step), &tensors).unwrap();
        }
        let (found, mut saved) = state.read().unwrap().unwrap();
        assert_eq!(found, header(2));
        let mut own = saved.take_prefix("adamw.");
        assert_eq!(own.take("m.a", 1).unwrap(), [2.0]);
        assert!(saved.take("params.a", 3).is_err());
        assert!(saved.take("params.b", 3).unwrap_err().to_string().contains("params.b"));
    }

    #[test]
    fn damaged_states_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let values = [1.0f32; 4];
        state
            .write(&header(1), &[StateTensor { name: "a".into(), values: Values::Slice(&values) }])
            .unwrap();
        let whole = std::fs::read(state.file()).unwrap();
        for cut in [0, 4, 20, whole.len() - 1] {
            std::fs::write(state.file(), &whole[..cut]).unwrap();
            assert!(state.read().is_err(), "cut at {cut}");
        }
        let mut long = whole.clone();
        long[7] = 0xff;
        std::fs::write(state.file(), &long).unwrap();
        assert!(state.read().is_err());
    }

    #[test]
    fn the_log_forgets_what_will_be_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("losses.jsonl");
        let mut log = LossLog::open(&path, 0).unwrap();
        for step in 1..=3 {
            log.append(record(step)).unwrap();
        }
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"step\": 4, \"lo");
        std::fs::write(&path, bytes).unwrap();
        let log = LossLog::open(&path, 2).unwrap();
        assert_eq!(log.records(), [record(1), record(2)]);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), log.text());
        assert!(LossLog::open(&path, 5).is_err());
    }
}
