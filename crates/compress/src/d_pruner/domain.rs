//! Dual importance S: gradients on domain text, boosted by the general importance.
//!
//! The model is trained on the domain by plain gradient descent (or stands still, at learning rate
//! 0); at every step the *unclipped* gradient at the current weights adds to the score of every
//! prunable weight. Afterwards the moved weights are thrown away. Beside the weights and one
//! gradient lies S in single precision; G is mapped from disk, layer by layer.

use super::files::{BlockImportance, Files, Kind};
use super::general::planned;
use super::{DPrunerOptions, Formula, Mode, accumulate, update_fisher};
use crate::plan::Plan;
use crate::{Error, Result};
use nn::{Decoder, Name};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use store::Checkpoint;
use tensor::rng::Rng;
use train::loader::{IGNORE, TokenBatch};
use train::schedule::{Decay, Schedule};
use train::state::{Header, StateDir, StateTensor, Values};
use train::{Grads, Params};

/// The domain's documents as token ids.
#[derive(Debug, Clone, PartialEq)]
pub struct Domain {
    /// Documents of at least two tokens each.
    samples: Vec<Vec<u32>>,
    /// Fills up a batch's shorter documents; never a target.
    pad: u32,
}

impl Domain {
    /// At most `limit` documents, each cut at `length` tokens; those that predict nothing are
    /// dropped.
    ///
    /// # Errors
    /// When nothing is left.
    pub fn new(documents: Vec<Vec<u32>>, length: usize, limit: usize, pad: u32) -> Result<Self> {
        let found = documents.len();
        let samples: Vec<Vec<u32>> = documents
            .into_iter()
            .map(|mut ids| {
                ids.truncate(length);
                ids
            })
            .filter(|ids| ids.len() >= 2)
            .take(limit)
            .collect();
        if samples.is_empty() {
            return Err(Error::Options(format!(
                "the domain text holds no document of at least two tokens ({found} documents, cut \
                 at {length} tokens); give --domain a file with text, one document per line of a \
                 .jsonl"
            )));
        }
        Ok(Self { samples, pad })
    }

    /// The documents.
    pub fn samples(&self) -> &[Vec<u32>] {
        &self.samples
    }

    /// Steps of one epoch.
    pub fn steps(&self, batch: usize) -> usize {
        self.samples.len().div_ceil(batch.max(1))
    }

    /// The batches of an epoch, in the order that `seed` and the epoch give.
    pub fn batches(&self, batch: usize, seed: u64, epoch: usize) -> Vec<TokenBatch> {
        let order =
            Rng::stream(seed, &format!("domain order {epoch}")).permutation(self.samples.len());
        order.chunks(batch.max(1)).map(|rows| self.batch(rows)).collect()
    }

    /// Documents side by side: every token is a target but for the first of each.
    fn batch(&self, rows: &[usize]) -> TokenBatch {
        let documents: Vec<&[u32]> =
            rows.iter().filter_map(|&row| self.samples.get(row)).map(Vec::as_slice).collect();
        let length = documents.iter().map(|d| d.len() - 1).max().unwrap_or(1);
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for document in &documents {
            let padding = length + 1 - document.len();
            tokens.extend_from_slice(document.get(..document.len() - 1).unwrap_or_default());
            tokens.extend(std::iter::repeat_n(self.pad, padding));
            targets.extend_from_slice(document.get(1..).unwrap_or_default());
            targets.extend(std::iter::repeat_n(IGNORE, padding));
        }
        TokenBatch { rows: documents.len(), length, tokens, targets }
    }

    /// What the documents are, for records.
    pub fn digest(&self) -> String {
        let ids = self.samples.iter().flat_map(|sample| {
            (sample.len() as u32)
                .to_le_bytes()
                .into_iter()
                .chain(sample.iter().flat_map(|id| id.to_le_bytes()))
        });
        store::sha256_bytes(&ids.collect::<Vec<u8>>())
    }
}

/// What scoring needs.
pub struct Scoring<'a> {
    /// The network.
    pub decoder: &'a Decoder,
    /// Its weights.
    pub checkpoint: &'a Checkpoint,
    /// The layers to score.
    pub plan: &'a Plan,
    /// The domain's text.
    pub domain: &'a Domain,
    /// Options.
    pub options: &'a DPrunerOptions,
    /// Seed of the order of documents.
    pub seed: u64,
    /// G; not needed by the mode `gradient`.
    pub general: Option<&'a Files>,
    /// Which model this is.
    pub identity: &'a Value,
}

