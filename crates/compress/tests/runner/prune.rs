//! Pruning inside the runner: what stays bit for bit, calibration order, masks, formats, refusals.

use crate::common::*;
use nn::{Context, Family, Model, Name, Overlay, Record, Site, Taps};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use strata_compress::block::INPUT_POINTS;
use strata_compress::gptq::{Factor, GptqOptions};
use strata_compress::grid::Matrix;
use strata_compress::mask::{self, Count, Mask, Scope, Structure};
use strata_compress::options::MemoryLimit;
use strata_compress::prune::sets::Order;
use strata_compress::prune::{PruneFormat, ShareOf};
use strata_compress::runner::Source;
use strata_compress::statistics::Gram;
use strata_compress::{Calibration, Outcome, Plan, PruneMethod, PruneOptions, sparsegpt, wanda};
use tensor::{Tensor, host};

pub const CALIBRATED: [PruneMethod; 2] = [PruneMethod::Wanda, PruneMethod::SparseGpt];

pub fn try_prune(
    input: &Path,
    out: &Path,
    options: &PruneOptions,
    calibration: &Calibration,
) -> strata_compress::Result<Outcome> {
    let model = Model::open(input)?;
    let plan = Plan::prune(&model.decoder, &model.checkpoint, options)?;
    strata_compress::prune::run(
        Source::of(&model)?,
        &plan,
        options,
        calibration,
        None,
        Value::Null,
        &target(out, false),
        &report::Progress::hidden(),
    )
}

pub fn options(method: PruneMethod) -> PruneOptions {
    PruneOptions { method, ..PruneOptions::default() }
}

fn windows() -> Calibration {
    calibration(70, 32, 31)
}

fn zeros(values: &[f32]) -> usize {
    values.iter().filter(|w| **w == 0.0).count()
}

#[test]
fn every_family_loses_its_share_and_keeps_the_rest() {
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        nn::testing::random_checkpoint(&input, &config, 32).unwrap();
        for method in [
            PruneMethod::Magnitude,
            PruneMethod::Random,
            PruneMethod::Wanda,
            PruneMethod::SparseGpt,
        ] {
            let out = scratch.path(method.slug());
            let options = PruneOptions { exact: true, ..options(method) };
            let calibration = if options.calibrates() { windows() } else { Calibration::none() };
            let outcome = try_prune(&input, &out, &options, &calibration).unwrap();
            let (before, after) = (Model::open(&input).unwrap(), Model::open(&out).unwrap());
            let masks = mask::read(&out).unwrap();
            for name in linears(&before.decoder) {
                let (was, is) = (matrix(&before, &name), matrix(&after, &name));
                let mask = &masks[&name.module];
                assert_eq!(zeros(&is) * 2, is.len(), "{case} {} {name}", method.slug());
                assert_eq!(*mask, Mask::of_zeros(name.shape, &is), "{case} {name}");
                if method != PruneMethod::SparseGpt {
                    let mut kept = was;
                    mask.apply(&mut kept);
                    assert!(kept == is, "{case} {} {name}: a kept weight moved", method.slug());
                }
                let layer = outcome.layers.iter().find(|l| l.module == name.module).unwrap();
                assert_eq!(layer.sparsity, Some(0.5));
                assert_eq!(layer.output_error.is_some(), options.calibrates());
            }
            // Everything outside the layers is untouched, and so are names and types.
            let linear: Vec<String> = linears(&before.decoder).iter().map(Name::weight).collect();
            for (a, b) in tensors(&input).iter().zip(tensors(&out)) {
                assert_eq!((&a.0, a.1, &a.2), (&b.0, b.1, &b.2), "{case}");
                assert!(linear.contains(&a.0) || a.3 == b.3, "{case}: {} changed", a.0);
            }
        }
        let random = |seed| {
            let mut options = options(PruneMethod::Random);
            options.calibration.seed = seed;
            let out = scratch.path(&format!("random-{seed}"));
            try_prune(&input, &out, &options, &Calibration::none()).unwrap();
            tensors(&out)
        };
        assert!(random(1) != random(2), "{case}");
    }
}

#[test]
fn no_sparsity_changes_no_byte() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 33).unwrap();
    for method in
        [PruneMethod::Magnitude, PruneMethod::Random, PruneMethod::Wanda, PruneMethod::SparseGpt]
    {
        let out = scratch.path(method.slug());
        let options = PruneOptions { sparsity: 0.0, ..options(method) };
        let calibration = if options.calibrates() { windows() } else { Calibration::none() };
        try_prune(&input, &out, &options, &calibration).unwrap();
        assert_same_tensors(&input, &out, method.slug());
    }
}

