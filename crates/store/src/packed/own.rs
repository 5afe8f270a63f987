//! Strata's own container: what no other tool's layout holds, e.g. groups along the output.
//!
//! `config.json` names every packed module with what it is:
//!
//! ```json
//! "quantization_config": { "quant_method": "strata", "version": 1, "modules": {
//!   "model.layers.0.mlp.down_proj":
//!     { "kind": "columns", "shape": [64, 192], "bits": 3, "group_size": 32, "symmetric": false } } }
//! ```
//!
//! Integer grids are stored row by row, `rows` being the outputs of a `grid` and the inputs of
//! `columns`: `P.qweight` i32 `[rows, words]`, codes dense in natural order, every row padded to
//! whole words; `P.scales` f16 or bf16 `[rows, groups]`; `P.qzeros` i32 `[rows, words]`, packed like
//! the codes, absent for symmetric grids; `P.g_idx` i32 `[in]` where groups are not consecutive.
//! Pyramid codes are described in [`super::pyramid`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::bits::{pack_rows, unpack_rows, words_for, words_to_bytes};
use super::fetch::{expect_shape, matrix, words};
use super::pyramid::{self, PyramidCode, PyramidMatrix};
use super::{PackedTensor, QuantizedMatrix};
use crate::checkpoint::Checkpoint;
use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The version of the container that is written, and the newest that is read.
const VERSION: u64 = 1;

/// What a compressed linear layer is stored as.
#[derive(Debug, Clone, PartialEq)]
pub enum Stored {
    /// An integer grid with groups along the input.
    Grid(QuantizedMatrix),
    /// An integer grid with groups along the output inside one input channel: the grid of the
    /// transposed weight, `[in, out]`.
    Columns(QuantizedMatrix),
    /// Directions on a pyramid lattice with lengths.
    Pyramid(PyramidMatrix),
}

impl Stored {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Grid(m) => [m.out_features, m.in_features],
            Self::Columns(m) => [m.in_features, m.out_features],
            Self::Pyramid(m) => m.code.shape,
        }
    }

    /// Stored bits per weight, side information included.
    pub fn bits_per_weight(&self) -> f64 {
        match self {
            Self::Grid(m) | Self::Columns(m) => m.bits_per_weight(),
            Self::Pyramid(m) => m.code.bits_per_weight(),
        }
    }

    /// Bits per code, where there are codes of a fixed width for every weight.
    pub fn bits(&self) -> Option<u8> {
        match self {
            Self::Grid(m) | Self::Columns(m) => Some(m.bits),
            Self::Pyramid(_) => None,
        }
    }

    /// Weights per scale.
    pub fn group_size(&self) -> Option<usize> {
        match self {
            Self::Grid(m) | Self::Columns(m) => Some(m.group_size),
            Self::Pyramid(m) => Some(m.code.dimension),
        }
    }

    /// Name of the kind, as in `config.json`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Grid(_) => "grid",
            Self::Columns(_) => "columns",
            Self::Pyramid(_) => "pyramid",
        }
    }

    /// Checks that all parts fit together.
    ///
    /// # Errors
    /// When a length, code, zero point, scale or group number is out of bounds.
    pub fn check(&self, module: &str) -> Result<()> {
        match self {
            Self::Grid(m) | Self::Columns(m) => m.check(module),
            Self::Pyramid(m) => m.check(module),
        }
    }
}

/// What `config.json` says about one module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Module {
    /// See [`Stored::Grid`].
    Grid(Grid),
    /// See [`Stored::Columns`].
    Columns(Grid),
    /// See [`Stored::Pyramid`].
    Pyramid(PyramidCode),
}

/// The description of an integer grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    /// `[out, in]` of the layer.
    pub shape: [usize; 2],
    /// Bits per code.
    pub bits: u8,
    /// Weights per scale.
    pub group_size: usize,
    /// Whether the zero point is the middle of the grid.
    pub symmetric: bool,
}

/// The modules of a checkpoint, by name.
pub type Modules = BTreeMap<String, Module>;

