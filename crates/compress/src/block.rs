//! One block under calibration: its working copy, its activations, and what leaves it.
//!
//! A method gets a [`BlockJob`], runs the stages it needs over all calibration batches, replaces
//! weights in the working copy and hands in the quantised layers. It never touches files.

use crate::activations::Activations;
use crate::grid::{Grid, GridOptions, Matrix, ScaleType, transpose};
use crate::plan::LayerPlan;
use crate::statistics::TokenSample;
use crate::{Error, Result};
use nn::{Batch, BlockState, Context, Decoder, Leaf, Name, Overlay, Point, Stage, Taps, Weights};
use std::collections::BTreeMap;
use store::packed::{QuantizedMatrix, Stored};
use tensor::{Tensor, host};

/// The point where the linears of set `n` of a block read their input (see
/// [`Decoder::linear_sets`]); stage `n` leaves it.
pub const INPUT_POINTS: [Point; 4] = [Point::AttnIn, Point::Z, Point::MlpIn, Point::MlpPost];

/// The stage that leaves the input of set `n`.
pub const INPUT_STAGES: [Stage; 4] = [Stage::Norm1, Stage::Attend, Stage::Project, Stage::Expand];

/// Tokens on which the output error of a layer is reported.
pub const REPORT_TOKENS: usize = 512;

/// Bins of the error histogram, over errors of -2 to 2 steps of the grid.
pub const HISTOGRAM_BINS: usize = 40;

/// What a layer was and what quantising it cost.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerResult {
    /// Module name.
    pub module: String,
    /// Role label, e.g. `query`.
    pub role: String,
    /// Block index.
    pub block: usize,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Bits per code, where every weight has a code of its own.
    #[serde(default)]
    pub bits: Option<u8>,
    /// Weights per scale, where there are groups.
    #[serde(default)]
    pub group_size: Option<usize>,
    /// Bits per weight including all side information.
    pub bits_per_weight: f64,
    /// Share of weights that are exactly zero, for pruned layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// `‖W - Ŵ‖² / ‖W‖²`.
    pub weight_error: f64,
    /// `‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖²` on calibration tokens; absent without calibration.
    pub output_error: Option<f64>,
    /// How many weights moved by how many steps of the grid: [`HISTOGRAM_BINS`] bins over [-2, 2];
    /// empty where there is no grid along the input.
    #[serde(default)]
    pub histogram: Vec<u64>,
    /// What the method has to say: loss, damping, chosen exponent, ...
    pub details: BTreeMap<String, serde_json::Value>,
}

/// The calibration windows: `[windows, length]` token ids and how they are cut into batches.
#[derive(Debug, Clone)]
pub struct Calibration {
    tokens: Vec<u32>,
    length: usize,
    per_batch: usize,
}

/// Tokens that are computed together.
const BATCH_TOKENS: usize = 2048;

impl Calibration {
    /// Windows of `length` tokens, end to end.
    pub fn new(tokens: Vec<u32>, length: usize) -> Result<Self> {
        if length < 2 || tokens.is_empty() || !tokens.len().is_multiple_of(length) {
            return Err(Error::Options(format!(
                "{} tokens are not whole calibration windows of {length}",
                tokens.len()
            )));
        }
        Ok(Self { tokens, length, per_batch: (BATCH_TOKENS / length).max(1) })
    }

    /// The first `count` windows, or all there are.
    ///
    /// # Errors
    /// When that leaves none.
    pub fn first(&self, count: usize) -> Result<Self> {
        let tokens = count.min(self.windows()) * self.length;
        Self::new(self.tokens.get(..tokens).unwrap_or_default().to_vec(), self.length)
    }

