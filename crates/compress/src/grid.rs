//! Uniform integer grids: how a group of weights becomes codes, a scale and a zero point.
//!
//! Every quantiser of the room shares these rules; a method only decides which values go in.
//! Codes are unsigned, `w ≈ (q - zero) * scale`, `q` in `0..=2^bits - 1`; symmetric grids store
//! `zero = 2^(bits-1)`. Rounding is half-to-even. Scales are rounded to the stored precision
//! *before* codes are chosen, so what is computed is what a loader sees.
//!
//! ```
//! use strata_compress::grid::{Grid, GridOptions, GroupGrid};
//! let grid = Grid::new(&GridOptions { bits: 2, ..GridOptions::default() }).unwrap();
//! let GroupGrid { scale, zero } = grid.find(&[-0.5, 0.1, 0.3, 1.0]);
//! assert_eq!((scale, zero), (0.5, 1.0));
//! ```

use crate::{Error, Result};
use rayon::prelude::*;
use store::packed::QuantizedMatrix;

/// Bit widths that a grid may have.
pub const BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];

/// The integer grid of a quantised layer: bits, group size, symmetry.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default)]
pub struct GridOptions {
    /// Bits per weight: 2, 3, 4, 5, 6 or 8
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Weights that share one scale, along the input; 0 means the whole row
    #[arg(long, default_value_t = 128)]
    pub group_size: usize,
    /// Symmetric grid (no zero point)
    #[arg(long)]
    pub symmetric: bool,
    /// What one scale covers: groups of a row, whole rows (channel), or the whole tensor
    #[arg(long, value_enum, default_value_t = Granularity::Group)]
    pub granularity: Granularity,
    /// Range rule of asymmetric grids: `zero` always contains 0, `strict` is the minimum and maximum as they are
    #[arg(long, value_enum, default_value_t = Range::Zero)]
    pub range: Range,
}

impl Default for GridOptions {
    fn default() -> Self {
        Self {
            bits: 4,
            group_size: 128,
            symmetric: false,
            granularity: Granularity::Group,
            range: Range::Zero,
        }
    }
}

/// What one scale covers.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Granularity {
    /// `group_size` consecutive inputs of one output row.
    #[default]
    Group,
    /// A whole output row.
    Channel,
    /// The whole matrix.
    Tensor,
}

/// How the range of an asymmetric group is found.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Range {
    /// The range is widened to contain zero, so that no group collapses onto a clamped zero point.
    #[default]
    Zero,
    /// Minimum and maximum as they are (bit comparison with the AWQ reference).
    Strict,
}

/// The floating-point type in which scales are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// IEEE half precision: what AutoAWQ and GPTQ files hold.
    #[default]
    F16,
    /// bfloat16: what compressed-tensors files of bfloat16 models hold.
    Bf16,
}

impl ScaleType {
    /// `value` rounded to the stored precision; a positive value never becomes zero.
    pub fn round(self, value: f32) -> f32 {
        let rounded = match self {
            Self::F16 => half::f16::from_f32(value).to_f32(),
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
        };
        if rounded == 0.0 && value > 0.0 { half::f16::from_bits(1).to_f32() } else { rounded }
    }
}

/// Scale and zero point of one group; `zero` is an integer held as a float.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupGrid {
    /// Step between neighbouring codes.
    pub scale: f32,
    /// The code of the value 0.
    pub zero: f32,
}

impl GroupGrid {
    /// The code nearest to `w`.
    #[inline(always)]
    pub fn code(self, w: f32, max_code: f32) -> f32 {
        ((w / self.scale).round_ties_even() + self.zero).clamp(0.0, max_code)
    }

    /// The value of a code.
    #[inline(always)]
    pub fn value(self, code: f32) -> f32 {
        (code - self.zero) * self.scale
    }
}

/// The rules by which groups become grids.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Bits per code.
    pub bits: u8,
    /// Symmetric around zero.
    pub symmetric: bool,
    /// Range rule of asymmetric grids.
    pub range: Range,
    /// Stored precision of scales.
    pub scale_type: ScaleType,
    /// Search the clipping of the range for the smallest error, as the GPTQ code does with `mse`.
    pub mse: bool,
}

