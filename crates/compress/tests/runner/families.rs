//! Ordinary weights on the quantised grid, for every family and method.

use crate::common::*;
use nn::{Decoder, Model};
use std::collections::BTreeSet;
use strata_compress::grid::{Grid, Matrix};
use strata_compress::{Format, Method, rtn};

const BITS: u8 = 3;

#[test]
fn output_is_the_same_network_on_the_grid() {
    let calibration = calibration(12, 16, 1);
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        planted(&input, &config, 5);
        let before = tensors(&input);
        let original = Model::open(&input).unwrap();
        let linears = linears(&original.decoder);
        for method in METHODS {
            let case = format!("{case}, {}", method.slug());
            let out = scratch.path(method.slug());
            let options = options(method, Format::Dequantized, BITS);
            let outcome = quantize(&input, &out, &options, &calibration);
            assert_eq!(outcome.path, out);
            assert_ne!(logits(&out), logits(&input), "{case}: nothing was quantised");

            let after = tensors(&out);
            let head = |t: &[(String, store::Dtype, Vec<usize>, Vec<u8>)]| -> Vec<_> {
                t.iter().map(|t| (t.0.clone(), t.1, t.2.clone())).collect()
            };
            assert_eq!(head(&before), head(&after), "{case}");
            let changed: BTreeSet<&str> = before
                .iter()
                .zip(&after)
                .filter(|(a, b)| a.3 != b.3)
                .map(|(a, _)| a.0.as_str())
                .collect();
            let allowed = may_change(&original.decoder, method);
            for name in &changed {
                assert!(allowed.contains(*name), "{case}: {name} changed");
            }

            let model = Model::open(&out).unwrap();
            for name in &linears {
                assert!(changed.contains(name.weight().as_str()), "{case}: {name} is as before");
                for (row, values) in matrix(&model, name).chunks(name.in_features()).enumerate() {
                    for group in values.chunks(16) {
                        let distinct: BTreeSet<u32> =
                            group.iter().map(|w| (w + 0.0).to_bits()).collect();
                        assert!(
                            distinct.len() <= 1 << BITS,
                            "{case}: {name}, row {row}: {group:?}"
                        );
                    }
                }
            }

            let modules: Vec<&str> = outcome.layers.iter().map(|l| l.module.as_str()).collect();
            let expected: Vec<&str> = linears.iter().map(|n| n.module.as_str()).collect();
            assert_eq!(modules, expected, "{case}: one result per layer, in order");
            for layer in &outcome.layers {
                let (error, module) = (layer.weight_error, &layer.module);
                assert!(error > 0.0 && error < 0.5, "{case}: {module}: {error}");
                assert_eq!(layer.output_error.is_some(), method.calibrates(), "{case}");
                let weights: u64 = layer.histogram.iter().sum();
                assert_eq!(weights, (layer.shape[0] * layer.shape[1]) as u64);
            }
        }
    }
}

/// Tensors that a method may touch: linear weights, and what absorbs AWQ's scales.
fn may_change(decoder: &Decoder, method: Method) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for block in 0..decoder.num_blocks() {
        names.extend(decoder.linears(block).iter().map(nn::Name::weight));
        if method == Method::Awq {
            for mapping in decoder.mappings(block) {
                match mapping.prev {
                    nn::Prev::Norm(name) | nn::Prev::Linear { name, .. } => {
                        names.extend(name.tensors());
                    }
                    nn::Prev::Activation => {}
                }
            }
        }
    }
    names
}

#[test]
fn rtn_in_the_runner_is_rtn_on_every_matrix() {
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let (input, out) = (scratch.path("in"), scratch.path("out"));
        nn::testing::random_checkpoint(&input, &config, 6).unwrap();
        let options = options(Method::Rtn, Format::Dequantized, 2);
        quantize(&input, &out, &options, &strata_compress::Calibration::none());
        let (before, after) = (Model::open(&input).unwrap(), Model::open(&out).unwrap());
        let rules = Grid::new(&options.grid).unwrap();
        for name in linears(&before.decoder) {
            let values = matrix(&before, &name);
            let dense = Matrix::new(name.out_features(), name.in_features(), values).unwrap();
            let by_hand = rtn::quantize(&dense, &rules, &options.grid).dequantize();
            assert!(by_hand == matrix(&after, &name), "{case}: {name}");
        }
    }
}
