//! Integer weight layouts of other tools, exactly: compressed-tensors `pack-quantized`, AutoAWQ
//! GEMM and GPTQ (v1 and v2), packed from and unpacked to one neutral [`QuantizedMatrix`], and the
//! `quantization_config` that announces them. How codes are chosen is left to the methods above.
//!
//! ```
//! use strata_store::packed::{Layout, QuantizedMatrix, pack};
//! // One row of eight 4-bit codes: AWQ and GPTQ order the nibbles of a word differently.
//! let matrix = QuantizedMatrix {
//!     bits: 4, group_size: 1, out_features: 8, in_features: 1,
//!     codes: vec![1, 2, 3, 4, 5, 6, 7, 8], scales: vec![1.0; 8], zeros: vec![8; 8],
//!     symmetric: true, group_index: None,
//! };
//! let tensors = pack(Layout::AutoAwq, "proj", &matrix)?;
//! let (name, _, shape, bytes) = &tensors[0];
//! assert_eq!((name.as_str(), &shape[..]), ("proj.qweight", &[1, 1][..]));
//! assert_eq!(bytes, &0x8642_7531_u32.to_le_bytes());
//! # Ok::<(), strata_store::Error>(())
//! ```

use std::fmt;

use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

mod awq;
mod bits;
mod compressed;
mod config;
mod fetch;
mod gptq;
pub mod own;
pub mod pyramid;
mod regex;
pub mod sparse;
#[cfg(test)]
mod tests;

pub use config::{QuantConfig, Scheme, config_json, parse_config};
pub use own::Stored;
pub use pyramid::{PyramidCode, PyramidMatrix};

/// A tensor ready to be written: name, type, shape, little-endian bytes.
pub type PackedTensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// A linear layer's weight `[out, in]` as integer codes with scales and zero points per group of
/// consecutive input columns: `w[o, k] = scale[o, g(k)] * (code[o, k] - zero[o, g(k)])` with
/// `g(k) = k / group_size`, or `group_index[k]`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedMatrix {
    /// Bits per code.
    pub bits: u8,
    /// Columns per group; `in_features` for one group per row.
    pub group_size: usize,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Codes, `[out, in]`, each below `2^bits`.
    pub codes: Vec<u8>,
    /// Scales, `[out, groups]`, representable in f16.
    pub scales: Vec<f32>,
    /// Zero points, `[out, groups]`, each below `2^bits`.
    pub zeros: Vec<u8>,
    /// Whether all zero points are `2^(bits-1)`.
    pub symmetric: bool,
    /// Group of each column, `[in]`, where groups are not consecutive columns.
    pub group_index: Option<Vec<u32>>,
}

impl QuantizedMatrix {
    /// Groups per row.
    pub fn groups(&self) -> usize {
        if self.group_size == 0 { 0 } else { self.in_features.div_ceil(self.group_size) }
    }