/// Wanda and SparseGPT with a whole pass through the block for every set of layers.
fn by_hand(
    model: &Model,
    calibration: &Calibration,
    options: &PruneOptions,
) -> BTreeMap<String, Vec<f32>> {
    let decoder = &model.decoder;
    let mut streams: Vec<Tensor<2>> = (0..calibration.batches())
        .map(|batch| {
            let (tokens, geometry) = calibration.batch(batch);
            let context = Context::new(geometry);
            decoder.embed(model.weights.as_ref(), tokens, &context, &mut Taps::none()).unwrap()
        })
        .collect();
    let mut pruned = BTreeMap::new();
    for block in 0..decoder.num_blocks() {
        let mut weights = Overlay::new(model.weights.as_ref());
        let mut untouched = Overlay::new(model.weights.as_ref());
        weights.load(decoder.names(block).unwrap().all()).unwrap();
        untouched.load(decoder.names(block).unwrap().all()).unwrap();
        for (set, names) in decoder.linear_sets(block).iter().enumerate() {
            let width = names[0].in_features();
            let mut gram = Gram::new(width);
            let site = Site::block(block, INPUT_POINTS[set]);
            for (batch, stream) in streams.iter().enumerate() {
                let mut record = Record::new([site]);
                let mut context = Context::new(calibration.batch(batch).1);
                let sets = options.calibration_order == Order::Sets;
                let source = if sets { &weights } else { &untouched };
                let mut taps = Taps::one(&mut record);
                decoder.block(block, source, stream.clone(), &mut context, &mut taps).unwrap();
                host::read(&record.seen[&site], |x| gram.add(x));
            }
            for name in names {
                let values = host::into_vec(nn::Weights::matrix(&weights, name).unwrap());
                let dense = Matrix::new(name.out_features(), width, values).unwrap();
                let values = if options.method == PruneMethod::SparseGpt {
                    let factor = Factor::new("by hand", &gram, &GptqOptions::default()).unwrap();
                    let target = sparsegpt::Target {
                        sparsity: options.sparsity,
                        structure: options.pattern,
                        count: Count::Threshold,
                        block_size: 128,
                    };
                    sparsegpt::prune("by hand", &dense, &factor, &target, None).unwrap().values
                } else {
                    let full = gram.full();
                    let squares: Vec<f64> = (0..width).map(|j| full[j * width + j]).collect();
                    let norms = wanda::norms(&squares, calibration.windows());
                    let scores = wanda::scores(&dense.values, &norms);
                    let (share, pattern) = (options.sparsity, options.pattern);
                    let mask =
                        mask::build(&scores, name.shape, share, pattern, Scope::Row, Count::Floor);
                    let mut values = dense.values.clone();
                    mask.apply(&mut values);
                    values
                };
                let device = nn::Weights::device(&weights);
                weights
                    .matrices
                    .insert(name.weight(), host::from_vec(values.clone(), name.shape, &device));
                pruned.insert(name.module.clone(), values);
            }
        }
        for (batch, stream) in streams.iter_mut().enumerate() {
            let mut context = Context::new(calibration.batch(batch).1);
            let x = stream.clone();
            *stream = decoder.block(block, &weights, x, &mut context, &mut Taps::none()).unwrap();
        }
    }
    pruned
}

#[test]
fn both_orders_of_calibration_see_the_inputs_they_say() {
    let calibration = windows();
    assert_eq!(calibration.batches(), 2);
    for (case, config) in cases() {
        let scratch = Scratch::new();
        let input = scratch.path("in");
        nn::testing::random_checkpoint(&input, &config, 34).unwrap();
        let before = Model::open(&input).unwrap();
        for method in CALIBRATED {
            let mut results = Vec::new();
            for calibration_order in [Order::Block, Order::Sets] {
                let options = PruneOptions { calibration_order, ..options(method) };
                let out = scratch.path(&format!("{}-{calibration_order:?}", method.slug()));
                try_prune(&input, &out, &options, &calibration).unwrap();
                let after = Model::open(&out).unwrap();
                let wanted = by_hand(&before, &calibration, &options);
                for name in linears(&before.decoder) {
                    let (ours, wanted) = (matrix(&after, &name), &wanted[&name.module]);
                    // Sums of squares are added in another order than the Gram matrix's diagonal,
                    // so Wanda may choose differently between scores that are equal but for that.
                    let apart = ours.iter().zip(wanted).filter(|(a, b)| a != b).count();
                    let allowed = if method == PruneMethod::Wanda { 4 } else { 0 };
                    assert!(apart <= allowed, "{case} {} {name}: {apart}", method.slug());
                }
                results.push(wanted);
            }
            let last = linears(&before.decoder).pop().unwrap().module;
            assert!(
                results[0][&last] != results[1][&last],
                "{case}: the orders cannot be told apart"
            );
        }
    }
}

