//! Which layers of a block share a scale: the architecture's table, or a user's choice from it.
//!
//! The table of [`nn::Decoder::mappings`] holds every exchange of a scale that leaves a network's
//! function as it is, so a file can choose among its entries, compare something else, and allow
//! scales that grouped queries share; it cannot add exchanges that would change the function.

use super::{AwqOptions, GqaFold};
use crate::{Error, Result};
use nn::{Decoder, Inspect, Mapping, Prev};
use std::path::Path;

/// A mapping and how columns that read the same row of `prev` come to share a scale.
#[derive(Debug, Clone)]
pub(super) struct Chosen {
    pub mapping: Mapping,
    pub fold: GqaFold,
}

/// A file of mappings, valid for every block of the network it was read for.
#[derive(Debug)]
pub(super) struct MappingFile {
    path: String,
    entries: Vec<Entry>,
}

/// One entry of the file; names are relative to the block.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    prev: String,
    layers: Vec<String>,
    #[serde(default)]
    inspect: Option<InspectName>,
    #[serde(default)]
    gqa: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum InspectName {
    SelfAttn,
    Mlp,
    #[serde(rename = "self")]
    Itself,
    Block,
}

impl MappingFile {
    /// Reads a file and checks it against every block of `decoder`.
    pub fn read(path: &Path, decoder: &Decoder, options: &AwqOptions) -> Result<Self> {
        let name = path.display().to_string();
        let bytes =
            std::fs::read(path).map_err(|source| Error::Io { path: name.clone(), source })?;
        let file = Self { entries: parse(&name, &bytes)?, path: name };
        for block in 0..decoder.num_blocks() {
            file.choose(decoder, block, options)?;
        }
        Ok(file)
    }

    /// The mappings of a block, in the order of computation.
    pub fn choose(
        &self,
        decoder: &Decoder,
        block: usize,
        options: &AwqOptions,
    ) -> Result<Vec<Chosen>> {
        let prefix = block_prefix(decoder, block);
        let mut all: Vec<Chosen> = Vec::new();
        for (number, entry) in self.entries.iter().enumerate() {
            let at = |reason: String| entry_error(&self.path, number, Some(&entry.prev), &reason);
            let chosen = entry.resolve(decoder, block, &prefix, options).map_err(at)?;
            if all.iter().any(|other| other.mapping.set == chosen.mapping.set) {
                return Err(at("is there twice; keep one of the entries".into()));
            }
            all.push(chosen);
        }
        all.sort_by_key(|chosen| chosen.mapping.set);
        Ok(all)
    }
}

fn parse(path: &str, bytes: &[u8]) -> Result<Vec<Entry>> {
    let entries: Vec<serde_json::Value> = serde_json::from_slice(bytes).map_err(|e| {
        Error::Options(format!(
            "{path}: not a JSON list of mappings: {e}; an entry looks like {{\"prev\": \
             \"input_layernorm\", \"layers\": [\"self_attn.q_proj\", \"self_attn.k_proj\", \
             \"self_attn.v_proj\"], \"inspect\": \"self_attn\"}}"
        ))
    })?;
    if entries.is_empty() {
        return Err(Error::Options(format!(
            "{path}: holds no mapping; to scale nothing use --no-scale"
        )));
    }
    let parse = |(number, value): (usize, serde_json::Value)| {
        let prev = value.get("prev").and_then(|v| v.as_str()).map(str::to_string);
        serde_json::from_value(value)
            .map_err(|e| entry_error(path, number, prev.as_deref(), &e.to_string()))
    };
    entries.into_iter().enumerate().map(parse).collect()
}

fn entry_error(path: &str, number: usize, prev: Option<&str>, reason: &str) -> Error {
    let prev = prev.map(|prev| format!(" (`{prev}`)")).unwrap_or_default();
    Error::Options(format!("{path}: entry {}{prev}: {reason}", number + 1))
}

