//! AdaDim inside the runner: what the choice is made on, that fixed directions are what they say,
//! the container that holds both, and what other formats refuse.

use crate::common::*;
use nn::{Decoder, Family, Model, Name};
use serde_json::json;
use std::path::Path;
use store::packed::Stored;
use strata_compress::adadim::{
    AdadimOptions, Base, ColumnOrder, Dim, Direction, Objective, Stream, linear_error, round,
};
use strata_compress::gptq::GptqOptions;
use strata_compress::grid::{Grid, Matrix};
use strata_compress::statistics::Gram;
use strata_compress::{Format, LayerResult, Method, QuantizeOptions};

fn ada(adadim: AdadimOptions, format: Format, bits: u8) -> QuantizeOptions {
    QuantizeOptions { adadim, ..options(Method::Adadim, format, bits) }
}

fn of(dim: Dim, base: Base) -> AdadimOptions {
    AdadimOptions { dim, base, ..Default::default() }
}

fn text<'a>(layer: &'a LayerResult, key: &str) -> &'a str {
    layer.details.get(key).and_then(|v| v.as_str()).unwrap_or_default()
}

fn error(layer: &LayerResult, key: &str) -> f64 {
    layer.details.get(key).and_then(|v| v.as_f64()).unwrap()
}

fn llama() -> (Scratch, std::path::PathBuf) {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    planted(&input, &config(Family::Llama, json!({})), 5);
    (scratch, input)
}

fn direction(layer: &LayerResult) -> Direction {
    match text(layer, "dim") {
        "oc" => Direction::Oc,
        "ic" => Direction::Ic,
        other => panic!("{other:?} is no direction"),
    }
}

#[test]
fn every_layer_holds_its_better_direction() {
    let calibration = calibration(12, 16, 1);
    let mut seen = Vec::new();
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let (input, out) = (scratch.path("in"), scratch.path("out"));
        planted(&input, &config, 5);
        let outcome = quantize(
            &input,
            &out,
            &ada(of(Dim::Ada, Base::Rtn), Format::Dequantized, 3),
            &calibration,
        );
        let (before, after) = (Model::open(&input).unwrap(), Model::open(&out).unwrap());
        let linears = linears(&before.decoder);
        assert_eq!(outcome.layers.len(), linears.len(), "{case}");
        let grid = grid(3, 16);
        let rules = Grid::new(&grid).unwrap();
        for (layer, name) in outcome.layers.iter().zip(&linears) {
            assert_eq!(layer.module, name.module, "{case}");
            let (oc, ic) = (error(layer, "error_oc"), error(layer, "error_ic"));
            let chosen = direction(layer);
            assert_eq!(chosen == Direction::Ic, ic < oc, "{case}: {layer:?}");
            assert!(oc > 0.0 && ic > 0.0 && error(layer, "outlier") >= 1.0, "{case}: {layer:?}");
            let original = matrix(&before, name);
            let original = Matrix::new(name.out_features(), name.in_features(), original).unwrap();
            let expected = nn::dequantize(&round(&original, &rules, &grid, chosen)).unwrap();
            assert!(matrix(&after, name) == expected, "{case}: {name}");
            seen.push(chosen);
        }
    }
    assert!(Direction::BOTH.iter().all(|d| seen.contains(d)), "only one direction was chosen");
}

/// Inputs of the linears of block 0 in full precision, as the network computes them.
fn gram_of(model: &Model, calibration: &strata_compress::Calibration, set: usize) -> Gram {
    use nn::{Context, Record, Site, Taps};
    let site = Site::block(0, strata_compress::block::INPUT_POINTS[set]);
    let width = model.decoder.linear_sets(0)[set][0].in_features();
    let mut gram = Gram::new(width);
    for batch in 0..calibration.batches() {
        let (tokens, geometry) = calibration.batch(batch);
        let mut context = Context::new(geometry);
        let mut record = Record::new([site]);
        let weights = model.weights.as_ref();
        model.decoder.hidden(weights, tokens, &mut context, &mut Taps::one(&mut record)).unwrap();
        tensor::host::read(&record.seen[&site], |x| gram.add(x));
    }
    gram
}

