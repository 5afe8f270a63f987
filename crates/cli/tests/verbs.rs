//! The verbs on a tiny model, as a user runs them.

mod common;

use common::{BLOCKS, HIDDEN, arg, ok, ok_json, run, shared, tiny_model};

#[test]
fn inspect_shows_tree_layers_and_tensors() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    let tree = ok(&["inspect", arg(&model)]);
    for text in ["architecture", "llama", "q_proj", "query", "├─", "outliers"] {
        assert!(tree.contains(text), "{text}\n{tree}");
    }
    let value = ok_json(&["inspect", arg(&model), "--tensors", "--json"]);
    let tensors = value["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 2 + 9 * BLOCKS);
    let sum: u64 = tensors.iter().map(|t| t["parameters"].as_u64().unwrap()).sum();
    assert_eq!(value["parameters"], sum);
    assert_eq!(value["bytes"], sum * 4);

    let value = ok_json(&["inspect", arg(&model), "--layers", "--json"]);
    let layers = value["layers"].as_array().unwrap();
    let query = layers.iter().find(|l| l["name"] == "model.layers.0.self_attn.q_proj").unwrap();
    assert_eq!(query["role"], "query");
    assert_eq!(query["block"], 0);
    // 32 × 32 weights of 0.5: the norm is 32 · 0.5.
    assert_eq!(query["statistics"]["norm"], HIDDEN as f64 * 0.5);
    assert_eq!(query["statistics"]["outliers"], 0.0);

    let only = ok_json(&[
        "inspect",
        arg(&model),
        "--tensors",
        "--json",
        "--only",
        "*.down_proj",
        "--no-statistics",
    ]);
    assert_eq!(only["tensors"].as_array().unwrap().len(), BLOCKS);
    assert!(only["tensors"][0]["statistics"].is_null());
}

#[test]
fn inspect_reads_real_weights() {
    let Some(model) = shared("stories260k") else { return };
    let value = ok_json(&["inspect", arg(&model), "--json", "--depth", "2"]);
    assert_eq!(value["architecture"], "llama");
    assert!(value["parameters"].as_u64().unwrap() > 200_000);
    assert!(ok(&["inspect", arg(&model), "--layers"]).contains("down"));
}

#[test]
fn generate_is_deterministic_and_respects_its_limits() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    let base = ["generate", arg(&model), "--prompt", "The town", "--max-tokens", "8"];
    let with = |more: &[&str]| ok(&[&base[..], more].concat());
    assert_eq!(with(&["--greedy"]), with(&["--greedy"]));
    assert_eq!(with(&["--seed", "3"]), with(&["--seed", "3"]));
    let value = ok_json(&[&base[..], &["--greedy", "--json"]].concat());
    assert!(value["tokens"].as_u64().unwrap() <= 8);
    assert_eq!(format!("{}\n", value["completion"].as_str().unwrap()), with(&["--greedy"]));
    let (code, _, stderr) = run(&[&base[..], &["--temperature", "-1"]].concat());
    assert_eq!(code, 2, "{stderr}");
}

#[test]
fn generate_continues_a_real_story() {
    let Some(model) = shared("stories260k") else { return };
    let text = ok(&[
        "generate",
        arg(&model),
        "--prompt",
        "Once upon a time",
        "--greedy",
        "--max-tokens",
        "24",
    ]);
    assert!(text.split_whitespace().count() > 5, "{text}");
}

