//! The streaming block runner: load a block, calibrate, transform, write, drop.
//!
//! Memory is one block's working copy, its statistics, and the calibration activations at one
//! block boundary (beyond `--memory` in a file). Every weight is read once and written once. The
//! output directory appears whole or not at all; after a kill at most one block is done again.

use crate::activations::Activations;
use crate::block::{BlockJob, Calibration, LayerResult};
use crate::grid::ScaleType;
use crate::options::{Format, Method, QuantizeOptions};
use crate::plan::Plan;
use crate::{Error, Result};
use nn::{Context, Leaf, Model, Name, Overlay, Taps};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use store::packed::{QuantConfig, QuantizedMatrix, Scheme, pack};
use store::{Checkpoint, Dtype, WriteOptions, Writer};
use tensor::host;

/// What a finished job leaves behind.
#[derive(Debug)]
pub struct Outcome {
    /// The output directory.
    pub path: PathBuf,
    /// What quantising every layer cost, in order.
    pub layers: Vec<LayerResult>,
    /// Things the user should know.
    pub warnings: Vec<String>,
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

/// Quantises `model` as planned. `progress` counts blocks.
pub fn run(
    model: &Model,
    plan: &Plan,
    options: &QuantizeOptions,
    calibration: &Calibration,
    target: &Target<'_>,
    progress: &report::Progress,
) -> Result<Outcome> {
    refuse_quantized(&model.checkpoint)?;
    if options.calibrates() && calibration.tokens() == 0 {
        return Err(Error::Options(format!(
            "{} needs calibration text, and there is none: give --calibration, or use --method rtn",
            options.method.slug()
        )));
    }
    let prepared = crate::awq::Prepared::new(&model.decoder, options)?;
    let fingerprint = fingerprint(options, calibration, target, &prepared.inputs)?;
    let mut writer = Writer::create(
        target.out,
        WriteOptions {
            max_shard_size: options.max_shard_size.0,
            resume: target.resume,
            overwrite: target.overwrite,
            fingerprint,
            inputs: vec![model.checkpoint.path().to_path_buf()],
        },
    )?;
    let walk = Walk { model, plan, options, calibration, inputs: &prepared.inputs };
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
    let budget = options.memory.0;
    let batches = calibration.batches();
    // The residual stream may use half of the budget, the branch between two stages the rest.
    let mut resid = Activations::new(batches, budget / 2, &scratch);
    let mut branch = Activations::new(batches, budget / 2, &scratch);
    let calibrates = options.calibrates();
    if calibrates && resumed_blocks < plan.blocks.len() {
        walk.enter(resumed_blocks, &scratch, &mut resid)?;
    }
    let mut spilled_bytes = 0;
    for (index, sets) in plan.blocks.iter().enumerate().skip(resumed_blocks) {
        let mut weights = Overlay::new(model.weights.as_ref());
        weights.load(model.decoder.names(index)?.all())?;
        let mut job = BlockJob {
            decoder: &model.decoder,
            index,
            sets,
            weights,
            calibration,
            scale_type: walk.scale_type(),
            resid: &mut resid,
            branch: &mut branch,
            kept: BTreeMap::new(),
            quantized: BTreeMap::new(),
            results: Vec::new(),
            warnings: Vec::new(),
        };
        job.check_finite()?;
        let mut search = None;
        match options.method {
            Method::Rtn => crate::rtn::quantize_block(&mut job)?,
            Method::Gptq => crate::gptq::quantize_block(&mut job, &options.gptq)?,
            Method::Awq => {
                let found = crate::awq::quantize_block(&mut job, options, &prepared)?;
                if options.awq.save_search {
                    let (record, file, bytes) = found.record(index)?;
                    writer.put_file(&file, &bytes)?;
                    search = Some(record);
                }
            }
        }
        walk.write_block(&mut writer, &job)?;
        let note = BlockNote { layers: job.results, warnings: job.warnings, search };
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
    let (mut layers, mut warnings, mut searches) = (Vec::new(), Vec::new(), Vec::new());
    for note in done {
        layers.extend(note.layers);
        warnings.extend(note.warnings);
        searches.extend(note.search);
    }
    if !searches.is_empty() {
        let contents = crate::awq::search_contents(&options.grid, searches)?;
        writer.put_json(crate::awq::SEARCH_FILE, &contents)?;
    }
    walk.write_companions(&mut writer, target, &layers)?;
    drop((resid, branch));
    let path = writer.finish()?;
    progress.finish();
    Ok(Outcome { path, layers, warnings, resumed_blocks, spilled_bytes })
}

/// What the journal keeps of a block.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct BlockNote {
    layers: Vec<LayerResult>,
    warnings: Vec<String>,
    /// What AWQ's search found, when it is to be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    search: Option<crate::awq::BlockRecord>,
}

/// A job's identity: an interrupted job may only be resumed under the same one.
fn fingerprint(
    options: &QuantizeOptions,
    calibration: &Calibration,
    target: &Target<'_>,
    inputs: &serde_json::Value,
) -> Result<String> {
    // Where activations spill changes no byte of the output.
    let options = QuantizeOptions { memory: Default::default(), ..options.clone() };
    let value = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "options": options,
        "calibration_tokens": calibration.ids(),
        "provenance": target.provenance,
        "inputs": inputs,
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

struct Walk<'a> {
    model: &'a Model,
    plan: &'a Plan,
    options: &'a QuantizeOptions,
    calibration: &'a Calibration,
    /// Hashes of the files that the method's options name.
    inputs: &'a serde_json::Value,
}

impl Walk<'_> {
    /// Scales are stored in the model's own type where the format allows it.
    fn scale_type(&self) -> ScaleType {
        let bfloat = self.model.checkpoint.infos().any(|info| info.dtype == Dtype::BF16);
        if bfloat && self.options.format == Format::CompressedTensors {
            ScaleType::Bf16
        } else {
            ScaleType::F16
        }
    }