#[test]
fn patterns_hold_in_every_group_and_memory_changes_no_byte() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 35).unwrap();
    let calibration = windows();
    for method in CALIBRATED {
        for pattern in ["2:4", "4:8"] {
            let pattern: Structure = pattern.parse().unwrap();
            let roomy = PruneOptions { pattern, ..options(method) };
            let tight = PruneOptions { memory: MemoryLimit(20_000), ..roomy.clone() };
            let (a, b) = (
                scratch.path(&format!("{}{pattern}a", method.slug())),
                scratch.path(&format!("{}{pattern}b", method.slug())),
            );
            assert_eq!(try_prune(&input, &a, &roomy, &calibration).unwrap().spilled_bytes, 0);
            assert!(try_prune(&input, &b, &tight, &calibration).unwrap().spilled_bytes > 0);
            assert_same_tensors(&a, &b, method.slug());
            let model = Model::open(&a).unwrap();
            for name in linears(&model.decoder) {
                let mask = Mask::of_zeros(name.shape, &matrix(&model, &name));
                assert!(mask.fits(pattern) && mask.sparsity() == 0.5, "{name}");
            }
        }
    }
}

#[test]
fn sparse_formats_hold_the_dense_weights() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 36).unwrap();
    let two_of_four =
        PruneOptions { pattern: Structure::TWO_OF_FOUR, ..options(PruneMethod::Magnitude) };
    let dense = scratch.path("dense");
    let exclude = vec!["*.down_proj".to_string()];
    let two_of_four = PruneOptions { exclude, ..two_of_four };
    try_prune(&input, &dense, &two_of_four, &Calibration::none()).unwrap();
    let dense = Model::open(&dense).unwrap();
    for format in [PruneFormat::SparseBitmask, PruneFormat::Sparse24Bitmask] {
        let out = scratch.path(format.layout().unwrap().name());
        let options = PruneOptions { format, ..two_of_four.clone() };
        try_prune(&input, &out, &options, &Calibration::none()).unwrap();
        let config: Value =
            serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        let sparsity = &config["quantization_config"]["sparsity_config"];
        assert_eq!(sparsity["format"], format.layout().unwrap().name());
        assert_eq!(sparsity["global_sparsity"], 0.5);
        let ignored = sparsity["ignore"].as_array().unwrap();
        assert!(ignored.contains(&json!("model.layers.0.mlp.down_proj")));
        let model = Model::open(&out).unwrap();
        for name in linears(&dense.decoder) {
            assert!(matrix(&model, &name) == matrix(&dense, &name), "{name}");
        }
        // Pruned once more, dense: nothing of the sparse format is left.
        let again = scratch.path(&format!("{}-again", format.layout().unwrap().name()));
        let none = PruneOptions { sparsity: 0.0, ..self::options(PruneMethod::Magnitude) };
        try_prune(&out, &again, &none, &Calibration::none()).unwrap();
        let config = std::fs::read_to_string(again.join("config.json")).unwrap();
        assert!(!config.contains("sparsity_config"), "{config}");
        assert!(distance(&logits(&again), &logits(&out)) < 1e-5);
        let again = Model::open(&again).unwrap();
        for name in linears(&dense.decoder) {
            assert!(matrix(&again, &name) == matrix(&dense, &name), "{name}");
        }
    }
}