impl Scoring<'_> {
    /// Scores all planned weights into `root`, or takes what is there already. A run that was
    /// stopped goes on after the last whole epoch.
    pub fn run(&self, root: &Path, progress: &report::Progress) -> Result<Files> {
        match self.run_until(root, progress, usize::MAX)? {
            Some(files) => Ok(files),
            None => Err(Error::Options("scoring stopped before its end".into())),
        }
    }

    /// As [`Scoring::run`], but returns `None` after epoch `stop`, as if killed there.
    pub fn run_until(
        &self,
        root: &Path,
        progress: &report::Progress,
        stop: usize,
    ) -> Result<Option<Files>> {
        let options = self.options;
        let files = Files::at(root, Kind::Scores, &self.record()?, self.plan.blocks.len())?;
        if files.complete() {
            report::note(&format!("importance taken from {}", files.directory().display()));
            return Ok(Some(files));
        }
        let steps = self.domain.steps(options.domain_batch) * options.epochs();
        if options.importance_mode == Mode::Reference && steps < 2 {
            return Err(Error::Options(
                "the mode reference scores from the second step on, and there is only one: more \
                 domain text, a smaller --domain-batch or more --epochs"
                    .into(),
            ));
        }
        let mut state = State::new(self)?;
        let saved = StateDir::new(files.directory());
        let first = state.restore(&saved)?;
        progress.set((first * self.domain.steps(options.domain_batch)) as u64);
        for epoch in first..options.epochs() {
            self.epoch(epoch, &mut state, progress)?;
            if epoch + 1 < options.epochs() {
                state.save(&saved, epoch + 1)?;
            }
            if epoch + 1 >= stop {
                return Ok(None);
            }
        }
        self.write(&files, &state)?;
        // The scores stand in files of their own now.
        let _ = std::fs::remove_file(saved.file());
        Ok(Some(files))
    }

    fn record(&self) -> Result<Value> {
        let options = DPrunerOptions {
            importance: None,
            lambda: Some(self.options.lambda()),
            alpha: Some(self.options.alpha()),
            epochs: Some(self.options.epochs()),
            ..self.options.clone()
        };
        let options = serde_json::to_value(options)
            .map_err(|e| Error::Options(format!("the options cannot be written: {e}")))?;
        let general = self
            .general
            .map(|files| files.directory().file_name().map(|n| n.to_string_lossy().into_owned()));
        Ok(json!({
            "kind": "importance",
            "strata": env!("CARGO_PKG_VERSION"),
            "model": self.identity,
            "domain": { "documents": self.domain.samples.len(), "tokens": self.domain.digest() },
            "options": options,
            "seed": self.seed,
            "general": general,
            "modules": planned(self.plan).map(|n| n.module.as_str()).collect::<Vec<_>>(),
        }))
    }

    fn epoch(&self, epoch: usize, state: &mut State, progress: &report::Progress) -> Result<()> {
        let options = self.options;
        let batches = self.domain.batches(options.domain_batch, self.seed, epoch);
        let total = (batches.len() * options.epochs()) as u64;
        let schedule = Schedule {
            decay: Decay::Linear,
            warmup_steps: (total as f64 * options.warmup).ceil() as u64,
            total_steps: total,
            floor: 0.0,
        };
        for (index, batch) in batches.iter().enumerate() {
            let step = (epoch * batches.len() + index) as u64;
            let alpha = options.alpha() * schedule.factor(step);
            let mut grads = Grads::new();
            let loss = train::loss::gradients(
                self.decoder,
                &state.params,
                std::slice::from_ref(batch),
                &mut grads,
            )?;
            if !loss.is_finite() {
                return Err(Error::Options(format!(
                    "the loss is {loss} in batch {index} of epoch {epoch}; {}",
                    advice(alpha)
                )));
            }
            // The authors score while they measure the gradient's norm, which skips the first step.
            if options.importance_mode != Mode::Reference || step > 0 {
                self.score(options.formula(alpha), &grads, state, (epoch, index, alpha))?;
            }
            if alpha > 0.0 {
                let norm = grads.global_norm();
                if !norm.is_finite() {
                    return Err(Error::Options(format!(
                        "a gradient is NaN or infinite in batch {index} of epoch {epoch}; {}",
                        advice(alpha)
                    )));
                }
                let limit = options.clip_norm;
                let clip = if limit > 0.0 && norm > limit { limit / norm } else { 1.0 };
                let rate = (alpha * clip) as f32;
                for (name, gradient) in grads.iter() {
                    state.params.write(name, |weights| {
                        weights.iter_mut().zip(gradient).for_each(|(w, g)| *w -= rate * g);
                    })?;
                }
            }
            progress.message(&format!("loss {loss:.3}"));
            progress.inc(1);
        }
        Ok(())
    }

    /// Adds one step's scores, layer after layer; G of a block is mapped while it is needed.
    fn score(
        &self,
        formula: Formula,
        grads: &Grads,
        state: &mut State,
        (epoch, batch, alpha): (usize, usize, f64),
    ) -> Result<()> {
        state.scored += 1;
        let mut open: Option<(usize, BlockImportance)> = None;
        for name in planned(self.plan) {
            let Some(gradient) = grads.get(&name.weight()) else { continue };
            let norm: f64 = gradient.iter().map(|g| f64::from(g.abs())).sum();
            if !norm.is_finite() {
                return Err(Error::layer(
                    &name.module,
                    format!(
                        "its gradient is NaN or infinite in batch {batch} of epoch {epoch}; {}",
                        advice(alpha)
                    ),
                ));
            }
            let scored = state.scored;
            let Some(layer) = state.layers.get_mut(&name.module) else { continue };
            if let Formula::Paper { .. } = formula {
                update_fisher(&mut layer.fisher, gradient, scored);
            }
            let block = name.block.unwrap_or(0);
            if let Some(general) = self.general
                && open.as_ref().is_none_or(|(at, _)| *at != block)
            {
                open = Some((block, general.open(block)?));
            }
            let Layer { scores, fisher } = layer;
            let params = &state.params;
            let add = |general: &[f32], scores: &mut Vec<f32>| {
                params.read(&name.weight(), |weights| {
                    accumulate(formula, weights, gradient, general, fisher, scores);
                })
            };
            match &open {
                Some((_, general)) => general.read(&name.module, gradient.len(), |g| {
                    // G lies as [out, in]; gradients as the checkpoint stores the weight.
                    let turned = name.transposed.then(|| turn(g, name.in_features()));
                    add(turned.as_deref().unwrap_or(g), scores)
                })??,
                None => add(&[], scores)?,
            }
        }
        Ok(())
    }

    fn write(&self, files: &Files, state: &State) -> Result<()> {
        for block in 0..self.plan.blocks.len() {
            let mut tensors: Vec<(&Name, std::borrow::Cow<'_, [f32]>)> = Vec::new();
            for name in planned(self.plan).filter(|name| name.block == Some(block)) {
                let Some(layer) = state.layers.get(&name.module) else { continue };
                crate::mask::check_scores(&name.module, &layer.scores)?;
                let scores = if name.transposed {
                    turn(&layer.scores, name.out_features()).into()
                } else {
                    layer.scores.as_slice().into()
                };
                tensors.push((name, scores));
            }
            let named: Vec<(&str, [usize; 2], &[f32])> = tensors
                .iter()
                .map(|(name, scores)| (name.module.as_str(), name.shape, scores.as_ref()))
                .collect();
            files.write(block, &named)?;
        }
        Ok(())
    }
}

