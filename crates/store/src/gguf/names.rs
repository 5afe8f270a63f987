//! From GGUF tensor names to Hugging Face names, per architecture, and what the converters did to
//! the values on the way that has to be undone.
//!
//! Tensors of an architecture that is not listed here keep their GGUF names.

use super::metadata::Metadata;

/// What separates stored values from the Hugging Face ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The rows of each of `heads` heads interleave the two rotary halves.
    RotaryRows {
        /// Heads along the rows.
        heads: usize,
    },
    /// Rows go q of all heads, k of all heads, v of all heads; Hugging Face has q, k, v per head.
    FusedRows {
        /// Heads along the rows.
        heads: usize,
    },
    /// Stored `[out, in]`; Hugging Face has `[in, out]`.
    Transposed,
    /// One was added to every value.
    PlusOne,
}

/// Architectures with a name table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Qwen2,
    Qwen3,
    Gemma2,
    Gpt2,
    GptNeox,
}

/// For error messages.
pub(super) const KNOWN: &str = "llama (also Mistral), qwen2, qwen3, gemma2, gpt2, gptneox";

impl Family {
    pub(super) fn of(metadata: &Metadata) -> Option<Self> {
        Self::parse(metadata.architecture()?)
    }

    fn parse(architecture: &str) -> Option<Self> {
        Some(match architecture {
            "llama" | "mistral" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "gemma2" => Self::Gemma2,
            "gpt2" => Self::Gpt2,
            "gptneox" => Self::GptNeox,
            _ => return None,
        })
    }
}

/// Attention head counts that undoing the row orders needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub query: usize,
    pub key: usize,
}

/// The names of an architecture in the other direction, for writing.
#[derive(Debug, Clone, Copy)]
pub struct Export {
    family: Family,
    heads: Heads,
}

/// GGUF names of modules outside the blocks.
const OUTER: [&str; 4] = ["token_embd", "position_embd", "output_norm", "output"];
/// GGUF names of the modules of a block.
const PARTS: [&str; 14] = [
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_output",
    "attn_q_norm",
    "attn_k_norm",
    "post_attention_norm",
    "ffn_norm",
    "post_ffw_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
];

impl Export {
    /// The names of `architecture` (as in `general.architecture`), for a network with so many heads;
    /// `None` for an architecture without a table here.
    pub fn new(architecture: &str, query_heads: usize, key_heads: usize) -> Option<Self> {
        let heads = Heads { query: query_heads, key: key_heads };
        Family::parse(architecture).map(|family| Self { family, heads })
    }

    /// The GGUF name of a tensor with the standard Hugging Face name `name`, and how the stored
    /// values differ from it; `None` for a tensor that has no place in such a file.
    pub fn tensor(&self, name: &str) -> Option<(String, Change)> {
        let (_, leaf) = name.rsplit_once('.')?;
        // The block number is the only number between dots.
        let block = name.split('.').find_map(|part| part.parse::<u32>().ok());
        let candidates: Vec<String> = match block {
            Some(i) => PARTS.iter().map(|part| format!("blk.{i}.{part}.{leaf}")).collect(),
            None => OUTER.iter().map(|stem| format!("{stem}.{leaf}")).collect(),
        };
        candidates.into_iter().find_map(|candidate| {
            let (found, change) = hugging_face(self.family, self.heads, &candidate)?;
            (found == name).then_some((candidate, change))
        })
    }
}

