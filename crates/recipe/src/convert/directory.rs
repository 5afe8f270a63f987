//! Writing a model directory: ordinary weights, a packed layout, or a sparse one.

use std::collections::{BTreeMap, BTreeSet};

use compress::grid::{Grid, Matrix, ScaleType};
use nn::{Decoder, Name};
use rayon::prelude::*;
use serde_json::Value;
use store::convert::{from_f32, overflows};
use store::packed::sparse::SparseLayout;
use store::packed::{
    Layout, QuantConfig, QuantizedMatrix, Scheme, Stored, check_packable, config_json, load,
    modules, own, pack, parse_config, sparse,
};
use store::{Checkpoint, Dtype, WriteOptions, Writer};

use super::layers::{Held, Source, describe, transpose};
use super::{ConvertJob, Converted, NumberType, Refused};
use crate::{Error, Result};

/// Files that belong to the source's own form.
const OWN: [&str; 6] = [
    "config.json",
    "quantize_config.json",
    "strata.json",
    "report.html",
    "report.json",
    "losses.jsonl",
];

/// The output directory with what is noted about it.
struct Output<'a> {
    writer: Writer,
    checkpoint: &'a Checkpoint,
    done: Converted,
}

impl<'a> Output<'a> {
    fn create(job: &ConvertJob, checkpoint: &'a Checkpoint) -> Result<Self> {
        let options = WriteOptions {
            max_shard_size: job.options.max_shard_size.0,
            resume: false,
            overwrite: job.overwrite,
            fingerprint: serde_json::to_string(&job.options).unwrap_or_default(),
            inputs: vec![checkpoint.path().to_path_buf()],
        };
        let writer = Writer::create(&job.out, options)?;
        let done = Converted {
            path: job.out.clone(),
            containers: (container_of(checkpoint)?, job.options.to.name().into()),
            bytes: (checkpoint.total_bytes(), 0),
            changes: BTreeMap::new(),
            notes: Vec::new(),
        };
        Ok(Self { writer, checkpoint, done })
    }

    /// Writes values in a floating-point type.
    fn dense(&mut self, name: &str, shape: &[usize], dtype: Dtype, values: &[f32]) -> Result<()> {
        let bad = |reason: String| Error::Recipe(format!("tensor {name}: {reason}"));
        if let Some(at) = overflows(values, dtype) {
            let value = values.get(at).copied().unwrap_or_default();
            return Err(bad(format!(
                "value {value:e} does not fit {}; --type f32 or bf16 holds it",
                dtype.name()
            )));
        }
        let bytes = from_f32(values, dtype)
            .ok_or_else(|| bad(format!("cannot be written as {}", dtype.name())))?;
        self.done.bytes.1 += bytes.len() as u64;
        Ok(self.writer.add(name, dtype, shape, &bytes)?)
    }

    /// Writes a tensor that is not a packed layer, in `dtype`.
    fn copy(&mut self, name: &str, dtype: Dtype) -> Result<()> {
        let checkpoint = self.checkpoint;
        let info = checkpoint.info(name)?;
        if dtype == info.dtype {
            let bytes = checkpoint.bytes(name)?;
            self.done.bytes.1 += bytes.len() as u64;
            self.writer.add(name, dtype, &info.shape, &bytes)?;
        } else {
            self.dense(name, &info.shape, dtype, &checkpoint.f32(name)?)?;
        }
        self.done.count(info.dtype.name(), dtype.name(), "");
        checkpoint.release(name);
        Ok(())
    }

    fn packed(&mut self, tensors: Vec<store::packed::PackedTensor>) -> Result<()> {
        for (tensor, dtype, shape, bytes) in tensors {
            self.done.bytes.1 += bytes.len() as u64;
            self.writer.add(&tensor, dtype, &shape, &bytes)?;
        }
        Ok(())
    }

