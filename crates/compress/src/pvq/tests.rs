//! One matrix through the quantiser: against the plain codec, against definitions, and at its limits.

use super::*;
use crate::gptq::GptqOptions;
use crate::grid::{Grid, GridOptions};
use tensor::Rng;

fn random(out: usize, width: usize, seed: u64) -> Matrix {
    let mut rng = Rng::new(seed);
    Matrix::new(out, width, (0..out * width).map(|_| rng.normal() as f32).collect()).unwrap()
}

/// Inputs with a few strong shared directions.
fn gram(width: usize, tokens: usize, seed: u64) -> Gram {
    let mut rng = Rng::new(seed);
    let mut x = vec![0f32; tokens * width];
    for row in x.chunks_mut(width) {
        let shared = [rng.normal(), rng.normal()];
        for (c, x) in row.iter_mut().enumerate() {
            let mixed = shared[0] * (c as f64 * 0.7).sin() + shared[1] * (c as f64 * 0.3).cos();
            *x = (1.5 * mixed + 0.6 * rng.normal()) as f32;
        }
    }
    let mut gram = Gram::new(width);
    gram.add(&x);
    gram
}

fn options() -> PvqOptions {
    PvqOptions { rotation: Coherence::None, ..PvqOptions::default() }
}

fn coded(
    matrix: &Matrix,
    factor: Option<&Factor>,
    options: &PvqOptions,
    pulses: usize,
) -> Quantized {
    let shape = [matrix.out_features, matrix.in_features];
    let code = layer_code("t", shape, options, 3.0, Some(pulses)).unwrap();
    quantize("t", matrix, &code, factor, options).unwrap()
}

fn values(quantized: &Quantized) -> Vec<f32> {
    nn::dequantize(&Stored::Pyramid(quantized.matrix.clone())).unwrap()
}

fn relative(matrix: &Matrix, quantized: &Quantized) -> f64 {
    let (error, norm) = matrix.squared_error(&values(quantized));
    error / norm
}

/// `tr((W - Ŵ) H (W - Ŵ)ᵀ)` with `H` damped.
fn damped_error(matrix: &Matrix, values: &[f32], gram: &Gram, damping: f64) -> f64 {
    let width = matrix.in_features;
    let hessian = gram.hessian();
    let mut total = 0f64;
    for (w, q) in matrix.values.chunks(width).zip(values.chunks(width)) {
        let d: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect();
        for i in 0..width {
            let row = &hessian[i * width..(i + 1) * width];
            total += d[i] * d.iter().zip(row).map(|(d, h)| d * h).sum::<f64>();
            total += damping * d[i] * d[i];
        }
    }
    total
}

#[test]
fn gaussian_rows_beat_rounding_at_both_rates() {
    let matrix = random(600, 128, 1);
    for (pulses, expected, bits, group) in [(27, 0.0196, 3, 64), (12, 0.083, 2, 64)] {
        let error = relative(&matrix, &coded(&matrix, None, &options(), pulses));
        assert!((error / expected - 1.0).abs() < 0.03, "K = {pulses}: {error}");
        let grid = GridOptions { bits, group_size: group, ..GridOptions::default() };
        let rounded = crate::rtn::quantize(&matrix, &Grid::new(&grid).unwrap(), &grid);
        let (e, norm) = matrix.squared_error(&rounded.dequantize());
        assert!(error <= 0.6 * e / norm, "K = {pulses}: {error} against {}", e / norm);
    }
    let cdf = PvqOptions { levels: Levels::BetaCdf, ..options() };
    let error = relative(&matrix, &coded(&matrix, None, &cdf, 27));
    assert!((error - 0.0199).abs() < 4e-4, "{error}");
}

#[test]
fn bits_are_counted_exactly() {
    let matrix = random(8, 128, 1);
    let quantized = coded(&matrix, None, &options(), 27);
    let code = &quantized.matrix.code;
    assert_eq!(code.bits_per_weight(), (48.0 + 4.0) / 16.0 + 16.0 / 128.0);
    assert_eq!(Stored::Pyramid(quantized.matrix.clone()).bits_per_weight(), code.bits_per_weight());
    // What lies in the file, filled up to words.
    let bytes = quantized.matrix.index.len() + quantized.matrix.amplitude.len() + 2 * 8;
    assert_eq!(code.stored_bits_per_weight() * (8 * 128) as f64, (8 * bytes) as f64);
    assert!((quantized.entropy_bound / 128.0 - 47.60 / 16.0).abs() < 0.001);
    for (rate, bits) in [(1.0, 1.25), (2.0, 2.25), (3.0, 3.25), (4.0, 4.25)] {
        let code = layer_code("t", [8, 4096], &options(), rate, None).unwrap();
        assert_eq!(code.bits_per_weight(), bits + 16.0 / 4096.0);
    }
}

