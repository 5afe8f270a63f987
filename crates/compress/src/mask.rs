//! Masks: which weights of a layer are set to zero, and the builders that all pruners share.
//!
//! A score per weight goes in, the weights with the smallest scores are pruned. What competes with
//! what is the [`Scope`] (the matrix, each row, blocks of input columns) or a fixed [`Structure`]
//! (N of every M neighbours in a row are kept). Equal scores are pruned in row-major order up to
//! the exact count, so that a layer full of ties never loses more than was asked for.
//!
//! ```
//! use strata_compress::mask::{Count, Scope, Structure, build};
//! let scores = [4.0, 0.0, 8.0, 3.0, 3.0, 4.0, 8.0, 9.0];
//! let mask = build(&scores, [2, 4], 0.5, Structure::Unstructured, Scope::Row, Count::Floor);
//! assert_eq!(mask.kept_columns(0), [0, 2]);
//! assert_eq!(mask.kept_columns(1), [2, 3]);
//! ```

use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use store::{Checkpoint, Dtype};
use tensor::rng::Rng;

/// Directory of the masks inside an output: loaders take every safetensors file beside a model's
/// weights for weights, so they lie apart.
pub const MASK_DIRECTORY: &str = "masks";

/// Values handled by one task.
const CHUNK: usize = 1 << 14;

/// Which pattern the zeros must form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, schemars::JsonSchema)]
#[schemars(with = "String")]
pub enum Structure {
    /// Zeros anywhere.
    #[default]
    Unstructured,
    /// `keep` of every `of` consecutive inputs of a row are kept.
    Blocks {
        /// Weights kept in a block.
        keep: usize,
        /// Length of a block.
        of: usize,
    },
}

impl Structure {
    /// 2:4, which sparse tensor cores multiply.
    pub const TWO_OF_FOUR: Self = Self::Blocks { keep: 2, of: 4 };

    /// The share of zeros that the pattern fixes.
    pub fn sparsity(self) -> Option<f64> {
        match self {
            Self::Unstructured => None,
            Self::Blocks { keep, of } => Some((of - keep) as f64 / of as f64),
        }
    }

    /// Refuses a layer whose rows are not whole blocks.
    pub fn check(self, layer: &str, in_features: usize) -> Result<()> {
        match self {
            Self::Blocks { of, .. } if !in_features.is_multiple_of(of) => Err(Error::layer(
                layer,
                format!(
                    "its {in_features} inputs are not a multiple of {of}, so the pattern {self} \
                     does not fit; --exclude the layer, or use --pattern unstructured"
                ),
            )),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unstructured => f.write_str("unstructured"),
            Self::Blocks { keep, of } => write!(f, "{keep}:{of}"),
        }
    }
}

impl std::str::FromStr for Structure {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "unstructured" {
            return Ok(Self::Unstructured);
        }
        let parts =
            text.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match parts {
            Some((keep, of)) if 0 < keep && keep < of => Ok(Self::Blocks { keep, of }),
            _ => Err(format!(
                "`{text}` is no pattern: use unstructured, or N:M to keep N of every M neighbours, \
                 like 2:4 or 4:8"
            )),
        }
    }
}

/// Which weights compete with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, schemars::JsonSchema)]
#[schemars(with = "String")]
pub enum Scope {
    /// All weights of the layer.
    #[default]
    Matrix,
    /// The weights of an output row.
    Row,
    /// Blocks of input columns, all rows; 0 stands for the rule of D-Pruner ([`Scope::for_role`]).
    Columns(usize),
}

impl Scope {
    /// The scope with its width filled in: D-Pruner's iterative blocking takes 128 input columns,
    /// and a 32nd of the inputs for the MLP's last projection.
    pub fn for_role(self, role: nn::Role, in_features: usize) -> Self {
        match self {
            Self::Columns(0) if role == nn::Role::Down => Self::Columns((in_features / 32).max(1)),
            Self::Columns(0) => Self::Columns(128),
            other => other,
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Matrix => f.write_str("matrix"),
            Self::Row => f.write_str("row"),
            Self::Columns(0) => f.write_str("columns"),
            Self::Columns(width) => write!(f, "columns:{width}"),
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            None if text == "matrix" => Ok(Self::Matrix),
            None if text == "row" => Ok(Self::Row),
            None if text == "columns" => Ok(Self::Columns(0)),
            Some(("columns", width)) if width.parse().is_ok_and(|w: usize| w > 0) => {
                Ok(Self::Columns(width.parse().unwrap_or(128)))
            }
            _ => Err(format!("`{text}` is no scope: use matrix, row, columns or columns:WIDTH")),
        }
    }
}

