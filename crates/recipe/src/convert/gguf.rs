//! Writing a model as a GGUF file: which tensor becomes which block type, and what is kept exactly.

use data::Tokenizer;
use nn::{Leaf, Name, Role};
use store::GgmlType;
use store::gguf::quantize::quantize;
use store::gguf::{Change, Export, TensorPlan, Value, encode_grid, grid_type, write};
use store::packed::{QuantizedMatrix, Stored};
use tensor::host;

use super::architecture::{architecture, metadata, padding, rope_factors, standard_module};
use super::layers::{Held, Source};
use super::{ConvertJob, Converted, NumberType, Refused};
use crate::{Error, Result};

/// What a tensor of the file is made from.
enum Content<'a> {
    /// A vector of a module, always F32.
    Vector(&'a Name, Leaf),
    /// The values of a matrix, encoded.
    Values(&'a Name),
    /// Codes and scales of a packed matrix, kept.
    Codes(&'a Name),
    /// Blocks of the source, kept.
    Blocks(&'a Name),
    /// Computed from the configuration.
    Fixed(Vec<f32>),
}

struct Item<'a> {
    plan: TensorPlan,
    change: Change,
    content: Content<'a>,
}

/// Writes `job.out`.
pub(super) fn convert(job: &ConvertJob) -> Result<Converted> {
    let source = Source::open(&job.model)?;
    refuse_input(job, &source)?;
    let config = &source.model.decoder.config;
    let mut done = Converted {
        path: job.out.clone(),
        containers: (source.checkpoint().container().name().into(), "gguf".into()),
        bytes: (source.checkpoint().total_bytes(), 0),
        changes: Default::default(),
        notes: Vec::new(),
    };
    let of_network = metadata(config, &mut done.notes)?;
    let items = plan(job, &source, &mut done)?;
    let tokenizer = tokenizer(job, &source, &mut done)?;
    let mut pairs = general(job, &source, &items)?;
    pairs.extend(of_network);
    pairs.extend(tokenizer);
    let plans: Vec<TensorPlan> = items.iter().map(|item| item.plan.clone()).collect();
    let progress = report::Progress::new("convert", plans.len() as u64, "tensors");
    let mut rest = items.iter();
    let size = write(&job.out, job.overwrite, &pairs, &plans, |plan| {
        let item =
            rest.next().ok_or_else(|| Error::Recipe(format!("{}: nothing to write", plan.name)))?;
        let bytes = fill(&source, item)?;
        progress.inc(1);
        Ok::<_, Error>(bytes)
    })?;
    progress.finish();
    done.bytes.1 = size;
    Ok(done)
}

/// The output is one file; it must not be one that is read.
fn refuse_input(job: &ConvertJob, source: &Source) -> Result<()> {
    let out = std::fs::canonicalize(&job.out).ok();
    let same = |file: &&std::path::Path| std::fs::canonicalize(file).ok() == out;
    if out.is_some() && source.checkpoint().files().iter().any(same) {
        return Err(Error::Recipe(format!(
            "{} would replace the file that is read; choose another name",
            job.out.display()
        )));
    }
    Ok(())
}

/// All tensors in order, with what they become; refuses what would lose information unasked.
fn plan<'a>(job: &ConvertJob, source: &'a Source, done: &mut Converted) -> Result<Vec<Item<'a>>> {
    let decoder = &source.model.decoder;
    let config = &decoder.config;
    let arch = architecture(config.family)?;
    let export = Export::new(arch, config.num_attention_heads, config.num_key_value_heads)
        .ok_or_else(|| Error::Recipe(format!("GGUF names of {arch} are not known")))?;
    let mut refused = Refused::default();
    let mut items = Vec::new();
    if let Some(factors) = rope_factors(config) {
        let name = "rope_freqs.weight".to_string();
        let plan = TensorPlan { name, ty: GgmlType::F32, shape: vec![factors.len()] };
        items.push(Item { plan, change: Change::None, content: Content::Fixed(factors) });
    }
    for name in decoder.all_names() {
        let module = standard_module(decoder, name);
        let place = |leaf: &str| {
            export.tensor(&format!("{module}.{leaf}")).ok_or_else(|| {
                Error::Recipe(format!("GGUF has no place for {}.{leaf} in {arch}", name.module))
            })
        };
        let (stored, change) = place("weight")?;
        // The matrix is asked for as `[out, in]`, which is how the file has it.
        let change = if change == Change::Transposed { Change::None } else { change };
        if name.role.is_norm() {
            let length = source.checkpoint().info(&name.weight())?.elements();
            let plan = TensorPlan { name: stored, ty: GgmlType::F32, shape: vec![length] };
            items.push(Item { plan, change, content: Content::Vector(name, Leaf::Weight) });
        } else {
            let (ty, content) = choose(job, source, name, &mut refused, done)?;
            let plan = TensorPlan { name: stored, ty, shape: name.shape.to_vec() };
            items.push(Item { plan, change, content });
        }
        if name.bias {
            let (stored, change) = place("bias")?;
            let shape = vec![name.shape[0]];
            let plan = TensorPlan { name: stored, ty: GgmlType::F32, shape };
            items.push(Item { plan, change, content: Content::Vector(name, Leaf::Bias) });
        }
    }
    refused.check(
        "gguf",
        "--type f16 writes them dequantised, --lossy rounds them to the type's grid",
    )?;
    Ok(items)
}

