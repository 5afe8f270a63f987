//! `strata prune` as a user runs it.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{arg, ok, ok_json, run, tiny_model};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const METHODS: [&str; 5] = ["magnitude", "random", "wanda", "sparsegpt", "d-pruner"];

/// A directory with the tiny model, tokenised calibration windows and a domain's documents.
struct Room {
    root: tempfile::TempDir,
    model: PathBuf,
    calibration: PathBuf,
    domain: PathBuf,
}

impl Room {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let model = tiny_model(root.path());
        let mut rng = tensor::Rng::new(3);
        let windows: Vec<Vec<usize>> =
            (0..16).map(|_| (0..32).map(|_| 3 + rng.below(200)).collect()).collect();
        let calibration = root.path().join("ids.json");
        std::fs::write(&calibration, json!(windows).to_string()).unwrap();
        let domain = root.path().join("domain.jsonl");
        let words = ["contract", "party", "clause", "lease", "court", "term", "notice", "claim"];
        let document = |i: usize| {
            let text: Vec<&str> = (0..6 + i % 5).map(|k| words[(i * 3 + k * k) % 8]).collect();
            json!({ "text": format!("The {}.", text.join(" of the ")) }).to_string()
        };
        let lines: Vec<String> = (0..20).map(document).collect();
        std::fs::write(&domain, lines.join("\n")).unwrap();
        Self { root, model, calibration, domain }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn job(&self, method: &str, out: &str, more: &[&str]) -> Vec<String> {
        let out = self.path(out);
        let mut all = vec!["-q", "prune", arg(&self.model), "--method", method, "--out", arg(&out)];
        all.extend(["--calibration", arg(&self.calibration)]);
        all.extend(["--samples", "16", "--sequence-length", "32"]);
        if method == "d-pruner" {
            all.extend(["--domain", arg(&self.domain), "--domain-batch", "4"]);
        }
        all.extend(more);
        all.iter().map(|s| s.to_string()).collect()
    }

    fn prune(&self, method: &str, out: &str, more: &[&str]) -> PathBuf {
        let more = [&["--no-evaluate"], more].concat();
        ok(&strs(&self.job(method, out, &more)));
        self.path(out)
    }

    fn refused(&self, arguments: &[String], phrases: &[&str]) {
        let (code, stdout, stderr) = run(&strs(arguments));
        assert_eq!(code, 2, "{arguments:?}\n{stdout}{stderr}");
        for phrase in phrases {
            assert!(stderr.contains(phrase), "{phrase:?} is not in\n{stderr}");
        }
    }
}

fn strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn perplexity(room: &Room, model: &Path) -> f64 {
    let text = room.path("text.txt");
    std::fs::write(&text, "The town has a market. The market is old. ".repeat(10)).unwrap();
    let base = ["-q", "eval", arg(model), "--task", "perplexity", "--text", arg(&text)];
    let value = ok_json(&[&base[..], &["--window", "32", "--json"]].concat());
    value["perplexity"].as_f64().unwrap()
}