/// Text in recipes and records, both ways.
macro_rules! as_text {
    ($kind:ty) => {
        impl serde::Serialize for $kind {
            fn serialize<S: serde::Serializer>(
                &self,
                s: S,
            ) -> std::result::Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $kind {
            fn deserialize<D: serde::Deserializer<'de>>(
                d: D,
            ) -> std::result::Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
as_text!(Structure);
as_text!(Scope);

/// How many of `n` competing weights a sparsity means. The reference codes differ by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// Those up to the percentile with linear interpolation: D-Pruner's masks.
    Percentile,
    /// Those up to the value at place `⌊n s⌋` of the sorted scores, one more than `n s`: the
    /// magnitude and SparseGPT references.
    Threshold,
    /// `⌊n s⌋`: Wanda.
    Floor,
    /// `n s`, rounded to nearest even.
    Exact,
}

impl Count {
    /// Number of weights to prune; none at a sparsity of 0.
    pub fn of(self, n: usize, sparsity: f64) -> usize {
        if sparsity <= 0.0 || n == 0 {
            return 0;
        }
        let count = match self {
            Self::Percentile => (sparsity * (n - 1) as f64).floor() as usize + 1,
            Self::Threshold => (n as f64 * sparsity).floor() as usize + 1,
            Self::Floor => (n as f64 * sparsity).floor() as usize,
            Self::Exact => (n as f64 * sparsity).round_ties_even() as usize,
        };
        count.min(n)
    }
}

/// Which weights of a layer are pruned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// `[out, in]`, true where the weight is set to zero.
    pub pruned: Vec<bool>,
}

impl Mask {
    /// A mask that keeps everything.
    pub fn keep_all([out_features, in_features]: [usize; 2]) -> Self {
        Self { out_features, in_features, pruned: vec![false; out_features * in_features] }
    }

    /// Number of pruned weights.
    pub fn count(&self) -> usize {
        self.pruned.par_chunks(CHUNK).map(|part| part.iter().filter(|&&p| p).count()).sum()
    }

    /// Share of pruned weights.
    pub fn sparsity(&self) -> f64 {
        self.count() as f64 / self.pruned.len().max(1) as f64
    }

    /// The columns that row `row` keeps.
    pub fn kept_columns(&self, row: usize) -> Vec<usize> {
        let row = self.pruned.chunks(self.in_features.max(1)).nth(row).unwrap_or_default();
        row.iter().enumerate().filter(|(_, pruned)| !**pruned).map(|(column, _)| column).collect()
    }

    /// Sets the pruned weights of `values` (`[out, in]`) to zero; the others keep their bits.
    pub fn apply(&self, values: &mut [f32]) {
        values.par_chunks_mut(CHUNK).zip(self.pruned.par_chunks(CHUNK)).for_each(|(w, pruned)| {
            for (w, &pruned) in w.iter_mut().zip(pruned) {
                if pruned {
                    *w = 0.0;
                }
            }
        });
    }

    /// Whether every aligned block of `of` columns keeps at most `keep`.
    pub fn fits(&self, structure: Structure) -> bool {
        let Structure::Blocks { keep, of } = structure else { return true };
        self.pruned.chunks(self.in_features.max(1)).all(|row| {
            row.chunks(of).all(|block| block.iter().filter(|&&pruned| !pruned).count() <= keep)
        })
    }

    /// One bit per weight, set where it is kept: `[out, ⌈in/8⌉]`, lowest bit first.
    pub fn bitmask(&self) -> Vec<u8> {
        let bytes = self.in_features.div_ceil(8);
        let mut bits = vec![0u8; self.out_features * bytes];
        let rows = bits.par_chunks_mut(bytes.max(1));
        rows.zip(self.pruned.par_chunks(self.in_features.max(1))).for_each(|(bits, pruned)| {
            for (byte, pruned) in bits.iter_mut().zip(pruned.chunks(8)) {
                for (bit, &pruned) in pruned.iter().enumerate() {
                    *byte |= u8::from(!pruned) << bit;
                }
            }
        });
        bits
    }

    /// The mask of a [`Mask::bitmask`]; `None` when the lengths do not fit.
    pub fn from_bitmask([out_features, in_features]: [usize; 2], bits: &[u8]) -> Option<Self> {
        let bytes = in_features.div_ceil(8);
        if out_features.checked_mul(bytes) != Some(bits.len()) || bytes == 0 {
            return None;
        }
        let kept = |row: &[u8], column: usize| {
            row.get(column / 8).is_some_and(|b| b >> (column % 8) & 1 == 1)
        };
        let pruned = bits
            .chunks_exact(bytes)
            .flat_map(|row| (0..in_features).map(move |column| !kept(row, column)))
            .collect();
        Some(Self { out_features, in_features, pruned })
    }

    /// Where `values` are zero.
    pub fn of_zeros([out_features, in_features]: [usize; 2], values: &[f32]) -> Self {
        let pruned = values.par_iter().map(|w| *w == 0.0).collect();
        Self { out_features, in_features, pruned }
    }
}

/// Refuses scores that do not order the weights.
pub fn check_scores(layer: &str, scores: &[f32]) -> Result<()> {
    match scores.par_iter().position_first(|s| !s.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::layer(
            layer,
            format!(
                "the score of weight {at} is NaN or infinite; activations or gradients of the \
                 model overflow on this text"
            ),
        )),
    }
}

