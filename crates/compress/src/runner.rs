//! The streaming block runner: load a block, calibrate, transform, write, drop.
//!
//! What happens to a block, and how what leaves it is written, is a [`Job`]'s business; quantising
//! is one (`quantize`), pruning another. Memory is one block's working copy, its statistics, and the
//! calibration activations at one block boundary (beyond `--memory` in a file). Every weight is read
//! once and written once. The output directory appears whole or not at all; after a kill at most
//! one block is done again.

use crate::activations::Activations;
use crate::block::{BlockJob, Calibration, LayerResult};
use crate::grid::ScaleType;
use crate::plan::{LayerPlan, Plan};
use crate::{Error, Result};
use nn::{Context, Decoder, Leaf, Model, Name, Overlay, Role, Stored, Taps, Weights};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use store::packed::sparse::{self, SparseLayout};
use store::packed::{Layout, own, pack};
use store::{Checkpoint, Dtype, WriteOptions, Writer};
use tensor::host;

/// How the layers that a job hands in are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// Ordinary weights, in the checkpoint's own type.
    Dense,
    /// A packed layout.
    Packed(Layout),
    /// Pruned layers in a sparse layout, the others dense.
    Sparse(SparseLayout),
}

/// A job on the runner.
pub trait Job {
    /// The verb, recorded in `strata.json`, e.g. `quantize`.
    fn verb(&self) -> &'static str;
    /// The method.
    fn slug(&self) -> &'static str;
    /// Whether blocks see calibration text.
    fn calibrates(&self) -> bool;
    /// How compressed layers are written.
    fn container(&self) -> Container;
    /// Bytes that calibration activations may take in memory, and the largest shard written.
    fn limits(&self) -> Limits;
    /// The options as `strata.json` records them.
    fn options(&self) -> Result<serde_json::Value>;
    /// What decides the bytes of the output besides the options: hashes of files that they name;
    /// `null` when there is nothing.
    fn inputs(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    /// Compresses one block.
    fn block(&mut self, job: &mut BlockJob<'_>) -> Result<()>;
    /// The `quantization_config` of the output's `config.json`; `modules` describes what was stored
    /// in Strata's own container.
    fn quantization_config(
        &self,
        plan: &Plan,
        layers: &[LayerResult],
        modules: own::Modules,
    ) -> Result<Option<serde_json::Value>>;
    /// JSON files to write at the end, from the records that blocks left
    /// ([`BlockJob::record`]), in order of the blocks.
    fn finish(
        &mut self,
        _records: Vec<serde_json::Value>,
    ) -> Result<Vec<(String, serde_json::Value)>> {
        Ok(Vec::new())
    }
}

/// What a job may use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of calibration activations in memory.
    pub memory: u64,
    /// Largest size of one output shard in bytes.
    pub max_shard_size: u64,
}

/// What a job reads: a network with its weights, as a checkpoint holds them or rewritten on the way
/// (rotated, for example).
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The network.
    pub decoder: &'a Decoder,
    /// What it computes with.
    pub weights: &'a dyn Weights,
    /// Where it comes from: stored types, companions, tensors outside the network.
    pub checkpoint: &'a Checkpoint,
    /// `config.json` of the output, before `quantization_config` is added.
    pub config: &'a serde_json::Value,
    /// The weights are not those of the checkpoint: every tensor is written from `weights`.
    pub rewritten: bool,
    /// The type in which tensors that stay dense are written, instead of their stored one.
    pub dense: Option<Dtype>,
}

impl<'a> Source<'a> {
    /// A model as it is.
    pub fn of(model: &'a Model) -> Result<Self> {
        Ok(Self {
            decoder: &model.decoder,
            weights: model.weights.as_ref(),
            checkpoint: &model.checkpoint,
            config: model.checkpoint.config()?,
            rewritten: false,
            dense: None,
        })
    }
}