#[test]
fn every_method_writes_a_model_that_opens_with_masks_and_a_report() {
    let room = Room::new();
    for method in METHODS {
        let out = room.prune(method, method, &[]);
        let record = json_of(&out.join("strata.json"));
        assert_eq!(record["job"], "prune");
        assert_eq!(record["options"]["method"], method);
        let layers = record["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 14);
        for layer in layers {
            let sparsity = layer["sparsity"].as_f64().unwrap();
            assert!((sparsity - 0.5).abs() < 0.02, "{method}: {layer}");
        }
        let masks = compress::mask::read(&out).unwrap();
        assert_eq!(masks.len(), 14);
        let html = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(html.contains("Zeros by layer") && html.contains("q_proj"));
        assert!(out.join("tokenizer.json").exists());
        assert!(perplexity(&room, &out).is_finite());
        assert!(!room.path(&format!("{method}.importance")).exists(), "nothing is left behind");
    }
}

#[test]
fn sparse_formats_compute_what_the_dense_one_computes() {
    let room = Room::new();
    for method in ["wanda", "sparsegpt"] {
        let dense = room.prune(method, &format!("{method}-dense"), &["--pattern", "2:4"]);
        let wanted = perplexity(&room, &dense);
        for format in ["sparse-bitmask", "sparse-24-bitmask"] {
            let more = ["--pattern", "2:4", "--format", format];
            let out = room.prune(method, &format!("{method}-{format}"), &more);
            let size = |path: &Path| path.join("model.safetensors").metadata().unwrap().len();
            assert!(size(&out) < size(&dense), "{format}");
            let found = perplexity(&room, &out);
            assert!((found / wanted - 1.0).abs() < 1e-5, "{method} {format}: {found} {wanted}");
        }
    }
}

#[test]
fn before_and_after_on_general_and_domain_text() {
    let room = Room::new();
    let more = ["--json", "--evaluate-tokens", "512", "--evaluate-window", "32"];
    let report = ok_json(&strs(&room.job("d-pruner", "measured", &more)));
    let text = report.to_string();
    for phrase in ["perplexity, domain", "nats per token, domain", "held out", "mode normalised"] {
        assert!(text.contains(phrase), "{phrase:?} is not in {text}");
    }
    // A dialect needs no file.
    let out = room.path("dialect");
    ok(&[
        "-q",
        "prune",
        arg(&room.model),
        "--method",
        "d-pruner",
        "--dialect",
        "law",
        "--out",
        arg(&out),
        "--calibration",
        arg(&room.calibration),
        "--samples",
        "4",
        "--sequence-length",
        "32",
        "--domain-samples",
        "8",
        "--no-evaluate",
        "--importance-mode",
        "paper",
        "--epochs",
        "1",
    ]);
    assert_eq!(
        json_of(&out.join("strata.json"))["options"]["d_pruner"]["importance_mode"],
        "paper"
    );
}

#[test]
fn kept_importance_serves_other_sparsities_and_a_finished_job_is_taken_up() {
    let room = Room::new();
    let kept = room.path("importance");
    let keep = ["--importance", arg(&kept)];
    let first = room.prune("d-pruner", "a", &keep);
    let files = || {
        let mut all: Vec<_> = std::fs::read_dir(&kept)
            .unwrap()
            .flat_map(|d| std::fs::read_dir(d.unwrap().path()).unwrap())
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .map(|p| (p.clone(), p.metadata().unwrap().modified().unwrap()))
            .collect();
        all.sort();
        all
    };
    let before = files();
    assert_eq!(before.len(), 4, "two blocks of two kinds");
    let more = [&keep[..], &["--sparsity", "0.75", "--scope", "row"]].concat();
    room.prune("d-pruner", "b", &more);
    assert_eq!(files(), before, "nothing was scored again");
    // Another lambda shares the general importance.
    room.prune("d-pruner", "c", &[&keep[..], &["--lambda", "10"]].concat());
    assert_eq!(files().len(), 6);
    let again = room.prune("d-pruner", "a", &[&keep[..], &["--resume"]].concat());
    assert_eq!(first, again);
    room.refused(
        &room.job("magnitude", "a", &["--no-evaluate"]),
        &["exists already", "--overwrite"],
    );
}

#[test]
fn pruned_zeros_survive_quantisation_in_a_recipe() {
    let room = Room::new();
    let recipe = room.path("job.yaml");
    let (pruned, quantised) = (room.path("pruned"), room.path("quantised"));
    let calibration =
        format!("{{ file: {}, samples: 16, sequence_length: 32 }}", room.calibration.display());
    let text = format!(
        "model: {}\nstages:\n  - prune: {{ method: sparsegpt, pattern: '2:4', calibration: {calibration}, \
         measure: {{ skip: true }}, out: {} }}\n  - quantize: {{ method: gptq, bits: 4, group_size: 16, \
         symmetric: true, gptq: {{ keep_zeros: true }}, format: dequantized, calibration: {calibration}, \
         measure: {{ skip: true }}, out: {} }}\n",
        room.model.display(),
        pruned.display(),
        quantised.display()
    );
    std::fs::write(&recipe, text).unwrap();
    let results = ok_json(&["-q", "run", arg(&recipe), "--json"]);
    assert_eq!(results[0]["stage"], "prune");
    assert_eq!(results[1]["stage"], "quantize");
    let open = |path: &Path| store::Checkpoint::open(path).unwrap();
    let (pruned, quantised) = (open(&pruned), open(&quantised));
    let mut zeros = 0;
    for name in pruned.names().filter(|n| n.ends_with("_proj.weight")) {
        let (a, b) = (pruned.f32(name).unwrap(), quantised.f32(name).unwrap());
        assert!(a.iter().zip(&b).all(|(a, b)| *a != 0.0 || *b == 0.0), "{name}");
        zeros += a.iter().filter(|w| **w == 0.0).count();
    }
    assert!(zeros > 5000, "{zeros}");
}

#[test]
fn refusals_say_what_would_work() {
    let room = Room::new();
    let job = |method, more: &[&str]| room.job(method, "refused", more);
    room.refused(&job("magnitude", &["--sparsity", "1.5"]), &["--sparsity 1.5"]);
    room.refused(&job("magnitude", &["--pattern", "4:2"]), &["4:2", "2:4"]);
    room.refused(&job("wanda", &["--format", "sparse-24-bitmask"]), &["--pattern 2:4"]);
    room.refused(&job("sparsegpt", &["--scope", "row"]), &["--block-size"]);
    room.refused(&job("magnitude", &["--keep", "*.q_porj"]), &["q_porj", "q_proj"]);
    room.refused(&job("wanda", &["--calibrate-on", "domain"]), &["--domain FILE", "--dialect"]);
    let empty = room.path("empty.jsonl");
    std::fs::write(&empty, "{\"text\": \"\"}\n").unwrap();
    let out = room.path("refused");
    let arguments = [
        "-q",
        "prune",
        arg(&room.model),
        "--method",
        "d-pruner",
        "--domain",
        arg(&empty),
        "--out",
        arg(&out),
    ];
    let (code, _, stderr) = run(&arguments);
    assert_eq!(code, 2);
    assert!(stderr.contains("empty.jsonl") && stderr.contains("no text"), "{stderr}");
    assert!(!out.exists());
}