    /// The type in which a tensor that stays dense is written.
    fn dense_type(&self, source: Dtype) -> Dtype {
        match self.options.format {
            // Loaders of these formats compute in half precision.
            Format::Awq | Format::Gptq | Format::GptqV2 if source.is_float() => Dtype::F16,
            _ => match source {
                Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => source,
                _ if source.is_float() => Dtype::F16,
                Dtype::Ggml(_) => Dtype::F16,
                _ => source,
            },
        }
    }

    /// Writes everything outside the blocks, as it is but for its type.
    fn write_outer(&self, writer: &mut Writer) -> Result<()> {
        let decoder = &self.model.decoder;
        let checkpoint = &self.model.checkpoint;
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

    /// Writes the tensors of a finished block in the order in which they compute.
    fn write_block(&self, writer: &mut Writer, job: &BlockJob<'_>) -> Result<()> {
        let checkpoint = &self.model.checkpoint;
        for name in self.model.decoder.names(job.index)?.all() {
            let weight = name.weight();
            let source = checkpoint.info(&weight)?.dtype;
            let layout = self.options.format.layout();
            match (job.quantized.get(&name.module), layout) {
                (Some(quantized), Some(layout)) => {
                    self.add_packed(writer, name, quantized, layout)?;
                }
                _ if name.role.is_norm() => {
                    let values = job.vector(name, Leaf::Weight)?;
                    let shape = [values.len()];
                    self.add_dense(writer, &weight, &shape, self.dense_type(source), &values)?;
                }
                _ => self.add_matrix(writer, name, self.dense_type(source), job)?,
            }
            if let Some(bias) = name.bias_name() {
                let values = job.vector(name, Leaf::Bias)?;
                let dtype = self.dense_type(checkpoint.info(&bias)?.dtype);
                self.add_dense(writer, &bias, &[values.len()], dtype, &values)?;
            }
        }
        Ok(())
    }

    fn add_packed(
        &self,
        writer: &mut Writer,
        name: &Name,
        quantized: &QuantizedMatrix,
        layout: store::packed::Layout,
    ) -> Result<()> {
        for tensor in pack(layout, &name.module, quantized)? {
            let (tensor_name, mut dtype, shape, mut bytes) = tensor;
            // Scales of a bfloat16 model are bfloat16 numbers; half precision would round them.
            if dtype == Dtype::F16 && self.scale_type() == ScaleType::Bf16 {
                bytes = store::convert::from_f32(&quantized.scales, Dtype::BF16).unwrap_or(bytes);
                dtype = Dtype::BF16;
            }
            writer.add(&tensor_name, dtype, &shape, &bytes)?;
        }
        Ok(())
    }

    /// Writes a matrix of the working copy the way the checkpoint stores it.
    fn add_matrix(
        &self,
        writer: &mut Writer,
        name: &Name,
        dtype: Dtype,
        job: &BlockJob<'_>,
    ) -> Result<()> {
        let values = host::into_vec(nn::Weights::matrix(&job.weights, name)?);
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

    fn add_dense(
        &self,
        writer: &mut Writer,
        name: &str,
        shape: &[usize],
        dtype: Dtype,
        values: &[f32],
    ) -> Result<()> {
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
        let bytes = store::convert::from_f32(values, dtype)
            .ok_or_else(|| Error::layer(name, format!("cannot be written as {}", dtype.name())))?;
        Ok(writer.add(name, dtype, shape, &bytes)?)
    }

    /// The residual stream entering block `index`: from the embedding, or from what an interrupted
    /// run saved.
    fn enter(&self, index: usize, scratch: &Path, resid: &mut Activations) -> Result<()> {
        let decoder = &self.model.decoder;
        let width = decoder.config.hidden_size;
        let mut saved = if index == 0 { None } else { Some(Boundary::open(scratch, index)?) };
        for batch in 0..self.calibration.batches() {
            let (tokens, geometry) = self.calibration.batch(batch);
            let values = match &mut saved {
                Some(saved) => saved.read(geometry.rows() * width)?,
                None => {
                    let context = Context::new(geometry);
                    let weights = self.model.weights.as_ref();
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
        target: &Target<'_>,
        layers: &[LayerResult],
    ) -> Result<()> {
        let checkpoint = &self.model.checkpoint;
        let mut config = checkpoint.config()?.clone();
        if let (Some(layout), Some(object)) = (self.options.format.layout(), config.as_object_mut())
        {
            let quantised: Vec<String> = layers.iter().map(|l| l.module.clone()).collect();
            let mut ignored: Vec<String> = self
                .plan
                .layers()
                .filter(|layer| layer.grid.is_none())
                .map(|layer| layer.name.module.clone())
                .collect();
            ignored.push("lm_head".into());
            let description = self.quant_config(layout, &ignored);
            let json = store::packed::config_json(&description, &quantised, &ignored);
            object.insert("quantization_config".into(), json.clone());
            if self.dense_type(Dtype::F32) == Dtype::F16 {
                for key in ["torch_dtype", "dtype"] {
                    if key == "torch_dtype" || object.contains_key(key) {
                        object.insert(key.into(), "float16".into());
                    }
                }
            }
            if matches!(self.options.format, Format::Gptq | Format::GptqV2) {
                writer.put_json("quantize_config.json", &json)?;
            }
        }
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
            self.write_gguf_tokenizer(writer)?;
        } else if directory.join("config.json").is_file() {
            writer.carry(directory, &own)?;
        }
        writer.put_json("config.json", &config)?;
        let mut record = serde_json::json!({
            "strata": env!("CARGO_PKG_VERSION"),
            "job": "quantize",
            "options": self.options,
            "calibration": {
                "windows": self.calibration.windows(),
                "length": self.calibration.length(),
            },
            "provenance": target.provenance,
            "inputs": self.inputs,
            "layers": serde_json::to_value(layers).unwrap_or_default(),
        });
        if let Some(object) = record.as_object_mut().filter(|_| self.inputs.is_null()) {
            object.shift_remove("inputs");
        }
        writer.put_json("strata.json", &record)?;
        Ok(())
    }

    /// A GGUF file holds its tokenizer inside; other containers need it as files.
    fn write_gguf_tokenizer(&self, writer: &mut Writer) -> Result<()> {
        let tokenizer = data::Tokenizer::from_checkpoint(&self.model.checkpoint)?;
        let mut config = serde_json::Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        for (key, id) in [("bos_token", tokenizer.bos()), ("eos_token", tokenizer.eos())] {
            if let Some(text) = id.and_then(|id| tokenizer.token_text(id)) {
                config.insert(key.into(), text.into());
            }
        }
        writer.put_file("tokenizer.json", tokenizer.to_json()?.as_bytes())?;
        Ok(writer.put_json("tokenizer_config.json", &config.into())?)
    }

    fn quant_config(&self, layout: store::packed::Layout, ignored: &[String]) -> QuantConfig {
        let grid = &self.options.grid;
        let group = match grid.granularity {
            crate::grid::Granularity::Group if grid.group_size > 0 => Some(grid.group_size),
            _ => None,
        };
        let gptq = &self.options.gptq;
        let by_gptq = self.options.rounds_by_gptq();
        let mut config = QuantConfig::new(layout, grid.bits, group, grid.symmetric);
        config.desc_act = by_gptq && gptq.act_order;
        config.static_groups = by_gptq && gptq.static_groups;
        config.damping = gptq.damping;
        config.ignore = ignored.to_vec();
        for layer in self.plan.layers() {
            let Some(own) = layer.grid.as_ref().filter(|own| *own != grid) else { continue };
            let group_size = (own.group_size > 0).then_some(own.group_size);
            let (bits, symmetric) = (own.bits, own.symmetric);
            config
                .overrides
                .push((layer.name.module.clone(), Scheme { bits, group_size, symmetric }));
        }
        config
    }
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
