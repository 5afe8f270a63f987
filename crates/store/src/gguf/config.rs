//! A Hugging Face `config.json` written from GGUF metadata.

use serde_json::{Map, Value as Json, json};

use super::metadata::{Metadata, Value};
use super::names::{Family, KNOWN};
use super::parse::Header;

/// Metadata of the file's own architecture, read by the part of the key after `<arch>.`.
struct Fields<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Fields<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A count; arrays that repeat one value (some converters write one per layer) count as it.
    fn optional(&self, name: &str) -> Result<Option<u64>, String> {
        let key = self.key(name);
        match self.metadata.get(&key) {
            None => Ok(None),
            Some(Value::Array(array)) => match array.integers().as_deref() {
                Some([first, rest @ ..]) if rest.iter().all(|v| v == first) => Ok(Some(*first)),
                _ => Err(format!("metadata key {key} differs from layer to layer")),
            },
            Some(_) => match self.metadata.get_u64(&key) {
                Some(value) => Ok(Some(value)),
                None => Err(format!("metadata key {key} is no count")),
            },
        }
    }

    fn count(&self, name: &str) -> Result<u64, String> {
        self.optional(name)?.ok_or_else(|| format!("metadata key {} is missing", self.key(name)))
    }

    fn positive(&self, name: &str) -> Result<u64, String> {
        match self.count(name)? {
            0 => Err(format!("metadata key {} is zero", self.key(name))),
            value => Ok(value),
        }
    }

    fn float(&self, name: &str) -> Option<f64> {
        self.metadata.get_f32(&self.key(name)).map(shortest)
    }

    fn required_float(&self, name: &str) -> Result<f64, String> {
        self.float(name).ok_or_else(|| format!("metadata key {} is missing", self.key(name)))
    }
}

/// The double that prints like the single: 1e-5f32 becomes 1e-5, not 9.99999974e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

/// Query and key head counts, as far as they are stated.
pub(super) fn heads(metadata: &Metadata) -> Result<(u64, u64), String> {
    let fields = fields(metadata)?;
    let query = fields.positive("attention.head_count")?;
    Ok((query, fields.optional("attention.head_count_kv")?.unwrap_or(query)))
}

fn fields(metadata: &Metadata) -> Result<Fields<'_>, String> {
    let architecture = metadata
        .architecture()
        .ok_or_else(|| "metadata key general.architecture is missing".to_owned())?;
    Ok(Fields { metadata, architecture })
}