    /// Configuration, tokenizer and the other files; makes the directory appear.
    fn finish(mut self, quantization: Option<Value>, number: Option<Dtype>) -> Result<Converted> {
        let directory = self.checkpoint.directory();
        if self.checkpoint.gguf_metadata().is_some() {
            match data::Tokenizer::from_checkpoint(self.checkpoint) {
                Ok(tokenizer) => {
                    for (name, text) in tokenizer.to_files()? {
                        self.writer.put_file(name, text.as_bytes())?;
                    }
                }
                Err(error) => self.done.note(format!("no tokenizer was written: {error}")),
            }
        } else if directory.join("config.json").is_file() {
            self.writer.carry(directory, &OWN)?;
        }
        if let Ok(config) = self.checkpoint.config() {
            let mut config = config.clone();
            if let Some(object) = config.as_object_mut() {
                object.shift_remove("quantization_config");
                object.shift_remove("compression_config");
                if let Some(name) = number.and_then(torch_name) {
                    object.shift_remove("dtype");
                    object.insert("torch_dtype".into(), name.into());
                }
                if let Some(value) = &quantization {
                    object.insert("quantization_config".into(), value.clone());
                }
            }
            self.writer.put_json("config.json", &config)?;
            if let Some(value) = &quantization
                && value.get("quant_method").and_then(Value::as_str) == Some("gptq")
            {
                self.writer.put_json("quantize_config.json", value)?;
            }
        }
        let record = serde_json::json!({
            "strata": env!("CARGO_PKG_VERSION"),
            "job": "convert",
            "from": self.done.containers.0,
            "to": self.done.containers.1,
            "changes": self.done.changes,
        });
        self.writer.put_json("strata.json", &record)?;
        self.done.path = self.writer.finish()?;
        Ok(self.done)
    }
}

/// PyTorch's name of a type.
fn torch_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::F32 => Some("float32"),
        Dtype::F16 => Some("float16"),
        Dtype::BF16 => Some("bfloat16"),
        _ => None,
    }
}

/// What the source is, for people: `gptq`, `sparse-bitmask`, `gguf`, `safetensors`.
fn container_of(checkpoint: &Checkpoint) -> Result<String> {
    let config = checkpoint.config().ok();
    if let Some(config) = config.map(parse_config).transpose()?.flatten() {
        return Ok(config.layout.name().into());
    }
    let sparse = config.and_then(sparse::layout_of);
    Ok(sparse.map_or(checkpoint.container().name(), SparseLayout::name).into())
}

/// The type in which ordinary numbers are written.
fn dense_type(number: Option<NumberType>, stored: Dtype) -> Dtype {
    match (number, stored) {
        (_, stored) if !stored.is_float() => stored,
        (Some(NumberType::F32), _) => Dtype::F32,
        (Some(NumberType::F16), _) => Dtype::F16,
        (Some(NumberType::Bf16), _) => Dtype::BF16,
        (_, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) => stored,
        _ => Dtype::F16,
    }
}

/// The type in which a dequantised layer is written: as asked, else that of its scales.
fn dequantised_type(number: Option<NumberType>, stored: &Stored) -> Dtype {
    let scales: &[f32] = match stored {
        Stored::Grid(m) | Stored::Columns(m) => &m.scales,
        Stored::Pyramid(m) => &m.norms,
    };
    let half = scales.iter().all(|s| half::f16::from_f32(*s).to_f32() == *s);
    dense_type(number, if half { Dtype::F16 } else { Dtype::BF16 })
}

