//! D-Pruner's two passes on tiny networks: what they record, that they go on where they were
//! stopped, what they refuse.

use crate::common::*;
use crate::prune::options;
use nn::{Context, Family, Model, Record, Site, Taps};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use strata_compress::block::INPUT_POINTS;
use strata_compress::d_pruner::domain::{Domain, Scoring};
use strata_compress::d_pruner::files::Files;
use strata_compress::d_pruner::general::{Pass, importance};
use strata_compress::d_pruner::{DPrunerOptions, Mode, accumulate, update_fisher};
use strata_compress::gptq::{Factor, GptqOptions};
use strata_compress::grid::Matrix;
use strata_compress::mask::{self, Count, Structure};
use strata_compress::prune::DialectName;
use strata_compress::runner::Source;
use strata_compress::statistics::Gram;
use strata_compress::{Calibration, Plan, PruneMethod, PruneOptions, sparsegpt};
use train::{Grads, Params};

fn job(mode: Mode) -> PruneOptions {
    let mut options = options(PruneMethod::DPruner);
    options.domain.dialect = Some(DialectName::Law);
    options.d_pruner.importance_mode = mode;
    options.d_pruner.domain_batch = 4;
    options
}

fn domain(count: usize, seed: u64) -> Domain {
    let mut rng = tensor::Rng::new(seed);
    let mut document = |i: usize| (0..5 + i % 7).map(|_| rng.below(97) as u32).collect::<Vec<_>>();
    let documents: Vec<Vec<u32>> = (0..count).map(&mut document).collect();
    Domain::new(documents, 24, count, 0).unwrap()
}

struct Room {
    _scratch: Scratch,
    input: PathBuf,
    root: PathBuf,
    model: Model,
    plan: Plan,
}

impl Room {
    fn new(family: Family, seed: u64) -> Self {
        let scratch = Scratch::new();
        let (input, root) = (scratch.path("in"), scratch.path("importance"));
        nn::testing::tiny_checkpoint(&input, family, seed).unwrap();
        let model = Model::open(&input).unwrap();
        let plan = Plan::prune(&model.decoder, &model.checkpoint, &job(Mode::Normalised)).unwrap();
        Self { _scratch: scratch, input, root, model, plan }
    }

    fn general(&self, root: &Path, calibration: &Calibration) -> strata_compress::Result<Files> {
        let options = job(Mode::Normalised);
        let pass = Pass {
            sparsegpt: &options.sparsegpt,
            sparsity: 0.52,
            order: options.calibration_order,
            memory: 1 << 30,
        };
        let hidden = report::Progress::hidden();
        let source = Source::of(&self.model)?;
        importance(source, &self.plan, calibration, &pass, root, &json!("tiny"), &hidden)
    }

    fn score(
        &self,
        options: &DPrunerOptions,
        domain: &Domain,
        general: Option<&Files>,
        root: &Path,
        stop: usize,
    ) -> strata_compress::Result<Option<Files>> {
        let scoring = Scoring {
            decoder: &self.model.decoder,
            checkpoint: &self.model.checkpoint,
            plan: &self.plan,
            domain,
            options,
            seed: 5,
            general,
            identity: &json!("tiny"),
        };
        scoring.run_until(root, &report::Progress::hidden(), stop)
    }
}

fn read(files: &Files, block: usize, module: &str, count: usize) -> Vec<f32> {
    files.open(block).unwrap().read(module, count, <[f32]>::to_vec).unwrap()
}

fn bytes(files: &Files, blocks: usize) -> Vec<Vec<u8>> {
    (0..blocks).map(|block| std::fs::read(files.path(block)).unwrap()).collect()
}

