//! What a search found, on disk: written block by block into the output, applied by later jobs.
//!
//! `awq-search/search.json` names for every block the mappings and clipped layers, and the
//! safetensors file beside it that holds their numbers in single precision: `<first layer>.scale`
//! (`[in]`) and `<layer>.clip` (`[out, groups]`, the largest magnitude kept). The files lie in a
//! directory of their own because loaders take every safetensors file beside a model's weights for
//! weights. One file per block, sealed with the block, keeps memory and resuming as they are.

use super::AwqOptions;
use super::mappings::{MappingFile, find, prev_module};
use crate::block::BlockJob;
use crate::grid::{GridOptions, effective_group};
use crate::options::{Method, QuantizeOptions};
use crate::{Error, Result};
use nn::{Decoder, Mapping, Name, Prev};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use store::{Checkpoint, Dtype};

/// Directory of the record inside the output.
pub const SEARCH_DIRECTORY: &str = "awq-search";

/// The record's table of contents inside [`SEARCH_DIRECTORY`].
pub const SEARCH_FILE: &str = "awq-search/search.json";

/// Version of the record.
const FORMAT: u32 = 1;

/// What was found for one block, as it stands in the table of contents.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockRecord {
    /// The block's safetensors file, beside the table of contents.
    pub file: String,
    /// The searched mappings, in the order of computation.
    pub mappings: Vec<MappingRecord>,
    /// The clipped layers.
    pub clips: Vec<ClipRecord>,
}

/// One searched mapping.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MappingRecord {
    /// Module that absorbs the inverse of the scale.
    pub prev: String,
    /// Modules whose input columns are multiplied by it.
    pub layers: Vec<String>,
    /// Tensor that holds it, `[in]`.
    pub scale: String,
    /// The exponent that was chosen; none for the identity and a fixed scale.
    pub ratio: Option<f64>,
    /// Loss with this scale.
    pub search_loss: f64,
    /// Loss of rounding to nearest without a scale.
    pub rounding_loss: f64,
}

/// One clipped layer.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipRecord {
    /// Module.
    pub layer: String,
    /// Tensor that holds the largest magnitude kept, `[out, groups]`.
    pub limits: String,
    /// Weights per group.
    pub group_size: usize,
}

/// The table of contents.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Contents {
    format: u32,
    strata: String,
    grid: GridOptions,
    blocks: Vec<BlockRecord>,
}

/// The table of contents of a finished job.
pub fn contents(grid: &GridOptions, blocks: Vec<BlockRecord>) -> Result<serde_json::Value> {
    let strata = env!("CARGO_PKG_VERSION").to_string();
    let contents = Contents { format: FORMAT, strata, grid: grid.clone(), blocks };
    serde_json::to_value(contents)
        .map_err(|e| Error::Options(format!("the search cannot be written: {e}")))
}

/// A scale and what it is exchanged between.
#[derive(Debug)]
pub(super) struct Fold {
    pub mapping: Mapping,
    pub scales: Vec<f32>,
    pub ratio: Option<f64>,
    pub search_loss: f64,
    pub rounding_loss: f64,
}

/// The largest magnitudes kept of one layer's groups.
#[derive(Debug)]
pub(super) struct Limits {
    pub group_size: usize,
    /// `[rows, groups]`.
    pub rows: usize,
    pub values: Vec<f32>,
}

/// What a search found for one block, with its numbers.
#[derive(Debug, Default)]
pub struct BlockSearch {
    pub(super) folds: Vec<Fold>,
    /// By module.
    pub(super) clips: BTreeMap<String, Limits>,
}

impl BlockSearch {
    /// The record's entry of block `index`, and its file's name inside the output and content.
    pub fn record(&self, index: usize) -> Result<(BlockRecord, String, Vec<u8>)> {
        let file = format!("block-{index:05}.safetensors");
        let path = format!("{SEARCH_DIRECTORY}/{file}");
        let mut record = BlockRecord { file, mappings: Vec::new(), clips: Vec::new() };
        let mut tensors: Vec<(String, Vec<usize>, &[f32])> = Vec::new();
        for fold in &self.folds {
            let layers: Vec<String> =
                fold.mapping.layers.iter().map(|layer| layer.module.clone()).collect();
            let scale = format!("{}.scale", layers.first().map_or("", String::as_str));
            tensors.push((scale.clone(), vec![fold.scales.len()], &fold.scales));
            record.mappings.push(MappingRecord {
                prev: prev_module(&fold.mapping).unwrap_or_default().to_string(),
                layers,
                scale,
                ratio: fold.ratio,
                search_loss: fold.search_loss,
                rounding_loss: fold.rounding_loss,
            });
        }
        for (layer, limits) in &self.clips {
            let name = format!("{layer}.clip");
            let groups = limits.values.len() / limits.rows.max(1);
            tensors.push((name.clone(), vec![limits.rows, groups], &limits.values));
            let group_size = limits.group_size;
            record.clips.push(ClipRecord { layer: layer.clone(), limits: name, group_size });
        }
        let bytes = safetensors(&path, &tensors)?;
        Ok((record, path, bytes))
    }
}