/// Ordinary weights. Works for any checkpoint, also of networks that Strata does not know.
pub(super) fn dense(job: &ConvertJob) -> Result<Converted> {
    let checkpoint = Checkpoint::open(&job.model)?;
    let number = job.options.number;
    let config = match checkpoint.config() {
        Ok(config) => parse_config(config)?,
        Err(_) => None,
    };
    let packed = match &config {
        Some(config) => modules(config.layout, &checkpoint),
        None => Vec::new(),
    };
    // Only the network knows which of its weights are stored transposed.
    let decoder = Decoder::from_checkpoint(&checkpoint).ok();
    let transposed: BTreeSet<&str> = decoder
        .iter()
        .flat_map(Decoder::all_names)
        .filter(|name| name.transposed)
        .map(|name| name.module.as_str())
        .collect();
    if let (Some(_), None) = (&config, &decoder) {
        report::warn("the architecture is not known: packed layers are written as [out, in]");
    }
    let mut out = Output::create(job, &checkpoint)?;
    let mut types = BTreeSet::new();
    let progress =
        report::Progress::new("convert", (packed.len() + checkpoint.len()) as u64, "tensors");
    for module in &packed {
        let Some(config) = &config else { continue };
        let stored = load(&checkpoint, module, config)?;
        let dtype = dequantised_type(number, &stored);
        let values = nn::dequantize(&stored)?;
        let [rows, columns] = stored.shape();
        let name = format!("{module}.weight");
        if transposed.contains(module.as_str()) {
            out.dense(&name, &[columns, rows], dtype, &transpose(&values, columns))?;
        } else {
            out.dense(&name, &[rows, columns], dtype, &values)?;
        }
        let from = format!("{} {}", config.layout, describe(&stored));
        out.done.count(&from, dtype.name(), "dequantised");
        types.insert(dtype.name());
        progress.inc(1);
    }
    let packed: BTreeSet<&str> = packed.iter().map(String::as_str).collect();
    for info in checkpoint.infos() {
        progress.inc(1);
        let Some((module, leaf)) = info.name.rsplit_once('.') else {
            out.copy(&info.name, dense_type(number, info.dtype))?;
            continue;
        };
        if packed.contains(module) && leaf != "bias" && leaf != "weight" {
            continue;
        }
        let dtype = dense_type(number, info.dtype);
        if info.shape.len() > 1 && dtype.is_float() {
            types.insert(dtype.name());
        }
        out.copy(&info.name, dtype)?;
    }
    progress.finish();
    let one = match types.iter().collect::<Vec<_>>().as_slice() {
        [name] => Dtype::parse(name),
        _ => None,
    };
    out.finish(None, one)
}

/// What becomes of a layer on the way into a packed layout.
enum Fate {
    /// Its grid is written as it is.
    Keep,
    /// Its scales are rounded to half precision, the codes kept.
    RoundScales,
    /// Its values are rounded to a new grid.
    Round,
    /// It stays dense.
    Dense,
}

/// A packed layout.
pub(super) fn packed(job: &ConvertJob, layout: Layout) -> Result<Converted> {
    let source = Source::open(&job.model)?;
    let fates = fates(job, &source, layout)?;
    let decoder = &source.model.decoder;
    let halves = matches!(layout, Layout::AutoAwq | Layout::Gptq { .. });
    let mut out = Output::create(job, source.checkpoint())?;
    let mut schemes: Vec<(String, Scheme)> = Vec::new();
    let mut own_modules = own::Modules::new();
    let mut ignored = Vec::new();
    let mut act_order = false;
    let progress = report::Progress::new("convert", fates.len() as u64, "layers");
    for (name, fate) in &fates {
        progress.inc(1);
        let from = source.describe(name)?;
        let (stored, how) = match fate {
            Fate::Dense => {
                ignored.push(name.module.clone());
                continue;
            }
            Fate::Keep => (kept(&source, name)?, "same codes"),
            Fate::RoundScales => {
                let Stored::Grid(mut m) = kept(&source, name)? else {
                    return Err(Error::Recipe(format!("{}: no grid along the input", name.module)));
                };
                m.scales.iter_mut().for_each(|s| *s = ScaleType::F16.round(*s));
                (Stored::Grid(m), "same codes, scales rounded")
            }
            Fate::Round => (Stored::Grid(round(job, &source, name)?), "rounded"),
        };
        if layout == Layout::Strata {
            let scale_type = scale_type(&stored);
            out.packed(own::pack(&name.module, &stored, scale_type)?)?;
            own_modules.insert(name.module.clone(), own::describe(&stored));
        } else if let Stored::Grid(m) = &stored {
            act_order |= m.group_index.is_some();
            let group_size = (m.group_size < m.in_features).then_some(m.group_size);
            let scheme = Scheme { bits: m.bits, group_size, symmetric: m.symmetric };
            schemes.push((name.module.clone(), scheme));
            out.packed(pack_exact(layout, &name.module, m)?)?;
        }
        out.done.count(&from, &format!("{layout} {}", describe(&stored)), how);
    }
    let packed: BTreeSet<&str> = fates
        .iter()
        .filter(|(_, fate)| !matches!(fate, Fate::Dense))
        .map(|(name, _)| name.module.as_str())
        .collect();
    write_rest(&mut out, decoder, &packed, |dtype| match dense_type(job.options.number, dtype) {
        dtype if halves && dtype.is_float() => Dtype::F16,
        dtype => dtype,
    })?;
    progress.finish();
    let config = quant_config(layout, schemes, ignored, act_order, own_modules, &source);
    let quantised: Vec<String> = packed.iter().map(|m| m.to_string()).collect();
    let value = config_json(&config, &quantised, &config.ignore);
    out.finish(Some(value), halves.then_some(Dtype::F16))
}

