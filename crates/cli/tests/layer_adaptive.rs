//! Layer-adaptive pruning as a user runs it: on a language model and on an image network.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{arg, ok, run, tiny_model};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use store::{Checkpoint, Dtype, WriteOptions, Writer};
use tensor::Rng;

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A chain 16-24-10 in f16 and 40 labelled images of 4 x 4 in IDX files.
fn image_model(directory: &Path) -> (PathBuf, PathBuf) {
    let out = directory.join("mlp");
    let mut writer = Writer::create(&out, WriteOptions::default()).unwrap();
    let mut rng = Rng::new(9);
    for (name, shape) in [
        ("fc1.weight", vec![24, 16]),
        ("fc1.bias", vec![24]),
        ("fc2.weight", vec![10, 24]),
        ("fc2.bias", vec![10]),
    ] {
        let mut values = vec![0.0; shape.iter().product()];
        rng.fill_normal(&mut values, 0.4);
        let bytes = store::convert::from_f32(&values, Dtype::F16).unwrap();
        writer.add(name, Dtype::F16, &shape, &bytes).unwrap();
    }
    writer.put_json("config.json", &json!({"architecture": "mlp"})).unwrap();
    writer.finish().unwrap();
    let images = directory.join("train-images-idx3-ubyte");
    let mut bytes = vec![0, 0, 8, 3];
    [40u32, 4, 4].iter().for_each(|n| bytes.extend(n.to_be_bytes()));
    bytes.extend((0..40 * 16).map(|_| rng.below(256) as u8));
    std::fs::write(&images, bytes).unwrap();
    let mut bytes = vec![0, 0, 8, 1, 0, 0, 0, 40];
    bytes.extend((0..40).map(|i| (i % 10) as u8));
    std::fs::write(directory.join("train-labels-idx1-ubyte"), bytes).unwrap();
    (out, images)
}

fn command<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let base = ["-q", "prune", model, "--method", "layer-adaptive-pruning", "--out", out];
    base.iter().chain(more).copied().collect()
}

/// Zeros of the masked tensors against `allocation.json` and the mask file; everything else bit for
/// bit as before.
fn check_output(model: &Path, out: &Path, layers: usize) -> f64 {
    let allocation = json_of(&out.join("allocation.json"));
    let (before, after) = (Checkpoint::open(model).unwrap(), Checkpoint::open(out).unwrap());
    let masks = Checkpoint::open(&out.join("masks/masks.safetensors")).unwrap();
    let shares = allocation["layers"].as_array().unwrap();
    assert_eq!((shares.len(), masks.len()), (layers, layers));
    let (mut zeros, mut total) = (0, 0);
    for share in shares {
        let module = share["module"].as_str().unwrap();
        let tensor = format!("{module}.weight");
        let (a, b) = (before.f32(&tensor).unwrap(), after.f32(&tensor).unwrap());
        let mask = masks.bytes(&format!("{module}.weight_mask")).unwrap().into_owned();
        assert_eq!(masks.info(&format!("{module}.weight_mask")).unwrap().dtype, Dtype::Bool);
        for ((a, b), keep) in a.iter().zip(&b).zip(&mask) {
            let expected = if *keep == 1 { a.to_bits() } else { 0 };
            assert_eq!(b.to_bits(), expected, "{module}");
        }
        let kept = mask.iter().filter(|k| **k == 1).count();
        assert_eq!(share["kept"], kept);
        (zeros, total) = (zeros + mask.len() - kept, total + mask.len());
    }
    for info in before.infos() {
        assert_eq!(after.info(&info.name).unwrap().dtype, info.dtype);
        if !shares.iter().any(|s| info.name == format!("{}.weight", s["module"].as_str().unwrap()))
        {
            assert_eq!(before.bytes(&info.name).unwrap(), after.bytes(&info.name).unwrap());
        }
    }
    let reached = zeros as f64 / total as f64;
    assert!((allocation["sparsity"]["reached"].as_f64().unwrap() - reached).abs() < 1e-9);
    assert!(out.join("report.html").exists());
    reached
}

