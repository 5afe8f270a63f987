//! Byte-level BPE from its parts: GPT-2's two files, or lists out of a GGUF file.

use super::ids::Configs;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// How text is split before byte-level BPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// GPT-2's expression.
    Gpt2,
    /// Single digits, then GPT-2's expression.
    Digits,
    /// A regular expression given here.
    Expression(&'static str),
}

/// The JSON of a byte-level BPE tokenizer. `special` lists added special tokens, `post` is the
/// post-processor.
pub(crate) fn byte_level(
    vocabulary: &Value,
    merges: &[(String, String)],
    special: &[(u32, String)],
    split: Split,
    add_prefix_space: bool,
    post: Value,
) -> Value {
    let added: Vec<Value> = special.iter().map(|(id, text)| added_token(*id, text, true)).collect();
    let merges: Vec<Value> = merges.iter().map(|(a, b)| json!([a, b])).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space,
        "trim_offsets": true, "use_regex": matches!(split, Split::Gpt2 | Split::Digits)});
    let pre_tokenizer = match split {
        Split::Gpt2 => byte_level,
        Split::Digits => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            // After digits, every piece would get a space of its own.
            let order = if add_prefix_space { [byte_level, digits] } else { [digits, byte_level] };
            json!({"type": "Sequence", "pretokenizers": order})
        }
        Split::Expression(expression) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false},
            byte_level,
        ]}),
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": pre_tokenizer, "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocabulary, "merges": merges},
    })
}

/// The JSON of one added token.
pub(crate) fn added_token(id: u32, text: &str, special: bool) -> Value {
    json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": special})
}

/// A post-processor that puts marks around a text, or none when there is nothing to put.
pub(crate) fn marks(begin: Option<(u32, &str)>, end: Option<(u32, &str)>) -> Value {
    if begin.is_none() && end.is_none() {
        return Value::Null;
    }
    let mark =
        |(_, text): (u32, &str), kind: u32| json!({"SpecialToken": {"id": text, "type_id": kind}});
    let piece = |name: &str, kind: u32| -> Vec<Value> {
        begin
            .map(|b| mark(b, kind))
            .into_iter()
            .chain([json!({"Sequence": {"id": name, "type_id": kind}})])
            .chain(end.map(|e| mark(e, kind)))
            .collect()
    };
    let special: serde_json::Map<String, Value> = begin
        .iter()
        .chain(end.iter())
        .map(|(id, text)| (text.to_string(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair: Vec<Value> = piece("A", 0).into_iter().chain(piece("B", 1)).collect();
    json!({"type": "TemplateProcessing", "single": piece("A", 0), "pair": pair, "special_tokens": special})
}

/// A tokenizer from the contents of `vocab.json` and `merges.txt`.
pub(super) fn byte_level_files(
    vocab_path: &Path,
    vocab: &[u8],
    merges_path: &Path,
    merges: &[u8],
    config: &Configs,
) -> Result<Value> {
    let vocabulary: Value = serde_json::from_slice(vocab)
        .map_err(|e| Error::line(vocab_path, e.line(), e.to_string()))?;
    let object = vocabulary
        .as_object()
        .ok_or_else(|| Error::file(vocab_path, "must be an object that maps tokens to ids"))?;
    for (token, id) in object {
        if id.as_u64().is_none_or(|id| id > u64::from(u32::MAX)) {
            return Err(Error::file(vocab_path, format!("token {token:?} has no id of 32 bits")));
        }
    }
    let text = std::str::from_utf8(merges)
        .map_err(|e| Error::file(merges_path, format!("not UTF-8 text: {e}")))?;
    let mut pairs = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.is_empty() || (index == 0 && line.starts_with("#version")) {
            continue;
        }
        pairs.push(merge_pair(line).ok_or_else(|| {
            Error::line(
                merges_path,
                index + 1,
                format!("{line:?} is not two tokens with one space between"),
            )
        })?);
    }
    let mut special: Vec<(u32, String)> = Vec::new();
    let id_of = |t: &str| object.get(t).and_then(Value::as_u64).and_then(|i| u32::try_from(i).ok());
    for token in ["bos_token", "eos_token", "unk_token", "pad_token"]
        .iter()
        .filter_map(|key| config.special_token(key))
        .chain(["<|endoftext|>"])
    {
        if let Some(id) = id_of(token)
            && special.iter().all(|(known, _)| *known != id)
        {
            special.push((id, token.to_string()));
        }
    }
    special.sort();
    let prefix_space = config.flag("add_prefix_space").unwrap_or(false);
    let begin =
        config.special_token("bos_token").filter(|_| config.flag("add_bos_token") == Some(true));
    let begin = begin.and_then(|token| Some((id_of(token)?, token)));
    Ok(byte_level(&vocabulary, &pairs, &special, Split::Gpt2, prefix_space, marks(begin, None)))
}

/// The two tokens of a line of `merges.txt`.
pub(super) fn merge_pair(line: &str) -> Option<(String, String)> {
    let (left, right) = line.trim_end_matches(['\r', '\n']).split_once(' ')?;
    (!left.is_empty() && !right.is_empty() && !right.contains(' '))
        .then(|| (left.to_string(), right.to_string()))
}