fn kept(source: &Source, name: &Name) -> Result<Stored> {
    source
        .stored(name)?
        .ok_or_else(|| Error::Recipe(format!("{}: is not stored as codes", name.module)))
}

/// The type that holds all scales as they are.
fn scale_type(stored: &Stored) -> Dtype {
    dequantised_type(None, stored)
}

/// Packs a grid; scales that are no half-precision numbers stay bfloat16 where the layout allows.
fn pack_exact(
    layout: Layout,
    module: &str,
    m: &QuantizedMatrix,
) -> Result<Vec<store::packed::PackedTensor>> {
    let half = m.scales.iter().all(|s| half::f16::from_f32(*s).to_f32() == *s);
    if half || layout != Layout::CompressedTensors {
        return Ok(pack(layout, module, m)?);
    }
    let rounded = QuantizedMatrix {
        scales: m.scales.iter().map(|s| half::f16::from_f32(*s).to_f32()).collect(),
        ..m.clone()
    };
    let mut tensors = pack(layout, module, &rounded)?;
    for (name, dtype, _, bytes) in &mut tensors {
        if name.ends_with(".weight_scale")
            && let Some(exact) = from_f32(&m.scales, Dtype::BF16)
        {
            (*dtype, *bytes) = (Dtype::BF16, exact);
        }
    }
    Ok(tensors)
}

/// Decides about every linear layer of the blocks; refuses what would lose information unasked.
fn fates(job: &ConvertJob, source: &Source, layout: Layout) -> Result<Vec<(Name, Fate)>> {
    let decoder = &source.model.decoder;
    let names: Vec<Name> = (0..decoder.num_blocks()).flat_map(|i| decoder.linears(i)).collect();
    let any_codes = names
        .iter()
        .map(|name| source.held(name))
        .collect::<Result<Vec<_>>>()?
        .iter()
        .any(|held| !matches!(held, Held::Dense(_)));
    let mut refused = Refused::default();
    let mut fates = Vec::new();
    // AutoAWQ's configuration has one grid for all layers.
    let mut common: Option<(u8, usize)> = None;
    for name in names {
        let held = source.held(&name)?;
        let stored = source.stored(&name)?;
        let fate = match stored {
            None if matches!(held, Held::Dense(_)) && any_codes => Fate::Dense,
            None => {
                let what = source.describe(&name)?;
                let reason = format!("{what} weights are not on an even grid");
                lossy(job, &name, reason, &mut refused)
            }
            Some(stored) => match obstacle(layout, &name.module, &stored, &mut common) {
                None => Fate::Keep,
                Some((reason, scales_only)) => match lossy(job, &name, reason, &mut refused) {
                    Fate::Round if scales_only => Fate::RoundScales,
                    fate => fate,
                },
            },
        };
        fates.push((name, fate));
    }
    let advice = if any_codes {
        "--to safetensors writes them dequantised, --lossy rounds them to a grid that fits"
    } else {
        "`strata quantize` chooses codes well; --lossy rounds to nearest"
    };
    refused.check(layout.name(), advice)?;
    Ok(fates)
}

