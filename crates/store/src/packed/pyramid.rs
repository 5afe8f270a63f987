//! Pyramid codes in Strata's own container: a linear layer as directions, lengths and norms.
//!
//! `P.pvq_index` u8 `[out, bytes]`: per row a little-endian stream of the indices of its groups, fields
//! of `index_bits`, filled up to a multiple of 8 bytes; `P.pvq_amp` u8 `[out, bytes]`: codes of lengths
//! in the same way, absent when they take no bits; `P.pvq_norm` f16 or f32 `[out]`. What an index means,
//! and the levels of lengths, follow from the description alone. Decoding is left to the engine.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::PackedTensor;
use super::fetch::{bad, expect_shape, matrix};
use crate::checkpoint::Checkpoint;
use crate::convert;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::TensorInfo;

/// How lengths are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AmpMode {
    /// Cells of equal probability under the Beta law, levels at their medians.
    BetaCdf,
    /// Lloyd-Max levels of the law.
    BetaLloyd,
    /// Cells of equal probability, levels at their means.
    BetaCond,
    /// Equal steps.
    Uniform,
    /// Equal ratios.
    Log,
    /// Half precision, 16 bits.
    Fp16,
}

/// Type in which norms of rows are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormType {
    /// Half precision.
    #[default]
    F16,
    /// Single precision.
    F32,
}

/// The orthogonal matrix that turned the input of a layer before coding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationInfo {
    /// Which matrix.
    pub kind: RotationType,
    /// Its order; it turns consecutive runs of that many inputs.
    pub order: usize,
    /// Seed of its random signs or entries.
    pub seed: u64,
}

/// Which orthogonal matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RotationType {
    /// Hadamard matrix with random signs.
    Hadamard,
    /// Random orthogonal matrix.
    Random,
}

/// The smaller last group of rows whose length is no multiple of the dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PyramidTail {
    /// Weights of the group.
    pub dimension: usize,
    /// Its pulses.
    pub pulses: usize,
    /// Bits of its index.
    pub index_bits: u32,
}

/// Everything that is needed to read the streams of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PyramidCode {
    /// `[out, in]` of the layer.
    pub shape: [usize; 2],
    /// Weights of a group, `D`.
    pub dimension: usize,
    /// Pulses of a group, `K`.
    pub pulses: usize,
    /// Bits of an index, `ceil(log2 N(D, K))`.
    pub index_bits: u32,
    /// The smaller last group, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<PyramidTail>,
    /// Bits of a length.
    pub amp_bits: u8,
    /// Rule of the levels of lengths.
    pub amp_mode: AmpMode,
    /// Code 0 is the length 0.
    #[serde(default)]
    pub amp_zero: bool,
    /// Type of the norms.
    #[serde(default)]
    pub norm: NormType,
    /// How the input was turned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<RotationInfo>,
}

/// Most bits of a length that is not half precision, and most pulses: what the engine can decode.
const MOST_AMP_BITS: u8 = 10;
const MOST_PULSES: usize = 4095;
const LARGEST_GROUP: usize = 4096;

/// Number of integer vectors of dimension `d` whose magnitudes sum to `k`; `None` beyond 128 bits.
/// (The engine has the tables; the container only has to know which indices exist.)
pub fn points(d: usize, k: usize) -> Option<u128> {
    let mut column = vec![1u128; d + 1];
    for _ in 0..k {
        let (mut diagonal, mut before) = (0u128, 0u128);
        for (n, value) in column.iter_mut().enumerate() {
            let old = *value;
            let next = if n == 0 { 0 } else { before.checked_add(old)?.checked_add(diagonal)? };
            (diagonal, before, *value) = (old, next, next);
        }
    }
    column.last().copied()
}

/// Bits of an index below `points`.
fn width_of(points: u128) -> u32 {
    128 - points.saturating_sub(1).leading_zeros()
}

/// `width` bits of a row's stream at `bit`.
fn field(row: &[u8], bit: usize, width: u32) -> u128 {
    let (byte, shift) = (bit / 8, (bit % 8) as u32);
    let rest = row.get(byte..).unwrap_or_default();
    let at = |i: usize| rest.get(i).copied().map_or(0, u128::from);
    let low = (0..16).fold(0u128, |value, i| value | at(i) << (8 * i)) >> shift;
    let high = if shift > 0 { at(16) << (128 - shift) } else { 0 };
    let value = low | high;
    if width < 128 { value & ((1u128 << width) - 1) } else { value }
}

