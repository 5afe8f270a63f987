//! Rotated weights compute the same function: in f32 through the library's own forward pass, and in
//! f64 through a small forward pass written here, which no rounding can hide behind.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod reference;

use std::path::{Path, PathBuf};

use reference::{Double, logits_f64};
use serde_json::{Value, json};
use strata_nn as nn;

use nn::testing::{random_checkpoint, tiny_config};
use nn::{
    Batch, CheckpointWeights, Context, Decoder, Family, Leaf, Model, Name, Role, Rotated,
    RotationKind, Taps, Weights,
};
use tensor::{Device, Tensor, host};

struct Folder(PathBuf);

impl Folder {
    fn new(label: &str) -> Self {
        let path = std::env::temp_dir().join(format!("strata-rot-{}-{label}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn merged(family: Family, extra: Value) -> Value {
    let mut config = tiny_config(family);
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    config
}

/// Every kind of network that can be rotated: name and config.
fn networks() -> Vec<(String, Value)> {
    let mut all = Vec::new();
    let plain = [
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gpt2,
        Family::GptNeox,
        Family::Opt,
    ];
    for family in plain {
        for tied in [true, false] {
            let name = format!("{}-{}", family.model_type(), if tied { "tied" } else { "untied" });
            all.push((name, merged(family, json!({"tie_word_embeddings": tied}))));
        }
    }
    let more = [
        ("opt-without-biases", Family::Opt, json!({"enable_bias": false})),
        ("opt-projected", Family::Opt, json!({"word_embed_proj_dim": 24})),
        ("neox-sequential", Family::GptNeox, json!({"use_parallel_residual": false})),
        ("llama-heads-of-6", Family::Llama, json!({"head_dim": 6})),
        // 52 = 2 (25 + 1) has no construction here.
        ("llama-width-52", Family::Llama, json!({"hidden_size": 52})),
        ("gpt2-width-52", Family::Gpt2, json!({"n_embd": 52})),
        ("llama-width-12", Family::Llama, json!({"hidden_size": 12})),
        ("gpt2-width-28", Family::Gpt2, json!({"n_embd": 28})),
    ];
    all.extend(more.into_iter().map(|(name, family, extra)| (name.into(), merged(family, extra))));
    all
}

fn open(label: &str, config: &Value) -> (Folder, Model) {
    let folder = Folder::new(label);
    random_checkpoint(&folder.0, config, 5).unwrap();
    let model = Model::open(&folder.0).unwrap();
    (folder, model)
}

fn rotated(path: &Path, kind: RotationKind, seed: u64) -> Rotated<'static> {
    let model = Model::open(path).unwrap();
    Rotated::new(model.weights, &model.decoder, kind, seed).unwrap()
}

fn logits(decoder: &Decoder, weights: &dyn Weights, ids: &[u32], sequences: usize) -> Vec<f32> {
    let mut context = Context::new(Batch::of(ids.len(), sequences).unwrap());
    host::into_vec(decoder.logits(weights, ids, &mut context, &mut Taps::none()).unwrap())
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 37 + 11) % 97).collect()
}

/// Largest difference, relative to the largest value.
fn distance<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().map(|&v| v.into().abs()).fold(0.0, f64::max);
    let off = a.iter().zip(b).map(|(&a, &b)| (a.into() - b.into()).abs()).fold(0.0, f64::max);
    off / largest
}

#[test]
fn rotated_networks_compute_the_same_logits() {
    let ids = tokens(18);
    for (label, config) in networks() {
        let (folder, model) = open(&format!("same-{label}"), &config);
        let before = logits(&model.decoder, model.weights.as_ref(), &ids, 2);
        for kind in [RotationKind::Hadamard, RotationKind::Random] {
            let weights = rotated(&folder.0, kind, 3);
            let after = logits(weights.decoder(), &weights, &ids, 2);
            let off = distance(&before, &after);
            assert!(off < 1e-4, "{label} {kind:?}: {off}");
        }
    }
}