fn lossy(job: &ConvertJob, name: &Name, reason: String, refused: &mut Refused) -> Fate {
    if !job.options.lossy {
        refused.add(&name.module, reason);
    }
    Fate::Round
}

/// Why a layout cannot hold a layer as it is, and whether only its scales are in the way.
fn obstacle(
    layout: Layout,
    module: &str,
    stored: &Stored,
    common: &mut Option<(u8, usize)>,
) -> Option<(String, bool)> {
    if layout == Layout::Strata {
        return None;
    }
    let Stored::Grid(m) = stored else {
        return Some((
            format!("it is stored as {}, not in groups along the input", stored.kind()),
            false,
        ));
    };
    if let Err(error) = check_packable(layout, module, m) {
        return Some((error.to_string(), false));
    }
    if layout == (Layout::Gptq { v2: false }) && m.zeros.contains(&0) {
        let reason = "a zero point is 0, which GPTQ v1 (zero - 1) cannot hold; gptq-v2 can";
        return Some((reason.into(), false));
    }
    if layout == Layout::AutoAwq {
        let grid = *common.get_or_insert((m.bits, m.group_size));
        if grid != (m.bits, m.group_size) {
            return Some(("AutoAWQ has one group size for all layers".into(), false));
        }
    }
    let half = m.scales.iter().all(|s| half::f16::from_f32(*s).to_f32() == *s);
    if !half && layout != Layout::CompressedTensors {
        return Some(("its scales are not half-precision numbers".into(), true));
    }
    None
}

/// Rounds the values of a layer to the grid of the options.
fn round(job: &ConvertJob, source: &Source, name: &Name) -> Result<QuantizedMatrix> {
    let [rows, columns] = name.shape;
    let matrix = Matrix::new(rows, columns, source.values(name)?)?;
    matrix.check_finite(&name.module)?;
    let options = &job.options.grid;
    let m = compress::rtn::quantize(&matrix, &Grid::new(options)?, options);
    if let Some(layout) = job.options.to.layout() {
        check_packable(layout, &name.module, &m)?;
    }
    Ok(m)
}

/// Everything that is no packed layer.
fn write_rest(
    out: &mut Output<'_>,
    decoder: &Decoder,
    packed: &BTreeSet<&str>,
    number: impl Fn(Dtype) -> Dtype,
) -> Result<()> {
    let checkpoint = out.checkpoint;
    let tied = decoder.config.tie_word_embeddings;
    for info in checkpoint.infos() {
        let name = info.name.as_str();
        let part = name
            .rsplit_once('.')
            .is_some_and(|(module, leaf)| packed.contains(module) && leaf != "bias");
        let duplicate = tied && name.ends_with("lm_head.weight") && name != decoder.embed.weight();
        if part || duplicate || decoder.is_buffer(name) {
            continue;
        }
        out.copy(name, number(info.dtype))?;
    }
    Ok(())
}

