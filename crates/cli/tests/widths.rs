//! Several widths in one model, as a user asks for them: by importance, by budget, with a curve;
//! what is written and what is refused.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{BLOCKS, arg, ok, ok_json, run, tiny_model};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A directory with the tiny model and tokenised calibration windows.
struct Room {
    root: tempfile::TempDir,
    model: PathBuf,
    calibration: PathBuf,
}

impl Room {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let model = tiny_model(root.path());
        let calibration = root.path().join("ids.json");
        let mut rng = tensor::Rng::new(3);
        let mut window = || (0..24).map(|_| 3 + rng.below(200)).collect::<Vec<_>>();
        let windows: Vec<_> = (0..4).map(|_| window()).collect();
        std::fs::write(&calibration, json!(windows).to_string()).unwrap();
        Self { root, model, calibration }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn job(&self, out: &str, more: &[&str]) -> Vec<String> {
        let out = self.path(out);
        let common = [
            "-q",
            "quantize",
            arg(&self.model),
            "--calibration",
            arg(&self.calibration),
            "--samples",
            "4",
            "--sequence-length",
            "24",
            "--group-size",
            "16",
            "--out",
            arg(&out),
        ];
        common.iter().chain(more).map(|s| s.to_string()).collect()
    }

    fn quantize(&self, out: &str, more: &[&str]) -> PathBuf {
        let more = [&["--no-evaluate"], more].concat();
        ok(&strs(&self.job(out, &more)));
        self.path(out)
    }

    fn refused(&self, more: &[&str], phrases: &[&str]) {
        let arguments = self.job("refused", &[&["--method", "rtn"], more].concat());
        let (code, stdout, stderr) = run(&strs(&arguments));
        assert_eq!(code, 2, "{more:?}\n{stdout}{stderr}");
        assert!(!self.path("refused").exists());
        for phrase in phrases {
            assert!(stderr.contains(phrase), "{phrase:?} is not in\n{stderr}");
        }
    }
}

fn strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn bits(out: &Path) -> Vec<u64> {
    let record = read(&out.join("strata.json"));
    let layers = record["layers"].as_array().unwrap();
    layers.iter().map(|l| l["bits"].as_u64().unwrap()).collect()
}

#[test]
fn half_of_the_blocks_at_a_lower_width_under_any_method() {
    let room = Room::new();
    for method in ["rtn", "gptq", "awq"] {
        for format in ["compressed-tensors", "gptq-v2", "strata", "dequantized"] {
            let schedule = ["--low-bits", "2", "--average-bits", "3", "--layer-score", "lim"];
            let job = ["--method", method, "--bits", "4", "--format", format];
            let out = room.quantize(&format!("{method}-{format}"), &[&job[..], &schedule].concat());
            let schedule = read(&out.join("schedule.json"));
            assert_eq!(
                (&schedule["score"], &schedule["average_bits"]),
                (&json!("lim"), &json!(3.0))
            );
            let order = schedule["order"].as_array().unwrap();
            let low = order[BLOCKS - 1].as_u64().unwrap();
            let high = order[0].as_u64().unwrap();
            assert_eq!(schedule["bits"][low.to_string()], 2);
            assert_eq!(schedule["bits"][high.to_string()], 4);
            let scores = &schedule["scores"];
            let of = |block: u64| scores[block.to_string()].as_f64().unwrap();
            assert!(of(low) <= of(high) && of(low) >= -1.0 && of(high) <= 1.0);
            let types = schedule["gguf_tensor_types"].as_array().unwrap();
            assert!(types.contains(&json!(format!("blk\\.{low}\\.=q2_k"))), "{types:?}");
            for (index, bits) in bits(&out).into_iter().enumerate() {
                let block = (index / (bits_per_block(&out))) as u64;
                assert_eq!(bits, if block == low { 2 } else { 4 });
            }
            let page = std::fs::read_to_string(out.join("report.html")).unwrap();
            assert!(page.contains("Bits by layer") && page.contains("Most important first"));
            let text = room.path("text.txt");
            std::fs::write(&text, "The town has a market. ".repeat(20)).unwrap();
            let base = ["-q", "eval", arg(&out), "--task", "perplexity", "--text", arg(&text)];
            let found = ok_json(&[&base[..], &["--window", "32", "--json"]].concat());
            assert!(found["perplexity"].as_f64().unwrap().is_finite());
        }
    }
}

fn bits_per_block(out: &Path) -> usize {
    bits(out).len() / BLOCKS
}