/// The block type of a matrix and where its bytes come from.
fn choose<'a>(
    job: &ConvertJob,
    source: &Source,
    name: &'a Name,
    refused: &mut Refused,
    done: &mut Converted,
) -> Result<(GgmlType, Content<'a>)> {
    let held = source.held(name)?;
    let from = source.describe(name)?;
    let request = job.options.number;
    if name.role == Role::Position {
        // Position tables are read in f32 only.
        done.count(&from, "F32", "");
        return Ok((GgmlType::F32, Content::Values(name)));
    }
    let wanted = request.map(|number| wanted(number, source, name, done));
    let quantises = request.is_some_and(|number| !number.is_float());
    match held {
        Held::Dense(_) => {
            let ty = wanted.unwrap_or(match held {
                Held::Dense(store::Dtype::F32) => GgmlType::F32,
                Held::Dense(store::Dtype::BF16) => GgmlType::BF16,
                _ => GgmlType::F16,
            });
            done.count(&from, ty.name(), if quantises { "rounded" } else { "" });
            Ok((ty, Content::Values(name)))
        }
        Held::Blocks(kind)
            if wanted.is_none_or(|ty| ty == kind)
                || (quantises && Some(kind) == request.map(NumberType::ggml)) =>
        {
            done.count(&from, kind.name(), "");
            Ok((kind, Content::Blocks(name)))
        }
        Held::Blocks(_) | Held::Packed if wanted.is_some() && !quantises => {
            let ty = wanted.unwrap_or(GgmlType::F16);
            done.count(&from, ty.name(), "dequantised");
            Ok((ty, Content::Values(name)))
        }
        Held::Blocks(_) | Held::Packed => {
            let (fits, reason) = match source.stored(name)? {
                Some(Stored::Grid(m)) => holder(&m, request),
                Some(other) => (None, format!("is stored as {}", other.kind())),
                None => (None, format!("is {from}, not an even grid")),
            };
            if let Some(ty) = fits {
                done.count(&from, ty.name(), "same codes");
                return Ok((ty, Content::Codes(name)));
            }
            if !job.options.lossy {
                refused.add(&name.module, reason);
            }
            let ty = wanted.unwrap_or_else(|| with_rows(GgmlType::Q8_0, name.shape[1]));
            done.count(&from, ty.name(), "rounded again");
            Ok((ty, Content::Values(name)))
        }
    }
}