/// The description of a packed output: the most frequent grid is the rule, the others exceptions.
fn quant_config(
    layout: Layout,
    schemes: Vec<(String, Scheme)>,
    ignored: Vec<String>,
    act_order: bool,
    own_modules: own::Modules,
    source: &Source,
) -> QuantConfig {
    let mut counts: Vec<(Scheme, usize)> = Vec::new();
    for (_, scheme) in &schemes {
        match counts.iter_mut().find(|(known, _)| known == scheme) {
            Some((_, count)) => *count += 1,
            None => counts.push((scheme.clone(), 1)),
        }
    }
    let rule = counts.iter().max_by_key(|(_, count)| *count).map(|(scheme, _)| scheme.clone());
    let rule = rule.unwrap_or(Scheme { bits: 4, group_size: None, symmetric: true });
    let mut config = QuantConfig::new(layout, rule.bits, rule.group_size, rule.symmetric);
    config.desc_act = act_order;
    config.static_groups = source.config.as_ref().is_some_and(|c| c.static_groups);
    config.overrides = schemes.into_iter().filter(|(_, scheme)| *scheme != rule).collect();
    config.ignore = ignored;
    config.ignore.push("lm_head".into());
    config.modules = own_modules;
    config
}

/// Layers with a smaller share of zeros than this count as not pruned.
const PRUNED: f64 = 0.05;

/// A sparse layout.
pub(super) fn sparse(job: &ConvertJob, layout: SparseLayout) -> Result<Converted> {
    let source = Source::open(&job.model)?;
    let decoder = &source.model.decoder;
    let names: Vec<Name> = (0..decoder.num_blocks()).flat_map(|i| decoder.linears(i)).collect();
    let checkpoint = source.checkpoint();
    let mut refused = Refused::default();
    for name in &names {
        if !matches!(source.held(name)?, Held::Dense(_)) && !job.options.lossy {
            let what = source.describe(name)?;
            refused.add(&name.module, format!("{what}: codes would become {layout} floats"));
        }
    }
    refused.check(layout.name(), "--lossy writes the dequantised values")?;
    let mut out = Output::create(job, checkpoint)?;
    let (mut pruned, mut ignored) = (BTreeSet::new(), Vec::new());
    let (mut zeros, mut total) = (0u64, 0u64);
    let progress = report::Progress::new("convert", names.len() as u64, "layers");
    for name in &names {
        let values = source.values(name)?;
        let zero = values.par_iter().filter(|v| **v == 0.0).count();
        progress.inc(1);
        if (zero as f64) < PRUNED * values.len() as f64 {
            ignored.push(name.module.clone());
            continue;
        }
        let stored = match source.held(name)? {
            Held::Dense(dtype) => dtype,
            _ => Dtype::F16,
        };
        let dtype = dense_type(job.options.number, stored);
        let [rows, columns] = name.shape;
        let (shape, values) = if name.transposed {
            ([columns, rows], transpose(&values, columns))
        } else {
            ([rows, columns], values)
        };
        if overflows(&values, dtype).is_some() {
            return Err(Error::Recipe(format!("{}: does not fit {}", name.module, dtype.name())));
        }
        let bytes = from_f32(&values, dtype).ok_or_else(|| {
            Error::Recipe(format!("{}: cannot be written as {}", name.module, dtype.name()))
        })?;
        out.packed(sparse::pack(layout, &name.module, dtype, shape, &bytes)?)?;
        let from = source.describe(name)?;
        out.done.count(&from, &format!("{layout} {}", dtype.name()), "same values");
        pruned.insert(name.module.clone());
        zeros += zero as u64;
        total += values.len() as u64;
    }
    progress.finish();
    if pruned.is_empty() {
        return Err(Error::Recipe(format!(
            "{}: no layer has {} zeros, so {layout} would save nothing; `strata prune` makes some",
            job.model.display(),
            report::human::percent(PRUNED)
        )));
    }
    let packed: BTreeSet<&str> = pruned.iter().map(String::as_str).collect();
    write_rest(&mut out, decoder, &packed, |dtype| dense_type(job.options.number, dtype))?;
    let share = zeros as f64 / (total as f64).max(1.0);
    if decoder.config.tie_word_embeddings || checkpoint.contains("lm_head.weight") {
        ignored.push("lm_head".into());
    }
    out.finish(Some(sparse::config_json(layout, share, &ignored)), None)
}