fn advice(alpha: f64) -> &'static str {
    if alpha > 0.0 {
        "lower --alpha (0 scores without moving the weights)"
    } else {
        "the model overflows on this text"
    }
}

/// The transpose of rows of `width` values.
fn turn(values: &[f32], width: usize) -> Vec<f32> {
    let height = values.len() / width.max(1);
    let mut turned = vec![0f32; values.len()];
    for (row, values) in values.chunks_exact(width.max(1)).enumerate() {
        for (column, value) in values.iter().enumerate() {
            if let Some(place) = turned.get_mut(column * height + row) {
                *place = *value;
            }
        }
    }
    turned
}

/// What is known of a layer, in the layout in which the checkpoint stores it.
struct Layer {
    scores: Vec<f32>,
    /// Running mean of `g²`; empty but in the mode `paper`.
    fisher: Vec<f32>,
}

struct State {
    params: Params,
    layers: BTreeMap<String, Layer>,
    /// Steps that have been scored.
    scored: u64,
    identity: Value,
}

impl State {
    fn new(scoring: &Scoring<'_>) -> Result<Self> {
        let mut params = Params::from_checkpoint(scoring.decoder, scoring.checkpoint)?;
        if scoring.options.alpha() == 0.0 {
            // Only what is scored needs a gradient when nothing moves.
            let weights: Vec<method::Pattern> = planned(scoring.plan)
                .map(|name| method::Pattern::new(&name.weight()).map_err(Error::Options))
                .collect::<Result<_>>()?;
            params.set_trainable(Some(&weights), &[])?;
        }
        let fisher = scoring.options.importance_mode == Mode::Paper;
        let layers = planned(scoring.plan)
            .map(|name| {
                let count = name.out_features() * name.in_features();
                let fisher = if fisher { vec![0.0; count] } else { Vec::new() };
                (name.module.clone(), Layer { scores: vec![0.0; count], fisher })
            })
            .collect();
        Ok(Self { params, layers, scored: 0, identity: scoring.record()? })
    }