/// What a finished job leaves behind.
#[derive(Debug)]
pub struct Outcome {
    /// The output directory.
    pub path: PathBuf,
    /// What compressing every layer cost, in order.
    pub layers: Vec<LayerResult>,
    /// Things the user should know.
    pub warnings: Vec<String>,
    /// What was done to the model as a whole, for the report.
    pub notes: Vec<String>,
    /// Blocks that an earlier, interrupted run had already done.
    pub resumed_blocks: usize,
    /// Bytes of calibration activations that went to a temporary file, at most.
    pub spilled_bytes: u64,
}

/// Where and how a job writes.
pub struct Target<'a> {
    /// Output directory.
    pub out: &'a Path,
    /// Take up an interrupted job.
    pub resume: bool,
    /// Replace an existing output.
    pub overwrite: bool,
    /// What the job is, beyond its options (command, input hashes); part of `strata.json`.
    pub provenance: serde_json::Value,
}

/// Runs `job` over the blocks of `source` as planned. `progress` counts blocks.
pub fn run_job(
    source: Source<'_>,
    plan: &Plan,
    job: &mut dyn Job,
    calibration: &Calibration,
    target: &Target<'_>,
    progress: &report::Progress,
) -> Result<Outcome> {
    refuse_quantized(source.checkpoint)?;
    let calibrates = job.calibrates();
    if calibrates && calibration.tokens() == 0 {
        return Err(Error::Options(format!(
            "{} needs calibration text, and there is none: give --calibration, or a method that \
             needs no data",
            job.slug()
        )));
    }
    let limits = job.limits();
    let mut writer = Writer::create(
        target.out,
        WriteOptions {
            max_shard_size: limits.max_shard_size,
            resume: target.resume,
            overwrite: target.overwrite,
            fingerprint: fingerprint(job, calibration, target)?,
            inputs: vec![source.checkpoint.path().to_path_buf()],
        },
    )?;
    let walk = Walk { source, calibration, container: job.container() };
    if writer.sealed().is_empty() {
        // Sealed together with the first block: a job that fails before that leaves nothing behind
        // that a corrected command would have to get past.
        walk.write_outer(&mut writer)?;
    }
    let mut done = Vec::new();
    for entry in writer.sealed() {
        let note: BlockNote = serde_json::from_value(entry.note.clone())
            .map_err(|e| Error::Options(format!("the journal of the job is damaged: {e}")))?;
        done.push(note);
    }
    let resumed_blocks = done.len();
    progress.set(resumed_blocks as u64);
    let scratch = writer.scratch_dir()?;
    let batches = calibration.batches();
    // The residual stream may use half of the budget, the branch between two stages the rest.
    let mut resid = Activations::new(batches, limits.memory / 2, &scratch);
    let mut branch = Activations::new(batches, limits.memory / 2, &scratch);
    if calibrates && resumed_blocks < plan.blocks.len() {
        walk.enter(resumed_blocks, &scratch, &mut resid)?;
    }
    let mut spilled_bytes = 0;
    for (index, sets) in plan.blocks.iter().enumerate().skip(resumed_blocks) {
        let mut block = open_block(
            source,
            index,
            sets,
            calibration,
            walk.scale_type(),
            &mut resid,
            &mut branch,
        )?;
        job.block(&mut block)?;
        for (file, bytes) in &block.files {
            writer.put_file(file, bytes)?;
        }
        let modules = walk.write_block(&mut writer, &block)?;
        let note = BlockNote {
            layers: block.results,
            warnings: block.warnings,
            modules,
            record: block.record,
        };
        for warning in &note.warnings {
            report::warn(warning);
        }
        spilled_bytes = spilled_bytes.max(resid.spilled_bytes() + branch.spilled_bytes());
        if calibrates && index + 1 < plan.blocks.len() {
            save_boundary(&scratch, index + 1, &resid)?;
        }
        let value = serde_json::to_value(&note)
            .map_err(|e| Error::Options(format!("the block's results cannot be noted: {e}")))?;
        writer.seal(&format!("block {index}"), value)?;
        remove_boundary(&scratch, index);
        done.push(note);
        progress.inc(1);
    }
    let (mut layers, mut warnings, mut records) = (Vec::new(), Vec::new(), Vec::new());
    let mut modules = own::Modules::new();
    for note in done {
        layers.extend(note.layers);
        warnings.extend(note.warnings);
        records.extend(note.record);
        modules.extend(note.modules);
    }
    for (file, contents) in job.finish(records)? {
        writer.put_json(&file, &contents)?;
    }
    let quantization = job.quantization_config(plan, &layers, modules)?;
    walk.write_companions(&mut writer, job, target, &layers, quantization)?;
    drop((resid, branch));
    let path = writer.finish()?;
    progress.finish();
    Ok(Outcome { path, layers, warnings, notes: Vec::new(), resumed_blocks, spilled_bytes })
}