#[test]
fn index_entropy_is_below_its_bound_and_near_it() {
    let matrix = random(3000, 64, 4);
    for (group, pulses) in [(4, 4), (8, 6), (16, 12)] {
        let options = PvqOptions { group, ..options() };
        let quantized = coded(&matrix, None, &options, pulses);
        let bound = quantized.entropy_bound / 64.0;
        let entropy = quantized.index_entropy;
        assert!(entropy < bound && entropy > 0.9 * bound, "{group} {pulses}: {entropy} of {bound}");
    }
    // Of a two-dimensional pyramid the joint entropy can be counted directly.
    let options = PvqOptions { group: 2, ..options() };
    let quantized = coded(&matrix, None, &options, 3);
    let code = &quantized.matrix.code;
    let codec = tensor::pyramid::Codec::new(nn::pyramid::pyramid_code(code)).unwrap();
    let mut counts = BTreeMap::<Vec<i16>, f64>::new();
    for row in quantized.matrix.index.chunks(codec.index_row_bytes()) {
        let mut y = vec![0i16; 64];
        codec.unpack_points(row, &mut y);
        for group in y.chunks(2) {
            *counts.entry(group.to_vec()).or_default() += 1.0;
        }
    }
    let total: f64 = counts.values().sum();
    let joint: f64 = counts.values().map(|c| c / total * (total / c).log2()).sum();
    assert!((quantized.index_entropy - joint / 2.0).abs() < 0.01, "{joint}");
}

#[test]
fn without_correlations_the_sweep_changes_nothing() {
    // X with H = 2 XᵀX / tokens = c I.
    let width = 64;
    let mut x = vec![0f32; width * width];
    (0..width).for_each(|i| x[i * width + i] = 1.3);
    let mut gram = Gram::new(width);
    gram.add(&x);
    let factor = Factor::new("t", &gram, &GptqOptions::default()).unwrap();
    let matrix = random(70, width, 3);
    for (length, refine) in [
        (Length::Metric, Refine::None),
        (Length::Projection, Refine::Angle),
        (Length::Norm, Refine::None),
        (Length::Projection, Refine::Metric),
    ] {
        let options = PvqOptions { length, refine, ..options() };
        let (plain, swept) =
            (coded(&matrix, None, &options, 12), coded(&matrix, Some(&factor), &options, 12));
        let differ = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a != b).count();
        let (plain, swept) = (plain.matrix, swept.matrix);
        assert_eq!(plain.norms, swept.norms);
        // Lengths on the edge between two levels may round differently.
        assert!(differ(&plain.index, &swept.index) <= 16, "{length:?} {refine:?}");
        assert!(differ(&plain.amplitude, &swept.amplitude) <= 3, "{length:?} {refine:?}");
    }
}

#[test]
fn loss_is_the_damped_output_error() {
    let (matrix, gram) = (random(40, 76, 5), gram(76, 300, 6));
    let factor = Factor::new("t", &gram, &GptqOptions::default()).unwrap();
    let options = PvqOptions { ragged: true, ..options() };
    let quantized = coded(&matrix, Some(&factor), &options, 12);
    let direct = damped_error(&matrix, &values(&quantized), &gram, factor.damping());
    let loss = quantized.loss.unwrap();
    assert!((loss / direct - 1.0).abs() < 1e-3, "{loss} {direct}");
    assert_eq!(quantized.round_trip_failures, 0);
}

#[test]
fn compensation_lowers_the_output_error() {
    let (matrix, gram) = (random(96, 128, 7), gram(128, 600, 8));
    let factor = Factor::new("t", &gram, &GptqOptions::default()).unwrap();
    for pulses in [12, 27] {
        let error = |options: &PvqOptions, factor: Option<&Factor>| {
            let quantized = coded(&matrix, factor, options, pulses);
            damped_error(&matrix, &values(&quantized), &gram, 0.0)
        };
        let plain = error(&options(), None);
        let swept = error(&options(), Some(&factor));
        assert!(swept < 0.6 * plain, "K = {pulses}: {swept} against {plain}");
        // The cheapest length is better than the projection's, moves of pulses help further.
        let euclid = PvqOptions { length: Length::Projection, ..options() };
        let moved = PvqOptions { refine: Refine::Metric, ..options() };
        let (euclid, moved) = (error(&euclid, Some(&factor)), error(&moved, Some(&factor)));
        assert!(swept < 1.02 * euclid && moved < swept, "{euclid} {swept} {moved}");
    }
}

