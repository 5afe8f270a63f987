//! What the tests share: temporary directories, networks, calibration, comparisons.

use nn::testing::{random_checkpoint, tiny_config, write_safetensors};
use nn::{Decoder, Family, Model, Name};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use strata_compress::grid::GridOptions;
use strata_compress::{Calibration, Format, Method, Outcome, Plan, QuantizeOptions, Target, run};
use tensor::{Rng, host};

/// A directory that disappears with the test.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("strata-compress-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub const METHODS: [Method; 3] = [Method::Rtn, Method::Gptq, Method::Awq];

/// A tiny config of `family` with some keys set otherwise.
pub fn config(family: Family, changes: Value) -> Value {
    let mut config = tiny_config(family);
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// Every family, and the variants of a block that differ for a quantiser.
pub fn cases() -> Vec<(String, Value)> {
    let plain = Family::ALL.map(|f| (f.model_type().to_string(), tiny_config(f)));
    let mut cases = plain.to_vec();
    let variants = [
        ("llama, one key head per query", Family::Llama, json!({"num_key_value_heads": 4})),
        ("opt, post-norm", Family::Opt, json!({"do_layer_norm_before": false})),
        ("opt, projected embedding", Family::Opt, json!({"word_embed_proj_dim": 16})),
        ("gpt_neox, sequential", Family::GptNeox, json!({"use_parallel_residual": false})),
    ];
    cases.extend(variants.map(|(name, family, keys)| (name.to_string(), config(family, keys))));
    cases
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Reads all tensors of a checkpoint, lets `change` at them and writes them back as a new file.
pub fn edit(dir: &Path, mut change: impl FnMut(&str, &[usize], &mut [f32])) {
    let checkpoint = store::Checkpoint::open(dir).unwrap();
    let mut tensors: Tensors = Vec::new();
    for info in checkpoint.infos() {
        let mut values = checkpoint.f32(&info.name).unwrap();
        change(&info.name, &info.shape, &mut values);
        tensors.push((info.name.clone(), info.shape.clone(), values));
    }
    drop(checkpoint);
    let file = dir.join("model.safetensors");
    let fresh = dir.join("fresh.tmp");
    write_safetensors(&fresh, &tensors).unwrap();
    std::fs::rename(fresh, file).unwrap();
}

/// A random network in which three channels of every norm before linear layers are large and the
/// weights that read them small, as in large models: there AWQ's scales have something to do.
pub fn planted(dir: &Path, config: &Value, seed: u64) {
    const FACTOR: f32 = 12.0;
    const CHANNELS: [usize; 3] = [3, 17, 20];
    random_checkpoint(dir, config, seed).unwrap();
    let decoder = Decoder::from_config(config).unwrap();
    let folds: Vec<_> = (0..decoder.num_blocks()).flat_map(|b| decoder.norm_fold(b)).collect();
    edit(dir, |tensor, _, values| {
        for fold in &folds {
            let norm = &fold.norm;
            let offset = if norm.plus_one && tensor == norm.weight() { 1.0 } else { 0.0 };
            if norm.tensors().iter().any(|name| name == tensor) {
                for channel in CHANNELS {
                    values[channel] = FACTOR * (values[channel] + offset) - offset;
                }
            }
            for name in fold.layers.iter().filter(|name| name.weight() == tensor) {
                for row in 0..name.out_features() {
                    for channel in CHANNELS {
                        values[place(name, row, channel)] /= FACTOR;
                    }
                }
            }
        }
    });
}

/// Where a weight lies in its stored tensor.
pub fn place(name: &Name, row: usize, column: usize) -> usize {
    let [out, width] = name.shape;
    if name.transposed { column * out + row } else { row * width + column }
}

/// `windows` windows of `length` random token ids.
pub fn calibration(windows: usize, length: usize, seed: u64) -> Calibration {
    let mut rng = Rng::new(seed);
    let ids = (0..windows * length).map(|_| rng.below(97) as u32).collect();
    Calibration::new(ids, length).unwrap()
}

pub fn grid(bits: u8, group_size: usize) -> GridOptions {
    GridOptions { bits, group_size, ..Default::default() }
}

pub fn options(method: Method, format: Format, bits: u8) -> QuantizeOptions {
    QuantizeOptions { method, format, grid: grid(bits, 16), ..Default::default() }
}

pub fn target(out: &Path, resume: bool) -> Target<'_> {
    Target { out, resume, overwrite: false, provenance: json!({"command": "test"}) }
}

/// Quantises `input` into `out`.
pub fn try_quantize(
    input: &Path,
    out: &Path,
    resume: bool,
    options: &QuantizeOptions,
    calibration: &Calibration,
) -> strata_compress::Result<Outcome> {
    let model = Model::open(input)?;
    let plan = Plan::new(&model.decoder, &model.checkpoint, options)?;
    let progress = report::Progress::hidden();
    run(&model, &plan, options, calibration, &target(out, resume), &progress)
}

pub fn quantize(
    input: &Path,
    out: &Path,
    options: &QuantizeOptions,
    calibration: &Calibration,
) -> Outcome {
    try_quantize(input, out, false, options, calibration).unwrap()
}

/// The message of a job that must be refused.
pub fn refusal(input: &Path, options: &QuantizeOptions, calibration: &Calibration) -> String {
    let scratch = Scratch::new();
    let out = scratch.path("out");
    let message = match try_quantize(input, &out, false, options, calibration) {
        Ok(_) => panic!("{:?} into {:?} was not refused", options.method, options.format),
        Err(error) => error.to_string(),
    };
    assert!(!out.exists(), "a refused job left an output");
    message
}

/// Logits of a checkpoint on fixed tokens, all of them finite.
pub fn logits(dir: &Path) -> Vec<f32> {
    let mut rng = Rng::new(99);
    let tokens: Vec<u32> = (0..48).map(|_| rng.below(97) as u32).collect();
    let logits = host::into_vec(Model::open(dir).unwrap().logits(&tokens, 3).unwrap());
    assert!(logits.iter().all(|x| x.is_finite()), "{}: logits are not finite", dir.display());
    logits
}

/// Largest difference, relative to the largest value of `reference`.
pub fn distance(values: &[f32], reference: &[f32]) -> f32 {
    assert_eq!(values.len(), reference.len());
    let largest = reference.iter().fold(0f32, |m, x| m.max(x.abs()));
    let apart = values.iter().zip(reference).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    apart / largest
}

pub fn linears(decoder: &Decoder) -> Vec<Name> {
    (0..decoder.num_blocks()).flat_map(|block| decoder.linears(block)).collect()
}

/// A linear layer of a checkpoint as `[out, in]`, plain or packed.
pub fn matrix(model: &Model, name: &Name) -> Vec<f32> {
    host::into_vec(model.weights.matrix(name).unwrap())
}

/// Name, type, shape and bytes of every tensor.
pub fn tensors(dir: &Path) -> Vec<(String, store::Dtype, Vec<usize>, Vec<u8>)> {
    let checkpoint = store::Checkpoint::open(dir).unwrap();
    checkpoint
        .infos()
        .map(|info| {
            let bytes = checkpoint.bytes(&info.name).unwrap().into_owned();
            (info.name.clone(), info.dtype, info.shape.clone(), bytes)
        })
        .collect()
}

/// Panics with the name of the first tensor that differs.
pub fn assert_same_tensors(a: &Path, b: &Path, case: &str) {
    let (a, b) = (tensors(a), tensors(b));
    assert_eq!(a.len(), b.len(), "{case}");
    for (a, b) in a.iter().zip(&b) {
        assert_eq!((&a.0, a.1, &a.2), (&b.0, b.1, &b.2), "{case}");
        assert!(a.3 == b.3, "{case}: the bytes of {} differ", a.0);
    }
}
