//! What every family must do, on tiny random networks: pass by pieces or whole, with and without
//! taps, cached or not, folded or not. Agreement with transformers is `tests/interop`.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use strata_nn as nn;

use nn::generate::{Picker, advance};
use nn::testing::{random_checkpoint, tiny_checkpoint, tiny_config};
use nn::{
    Batch, BlockState, CheckpointWeights, Context, Decoder, Error, Family, KvCache, Leaf, Model,
    Overlay, Point, Prev, Record, Replace, Sampling, Site, Stage, Tap, Taps, Weights, generate,
};
use serde_json::json;
use tensor::{Tensor, host};

/// A directory that goes away with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(label: &str) -> Self {
        let name = format!("strata-nn-{}-{label}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tiny(family: Family, label: &str) -> (Folder, Model) {
    let folder = Folder::new(&format!("{label}-{}", family.model_type()));
    tiny_checkpoint(&folder.0, family, 7).unwrap();
    let model = Model::open(&folder.0).unwrap();
    (folder, model)
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 37 + 11) % 97).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn values(x: Tensor<2>) -> Vec<f32> {
    host::into_vec(x)
}

#[test]
fn stages_taps_and_overlay_leave_the_function_alone() {
    for family in Family::ALL {
        let (_folder, model) = tiny(family, "stages");
        let ids = tokens(2 * 9);
        let whole = values(model.logits(&ids, 2).unwrap());
        assert!(whole.iter().all(|v| v.is_finite()));
        // Stage by stage, from a working copy of every block.
        let (decoder, weights) = (&model.decoder, model.weights.as_ref());
        let batch = Batch::new(2, 9);
        let mut overlay = Overlay::new(weights);
        overlay.load(decoder.all_names()).unwrap();
        let mut ctx = Context::new(batch);
        let mut taps = Taps::none();
        let mut x = decoder.embed(&overlay, &ids, &ctx, &mut taps).unwrap();
        for i in 0..decoder.num_blocks() {
            let sets = decoder.linear_sets(i);
            let mut state = BlockState::new(x);
            for (n, stage) in Stage::ALL.into_iter().enumerate() {
                state = decoder.stage(i, stage, &overlay, state, &mut ctx, &mut taps).unwrap();
                if let Some(set) = sets.get(n) {
                    assert!(set.iter().all(|l| l.in_features() == state.x.dims()[1]));
                }
            }
            x = state.resid;
        }
        let x = decoder.finish(&overlay, x, &batch, &mut taps).unwrap();
        let staged = decoder.head_logits(&overlay, x, &batch, &mut taps).unwrap();
        assert!(largest_difference(&whole, &values(staged)) < 1e-4, "{family:?}");
        // Watching scores takes the composed attention.
        let mut record = Record::every(Point::AttnScores, 2);
        let watched = model.tapped_logits(&ids, 2, &mut Taps::one(&mut record)).unwrap();
        assert!(largest_difference(&whole, &values(watched)) < 1e-4, "{family:?}");
        let scores = record.seen.get(&Site::block(1, Point::AttnScores)).unwrap();
        assert_eq!(scores.dims(), [2 * 4 * 9, 9]);
        let scores = values(scores.clone());
        assert!(scores[1] == f32::NEG_INFINITY && scores[0].is_finite());
    }
}

#[test]
fn taps_see_and_replace_in_order() {
    let (_folder, model) = tiny(Family::Llama, "taps");
    let ids = tokens(6);
    let site = Site::block(0, Point::MlpOut);
    let mut zero = Replace::new(site, |_: &Batch, x: Tensor<2>| Ok(x * 0.0));
    let mut seen =
        Record::new([site, Site::block(0, Point::ResidMid), Site::block(0, Point::ResidPost)]);
    let mut taps = Taps(vec![&mut zero as &mut dyn Tap, &mut seen]);
    let changed = values(model.tapped_logits(&ids, 1, &mut taps).unwrap());
    drop(taps);
    let at = |point| values(seen.seen.get(&Site::block(0, point)).unwrap().clone());
    assert!(at(Point::MlpOut).iter().all(|v| *v == 0.0));
    assert_eq!(at(Point::ResidMid), at(Point::ResidPost));
    let plain = values(model.logits(&ids, 1).unwrap());
    assert!(largest_difference(&plain, &changed) > 1e-3);
    let mut wrong = Replace::new(site, |_: &Batch, x: Tensor<2>| Ok(x.narrow(0, 0, 1)));
    let error = model.tapped_logits(&ids, 1, &mut Taps::one(&mut wrong)).unwrap_err();
    assert!(error.to_string().contains("blocks.0.hook_mlp_out"), "{error}");
}