#[test]
fn errors_of_single_layers_are_their_output_errors() {
    let (scratch, input) = llama();
    let calibration = calibration(12, 16, 2);
    for objective in [Objective::Module, Objective::Linear] {
        let options = AdadimOptions { objective, ..Default::default() };
        let out = scratch.path(&format!("{objective:?}"));
        let outcome = quantize(&input, &out, &ada(options, Format::Dequantized, 3), &calibration);
        let model = Model::open(&input).unwrap();
        let grid = grid(3, 16);
        let rules = Grid::new(&grid).unwrap();
        for (set, names) in model.decoder.linear_sets(0).iter().enumerate() {
            let covariance = gram_of(&model, &calibration, set).covariance();
            for name in names {
                let layer = outcome.layers.iter().find(|l| l.module == name.module).unwrap();
                let judged = match (objective, set) {
                    (Objective::Linear, _) | (_, 1 | 3) => "linear",
                    (_, 0) => "attention",
                    _ => "mlp",
                };
                assert_eq!(text(layer, "judged_by"), judged);
                if judged != "linear" {
                    continue;
                }
                let [out, width] = name.shape;
                let original = Matrix::new(out, width, matrix(&model, name)).unwrap();
                let errors = Direction::BOTH.map(|d| {
                    let values = nn::dequantize(&round(&original, &rules, &grid, d)).unwrap();
                    linear_error(&original, &values, &covariance)
                });
                for (key, expected) in ["error_oc", "error_ic"].iter().zip(errors) {
                    let found = error(layer, key);
                    assert!((found / expected - 1.0).abs() < 1e-3, "{name} {found} {expected}");
                }
                let chosen = errors[usize::from(direction(layer) == Direction::Ic)];
                assert_eq!(chosen, errors[0].min(errors[1]));
            }
        }
    }
}

/// The error of q is that of the whole attention with everything else as it was, the error of k
/// that with q already quantised.
#[test]
fn module_errors_are_greedy() {
    use nn::{Context, Overlay, Taps};
    let (scratch, input) = llama();
    let calibration = calibration(6, 16, 3);
    let options = ada(of(Dim::Ada, Base::Rtn), Format::Dequantized, 3);
    let outcome = quantize(&input, &scratch.path("out"), &options, &calibration);
    let model = Model::open(&input).unwrap();
    let done = Model::open(&scratch.path("out")).unwrap();
    let names = &model.decoder.names(0).unwrap().qkv;
    let grid = grid(3, 16);
    let rules = Grid::new(&grid).unwrap();
    for (n, name) in names.iter().enumerate() {
        let layer = outcome.layers.iter().find(|l| l.module == name.module).unwrap();
        let [out, width] = name.shape;
        let original = Matrix::new(out, width, matrix(&model, name)).unwrap();
        for (key, direction) in ["error_oc", "error_ic"].iter().zip(Direction::BOTH) {
            let (mut sum, mut count) = (0f64, 0usize);
            for batch in 0..calibration.batches() {
                let (tokens, geometry) = calibration.batch(batch);
                let context = Context::new(geometry);
                let weights = model.weights.as_ref();
                let x = model.decoder.embed(weights, tokens, &context, &mut Taps::none()).unwrap();
                let norm = &model.decoder.names(0).unwrap().norm1;
                let x = model.decoder.norm(norm, weights, x).unwrap();
                let mut now = Overlay::new(weights);
                let device = nn::Weights::device(&now);
                let put = |now: &mut Overlay<'_>, name: &Name, values: Vec<f32>| {
                    let tensor = tensor::host::from_vec(values, name.shape, &device);
                    now.matrices.insert(name.weight(), tensor);
                };
                for earlier in &names[..n] {
                    put(&mut now, earlier, matrix(&done, earlier));
                }
                let run = |now: &Overlay<'_>| {
                    let mut context = Context::new(geometry);
                    let y = model.decoder.attention(0, now, x.clone(), &mut context).unwrap();
                    tensor::host::into_vec(y)
                };
                let before = run(&now);
                put(
                    &mut now,
                    name,
                    nn::dequantize(&round(&original, &rules, &grid, direction)).unwrap(),
                );
                for (a, b) in run(&now).iter().zip(&before) {
                    sum += f64::from(a - b) * f64::from(a - b);
                    count += 1;
                }
            }
            let (found, expected) = (error(layer, key), sum / count as f64);
            assert!((found / expected - 1.0).abs() < 1e-3, "{name} {key}: {found} {expected}");
        }
    }
}

