//! What a finished run leaves: model, tokenizer, loss log, report, and `strata.json`, which says
//! how it came to be.
//!
//! Nothing here depends on the time or the place of the run, so that a resumed run ends with the
//! same bytes.

use crate::{
    config::TrainConfig,
    error::{Error, Result, io},
    params::Params,
    sources::Material,
    state::{LossLog, LossRecord},
    trainer::evaluations,
};
use report::{Block, Cell, Chart, ChartKind, Column, Report, Section, Table};
use serde_json::{Value, json};
use std::path::Path;
use store::{WriteOptions, Writer};

/// Name of the loss log.
pub(crate) const LOSSES: &str = "losses.jsonl";
/// Name of the record of how the output came to be.
const RECORD: &str = "strata.json";

/// Everything that the output is made of.
pub(crate) struct Finished<'a> {
    pub config: &'a TrainConfig,
    pub material: &'a Material,
    pub params: &'a Params,
    pub log: &'a LossLog,
}

/// The configuration as JSON.
pub(crate) fn config_value(config: &TrainConfig) -> Value {
    serde_json::to_value(config).unwrap_or(Value::Null)
}

/// The first key in which two configurations differ, leaving out those that do not change the
/// result.
pub(crate) fn difference(a: &Value, b: &Value) -> Option<String> {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return Some("config".into()) };
    let keys = a.keys().chain(b.keys());
    keys.filter(|key| *key != "checkpoint_every").find(|key| a.get(*key) != b.get(*key)).cloned()
}

/// Writes the output directory; it appears whole.
pub(crate) fn write(run: &Finished<'_>, out: &Path) -> Result<()> {
    let mut recorded = config_value(run.config);
    if let Some(map) = recorded.as_object_mut() {
        map.remove("checkpoint_every");
    }
    let options = WriteOptions {
        resume: true,
        fingerprint: json!({"train": recorded, "data": run.material.hash}).to_string(),
        inputs: run.config.init.iter().cloned().collect(),
        ..WriteOptions::default()
    };
    let mut writer = match Writer::create(out, options) {
        Err(store::Error::Complete { .. }) => return Ok(()),
        other => other?,
    };
    run.params.save(&mut writer, run.config.precision)?;
    if let Some(init) = &run.config.init {
        let directory = if init.is_dir() { init.as_path() } else { init.parent().unwrap_or(init) };
        let own = ["config.json", RECORD, LOSSES, "report.json", "report.html", "README.md"];
        writer.carry(directory, &own)?;
    }
    for (name, bytes) in &run.material.files {
        writer.put_file(name, bytes)?;
    }
    let mut model = run.material.config.clone();
    if let Some(map) = model.as_object_mut() {
        map.remove("dtype");
        map.insert("torch_dtype".into(), run.config.precision.torch_name().into());
    }
    writer.put_json("config.json", &model)?;
    writer.put_file(LOSSES, run.log.text().as_bytes())?;
    let record = record(run);
    let report = report(run, &record);
    writer.put_json("report.json", &report.json())?;
    writer.put_file("report.html", report.html().as_bytes())?;
    writer.put_json(RECORD, &record)?;
    writer.finish()?;
    Ok(())
}

fn record(run: &Finished<'_>) -> Value {
    let records = run.log.records();
    let evaluations = evaluations(records);
    json!({
        "strata": env!("CARGO_PKG_VERSION"),
        "command": "train",
        "config": config_value(run.config),
        "seed": run.config.seed,
        "data": run.material.summary,
        "parameters": run.params.count(),
        "trained_parameters": run.params.trainable_count(),
        "steps": records.len(),
        "tokens": records.last().map_or(0, |r| r.tokens),
        "loss": {
            "first": records.first().map(|r| r.loss),
            "last": records.last().map(|r| r.loss),
            "mean_of_last_tenth": tail_mean(records),
            "evaluation": evaluations.last().map(|e| e.1),
        },
    })
}

fn tail_mean(records: &[LossRecord]) -> Option<f64> {
    let tail = &records[records.len() - records.len().div_ceil(10).min(records.len())..];
    (!tail.is_empty()).then(|| tail.iter().map(|r| r.loss).sum::<f64>() / tail.len() as f64)
}

