//! GPTQ inside the runner: true-sequential calibration, column order, dead inputs.

use crate::common::*;
use nn::{Context, Family, Model, Overlay, Record, Site, Taps};
use serde_json::json;
use std::collections::BTreeMap;
use strata_compress::block::INPUT_POINTS;
use strata_compress::gptq::{self, Factor, GptqOptions};
use strata_compress::grid::{Grid, Matrix};
use strata_compress::statistics::Gram;
use strata_compress::{Calibration, Format, Method, QuantizeOptions};
use tensor::{Tensor, host};

fn options_of(gptq: GptqOptions, format: Format, bits: u8) -> QuantizeOptions {
    QuantizeOptions { gptq, ..options(Method::Gptq, format, bits) }
}

/// GPTQ as the paper tells it, with a whole pass through the block for every set of layers. With
/// `sequential` off, all sets of a block are calibrated on its original weights.
fn by_hand(
    model: &Model,
    calibration: &Calibration,
    options: &QuantizeOptions,
    sequential: bool,
) -> BTreeMap<String, Vec<f32>> {
    let decoder = &model.decoder;
    let rules = Grid::new(&options.grid).unwrap();
    let mut streams: Vec<Tensor<2>> = (0..calibration.batches())
        .map(|batch| {
            let (tokens, geometry) = calibration.batch(batch);
            let context = Context::new(geometry);
            decoder.embed(model.weights.as_ref(), tokens, &context, &mut Taps::none()).unwrap()
        })
        .collect();
    let mut quantized = BTreeMap::new();
    for block in 0..decoder.num_blocks() {
        let mut weights = Overlay::new(model.weights.as_ref());
        let mut untouched = Overlay::new(model.weights.as_ref());
        weights.load(decoder.names(block).unwrap().all()).unwrap();
        untouched.load(decoder.names(block).unwrap().all()).unwrap();
        for (set, names) in decoder.linear_sets(block).iter().enumerate() {
            let mut gram = Gram::new(names[0].in_features());
            let site = Site::block(block, INPUT_POINTS[set]);
            for (batch, stream) in streams.iter().enumerate() {
                let mut record = Record::new([site]);
                let mut context = Context::new(calibration.batch(batch).1);
                let source = if sequential { &weights } else { &untouched };
                let mut taps = Taps::one(&mut record);
                decoder.block(block, source, stream.clone(), &mut context, &mut taps).unwrap();
                host::read(&record.seen[&site], |x| gram.add(x));
            }
            let factor = Factor::new("by hand", &gram, &options.gptq).unwrap();
            for name in names {
                let values = host::into_vec(nn::Weights::matrix(&weights, name).unwrap());
                let dense = Matrix::new(name.out_features(), name.in_features(), values).unwrap();
                let result = gptq::quantize(
                    "by hand",
                    &dense,
                    &factor,
                    &rules,
                    &options.grid,
                    &options.gptq,
                )
                .unwrap();
                let values = result.matrix.dequantize();
                let device = nn::Weights::device(&weights);
                weights
                    .matrices
                    .insert(name.weight(), host::from_vec(values.clone(), name.shape, &device));
                quantized.insert(name.module.clone(), values);
            }
        }
        for (batch, stream) in streams.iter_mut().enumerate() {
            let mut context = Context::new(calibration.batch(batch).1);
            let x = stream.clone();
            *stream = decoder.block(block, &weights, x, &mut context, &mut Taps::none()).unwrap();
        }
    }
    quantized
}

#[test]
fn every_set_sees_inputs_of_the_quantised_sets_before_it() {
    // More tokens than one batch holds, the last batch shorter.
    let calibration = calibration(70, 32, 11);
    assert_eq!(calibration.batches(), 2);
    let options = options_of(GptqOptions::default(), Format::Dequantized, 3);
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let (input, out) = (scratch.path("in"), scratch.path("out"));
        nn::testing::random_checkpoint(&input, &config, 12).unwrap();
        quantize(&input, &out, &options, &calibration);
        let (before, after) = (Model::open(&input).unwrap(), Model::open(&out).unwrap());
        let sequential = by_hand(&before, &calibration, &options, true);
        let parallel = by_hand(&before, &calibration, &options, false);
        for name in linears(&before.decoder) {
            let ours = matrix(&after, &name);
            assert!(ours == sequential[&name.module], "{case}: {name}");
        }
        for block in 0..before.decoder.num_blocks() {
            for (set, names) in before.decoder.linear_sets(block).iter().enumerate() {
                // Only the first set of the first block has the same inputs either way.
                let first = block == 0 && set == 0;
                // In a parallel block the MLP does not read attention's output.
                let parallel_mlp = case == "gpt_neox" && block == 0 && set == 2;
                let module = &names[0].module;
                assert_eq!(
                    sequential[module] == parallel[module],
                    first || parallel_mlp,
                    "{case}: {module}: the test cannot tell sequential from parallel"
                );
            }
        }
    }
}

