//! Layouts against words computed by hand and against each other's pitfalls.

use serde_json::{Value, json};

use super::*;
use crate::safetensors::tests::Lcg;
use crate::writer::{WriteOptions, Writer};

fn matrix(random: &mut Lcg, bits: u8, out: usize, input: usize, group: usize) -> QuantizedMatrix {
    let top = (1usize << bits) - 1;
    let groups = input / group;
    let symmetric = random.below(2) == 0;
    QuantizedMatrix {
        bits,
        group_size: group,
        out_features: out,
        in_features: input,
        codes: (0..out * input).map(|_| random.below(top + 1) as u8).collect(),
        // Halves are exact in f16.
        scales: (0..out * groups).map(|_| (1 + random.below(1000)) as f32 / 1024.0).collect(),
        zeros: (0..out * groups)
            .map(|_| if symmetric { 1u8 << (bits - 1) } else { 1 + random.below(top) as u8 })
            .collect(),
        symmetric,
        group_index: None,
    }
}

/// Writes the tensors and opens them again.
fn store(tensors: Vec<PackedTensor>) -> (tempfile::TempDir, Checkpoint) {
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    let mut w = Writer::create(&out, WriteOptions::default()).unwrap();
    for (name, dtype, shape, bytes) in tensors {
        w.add(&name, dtype, &shape, &bytes).unwrap();
    }
    w.finish().unwrap();
    let ck = Checkpoint::open(&out).unwrap();
    (d, ck)
}

fn config_of(layout: Layout, m: &QuantizedMatrix) -> QuantConfig {
    QuantConfig::new(layout, m.bits, Some(m.group_size), m.symmetric)
}

fn word(tensors: &[PackedTensor], leaf: &str, index: usize) -> u32 {
    let (_, _, _, bytes) = tensors.iter().find(|t| t.0.ends_with(leaf)).unwrap();
    u32::from_le_bytes(bytes[4 * index..4 * index + 4].try_into().unwrap())
}

/// Eight outputs of one input, or one output of eight inputs.
fn eight(codes: [u8; 8], along_out: bool) -> QuantizedMatrix {
    let (out, input) = if along_out { (8, 1) } else { (8, 8) };
    let codes = if along_out { codes.to_vec() } else { codes.repeat(8) };
    QuantizedMatrix {
        bits: 4,
        group_size: input,
        out_features: out,
        in_features: input,
        codes,
        scales: vec![1.0; out],
        zeros: vec![8; out],
        symmetric: true,
        group_index: None,
    }
}

#[test]
fn nibble_orders_of_awq_and_gptq() {
    let ascending = pack(Layout::AutoAwq, "p", &eight([1, 2, 3, 4, 5, 6, 7, 8], true)).unwrap();
    assert_eq!(word(&ascending, "qweight", 0), 0x8642_7531);
    let codes = [15, 0, 7, 8, 3, 12, 1, 9];
    let awq = pack(Layout::AutoAwq, "p", &eight(codes, true)).unwrap();
    assert_eq!(word(&awq, "qweight", 0), 0x9C80_137F);
    let gptq = pack(Layout::Gptq { v2: false }, "p", &eight(codes, false)).unwrap();
    assert_eq!(word(&gptq, "qweight", 0), 0x91C3_870F);
    // The middle zero point, minus one.
    assert_eq!(word(&gptq, "qzeros", 0), 0x7777_7777);
    let v2 = pack(Layout::Gptq { v2: true }, "p", &eight(codes, false)).unwrap();
    assert_eq!(word(&v2, "qzeros", 0), 0x8888_8888);
    assert_eq!(word(&awq, "qzeros", 0), 0x8888_8888);
}

#[test]
fn shapes_and_names() {
    let m = matrix(&mut Lcg(3), 3, 64, 96, 32);
    let shapes = |layout| -> Vec<(String, Vec<usize>)> {
        pack(layout, "m.q", &m).unwrap().into_iter().map(|t| (t.0, t.2)).collect()
    };
    assert_eq!(
        shapes(Layout::Gptq { v2: true }),
        [
            ("m.q.qweight".into(), vec![9, 64]),
            ("m.q.qzeros".into(), vec![3, 6]),
            ("m.q.scales".into(), vec![3, 64]),
            ("m.q.g_idx".into(), vec![96]),
        ]
    );
    let m = QuantizedMatrix { zeros: vec![1; 64 * 3], symmetric: false, ..m.clone() };
    let shapes: Vec<_> = pack(Layout::CompressedTensors, "m.q", &m).unwrap();
    let shapes: Vec<_> = shapes.into_iter().map(|t| (t.0, t.2)).collect();
    assert_eq!(
        shapes,
        [
            ("m.q.weight_packed".into(), vec![64, 9]),
            ("m.q.weight_scale".into(), vec![64, 3]),
            ("m.q.weight_shape".into(), vec![2]),
            ("m.q.weight_zero_point".into(), vec![6, 3]),
        ]
    );
}