    /// The weights in f32, `[out, in]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let (width, groups) = (self.in_features, self.groups());
        let mut out = vec![0f32; self.codes.len()];
        if width == 0 || groups == 0 {
            return out;
        }
        out.par_chunks_mut(width)
            .zip(self.codes.par_chunks(width))
            .zip(self.scales.par_chunks(groups).zip(self.zeros.par_chunks(groups)))
            .with_min_len(16)
            .for_each(|((out, codes), (scales, zeros))| match &self.group_index {
                None => {
                    let rows = out.chunks_mut(self.group_size).zip(codes.chunks(self.group_size));
                    for ((out, codes), (scale, zero)) in rows.zip(scales.iter().zip(zeros)) {
                        let zero = i16::from(*zero);
                        for (o, code) in out.iter_mut().zip(codes) {
                            *o = f32::from(i16::from(*code) - zero) * scale;
                        }
                    }
                }
                Some(index) => {
                    for ((o, code), group) in out.iter_mut().zip(codes).zip(index) {
                        let group = *group as usize;
                        let scale = scales.get(group).copied().unwrap_or(0.0);
                        let zero = zeros.get(group).copied().unwrap_or(0);
                        *o = f32::from(i16::from(*code) - i16::from(zero)) * scale;
                    }
                }
            });
        out
    }

    /// Stored bits per weight: codes, an f16 scale and (if asymmetric) a zero point per group, and
    /// the group index if there is one.
    pub fn bits_per_weight(&self) -> f64 {
        let weights = (self.out_features * self.in_features) as f64;
        if weights == 0.0 {
            return 0.0;
        }
        let bits = f64::from(self.bits);
        let per_group = 16.0 + if self.symmetric { 0.0 } else { bits };
        let groups = (self.out_features * self.groups()) as f64;
        let index = if self.group_index.is_some() { 32.0 * self.in_features as f64 } else { 0.0 };
        bits + (groups * per_group + index) / weights
    }

    /// The zero point of a symmetric grid.
    pub fn middle(&self) -> u8 {
        1u8.checked_shl(u32::from(self.bits).saturating_sub(1)).unwrap_or(0)
    }

    /// Checks that all parts fit together.
    ///
    /// # Errors
    /// When a length, code, zero point, scale or group number is out of bounds.
    pub fn check(&self, module: &str) -> Result<()> {
        let bad = |reason: String| Err(Error::packed(module, reason));
        if !(1..=8).contains(&self.bits) {
            return bad(format!("{} bits; codes have 1 to 8", self.bits));
        }
        if self.group_size == 0 {
            return bad("the group size is 0".into());
        }
        let groups = self.groups();
        for (what, found, wanted) in [
            ("codes", self.codes.len(), self.out_features.checked_mul(self.in_features)),
            ("scales", self.scales.len(), self.out_features.checked_mul(groups)),
            ("zero points", self.zeros.len(), self.out_features.checked_mul(groups)),
        ] {
            if Some(found) != wanted {
                return bad(format!(
                    "{found} {what} for [{}, {}] in groups of {}",
                    self.out_features, self.in_features, self.group_size
                ));
            }
        }
        let top = (u16::from(self.middle()) * 2 - 1) as u8;
        // A maximum vectorises, an early exit does not.
        let largest = |codes: &[u8]| codes.par_chunks(1 << 16).map(max).max().unwrap_or(0);
        if largest(&self.codes) > top {
            return bad(format!("a code exceeds {top}, the largest of {} bits", self.bits));
        }
        if max(&self.zeros) > top {
            return bad(format!("a zero point exceeds {top}, the largest of {} bits", self.bits));
        }
        if self.symmetric && self.zeros.iter().any(|z| *z != self.middle()) {
            return bad(format!("symmetric, but not all zero points are {}", self.middle()));
        }
        if let Some(scale) = self.scales.iter().find(|s| !s.is_finite()) {
            return bad(format!("a scale is {scale}"));
        }
        if let Some(index) = &self.group_index {
            if index.len() != self.in_features {
                return bad(format!("{} group numbers for {}", index.len(), self.in_features));
            }
            if let Some(group) = index.iter().find(|g| **g as usize >= groups) {
                return bad(format!("group number {group} of {groups} groups"));
            }
        }
        Ok(())
    }
}

fn max(values: &[u8]) -> u8 {
    values.iter().fold(0, |m, v| m.max(*v))
}

/// A layout of quantised linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// compressed-tensors "pack-quantized": 1 to 8 bits, symmetric or asymmetric.
    CompressedTensors,
    /// AutoAWQ "GEMM": 4 bits.
    AutoAwq,
    /// GPTQ: 2, 3, 4 or 8 bits.
    Gptq {
        /// `gptq_v2` stores zero points as they are, v1 stores them minus one.
        v2: bool,
    },
    /// Strata's own container, see [`own`].
    Strata,
}