/// One-hot embeddings make the inputs of the first block orthogonal, so nothing can be compensated
/// there: GPTQ is rounding, bit for bit. Later layers see correlated inputs.
#[test]
fn orthogonal_inputs_make_it_rtn() {
    let scratch = Scratch::new();
    let (input, a, b) = (scratch.path("in"), scratch.path("gptq"), scratch.path("rtn"));
    nn::testing::tiny_checkpoint(&input, Family::Llama, 13).unwrap();
    edit(&input, |name, shape, values| {
        if name == "model.embed_tokens.weight" {
            for (token, row) in values.chunks_mut(shape[1]).enumerate() {
                row.fill(0.0);
                row[token % shape[1]] = 1.0 + token as f32 / 50.0;
            }
        }
    });
    let ids = (0..32).chain((0..32).rev()).collect();
    let calibration = Calibration::new(ids, 32).unwrap();
    quantize(&input, &a, &options_of(GptqOptions::default(), Format::Dequantized, 3), &calibration);
    let rtn = options(Method::Rtn, Format::Dequantized, 3);
    quantize(&input, &b, &rtn, &Calibration::none());
    let (a, b) = (Model::open(&a).unwrap(), Model::open(&b).unwrap());
    let sets = a.decoder.linear_sets(0);
    for name in &sets[0] {
        assert!(matrix(&a, name) == matrix(&b, name), "{name}");
    }
    for name in sets[1..].iter().flatten() {
        assert!(matrix(&a, name) != matrix(&b, name), "{name}");
    }
}

#[test]
fn column_order_goes_only_where_the_format_can_hold_it() {
    let calibration = calibration(8, 16, 14);
    let scratch = Scratch::new();
    let input = scratch.path("in");
    planted(&input, &config(Family::Llama, json!({})), 15);
    let dynamic = GptqOptions { act_order: true, ..Default::default() };
    let fixed = GptqOptions { static_groups: true, ..dynamic.clone() };

    for (gptq, formats) in [
        (&fixed, &[Format::CompressedTensors, Format::Awq, Format::GptqV2][..]),
        (&dynamic, &[Format::GptqV2][..]),
    ] {
        let twin = scratch.path(&format!("twin-{}", gptq.static_groups));
        quantize(&input, &twin, &options_of(gptq.clone(), Format::Dequantized, 4), &calibration);
        let twin = Model::open(&twin).unwrap();
        for &format in formats {
            let out = scratch.path(&format!("{format:?}-{}", gptq.static_groups));
            quantize(&input, &out, &options_of(gptq.clone(), format, 4), &calibration);
            let model = Model::open(&out).unwrap();
            for name in linears(&model.decoder) {
                assert!(matrix(&model, &name) == matrix(&twin, &name), "{format:?}: {name}");
            }
            if format == Format::GptqV2 {
                let config = model.checkpoint.config().unwrap();
                assert_eq!(config["quantization_config"]["desc_act"], true);
                let index = model.checkpoint.i32("model.layers.0.self_attn.q_proj.g_idx").unwrap();
                let neighbours: Vec<i32> = (0..32).map(|column| column / 16).collect();
                assert_eq!(index == neighbours, gptq.static_groups, "{index:?}");
                let mut counts = [0; 2];
                index.iter().for_each(|&group| counts[group as usize] += 1);
                assert_eq!(counts, [16, 16]);
            }
        }
    }
    for format in [Format::CompressedTensors, Format::Awq] {
        let message = refusal(&input, &options_of(dynamic.clone(), format, 4), &calibration);
        assert!(message.contains("--static-groups") && message.contains("gptq-v2"), "{message}");
    }
    // The planted channels come first.
    let index = store::Checkpoint::open(&scratch.path("GptqV2-false"))
        .unwrap()
        .i32("model.layers.0.self_attn.q_proj.g_idx")
        .unwrap();
    for channel in [3, 17, 20] {
        assert_eq!(index[channel], 0, "{index:?}");
    }
}

#[test]
fn dead_inputs_get_weight_zero_and_are_reported() {
    const DEAD: usize = 5;
    let calibration = calibration(8, 16, 16);
    for (act_order, family) in [(false, Family::Llama), (true, Family::Opt)] {
        let config = config(family, json!({}));
        let scratch = Scratch::new();
        let (input, out) = (scratch.path("in"), scratch.path("out"));
        nn::testing::random_checkpoint(&input, &config, 17).unwrap();
        let decoder = nn::Decoder::from_config(&config).unwrap();
        let norm = decoder.names(0).unwrap().norm1.clone();
        edit(&input, |name, _, values| {
            if norm.tensors().iter().any(|n| n == name) {
                values[DEAD] = 0.0;
            }
        });
        let gptq = GptqOptions { act_order, ..Default::default() };
        let outcome =
            quantize(&input, &out, &options_of(gptq, Format::Dequantized, 4), &calibration);
        logits(&out);
        let model = Model::open(&out).unwrap();
        for name in &decoder.linear_sets(0)[0] {
            let values = matrix(&model, name);
            assert!(values.chunks(32).all(|row| row[DEAD] == 0.0), "{name}");
            let layer = outcome.layers.iter().find(|l| l.module == name.module).unwrap();
            assert_eq!(layer.details["dead_columns"], 1, "{layer:?}");
        }
        let alive = outcome.layers.iter().find(|l| l.block == 1 && l.role == "query").unwrap();
        assert_eq!(alive.details["dead_columns"], 0);
    }
}

/// Fewer tokens than inputs: the Hessian is singular, damping carries it.
#[test]
fn fewer_tokens_than_inputs() {
    let scratch = Scratch::new();
    let (input, out) = (scratch.path("in"), scratch.path("out"));
    nn::testing::tiny_checkpoint(&input, Family::Qwen2, 18).unwrap();
    let few = calibration(2, 4, 19);
    quantize(&input, &out, &options_of(GptqOptions::default(), Format::Dequantized, 4), &few);
    logits(&out);
}