/// The double-precision view of weights.
struct Plain<'a>(&'a dyn Weights);

impl Double for Plain<'_> {
    fn matrix(&self, name: &Name) -> Vec<f64> {
        host::into_vec(self.0.matrix(name).unwrap()).into_iter().map(f64::from).collect()
    }
    fn vector(&self, name: &Name, leaf: Leaf) -> Vec<f64> {
        host::into_vec(self.0.vector(name, leaf).unwrap()).into_iter().map(f64::from).collect()
    }
}

impl Double for Rotated<'_> {
    fn matrix(&self, name: &Name) -> Vec<f64> {
        self.matrix_f64(name).unwrap()
    }
    fn vector(&self, name: &Name, leaf: Leaf) -> Vec<f64> {
        self.vector_f64(name, leaf).unwrap()
    }
}

#[test]
fn folding_and_rotating_are_identities_in_double_precision() {
    let ids = tokens(7);
    for (label, config) in networks() {
        let (folder, model) = open(&format!("f64-{label}"), &config);
        let before = logits_f64(&model.decoder, &Plain(model.weights.as_ref()), &ids);
        // The forward pass here is the same network as the library's.
        let library = logits(&model.decoder, model.weights.as_ref(), &ids, 1);
        let single: Vec<f32> = before.iter().map(|&v| v as f32).collect();
        assert!(distance(&library, &single) < 1e-4, "{label}");
        for kind in [RotationKind::Hadamard, RotationKind::Random] {
            let weights = rotated(&folder.0, kind, 11);
            let off = distance(&before, &logits_f64(weights.decoder(), &weights, &ids));
            assert!(off < 1e-9, "{label} {kind:?}: {off}");
        }
    }
}

/// The sample model of the project: head tied, grouped-query attention, f16 weights.
#[test]
fn the_sample_model_keeps_its_logits() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../samples/almanac-3m");
    let model = Model::open(&path).unwrap();
    let ids: Vec<u32> = (0..48).map(|i| (i * 131 + 7) % 2048).collect();
    let before = logits(&model.decoder, model.weights.as_ref(), &ids, 2);
    let weights = rotated(&path, RotationKind::Hadamard, 0);
    // From a working copy: every matrix is asked for once.
    let mut copy = nn::Overlay::new(&weights);
    copy.load(weights.decoder().all_names()).unwrap();
    let after = logits(weights.decoder(), &copy, &ids, 2);
    let off = distance(&before, &after);
    assert!(off < 1e-4, "{off}");
    assert!(weights.warnings().is_empty());
}

/// Weights whose embedding rows are all 16 in channel 5 and 0 elsewhere.
struct Planted(CheckpointWeights);

impl Weights for Planted {
    fn linear(&self, name: &Name, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        self.0.linear(name, x)
    }
    fn matrix(&self, name: &Name) -> nn::Result<Tensor<2>> {
        self.0.matrix(name)
    }
    fn vector(&self, name: &Name, leaf: Leaf) -> nn::Result<Tensor<1>> {
        self.0.vector(name, leaf)
    }
    fn embed(&self, name: &Name, ids: &[u32]) -> nn::Result<Tensor<2>> {
        let width = name.shape[1];
        let rows = (0..ids.len() * width).map(|at| if at % width == 5 { 16.0 } else { 0.0 });
        Ok(host::from_vec(rows.collect(), [ids.len(), width], &self.0.device()))
    }
    fn device(&self) -> Device {
        self.0.device()
    }
}