impl PyramidCode {
    /// Whole groups of a row.
    pub fn whole_groups(&self) -> usize {
        self.shape[1].checked_div(self.dimension).unwrap_or(0)
    }

    /// Bits of the length of a group of `dimension` weights.
    fn bits_of_length(&self, dimension: usize) -> usize {
        match self.amp_mode {
            // The whole row: its length is the norm.
            _ if dimension == self.shape[1] => 0,
            AmpMode::Fp16 => 16,
            _ => usize::from(self.amp_bits),
        }
    }

    /// Bits of the indices of a row.
    pub fn row_index_bits(&self) -> usize {
        self.whole_groups() * self.index_bits as usize
            + self.tail.map_or(0, |t| t.index_bits as usize)
    }

    /// Bits of the lengths of a row.
    pub fn row_amp_bits(&self) -> usize {
        self.whole_groups() * self.bits_of_length(self.dimension)
            + self.tail.map_or(0, |t| self.bits_of_length(t.dimension))
    }

    fn norm_bits(&self) -> usize {
        match self.norm {
            NormType::F16 => 16,
            NormType::F32 => 32,
        }
    }

    /// Bits per weight: index, lengths, norm; a rotation is only a seed.
    pub fn bits_per_weight(&self) -> f64 {
        let bits = self.row_index_bits() + self.row_amp_bits() + self.norm_bits();
        bits as f64 / self.shape[1].max(1) as f64
    }

    /// As [`PyramidCode::bits_per_weight`], with the bytes that fill up rows.
    pub fn stored_bits_per_weight(&self) -> f64 {
        let bytes = row_bytes(self.row_index_bits()) + row_bytes(self.row_amp_bits());
        (8 * bytes + self.norm_bits()) as f64 / self.shape[1].max(1) as f64
    }

    /// What is wrong with the description itself.
    fn problem(&self) -> Option<String> {
        let [out, width] = self.shape;
        let groups = std::iter::once((self.dimension, self.pulses, self.index_bits));
        let tail = self.tail.map(|t| (t.dimension, t.pulses, t.index_bits));
        // Bits of a row must be countable.
        let sizes = 1..1usize << 31;
        if out == 0 || !sizes.contains(&width) || self.dimension == 0 || self.dimension > width {
            return Some(format!("groups of {} for {:?}", self.dimension, self.shape));
        }
        if width % self.dimension != self.tail.map_or(0, |t| t.dimension) {
            return Some(format!("groups of {} do not fill {width} inputs", self.dimension));
        }
        for (dimension, pulses, bits) in groups.chain(tail) {
            let sane =
                (1..=LARGEST_GROUP).contains(&dimension) && (1..=MOST_PULSES).contains(&pulses);
            let count = if sane { points(dimension, pulses) } else { None };
            let Some(count) = count else {
                return Some(format!("{pulses} pulses in groups of {dimension}"));
            };
            if width_of(count) != bits {
                return Some(format!(
                    "indices of {bits} bits, where {pulses} pulses in groups of {dimension} take {}",
                    width_of(count)
                ));
            }
        }
        if self.amp_mode != AmpMode::Fp16 && self.amp_bits > MOST_AMP_BITS {
            return Some(format!("lengths of {} bits", self.amp_bits));
        }
        if self.amp_zero && self.amp_bits == 0 && self.amp_mode != AmpMode::Fp16 {
            return Some("a code for the length 0, but no bits".into());
        }
        if let Some(rotation) = &self.rotation
            && (rotation.order == 0 || !width.is_multiple_of(rotation.order))
        {
            return Some(format!("a rotation of order {} for {width} inputs", rotation.order));
        }
        None
    }
}

/// Bytes of a row of `bits` bits.
fn row_bytes(bits: usize) -> usize {
    bits.div_ceil(64) * 8
}

/// A linear layer's weight `[out, in]` as pyramid codes.
#[derive(Debug, Clone, PartialEq)]
pub struct PyramidMatrix {
    /// How to read the streams.
    pub code: PyramidCode,
    /// Streams of indices, `[out, bytes]`.
    pub index: Vec<u8>,
    /// Streams of codes of lengths, `[out, bytes]`.
    pub amplitude: Vec<u8>,
    /// Norms of the rows, `[out]`, representable in the type of the description.
    pub norms: Vec<f32>,
}

/// Something wrong in one of the tensors.
struct Fault {
    leaf: &'static str,
    reason: String,
}