/// What has to be known about `stored` to read it back.
pub fn describe(stored: &Stored) -> Module {
    let grid = |m: &QuantizedMatrix| Grid {
        shape: stored.shape(),
        bits: m.bits,
        group_size: m.group_size,
        symmetric: m.symmetric,
    };
    match stored {
        Stored::Grid(m) => Module::Grid(grid(m)),
        Stored::Columns(m) => Module::Columns(grid(m)),
        Stored::Pyramid(m) => Module::Pyramid(m.code.clone()),
    }
}

/// The tensors of a module; scales are stored as `scale_type` (f16 or bf16).
///
/// # Errors
/// When the parts do not fit together, or a scale is not a number of `scale_type`.
pub fn pack(module: &str, stored: &Stored, scale_type: Dtype) -> Result<Vec<PackedTensor>> {
    stored.check(module)?;
    match stored {
        Stored::Grid(m) | Stored::Columns(m) => pack_grid(module, m, scale_type),
        Stored::Pyramid(m) => pyramid::pack(module, m),
    }
}

fn pack_grid(module: &str, m: &QuantizedMatrix, scale_type: Dtype) -> Result<Vec<PackedTensor>> {
    let (rows, width, groups) = (m.out_features, m.in_features, m.groups());
    let name = |leaf: &str| format!("{module}.{leaf}");
    let codes = pack_rows(&m.codes, width, m.bits);
    let scales = convert::from_f32(&m.scales, scale_type).filter(|bytes| {
        convert::to_f32(scale_type, bytes, m.scales.len()).as_ref() == Some(&m.scales)
    });
    let scales = scales.ok_or_else(|| {
        Error::packed(module, format!("a scale is not a number of {}", scale_type.name()))
            .with_remedy("round scales to the stored type before choosing codes")
    })?;
    let mut tensors = vec![
        (name("qweight"), Dtype::I32, vec![rows, words_for(width, m.bits)], words_to_bytes(&codes)),
        (name("scales"), scale_type, vec![rows, groups], scales),
    ];
    if !m.symmetric {
        let zeros = words_to_bytes(&pack_rows(&m.zeros, groups, m.bits));
        let shape = vec![rows, words_for(groups, m.bits)];
        tensors.push((name("qzeros"), Dtype::I32, shape, zeros));
    }
    if let Some(index) = &m.group_index {
        tensors.push((name("g_idx"), Dtype::I32, vec![width], words_to_bytes(index)));
    }
    Ok(tensors)
}

/// Reads a module back.
///
/// # Errors
/// When tensors are missing, do not fit together, or are not what `description` says.
pub fn unpack(checkpoint: &Checkpoint, module: &str, description: &Module) -> Result<Stored> {
    let stored = match description {
        Module::Grid(grid) => Stored::Grid(unpack_grid(checkpoint, module, grid, grid.shape)?),
        Module::Columns(grid) => {
            let [out, width] = grid.shape;
            Stored::Columns(unpack_grid(checkpoint, module, grid, [width, out])?)
        }
        // Checked while it was read, with the names of its tensors.
        Module::Pyramid(code) => {
            return Ok(Stored::Pyramid(pyramid::unpack(checkpoint, module, code)?));
        }
    };
    stored.check(module)?;
    Ok(stored)
}

fn unpack_grid(
    checkpoint: &Checkpoint,
    module: &str,
    grid: &Grid,
    [rows, width]: [usize; 2],
) -> Result<QuantizedMatrix> {
    let bits = grid.bits;
    if !(1..=8).contains(&bits) || grid.group_size == 0 || rows == 0 || width == 0 {
        let reason = format!("{grid:?} in quantization_config is no grid");
        return Err(Error::packed(module, reason));
    }
    let groups = width.div_ceil(grid.group_size);
    let why = "quantization_config";
    let packed = |leaf: &str, count: usize| -> Result<Vec<u8>> {
        let (info, _) = matrix(checkpoint, module, leaf)?;
        expect_shape(info, [rows, words_for(count, bits)], why)?;
        Ok(unpack_rows(&words(checkpoint, info)?, count, bits))
    };
    let codes = packed("qweight", width)?;
    let (scales, _) = matrix(checkpoint, module, "scales")?;
    expect_shape(scales, [rows, groups], why)?;
    let middle = 1u8.checked_shl(u32::from(bits) - 1).unwrap_or(0);
    let zeros =
        if grid.symmetric { vec![middle; rows * groups] } else { packed("qzeros", groups)? };
    let index = format!("{module}.g_idx");
    let group_index = if checkpoint.contains(&index) {
        // Negative numbers become large ones, which the final check refuses.
        Some(checkpoint.i32(&index)?.into_iter().map(|g| g as u32).collect())
    } else {
        None
    };
    Ok(QuantizedMatrix {
        bits,
        group_size: grid.group_size,
        out_features: rows,
        in_features: width,
        codes,
        scales: checkpoint.f32(&scales.name)?,
        zeros,
        symmetric: grid.symmetric,
        group_index,
    })
}