#[test]
fn general_importance_is_what_sparsegpt_sees() {
    let room = Room::new(Family::Llama, 51);
    let calibration = calibration(70, 32, 52);
    let files = room.general(&room.root, &calibration).unwrap();
    let model = &room.model;
    // The first set of the first block, from the definition.
    let site = Site::block(0, INPUT_POINTS[0]);
    let names = &model.decoder.linear_sets(0)[0];
    let mut gram = Gram::new(names[0].in_features());
    for batch in 0..calibration.batches() {
        let (tokens, geometry) = calibration.batch(batch);
        let mut record = Record::new([site]);
        let mut context = Context::new(geometry);
        let weights = model.weights.as_ref();
        let x = model.decoder.embed(weights, tokens, &context, &mut Taps::none()).unwrap();
        model.decoder.block(0, weights, x, &mut context, &mut Taps::one(&mut record)).unwrap();
        tensor::host::read(&record.seen[&site], |x| gram.add(x));
    }
    let factor = Factor::new("m", &gram, &GptqOptions::default()).unwrap();
    for name in names {
        let values = matrix(model, name);
        let dense = Matrix::new(name.out_features(), name.in_features(), values).unwrap();
        let mut wanted = vec![0f32; dense.values.len()];
        let target = sparsegpt::Target {
            sparsity: 0.52,
            structure: Structure::Unstructured,
            count: Count::Threshold,
            block_size: 128,
        };
        sparsegpt::prune("m", &dense, &factor, &target, Some(&mut wanted)).unwrap();
        // 2/Ns over sequences of 32 tokens, not 2/tokens.
        wanted.iter_mut().for_each(|g| *g *= 32.0);
        assert!(read(&files, 0, &name.module, wanted.len()) == wanted, "{name}");
    }
    // Found again, not computed again.
    let before = std::fs::metadata(files.path(0)).unwrap().modified().unwrap();
    room.general(&room.root, &calibration).unwrap();
    assert_eq!(std::fs::metadata(files.path(0)).unwrap().modified().unwrap(), before);
}

/// A second block that is damaged stops the pass after the first; mended, it goes on there.
#[test]
fn the_general_pass_goes_on_at_the_block_where_it_was_stopped() {
    let whole = Room::new(Family::Llama, 53);
    let calibration = calibration(70, 32, 54);
    let wanted = bytes(&whole.general(&whole.root, &calibration).unwrap(), 2);
    let module = "model.layers.1.mlp.up_proj.weight";
    let good = std::fs::read(whole.input.join("model.safetensors")).unwrap();
    edit(&whole.input, |name, _, values| {
        if name == module {
            values[0] = f32::NAN;
        }
    });
    let root = whole.root.with_file_name("stopped");
    let open = |input: &Path| {
        let model = Model::open(input).unwrap();
        Room { model, ..Room::new(Family::Llama, 53) }
    };
    let error = open(&whole.input).general(&root, &calibration).unwrap_err().to_string();
    assert!(error.contains(module) && error.contains("NaN"), "{error}");
    std::fs::write(whole.input.join("model.safetensors"), good).unwrap();
    let mended = open(&whole.input);
    let directory = std::fs::read_dir(&root).unwrap().next().unwrap().unwrap().path();
    let first = directory.join("block-00000.safetensors");
    assert!(first.is_file() && directory.join("boundary-1.f32").is_file());
    let stamp = std::fs::metadata(&first).unwrap().modified().unwrap();
    let files = mended.general(&root, &calibration).unwrap();
    assert_eq!(std::fs::metadata(&first).unwrap().modified().unwrap(), stamp, "done once");
    assert!(bytes(&files, 2) == wanted);
    assert!(!directory.join("boundary-1.f32").exists());
}