impl PyramidMatrix {
    /// Checks that all parts fit together and that every index exists.
    ///
    /// # Errors
    /// When a length does not fit, an index is out of range, or a norm is not finite.
    pub fn check(&self, module: &str) -> Result<()> {
        if let Some(reason) = self.code.problem() {
            return Err(Error::packed(module, format!("{reason}: no such pyramid code")));
        }
        match self.fault() {
            Some(fault) => Err(Error::packed(module, format!("{}: {}", fault.leaf, fault.reason))),
            None => Ok(()),
        }
    }

    /// The first fault in the tensors of a sound description.
    fn fault(&self) -> Option<Fault> {
        let fault = |leaf, reason| Some(Fault { leaf, reason });
        let out = self.code.shape[0];
        let index_row = row_bytes(self.code.row_index_bits());
        let amp_row = row_bytes(self.code.row_amp_bits());
        for (leaf, found, row) in [
            ("pvq_index", self.index.len(), index_row),
            ("pvq_amp", self.amplitude.len(), amp_row),
            ("pvq_norm", self.norms.len(), 1),
        ] {
            if Some(found) != out.checked_mul(row) {
                return fault(leaf, format!("{found} values for {:?}", self.code.shape));
            }
        }
        if let Some(row) = self.norms.iter().position(|n| !(n.is_finite() && *n >= 0.0)) {
            return fault("pvq_norm", format!("the norm of row {row} is {}", self.norms[row]));
        }
        let code = &self.code;
        let whole = code.whole_groups();
        let mut kinds = vec![(0..whole, 0, code.index_bits, points(code.dimension, code.pulses)?)];
        if let Some(tail) = code.tail {
            let bit = whole * code.index_bits as usize;
            let count = points(tail.dimension, tail.pulses)?;
            kinds.push((whole..whole + 1, bit, tail.index_bits, count));
        }
        for (groups, bit, width, count) in kinds {
            if count.is_power_of_two() {
                continue;
            }
            let first = groups.start;
            let bad =
                self.index.par_chunks(index_row).enumerate().find_map_first(|(row, bytes)| {
                    let index = |g: usize| field(bytes, bit + (g - first) * width as usize, width);
                    groups.clone().find(|&g| index(g) >= count).map(|g| (row, g, index(g)))
                });
            if let Some((row, group, index)) = bad {
                return fault(
                    "pvq_index",
                    format!(
                        "index {index} of group {group} in row {row} is not below {count}: the \
                         file is corrupt"
                    ),
                );
            }
        }
        if code.amp_mode == AmpMode::Fp16 && amp_row > 0 {
            let groups = code.row_amp_bits() / 16;
            let bad = self.amplitude.chunks(amp_row).enumerate().find_map(|(row, bytes)| {
                let codes = bytes.as_chunks::<2>().0.iter().take(groups);
                let length = |c: &[u8; 2]| half::f16::from_le_bytes(*c);
                codes
                    .map(length)
                    .position(|l| !(l.is_finite() && l >= half::f16::ZERO))
                    .map(|g| (row, g))
            });
            if let Some((row, group)) = bad {
                let reason = format!("the length of group {group} in row {row} is not a number");
                return fault("pvq_amp", reason);
            }
        }
        None
    }
}

/// The tensors of a layer that has been checked.
pub(super) fn pack(module: &str, m: &PyramidMatrix) -> Result<Vec<PackedTensor>> {
    let out = m.code.shape[0];
    let name = |leaf: &str| format!("{module}.{leaf}");
    let dtype = norm_dtype(&m.code);
    let norms = convert::from_f32(&m.norms, dtype).filter(|bytes| {
        convert::to_f32(dtype, bytes, m.norms.len()).as_deref() == Some(m.norms.as_slice())
    });
    let norms = norms.ok_or_else(|| {
        Error::packed(module, format!("a norm is not a number of {}", dtype.name()))
            .with_remedy("store norms in f32, or round them before coding")
    })?;
    let mut tensors =
        vec![(name("pvq_index"), Dtype::U8, vec![out, m.index.len() / out], m.index.clone())];
    if !m.amplitude.is_empty() {
        let shape = vec![out, m.amplitude.len() / out];
        tensors.push((name("pvq_amp"), Dtype::U8, shape, m.amplitude.clone()));
    }
    tensors.push((name("pvq_norm"), dtype, vec![out], norms));
    Ok(tensors)
}

fn norm_dtype(code: &PyramidCode) -> Dtype {
    match code.norm {
        NormType::F16 => Dtype::F16,
        NormType::F32 => Dtype::F32,
    }
}

