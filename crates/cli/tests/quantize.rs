//! The main job as a user runs it: what is written, what is left alone, what is refused and how.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{BLOCKS, arg, ok, ok_json, run, tiny_model};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use store::{Checkpoint, Dtype, WriteOptions, Writer};

const METHODS: [&str; 3] = ["rtn", "gptq", "awq"];
/// Linear layers of the tiny model.
const LINEARS: usize = 7 * BLOCKS;
/// Windows and tokens per window of the calibration file.
const WINDOWS: usize = 4;
const LENGTH: usize = 24;

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
        let mut window = || (0..LENGTH).map(|_| 3 + rng.below(200)).collect::<Vec<_>>();
        let windows: Vec<_> = (0..WINDOWS).map(|_| window()).collect();
        std::fs::write(&calibration, json!(windows).to_string()).unwrap();
        Self { root, model, calibration }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The command line of a job on the tiny model; `more` comes last.
    fn job(&self, method: &str, out: &str, more: &[&str]) -> Vec<String> {
        self.job_on(&self.model, method, out, more)
    }

    fn job_on(&self, model: &Path, method: &str, out: &str, more: &[&str]) -> Vec<String> {
        let (samples, length) = (WINDOWS.to_string(), LENGTH.to_string());
        let out = self.path(out);
        let common = [
            "-q",
            "quantize",
            arg(model),
            "--method",
            method,
            "--calibration",
            arg(&self.calibration),
            "--samples",
            &samples,
            "--sequence-length",
            &length,
            "--no-evaluate",
            "--out",
            arg(&out),
        ];
        common.iter().chain(more).map(|s| s.to_string()).collect()
    }

    /// Quantises into groups of 16; `more` must not repeat that flag.
    fn quantize(&self, method: &str, out: &str, more: &[&str]) -> PathBuf {
        let more = [&["--group-size", "16"], more].concat();
        ok(&strs(&self.job(method, out, &more)));
        self.path(out)
    }

    /// Expects a refusal that says all of `phrases`.
    fn refused(&self, arguments: &[String], phrases: &[&str]) {
        let (code, stdout, stderr) = run(&strs(arguments));
        assert_eq!(code, 2, "{arguments:?}\n{stdout}{stderr}");
        assert!(stderr.starts_with("error: ") && stdout.is_empty(), "{stdout}{stderr}");
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

/// Every file of a directory with its bytes. Reports hold timings and are left out.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let name = |e: &std::fs::DirEntry| e.file_name().into_string().unwrap();
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| !name(entry).starts_with("report."))
        .map(|entry| (name(&entry), std::fs::read(entry.path()).unwrap()))
        .collect()
}

fn assert_same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in &a {
        assert!(bytes == &b[name], "{name} differs");
    }
}

fn evaluate(room: &Room, model: &Path) -> Value {
    let text = room.path("text.txt");
    std::fs::write(&text, "The town has a market. The market is old. ".repeat(10)).unwrap();
    let window = ["--window", "32", "--json"];
    let base = ["-q", "eval", arg(model), "--task", "perplexity", "--text", arg(&text)];
    ok_json(&[&base[..], &window].concat())
}