#[test]
fn three_bit_words() {
    let codes: Vec<u8> = (0..32).map(|i| (5 * i + 3) % 8).collect();
    let m = QuantizedMatrix {
        bits: 3,
        group_size: 32,
        out_features: 32,
        in_features: 32,
        codes: codes.repeat(32),
        scales: vec![0.5; 32],
        zeros: vec![4; 32],
        symmetric: true,
        group_index: None,
    };
    let expected = [0x43C6_7543, 0x7543_C675, 0xC675_43C6];
    let compressed = pack(Layout::CompressedTensors, "p", &m).unwrap();
    let gptq = pack(Layout::Gptq { v2: false }, "p", &m).unwrap();
    for (i, expected) in expected.into_iter().enumerate() {
        assert_eq!(word(&compressed, "weight_packed", i), expected);
        assert_eq!(word(&gptq, "qweight", 32 * i), expected, "word rows of 32 outputs");
    }
}

#[test]
fn everything_round_trips() {
    let mut random = Lcg(5);
    for bits in 1..=8u8 {
        for (out, input, group) in
            [(8, 8, 8), (32, 64, 16), (40, 96, 32), (64, 160, 160), (7, 15, 5), (96, 32, 1)]
        {
            let m = matrix(&mut random, bits, out, input, group);
            for layout in [
                Layout::CompressedTensors,
                Layout::AutoAwq,
                Layout::Gptq { v2: false },
                Layout::Gptq { v2: true },
            ] {
                let Ok(tensors) = pack(layout, "a.b", &m) else {
                    assert!(layout != Layout::CompressedTensors, "holds everything");
                    continue;
                };
                let (_d, ck) = store(tensors);
                assert!(is_packed(layout, &ck, "a.b"));
                assert_eq!(modules(layout, &ck), ["a.b"]);
                let back = unpack(layout, &ck, "a.b", &config_of(layout, &m)).unwrap();
                // A random asymmetric grid may happen to be the middle everywhere.
                let m = QuantizedMatrix { symmetric: back.symmetric, ..m.clone() };
                assert_eq!(back, m, "{layout} {bits} bits [{out}, {input}] / {group}");
            }
        }
    }
}

#[test]
fn reordered_groups() {
    let mut m = matrix(&mut Lcg(9), 4, 8, 16, 8);
    m.group_index = Some((0..16).map(|k| (k % 2) as u32).collect());
    let layout = Layout::Gptq { v2: true };
    let (_d, ck) = store(pack(layout, "p", &m).unwrap());
    let back = unpack(layout, &ck, "p", &config_of(layout, &m)).unwrap();
    assert_eq!(back.group_index, m.group_index);
    let w = back.dequantize();
    for (k, value) in w[..16].iter().enumerate() {
        let g = k % 2;
        let expected = (f32::from(m.codes[k]) - f32::from(m.zeros[g])) * m.scales[g];
        assert_eq!(*value, expected);
    }
    for layout in [Layout::AutoAwq, Layout::CompressedTensors] {
        let message = pack(layout, "p", &m).unwrap_err().to_string();
        assert!(message.contains("static groups"), "{message}");
    }
}

#[test]
fn dequantises_by_hand() {
    // [-0.5, 0.1, 0.3, 1.0] at 4 bits: step 0.1, zero point 5.
    let m = QuantizedMatrix {
        bits: 4,
        group_size: 2,
        out_features: 1,
        in_features: 4,
        codes: vec![0, 6, 8, 15],
        scales: vec![0.5, 0.25],
        zeros: vec![5, 7],
        symmetric: false,
        group_index: None,
    };
    assert_eq!(m.dequantize(), [-2.5, 0.5, 0.25, 2.0]);
    // 4 bits, and 16 + 4 more for every 2 weights.
    assert_eq!(m.bits_per_weight(), 14.0);
    let ragged = QuantizedMatrix { group_size: 3, ..m };
    assert_eq!(ragged.dequantize(), [-2.5, 0.5, 1.5, 2.0], "the last group is shorter");
}