impl Layout {
    /// Name as on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::AutoAwq => "awq",
            Self::Gptq { v2: false } => "gptq",
            Self::Gptq { v2: true } => "gptq_v2",
            Self::Strata => "strata",
        }
    }

    /// Names of the tensors that may hold the codes, without the module.
    fn codes_leaves(self) -> &'static [&'static str] {
        match self {
            Self::CompressedTensors => &["weight_packed"],
            Self::AutoAwq | Self::Gptq { .. } => &["qweight"],
            Self::Strata => &["qweight", "pvq_index"],
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Packs a matrix; the tensors are named `module.qweight` and so on. A bias, if any, is stored by
/// the caller under its usual name.
///
/// # Errors
/// When the layout has no place for the matrix; the message says what would work.
pub fn pack(layout: Layout, module: &str, m: &QuantizedMatrix) -> Result<Vec<PackedTensor>> {
    check_packable(layout, module, m)?;
    m.check(module)?;
    match layout {
        Layout::CompressedTensors => compressed::pack(module, m),
        Layout::AutoAwq => awq::pack(module, m),
        Layout::Gptq { v2 } => gptq::pack(module, m, v2),
        Layout::Strata => own::pack(module, &Stored::Grid(m.clone()), Dtype::F16),
    }
}

/// Whether the layout can hold such a matrix, by shape and grid alone: usable before any work is
/// done (codes, scales and zero points may still be empty).
///
/// # Errors
/// As [`pack`].
pub fn check_packable(layout: Layout, module: &str, m: &QuantizedMatrix) -> Result<()> {
    let (rows, columns, group) = (m.out_features, m.in_features, m.group_size);
    let ragged = layout == Layout::Strata;
    if group == 0 || (columns % group != 0 && !ragged) {
        let reason = format!("in = {columns} is not a multiple of the group size {group}");
        return Err(Error::packed(module, reason).with_remedy(format!(
            "group sizes that work: {}; or write it dequantised",
            divisors(columns)
        )));
    }
    match layout {
        Layout::CompressedTensors => compressed::check(module, m),
        Layout::AutoAwq => awq::check(module, m),
        Layout::Gptq { .. } => gptq::check(module, m),
        Layout::Strata => Ok(()),
    }?;
    if rows == 0 || columns == 0 {
        return Err(Error::packed(module, format!("the shape [{rows}, {columns}] is empty")));
    }
    Ok(())
}

/// Bytes of the tensors that [`pack`] makes of such a matrix, by shape and grid alone.
pub fn stored_bytes(layout: Layout, m: &QuantizedMatrix) -> u64 {
    let (rows, columns, groups) = (m.out_features, m.in_features, m.groups());
    let words = |codes: usize| 4 * bits::words_for(codes, m.bits);
    let scales = 2 * rows * groups;
    let bytes = match layout {
        Layout::CompressedTensors => {
            let zeros = if m.symmetric { 0 } else { words(rows) * groups };
            rows * words(columns) + scales + zeros + 16
        }
        Layout::AutoAwq => columns * words(rows) + scales + groups * words(rows),
        Layout::Gptq { .. } => rows * words(columns) + scales + groups * words(rows) + 4 * columns,
        Layout::Strata => {
            let zeros = if m.symmetric { 0 } else { rows * words(groups) };
            let index = if m.group_index.is_some() { 4 * columns } else { 0 };
            rows * words(columns) + scales + zeros + index
        }
    };
    bytes as u64
}

/// The divisors of `n` from 8 up, for a message.
fn divisors(n: usize) -> String {
    let small = (1..=n.min(1 << 16)).filter(|d| *d >= 8 && n.is_multiple_of(*d));
    let list: Vec<String> = small.map(|d| d.to_string()).collect();
    match list.len() {
        0 => n.to_string(),
        1..=12 => list.join(", "),
        count => format!("{}, ..., {}", list[..8].join(", "), list[count - 1]),
    }
}

/// Reads a packed linear layer back.
///
/// # Errors
/// When tensors are missing, do not fit together, or the grid is not what the configuration says.
pub fn unpack(
    layout: Layout,
    checkpoint: &Checkpoint,
    module: &str,
    config: &QuantConfig,
) -> Result<QuantizedMatrix> {
    let matrix = match layout {
        Layout::CompressedTensors => compressed::unpack(checkpoint, module, config),
        Layout::AutoAwq => awq::unpack(checkpoint, module),
        Layout::Gptq { v2 } => gptq::unpack(checkpoint, module, config, v2),
        Layout::Strata => match load(checkpoint, module, config)? {
            Stored::Grid(matrix) => return Ok(matrix),
            other => {
                let reason =
                    format!("is stored as {}, not as a grid along the input", other.kind());
                return Err(Error::packed(module, reason));
            }
        },
    }?;
    matrix.check(module)?;
    Ok(matrix)
}

/// Reads a packed linear layer back, whatever its layout.
///
/// # Errors
/// As [`unpack`].
pub fn load(checkpoint: &Checkpoint, module: &str, config: &QuantConfig) -> Result<Stored> {
    if config.layout != Layout::Strata {
        return unpack(config.layout, checkpoint, module, config).map(Stored::Grid);
    }
    let description = config.modules.get(module).ok_or_else(|| {
        Error::packed(module, "has packed tensors but is not named in quantization_config")
    })?;
    own::unpack(checkpoint, module, description)
}

/// Whether `module` is stored in that layout.
pub fn is_packed(layout: Layout, checkpoint: &Checkpoint, module: &str) -> bool {
    layout.codes_leaves().iter().any(|leaf| checkpoint.contains(&format!("{module}.{leaf}")))
}

/// The modules stored in that layout, in the order of the checkpoint's names.
pub fn modules(layout: Layout, checkpoint: &Checkpoint) -> Vec<String> {
    let module = |name: &str| {
        let leaves = layout.codes_leaves();
        leaves.iter().find_map(|leaf| name.strip_suffix(leaf)?.strip_suffix('.').map(String::from))
    };
    checkpoint.names().filter_map(module).collect()
}