/// The working copy of block `index`, its weights checked.
fn open_block<'a>(
    source: Source<'a>,
    index: usize,
    sets: &'a [Vec<LayerPlan>],
    calibration: &'a Calibration,
    scale_type: ScaleType,
    resid: &'a mut Activations,
    branch: &'a mut Activations,
) -> Result<BlockJob<'a>> {
    let mut weights = Overlay::new(source.weights);
    weights.load(source.decoder.names(index)?.all())?;
    let block = BlockJob {
        decoder: source.decoder,
        index,
        sets,
        weights,
        calibration,
        scale_type,
        resid,
        branch,
        kept: BTreeMap::new(),
        stored: BTreeMap::new(),
        results: Vec::new(),
        warnings: Vec::new(),
        record: None,
        files: Vec::new(),
    };
    block.check_finite()?;
    Ok(block)
}

/// Walks over the blocks as a job does, but writes no checkpoint: for passes that only look.
///
/// `done` blocks need not be visited again; the residual stream is kept in `scratch`, so that a
/// later call with more of them done goes on where this one was stopped.
pub(crate) fn walk(
    source: Source<'_>,
    plan: &Plan,
    calibration: &Calibration,
    memory: u64,
    done: usize,
    scratch: &Path,
    mut visit: impl FnMut(&mut BlockJob<'_>) -> Result<()>,
) -> Result<()> {
    let walk = Walk { source, calibration, container: Container::Dense };
    let batches = calibration.batches();
    let mut resid = Activations::new(batches, memory / 2, scratch);
    let mut branch = Activations::new(batches, memory / 2, scratch);
    // A kill between a block's result and its boundary leaves the boundary before.
    let first = (1..=done).rev().find(|&i| boundary_path(scratch, i).is_file()).unwrap_or(0);
    walk.enter(first, scratch, &mut resid)?;
    for (index, sets) in plan.blocks.iter().enumerate().skip(first) {
        let scale = walk.scale_type();
        let mut block =
            open_block(source, index, sets, calibration, scale, &mut resid, &mut branch)?;
        visit(&mut block)?;
        block.warnings.iter().for_each(|warning| report::warn(warning));
        if index + 1 < plan.blocks.len() {
            save_boundary(scratch, index + 1, &resid)?;
        }
        remove_boundary(scratch, index);
    }
    Ok(())
}

/// What the journal keeps of a block.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct BlockNote {
    layers: Vec<LayerResult>,
    warnings: Vec<String>,
    /// What Strata's own container holds.
    #[serde(default, skip_serializing_if = "own::Modules::is_empty")]
    modules: own::Modules,
    /// What the job wants back at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    record: Option<serde_json::Value>,
}

/// A job's identity: an interrupted job may only be resumed under the same one.
fn fingerprint(job: &dyn Job, calibration: &Calibration, target: &Target<'_>) -> Result<String> {
    let mut options = job.options()?;
    // Where activations spill changes no byte of the output.
    if let Some(options) = options.as_object_mut() {
        options.shift_remove("memory");
    }
    let value = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "job": job.verb(),
        "options": options,
        "calibration_tokens": calibration.ids(),
        "provenance": target.provenance,
        "inputs": job.inputs(),
    });
    serde_json::to_string(&value)
        .map_err(|e| Error::Options(format!("the options cannot be written: {e}")))
}

