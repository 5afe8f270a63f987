//! `strata convert` as a user meets it: what goes through every container unchanged, what is refused
//! and how that is said.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{arg, ok, ok_json, run, tiny_model};
use store::packed::{Stored, load, modules, parse_config};
use store::{Checkpoint, Dtype, WriteOptions, Writer};

struct Place {
    directory: tempfile::TempDir,
    model: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let model = tiny_model(directory.path());
        Self { directory, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The model quantised by rounding; `extra` are further flags.
    fn quantized(&self, name: &str, format: &str, extra: &[&str]) -> PathBuf {
        let out = self.path(name);
        let mut arguments = vec![
            "quantize",
            arg(&self.model),
            "--method",
            "rtn",
            "--group-size",
            "32",
            "--format",
            format,
            "--no-evaluate",
            "--out",
            arg(&out),
        ];
        arguments.extend(extra);
        ok(&arguments);
        out
    }

    fn convert(&self, from: &Path, to: &str, name: &str, extra: &[&str]) -> PathBuf {
        let out = self.path(name);
        let mut arguments = vec!["convert", arg(from), "--to", to, "--out", arg(&out)];
        arguments.extend(extra);
        ok(&arguments);
        out
    }

    /// The message of a refused conversion; nothing may be left behind.
    fn refused(&self, from: &Path, to: &str, extra: &[&str]) -> String {
        let out = self.path("refused");
        let mut arguments = vec!["convert", arg(from), "--to", to, "--out", arg(&out)];
        arguments.extend(extra);
        let (code, _, message) = run(&arguments);
        assert_eq!(code, 2, "{message}");
        let left: Vec<_> = std::fs::read_dir(self.directory.path())
            .unwrap()
            .filter_map(|e| e.unwrap().file_name().into_string().ok())
            .filter(|n| n.starts_with("refused"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        message
    }
}

/// The codes of all packed layers.
fn codes(path: &Path) -> BTreeMap<String, Stored> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let config = parse_config(checkpoint.config().unwrap()).unwrap().unwrap();
    modules(config.layout, &checkpoint)
        .into_iter()
        .map(|module| {
            let stored = load(&checkpoint, &module, &config).unwrap();
            (module, stored)
        })
        .collect()
}

/// All tensors as f32.
fn values(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let names: Vec<String> = checkpoint.names().map(String::from).collect();
    names.into_iter().map(|n| (n.clone(), checkpoint.f32(&n).unwrap())).collect()
}

/// Values as half precision has them.
fn rounded(values: &[f32]) -> Vec<f32> {
    let bytes = store::convert::from_f32(values, Dtype::F16).unwrap();
    store::convert::to_f32(Dtype::F16, &bytes, values.len()).unwrap()
}

#[test]
fn codes_pass_through_every_container_unchanged() {
    let place = Place::new();
    let first = place.quantized("gptq", "gptq", &["--symmetric"]);
    let original = codes(&first);
    assert_eq!(original.len(), 14);
    let mut from = first;
    for (step, to) in
        ["gptq-v2", "compressed-tensors", "awq", "strata", "gguf", "gptq"].iter().enumerate()
    {
        let next = place.convert(&from, to, &format!("step{step}"), &[]);
        if *to == "gguf" {
            let blocks = Checkpoint::open(&next).unwrap();
            let q4 = blocks.infos().filter(|i| i.dtype == Dtype::Ggml(store::GgmlType::Q4_0));
            assert_eq!(q4.count(), 14);
        } else {
            assert!(codes(&next) == original, "{to}");
        }
        from = next;
    }
    // The same function all the way: what a reader without codes sees.
    let plain = values(&place.convert(&from, "safetensors", "plain", &["--type", "f32"]));
    for (module, stored) in &original {
        assert_eq!(plain[&format!("{module}.weight")], nn::dequantize(stored).unwrap(), "{module}");
    }
    let embedding = "model.embed_tokens.weight";
    assert_eq!(plain[embedding], rounded(&values(&place.model)[embedding]));
}

#[test]
fn asymmetric_grids_of_other_widths_pass_where_they_fit() {
    let place = Place::new();
    let first = place.quantized("ct3", "compressed-tensors", &["--bits", "3"]);
    let original = codes(&first);
    let own = place.convert(&first, "strata", "own", &[]);
    let back = place.convert(&own, "compressed-tensors", "back", &[]);
    assert!(codes(&back) == original);
    let message = place.refused(&first, "gptq-v2", &[]);
    assert!(message.contains("needs out to be a multiple of 32; it is 16"), "{message}");
    let message = place.refused(&first, "awq", &[]);
    assert!(message.contains("14 layer(s) cannot go into awq"), "{message}");
    assert!(message.contains("AutoAWQ holds 4 bits, not 3") && message.contains("--lossy"));
    assert!(message.contains("model.layers.0.self_attn.q_proj"), "{message}");
    let message = place.refused(&first, "gguf", &[]);
    assert!(message.contains("zero points") && message.contains("--type f16"), "{message}");
    // Asked for by name, the values go.
    let half = place.convert(&first, "gguf", "half.gguf", &["--type", "f16"]);
    let read = values(&half);
    for (module, stored) in &original {
        let wanted = rounded(&nn::dequantize(stored).unwrap());
        assert_eq!(read[&format!("{module}.weight")], wanted, "{module}");
    }
    let lossy = place.convert(&first, "awq", "lossy", &["--lossy", "--group-size", "32"]);
    assert!(codes(&lossy).values().all(|stored| stored.bits() == Some(4)));
}

#[test]
fn nothing_is_lost_unasked() {
    let place = Place::new();
    let message = place.refused(&place.model, "gptq-v2", &[]);
    assert!(message.contains("F32 weights are not on an even grid"), "{message}");
    assert!(message.contains("strata quantize"), "{message}");
    let message = place.refused(&place.model, "compressed-tensors", &["--type", "q4_0"]);
    assert!(message.contains("block type of GGUF"), "{message}");
    let message = place.refused(&place.model, "sparse-bitmask", &[]);
    assert!(message.contains("no layer has 5") && message.contains("strata prune"), "{message}");
    // Blocks with minima, and blocks of blocks, are no even grids.
    let blocks = place.convert(&place.model, "gguf", "q4_1.gguf", &["--type", "q4_1"]);
    let message = place.refused(&blocks, "compressed-tensors", &[]);
    assert!(message.contains("Q4_1 weights are not on an even grid"), "{message}");
    let message = place.refused(&blocks, "gguf", &["--type", "q8_0"]);
    assert!(message.contains("is Q4_1, not an even grid"), "{message}");
    let again = place.convert(&blocks, "gguf", "again.gguf", &[]);
    assert_eq!(values(&again), values(&blocks));
    // Groups along the output have no place outside Strata's container, nor zero points of 0 in v1.
    let asymmetric = place.quantized("v2", "gptq-v2", &["--range", "strict"]);
    let message =
        run(&["convert", arg(&asymmetric), "--to", "gptq", "--out", arg(&place.path("v1"))]);
    if message.0 != 0 {
        assert!(message.2.contains("zero point is 0"), "{}", message.2);
    }
    // The file that is read is not replaced.
    let (code, _, message) =
        run(&["convert", arg(&blocks), "--to", "gguf", "--overwrite", "--out", arg(&blocks)]);
    assert_eq!(code, 2);
    assert!(message.contains("would replace the file that is read"), "{message}");
    let (code, _, message) =
        run(&["convert", arg(&place.model), "--to", "gguf", "--out", arg(&blocks)]);
    assert_eq!(code, 2);
    assert!(message.contains("already exists"), "{message}");
}

#[test]
fn a_report_says_what_happened() {
    let place = Place::new();
    let out = place.path("x.gguf");
    let json = ok_json(&[
        "convert",
        arg(&place.model),
        "--to",
        "gguf",
        "--type",
        "q4_k",
        "--out",
        arg(&out),
        "--json",
    ]);
    // Rows of 32 and 64 weights fill no block of 256.
    assert_eq!(json["changes"]["F32 -> Q5_0, rounded"], 14, "{json}");
    assert_eq!(json["changes"]["F32 -> Q8_0, rounded"], 1, "{json}");
    let notes = json["notes"].to_string();
    assert!(notes.contains("no whole number of Q4_K blocks"), "{notes}");
    let size = std::fs::metadata(&out).unwrap().len();
    assert_eq!(json["bytes"][1], size);
    let path = place.path("text.txt");
    std::fs::write(&path, "The town of Gakdale lies on the river Hande. ".repeat(20)).unwrap();
    let window = ["--window", "16", "--text", arg(&path)];
    let mut arguments = vec!["eval", arg(&out), "--task", "accuracy"];
    arguments.extend(window);
    let text = ok(&arguments);
    assert!(text.contains("Accuracy") || text.contains("accuracy"), "{text}");
}

/// The model with two zeros in every four columns of its first block.
fn pruned(place: &Place) -> PathBuf {
    let checkpoint = Checkpoint::open(&place.model).unwrap();
    let out = place.path("pruned");
    let mut writer = Writer::create(&out, WriteOptions::default()).unwrap();
    for info in checkpoint.infos() {
        let mut values = checkpoint.f32(&info.name).unwrap();
        if info.name.contains("layers.0") && info.name.contains("proj") {
            for (i, value) in values.iter_mut().enumerate() {
                if (i / 4 + i) % 4 < 2 {
                    *value = 0.0;
                }
            }
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.add(&info.name, Dtype::F32, &info.shape, &bytes).unwrap();
    }
    writer.carry(&place.model, &[]).unwrap();
    writer.finish().unwrap()
}

#[test]
fn pruned_layers_become_sparse_and_come_back() {
    let place = Place::new();
    let dense = pruned(&place);
    let original = values(&dense);
    for (to, structure) in [("sparse-bitmask", "unstructured"), ("sparse-24-bitmask", "2:4")] {
        let sparse = place.convert(&dense, to, to, &[]);
        let raw: serde_json::Value =
            serde_json::from_slice(&std::fs::read(sparse.join("config.json")).unwrap()).unwrap();
        let config = &raw["quantization_config"]["sparsity_config"];
        assert_eq!(
            (&config["format"], &config["sparsity_structure"]),
            (&to.into(), &structure.into())
        );
        assert_eq!(config["global_sparsity"], 0.5);
        assert_eq!(config["ignore"].as_array().unwrap().len(), 8, "seven layers and the head");
        assert_eq!(values(&sparse), original);
        let sizes = [&dense, &sparse].map(|p| Checkpoint::open(p).unwrap().total_bytes());
        assert!(sizes[1] < sizes[0], "{sizes:?}");
        // The whole program sees ordinary weights.
        let shown = ok_json(&["inspect", arg(&sparse), "--layers", "--json"]);
        assert_eq!(shown["bytes"], sizes[1]);
        let back = place.convert(&sparse, "safetensors", &format!("{to}-back"), &[]);
        assert_eq!(values(&back), original);
        let plain = std::fs::read_to_string(back.join("config.json")).unwrap();
        assert!(!plain.contains("sparsity_config"));
        ok(&[
            "quantize",
            arg(&sparse),
            "--method",
            "rtn",
            "--group-size",
            "32",
            "--no-evaluate",
            "--out",
            arg(&place.path(&format!("{to}-quantized"))),
        ]);
    }
    // One more value per group is too many for 2:4.
    let message = place.refused(&place.quantized("q", "gptq-v2", &[]), "sparse-bitmask", &[]);
    assert!(message.contains("codes would become"), "{message}");
}

#[test]
fn files_without_a_network_convert_too() {
    let place = Place::new();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../store/tests/fixtures/plain.pt");
    let out = place.convert(&fixture, "safetensors", "from-pickle", &[]);
    assert_eq!(values(&out), values(&fixture));
    let out = place.convert(&fixture, "safetensors", "half", &["--type", "f16"]);
    assert!(Checkpoint::open(&out).unwrap().infos().all(|i| i.dtype != Dtype::F32));
}

#[test]
fn a_recipe_converts() {
    let place = Place::new();
    let recipe = place.path("job.yaml");
    let text = format!(
        "model: {}\nstages:\n- quantize: {{ method: rtn, group_size: 32, symmetric: true, format: gptq-v2, \
         out: {}, measure: {{ skip: true }} }}\n- convert: {{ to: gguf, out: {} }}\n",
        arg(&place.model),
        arg(&place.path("a")),
        arg(&place.path("a.gguf"))
    );
    std::fs::write(&recipe, text).unwrap();
    let results = ok_json(&["run", arg(&recipe), "--json"]);
    assert_eq!(results[1]["stage"], "convert");
    let line = "gptq_v2 4 bits, groups of 32 -> Q4_0, same codes";
    assert_eq!(results[1]["result"]["changes"][line], 14, "{}", results[1]);
}
