//! What GGUF metadata say about a network, and which networks they can say it of.

use nn::config::{Placement, Positions, RopeScaling};
use nn::{Decoder, DecoderConfig, Family, Name, Role};
use store::gguf::{Array, Value};
use tensor::ops::Activation;

use crate::{Error, Result};

/// `general.architecture` of a family.
pub(super) fn architecture(family: Family) -> Result<&'static str> {
    match family {
        Family::Llama | Family::Mistral => Ok("llama"),
        Family::Qwen2 => Ok("qwen2"),
        Family::Qwen3 => Ok("qwen3"),
        Family::Gemma2 => Ok("gemma2"),
        Family::Gpt2 => Ok("gpt2"),
        Family::GptNeox => Ok("gptneox"),
        other => Err(Error::Recipe(format!(
            "GGUF has no architecture for {} models; written are llama, mistral, qwen2, qwen3, \
             gemma2, gpt2 and gpt_neox",
            other.model_type()
        ))),
    }
}

/// Metadata under the architecture's own name, after checking that the format's readers would
/// compute the same network.
pub(super) fn metadata(c: &DecoderConfig, notes: &mut Vec<String>) -> Result<Vec<(String, Value)>> {
    let arch = architecture(c.family)?;
    refuse(c)?;
    let mut out = Vec::new();
    let mut put = |key: &str, value: Value| out.push((format!("{arch}.{key}"), value));
    let count = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
    put("context_length", count(c.max_position_embeddings));
    put("embedding_length", count(c.hidden_size));
    put("block_count", count(c.num_hidden_layers));
    put("feed_forward_length", count(c.intermediate_size));
    put("vocab_size", count(c.vocab_size));
    put("attention.head_count", count(c.num_attention_heads));
    let layer_norm = matches!(c.family, Family::Gpt2 | Family::GptNeox);
    if layer_norm {
        put("attention.layer_norm_epsilon", Value::F32(c.norm_eps));
    } else {
        put("attention.layer_norm_rms_epsilon", Value::F32(c.norm_eps));
        put("attention.head_count_kv", count(c.num_key_value_heads));
        put("attention.key_length", count(c.head_dim));
        put("attention.value_length", count(c.head_dim));
    }
    if let Positions::Rotary { theta, dim, scaling } = c.positions {
        put("rope.dimension_count", count(dim));
        put("rope.freq_base", Value::F32(theta as f32));
        if let RopeScaling::Linear { factor } = scaling {
            put("rope.scaling.type", Value::String("linear".into()));
            put("rope.scaling.factor", Value::F32(factor));
        }
        if let RopeScaling::Llama3 { original_max_position_embeddings: length, .. } = scaling {
            put("rope.scaling.original_context_length", count(length as usize));
        }
    }
    if c.family == Family::GptNeox {
        put("use_parallel_residual", Value::Bool(c.placement == Placement::Parallel));
    }
    if let Some(cap) = c.attention_softcap {
        put("attn_logit_softcapping", Value::F32(cap));
    }
    if let Some(cap) = c.final_softcap {
        put("final_logit_softcapping", Value::F32(cap));
    }
    if let Some(window) = c.windows.iter().flatten().next() {
        put("attention.sliding_window", count(*window));
        if c.family != Family::Gemma2 && *window < c.max_position_embeddings {
            notes.push(format!(
                "attention windows of {window} tokens are recorded, but llama.cpp attends to all \
                 tokens in this architecture: longer contexts differ"
            ));
        }
    }
    Ok(out)
}

/// Refuses what the format's readers would compute otherwise.
fn refuse(c: &DecoderConfig) -> Result<()> {
    let model_type = c.family.model_type();
    let refuse = |what: String| {
        Err(Error::Recipe(format!("GGUF has no words for this {model_type} model: {what}")))
    };
    let activation = match c.family {
        Family::Gemma2 | Family::Gpt2 => Activation::GeluTanh,
        Family::GptNeox => Activation::Gelu,
        _ => Activation::Silu,
    };
    // ggml has one GELU, the tanh form.
    let gelu = c.family == Family::GptNeox && c.activation == Activation::GeluTanh;
    if c.activation != activation && !gelu {
        return refuse(format!("its activation is {:?}, not {activation:?}", c.activation));
    }
    let scale = (c.head_dim as f32).powf(-0.5);
    let other = match c.family {
        // The 27B model is known by its number of blocks.
        Family::Gemma2 if c.num_hidden_layers == 46 => {
            ((c.hidden_size / c.num_attention_heads.max(1)) as f32).powf(-0.5)
        }
        _ => scale,
    };
    if (c.attention_scale - other).abs() > 1e-5 * other || c.scale_by_layer {
        return refuse(format!(
            "its attention scale is {}, not one over the root of the head size",
            c.attention_scale
        ));
    }
    if let Positions::Rotary { dim, .. } = c.positions
        && dim != c.head_dim
        && c.family != Family::GptNeox
    {
        return refuse(format!("only {dim} of {} features per head are rotated", c.head_dim));
    }
    if c.family == Family::Gemma2 && (c.attention_softcap.is_none() || c.final_softcap.is_none()) {
        return refuse("it has no soft caps".into());
    }
    let window = c.windows.iter().flatten().next().copied();
    let alternating = |i: usize| if i.is_multiple_of(2) { window } else { None };
    if c.family == Family::Gemma2 && (0..).zip(&c.windows).any(|(i, w)| *w != alternating(i)) {
        return refuse("its attention windows do not alternate".into());
    }
    Ok(())
}

/// Llama 3's factors of the rotary frequencies, the tensor `rope_freqs.weight`.
pub(super) fn rope_factors(c: &DecoderConfig) -> Option<Vec<f32>> {
    let Positions::Rotary { theta, dim, scaling } = c.positions else { return None };
    let RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    } = scaling
    else {
        return None;
    };
    let [factor, low, high, original] =
        [factor, low_freq_factor, high_freq_factor, original_max_position_embeddings]
            .map(f64::from);
    let one = |i: usize| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..dim / 2).map(|i| one(i) as f32).collect())
}

/// The module's name in the family's standard spelling, whatever this checkpoint puts before it.
pub(super) fn standard_module(decoder: &Decoder, name: &Name) -> String {
    let table = decoder.config.family.table();
    if name.role == Role::Head {
        return table.head.to_string();
    }
    let inner = name.module.strip_prefix(&decoder.prefix).unwrap_or(&name.module);
    format!("{}{inner}", table.prefixes.first().copied().unwrap_or(""))
}

/// Special token ids that the tokenizer's own metadata may lack, from the configuration.
pub(super) fn padding(config: &serde_json::Value, tokens: &[(String, Value)]) -> Option<Value> {
    let id = config.get("pad_token_id").and_then(serde_json::Value::as_u64)?;
    let count = tokens.iter().find_map(|(key, value)| match value {
        Value::Array(Array::String(texts)) if key == "tokenizer.ggml.tokens" => Some(texts.len()),
        _ => None,
    })?;
    let id = u32::try_from(id).ok()?;
    ((id as usize) < count).then_some(Value::U32(id))
}
