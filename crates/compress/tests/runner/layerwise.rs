//! Schedules of several widths: scores on real networks, budgets, and what a job makes of them.

use crate::common::*;
use nn::testing::random_checkpoint;
use nn::{Family, Model};
use serde_json::{Value, json};
use std::path::Path;
use strata_compress::layerwise_quant::{
    Budget, BudgetError, BudgetUnit, BudgetWeight, LayerScore, Resolved, Settings, Share, resolve,
    scores,
};
use strata_compress::statistics::{Gram, quadratic_error};
use strata_compress::{Calibration, Format, Method, QuantizeOptions};
use tensor::host;

/// A network of `layers` blocks without biases; all widths divide into groups of 16.
fn network(dir: &Path, layers: usize, seed: u64) {
    let keys = json!({
        "num_hidden_layers": layers, "mlp_bias": false, "attention_bias": false,
    });
    random_checkpoint(dir, &config(Family::Llama, keys), seed).unwrap();
}

fn job(
    method: Method,
    format: Format,
    change: impl FnOnce(&mut QuantizeOptions),
) -> QuantizeOptions {
    let mut options = options(method, format, 4);
    options.layerwise.probe_samples = 4;
    change(&mut options);
    options
}

fn two_widths(method: Method, format: Format, average: f64) -> QuantizeOptions {
    job(method, format, |o| {
        o.layerwise.low_bits = Some(2);
        o.layerwise.average_bits = Some(average);
        o.layerwise.layer_score = LayerScore::First;
    })
}

fn budget(weight: BudgetWeight, size: Budget) -> QuantizeOptions {
    job(Method::Rtn, Format::CompressedTensors, |o| {
        o.layerwise.budget = Some(size);
        o.layerwise.budget_weight = weight;
    })
}

fn decide_with(
    dir: &Path,
    options: &QuantizeOptions,
    text: &Calibration,
) -> Result<Resolved, String> {
    let scratch = Scratch::new();
    let model = Model::open(dir).map_err(|e| e.to_string())?;
    let place = scratch.path("activations");
    let settings = Settings { model: &model, options, calibration: text, scratch: &place };
    resolve(&settings).map_err(|e| e.to_string()).map(|r| r.expect("a schedule was asked for"))
}

fn decide(dir: &Path, options: &QuantizeOptions) -> Resolved {
    decide_with(dir, options, &calibration(6, 24, 5)).unwrap()
}

fn bits_of(resolved: &Resolved) -> Vec<u8> {
    resolved.schedule.bits.values().copied().collect()
}

#[test]
fn a_block_that_does_nothing_is_least_important() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 4, 1);
    edit(&dir, |name, _, values| {
        if name.contains("layers.2.") && (name.contains("o_proj") || name.contains("down_proj")) {
            values.fill(0.0);
        }
    });
    for score in [LayerScore::Lim, LayerScore::Sensitivity] {
        let mut options = two_widths(Method::Rtn, Format::CompressedTensors, 3.5);
        options.layerwise.layer_score = score;
        let found = decide(&dir, &options);
        assert_eq!(found.schedule.order.last(), Some(&2), "{score:?}");
        assert_eq!(bits_of(&found), [4, 4, 2, 4]);
        let value = found.schedule.scores[&2];
        assert_eq!(value, if score == LayerScore::Lim { -1.0 } else { 0.0 });
        options.layerwise.reverse_order = true;
        assert_eq!(decide(&dir, &options).schedule.order.first(), Some(&2));
    }
}

#[test]
fn heavy_tails_come_first_by_z_scores() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 3, 2);
    edit(&dir, |name, _, values| {
        if name.contains("layers.1.") && name.contains("proj") {
            values.iter_mut().step_by(40).for_each(|w| *w *= 30.0);
        }
    });
    let mut options = two_widths(Method::Rtn, Format::CompressedTensors, 10.0 / 3.0);
    options.layerwise.layer_score = LayerScore::Zd;
    let found = decide_with(&dir, &options, &Calibration::none()).unwrap();
    assert_eq!(found.schedule.order[0], 1, "{:?}", found.schedule.scores);
    assert!(found.schedule.scores[&1] < found.schedule.scores[&0]);
}

#[test]
fn random_orders_follow_their_seed() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 8, 3);
    let order = |seed: u64| {
        let mut options = two_widths(Method::Rtn, Format::CompressedTensors, 3.0);
        options.layerwise.layer_score = LayerScore::Random;
        options.layerwise.order_seed = seed;
        decide(&dir, &options).schedule.order
    };
    assert_eq!(order(4), order(4));
    assert_ne!(order(4), order(5));
}

