//! Rounds of pruning and training, and the job that writes what comes out.
//!
//! Round `t` of `T` prunes to `1 - (1 - S)^(t/T)`: every round takes the same share of what is left
//! (the paper's `1 - (1 - a)^t` with the `a` that ends at `S`). Masks only grow. After every round
//! but a training-free one the network is trained under its masks; how is the [`Finetune`]'s
//! business. Finished rounds are kept in the job's working directory, so that a killed job goes on.

use super::cache::CurveCache;
use super::curves::Prunable;
use super::layers::{self, Place};
use super::masks::{self, Mask};
use super::options::{LayerAdaptivePruningOptions, Rewind};
use super::output;
use super::round::{self, Round, Settings, Subject};
use super::samples::Samples;
use crate::runner::Target;
use crate::{Error, Result};
use nn::{Network, Weights};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use store::packed::sparse::SparseLayout;
use store::{Checkpoint, Dtype, WriteOptions, Writer};

/// Values of trained tensors by name, as the checkpoint orders them.
pub type Snapshot = BTreeMap<String, Vec<f32>>;

/// Trains a network whose pruned weights stay zero.
pub trait Finetune {
    /// The weights as they are now.
    fn weights(&self) -> Box<dyn Weights + Sync + '_>;

    /// `steps` steps of training after round `round`; weights that `masks` (by module) drop are zero
    /// before, during and after. What happens depends on the weights and the round only, so that a
    /// resumed job repeats it. Returns the mean loss of the last tenth of the steps.
    ///
    /// # Errors
    /// When training diverges.
    fn train(&mut self, masks: &BTreeMap<String, Mask>, steps: u64, round: u32) -> Result<f64>;

    /// Every value that training may change.
    fn snapshot(&self) -> Snapshot;

    /// Takes back a snapshot.
    ///
    /// # Errors
    /// One of another network.
    fn restore(&mut self, snapshot: &Snapshot) -> Result<()>;

    /// What the training is, for the job's identity (data, batch, rate, seed).
    fn identity(&self) -> serde_json::Value;
}

/// What a job prunes.
pub struct Job<'a> {
    /// The network.
    pub network: &'a dyn Network,
    /// Its weights, as the checkpoint holds them.
    pub weights: &'a (dyn Weights + Sync),
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// The layers that take part.
    pub places: Vec<Place>,
    /// Calibration inputs, if there are any.
    pub samples: Option<&'a Samples>,
    /// Training between rounds, if there is any.
    pub finetune: Option<&'a mut dyn Finetune>,
    /// Sparsity at the end.
    pub sparsity: f64,
    /// The method's options.
    pub options: &'a LayerAdaptivePruningOptions,
    /// Everything else that decides the output, for its record (the whole job's options).
    pub record: serde_json::Value,
    /// Largest size of one output shard.
    pub max_shard_size: u64,
    /// How masked linear layers are stored; `None` for ordinary weights.
    pub layout: Option<SparseLayout>,
}

/// One line of a job's history.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RoundNote {
    /// From 1.
    pub round: u32,
    /// Sparsity asked for.
    pub requested: f64,
    /// Sparsity reached.
    pub reached: f64,
    /// Predicted distortion.
    pub predicted: Option<f64>,
    /// Measured distortion.
    pub measured: Option<f64>,
    /// Mean training loss at the end of the round.
    pub loss: Option<f64>,
}

/// What a job leaves behind.
#[derive(Debug)]
pub struct Pruned {
    /// The output directory.
    pub path: PathBuf,
    /// The last round.
    pub round: Round,
    /// All rounds.
    pub history: Vec<RoundNote>,
    /// Rounds that an earlier, interrupted run had done.
    pub resumed: usize,
}

/// The sparsity of round `t` of `rounds` that ends at `sparsity`.
pub fn round_target(sparsity: f64, t: u32, rounds: u32) -> f64 {
    if t >= rounds {
        return sparsity;
    }
    // The share of the survivors that every round takes.
    let amount = 1.0 - (1.0 - sparsity).powf(1.0 / f64::from(rounds.max(1)));
    masks::schedule(amount, t)
}

