//! What a layer is in the source of a conversion: ordinary weights, packed codes, ggml blocks.

use std::path::Path;

use nn::{Model, Name};
use store::gguf::decode_grid;
use store::packed::{QuantConfig, Stored, load, parse_config};
use store::{Checkpoint, Dtype, GgmlType};
use tensor::host;

use crate::Result;

/// The source of a conversion: a network that Strata knows, and how its layers are stored.
pub(super) struct Source {
    pub model: Model,
    pub config: Option<QuantConfig>,
}

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Ordinary numbers of this type.
    Dense(Dtype),
    /// ggml blocks.
    Blocks(GgmlType),
    /// A packed layout.
    Packed,
}

impl Source {
    pub fn open(path: &Path) -> Result<Self> {
        let model = Model::open(path)?;
        let config = parse_config(model.checkpoint.config()?)?;
        Ok(Self { model, config })
    }

    pub fn checkpoint(&self) -> &Checkpoint {
        &self.model.checkpoint
    }

    /// How `name` is stored.
    pub fn held(&self, name: &Name) -> Result<Held> {
        let checkpoint = self.checkpoint();
        if self.config.is_some() && !checkpoint.contains(&name.weight()) {
            return Ok(Held::Packed);
        }
        let dtype = checkpoint.info(&name.weight())?.dtype;
        Ok(match dtype {
            Dtype::Ggml(kind) => Held::Blocks(kind),
            dtype => Held::Dense(dtype),
        })
    }

    /// The packed form of a layer: as stored, or the grid that its blocks are. `None` for ordinary
    /// weights and for blocks that are no such grid.
    pub fn stored(&self, name: &Name) -> Result<Option<Stored>> {
        let checkpoint = self.checkpoint();
        match (self.held(name)?, &self.config) {
            (Held::Packed, Some(config)) => Ok(Some(load(checkpoint, &name.module, config)?)),
            (Held::Blocks(kind), _) if !name.transposed => {
                let [rows, columns] = name.shape;
                let weight = name.weight();
                let grid = decode_grid(kind, &checkpoint.bytes(&weight)?, rows, columns);
                checkpoint.release(&weight);
                Ok(grid.map(Stored::Grid))
            }
            _ => Ok(None),
        }
    }

    /// The values of a layer, `[out, in]`.
    pub fn values(&self, name: &Name) -> Result<Vec<f32>> {
        Ok(host::into_vec(self.model.weights.matrix(name)?))
    }

    /// What a layer is, for people: `gptq 4 bits, groups of 128`, `Q4_K`, `F16`.
    pub fn describe(&self, name: &Name) -> Result<String> {
        Ok(match (self.held(name)?, &self.config) {
            (Held::Dense(dtype), _) => dtype.name().into(),
            (Held::Blocks(kind), _) => kind.name().into(),
            (Held::Packed, Some(config)) => match self.stored(name)? {
                Some(stored) => format!("{} {}", config.layout, describe(&stored)),
                None => config.layout.name().into(),
            },
            (Held::Packed, None) => "packed".into(),
        })
    }
}

/// `4 bits, groups of 128`.
pub(super) fn describe(stored: &Stored) -> String {
    match (stored.bits(), stored.group_size()) {
        (Some(bits), Some(group)) => {
            let kind = if matches!(stored, Stored::Grid(_)) { "" } else { " along the output" };
            format!("{bits} bits, groups of {group}{kind}")
        }
        _ => stored.kind().into(),
    }
}

/// `[rows, columns]` to `[columns, rows]`.
pub(super) fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    let mut out = vec![0f32; values.len()];
    for (row, line) in values.chunks(columns.max(1)).enumerate() {
        for (column, value) in line.iter().enumerate() {
            if let Some(place) = out.get_mut(column * rows + row) {
                *place = *value;
            }
        }
    }
    out
}
