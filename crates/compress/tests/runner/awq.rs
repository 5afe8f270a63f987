//! AWQ inside the runner: the search never loses to rounding, folding keeps the function.

use crate::common::*;
use nn::{Decoder, Family, Prev};
use serde_json::json;
use std::collections::BTreeSet;
use strata_compress::awq::{AwqOptions, GqaFold, Objective, RatioGrid, Search};
use strata_compress::{Calibration, Format, Method, Outcome, QuantizeOptions};

fn awq(bits: u8, awq: AwqOptions) -> QuantizeOptions {
    QuantizeOptions { awq, ..options(Method::Awq, Format::Dequantized, bits) }
}

#[test]
fn without_scale_and_clip_it_is_rtn() {
    let calibration = calibration(8, 16, 2);
    let nothing = AwqOptions { no_scale: true, no_clip: true, ..Default::default() };
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config, 7);
        let (a, b, c) = (scratch.path("awq"), scratch.path("rtn"), scratch.path("clip"));
        quantize(&input, &a, &awq(3, nothing.clone()), &calibration);
        let rtn = options(Method::Rtn, Format::Dequantized, 3);
        quantize(&input, &b, &rtn, &Calibration::none());
        assert_same_tensors(&a, &b, &case);
        let clip_only = AwqOptions { no_scale: true, ..Default::default() };
        quantize(&input, &c, &awq(3, clip_only), &calibration);
        assert_ne!(logits(&c), logits(&b), "{case}: clipping does nothing");
    }
}

/// Modules of the layers that AWQ can scale in this network.
fn scalable(decoder: &Decoder, fold: GqaFold) -> BTreeSet<String> {
    (0..decoder.num_blocks())
        .flat_map(|block| decoder.mappings(block))
        .filter(|mapping| match mapping.prev {
            Prev::Norm(_) => true,
            Prev::Linear { grouped, .. } => !grouped || fold != GqaFold::None,
            Prev::Activation => false,
        })
        .flat_map(|mapping| mapping.layers.into_iter().map(|name| name.module))
        .collect()
}

fn number(outcome: &Outcome, module: &str, key: &str) -> Option<f64> {
    let layer = outcome.layers.iter().find(|layer| layer.module == module).unwrap();
    layer.details.get(key).and_then(serde_json::Value::as_f64)
}

#[test]
fn search_never_loses_to_rounding() {
    let calibration = calibration(8, 16, 3);
    let arms = [
        AwqOptions::default(),
        AwqOptions {
            search: Search::Duo,
            search_grid: RatioGrid::Closed,
            gqa_fold: GqaFold::Mean,
            ..Default::default()
        },
        AwqOptions { gqa_fold: GqaFold::Max, search_points: 5, ..Default::default() },
        AwqOptions { objective: Objective::Linear, search: Search::Duo, ..Default::default() },
    ];
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config, 8);
        let decoder = Decoder::from_config(&config).unwrap();
        for (arm, search) in arms.iter().enumerate() {
            let out = scratch.path(&format!("out-{arm}"));
            let outcome = quantize(&input, &out, &awq(3, search.clone()), &calibration);
            let expected = scalable(&decoder, search.gqa_fold);
            let mut better = 0;
            for layer in &outcome.layers {
                let module = &layer.module;
                let loss = number(&outcome, module, "search_loss");
                assert_eq!(
                    loss.is_some(),
                    expected.contains(module),
                    "{case}, arm {arm}: {module} searched: {loss:?}"
                );
                let Some(loss) = loss else { continue };
                let rounding = number(&outcome, module, "rounding_loss").unwrap();
                assert!(
                    loss >= 0.0 && loss <= rounding,
                    "{case}, arm {arm}: {module}: {loss} > {rounding}"
                );
                let identity = layer.details["ratio"].is_null();
                assert_eq!(identity, loss == rounding, "{case}: {module}: ties keep the identity");
                better += usize::from(loss < 0.9 * rounding);
            }
            assert!(better > 0, "{case}, arm {arm}: no scale helped on planted channels");
        }
    }
}