/// Refuses a checkpoint whose weights are already on an integer grid.
pub(crate) fn refuse_quantized(checkpoint: &Checkpoint) -> Result<()> {
    if store::packed::parse_config(checkpoint.config()?)?.is_some() {
        return Err(Error::Options(format!(
            "{} is already quantised; start from the original checkpoint",
            checkpoint.path().display()
        )));
    }
    Ok(())
}

/// Scales are stored in the model's own type where the format allows it.
pub(crate) fn scale_type(checkpoint: &Checkpoint, container: Container) -> ScaleType {
    let bfloat = checkpoint.infos().any(|info| info.dtype == Dtype::BF16);
    match container {
        Container::Packed(Layout::CompressedTensors | Layout::Strata) if bfloat => ScaleType::Bf16,
        _ => ScaleType::F16,
    }
}

/// Whether loaders of the format compute in half precision.
fn half(container: Container) -> bool {
    matches!(container, Container::Packed(Layout::AutoAwq | Layout::Gptq { .. }))
}

/// The type in which a tensor that stays dense is written.
pub(crate) fn dense_type(container: Container, source: Dtype) -> Dtype {
    match source {
        _ if half(container) && source.is_float() => Dtype::F16,
        Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => source,
        _ if source.is_float() => Dtype::F16,
        Dtype::Ggml(_) => Dtype::F16,
        _ => source,
    }
}

struct Walk<'a> {
    source: Source<'a>,
    calibration: &'a Calibration,
    container: Container,
}