#[test]
fn schedules_of_one_width_are_the_plain_job_bit_for_bit() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 3, 4);
    let text = calibration(6, 24, 5);
    for method in METHODS {
        for format in [Format::CompressedTensors, Format::GptqV2, Format::Strata] {
            for (average, bits) in [(4.0, 4), (2.0, 2)] {
                let case = format!("{method:?} {format:?} {bits}");
                let found = decide(&dir, &two_widths(method, format, average));
                let (mixed, plain) = (scratch.path("mixed"), scratch.path("plain"));
                quantize(&dir, &mixed, &found.options, &text);
                quantize(&dir, &plain, &options(method, format, bits), &text);
                assert_same_tensors(&mixed, &plain, &case);
                for dir in [mixed, plain] {
                    std::fs::remove_dir_all(dir).unwrap();
                }
            }
        }
    }
}

#[test]
fn mixed_widths_are_written_announced_and_read_back() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 4, 5);
    let text = calibration(6, 24, 5);
    for method in METHODS {
        for format in [Format::CompressedTensors, Format::GptqV2, Format::Strata] {
            let mut options = two_widths(method, format, 3.5);
            options.layerwise.low_group_size = Some(8);
            let found = decide(&dir, &options);
            let out = scratch.path(&format!("{method:?}-{format:?}"));
            let outcome = quantize(&dir, &out, &found.options, &text);
            for layer in &outcome.layers {
                let low = layer.block == 3;
                assert_eq!(layer.bits, Some(if low { 2 } else { 4 }), "{}", layer.module);
                assert_eq!(layer.group_size, Some(if low { 8 } else { 16 }));
            }
            // What a loader computes with is what the job said.
            let (model, original) = (Model::open(&out).unwrap(), Model::open(&dir).unwrap());
            for (name, layer) in linears(&model.decoder).iter().zip(&outcome.layers) {
                let (found, was) = (matrix(&model, name), matrix(&original, name));
                let error: f64 =
                    found.iter().zip(&was).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let norm: f64 = was.iter().map(|b| f64::from(*b).powi(2)).sum();
                // AWQ moves scales into the norms.
                if method != Method::Awq {
                    assert!((error / norm - layer.weight_error).abs() < 1e-6, "{}", name.module);
                }
            }
            logits(&out);
            let bytes = Model::open(&out).unwrap().checkpoint.total_bytes();
            assert_eq!(found.schedule.bytes, Some(bytes), "{method:?} {format:?}");
            let config: Value = read(&out.join("config.json"));
            let config = &config["quantization_config"];
            if format == Format::GptqV2 {
                let low = &config["dynamic"][r"+:^model\.layers\.3\..*$"];
                assert_eq!(low, &json!({"bits": 2, "group_size": 8, "sym": false}), "{config}");
                assert_eq!(config["bits"], 4);
            }
            if format == Format::CompressedTensors {
                let groups = config["config_groups"].as_object().unwrap();
                let targets: Vec<&Value> = groups.values().map(|g| &g["targets"]).collect();
                let wanted = [r"re:^model\.layers\.(?:0|1|2)\..*$", r"re:^model\.layers\.3\..*$"];
                assert_eq!(targets, [&json!([wanted[0]]), &json!([wanted[1]])]);
            }
        }
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_other_methods_of_the_room_take_schedules_too() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 4, 16);
    let text = calibration(6, 24, 5);
    for method in [Method::Adadim, Method::Rsq, Method::Pvq] {
        let importance = two_widths(method, Format::Strata, 3.5);
        let budget = job(method, Format::Strata, |o| {
            o.layerwise.budget = Some(Budget::BitsPerWeight(4.5));
        });
        for (name, options) in [("importance", importance), ("budget", budget)] {
            let case = format!("{method:?}-{name}");
            let found = decide(&dir, &options);
            let out = scratch.path(&case);
            let outcome = quantize(&dir, &out, &found.options, &text);
            let size = |l: &strata_compress::LayerResult| (l.shape[0] * l.shape[1]) as f64;
            let all: f64 = outcome.layers.iter().map(size).sum();
            let mean =
                outcome.layers.iter().map(|l| l.bits_per_weight * size(l)).sum::<f64>() / all;
            let said = found.schedule.effective_bits_per_weight;
            // The groups of columns that adadim may choose do not always divide a layer.
            assert!((mean - said).abs() < 0.35, "{case}: {mean} {said}");
            if name == "importance" {
                let of = |block: usize| -> f64 {
                    let here = outcome.layers.iter().filter(|l| l.block == block);
                    here.map(|l| l.bits_per_weight).sum::<f64>()
                };
                assert!(of(3) + 7.0 < of(0), "{case}: the last block is the low one");
            } else {
                assert!(said <= 4.5, "{case}");
            }
            logits(&out);
        }
    }
}