/// The Hugging Face name of a GGUF tensor and the change to undo; `None` for a tensor that has no
/// counterpart there (it then keeps its name).
pub(super) fn hugging_face(family: Family, heads: Heads, name: &str) -> Option<(String, Change)> {
    let (stem, leaf) = name.rsplit_once('.')?;
    if !matches!(leaf, "weight" | "bias") {
        return None;
    }
    let (module, change) = match stem.strip_prefix("blk.") {
        Some(rest) => {
            let (index, part) = rest.split_once('.')?;
            // Re-printed, so that "00" and "0" cannot both become block 0 unnoticed.
            let index: u32 = index.parse().ok()?;
            let (part, change) = block(family, heads, part, leaf)?;
            let blocks = match family {
                Family::Gpt2 => "transformer.h",
                Family::GptNeox => "gpt_neox.layers",
                _ => "model.layers",
            };
            (format!("{blocks}.{index}.{part}"), change)
        }
        None => {
            let module = outer(family, stem)?;
            let plus_one = family == Family::Gemma2 && stem == "output_norm";
            (module.to_owned(), if plus_one { Change::PlusOne } else { Change::None })
        }
    };
    Some((format!("{module}.{leaf}"), change))
}

fn outer(family: Family, stem: &str) -> Option<&'static str> {
    Some(match (family, stem) {
        (Family::Gpt2, "token_embd") => "transformer.wte",
        (Family::Gpt2, "position_embd") => "transformer.wpe",
        (Family::Gpt2, "output_norm") => "transformer.ln_f",
        (Family::GptNeox, "token_embd") => "gpt_neox.embed_in",
        (Family::GptNeox, "output_norm") => "gpt_neox.final_layer_norm",
        (Family::GptNeox, "output") => "embed_out",
        (_, "output") => "lm_head",
        (Family::Llama | Family::Qwen2 | Family::Qwen3 | Family::Gemma2, "token_embd") => {
            "model.embed_tokens"
        }
        (Family::Llama | Family::Qwen2 | Family::Qwen3 | Family::Gemma2, "output_norm") => {
            "model.norm"
        }
        _ => return None,
    })
}

fn block(family: Family, heads: Heads, part: &str, leaf: &str) -> Option<(&'static str, Change)> {
    match family {
        Family::Gpt2 => gpt2_block(part, leaf),
        Family::GptNeox => neox_block(heads, part),
        _ => llama_block(family, heads, part),
    }
}

fn llama_block(family: Family, heads: Heads, part: &str) -> Option<(&'static str, Change)> {
    let gemma = family == Family::Gemma2;
    let norm = if gemma { Change::PlusOne } else { Change::None };
    let rotary = |heads| match family {
        Family::Llama => Change::RotaryRows { heads },
        _ => Change::None,
    };
    Some(match part {
        "attn_norm" => ("input_layernorm", norm),
        "attn_q" => ("self_attn.q_proj", rotary(heads.query)),
        "attn_k" => ("self_attn.k_proj", rotary(heads.key)),
        "attn_v" => ("self_attn.v_proj", Change::None),
        "attn_output" => ("self_attn.o_proj", Change::None),
        "attn_q_norm" if family == Family::Qwen3 => ("self_attn.q_norm", Change::None),
        "attn_k_norm" if family == Family::Qwen3 => ("self_attn.k_norm", Change::None),
        "post_attention_norm" if gemma => ("post_attention_layernorm", norm),
        "ffn_norm" if gemma => ("pre_feedforward_layernorm", norm),
        "post_ffw_norm" if gemma => ("post_feedforward_layernorm", norm),
        "ffn_norm" => ("post_attention_layernorm", norm),
        "ffn_gate" => ("mlp.gate_proj", Change::None),
        "ffn_up" => ("mlp.up_proj", Change::None),
        "ffn_down" => ("mlp.down_proj", Change::None),
        _ => return None,
    })
}

fn gpt2_block(part: &str, leaf: &str) -> Option<(&'static str, Change)> {
    let turned = if leaf == "weight" { Change::Transposed } else { Change::None };
    Some(match part {
        "attn_norm" => ("ln_1", Change::None),
        "attn_qkv" => ("attn.c_attn", turned),
        "attn_output" => ("attn.c_proj", turned),
        "ffn_norm" => ("ln_2", Change::None),
        "ffn_up" => ("mlp.c_fc", turned),
        "ffn_down" => ("mlp.c_proj", turned),
        _ => return None,
    })
}

