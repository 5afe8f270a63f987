//! RSQ inside the runner: rotated checkpoints are ordinary ones that compute the same, weights of 1
//! change no bit, and importance is measured under the layer's own mask.

use crate::common::*;
use nn::testing::{random_checkpoint, tiny_checkpoint};
use nn::{Family, Model, Point, Record, Site, Taps};
use serde_json::json;
use std::path::Path;
use strata_compress::rsq::importance::{self, Importance, PositionDebias};
use strata_compress::rsq::{Base, RotationChoice, RsqOptions};
use strata_compress::{Calibration, Format, LayerResult, Method, Outcome, QuantizeOptions};
use tensor::host;

fn options_of(rsq: RsqOptions, bits: u8) -> QuantizeOptions {
    QuantizeOptions { rsq, ..options(Method::Rsq, Format::Dequantized, bits) }
}

fn rotate_only() -> QuantizeOptions {
    options_of(RsqOptions { rotate_only: true, ..Default::default() }, 4)
}

/// Every family that can be rotated, head tied and untied.
fn rotatable() -> Vec<(String, serde_json::Value)> {
    let mut all = Vec::new();
    for family in Family::ALL.into_iter().filter(|f| *f != Family::Gemma2) {
        for tied in [true, false] {
            let name = format!("{} tied: {tied}", family.model_type());
            all.push((name, config(family, json!({"tie_word_embeddings": tied}))));
        }
    }
    all.push(("opt, projected".into(), config(Family::Opt, json!({"word_embed_proj_dim": 16}))));
    all.push(("opt, no biases".into(), config(Family::Opt, json!({"enable_bias": false}))));
    all
}

#[test]
fn a_rotated_checkpoint_computes_the_same() {
    for (case, config) in rotatable() {
        let scratch = Scratch::new();
        let (input, out) = (scratch.path("in"), scratch.path("out"));
        planted(&input, &config, 7);
        let outcome = quantize(&input, &out, &rotate_only(), &Calibration::none());
        assert!(outcome.layers.is_empty(), "{case}");
        assert!(outcome.notes[0].contains("Hadamard"), "{case}: {:?}", outcome.notes);
        let off = distance(&logits(&out), &logits(&input));
        assert!(off < 1e-4, "{case}: {off}");
        // An ordinary checkpoint: no quantization_config, and the head stands on its own.
        let written = Model::open(&out).unwrap();
        let config = written.checkpoint.config().unwrap();
        assert!(config.get("quantization_config").is_none(), "{case}");
        if config["word_embed_proj_dim"] != 16 {
            assert_eq!(config["tie_word_embeddings"], false, "{case}");
        }
        // The weights did change.
        let original = Model::open(&input).unwrap();
        let moved = |n: usize| {
            let names = |m: &Model| m.decoder.linears(0)[n].clone();
            matrix(&original, &names(&original)) != matrix(&written, &names(&written))
        };
        assert!((0..4).all(moved), "{case}");
    }
}

/// With 8 bits in groups nothing is lost that could hide a wrong rotation.
#[test]
fn eight_bits_after_rotating_are_close_in_every_format() {
    for format in [Format::CompressedTensors, Format::GptqV2, Format::Dequantized, Format::Strata] {
        for family in [Family::Llama, Family::Qwen2, Family::Gpt2, Family::Opt] {
            let scratch = Scratch::new();
            let (input, out) = (scratch.path("in"), scratch.path("out"));
            tiny_checkpoint(&input, family, 3).unwrap();
            let options =
                QuantizeOptions { rsq: RsqOptions::default(), ..options(Method::Rsq, format, 8) };
            quantize(&input, &out, &options, &calibration(8, 16, 1));
            let off = distance(&logits(&out), &logits(&input));
            assert!(off < 0.03, "{family:?} {format:?}: {off}");
        }
    }
}

/// Weights of exactly 1 through the weighted path: the same bytes as plain GPTQ on the rotated
/// model, and without rotation the same as the method gptq.
#[test]
fn weights_of_one_change_no_bit() {
    for family in [Family::Llama, Family::Gpt2] {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        tiny_checkpoint(&input, family, 5).unwrap();
        let text = calibration(6, 24, 2);
        let run = |label: &str, options: &QuantizeOptions| {
            let out = scratch.path(label);
            quantize(&input, &out, options, &text);
            out
        };
        for rotation in [RotationChoice::Hadamard, RotationChoice::None] {
            let with = |importance, r_min| {
                options_of(RsqOptions { rotation, importance, r_min, ..Default::default() }, 3)
            };
            let label = format!("{rotation:?}");
            let plain = run(&format!("plain {label}"), &with(Importance::Uniform, 0.01));
            let ones = run(&format!("ones {label}"), &with(Importance::Attention, 1.0));
            assert_same_tensors(&plain, &ones, &label);
            let weighted = run(&format!("weighted {label}"), &with(Importance::Attention, 0.01));
            assert!(distance(&logits(&weighted), &logits(&plain)) > 1e-4, "{label}");
            if rotation == RotationChoice::None {
                let gptq = run("gptq", &options(Method::Gptq, Format::Dequantized, 3));
                assert_same_tensors(&gptq, &plain, "gptq");
            }
        }
    }
}

