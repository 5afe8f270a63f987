//! Pyramid codes as a user runs them: quantise into the own container, evaluate, be refused.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{BLOCKS, arg, ok, ok_json, run, tiny_model};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use store::Checkpoint;

struct Room {
    root: tempfile::TempDir,
    model: PathBuf,
    ids: PathBuf,
    text: PathBuf,
}

impl Room {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let model = tiny_model(root.path());
        let ids = root.path().join("ids.json");
        let mut rng = tensor::Rng::new(3);
        let windows: Vec<Vec<usize>> =
            (0..6).map(|_| (0..24).map(|_| 3 + rng.below(200)).collect()).collect();
        std::fs::write(&ids, json!(windows).to_string()).unwrap();
        let text = root.path().join("text.txt");
        std::fs::write(&text, "Mina lives in the house beside the old bridge. ".repeat(12))
            .unwrap();
        Self { root, model, ids, text }
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
            "pvq",
            "--calibration",
            arg(&self.ids),
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

    fn perplexity(&self, model: &Path) -> f64 {
        let flags = ["--text", arg(&self.text), "--window", "24", "--json"];
        let base = ["-q", "eval", arg(model), "--task", "perplexity"];
        ok_json(&[&base[..], &flags].concat())["perplexity"].as_f64().unwrap()
    }
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_packed_container_computes_what_the_dequantised_one_does() {
    let room = Room::new();
    let before = room.perplexity(&room.model);
    for (name, more) in [
        ("turned", &["--pvq-rate", "3"][..]),
        ("plain", &["--bits", "3", "--pvq-rotation", "none", "--pvq-data-free"]),
        ("fused", &["--pvq-pulses", "27", "--pvq-rotation", "fused"]),
        ("ragged", &["--bits", "2", "--pvq-group", "12", "--pvq-ragged", "--pvq-length-bits", "0"]),
        ("exact", &["--bits", "4", "--pvq-levels", "fp16", "--pvq-norms", "f32"]),
    ] {
        let packed = room.out(&format!("{name}-strata"));
        let dense = room.out(&format!("{name}-dense"));
        ok(&room.job(&packed, &[&["--format", "strata"], more].concat()));
        ok(&room.job(&dense, &[&["--format", "dequantized"], more].concat()));
        let (a, b) = (room.perplexity(&packed), room.perplexity(&dense));
        assert!((a / b - 1.0).abs() < 1e-4, "{name}: {a} packed, {b} dequantised");
        assert!((a / before - 1.0).abs() > 1e-6, "{name} changed nothing");
        let checkpoint = Checkpoint::open(&packed).unwrap();
        assert!(!checkpoint.contains("model.layers.0.mlp.up_proj.weight"));
        assert_eq!(checkpoint.info("model.layers.0.mlp.up_proj.pvq_index").unwrap().shape[0], 64);
        let config = json_file(&packed.join("config.json"));
        let config = &config["quantization_config"];
        assert_eq!((&config["quant_method"], &config["version"]), (&json!("strata"), &json!(1)));
        assert_eq!(config["modules"].as_object().unwrap().len(), 7 * BLOCKS);
        assert_eq!(config["modules"]["model.layers.1.mlp.down_proj"]["kind"], "pyramid");
        let layers = json_file(&packed.join("strata.json"))["layers"].clone();
        for layer in layers.as_array().unwrap() {
            assert_eq!(layer["details"]["round_trip_failures"], 0);
        }
    }
}

#[test]
fn rates_and_their_parts_are_reported() {
    let room = Room::new();
    let out = room.out("rates");
    let more = ["--format", "strata", "--pvq-rate", "3", "--json"];
    let report = ok_json(&room.job(&out, &more)).to_string();
    assert!(report.contains("3 bits + 4 for the length of every 16 weights"), "{report}");
    let record = json_file(&out.join("strata.json"));
    let layer = &record["layers"][0];
    // 32 inputs: two groups of 48 + 4 bits, and 16 bits of norm.
    assert_eq!(layer["bits_per_weight"], 3.25 + 0.5);
    let of = |key: &str| layer["details"][key].as_f64().unwrap();
    assert_eq!((of("direction_bits_per_weight"), of("length_bits_per_weight")), (3.0, 0.25));
    assert!(of("entropy_bound_per_weight") < 3.0 && of("entropy_bound_per_weight") > 2.9);
    assert!(of("index_entropy_per_weight") < of("entropy_bound_per_weight"));
    assert!(of("stored_bits_per_weight") >= 3.75 && of("kurtosis") > 0.0);
}

#[test]
fn the_same_command_writes_the_same_bytes() {
    let room = Room::new();
    let read = |name: &str, more: &[&str]| {
        let out = room.out(name);
        ok(&room.job(&out, &[&["--format", "strata"], more].concat()));
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    let first = read("first", &[]);
    assert_eq!(first, read("second", &[]));
    assert_ne!(first, read("third", &["--pvq-rotation-seed", "1"]));
}

#[test]
fn refusals_say_what_would_work() {
    let room = Room::new();
    for (more, said) in [
        (&[][..], "--format strata"),
        (&["--format", "strata", "--pvq-group", "24"], "--pvq-ragged"),
        (&["--format", "strata", "--pvq-group", "64"], "--pvq-group"),
        (&["--format", "strata", "--pvq-rate", "0.1"], "at least"),
        (&["--format", "strata", "--pvq-group", "32", "--pvq-rate", "5"], "128 bits"),
        (&["--format", "strata", "--pvq-pulses", "3", "--pvq-rate", "3"], "not both"),
        (&["--format", "strata", "--pvq-length-bits", "11"], "fp16"),
    ] {
        let out = room.out("refused");
        let (code, _, stderr) = run(&room.job(&out, more));
        assert!(code != 0 && stderr.contains(said), "{more:?}\n{stderr}");
        assert!(!out.exists(), "{more:?}");
    }
}

#[test]
fn damaged_files_are_found() {
    let room = Room::new();
    let out = room.out("damaged");
    ok(&room.job(&out, &["--format", "strata"]));
    let file = out.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let tensor = "model.layers.1.mlp.up_proj.pvq_index";
    let start = entries[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + start..][..8].fill(0xFF);
    std::fs::write(&file, bytes).unwrap();
    let eval = ["-q", "eval", arg(&out), "--task", "perplexity", "--text", arg(&room.text)];
    let (code, _, stderr) = run(&[&eval[..], &["--window", "24"]].concat());
    assert!(code != 0 && stderr.contains(tensor) && stderr.contains("corrupt"), "{stderr}");
}
