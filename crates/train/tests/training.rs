//! Training as a user does it, on networks of a few hundred parameters.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use strata_train::{
    Grads, Params, TrainConfig, Trainer,
    loader::{IGNORE, TokenBatch},
    loss,
};
use tensor::rng::Rng;

const WORDS: [&str; 12] = [
    "<unk>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
];

fn llama(tied: bool) -> Value {
    json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": WORDS.len(),
        "max_position_embeddings": 32, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5,
    })
}

fn family(name: &str) -> Value {
    let mut config = llama(false);
    config["model_type"] = name.into();
    match name {
        "qwen3" => config["num_key_value_heads"] = 2.into(),
        "gemma2" => {
            config["head_dim"] = 4.into();
            config["query_pre_attn_scalar"] = 4.into();
            config["sliding_window"] = 3.into();
            config["tie_word_embeddings"] = true.into();
        }
        "gpt2" => {
            return json!({
                "model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32,
                "vocab_size": WORDS.len(),
            });
        }
        "gpt_neox" => {
            return json!({
                "model_type": "gpt_neox", "hidden_size": 8, "intermediate_size": 12,
                "num_hidden_layers": 2, "num_attention_heads": 2, "rotary_pct": 0.5,
                "vocab_size": WORDS.len(), "max_position_embeddings": 32,
            });
        }
        _ => {}
    }
    config
}