/// Reads a layer back; everything in it has been checked.
pub(super) fn unpack(
    checkpoint: &Checkpoint,
    module: &str,
    code: &PyramidCode,
) -> Result<PyramidMatrix> {
    if let Some(reason) = code.problem() {
        let reason = format!("{reason} in quantization_config: no such pyramid code");
        return Err(Error::packed(module, reason));
    }
    let out = code.shape[0];
    let stream = |leaf: &str, bits: usize| -> Result<Vec<u8>> {
        let (info, _) = matrix(checkpoint, module, leaf)?;
        expect_type(info, Dtype::U8)?;
        expect_shape(info, [out, row_bytes(bits)], "quantization_config")?;
        Ok(checkpoint.bytes(&info.name)?.to_vec())
    };
    let index = stream("pvq_index", code.row_index_bits())?;
    let amplitude = match code.row_amp_bits() {
        0 => Vec::new(),
        bits => stream("pvq_amp", bits)?,
    };
    let info = checkpoint.info(&format!("{module}.pvq_norm"))?;
    expect_type(info, norm_dtype(code))?;
    if info.shape != [out] {
        let reason = format!("has the shape {:?}; {out} rows need [{out}]", info.shape);
        return Err(bad(info, reason));
    }
    let norms = checkpoint.f32(&info.name)?;
    let m = PyramidMatrix { code: code.clone(), index, amplitude, norms };
    match m.fault() {
        Some(fault) => {
            Err(bad(checkpoint.info(&format!("{module}.{}", fault.leaf))?, fault.reason))
        }
        None => Ok(m),
    }
}