#[test]
fn eval_prints_writes_and_judges() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    let text = root.path().join("text.txt");
    std::fs::write(&text, "The town has a market. The market is old. ".repeat(20)).unwrap();
    let out = root.path().join("result.json");
    let base =
        ["eval", arg(&model), "--task", "perplexity", "--text", arg(&text), "--window", "32"];
    let value = ok_json(&[&base[..], &["--stride", "16", "--json", "--out", arg(&out)]].concat());
    let perplexity = value["perplexity"].as_f64().unwrap();
    assert!(perplexity > 1.0 && value["tokens"].as_u64().unwrap() > 10, "{value}");
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!(written, value);

    // Thresholds: exit code 1, and the result is still printed.
    let (code, stdout, stderr) = run(&[&base[..], &["--at-most", "1.0"]].concat());
    assert_eq!(code, 1, "{stderr}");
    assert!(stdout.contains("perplexity") && stderr.contains("at most 1"), "{stdout}{stderr}");
    let (code, _, _) = run(&[&base[..], &["--at-most", "1e9"]].concat());
    assert_eq!(code, 0);

    let value =
        ok_json(&["eval", arg(&model), "--task", "accuracy", "--text", arg(&text), "--json"]);
    assert!((0.0..=1.0).contains(&value["accuracy"].as_f64().unwrap()));

    let questions = root.path().join("q.jsonl");
    let line = r#"{"question": "The market is", "choices": ["old", "new"], "answer": 0}"#;
    std::fs::write(&questions, line).unwrap();
    let value = ok_json(&[
        "eval",
        arg(&model),
        "--task",
        "choice",
        "--questions",
        arg(&questions),
        "--json",
    ]);
    assert_eq!(value["chance"], 0.5);

    let (code, _, stderr) = run(&["eval", arg(&model), "--task", "perplexity"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--text"), "{stderr}");
}

#[test]
fn almanac_then_training_then_facts() {
    let root = tempfile::tempdir().unwrap();
    let almanac = root.path().join("almanac");
    let make = ["data", "almanac", "--size", "tiny", "--out", arg(&almanac)];
    let value = ok_json(&[&make[..], &["--json"]].concat());
    assert!(value["facts"].as_u64().unwrap() > 0);
    assert!(almanac.join("facts.json").exists());
    let (code, _, stderr) = run(&make);
    assert_eq!(code, 2, "an output is not replaced unasked");
    assert!(stderr.contains("--overwrite"), "{stderr}");
    assert!(ok(&[&make[..], &["--overwrite"]].concat()).contains("facts"));

    let config = root.path().join("train.yaml");
    let yaml = "model: {model_type: llama, vocab_size: 1024, hidden_size: 32, intermediate_size: 64, \
                num_hidden_layers: 1, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, \
                hidden_act: silu, max_position_embeddings: 64, rms_norm_eps: 1.0e-5, \
                rope_theta: 10000.0, tie_word_embeddings: true}\n\
                data: [{almanac: {seed: 0, part: base, size: tiny}}]\n\
                sequence_length: 32\nbatch_size: 2\nsteps: 3\n";
    std::fs::write(&config, yaml).unwrap();
    let out = root.path().join("model");
    let train = ["-q", "train", "--config", arg(&config), "--out", arg(&out)];
    let outcome = ok_json(&[&train[..], &["--json"]].concat());
    assert_eq!(outcome["losses"].as_array().unwrap().len(), 3);
    assert!(out.join("model.safetensors").exists());

    let facts = almanac.join("facts.json");
    let value =
        ok_json(&["-q", "eval", arg(&out), "--task", "facts", "--facts", arg(&facts), "--json"]);
    assert!(value["heldout_accuracy"].as_f64().unwrap() < 0.5, "three steps teach no facts");

    std::fs::write(&config, yaml.replace("batch_size", "batchsize")).unwrap();
    let (code, _, stderr) = run(&train);
    assert_eq!(code, 2);
    assert!(stderr.contains("did you mean `batch_size`?"), "{stderr}");
}

#[test]
fn quantize_leaves_a_report_and_a_model_that_runs() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    let out = root.path().join("out");
    let report = ok_json(&[
        "-q",
        "quantize",
        arg(&model),
        "--method",
        "rtn",
        "--bits",
        "4",
        "--group-size",
        "32",
        "--no-evaluate",
        "--json",
        "--out",
        arg(&out),
    ]);
    assert!(report["sections"].is_array());
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains("</html>"));
    ok(&["generate", arg(&out), "--prompt", "The", "--greedy", "--max-tokens", "4"]);
    let layers = ok_json(&["inspect", arg(&out), "--layers", "--json"]);
    let query = layers["layers"].as_array().unwrap().iter().find(|l| l["role"] == "query").unwrap();
    assert_eq!(query["dtype"], "packed");
}
