//! The description of a decoder, read from `config.json` and checked before anything is computed.
//!
//! Both generations of configs are read: `rope_theta`/`rope_scaling` and the newer
//! `rope_parameters`. Defaults are those of the transformers library for the same `model_type`.

use serde_json::Value;
use tensor::ops::Activation;

use crate::keys::Keys;
use crate::{Error, Family, Result};

/// How a block is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm.
    Rms,
    /// RMSNorm whose gain is `1 + weight`.
    RmsPlusOne,
    /// LayerNorm with bias.
    Layer,
}

/// Where the norms stand and how the branches meet the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// `x + attn(n1 x)`, then `x + mlp(n2 x)`.
    Pre,
    /// `n1(x + attn x)`, then `n2(x + mlp x)`.
    Post,
    /// `x + n1'(attn(n1 x))`, then `x + n2'(mlp(n2 x))`.
    Sandwich,
    /// `x + attn(n1 x) + mlp(n2 x)`.
    Parallel,
}

/// Frequencies of the rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// `theta^(-2i/d)`.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3: low frequencies divided by a factor, high ones kept, a ramp between.
    Llama3 {
        /// The factor.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are scaled fully.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length of the first training.
        original_max_position_embeddings: f32,
    },
}

/// How positions enter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Positions {
    /// The first `dim` features of every query and key head are rotated.
    Rotary {
        /// Base of the frequencies.
        theta: f64,
        /// Rotated features per head (even).
        dim: usize,
        /// Change of the frequencies.
        scaling: RopeScaling,
    },
    /// A learned vector per position, table rows starting at `offset`.
    Learned {
        /// Row of position 0.
        offset: usize,
    },
}

/// Layout of the query, key and value projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qkv {
    /// Three matrices.
    Separate,
    /// One matrix; output rows are all of q, then all of k, then all of v (GPT-2).
    Fused,
    /// One matrix; for every head its q, k and v rows in turn (GPT-NeoX).
    FusedPerHead,
}

/// Everything the forward pass needs to know about an architecture.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// The architecture.
    pub family: Family,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the token embedding (differs from `hidden_size` only in OPT-350m).
    pub embed_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Context length; a hard limit with learned positions.
    pub max_position_embeddings: usize,
    /// Kind of all norms.
    pub norm: NormKind,
    /// Their epsilon.
    pub norm_eps: f32,
    /// Where they stand.
    pub placement: Placement,
    /// Whether a norm precedes the head.
    pub final_norm: bool,
    /// How positions enter.
    pub positions: Positions,
    /// Layout of the attention projections.
    pub qkv: Qkv,
    /// Norms on every query and key head.
    pub qk_norm: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention output.
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// `down(act(gate x) * up x)` instead of `down(act(up x))`.
    pub gated: bool,
    /// The MLP's activation.
    pub activation: Activation,
    /// Linear weights are stored `[in, out]`.
    pub transposed: bool,
    /// Factor on the attention scores.
    pub attention_scale: f32,
    /// GPT-2 option: the scores of block `i` are also divided by `i + 1`.
    pub scale_by_layer: bool,
    /// `cap * tanh(scores / cap)`.
    pub attention_softcap: Option<f32>,
    /// `cap * tanh(logits / cap)`.
    pub final_softcap: Option<f32>,
    /// Factor on the token embeddings.
    pub embed_scale: Option<f32>,
    /// Attention window of every block (keys a query sees, itself included); `None` sees all.
    pub windows: Vec<Option<usize>>,
    /// The head is the token embedding.
    pub tie_word_embeddings: bool,
}