/// The configuration, or why there can be none. `rope_factors` are the values of
/// `rope_freqs.weight` where the file has that tensor.
pub(super) fn synthesise(header: &Header, rope_factors: Option<&[f32]>) -> Result<Json, String> {
    let metadata = &header.metadata;
    let fields = fields(metadata)?;
    let family = Family::of(metadata).ok_or_else(|| {
        format!("architecture \"{}\" has no configuration here; known are {KNOWN}", {
            crate::error::shorten(fields.architecture)
        })
    })?;
    if fields.optional("expert_count")?.unwrap_or(0) > 0 {
        return Err("mixture-of-experts models are not supported".into());
    }
    let mut config = match family {
        Family::Gpt2 => gpt2(&fields)?,
        Family::GptNeox => neox(&fields)?,
        _ => llama_like(&fields, family, rope_factors)?,
    };
    config.insert("vocab_size".into(), json!(vocabulary(header, &fields)?));
    let tied = header.tensor("output.weight").is_none();
    config.insert("tie_word_embeddings".into(), json!(tied));
    let has = |name: &str| header.tensor(&format!("blk.0.{name}.bias")).is_some();
    if matches!(family, Family::Llama | Family::Qwen3) && (has("attn_q") || has("attn_output")) {
        config.insert("attention_bias".into(), json!(true));
    }
    if family == Family::Llama && (has("ffn_up") || has("ffn_down")) {
        config.insert("mlp_bias".into(), json!(true));
    }
    if family == Family::GptNeox && !header.tensors.is_empty() && !has("attn_qkv") {
        config.insert("attention_bias".into(), json!(false));
    }
    for (key, name) in
        [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")]
    {
        if let Some(id) = metadata.get_u32(&format!("tokenizer.ggml.{name}_token_id")) {
            config.insert(key.into(), json!(id));
        }
    }
    Ok(Json::Object(config))
}

fn vocabulary(header: &Header, fields: &Fields<'_>) -> Result<u64, String> {
    // The embedding is what the network computes with; the token list may be shorter (padding).
    if let Some(embedding) = header.tensor("token_embd.weight") {
        return Ok(embedding.shape[0] as u64);
    }
    match fields.optional("vocab_size")? {
        Some(size) => Ok(size),
        None => header
            .metadata
            .get_strings("tokenizer.ggml.tokens")
            .map(|tokens| tokens.len() as u64)
            .ok_or_else(|| "has neither token_embd.weight nor a vocabulary".into()),
    }
}

fn object(value: Json) -> Map<String, Json> {
    match value {
        Json::Object(map) => map,
        _ => Map::new(),
    }
}

fn llama_like(
    fields: &Fields<'_>,
    family: Family,
    rope_factors: Option<&[f32]>,
) -> Result<Map<String, Json>, String> {
    let window = fields.optional("attention.sliding_window")?.filter(|&window| window > 0);
    let (class, model_type, activation) = match family {
        Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2", "silu"),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3", "silu"),
        Family::Gemma2 => ("Gemma2ForCausalLM", "gemma2", "gelu_pytorch_tanh"),
        _ if window.is_some() => ("MistralForCausalLM", "mistral", "silu"),
        _ => ("LlamaForCausalLM", "llama", "silu"),
    };
    let hidden = fields.positive("embedding_length")?;
    let heads = fields.positive("attention.head_count")?;
    let layers = fields.count("block_count")?;
    let head_dim = match fields.optional("attention.key_length")? {
        Some(size) => size,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(format!("{heads} heads do not divide the hidden size {hidden}")),
    };
    let mut config = object(json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.optional("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": activation,
        "max_position_embeddings": fields.count("context_length")?,
        "rms_norm_eps": fields.required_float("attention.layer_norm_rms_epsilon")?,
        "rope_theta": fields.float("rope.freq_base").unwrap_or(10000.0),
    }));
    if family == Family::Gemma2 {
        // ggml gives the 27B model (46 layers) another attention scale than head_dim^-0.5.
        let scalar = if layers == 46 { hidden / heads } else { head_dim };
        let caps = |name, default| fields.float(name).unwrap_or(default);
        config.extend(object(json!({
            "hidden_activation": activation,
            "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": caps("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": caps("final_logit_softcapping", 30.0),
            "sliding_window": window.unwrap_or(4096),
        })));
    } else if let Some(window) = window {
        config.insert("sliding_window".into(), json!(window));
        if family != Family::Llama {
            config.insert("use_sliding_window".into(), json!(true));
        }
    }
    if let Some(scaling) = rope_scaling(fields, head_dim, rope_factors)? {
        config.insert("rope_scaling".into(), scaling);
    }
    Ok(config)
}

fn rope_scaling(
    fields: &Fields<'_>,
    head_dim: u64,
    rope_factors: Option<&[f32]>,
) -> Result<Option<Json>, String> {
    if let Some(factors) = rope_factors {
        let base = fields.float("rope.freq_base").unwrap_or(10000.0);
        let size = fields.optional("rope.dimension_count")?.unwrap_or(head_dim);
        let original = fields.optional("rope.scaling.original_context_length")?;
        return llama3_scaling(factors, base, size, original.unwrap_or(8192)).map(Some);
    }
    match fields.metadata.get_str(&fields.key("rope.scaling.type")) {
        None | Some("none") => Ok(None),
        Some(kind @ ("linear" | "yarn")) => {
            let mut scaling = object(json!({
                "rope_type": kind,
                "factor": fields.required_float("rope.scaling.factor")?,
            }));
            if let Some(length) = fields.optional("rope.scaling.original_context_length")? {
                scaling.insert("original_max_position_embeddings".into(), json!(length));
            }
            Ok(Some(Json::Object(scaling)))
        }
        Some(other) => Err(format!("rope scaling \"{other}\" is not supported")),
    }
}

