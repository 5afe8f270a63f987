//! The training loop: prepare, resume, step, evaluate, save.
//!
//! A run works in `<out>.training` (state and loss log) and leaves `<out>` whole at the end. Killed
//! at any time it continues from the last saved state and ends with the same bytes as an
//! uninterrupted run on the same machine with the same number of threads.

use crate::{
    config::{TrainConfig, parse_pattern},
    error::{Error, Result, config as refuse, io},
    gradients::Grads,
    loader::{Loader, TokenBatch},
    loss,
    output::{self, Finished},
    params::Params,
    schedule::Schedule,
    sources::{self, Material},
    state::{Header, LossLog, LossRecord, StateDir},
    transform::{Chain, Step},
};
use nn::Decoder;
use report::{Cell, Column, Progress, Table};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

/// What a finished run did.
#[derive(Clone, Debug, Serialize)]
pub struct TrainOutcome {
    /// The output directory.
    pub path: PathBuf,
    /// Number of values in all parameters.
    pub parameters: usize,
    /// One record per step, in order.
    pub losses: Vec<LossRecord>,
    /// `(step, loss)` of every evaluation.
    pub evaluations: Vec<(u64, f64)>,
    /// The step from which this process continued.
    pub resumed_from: u64,
    /// Wall time of this process in seconds.
    pub seconds: f64,
    /// Training tokens per second of this process, evaluations and saving included.
    pub tokens_per_second: f64,
}

impl TrainOutcome {
    /// The outcome as a table of one row.
    pub fn table(&self) -> Table {
        let columns = ["steps", "tokens", "loss", "evaluation loss", "time", "tokens/s"];
        let last = self.losses.last();
        Table::new("Training", columns.map(Column::right).to_vec()).row(vec![
            Cell::Int(self.losses.len() as i64),
            Cell::Count(last.map_or(0, |l| l.tokens)),
            last.map_or(Cell::Empty, |l| Cell::Float(l.loss, 4)),
            self.evaluations.last().map_or(Cell::Empty, |e| Cell::Float(e.1, 4)),
            Cell::Seconds(self.seconds),
            Cell::Float(self.tokens_per_second, 0),
        ])
    }
}

/// A prepared run: everything is loaded and checked, nothing is written yet.
pub struct Trainer {
    config: TrainConfig,
    material: Material,
    decoder: Decoder,
    params: Params,
    chain: Chain,
    schedule: Schedule,
    loader: Loader,
    evaluation: Vec<TokenBatch>,
    step: u64,
    total: u64,
}

impl Trainer {
    /// Trains as `config` says and leaves the model, its tokenizer, the loss log and a report in
    /// `out`.
    ///
    /// With `resume` a run that was stopped continues; a finished one is reported and left alone.
    ///
    /// # Errors
    /// A configuration, data or checkpoint that cannot work (before anything is written), a
    /// diverged run (by step), and an `out` that exists or is in progress without `resume`.
    pub fn run(
        config: &TrainConfig,
        out: &Path,
        resume: bool,
        progress: &Progress,
    ) -> Result<TrainOutcome> {
        match Self::run_until(config, out, resume, progress, u64::MAX)? {
            Some(outcome) => Ok(outcome),
            None => Err(refuse("steps", "the run stopped before its end")),
        }
    }

    /// As [`Trainer::run`], but returns `None` after step `stop` without saving, as if killed
    /// there.
    pub fn run_until(
        config: &TrainConfig,
        out: &Path,
        resume: bool,
        progress: &Progress,
        stop: u64,
    ) -> Result<Option<TrainOutcome>> {
        let started = Instant::now();
        config.validate()?;
        let work = Work::open(config, out, resume)?;
        if let Some(outcome) = work.finished()? {
            return Ok(Some(outcome));
        }
        let mut trainer = Self::prepare(config)?;
        let state = StateDir::new(&work.directory);
        trainer.restore(&state)?;
        let resumed_from = trainer.step;
        let mut log = LossLog::open(&work.directory.join(output::LOSSES), resumed_from)?;
        progress.set(resumed_from);
        let windows = config.batch_size * config.accumulation;
        while trainer.step < trainer.total {
            if trainer.step >= stop {
                return Ok(None);
            }
            let record = trainer.step()?;
            let done = trainer.step - resumed_from;
            let speed = (done as usize * windows * config.sequence_length) as f64
                / started.elapsed().as_secs_f64();
            let (step, total) = (trainer.step, trainer.total);
            progress.message(&format!(
                "step {step} of {total}, loss {:.3}, {speed:.0} tokens/s",
                record.loss
            ));
            progress.inc(1);
            log.append(record)?;
            if trainer.step.is_multiple_of(config.checkpoint_every) && trainer.step < trainer.total
            {
                log.sync()?;
                trainer.save_state(&state)?;
            }
        }
        let finished = Finished {
            config: &trainer.config,
            material: &trainer.material,
            params: &trainer.params,
            log: &log,
        };
        output::write(&finished, out)?;
        work.remove()?;
        let seconds = started.elapsed().as_secs_f64();
        let tokens =
            (trainer.total - resumed_from) as f64 * (windows * config.sequence_length) as f64;
        Ok(Some(TrainOutcome {
            path: out.to_path_buf(),
            parameters: trainer.params.count(),
            evaluations: evaluations(log.records()),
            losses: log.records().to_vec(),
            resumed_from,
            seconds,
            tokens_per_second: tokens / seconds,
        }))
    }