    /// Every window `times` times, each copy rolled on by an equal part of its length: what stood at
    /// `t` stands at `t + length · m / times` in copy `m`, and the end comes round to the start.
    ///
    /// # Errors
    /// When there are no whole windows.
    pub fn expanded(&self, times: usize) -> Result<Self> {
        let mut tokens = Vec::with_capacity(self.tokens.len() * times);
        for copy in 0..times {
            for window in self.tokens.chunks(self.length) {
                let start = tokens.len();
                tokens.extend_from_slice(window);
                if let Some(window) = tokens.get_mut(start..) {
                    window.rotate_right(self.length * copy / times);
                }
            }
        }
        Self::new(tokens, self.length)
    }

    /// No calibration at all.
    pub fn none() -> Self {
        Self { tokens: Vec::new(), length: 2, per_batch: 1 }
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// All token ids.
    pub fn ids(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens per window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Number of windows.
    pub fn windows(&self) -> usize {
        self.tokens.len() / self.length
    }

    /// Number of batches.
    pub fn batches(&self) -> usize {
        self.windows().div_ceil(self.per_batch)
    }

    /// Token ids and geometry of batch `index`.
    pub fn batch(&self, index: usize) -> (&[u32], Batch) {
        let size = self.per_batch * self.length;
        let start = (index * size).min(self.tokens.len());
        let tokens = &self.tokens[start..(start + size).min(self.tokens.len())];
        (tokens, Batch::new(tokens.len() / self.length, self.length))
    }
}

/// One block being compressed.
pub struct BlockJob<'a> {
    /// The network.
    pub decoder: &'a Decoder,
    /// Index of the block.
    pub index: usize,
    /// What is to be done with its linears, by set.
    pub sets: &'a [Vec<LayerPlan>],
    /// The working copy: f32 weights of this block.
    pub weights: Overlay<'a>,
    /// The calibration windows.
    pub calibration: &'a Calibration,
    /// Precision in which scales are stored.
    pub scale_type: ScaleType,
    /// Residual stream at the block's current point, one slot per batch.
    pub resid: &'a mut Activations,
    /// The branch between two stages, one slot per batch.
    pub branch: &'a mut Activations,
    /// Input channels that stay out of rounding, by module (ordinary weights only: no packed format
    /// can hold them).
    pub kept: BTreeMap<String, Vec<usize>>,
    /// The layers that are stored in packed form, by module.
    pub stored: BTreeMap<String, Stored>,
    /// What compressing them cost.
    pub results: Vec<LayerResult>,
    /// Things the user should know.
    pub warnings: Vec<String>,
    /// What the job wants back from every block when it has done the last one.
    pub record: Option<serde_json::Value>,
    /// Files that belong to this block, by path inside the output.
    pub files: Vec<(String, Vec<u8>)>,
}

impl BlockJob<'_> {
    /// Runs one stage over all batches with the working copy as it stands.
    pub fn run_stage(&mut self, stage: Stage, taps: &mut Taps<'_>) -> Result<()> {
        for batch in 0..self.calibration.batches() {
            let state = self.load(batch, stage == Stage::Norm1)?;
            let (_, geometry) = self.calibration.batch(batch);
            let mut context = Context::new(geometry);
            let state =
                self.decoder.stage(self.index, stage, &self.weights, state, &mut context, taps)?;
            if stage == Stage::Contract {
                self.branch.take(batch)?;
                self.resid.put(batch, host::into_vec(state.resid))?;
            } else {
                self.resid.put(batch, host::into_vec(state.resid))?;
                self.branch.put(batch, host::into_vec(state.x))?;
            }
        }
        Ok(())
    }

    /// The state of a batch; a block about to start has only the residual stream.
    fn load(&mut self, batch: usize, start: bool) -> Result<BlockState> {
        let rows = self.calibration.batch(batch).1.rows();
        let resid = self.resid.take(batch)?;
        let resid = self.tensor(resid, rows);
        if start {
            return Ok(BlockState::new(resid));
        }
        let x = self.branch.take(batch)?;
        Ok(BlockState { x: self.tensor(x, rows), resid })
    }