impl Grid {
    /// The rules that `options` describe, with half-precision scales.
    pub fn new(options: &GridOptions) -> Result<Self> {
        if !BITS.contains(&options.bits) {
            return Err(Error::Options(format!(
                "bits = {} is not supported; choose one of {BITS:?}",
                options.bits
            )));
        }
        Ok(Self {
            bits: options.bits,
            symmetric: options.symmetric,
            range: options.range,
            scale_type: ScaleType::F16,
            mse: false,
        })
    }

    /// The largest code, `2^bits - 1`.
    #[inline(always)]
    pub fn max_code(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// The grid of one group of values.
    pub fn find(&self, values: &[f32]) -> GroupGrid {
        let (low, high) = min_max(values);
        let plain = self.from_range(low, high);
        if self.mse { self.find_mse(values, low, high, plain) } else { plain }
    }

    /// The grid of a group whose extreme values are known.
    pub fn from_range(&self, low: f32, high: f32) -> GroupGrid {
        let max_code = self.max_code();
        if self.symmetric {
            let half = (1u32 << (self.bits - 1)) as f32;
            let scale = low.abs().max(high.abs()).max(1e-5) / (half - 1.0).max(1.0);
            return GroupGrid { scale: self.scale_type.round(scale), zero: half };
        }
        let (low, high) = match self.range {
            Range::Zero => (low.min(0.0), high.max(0.0)),
            Range::Strict => (low, high),
        };
        let scale = self.scale_type.round((high - low).max(1e-5) / max_code);
        let zero = (-(low / scale).round_ties_even()).clamp(0.0, max_code);
        GroupGrid { scale, zero }
    }

    /// Shrinks the range step by step (80 steps of 1 %) and keeps the one with the smallest
    /// `Σ |q(w) - w|^2.4` (GPTQ code, `mse` option).
    fn find_mse(&self, values: &[f32], low: f32, high: f32, plain: GroupGrid) -> GroupGrid {
        let max_code = self.max_code();
        let error = |grid: GroupGrid, limit: f32| -> f32 {
            clipping_error(values, grid.scale, grid.zero, max_code, limit)
        };
        let (mut best, mut best_error) = (plain, error(plain, f32::INFINITY));
        for step in 1..80 {
            let shrink = 1.0 - step as f32 / 100.0;
            let grid = self.from_range(low * shrink, high * shrink);
            let candidate = error(grid, best_error);
            if candidate < best_error {
                (best, best_error) = (grid, candidate);
            }
        }
        best
    }

    /// Replaces every value of a group by its nearest grid value; returns the grid.
    pub fn fake_quantize(&self, values: &mut [f32]) -> GroupGrid {
        let grid = self.find(values);
        let max_code = self.max_code();
        for w in values {
            *w = grid.value(grid.code(*w, max_code));
        }
        grid
    }
}

tensor::simd! {
    /// `Σ |q(w) - w|^2.4`; a sum that has reached `limit` is given up and returned as it is.
    fn clipping_error(values: &[f32], scale: f32, zero: f32, max_code: f32, limit: f32) -> f32 {
        /// Values between two looks at the limit.
        const PART: usize = 256;
        const LANES: usize = 16;
        let term = |w: f32| -> f32 {
            let code = ((w / scale).round_ties_even() + zero).max(0.0).min(max_code);
            let off = (code - zero) * scale - w;
            off * off * fifth_root(off * off)
        };
        let mut total = 0f32;
        for part in values.chunks(PART) {
            let mut lanes = [0f32; LANES];
            let blocks = part.chunks_exact(LANES);
            let rest = blocks.remainder();
            for block in blocks {
                for (lane, &w) in lanes.iter_mut().zip(block) {
                    *lane += term(w);
                }
            }
            total += lanes.iter().sum::<f32>() + rest.iter().map(|&w| term(w)).sum::<f32>();
            if total >= limit {
                break;
            }
        }
        total
    }
}

/// `x^(1/5)` of a number that is not negative, to about 1e-6 relative: a first guess from the bits
/// (a fifth of the exponent), then Newton's method. No branches, so that loops vectorise. What is
/// smaller than a normal number gives something small, not 0.
#[inline(always)]
fn fifth_root(x: f32) -> f32 {
    let mut y = f32::from_bits(x.to_bits() / 5 + 0x32C8_38EC);
    for _ in 0..3 {
        let square = y * y;
        y = 0.8 * y + 0.2 * x / (square * square);
    }
    y
}

/// Smallest and largest value.
#[inline]
pub fn min_max(values: &[f32]) -> (f32, f32) {
    // Sixteen independent lanes, so that the loop vectorises.
    let mut low = [f32::INFINITY; 16];
    let mut high = [f32::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..16 {
            low[lane] = if chunk[lane] < low[lane] { chunk[lane] } else { low[lane] };
            high[lane] = if chunk[lane] > high[lane] { chunk[lane] } else { high[lane] };
        }
    }
    let low = low.iter().chain(rest).fold(f32::INFINITY, |a, &b| a.min(b));
    let high = high.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    (low, high)
}

/// A dense matrix on its way through the room: `[out_features, in_features]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Values, `out_features * in_features` of them.
    pub values: Vec<f32>,
}

