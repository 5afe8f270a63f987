//! Tokenizers as checkpoints carry them, behind one type.
//!
//! The tokenising itself is the `tokenizers` crate's. This file finds the right files, hands over to
//! the converters of the other formats (each yields the JSON of a `tokenizer.json`), and knows which
//! ids begin and end a text.

pub(crate) mod convert;
mod export;
mod gguf;
mod ids;
mod sentencepiece;
mod stream;

pub use export::GgufVocabulary;
pub use stream::DecodeStream;

use crate::{Error, Result};
use ids::SpecialIds;
use std::path::{Path, PathBuf};
use store::Checkpoint;

/// A tokenizer with its special ids.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    ids: SpecialIds,
    origin: PathBuf,
}

impl Tokenizer {
    /// The tokenizer of a model directory: `tokenizer.json`, else `tokenizer.model` (sentencepiece),
    /// else `vocab.json` with `merges.txt` (GPT-2's byte-level BPE). The ids that begin and end a
    /// text come from `tokenizer_config.json`, `generation_config.json` and `config.json`.
    ///
    /// # Errors
    /// Names the directory and what was looked for, or the file that cannot be read and why.
    pub fn from_dir(directory: &Path) -> Result<Self> {
        for name in ["tokenizer.json", "tokenizer.model", "vocab.json"] {
            let path = directory.join(name);
            if path.is_file() {
                return Self::from_file(&path);
            }
        }
        Err(Error::file(
            directory,
            "no tokenizer here: looked for tokenizer.json, tokenizer.model, and vocab.json with merges.txt",
        ))
    }

