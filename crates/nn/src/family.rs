//! The known architectures and the module names their checkpoints use, as data.
//!
//! A new family is an entry of [`Family`], a [`Table`] here and a reader in `config`; the forward
//! function changes only if the family does something no other does.

/// An architecture, by the `model_type` of its `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1 to 3 and relatives.
    Llama,
    /// Mistral (sliding window).
    Mistral,
    /// Qwen 2 (biases on q, k, v).
    Qwen2,
    /// Qwen 3 (norms on every query and key head).
    Qwen3,
    /// Gemma 2 (norms around every branch, soft caps, alternating windows).
    Gemma2,
    /// GPT-2 (fused `Conv1D` projections, learned positions).
    Gpt2,
    /// GPT-NeoX, Pythia (fused projections per head, partial rotation, parallel residual).
    GptNeox,
    /// OPT (learned positions, ReLU, pre- or post-norm).
    Opt,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 8] = [
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma2,
        Family::Gpt2,
        Family::GptNeox,
        Family::Opt,
    ];

    /// The `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma2 => "gemma2",
            Family::Gpt2 => "gpt2",
            Family::GptNeox => "gpt_neox",
            Family::Opt => "opt",
        }
    }

    /// The family of a `model_type`.
    pub fn parse(model_type: &str) -> Option<Self> {
        Family::ALL.into_iter().find(|family| family.model_type() == model_type)
    }

    /// The names its checkpoints use.
    pub fn table(self) -> &'static Table {
        match self {
            Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => &LLAMA,
            Family::Gemma2 => &GEMMA2,
            Family::Gpt2 => &GPT2,
            Family::GptNeox => &GPT_NEOX,
            Family::Opt => &OPT,
        }
    }
}

/// Module names of a family: the outer ones follow the checkpoint's prefix, those of a block follow
/// `<prefix><blocks>.<i>.`.
#[derive(Debug)]
pub struct Table {
    /// Prefixes that checkpoints of the family use, the standard one first.
    pub prefixes: &'static [&'static str],
    /// Token embedding.
    pub embed: &'static str,
    /// Learned positions.
    pub position: &'static str,
    /// Projection from the embedding width.
    pub project_in: &'static str,
    /// Projection to the embedding width.
    pub project_out: &'static str,
    /// Norm before the head.
    pub final_norm: &'static str,
    /// Output head, without prefix.
    pub head: &'static str,
    /// The list of blocks.
    pub blocks: &'static str,
    /// First norm of a block.
    pub norm1: &'static str,
    /// Norm on attention's output.
    pub norm1_post: &'static str,
    /// Second norm of a block.
    pub norm2: &'static str,
    /// Norm on the MLP's output.
    pub norm2_post: &'static str,
    /// Query, key and value projections (the first only, when fused).
    pub qkv: [&'static str; 3],
    /// Norms of the query and key heads.
    pub qk_norm: [&'static str; 2],
    /// Attention's output projection.
    pub output: &'static str,
    /// Gated branch.
    pub gate: &'static str,
    /// Linear branch, or fc1.
    pub up: &'static str,
    /// Down projection, or fc2.
    pub down: &'static str,
    /// Endings of tensors that old checkpoints carry and no forward pass reads.
    pub buffers: &'static [&'static str],
}

const LLAMA: Table = Table {
    prefixes: &["model.", ""],
    embed: "embed_tokens",
    position: "",
    project_in: "",
    project_out: "",
    final_norm: "norm",
    head: "lm_head",
    blocks: "layers",
    norm1: "input_layernorm",
    norm1_post: "",
    norm2: "post_attention_layernorm",
    norm2_post: "",
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    qk_norm: ["self_attn.q_norm", "self_attn.k_norm"],
    output: "self_attn.o_proj",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    buffers: &["rotary_emb.inv_freq"],
};

const GEMMA2: Table = Table {
    norm1_post: "post_attention_layernorm",
    norm2: "pre_feedforward_layernorm",
    norm2_post: "post_feedforward_layernorm",
    ..LLAMA
};

const GPT2: Table = Table {
    prefixes: &["transformer.", ""],
    embed: "wte",
    position: "wpe",
    final_norm: "ln_f",
    blocks: "h",
    norm1: "ln_1",
    norm2: "ln_2",
    qkv: ["attn.c_attn", "", ""],
    output: "attn.c_proj",
    gate: "",
    up: "mlp.c_fc",
    down: "mlp.c_proj",
    buffers: &["attn.bias", "attn.masked_bias"],
    ..LLAMA
};

const GPT_NEOX: Table = Table {
    prefixes: &["gpt_neox.", ""],
    embed: "embed_in",
    final_norm: "final_layer_norm",
    head: "embed_out",
    qkv: ["attention.query_key_value", "", ""],
    output: "attention.dense",
    gate: "",
    up: "mlp.dense_h_to_4h",
    down: "mlp.dense_4h_to_h",
    buffers: &["attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"],
    ..LLAMA
};

const OPT: Table = Table {
    prefixes: &["model.decoder.", "decoder.", ""],
    position: "embed_positions",
    project_in: "project_in",
    project_out: "project_out",
    final_norm: "final_layer_norm",
    norm1: "self_attn_layer_norm",
    norm2: "final_layer_norm",
    output: "self_attn.out_proj",
    gate: "",
    up: "fc1",
    down: "fc2",
    ..LLAMA
};