impl Walk<'_> {
    fn scale_type(&self) -> ScaleType {
        scale_type(self.source.checkpoint, self.container)
    }

    fn dense_type(&self, source: Dtype) -> Dtype {
        match self.source.dense {
            Some(own) if source.is_float() => own,
            _ => dense_type(self.container, source),
        }
    }

    /// The type in which a tensor of the network is written; one that the checkpoint does not have
    /// (a head that was tied, a new name) takes after the checkpoint's largest tensor.
    fn type_of(&self, tensor: &str) -> Result<Dtype> {
        let checkpoint = self.source.checkpoint;
        if checkpoint.contains(tensor) {
            return Ok(self.dense_type(checkpoint.info(tensor)?.dtype));
        }
        let floats = checkpoint.infos().filter(|info| info.dtype.is_float());
        let largest = floats.max_by_key(|info| info.shape.iter().product::<usize>());
        Ok(self.dense_type(largest.map_or(Dtype::F32, |info| info.dtype)))
    }

    /// Writes everything outside the blocks, as it is but for its type.
    fn write_outer(&self, writer: &mut Writer) -> Result<()> {
        let decoder = self.source.decoder;
        let checkpoint = self.source.checkpoint;
        if self.source.rewritten {
            for name in decoder.other_names() {
                self.write_rewritten(writer, name)?;
            }
            return Ok(());
        }
        let in_blocks: BTreeSet<String> =
            (0..decoder.num_blocks()).flat_map(|i| decoder.block_tensors(i)).collect();
        let tied = decoder.config.tie_word_embeddings;
        for info in checkpoint.infos() {
            let name = &info.name;
            let duplicate =
                tied && name.ends_with("lm_head.weight") && *name != decoder.embed.weight();
            if in_blocks.contains(name) || decoder.is_buffer(name) || duplicate {
                continue;
            }
            let dtype = self.dense_type(info.dtype);
            if dtype == info.dtype {
                writer.add(name, dtype, &info.shape, &checkpoint.bytes(name)?)?;
            } else {
                self.add_dense(writer, name, &info.shape, dtype, &checkpoint.f32(name)?)?;
            }
            checkpoint.release(name);
        }
        Ok(())
    }

    /// Writes a module outside the blocks from the source's weights.
    fn write_rewritten(&self, writer: &mut Writer, name: &Name) -> Result<()> {
        let weight = name.weight();
        if name.role == Role::Head && self.source.decoder.config.tie_word_embeddings {
            return Ok(());
        }
        let weights = self.source.weights;
        if name.role.is_norm() {
            let values = host::into_vec(weights.vector(name, Leaf::Weight)?);
            self.add_dense(writer, &weight, &[values.len()], self.type_of(&weight)?, &values)?;
        } else if matches!(name.role, Role::Embed | Role::Position | Role::Head) {
            self.add_table(writer, name, self.type_of(&weight)?, weights)?;
        } else {
            self.add_matrix(writer, name, self.type_of(&weight)?, weights)?;
        }
        if let Some(bias) = name.bias_name() {
            let values = host::into_vec(weights.vector(name, Leaf::Bias)?);
            self.add_dense(writer, &bias, &[values.len()], self.type_of(&bias)?, &values)?;
        }
        Ok(())
    }

    /// Writes the tensors of a finished block in the order in which they compute; returns what
    /// Strata's own container holds of it.
    fn write_block(&self, writer: &mut Writer, job: &BlockJob<'_>) -> Result<own::Modules> {
        let mut modules = own::Modules::new();
        let pruned =
            |module: &str| job.results.iter().any(|r| r.module == module && r.sparsity.is_some());
        for name in self.source.decoder.names(job.index)?.all() {
            let weight = name.weight();
            match (job.stored.get(&name.module), self.container) {
                (Some(stored), Container::Packed(layout)) => {
                    if layout == Layout::Strata {
                        modules.insert(name.module.clone(), own::describe(stored));
                    }
                    self.add_packed(writer, name, stored, layout)?;
                }
                (_, Container::Sparse(layout)) if pruned(&name.module) => {
                    self.add_sparse(writer, name, layout, job)?;
                }
                _ if name.role.is_norm() => {
                    let values = job.vector(name, Leaf::Weight)?;
                    let shape = [values.len()];
                    self.add_dense(writer, &weight, &shape, self.type_of(&weight)?, &values)?;
                }
                _ => self.add_matrix(writer, name, self.type_of(&weight)?, &job.weights)?,
            }
            if let Some(bias) = name.bias_name() {
                let values = job.vector(name, Leaf::Bias)?;
                self.add_dense(writer, &bias, &[values.len()], self.type_of(&bias)?, &values)?;
            }
        }
        Ok(modules)
    }

    fn add_packed(
        &self,
        writer: &mut Writer,
        name: &Name,
        stored: &Stored,
        layout: Layout,
    ) -> Result<()> {
        let scale_type = match self.scale_type() {
            ScaleType::F16 => Dtype::F16,
            ScaleType::Bf16 => Dtype::BF16,
        };
        let tensors = match (layout, stored) {
            (Layout::Strata, stored) => own::pack(&name.module, stored, scale_type)?,
            (layout, Stored::Grid(quantized)) => {
                let mut tensors = pack(layout, &name.module, quantized)?;
                // Scales of a bfloat16 model are bfloat16 numbers; half precision would round them.
                for (_, dtype, _, bytes) in &mut tensors {
                    if *dtype == Dtype::F16
                        && let Some(exact) = store::convert::from_f32(&quantized.scales, scale_type)
                        && scale_type != Dtype::F16
                    {
                        (*dtype, *bytes) = (scale_type, exact);
                    }
                }
                tensors
            }
            (layout, other) => {
                return Err(Error::layer(
                    &name.module,
                    format!(
                        "is stored as {}, which the {layout} format cannot hold: use --format \
                         strata or dequantized",
                        other.kind()
                    ),
                ));
            }
        };
        for (tensor, dtype, shape, bytes) in tensors {
            writer.add(&tensor, dtype, &shape, &bytes)?;
        }
        Ok(())
    }

    /// Writes a pruned matrix in a sparse layout, in the checkpoint's own type.
    fn add_sparse(
        &self,
        writer: &mut Writer,
        name: &Name,
        layout: SparseLayout,
        job: &BlockJob<'_>,
    ) -> Result<()> {
        let values = host::into_vec(job.weights.matrix(name)?);
        let dtype = self.type_of(&name.weight())?;
        let bytes = store::convert::from_f32(&values, dtype).ok_or_else(|| {
            Error::layer(&name.module, format!("cannot be written as {}", dtype.name()))
        })?;
        for (tensor, dtype, shape, bytes) in
            sparse::pack(layout, &name.module, dtype, name.shape, &bytes)?
        {
            writer.add(&tensor, dtype, &shape, &bytes)?;
        }
        Ok(())
    }

    /// Writes a matrix the way the checkpoint stores it.
    fn add_matrix(
        &self,
        writer: &mut Writer,
        name: &Name,
        dtype: Dtype,
        weights: &dyn Weights,
    ) -> Result<()> {
        let values = host::into_vec(weights.matrix(name)?);
        let [out, width] = name.shape;
        if !name.transposed {
            return self.add_dense(writer, &name.weight(), &[out, width], dtype, &values);
        }
        let mut transposed = vec![0f32; values.len()];
        for (row, values) in values.chunks(width).enumerate() {
            for (column, &value) in values.iter().enumerate() {
                transposed[column * out + row] = value;
            }
        }
        self.add_dense(writer, &name.weight(), &[width, out], dtype, &transposed)
    }

    /// Writes an embedding or a head, the largest tensors there are, some rows at a time: only its
    /// stored bytes are ever held as a whole.
    fn add_table(
        &self,
        writer: &mut Writer,
        name: &Name,
        dtype: Dtype,
        weights: &dyn Weights,
    ) -> Result<()> {
        const VALUES: usize = 1 << 22;
        let [rows, width] = name.shape;
        let mut bytes = Vec::new();
        for start in (0..rows).step_by((VALUES / width.max(1)).max(1)) {
            let end = rows.min(start + (VALUES / width.max(1)).max(1));
            let ids: Vec<u32> = (start..end).map(|row| row as u32).collect();
            let values = host::into_vec(weights.embed(name, &ids)?);
            bytes.extend(self.encode(&name.weight(), dtype, &values)?);
        }
        Ok(writer.add(&name.weight(), dtype, &[rows, width], &bytes)?)
    }

    fn add_dense(
        &self,
        writer: &mut Writer,
        name: &str,
        shape: &[usize],
        dtype: Dtype,
        values: &[f32],
    ) -> Result<()> {
        Ok(writer.add(name, dtype, shape, &self.encode(name, dtype, values)?)?)
    }

    /// `values` as bytes of `dtype`.
    fn encode(&self, name: &str, dtype: Dtype, values: &[f32]) -> Result<Vec<u8>> {
        if let Some(at) = store::convert::overflows(values, dtype) {
            return Err(Error::layer(
                name,
                format!(
                    "value {} does not fit {}; use --format dequantized, which keeps the \
                     checkpoint's own type",
                    values.get(at).copied().unwrap_or_default(),
                    dtype.name()
                ),
            ));
        }
        store::convert::from_f32(values, dtype)
            .ok_or_else(|| Error::layer(name, format!("cannot be written as {}", dtype.name())))
    }

    /// The residual stream entering block `index`: from the embedding, or from what an interrupted
    /// run saved.
    fn enter(&self, index: usize, scratch: &Path, resid: &mut Activations) -> Result<()> {
        let decoder = self.source.decoder;
        let width = decoder.config.hidden_size;
        let mut saved = if index == 0 { None } else { Some(Boundary::open(scratch, index)?) };
        for batch in 0..self.calibration.batches() {
            let (tokens, geometry) = self.calibration.batch(batch);
            let values = match &mut saved {
                Some(saved) => saved.read(geometry.rows() * width)?,
                None => {
                    let context = Context::new(geometry);
                    let weights = self.source.weights;
                    host::into_vec(decoder.embed(weights, tokens, &context, &mut Taps::none())?)
                }
            };
            resid.put(batch, values)?;
        }
        Ok(())
    }

    /// Config, tokenizer and the rest of the directory, and the record of what was done.
    fn write_companions(
        &self,
        writer: &mut Writer,
        job: &dyn Job,
        target: &Target<'_>,
        layers: &[LayerResult],
        quantization: Option<serde_json::Value>,
    ) -> Result<()> {
        let checkpoint = self.source.checkpoint;
        let mut config = self.source.config.clone();
        if let Some(object) = config.as_object_mut().filter(|_| quantization.is_none()) {
            // A sparse checkpoint has been read as a dense one.
            object.shift_remove("quantization_config");
            object.shift_remove("compression_config");
        }
        if let (Some(json), Some(object)) = (quantization, config.as_object_mut()) {
            object.insert("quantization_config".into(), json.clone());
            if half(self.container) {
                for key in ["torch_dtype", "dtype"] {
                    if key == "torch_dtype" || object.contains_key(key) {
                        object.insert(key.into(), "float16".into());
                    }
                }
            }
            if matches!(self.container, Container::Packed(Layout::Gptq { .. })) {
                writer.put_json("quantize_config.json", &json)?;
            }
        }
        carry(writer, checkpoint)?;
        writer.put_json("config.json", &config)?;
        let mut record = serde_json::json!({
            "strata": env!("CARGO_PKG_VERSION"),
            "job": job.verb(),
            "method": job.slug(),
            "options": job.options()?,
            "calibration": {
                "windows": self.calibration.windows(),
                "length": self.calibration.length(),
            },
            "provenance": target.provenance,
            "inputs": job.inputs(),
            "layers": serde_json::to_value(layers).unwrap_or_default(),
        });
        if let Some(object) = record
            .as_object_mut()
            .filter(|record| record.get("inputs").is_some_and(|v| v.is_null()))
        {
            object.shift_remove("inputs");
        }
        writer.put_json("strata.json", &record)?;
        Ok(())
    }
}

