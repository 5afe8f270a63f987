//! RSQ as a user runs it: quantise, only rotate, ablate, be refused.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{arg, ok, ok_json, run, tiny_model};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use store::Checkpoint;

struct Room {
    root: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
}

impl Room {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let model = tiny_model(root.path());
        let text = root.path().join("ids.json");
        let mut rng = tensor::Rng::new(3);
        let windows: Vec<Vec<usize>> =
            (0..6).map(|_| (0..24).map(|_| 3 + rng.below(200)).collect()).collect();
        std::fs::write(&text, json!(windows).to_string()).unwrap();
        Self { root, model, text }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn job<'a>(&'a self, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
        let common = [
            "-q",
            "quantize",
            arg(&self.model),
            "--method",
            "rsq",
            "--calibration",
            arg(&self.text),
            "--samples",
            "6",
            "--sequence-length",
            "24",
            "--no-evaluate",
            "--out",
            arg(out),
        ];
        [&common, more].concat()
    }
}

fn logits(path: &Path) -> Vec<f32> {
    let ids: Vec<u32> = (3..35).collect();
    tensor::host::into_vec(nn::Model::open(path).unwrap().logits(&ids, 2).unwrap())
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

fn config(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap()
}

#[test]
fn only_rotating_writes_the_same_function_in_other_weights() {
    let room = Room::new();
    let out = room.out("rotated");
    let report = ok(&room.job(&out, &["--rotate-only"]));
    assert!(report.contains("randomised Hadamard"), "{report}");
    assert!(distance(&logits(&out), &logits(&room.model)) < 1e-4);
    let (before, after) = (Checkpoint::open(&room.model).unwrap(), Checkpoint::open(&out).unwrap());
    let norm = after.f32("model.layers.0.input_layernorm.weight").unwrap();
    assert!(norm.iter().all(|g| *g == 1.0));
    let query = "model.layers.0.self_attn.q_proj.weight";
    assert_ne!(before.f32(query).unwrap(), after.f32(query).unwrap());
    // The head was tied and stands on its own now.
    assert!(!before.contains("lm_head.weight") && after.contains("lm_head.weight"));
    assert_eq!(config(&out)["tie_word_embeddings"], false);
    assert!(config(&out).get("quantization_config").is_none());
}

#[test]
fn quantising_reports_rotation_and_token_weights() {
    let room = Room::new();
    let out = room.out("rsq");
    let grid = ["--bits", "4", "--group-size", "16", "--symmetric", "--json"];
    let report = ok_json(&room.job(&out, &grid)).to_string();
    assert!(report.contains("randomised Hadamard"), "{report}");
    assert!(report.contains("effective tokens"), "{report}");
    let record: Value =
        serde_json::from_slice(&std::fs::read(out.join("strata.json")).unwrap()).unwrap();
    assert_eq!(record["options"]["rsq"]["importance"], "attention");
    for layer in record["layers"].as_array().unwrap() {
        let details = &layer["details"];
        let of = |key: &str| details[key].as_f64().unwrap();
        assert!(of("token_weight_min") < 1.0 && of("token_weight_max") > 1.0, "{layer}");
        assert!(of("effective_tokens") < of("tokens") && of("tokens") == 144.0, "{layer}");
    }
    assert_eq!(config(&out)["quantization_config"]["quant_method"], "compressed-tensors");
    assert!(distance(&logits(&out), &logits(&room.model)) < 0.5);
    // Its parts alone: no importance; no rotation; no calibration at all.
    for (name, more) in [
        ("quarot", &["--importance", "uniform"][..]),
        ("sq", &["--rotation", "none", "--r-min", "0.1"]),
        ("random", &["--rotation", "random", "--rsq-base", "rtn"]),
    ] {
        let out = room.out(name);
        ok(&room.job(&out, &[&["--bits", "4", "--group-size", "16"], more].concat()));
        assert_eq!(Checkpoint::open(&out).unwrap().contains("lm_head.weight"), name != "sq");
    }
}

#[test]
fn refusals_say_what_would_work() {
    let room = Room::new();
    for (more, said) in [
        (&["--r-min", "0"][..], "0.01"),
        (&["--r-min", "0.5", "--r-max", "0.2"], "--r-max"),
        (&["--rotate-only", "--rotation", "none"], "nothing"),
        (&["--rotate-only", "--format", "gptq"], "--format dequantized"),
        (&["--weighting-modules", "*.q_prj"], "*.q_prj"),
        (&["--importance", "first-n", "--importance-chunks", "25"], "between 2 and 24"),
        (&["--weight-power", "3"], "3"),
        (&["--expand", "0"], "--expand"),
    ] {
        let out = room.out("refused");
        let (code, stdout, stderr) =
            run(&room.job(&out, &[&["--group-size", "16"], more].concat()));
        assert_eq!(code, 2, "{more:?}\n{stdout}{stderr}");
        assert!(stderr.contains(said), "{more:?}\n{stderr}");
        assert!(!out.exists(), "{more:?}");
    }
}