fn expect_type(info: &TensorInfo, dtype: Dtype) -> Result<()> {
    if info.dtype == dtype {
        return Ok(());
    }
    Err(bad(info, format!("is {}, where {dtype} is needed", info.dtype)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::own::{Module, Modules, Stored, config_json, describe};
    use crate::{WriteOptions, Writer};
    use serde_json::json;

    fn code(out: usize, width: usize) -> PyramidCode {
        PyramidCode {
            shape: [out, width],
            dimension: 16,
            pulses: 27,
            index_bits: 48,
            tail: (width % 16 == 12).then_some(PyramidTail {
                dimension: 12,
                pulses: 20,
                index_bits: 35,
            }),
            amp_bits: 4,
            amp_mode: AmpMode::BetaLloyd,
            amp_zero: false,
            norm: NormType::F16,
            rotation: Some(RotationInfo { kind: RotationType::Hadamard, order: 4, seed: u64::MAX }),
        }
    }

    fn sample(code: PyramidCode) -> PyramidMatrix {
        let out = code.shape[0];
        let (index_row, amp_row) =
            (row_bytes(code.row_index_bits()), row_bytes(code.row_amp_bits()));
        // Small bytes keep every index in range.
        let bytes = |n: usize| (0..n).map(|i| (i % 3) as u8).collect::<Vec<u8>>();
        let mut m = PyramidMatrix {
            index: bytes(out * index_row),
            amplitude: bytes(out * amp_row),
            norms: (0..out).map(|i| 0.5 * i as f32).collect(),
            code,
        };
        if m.code.amp_mode == AmpMode::Fp16 {
            m.amplitude.iter_mut().for_each(|b| *b = 0x24);
        }
        m
    }

    fn write(m: &PyramidMatrix) -> (tempfile::TempDir, Checkpoint, Modules) {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let mut writer = Writer::create(&out, WriteOptions::default()).unwrap();
        for (name, dtype, shape, bytes) in pack("p", m).unwrap() {
            writer.add(&name, dtype, &shape, &bytes).unwrap();
        }
        let modules = Modules::from([("p".into(), describe(&Stored::Pyramid(m.clone())))]);
        let config = json!({ "quantization_config": config_json(&modules) });
        writer.put_json("config.json", &config).unwrap();
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        (directory, checkpoint, modules)
    }

    #[test]
    fn counts_and_rates() {
        assert_eq!((points(4, 4), points(16, 8)), (Some(192), Some(30_316_544)));
        assert_eq!((width_of(192), width_of(256), width_of(1)), (8, 8, 0));
        assert_eq!(points(64, 200), None);
        // 48 + 4 bits for 16 weights, and a norm for the row.
        let m = code(3, 128);
        assert_eq!(m.bits_per_weight(), 52.0 / 16.0 + 16.0 / 128.0);
        // 32 bits of lengths take a whole word of 64.
        assert_eq!(m.stored_bits_per_weight(), m.bits_per_weight() + 32.0 / 128.0);
        let single = PyramidCode { norm: NormType::F32, tail: None, ..code(3, 16) };
        assert_eq!(single.bits_per_weight(), 5.0, "one group: no bits for its length");
    }

    #[test]
    fn layers_come_back_as_they_were() {
        for code in [
            code(5, 128),
            code(5, 172),
            PyramidCode { amp_bits: 0, rotation: None, ..code(3, 64) },
            PyramidCode { amp_mode: AmpMode::Fp16, norm: NormType::F32, ..code(3, 64) },
            PyramidCode { amp_zero: true, amp_mode: AmpMode::BetaCdf, ..code(1, 32) },
        ] {
            let m = sample(code);
            m.check("p").unwrap();
            let (_directory, checkpoint, modules) = write(&m);
            let config =
                crate::packed::parse_config(checkpoint.config().unwrap()).unwrap().unwrap();
            assert_eq!(config.modules, modules, "description through JSON");
            assert!(crate::packed::is_packed(config.layout, &checkpoint, "p"));
            let back = crate::packed::load(&checkpoint, "p", &config).unwrap();
            assert_eq!(back, Stored::Pyramid(m));
        }
    }

    #[test]
    fn damage_is_found_and_named() {
        let m = sample(code(5, 172));
        let mut large = m.clone();
        let row = row_bytes(m.code.row_index_bits());
        large.index[3 * row + 12..3 * row + 18].fill(0xFF);
        let error = large.check("p").unwrap_err().to_string();
        assert!(error.contains("group 2 in row 3") && error.contains("corrupt"), "{error}");
        let (_directory, checkpoint, _) = write(&large);
        let error = unpack(&checkpoint, "p", &m.code).unwrap_err().to_string();
        assert!(error.contains("p.pvq_index") && error.contains("safetensors"), "{error}");
        // The last group has bounds of its own.
        let mut tail = m.clone();
        let bit = 10 * 48;
        tail.index[bit / 8..bit / 8 + 4].fill(0xFF);
        tail.index[bit / 8 + 4] = 0x0F;
        assert!(tail.check("p").unwrap_err().to_string().contains("group 10 in row 0"));
        for norm in [f32::NAN, f32::INFINITY, -1.0] {
            let mut bad = m.clone();
            bad.norms[2] = norm;
            assert!(bad.check("p").unwrap_err().to_string().contains("row 2"));
        }
        let mut short = m.clone();
        short.amplitude.pop();
        assert!(short.check("p").unwrap_err().to_string().contains("pvq_amp"));
        let mut half = sample(PyramidCode { amp_mode: AmpMode::Fp16, ..code(2, 64) });
        half.amplitude[2..4].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        assert!(half.check("p").unwrap_err().to_string().contains("group 1 in row 0"));
        let mut precise = m.clone();
        precise.norms[1] = 1.0 + 1e-5;
        assert!(pack("p", &precise).unwrap_err().to_string().contains("f32"));
    }

    #[test]
    fn descriptions_are_checked_before_tensors() {
        let m = sample(code(5, 128));
        let (_directory, checkpoint, modules) = write(&m);
        let good = match &modules["p"] {
            Module::Pyramid(code) => code.clone(),
            other => panic!("{other:?}"),
        };
        for wrong in [
            PyramidCode { shape: [0, 128], ..good.clone() },
            PyramidCode { shape: [5, usize::MAX / 16 * 16], ..good.clone() },
            PyramidCode { dimension: 0, ..good.clone() },
            PyramidCode { dimension: 24, ..good.clone() },
            PyramidCode { pulses: 26, ..good.clone() },
            PyramidCode { pulses: 1 << 40, ..good.clone() },
            PyramidCode { pulses: 4000, ..good.clone() },
            PyramidCode { index_bits: 128, ..good.clone() },
            PyramidCode { amp_bits: 200, ..good.clone() },
            PyramidCode { amp_bits: 0, amp_zero: true, ..good.clone() },
            PyramidCode {
                rotation: Some(RotationInfo { kind: RotationType::Random, order: 0, seed: 1 }),
                ..good.clone()
            },
        ] {
            let error = unpack(&checkpoint, "p", &wrong).unwrap_err().to_string();
            assert!(error.contains("no such pyramid code"), "{error}");
        }
        // Sound descriptions of other tensors.
        for wrong in [
            PyramidCode { shape: [6, 128], ..good.clone() },
            PyramidCode { shape: [5, 256], ..good.clone() },
            PyramidCode { amp_bits: 9, ..good.clone() },
            PyramidCode { norm: NormType::F32, ..good.clone() },
        ] {
            let error = unpack(&checkpoint, "p", &wrong).unwrap_err().to_string();
            assert!(error.contains("p.pvq_"), "{error}");
        }
    }
}
