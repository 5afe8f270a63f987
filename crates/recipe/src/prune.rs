//! Pruning a checkpoint and proving what it cost, on general text and on the domain's.
//!
//! Plan, score where the method needs it, measure, stream, measure again, report. The mathematics
//! is in `compress`.

use crate::domain::DomainText;
use crate::measure::{MeasureOptions, Measurement};
use crate::quantize::{Comparison, finished_outcome, general_text, provenance};
use crate::{Error, Result, present};
use compress::d_pruner::domain::{Domain, Scoring};
use compress::d_pruner::files::Files;
use compress::d_pruner::general::{self, Pass};
use compress::prune::CalibrateOn;
use compress::runner::Source;
use compress::{Calibration, Outcome, Plan, PruneMethod, PruneOptions, Target};
use data::{Tokenizer, text};
use eval::Perplexity;
use nn::Model;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// A pruning job.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PruneJob {
    /// Model directory or file.
    pub model: PathBuf,
    /// Output directory.
    pub out: PathBuf,
    /// What to write.
    pub options: PruneOptions,
    /// What to measure.
    pub measure: MeasureOptions,
    /// Take up an interrupted job.
    pub resume: bool,
    /// Replace an existing output.
    pub overwrite: bool,
}

/// What a pruning job leaves behind.
#[derive(Debug)]
pub struct Pruned {
    /// The output directory.
    pub path: PathBuf,
    /// What pruning every layer cost.
    pub layers: Vec<compress::LayerResult>,
    /// Measured before and after on general text; absent when skipped.
    pub measures: Option<Comparison>,
    /// Measured before and after on the domain's held-out text, where there is a domain.
    pub domain: Option<DomainComparison>,
    /// Bytes of tensors before and after.
    pub bytes: (u64, u64),
    /// Seconds spent scoring and pruning.
    pub seconds: f64,
    /// The report that lies in the output directory.
    pub report: report::Report,
}

/// Perplexity on the domain's text, before and after.
#[derive(Debug, Clone, serde::Serialize)]
pub struct DomainComparison {
    /// The original model.
    pub before: Perplexity,
    /// The pruned one.
    pub after: Perplexity,
    /// What the text is.
    pub text: String,
}

impl PruneJob {
    /// Runs the job.
    pub fn run(&self) -> Result<Pruned> {
        if self.options.method == PruneMethod::LayerAdaptivePruning {
            // Any family, whole networks at once: a walk of its own.
            return crate::layer_adaptive::run(self);
        }
        let model = Model::open(&self.model)?;
        let plan = Plan::prune(&model.decoder, &model.checkpoint, &self.options)?;
        report::note(&present::prune::plan_line(&plan, &self.options));
        self.check_output()?;
        let domain = DomainText::load(&self.options.domain, &model)?;
        let started = Instant::now();
        let outcome = match self.stream(&model, &plan, domain.as_ref()) {
            Ok(outcome) => outcome,
            // A resumed job whose output stands already only lacks its report.
            Err(Error::Compress(compress::Error::Store(store::Error::Complete { path }))) => {
                report::note(&format!("{} is already complete", path.display()));
                finished_outcome(path)?
            }
            Err(error) => return Err(error),
        };
        let seconds = started.elapsed().as_secs_f64();
        let pruned = Model::open(&outcome.path)?;
        let bytes = (model.checkpoint.total_bytes(), pruned.checkpoint.total_bytes());
        let (mut measures, mut on_domain) = (None, None);
        if !self.measure.skip {
            measures = Some(Comparison::new(&model, &pruned, &self.measure)?);
            if let Some(domain) = &domain {
                on_domain = Some(self.on_domain(&model, &pruned, domain)?);
            }
        }
        let finished = present::prune::Finished {
            job: self,
            outcome: &outcome,
            measures: measures.as_ref(),
            domain: on_domain.as_ref(),
            bytes,
            seconds,
            blocks: model.decoder.num_blocks(),
        };
        let report = present::prune::report(&finished);
        store::write_atomic(&outcome.path.join("report.html"), report.html().as_bytes())?;
        let json = serde_json::to_vec_pretty(&report.json()).unwrap_or_default();
        store::write_atomic(&outcome.path.join("report.json"), &json)?;
        Ok(Pruned {
            path: outcome.path,
            layers: outcome.layers,
            measures,
            domain: on_domain,
            bytes,
            seconds,
            report,
        })
    }