/// Runs the rounds of `options` and returns the last one with the history. With `scratch`, finished
/// rounds and measured curves are kept there and taken up again.
///
/// # Errors
/// From the rounds and the training.
#[allow(clippy::too_many_arguments)]
pub fn rounds(
    network: &dyn Network,
    weights: &(dyn Weights + Sync),
    places: &[Place],
    samples: Option<&Samples>,
    mut finetune: Option<&mut dyn Finetune>,
    sparsity: f64,
    options: &LayerAdaptivePruningOptions,
    scratch: Option<&Path>,
) -> Result<(Round, Vec<RoundNote>, usize)> {
    options.check(sparsity)?;
    if options.finetune_steps > 0 && finetune.is_none() {
        return Err(Error::Options(
            "--finetune-steps needs something to train on: give training data".into(),
        ));
    }
    let settings = Settings::new(options)?;
    let cache = options
        .curve_cache
        .clone()
        .or_else(|| scratch.map(|s| s.join("curves")))
        .map(|directory| CurveCache::new(&directory));
    let start = finetune.as_ref().map(|f| f.snapshot());
    let mut before_training = start.clone();
    let mut masks: BTreeMap<String, Mask> = BTreeMap::new();
    let mut history: Vec<RoundNote> = Vec::new();
    let mut resumed = 0;
    if let Some(saved) = scratch.filter(|_| options.finetune_steps > 0).and_then(read_state) {
        if let (Some(finetune), Some(now)) = (finetune.as_mut(), &saved.now) {
            finetune.restore(now)?;
        }
        before_training = saved.before;
        masks = saved.masks;
        history = saved.history;
        resumed = history.len();
        report::note(&format!("resumed after round {resumed}"));
    }
    let mut last = None;
    for t in resumed as u32 + 1..=options.rounds {
        let target = round_target(sparsity, t, options.rounds);
        let mut round = {
            let trained = finetune.as_ref().map(|f| f.weights());
            let current: &(dyn Weights + Sync) = match &trained {
                Some(trained) => trained.as_ref(),
                None => weights,
            };
            let layers: Vec<Prunable> = layers::rank(places, current, &masks)?;
            let subject = Subject { network, weights: current, samples };
            let work = match (samples, options.allocator) {
                (Some(samples), super::Allocator::Rd) => {
                    let workers = settings.workers;
                    super::Probe { network, weights: current, samples, workers }
                        .measurements(&layers, settings.points)
                }
                _ => 0,
            };
            let label = match options.rounds {
                1 => "curves".to_string(),
                rounds => format!("curves, round {t} of {rounds}"),
            };
            let progress = match work {
                0 => report::Progress::hidden(),
                work => report::Progress::new(&label, work, "measurements"),
            };
            let round = round::run(subject, &layers, target, &settings, cache.as_ref(), &progress)?;
            progress.finish();
            round
        };
        if t > 1 {
            // Said in the first round, and from then on the masks' own doing.
            round.warnings.retain(|w| !w.contains("zero already"));
        }
        masks.clone_from(&round.masks);
        let mut loss = None;
        if let (Some(finetune), true) = (finetune.as_mut(), options.finetune_steps > 0) {
            let rewound = match options.rewind {
                Rewind::None => None,
                Rewind::Previous => before_training.clone(),
                Rewind::Start => start.clone(),
            };
            before_training = Some(finetune.snapshot());
            if let Some(snapshot) = rewound {
                finetune.restore(&snapshot)?;
            }
            loss = Some(finetune.train(&masks, options.finetune_steps, t)?);
        }
        history.push(RoundNote {
            round: t,
            requested: round.requested,
            reached: round.reached,
            predicted: round.predicted,
            measured: round.measured,
            loss,
        });
        if let (Some(scratch), Some(finetune), true) =
            (scratch, finetune.as_ref(), t < options.rounds)
        {
            write_state(scratch, &history, &masks, finetune.snapshot(), before_training.as_ref())?;
        }
        last = Some(round);
    }
    let round = last.ok_or_else(|| Error::Options("--rounds must be at least 1".into()))?;
    Ok((round, history, resumed))
}