impl Entry {
    fn resolve(
        &self,
        decoder: &Decoder,
        block: usize,
        prefix: &str,
        options: &AwqOptions,
    ) -> std::result::Result<Chosen, String> {
        let layers: Vec<String> = self.layers.iter().map(|l| format!("{prefix}{l}")).collect();
        let mut mapping = find(decoder, block, &format!("{prefix}{}", self.prev), &layers)?;
        let set = mapping.set;
        match self.inspect {
            None => {}
            Some(InspectName::Itself) => mapping.inspect = Inspect::Linear,
            Some(InspectName::Block) => mapping.inspect = Inspect::Block,
            Some(InspectName::SelfAttn) if set == 0 => mapping.inspect = Inspect::Attention,
            Some(InspectName::Mlp) if set == 2 => mapping.inspect = Inspect::Mlp,
            Some(InspectName::SelfAttn | InspectName::Mlp) => {
                return Err("the module to inspect must read the same input as the layers: use \
                            \"self\" (the layers alone) or \"block\""
                    .into());
            }
        }
        let grouped = matches!(&mapping.prev, Prev::Linear { grouped: true, .. });
        let fold = match options.gqa_fold {
            GqaFold::None if self.gqa => GqaFold::Mean,
            fold => fold,
        };
        if grouped && fold == GqaFold::None {
            return Err(
                "several query heads read one value head, so they must share a scale: say \
                        \"gqa\": true, or leave the entry out"
                    .into(),
            );
        }
        Ok(Chosen { mapping, fold })
    }
}

/// What every module name of a block starts with, e.g. `model.layers.3.`.
fn block_prefix(decoder: &Decoder, block: usize) -> String {
    format!("{}{}.{block}.", decoder.prefix, decoder.config.family.table().blocks)
}

/// The module that absorbs a mapping's scale, if one can.
pub(super) fn prev_module(mapping: &Mapping) -> Option<&str> {
    match &mapping.prev {
        Prev::Norm(name) | Prev::Linear { name, .. } => Some(&name.module),
        Prev::Activation => None,
    }
}

/// The table's mapping from `prev` to exactly `layers` (module names in full), or why there is
/// none and which there are.
pub(super) fn find(
    decoder: &Decoder,
    block: usize,
    prev: &str,
    layers: &[String],
) -> std::result::Result<Mapping, String> {
    let prefix = block_prefix(decoder, block);
    let short = |module: &str| module.strip_prefix(&prefix).unwrap_or(module).to_string();
    let list =
        |m: &Mapping| m.layers.iter().map(|l| short(&l.module)).collect::<Vec<_>>().join(", ");
    let table = decoder.mappings(block);
    let known: Vec<String> = table.iter().filter_map(prev_module).map(short).collect();
    let Some(mapping) = table.iter().find(|m| prev_module(m) == Some(prev)) else {
        let fed = layers
            .first()
            .and_then(|first| table.iter().find(|m| m.layers.iter().any(|l| l.module == *first)));
        let near = method::nearest(&short(prev), known.iter().map(String::as_str));
        let hint = match (fed.map(|m| (m, prev_module(m))), near) {
            (Some((m, Some(works))), _) => {
                format!("`{}` can absorb the scale of {}", short(works), list(m))
            }
            (Some((m, None)), _) => format!(
                "{} read an activation that does not commute with a scale; leave the entry out",
                list(m)
            ),
            (None, Some(near)) => format!("did you mean `{near}`?"),
            (None, None) => format!("those that can are {}", known.join(", ")),
        };
        return Err(format!(
            "nothing called `{}` can absorb a scale in block {block}; {hint}",
            short(prev)
        ));
    };
    let wanted = |module: &str| layers.iter().any(|layer| layer == module);
    let same = mapping.layers.iter().all(|layer| wanted(&layer.module));
    if !same || layers.len() != mapping.layers.len() {
        return Err(format!(
            "`layers` must be all that read `{}`, or the network would change: {}",
            short(prev),
            list(mapping)
        ));
    }
    Ok(mapping.clone())
}