impl Matrix {
    /// A matrix of the given shape; the number of values must fit.
    pub fn new(out_features: usize, in_features: usize, values: Vec<f32>) -> Result<Self> {
        if out_features == 0 || in_features == 0 || values.len() != out_features * in_features {
            return Err(Error::Options(format!(
                "{} values do not make a [{out_features}, {in_features}] matrix",
                values.len()
            )));
        }
        Ok(Self { out_features, in_features, values })
    }

    /// The transpose, `[in_features, out_features]`.
    pub fn transposed(&self) -> Self {
        let (rows, columns) = (self.out_features, self.in_features);
        Self {
            out_features: columns,
            in_features: rows,
            values: transpose(&self.values, rows, columns),
        }
    }

    /// Refuses NaN and infinities, naming the layer and the first bad place.
    pub fn check_finite(&self, layer: &str) -> Result<()> {
        let row = self
            .values
            .par_chunks(self.in_features)
            .position_first(|row| row.iter().any(|w| !w.is_finite()));
        match row {
            None => Ok(()),
            Some(row) => Err(Error::layer(
                layer,
                format!(
                    "weight [{}, {}] holds NaN or infinity in row {row}; the checkpoint is damaged \
                     or overflowed when it was saved",
                    self.out_features, self.in_features
                ),
            )),
        }
    }

    /// Squared Frobenius norm of `self - other`, and of `self`.
    pub fn squared_error(&self, other: &[f32]) -> (f64, f64) {
        self.values
            .par_chunks(4096)
            .zip(other.par_chunks(4096))
            .map(|(a, b)| {
                let (mut error, mut norm) = (0f64, 0f64);
                for (&a, &b) in a.iter().zip(b) {
                    error += f64::from(a - b) * f64::from(a - b);
                    norm += f64::from(a) * f64::from(a);
                }
                (error, norm)
            })
            .collect::<Vec<_>>()
            .into_iter()
            .fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1))
    }
}

/// The transpose of `values` (`[rows, columns]`).
pub fn transpose<T: Copy + Default + Send + Sync>(
    values: &[T],
    rows: usize,
    columns: usize,
) -> Vec<T> {
    // Bands of columns, so that a cache line of the source serves all of its columns.
    const BAND: usize = 16;
    let mut out = vec![T::default(); values.len()];
    out.par_chunks_mut(BAND * rows.max(1)).enumerate().for_each(|(band, out)| {
        for (row, source) in values.chunks_exact(columns.max(1)).enumerate() {
            let source = source.get(band * BAND..).unwrap_or_default();
            for (out, &value) in out.chunks_exact_mut(rows).zip(source) {
                out[row] = value;
            }
        }
    });
    out
}

/// The group size that `options` mean for a row of `in_features` weights.
pub fn effective_group(options: &GridOptions, in_features: usize) -> usize {
    match options.granularity {
        Granularity::Group if options.group_size > 0 => options.group_size.min(in_features),
        _ => in_features,
    }
}

