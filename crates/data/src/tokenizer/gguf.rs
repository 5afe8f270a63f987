//! The vocabulary inside a GGUF file.
//!
//! Two kinds are read: `llama` (sentencepiece BPE with scores) and `gpt2` (byte-level BPE with
//! merges, split by one of a few known expressions).

use super::convert::{Split, added_token, byte_level, marks as mark_processor, merge_pair};
use super::sentencepiece::{Algorithm, Kind, Model, Piece};
use serde_json::{Value, json};
use store::gguf::Metadata;

type Parsed<T> = std::result::Result<T, String>;

/// Llama 3's split, as llama.cpp calls it.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's split: one digit at a time.
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A vocabulary with its rules.
#[derive(Clone, Debug)]
pub(super) struct Vocabulary {
    pub pieces: Vec<Piece>,
    pub merges: Vec<(String, String)>,
    /// `None`: sentencepiece rules. `Some`: byte-level BPE with this split.
    pub split: Option<Split>,
    pub begin: Option<u32>,
    pub end: Option<u32>,
    pub add_begin: bool,
    pub add_end: bool,
    pub add_space_prefix: bool,
    pub remove_extra_whitespaces: bool,
}

/// The id that begins a text, and those at which generation stops.
pub(super) fn marks(metadata: &Metadata) -> (Option<u32>, Vec<u32>) {
    let id = |name: &str| metadata.get_u32(&format!("tokenizer.ggml.{name}_token_id"));
    let end = id("eos");
    let turn = id("eot").filter(|id| Some(*id) != end);
    (id("bos"), end.into_iter().chain(turn).collect())
}

impl Vocabulary {
    /// Reads the keys `tokenizer.ggml.*`.
    pub(super) fn read(metadata: &Metadata) -> Parsed<Self> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let model = metadata
            .get_str(&key("model"))
            .ok_or("the metadata has no tokenizer.ggml.model: the file carries no tokenizer")?;
        let texts = metadata
            .get_strings(&key("tokens"))
            .ok_or("the metadata has no list tokenizer.ggml.tokens")?;
        let scores = metadata.get_f32s(&key("scores"));
        let kinds = metadata.get_i32s(&key("token_type"));
        let id = |name: &str| metadata.get_u32(&key(name));
        let flag = |name: &str| metadata.get_bool(&key(name));
        let llama = model == "llama";
        let split = match model {
            "llama" => None,
            "gpt2" => Some(split_of(metadata.get_str(&key("pre")))?),
            other => {
                return Err(format!(
                    "tokenizer.ggml.model is {other:?}; read are \"llama\" and \"gpt2\""
                ));
            }
        };
        if let Some(scores) = scores
            && scores.len() != texts.len()
        {
            return Err(format!("{} scores for {} tokens", scores.len(), texts.len()));
        }
        if llama && scores.is_none() {
            return Err("the metadata has no list tokenizer.ggml.scores".into());
        }
        if let Some(kinds) = kinds
            && kinds.len() != texts.len()
        {
            return Err(format!("{} token types for {} tokens", kinds.len(), texts.len()));
        }
        let mut pieces = Vec::with_capacity(texts.len());
        for (i, text) in texts.iter().enumerate() {
            let number = kinds.as_ref().and_then(|k| k.get(i)).copied().unwrap_or(1);
            let kind = u64::try_from(number)
                .ok()
                .and_then(Kind::from_number)
                .ok_or_else(|| format!("token {i} has the unknown type {number}"))?;
            let score = scores.as_ref().and_then(|s| s.get(i)).copied().unwrap_or(0.0);
            pieces.push(Piece { text: text.to_string(), score, kind });
        }
        let mut merges = Vec::new();
        for (i, line) in metadata.get_strings(&key("merges")).unwrap_or_default().iter().enumerate()
        {
            merges.push(
                merge_pair(line).ok_or_else(|| format!("merge {i} is {line:?}, not two tokens"))?,
            );
        }
        Ok(Self {
            pieces,
            merges,
            split,
            begin: id("bos_token_id"),
            end: id("eos_token_id"),
            add_begin: flag("add_bos_token").unwrap_or(llama),
            add_end: flag("add_eos_token").unwrap_or(false),
            add_space_prefix: flag("add_space_prefix").unwrap_or(llama),
            remove_extra_whitespaces: flag("remove_extra_whitespaces").unwrap_or(false),
        })
    }

    /// The JSON of a `tokenizer.json` that tokenises the same.
    pub(super) fn to_json(&self) -> Parsed<Value> {
        let begin = self.begin.filter(|_| self.add_begin);
        let end = self.end.filter(|_| self.add_end);
        let Some(split) = self.split else {
            let mark = |id: Option<u32>| id.map_or(-1, i64::from);
            let model = Model {
                pieces: self.pieces.clone(),
                algorithm: Algorithm::Bpe,
                byte_fallback: self.pieces.iter().any(|p| p.kind == Kind::Byte),
                begin: mark(self.begin),
                end: mark(self.end),
                add_dummy_prefix: self.add_space_prefix,
                remove_extra_whitespaces: self.remove_extra_whitespaces,
                ..Model::default()
            };
            model.validate()?;
            return model.to_json_with(begin, end);
        };
        let mut vocabulary = serde_json::Map::new();
        let mut special = Vec::new();
        let mut user = Vec::new();
        for (id, piece) in (0u32..).zip(&self.pieces) {
            if vocabulary.insert(piece.text.clone(), json!(id)).is_some() {
                return Err(format!("token {id} ({:?}) occurs twice", piece.text));
            }
            match piece.kind {
                Kind::Control | Kind::Unknown => special.push((id, piece.text.clone())),
                Kind::UserDefined => user.push(added_token(id, &piece.text, false)),
                _ => {}
            }
        }
        let text = |id: Option<u32>| {
            id.and_then(|id| Some((id, self.pieces.get(id as usize)?.text.as_str())))
        };
        let post = mark_processor(text(begin), text(end));
        let vocabulary = Value::Object(vocabulary);
        let mut json =
            byte_level(&vocabulary, &self.merges, &special, split, self.add_space_prefix, post);
        if let Some(added) = json.get_mut("added_tokens").and_then(Value::as_array_mut) {
            added.extend(user);
            added.sort_by_key(|t| t.get("id").and_then(Value::as_u64));
        }
        Ok(json)
    }
}

fn split_of(name: Option<&str>) -> Parsed<Split> {
    match name.unwrap_or("default") {
        "default" | "gpt-2" | "gpt2" | "olmo" | "mpt" | "phi-2" => Ok(Split::Gpt2),
        "llama-bpe" | "llama3" | "llama-v3" => Ok(Split::Expression(LLAMA3)),
        "qwen2" => Ok(Split::Expression(QWEN2)),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => Ok(Split::Digits),
        other => Err(format!(
            "tokenizer.ggml.pre is {other:?}; read are \"gpt-2\", \"llama-bpe\", \"qwen2\" and \"smollm\" \
             (put the model's tokenizer.json into a directory with its weights instead)"
        )),
    }
}