#[test]
fn targets_count_what_they_say() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 8, 6);
    let base = two_widths(Method::Rtn, Format::CompressedTensors, 3.25);
    let nominal = decide(&dir, &base).schedule;
    assert_eq!(nominal.average_bits, 3.25);
    // Groups of 16: b + (16 + b) / 16.
    let effective = |bits: f64| bits + (16.0 + bits) / 16.0;
    let mean = (5.0 * effective(4.0) + 3.0 * effective(2.0)) / 8.0;
    assert!((nominal.effective_bits_per_weight - mean).abs() < 1e-9);
    let mut counted = base.clone();
    counted.layerwise.average_count = strata_compress::layerwise_quant::Count::Effective;
    counted.layerwise.average_bits = Some(4.25);
    let schedule = decide(&dir, &counted).schedule;
    assert!(schedule.effective_bits_per_weight <= 4.25);
    // One block fewer at 2 bits would not have fitted.
    let step = (effective(4.0) - effective(2.0)) / 8.0;
    assert!(schedule.effective_bits_per_weight + step > 4.25);
    let mut share = base.clone();
    share.layerwise.average_bits = None;
    share.layerwise.low_blocks = Some(Share::Fraction(0.25));
    assert_eq!(decide(&dir, &share).schedule.bits.values().filter(|b| **b == 2).count(), 2);
    let mut bytes = base;
    bytes.layerwise.average_bits = None;
    let whole = nominal.bytes.unwrap();
    bytes.layerwise.budget = Some(Budget::Bytes(whole));
    assert_eq!(decide(&dir, &bytes).schedule.bytes, Some(whole));
    bytes.layerwise.budget = Some(Budget::Bytes(whole - 1));
    assert!(decide(&dir, &bytes).schedule.bytes.unwrap() < whole);
    bytes.layerwise.budget = Some(Budget::Bytes(1000));
    let text = calibration(6, 24, 5);
    let message = decide_with(&dir, &bytes, &text).err().unwrap();
    assert!(message.contains("cannot be met"), "{message}");
}

#[test]
fn overrides_of_the_user_stay() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 4, 7);
    let mut options = two_widths(Method::Rtn, Format::CompressedTensors, 2.0);
    options.overrides = vec![strata_compress::options::Override {
        pattern: "*.down_proj".into(),
        bits: Some(8),
        group_size: None,
        symmetric: None,
    }];
    let found = decide(&dir, &options);
    let outcome = quantize(&dir, &scratch.path("out"), &found.options, &Calibration::none());
    for layer in &outcome.layers {
        let down = layer.module.ends_with("down_proj");
        assert_eq!(layer.bits, Some(if down { 8 } else { 2 }), "{}", layer.module);
    }
    assert_eq!(found.schedule.average_bits, 2.0, "the average is over scheduled layers");
    let bytes = Model::open(&scratch.path("out")).unwrap().checkpoint.total_bytes();
    assert_eq!(found.schedule.bytes, Some(bytes));
}

#[test]
fn refinement_only_brings_predictions_nearer() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 5, 8);
    let text = calibration(6, 24, 5);
    let divergence = |resolved: &Resolved| {
        let model = Model::open(&dir).unwrap();
        let points = resolved.points(2).unwrap();
        let mut point = points[0].clone();
        point.grids = resolved
            .schedule
            .layers
            .iter()
            .map(|l| (l.module.clone(), grid(l.bits, l.group_size)))
            .collect();
        let changed = resolved.rounded(&model, &point).unwrap();
        eval::compare(&model, &changed, text.ids(), 24).unwrap().kl_divergence
    };
    let mut options = two_widths(Method::Rtn, Format::CompressedTensors, 3.2);
    let plain = decide(&dir, &options);
    options.layerwise.refine_swaps = 20;
    let refined = decide(&dir, &options);
    assert!(divergence(&refined) <= divergence(&plain) + 1e-9);
    let low = |r: &Resolved| bits_of(r).iter().filter(|b| **b == 2).count();
    assert_eq!(low(&refined), low(&plain), "exchanges keep the average");
    assert!(refined.schedule.notes[0].contains("exchanges kept"));
}