    /// Scoring may take hours; an output that would be refused afterwards is refused before.
    fn check_output(&self) -> Result<()> {
        if self.out.exists() && !self.resume && !self.overwrite {
            return Err(Error::Recipe(format!(
                "{} exists already; --overwrite replaces it, --resume goes on with a job",
                self.out.display()
            )));
        }
        Ok(())
    }

    fn stream(&self, model: &Model, plan: &Plan, domain: Option<&DomainText>) -> Result<Outcome> {
        let options = &self.options;
        let calibration = self.calibration(model, domain)?;
        let mut inputs = Value::Null;
        let mut scores = None;
        let mut scratch = None;
        if options.method == PruneMethod::DPruner {
            let domain = self.domain(model, domain)?;
            inputs = json!({
                "domain": domain.as_ref().map(Domain::digest),
                "general_windows": calibration.windows(),
            });
            // A complete output needs no scores; the writer says that it is complete.
            if !(self.resume && self.out.is_dir()) {
                let root = match &options.d_pruner.importance {
                    Some(root) => root.clone(),
                    None => {
                        let root = self.scratch()?;
                        scratch = Some(root.clone());
                        root
                    }
                };
                scores = Some(self.score(model, plan, &calibration, domain.as_ref(), &root)?);
            }
        }
        let blocks = plan.blocks.len() as u64;
        let progress =
            report::Progress::new(&format!("prune ({})", options.method.slug()), blocks, "blocks");
        let target = Target {
            out: &self.out,
            resume: self.resume,
            overwrite: self.overwrite,
            provenance: provenance(model)?,
        };
        // While a block is pruned only methods with statistics see text.
        let none = Calibration::none();
        let seen = if options.calibrates() { &calibration } else { &none };
        let source = Source::of(model)?;
        let outcome =
            compress::prune::run(source, plan, options, seen, scores, inputs, &target, &progress)?;
        if outcome.resumed_blocks > 0 {
            report::note(&format!(
                "resumed: {} of {} blocks were done already",
                outcome.resumed_blocks,
                plan.blocks.len()
            ));
        }
        if let Some(scratch) = scratch {
            // Nothing but what could be computed again.
            let _ = std::fs::remove_dir_all(scratch);
        }
        Ok(outcome)
    }

    /// Where the importance lies while the job runs, when nobody wants to keep it.
    fn scratch(&self) -> Result<PathBuf> {
        let name = self.out.file_name().ok_or_else(|| {
            Error::Recipe(format!("--out {} names no directory", self.out.display()))
        })?;
        let mut name = name.to_os_string();
        name.push(".importance");
        Ok(self.out.with_file_name(name))
    }

    /// The calibration windows, if a pass looks at activations.
    fn calibration(&self, model: &Model, domain: Option<&DomainText>) -> Result<Calibration> {
        let options = &self.options;
        if !options.calibrates() && !options.needs_general() {
            return Ok(Calibration::none());
        }
        let tokenizer = || Ok(Tokenizer::from_checkpoint(&model.checkpoint)?);
        let general = |samples: usize| -> Result<Calibration> {
            let mut options = options.calibration.clone();
            options.samples = samples;
            let method = compress::Method::Gptq;
            let fallback = || Ok(general_text(model));
            Ok(compress::calibration::windows(&options, method, tokenizer, fallback)?)
        };
        let on_domain = |samples: usize| -> Result<Calibration> {
            let domain = domain.ok_or_else(|| Error::Recipe("no domain is given".into()))?;
            let (length, seed) = (options.calibration.sequence_length, options.calibration.seed);
            let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
            let windows =
                text::calibration_random(&domain.scored, &tokenizer, samples, length, seed)?;
            Ok(Calibration::new(windows.tokens, windows.length)?)
        };
        let samples = options.calibration.samples;
        match (options.calibrates(), options.calibrate_on) {
            (true, CalibrateOn::Domain) => on_domain(samples),
            (true, CalibrateOn::Both) => {
                let (a, b) = (general(samples.div_ceil(2))?, on_domain((samples / 2).max(1))?);
                Ok(Calibration::new([a.ids(), b.ids()].concat(), a.length())?)
            }
            _ => general(samples),
        }
    }