fn refused(layout: Layout, m: &QuantizedMatrix, parts: &[&str]) {
    let message = pack(layout, "model.q_proj", m).unwrap_err().to_string();
    for part in parts.iter().chain(&["model.q_proj"]) {
        assert!(message.contains(part), "\"{part}\" expected in: {message}");
    }
}

#[test]
fn refusals() {
    let random = &mut Lcg(1);
    let base = matrix(random, 4, 64, 64, 32);
    let all = [Layout::CompressedTensors, Layout::AutoAwq, Layout::Gptq { v2: false }];
    for layout in all {
        let m = QuantizedMatrix { group_size: 48, ..base.clone() };
        refused(layout, &m, &["not a multiple of the group size 48", "8, 16, 32, 64"]);
        let mut m = base.clone();
        m.codes[7] = 16;
        refused(layout, &m, &["a code exceeds 15"]);
        let mut m = base.clone();
        m.scales[3] = f32::NAN;
        refused(layout, &m, &["a scale is NaN"]);
        m.scales[3] = 0.1;
        refused(layout, &m, &["not representable in f16", "round"]);
        m.scales.pop();
        refused(layout, &m, &["127 scales"]);
    }
    let m = matrix(random, 3, 64, 64, 32);
    refused(Layout::AutoAwq, &m, &["AutoAWQ holds 4 bits, not 3"]);
    let m = matrix(random, 5, 64, 64, 32);
    refused(Layout::Gptq { v2: false }, &m, &["2, 3, 4 or 8 bits, not 5"]);
    let m = matrix(random, 4, 12, 64, 32);
    refused(Layout::AutoAwq, &m, &["multiple of 8; it is 12"]);
    refused(Layout::Gptq { v2: false }, &m, &["out to be a multiple of 8; it is 12"]);
    let m = matrix(random, 4, 16, 12, 12);
    refused(Layout::Gptq { v2: false }, &m, &["in to be a multiple of 8; it is 12"]);
    let m = matrix(random, 3, 32, 48, 48);
    refused(Layout::Gptq { v2: false }, &m, &["in to be a multiple of 32; it is 48"]);
    let m = QuantizedMatrix { symmetric: true, zeros: vec![7; 128], ..base.clone() };
    refused(Layout::AutoAwq, &m, &["not all zero points are 8"]);
}

#[test]
fn zero_point_zero_needs_gptq_v2() {
    let mut m = matrix(&mut Lcg(2), 4, 8, 8, 8);
    m.symmetric = false;
    m.zeros[5] = 0;
    refused(Layout::Gptq { v2: false }, &m, &["zero point is 0", "write gptq_v2"]);
    let (_d, ck) = store(pack(Layout::Gptq { v2: true }, "p", &m).unwrap());
    let config = config_of(Layout::Gptq { v2: true }, &m);
    assert_eq!(unpack(config.layout, &ck, "p", &config).unwrap().zeros, m.zeros);
    // Read as v1, a stored 15 would be the zero point 16.
    m.zeros[5] = 15;
    let (_d, ck) = store(pack(Layout::Gptq { v2: true }, "p", &m).unwrap());
    let message = unpack(Layout::Gptq { v2: false }, &ck, "p", &config).unwrap_err().to_string();
    assert!(message.contains("zero point is 16") && message.contains("p.qzeros"), "{message}");
}

#[test]
fn inconsistent_modules_are_refused() {
    let m = matrix(&mut Lcg(4), 4, 32, 64, 32);
    for layout in [Layout::CompressedTensors, Layout::AutoAwq, Layout::Gptq { v2: false }] {
        let config = config_of(layout, &m);
        let tensors = pack(layout, "p", &m).unwrap();
        for i in 0..tensors.len() {
            // Missing, of another type, of another shape.
            let mut broken = tensors.clone();
            let (gone, _, _, _) = broken.remove(i);
            let optional = gone.ends_with("g_idx");
            let (_d, ck) = store(broken);
            let outcome = unpack(layout, &ck, "p", &config);
            assert!(outcome.is_err() || optional, "{layout} without {gone}");
            let mut broken = tensors.clone();
            broken[i].1 = Dtype::U8;
            broken[i].2 = vec![broken[i].3.len()];
            let (_d, ck) = store(broken);
            assert!(unpack(layout, &ck, "p", &config).is_err());
            let mut broken = tensors.clone();
            let width = broken[i].1.bits() as usize / 8;
            let more = width * broken[i].2.last().unwrap();
            broken[i].3.extend(vec![0; more]);
            broken[i].2 = match broken[i].2[..] {
                [a, b] => vec![a + 1, b],
                _ => vec![broken[i].3.len() / width],
            };
            let (_d, ck) = store(broken);
            let message = unpack(layout, &ck, "p", &config).unwrap_err().to_string();
            assert!(message.contains("\"p."), "{message}");
        }
    }
}

