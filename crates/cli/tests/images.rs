//! Image networks as a user meets them: inspect and eval.

mod common;

use common::{arg, ok, ok_json, run, shared, tiny_model};
use nn::{ResNet, testing};

/// Four images of 3 x 32 x 32 in CIFAR-10's records.
fn records(labels: &[u8]) -> Vec<u8> {
    let pixels = |label: u8| (0..3072u32).map(move |i| (i * 7 + u32::from(label) * 31) as u8);
    labels.iter().flat_map(|&label| std::iter::once(label).chain(pixels(label))).collect()
}

#[test]
fn a_residual_network_is_inspected_and_evaluated() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    let network = ResNet::cifar(8, 10).unwrap();
    testing::random_network(&model, &network, None, 1).unwrap();
    let tree = ok(&["inspect", arg(&model)]);
    for text in ["resnet", "images of 3 x 32 x 32, 10 classes", "16 × 3 × 3 × 3", "batch_norm"] {
        assert!(tree.contains(text), "{text}\n{tree}");
    }
    let layers = ok_json(&["inspect", arg(&model), "--layers", "--json"]);
    let layers = layers["layers"].as_array().unwrap();
    let stem = layers.iter().find(|l| l["name"] == "conv1").unwrap();
    assert_eq!((&stem["role"], &stem["parameters"]), (&"stem".into(), &432.into()));
    assert_eq!(layers.len(), 2 * 7 + 1);

    let data = root.path().join("test.bin");
    std::fs::write(&data, records(&[1, 7, 3, 7])).unwrap();
    let scores =
        ok_json(&["eval", arg(&model), "--task", "images", "--data", arg(&data), "--json"]);
    assert_eq!(scores["images"], 4);
    let correct = scores["correct"].as_u64().unwrap();
    assert_eq!(scores["accuracy"], correct as f64 / 4.0);
    assert!(scores["loss"].as_f64().unwrap() > 0.0);
    assert_eq!(scores["classes"][7]["images"], 2);
    let eval = ["eval", arg(&model), "--task", "images", "--data", arg(&data)];
    assert!(ok(&[&eval[..], &["--images", "2"]].concat()).contains("top-1 accuracy"));
    let (code, _, stderr) = run(&[&eval[..], &["--at-least", "1.01"]].concat());
    assert_eq!(code, 1);
    assert!(stderr.contains("top-1 accuracy"), "{stderr}");

    std::fs::write(&data, &records(&[1])[..3000]).unwrap();
    let (code, _, stderr) = run(&eval);
    assert_eq!(code, 2);
    assert!(stderr.contains("test.bin") && stderr.contains("3073"), "{stderr}");
    let (code, _, stderr) = run(&["eval", arg(&model), "--task", "images"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--data"), "{stderr}");
}

#[test]
fn a_language_model_takes_no_images_and_an_unknown_model_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    let data = root.path().join("test.bin");
    std::fs::write(&data, records(&[1])).unwrap();
    let eval = |model: &str| run(&["eval", model, "--task", "images", "--data", arg(&data)]);
    let (code, _, stderr) = eval(arg(&model));
    assert_eq!(code, 2);
    assert!(stderr.contains("takes token ids"), "{stderr}");
    std::fs::write(model.join("config.json"), r#"{"model_type": "t5"}"#).unwrap();
    let (code, _, stderr) = eval(arg(&model));
    assert_eq!(code, 2);
    assert!(stderr.contains("t5") && stderr.contains("resnet, vit, mlp"), "{stderr}");
}

#[test]
fn real_networks_reach_their_accuracy() {
    let (Some(model), Some(data)) =
        (shared("cifar10-resnets/resnet20"), shared("cifar10-lossless/test_1017.bin.gz"))
    else {
        return;
    };
    let scores =
        ok_json(&["eval", arg(&model), "--task", "images", "--data", arg(&data), "--json"]);
    assert_eq!((&scores["correct"], &scores["images"]), (&932.into(), &1017.into()));
    assert!(ok(&["inspect", arg(&model), "--layers"]).contains("layer3.2.conv2"));
}