fn number(layer: &LayerResult, key: &str) -> f64 {
    layer.details.get(key).and_then(|v| v.as_f64()).unwrap()
}

fn first_layer(input: &Path, rsq: RsqOptions, text: &Calibration) -> LayerResult {
    let scratch = Scratch::new();
    let out = scratch.path("out");
    quantize(input, &out, &options_of(rsq, 4), text).layers.remove(0)
}

/// The weights of block 0 against whole patterns recorded from the model: causal, sliding window,
/// soft cap, grouped heads, one head per layer scale.
#[test]
fn attention_importance_is_the_column_sum_of_the_layers_own_pattern() {
    let cases = [
        config(Family::Llama, json!({})),
        config(Family::Mistral, json!({"sliding_window": 5})),
        config(Family::Qwen3, json!({})),
        config(Family::Gpt2, json!({"scale_attn_by_inverse_layer_idx": true})),
        config(Family::GptNeox, json!({})),
        config(Family::Gemma2, json!({"sliding_window": 5})),
    ];
    for config in cases {
        for debias in [PositionDebias::None, PositionDebias::Linear] {
            let scratch = Scratch::new();
            let input = scratch.path("in");
            random_checkpoint(&input, &config, 11).unwrap();
            let (windows, length) = (3, 20);
            let text = calibration(windows, length, 4);
            let rsq = RsqOptions {
                rotation: RotationChoice::None,
                position_debias: debias,
                r_min: 0.05,
                ..Default::default()
            };
            let layer = first_layer(&input, rsq, &text);
            let model = Model::open(&input).unwrap();
            let site = Site::block(0, Point::Pattern);
            let mut record = Record::new([site]);
            model.tapped_logits(text.ids(), windows, &mut Taps::one(&mut record)).unwrap();
            let pattern = host::into_vec(record.seen[&site].clone());
            let heads = model.decoder.config.num_attention_heads;
            let window = model.decoder.config.windows[0].unwrap_or(length);
            let mut all = Vec::new();
            for rows in pattern.chunks(heads * length * length) {
                let scores: Vec<f64> = (0..length)
                    .map(|key| {
                        let column = rows.iter().skip(key).step_by(length);
                        let sum: f64 = column.map(|&p| f64::from(p)).sum();
                        let seen = (length - key).min(window) as f64;
                        if debias == PositionDebias::Linear { sum / seen } else { sum }
                    })
                    .collect();
                all.extend(importance::weights(&scores, 0.05, 1.0).unwrap());
            }
            let sum: f64 = all.iter().sum();
            let squares: f64 = all.iter().map(|w| w * w).sum();
            let low = all.iter().copied().fold(f64::INFINITY, f64::min);
            let high = all.iter().copied().fold(0.0, f64::max);
            for (key, wanted) in [
                ("token_weight_min", low),
                ("token_weight_max", high),
                ("effective_tokens", sum * sum / squares),
            ] {
                let got = number(&layer, key);
                let case = &config["model_type"];
                assert!((got / wanted - 1.0).abs() < 1e-3, "{case} {key}: {got} {wanted}");
            }
        }
    }
}

#[test]
fn every_strategy_weighs_and_reports() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    tiny_checkpoint(&input, Family::Llama, 5).unwrap();
    let text = calibration(6, 32, 2);
    let strategies = [
        Importance::Attention,
        Importance::ActNorm,
        Importance::ActDiff,
        Importance::TokenFreq,
        Importance::TokenSim,
        Importance::FirstN,
        Importance::FirstLastN,
    ];
    let mut seen = Vec::new();
    for importance in strategies {
        let layer = first_layer(&input, RsqOptions { importance, ..Default::default() }, &text);
        let (low, high) = (number(&layer, "token_weight_min"), number(&layer, "token_weight_max"));
        // In every window the least important token has 1/100 of the weight of the most important.
        assert!(low < 0.2 && high > 1.0, "{importance:?}: {low} {high}");
        let effective = number(&layer, "effective_tokens");
        assert!(effective > 6.0 && effective < 6.0 * 32.0, "{importance:?}: {effective}");
        seen.push((layer.weight_error, importance));
    }
    // The first 4 of 32 tokens: 4 of weight 1, 28 of 0.01.
    let layer = first_layer(
        &input,
        RsqOptions { importance: Importance::FirstN, ..Default::default() },
        &text,
    );
    let effective = 6.0 * (4.28f64 * 4.28) / (4.0 + 28.0 * 1e-4);
    assert!((number(&layer, "effective_tokens") / effective - 1.0).abs() < 1e-9);
    seen.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert!(seen.windows(2).all(|w| w[0].0 != w[1].0), "two strategies did the same: {seen:?}");
    // The second power weighs more unevenly; only named layers are weighed; copies add tokens.
    let squared = RsqOptions { weight_power: 2, ..Default::default() };
    let once = first_layer(&input, RsqOptions::default(), &text);
    assert_ne!(first_layer(&input, squared, &text).weight_error, once.weight_error);
    let only = RsqOptions { weighting_modules: vec!["*.v_proj".into()], ..Default::default() };
    let out = scratch.path("only");
    let outcome: Outcome = quantize(&input, &out, &options_of(only, 4), &text);
    for layer in &outcome.layers {
        let weighed = layer.details.contains_key("effective_tokens");
        assert_eq!(weighed, layer.module.ends_with("v_proj"), "{}", layer.module);
        assert!(layer.details.contains_key("loss"));
    }
    let expand = RsqOptions { expand: 4, ..Default::default() };
    assert_eq!(number(&first_layer(&input, expand, &text), "tokens"), 4.0 * 6.0 * 32.0);
}