/// The `quantization_config` object.
pub fn config_json(modules: &Modules) -> Value {
    json!({ "quant_method": "strata", "version": VERSION, "modules": modules })
}

/// Reads the `quantization_config` object.
pub(super) fn parse(value: &Value) -> Result<Modules> {
    let version = value.get("version").and_then(Value::as_u64).unwrap_or(0);
    if version == 0 || version > VERSION {
        let reason = format!("container version {version}; this program reads up to {VERSION}");
        return Err(Error::config(reason).with_remedy("use a newer strata"));
    }
    let modules = value.get("modules").cloned().unwrap_or_default();
    serde_json::from_value(modules)
        .map_err(|e| Error::config(format!("\"modules\" of quantization_config: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{WriteOptions, Writer};

    fn matrix(rows: usize, width: usize, bits: u8, symmetric: bool) -> QuantizedMatrix {
        let group_size = 5;
        let groups = width.div_ceil(group_size);
        let top = 1usize << bits;
        let zeros = if symmetric {
            vec![(top / 2) as u8; rows * groups]
        } else {
            (0..rows * groups).map(|i| (i * 3 % top) as u8).collect()
        };
        QuantizedMatrix {
            bits,
            group_size,
            out_features: rows,
            in_features: width,
            codes: (0..rows * width).map(|i| (i * 7 % top) as u8).collect(),
            scales: (0..rows * groups).map(|i| 0.25 * (i + 1) as f32).collect(),
            zeros,
            symmetric,
            group_index: None,
        }
    }

    #[test]
    fn both_kinds_come_back_as_they_were() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let mut writer = Writer::create(&out, WriteOptions::default()).unwrap();
        let mut modules = Modules::new();
        let mut originals = Vec::new();
        for bits in [2, 3, 4, 5, 8] {
            // Ragged last groups and rows that end inside a word.
            let grid = Stored::Grid(matrix(4, 13, bits, bits == 4));
            let columns = Stored::Columns(matrix(13, 4, bits, false));
            for stored in [grid, columns] {
                let name = format!("m{bits}.{}", stored.kind());
                for (tensor, dtype, shape, bytes) in pack(&name, &stored, Dtype::F16).unwrap() {
                    writer.add(&tensor, dtype, &shape, &bytes).unwrap();
                }
                modules.insert(name.clone(), describe(&stored));
                originals.push((name, stored));
            }
        }
        let config = json!({ "quantization_config": config_json(&modules) });
        writer.put_json("config.json", &config).unwrap();
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let config = crate::packed::parse_config(checkpoint.config().unwrap()).unwrap().unwrap();
        assert_eq!(config.modules, modules);
        for (name, stored) in originals {
            assert_eq!(stored.shape(), [4, 13]);
            assert_eq!(crate::packed::load(&checkpoint, &name, &config).unwrap(), stored);
        }
        let stray = crate::packed::load(&checkpoint, "other", &config).unwrap_err().to_string();
        assert!(stray.contains("other"), "{stray}");
        // A description that does not fit the tensors is refused, naming the tensor.
        let mut wrong = modules["m3.grid"].clone();
        let Module::Grid(grid) = &mut wrong else { unreachable!() };
        grid.bits = 8;
        let error = unpack(&checkpoint, "m3.grid", &wrong).unwrap_err().to_string();
        assert!(error.contains("m3.grid.qweight"), "{error}");
    }

    #[test]
    fn newer_containers_are_refused() {
        let newer = json!({"quant_method": "strata", "version": VERSION + 1, "modules": {}});
        assert!(parse(&newer).unwrap_err().to_string().contains("newer"));
    }
}