/// With every channel kept out of rounding only the folding is left, so the network must be the
/// original one up to f32 rounding; at 8 bits in groups of 16 it must be so nearly. A scale that is
/// lost, doubled or put into a wrong row moves the logits by their own size.
#[test]
fn folding_keeps_the_function() {
    let calibration = calibration(8, 16, 4);
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config, 9);
        let reference = logits(&input);
        let decoder = Decoder::from_config(&config).unwrap();
        let mean = AwqOptions { gqa_fold: GqaFold::Mean, no_clip: true, ..Default::default() };
        let max = AwqOptions { gqa_fold: GqaFold::Max, search: Search::Duo, ..mean.clone() };
        let kept =
            |search: &AwqOptions| AwqOptions { keep_channels: Some(100.0), ..search.clone() };
        for (arm, (bits, search, tolerance)) in [
            (3, kept(&mean), 1e-5),
            (3, kept(&max), 1e-5),
            (8, mean.clone(), 0.06),
            (8, max.clone(), 0.06),
        ]
        .into_iter()
        .enumerate()
        {
            let case = format!("{case}, arm {arm}");
            let out = scratch.path(&format!("out-{arm}"));
            let outcome = quantize(&input, &out, &awq(bits, search.clone()), &calibration);
            // Most mappings must have found scales, or nothing is tested.
            let scaled: BTreeSet<&str> = outcome
                .layers
                .iter()
                .filter(|layer| layer.details.get("ratio").is_some_and(|ratio| !ratio.is_null()))
                .map(|layer| layer.module.as_str())
                .collect();
            let all = scalable(&decoder, search.gqa_fold);
            assert!(2 * scaled.len() >= all.len(), "{case}: {scaled:?} of {all:?}");
            let apart = distance(&logits(&out), &reference);
            assert!(apart < tolerance, "{case}: logits moved by {apart}");
        }
    }
}

/// An input that is always zero keeps the factor 1 and does not disturb the others' scales.
#[test]
fn dead_channel_keeps_its_weights() {
    const DEAD: usize = 5;
    let calibration = calibration(8, 16, 5);
    for family in [Family::Llama, Family::Gemma2, Family::Gpt2] {
        let config = config(family, json!({}));
        let scratch = Scratch::new();
        let (input, out) = (scratch.path("in"), scratch.path("out"));
        planted(&input, &config, 10);
        let decoder = Decoder::from_config(&config).unwrap();
        let norm = decoder.names(0).unwrap().norm1.clone();
        edit(&input, |name, _, values| {
            if name == norm.weight() {
                values[DEAD] = if norm.plus_one { -1.0 } else { 0.0 };
            } else if Some(name) == norm.bias_name().as_deref() {
                values[DEAD] = 0.0;
            }
        });
        let reference = logits(&input);
        let outcome = quantize(
            &input,
            &out,
            &awq(8, AwqOptions { no_clip: true, ..Default::default() }),
            &calibration,
        );
        let first = &outcome.layers[0];
        assert!(first.details["ratio"].as_f64().is_some_and(|r| r > 0.0), "{first:?}");
        let (before, after) = (nn::Model::open(&input).unwrap(), nn::Model::open(&out).unwrap());
        // Query rows, which nothing but the rounding changes.
        let name = &decoder.linear_sets(0)[0][0];
        let (before, after) = (matrix(&before, name), matrix(&after, name));
        let (mut moved, mut size) = (0f64, 0f64);
        for (a, b) in before.chunks(32).zip(after.chunks(32)).take(32) {
            moved += f64::from(a[DEAD] - b[DEAD]).powi(2);
            size += f64::from(a[DEAD]).powi(2);
        }
        assert!(moved < 0.001 * size, "{family:?}, {name}: column moved by {}", moved / size);
        let apart = distance(&logits(&out), &reference);
        assert!(apart < 0.05, "{family:?}: logits moved by {apart}");
    }
}
