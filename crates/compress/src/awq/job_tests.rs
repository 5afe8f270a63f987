//! Tests of whole AWQ jobs on tiny networks: what rounds, what is kept, what is stored.
use super::*;
use crate::grid::GridOptions;
use crate::options::{Format, Method, QuantizeOptions};
use crate::{Calibration, Outcome, Plan, Target};
use nn::testing::{random_checkpoint, tiny_config};
use nn::{Decoder, Family, Model};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use store::{Checkpoint, Dtype, WriteOptions, Writer};
use tensor::{Rng, host};

/// Channels that the networks' norms amplify.
const PLANTED: [usize; 3] = [3, 17, 20];

/// A directory with a network in it; disappears with the test.
struct Room {
    root: PathBuf,
    config: Value,
}

impl Room {
    fn new(test: &str, family: Family) -> Self {
        let root = std::env::temp_dir().join(format!("strata-awq-{}-{test}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        let room = Self { root, config: tiny_config(family) };
        random_checkpoint(&room.path("raw"), &room.config, 5).unwrap();
        room.edit(&room.path("raw"), &room.path("in"), |name, values| {
            if name.contains("layernorm.weight") || name.contains("layer_norm.weight") {
                PLANTED.iter().for_each(|&channel| values[channel] *= 6.0);
            }
        });
        room
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn decoder(&self) -> Decoder {
        Decoder::from_config(&self.config).unwrap()
    }

    /// Copies a network with changed values.
    fn edit(&self, from: &Path, to: &Path, change: impl Fn(&str, &mut [f32])) {
        let checkpoint = Checkpoint::open(from).unwrap();
        let overwrite = WriteOptions { overwrite: true, ..Default::default() };
        let mut writer = Writer::create(to, overwrite).unwrap();
        for info in checkpoint.infos() {
            let mut values = checkpoint.f32(&info.name).unwrap();
            change(&info.name, &mut values);
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.add(&info.name, Dtype::F32, &info.shape, &bytes).unwrap();
        }
        writer.put_json("config.json", &self.config).unwrap();
        writer.finish().unwrap();
    }

    fn try_run(
        &self,
        out: &str,
        options: &QuantizeOptions,
        calibration: &Calibration,
        resume: bool,
    ) -> crate::Result<Outcome> {
        let model = Model::open(&self.path("in"))?;
        let plan = Plan::new(&model.decoder, &model.checkpoint, options)?;
        let out = self.path(out);
        let target = Target { out: &out, resume, overwrite: false, provenance: Value::Null };
        let progress = report::Progress::hidden();
        crate::run(&model, &plan, options, calibration, &target, &progress)
    }

    fn run(&self, out: &str, options: &QuantizeOptions) -> Outcome {
        self.try_run(out, options, &windows(), false).unwrap()
    }

    fn refused(&self, options: &QuantizeOptions) -> String {
        let error = self.try_run("refused", options, &windows(), false).unwrap_err();
        assert!(!self.path("refused").exists());
        // A block that is done stays for a resume.
        let _ = std::fs::remove_dir_all(self.path("refused.partial"));
        error.to_string()
    }

    fn mappings(&self, entries: &Value) -> AwqOptions {
        let file = self.path("mappings.json");
        std::fs::write(&file, entries.to_string()).unwrap();
        AwqOptions { mappings: Some(file), ..Default::default() }
    }

    fn tensors(&self, out: &str) -> BTreeMap<String, Vec<u8>> {
        let checkpoint = Checkpoint::open(&self.path(out)).unwrap();
        let bytes = |name: &str| checkpoint.bytes(name).unwrap().into_owned();
        checkpoint.names().map(|name| (name.to_string(), bytes(name))).collect()
    }

    fn matrix(&self, out: &str, layer: &nn::Name) -> Vec<f32> {
        host::into_vec(Model::open(&self.path(out)).unwrap().weights.matrix(layer).unwrap())
    }

    /// Asserts that an output of 8 bits computes what the input does, up to what rounding costs,
    /// and that this would show if a scale were folded into the layers only.
    fn assert_close(&self, out: &str) {
        let input = Checkpoint::open(&self.path("in")).unwrap();
        self.edit(&self.path(out), &self.path("half"), |name, values| {
            if name.contains("input_layernorm") {
                values.copy_from_slice(&input.f32(name).unwrap());
            }
        });
        let distance = |out: &str| distance(&self.logits(out), &self.logits("in"));
        let (apart, half) = (distance(out), distance("half"));
        assert!(apart < 0.08 && half > 0.3, "{apart}, half folded {half}");
    }

    fn logits(&self, out: &str) -> Vec<f32> {
        let tokens: Vec<u32> = (0..48).map(|i| (i * 37 + 5) % 97).collect();
        host::into_vec(Model::open(&self.path(out)).unwrap().logits(&tokens, 3).unwrap())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn windows() -> Calibration {
    let mut rng = Rng::new(2);
    Calibration::new((0..8 * 16).map(|_| rng.below(97) as u32).collect(), 16).unwrap()
}

fn job(bits: u8, awq: AwqOptions) -> QuantizeOptions {
    let grid = GridOptions { bits, group_size: 16, ..Default::default() };
    let (method, format) = (Method::Awq, Format::Dequantized);
    QuantizeOptions { method, grid, format, awq, ..Default::default() }
}

fn assert_same(a: &BTreeMap<String, Vec<u8>>, b: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in a {
        assert!(*bytes == b[name], "{name} differs");
    }
}

/// Largest difference relative to the largest value.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

#[test]
fn gptq_rounds_what_was_folded() {
    let room = Room::new("gptq", Family::Llama);
    let gptq = |no_scale| AwqOptions { rounding: Rounding::Gptq, no_scale, ..Default::default() };
    // Nothing folded: plain GPTQ, quantised stream and all.
    room.run("nothing", &job(3, gptq(true)));
    room.run("plain", &QuantizeOptions { method: Method::Gptq, ..job(3, gptq(true)) });
    assert_same(&room.tensors("nothing"), &room.tensors("plain"));
    let outcome = room.run("scaled", &job(3, gptq(false)));
    let first = &outcome.layers[0].details;
    assert!(first["ratio"].as_f64().is_some_and(|r| r > 0.0), "{first:?}");
    assert!(first.contains_key("loss") && first.contains_key("damping"), "{first:?}");
    assert!(!outcome.layers.iter().any(|l| l.details.contains_key("clip_histogram")));
    assert_ne!(room.logits("scaled"), room.logits("plain"));
    // With hardly any rounding only the fold is left, which must change nothing.
    room.run("fine", &job(8, gptq(false)));
    room.assert_close("fine");
}

#[test]
fn gptq_rounding_obeys_the_options_of_gptq() {
    let rounding = Rounding::Gptq;
    let mut options = job(4, AwqOptions { rounding, ..Default::default() });
    options.format = Format::CompressedTensors;
    options.gptq.act_order = true;
    let error = options.check().unwrap_err().to_string();
    assert!(error.contains("--static-groups"), "{error}");
    options.awq.rounding = Rounding::Rtn;
    options.check().unwrap();
}

#[test]
fn stored_search_gives_the_same_bytes_without_calibration() {
    for (family, awq) in [
        (Family::Llama, AwqOptions { gqa_fold: GqaFold::Mean, ..Default::default() }),
        (Family::Opt, AwqOptions { search: Search::Duo, ..Default::default() }),
        (Family::Gpt2, AwqOptions::default()),
        (Family::Gemma2, AwqOptions { fixed_scale: Some(1.5), ..Default::default() }),
    ] {
        let room = Room::new(&format!("stored-{family:?}"), family);
        let mut search = job(3, AwqOptions { save_search: true, ..awq });
        room.run("searched", &search);
        // Whether the search is kept does not change the result.
        search.awq.save_search = false;
        room.run("unsaved", &search);
        assert_same(&room.tensors("unsaved"), &room.tensors("searched"));
        assert!(!room.path("unsaved").join(SEARCH_DIRECTORY).exists());
        for directory in ["searched", "searched/awq-search"] {
            let apply_search = Some(room.path(directory));
            let apply = job(3, AwqOptions { apply_search, ..Default::default() });
            assert!(!apply.calibrates());
            let out = format!("applied-{}", directory.len());
            let outcome = room.try_run(&out, &apply, &Calibration::none(), false).unwrap();
            assert_same(&room.tensors(&out), &room.tensors("searched"));
            assert!(outcome.warnings.is_empty(), "{:?}", outcome.warnings);
        }
    }
}

#[test]
fn stored_search_under_gptq() {
    let room = Room::new("stored-gptq", Family::Qwen3);
    let rounding = Rounding::Gptq;
    room.run("searched", &job(3, AwqOptions { rounding, save_search: true, ..Default::default() }));
    // The scales come from the record, GPTQ's statistics from the same calibration text.
    let apply_search = Some(room.path("searched"));
    let apply = job(3, AwqOptions { rounding, apply_search, ..Default::default() });
    assert!(apply.calibrates());
    room.run("applied", &apply);
    assert_same(&room.tensors("applied"), &room.tensors("searched"));
}

/// The record says what was done: the stored gain times the scale is the gain that was there, and
/// no weight exceeds its group's limit.
#[test]
fn record_holds_the_numbers_that_were_applied() {
    let room = Room::new("record", Family::Llama);
    room.run("out", &job(4, AwqOptions { save_search: true, ..Default::default() }));
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(room.path("out").join(name)).unwrap()).unwrap()
    };
    let contents = read(SEARCH_FILE);
    assert_eq!(contents["grid"]["bits"], 4);
    let before = Checkpoint::open(&room.path("in")).unwrap();
    let after = Checkpoint::open(&room.path("out")).unwrap();
    for (index, names) in room.decoder().blocks.iter().enumerate() {
        let block = &contents["blocks"][index];
        let file = format!("out/awq-search/{}", block["file"].as_str().unwrap());
        let numbers = Checkpoint::open(&room.path(&file)).unwrap();
        let mappings = block["mappings"].as_array().unwrap();
        // No value projection: two query heads read one key head.
        assert_eq!(mappings.len(), 3);
        assert_eq!(mappings[0]["prev"], names.norm1.module.as_str());
        assert_eq!(mappings[0]["layers"].as_array().unwrap().len(), 3);
        assert_eq!(mappings[2]["prev"], names.up.module.as_str());
        for (entry, norm) in mappings.iter().zip([&names.norm1, &names.norm2]) {
            let scale = numbers.f32(entry["scale"].as_str().unwrap()).unwrap();
            let old = before.f32(&norm.weight()).unwrap();
            let new = after.f32(&norm.weight()).unwrap();
            assert!(scale.iter().any(|s| (s - 1.0).abs() > 0.1), "{scale:?}");
            for ((old, new), scale) in old.iter().zip(&new).zip(&scale) {
                assert!((new * scale - old).abs() <= 1e-5 * old.abs(), "{new} * {scale} != {old}");
            }
        }
        let clips = block["clips"].as_array().unwrap();
        assert_eq!(clips.len(), 5, "all but query and key");
        for clip in clips {
            let info = numbers.info(clip["limits"].as_str().unwrap()).unwrap().shape.clone();
            let limits = numbers.f32(clip["limits"].as_str().unwrap()).unwrap();
            let module = clip["layer"].as_str().unwrap();
            let shape = after.info(&format!("{module}.weight")).unwrap().shape.clone();
            assert_eq!(info, [shape[0], shape[1] / 16]);
            let weights = after.f32(&format!("{module}.weight")).unwrap();
            for (group, limit) in weights.chunks(16).zip(&limits) {
                // The zero point is rounded: up to half a step of 2 limits / 15.
                let largest = group.iter().fold(0f32, |m, w| m.max(w.abs()));
                assert!(largest <= limit * 1.07, "{module}: {largest} > {limit}");
            }
        }
    }
}

#[test]
fn interrupted_job_leaves_the_same_record() {
    let room = Room::new("resume", Family::Llama);
    let options = job(4, AwqOptions { save_search: true, ..Default::default() });
    room.run("whole", &options);
    std::fs::rename(room.path("in"), room.path("good")).unwrap();
    let last = room.decoder().blocks[1].down.weight();
    room.edit(&room.path("good"), &room.path("in"), |name, values| {
        if name == last {
            values[7] = f32::NAN;
        }
    });
    assert!(room.try_run("out", &options, &windows(), true).is_err());
    assert!(room.path("out.partial/awq-search/block-00000.safetensors").exists());
    std::fs::remove_dir_all(room.path("in")).unwrap();
    std::fs::rename(room.path("good"), room.path("in")).unwrap();
    assert_eq!(room.try_run("out", &options, &windows(), true).unwrap().resumed_blocks, 1);
    let mut compared = 0;
    for entry in std::fs::read_dir(room.path("whole").join(SEARCH_DIRECTORY)).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |out: &str| std::fs::read(room.path(out).join(SEARCH_DIRECTORY).join(&name));
        assert!(read("whole").unwrap() == read("out").unwrap(), "{name:?} differs");
        compared += 1;
    }
    assert_eq!(compared, 3);
    assert_same(&room.tensors("whole"), &room.tensors("out"));
}

/// Changes one number of a stored tensor.
fn tamper(file: &Path, tensor: &str, at: usize, value: f32) {
    let mut bytes = std::fs::read(file).unwrap();
    let header = store::safetensors::parse(file, &bytes).unwrap();
    let start = header.tensors.iter().find(|t| t.name == tensor).unwrap().start;
    let at = header.data_start + start + 4 * at;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn unfit_records_are_refused() {
    let room = Room::new("unfit", Family::Llama);
    let gqa_fold = GqaFold::Max;
    room.run("out", &job(4, AwqOptions { save_search: true, gqa_fold, ..Default::default() }));
    let apply =
        |path: PathBuf| job(4, AwqOptions { apply_search: Some(path), ..Default::default() });
    let expect = |options: &QuantizeOptions, phrases: &[&str]| {
        let message = room.refused(options);
        assert!(phrases.iter().all(|phrase| message.contains(phrase)), "{message}");
    };
    expect(&apply(room.path("in")), &["holds no search", "--save-search"]);
    let mut other = apply(room.path("out"));
    other.grid.group_size = 8;
    expect(&other, &["groups of 16", "groups of 8", "--no-clip"]);
    other.awq.no_clip = true;
    let outcome = room.try_run("other", &other, &Calibration::none(), false).unwrap();
    assert_eq!(outcome.warnings.len(), 1, "{:?}", outcome.warnings);
    let mut excluded = apply(room.path("out"));
    excluded.exclude = vec!["*.gate_proj".into()];
    expect(&excluded, &["gate_proj", "left as it is"]);
    let mut twice = apply(room.path("out"));
    twice.awq.no_scale = true;
    expect(&twice, &["--no-scale"]);

    let file = room.path("out/awq-search/block-00001.safetensors");
    let good = std::fs::read(&file).unwrap();
    let names = room.decoder().blocks[1].clone();
    let query = format!("{}.scale", names.qkv[0].module);
    for (value, phrase) in [(f32::NAN, "NaN"), (-2.0, "-2"), (0.0, "scale of 0")] {
        tamper(&file, &query, 4, value);
        expect(&apply(room.path("out")), &[phrase, "q_proj"]);
        std::fs::write(&file, &good).unwrap();
    }
    // Columns 0 and 8 of the output projection read the same value row.
    tamper(&file, &format!("{}.scale", names.output.module), 8, 77.0);
    expect(&apply(room.path("out")), &["o_proj", "unequal scales"]);
    std::fs::write(&file, &good).unwrap();

    let contents = room.path("out").join(SEARCH_FILE);
    let text = std::fs::read_to_string(&contents).unwrap();
    for (from, to, phrase) in [
        ("block-00001.safetensors", "../../in/model.safetensors", "not beside it"),
        ("\"format\": 1", "\"format\": 7", "format 7"),
        ("layers.1.input_layernorm", "layers.1.input_norm", "can absorb the scale"),
        ("\"blocks\": [", "\"blocks\": 3, \"x\": [", "not the record"),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&contents, text.replace(from, to)).unwrap();
        expect(&apply(room.path("out")), &[phrase]);
    }
}

#[test]
fn kept_channels_stay_as_they_are() {
    let room = Room::new("kept", Family::Llama);
    let nothing = AwqOptions { no_scale: true, no_clip: true, ..Default::default() };
    room.run("rtn", &job(3, nothing.clone()));
    for keep_by in [KeepBy::Activation, KeepBy::Weight, KeepBy::Random] {
        let out = format!("{keep_by:?}");
        // 9 % of 32 and of 48 inputs: 3 and 5 channels.
        let awq = AwqOptions { keep_channels: Some(9.0), keep_by, ..nothing.clone() };
        let outcome = room.run(&out, &job(3, awq));
        for (layer, result) in room.decoder().linears(0).iter().zip(&outcome.layers) {
            let width = layer.in_features();
            let (original, rounded) = (room.matrix("in", layer), room.matrix("rtn", layer));
            let kept = room.matrix(&out, layer);
            let column = |m: &[f32], c: usize| m.iter().skip(c).step_by(width).copied().collect();
            let same = |m: &[f32], c: usize| -> bool {
                let (a, b): (Vec<f32>, Vec<f32>) = (column(m, c), column(&kept, c));
                a == b
            };
            let channels: Vec<usize> = (0..width).filter(|&c| same(&original, c)).collect();
            let count = if width == 32 { 3 } else { 5 };
            assert_eq!(channels.len(), count, "{out}, {layer}: {channels:?}");
            assert!((0..width).all(|c| channels.contains(&c) || same(&rounded, c)));
            let expected = 3.0 + 19.0 / 16.0 + 13.0 * count as f64 / width as f64;
            assert!((result.bits_per_weight - expected).abs() < 1e-9, "{result:?}");
            if keep_by == KeepBy::Activation && layer.role == nn::Role::Gate {
                assert_eq!(channels, PLANTED);
            }
            if keep_by == KeepBy::Weight {
                let norms = column_norms(&Matrix::new(layer.shape[0], width, original).unwrap());
                let smallest = channels.iter().map(|&c| norms[c]).fold(f32::INFINITY, f32::min);
                assert_eq!(norms.iter().filter(|n| **n >= smallest).count(), count);
            }
        }
    }
    let mut packed = job(4, AwqOptions { keep_channels: Some(1.0), ..nothing });
    packed.format = Format::CompressedTensors;
    assert!(packed.check().unwrap_err().to_string().contains("dequantized"));
}

#[test]
fn fixed_scale_goes_on_the_planted_channels() {
    let room = Room::new("fixed", Family::Llama);
    let fixed_scale = Some(2.0);
    room.run("out", &job(8, AwqOptions { fixed_scale, no_clip: true, ..Default::default() }));
    let before = Checkpoint::open(&room.path("in")).unwrap();
    let after = Checkpoint::open(&room.path("out")).unwrap();
    for names in &room.decoder().blocks {
        for norm in [&names.norm1, &names.norm2] {
            let old = before.f32(&norm.weight()).unwrap();
            let new = after.f32(&norm.weight()).unwrap();
            let moved: Vec<usize> = (0..old.len()).filter(|&c| old[c] != new[c]).collect();
            // 1 % of 32 channels is one.
            assert_eq!(moved.len(), 1);
            assert!(PLANTED.contains(&moved[0]));
            assert_eq!(new[moved[0]] * 2.0, old[moved[0]]);
        }
    }
    room.assert_close("out");
}

fn table() -> Value {
    json!([
        {"prev": "mlp.up_proj", "layers": ["mlp.down_proj"], "inspect": "self"},
        {"prev": "input_layernorm", "inspect": "self_attn",
         "layers": ["self_attn.v_proj", "self_attn.k_proj", "self_attn.q_proj"]},
        {"prev": "self_attn.v_proj", "layers": ["self_attn.o_proj"], "gqa": true},
        {"prev": "post_attention_layernorm", "layers": ["mlp.gate_proj", "mlp.up_proj"]},
    ])
}

#[test]
fn mapping_file_replaces_the_table() {
    let room = Room::new("mappings", Family::Llama);
    // All of the table, in another order: the same job.
    room.run("table", &job(3, AwqOptions { gqa_fold: GqaFold::Mean, ..Default::default() }));
    room.run("file", &job(3, room.mappings(&table())));
    assert_same(&room.tensors("table"), &room.tensors("file"));
    // A part of it, judged by the whole block: only that is searched.
    let mut part = json!([table()[0], table()[1]]);
    part[0]["inspect"] = json!("block");
    part[1]["inspect"] = json!("block");
    let outcome = room.run("part", &job(3, room.mappings(&part)));
    for layer in &outcome.layers {
        let searched = ["query", "key", "value", "down"].contains(&layer.role.as_str());
        let loss = layer.details.get("search_loss").and_then(Value::as_f64);
        assert_eq!(loss.is_some(), searched, "{layer:?}");
        if let Some(loss) = loss {
            let rounding = layer.details["rounding_loss"].as_f64().unwrap();
            assert!(loss > 0.0 && loss <= rounding, "{loss} {rounding}");
        }
    }
}

/// The last layer of a block adds straight to its output, so judging the block is judging it.
#[test]
fn block_and_layer_agree_on_the_last_layer() {
    let room = Room::new("inspect", Family::Llama);
    let mut losses = Vec::new();
    for inspect in ["self", "block"] {
        let mut entry = table()[0].clone();
        entry["inspect"] = json!(inspect);
        let outcome = room.run(inspect, &job(3, room.mappings(&json!([entry]))));
        let down = outcome.layers.iter().find(|l| l.role == "down").unwrap();
        losses.push((down.details["search_loss"].as_f64().unwrap(), down.details["ratio"].clone()));
    }
    assert!((losses[0].0 / losses[1].0 - 1.0).abs() < 1e-3, "{losses:?}");
    assert_eq!(losses[0].1, losses[1].1);
}

#[test]
fn unfit_mappings_are_refused_by_entry() {
    let room = Room::new("unfit-mappings", Family::Llama);
    let with = |entry: usize, key: &str, value: Value| {
        let mut table = table();
        table[entry][key] = value;
        table
    };
    for (entries, phrases) in [
        (json!({}), vec!["not a JSON list", "input_layernorm"]),
        (json!([]), vec!["no mapping", "--no-scale"]),
        (with(1, "prev", json!("input_norm")), vec!["entry 2 (`input_norm`)", "`input_layernorm`"]),
        (
            with(1, "layers", json!(["self_attn.q_proj"])),
            vec!["entry 2", "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"],
        ),
        (with(0, "inspect", json!("mlp")), vec!["entry 1", "\"self\"", "\"block\""]),
        (with(0, "inspect", json!("module")), vec!["entry 1", "self_attn"]),
        (with(2, "gqa", json!(false)), vec!["entry 3", "\"gqa\": true"]),
        (with(3, "layer", json!([])), vec!["entry 4", "unknown field `layer`"]),
        (json!([table()[0], table()[0]]), vec!["entry 2", "twice"]),
    ] {
        let message = room.refused(&job(3, room.mappings(&entries)));
        let all = phrases.iter().all(|phrase| message.contains(phrase));
        assert!(all && message.contains("mappings.json"), "{phrases:?}: {message}");
    }
    let gelu = Room::new("unfit-gelu", Family::Gpt2);
    let entries = json!([{"prev": "mlp.act", "layers": ["mlp.c_proj"]}]);
    let message = gelu.refused(&job(3, gelu.mappings(&entries)));
    assert!(message.contains("does not commute"), "{message}");
}