    /// Saves everything that the next epoch depends on.
    fn save(&self, directory: &StateDir, epoch: usize) -> Result<()> {
        let mut tensors: Vec<StateTensor<'_>> = self.params.state();
        for (module, layer) in &self.layers {
            for (kind, values) in [("scores", &layer.scores), ("fisher", &layer.fisher)] {
                let name = format!("{kind}.{module}");
                tensors.push(StateTensor { name, values: Values::Slice(values) });
            }
        }
        let header = Header {
            step: epoch as u64,
            config: self.identity.clone(),
            data: String::new(),
            notes: json!({ "scored": self.scored }),
        };
        Ok(directory.write(&header, &tensors)?)
    }

    /// Takes up a saved state; returns the epoch to go on with.
    fn restore(&mut self, directory: &StateDir) -> Result<usize> {
        let Some((header, mut saved)) = directory.read()? else { return Ok(0) };
        if header.config != self.identity {
            return Ok(0);
        }
        self.params.restore(&mut saved)?;
        for (module, layer) in &mut self.layers {
            layer.scores = saved.take(&format!("scores.{module}"), layer.scores.len())?;
            layer.fisher = saved.take(&format!("fisher.{module}"), layer.fisher.len())?;
        }
        self.scored = header.notes.get("scored").and_then(Value::as_u64).unwrap_or(0);
        report::note(&format!("scoring goes on after epoch {}", header.step));
        Ok(header.step as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_padded_and_only_real_tokens_are_targets() {
        let documents = vec![vec![1, 2, 3, 4], vec![5, 6], vec![7], vec![]];
        let domain = Domain::new(documents, 3, 10, 99).unwrap();
        assert_eq!(domain.samples(), [vec![1, 2, 3], vec![5, 6]]);
        let batch = domain.batch(&[0, 1]);
        assert_eq!((batch.rows, batch.length), (2, 2));
        assert_eq!(batch.tokens, [1, 2, 5, 99]);
        assert_eq!(batch.targets, [2, 3, 6, IGNORE]);
        assert_eq!(domain.steps(1), 2);
    }

    #[test]
    fn epochs_go_through_every_document_once_in_another_order() {
        let documents: Vec<Vec<u32>> = (0..20).map(|i| vec![i, i]).collect();
        let domain = Domain::new(documents, 8, 20, 0).unwrap();
        let firsts = |epoch| -> Vec<u32> {
            domain.batches(3, 7, epoch).iter().flat_map(|b| b.tokens.clone()).collect()
        };
        let (a, b) = (firsts(0), firsts(1));
        assert_ne!(a, b);
        for mut order in [a, b] {
            order.sort_unstable();
            assert_eq!(order, (0..20).collect::<Vec<u32>>());
        }
        assert_eq!(domain.batches(3, 7, 0).len(), 7);
    }

    #[test]
    fn text_without_a_prediction_is_refused() {
        for documents in [vec![], vec![vec![1], vec![]]] {
            let error = Domain::new(documents, 8, 10, 0).unwrap_err().to_string();
            assert!(error.contains("two tokens"), "{error}");
        }
        assert!(Domain::new(vec![vec![1, 2, 3]], 1, 10, 0).is_err(), "cut at one token");
    }

    #[test]
    fn turning_is_a_transpose() {
        assert_eq!(turn(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
