//! Tiny random checkpoints of every family, for the tests of this crate and of those above it.

use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};
use tensor::rng::Rng;

use crate::{Decoder, Error, Family, Leaf, Network, Result, Role};

/// The `config.json` of a tiny network: hidden 32, 2 blocks, 4 heads (2 key heads where the family
/// groups them), vocabulary 97.
pub fn tiny_config(family: Family) -> Value {
    let mut config = json!({
        "model_type": family.model_type(),
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": false,
        "torch_dtype": "float32",
    });
    let extra = match family {
        Family::Llama => json!({"mlp_bias": true, "attention_bias": true}),
        Family::Mistral => json!({"sliding_window": 5}),
        Family::Qwen2 => json!({}),
        Family::Qwen3 => json!({"head_dim": 16}),
        Family::Gemma2 => json!({
            "tie_word_embeddings": true, "sliding_window": 5, "query_pre_attn_scalar": 12,
        }),
        Family::Gpt2 => json!({
            "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "tie_word_embeddings": true,
        }),
        Family::GptNeox => json!({"rotary_pct": 0.5}),
        Family::Opt => json!({
            "ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": true,
        }),
    };
    if let (Some(config), Value::Object(extra)) = (config.as_object_mut(), extra) {
        config.extend(extra);
    }
    config
}

/// Writes the tiny network of `family` with weights drawn from `seed` to `dir` (config.json and
/// model.safetensors, f32).
pub fn tiny_checkpoint(dir: &Path, family: Family, seed: u64) -> Result<()> {
    random_checkpoint(dir, &tiny_config(family), seed)
}

/// Writes a decoder of `config` with weights drawn from `seed` to `dir`.
pub fn random_checkpoint(dir: &Path, config: &Value, seed: u64) -> Result<()> {
    random_network(dir, &Decoder::from_config(config)?, Some(config), seed)
}

/// Writes any network with weights drawn from `seed` to `dir`, and its config if there is one.
pub fn random_network(
    dir: &Path,
    network: &dyn Network,
    config: Option<&Value>,
    seed: u64,
) -> Result<()> {
    let mut tensors = Vec::new();
    for name in network.modules() {
        let mut rng = Rng::stream(seed, &name.module);
        let spread = match name.role {
            Role::Embed | Role::Position | Role::ClassToken => 0.5,
            role if role.is_norm() => 0.2,
            _ => 1.2 / (name.in_features() as f32).sqrt(),
        };
        for leaf in name.leaves() {
            let shape = name.leaf_shape(leaf);
            let mut values = vec![0.0; shape.iter().product()];
            rng.fill_normal(&mut values, if leaf == Leaf::Weight { spread } else { 0.1 });
            let gain = leaf == Leaf::Weight && name.role.is_norm() && !name.plus_one;
            if gain || leaf == Leaf::RunningVar {
                values.iter_mut().for_each(|v| *v += 1.0);
            }
            tensors.push((name.tensor(leaf), shape, values));
        }
    }
    std::fs::create_dir_all(dir).map_err(Error::external)?;
    if let Some(config) = config {
        let text = serde_json::to_vec_pretty(config).map_err(Error::external)?;
        std::fs::write(dir.join("config.json"), text).map_err(Error::external)?;
    }
    write_safetensors(&dir.join("model.safetensors"), &tensors)
}

/// Writes one f32 safetensors file.
pub fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    for (name, shape, values) in tensors {
        let end = offset + 4 * values.len();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [offset, end]});
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(Error::external)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).map_err(Error::external)?);
    let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(Error::external);
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    for (_, _, values) in tensors {
        write(bytemuck::cast_slice(values))?;
    }
    file.flush().map_err(Error::external)
}