#[test]
fn budgets_hold_and_beat_every_uniform_width() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 4, 9);
    for weight in
        [BudgetWeight::Loss, BudgetWeight::Measured, BudgetWeight::Relative, BudgetWeight::Absolute]
    {
        for bits in [3u8, 4, 5] {
            // Exactly what the uniform width takes.
            let size = f64::from(bits) + (16.0 + f64::from(bits)) / 16.0;
            let found = decide(&dir, &budget(weight, Budget::BitsPerWeight(size)));
            let schedule = &found.schedule;
            assert!(schedule.effective_bits_per_weight <= size + 1e-9, "{weight:?}");
            let uniform: f64 = schedule
                .units
                .iter()
                .map(|u| u.error[u.bits.iter().position(|b| *b == bits).unwrap()])
                .sum();
            let error = schedule.predicted_error.unwrap();
            assert!(error <= uniform + 1e-12, "{weight:?} {bits}: {error} {uniform}");
            assert!(schedule.error_bound.unwrap() <= error);
        }
    }
}

#[test]
fn a_budget_in_bytes_is_what_lies_on_disk() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 4, 10);
    let text = calibration(6, 24, 5);
    let widest = decide(&dir, &budget(BudgetWeight::Relative, Budget::BitsPerWeight(20.0)));
    assert!(widest.schedule.bits.values().all(|b| *b == 8));
    let limit = widest.schedule.bytes.unwrap() - 9_000;
    for format in [Format::CompressedTensors, Format::GptqV2, Format::Strata] {
        let mut options = budget(BudgetWeight::Loss, Budget::Bytes(limit));
        options.format = format;
        options.method = Method::Gptq;
        let found = decide(&dir, &options);
        let out = scratch.path(&format!("{format:?}"));
        quantize(&dir, &out, &found.options, &text);
        let bytes = Model::open(&out).unwrap().checkpoint.total_bytes();
        assert_eq!(found.schedule.bytes, Some(bytes), "{format:?}");
        assert!(bytes <= limit, "{format:?}: {bytes} > {limit}");
    }
}

#[test]
fn curves_are_the_output_errors_on_the_calibration_text() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 2, 11);
    let text = calibration(3, 24, 5);
    let mut options = budget(BudgetWeight::Loss, Budget::BitsPerWeight(4.5));
    options.layerwise.budget_unit = BudgetUnit::Linear;
    options.layerwise.probe_samples = 3;
    let found = decide_with(&dir, &options, &text).unwrap();
    let model = Model::open(&dir).unwrap();
    // The inputs of the first block's query, computed on their own.
    let mut record = nn::Record::new([nn::Site::block(0, nn::Point::AttnIn)]);
    model.tapped_logits(text.ids(), 3, &mut nn::Taps::one(&mut record)).unwrap();
    let x = &record.seen[&nn::Site::block(0, nn::Point::AttnIn)];
    let mut gram = Gram::new(32);
    host::read(x, |x| gram.add(x));
    let name = &linears(&model.decoder)[0];
    let unit = &found.schedule.units[0];
    assert_eq!(unit.layers[0].module, name.module);
    assert_eq!(unit.bits, [2, 3, 4, 5, 6, 8]);
    let w = matrix(&model, name);
    let energy = quadratic_error(&w, &gram.covariance(), 32);
    assert!((unit.layers[0].energy / energy - 1.0).abs() < 1e-4);
    for (at, bits) in unit.bits.iter().enumerate() {
        let as_matrix = strata_compress::grid::Matrix::new(32, 32, w.clone()).unwrap();
        let options = grid(*bits, 16);
        let rules = strata_compress::grid::Grid::new(&options).unwrap();
        let q = strata_compress::rtn::quantize(&as_matrix, &rules, &options).dequantize();
        let d: Vec<f32> = q.iter().zip(&w).map(|(q, w)| q - w).collect();
        let error = quadratic_error(&d, &gram.covariance(), 32);
        assert!((unit.layers[0].absolute[at] / error - 1.0).abs() < 1e-3, "{bits}");
        assert!((unit.relative[at] / (error / energy) - 1.0).abs() < 1e-3);
    }
    // The probed width costs what it measured, the others in proportion.
    let [effect, there] = unit.probe.unwrap();
    assert!(effect > 0.0 && there == unit.relative[1]);
    assert!((unit.error[1] - effect).abs() < 1e-12);
    assert!((unit.error[0] / effect - unit.relative[0] / unit.relative[1]).abs() < 1e-9);
    // Measured alone, the same width has the same effect.
    options.layerwise.budget_weight = BudgetWeight::Measured;
    let measured = decide_with(&dir, &options, &text).unwrap();
    assert_eq!(measured.schedule.units[0].error[1], effect);
}