/// A safetensors file of single-precision tensors, in the given order.
fn safetensors(path: &str, tensors: &[(String, Vec<usize>, &[f32])]) -> Result<Vec<u8>> {
    let mut end = 0;
    let header: Vec<store::safetensors::Tensor> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let start = end;
            end += size_of_val(*values);
            let (name, shape) = (name.clone(), shape.clone());
            store::safetensors::Tensor { name, dtype: Dtype::F32, shape, start, end }
        })
        .collect();
    let metadata = BTreeMap::new();
    let mut bytes = store::safetensors::header_bytes(Path::new(path), &metadata, &header, 0)?;
    for (_, _, values) in tensors {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    Ok(bytes)
}

/// A record on disk.
#[derive(Debug)]
struct Stored {
    directory: PathBuf,
    contents: Contents,
}

impl Stored {
    /// Opens the record in an output directory, or its own directory.
    fn open(path: &Path, decoder: &Decoder) -> Result<Self> {
        let inside = path.join(SEARCH_DIRECTORY);
        let directory = if inside.is_dir() { inside } else { path.to_path_buf() };
        let file = directory.join("search.json");
        let name = file.display().to_string();
        if !file.is_file() {
            return Err(Error::Options(format!(
                "{} holds no search: give the output directory of a job that ran with \
                 --save-search",
                path.display()
            )));
        }
        let bytes =
            std::fs::read(&file).map_err(|source| Error::Io { path: name.clone(), source })?;
        let contents: Contents = serde_json::from_slice(&bytes)
            .map_err(|e| Error::Options(format!("{name}: not the record of a search: {e}")))?;
        if contents.format != FORMAT {
            return Err(Error::Options(format!(
                "{name}: format {} is not known, only {FORMAT}; search again",
                contents.format
            )));
        }
        if contents.blocks.len() != decoder.num_blocks() {
            return Err(Error::Options(format!(
                "{name}: holds {} blocks, the model has {}; it was searched on another model",
                contents.blocks.len(),
                decoder.num_blocks()
            )));
        }
        let stored = Self { directory, contents };
        for (block, record) in stored.contents.blocks.iter().enumerate() {
            stored.file(record)?;
            for mapping in &record.mappings {
                find(decoder, block, &mapping.prev, &mapping.layers)
                    .map_err(|reason| Error::Options(format!("{name}: block {block}: {reason}")))?;
            }
        }
        Ok(stored)
    }

    /// The file of a block. The name comes from a file: it may not lead elsewhere.
    fn file(&self, record: &BlockRecord) -> Result<PathBuf> {
        let plain = Path::new(&record.file).file_name().is_some_and(|name| *name == *record.file);
        let file = self.directory.join(&record.file);
        if !plain || !file.is_file() {
            return Err(Error::Options(format!(
                "{}: the block's file `{}` is not beside it; copy the whole directory",
                self.directory.join("search.json").display(),
                record.file
            )));
        }
        Ok(file)
    }

    /// What was found for the block of `job`, checked against it.
    fn block(&self, job: &mut BlockJob<'_>, options: &AwqOptions) -> Result<BlockSearch> {
        let Some(record) = self.contents.blocks.get(job.index) else {
            return Ok(BlockSearch::default());
        };
        let file = self.file(record)?;
        let tensors = Checkpoint::open(&file)?;
        let bad = |layer: &str, reason: String| {
            Error::layer(layer, format!("{}: {reason}", file.display()))
        };
        let read = |layer: &str, tensor: &str, shape: &[usize]| -> Result<Vec<f32>> {
            let found = &tensors.info(tensor)?.shape;
            if found != shape {
                return Err(bad(
                    layer,
                    format!("`{tensor}` has shape {found:?}, the model needs {shape:?}"),
                ));
            }
            let values = tensors.f32(tensor)?;
            match values.iter().find(|v| !v.is_finite() || **v < 0.0) {
                Some(value) => Err(bad(layer, format!("`{tensor}` holds {value}"))),
                None => Ok(values),
            }
        };
        let mut search = BlockSearch::default();
        for entry in &record.mappings {
            let mapping = find(job.decoder, job.index, &entry.prev, &entry.layers)
                .map_err(|reason| bad(&entry.prev, reason))?;
            let Some(first) = mapping.layers.first() else { continue };
            let scales = read(&first.module, &entry.scale, &[first.in_features()])?;
            if scales.contains(&0.0) {
                return Err(bad(&first.module, format!("`{}` holds a scale of 0", entry.scale)));
            }
            check_planned(job, &mapping)?;
            check_shared(&mapping, &scales).map_err(|reason| bad(&first.module, reason))?;
            search.folds.push(Fold {
                mapping,
                scales,
                ratio: entry.ratio,
                search_loss: entry.search_loss,
                rounding_loss: entry.rounding_loss,
            });
        }
        let clips: &[ClipRecord] = if options.clips() { &record.clips } else { &[] };
        for clip in clips {
            let planned = job.sets.iter().flatten().find(|l| l.name.module == clip.layer);
            let Some(layer) = planned else {
                return Err(bad(&clip.layer, "the block has no such layer".into()));
            };
            let Some(grid) = &layer.grid else { continue };
            let (rows, width) = (layer.name.out_features(), layer.name.in_features());
            let group_size = effective_group(grid, width);
            if group_size != clip.group_size {
                return Err(bad(
                    &clip.layer,
                    format!(
                        "clipped in groups of {}, but this job has groups of {group_size}: use the \
                         group size of the search, or --no-clip",
                        clip.group_size
                    ),
                ));
            }
            let shape = [rows, width.div_ceil(group_size)];
            let values = read(&clip.layer, &clip.limits, &shape)?;
            search.clips.insert(clip.layer.clone(), Limits { group_size, rows, values });
        }
        if job.index == 0 {
            self.compare(job);
        }
        Ok(search)
    }