/// Refuses a group size that does not divide the row, with the divisors that would work.
pub fn require_whole_groups(layer: &str, in_features: usize, group_size: usize) -> Result<()> {
    if group_size != 0 && in_features.is_multiple_of(group_size) {
        return Ok(());
    }
    let divisors: Vec<String> = [16, 32, 64, 128, 256, 512]
        .into_iter()
        .filter(|g| in_features.is_multiple_of(*g))
        .map(|g| g.to_string())
        .collect();
    let advice = if divisors.is_empty() {
        "use --group-size 0 (whole rows)".to_string()
    } else {
        format!("group sizes {} would work, or 0 for whole rows", divisors.join(", "))
    };
    Err(Error::layer(
        layer,
        format!("{in_features} inputs cannot be cut into groups of {group_size}; {advice}"),
    ))
}

/// Assembles the codes of `matrix` under known group grids (`[out, groups]`, row-major), every
/// weight rounded to its nearest code.
pub fn encode(
    matrix: &Matrix,
    grid: &Grid,
    group_size: usize,
    grids: &[GroupGrid],
) -> QuantizedMatrix {
    let (out, width) = (matrix.out_features, matrix.in_features);
    let groups = width.div_ceil(group_size);
    let max_code = grid.max_code();
    let mut codes = vec![0u8; out * width];
    codes.par_chunks_mut(width).zip(matrix.values.par_chunks(width)).enumerate().for_each(
        |(row, (codes, values))| {
            for (g, (codes, values)) in
                codes.chunks_mut(group_size).zip(values.chunks(group_size)).enumerate()
            {
                let group = grids[row * groups + g];
                for (code, &w) in codes.iter_mut().zip(values) {
                    *code = group.code(w, max_code) as u8;
                }
            }
        },
    );
    assemble(grid, out, width, group_size, codes, grids, None)
}