#[test]
fn a_share_of_the_model_is_made_up_by_its_layers() {
    let scratch = Scratch::new();
    let (input, out) = (scratch.path("in"), scratch.path("out"));
    nn::testing::tiny_checkpoint(&input, Family::Llama, 37).unwrap();
    let options = PruneOptions {
        sparsity: 0.25,
        sparsity_of: ShareOf::Model,
        exact: true,
        ..options(PruneMethod::Magnitude)
    };
    let outcome = try_prune(&input, &out, &options, &Calibration::none()).unwrap();
    let checkpoint = store::Checkpoint::open(&out).unwrap();
    let total: usize = checkpoint.infos().map(|i| i.shape.iter().product::<usize>()).sum();
    let pruned: f64 =
        outcome.layers.iter().map(|l| l.sparsity.unwrap() * (l.shape[0] * l.shape[1]) as f64).sum();
    assert!((pruned / total as f64 - 0.25).abs() < 0.002, "{}", pruned / total as f64);
    let most = PruneOptions { sparsity: 0.99, ..options };
    let error = try_prune(&input, &scratch.path("no"), &most, &Calibration::none()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("0.99") && error.contains("at most"), "{error}");
}

#[test]
fn refusals_name_what_is_wrong_and_leave_nothing() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    nn::testing::tiny_checkpoint(&input, Family::Llama, 38).unwrap();
    let refused =
        |input: &Path, options: &PruneOptions, calibration: &Calibration, phrases: &[&str]| {
            let out = scratch.path("refused");
            let error = try_prune(input, &out, options, calibration).unwrap_err().to_string();
            for phrase in phrases {
                assert!(error.contains(phrase), "{phrase:?} is not in {error}");
            }
            assert!(!out.exists());
        };
    let none = Calibration::none();
    let magnitude = options(PruneMethod::Magnitude);
    let with = |change: &dyn Fn(&mut PruneOptions)| {
        let mut options = magnitude.clone();
        change(&mut options);
        options
    };
    refused(
        &input,
        &with(&|o| o.exclude = vec!["*.q_projj".into()]),
        &none,
        &["q_projj", "q_proj"],
    );
    refused(&input, &with(&|o| o.only = vec!["lm_head".into()]), &none, &["nothing is left"]);
    refused(&input, &options(PruneMethod::Wanda), &none, &["wanda", "--calibration"]);
    // 3 of 7 fits no width of the network.
    let pattern: Structure = "3:7".parse().unwrap();
    refused(&input, &with(&|o| o.pattern = pattern), &none, &["q_proj", "multiple of 7", "3:7"]);
    // Already quantised.
    let packed = scratch.path("packed");
    let quantised = crate::common::options(
        strata_compress::Method::Rtn,
        strata_compress::Format::CompressedTensors,
        4,
    );
    quantize(&input, &packed, &quantised, &none);
    refused(&packed, &magnitude, &none, &["already quantised"]);
    // Transposed matrices have no place in the sparse formats.
    let gpt2 = scratch.path("gpt2");
    nn::testing::tiny_checkpoint(&gpt2, Family::Gpt2, 39).unwrap();
    let sparse = with(&|o| o.format = PruneFormat::SparseBitmask);
    refused(&gpt2, &sparse, &none, &["transposed", "--format dense"]);
    // Inputs that are zero everywhere.
    let dark = scratch.path("dark");
    nn::testing::tiny_checkpoint(&dark, Family::Llama, 40).unwrap();
    edit(&dark, |name, _, values| {
        if name == "model.embed_tokens.weight" {
            values.fill(0.0);
        }
    });
    refused(&dark, &options(PruneMethod::SparseGpt), &windows(), &["q_proj", "excites"]);
    // A weight that is not a number is named before anything is calibrated.
    let broken = scratch.path("broken");
    nn::testing::tiny_checkpoint(&broken, Family::Llama, 41).unwrap();
    edit(&broken, |name, _, values| {
        if name == "model.layers.1.self_attn.v_proj.weight" {
            values[3] = f32::NAN;
        }
    });
    refused(&broken, &magnitude, &none, &["model.layers.1.self_attn.v_proj.weight", "NaN"]);
}

#[test]
fn few_tokens_are_warned_about() {
    let scratch = Scratch::new();
    let (input, out) = (scratch.path("in"), scratch.path("out"));
    nn::testing::tiny_checkpoint(&input, Family::Llama, 42).unwrap();
    let few = calibration(1, 16, 1);
    let outcome = try_prune(&input, &out, &options(PruneMethod::SparseGpt), &few).unwrap();
    let warning = outcome.warnings.join("\n");
    assert!(
        warning.contains("16 calibration tokens") && warning.contains("--samples"),
        "{warning}"
    );
}