impl DecoderConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// [`Error::UnknownArchitecture`], or [`Error::Config`] naming the key.
    pub fn from_json(config: &Value) -> Result<Self> {
        let keys = Keys(config);
        let found = config.get("model_type").and_then(Value::as_str).unwrap_or("");
        let family = Family::parse(found).ok_or_else(|| Error::UnknownArchitecture {
            found: found.to_string(),
            known: Family::ALL.map(Family::model_type).join(", "),
        })?;
        let config = match family {
            Family::Gpt2 => gpt2(&keys)?,
            Family::GptNeox => gpt_neox(&keys)?,
            Family::Opt => opt(&keys)?,
            _ => llama_like(family, &keys)?,
        };
        config.check()?;
        Ok(config)
    }

    /// Total width of all query heads.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Total width of all key (or value) heads.
    pub fn key_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    fn check(&self) -> Result<()> {
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv) {
            return Err(Error::config(
                "num_key_value_heads",
                format!("{kv} does not divide the {heads} attention heads"),
            ));
        }
        for (key, a, b) in [
            ("head_dim", heads, self.head_dim * 3),
            ("vocab_size", self.vocab_size, self.hidden_size),
            ("intermediate_size", self.intermediate_size, self.hidden_size),
        ] {
            if a.checked_mul(b).is_none_or(|n| n > 1 << 44) {
                return Err(Error::config(key, format!("a size of {a} x {b} is absurd")));
            }
        }
        if let Positions::Rotary { dim, theta, .. } = self.positions {
            if dim == 0 || !dim.is_multiple_of(2) || dim > self.head_dim {
                return Err(Error::config(
                    "head_dim",
                    format!(
                        "{dim} of {} features per head would be rotated; this must be even and at \
                         least 2",
                        self.head_dim
                    ),
                ));
            }
            if !(theta.is_finite() && theta > 0.0) {
                return Err(Error::config("rope_theta", format!("{theta} is not positive")));
            }
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(Error::config("norm epsilon", format!("{} is not valid", self.norm_eps)));
        }
        Ok(())
    }
}

fn llama_like(family: Family, keys: &Keys) -> Result<DecoderConfig> {
    let hidden = keys.size("hidden_size")?;
    let heads = keys.size("num_attention_heads")?;
    let layers = keys.layers("num_hidden_layers")?;
    let default_head = match family {
        Family::Gemma2 => Some(256),
        Family::Qwen3 => Some(128),
        _ => None,
    };
    let head_dim = match (keys.optional_size("head_dim")?, default_head) {
        (Some(n), _) => n,
        // An explicit null means "derive"; an absent key means the family's default.
        (None, Some(n)) if !keys.has("head_dim") => n,
        _ => derived_head_dim(hidden, heads)?,
    };
    let gemma = family == Family::Gemma2;
    let bias = keys.flag("attention_bias", false)?;
    let activation_key = if gemma { "hidden_activation" } else { "hidden_act" };
    let activation_default = if gemma { "gelu_pytorch_tanh" } else { "silu" };
    let attention_scale = if gemma {
        keys.number("query_pre_attn_scalar", 256.0)?.powf(-0.5)
    } else {
        (head_dim as f64).powf(-0.5)
    };
    if gemma && keys.flag("use_bidirectional_attention", false)? {
        return Err(Error::config("use_bidirectional_attention", "only causal models are known"));
    }
    let cap = |key, default: f64| -> Result<Option<f32>> {
        if !gemma {
            return Ok(None);
        }
        if keys.has(key) { keys.optional_number(key) } else { Ok(Some(default)) }
            .map(|cap| cap.map(|c| c as f32))
    };
    Ok(DecoderConfig {
        family,
        vocab_size: keys.size("vocab_size")?,
        hidden_size: hidden,
        embed_size: hidden,
        intermediate_size: keys.size("intermediate_size")?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(match family {
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 if !keys.has("num_key_value_heads") => 32,
            Family::Gemma2 => 4,
            _ => heads,
        }),
        head_dim,
        max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
        norm: if gemma { NormKind::RmsPlusOne } else { NormKind::Rms },
        norm_eps: keys.number("rms_norm_eps", 1e-6)? as f32,
        placement: if gemma { Placement::Sandwich } else { Placement::Pre },
        final_norm: true,
        positions: rotary(keys, head_dim, 10_000.0, 1.0)?,
        qkv: Qkv::Separate,
        qk_norm: family == Family::Qwen3,
        qkv_bias: match family {
            Family::Qwen2 => true,
            Family::Mistral => false,
            _ => bias,
        },
        output_bias: match family {
            Family::Qwen2 | Family::Mistral => false,
            _ => bias,
        },
        mlp_bias: family == Family::Llama && keys.flag("mlp_bias", false)?,
        gated: true,
        activation: keys.activation(activation_key, activation_default)?,
        transposed: false,
        attention_scale: attention_scale as f32,
        scale_by_layer: false,
        attention_softcap: cap("attn_logit_softcapping", 50.0)?,
        final_softcap: cap("final_logit_softcapping", 30.0)?,
        embed_scale: gemma.then(|| (hidden as f64).sqrt() as f32),
        windows: windows(family, keys, layers)?,
        tie_word_embeddings: keys.flag("tie_word_embeddings", gemma)?,
    })
}

