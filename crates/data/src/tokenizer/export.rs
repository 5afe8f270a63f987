//! A tokenizer as the metadata of a GGUF file.
//!
//! GGUF names how text is split instead of spelling it out, so only tokenizers of a known build can
//! be written: byte-level BPE split by one of a few expressions, and sentencepiece-like BPE. The
//! whole `tokenizer.json` goes along under `tokenizer.huggingface.json`; Strata reads that back.

use serde_json::Value as Json;
use store::gguf::{Array, Value};

use super::Tokenizer;
use super::gguf::{LLAMA3, QWEN2};

/// A tokenizer ready for a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufVocabulary {
    /// Metadata under `tokenizer.*`.
    pub metadata: Vec<(String, Value)>,
    /// What other readers of the file should know.
    pub notes: Vec<String>,
}

/// Token types of the format.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

type Parsed<T> = Result<T, String>;

/// The metadata for a network whose embedding has `vocab_size` rows.
pub(super) fn export(
    tokenizer: &Tokenizer,
    json: &str,
    vocab_size: usize,
) -> Parsed<GgufVocabulary> {
    let value: Json = serde_json::from_str(json).map_err(|e| e.to_string())?;
    let model = value.get("model").ok_or("it has no model")?;
    let kind = model.get("type").and_then(Json::as_str).unwrap_or_default();
    if kind != "BPE" {
        return Err(format!("GGUF holds BPE vocabularies; this one is {kind}"));
    }
    let build = Build::of(&value, model)?;
    let mut tokens = tokens(tokenizer, vocab_size)?;
    let mut types = types(&value, model, &tokens, &build);
    // An embedding may have more rows than there are tokens.
    for id in tokens.len()..vocab_size {
        tokens.push(format!("[PAD{id}]"));
        types.push(UNUSED);
    }
    let merges = merges(model)?;
    let mut metadata = Vec::new();
    let mut put = |key: &str, value: Value| metadata.push((format!("tokenizer.{key}"), value));
    put("ggml.model", Value::String(build.model().into()));
    put("ggml.pre", Value::String(build.pre().into()));
    let scores = match build {
        Build::SentencePiece { .. } => Some(scores(&tokens, &types, &merges)),
        Build::ByteLevel { .. } => None,
    };
    put("ggml.tokens", Value::Array(Array::String(tokens)));
    put("ggml.token_type", Value::Array(Array::I32(types)));
    match scores {
        Some(scores) => put("ggml.scores", Value::Array(Array::F32(scores))),
        None => {
            let lines = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
            put("ggml.merges", Value::Array(Array::String(lines)));
        }
    }
    let fault = |e: crate::Error| e.to_string();
    let marks = tokenizer.encode("", true).map_err(fault)?;
    let begins = tokenizer.bos().is_some() && marks.first().copied() == tokenizer.bos();
    let ends = marks.last().is_some_and(|id| tokenizer.eos_ids().contains(id));
    for (key, id) in [
        ("ggml.bos_token_id", tokenizer.bos()),
        ("ggml.eos_token_id", tokenizer.eos()),
        ("ggml.eot_token_id", tokenizer.eos_ids().get(1).copied()),
    ] {
        if let Some(id) = id {
            put(key, Value::U32(id));
        }
    }
    let unknown = model.get("unk_token").and_then(Json::as_str).and_then(|t| tokenizer.token(t));
    if let Some(id) = unknown {
        put("ggml.unknown_token_id", Value::U32(id));
    }
    put("ggml.add_bos_token", Value::Bool(begins));
    put("ggml.add_eos_token", Value::Bool(ends && marks.len() > usize::from(begins)));
    put("ggml.add_space_prefix", Value::Bool(build.space_prefix()));
    if let Build::SentencePiece { collapses: true, .. } = build {
        put("ggml.remove_extra_whitespaces", Value::Bool(true));
    }
    if let Some(template) = tokenizer.chat_template() {
        put("chat_template", Value::String(template.into()));
    }
    let compact = serde_json::to_string(&value).map_err(|e| e.to_string())?;
    put("huggingface.json", Value::String(compact));
    Ok(GgufVocabulary { metadata, notes: build.notes() })
}

