//! The main job: quantise a checkpoint and prove what it cost.
//!
//! Plan, measure, stream, measure again, report. The mathematics is in `compress`.

use crate::measure::{MeasureOptions, Measurement, Measures};
use crate::{Error, Result, present, widths};
use compress::layerwise_quant::{self, Settings};
use compress::{Calibration, Outcome, Plan, QuantizeOptions, Target};
use data::Tokenizer;
use data::almanac::{Almanac, Split};
use nn::Model;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A quantisation job.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct QuantizeJob {
    /// Model directory or file.
    pub model: PathBuf,
    /// Output directory.
    pub out: PathBuf,
    /// What to write.
    pub options: QuantizeOptions,
    /// What to measure.
    pub measure: MeasureOptions,
    /// Take up an interrupted job.
    pub resume: bool,
    /// Replace an existing output.
    pub overwrite: bool,
}

/// What a job leaves behind.
#[derive(Debug)]
pub struct Finished {
    /// The output directory.
    pub path: PathBuf,
    /// What quantising every layer cost.
    pub layers: Vec<compress::LayerResult>,
    /// Measured before and after; absent when skipped.
    pub measures: Option<Comparison>,
    /// Bytes of tensors before and after.
    pub bytes: (u64, u64),
    /// Seconds spent quantising.
    pub seconds: f64,
    /// The widths of its layers, where they are not all the same.
    pub schedule: Option<layerwise_quant::Schedule>,
    /// The report that lies in the output directory.
    pub report: report::Report,
}

/// Before and after.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Comparison {
    /// The original model.
    pub before: Measures,
    /// The quantised one.
    pub after: Measures,
    /// Distance of their predictions.
    pub distance: eval::Comparison,
    /// What the held-out text is.
    pub text: String,
}

impl QuantizeJob {
    /// Runs the job.
    pub fn run(&self) -> Result<Finished> {
        let model = Model::open(&self.model)?;
        let plan = Plan::new(&model.decoder, &model.checkpoint, &self.options)?;
        let started = Instant::now();
        let calibration = self.calibration(&model)?;
        let resolved = self.resolve(&model, &calibration)?;
        let (plan, options) = match &resolved {
            Some(r) => (Plan::new(&model.decoder, &model.checkpoint, &r.options)?, &r.options),
            None => (plan, &self.options),
        };
        report::note(&present::plan_line(&plan, options));
        if let Some(r) = &resolved {
            let schedule = &r.schedule;
            report::note(&format!(
                "bits per weight by {}: {:.3} in codes, {:.3} with scales and zero points",
                schedule.by, schedule.average_bits, schedule.effective_bits_per_weight
            ));
        }
        let outcome = match self.stream(&model, &plan, options, &calibration) {
            Ok(outcome) => outcome,
            // A resumed job whose output stands already only lacks its report.
            Err(Error::Compress(compress::Error::Store(store::Error::Complete { path }))) => {
                report::note(&format!("{} is already complete", path.display()));
                finished_outcome(path)?
            }
            Err(error) => return Err(error),
        };
        let seconds = started.elapsed().as_secs_f64();
        let quantised = Model::open(&outcome.path)?;
        let bytes = (model.checkpoint.total_bytes(), quantised.checkpoint.total_bytes());
        let measures =
            if self.measure.skip { None } else { Some(self.measure(&model, &quantised)?) };
        let mut report =
            present::quantize(self, &outcome, measures.as_ref(), bytes, seconds, &model.decoder);
        if let Some(r) = &resolved {
            let curve = match self.options.layerwise.curve {
                0 => Vec::new(),
                _ => widths::curve(self, &model, r, &calibration)?,
            };
            let measured = widths::divergence(self, &r.schedule, &model, &quantised, &calibration)?;
            widths::describe(&mut report, self, &r.schedule, measured, &curve);
            let mut json = r.schedule.json();
            if let Some(object) = json.as_object_mut().filter(|_| !curve.is_empty()) {
                object.insert("curve".into(), serde_json::to_value(&curve).unwrap_or_default());
            }
            let bytes = serde_json::to_vec_pretty(&json).unwrap_or_default();
            store::write_atomic(&outcome.path.join(layerwise_quant::FILE), &bytes)?;
        }
        let html = outcome.path.join("report.html");
        store::write_atomic(&html, report.html().as_bytes())?;
        let json = serde_json::to_vec_pretty(&report.json()).unwrap_or_default();
        store::write_atomic(&outcome.path.join("report.json"), &json)?;
        Ok(Finished {
            path: outcome.path,
            layers: outcome.layers,
            measures,
            bytes,
            seconds,
            schedule: resolved.map(|r| r.schedule),
            report,
        })
    }