/// The mask that prunes a share `sparsity` of the weights with the smallest `scores` (`[out, in]`,
/// finite and not negative). A block structure fixes scope and share itself.
pub fn build(
    scores: &[f32],
    [out, width]: [usize; 2],
    sparsity: f64,
    structure: Structure,
    scope: Scope,
    count: Count,
) -> Mask {
    let mut mask = Mask::keep_all([out, width]);
    if width == 0 {
        return mask;
    }
    match (structure, scope) {
        (Structure::Blocks { keep, of }, _) => {
            let rows = mask.pruned.par_chunks_mut(width).zip(scores.par_chunks(width));
            rows.for_each(|(pruned, scores)| {
                for (pruned, scores) in pruned.chunks_mut(of).zip(scores.chunks(of)) {
                    prune_block(scores, of - keep, pruned);
                }
            });
        }
        (_, Scope::Matrix) => {
            mark_smallest(scores, count.of(scores.len(), sparsity), &mut mask.pruned);
        }
        (_, Scope::Row) => {
            let rows = mask.pruned.par_chunks_mut(width).zip(scores.par_chunks(width));
            let count = count.of(width, sparsity);
            rows.for_each(|(pruned, scores)| mark_smallest(scores, count, pruned));
        }
        (_, Scope::Columns(block)) => {
            let block = if block == 0 { 128 } else { block };
            let mut place = Vec::new();
            for start in (0..width).step_by(block) {
                let end = (start + block).min(width);
                place.clear();
                scores.chunks(width).for_each(|row| place.extend_from_slice(&row[start..end]));
                let mut pruned = vec![false; place.len()];
                mark_smallest(&place, count.of(place.len(), sparsity), &mut pruned);
                let rows = mask.pruned.chunks_mut(width).zip(pruned.chunks(end - start));
                rows.for_each(|(row, pruned)| row[start..end].copy_from_slice(pruned));
            }
        }
    }
    mask
}

/// Marks the `count` smallest of a few scores, the first of equal ones.
pub(crate) fn prune_block(scores: &[f32], count: usize, pruned: &mut [bool]) {
    for _ in 0..count {
        let mut least: Option<usize> = None;
        for (i, score) in scores.iter().enumerate() {
            if !pruned[i] && least.is_none_or(|least| *score < scores[least]) {
                least = Some(i);
            }
        }
        if let Some(least) = least {
            pruned[least] = true;
        }
    }
}