/// Runs the job and writes its output directory.
///
/// # Errors
/// As [`rounds`], and from the files.
pub fn run(mut job: Job<'_>, target: &Target<'_>) -> Result<Pruned> {
    job.options.check(job.sparsity)?;
    let config = config_of(job.checkpoint)?;
    if config.is_some() {
        crate::runner::refuse_quantized(job.checkpoint)?;
    }
    let training = job.finetune.as_ref().map(|f| f.identity());
    let samples = job.samples.map(|s| s.identity());
    let identity = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "job": "prune",
        "options": job.record,
        "samples": samples,
        "training": training,
        "provenance": target.provenance,
    });
    let fingerprint = identity.to_string();
    let mut writer = Writer::create(
        target.out,
        WriteOptions {
            max_shard_size: job.max_shard_size,
            resume: target.resume,
            overwrite: target.overwrite,
            fingerprint,
            inputs: vec![job.checkpoint.path().to_path_buf()],
        },
    )?;
    if writer.sealed().is_empty() {
        // From here on a killed job finds its curves and rounds again.
        writer.seal("start", serde_json::Value::Null)?;
    }
    let scratch = writer.scratch_dir()?;
    let result = rounds(
        job.network,
        job.weights,
        &job.places,
        job.samples,
        // Reborrowed as a shorter-lived object.
        match &mut job.finetune {
            Some(finetune) => Some(&mut **finetune),
            None => None,
        },
        job.sparsity,
        job.options,
        Some(&scratch),
    );
    let (round, history, resumed) = match result {
        Ok(done) => done,
        Err(refused @ (Error::Options(_) | Error::Layer { .. })) => {
            // Nothing here helps a corrected command; what a kill or a full disk leaves does.
            drop(writer);
            let mut partial = target.out.as_os_str().to_os_string();
            partial.push(".partial");
            let _ = std::fs::remove_dir_all(partial);
            return Err(refused);
        }
        Err(error) => return Err(error),
    };
    for warning in &round.warnings {
        report::warn(warning);
    }
    let snapshot = match &job.finetune {
        Some(finetune) if job.options.finetune_steps > 0 => finetune.snapshot(),
        _ => Snapshot::new(),
    };
    let trained = |name: &str| snapshot.get(name).cloned();
    let masked = output::Masked::new(&job.places, &round.masks);
    let sparse =
        output::write_checkpoint(&mut writer, job.checkpoint, &masked, &trained, job.layout)?;
    output::write_masks(
        &mut writer,
        job.checkpoint,
        &job.places,
        &round.masks,
        &trained,
        job.options.mask_export,
    )?;
    let notes: Vec<serde_json::Value> =
        history.iter().map(|n| serde_json::to_value(n).unwrap_or_default()).collect();
    let kind = job.options.kind();
    let allocation = output::allocation(&round, kind, &notes);
    writer.put_json(output::ALLOCATION_FILE, &allocation)?;
    if let Some(curves) = output::curves(&round.curves, kind) {
        writer.put_json(output::CURVES_FILE, &curves)?;
    }
    crate::runner::carry(&mut writer, job.checkpoint)?;
    if let Some(config) = with_layout(&job, config, &round, &sparse) {
        writer.put_json("config.json", &config)?;
    }
    let record = serde_json::json!({
        "strata": env!("CARGO_PKG_VERSION"),
        "job": "prune",
        "options": job.record,
        "samples": identity.get("samples"),
        "training": identity.get("training"),
        "provenance": target.provenance,
        "layers": allocation.get("layers"),
    });
    writer.put_json("strata.json", &record)?;
    let path = writer.finish()?;
    Ok(Pruned { path, round, history, resumed })
}