/// The block type that a type asked for means for this matrix, as llama.cpp's own quantiser chooses.
fn wanted(number: NumberType, source: &Source, name: &Name, done: &mut Converted) -> GgmlType {
    let ty = number.ggml();
    if number.is_float() {
        return ty;
    }
    let config = &source.model.decoder.config;
    let tied = config.tie_word_embeddings;
    let head = name.role == Role::Head || (tied && name.role == Role::Embed);
    let (block, blocks) = (name.block.unwrap_or(0), config.num_hidden_layers);
    let more = block < blocks / 8
        || block >= 7 * blocks / 8
        || (block.saturating_sub(blocks / 8)) % 3 == 2;
    let mixed = matches!(name.role, Role::Value | Role::QueryKeyValue | Role::Down) && more;
    let six = (head && ty != GgmlType::Q8_0) || (number == NumberType::Q4KM && mixed);
    let ty = if six { GgmlType::Q6_K } else { ty };
    let [_, width] = name.shape;
    let fitting = with_rows(ty, width);
    if fitting != ty {
        done.note(format!(
            "rows of {width} weights are no whole number of {ty} blocks of {}: such layers are \
             written as {fitting}",
            ty.block_size()
        ));
    }
    fitting
}

/// The type itself where rows of `width` fill whole blocks, else the next wider one that does.
fn with_rows(ty: GgmlType, width: usize) -> GgmlType {
    let mut ty = ty;
    while !width.is_multiple_of(ty.block_size()) {
        ty = match ty {
            GgmlType::Q4_K => GgmlType::Q5_0,
            GgmlType::Q5_K => GgmlType::Q5_1,
            GgmlType::Q6_K => GgmlType::Q8_0,
            _ => GgmlType::F16,
        };
    }
    ty
}

/// The block type that holds the codes of a grid as they are, or why none does.
fn holder(m: &QuantizedMatrix, request: Option<NumberType>) -> (Option<GgmlType>, String) {
    let no = |reason: String| (None, reason);
    if !m.symmetric {
        return no("has zero points, which GGUF's block types have no place for".into());
    }
    if m.group_index.is_some() {
        return no("has reordered groups".into());
    }
    if !m.group_size.is_multiple_of(32) || !m.in_features.is_multiple_of(m.group_size) {
        return no(format!("has groups of {}, no multiple of 32", m.group_size));
    }
    if m.scales.iter().any(|s| half::f16::from_f32(*s).to_f32() != *s) {
        return no("has scales that are not half-precision numbers".into());
    }
    let Some(least) = grid_type(m.bits) else {
        return no(format!("has {} bits", m.bits));
    };
    let order = [GgmlType::Q4_0, GgmlType::Q5_0, GgmlType::Q8_0];
    let rank = |ty: GgmlType| order.iter().position(|t| *t == ty);
    match request.map(NumberType::ggml) {
        None => (Some(least), String::new()),
        Some(ty) if rank(ty) >= rank(least) && rank(ty).is_some() => (Some(ty), String::new()),
        Some(ty) => no(format!("has {} bits on an even grid, which {ty} is not", m.bits)),
    }
}