/// Marks the `count` smallest scores; of equal scores at the threshold the first are taken.
pub fn mark_smallest(scores: &[f32], count: usize, pruned: &mut [bool]) {
    let count = count.min(scores.len());
    if count == 0 {
        return;
    }
    let threshold = kth_smallest(scores, count - 1);
    let below: usize = scores
        .par_chunks(CHUNK)
        .zip(pruned.par_chunks_mut(CHUNK))
        .map(|(scores, pruned)| {
            let mut below = 0;
            for (score, pruned) in scores.iter().zip(pruned) {
                *pruned = *score < threshold;
                below += usize::from(*pruned);
            }
            below
        })
        .sum();
    let mut ties = count - below;
    for (score, pruned) in scores.iter().zip(pruned) {
        if ties == 0 {
            break;
        }
        if *score == threshold {
            *pruned = true;
            ties -= 1;
        }
    }
}

/// The value at place `k` of the sorted scores.
pub(crate) fn kth_smallest(scores: &[f32], k: usize) -> f32 {
    // Finite numbers that are not negative are ordered as their bits; `+ 0.0` turns -0 into 0.
    let mut bits: Vec<u32> = scores.iter().map(|s| (s + 0.0).to_bits()).collect();
    let k = k.min(bits.len().saturating_sub(1));
    if bits.is_empty() {
        return 0.0;
    }
    f32::from_bits(*bits.select_nth_unstable(k).1)
}

/// Scores of magnitude pruning.
pub fn magnitude_scores(values: &[f32]) -> Vec<f32> {
    values.par_iter().map(|w| w.abs()).collect()
}

/// Scores of random pruning: uniform numbers that depend on seed and layer only.
pub fn random_scores(layer: &str, count: usize, seed: u64) -> Vec<f32> {
    let mut scores = vec![0f32; count];
    Rng::stream(seed, &format!("prune {layer}")).fill_uniform(&mut scores, 0.0, 1.0);
    scores
}

/// Name and bytes of the mask file of a block: `<module>.bitmask` (see [`Mask::bitmask`]) and
/// `<module>.shape`.
pub fn file(block: usize, masks: &BTreeMap<String, Mask>) -> Result<(String, Vec<u8>)> {
    let name = format!("{MASK_DIRECTORY}/block-{block:05}.safetensors");
    let mut tensors = Vec::new();
    // Shapes first: they must be aligned to eight bytes.
    for (module, mask) in masks {
        let shape = [mask.out_features as i64, mask.in_features as i64];
        let shape: Vec<u8> = shape.iter().flat_map(|n| n.to_le_bytes()).collect();
        tensors.push((format!("{module}.shape"), Dtype::I64, vec![2], shape));
    }
    for (module, mask) in masks {
        let rows = vec![mask.out_features, mask.in_features.div_ceil(8)];
        tensors.push((format!("{module}.bitmask"), Dtype::U8, rows, mask.bitmask()));
    }
    let bytes = store::safetensors::file_bytes(Path::new(&name), &tensors)?;
    Ok((name, bytes))
}