    /// `values` as `[rows, values / rows]`.
    pub fn tensor(&self, values: Vec<f32>, rows: usize) -> Tensor<2> {
        let width = values.len() / rows.max(1);
        host::from_vec(values, [rows, width], &self.weights.device())
    }

    /// The working copy of a linear layer.
    pub fn matrix(&self, name: &Name) -> Result<Matrix> {
        let values = host::into_vec(self.weights.matrix(name)?);
        let matrix = Matrix::new(name.out_features(), name.in_features(), values)?;
        matrix.check_finite(&name.module)?;
        Ok(matrix)
    }

    /// Refuses a block with NaN or infinity in any of its tensors, naming the first. Left in, one
    /// bad weight shows as bad activations of layers that have nothing to do with it.
    pub fn check_finite(&self) -> Result<()> {
        for name in self.decoder.names(self.index)?.all() {
            let leaves = if name.bias { &[Leaf::Weight, Leaf::Bias][..] } else { &[Leaf::Weight] };
            for &leaf in leaves {
                let finite = if leaf == Leaf::Bias || name.role.is_norm() {
                    host::read(&self.weights.vector(name, leaf)?, all_finite)
                } else {
                    host::read(&self.weights.matrix(name)?, all_finite)
                };
                if !finite {
                    return Err(Error::layer(
                        name.tensor(leaf),
                        "holds NaN or infinity; the checkpoint is damaged or overflowed when it \
                         was saved",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Replaces the working copy of a linear layer.
    pub fn set_matrix(&mut self, name: &Name, values: Vec<f32>) {
        let tensor = host::from_vec(values, name.shape, &self.weights.device());
        self.weights.matrices.insert(name.weight(), tensor);
    }

    /// The working copy of a vector.
    pub fn vector(&self, name: &Name, leaf: Leaf) -> Result<Vec<f32>> {
        Ok(host::into_vec(self.weights.vector(name, leaf)?))
    }

    /// Replaces the working copy of a vector.
    pub fn set_vector(&mut self, name: &Name, leaf: Leaf, values: Vec<f32>) {
        let shape = [values.len()];
        let tensor = host::from_vec(values, shape, &self.weights.device());
        self.weights.vectors.insert(name.tensor(leaf), tensor);
    }

    /// The grid rules of a layer.
    pub fn grid(&self, options: &GridOptions) -> Result<Grid> {
        Ok(Grid { scale_type: self.scale_type, ..Grid::new(options)? })
    }

    /// Hands in a layer in packed form: records what it cost and puts its values into the working
    /// copy.
    ///
    /// `original` is what the layer computed with before (in the same channel scaling), `sample`
    /// calibration inputs in that scaling.
    pub fn hand_in(
        &mut self,
        name: &Name,
        original: &Matrix,
        stored: Stored,
        sample: Option<&TokenSample>,
        details: BTreeMap<String, serde_json::Value>,
    ) -> Result<()> {
        if let Stored::Grid(m) | Stored::Columns(m) = &stored
            && let Some(scale) = m.scales.iter().find(|s| !s.is_finite())
        {
            return Err(Error::layer(
                &name.module,
                format!(
                    "a group scale of {scale} does not fit the stored precision; the weights are \
                     too large, exclude the layer"
                ),
            ));
        }
        let mut values = nn::dequantize(&stored)?;
        let mut bits_per_weight = stored.bits_per_weight();
        if let Some(kept) = self.kept.get(&name.module) {
            let width = name.in_features();
            for (row, original) in values.chunks_mut(width).zip(original.values.chunks(width)) {
                kept.iter().for_each(|&channel| row[channel] = original[channel]);
            }
            let share = kept.len() as f64 / width as f64;
            bits_per_weight += share * (16.0 - f64::from(stored.bits().unwrap_or(16)));
        }
        let result = LayerResult {
            bits: stored.bits(),
            group_size: stored.group_size(),
            histogram: match &stored {
                Stored::Grid(m) => histogram(original, m, &values),
                Stored::Columns(m) => {
                    let values = transpose(&values, original.out_features, original.in_features);
                    histogram(&original.transposed(), m, &values)
                }
                Stored::Pyramid(_) => Vec::new(),
            },
            ..self.result(name, original, &values, bits_per_weight, sample, details)
        };
        self.results.push(result);
        self.set_matrix(name, values);
        self.stored.insert(name.module.clone(), stored);
        Ok(())
    }

    /// Hands in a layer whose new `values` are ordinary numbers, e.g. pruned; arguments as for
    /// [`BlockJob::hand_in`].
    pub fn hand_in_dense(
        &mut self,
        name: &Name,
        original: &Matrix,
        values: Vec<f32>,
        bits_per_weight: f64,
        sample: Option<&TokenSample>,
        details: BTreeMap<String, serde_json::Value>,
    ) {
        let zeros = values.iter().filter(|w| **w == 0.0).count();
        let mut result = self.result(name, original, &values, bits_per_weight, sample, details);
        result.sparsity = Some(zeros as f64 / values.len().max(1) as f64);
        self.results.push(result);
        self.set_matrix(name, values);
    }

    fn result(
        &self,
        name: &Name,
        original: &Matrix,
        values: &[f32],
        bits_per_weight: f64,
        sample: Option<&TokenSample>,
        details: BTreeMap<String, serde_json::Value>,
    ) -> LayerResult {
        let (error, norm) = original.squared_error(values);
        LayerResult {
            module: name.module.clone(),
            role: name.role.label().to_string(),
            block: self.index,
            shape: name.shape,
            bits: None,
            group_size: None,
            bits_per_weight,
            sparsity: None,
            weight_error: ratio(error, norm),
            output_error: sample.map(|sample| output_error(original, values, sample)),
            histogram: Vec::new(),
            details,
        }
    }
}

fn all_finite(values: &[f32]) -> bool {
    use rayon::prelude::*;
    values.par_chunks(1 << 14).all(|part| part.iter().all(|w| w.is_finite()))
}

fn ratio(error: f64, norm: f64) -> f64 {
    if norm > 0.0 { error / norm } else { 0.0 }
}

/// `‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖²` on a sample of inputs.
fn output_error(original: &Matrix, values: &[f32], sample: &TokenSample) -> f64 {
    let (out, width) = (original.out_features, original.in_features);
    let tokens = sample.rows().len() / width;
    let energy = |weights: &[f32]| -> f64 {
        let mut y = vec![0f32; tokens * out];
        tensor::skinny::linear_f32(sample.rows(), tokens, weights, out, width, None, &mut y);
        y.iter().map(|y| f64::from(*y) * f64::from(*y)).sum()
    };
    let difference: Vec<f32> = original.values.iter().zip(values).map(|(a, b)| a - b).collect();
    ratio(energy(&difference), energy(&original.values))
}

/// Counts of `(w - ŵ) / scale` over [-2, 2]; what lies outside goes to the outermost bins.
fn histogram(original: &Matrix, quantized: &QuantizedMatrix, values: &[f32]) -> Vec<u64> {
    let width = original.in_features;
    let groups = width.div_ceil(quantized.group_size);
    let mut counts = vec![0u64; HISTOGRAM_BINS];
    for (row, (w, q)) in original.values.chunks(width).zip(values.chunks(width)).enumerate() {
        for (column, (w, q)) in w.iter().zip(q).enumerate() {
            let group = match &quantized.group_index {
                Some(index) => index[column] as usize,
                None => column / quantized.group_size,
            };
            let steps = (w - q) / quantized.scales[row * groups + group];
            let bin = ((steps + 2.0) / 4.0 * HISTOGRAM_BINS as f32) as usize;
            counts[bin.min(HISTOGRAM_BINS - 1)] += 1;
        }
    }
    counts
}