/// Bytes of a tensor.
fn fill(source: &Source, item: &Item<'_>) -> Result<Vec<u8>> {
    let bad = |reason: String| Error::Recipe(format!("{}: {reason}", item.plan.name));
    let (change, ty) = (item.change, item.plan.ty);
    let encode = |mut values: Vec<f32>, rows: usize| -> Result<Vec<u8>> {
        if change == Change::PlusOne {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        let values = change.arrange(&values, rows).map_err(bad)?;
        quantize(ty, &values).map_err(bad)
    };
    match &item.content {
        Content::Fixed(values) => encode(values.clone(), values.len()),
        Content::Vector(name, leaf) => {
            let values = host::into_vec(source.model.weights.vector(name, *leaf)?);
            let rows = values.len();
            encode(values, rows)
        }
        Content::Values(name) => encode(source.values(name)?, name.shape[0]),
        Content::Blocks(name) => {
            let checkpoint = source.checkpoint();
            let bytes = checkpoint.bytes(&name.weight())?;
            let arranged = change.arrange(&bytes, name.shape[0]).map_err(bad)?;
            checkpoint.release(&name.weight());
            Ok(arranged)
        }
        Content::Codes(name) => {
            let Some(Stored::Grid(m)) = source.stored(name)? else {
                return Err(bad("the codes are gone".into()));
            };
            let rows = m.out_features;
            let codes = change.arrange(&m.codes, rows).map_err(bad)?;
            let scales = change.arrange(&m.scales, rows).map_err(bad)?;
            let repeat = m.group_size / 32;
            let scales: Vec<f32> =
                scales.iter().flat_map(|s| std::iter::repeat_n(*s, repeat)).collect();
            encode_grid(ty, m.bits, &codes, &scales).map_err(bad)
        }
    }
}

/// Metadata under `general`.
fn general(job: &ConvertJob, source: &Source, items: &[Item<'_>]) -> Result<Vec<(String, Value)>> {
    let config = &source.model.decoder.config;
    let mut pairs = vec![(
        "general.architecture".to_string(),
        Value::String(architecture(config.family)?.into()),
    )];
    let mut put = |key: &str, value: Value| pairs.push((format!("general.{key}"), value));
    let own = ["architecture", "file_type", "quantization_version", "alignment"];
    let inherited = source.checkpoint().gguf_metadata();
    let mut named = false;
    for (key, value) in inherited.iter().flat_map(|metadata| metadata.iter()) {
        if let Some(key) = key.strip_prefix("general.")
            && !own.contains(&key)
        {
            named |= key == "name";
            put(key, value.clone());
        }
    }
    let name = source.checkpoint().directory().file_name().map(|n| n.to_string_lossy());
    if let (false, Some(name)) = (named, name) {
        put("name", Value::String(name.into_owned()));
    }
    // The type of most weights, by llama.cpp's numbers.
    let weight = |ty: GgmlType| -> usize {
        let of_type = items.iter().filter(|item| item.plan.ty == ty && item.plan.shape.len() == 2);
        of_type.map(|item| item.plan.shape.iter().product::<usize>()).sum()
    };
    let common = store::gguf::quantize::WRITABLE.into_iter().max_by_key(|ty| weight(*ty));
    let mixed = job.options.number == Some(NumberType::Q4KM);
    let file_type = match common.unwrap_or(GgmlType::F16) {
        GgmlType::F32 => 0,
        GgmlType::Q4_0 => 2,
        GgmlType::Q4_1 => 3,
        GgmlType::Q8_0 => 7,
        GgmlType::Q5_0 => 8,
        GgmlType::Q5_1 => 9,
        GgmlType::Q4_K if mixed => 15,
        GgmlType::Q4_K => 14,
        GgmlType::Q5_K => 16,
        GgmlType::Q6_K => 18,
        GgmlType::BF16 => 32,
        _ => 1,
    };
    put("file_type", Value::U32(file_type));
    put("quantization_version", Value::U32(2));
    Ok(pairs)
}

/// Metadata under `tokenizer`.
fn tokenizer(
    job: &ConvertJob,
    source: &Source,
    done: &mut Converted,
) -> Result<Vec<(String, Value)>> {
    if job.options.without_tokenizer {
        // llama.cpp's name for a file that is used with token ids only.
        let model = Value::String("no_vocab".into());
        return Ok(vec![("tokenizer.ggml.model".into(), model)]);
    }
    if let Some(metadata) = source.checkpoint().gguf_metadata() {
        let kept = metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
        return Ok(kept.map(|(key, value)| (key.to_string(), value.clone())).collect());
    }
    let vocab_size = source.model.decoder.config.vocab_size;
    let without = |e: data::Error| {
        Error::Recipe(format!(
            "{e}; --without-tokenizer writes the network alone, for use with token ids"
        ))
    };
    let tokenizer = Tokenizer::from_checkpoint(source.checkpoint()).map_err(without)?;
    let vocabulary = tokenizer.to_gguf(vocab_size).map_err(without)?;
    done.notes.extend(vocabulary.notes);
    let mut pairs = vocabulary.metadata;
    let directory = source.checkpoint().directory().join("generation_config.json");
    let generation = std::fs::read(directory).ok().and_then(|b| serde_json::from_slice(&b).ok());
    let configs = [generation.as_ref(), source.checkpoint().config().ok()];
    if let Some(id) = configs.into_iter().flatten().find_map(|config| padding(config, &pairs)) {
        pairs.push(("tokenizer.ggml.padding_token_id".into(), id));
    }
    Ok(pairs)
}