fn tokenizer(directory: &Path) -> PathBuf {
    let added: Vec<Value> = (0..6)
        .map(|id| {
            json!({"id": id, "content": WORDS[id], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let vocabulary: serde_json::Map<String, Value> =
        WORDS.iter().enumerate().map(|(i, w)| (w.to_string(), i.into())).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    let out = directory.join("tokenizer");
    std::fs::create_dir_all(&out).unwrap();
    std::fs::write(out.join("tokenizer.json"), json.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(out.join("tokenizer_config.json"), config.to_string()).unwrap();
    out
}

/// Parameters large enough that no gradient drowns in rounding.
fn noisy(decoder: &nn::Decoder, seed: u64) -> Params {
    let mut params = Params::random(decoder, seed).unwrap();
    let names: Vec<String> = params.names().map(str::to_string).collect();
    for name in names {
        let mut rng = Rng::stream(seed, &name);
        let matrix = params.shape(&name).unwrap().len() == 2;
        params
            .write(&name, |values| {
                for v in values {
                    *v = if matrix { 0.0 } else { *v } + 0.35 * rng.normal() as f32;
                }
            })
            .unwrap();
    }
    params
}

fn batch(rows: usize, length: usize, seed: u64, masked: bool) -> TokenBatch {
    let mut rng = Rng::new(seed);
    let mut draw =
        |n: usize| -> Vec<u32> { (0..n).map(|_| rng.below(WORDS.len()) as u32).collect() };
    let (tokens, mut targets) = (draw(rows * length), draw(rows * length));
    if masked {
        targets.iter_mut().step_by(3).for_each(|t| *t = IGNORE);
    }
    TokenBatch { rows, length, tokens, targets }
}

fn loss_of(decoder: &nn::Decoder, params: &Params, batch: &TokenBatch) -> f64 {
    loss::evaluate(decoder, &params.constants(), std::slice::from_ref(batch)).unwrap()
}

/// The slope of the loss along each parameter's gradient must be the gradient's norm, and along a
/// random direction the product of both.
#[test]
fn gradients_of_whole_networks_are_slopes() {
    for config in [
        llama(true),
        llama(false),
        family("qwen3"),
        family("gemma2"),
        family("gpt2"),
        family("gpt_neox"),
    ] {
        let kind = config["model_type"].as_str().unwrap().to_string();
        let decoder = nn::Decoder::from_config(&config).unwrap();
        let mut params = noisy(&decoder, 3);
        let batch = batch(2, 6, 5, true);
        let mut grads = Grads::new();
        let value =
            loss::gradients(&decoder, &params, std::slice::from_ref(&batch), &mut grads).unwrap();
        assert!((value - loss_of(&decoder, &params, &batch)).abs() < 1e-5, "{kind}");
        let names: Vec<String> = params.names().map(str::to_string).collect();
        assert_eq!(grads.len(), names.len(), "{kind}: every parameter has a gradient");
        for name in names {
            let gradient = grads.get(&name).unwrap().to_vec();
            let norm = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            let mut rng = Rng::stream(9, &name);
            let along: Vec<f32> =
                gradient.iter().map(|g| (f64::from(*g) / norm.max(1e-12)) as f32).collect();
            let random: Vec<f32> = gradient
                .iter()
                .map(|_| rng.normal() as f32 / (gradient.len() as f32).sqrt())
                .collect();
            for direction in [along, random] {
                let expected: f64 = gradient
                    .iter()
                    .zip(&direction)
                    .map(|(g, d)| f64::from(*g) * f64::from(*d))
                    .sum();
                let original = params.read(&name, <[f32]>::to_vec).unwrap();
                let h = 4e-3f32;
                let mut at = |sign: f32| {
                    params
                        .write(&name, |v| {
                            for ((v, o), d) in v.iter_mut().zip(&original).zip(&direction) {
                                *v = o + sign * h * d;
                            }
                        })
                        .unwrap();
                    loss_of(&decoder, &params, &batch)
                };
                // Central differences of fourth order: the curvature of small networks is large.
                let near = at(1.0) - at(-1.0);
                let far = at(2.0) - at(-2.0);
                let slope = (8.0 * near - far) / (12.0 * f64::from(h));
                at(0.0);
                assert!(
                    (slope - expected).abs() < 2e-4 + 0.01 * expected.abs(),
                    "{kind} {name}: slope {slope}, gradient {expected}"
                );
            }
        }
    }
}

#[test]
fn accumulation_equals_a_larger_batch() {
    let decoder = nn::Decoder::from_config(&llama(true)).unwrap();
    let params = noisy(&decoder, 1);
    let (a, b) = (batch(2, 6, 1, true), batch(2, 6, 2, false));
    let both = TokenBatch {
        rows: 4,
        length: 6,
        tokens: [a.tokens.clone(), b.tokens.clone()].concat(),
        targets: [a.targets.clone(), b.targets.clone()].concat(),
    };
    let (mut one, mut two) = (Grads::new(), Grads::new());
    let large = loss::gradients(&decoder, &params, &[both], &mut one).unwrap();
    let small = loss::gradients(&decoder, &params, &[a, b], &mut two).unwrap();
    assert!((large - small).abs() < 1e-6);
    for (name, gradient) in one.iter() {
        for (x, y) in gradient.iter().zip(two.get(name).unwrap()) {
            assert!((x - y).abs() < 1e-5, "{name}: {x} {y}");
        }
    }
}

#[test]
fn frozen_parameters_have_no_gradient() {
    let decoder = nn::Decoder::from_config(&llama(true)).unwrap();
    let mut params = noisy(&decoder, 1);
    let pattern = |p: &str| method::Pattern::new(p).unwrap();
    params
        .set_trainable(Some(&[pattern("*norm*"), pattern("*q_proj*")]), &[pattern("*layers.1*")])
        .unwrap();
    let mut grads = Grads::new();
    loss::gradients(&decoder, &params, &[batch(2, 6, 1, false)], &mut grads).unwrap();
    let expected = [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ];
    assert_eq!(grads.names().collect::<Vec<_>>(), expected);
    // Switching back on brings them back.
    params.set_trainable(None, &[]).unwrap();
    let mut grads = Grads::new();
    loss::gradients(&decoder, &params, &[batch(2, 6, 1, false)], &mut grads).unwrap();
    assert_eq!(grads.len(), params.names().count());
    assert!(params.set_trainable(Some(&[pattern("*wrong*")]), &[]).is_err());
}

/// A corpus with a rule: the words count upwards, in circles.
fn corpus(directory: &Path) -> PathBuf {
    let lines: Vec<Value> = (0..40)
        .map(|start| {
            let words: Vec<&str> = (0..12).map(|i| WORDS[6 + (start + i) % 6]).collect();
            json!({"text": words.join(" ")})
        })
        .collect();
    let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
    let path = directory.join("corpus.jsonl");
    std::fs::write(&path, text).unwrap();
    path
}

fn config(directory: &Path, patch: Value) -> TrainConfig {
    let corpus = corpus(directory);
    let mut value = json!({
        "model": llama(true), "tokenizer": tokenizer(directory),
        "data": [{"text": corpus}], "evaluation": [{"text": corpus}],
        "sequence_length": 8, "batch_size": 4, "steps": 12,
        "optimizer": {"learning_rate": 0.02, "betas": [0.9, 0.99], "weight_decay": 0.01},
        "schedule": {"warmup_steps": 3}, "checkpoint_every": 5, "evaluate_every": 4,
        "precision": "f32",
    });
    for (key, v) in patch.as_object().unwrap() {
        value[key] = v.clone();
        if v.is_null() {
            value.as_object_mut().unwrap().remove(key);
        }
    }
    serde_json::from_value(value).unwrap()
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

fn run(config: &TrainConfig, out: &Path, resume: bool) -> strata_train::TrainOutcome {
    Trainer::run(config, out, resume, &report::Progress::hidden()).unwrap()
}

#[test]
fn learns_and_leaves_a_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), json!({"steps": 120, "precision": "f16"}));
    let out = dir.path().join("model");
    let outcome = run(&config, &out, false);
    assert_eq!(outcome.losses.len(), 120);
    let (first, last) = (outcome.losses[0].loss, outcome.losses[119].loss);
    assert!((first - (WORDS.len() as f64).ln()).abs() < 0.1, "an untrained model guesses: {first}");
    // Within a document all is determined; only the first word after the marks is not.
    assert!(last < 0.5, "{last}");
    assert_eq!(outcome.evaluations.len(), 30);
    let names: Vec<String> = files(&out).into_keys().collect();
    let expected = [
        "config.json",
        "losses.jsonl",
        "model.safetensors",
        "report.html",
        "report.json",
        "strata.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    assert!(!dir.path().join("model.training").exists());
    let model = nn::Model::open(&out).unwrap();
    assert_eq!(model.checkpoint.info("model.norm.weight").unwrap().dtype, store::Dtype::F16);
    let logits = model.logits(&[1, 8, 9], 1).unwrap();
    let row = tensor::host::into_vec(logits)[2 * WORDS.len()..].to_vec();
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    assert_eq!(WORDS[best], "five");
    // A finished run is left alone.
    assert!(Trainer::run(&config, &out, false, &report::Progress::hidden()).is_err());
    assert_eq!(run(&config, &out, true).losses, outcome.losses);
}

#[test]
fn resuming_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), json!({"accumulation": 2, "clip_value": 0.5}));
    let whole = dir.path().join("whole");
    let expected = run(&config, &whole, false);
    let progress = report::Progress::hidden();
    // Killed before the first state, between states, right after one, and twice.
    for (i, stops) in [vec![3], vec![7], vec![10], vec![6, 11]].into_iter().enumerate() {
        let out = dir.path().join(format!("stopped-{i}"));
        for (n, stop) in stops.iter().enumerate() {
            let stopped = Trainer::run_until(&config, &out, n > 0, &progress, *stop).unwrap();
            assert!(stopped.is_none() && !out.exists());
        }
        let message = Trainer::run(&config, &out, false, &progress).unwrap_err().to_string();
        assert!(message.contains("--resume"), "{message}");
        let outcome = run(&config, &out, true);
        assert_eq!(outcome.losses, expected.losses);
        assert_eq!(outcome.resumed_from, (stops[stops.len() - 1] / 5) * 5);
        let (a, b) = (files(&whole), files(&out));
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (name, bytes) in a {
            assert!(b[&name] == bytes, "{name} differs after stops at {stops:?}");
        }
    }
}

#[test]
fn another_configuration_is_not_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let progress = report::Progress::hidden();
    let first = config(dir.path(), json!({}));
    Trainer::run_until(&first, &out, false, &progress, 7).unwrap();
    let second = config(dir.path(), json!({"batch_size": 2}));
    let message = Trainer::run(&second, &out, true, &progress).unwrap_err().to_string();
    assert!(message.contains("batch_size"), "{message}");
}

