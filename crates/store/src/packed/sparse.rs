//! Sparse layouts of compressed-tensors: a matrix as the values that are not zero and one bit per
//! weight that says where they stand. `sparse-bitmask` holds any pattern, `sparse-24-bitmask` two
//! values in every four consecutive input columns.
//!
//! A checkpoint is read back as if the matrices were dense ([`merge`]), so that nothing above has to
//! know. Which weights are zero is left to the methods that prune.
//!
//! Beside a module's name stand `shape` int64 (`[2]`; `[2, 1]` for 2:4), `compressed` (the kept values in row-major
//! order, 1-D; `[out, in/2]` for 2:4), `bitmask` uint8 `[out, ceil(in/8)]` (least significant bit
//! first, set = kept) and, for `sparse-bitmask`, `row_offsets` int64 `[out]` (kept values before
//! each row).

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Value, json};

use super::PackedTensor;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::{Entry, Source, TensorInfo};

/// A sparse layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SparseLayout {
    /// `sparse-bitmask`: zeros anywhere.
    Bitmask,
    /// `sparse-24-bitmask`: at least two zeros in every aligned group of four columns.
    TwoFour,
}

impl SparseLayout {
    /// The format's name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bitmask => "sparse-bitmask",
            Self::TwoFour => "sparse-24-bitmask",
        }
    }

    /// The layout of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Bitmask, Self::TwoFour].into_iter().find(|layout| layout.name() == name)
    }

    /// The `sparsity_structure` that goes with it.
    pub fn structure(self) -> &'static str {
        match self {
            Self::Bitmask => "unstructured",
            Self::TwoFour => "2:4",
        }
    }
}

impl fmt::Display for SparseLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The `quantization_config` object of a checkpoint whose `Linear` modules are stored sparse,
/// except the `ignored` ones. `global_sparsity` is the share of zeros among the sparse modules'
/// weights, 0 to 1.
pub fn config_json(layout: SparseLayout, global_sparsity: f64, ignored: &[String]) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": layout.name(),
            "global_sparsity": global_sparsity,
            "ignore": ignored,
            "sparsity_structure": layout.structure(),
            "targets": ["Linear"],
        },
    })
}

/// The sparse layout that a `config.json` (given whole) announces, if any.
pub fn layout_of(config: &Value) -> Option<SparseLayout> {
    let quantised = ["quantization_config", "compression_config"];
    let found = quantised.iter().find_map(|key| config.get(key))?.get("sparsity_config")?;
    SparseLayout::parse(found.get("format")?.as_str()?)
}

/// Bytes per element of the types that can be stored sparse.
fn element_size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

/// Whether a little-endian IEEE value is zero (of either sign).
fn is_zero(element: &[u8]) -> bool {
    match element.split_last() {
        Some((top, rest)) => top & 0x7f == 0 && rest.iter().all(|b| *b == 0),
        None => true,
    }
}