/// The checkpoint's config; `None` for a bare file of weights.
fn config_of(checkpoint: &Checkpoint) -> Result<Option<serde_json::Value>> {
    match checkpoint.config() {
        Ok(config) => Ok(Some(config.clone())),
        Err(store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The output's config, with the announcement of what is stored sparse.
fn with_layout(
    job: &Job<'_>,
    config: Option<serde_json::Value>,
    round: &Round,
    stored_sparse: &BTreeSet<String>,
) -> Option<serde_json::Value> {
    let Some(layout) = job.layout.filter(|_| !stored_sparse.is_empty()) else { return config };
    let shares = || round.layers.iter().filter(|l| stored_sparse.contains(&l.module));
    let total: usize = shares().map(|l| l.total).sum();
    let kept: usize = shares().map(|l| l.kept).sum();
    let mut ignored: Vec<String> = job
        .network
        .layers()
        .into_iter()
        .map(|(_, name)| name.module)
        .filter(|module| !stored_sparse.contains(module))
        .collect();
    if !ignored.iter().any(|module| module == "lm_head") && !stored_sparse.contains("lm_head") {
        ignored.push("lm_head".into());
    }
    let sparsity = 1.0 - kept as f64 / total.max(1) as f64;
    let json = store::packed::sparse::config_json(layout, sparsity, &ignored);
    let mut config = config.unwrap_or_else(|| serde_json::json!({}));
    if let Some(object) = config.as_object_mut() {
        object.insert("quantization_config".into(), json);
    }
    Some(config)
}

/// Reads what a finished job wrote about itself: the last round (without masks) and the history.
///
/// # Errors
/// Files that are missing or damaged, by name.
pub fn read(directory: &Path) -> Result<(Round, Vec<RoundNote>)> {
    let load = |file: &str| -> Result<Option<serde_json::Value>> {
        let path = directory.join(file);
        if !path.is_file() {
            return Ok(None);
        }
        let shown = path.display().to_string();
        let bytes =
            std::fs::read(&path).map_err(|source| Error::Io { path: shown.clone(), source })?;
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::Options(format!("{shown} is damaged: {e}")))
    };
    let missing = || {
        let path = directory.join(output::ALLOCATION_FILE);
        Error::Options(format!("{} is not there", path.display()))
    };
    let allocation = load(output::ALLOCATION_FILE)?.ok_or_else(missing)?;
    let curves = load(output::CURVES_FILE)?.unwrap_or_default();
    output::parse(&allocation, &curves)
        .ok_or_else(|| Error::Options(format!("{} is damaged", directory.display())))
}

/// A finished round on disk.
struct State {
    history: Vec<RoundNote>,
    masks: BTreeMap<String, Mask>,
    now: Option<Snapshot>,
    before: Option<Snapshot>,
}

fn state_path(scratch: &Path) -> PathBuf {
    scratch.join("rounds.safetensors")
}

/// Keeps the state after a round: one file, replaced atomically.
fn write_state(
    scratch: &Path,
    history: &[RoundNote],
    masks: &BTreeMap<String, Mask>,
    now: Snapshot,
    before: Option<&Snapshot>,
) -> Result<()> {
    let history = serde_json::to_vec(history)
        .map_err(|e| Error::Options(format!("the rounds cannot be noted: {e}")))?;
    let mut tensors = vec![("history".to_string(), Dtype::U8, vec![history.len()], history)];
    for (module, mask) in masks {
        let bytes: Vec<u8> = mask.flags().iter().map(|keep| u8::from(*keep)).collect();
        tensors.push((format!("mask.{module}"), Dtype::Bool, vec![bytes.len()], bytes));
    }
    for (prefix, snapshot) in [("now.", Some(&now)), ("before.", before)] {
        for (name, values) in snapshot.into_iter().flatten() {
            let bytes = bytemuck::cast_slice(values).to_vec();
            tensors.push((format!("{prefix}{name}"), Dtype::F32, vec![values.len()], bytes));
        }
    }
    let path = state_path(scratch);
    let bytes = store::safetensors::file_bytes(&path, &tensors)?;
    Ok(store::write_atomic(&path, &bytes)?)
}

/// The state that an interrupted run left; `None` when there is none or it is damaged.
fn read_state(scratch: &Path) -> Option<State> {
    let path = state_path(scratch);
    if !path.is_file() {
        return None;
    }
    let file = Checkpoint::open(&path).ok()?;
    let history = serde_json::from_slice(&file.bytes("history").ok()?).ok()?;
    let mut state = State { history, masks: BTreeMap::new(), now: None, before: None };
    for info in file.infos() {
        let name = &info.name;
        if let Some(module) = name.strip_prefix("mask.") {
            let flags = file.bytes(name).ok()?.iter().map(|b| *b != 0).collect();
            state.masks.insert(module.to_string(), Mask::new(flags));
        } else if let Some(tensor) = name.strip_prefix("now.") {
            let values = file.f32(name).ok()?;
            state.now.get_or_insert_default().insert(tensor.to_string(), values);
        } else if let Some(tensor) = name.strip_prefix("before.") {
            let values = file.f32(name).ok()?;
            state.before.get_or_insert_default().insert(tensor.to_string(), values);
        }
    }
    Some(state)
}

#[cfg(test)]
mod tests {
    use super::super::nets::{Chain, Held};
    use super::super::options::Allocator;
    use super::*;
    use tensor::Rng;

    #[test]
    fn rounds_end_at_the_target_of_the_papers_schedule() {
        let end = masks::schedule(0.2, 20);
        for t in 1..=20 {
            assert!((round_target(end, t, 20) - masks::schedule(0.2, t)).abs() < 1e-12);
        }
        assert_eq!(round_target(0.7, 1, 1), 0.7);
    }

    /// "Training" that adds fixed noise under the masks: what rounds do with a trainer, without one.
    struct Noise {
        weights: Held,
        names: Vec<nn::Name>,
        trained: u64,
        fails_at: u64,
    }

    impl Finetune for Noise {
        fn weights(&self) -> Box<dyn Weights + Sync + '_> {
            Box::new(self.weights.clone())
        }

        fn train(&mut self, masks: &BTreeMap<String, Mask>, steps: u64, round: u32) -> Result<f64> {
            self.trained += 1;
            if self.trained == self.fails_at {
                return Err(Error::Options("killed".into()));
            }
            for name in &self.names {
                // A generator by what the weights are, so that a resumed run repeats it.
                let mut values = self.weights.values(name);
                let seed = values.iter().map(|v| u64::from(v.to_bits())).sum();
                let mut rng = Rng::stream(seed, &name.module);
                for _ in 0..steps {
                    values.iter_mut().for_each(|v| *v += 0.02 * rng.normal() as f32);
                }
                masks[&name.module].apply(&mut values);
                self.weights.set(name, values);
            }
            Ok(1.0 / f64::from(round))
        }

        fn snapshot(&self) -> Snapshot {
            self.names.iter().map(|n| (n.weight(), self.weights.values(n))).collect()
        }

        fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
            for name in &self.names.clone() {
                self.weights.set(name, snapshot[&name.weight()].clone());
            }
            Ok(())
        }

        fn identity(&self) -> serde_json::Value {
            serde_json::Value::Null
        }
    }

    fn noise(net: &Chain, fails_at: u64) -> Noise {
        let names = net.names.clone();
        Noise { weights: Held::random(net, 30), names, trained: 0, fails_at }
    }

    fn options(rewind: Rewind) -> LayerAdaptivePruningOptions {
        LayerAdaptivePruningOptions {
            curve_points: 20,
            rounds: 4,
            finetune_steps: 2,
            rewind,
            ..Default::default()
        }
    }

    fn go(
        net: &Chain,
        trainer: &mut Noise,
        options: &LayerAdaptivePruningOptions,
        scratch: Option<&Path>,
    ) -> Result<(Round, Vec<RoundNote>, usize)> {
        let mut pixels = vec![0.0; 12 * net.width()];
        Rng::new(5).fill_normal(&mut pixels, 1.0);
        let samples = Samples::images(pixels, [12, 1, 1, net.width()]).unwrap();
        let places = layers::select(net, &[], &[], false).unwrap();
        let base = trainer.weights.clone();
        rounds(net, &base, &places, Some(&samples), Some(trainer), 0.8, options, scratch)
    }

    #[test]
    fn masks_hold_through_training_and_a_killed_job_ends_the_same() {
        let net = Chain::new(&[12, 20, 6]);
        for rewind in [Rewind::None, Rewind::Previous, Rewind::Start] {
            let options = options(rewind);
            let mut whole = noise(&net, 0);
            let (round, history, _) = go(&net, &mut whole, &options, None).unwrap();
            assert_eq!(history.len(), 4);
            assert!(history.windows(2).all(|h| h[0].reached <= h[1].reached));
            assert!((round.requested - 0.8).abs() < 1e-12 && round.reached >= 0.8);
            for name in &net.names {
                let values = whole.weights.values(name);
                let mask = &round.masks[&name.module];
                assert!((0..values.len()).all(|i| mask.keeps(i) || values[i] == 0.0));
            }
            let dir = tempfile::tempdir().unwrap();
            let mut killed = noise(&net, 3);
            let error = go(&net, &mut killed, &options, Some(dir.path())).unwrap_err().to_string();
            assert!(error.contains("killed"), "{error}");
            let mut again = noise(&net, 0);
            again.trained = 2;
            let (after, notes, resumed) = go(&net, &mut again, &options, Some(dir.path())).unwrap();
            assert_eq!(resumed, 2);
            assert_eq!(notes, history, "{rewind:?}");
            assert_eq!(after.masks, round.masks);
            assert_eq!(again.snapshot(), whole.snapshot());
        }
    }

    #[test]
    fn rewinding_starts_from_the_weights_it_names() {
        let net = Chain::new(&[12, 20, 6]);
        let mut start = noise(&net, 0);
        let original = start.snapshot();
        let (round, _, _) = go(&net, &mut start, &options(Rewind::Start), None).unwrap();
        // Two steps of noise of 0.02 from the original, not eight.
        for name in &net.names {
            let mask = &round.masks[&name.module];
            let (now, then) = (start.weights.values(name), &original[&name.weight()]);
            let moved: f64 = (0..now.len())
                .filter(|&i| mask.keeps(i))
                .map(|i| f64::from(now[i] - then[i]).powi(2))
                .sum::<f64>()
                / mask.kept() as f64;
            assert!((moved.sqrt() / (0.02 * 2f64.sqrt()) - 1.0).abs() < 0.4, "{}", moved.sqrt());
        }
    }

    #[test]
    fn training_without_data_is_refused() {
        let net = Chain::new(&[12, 6]);
        let weights = Held::random(&net, 1);
        let places = layers::select(&net, &[], &[], false).unwrap();
        let options =
            LayerAdaptivePruningOptions { allocator: Allocator::Lamp, ..options(Rewind::None) };
        let error = rounds(&net, &weights, &places, None, None, 0.5, &options, None).unwrap_err();
        assert!(error.to_string().contains("--finetune-steps"), "{error}");
    }
}