#[test]
fn norms_become_plain_and_outliers_are_spread() {
    let config = merged(Family::Llama, json!({}));
    let folder = Folder::new("spread");
    random_checkpoint(&folder.0, &config, 5).unwrap();
    let weights = rotated(&folder.0, RotationKind::Hadamard, 0);
    let names = weights.decoder().names(0).unwrap().clone();
    assert!(weights.vector_f64(&names.norm1, Leaf::Weight).unwrap().iter().all(|g| *g == 1.0));
    // An embedding row with a single large entry: all its energy ends up spread evenly.
    let base = CheckpointWeights::new(store::Checkpoint::open(&folder.0).unwrap()).unwrap();
    let source = Model::open(&folder.0).unwrap().decoder;
    let kind = RotationKind::Hadamard;
    let spread = Rotated::new(Box::new(Planted(base)), &source, kind, 0).unwrap();
    let embed = &weights.decoder().embed;
    let row = host::into_vec(spread.embed(embed, &[0]).unwrap());
    let even = 16.0 / 32f32.sqrt();
    assert!(row.iter().all(|v| (v.abs() - even).abs() < 1e-5), "{row:?}");
}

#[test]
fn what_cannot_be_rotated_is_refused() {
    for (family, extra, said) in [
        (Family::Gemma2, json!({}), "branches"),
        (Family::Opt, json!({"do_layer_norm_before": false}), "post-norm"),
        (Family::Opt, json!({"_remove_final_layer_norm": true}), "final norm"),
    ] {
        let (_folder, model) = open(&format!("refuse-{said}"), &merged(family, extra));
        let error = Rotated::new(model.weights, &model.decoder, RotationKind::Hadamard, 0);
        let message = error.err().unwrap().to_string();
        assert!(message.contains(said) && message.contains("--rotation none"), "{message}");
    }
}

#[test]
fn fallbacks_are_said() {
    let width = merged(Family::Llama, json!({"hidden_size": 52}));
    let (folder, _) = open("said-52", &width);
    let weights = rotated(&folder.0, RotationKind::Hadamard, 0);
    assert!(weights.warnings()[0].contains("order 52"), "{:?}", weights.warnings());
    assert!(weights.description().contains("random orthogonal"), "{}", weights.description());
    let heads = merged(Family::Llama, json!({"head_dim": 6}));
    let (folder, _) = open("said-heads", &heads);
    let weights = rotated(&folder.0, RotationKind::Hadamard, 0);
    assert!(weights.warnings()[0].contains("heads of 6"), "{:?}", weights.warnings());
    assert!(!weights.description().contains("value"), "{}", weights.description());
}

/// A head of its own, under the name that loaders look for; bare checkpoints get the usual prefix.
#[test]
fn untied_heads_have_the_usual_names() {
    let (folder, model) = open("names", &merged(Family::Gpt2, json!({})));
    let weights = rotated(&folder.0, RotationKind::Hadamard, 0);
    assert_eq!(weights.decoder().head.weight(), "lm_head.weight");
    assert_eq!(weights.decoder().embed.weight(), "transformer.wte.weight");
    let config = weights.config(model.checkpoint.config().unwrap());
    assert_eq!(config["tie_word_embeddings"], false);
    assert_eq!(weights.source_name(&weights.decoder().head).unwrap().role, Role::Head);
    // The same tensors without the prefix.
    let bare = Folder::new("bare");
    let tensors: Vec<_> = model
        .decoder
        .all_names()
        .iter()
        .flat_map(|name| name.tensors())
        .map(|tensor| {
            let info = model.checkpoint.info(&tensor).unwrap();
            let short = tensor.strip_prefix("transformer.").unwrap().to_string();
            (short, info.shape.clone(), model.checkpoint.f32(&tensor).unwrap())
        })
        .collect();
    nn::testing::write_safetensors(&bare.0.join("model.safetensors"), &tensors).unwrap();
    std::fs::copy(folder.0.join("config.json"), bare.0.join("config.json")).unwrap();
    let weights = rotated(&bare.0, RotationKind::Hadamard, 0);
    assert_eq!(weights.decoder().embed.weight(), "transformer.wte.weight");
    let source = weights.source_name(&weights.decoder().blocks[1].down).unwrap();
    assert_eq!(source.module, "h.1.mlp.c_proj");
    let ids = tokens(9);
    let before = logits(&model.decoder, model.weights.as_ref(), &ids, 1);
    assert!(distance(&before, &logits(weights.decoder(), &weights, &ids, 1)) < 1e-4);
}