#[test]
fn a_language_model_is_pruned_by_its_curves() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    let calibration = root.path().join("ids.json");
    let mut rng = Rng::new(3);
    let mut window = || (0..24).map(|_| 3 + rng.below(200)).collect::<Vec<_>>();
    let windows: Vec<_> = (0..4).map(|_| window()).collect();
    std::fs::write(&calibration, json!(windows).to_string()).unwrap();
    let out = root.path().join("out");
    let more = [
        "--sparsity",
        "0.5",
        "--curve-points",
        "10",
        "--no-evaluate",
        "--calibration",
        arg(&calibration),
        "--sequence-length",
        "24",
        "--curve-samples",
        "4",
    ];
    ok(&command(arg(&model), arg(&out), &more));
    let reached = check_output(&model, &out, 14);
    assert!((0.5..0.56).contains(&reached), "{reached}");
    let curves = json_of(&out.join("curves.json"));
    let first = &curves["layers"][0];
    assert_eq!(first["amount"].as_array().unwrap().len(), 11);
    assert_eq!(first["distortion"][0], 0.0);
    let allocation = json_of(&out.join("allocation.json"));
    assert!(allocation["measured_distortion"].as_f64().unwrap() > 0.0);
    assert!(allocation["predicted_distortion"].as_f64().unwrap() > 0.0);
    let record = json_of(&out.join("strata.json"));
    assert_eq!(record["job"], "prune");
    assert_eq!(record["options"]["method"], "layer-adaptive-pruning");
    // The same job again is refused; resumed it is complete.
    let (code, _, stderr) = run(&command(arg(&model), arg(&out), &more));
    assert_eq!(code, 2, "{stderr}");
    ok(&command(arg(&model), arg(&out), &[&more[..], &["--resume"]].concat()));
    // The head is the embedding: it can be pruned, and both see it.
    let tied = root.path().join("tied");
    let head = ["--tied-head", "--only", "model.embed_tokens"];
    ok(&command(arg(&model), arg(&tied), &[&more[..], &head].concat()));
    assert!((check_output(&model, &tied, 1) - 0.5).abs() < 0.01);
    // Dense zeros or stored sparse: the same model.
    let sparse = root.path().join("sparse");
    ok(&command(arg(&model), arg(&sparse), &[&more[..], &["--format", "sparse-bitmask"]].concat()));
    let (a, b) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&sparse).unwrap());
    assert!(b.total_bytes() < a.total_bytes());
    let q = "model.layers.1.self_attn.q_proj.weight";
    assert_eq!(a.f32(q).unwrap(), nn_matrix(&sparse, 1), "{q}");
}

/// The query projection of a block as a network reads it.
fn nn_matrix(path: &Path, block: usize) -> Vec<f32> {
    let model = nn::Model::open(path).unwrap();
    let name = model.decoder.linears(block)[0].clone();
    tensor::host::into_vec(nn::Weights::matrix(model.weights.as_ref(), &name).unwrap())
}