fn gpt2(keys: &Keys) -> Result<DecoderConfig> {
    let hidden = keys.size("n_embd")?;
    let heads = keys.size("n_head")?;
    let layers = keys.layers("n_layer")?;
    let head_dim = derived_head_dim(hidden, heads)?;
    if keys.flag("add_cross_attention", false)? {
        return Err(Error::config("add_cross_attention", "only decoders without it are known"));
    }
    let scaled = keys.flag("scale_attn_weights", true)?;
    Ok(DecoderConfig {
        max_position_embeddings: match keys.optional_size("n_positions")? {
            Some(n) => n,
            None => keys.optional_size("n_ctx")?.unwrap_or(1024),
        },
        intermediate_size: keys.optional_size("n_inner")?.unwrap_or(4 * hidden),
        norm_eps: keys.number("layer_norm_epsilon", 1e-5)? as f32,
        positions: Positions::Learned { offset: 0 },
        qkv: Qkv::Fused,
        activation: keys.activation("activation_function", "gelu_new")?,
        transposed: true,
        attention_scale: if scaled { (head_dim as f64).powf(-0.5) as f32 } else { 1.0 },
        scale_by_layer: keys.flag("scale_attn_by_inverse_layer_idx", false)?,
        tie_word_embeddings: keys.flag("tie_word_embeddings", true)?,
        ..layer_norm_base(Family::Gpt2, keys.size("vocab_size")?, hidden, heads, layers, head_dim)
    })
}

fn gpt_neox(keys: &Keys) -> Result<DecoderConfig> {
    let hidden = keys.size("hidden_size")?;
    let heads = keys.size("num_attention_heads")?;
    let layers = keys.layers("num_hidden_layers")?;
    let head_dim = derived_head_dim(hidden, heads)?;
    let bias = keys.flag("attention_bias", true)?;
    let parallel = keys.flag("use_parallel_residual", true)?;
    Ok(DecoderConfig {
        intermediate_size: keys.size("intermediate_size")?,
        max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
        norm_eps: keys.number("layer_norm_eps", 1e-5)? as f32,
        placement: if parallel { Placement::Parallel } else { Placement::Pre },
        positions: rotary(
            keys,
            head_dim,
            keys.number("rotary_emb_base", 10_000.0)?,
            keys.number("rotary_pct", 0.25)?,
        )?,
        qkv: Qkv::FusedPerHead,
        qkv_bias: bias,
        output_bias: bias,
        activation: keys.activation("hidden_act", "gelu")?,
        tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
        ..layer_norm_base(
            Family::GptNeox,
            keys.size("vocab_size")?,
            hidden,
            heads,
            layers,
            head_dim,
        )
    })
}

fn opt(keys: &Keys) -> Result<DecoderConfig> {
    let hidden = keys.size("hidden_size")?;
    let heads = keys.size("num_attention_heads")?;
    let layers = keys.layers("num_hidden_layers")?;
    let head_dim = derived_head_dim(hidden, heads)?;
    let bias = keys.flag("enable_bias", true)?;
    let pre = keys.flag("do_layer_norm_before", true)?;
    if !keys.flag("layer_norm_elementwise_affine", true)? {
        return Err(Error::config(
            "layer_norm_elementwise_affine",
            "norms without weights are not supported",
        ));
    }
    Ok(DecoderConfig {
        embed_size: keys.optional_size("word_embed_proj_dim")?.unwrap_or(hidden),
        intermediate_size: keys.size("ffn_dim")?,
        max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
        placement: if pre { Placement::Pre } else { Placement::Post },
        final_norm: pre && !keys.flag("_remove_final_layer_norm", false)?,
        positions: Positions::Learned { offset: 2 },
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias: bias,
        activation: keys.activation("activation_function", "relu")?,
        tie_word_embeddings: keys.flag("tie_word_embeddings", true)?,
        ..layer_norm_base(Family::Opt, keys.size("vocab_size")?, hidden, heads, layers, head_dim)
    })
}

/// What the families with LayerNorm and plain MLPs have in common.
fn layer_norm_base(
    family: Family,
    vocab_size: usize,
    hidden_size: usize,
    heads: usize,
    layers: usize,
    head_dim: usize,
) -> DecoderConfig {
    DecoderConfig {
        family,
        vocab_size,
        hidden_size,
        embed_size: hidden_size,
        intermediate_size: 4 * hidden_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        max_position_embeddings: 2048,
        norm: NormKind::Layer,
        norm_eps: 1e-5,
        placement: Placement::Pre,
        final_norm: true,
        positions: Positions::Learned { offset: 0 },
        qkv: Qkv::Separate,
        qk_norm: false,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        gated: false,
        activation: Activation::Gelu,
        transposed: false,
        attention_scale: (head_dim as f64).powf(-0.5) as f32,
        scale_by_layer: false,
        attention_softcap: None,
        final_softcap: None,
        embed_scale: None,
        windows: vec![None; layers],
        tie_word_embeddings: false,
    }
}

