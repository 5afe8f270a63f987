//! The almanac's tokenizer: byte-level BPE trained on its text.
//!
//! Text always gets a leading space, so that a name at the start of a text is the same tokens as
//! within a sentence; digits stand alone, so that sums can be learnt.

use super::chat::CHAT_TEMPLATE;
use crate::{Error, Result, Tokenizer};
use serde_json::{Value, json};
use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Special tokens; a token's id is its place.
pub(super) const SPECIAL: [&str; 7] =
    ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"];
const BEGIN: u32 = 0;
const END: u32 = 1;
const TURN_END: u32 = 6;

/// Trains the tokenizer and returns the JSON of its `tokenizer.json`.
pub(super) fn train(texts: &[String], vocab_size: usize) -> Result<String> {
    let message = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
    let mut tokenizer =
        tokenizers::Tokenizer::from_bytes(empty().to_string().as_bytes()).map_err(message)?;
    let special = SPECIAL.iter().map(|t| AddedToken::from(*t, true)).collect();
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    tokenizer.train(&mut trainer, texts.iter().map(String::as_str)).map_err(message)?;
    let text = tokenizer.to_string(false).map_err(message)?;
    let mut value: Value =
        serde_json::from_str(&text).map_err(|e| Error::Tokenizer(e.to_string()))?;
    // The mark exists only now, so that the post-processor cannot be there before the training.
    let begin = SPECIAL.first().copied().unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.insert(
            "post_processor".into(),
            crate::tokenizer::convert::marks(Some((BEGIN, begin)), None),
        );
    }
    serde_json::to_string_pretty(&value).map_err(|e| Error::Tokenizer(e.to_string()))
}

fn empty() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            {"type": "Digits", "individual_digits": true},
        ]},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": {}, "merges": []},
    })
}

/// The tokenizer of that JSON.
pub(super) fn tokenizer(json: &str) -> Result<Tokenizer> {
    Tokenizer::from_json(json.as_bytes(), Some(BEGIN), Some(END))
}

/// The configuration files beside `tokenizer.json`, by name.
pub(super) fn configuration(context: usize) -> Vec<(&'static str, Value)> {
    let [bos, eos, pad, system, user, assistant, end] = SPECIAL;
    vec![
        (
            "tokenizer_config.json",
            json!({
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": bos, "eos_token": eos, "pad_token": pad,
                "additional_special_tokens": [system, user, assistant, end],
                "model_max_length": context,
                "clean_up_tokenization_spaces": false,
                "chat_template": CHAT_TEMPLATE,
            }),
        ),
        (
            "special_tokens_map.json",
            json!({"bos_token": bos, "eos_token": eos, "pad_token": pad,
                "additional_special_tokens": [system, user, assistant, end]}),
        ),
        (
            "generation_config.json",
            json!({"bos_token_id": BEGIN, "eos_token_id": [END, TURN_END], "pad_token_id": 2}),
        ),
    ]
}