#[test]
fn negative_group_index_is_refused() {
    let m = matrix(&mut Lcg(4), 4, 32, 64, 32);
    let mut tensors = pack(Layout::Gptq { v2: false }, "p", &m).unwrap();
    tensors[3].3[..4].copy_from_slice(&(-1i32).to_le_bytes());
    let (_d, ck) = store(tensors);
    let config = config_of(Layout::Gptq { v2: false }, &m);
    let message = unpack(config.layout, &ck, "p", &config).unwrap_err().to_string();
    assert!(message.contains("group number"), "{message}");
}

#[test]
fn configs_round_trip() {
    let names = ["model.layers.0.mlp.up_proj".to_string(), "model.layers.0.mlp.down_proj".into()];
    let ignored = ["lm_head".to_string()];
    for layout in [
        Layout::CompressedTensors,
        Layout::AutoAwq,
        Layout::Gptq { v2: false },
        Layout::Gptq { v2: true },
    ] {
        for group_size in [Some(128), None] {
            let symmetric = layout != Layout::AutoAwq;
            let config = QuantConfig::new(layout, 4, group_size, symmetric);
            let value = json!({ "quantization_config": config_json(&config, &names, &ignored) });
            let mut back = parse_config(&value).unwrap().unwrap();
            back.ignore.clear();
            assert_eq!(back, config);
        }
    }
    assert_eq!(parse_config(&json!({})).unwrap(), None);
    assert_eq!(parse_config(&json!({ "quantization_config": null })).unwrap(), None);
}

#[test]
fn config_details() {
    let mut config = QuantConfig::new(Layout::AutoAwq, 4, Some(128), false);
    let names = ["a.q".to_string(), "a.o".into()];
    let head = ["lm_head".to_string()];
    assert_eq!(
        config_json(&config, &names, &head),
        json!({"quant_method": "awq", "zero_point": true, "group_size": 128, "bits": 4,
               "version": "gemm", "modules_to_not_convert": null})
    );
    config.layout = Layout::Gptq { v2: false };
    config.overrides = vec![("a.o".into(), Scheme { bits: 8, group_size: None, symmetric: true })];
    let value = config_json(&config, &names, &["lm_head".into(), "a.x".into()]);
    assert_eq!(value["checkpoint_format"], "gptq");
    assert_eq!(value["dynamic"]["+:^a\\.o$"]["bits"], 8);
    assert_eq!(value["dynamic"]["-:^a\\.x$"], json!({}));
    config.layout = Layout::CompressedTensors;
    let value = config_json(&config, &names, &head);
    assert_eq!(value["ignore"], json!(["lm_head"]));
    assert_eq!(value["config_groups"]["group_0"]["targets"], json!(["a.q"]));
    assert_eq!(value["config_groups"]["group_1"]["targets"], json!(["a.o"]));
    assert_eq!(value["config_groups"]["group_1"]["weights"]["strategy"], "channel");
    assert_eq!(value["config_groups"]["group_1"]["weights"]["group_size"], Value::Null);
    let back = parse_config(&json!({ "quantization_config": value })).unwrap().unwrap();
    assert_eq!(back.scheme_of("a.o").unwrap().bits, 8);
}