#[test]
fn every_method_writes_every_format_as_a_directory_that_opens() {
    let room = Room::new();
    let before = evaluate(&room, &room.model);
    for method in METHODS {
        let mut perplexities = Vec::new();
        for format in ["dequantized", "compressed-tensors", "awq", "gptq", "gptq-v2"] {
            let symmetric: &[&str] = if format == "gptq" { &["--symmetric"] } else { &[] };
            let more = [&["--format", format], symmetric].concat();
            let out = room.quantize(method, &format!("{method}-{format}"), &more);

            let record = json_of(&out.join("strata.json"));
            assert_eq!(record["job"], "quantize");
            assert_eq!(record["options"]["method"], method);
            assert_eq!(record["options"]["format"], format);
            let layers = record["layers"].as_array().unwrap();
            assert_eq!(layers.len(), LINEARS);
            for layer in layers {
                let error = layer["weight_error"].as_f64().unwrap();
                assert!((0.0..0.2).contains(&error), "{layer}");
                // Only calibrated methods have seen inputs.
                assert_eq!(layer["output_error"].is_number(), method != "rtn", "{layer}");
            }
            let html = std::fs::read_to_string(out.join("report.html")).unwrap();
            assert!(html.contains("</html>") && html.contains("q_proj"));
            assert!(json_of(&out.join("report.json"))["sections"].is_array());
            assert!(out.join("tokenizer.json").exists(), "the rest of the directory comes along");

            let config = json_of(&out.join("config.json"));
            assert_eq!(config["quantization_config"].is_object(), format != "dequantized");
            let layers = ok_json(&["inspect", arg(&out), "--layers", "--json"]);
            let layers = layers["layers"].as_array().unwrap();
            let packed = layers.iter().filter(|l| l["dtype"] == "packed").count();
            assert_eq!(packed, if format == "dequantized" { 0 } else { LINEARS });

            let after = evaluate(&room, &out);
            assert_eq!(after["tokens"], before["tokens"]);
            perplexities.push(after["perplexity"].as_f64().unwrap());
        }
        // The asymmetric formats hold the same numbers; only the type of dense tensors differs.
        for other in [1, 2, 4] {
            let ratio = perplexities[other] / perplexities[0];
            assert!((ratio - 1.0).abs() < 1e-2, "{method}: {perplexities:?}");
        }
    }
}

#[test]
fn every_width_is_written_and_read() {
    let room = Room::new();
    let mut errors = Vec::new();
    for bits in ["2", "3", "4", "5", "6", "8"] {
        let out = room.quantize("rtn", &format!("bits{bits}"), &["--bits", bits]);
        assert!(evaluate(&room, &out)["perplexity"].as_f64().unwrap().is_finite());
        let layers = json_of(&out.join("strata.json"));
        // The first layer of the tiny model is constant and exact at every width.
        errors.push(layers["layers"][1]["weight_error"].as_f64().unwrap());
    }
    assert!(errors.windows(2).all(|pair| pair[1] < pair[0]), "{errors:?}");
}

#[test]
fn the_report_compares_before_and_after_on_the_given_text() {
    let room = Room::new();
    let text = room.path("held-out.txt");
    std::fs::write(&text, "The town has a market. ".repeat(12)).unwrap();
    let mut job = room.job("rtn", "out", &["--group-size", "16", "--evaluate", arg(&text)]);
    job.retain(|argument| argument != "--no-evaluate");
    ok(&strs(&job));
    let report = std::fs::read_to_string(room.path("out/report.json")).unwrap();
    assert!(report.contains("perplexity") && report.contains("held-out.txt"), "{report}");
}