/// Llama 3 stores its rope scaling as one divisor per frequency. All published models use the same
/// constants, so the factor is the largest divisor; anything else is refused, not guessed.
fn llama3_scaling(factors: &[f32], base: f64, size: u64, original: u64) -> Result<Json, String> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let length = original as f64;
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let fits = factors.len() as u64 == size / 2
        && factors.iter().enumerate().all(|(i, &stored)| {
            let wavelength = std::f64::consts::TAU * base.powf(2.0 * i as f64 / size as f64);
            let expected = if wavelength < length / HIGH {
                1.0
            } else if wavelength > length / LOW {
                factor
            } else {
                let smooth = (length / wavelength - LOW) / (HIGH - LOW);
                1.0 / ((1.0 - smooth) / factor + smooth)
            };
            (f64::from(stored) - expected).abs() <= 1e-3 * expected
        });
    if !fits {
        return Err("rope_freqs.weight does not follow Llama 3's rope scaling".into());
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": original,
    }))
}

fn gpt2(fields: &Fields<'_>) -> Result<Map<String, Json>, String> {
    let context = fields.count("context_length")?;
    Ok(object(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": fields.positive("embedding_length")?,
        "n_layer": fields.count("block_count")?,
        "n_head": fields.positive("attention.head_count")?,
        "n_inner": fields.count("feed_forward_length")?,
        "n_positions": context,
        "n_ctx": context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": fields.required_float("attention.layer_norm_epsilon")?,
    })))
}

fn neox(fields: &Fields<'_>) -> Result<Map<String, Json>, String> {
    let hidden = fields.positive("embedding_length")?;
    let heads = fields.positive("attention.head_count")?;
    let head_dim = hidden / heads;
    if head_dim == 0 {
        return Err(format!("{heads} heads do not divide the hidden size {hidden}"));
    }
    let rotary = fields.optional("rope.dimension_count")?.unwrap_or(head_dim);
    let parallel = fields.metadata.get_bool(&fields.key("use_parallel_residual")).unwrap_or(true);
    Ok(object(json!({
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length")?,
        "num_hidden_layers": fields.count("block_count")?,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "max_position_embeddings": fields.count("context_length")?,
        "layer_norm_eps": fields.required_float("attention.layer_norm_epsilon")?,
        "rotary_pct": rotary as f64 / head_dim as f64,
        "rotary_emb_base": fields.float("rope.freq_base").unwrap_or(10000.0),
        "use_parallel_residual": parallel,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_factors_are_recognised() {
        // Base 500000, 8 frequencies: wavelengths 6.28, 32.4, 167, 862, 4443, 22911, ...
        // 4443 lies between 2048 and 8192: smooth = (8192 / 4443 - 1) / 3 = 0.28127...
        let wavelength = std::f64::consts::TAU * 500_000f64.powf(0.5);
        let smooth = (8192.0 / wavelength - 1.0) / 3.0;
        let middle = (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32;
        let factors = [1.0, 1.0, 1.0, 1.0, middle, 8.0, 8.0, 8.0];
        let scaling = llama3_scaling(&factors, 500_000.0, 16, 8192).unwrap();
        assert_eq!(scaling["factor"], json!(8.0));
        assert_eq!(scaling["rope_type"], json!("llama3"));
        assert!(llama3_scaling(&[1.0, 2.0, 1.0, 1.0, 1.0, 8.0, 8.0, 8.0], 5e5, 16, 8192).is_err());
        assert!(llama3_scaling(&factors, 5e5, 16, 4096).is_err());
        assert!(llama3_scaling(&factors[..7], 5e5, 16, 8192).is_err());
    }

    #[test]
    fn singles_print_short() {
        assert_eq!(shortest(1e-5), 1e-5);
        assert_eq!(shortest(10000.0), 10000.0);
    }
}