/// S from the definition: gradients of the trainer, formula by formula, for matrices that the
/// checkpoint stores as they are and transposed.
#[test]
fn importance_adds_up_the_formula_over_batches() {
    for family in [Family::Llama, Family::Gpt2] {
        let room = Room::new(family, 55);
        let general = room.general(&room.root, &calibration(40, 32, 56)).unwrap();
        let domain = domain(10, 57);
        for mode in [Mode::Normalised, Mode::Gradient, Mode::Paper, Mode::Reference] {
            let options =
                DPrunerOptions { alpha: Some(0.0), epochs: Some(2), ..job(mode).d_pruner };
            let g = mode.needs_general().then_some(&general);
            let files = room.score(&options, &domain, g, &room.root, 9).unwrap().unwrap();
            let model = &room.model;
            let params = Params::from_checkpoint(&model.decoder, &model.checkpoint).unwrap();
            for name in linears(&model.decoder) {
                let count = name.out_features() * name.in_features();
                let stored = |values: &[f32]| -> Vec<f32> {
                    let mut out = vec![0f32; count];
                    for row in 0..name.out_features() {
                        for column in 0..name.in_features() {
                            out[place(&name, row, column)] =
                                values[row * name.in_features() + column];
                        }
                    }
                    out
                };
                let general = match g {
                    Some(files) => stored(&read(files, name.block.unwrap(), &name.module, count)),
                    None => Vec::new(),
                };
                let (mut wanted, mut fisher) = (vec![0f32; count], vec![0f32; count]);
                let mut step = 0;
                for epoch in 0..2 {
                    for batch in domain.batches(4, 5, epoch) {
                        let mut grads = Grads::new();
                        train::loss::gradients(&model.decoder, &params, &[batch], &mut grads)
                            .unwrap();
                        let gradient = grads.get(&name.weight()).unwrap();
                        step += 1;
                        if mode == Mode::Reference && step == 1 {
                            continue;
                        }
                        update_fisher(&mut fisher, gradient, step);
                        params
                            .read(&name.weight(), |w| {
                                let formula = options.formula(0.0);
                                accumulate(formula, w, gradient, &general, &fisher, &mut wanted);
                            })
                            .unwrap();
                    }
                }
                let found = stored(&read(&files, name.block.unwrap(), &name.module, count));
                let largest = wanted.iter().fold(0f32, |a, b| a.max(*b));
                assert!(largest > 0.0);
                for (a, b) in found.iter().zip(&wanted) {
                    assert!((a - b).abs() <= 1e-5 * largest, "{family:?} {mode:?} {name}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn scoring_goes_on_after_a_whole_epoch_with_the_same_bytes() {
    let room = Room::new(Family::Llama, 58);
    let general = room.general(&room.root, &calibration(40, 32, 59)).unwrap();
    let domain = domain(12, 60);
    for mode in [Mode::Normalised, Mode::Paper, Mode::Reference] {
        let options = DPrunerOptions { alpha: Some(0.05), epochs: Some(3), ..job(mode).d_pruner };
        let (a, b) = (room.root.join("whole"), room.root.join("stopped"));
        let whole = room.score(&options, &domain, Some(&general), &a, 9).unwrap().unwrap();
        assert!(room.score(&options, &domain, Some(&general), &b, 1).unwrap().is_none());
        let state = std::fs::read_dir(&b)
            .unwrap()
            .flatten()
            .any(|d| d.path().join("state.safetensors").is_file());
        assert!(state, "an epoch is saved");
        let resumed = room.score(&options, &domain, Some(&general), &b, 9).unwrap().unwrap();
        assert!(bytes(&whole, 2) == bytes(&resumed, 2), "{mode:?}");
        assert!(!resumed.directory().join("state.safetensors").exists());
        // The weights moved, so standing still gives other scores.
        let still = DPrunerOptions { alpha: Some(0.0), ..options };
        let still = room.score(&still, &domain, Some(&general), &a, 9).unwrap().unwrap();
        assert!(bytes(&whole, 2) != bytes(&still, 2), "{mode:?}");
    }
}

#[test]
fn the_base_weights_are_masked_and_nothing_else() {
    for (family, scope) in
        [(Family::Llama, "matrix"), (Family::Gpt2, "columns:8"), (Family::Llama, "row")]
    {
        let room = Room::new(family, 61);
        let general = room.general(&room.root, &calibration(40, 32, 62)).unwrap();
        let mut options = job(Mode::Normalised);
        options.scope = Some(scope.parse().unwrap());
        options.d_pruner.alpha = Some(0.05);
        let scores = room
            .score(&options.d_pruner, &domain(12, 63), Some(&general), &room.root, 9)
            .unwrap()
            .unwrap();
        let out = room.root.with_file_name("out");
        let none = Calibration::none();
        strata_compress::prune::run(
            Source::of(&room.model).unwrap(),
            &room.plan,
            &options,
            &none,
            Some(scores.clone()),
            Value::Null,
            &target(&out, false),
            &report::Progress::hidden(),
        )
        .unwrap();
        let after = Model::open(&out).unwrap();
        for name in linears(&room.model.decoder) {
            let count = name.out_features() * name.in_features();
            let scores = read(&scores, name.block.unwrap(), &name.module, count);
            let mask = mask::build(
                &scores,
                name.shape,
                0.5,
                Structure::Unstructured,
                scope.parse().unwrap(),
                Count::Percentile,
            );
            let mut wanted = matrix(&room.model, &name);
            mask.apply(&mut wanted);
            assert!(matrix(&after, &name) == wanted, "{family:?} {scope} {name}");
        }
    }
}

#[test]
fn refusals() {
    let room = Room::new(Family::Llama, 64);
    let error = room.general(&room.root, &Calibration::none()).unwrap_err().to_string();
    assert!(error.contains("--calibration"), "{error}");
    // One step is not enough for the reference.
    let options = DPrunerOptions { epochs: Some(1), ..job(Mode::Reference).d_pruner };
    let error = room.score(&options, &domain(3, 1), None, &room.root, 9).unwrap_err().to_string();
    assert!(error.contains("second step"), "{error}");
    // A learning rate that blows the model up: the batch is named.
    let wild = DPrunerOptions {
        alpha: Some(1e30),
        clip_norm: 0.0,
        epochs: Some(3),
        warmup: 0.0,
        ..job(Mode::Gradient).d_pruner
    };
    let error = room.score(&wild, &domain(12, 2), None, &room.root, 9).unwrap_err().to_string();
    assert!(error.contains("batch") && error.contains("--alpha"), "{error}");
}