#[test]
fn along_the_input_for_all_is_the_base_method() {
    let calibration = calibration(12, 16, 4);
    for family in [Family::Llama, Family::Gpt2, Family::GptNeox] {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config(family, json!({})), 6);
        let run = |name: &str, options: &QuantizeOptions| {
            quantize(&input, &scratch.path(name), options, &calibration);
            scratch.path(name)
        };
        for format in [Format::Dequantized, Format::CompressedTensors, Format::Strata] {
            let case = format!("{family:?} {format:?}");
            let ours = run(&format!("{case} a"), &ada(of(Dim::Oc, Base::Rtn), format, 3));
            let rtn = run(&format!("{case} b"), &options(Method::Rtn, format, 3));
            assert_same_tensors(&ours, &rtn, &case);
            let stream = Stream::Quantized;
            for (columns, act_order, static_groups) in
                [(ColumnOrder::Stored, false, false), (ColumnOrder::EnergyStatic, true, true)]
            {
                let case = format!("{case} {columns:?}");
                let adadim = AdadimOptions { stream, columns, ..of(Dim::Oc, Base::Gptq) };
                let ours = run(&format!("{case} c"), &ada(adadim, format, 3));
                let gptq = GptqOptions { act_order, static_groups, ..Default::default() };
                let theirs = QuantizeOptions { gptq, ..options(Method::Gptq, format, 3) };
                assert_same_tensors(&ours, &run(&format!("{case} d"), &theirs), &case);
            }
        }
    }
}

#[test]
fn own_container_holds_both_directions_exactly() {
    let calibration = calibration(12, 16, 7);
    let mut kinds = Vec::new();
    for (case, config) in cases() {
        for base in [Base::Rtn, Base::Gptq] {
            let scratch = Scratch::new();
            let input = scratch.path("in");
            planted(&input, &config, 8);
            let (own, twin) = (scratch.path("own"), scratch.path("twin"));
            let outcome =
                quantize(&input, &own, &ada(of(Dim::Ada, base), Format::Strata, 3), &calibration);
            quantize(&input, &twin, &ada(of(Dim::Ada, base), Format::Dequantized, 3), &calibration);
            let (packed, plain) = (Model::open(&own).unwrap(), Model::open(&twin).unwrap());
            let modules = store::packed::parse_config(packed.checkpoint.config().unwrap());
            let config = modules.unwrap().unwrap();
            for (layer, name) in outcome.layers.iter().zip(linears(&packed.decoder)) {
                assert!(matrix(&packed, &name) == matrix(&plain, &name), "{case}: {name}");
                let stored =
                    store::packed::load(&packed.checkpoint, &name.module, &config).unwrap();
                let along_output = matches!(stored, Stored::Columns(_));
                assert_eq!(along_output, direction(layer) == Direction::Ic, "{case}: {name}");
                assert!((stored.bits_per_weight() - layer.bits_per_weight).abs() < 1e-12);
                kinds.push(along_output);
            }
            let apart = distance(&logits(&own), &logits(&twin));
            assert!(apart < 1e-4, "{case}: logits moved by {apart}");
        }
    }
    assert!(kinds.contains(&true) && kinds.contains(&false));
}