    /// Warns when the search was judged on another grid than the job's.
    fn compare(&self, job: &mut BlockJob<'_>) {
        let then = &self.contents.grid;
        let now = job.sets.iter().flatten().find_map(|layer| layer.grid.as_ref());
        if let Some(now) = now.filter(|now| *now != then) {
            let describe = |grid: &GridOptions| {
                let kind = if grid.symmetric { "symmetric" } else { "asymmetric" };
                format!("{} bits, groups of {}, {kind}", grid.bits, grid.group_size)
            };
            job.warnings.push(format!(
                "the applied search was judged on another grid ({}; now {})",
                describe(then),
                describe(now)
            ));
        }
    }
}

/// Refuses a stored scale that would change a layer which the plan leaves as it is.
fn check_planned(job: &BlockJob<'_>, mapping: &Mapping) -> Result<()> {
    let changed = match &mapping.prev {
        Prev::Linear { name, .. } => Some(name),
        _ => None,
    };
    let planned = |name: &Name| {
        job.sets.iter().flatten().any(|l| l.grid.is_some() && l.name.module == name.module)
    };
    match mapping.layers.iter().chain(changed).find(|name| !planned(name)) {
        Some(name) => Err(Error::layer(
            &name.module,
            "is left as it is, but the applied search scales it: quantise it too, or search again",
        )),
        None => Ok(()),
    }
}

/// Columns that read the same row must have the same scale, or the function would change.
fn check_shared(mapping: &Mapping, scales: &[f32]) -> std::result::Result<(), String> {
    let Prev::Linear { rows, .. } = &mapping.prev else { return Ok(()) };
    let mut shared: HashMap<usize, f32> = HashMap::new();
    for (&row, &scale) in rows.iter().zip(scales) {
        if *shared.entry(row).or_insert(scale) != scale {
            return Err(format!("the inputs that read row {row} of the value have unequal scales"));
        }
    }
    Ok(())
}

/// The files that AWQ's options name, read and checked against the network before any work.
#[derive(Debug, Default)]
pub struct Prepared {
    pub(super) mappings: Option<MappingFile>,
    stored: Option<Stored>,
    /// Hashes of the files, `null` when there are none: part of the job's identity.
    pub inputs: serde_json::Value,
}

impl Prepared {
    /// Reads what `options` name; nothing for other methods.
    pub fn new(decoder: &Decoder, options: &QuantizeOptions) -> Result<Self> {
        let mut prepared = Self::default();
        if options.method != Method::Awq {
            return Ok(prepared);
        }
        let awq = &options.awq;
        let mut hashes = serde_json::Map::new();
        if let Some(path) = &awq.mappings {
            prepared.mappings = Some(MappingFile::read(path, decoder, awq)?);
            hashes.insert("mappings".into(), store::sha256_file(path)?.into());
        }
        if let Some(path) = &awq.apply_search {
            let stored = Stored::open(path, decoder)?;
            let mut files = vec![stored.directory.join("search.json")];
            for record in &stored.contents.blocks {
                files.push(stored.file(record)?);
            }
            let files: Vec<String> =
                files.iter().map(|file| store::sha256_file(file)).collect::<store::Result<_>>()?;
            hashes.insert("search".into(), files.into());
            prepared.stored = Some(stored);
        }
        if !hashes.is_empty() {
            prepared.inputs = hashes.into();
        }
        Ok(prepared)
    }

    /// What an earlier job found for the block of `job`, when one is to be applied.
    pub(super) fn stored(
        &self,
        job: &mut BlockJob<'_>,
        options: &AwqOptions,
    ) -> Result<Option<BlockSearch>> {
        self.stored.as_ref().map(|stored| stored.block(job, options)).transpose()
    }
}
