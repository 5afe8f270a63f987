//! The rows of an inspection: one per tensor, or one per layer of a known architecture.

use std::collections::HashMap;

use method::Pattern;
use nn::{Leaf, Name, Network, OpenNetwork};
use report::{Cell, Column, Progress, Table, human};
use serde_json::{Value, json};
use store::{Checkpoint, TensorInfo};
use tensor::host;

use super::statistics::Statistics;
use crate::failure::{Failure, Result};

/// Rows read at once from a large tensor.
const ELEMENTS_AT_ONCE: usize = 1 << 26;

/// One tensor or layer.
pub struct Row {
    /// The tensor's or module's name.
    pub name: String,
    /// What it is for, when the architecture is known.
    pub role: Option<&'static str>,
    /// Index of its block.
    pub block: Option<usize>,
    /// How it is stored.
    pub dtype: String,
    /// Its shape; of layers `[out, in]`.
    pub shape: Vec<usize>,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// What its values are like; absent for integers, or when nobody asked.
    pub statistics: Option<Statistics>,
}

/// What was found in a checkpoint.
pub struct Content {
    /// The checkpoint's file format.
    pub container: String,
    /// `model_type`, where there is a config.
    pub architecture: Option<String>,
    path: String,
    shape: Option<String>,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Content {
    /// One row per stored tensor.
    pub fn tensors(checkpoint: Checkpoint, only: &[Pattern], statistics: bool) -> Result<Self> {
        // An unknown architecture is no obstacle here: its tensors just have no roles.
        let network = nn::network_of(&checkpoint).ok();
        let mut roles: HashMap<String, &Name> = HashMap::new();
        for name in network.iter().flat_map(|n| n.modules()) {
            for tensor in name.tensors() {
                roles.entry(tensor).or_insert(name);
            }
        }
        let chosen: Vec<&TensorInfo> =
            checkpoint.infos().filter(|info| wanted(only, &info.name)).collect();
        let progress = progress(&chosen, statistics);
        let mut rows = Vec::with_capacity(chosen.len());
        for info in chosen {
            let name = roles.get(&info.name);
            rows.push(Row {
                name: info.name.clone(),
                role: name.map(|n| n.role.label()),
                block: name.and_then(|n| n.block),
                dtype: info.dtype.to_string(),
                shape: info.shape.clone(),
                parameters: info.elements() as u64,
                bytes: checkpoint.stored_bytes(&info.name)?,
                statistics: if statistics { measure(&checkpoint, info)? } else { None },
            });
            progress.inc(info.nbytes);
        }
        progress.finish();
        Ok(Self::around(&checkpoint, network.as_deref(), rows))
    }

    /// One row per layer: a packed layer is shown as the matrix it stands for.
    pub fn layers(checkpoint: Checkpoint, only: &[Pattern], statistics: bool) -> Result<Self> {
        let model = OpenNetwork::from_checkpoint(checkpoint)?;
        let mut rows: Vec<Row> = Vec::new();
        let names = model.network.modules();
        let progress = if statistics {
            Progress::new("reading", names.len() as u64, "layers")
        } else {
            Progress::hidden()
        };
        for name in names {
            // A tied head is the embedding once more.
            let repeated = rows.iter().any(|row| row.name == name.module);
            if !repeated && wanted(only, &name.module) {
                rows.push(layer(&model, name, statistics)?);
            }
            progress.inc(1);
        }
        progress.finish();
        Ok(Self::around(&model.checkpoint, Some(model.network.as_ref()), rows))
    }

    fn around(checkpoint: &Checkpoint, network: Option<&dyn Network>, rows: Vec<Row>) -> Self {
        let declared = || {
            let kind = checkpoint.config().ok()?.get("model_type")?.as_str()?;
            Some(kind.to_string())
        };
        Self {
            container: checkpoint.container().name().to_string(),
            architecture: declared().or_else(|| network.map(|n| n.family().to_string())),
            path: checkpoint.path().display().to_string(),
            shape: network.map(|n| n.summary()),
            rows,
        }
    }

    /// Where it is.
    pub fn title(&self) -> &str {
        &self.path
    }

    /// The head of the page.
    pub fn summary(&self) -> Vec<(&'static str, String)> {
        let mut summary = vec![("container", self.container.clone())];
        summary.extend(self.architecture.clone().map(|a| ("architecture", a)));
        summary.extend(self.shape.clone().map(|s| ("shape", s)));
        summary.push(("parameters", human::count(self.parameters())));
        summary.push(("size", human::bytes(self.bytes())));
        let spoilt: u64 =
            self.rows.iter().filter_map(|r| r.statistics.as_ref()).map(|s| s.not_finite).sum();
        if spoilt > 0 {
            summary.push(("not finite", format!("{spoilt} values are NaN or infinite")));
        }
        summary
    }

    /// Number of weights in all rows.
    pub fn parameters(&self) -> u64 {
        self.rows.iter().map(|r| r.parameters).sum()
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> u64 {
        self.rows.iter().map(|r| r.bytes).sum()
    }

    /// The rows as a table.
    pub fn table(&self, layers: bool) -> Table {
        let mut table = Table::new("", columns(if layers { "layer" } else { "tensor" }));
        for row in &self.rows {
            table.push(row.cells(row.name.clone()));
        }
        table
    }
}

/// The columns of all views.
pub fn columns(first: &str) -> Vec<Column> {
    let mut columns: Vec<Column> = [first, "role", "dtype"].map(Column::left).to_vec();
    let right = ["shape", "weights", "size", "norm", "max abs", "outliers", "sparsity"];
    columns.extend(right.map(Column::right));
    columns
}

impl Row {
    /// The cells under `name`.
    pub fn cells(&self, name: String) -> Vec<Cell> {
        let mut cells = vec![
            Cell::Text(name),
            Cell::text(self.role.unwrap_or_default()),
            Cell::text(&self.dtype),
            Cell::Text(shape(&self.shape)),
            Cell::Count(self.parameters),
            Cell::Bytes(self.bytes),
        ];
        cells.extend(Statistics::cells(self.statistics.as_ref()));
        cells
    }

    /// The row for scripts.
    pub fn json(&self) -> Value {
        json!({
            "name": self.name,
            "role": self.role,
            "block": self.block,
            "dtype": self.dtype,
            "shape": self.shape,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "statistics": Statistics::json(self.statistics.as_ref()),
        })
    }
}

fn shape(shape: &[usize]) -> String {
    if shape.is_empty() {
        return "scalar".into();
    }
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" × ")
}

fn wanted(only: &[Pattern], name: &str) -> bool {
    // A pattern for a module also means its tensors.
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    only.is_empty() || only.iter().any(|p| p.matches(name) || p.matches(module))
}

fn progress(chosen: &[&TensorInfo], statistics: bool) -> Progress {
    let bytes = chosen.iter().map(|info| info.nbytes).sum();
    if statistics { Progress::new("reading", bytes, "bytes") } else { Progress::hidden() }
}

/// Statistics of a stored tensor, or nothing for integers. A large tensor is read in pieces; its
/// outliers are then counted against the deviation of each piece.
fn measure(checkpoint: &Checkpoint, info: &TensorInfo) -> Result<Option<Statistics>> {
    if !info.dtype.is_float() {
        return Ok(None);
    }
    let elements = info.elements();
    let rows = info.shape.first().copied().unwrap_or(0);
    if elements <= ELEMENTS_AT_ONCE || rows < 2 {
        return Ok(Some(Statistics::of(&checkpoint.f32(&info.name)?)));
    }
    let step = (ELEMENTS_AT_ONCE / (elements / rows).max(1)).max(1);
    let mut all = Statistics::default();
    for start in (0..rows).step_by(step) {
        let values = checkpoint.f32_rows(&info.name, start..(start + step).min(rows))?;
        all = all.plus(Statistics::of(&values));
    }
    Ok(Some(all))
}

fn layer(model: &OpenNetwork, name: &Name, statistics: bool) -> Result<Row> {
    // Everything stored under the module: weight and bias, or codes, scales and zeros.
    let prefix = format!("{}.", name.module);
    let own = name.tensors();
    let belongs = |info: &&TensorInfo| info.name.starts_with(&prefix) || own.contains(&info.name);
    let stored: Vec<&TensorInfo> = model.checkpoint.infos().filter(belongs).collect();
    if stored.is_empty() {
        return Err(Failure::error(format!(
            "{}: no tensor is stored for {}",
            model.checkpoint.path().display(),
            name.module
        )));
    }
    let dtype = match stored.iter().find(|info| info.name == name.weight()) {
        Some(info) => info.dtype.to_string(),
        None => "packed".to_string(),
    };
    let [out, width] = name.shape;
    let bias = if name.bias { out } else { 0 };
    let statistics = if !statistics {
        None
    } else if name.role.is_norm() {
        let values = model.weights.vector(name, Leaf::Weight)?;
        Some(host::read(&values, Statistics::of))
    } else {
        let values = model.weights.matrix(name)?;
        Some(host::read(&values, Statistics::of))
    };
    let mut bytes = 0;
    for info in &stored {
        bytes += model.checkpoint.stored_bytes(&info.name)?;
    }
    Ok(Row {
        name: name.module.clone(),
        role: Some(name.role.label()),
        block: name.block,
        dtype,
        shape: match name.role.is_norm() {
            true => vec![out],
            false if name.kernel.is_some() => name.stored_shape(),
            false => vec![out, width],
        },
        parameters: (out * width + bias) as u64,
        bytes,
        statistics,
    })
}