/// How a tokenizer is built, as far as GGUF can say it.
enum Build {
    ByteLevel {
        /// Name of the split.
        pre: &'static str,
        space_prefix: bool,
        /// Digits are split off after the words, not before: other spaces before them.
        digits_last: bool,
    },
    SentencePiece {
        space_prefix: bool,
        /// Runs of spaces count as one.
        collapses: bool,
    },
}

impl Build {
    fn of(value: &Json, model: &Json) -> Parsed<Self> {
        let steps = steps(value.get("pre_tokenizer"), "pretokenizers");
        let kind = |step: &Json| step.get("type").and_then(Json::as_str).unwrap_or("").to_string();
        let flag = |step: &Json, key: &str| step.get(key).and_then(Json::as_bool).unwrap_or(false);
        let kinds: Vec<String> = steps.iter().map(|step| kind(step)).collect();
        let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
        let normalized = !steps_of_normalizer(value).is_empty();
        let byte_level = |pre, step: &Json, digits_last| {
            Ok(Self::ByteLevel { pre, space_prefix: flag(step, "add_prefix_space"), digits_last })
        };
        let unknown =
            || format!("its pre-tokenizer ({}) is none that GGUF has a name for", kinds.join(", "));
        match (kinds.as_slice(), steps.as_slice()) {
            (["ByteLevel"], [step]) if flag(step, "use_regex") && !normalized => {
                byte_level("gpt-2", step, false)
            }
            (["Split", "ByteLevel"], [split, step]) if !flag(step, "use_regex") => {
                let expression =
                    split.get("pattern").and_then(|p| p.get("Regex")).and_then(Json::as_str);
                match expression {
                    Some(LLAMA3) => byte_level("llama-bpe", step, false),
                    Some(QWEN2) => byte_level("qwen2", step, false),
                    _ => Err(unknown()),
                }
            }
            (["Digits", "ByteLevel"], [digits, step])
                if flag(digits, "individual_digits") && flag(step, "use_regex") && !normalized =>
            {
                byte_level("smollm", step, false)
            }
            (["ByteLevel", "Digits"], [step, digits])
                if flag(digits, "individual_digits") && flag(step, "use_regex") && !normalized =>
            {
                byte_level("smollm", step, true)
            }
            (kinds, steps) if flag(model, "byte_fallback") => {
                let metaspace = steps.iter().find(|step| kind(step) == "Metaspace");
                let replaces = steps_of_normalizer(value).iter().any(|step| {
                    kind(step) == "Replace"
                        && step.get("content").and_then(Json::as_str) == Some("▁")
                });
                let collapses = steps_of_normalizer(value).iter().any(|step| {
                    let pattern = step.get("pattern").and_then(|p| p.get("Regex"));
                    kind(step) == "Replace" && pattern.and_then(Json::as_str) == Some(" {2,}")
                });
                let prepends =
                    steps_of_normalizer(value).iter().any(|step| kind(step) == "Prepend");
                match metaspace {
                    Some(step) => {
                        let scheme = step.get("prepend_scheme").and_then(Json::as_str);
                        Ok(Self::SentencePiece { space_prefix: scheme != Some("never"), collapses })
                    }
                    None if replaces && kinds.is_empty() => {
                        Ok(Self::SentencePiece { space_prefix: prepends, collapses })
                    }
                    None => Err(unknown()),
                }
            }
            _ => Err(unknown()),
        }
    }

    fn model(&self) -> &'static str {
        match self {
            Self::ByteLevel { .. } => "gpt2",
            Self::SentencePiece { .. } => "llama",
        }
    }

    fn pre(&self) -> &'static str {
        match self {
            Self::ByteLevel { pre, .. } => pre,
            Self::SentencePiece { .. } => "default",
        }
    }

    fn space_prefix(&self) -> bool {
        match self {
            Self::ByteLevel { space_prefix, .. } | Self::SentencePiece { space_prefix, .. } => {
                *space_prefix
            }
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Self::SentencePiece { collapses: true, .. } = self {
            notes.push(
                "this tokenizer takes several spaces for one; llama.cpp keeps them apart".into(),
            );
        }
        if let Self::ByteLevel { space_prefix, digits_last, .. } = self {
            if *space_prefix {
                notes.push(
                    "this tokenizer puts a space before a text; llama.cpp does not for byte-level \
                     BPE: begin texts with a space there"
                        .into(),
                );
            }
            if *digits_last {
                notes.push(
                    "llama.cpp splits digits before words, this tokenizer after: several white \
                     spaces right before a digit become other tokens there"
                        .into(),
                );
            }
        }
        notes
    }
}