fn neox_block(heads: Heads, part: &str) -> Option<(&'static str, Change)> {
    Some(match part {
        "attn_norm" => ("input_layernorm", Change::None),
        "attn_qkv" => ("attention.query_key_value", Change::FusedRows { heads: heads.query }),
        "attn_output" => ("attention.dense", Change::None),
        "ffn_norm" => ("post_attention_layernorm", Change::None),
        "ffn_up" => ("mlp.dense_h_to_4h", Change::None),
        "ffn_down" => ("mlp.dense_4h_to_h", Change::None),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(family: Family, name: &str) -> Option<(String, Change)> {
        hugging_face(family, Heads { query: 8, key: 2 }, name)
    }

    #[test]
    fn llama_names() {
        assert_eq!(
            map(Family::Llama, "blk.12.attn_k.weight"),
            Some((
                "model.layers.12.self_attn.k_proj.weight".into(),
                Change::RotaryRows { heads: 2 }
            ))
        );
        assert_eq!(
            map(Family::Llama, "blk.0.ffn_norm.weight"),
            Some(("model.layers.0.post_attention_layernorm.weight".into(), Change::None))
        );
        assert_eq!(map(Family::Llama, "output.weight").unwrap().0, "lm_head.weight");
        assert_eq!(map(Family::Llama, "rope_freqs.weight"), None);
        assert_eq!(map(Family::Llama, "blk.0.attn_q_norm.weight"), None);
        assert_eq!(map(Family::Llama, "blk.x.attn_q.weight"), None);
    }

    #[test]
    fn export_is_the_inverse() {
        for (architecture, family) in [
            ("llama", Family::Llama),
            ("qwen2", Family::Qwen2),
            ("qwen3", Family::Qwen3),
            ("gemma2", Family::Gemma2),
            ("gpt2", Family::Gpt2),
            ("gptneox", Family::GptNeox),
        ] {
            let export = Export::new(architecture, 8, 2).unwrap();
            let blocks = PARTS.iter().map(|part| format!("blk.3.{part}"));
            let mut seen = 0;
            for stem in blocks.chain(OUTER.map(String::from)) {
                for leaf in ["weight", "bias"] {
                    let stored = format!("{stem}.{leaf}");
                    if let Some((name, change)) = map(family, &stored) {
                        assert_eq!(export.tensor(&name), Some((stored, change)), "{name}");
                        seen += 1;
                    }
                }
            }
            assert!(seen > 14, "{architecture}: {seen}");
            assert_eq!(export.tensor("model.layers.0.other.weight"), None);
            assert_eq!(export.tensor("weight"), None);
        }
        assert!(Export::new("opt", 8, 8).is_none());
    }

    #[test]
    fn families_differ() {
        assert_eq!(
            map(Family::Qwen2, "blk.1.attn_q.bias"),
            Some(("model.layers.1.self_attn.q_proj.bias".into(), Change::None))
        );
        assert_eq!(
            map(Family::Gemma2, "blk.1.ffn_norm.weight"),
            Some(("model.layers.1.pre_feedforward_layernorm.weight".into(), Change::PlusOne))
        );
        assert_eq!(
            map(Family::Gpt2, "blk.1.ffn_up.weight"),
            Some(("transformer.h.1.mlp.c_fc.weight".into(), Change::Transposed))
        );
        assert_eq!(
            map(Family::Gpt2, "blk.1.ffn_up.bias"),
            Some(("transformer.h.1.mlp.c_fc.bias".into(), Change::None))
        );
        assert_eq!(
            map(Family::GptNeox, "blk.1.attn_qkv.bias"),
            Some((
                "gpt_neox.layers.1.attention.query_key_value.bias".into(),
                Change::FusedRows { heads: 8 }
            ))
        );
    }
}
