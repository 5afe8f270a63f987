//! Odd weights that every method must get through.

use crate::common::*;
use nn::Model;
use strata_compress::Format;

/// An all-zero matrix, an all-zero row and an all-zero group in every block.
#[test]
fn all_zero_rows_groups_and_matrices() {
    let calibration = calibration(8, 16, 61);
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config, 62);
        let original = Model::open(&input).unwrap();
        let names = original.decoder.names(0).unwrap();
        let (rows, matrix_of_zeros) = (names.up.clone(), names.output.clone());
        drop(original);
        let at = |row, column| place(&rows, row, column);
        edit(&input, |name, _, values| {
            if name == rows.weight() {
                (0..32).for_each(|column| values[at(3, column)] = 0.0);
                (16..32).for_each(|column| values[at(5, column)] = 0.0);
            } else if name == matrix_of_zeros.weight() {
                values.fill(0.0);
            }
        });
        for method in METHODS {
            for format in [Format::Dequantized, Format::CompressedTensors] {
                let case = format!("{case}, {} as {format:?}", method.slug());
                let out = scratch.path(&format!("{}-{format:?}", method.slug()));
                let outcome = quantize(&input, &out, &options(method, format, 4), &calibration);
                logits(&out);
                for layer in &outcome.layers {
                    let finite = layer.weight_error.is_finite()
                        && layer.output_error.is_none_or(f64::is_finite);
                    assert!(finite, "{case}: {layer:?}");
                }
                let model = Model::open(&out).unwrap();
                assert!(matrix(&model, &matrix_of_zeros).iter().all(|w| *w == 0.0), "{case}");
                let values = matrix(&model, &rows);
                assert!(values[3 * 32..4 * 32].iter().all(|w| *w == 0.0), "{case}");
                // GPTQ moves errors of the first group into the zeros of the second.
                if method != strata_compress::Method::Gptq {
                    assert!(values[5 * 32 + 16..6 * 32].iter().all(|w| *w == 0.0), "{case}");
                }
            }
        }
    }
}

/// A zero output matrix of attention makes the rest of the block blind to attention, and a zero
/// norm makes a whole set of layers blind: calibration cannot judge them.
#[test]
fn layers_that_no_token_excites() {
    let calibration = calibration(8, 16, 63);
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, nn::Family::Llama, 64).unwrap();
    edit(&input, |name, _, values| {
        if name == "model.layers.1.post_attention_layernorm.weight" {
            values.fill(0.0);
        }
    });
    let awq = options(strata_compress::Method::Awq, Format::Dequantized, 4);
    quantize(&input, &scratch.path("awq"), &awq, &calibration);
    logits(&scratch.path("awq"));
    let mut gptq = options(strata_compress::Method::Gptq, Format::Dequantized, 4);
    let message = refusal(&input, &gptq, &calibration);
    assert!(message.contains("model.layers.1.mlp."), "{message}");
    gptq.gptq.on_failure = strata_compress::gptq::OnFailure::Rtn;
    let outcome = quantize(&input, &scratch.path("gptq"), &gptq, &calibration);
    assert!(outcome.warnings.iter().any(|w| w.contains("model.layers.1.mlp.")), "{outcome:?}");
    logits(&scratch.path("gptq"));
}
