//! What the runner refuses, and that the message names the thing.

use crate::common::*;
use nn::Family;
use serde_json::json;
use strata_compress::{Calibration, Format, Method, QuantizeOptions};

#[test]
fn damaged_weights_are_named() {
    let calibration = calibration(4, 16, 41);
    for family in [Family::Llama, Family::Gpt2] {
        let config = config(family, json!({}));
        let decoder = nn::Decoder::from_config(&config).unwrap();
        let names = decoder.names(1).unwrap();
        for (name, value) in [
            (&names.qkv[0], f32::NAN),
            (&names.output, f32::INFINITY),
            (&names.up, f32::NEG_INFINITY),
            (&names.down, f32::NAN),
        ] {
            let scratch = Scratch::new();
            let input = scratch.path("in");
            nn::testing::random_checkpoint(&input, &config, 42).unwrap();
            edit(&input, |tensor, _, values| {
                if tensor == name.weight() {
                    values[70] = value;
                }
            });
            for method in METHODS {
                let message =
                    refusal(&input, &options(method, Format::Dequantized, 4), &calibration);
                let case = format!("{}, {value} in {name}", method.slug());
                assert!(message.contains(&name.module), "{case}: {message}");
                assert!(message.contains("NaN"), "{case}: {message}");
            }
        }
    }
}

#[test]
fn damaged_norms_and_biases_are_named() {
    let calibration = calibration(4, 16, 43);
    let config = config(Family::Qwen2, json!({}));
    for tensor in [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.0.post_attention_layernorm.weight",
    ] {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        nn::testing::random_checkpoint(&input, &config, 44).unwrap();
        edit(&input, |name, _, values| {
            if name == tensor {
                values[1] = f32::NAN;
            }
        });
        for method in METHODS {
            let message = refusal(&input, &options(method, Format::Dequantized, 4), &calibration);
            assert!(message.contains(tensor), "{tensor}, {}: {message}", method.slug());
            assert!(message.contains("NaN"), "{tensor}, {}: {message}", method.slug());
        }
    }
}

#[test]
fn no_calibration_is_refused() {
    assert!(Calibration::new(Vec::new(), 16).is_err());
    assert!(Calibration::new(vec![1; 17], 16).is_err());
    assert!(Calibration::new(vec![1; 4], 1).is_err());
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 45).unwrap();
    let mut without_scale = options(Method::Awq, Format::Dequantized, 4);
    without_scale.awq.no_scale = true;
    for options in [
        options(Method::Gptq, Format::Dequantized, 4),
        options(Method::Awq, Format::Dequantized, 4),
        without_scale,
    ] {
        let message = refusal(&input, &options, &Calibration::none());
        assert!(message.contains("calibration"), "{message}");
    }
    let mut none = options(Method::Gptq, Format::Dequantized, 4);
    none.calibration.samples = 0;
    let message = refusal(&input, &none, &calibration(1, 4, 1));
    assert!(message.contains("samples"), "{message}");
}

#[test]
fn foreign_token_ids_are_named() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 46).unwrap();
    let mut ids = vec![1u32; 64];
    ids[40] = 97;
    let foreign = Calibration::new(ids, 16).unwrap();
    for method in [Method::Gptq, Method::Awq] {
        let message = refusal(&input, &options(method, Format::CompressedTensors, 4), &foreign);
        assert!(message.contains("97") && message.contains("vocabulary"), "{message}");
    }
    let gpt2 = scratch.path("gpt2");
    nn::testing::tiny_checkpoint(&gpt2, Family::Gpt2, 47).unwrap();
    let long = calibration(1, 80, 1);
    let message = refusal(&gpt2, &options(Method::Gptq, Format::Dequantized, 4), &long);
    assert!(message.contains("80") && message.contains("64"), "{message}");
}

#[test]
fn quantised_input_is_refused() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 48).unwrap();
    for format in [Format::CompressedTensors, Format::Awq, Format::GptqV2] {
        let packed = scratch.path(&format!("{format:?}"));
        let rtn = options(Method::Rtn, format, 4);
        quantize(&input, &packed, &rtn, &Calibration::none());
        for method in METHODS {
            let again = options(method, Format::Dequantized, 4);
            let message = refusal(&packed, &again, &calibration(2, 8, 1));
            assert!(message.contains("already quantised"), "{message}");
        }
    }
    // Ordinary weights that lie on a grid are ordinary weights.
    let (grid, again) = (scratch.path("grid"), scratch.path("again"));
    let rtn = options(Method::Rtn, Format::Dequantized, 4);
    quantize(&input, &grid, &rtn, &Calibration::none());
    quantize(&grid, &again, &rtn, &Calibration::none());
}

#[test]
fn groups_that_do_not_divide() {
    let calibration = calibration(4, 16, 49);
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 50).unwrap();
    let with = |method, format, group_size| QuantizeOptions {
        grid: grid(4, group_size),
        ..options(method, format, 4)
    };
    // Inputs are 32 wide, those of down 48.
    for (method, format, group_size, layer) in [
        (Method::Rtn, Format::CompressedTensors, 20, "q_proj"),
        (Method::Rtn, Format::Awq, 32, "down_proj"),
        (Method::Gptq, Format::GptqV2, 32, "down_proj"),
        (Method::Awq, Format::Dequantized, 32, "down_proj"),
        (Method::Awq, Format::CompressedTensors, 128, "q_proj"),
    ] {
        let message = refusal(&input, &with(method, format, group_size), &calibration);
        let group = group_size.to_string();
        assert!(message.contains(layer) && message.contains(&group), "{message}");
        assert!(message.contains("16"), "no advice: {message}");
    }
    // Ordinary weights may have a shorter last group; 0 means whole rows for everybody.
    for method in [Method::Rtn, Method::Gptq] {
        let out = scratch.path(&format!("ragged-{}", method.slug()));
        quantize(&input, &out, &with(method, Format::Dequantized, 20), &calibration);
        logits(&out);
    }
    for method in METHODS {
        for format in [Format::Dequantized, Format::CompressedTensors, Format::GptqV2] {
            let out = scratch.path(&format!("rows-{}-{format:?}", method.slug()));
            quantize(&input, &out, &with(method, format, 0), &calibration);
            logits(&out);
        }
    }
}

#[test]
fn patterns_that_match_nothing_and_jobs_that_do_nothing() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 51).unwrap();
    let rtn = || options(Method::Rtn, Format::Dequantized, 4);
    let wrong = QuantizeOptions { only: vec!["*.q_prj".into()], ..rtn() };
    let message = refusal(&input, &wrong, &Calibration::none());
    assert!(message.contains("q_prj") && message.contains("q_proj"), "{message}");
    let nothing = QuantizeOptions { exclude: vec!["*".into()], ..rtn() };
    let message = refusal(&input, &nothing, &Calibration::none());
    assert!(message.contains("nothing"), "{message}");
    // The same name twice, or excluded and selected, is no mistake.
    let out = scratch.path("out");
    let twice = QuantizeOptions {
        only: vec!["*.q_proj".into(), "*.q_proj".into(), "*.o_proj".into()],
        exclude: vec!["*.o_proj".into(), "*.o_proj".into(), "lm_head".into()],
        ..rtn()
    };
    let outcome = quantize(&input, &out, &twice, &Calibration::none());
    let modules: Vec<&str> = outcome.layers.iter().map(|l| l.module.as_str()).collect();
    assert_eq!(modules, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]);
}