/// The masks of a pruned model's directory, by module.
pub fn read(directory: &Path) -> Result<BTreeMap<String, Mask>> {
    let directory = directory.join(MASK_DIRECTORY);
    let io = |source| Error::Io { path: directory.display().to_string(), source };
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .map_err(io)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    let mut masks = BTreeMap::new();
    for path in files {
        let file = Checkpoint::open(&path)?;
        let modules: Vec<String> =
            file.names().filter_map(|n| Some(n.strip_suffix(".bitmask")?.to_string())).collect();
        for module in modules {
            let shape = file.bytes(&format!("{module}.shape"))?;
            let shape: Vec<usize> = shape
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| usize::try_from(i64::from_le_bytes(*b)).unwrap_or(0))
                .collect();
            let bits = file.bytes(&format!("{module}.bitmask"))?;
            let mask = match shape[..] {
                [out, width] => Mask::from_bitmask([out, width], &bits),
                _ => None,
            };
            let mask = mask.ok_or_else(|| {
                Error::layer(
                    &module,
                    format!("its mask in {} does not fit its shape", path.display()),
                )
            })?;
            masks.insert(module, mask);
        }
    }
    Ok(masks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(mask: &Mask) -> Vec<Vec<usize>> {
        (0..mask.out_features).map(|row| mask.kept_columns(row)).collect()
    }

    const UNSTRUCTURED: Structure = Structure::Unstructured;

    #[test]
    fn percentiles_without_ties_prune_p_within_one_weight() {
        let mut rng = Rng::new(1);
        for n in [7usize, 100, 1001, 40_000] {
            let scores: Vec<f32> = rng.permutation(n).iter().map(|&i| 1.0 + i as f32).collect();
            for p in [0.1, 0.5, 0.52, 0.7, 0.93] {
                let mask =
                    build(&scores, [1, n], p, UNSTRUCTURED, Scope::Matrix, Count::Percentile);
                assert!((mask.sparsity() - p).abs() <= 1.0 / n as f64, "{n} {p}");
                // The definition: numpy's percentile with linear interpolation, prune <= it.
                let place = p * (n - 1) as f64;
                let (low, part) = (place.floor(), place - place.floor());
                let threshold = 1.0 + low + part;
                for (score, pruned) in scores.iter().zip(&mask.pruned) {
                    assert_eq!(*pruned, f64::from(*score) <= threshold, "{n} {p} {score}");
                }
            }
        }
    }

    #[test]
    fn ties_never_prune_more_than_the_count() {
        // Every score is 0: the threshold alone would prune all.
        for scope in [Scope::Matrix, Scope::Row, Scope::Columns(3)] {
            let mask = build(&[0.0; 48], [8, 6], 0.5, UNSTRUCTURED, scope, Count::Exact);
            assert_eq!(mask.count(), 24, "{scope}");
        }
        let mask = build(&[0.0; 8], [2, 4], 0.5, UNSTRUCTURED, Scope::Matrix, Count::Exact);
        assert_eq!(kept(&mask), [vec![], vec![0, 1, 2, 3]], "first come, first pruned");
        let mask = build(&[0.0; 8], [2, 4], 0.5, UNSTRUCTURED, Scope::Matrix, Count::Percentile);
        assert_eq!(mask.count(), 4);
        // More values than one task takes, two distinct scores.
        let n = 3 * CHUNK + 11;
        let scores: Vec<f32> = (0..n).map(|i| (i % 2) as f32).collect();
        let mut pruned = vec![false; n];
        mark_smallest(&scores, 1000, &mut pruned);
        assert_eq!(pruned.iter().filter(|p| **p).count(), 1000);
        assert!(pruned[1998] && !pruned[2000] && !pruned[1], "the first 1000 zeros");
    }

    #[test]
    fn scopes_compete_where_they_say() {
        let scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let mask = |scope| kept(&build(&scores, [2, 4], 0.5, UNSTRUCTURED, scope, Count::Exact));
        assert_eq!(mask(Scope::Matrix), [vec![], vec![0, 1, 2, 3]]);
        assert_eq!(mask(Scope::Row), [vec![2, 3], vec![2, 3]]);
        // Blocks of two columns: 1 2 5 6 and 3 4 7 8.
        assert_eq!(mask(Scope::Columns(2)), [vec![], vec![0, 1, 2, 3]]);
        let scores = [1.0, 9.0, 3.0, 4.0, 8.0, 2.0, 7.0, 5.0];
        let columns = build(&scores, [2, 4], 0.5, UNSTRUCTURED, Scope::Columns(2), Count::Exact);
        assert_eq!(kept(&columns), [vec![1], vec![0, 2, 3]]);
        let ragged = build(&scores, [2, 4], 0.5, UNSTRUCTURED, Scope::Columns(3), Count::Exact);
        assert_eq!(kept(&ragged), [vec![1], vec![0, 2, 3]]);
    }

    #[test]
    fn the_counts_of_the_references() {
        let counts = |n, s| {
            [Count::Percentile, Count::Threshold, Count::Floor, Count::Exact].map(|c| c.of(n, s))
        };
        assert_eq!(counts(6, 0.5), [3, 4, 3, 3]);
        assert_eq!(counts(5, 0.5), [3, 3, 2, 2]);
        assert_eq!(counts(10, 0.0), [0; 4]);
        assert_eq!(counts(10, 1.0), [10; 4]);
    }

    #[test]
    fn blocks_keep_n_of_m() {
        let mut rng = Rng::new(2);
        let mut scores = vec![0f32; 16 * 32];
        rng.fill_uniform(&mut scores, 0.0, 1.0);
        for (text, share) in [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("3:4", 0.25)] {
            let structure: Structure = text.parse().unwrap();
            assert_eq!(structure.sparsity(), Some(share));
            let mask = build(&scores, [16, 32], 0.9, structure, Scope::Matrix, Count::Floor);
            assert!(mask.fits(structure) && mask.sparsity() == share, "{text}");
        }
        let mask = build(&[0.0; 8], [1, 8], 0.5, Structure::TWO_OF_FOUR, Scope::Row, Count::Floor);
        assert_eq!(kept(&mask), [vec![2, 3, 6, 7]]);
        let error = Structure::TWO_OF_FOUR.check("model.a", 10).unwrap_err().to_string();
        assert!(
            error.contains("model.a") && error.contains("10") && error.contains("2:4"),
            "{error}"
        );
    }

    #[test]
    fn bitmask_by_hand_and_files() {
        let values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        let mask = Mask::of_zeros([1, 9], &values);
        assert_eq!(mask.bitmask(), [25, 1]);
        assert_eq!(Mask::from_bitmask([1, 9], &[25, 1]), Some(mask.clone()));
        assert_eq!(Mask::from_bitmask([1, 9], &[25]), None);
        let directory = std::env::temp_dir().join(format!("strata-mask-{}", std::process::id()));
        let masks = BTreeMap::from([("a.b".to_string(), mask)]);
        let (name, bytes) = file(3, &masks).unwrap();
        std::fs::create_dir_all(directory.join(MASK_DIRECTORY)).unwrap();
        std::fs::write(directory.join(name), bytes).unwrap();
        assert_eq!(read(&directory).unwrap(), masks);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn applying_keeps_the_other_bits() {
        let mut values = [1.5, -0.0, f32::MIN_POSITIVE, 2.0];
        let mask = Mask { out_features: 1, in_features: 4, pruned: vec![true, false, false, true] };
        mask.apply(&mut values);
        assert_eq!(values.map(f32::to_bits), [0.0, -0.0, f32::MIN_POSITIVE, 0.0].map(f32::to_bits));
    }

    #[test]
    fn texts_of_patterns_and_scopes() {
        for text in ["unstructured", "2:4", "4:8"] {
            assert_eq!(text.parse::<Structure>().unwrap().to_string(), text);
        }
        for text in ["matrix", "row", "columns", "columns:344"] {
            assert_eq!(text.parse::<Scope>().unwrap().to_string(), text);
        }
        for text in ["4:2", "2:2", "0:4", "2-4", "", "2:x"] {
            assert!(text.parse::<Structure>().is_err(), "{text}");
        }
        for text in ["columns:0", "rows", "columns:x", "matrix:2"] {
            assert!(text.parse::<Scope>().is_err(), "{text}");
        }
        let down = Scope::Columns(0).for_role(nn::Role::Down, 11008);
        assert_eq!(down, Scope::Columns(344));
        assert_eq!(Scope::Columns(0).for_role(nn::Role::Query, 4096), Scope::Columns(128));
    }

    #[test]
    fn bad_scores_are_refused() {
        let error = check_scores("model.q", &[1.0, f32::NAN]).unwrap_err().to_string();
        assert!(error.contains("model.q") && error.contains("weight 1"), "{error}");
        assert!(check_scores("model.q", &[1.0, 0.0]).is_ok());
    }

    #[test]
    fn random_scores_depend_on_seed_and_layer() {
        let scores = |layer, seed| random_scores(layer, 16, seed);
        assert_eq!(scores("a", 1), scores("a", 1));
        assert_ne!(scores("a", 1), scores("b", 1));
        assert_ne!(scores("a", 1), scores("a", 2));
    }
}