/// Groups of one weight with enough levels: a sign and a length, as a scalar grid.
#[test]
fn groups_of_one_are_signs_and_lengths() {
    let (matrix, gram) = (random(32, 48, 9), gram(48, 300, 10));
    let options = PvqOptions { group: 1, length_bits: 10, levels: Levels::BetaLloyd, ..options() };
    let quantized = coded(&matrix, None, &options, 1);
    assert!(relative(&matrix, &quantized) < 1e-4);
    for (w, q) in matrix.values.iter().zip(values(&quantized)) {
        assert_eq!(w.signum(), q.signum());
    }
    let factor = Factor::new("t", &gram, &GptqOptions::default()).unwrap();
    let swept = coded(&matrix, Some(&factor), &options, 1);
    let direct = damped_error(&matrix, &values(&swept), &gram, factor.damping());
    assert!((swept.loss.unwrap() / direct - 1.0).abs() < 1e-3);
}

#[test]
fn turning_a_layer_keeps_its_function() {
    let matrix = random(24, 64, 11);
    for width in [64, 172] {
        let options = PvqOptions { ragged: true, ..PvqOptions::default() };
        let matrix = if width == 64 { matrix.clone() } else { random(24, width, 12) };
        let info = options.rotation(width).unwrap();
        let turn = nn::pyramid::input_rotation(&info).unwrap();
        let mut turned = matrix.clone();
        turn.rotate_rows_f32(&mut turned.values);
        // Fine enough that only the rotation could be wrong.
        let options = PvqOptions { group: 4, levels: Levels::Fp16, ..options };
        let quantized = coded(&turned, None, &options, 200);
        assert!(relative(&matrix, &quantized) < 1e-4, "{width}");
        assert!(relative(&turned, &quantized) > 0.5);
    }
    let rotation = |width| PvqOptions::default().rotation(width).unwrap();
    assert_eq!((rotation(4096).kind, rotation(4096).order), (RotationType::Hadamard, 4096));
    assert_eq!((rotation(172).kind, rotation(172).order), (RotationType::Random, 172));
    let large = rotation(43 * 256);
    assert_eq!(large.kind, RotationType::Hadamard);
    assert!(large.order >= 256 && (43 * 256) % large.order == 0);
}