/// Copies what lies beside the weights (tokenizer, generation settings, licence, ...) except what a
/// job writes itself: `config.json` and its own records.
pub(crate) fn carry(writer: &mut Writer, checkpoint: &Checkpoint) -> Result<()> {
    let own = [
        "config.json",
        "quantize_config.json",
        "strata.json",
        "report.html",
        "report.json",
        "losses.jsonl",
    ];
    let directory = checkpoint.directory();
    if checkpoint.gguf_metadata().is_some() {
        write_gguf_tokenizer(writer, checkpoint)?;
    } else if directory.join("config.json").is_file() {
        writer.carry(directory, &own)?;
    }
    Ok(())
}

/// A GGUF file holds its tokenizer inside; other containers need it as files.
fn write_gguf_tokenizer(writer: &mut Writer, checkpoint: &Checkpoint) -> Result<()> {
    let tokenizer = data::Tokenizer::from_checkpoint(checkpoint)?;
    for (name, text) in tokenizer.to_files()? {
        writer.put_file(name, text.as_bytes())?;
    }
    Ok(())
}

fn boundary_path(scratch: &Path, index: usize) -> PathBuf {
    scratch.join(format!("boundary-{index}.f32"))
}

/// Saves the residual stream entering block `index`, so that a killed job can go on from there.
fn save_boundary(scratch: &Path, index: usize, resid: &Activations) -> Result<()> {
    use std::io::Write;
    let path = boundary_path(scratch, index);
    let io = |e| Error::Io { path: path.display().to_string(), source: e };
    let mut file = std::fs::File::create(&path).map_err(io)?;
    for batch in 0..resid.len() {
        file.write_all(bytemuck::cast_slice(&resid.get(batch)?)).map_err(io)?;
    }
    file.sync_all().map_err(io)
}

fn remove_boundary(scratch: &Path, index: usize) {
    // A leftover costs disk until the job ends, nothing else.
    let _ = std::fs::remove_file(boundary_path(scratch, index));
}

/// A saved residual stream, read batch by batch.
struct Boundary {
    file: std::fs::File,
    path: PathBuf,
}

impl Boundary {
    fn open(scratch: &Path, index: usize) -> Result<Self> {
        let path = boundary_path(scratch, index);
        let file = std::fs::File::open(&path)
            .map_err(|source| Error::Io { path: path.display().to_string(), source })?;
        Ok(Self { file, path })
    }

    fn read(&mut self, count: usize) -> Result<Vec<f32>> {
        use std::io::Read;
        let mut values = vec![0f32; count];
        self.file
            .read_exact(bytemuck::cast_slice_mut(&mut values))
            .map_err(|source| Error::Io { path: self.path.display().to_string(), source })?;
        Ok(values)
    }
}