/// Scaling an input channel by a power of two scales its groups; the network stays the same one.
#[test]
fn planted_outliers_do_not_move_groups_along_the_output() {
    let scratch = Scratch::new();
    let config = config(Family::Llama, json!({"attention_bias": false}));
    let calibration = calibration(8, 16, 9);
    let (input, scaled) = (scratch.path("in"), scratch.path("scaled"));
    nn::testing::random_checkpoint(&input, &config, 10).unwrap();
    nn::testing::random_checkpoint(&scaled, &config, 10).unwrap();
    let decoder = Decoder::from_config(&config).unwrap();
    edit(&scaled, |tensor, _, values| {
        for fold in (0..decoder.num_blocks()).flat_map(|b| decoder.norm_fold(b)) {
            if tensor == fold.norm.weight() {
                [3, 17].iter().for_each(|&c| values[c] *= 16.0);
            }
            for name in fold.layers.iter().filter(|name| name.weight() == tensor) {
                for row in 0..name.out_features() {
                    [3, 17].iter().for_each(|&c| values[place(name, row, c)] /= 16.0);
                }
            }
        }
    });
    let run = |from: &Path, dim: Dim| {
        let out = scratch.path(&format!("{dim:?} {}", from.ends_with("scaled")));
        let options = ada(of(dim, Base::Rtn), Format::Dequantized, 2);
        quantize(from, &out, &options, &calibration);
        logits(&out)
    };
    let same = distance(&run(&scaled, Dim::Ic), &run(&input, Dim::Ic));
    let moved = distance(&run(&scaled, Dim::Oc), &run(&input, Dim::Oc));
    assert!(same < 1e-4 && moved > 1e-2, "{same} {moved}");
}

#[test]
fn heuristic_and_selection_by_gptq() {
    let (scratch, input) = llama();
    let calibration = calibration(12, 16, 11);
    let run = |name: &str, adadim: AdadimOptions| {
        let options = ada(adadim, Format::Dequantized, 3);
        quantize(&input, &scratch.path(name), &options, &calibration).layers
    };
    for layer in run("heuristic", of(Dim::Heuristic, Base::Rtn)) {
        let expected = match layer.role.as_str() {
            "query" | "key" | "value" | "down" => "ic",
            _ => "oc",
        };
        assert_eq!(text(&layer, "dim"), expected, "{layer:?}");
        assert!(!layer.details.contains_key("error_oc"));
    }
    let by_rounding = run("rtn", of(Dim::Ada, Base::Gptq));
    let select_by = Base::Gptq;
    let by_gptq = run("gptq", AdadimOptions { select_by, ..of(Dim::Ada, Base::Gptq) });
    for (a, b) in by_rounding.iter().zip(&by_gptq) {
        // Errors of compensated codes are smaller than those of rounded ones.
        if text(a, "judged_by") == "linear" && a.block == 0 {
            assert!(error(b, "error_oc") < error(a, "error_oc"), "{a:?} {b:?}");
            assert!(error(b, "error_ic") < error(a, "error_ic"), "{a:?} {b:?}");
        }
        assert!(error(b, "loss") > 0.0 && error(b, "damping") > 0.0);
    }
}

#[test]
fn formats_of_other_tools_refuse_with_the_list_of_layers() {
    let (_scratch, input) = llama();
    let calibration = calibration(4, 16, 12);
    for format in [Format::CompressedTensors, Format::Awq, Format::GptqV2] {
        let message = refusal(&input, &ada(of(Dim::Ada, Base::Rtn), format, 4), &calibration);
        assert!(message.contains("--dim oc") && message.contains("--format strata"), "{message}");
        let message = refusal(&input, &ada(of(Dim::Heuristic, Base::Rtn), format, 4), &calibration);
        for phrase in
            ["8 layers", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "--dim oc"]
        {
            assert!(message.contains(phrase), "{phrase}: {message}");
        }
        assert!(!message.contains("gate_proj"), "{message}");
        let message = refusal(&input, &ada(of(Dim::Ic, Base::Gptq), format, 4), &calibration);
        assert!(message.contains("14 layers") && message.contains("and 6 more"), "{message}");
    }
    // A layer that is left alone has no direction that a format could lack.
    let options = QuantizeOptions {
        exclude: vec![
            "*.q_proj".into(),
            "*.k_proj".into(),
            "*.v_proj".into(),
            "*.down_proj".into(),
        ],
        ..ada(of(Dim::Heuristic, Base::Rtn), Format::CompressedTensors, 4)
    };
    let scratch = Scratch::new();
    quantize(&input, &scratch.path("out"), &options, &calibration);
}

