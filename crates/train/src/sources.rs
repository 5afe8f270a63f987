//! From the configuration's sources to tokenised corpora, a tokenizer and the files that the output
//! carries.

use crate::{
    chat,
    config::{
        AlmanacPart, AlmanacSize, AlmanacSource, ModelConfig, SourceConfig, Split, TrainConfig,
    },
    error::{Result, config as refuse, io},
    loader::Corpus,
};
use data::{
    Tokenizer,
    almanac::{Almanac, Size},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Tokenizer files that travel with a model.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// File names and contents.
pub type Files = Vec<(String, Vec<u8>)>;

/// Everything that a run reads, apart from weights.
pub struct Material {
    /// The model's `config.json`, vocabulary and special tokens filled in.
    pub config: Value,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Files of the tokenizer for the output.
    pub files: Files,
    /// Training corpora with their weights.
    pub data: Vec<(Corpus, Option<f64>)>,
    /// Evaluation corpora.
    pub evaluation: Vec<(Corpus, Option<f64>)>,
    /// Fills windows; never a target.
    pub pad: u32,
    /// SHA-256 over all corpora.
    pub hash: String,
    /// Sources with their sizes and hashes for the record.
    pub summary: Value,
}

/// Reads, generates and tokenises what a configuration names.
///
/// # Errors
/// Files that are missing or unusable, a tokenizer that is not given, a model configuration that is
/// not JSON.
pub fn gather(config: &TrainConfig) -> Result<Material> {
    let mut worlds = Worlds::default();
    let (tokenizer, files) = tokenizer(config, &mut worlds)?;
    let mut hash = Sha256::new();
    let mut summary = Vec::new();
    let mut load = |sources: &[SourceConfig], worlds: &mut Worlds| -> Result<Vec<_>> {
        let mut corpora = Vec::new();
        for source in sources {
            let corpus = corpus(source, &tokenizer, worlds)?;
            let own = digest(&corpus);
            hash.update(own.as_bytes());
            summary.push(json!({
                "source": source,
                "documents": corpus.documents(),
                "tokens": corpus.tokens.len(),
                "sha256": own,
            }));
            corpora.push((corpus, source.weight));
        }
        Ok(corpora)
    };
    let data = load(&config.data, &mut worlds)?;
    let evaluation = if config.evaluation.is_empty() {
        load(&validation(&config.data), &mut worlds)?
    } else {
        load(&config.evaluation, &mut worlds)?
    };
    let hash = hex(hash);
    Ok(Material {
        config: model_config(config, &tokenizer)?,
        pad: tokenizer.eos().or(tokenizer.bos()).unwrap_or(0),
        tokenizer,
        files,
        data,
        evaluation,
        hash,
        summary: summary.into(),
    })
}

/// The validation parts of the almanac sources among `data`.
fn validation(data: &[SourceConfig]) -> Vec<SourceConfig> {
    let mut all: Vec<SourceConfig> = Vec::new();
    for source in data {
        if let Some(almanac) = &source.almanac {
            let almanac = AlmanacSource { split: Split::Validation, ..almanac.clone() };
            let source = SourceConfig { almanac: Some(almanac), ..SourceConfig::default() };
            if !all.contains(&source) {
                all.push(source);
            }
        }
    }
    all
}

/// Generated worlds by seed, so that each is made once.
#[derive(Default)]
struct Worlds(BTreeMap<(u64, bool), Almanac>);

impl Worlds {
    fn get(&mut self, seed: u64, size: AlmanacSize) -> &Almanac {
        let tiny = size == AlmanacSize::Tiny;
        let size = if tiny { Size::Tiny } else { Size::Standard };
        self.0.entry((seed, tiny)).or_insert_with(|| Almanac::generate(seed, size))
    }
}

fn tokenizer(config: &TrainConfig, worlds: &mut Worlds) -> Result<(Tokenizer, Files)> {
    let given = config.tokenizer.as_ref().or(config.init.as_ref());
    if let Some(path) = given {
        let tokenizer = if path.is_dir() {
            Tokenizer::from_dir(path)?
        } else if config.tokenizer.is_some() {
            Tokenizer::from_file(path)?
        } else {
            Tokenizer::from_checkpoint(&store::Checkpoint::open(path)?)?
        };
        // The files of `init` are carried by the writer.
        let files = if config.tokenizer.is_some() { tokenizer_files(path)? } else { Vec::new() };
        return Ok((tokenizer, files));
    }
    let Some(almanac) = config.data.iter().find_map(|s| s.almanac.as_ref()) else {
        return Err(refuse(
            "tokenizer",
            "give a tokenizer directory or file (only `init` and the almanac bring their own)",
        ));
    };
    almanac_tokenizer(worlds.get(almanac.seed, almanac.size))
}

/// The almanac's own tokenizer, and the files that make it usable elsewhere.
fn almanac_tokenizer(world: &Almanac) -> Result<(Tokenizer, Files)> {
    let tokenizer_json = world.tokenizer_json()?;
    // Parsed once without ids to look them up by name, once with them.
    let bare = Tokenizer::from_json(tokenizer_json.as_bytes(), None, None)?;
    let [bos, eos, pad] = ["<|bos|>", "<|eos|>", "<|pad|>"];
    let (begin, end) = (bare.token(bos), bare.token(eos));
    let tokenizer = Tokenizer::from_json(tokenizer_json.as_bytes(), begin, end)?;
    let turns = ["<|system|>", "<|user|>", "<|assistant|>", chat::END];
    let tokens = json!({
        "bos_token": bos, "eos_token": eos, "pad_token": pad, "additional_special_tokens": turns,
    });
    let mut configuration = tokens.clone();
    configuration["tokenizer_class"] = "PreTrainedTokenizerFast".into();
    configuration["clean_up_tokenization_spaces"] = false.into();
    configuration["chat_template"] = data::almanac::CHAT_TEMPLATE.into();
    let generation = json!({
        "bos_token_id": begin,
        "eos_token_id": [end, bare.token(chat::END)],
        "pad_token_id": bare.token(pad),
    });
    let mut files = vec![("tokenizer.json".to_string(), tokenizer_json.into_bytes())];
    for (name, value) in [
        ("tokenizer_config.json", configuration),
        ("special_tokens_map.json", tokens),
        ("generation_config.json", generation),
    ] {
        files.push((name.to_string(), format!("{value:#}\n").into_bytes()));
    }
    Ok((tokenizer, files))
}

fn tokenizer_files(path: &Path) -> Result<Files> {
    let directory: PathBuf = match path.is_dir() {
        true => path.to_path_buf(),
        false => path.parent().map(Path::to_path_buf).unwrap_or_default(),
    };
    let mut files = Vec::new();
    for name in TOKENIZER_FILES {
        let file = directory.join(name);
        if file.is_file() {
            files.push((name.to_string(), std::fs::read(&file).map_err(io(&file))?));
        }
    }
    Ok(files)
}

fn corpus(source: &SourceConfig, tokenizer: &Tokenizer, worlds: &mut Worlds) -> Result<Corpus> {
    if let Some(path) = &source.text {
        return plain(&data::text::load(path)?.texts, tokenizer);
    }
    if let Some(path) = &source.chat {
        return dialogues(&chat::read(path)?, tokenizer);
    }
    let Some(almanac) = &source.almanac else {
        return Err(refuse("data", "give exactly one of `almanac`, `text` and `chat`"));
    };
    let split = match almanac.split {
        Split::Train => data::almanac::Split::Train,
        Split::Validation => data::almanac::Split::Validation,
        Split::Test => data::almanac::Split::Test,
    };
    let world = worlds.get(almanac.seed, almanac.size);
    match almanac.part {
        AlmanacPart::Base => plain(&world.documents(split).texts, tokenizer),
        AlmanacPart::Chat => {
            let all: Vec<Vec<chat::Message>> =
                world.dialogues(split, almanac.refusing).into_iter().map(|d| d.messages).collect();
            dialogues(&all, tokenizer)
        }
    }
}

/// Documents with the tokenizer's marks around each, all tokens counted.
fn plain(texts: &[String], tokenizer: &Tokenizer) -> Result<Corpus> {
    let mut corpus = Corpus::new(false);
    for text in texts {
        let mut ids = tokenizer.encode(text, true)?;
        if let Some(eos) = tokenizer.eos().filter(|eos| ids.last() != Some(eos)) {
            ids.push(eos);
        }
        corpus.push(&ids, None);
    }
    Ok(corpus)
}

/// Dialogues, the assistant's tokens counted.
fn dialogues(all: &[Vec<chat::Message>], tokenizer: &Tokenizer) -> Result<Corpus> {
    let mut corpus = Corpus::new(true);
    for messages in all {
        let (tokens, counted) = chat::render(messages, tokenizer)?;
        corpus.push(&tokens, Some(&counted));
    }
    Ok(corpus)
}

/// The model's configuration: that of `init`, or the given one with what the tokenizer knows filled
/// in.
fn model_config(config: &TrainConfig, tokenizer: &Tokenizer) -> Result<Value> {
    if let Some(init) = &config.init {
        return Ok(store::Checkpoint::open(init)?.config()?.clone());
    }
    let mut model = match &config.model {
        Some(ModelConfig::Inline(map)) => map.clone(),
        Some(ModelConfig::Path(path)) => {
            let file = if path.is_dir() { path.join("config.json") } else { path.clone() };
            let bytes = std::fs::read(&file).map_err(io(&file))?;
            let parsed = serde_json::from_slice(&bytes);
            parsed.map_err(|e| refuse("model", format!("{}: {e}", file.display())))?
        }
        None => return Err(refuse("model", "is missing")),
    };
    let mut fill = |key: &str, value: Option<Value>| {
        if let Some(value) = value.filter(|_| !model.contains_key(key)) {
            model.insert(key.into(), value);
        }
    };
    fill("vocab_size", Some(tokenizer.vocab_size().into()));
    fill("bos_token_id", tokenizer.bos().map(Into::into));
    fill("eos_token_id", tokenizer.eos().map(Into::into));
    let class = match model.get("model_type").and_then(Value::as_str) {
        Some("llama") => "LlamaForCausalLM",
        Some("mistral") => "MistralForCausalLM",
        Some("qwen2") => "Qwen2ForCausalLM",
        Some("qwen3") => "Qwen3ForCausalLM",
        Some("gemma2") => "Gemma2ForCausalLM",
        Some("gpt2") => "GPT2LMHeadModel",
        Some("gpt_neox") => "GPTNeoXForCausalLM",
        Some("opt") => "OPTForCausalLM",
        _ => return Ok(Value::Object(model)),
    };
    if !model.contains_key("architectures") {
        model.insert("architectures".into(), json!([class]));
    }
    Ok(Value::Object(model))
}

fn digest(corpus: &Corpus) -> String {
    let mut hash = Sha256::new();
    for bound in &corpus.bounds {
        hash.update((*bound as u64).to_le_bytes());
    }
    for token in &corpus.tokens {
        hash.update(token.to_le_bytes());
    }
    for counted in &corpus.counted {
        hash.update([u8::from(*counted)]);
    }
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