fn report(run: &Finished<'_>, record: &Value) -> Report {
    let records = run.log.records();
    let evaluations = evaluations(records);
    let mut report = Report::new("Training", "loss, evaluation and options of one run");
    report.fact("Parameters", report::human::count(run.params.count() as u64));
    report.fact("Steps", records.len().to_string());
    report.fact("Tokens", report::human::count(records.last().map_or(0, |r| r.tokens)));
    if let Some(loss) = tail_mean(records) {
        report.fact("Training loss (mean of the last tenth)", format!("{loss:.4}"));
    }
    if let Some((_, loss)) = evaluations.last() {
        report.fact("Evaluation loss", format!("{loss:.4}"));
        report.fact("Evaluation perplexity", format!("{:.3}", loss.exp()));
    }
    let line = |title: &str, y: &str, f: &dyn Fn(&LossRecord) -> f64, name: &str| {
        Chart::new(ChartKind::Line, title).axes("step", y).points(name, thinned(records, f))
    };
    let mut loss = line("Loss", "nats per token", &|r| r.loss, "training");
    if !evaluations.is_empty() {
        loss =
            loss.points("evaluation", evaluations.iter().map(|(s, l)| (*s as f64, *l)).collect());
    }
    report.sections.push(Section {
        title: "Loss".into(),
        blocks: vec![Block::Chart(loss), Block::Table(evaluation_table(records))],
    });
    report.sections.push(Section {
        title: "Course of the optimiser".into(),
        blocks: vec![
            Block::Chart(line("Learning rate", "rate", &|r| r.learning_rate, "learning rate")),
            Block::Chart(line(
                "Gradient norm before clipping",
                "L2 norm",
                &|r| r.gradient_norm,
                "norm",
            )),
        ],
    });
    let text = serde_json::to_string_pretty(record).unwrap_or_default();
    report
        .sections
        .push(Section { title: "Options and data".into(), blocks: vec![Block::Code(text)] });
    report
}

/// At most some hundred points: means over equal runs of steps.
fn thinned(records: &[LossRecord], f: &dyn Fn(&LossRecord) -> f64) -> Vec<(f64, f64)> {
    let run = records.len().div_ceil(300).max(1);
    let mean = |chunk: &[LossRecord]| chunk.iter().map(f).sum::<f64>() / chunk.len() as f64;
    let middle = |chunk: &[LossRecord]| chunk[chunk.len() / 2].step as f64;
    records.chunks(run).map(|chunk| (middle(chunk), mean(chunk))).collect()
}

fn evaluation_table(records: &[LossRecord]) -> Table {
    let columns = ["step", "tokens", "training loss", "evaluation loss", "perplexity"];
    let mut table = Table::new("Evaluations", columns.map(Column::right).to_vec());
    for record in records {
        if let Some(loss) = record.evaluation {
            table.push(vec![
                Cell::Int(record.step as i64),
                Cell::Count(record.tokens),
                Cell::Float(record.loss, 4),
                Cell::Float(loss, 4),
                Cell::Float(loss.exp(), 3),
            ]);
        }
    }
    table
}

/// The record of an output directory.
fn read_record(out: &Path) -> Option<Value> {
    let bytes = std::fs::read(out.join(RECORD)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Whether `out` is the finished result of `config`.
pub(crate) fn is_result_of(out: &Path, config: &TrainConfig) -> bool {
    read_record(out)
        .is_some_and(|record| difference(&record["config"], &config_value(config)).is_none())
}

/// The number of parameters that an output's record states.
pub(crate) fn read_parameters(out: &Path) -> usize {
    read_record(out).and_then(|r| r["parameters"].as_u64()).unwrap_or(0) as usize
}

/// The loss log of a finished output.
pub(crate) fn read_losses(out: &Path) -> Result<Vec<LossRecord>> {
    let path = out.join(LOSSES);
    let text = std::fs::read_to_string(&path).map_err(io(&path))?;
    let parse = |line: &str| {
        serde_json::from_str(line)
            .map_err(|e| Error::State { path: path.clone(), reason: e.to_string() })
    };
    text.lines().map(parse).collect()
}
