//! Shared by the command line's tests: running the built binary, and a tiny model to run it on.
// The helpers are test code too, which the lint sees only inside test functions.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use data::almanac::{Almanac, Size};
use serde_json::{Value, json};
use store::{Dtype, WriteOptions, Writer};

/// The built binary, without colours from the environment and with a quiet stderr for assertions.
pub fn strata(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command.args(arguments).env_remove("NO_COLOR").env_remove("RUST_BACKTRACE");
    command
}

/// Runs to the end; returns exit code, stdout, stderr.
pub fn run(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = strata(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

/// Runs, expects success, returns stdout.
pub fn ok(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = run(arguments);
    assert_eq!(code, 0, "strata {arguments:?}\n{stderr}");
    stdout
}

/// Runs, expects success, parses stdout as JSON.
pub fn ok_json(arguments: &[&str]) -> Value {
    let text = ok(arguments);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}\n{text}"))
}

/// Shared data, if this machine has it.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("STRATA_SHARED").map(PathBuf::from);
    let fallback = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let path = root.unwrap_or_else(fallback).join("data").join(path);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

pub const HIDDEN: usize = 32;
pub const BLOCKS: usize = 2;

/// A random Llama of two blocks with the tokenizer of the tiny almanac. All weights of the first
/// query projection are 0.5, so that its norm is known.
pub fn tiny_model(directory: &Path) -> PathBuf {
    let tokenizer = Almanac::generate(0, Size::Tiny).tokenizer_json().unwrap();
    let vocabulary =
        data::Tokenizer::from_json(tokenizer.as_bytes(), None, None).unwrap().vocab_size();
    let out = directory.join("tiny");
    let mut writer = Writer::create(&out, WriteOptions::default()).unwrap();
    let mut rng = tensor::Rng::new(7);
    let mut add = |name: &str, shape: &[usize]| {
        let values = (0..shape.iter().product()).map(|_| match name {
            n if n.ends_with("norm.weight") => 1.0,
            "model.layers.0.self_attn.q_proj.weight" => 0.5,
            _ => 0.1 * rng.normal() as f32,
        });
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        writer.add(name, Dtype::F32, shape, &bytes).unwrap();
    };
    add("model.embed_tokens.weight", &[vocabulary, HIDDEN]);
    for i in 0..BLOCKS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![16, HIDDEN]),
            ("self_attn.v_proj", vec![16, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![64, HIDDEN]),
            ("mlp.up_proj", vec![64, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, 64]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            add(&format!("model.layers.{i}.{name}.weight"), &shape);
        }
    }
    add("model.norm.weight", &[HIDDEN]);
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary, "hidden_size": HIDDEN, "intermediate_size": 64,
        "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    writer.put_json("config.json", &config).unwrap();
    writer.put_file("tokenizer.json", tokenizer.as_bytes()).unwrap();
    writer.finish().unwrap()
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