    /// The tokenizer in one file (`tokenizer.json`, `tokenizer.model`, or `vocab.json` with a
    /// `merges.txt` beside it); configuration files beside it are read for the special ids.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn from_file(path: &Path) -> Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let config = ids::Configs::read(directory)?;
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        if name.ends_with(".model") {
            let model = sentencepiece::Model::parse(&bytes).map_err(|m| Error::file(path, m))?;
            let json = model.to_json(&config).map_err(|m| Error::file(path, m))?;
            let inner = from_value(&json).map_err(|m| Error::file(path, m))?;
            let ids = config.ids(&inner, model.begin(), model.end());
            return Ok(Self { inner, ids, origin: path.to_path_buf() });
        }
        if name.ends_with("vocab.json") {
            let merges_path = directory.join(name.replace("vocab.json", "merges.txt"));
            let merges = std::fs::read(&merges_path).map_err(Error::io(&merges_path))?;
            let json = convert::byte_level_files(path, &bytes, &merges_path, &merges, &config)?;
            let inner = from_value(&json).map_err(|m| Error::file(path, m))?;
            let ids = config.ids(&inner, None, None);
            return Ok(Self { inner, ids, origin: path.to_path_buf() });
        }
        let inner = from_bytes(&bytes).map_err(|m| {
            Error::file(path, format!("not a tokenizer.json that this version reads: {m}"))
        })?;
        let ids = config.ids(&inner, None, None);
        Ok(Self { inner, ids, origin: path.to_path_buf() })
    }

    /// The tokenizer that belongs to a checkpoint: for a GGUF file the one in its metadata, else the
    /// one of its directory.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`]; for GGUF names the metadata key that is missing or wrong.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let Some(metadata) = checkpoint.gguf_metadata() else {
            return Self::from_dir(checkpoint.directory());
        };
        let path = checkpoint.path();
        let inner = match metadata.get_str("tokenizer.huggingface.json") {
            Some(json) => from_bytes(json.as_bytes()),
            None => gguf::Vocabulary::read(metadata)
                .and_then(|vocabulary| vocabulary.to_json())
                .and_then(|json| from_value(&json)),
        };
        let inner = inner.map_err(|m| Error::file(path, m))?;
        let template = metadata.get_str("tokenizer.chat_template").map(str::to_string);
        let (begin, ends) = gguf::marks(metadata);
        let ids = SpecialIds::new(begin, ends, template);
        Ok(Self { inner, ids, origin: path.to_path_buf() })
    }

    /// A tokenizer from the bytes of a `tokenizer.json`, with the ids that begin and end a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the bytes are not a tokenizer.
    pub fn from_json(bytes: &[u8], bos: Option<u32>, eos: Option<u32>) -> Result<Self> {
        let inner = from_bytes(bytes).map_err(Error::Tokenizer)?;
        let ids = SpecialIds::new(bos, eos.into_iter().collect(), None);
        Ok(Self { inner, ids, origin: PathBuf::new() })
    }

    /// Token ids of a text. With `add_special` the tokenizer's own post-processor adds what it adds
    /// (usually the begin mark); nothing else is added or removed.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text cannot be encoded.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| {
            Error::Tokenizer(format!("{}: cannot encode the text: {e}", self.origin.display()))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of token ids; with `skip_special` without the special tokens. Ids outside of the
    /// vocabulary give no text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| Error::Tokenizer(format!("{}: cannot decode: {e}", self.origin.display())))
    }

    /// Number of token ids, added tokens included: one more than the largest id.
    pub fn vocab_size(&self) -> usize {
        let vocabulary = self.inner.get_vocab(true);
        vocabulary.values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The id that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.ids.begin
    }

    /// The id that ends a text (the first, where a model has several).
    pub fn eos(&self) -> Option<u32> {
        self.ids.end.first().copied()
    }

    /// All ids at which generation stops.
    pub fn eos_ids(&self) -> &[u32] {
        &self.ids.end
    }

    /// The id of a token by its exact text in the vocabulary (`<s>`, `Ġthe`, ...).
    pub fn token(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token's text in the vocabulary.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The Jinja chat template of `tokenizer_config.json` (or `chat_template.jinja`), if any.
    pub fn chat_template(&self) -> Option<&str> {
        self.ids.chat_template.as_deref()
    }

    /// A decoder for tokens that arrive one by one; `skip_special` leaves special tokens out.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The metadata of a GGUF file that carries this tokenizer, for a network whose embedding has
    /// `vocab_size` rows.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when GGUF has no words for it; the message says for what.
    pub fn to_gguf(&self, vocab_size: usize) -> Result<GgufVocabulary> {
        export::export(self, &self.to_json()?, vocab_size).map_err(|reason| {
            let origin = self.origin.display();
            Error::Tokenizer(format!("{origin}: the tokenizer does not fit GGUF: {reason}"))
        })
    }

    /// The files that a model directory needs for this tokenizer: names and contents.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when a part cannot be written.
    pub fn to_files(&self) -> Result<Vec<(&'static str, String)>> {
        let mut config = serde_json::Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        for (key, id) in [("bos_token", self.bos()), ("eos_token", self.eos())] {
            if let Some(text) = id.and_then(|id| self.token_text(id)) {
                config.insert(key.into(), text.into());
            }
        }
        if let Some(template) = self.chat_template() {
            config.insert("chat_template".into(), template.into());
        }
        let config =
            serde_json::to_string_pretty(&config).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(vec![("tokenizer.json", self.to_json()?), ("tokenizer_config.json", config + "\n")])
    }

    /// The JSON of a `tokenizer.json` that tokenises the same.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when a part cannot be written.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| Error::Tokenizer(e.to_string()))
    }
}

fn from_bytes(bytes: &[u8]) -> std::result::Result<tokenizers::Tokenizer, String> {
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
    // Truncation and padding saved with a tokenizer are habits of its training, not of its text.
    inner.with_truncation(None).map_err(|e| e.to_string())?;
    inner.with_padding(None);
    Ok(inner)
}

fn from_value(json: &serde_json::Value) -> std::result::Result<tokenizers::Tokenizer, String> {
    from_bytes(json.to_string().as_bytes())
}

#[cfg(test)]
mod tests;