#[test]
fn an_image_network_is_pruned_trained_and_exported() {
    let root = tempfile::tempdir().unwrap();
    let (model, images) = image_model(root.path());
    for allocator in ["rd", "lamp", "erk", "uniform", "uniform-plus", "global"] {
        let out = root.path().join(allocator);
        let more = [
            "--allocator",
            allocator,
            "--sparsity",
            "0.6",
            "--calibration",
            arg(&images),
            "--evaluate",
            arg(&images),
        ];
        ok(&command(arg(&model), arg(&out), &more));
        let reached = check_output(&model, &out, 2);
        assert!((reached - 0.6).abs() < 0.011, "{allocator} {reached}");
        let report = std::fs::read_to_string(out.join("report.json")).unwrap();
        assert!(report.contains("top-1 accuracy"));
    }
    let table = root.path().join("table.json");
    std::fs::write(&table, r#"{"fc1": 0.25}"#).unwrap();
    let out = root.path().join("table");
    let more = ["--allocator", "table", "--allocation-table", arg(&table)];
    ok(&command(arg(&model), arg(&out), &more));
    assert!((check_output(&model, &out, 2) - 96.0 / 624.0).abs() < 1e-9);
    // Rounds with training: what is kept moves, what is pruned stays zero.
    let out = root.path().join("trained");
    let more = [
        "--sparsity",
        "0.7",
        "--rounds",
        "3",
        "--finetune-steps",
        "4",
        "--finetune-batch",
        "8",
        "--calibration",
        arg(&images),
        "--mask-export",
        "pytorch",
        "--curve-preset",
        "paper",
    ];
    ok(&command(arg(&model), arg(&out), &more));
    let allocation = json_of(&out.join("allocation.json"));
    assert_eq!(allocation["rounds"].as_array().unwrap().len(), 3);
    assert_eq!(allocation["distortion"], "worst");
    assert!(allocation["rounds"][2]["loss"].as_f64().unwrap().is_finite());
    let pytorch = Checkpoint::open(&out.join("masks/pytorch.safetensors")).unwrap();
    let after = Checkpoint::open(&out).unwrap();
    let before = Checkpoint::open(&model).unwrap();
    for module in ["fc1", "fc2"] {
        let weight = after.f32(&format!("{module}.weight")).unwrap();
        let kept = pytorch.f32(&format!("{module}.weight_orig")).unwrap();
        let mask = pytorch.f32(&format!("{module}.weight_mask")).unwrap();
        let product: Vec<f32> = kept.iter().zip(&mask).map(|(w, m)| w * m).collect();
        assert_eq!(product, weight);
        assert!(weight != before.f32(&format!("{module}.weight")).unwrap());
    }
    assert!(before.f32("fc1.bias").unwrap() != after.f32("fc1.bias").unwrap());
}

#[test]
fn what_cannot_work_is_refused_with_a_remedy() {
    let root = tempfile::tempdir().unwrap();
    let (model, images) = image_model(root.path());
    let language = tiny_model(root.path());
    let out = root.path().join("out");
    for (model, more, phrase) in [
        (&model, vec![], "--synthetic-calibration"),
        (&model, vec!["--sparsity", "1"], "0 to 1"),
        (&model, vec!["--curve-points", "1", "--synthetic-calibration"], "at least 2"),
        (&model, vec!["--only", "fc9", "--synthetic-calibration"], "fc9"),
        (&model, vec!["--layer-max", "fc1", "--synthetic-calibration"], "PATTERN=SPARSITY"),
        (&model, vec!["--tied-head", "--synthetic-calibration"], "not tied"),
        (&model, vec!["--finetune-steps", "2", "--synthetic-calibration"], "--finetune-data"),
        (&model, vec!["--pattern", "2:4"], "pattern"),
        (&language, vec!["--calibration", arg(&images), "--no-evaluate"], "train-images"),
    ] {
        let (code, stdout, stderr) = run(&command(arg(model), arg(&out), &more));
        assert_eq!(code, 2, "{more:?}\n{stdout}{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(phrase), "{more:?}\n{stderr}");
        assert!(!out.exists());
    }
    // Noise stands in for images; everything in one layer may go only if that is allowed.
    let more = ["--synthetic-calibration", "--sparsity", "0.5", "--curve-samples", "16"];
    ok(&command(arg(&model), arg(&out), &more));
    let dead = root.path().join("dead");
    let table = root.path().join("table.json");
    std::fs::write(&table, r#"{"fc1": 1.0}"#).unwrap();
    let more =
        ["--allocator", "table", "--allocation-table", arg(&table), "--synthetic-calibration"];
    let (code, _, stderr) = run(&command(arg(&model), arg(&dead), &more));
    assert!(code == 2 && stderr.contains("--allow-dead-layers"), "{stderr}");
    ok(&command(
        arg(&model),
        arg(&dead),
        &[&more[..], &["--allow-dead-layers", "--overwrite"]].concat(),
    ));
}