#[test]
fn short_groups_are_kept_and_said() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    // 16 outputs of k and v, 48 of gate and up: groups of 32 fit neither.
    planted(&input, &config(Family::Mistral, json!({})), 13);
    let calibration = calibration(6, 16, 14);
    for format in [Format::Dequantized, Format::Strata] {
        let options =
            QuantizeOptions { grid: grid(4, 32), ..ada(of(Dim::Ic, Base::Gptq), format, 4) };
        let out = scratch.path(&format!("{format:?}"));
        let outcome = quantize(&input, &out, &options, &calibration);
        let said = |module: &str, what: &str| {
            outcome.warnings.iter().filter(|w| w.contains(module) && w.contains(what)).count()
        };
        assert_eq!(said("k_proj", "16 outputs in groups of 32: the only one holds 16"), 1);
        assert_eq!(said("up_proj", "48 outputs in groups of 32: the last one holds 16"), 1);
        assert_eq!(said("q_proj", "groups"), 0);
        let noted = outcome.layers.iter().filter(|l| l.details.contains_key("short_group"));
        assert_eq!(noted.count(), 8);
    }
    let (own, plain) = (scratch.path("Strata"), scratch.path("Dequantized"));
    assert!(distance(&logits(&own), &logits(&plain)) < 1e-4);
}

#[test]
fn layers_and_weights_that_cannot_be_measured() {
    let (scratch, input) = llama();
    let calibration = calibration(4, 16, 15);
    // Nothing of block 1 but its last layer.
    let options = QuantizeOptions {
        only: vec!["*.layers.1.mlp.down_proj".into()],
        ..ada(of(Dim::Ada, Base::Gptq), Format::Dequantized, 3)
    };
    let outcome = quantize(&input, &scratch.path("one"), &options, &calibration);
    assert_eq!(outcome.layers.len(), 1);
    assert!(error(&outcome.layers[0], "error_oc") > 0.0);
    // Inputs of the last layer that are all zero excite nothing: GPTQ stops or rounds, and both
    // directions are equally good.
    edit(&input, |tensor, _, values| {
        if tensor.contains("layers.0.mlp.gate_proj") {
            values.fill(0.0);
        }
    });
    let dead = ada(of(Dim::Ada, Base::Rtn), Format::Dequantized, 3);
    let outcome = quantize(&input, &scratch.path("dead"), &dead, &calibration);
    let down = outcome.layers.iter().find(|l| l.module.contains("0.mlp.down_proj")).unwrap();
    assert_eq!((error(down, "error_oc"), error(down, "error_ic")), (0.0, 0.0));
    assert_eq!(text(down, "dim"), "oc");
    let gptq = ada(of(Dim::Ada, Base::Gptq), Format::Dequantized, 3);
    let message = refusal(&input, &gptq, &calibration);
    assert!(message.contains("0.mlp.down_proj") && message.contains("no calibration"), "{message}");
    let rounding =
        GptqOptions { on_failure: strata_compress::gptq::OnFailure::Rtn, ..Default::default() };
    let outcome = quantize(
        &input,
        &scratch.path("rounded"),
        &QuantizeOptions { gptq: rounding, ..gptq },
        &calibration,
    );
    assert!(outcome.warnings.iter().any(|w| w.contains("0.mlp.down_proj")));
    let down = outcome.layers.iter().find(|l| l.module.contains("0.mlp.down_proj")).unwrap();
    assert_eq!(text(down, "fallback"), "rtn");
}

#[test]
fn kept_zeros_of_a_pruned_network() {
    let (scratch, input) = llama();
    edit(&input, |tensor, shape, values| {
        if shape.len() == 2 && tensor.contains("proj") {
            values.iter_mut().step_by(2).for_each(|w| *w = 0.0);
        }
    });
    let calibration = calibration(12, 16, 16);
    let run = |keep_zeros: bool| {
        let out = scratch.path(&format!("{keep_zeros}"));
        let gptq = GptqOptions { keep_zeros, ..Default::default() };
        let options = QuantizeOptions { gptq, ..ada(of(Dim::Ada, Base::Gptq), Format::Strata, 3) };
        quantize(&input, &out, &options, &calibration);
        let model = Model::open(&out).unwrap();
        let pruned = |name: &Name| matrix(&model, name).iter().step_by(2).all(|w| *w == 0.0);
        linears(&model.decoder).iter().filter(|name| pruned(name)).count()
    };
    assert_eq!(run(true), 14);
    assert!(run(false) < 14);
}