/// Puts codes and grids into the storage form.
pub fn assemble(
    grid: &Grid,
    out_features: usize,
    in_features: usize,
    group_size: usize,
    codes: Vec<u8>,
    grids: &[GroupGrid],
    group_index: Option<Vec<u32>>,
) -> QuantizedMatrix {
    QuantizedMatrix {
        bits: grid.bits,
        group_size,
        out_features,
        in_features,
        codes,
        scales: grids.iter().map(|g| g.scale).collect(),
        zeros: grids.iter().map(|g| g.zero as u8).collect(),
        symmetric: grid.symmetric,
        group_index,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(bits: u8) -> Grid {
        Grid::new(&GridOptions { bits, ..GridOptions::default() }).unwrap()
    }

    #[test]
    fn hand_computed_asymmetric_grids() {
        let values = [-0.5f32, 0.1, 0.3, 1.0];
        // 1.5 / 15 = 0.1 is not a half-precision number; the rounded scale gives the same codes.
        let four = grid(4).find(&values);
        assert!((four.scale - 0.1).abs() < 3e-5 && four.zero == 5.0);
        let codes: Vec<f32> = values.iter().map(|&w| four.code(w, 15.0)).collect();
        assert_eq!(codes, [0.0, 6.0, 8.0, 15.0]);
        let two = grid(2).find(&values);
        assert_eq!(two, GroupGrid { scale: 0.5, zero: 1.0 });
        let back: Vec<f32> = values.iter().map(|&w| two.value(two.code(w, 3.0))).collect();
        assert_eq!(back, [-0.5, 0.0, 0.5, 1.0]);
    }

    #[test]
    fn group_without_zero_collapses_only_when_strict() {
        let values = [1.0f32, 1.2, 1.5, 1.9];
        let error = |grid: Grid| -> f32 {
            let mut copy = values;
            grid.fake_quantize(&mut copy);
            copy.iter().zip(values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        assert!(error(grid(4)) < 0.07);
        // The reference rule clamps the zero point and maps all four to 0.9.
        let strict = Grid { range: Range::Strict, ..grid(4) };
        let mut copy = values;
        strict.fake_quantize(&mut copy);
        assert!(copy.iter().all(|w| (w - 0.9).abs() < 1e-3), "{copy:?}");
    }

    #[test]
    fn symmetric_grid_reaches_the_largest_magnitude() {
        let symmetric = Grid { symmetric: true, ..grid(4) };
        let group = symmetric.find(&[-0.7, 0.2, 0.35]);
        assert_eq!(group.zero, 8.0);
        assert_eq!(group.code(-0.7, 15.0), 1.0);
        assert_eq!(group.code(0.0, 15.0), 8.0);
    }

    #[test]
    fn all_zero_group_stays_zero() {
        for symmetric in [false, true] {
            let mut values = [0.0f32; 8];
            let group = Grid { symmetric, ..grid(4) }.fake_quantize(&mut values);
            assert!(group.scale > 0.0);
            assert_eq!(values, [0.0; 8]);
        }
    }

    #[test]
    fn fifth_roots_are_accurate() {
        for i in -120..=120 {
            for j in 0..50 {
                let x = 2f32.powi(i) * (1.0 + j as f32 / 50.0);
                let exact = f64::from(x).powf(0.2);
                let off = (f64::from(fifth_root(x)) - exact).abs() / exact;
                assert!(off < 1e-6, "{x}: {off}");
            }
        }
        assert!(fifth_root(0.0).abs() < 1e-6);
    }

    /// The vectorised search against the definition.
    #[test]
    fn clipping_errors_are_those_of_the_definition() {
        let mut rng = tensor::Rng::new(8);
        for count in [1, 15, 16, 255, 700] {
            let values: Vec<f32> = (0..count).map(|_| rng.normal() as f32).collect();
            let grid = GroupGrid { scale: 0.21, zero: 3.0 };
            let plain: f64 = values
                .iter()
                .map(|&w| f64::from((grid.value(grid.code(w, 7.0)) - w).abs()).powf(2.4))
                .sum();
            let fast = clipping_error(&values, 0.21, 3.0, 7.0, f32::INFINITY);
            assert!((f64::from(fast) / plain - 1.0).abs() < 1e-5, "{count}: {fast} {plain}");
            assert!(clipping_error(&values, 0.21, 3.0, 7.0, fast / 2.0) >= fast / 2.0);
        }
    }

    #[test]
    fn mse_clipping_never_increases_the_error() {
        let mut rng = tensor::Rng::new(3);
        let values: Vec<f32> = (0..64).map(|_| rng.normal() as f32).collect();
        let power = |grid: Grid| -> f32 {
            let mut copy = values.clone();
            grid.fake_quantize(&mut copy);
            copy.iter().zip(&values).map(|(a, b)| (a - b).abs().powf(2.4)).sum()
        };
        let plain = grid(3);
        assert!(power(Grid { mse: true, ..plain }) < power(plain));
    }

    #[test]
    fn min_max_sees_every_lane_and_the_rest() {
        for length in [1usize, 15, 16, 17, 33] {
            for at in 0..length {
                let mut values = vec![0.5f32; length];
                values[at] = -3.0;
                assert_eq!(min_max(&values).0, -3.0);
                values[at] = 3.0;
                assert_eq!(min_max(&values).1, 3.0);
            }
        }
    }

    #[test]
    fn transposes_rectangles() {
        let matrix = Matrix::new(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let transposed = matrix.transposed();
        assert_eq!((transposed.out_features, transposed.in_features), (3, 2));
        assert_eq!(transposed.values, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let wide: Vec<u32> = (0..70 * 33).collect();
        let back = transpose(&transpose(&wide, 70, 33), 33, 70);
        assert_eq!(back, wide);
    }

    #[test]
    fn refusals_name_what_would_work() {
        assert!(Grid::new(&GridOptions { bits: 7, ..Default::default() }).is_err());
        let message = require_whole_groups("blk.q_proj", 172, 128).unwrap_err().to_string();
        assert!(message.contains("blk.q_proj") && message.contains("172") && message.contains('0'));
        let message = require_whole_groups("x", 192, 128).unwrap_err().to_string();
        assert!(message.contains("16, 32, 64"));
        let bad = Matrix::new(1, 2, vec![1.0, f32::NAN]).unwrap();
        assert!(bad.check_finite("layer.x").unwrap_err().to_string().contains("layer.x"));
    }
}