/// Stores a matrix `[out, in]` (`bytes`: row-major, little-endian, F32, F16 or BF16) sparse, under
/// `module.compressed` and so on. Negative zeros come back as zeros.
///
/// # Errors
/// When the type has no place here, the sizes do not fit, or (2:4) a group of four columns has more
/// than two values; the message names it.
pub fn pack(
    layout: SparseLayout,
    module: &str,
    dtype: Dtype,
    shape: [usize; 2],
    bytes: &[u8],
) -> Result<Vec<PackedTensor>> {
    let bad = |reason: String| Error::packed(module, reason);
    let size = element_size(dtype).ok_or_else(|| {
        bad(format!("{layout} holds F32, F16 and BF16 values, not {dtype}"))
            .with_remedy("write it dense")
    })?;
    let [rows, columns] = shape;
    let width = columns.checked_mul(size).ok_or_else(|| bad(format!("the shape {shape:?}")))?;
    if rows == 0 || columns == 0 || rows.checked_mul(width) != Some(bytes.len()) {
        return Err(bad(format!("{} bytes given for {dtype} of shape {shape:?}", bytes.len())));
    }
    if layout == SparseLayout::TwoFour && columns % 4 != 0 {
        return Err(bad(format!("2:4 needs whole groups of four columns; there are {columns}"))
            .with_remedy("write sparse-bitmask"));
    }
    let packed: Vec<(Vec<u8>, Vec<u8>)> = bytes
        .par_chunks(width)
        .enumerate()
        .with_min_len(16)
        .map(|(row, line)| {
            let kept: Vec<bool> = line.chunks_exact(size).map(|e| !is_zero(e)).collect();
            let kept = match layout {
                SparseLayout::Bitmask => kept,
                SparseLayout::TwoFour => two_of_four(kept).map_err(|group| {
                    bad(format!(
                        "row {row}, columns {} to {} hold more than two values, which 2:4 does \
                         not allow",
                        4 * group,
                        4 * group + 3
                    ))
                    .with_remedy("prune with the pattern 2:4, or write sparse-bitmask")
                })?,
            };
            let mut values = Vec::new();
            let mut mask = vec![0u8; columns.div_ceil(8)];
            for (column, (element, _)) in
                line.chunks_exact(size).zip(&kept).enumerate().filter(|(_, (_, kept))| **kept)
            {
                values.extend_from_slice(element);
                mask[column / 8] |= 1 << (column % 8);
            }
            Ok((values, mask))
        })
        .collect::<Result<_>>()?;
    let mut values = Vec::new();
    let mut mask = Vec::new();
    let mut offsets = Vec::with_capacity(rows * 8);
    for (row_values, row_mask) in packed {
        offsets.extend(((values.len() / size) as i64).to_le_bytes());
        values.extend(row_values);
        mask.extend(row_mask);
    }
    let name = |leaf: &str| format!("{module}.{leaf}");
    let dimensions = [rows as i64, columns as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
    let (kept_shape, shape_shape) = match layout {
        SparseLayout::Bitmask => (vec![values.len() / size], vec![2]),
        SparseLayout::TwoFour => (vec![rows, columns / 2], vec![2, 1]),
    };
    let mut tensors = vec![
        (name("shape"), Dtype::I64, shape_shape, dimensions),
        (name("compressed"), dtype, kept_shape, values),
        (name("bitmask"), Dtype::U8, vec![rows, columns.div_ceil(8)], mask),
    ];
    if layout == SparseLayout::Bitmask {
        tensors.push((name("row_offsets"), Dtype::I64, vec![rows], offsets));
    }
    Ok(tensors)
}

/// Exactly two kept columns in every group of four: genuine zeros fill up groups with fewer values.
/// The error is the group that has more.
fn two_of_four(mut kept: Vec<bool>) -> std::result::Result<Vec<bool>, usize> {
    for (group, four) in kept.chunks_mut(4).enumerate() {
        let count = four.iter().filter(|kept| **kept).count();
        let Some(missing) = 2usize.checked_sub(count) else { return Err(group) };
        four.iter_mut().filter(|kept| !**kept).take(missing).for_each(|place| *place = true);
    }
    Ok(kept)
}

/// The stored parts of a sparse matrix.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// Type of the values: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// The kept values, row-major.
    pub compressed: &'a [u8],
    /// One bit per weight, `[rows, ceil(columns / 8)]`.
    pub bitmask: &'a [u8],
    /// Kept values before each row (little-endian int64), where the layout has them.
    pub row_offsets: Option<&'a [u8]>,
}