#[test]
fn configs_that_are_not_read() {
    for (value, reason) in [
        (json!({ "quant_method": "bitsandbytes" }), "known are awq, gptq"),
        (json!({ "quant_method": "awq", "bits": 4, "version": "gemv" }), "gemv"),
        (json!({ "quant_method": "gptq", "bits": 40 }), "from 1 to 8"),
        (json!({ "quant_method": "gptq", "bits": 4, "group_size": 0 }), "neither positive"),
        (json!({ "quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin" }), "marlin"),
        (json!({ "quant_method": "compressed-tensors", "config_groups": {} }), "config_groups"),
        (
            json!({ "quant_method": "compressed-tensors", "format": "float-quantized",
                    "config_groups": { "g": { "weights": {} } } }),
            "float-quantized",
        ),
    ] {
        let message =
            parse_config(&json!({ "quantization_config": value })).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn mixed_grids_are_told_apart() {
    let random = &mut Lcg(6);
    let (narrow, wide) = (matrix(random, 3, 32, 64, 32), matrix(random, 8, 32, 64, 64));
    let mut tensors = pack(Layout::CompressedTensors, "a.q", &narrow).unwrap();
    tensors.extend(pack(Layout::CompressedTensors, "a.o", &wide).unwrap());
    let (_d, ck) = store(tensors);
    let mut config = config_of(Layout::CompressedTensors, &narrow);
    let scheme = Scheme { bits: 8, group_size: Some(64), symmetric: wide.symmetric };
    // By full name, and by a pattern that is not interpreted: the shapes tell.
    for target in ["a.o", "re:.*o"] {
        config.overrides = vec![(target.into(), scheme.clone())];
        assert_eq!(unpack(config.layout, &ck, "a.o", &config).unwrap().codes, wide.codes);
        assert_eq!(unpack(config.layout, &ck, "a.q", &config).unwrap().codes, narrow.codes);
    }
}

/// Words of all positions in one number.
fn checksum(tensors: &[PackedTensor], leaf: &str) -> (Vec<usize>, u32) {
    let (_, _, shape, bytes) = tensors.iter().find(|t| t.0.ends_with(leaf)).unwrap();
    let (words, _) = bytes.as_chunks::<4>();
    let sum = words.iter().enumerate().fold(0u32, |sum, (i, word)| {
        sum.wrapping_add(u32::from_le_bytes(*word).wrapping_mul(2 * i as u32 + 1))
    });
    (shape.clone(), sum)
}

/// The same codes and zero points packed by `pack_to_int32` of compressed-tensors 0.19.
#[test]
fn agrees_with_compressed_tensors() {
    // Bits, then shape and checksum of the codes, then of the zero points.
    let golden = [
        (2u8, [10usize, 2], 0x66F706F4u32, [1usize, 3], 0x0029C9C4u32),
        (3u8, [10usize, 3], 0xC2B1E40Bu32, [1usize, 3], 0xBD880D38u32),
        (4u8, [10usize, 3], 0xB3230401u32, [2usize, 3], 0x5C2902C0u32),
        (5u8, [10usize, 4], 0xFA5F7560u32, [2usize, 3], 0x3F954932u32),
        (6u8, [10usize, 5], 0x4C09ACB3u32, [2usize, 3], 0xF145144Au32),
        (7u8, [10usize, 6], 0x160CE61Fu32, [3usize, 3], 0x1BDF0DCBu32),
        (8u8, [10usize, 6], 0x02D67720u32, [3usize, 3], 0x815F903Cu32),
    ];
    for (bits, shape, words, zeros_shape, zeros) in golden {
        let levels = 1usize << bits;
        let cells = |columns: usize| (0..10).flat_map(move |o| (0..columns).map(move |k| (o, k)));
        let m = QuantizedMatrix {
            bits,
            group_size: 8,
            out_features: 10,
            in_features: 24,
            codes: cells(24).map(|(o, k)| ((o * 7 + k * 3 + o * k) % levels) as u8).collect(),
            scales: vec![0.5; 30],
            zeros: cells(3).map(|(o, g)| ((o + 3 * g + 1) % levels) as u8).collect(),
            symmetric: false,
            group_index: None,
        };
        let tensors = pack(Layout::CompressedTensors, "p", &m).unwrap();
        assert_eq!(checksum(&tensors, "weight_packed"), (shape.to_vec(), words), "{bits} bits");
        assert_eq!(checksum(&tensors, "zero_point"), (zeros_shape.to_vec(), zeros), "{bits} bits");
    }
}

#[test]
fn sizes_are_known_before_packing() {
    let mut random = Lcg(17);
    for layout in
        [Layout::CompressedTensors, Layout::AutoAwq, Layout::Gptq { v2: true }, Layout::Strata]
    {
        for bits in [2, 3, 4, 5, 6, 8] {
            let m = matrix(&mut random, bits, 64, 96, 32);
            let m = QuantizedMatrix { symmetric: false, ..m };
            for m in [QuantizedMatrix { zeros: vec![1; m.zeros.len()], ..m.clone() }, {
                let zeros = vec![m.middle(); m.zeros.len()];
                QuantizedMatrix { symmetric: true, zeros, ..m }
            }] {
                let Ok(tensors) = pack(layout, "p", &m) else { continue };
                let bytes: usize = tensors.iter().map(|t| t.3.len()).sum();
                assert_eq!(stored_bytes(layout, &m), bytes as u64, "{layout} {bits}");
            }
        }
    }
}
