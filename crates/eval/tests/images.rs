//! Image networks on the data they were trained for: the accuracies that their authors, or whoever
//! measured the copies at hand, state.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use data::images::Images;
use nn::{Input, Mlp, open_network, testing};
use strata_eval::{check_images, classify};
use tensor::host;

/// A path under the shared data, or `None` with a note.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("STRATA_SHARED").map(PathBuf::from);
    let root =
        root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let path = root.join("data").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("SKIPPED: no {} (set STRATA_SHARED); nothing was checked", path.display());
    None
}

#[test]
fn residual_networks_reach_their_accuracy() {
    let Some(data) = shared("cifar10-lossless/test_1017.bin.gz") else { return };
    let images = Images::load(&data, None).unwrap();
    assert_eq!(images.len(), 1017);
    for (name, correct, depth) in [("resnet20", 932, 20), ("resnet32", 944, 32)] {
        let Some(path) = shared(&format!("cifar10-resnets/{name}")) else { return };
        let model = open_network(&path).unwrap();
        assert_eq!(model.network.layers().len(), depth);
        let scores = classify(model.network.as_ref(), model.weights.as_ref(), &images).unwrap();
        println!(
            "{name}: {:.4}, loss {:.4}, {:.2} s",
            scores.accuracy, scores.loss, scores.seconds
        );
        // 91.64 % and 92.82 % of 1017 images.
        assert_eq!(scores.correct, correct, "{name}");
        assert_eq!(scores.classes[3].label, "cat");
        assert_eq!(scores.classes.iter().map(|c| c.images).sum::<usize>(), 1017);
    }
}

#[test]
fn the_small_vision_transformer_reaches_its_accuracy() {
    let (Some(path), Some(data)) =
        (shared("vit-mnist-11k"), shared("mnist/t10k-images-idx3-ubyte.gz"))
    else {
        return;
    };
    let images = Images::load(&data, None).unwrap();
    assert_eq!((images.len(), images.shape), (10_000, [1, 28, 28]));
    let model = open_network(&path).unwrap();
    let scores = classify(model.network.as_ref(), model.weights.as_ref(), &images).unwrap();
    println!("accuracy {:.4}, loss {:.4}, {:.2} s", scores.accuracy, scores.loss, scores.seconds);
    assert_eq!(scores.correct, 8397);
}

#[test]
fn scores_of_a_chain_by_hand() {
    // Two inputs, logits (x0, x1): class 1 where the second pixel is brighter.
    let dir = tempfile::tempdir().unwrap();
    let tensors = [("net.weight".to_string(), vec![2, 2], vec![1.0, 0.0, 0.0, 1.0])];
    testing::write_safetensors(&dir.path().join("model.safetensors"), &tensors).unwrap();
    let model = open_network(dir.path()).unwrap();
    let images =
        Images { shape: [1, 1, 2], pixels: vec![0, 255, 255, 0, 0, 255], labels: vec![1, 0, 0] };
    let (network, w) = (model.network.as_ref(), model.weights.as_ref());
    let scores = classify(network, w, &images).unwrap();
    assert_eq!((scores.correct, scores.images), (2, 3));
    let right = (1.0 + (-1.0f64).exp()).ln();
    assert!((scores.loss - (3.0 * right + 1.0) / 3.0).abs() < 1e-6);
    let input = Input::Images { pixels: &[0.0, 1.0], shape: [1, 1, 1, 2] };
    assert_eq!(host::into_vec(network.predict(w, &input).unwrap()), [0.0, 1.0]);
    let wrong = |images: &Images| check_images(network, images).err().unwrap().to_string();
    assert!(wrong(&Images { labels: vec![1, 0, 2], ..images.clone() }).contains("label 2"));
    assert!(wrong(&Images { shape: [2, 1, 1], ..images }).contains("takes 1 x 1 x 2"));
    assert!(Mlp::of_widths(&[4, 2]).is_ok());
}