    /// Decides the widths of layers, where they are not all the same.
    fn resolve(
        &self,
        model: &Model,
        calibration: &Calibration,
    ) -> Result<Option<layerwise_quant::Resolved>> {
        let mut scratch = self.out.clone().into_os_string();
        scratch.push(".activations");
        let scratch = PathBuf::from(scratch);
        let options = &self.options;
        Ok(layerwise_quant::resolve(&Settings { model, options, calibration, scratch: &scratch })?)
    }

    fn stream(
        &self,
        model: &Model,
        plan: &Plan,
        options: &QuantizeOptions,
        calibration: &Calibration,
    ) -> Result<Outcome> {
        // Text that only the schedule looked at decides nothing more.
        let none = Calibration::none();
        let calibration = if options.calibrates() { calibration } else { &none };
        let progress = report::Progress::new(
            &format!("quantize ({})", self.options.method.slug()),
            plan.blocks.len() as u64,
            "blocks",
        );
        let target = Target {
            out: &self.out,
            resume: self.resume,
            overwrite: self.overwrite,
            provenance: provenance(model)?,
        };
        let outcome = compress::run(model, plan, options, calibration, &target, &progress)?;
        if outcome.resumed_blocks > 0 {
            report::note(&format!(
                "resumed: {} of {} blocks were done already",
                outcome.resumed_blocks,
                plan.blocks.len()
            ));
        }
        Ok(outcome)
    }

    /// The calibration windows, if the job looks at activations.
    fn calibration(&self, model: &Model) -> Result<Calibration> {
        if !self.options.needs_text() {
            return Ok(Calibration::none());
        }
        Ok(compress::calibration::windows(
            &self.options.calibration,
            self.options.method,
            || Ok(Tokenizer::from_checkpoint(&model.checkpoint)?),
            || Ok(general_text(model)),
        )?)
    }

    fn measure(&self, before: &Model, after: &Model) -> Result<Comparison> {
        let measurement = Measurement::new(before, &self.measure)?;
        Ok(Comparison {
            before: measurement.run(before, "before")?,
            after: measurement.run(after, "after")?,
            distance: measurement.compare(before, after)?,
            text: measurement.source.clone(),
        })
    }
}

/// Where the input comes from: its name, the hashes of its small files, size and name of its
/// weight files (hashing many gigabytes would double the reading), and its own record.
pub(crate) fn provenance(model: &Model) -> Result<serde_json::Value> {
    provenance_of(&model.checkpoint)
}

/// As [`provenance`], of a checkpoint of any family.
pub(crate) fn provenance_of(checkpoint: &store::Checkpoint) -> Result<serde_json::Value> {
    let directory = checkpoint.directory();
    let mut files = serde_json::Map::new();
    for path in checkpoint.files() {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        let size = std::fs::metadata(path).map(|m| m.len()).unwrap_or(0);
        files.insert(name.unwrap_or_default(), serde_json::json!({"bytes": size}));
    }
    for name in ["config.json", "tokenizer.json", "tokenizer.model"] {
        let path = directory.join(name);
        if path.is_file() {
            let hash = store::sha256_file(&path)?;
            files.insert(name.into(), serde_json::json!({"sha256": hash}));
        }
    }
    let own = std::fs::read(directory.join("strata.json"))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    // Per-layer results of an earlier job belong to that job's output.
    let own = own.map(|mut value| {
        if let Some(object) = value.as_object_mut() {
            object.remove("layers");
        }
        value
    });
    Ok(serde_json::json!({
        "model": directory.file_name().map(|n| n.to_string_lossy().into_owned()),
        "files": files,
        "made_by": own,
    }))
}

/// The text that calibration draws from when none is given: the validation part of the almanac that
/// the model was trained on, or of the embedded one.
pub(crate) fn general_text(model: &Model) -> data::text::Documents {
    let known = crate::measure::almanac_of(model.checkpoint.directory());
    if known.is_none() {
        report::warn(
            "no --calibration file: using the embedded almanac, which is not the text this model \
             was trained on",
        );
    }
    known.unwrap_or_else(Almanac::embedded).documents(Split::Validation)
}

/// The outcome of a job that had finished before, from its own record.
pub(crate) fn finished_outcome(path: PathBuf) -> Result<Outcome> {
    let layers = read_layers(&path)?;
    Ok(Outcome {
        path,
        layers,
        warnings: Vec::new(),
        notes: Vec::new(),
        resumed_blocks: 0,
        spilled_bytes: 0,
    })
}

fn read_layers(path: &Path) -> Result<Vec<compress::LayerResult>> {
    let file = path.join("strata.json");
    let damaged = |reason: String| Error::Recipe(format!("{}: {reason}", file.display()));
    let bytes = std::fs::read(&file).map_err(|e| damaged(e.to_string()))?;
    let value: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    let layers = value.get("layers").cloned().unwrap_or_default();
    serde_json::from_value(layers).map_err(|e| damaged(e.to_string()))
}
