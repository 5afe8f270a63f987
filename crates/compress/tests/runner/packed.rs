//! Packed files hold the same network as ordinary weights on the same grid.

use crate::common::*;
use nn::{Family, Model};
use serde_json::json;
use store::Dtype;
use strata_compress::options::Override;
use strata_compress::{Format, Method, QuantizeOptions};

/// The weights agree bit for bit. In AWQ and GPTQ files what is not quantised is in half precision
/// (2^-11 per number), compressed-tensors keeps it.
#[test]
fn packed_networks_compute_what_their_twins_compute() {
    let calibration = calibration(8, 16, 31);
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config, 32);
        for method in METHODS {
            let twin = scratch.path(&format!("{}-twin", method.slug()));
            quantize(&input, &twin, &options(method, Format::Dequantized, 4), &calibration);
            let reference = logits(&twin);
            let twin = Model::open(&twin).unwrap();
            for (format, tolerance) in
                [(Format::CompressedTensors, 1e-4), (Format::Awq, 4e-3), (Format::GptqV2, 4e-3)]
            {
                let case = format!("{case}, {} as {format:?}", method.slug());
                let out = scratch.path(&format!("{}-{format:?}", method.slug()));
                quantize(&input, &out, &options(method, format, 4), &calibration);
                let model = Model::open(&out).unwrap();
                for name in linears(&model.decoder) {
                    assert!(!model.checkpoint.contains(&name.weight()), "{case}: {name}");
                    assert!(matrix(&model, &name) == matrix(&twin, &name), "{case}: {name}");
                }
                let half = format != Format::CompressedTensors;
                for info in model.checkpoint.infos() {
                    let dense = twin.checkpoint.contains(&info.name);
                    if dense {
                        let expected = if half { Dtype::F16 } else { Dtype::F32 };
                        assert_eq!(info.dtype, expected, "{case}: {}", info.name);
                    }
                }
                let apart = distance(&logits(&out), &reference);
                assert!(apart < tolerance, "{case}: logits moved by {apart}");
            }
        }
    }
}

/// Bits, groups and symmetry of their own for some layers, and layers left alone.
#[test]
fn mixed_grids_come_back() {
    let calibration = calibration(8, 16, 33);
    let own = |pattern: &str, bits, group_size, symmetric| Override {
        pattern: pattern.into(),
        bits,
        group_size,
        symmetric,
    };
    for family in [Family::Llama, Family::Opt] {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config(family, json!({})), 34);
        for method in METHODS {
            let mixed = |format| QuantizeOptions {
                overrides: vec![
                    own("*.v_proj", Some(8), None, Some(true)),
                    own("*.layers.0.*", Some(3), Some(32), None),
                ],
                only: vec!["*.self_attn.*".into(), "*.self_attn.*".into()],
                exclude: vec!["*.k_proj".into(), "*.k_proj".into()],
                ..options(method, format, 4)
            };
            let case = format!("{family:?}, {}", method.slug());
            let (out, twin) =
                (scratch.path(&format!("{case}.a")), scratch.path(&format!("{case}.b")));
            let outcome = quantize(&input, &out, &mixed(Format::CompressedTensors), &calibration);
            quantize(&input, &twin, &mixed(Format::Dequantized), &calibration);
            let found: Vec<(usize, &str, u8, usize)> = outcome
                .layers
                .iter()
                .map(|l| (l.block, l.role.as_str(), l.bits.unwrap(), l.group_size.unwrap()))
                .collect();
            let expected = [
                (0, "query", 3, 32),
                (0, "value", 8, 16),
                (0, "output", 3, 32),
                (1, "query", 4, 16),
                (1, "value", 8, 16),
                (1, "output", 4, 16),
            ];
            assert_eq!(found, expected, "{case}");
            let apart = distance(&logits(&out), &logits(&twin));
            assert!(apart < 1e-4, "{case}: logits moved by {apart}");
            let (model, twin) = (Model::open(&out).unwrap(), Model::open(&twin).unwrap());
            for name in linears(&model.decoder) {
                assert!(matrix(&model, &name) == matrix(&twin, &name), "{case}: {name}");
            }
        }
    }
}

/// Scales of a bfloat16 model are bfloat16 in compressed-tensors files and half precision elsewhere.
#[test]
fn bfloat16_models() {
    let calibration = calibration(8, 16, 35);
    let scratch = Scratch::new();
    let (plain, input) = (scratch.path("plain"), scratch.path("in"));
    let config = config(Family::Qwen2, json!({"torch_dtype": "bfloat16"}));
    nn::testing::random_checkpoint(&plain, &config, 36).unwrap();
    let source = store::Checkpoint::open(&plain).unwrap();
    let mut writer = store::Writer::create(&input, store::WriteOptions::default()).unwrap();
    for info in source.infos() {
        let values = source.f32(&info.name).unwrap();
        let bytes = store::convert::from_f32(&values, Dtype::BF16).unwrap();
        writer.add(&info.name, Dtype::BF16, &info.shape, &bytes).unwrap();
    }
    writer.carry(&plain, &[]).unwrap();
    writer.finish().unwrap();
    for method in METHODS {
        for (format, leaf, dtype) in [
            (Format::CompressedTensors, "weight_scale", Dtype::BF16),
            (Format::Awq, "scales", Dtype::F16),
            (Format::Dequantized, "weight", Dtype::BF16),
        ] {
            let out = scratch.path(&format!("{}-{format:?}", method.slug()));
            quantize(&input, &out, &options(method, format, 4), &calibration);
            let checkpoint = store::Checkpoint::open(&out).unwrap();
            let name = format!("model.layers.0.mlp.up_proj.{leaf}");
            assert_eq!(checkpoint.info(&name).unwrap().dtype, dtype, "{method:?}, {format:?}");
            logits(&out);
        }
        if method == Method::Awq {
            continue;
        }
        // What was reported is what the file holds: scales were bfloat16 before codes were chosen.
        let out = scratch.path(&format!("{}-CompressedTensors", method.slug()));
        let packed = Model::open(&out).unwrap();
        let dense = Model::open(&input).unwrap();
        let record = std::fs::read(out.join("strata.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        for (layer, name) in
            record["layers"].as_array().unwrap().iter().zip(linears(&dense.decoder))
        {
            let (mut error, mut norm) = (0f64, 0f64);
            for (a, b) in matrix(&dense, &name).into_iter().zip(matrix(&packed, &name)) {
                error += f64::from(a - b).powi(2);
                norm += f64::from(a).powi(2);
            }
            let reported = layer["weight_error"].as_f64().unwrap();
            let apart = (error / norm / reported - 1.0).abs();
            assert!(apart < 1e-9, "{name}: {} reported as {reported}", error / norm);
        }
    }
}