/// Fewer tokens than inputs: it works on the damping, and the user is told the rank.
#[test]
fn too_few_tokens_are_said() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    tiny_checkpoint(&input, Family::Llama, 5).unwrap();
    let options = options_of(RsqOptions::default(), 4);
    let outcome = quantize(&input, &scratch.path("few"), &options, &calibration(1, 20, 2));
    let said = |w: &String| w.contains("down_proj") && w.contains("rank 20");
    assert!(outcome.warnings.iter().any(said), "{:?}", outcome.warnings);
    let outcome = quantize(&input, &scratch.path("enough"), &options, &calibration(4, 20, 2));
    assert!(outcome.warnings.is_empty(), "{:?}", outcome.warnings);
}

#[test]
fn rotation_saves_rounding_from_outliers() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    planted(&input, &config(Family::Llama, json!({})), 3);
    let reference = logits(&input);
    let run = |rotation, base| {
        let out = scratch.path(&format!("{rotation:?} {base:?}"));
        let rsq = RsqOptions { rotation, base, ..Default::default() };
        quantize(&input, &out, &options_of(rsq, 4), &calibration(8, 32, 1));
        distance(&logits(&out), &reference)
    };
    let plain = run(RotationChoice::None, Base::Rtn);
    for rotation in [RotationChoice::Hadamard, RotationChoice::Random] {
        let rotated = run(rotation, Base::Rtn);
        assert!(rotated < 0.7 * plain, "{rotation:?}: {rotated} {plain}");
    }
}

#[test]
fn the_seed_decides_and_runs_repeat() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    tiny_checkpoint(&input, Family::Gpt2, 5).unwrap();
    let text = calibration(4, 24, 2);
    let options = options_of(RsqOptions::default(), 4);
    let (whole, again) = (scratch.path("whole"), scratch.path("again"));
    quantize(&input, &whole, &options, &text);
    quantize(&input, &again, &options, &text);
    assert_same_tensors(&whole, &again, "twice");
    let other = RsqOptions { rotation_seed: 1, ..Default::default() };
    let seeded = scratch.path("seeded");
    quantize(&input, &seeded, &options_of(other, 4), &text);
    assert!(tensors(&whole) != tensors(&seeded), "the seed decides nothing");
}

#[test]
fn what_cannot_work_is_refused() {
    let scratch = Scratch::new();
    let text = calibration(4, 24, 2);
    let gemma = scratch.path("gemma");
    tiny_checkpoint(&gemma, Family::Gemma2, 5).unwrap();
    let message = refusal(&gemma, &options_of(RsqOptions::default(), 4), &text);
    assert!(message.contains("--rotation none"), "{message}");
    let llama = scratch.path("llama");
    tiny_checkpoint(&llama, Family::Llama, 5).unwrap();
    let unknown = RsqOptions { weighting_modules: vec!["*.w_proj".into()], ..Default::default() };
    let message = refusal(&llama, &options_of(unknown, 4), &text);
    assert!(message.contains("*.w_proj"), "{message}");
    // Queries and keys so large that their products overflow: no importance, no silent uniform.
    edit(&llama, |name, _, values| {
        if name.contains("layers.1") && (name.contains("q_proj") || name.contains("k_proj")) {
            values.iter_mut().for_each(|v| *v *= 1e25);
        }
    });
    let plain = RsqOptions { rotation: RotationChoice::None, ..Default::default() };
    let message = {
        let out = scratch.path("out");
        let result = try_quantize(&llama, &out, false, &options_of(plain, 4), &text);
        assert!(!out.exists());
        result.unwrap_err().to_string()
    };
    assert!(message.contains("block 1") && message.contains("overflow"), "{message}");
}