#[test]
fn frozen_parameters_keep_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    run(&config(dir.path(), json!({})), &base, false);
    let tuned = dir.path().join("tuned");
    let patch = json!({
        "model": null, "tokenizer": null, "init": base, "freeze": ["*mlp*", "*embed_tokens*"], "steps": 3,
    });
    run(&config(dir.path(), patch), &tuned, false);
    let open = |p: &Path| store::Checkpoint::open(p).unwrap();
    let (before, after) = (open(&base), open(&tuned));
    for name in before.names() {
        let same = before.f32(name).unwrap() == after.f32(name).unwrap();
        assert_eq!(same, name.contains("mlp") || name.contains("embed_tokens"), "{name}");
    }
    assert!(tuned.join("tokenizer.json").exists(), "carried from the start");
}

#[test]
fn divergence_names_the_step() {
    let dir = tempfile::tempdir().unwrap();
    let patch = json!({"optimizer": {"learning_rate": 1e30}, "schedule": {"warmup_steps": 0}});
    let out = dir.path().join("out");
    let progress = report::Progress::hidden();
    let error = Trainer::run(&config(dir.path(), patch), &out, false, &progress).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("at step 2") && message.contains("learning_rate"), "{message}");
    assert!(!out.exists());
}

#[test]
fn chat_counts_the_assistant_only() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = data::Tokenizer::from_dir(&tokenizer(dir.path())).unwrap();
    let path = dir.path().join("chat.jsonl");
    let line = json!({"messages": [
        {"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"},
    ]});
    std::fs::write(&path, format!("{line}\n")).unwrap();
    let dialogues = strata_train::chat::read(&path).unwrap();
    let (tokens, counted) = strata_train::chat::render(&dialogues[0], &tokenizer).unwrap();
    let words: Vec<&str> = tokens.iter().map(|t| WORDS[*t as usize]).collect();
    let expected =
        ["<s>", "<|user|>", "one", "two", "<|end|>", "<|assistant|>", "three", "<|end|>"];
    assert_eq!(words, expected);
    let learnt: Vec<&str> =
        words.iter().zip(counted).filter(|(_, c)| *c).map(|(w, _)| *w).collect();
    assert_eq!(learnt, ["three", "<|end|>"]);
    for (bad, reason) in [
        (r#"{"messages": [{"role": "user", "content": "one"}]}"#, "nothing to learn"),
        (r#"{"messages": [{"role": "bot", "content": "one"}]}"#, "role `bot`"),
        ("{", "line 1"),
    ] {
        std::fs::write(&path, bad).unwrap();
        let message = strata_train::chat::read(&path).unwrap_err().to_string();
        assert!(message.contains(reason) && message.contains("line 1"), "{message}");
    }
}