/// The dense matrix, row-major and little-endian.
///
/// # Errors
/// The reason, when the parts do not fit together.
pub fn unpack(parts: &Parts<'_>) -> std::result::Result<Vec<u8>, String> {
    let [rows, columns] = parts.shape;
    let size = element_size(parts.dtype).ok_or_else(|| format!("{} values", parts.dtype))?;
    let mask_width = columns.div_ceil(8);
    let total = rows.checked_mul(columns).and_then(|n| n.checked_mul(size));
    let (Some(total), true) = (total, rows > 0 && columns > 0) else {
        return Err(format!("the shape {:?} is impossible", parts.shape));
    };
    if rows.checked_mul(mask_width) != Some(parts.bitmask.len()) {
        return Err(format!(
            "{} bytes of bitmask for {rows} rows of {columns} columns",
            parts.bitmask.len()
        ));
    }
    let mut starts = Vec::with_capacity(rows);
    let mut at = 0usize;
    for mask in parts.bitmask.chunks_exact(mask_width) {
        if columns % 8 != 0 && mask.last().is_some_and(|last| last >> (columns % 8) != 0) {
            return Err(format!("the bitmask keeps columns beyond the last, {}", columns - 1));
        }
        starts.push(at);
        at += mask.iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
    }
    if at.checked_mul(size) != Some(parts.compressed.len()) {
        return Err(format!(
            "the bitmask keeps {at} values, but {} are stored",
            parts.compressed.len() / size
        ));
    }
    if let Some(offsets) = parts.row_offsets {
        let (offsets, rest) = offsets.as_chunks::<8>();
        let same = rest.is_empty()
            && offsets.len() == rows
            && offsets.iter().zip(&starts).all(|(b, at)| i64::from_le_bytes(*b) == *at as i64);
        if !same {
            return Err("row_offsets do not agree with the bitmask".into());
        }
    }
    let mut dense = vec![0u8; total];
    dense
        .par_chunks_mut(columns * size)
        .zip(parts.bitmask.par_chunks(mask_width).zip(&starts))
        .with_min_len(16)
        .for_each(|(row, (mask, start))| {
            let mut values = parts.compressed[start * size..].chunks_exact(size);
            for (column, element) in row.chunks_exact_mut(size).enumerate() {
                if mask[column / 8] >> (column % 8) & 1 == 1
                    && let Some(value) = values.next()
                {
                    element.copy_from_slice(value);
                }
            }
        });
    Ok(dense)
}

/// Replaces the parts of every sparse module by one entry `module.weight` that is unpacked when it
/// is read. The second value maps the names of these entries to the bytes that they take on disk.
///
/// # Errors
/// When the parts of a module do not have types and shapes that can belong together.
pub(crate) fn merge(mut entries: Vec<Entry>) -> Result<(Vec<Entry>, HashMap<String, u64>)> {
    let modules: Vec<String> = entries
        .iter()
        .filter(|e| e.info.dtype == Dtype::U8)
        .filter_map(|e| e.info.name.strip_suffix(".bitmask").map(String::from))
        .collect();
    let mut stored = HashMap::new();
    if modules.is_empty() {
        return Ok((entries, stored));
    }
    let mut parts: HashMap<String, Entry> = HashMap::new();
    let is_part = |name: &str| {
        let split = name.rsplit_once('.');
        split.is_some_and(|(_, leaf)| {
            ["shape", "compressed", "bitmask", "row_offsets"].contains(&leaf)
        })
    };
    for entry in entries.iter().filter(|e| is_part(&e.info.name)) {
        parts.insert(entry.info.name.clone(), entry.clone());
    }
    let mut gone: Vec<String> = Vec::new();
    for module in modules {
        let part = |leaf: &str| parts.get(&format!("{module}.{leaf}"));
        let (Some(shape), Some(compressed), Some(bitmask)) =
            (part("shape"), part("compressed"), part("bitmask"))
        else {
            // Some other tensor of that name.
            continue;
        };
        let offsets = part("row_offsets");
        let entry = assemble(&module, shape, compressed, bitmask, offsets)?;
        let members = [Some(shape), Some(compressed), Some(bitmask), offsets];
        let members: Vec<&Entry> = members.into_iter().flatten().collect();
        stored.insert(entry.info.name.clone(), members.iter().map(|e| e.info.nbytes).sum());
        gone.extend(members.iter().map(|e| e.info.name.clone()));
        entries.push(entry);
    }
    let gone: std::collections::HashSet<String> = gone.into_iter().collect();
    entries.retain(|entry| !gone.contains(&entry.info.name));
    Ok((entries, stored))
}