fn derived_head_dim(hidden: usize, heads: usize) -> Result<usize> {
    if !hidden.is_multiple_of(heads) {
        return Err(Error::config(
            "num_attention_heads",
            format!(
                "{heads} heads do not divide the hidden size {hidden}, and no head_dim is given"
            ),
        ));
    }
    Ok(hidden / heads)
}

fn rotary(keys: &Keys, head_dim: usize, theta: f64, fraction: f64) -> Result<Positions> {
    // The newer form keeps everything in one object; the older has theta beside `rope_scaling`.
    let empty = Value::Null;
    let inner = ["rope_parameters", "rope_scaling"]
        .iter()
        .filter_map(|key| keys.0.get(*key))
        .find(|value| value.is_object())
        .unwrap_or(&empty);
    let rope = Keys(inner);
    let theta = rope.number("rope_theta", keys.number("rope_theta", theta)?)?;
    let fraction = keys.number("partial_rotary_factor", fraction)?;
    let fraction = rope.number("partial_rotary_factor", fraction)?;
    if !(fraction > 0.0 && fraction <= 1.0) {
        return Err(Error::config(
            "partial_rotary_factor",
            format!("{fraction} is not a fraction of a head"),
        ));
    }
    let kind = inner.get("rope_type").or_else(|| inner.get("type")).and_then(Value::as_str);
    let positive = |key: &str, default: Option<f64>| -> Result<f32> {
        let value = match (rope.optional_number(key)?, default) {
            (Some(v), _) => v,
            (None, Some(v)) => v,
            (None, None) => {
                return Err(Error::config(key, "is missing from the rope parameters"));
            }
        };
        if value > 0.0 { Ok(value as f32) } else { Err(Error::config(key, "must be positive")) }
    };
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: positive("factor", None)? },
        "llama3" => RopeScaling::Llama3 {
            factor: positive("factor", None)?,
            low_freq_factor: positive("low_freq_factor", None)?,
            high_freq_factor: positive("high_freq_factor", None)?,
            original_max_position_embeddings: positive(
                "original_max_position_embeddings",
                keys.optional_number("max_position_embeddings")?,
            )?,
        },
        other => {
            return Err(Error::config(
                "rope_scaling",
                format!("rope_type `{other}` is not known; known: default, linear, llama3"),
            ));
        }
    };
    if let RopeScaling::Llama3 { low_freq_factor: low, high_freq_factor: high, .. } = scaling
        && high <= low
    {
        return Err(Error::config("high_freq_factor", format!("{high} must exceed {low}")));
    }
    Ok(Positions::Rotary { theta, dim: (head_dim as f64 * fraction) as usize, scaling })
}

fn windows(family: Family, keys: &Keys, layers: usize) -> Result<Vec<Option<usize>>> {
    let default = match family {
        Family::Mistral | Family::Gemma2 if !keys.has("sliding_window") => Some(4096),
        _ => None,
    };
    let window = match family {
        Family::Llama => return Ok(vec![None; layers]),
        Family::Qwen2 | Family::Qwen3 if !keys.flag("use_sliding_window", false)? => {
            return Ok(vec![None; layers]);
        }
        _ => keys.optional_size("sliding_window")?.or(default),
    };
    if family == Family::Mistral {
        return Ok(vec![window; layers]);
    }
    if let Some(types) = keys.0.get("layer_types").filter(|v| !v.is_null()) {
        let list = types
            .as_array()
            .filter(|list| list.len() == layers)
            .ok_or_else(|| Error::config("layer_types", format!("is not a list of {layers}")))?;
        return list
            .iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Ok(window),
                Some("full_attention") => Ok(None),
                _ => Err(Error::config("layer_types", format!("{kind} is not known"))),
            })
            .collect();
    }
    let full_below = keys.optional_size("max_window_layers")?.unwrap_or(28);
    Ok((0..layers)
        .map(|i| match family {
            Family::Gemma2 if i % 2 == 1 => None,
            Family::Qwen2 | Family::Qwen3 if i < full_below => None,
            _ => window,
        })
        .collect())
}