#[test]
fn cached_generation_equals_uncached() {
    for family in Family::ALL {
        let (_folder, model) = tiny(family, "cache");
        let prompt = tokens(7);
        let cached = generate(&model, &prompt, &Sampling::greedy(12), &[], &mut |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
        let mut all = prompt.clone();
        for expected in &cached {
            let logits = values(model.logits(&all, 1).unwrap());
            let last = &logits[logits.len() - 97..];
            let token = nn::generate::argmax(last);
            assert_eq!(token, *expected, "{family:?} after {} tokens", all.len());
            all.push(token);
        }
        // One by one, in two chunks, or whole: the same last logits.
        let whole = values(model.logits(&prompt, 1).unwrap());
        let whole = &whole[6 * 97..];
        for chunks in [vec![7], vec![3, 4], vec![1; 7], vec![4, 1, 2]] {
            let mut cache = KvCache::new(&model.decoder, 7).unwrap();
            let (mut start, mut last) = (0, Vec::new());
            for chunk in chunks {
                last = advance(&model, &prompt[start..start + chunk], &mut cache).unwrap();
                start += chunk;
            }
            assert!(largest_difference(whole, &last) < 1e-4, "{family:?}");
            assert!(advance(&model, &[1], &mut cache).is_err(), "the cache is full");
            cache.truncate(3);
            let again = advance(&model, &prompt[3..], &mut cache).unwrap();
            assert!(largest_difference(whole, &again) < 1e-4, "{family:?}");
        }
    }
}

#[test]
fn sampling_is_deterministic_and_obeys_its_limits() {
    let (_folder, model) = tiny(Family::Llama, "sampling");
    let prompt = tokens(4);
    let run = |s: &Sampling, stop: &[u32]| {
        generate(&model, &prompt, s, stop, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    let hot = Sampling { temperature: 1.5, seed: 3, max_tokens: 20, ..Sampling::default() };
    let first = run(&hot, &[]);
    assert_eq!(first, run(&hot, &[]));
    assert_ne!(first, run(&Sampling { seed: 4, ..hot.clone() }, &[]));
    let greedy = run(&Sampling::greedy(20), &[]);
    assert_eq!(greedy.len(), 20);
    assert_eq!(greedy, run(&Sampling { top_k: 1, ..hot.clone() }, &[]));
    assert_eq!(greedy, run(&Sampling { top_p: 1e-6, ..hot.clone() }, &[]));
    // A stop id ends before itself; the callback can end after a token.
    let at = greedy.iter().position(|t| *t == greedy[5]).unwrap();
    assert_eq!(run(&Sampling::greedy(20), &[greedy[5]]), greedy[..at]);
    let mut count = 0;
    let broken = generate(&model, &prompt, &Sampling::greedy(20), &[], &mut |_| {
        count += 1;
        if count == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(broken.unwrap(), greedy[..3]);
    // A large penalty never repeats within the vocabulary.
    let penalised = Sampling { repetition_penalty: 1e9, ..Sampling::greedy(30) };
    let mut all = prompt.clone();
    all.extend(run(&penalised, &[]));
    let distinct: std::collections::HashSet<_> = all.iter().collect();
    assert!(distinct.len() > 25);
    for bad in [
        Sampling { temperature: -1.0, ..hot.clone() },
        Sampling { top_p: 0.0, ..hot.clone() },
        Sampling { repetition_penalty: f32::NAN, ..hot.clone() },
    ] {
        assert!(generate(&model, &prompt, &bad, &[], &mut |_| ControlFlow::Continue(())).is_err());
    }
}

#[test]
fn picking_by_hand() {
    // exp(2), exp(1), exp(0), exp(-1) over their sum: 0.644, 0.237, 0.087, 0.032.
    let logits = [1.0f32, 2.0, 0.0, -1.0];
    let draw = |s: &Sampling| {
        let mut picker = Picker::new(s, &[]);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[picker.pick(&mut logits.clone()).unwrap() as usize] += 1;
        }
        counts.map(|c| c as f64 / 4000.0)
    };
    let all = draw(&Sampling::default());
    for (share, expected) in all.iter().zip([0.237, 0.644, 0.087, 0.032]) {
        assert!((share - expected).abs() < 0.03, "{all:?}");
    }
    let two = draw(&Sampling { top_k: 2, ..Sampling::default() });
    assert!((two[1] - 0.731).abs() < 0.03 && two[2] == 0.0 && two[3] == 0.0, "{two:?}");
    // 0.644 + 0.237 = 0.881 >= 0.85: two tokens are enough; for 0.9 it takes three.
    let p = draw(&Sampling { top_p: 0.85, ..Sampling::default() });
    assert!(p[2] == 0.0 && p[0] > 0.0, "{p:?}");
    assert!(draw(&Sampling { top_p: 0.9, ..Sampling::default() })[2] > 0.0);
    // Token 1 seen, penalty 4: 2 becomes 0.5, so token 0 wins; token 3 would go to -4.
    let penalty = Sampling { repetition_penalty: 4.0, ..Sampling::greedy(1) };
    let mut changed = logits;
    assert_eq!(Picker::new(&penalty, &[1, 3, 3]).pick(&mut changed).unwrap(), 0);
    assert_eq!(changed, [1.0, 0.5, 0.0, -4.0]);
    assert!(Picker::new(&penalty, &[]).pick(&mut [f32::NAN]).is_err());
}

/// A fixed, uneven, positive scale per column.
fn scale(width: usize) -> Vec<f32> {
    (0..width).map(|c| 0.5 + (c * 7 % 13) as f32 / 6.0).collect()
}

fn vector(overlay: &mut Overlay<'_>, name: &str, f: impl Fn(usize, f32) -> f32) {
    let old = host::into_vec(overlay.vectors.get(name).unwrap().clone());
    let new: Vec<f32> = old.into_iter().enumerate().map(|(i, v)| f(i, v)).collect();
    let length = new.len();
    let device = overlay.device();
    overlay.vectors.insert(name.to_string(), host::from_vec(new, [length], &device));
}

fn matrix(overlay: &mut Overlay<'_>, name: &str, f: impl Fn(usize, usize, f32) -> f32) {
    let old = overlay.matrices.get(name).unwrap().clone();
    let shape = old.dims();
    let new = host::into_vec(old)
        .into_iter()
        .enumerate()
        .map(|(i, v)| f(i / shape[1], i % shape[1], v))
        .collect();
    let device = overlay.device();
    overlay.matrices.insert(name.to_string(), host::from_vec(new, shape, &device));
}

fn divide_norm(overlay: &mut Overlay<'_>, norm: &nn::Name, s: &[f32]) {
    let one = if norm.plus_one { 1.0 } else { 0.0 };
    vector(overlay, &norm.weight(), |i, v| (v + one) / s[i] - one);
    if let Some(bias) = norm.bias_name() {
        vector(overlay, &bias, |i, v| v / s[i]);
    }
}

#[test]
fn folding_along_the_mappings_changes_nothing() {
    let post_norm = json!({"do_layer_norm_before": false, "word_embed_proj_dim": 24});
    let sequential = json!({"use_parallel_residual": false});
    let variants = Family::ALL
        .map(|f| (f, json!({})))
        .into_iter()
        .chain([(Family::Opt, post_norm), (Family::GptNeox, sequential)]);
    for (n, (family, extra)) in variants.enumerate() {
        let folder = Folder::new(&format!("fold-{n}"));
        let mut config = tiny_config(family);
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        random_checkpoint(&folder.0, &config, 5).unwrap();
        let model = Model::open(&folder.0).unwrap();
        let decoder = &model.decoder;
        let mut overlay = Overlay::new(model.weights.as_ref());
        overlay.load(decoder.all_names()).unwrap();
        let mut folds = 0;
        for i in 0..decoder.num_blocks() {
            let sets = decoder.linear_sets(i);
            for mapping in decoder.mappings(i) {
                assert_eq!(mapping.layers, sets[mapping.set]);
                let mut s = scale(mapping.layers[0].in_features());
                match &mapping.prev {
                    Prev::Activation => continue,
                    Prev::Norm(norm) => divide_norm(&mut overlay, norm, &s),
                    Prev::Linear { name, rows, grouped } => {
                        let mut by_row = vec![1.0; name.out_features()];
                        for (c, &row) in rows.iter().enumerate() {
                            by_row[row] = s[c];
                        }
                        for (c, &row) in rows.iter().enumerate() {
                            assert!(*grouped || by_row[row] == s[c]);
                            s[c] = by_row[row];
                        }
                        matrix(&mut overlay, &name.weight(), |r, _, v| v / by_row[r]);
                        if let Some(bias) = name.bias_name() {
                            vector(&mut overlay, &bias, |r, v| v / by_row[r]);
                        }
                    }
                }
                for layer in &mapping.layers {
                    matrix(&mut overlay, &layer.weight(), |_, c, v| v * s[c]);
                }
                folds += 1;
            }
            // Norm folds: the whole gain moves into the layers.
            for fold in decoder.norm_fold(i) {
                let gain = host::into_vec(overlay.vector(&fold.norm, Leaf::Weight).unwrap());
                let one = if fold.norm.plus_one { 1.0 } else { 0.0 };
                let gain: Vec<f32> = gain.into_iter().map(|g| g + one).collect();
                divide_norm(&mut overlay, &fold.norm, &gain);
                for layer in &fold.layers {
                    matrix(&mut overlay, &layer.weight(), |_, c, v| v * gain[c]);
                }
            }
        }
        assert!(folds >= 4, "{family:?}");
        let ids = tokens(10);
        let plain = values(model.logits(&ids, 1).unwrap());
        let mut ctx = Context::new(Batch::new(1, 10));
        let folded = decoder.logits(&overlay, &ids, &mut ctx, &mut Taps::none()).unwrap();
        let size = plain.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let error = largest_difference(&plain, &values(folded)) / size;
        assert!(error < 1e-5, "{family:?} {extra}: {error}");
    }
}

#[test]
fn names_cover_the_checkpoint_exactly() {
    for family in Family::ALL {
        let (_folder, model) = tiny(family, "names");
        let decoder = &model.decoder;
        let mut listed = decoder.other_tensors();
        (0..decoder.num_blocks()).for_each(|i| listed.extend(decoder.block_tensors(i)));
        listed.sort();
        let stored: Vec<String> = model.checkpoint.names().map(str::to_string).collect();
        assert_eq!(listed, stored, "{family:?}");
        for tensor in &stored {
            let name = decoder.name_of(tensor).unwrap();
            assert!(name.tensors().contains(tensor));
        }
        assert!(decoder.name_of("nothing.weight").is_none());
        assert!(decoder.linears(9).is_empty() && decoder.names(9).is_err());
    }
    let decoder = Decoder::from_config(&tiny_config(Family::Gpt2)).unwrap();
    assert!(decoder.is_buffer("transformer.h.0.attn.bias"));
    assert!(!decoder.is_buffer("transformer.h.0.attn.c_attn.bias"));
}

#[test]
fn names_with_other_prefixes_are_found() {
    for (family, from, to) in [
        (Family::Gpt2, "transformer.", ""),
        (Family::Llama, "model.", "language_model.model."),
        (Family::Opt, "model.decoder.", "decoder."),
    ] {
        let (folder, model) = tiny(family, "prefix");
        let expected = values(model.logits(&tokens(5), 1).unwrap());
        let tensors: Vec<_> = model
            .checkpoint
            .names()
            .map(|name| {
                let shape = model.checkpoint.info(name).unwrap().shape.clone();
                let renamed = match name.strip_prefix(from) {
                    Some(rest) => format!("{to}{rest}"),
                    None => format!("{}{name}", to.strip_suffix(from).unwrap_or("")),
                };
                (renamed, shape, model.checkpoint.f32(name).unwrap())
            })
            .collect();
        drop(model);
        nn::testing::write_safetensors(&folder.0.join("model.safetensors"), &tensors).unwrap();
        let model = Model::open(&folder.0).unwrap();
        assert_eq!(values(model.logits(&tokens(5), 1).unwrap()), expected);
        assert_eq!(model.decoder.prefix, to);
    }
}

#[test]
fn refusals_name_what_is_wrong() {
    let message =
        |config: &serde_json::Value| Decoder::from_config(config).unwrap_err().to_string();
    let unknown = message(&json!({"model_type": "rwkv"}));
    assert!(unknown.contains("rwkv") && unknown.contains("gpt_neox"), "{unknown}");
    for (key, value) in [
        ("num_key_value_heads", json!(3)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!("x")),
        ("vocab_size", json!(1u64 << 40)),
        ("num_hidden_layers", json!(1 << 20)),
        ("head_dim", json!(7)),
        ("hidden_act", json!("quick")),
        ("rms_norm_eps", json!("tiny")),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
        ("attention_bias", json!(1)),
    ] {
        let mut config = tiny_config(Family::Llama);
        config[key] = value.clone();
        let text = message(&config);
        assert!(text.contains(key), "{key} = {value}: {text}");
    }
    let mut config = tiny_config(Family::Llama);
    config.as_object_mut().unwrap().remove("vocab_size");
    assert!(message(&config).contains("vocab_size"));
    let mut config = tiny_config(Family::GptNeox);
    config["num_attention_heads"] = json!(5);
    assert!(message(&config).contains("num_attention_heads"));

    let (folder, model) = tiny(Family::Llama, "refusals");
    for bad in [&[97][..], &[], &[1, 2, 3]] {
        assert!(matches!(model.logits(bad, 2), Err(Error::Input(_))), "{bad:?}");
    }
    let open = |config: &serde_json::Value| {
        std::fs::write(folder.0.join("config.json"), config.to_string()).unwrap();
        match Model::open(&folder.0) {
            Ok(_) => panic!("opened"),
            Err(error) => error,
        }
    };
    let mut config = tiny_config(Family::Llama);
    config["intermediate_size"] = json!(40);
    assert!(matches!(open(&config), Error::Shape { name, .. } if name.contains("gate_proj")));
    let mut config = tiny_config(Family::Llama);
    config["num_hidden_layers"] = json!(3);
    assert!(matches!(open(&config), Error::Missing { name, .. } if name.contains("layers.2")));
    let (_folder, model) = tiny(Family::Gpt2, "positions");
    let error = model.logits(&tokens(65), 1).unwrap_err().to_string();
    assert!(error.contains("64"), "{error}");
}

/// Packs every linear layer of a tiny network at 4 bits and groups of 8, and compares the integer
/// products with the same network dequantised.
#[test]
fn packed_checkpoints_compute_what_their_codes_say() {
    use store::packed::{Layout, QuantConfig, QuantizedMatrix, config_json, pack};
    let folder = Folder::new("packed");
    let mut config = tiny_config(Family::Qwen2);
    config["intermediate_size"] = json!(64);
    random_checkpoint(&folder.0, &config, 3).unwrap();
    let model = Model::open(&folder.0).unwrap();
    let decoder = &model.decoder;
    let linears: Vec<_> = (0..2).flat_map(|i| decoder.linears(i)).collect();
    let mut dense = Overlay::new(model.weights.as_ref());
    let settings = store::WriteOptions::default();
    let out = folder.0.join("packed");
    let mut writer = store::Writer::create(&out, settings).unwrap();
    for name in &linears {
        let weights = values(model.weights.matrix(name).unwrap());
        let [rows, columns] = name.shape;
        let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        for group in weights.chunks(8) {
            let low = group.iter().copied().fold(0.0, f32::min);
            let high = group.iter().copied().fold(0.0, f32::max);
            let step = half::f16::from_f32((high - low) / 15.0).to_f32();
            let zero = (-low / step).round().clamp(0.0, 15.0);
            codes.extend(group.iter().map(|w| (w / step + zero).round().clamp(0.0, 15.0) as u8));
            scales.push(step);
            zeros.push(zero as u8);
        }
        let m = QuantizedMatrix {
            bits: 4,
            group_size: 8,
            out_features: rows,
            in_features: columns,
            codes,
            scales,
            zeros,
            symmetric: false,
            group_index: None,
        };
        let device = dense.device();
        let matrix = host::from_vec(m.dequantize(), name.shape, &device);
        dense.matrices.insert(name.weight(), matrix);
        for tensor in pack(Layout::CompressedTensors, &name.module, &m).unwrap() {
            writer.add(&tensor.0, tensor.1, &tensor.2, &tensor.3).unwrap();
        }
        if let Some(bias) = name.bias_name() {
            copy(&model, &mut writer, &bias);
        }
    }
    for name in decoder.all_names() {
        if !linears.contains(name) {
            name.tensors().iter().for_each(|tensor| copy(&model, &mut writer, tensor));
        }
    }
    let modules: Vec<String> = linears.iter().map(|n| n.module.clone()).collect();
    let quant = QuantConfig::new(Layout::CompressedTensors, 4, Some(8), false);
    config["quantization_config"] = config_json(&quant, &modules, &["lm_head".into()]);
    writer.put_json("config.json", &config).unwrap();
    writer.finish().unwrap();
    let packed = Model::open(&out).unwrap();
    for count in [1, 20] {
        let ids = tokens(count);
        let mut ctx = Context::new(Batch::new(1, count));
        let expected = decoder.logits(&dense, &ids, &mut ctx, &mut Taps::none()).unwrap();
        let expected = values(expected);
        let found = values(packed.logits(&ids, 1).unwrap());
        let size = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(largest_difference(&found, &expected) < 2e-2 * size);
        let plain = values(model.logits(&ids, 1).unwrap());
        assert!(largest_difference(&plain, &expected) > 1e-3 * size);
    }
    let matrix = values(packed.weights.matrix(&linears[3]).unwrap());
    assert_eq!(matrix, values(dense.matrix(&linears[3]).unwrap()));
}

fn copy(model: &Model, writer: &mut store::Writer, tensor: &str) {
    let info = model.checkpoint.info(tensor).unwrap();
    let bytes = model.checkpoint.bytes(tensor).unwrap();
    writer.add(tensor, info.dtype, &info.shape, &bytes).unwrap();
}

#[test]
fn gradients_reach_activations_through_a_checkpoint() {
    let (_folder, model) = tiny(Family::Llama, "gradients");
    let device = tensor::device("cpu").unwrap().autodiff();
    let weights = CheckpointWeights::on(model.checkpoint.clone(), device);
    let mut seen = None;
    let mut leaf = Replace::new(Site::block(0, Point::ResidPost), |_: &Batch, x: Tensor<2>| {
        let x = x.detach().require_grad();
        seen = Some(x.clone());
        Ok(x)
    });
    let mut ctx = Context::new(Batch::new(1, 6));
    let logits =
        model.decoder.logits(&weights, &tokens(6), &mut ctx, &mut Taps::one(&mut leaf)).unwrap();
    let plain = values(model.logits(&tokens(6), 1).unwrap());
    assert!(largest_difference(&plain, &host::into_vec(logits.clone())) < 1e-4);
    let gradients = logits.narrow(0, 5, 1).sum().backward();
    let gradient = values(seen.unwrap().grad(&gradients).unwrap());
    assert!(gradient.iter().any(|g| g.abs() > 1e-3) && gradient.iter().all(|g| g.is_finite()));
}

#[test]
fn stories_begin_as_their_author_documents() {
    let shared = std::env::var_os("STRATA_SHARED").map(PathBuf::from);
    let shared =
        shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let path = shared.join("data/stories260k");
    if !path.is_dir() {
        println!("skipped: no {}", path.display());
        return;
    }
    let model = Model::open(&path).unwrap();
    // "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.
    // One day, she saw a big, red ball. ..." as transformers continues BOS greedily.
    #[rustfmt::skip]
    let expected: [u32; 64] = [
        403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338,
        401, 396, 267, 337, 410, 408, 419, 292, 411, 322, 265, 282, 295, 433, 426, 385,
        328, 432, 358, 394, 261, 370, 432, 352, 266, 268, 388, 426, 338, 391, 266, 267,
        337, 335, 312, 432, 398, 312, 286, 267, 414, 270, 333, 415, 426, 13, 438, 310,
    ];
    let story =
        generate(&model, &[1], &Sampling::greedy(64), &[], &mut |_| ControlFlow::Continue(()));
    assert_eq!(story.unwrap(), expected);
}