#[test]
fn excluded_layers_stay_as_they_are_byte_for_byte() {
    let room = Room::new();
    let original = Checkpoint::open(&room.model).unwrap();
    for method in METHODS {
        for (index, (flags, kept)) in [
            (&["--exclude", "*.down_proj"][..], &["down_proj"][..]),
            (&["--exclude", "q_proj", "--exclude", "model.layers.0.*"], &["q_proj", "layers.0."]),
            (
                &[
                    "--only",
                    "*.o_proj",
                    "--only",
                    "layers.1.mlp.up_proj",
                    "--exclude",
                    "layers.0.*",
                ],
                &["layers.0.", "q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"],
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let out = room.quantize(method, &format!("{method}{index}"), flags);
            let written = Checkpoint::open(&out).unwrap();
            let is_kept = |name: &str| kept.iter().any(|part| name.contains(part));
            for name in original.names().filter(|name| name.ends_with("_proj.weight")) {
                assert_eq!(written.contains(name), is_kept(name), "{method} {flags:?}: {name}");
                if is_kept(name) {
                    assert_eq!(written.info(name).unwrap().dtype, Dtype::F32);
                    let same = written.bytes(name).unwrap() == original.bytes(name).unwrap();
                    assert!(same, "{method} {flags:?}: {name} was changed");
                }
            }
            let embedding = "model.embed_tokens.weight";
            assert!(written.bytes(embedding).unwrap() == original.bytes(embedding).unwrap());
            let record = json_of(&out.join("strata.json"));
            let done = record["layers"].as_array().unwrap();
            assert!(done.iter().all(|l| !is_kept(l["module"].as_str().unwrap())), "{record}");
        }
    }
}

#[test]
fn only_the_named_layers_change_in_an_ordinary_checkpoint() {
    let room = Room::new();
    for method in ["rtn", "gptq"] {
        let flags = ["--only", "*.v_proj", "--format", "dequantized", "--bits", "2"];
        let out = room.quantize(method, method, &flags);
        let (original, written) =
            (Checkpoint::open(&room.model).unwrap(), Checkpoint::open(&out).unwrap());
        assert!(original.names().eq(written.names()));
        for name in original.names() {
            let same = original.bytes(name).unwrap() == written.bytes(name).unwrap();
            assert_eq!(same, !name.contains("v_proj"), "{method}: {name}");
        }
    }
}

#[test]
fn a_pattern_that_matches_nothing_is_answered_with_the_nearest_layer() {
    let room = Room::new();
    for flag in ["--exclude", "--only"] {
        for (wrong, right) in [
            ("layers.1.mlp.donw_proj", "layers.1.mlp.down_proj`"),
            ("*.donw_proj", "down_proj`"),
            ("dwon_proj", "down_proj`"),
        ] {
            let job = room.job("rtn", "out", &["--group-size", "16", flag, wrong]);
            room.refused(&job, &[&format!("`{wrong}`"), right]);
        }
    }
    let job = room.job("rtn", "out", &["--group-size", "16", "--only", "lm_head"]);
    room.refused(&job, &["nothing is left to quantise", "--only"]);
    assert!(!room.path("out").exists() && !room.path("out.partial").exists());
}

#[test]
fn what_cannot_work_is_refused_before_any_work_with_what_would() {
    let room = Room::new();
    let model_before = files(&room.model);
    for (method, flags, phrases) in [
        (
            "rtn",
            &["--group-size", "24"][..],
            &["model.layers.0.self_attn.q_proj", "32 inputs", "24", "16, 32", "0 for whole"][..],
        ),
        ("gptq", &["--group-size", "64"], &["model.layers.0.self_attn.q_proj", "64", "16, 32"]),
        ("rtn", &["--bits", "7"], &["bits = 7", "[2, 3, 4, 5, 6, 8]"]),
        ("awq", &["--bits", "1"], &["bits = 1", "[2, 3, 4, 5, 6, 8]"]),
        (
            "rtn",
            &["--group-size", "16", "--bits", "3", "--format", "awq"],
            &["awq format", "4 bits", "not 3", "--format compressed-tensors"],
        ),
        (
            "gptq",
            &["--group-size", "16", "--format", "gptq"],
            &["gptq v1", "--format gptq-v2", "--symmetric"],
        ),
        (
            "rtn",
            &["--group-size", "16", "--bits", "6", "--format", "gptq-v2"],
            &["model.layers.0.self_attn.q_proj", "2, 3, 4 or 8 bits", "compressed-tensors"],
        ),
        (
            "gptq",
            &["--group-size", "16", "--act-order"],
            &["--act-order", "--static-groups", "--format gptq-v2"],
        ),
        ("gptq", &["--group-size", "0", "--static-groups"], &["static groups", "--group-size"]),
        ("gptq", &["--group-size", "16", "--damping", "0"], &["damping = 0", "0.01"]),
    ] {
        room.refused(&room.job(method, "out", flags), phrases);
        assert!(!room.path("out").exists(), "{flags:?}");
        assert!(!room.path("out.partial").exists(), "{flags:?} was refused only after work began");
    }
    let inside = room.model.join("inside");
    let mut job = room.job("rtn", "out", &["--group-size", "16"]);
    *job.iter_mut().find(|a| a.ends_with("/out")).unwrap() = arg(&inside).to_string();
    room.refused(&job, &["would write into the input"]);
    assert!(files(&room.model) == model_before, "inputs are never modified");
}

#[test]
fn calibration_that_cannot_work_is_refused_by_name() {
    let room = Room::new();
    let file = room.path("windows.json");
    let job = |out: &str, length: &str| {
        let flags = ["--group-size", "16", "--sequence-length", length];
        let mut job = room.job("gptq", out, &[]);
        let at = job.iter().position(|a| a == "--sequence-length").unwrap();
        job.drain(at..at + 2);
        let calibration = job.iter().position(|a| a == "--calibration").unwrap() + 1;
        job[calibration] = arg(&file).to_string();
        job.extend(flags.map(String::from));
        job
    };
    std::fs::write(&file, "[[5, 6, 7]]").unwrap();
    room.refused(&job("a", "8"), &["windows.json", "window 0", "3 token ids", "8"]);
    room.refused(&job("a", "1"), &["at least 2 tokens"]);
    std::fs::write(&file, "[[5, 6, 7], [5, 999999, 7]]").unwrap();
    room.refused(&job("b", "3"), &["999999"]);
    std::fs::write(&file, "[]").unwrap();
    room.refused(&job("c", "3"), &["0 tokens"]);
    let (code, _, stderr) = run(&strs(&{
        let mut job = job("d", "3");
        let at = job.iter().position(|a| a == "--calibration").unwrap() + 1;
        job[at] = arg(&room.path("window.json")).to_string();
        job
    }));
    assert_eq!(code, 2);
    assert!(stderr.contains("windows.json?"), "{stderr}");
    for out in ["a", "b", "c", "d"] {
        assert!(!room.path(out).exists());
    }
}

/// The tiny model with one weight replaced by NaN.
fn damaged(room: &Room, tensor: &str) -> PathBuf {
    let original = Checkpoint::open(&room.model).unwrap();
    let out = room.path(&format!("damaged-{tensor}"));
    let mut writer = Writer::create(&out, WriteOptions::default()).unwrap();
    for info in original.infos() {
        let mut bytes = original.bytes(&info.name).unwrap().into_owned();
        if info.name == tensor {
            bytes[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        writer.add(&info.name, info.dtype, &info.shape, &bytes).unwrap();
    }
    writer.carry(&room.model, &[]).unwrap();
    writer.finish().unwrap()
}

#[test]
fn a_weight_that_is_not_a_number_is_refused_by_name_and_leaves_no_output() {
    let room = Room::new();
    for module in ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"] {
        let model = damaged(&room, &format!("{module}.weight"));
        for method in METHODS {
            let job = room.job_on(&model, method, "out", &["--group-size", "16"]);
            room.refused(&job, &[module, "NaN"]);
            assert!(!room.path("out").exists(), "{method}");
            let _ = std::fs::remove_dir_all(room.path("out.partial"));
        }
    }
}

#[test]
fn an_existing_output_is_replaced_only_when_asked() {
    let room = Room::new();
    let out = room.quantize("rtn", "out", &["--bits", "4"]);
    let before = files(&out);
    let job = room.job("rtn", "out", &["--group-size", "16", "--bits", "8"]);
    room.refused(&job, &["out", "already exists"]);
    assert!(files(&out) == before);
    room.quantize("rtn", "out", &["--bits", "8", "--overwrite"]);
    let record = json_of(&out.join("strata.json"));
    assert_eq!(record["options"]["bits"], 8);
    assert!(!room.path("out.partial").exists());
}

#[test]
fn resuming_a_finished_job_only_writes_the_report_again() {
    let room = Room::new();
    let out = room.quantize("gptq", "out", &[]);
    let before = files(&out);
    let written = std::fs::metadata(out.join("model.safetensors")).unwrap().modified().unwrap();
    std::fs::remove_file(out.join("report.html")).unwrap();
    let job = room.job("gptq", "out", &["--group-size", "16", "--resume"]);
    let (code, _, stderr) = run(&strs(&job)[1..]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("already complete"), "{stderr}");
    let again = std::fs::metadata(out.join("model.safetensors")).unwrap().modified().unwrap();
    assert_eq!(again, written, "the weights were not written again");
    assert!(files(&out) == before);
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("q_proj"), "the report still knows the layers");

    // Under other options it is another job.
    let job = room.job("gptq", "out", &["--group-size", "32", "--resume"]);
    room.refused(&job, &["already exists"]);
}

#[test]
fn a_quantised_checkpoint_is_not_quantised_again() {
    let room = Room::new();
    for format in ["compressed-tensors", "awq", "gptq-v2"] {
        let packed = room.quantize("rtn", format, &["--format", format]);
        for method in ["rtn", "awq"] {
            let job = room.job_on(&packed, method, "out", &["--group-size", "16"]);
            room.refused(&job, &[arg(&packed), "already quantised"]);
            assert!(!room.path("out").exists() && !room.path("out.partial").exists());
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let room = Room::new();
    let text = room.path("calibration.txt");
    let sentences: Vec<String> =
        (0..400).map(|i| format!("House {i} stands by the river {}.", i * 7 % 31)).collect();
    std::fs::write(&text, sentences.join("\n\n")).unwrap();
    for method in METHODS {
        let make = |name: &str, seed: &str| {
            let mut job = room.job(method, name, &["--group-size", "16", "--seed", seed]);
            let at = job.iter().position(|a| a == "--calibration").unwrap() + 1;
            job[at] = arg(&text).to_string();
            ok(&strs(&job));
            room.path(name)
        };
        let [a, b, c] = [("a", "5"), ("b", "5"), ("c", "6")]
            .map(|(name, seed)| make(&format!("{method}-{name}"), seed));
        assert_same_files(&a, &b);
        let weights = |path: &Path| {
            let checkpoint = Checkpoint::open(path).unwrap();
            let names: Vec<String> = checkpoint.names().map(String::from).collect();
            names
                .iter()
                .flat_map(|n| checkpoint.bytes(n).unwrap().into_owned())
                .collect::<Vec<u8>>()
        };
        // Another seed draws another calibration; rounding to nearest does not look at it.
        assert_eq!(weights(&a) == weights(&c), method == "rtn", "{method}");
    }
}

#[test]
fn little_memory_changes_no_weight() {
    let room = Room::new();
    for method in ["gptq", "awq"] {
        let plenty = room.quantize(method, &format!("{method}-plenty"), &[]);
        let little = room.quantize(method, &format!("{method}-little"), &["--memory", "1KiB"]);
        let file = "model.safetensors";
        assert!(files(&plenty)[file] == files(&little)[file], "{method}");
    }
}

#[test]
fn large_outputs_are_cut_into_shards_with_an_index() {
    let room = Room::new();
    let whole = room.quantize("rtn", "whole", &[]);
    let cut = room.quantize("rtn", "cut", &["--max-shard-size", "8KB"]);
    assert!(!cut.join("model.safetensors").exists());
    let index = json_of(&cut.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    let (whole, parts) = (Checkpoint::open(&whole).unwrap(), Checkpoint::open(&cut).unwrap());
    assert_eq!(map.len(), whole.names().count());
    assert_eq!(index["metadata"]["total_size"], whole.total_bytes());
    let mut sizes: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for info in whole.infos() {
        assert!(parts.bytes(&info.name).unwrap() == whole.bytes(&info.name).unwrap());
        sizes.entry(map[&info.name].as_str().unwrap()).or_default().push(info.nbytes);
    }
    let count = sizes.len();
    assert!(count >= 3, "{sizes:?}");
    for (position, (file, tensors)) in sizes.iter().enumerate() {
        assert_eq!(*file, format!("model-{:05}-of-{count:05}.safetensors", position + 1));
        let alone = tensors.len() == 1;
        assert!(alone || tensors.iter().sum::<u64>() <= 8000, "{file}: {tensors:?}");
    }
    let evaluated = |path: &str| evaluate(&room, &room.path(path))["perplexity"].clone();
    assert_eq!(evaluated("whole"), evaluated("cut"));
}

#[test]
fn a_recipe_writes_the_same_bytes_as_the_flags() {
    let room = Room::new();
    let flags = ["--bits", "3", "--exclude", "*.v_proj", "--seed", "4", "--act-order"];
    let by_flags = room.quantize("gptq", "flags", &[&flags[..], &["--static-groups"]].concat());
    let yaml = format!(
        "model: {model}\n\
         stages:\n\
         - quantize:\n    \
             method: gptq\n    \
             bits: 3\n    \
             group_size: 16\n    \
             exclude: ['*.v_proj']\n    \
             calibration: {{file: {file}, samples: {WINDOWS}, sequence_length: {LENGTH}, seed: 4}}\n    \
             gptq: {{act_order: true, static_groups: true}}\n    \
             measure: {{skip: true}}\n    \
             out: {out}\n",
        model = arg(&room.model),
        file = arg(&room.calibration),
        out = arg(&room.path("recipe")),
    );
    let recipe = room.path("job.yaml");
    std::fs::write(&recipe, &yaml).unwrap();
    let result = ok_json(&["-q", "run", arg(&recipe), "--json"]);
    assert_eq!(result[0]["stage"], "quantize");
    assert_same_files(&by_flags, &room.path("recipe"));

    for (right, wrong) in
        [("group_size", "groupsize"), ("act_order", "act_oder"), ("samples", "sampels")]
    {
        std::fs::write(&recipe, yaml.replace(right, wrong)).unwrap();
        let job = ["-q", "run", arg(&recipe)].map(String::from);
        room.refused(&job, &["job.yaml", wrong, &format!("did you mean `{right}`?")]);
    }
}

#[test]
fn a_recipe_gives_some_layers_another_grid() {
    let room = Room::new();
    let yaml = format!(
        "model: {}\n\
         stages:\n\
         - quantize:\n    \
             bits: 3\n    \
             group_size: 16\n    \
             overrides:\n    \
             - {{pattern: '*.down_proj', bits: 8, group_size: 32}}\n    \
             - {{pattern: 'layers.0.*', bits: 5, symmetric: true}}\n    \
             measure: {{skip: true}}\n    \
             out: {}\n",
        arg(&room.model),
        arg(&room.path("mixed")),
    );
    let recipe = room.path("mixed.yaml");
    std::fs::write(&recipe, &yaml).unwrap();
    ok(&["-q", "run", arg(&recipe)]);
    let record = json_of(&room.path("mixed/strata.json"));
    for layer in record["layers"].as_array().unwrap() {
        let module = layer["module"].as_str().unwrap();
        let expected = if module.ends_with("down_proj") {
            (8, 32)
        } else if module.contains("layers.0.") {
            (5, 16)
        } else {
            (3, 16)
        };
        let found = (layer["bits"].as_u64().unwrap(), layer["group_size"].as_u64().unwrap());
        assert_eq!(found, expected, "{module}");
    }
    assert!(evaluate(&room, &room.path("mixed"))["perplexity"].as_f64().unwrap().is_finite());
    let job = ["-q", "run", arg(&recipe)].map(String::from);
    std::fs::write(&recipe, yaml.replace("'*.down_proj', bits", "'*.down_proj', bit")).unwrap();
    room.refused(&job, &["`bit`", "did you mean `bits`?"]);
    std::fs::write(&recipe, yaml.replace("bits: 3", "bits: 3\n    format: gptq-v2")).unwrap();
    room.refused(&job, &["GPTQ holds 2, 3, 4 or 8 bits, not 5", "compressed-tensors"]);
    std::fs::write(&recipe, yaml.replace("bits: 3", "bits: 4\n    format: awq")).unwrap();
    room.refused(&job, &["overrides", "--format compressed-tensors"]);
}