fn assemble(
    module: &str,
    shape: &Entry,
    compressed: &Entry,
    bitmask: &Entry,
    offsets: Option<&Entry>,
) -> Result<Entry> {
    let fault = |info: &TensorInfo, reason: String| Error::tensor(&info.file, &info.name, reason);
    if shape.info.dtype != Dtype::I64 || shape.info.elements() != 2 {
        let reason = format!("is {} of shape {:?}", shape.info.dtype, shape.info.shape);
        return Err(fault(&shape.info, reason).with_remedy("a sparse matrix needs I64 and two"));
    }
    let raw = shape.bytes()?;
    let (numbers, _) = raw.as_chunks::<8>();
    let sizes: Vec<usize> =
        numbers.iter().filter_map(|b| usize::try_from(i64::from_le_bytes(*b)).ok()).collect();
    let [rows, columns] = sizes[..] else {
        return Err(fault(&shape.info, "holds no shape of a matrix".into()));
    };
    let dtype = compressed.info.dtype;
    if element_size(dtype).is_none() {
        return Err(fault(&compressed.info, format!("is {dtype}; read are F32, F16 and BF16")));
    }
    if bitmask.info.shape != [rows, columns.div_ceil(8)] {
        let reason = format!("has the shape {:?} for [{rows}, {columns}]", bitmask.info.shape);
        return Err(fault(&bitmask.info, reason));
    }
    let elements = rows
        .checked_mul(columns)
        .ok_or_else(|| fault(&shape.info, format!("the shape [{rows}, {columns}] is too large")))?;
    let nbytes = dtype
        .bytes_for(elements as u64)
        .ok_or_else(|| fault(&shape.info, format!("[{rows}, {columns}] is too large")))?;
    let info = TensorInfo {
        name: format!("{module}.weight"),
        dtype,
        shape: vec![rows, columns],
        file: compressed.info.file.clone(),
        nbytes,
    };
    let (compressed, bitmask, offsets) = (compressed.clone(), bitmask.clone(), offsets.cloned());
    let (file, name) = (info.file.clone(), info.name.clone());
    let read = move || {
        let row_offsets = offsets.as_ref().map(Entry::bytes).transpose()?;
        let (compressed, bitmask) = (compressed.bytes()?, bitmask.bytes()?);
        let parts = Parts {
            dtype,
            shape: [rows, columns],
            compressed: &compressed,
            bitmask: &bitmask,
            row_offsets: row_offsets.as_deref(),
        };
        unpack(&parts).map_err(|reason| Error::tensor(&file, &name, reason))
    };
    Ok(Entry { info, source: Source::Lazy(Arc::new(read)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::writer::{WriteOptions, Writer};

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn find<'a>(tensors: &'a [PackedTensor], leaf: &str) -> &'a PackedTensor {
        tensors.iter().find(|(name, ..)| name == &format!("m.{leaf}")).unwrap()
    }

    #[test]
    fn the_bitmask_by_hand() {
        let row = [1., 0., 0., 1., 1., 0., 0., 0., 1.];
        let t = pack(SparseLayout::Bitmask, "m", Dtype::F32, [1, 9], &bytes(&row)).unwrap();
        assert_eq!(find(&t, "bitmask").3, [25, 1]);
        assert_eq!(find(&t, "bitmask").2, [1, 2]);
        assert_eq!(find(&t, "compressed").3, bytes(&[1.0; 4]));
        assert_eq!(find(&t, "shape").3, [1i64, 9].map(i64::to_le_bytes).concat());
        let row = [0., 2., 0., -0., 3., 0.];
        let t = pack(SparseLayout::Bitmask, "m", Dtype::F32, [2, 3], &bytes(&row)).unwrap();
        assert_eq!(find(&t, "row_offsets").3, [0i64, 1].map(i64::to_le_bytes).concat());
        assert_eq!(find(&t, "bitmask").3, [2, 2]);
    }

    #[test]
    fn two_of_four_keeps_genuine_zeros_where_groups_have_room() {
        let m = [0., 2., 0., 3., 0., 0., 0., 4., 0., 0., 0., 0.];
        let t = pack(SparseLayout::TwoFour, "m", Dtype::F32, [1, 12], &bytes(&m)).unwrap();
        assert_eq!(find(&t, "compressed").2, [1, 6]);
        assert_eq!(find(&t, "compressed").3, bytes(&[2., 3., 0., 4., 0., 0.]));
        assert_eq!(find(&t, "shape").2, [2, 1]);
        assert_eq!(find(&t, "bitmask").3, [0b1001_1010, 0b0000_0011]);
        let three = bytes(&[1., 0., 0., 0., 1., 1., 0., 1.]);
        let error = pack(SparseLayout::TwoFour, "m", Dtype::F32, [1, 8], &three).unwrap_err();
        assert!(error.to_string().contains("row 0, columns 4 to 7"), "{error}");
        let error = pack(SparseLayout::TwoFour, "m", Dtype::F32, [1, 6], &bytes(&[0.; 6]));
        assert!(error.unwrap_err().to_string().contains("there are 6"));
        assert!(pack(SparseLayout::Bitmask, "m", Dtype::I32, [1, 6], &bytes(&[0.; 6])).is_err());
        assert!(pack(SparseLayout::Bitmask, "m", Dtype::F32, [2, 6], &bytes(&[0.; 6])).is_err());
    }

    /// A matrix with about half of its values zero, in a pattern that fits 2:4.
    fn matrix(rows: usize, columns: usize) -> Vec<f32> {
        let mut state = 7u32;
        (0..rows * columns)
            .map(|i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let keep = (i / 4 + i) % 4 < 2 && state >> 28 != 0;
                if keep { (state >> 20) as f32 - 2048.0 } else { 0.0 }
            })
            .collect()
    }

    #[test]
    fn checkpoints_round_trip() {
        let directory = tempfile::tempdir().unwrap();
        for (layout, columns) in
            [(SparseLayout::Bitmask, 33), (SparseLayout::TwoFour, 36), (SparseLayout::Bitmask, 64)]
        {
            let dense = matrix(19, columns);
            for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
                let raw = crate::convert::from_f32(&dense, dtype).unwrap();
                let out = directory.path().join(format!("{layout}-{columns}-{dtype}"));
                let mut writer = Writer::create(&out, WriteOptions::default()).unwrap();
                for (name, dtype, shape, bytes) in
                    pack(layout, "a.b", dtype, [19, columns], &raw).unwrap()
                {
                    writer.add(&name, dtype, &shape, &bytes).unwrap();
                }
                writer.add("other.shape", Dtype::I64, &[2], &[0; 16]).unwrap();
                writer.finish().unwrap();
                let checkpoint = Checkpoint::open(&out).unwrap();
                assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.b.weight", "other.shape"]);
                let info = checkpoint.info("a.b.weight").unwrap();
                assert_eq!((&info.shape[..], info.dtype), (&[19, columns][..], dtype));
                assert_eq!(&*checkpoint.bytes("a.b.weight").unwrap(), raw);
                assert!(checkpoint.total_bytes() < raw.len() as u64 + 19 * 16 + 32);
                assert_eq!(
                    checkpoint.total_bytes(),
                    16 + checkpoint.stored_bytes("a.b.weight").unwrap()
                );
            }
        }
    }

    #[test]
    fn parts_that_disagree_are_refused() {
        let values = bytes(&[1., 2., 3.]);
        let offsets = [0i64, 2].map(i64::to_le_bytes).concat();
        let good = Parts {
            dtype: Dtype::F32,
            shape: [2, 3],
            compressed: &values,
            bitmask: &[0b101, 0b010],
            row_offsets: Some(&offsets),
        };
        assert_eq!(unpack(&good).unwrap(), bytes(&[1., 0., 2., 0., 3., 0.]));
        let refused = |parts: Parts<'_>, what: &str| {
            let message = unpack(&parts).unwrap_err();
            assert!(message.contains(what), "{message}");
        };
        refused(Parts { bitmask: &[0b111, 0b010], ..good }, "keeps 4 values, but 3");
        refused(Parts { bitmask: &[0b1101, 0], ..good }, "beyond the last, 2");
        refused(Parts { bitmask: &[0b101], ..good }, "1 bytes of bitmask");
        refused(Parts { row_offsets: Some(&offsets[..8]), ..good }, "row_offsets");
        refused(Parts { bitmask: &[0b010, 0b101], ..good }, "row_offsets");
        refused(Parts { shape: [usize::MAX, 3], ..good }, "impossible");
        refused(Parts { shape: [0, 3], ..good }, "impossible");
        refused(Parts { dtype: Dtype::I32, ..good }, "I32");
    }

    #[test]
    fn configuration_names_the_layout() {
        let config = json!({"quantization_config":
            config_json(SparseLayout::TwoFour, 0.5, &["lm_head".into()])});
        assert_eq!(layout_of(&config), Some(SparseLayout::TwoFour));
        assert_eq!(crate::packed::parse_config(&config).unwrap(), None);
        assert_eq!(layout_of(&json!({})), None);
    }
}