#[test]
fn units_share_one_width_and_gptq_errors_are_smaller() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 3, 12);
    let mut options = budget(BudgetWeight::Relative, Budget::BitsPerWeight(4.2));
    let of = |options: &QuantizeOptions| decide(&dir, options).schedule;
    let rtn = of(&options);
    assert_eq!(rtn.units.len(), 3 * 4, "q, k, v; o; gate, up; down");
    for block in rtn.layers.chunk_by(|a, b| a.block == b.block) {
        assert!(block[0].bits == block[1].bits && block[1].bits == block[2].bits);
        assert!(block[4].bits == block[5].bits);
    }
    options.layerwise.budget_unit = BudgetUnit::Block;
    let blocks = of(&options);
    assert_eq!((blocks.units.len(), blocks.bits.len()), (3, 3));
    options.layerwise.budget_unit = BudgetUnit::Input;
    options.layerwise.budget_error = BudgetError::Gptq;
    let gptq = of(&options);
    let sum = |units: &[strata_compress::layerwise_quant::UnitCurve]| -> f64 {
        units.iter().map(|u| u.relative[1]).sum()
    };
    assert!(sum(&gptq.units) < sum(&rtn.units), "compensation lowers the output error");
}

#[test]
fn what_cannot_be_decided_is_refused() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 2, 13);
    let text = calibration(2, 24, 5);
    let mut lim = two_widths(Method::Rtn, Format::CompressedTensors, 3.0);
    lim.layerwise.layer_score = LayerScore::Lim;
    let message = decide_with(&dir, &lim, &Calibration::none()).err().unwrap();
    assert!(message.contains("calibration"), "{message}");
    let tight = budget(BudgetWeight::Relative, Budget::BitsPerWeight(2.5));
    let message = decide_with(&dir, &tight, &text).err().unwrap();
    assert!(message.contains("3.125bpw"), "{message}");
    // One block: neither width averages 3.4, the nearest is taken and said.
    let one = scratch.path("one");
    network(&one, 1, 14);
    let found = decide(&one, &two_widths(Method::Rtn, Format::CompressedTensors, 3.4));
    assert_eq!(bits_of(&found), [4]);
    assert!(found.schedule.notes[0].contains("single block"), "{:?}", found.schedule.notes);
    // Damaged weights are named by block or layer.
    edit(&dir, |name, _, values| {
        if name.contains("layers.1.mlp.up_proj") {
            values[3] = f32::NAN;
        }
    });
    let mut zd = two_widths(Method::Rtn, Format::CompressedTensors, 3.0);
    zd.layerwise.layer_score = LayerScore::Zd;
    for options in [&zd, &lim] {
        let message = decide_with(&dir, options, &text).err().unwrap();
        assert!(message.contains("block 1"), "{message}");
    }
    let budget = budget(BudgetWeight::Relative, Budget::BitsPerWeight(4.5));
    let message = decide_with(&dir, &budget, &text).err().unwrap();
    assert!(message.contains("layers.1."), "{message}");
}

#[test]
fn scores_do_not_depend_on_how_the_text_is_cut_into_batches() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    network(&dir, 3, 15);
    let model = Model::open(&dir).unwrap();
    let own = two_widths(Method::Rtn, Format::CompressedTensors, 3.0).layerwise;
    let own = strata_compress::layerwise_quant::LayerwiseQuantOptions {
        layer_score: LayerScore::Lim,
        ..own
    };
    let place = scratch.path("spill");
    // No memory at all: every activation goes through the file.
    let of = |memory: u64| {
        let text = calibration(200, 24, 5);
        scores(&model, &own, &text, memory, &place, &|_, _| Ok(())).unwrap().values
    };
    assert_eq!(of(1 << 30), of(0));
    assert!(!place.exists(), "the spill file is gone");
}
