//! Which ids begin and end a text: gathered from the configuration files beside a tokenizer.

use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Ids that begin and end a text, and the chat template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SpecialIds {
    pub begin: Option<u32>,
    pub end: Vec<u32>,
    pub chat_template: Option<String>,
}

impl SpecialIds {
    pub(super) fn new(begin: Option<u32>, end: Vec<u32>, chat_template: Option<String>) -> Self {
        Self { begin, end, chat_template }
    }
}

/// The configuration files of a model directory; missing ones are `Value::Null`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configs {
    tokenizer: Value,
    special_tokens: Value,
    generation: Value,
    model: Value,
    chat_template: Option<String>,
}

impl Configs {
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let template = directory.join("chat_template.jinja");
        let chat_template = if template.is_file() {
            Some(std::fs::read_to_string(&template).map_err(Error::io(&template))?)
        } else {
            None
        };
        Ok(Self {
            tokenizer: read_json(&directory.join("tokenizer_config.json"))?,
            special_tokens: read_json(&directory.join("special_tokens_map.json"))?,
            generation: read_json(&directory.join("generation_config.json"))?,
            model: read_json(&directory.join("config.json"))?,
            chat_template,
        })
    }

    /// A flag of `tokenizer_config.json`.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.tokenizer.get(key).and_then(Value::as_bool)
    }

    /// A special token by its key (`eos_token`), as text.
    pub(super) fn special_token(&self, key: &str) -> Option<&str> {
        [&self.tokenizer, &self.special_tokens].into_iter().find_map(|config| {
            let value = config.get(key)?;
            value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
        })
    }

    /// Begin: the tokenizer's word, else the model's id, else `begin`. End: every id of the
    /// generation configuration, then the tokenizer's word, then the model's; `end` when none.
    pub(super) fn ids(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        begin: Option<u32>,
        end: Option<u32>,
    ) -> SpecialIds {
        let by_word = |key| self.special_token(key).and_then(|t| tokenizer.token_to_id(t));
        let known = |id: &u32| tokenizer.id_to_token(*id).is_some();
        let by_id = |key: &str| -> Vec<u32> {
            [&self.generation, &self.model]
                .into_iter()
                .filter_map(|config| config.get(key))
                .flat_map(id_list)
                .filter(known)
                .collect()
        };
        let begin =
            by_word("bos_token").or_else(|| by_id("bos_token_id").first().copied()).or(begin);
        let mut ends = id_list(self.generation.get("eos_token_id").unwrap_or(&Value::Null));
        ends.retain(known);
        ends.extend(by_word("eos_token"));
        if ends.is_empty() {
            ends.extend(by_id("eos_token_id"));
        }
        if ends.is_empty() {
            ends.extend(end);
        }
        let mut unique = Vec::new();
        for id in ends {
            if !unique.contains(&id) {
                unique.push(id);
            }
        }
        let template = self.tokenizer.get("chat_template").and_then(Value::as_str);
        let chat_template = self.chat_template.clone().or_else(|| template.map(str::to_string));
        SpecialIds::new(begin, unique, chat_template)
    }
}

/// An id or a list of ids.
fn id_list(value: &Value) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::line(path, e.line(), e.to_string()))
}