    /// Loads data, tokenizer and parameters and checks that they fit together.
    pub fn prepare(config: &TrainConfig) -> Result<Self> {
        config.validate()?;
        let mut material = sources::gather(config)?;
        let decoder = Decoder::from_config(&material.config)?;
        let (decoder, mut params) = match &config.init {
            Some(path) => {
                let checkpoint = store::Checkpoint::open(path)?;
                let decoder = Decoder::from_checkpoint(&checkpoint)?;
                let params = Params::from_checkpoint(&decoder, &checkpoint)?;
                (decoder, params)
            }
            None => {
                let params = Params::random(&decoder, config.seed)?;
                (decoder, params)
            }
        };
        check_lengths(config, &material, &decoder)?;
        let trainable =
            config.trainable.as_ref().map(|list| patterns("trainable", list)).transpose()?;
        params.set_trainable(trainable.as_deref(), &patterns("freeze", &config.freeze)?)?;

        let pad = material.pad;
        let length = config.sequence_length;
        let too_small = |list: &'static str| {
            move |i: usize| {
                refuse(
                    format!("{list}[{i}]"),
                    format!("holds less than one window of {length} tokens"),
                )
            }
        };
        let data = std::mem::take(&mut material.data);
        let loader = Loader::new(data, length, pad, config.seed).map_err(too_small("data"))?;
        let evaluation = std::mem::take(&mut material.evaluation);
        let evaluation =
            evaluation_batches(config, evaluation, pad).map_err(too_small("evaluation"))?;
        let windows = config.batch_size * config.accumulation;
        let total = match (config.steps, config.epochs) {
            (Some(steps), _) => steps,
            (None, epochs) => {
                let rows = epochs.unwrap_or(1.0) * loader.epoch_windows() as f64;
                (rows / windows as f64).round().max(1.0) as u64
            }
        };
        Ok(Self {
            chain: Chain::from_config(config)?,
            schedule: config.schedule.over(total),
            config: config.clone(),
            material,
            decoder,
            params,
            loader,
            evaluation,
            step: 0,
            total,
        })
    }

    /// Optimiser steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total
    }

    /// The parameters as they are now.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// One optimiser step, with an evaluation when it is due.
    pub fn step(&mut self) -> Result<LossRecord> {
        let config = &self.config;
        let batches: Vec<TokenBatch> =
            (0..config.accumulation).map(|_| self.loader.batch(config.batch_size)).collect();
        let mut grads = Grads::new();
        let loss = loss::gradients(&self.decoder, &self.params, &batches, &mut grads)?;
        if !loss.is_finite() {
            let what = format!("the loss is {loss}");
            return Err(Error::Diverged { step: self.step + 1, what });
        }
        let learning_rate = config.optimizer.learning_rate * self.schedule.factor(self.step);
        let step = Step { index: self.step, total: self.total, learning_rate };
        self.chain.update(&step, &mut self.params, &mut grads)?;
        self.step += 1;
        let measures = self.chain.measures();
        let gradient_norm =
            measures.iter().find(|(name, _)| *name == "gradient_norm").map_or(0.0, |(_, v)| *v);
        let every = config.evaluate_every;
        let due = self.step == self.total || (every > 0 && self.step.is_multiple_of(every));
        let evaluation = if due && !self.evaluation.is_empty() {
            Some(loss::evaluate(&self.decoder, &self.params.constants(), &self.evaluation)?)
        } else {
            None
        };
        let window = config.batch_size * config.accumulation * config.sequence_length;
        let tokens = self.step * window as u64;
        Ok(LossRecord { step: self.step, loss, learning_rate, gradient_norm, tokens, evaluation })
    }

    fn save_state(&self, state: &StateDir) -> Result<()> {
        let header = Header {
            step: self.step,
            config: output::config_value(&self.config),
            data: self.material.hash.clone(),
            notes: self.chain.notes(),
        };
        let mut tensors = self.params.state();
        tensors.extend(self.chain.state());
        state.write(&header, &tensors)
    }

    fn restore(&mut self, state: &StateDir) -> Result<()> {
        let Some((header, mut saved)) = state.read()? else { return Ok(()) };
        let refuse = |reason: String| Error::State { path: state.file(), reason };
        if let Some(key) = output::difference(&header.config, &output::config_value(&self.config)) {
            return Err(refuse(format!(
                "was written with another `{key}`; resume with the configuration of the start, \
                 or choose another output"
            )));
        }
        if header.data != self.material.hash {
            return Err(refuse(
                "the training data have changed since; restore them, or choose another output"
                    .into(),
            ));
        }
        self.params.restore(&mut saved)?;
        self.chain.restore(&mut saved, &header.notes)?;
        if let Some(name) = saved.names().next() {
            return Err(refuse(format!("holds `{name}`, which this run does not know")));
        }
        self.step = header.step;
        let windows = self.config.batch_size * self.config.accumulation;
        self.loader.skip(self.step * windows as u64);
        Ok(())
    }
}