    /// The domain's documents as D-Pruner reads them.
    fn domain(&self, model: &Model, text: Option<&DomainText>) -> Result<Option<Domain>> {
        let options = &self.options.d_pruner;
        let Some(text) = text.filter(|_| options.importance_mode.needs_domain()) else {
            return Ok(None);
        };
        let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
        let pad = tokenizer.eos().or(tokenizer.bos()).unwrap_or(0);
        let context = model.decoder.config.max_position_embeddings;
        let length = options.domain_length.min(context);
        let samples = text.samples(&tokenizer)?;
        Ok(Some(Domain::new(samples, length, options.domain_samples, pad)?))
    }

    /// D-Pruner's importance of every planned weight.
    fn score(
        &self,
        model: &Model,
        plan: &Plan,
        calibration: &Calibration,
        domain: Option<&Domain>,
        root: &std::path::Path,
    ) -> Result<Files> {
        let options = &self.options;
        let mut identity = serde_json::Map::new();
        for path in model.checkpoint.files() {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            identity.insert(name.unwrap_or_default(), store::sha256_file(path)?.into());
        }
        let identity = Value::Object(identity);
        let mut general = None;
        if options.needs_general() {
            let progress =
                report::Progress::new("general importance", plan.blocks.len() as u64, "blocks");
            let pass = Pass {
                sparsegpt: &options.sparsegpt,
                sparsity: options.d_pruner.general_sparsity,
                order: options.calibration_order,
                memory: options.memory.0,
            };
            let source = Source::of(model)?;
            general = Some(general::importance(
                source,
                plan,
                calibration,
                &pass,
                root,
                &identity,
                &progress,
            )?);
            progress.finish();
        }
        let Some(domain) = domain else {
            return general.ok_or_else(|| Error::Recipe("there is nothing to score".into()));
        };
        let epochs = options.d_pruner.epochs();
        let steps = domain.steps(options.d_pruner.domain_batch) * epochs;
        let progress = report::Progress::new("importance", steps as u64, "steps");
        let scoring = Scoring {
            decoder: &model.decoder,
            checkpoint: &model.checkpoint,
            plan,
            domain,
            options: &options.d_pruner,
            seed: options.calibration.seed,
            general: general.as_ref(),
            identity: &identity,
        };
        let files = scoring.run(root, &progress)?;
        progress.finish();
        Ok(files)
    }

    fn on_domain(
        &self,
        before: &Model,
        after: &Model,
        domain: &DomainText,
    ) -> Result<DomainComparison> {
        let tokenizer = Tokenizer::from_checkpoint(&before.checkpoint)?;
        let mut tokens = text::document_tokens(&domain.held_out, &tokenizer)?;
        if self.measure.tokens > 0 {
            tokens.truncate(self.measure.tokens);
        }
        let window = self.measure.window.min(before.decoder.config.max_position_embeddings);
        let measure = |model| eval::perplexity(model, &tokens, window, window);
        Ok(DomainComparison {
            before: measure(before)?,
            after: measure(after)?,
            text: domain.source.clone(),
        })
    }
}

impl Comparison {
    /// Measures two models the same way.
    pub(crate) fn new(before: &Model, after: &Model, options: &MeasureOptions) -> Result<Self> {
        let measurement = Measurement::new(before, options)?;
        Ok(Self {
            before: measurement.run(before, "before")?,
            after: measurement.run(after, "after")?,
            distance: measurement.compare(before, after)?,
            text: measurement.source.clone(),
        })
    }
}