#[test]
fn a_budget_is_kept_and_shown() {
    let room = Room::new();
    for method in ["rtn", "gptq"] {
        for weight in ["loss", "relative"] {
            let budget = ["--method", method, "--budget", "4.4bpw", "--budget-weight", weight];
            let out = room.quantize(&format!("{method}-{weight}"), &budget);
            let schedule = read(&out.join("schedule.json"));
            let effective = schedule["effective_bits_per_weight"].as_f64().unwrap();
            assert!(effective <= 4.4 && effective > 3.0, "{effective}");
            let record = read(&out.join("strata.json"));
            let (mut sum, mut all) = (0.0, 0.0);
            for layer in record["layers"].as_array().unwrap() {
                let shape = layer["shape"].as_array().unwrap();
                let size = shape[0].as_f64().unwrap() * shape[1].as_f64().unwrap();
                sum += layer["bits_per_weight"].as_f64().unwrap() * size;
                all += size;
            }
            assert!((sum / all - effective).abs() < 1e-9);
            assert_eq!(schedule["units"].as_array().unwrap().len(), 4 * BLOCKS);
            let page = std::fs::read_to_string(out.join("report.html")).unwrap();
            assert!(page.contains("What every unit got"));
        }
    }
    // Bytes count everything that is written.
    let whole = read(&room.path("rtn-loss").join("schedule.json"))["bytes"].as_u64().unwrap();
    let limit = format!("{}B", whole - 300);
    let out = room.quantize("bytes", &["--method", "rtn", "--budget", &limit]);
    let bytes = read(&out.join("schedule.json"))["bytes"].as_u64().unwrap();
    assert!(bytes <= whole - 300);
    assert_eq!(store::Checkpoint::open(&out).unwrap().total_bytes(), bytes);
}

#[test]
fn the_trade_off_is_measured_on_request() {
    let room = Room::new();
    let text = room.path("text.txt");
    std::fs::write(&text, "The town has a market. The market is old. ".repeat(20)).unwrap();
    for method in ["rtn", "gptq"] {
        for schedule in [&["--low-bits", "2", "--low-blocks", "50%"][..], &["--budget", "4.4bpw"]] {
            let name = format!("{method}-{}", schedule.len());
            let measured = [
                "--method",
                method,
                "--curve=3",
                "--evaluate",
                arg(&text),
                "--evaluate-window",
                "32",
            ];
            let arguments = room.job(&name, &[&measured[..], schedule].concat());
            ok(&strs(&arguments));
            let curve = read(&room.path(&name).join("schedule.json"))["curve"].clone();
            let points = curve.as_array().unwrap();
            assert_eq!(points.len(), 3, "{curve}");
            let of = |key: &str| points.iter().map(|p| p[key].as_f64()).collect::<Vec<_>>();
            assert!(of("effective").windows(2).all(|w| w[0] >= w[1]));
            assert!(of("perplexity").iter().all(|p| p.is_some_and(f64::is_finite)));
            let by_blocks = schedule.len() == 4;
            assert_eq!(of("skipped").iter().all(Option::is_some), by_blocks);
            if by_blocks {
                assert_eq!(of("lowered"), [Some(0.0), Some(1.0), Some(2.0)]);
                // Nothing left out is the model itself.
                assert_eq!(of("skipped")[0], of("perplexity")[0]);
            }
            // The intermediate models are gone.
            let left = std::fs::read_dir(room.root.path()).unwrap();
            let names = left.map(|e| e.unwrap().file_name().into_string().unwrap());
            assert!(names.filter(|n| n.contains(".curve") || n.contains(".activ")).count() == 0);
        }
    }
}

#[test]
fn the_same_command_writes_the_same_bytes() {
    let room = Room::new();
    let budget = ["--method", "gptq", "--budget", "4.4bpw", "--budget-error", "gptq"];
    let (a, b) = (room.quantize("a", &budget), room.quantize("b", &budget));
    for file in ["model.safetensors", "schedule.json", "config.json", "strata.json"] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
        assert!(read(&a) == read(&b), "{file} differs");
    }
}

#[test]
fn what_cannot_work_is_refused_before_any_work() {
    let room = Room::new();
    let low = ["--low-bits", "2", "--average-bits"];
    let with = |more: &[&'static str]| -> Vec<&'static str> { [&low[..], more].concat() };
    room.refused(&with(&["5"]), &["outside", "from 2 to 4"]);
    room.refused(&with(&["3", "--format", "awq"]), &["one width", "--exclude"]);
    room.refused(&with(&["3", "--bits", "2"]), &["must fall"]);
    room.refused(&with(&["3", "--low-blocks", "1"]), &["give one"]);
    room.refused(&["--low-bits", "2"], &["--average-bits", "--low-blocks", "--budget"]);
    room.refused(&["--average-bits", "3"], &["--low-bits"]);
    room.refused(&["--budget", "3.5"], &["no unit", "3.5bpw"]);
    room.refused(&["--budget", "1bpw"], &["cannot be met", "bpw"]);
    room.refused(&["--budget", "1kB"], &["cannot be met", "embeddings"]);
    room.refused(&["--budget", "3MB", "--format", "dequantized"], &["bpw"]);
}

#[test]
fn recipes_take_the_same_options() {
    let room = Room::new();
    let out = room.path("recipe");
    let recipe = format!(
        "model: {}\nstages:\n  - quantize:\n      method: gptq\n      group_size: 16\n      \
         layerwise: {{ low_bits: 2, low_blocks: 1, layer_score: zd }}\n      \
         calibration: {{ file: {}, samples: 4, sequence_length: 24 }}\n      \
         measure: {{ skip: true }}\n      out: {}\n",
        room.model.display(),
        room.calibration.display(),
        out.display()
    );
    let file = room.path("recipe.yaml");
    std::fs::write(&file, recipe).unwrap();
    ok(&["-q", "run", arg(&file)]);
    let schedule = read(&out.join("schedule.json"));
    assert_eq!((&schedule["score"], &schedule["average_bits"]), (&json!("zd"), &json!(3.0)));
}