/// `(step, loss)` of the records with an evaluation.
pub(crate) fn evaluations(records: &[LossRecord]) -> Vec<(u64, f64)> {
    records.iter().filter_map(|r| Some((r.step, r.evaluation?))).collect()
}

fn patterns(field: &str, list: &[String]) -> Result<Vec<method::Pattern>> {
    list.iter().map(|p| parse_pattern(field, p)).collect()
}

fn check_lengths(config: &TrainConfig, material: &Material, decoder: &Decoder) -> Result<()> {
    let (vocabulary, needed) = (decoder.config.vocab_size, material.tokenizer.vocab_size());
    if vocabulary < needed {
        return Err(refuse(
            "model.vocab_size",
            format!("{vocabulary} is less than the tokenizer's {needed} tokens"),
        ));
    }
    let context = decoder.config.max_position_embeddings;
    if config.sequence_length > context {
        return Err(refuse(
            "sequence_length",
            format!("{} is longer than the model's context of {context}", config.sequence_length),
        ));
    }
    Ok(())
}

/// The fixed windows of every evaluation, in batches.
fn evaluation_batches(
    config: &TrainConfig,
    corpora: Vec<(crate::loader::Corpus, Option<f64>)>,
    pad: u32,
) -> std::result::Result<Vec<TokenBatch>, usize> {
    if corpora.is_empty() {
        return Ok(Vec::new());
    }
    let mut loader = Loader::new(corpora, config.sequence_length, pad, 0)?;
    let mut left = config.evaluation_windows.min(loader.epoch_windows());
    let mut batches = Vec::new();
    while left > 0 {
        let rows = left.min(config.batch_size);
        batches.push(loader.batch(rows));
        left -= rows;
    }
    Ok(batches)
}

/// The directory of a run in progress.
struct Work {
    directory: PathBuf,
    out: PathBuf,
    complete: bool,
}

impl Work {
    fn open(config: &TrainConfig, out: &Path, resume: bool) -> Result<Self> {
        let name = out.file_name().ok_or_else(|| Error::State {
            path: out.to_path_buf(),
            reason: "is not a directory name; give the directory to create".into(),
        })?;
        let mut own = name.to_os_string();
        own.push(".training");
        let directory = out.with_file_name(own);
        let complete = out.exists();
        let exists = |path: &Path, hint: &str| Error::State {
            path: path.to_path_buf(),
            reason: format!("exists already; {hint}"),
        };
        if complete && !resume {
            return Err(exists(out, "remove it or choose another output"));
        }
        if !complete && !resume && directory.exists() {
            return Err(exists(&directory, "continue that run with --resume, or remove it"));
        }
        if complete && !output::is_result_of(out, config) {
            return Err(exists(out, "it is not the result of this configuration"));
        }
        if !complete {
            std::fs::create_dir_all(&directory).map_err(io(&directory))?;
        }
        Ok(Self { directory, out: out.to_path_buf(), complete })
    }

    /// The outcome when the output is already complete.
    fn finished(&self) -> Result<Option<TrainOutcome>> {
        if !self.complete {
            return Ok(None);
        }
        let losses = output::read_losses(&self.out)?;
        self.remove()?;
        let parameters = output::read_parameters(&self.out);
        Ok(Some(TrainOutcome {
            path: self.out.clone(),
            parameters,
            evaluations: evaluations(&losses),
            resumed_from: losses.len() as u64,
            losses,
            seconds: 0.0,
            tokens_per_second: 0.0,
        }))
    }

    fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.directory) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(&self.directory)(e)),
            _ => Ok(()),
        }
    }
}