/// The steps of a (sequence of) pre-tokenizer or normalizer.
fn steps<'a>(value: Option<&'a Json>, list: &str) -> Vec<&'a Json> {
    match value {
        None | Some(Json::Null) => Vec::new(),
        Some(value) => match value.get(list).and_then(Json::as_array) {
            Some(steps) => steps.iter().collect(),
            None => vec![value],
        },
    }
}

fn steps_of_normalizer(value: &Json) -> Vec<&Json> {
    steps(value.get("normalizer"), "normalizers")
}

/// Token texts by id.
fn tokens(tokenizer: &Tokenizer, vocab_size: usize) -> Parsed<Vec<String>> {
    let count = tokenizer.vocab_size();
    if count > vocab_size {
        return Err(format!(
            "it has {count} tokens, but the network's embedding has {vocab_size} rows"
        ));
    }
    (0..count)
        .map(|id| {
            let text = u32::try_from(id).ok().and_then(|id| tokenizer.token_text(id));
            // A gap in the ids.
            Ok(text.unwrap_or_else(|| format!("[PAD{id}]")))
        })
        .collect()
}

fn types(value: &Json, model: &Json, tokens: &[String], build: &Build) -> Vec<i32> {
    let mut types = vec![NORMAL; tokens.len()];
    for (kind, token) in types.iter_mut().zip(tokens) {
        let byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        if byte && matches!(build, Build::SentencePiece { .. }) {
            *kind = BYTE;
        }
    }
    let added = value.get("added_tokens").and_then(Json::as_array);
    for token in added.into_iter().flatten() {
        let id = token.get("id").and_then(Json::as_u64).and_then(|id| usize::try_from(id).ok());
        let special = token.get("special").and_then(Json::as_bool).unwrap_or(false);
        if let Some(kind) = id.and_then(|id| types.get_mut(id)) {
            *kind = if special { CONTROL } else { USER_DEFINED };
        }
    }
    if let Some(unknown) = model.get("unk_token").and_then(Json::as_str)
        && let Some(at) = tokens.iter().position(|t| t == unknown)
        && let Some(kind) = types.get_mut(at)
    {
        *kind = UNKNOWN;
    }
    types
}

fn merges(model: &Json) -> Parsed<Vec<(String, String)>> {
    let list = model.get("merges").and_then(Json::as_array).ok_or("it has no merges")?;
    list.iter()
        .map(|merge| {
            let pair = match merge {
                Json::String(line) => line.split_once(' ').map(|(a, b)| (a.into(), b.into())),
                Json::Array(pair) => match pair.as_slice() {
                    [Json::String(a), Json::String(b)] => Some((a.clone(), b.clone())),
                    _ => None,
                },
                _ => None,
            };
            pair.ok_or_else(|| format!("the merge {merge} is not two tokens"))
        })
        .collect()
}

/// Scores that make the merges come in their order: minus the place of the first merge that yields
/// a token. Tokens that no merge yields come last; their score decides nothing.
fn scores(tokens: &[String], types: &[i32], merges: &[(String, String)]) -> Vec<f32> {
    let mut places = std::collections::HashMap::new();
    for (a, b) in merges {
        let next = places.len() as f32;
        places.entry(format!("{a}{b}")).or_insert(-next);
    }
    let last = -(places.len() as f32);
    let score = |(token, kind): (&String, &i32)| match *kind {
        NORMAL | USER_DEFINED => places.get(token).copied().unwrap_or(last),
        _ => 0.0,
    };
    tokens.iter().zip(types).map(score).collect()
}