#[test]
fn turned_hessians_are_those_of_turned_inputs() {
    let width = 48;
    let mut rng = Rng::new(3);
    let x: Vec<f32> = (0..90 * width).map(|_| rng.normal() as f32).collect();
    for order in [48, 12] {
        let info = RotationInfo { kind: RotationType::Hadamard, order, seed: 5 };
        let turn = nn::pyramid::input_rotation(&info).unwrap();
        let (mut plain, mut direct) = (Gram::new(width), Gram::new(width));
        plain.add(&x);
        let mut turned = x.clone();
        turn.rotate_rows_f32(&mut turned);
        direct.add(&turned);
        let mut hessian = plain.into_hessian();
        turn_hessian(&mut hessian, width, &turn);
        for (a, b) in hessian.iter().zip(direct.into_hessian()) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
}

#[test]
fn normality_tells_normal_rows_from_others() {
    let normal = normality(&random(200, 256, 13), 16);
    assert!((normal.kurtosis - 3.0).abs() < 0.1 && normal.distance < 0.02, "{normal:?}");
    let mut outliers = random(200, 256, 14);
    outliers.values.chunks_mut(256).for_each(|row| row[7] *= 20.0);
    let found = normality(&outliers, 16);
    assert!(found.kurtosis > 10.0 && found.distance > 0.3, "{found:?}");
    // A rotation mends that.
    let turn = nn::pyramid::input_rotation(&PvqOptions::default().rotation(256).unwrap()).unwrap();
    turn.rotate_rows_f32(&mut outliers.values);
    let found = normality(&outliers, 16);
    assert!(found.kurtosis < 3.5 && found.distance < 0.1, "{found:?}");
    let zeros = Matrix::new(2, 32, vec![0.0; 64]).unwrap();
    assert_eq!(normality(&zeros, 16), Normality { kurtosis: 3.0, distance: 0.0 });
}

#[test]
fn zero_rows_and_zero_groups() {
    let mut matrix = random(4, 64, 15);
    matrix.values[..64].fill(0.0);
    matrix.values[64..80].fill(0.0);
    let factor = Factor::new("t", &gram(64, 300, 1), &GptqOptions::default()).unwrap();
    for factor in [None, Some(&factor)] {
        let quantized = coded(&matrix, factor, &options(), 12);
        let back = values(&quantized);
        assert!(back[..64].iter().all(|w| *w == 0.0), "a row of zeros stays one");
        assert_eq!(quantized.zero_groups, 1);
    }
    let kept = PvqOptions { zero_length: true, ..options() };
    assert!(values(&coded(&matrix, None, &kept, 12))[64..80].iter().all(|w| *w == 0.0));
}

#[test]
fn no_bits_for_lengths() {
    let matrix = random(50, 128, 16);
    let none = PvqOptions { length_bits: 0, ..options() };
    let quantized = coded(&matrix, None, &none, 27);
    assert_eq!(quantized.matrix.code.bits_per_weight(), 3.0 + 16.0 / 128.0);
    assert!(quantized.matrix.amplitude.is_empty());
    let error = relative(&matrix, &quantized);
    assert!(error > relative(&matrix, &coded(&matrix, None, &options(), 27)) && error < 0.08);
}

#[test]
fn what_cannot_work_is_refused() {
    let code = |shape, options: &PvqOptions, rate, pulses| {
        layer_code("m.layer", shape, options, rate, pulses).map_err(|e| e.to_string())
    };
    let ragged = code([8, 172], &options(), 3.0, None).unwrap_err();
    assert!(ragged.contains("m.layer") && ragged.contains("--pvq-group 4 or 2"), "{ragged}");
    let allowed = PvqOptions { ragged: true, ..options() };
    let tail = code([8, 172], &allowed, 3.0, None).unwrap().tail.unwrap();
    assert_eq!(tail.dimension, 12);
    let rate = f64::from(tail.index_bits) / 12.0;
    assert!((2.5..=3.01).contains(&rate), "{tail:?}");
    assert!(code([8, 8], &options(), 3.0, None).unwrap_err().contains("8 inputs"));
    let wide = code([8, 128], &PvqOptions { group: 32, ..options() }, 5.0, None).unwrap_err();
    assert!(wide.contains("128 bits") && wide.contains("105 pulses"), "{wide}");
    let many = code([8, 128], &options(), 3.0, Some(3000)).unwrap_err();
    assert!(many.contains("largest number of pulses"), "{many}");
    let low = code([8, 128], &options(), 0.2, None).unwrap_err();
    assert!(low.contains("at least 0.313"), "{low}");

    let shape = [4, 32];
    let plain = code(shape, &options(), 3.0, None).unwrap();
    let mut matrix = random(4, 32, 17);
    matrix.values[40] = f32::NAN;
    let error = quantize("m", &matrix, &plain, None, &options()).unwrap_err().to_string();
    assert!(error.contains("NaN"), "{error}");
    let mut large = random(4, 32, 18);
    large.values[70] = 1e6;
    let error = quantize("m", &large, &plain, None, &options()).unwrap_err().to_string();
    assert!(error.contains("row 2") && error.contains("--pvq-norms f32"), "{error}");
    let single = PvqOptions { norms: Norms::F32, ..options() };
    let code = code(shape, &single, 3.0, None).unwrap();
    let quantized = quantize("m", &large, &code, None, &single).unwrap();
    assert_eq!(code.bits_per_weight(), 3.25 + 32.0 / 32.0);
    assert!(values(&quantized)[70] > 5e5);
    let mut tiny = random(4, 32, 19);
    tiny.values[..32].iter_mut().for_each(|w| *w *= 1e-10);
    assert!(quantize("m", &tiny, &plain, None, &options()).is_err());
    assert!(quantize("m", &tiny, &code, None, &single).is_ok());
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let job = |change: fn(&mut QuantizeOptions)| {
        let mut all = QuantizeOptions {
            method: crate::Method::Pvq,
            format: Format::Strata,
            ..QuantizeOptions::default()
        };
        change(&mut all);
        all.check().map_err(|e| e.to_string())
    };
    assert!(job(|_| {}).is_ok());
    type Change = fn(&mut QuantizeOptions);
    let cases: [(Change, &str); 8] = [
        (|o| o.format = Format::CompressedTensors, "strata"),
        (|o| (o.pvq.rate, o.pvq.pulses) = (Some(3.0), Some(27)), "not both"),
        (|o| o.pvq.rate = Some(-1.0), "positive"),
        (|o| o.pvq.length_bits = 11, "fp16"),
        (|o| (o.pvq.length_bits, o.pvq.zero_length) = (0, true), "needs a code"),
        (|o| o.gptq.act_order = true, "--act-order"),
        (|o| (o.pvq.data_free, o.pvq.refine) = (true, Refine::Metric), "calibration"),
        (|o| o.gptq.damping = 0.0, "damping"),
    ];
    for (change, part) in cases {
        let error = job(change).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let data_free = job(|o| (o.pvq.data_free, o.gptq.act_order) = (true, true));
    assert!(data_free.is_ok());
}
