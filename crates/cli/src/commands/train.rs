//! `strata train`: flags and file become a `TrainConfig`; the trainer does the rest.

use std::path::PathBuf;

use report::{Progress, Report, Style};
use train::config::SourceConfig;
use train::{TrainConfig, Trainer};

use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::paths;

/// Flags of `strata train`. Flags win over the file.
#[derive(clap::Args)]
#[command(
    after_help = "Example: strata train --config samples/almanac-3m.train.yaml --out out/almanac-3m\n\
    Killed at any time, the same command with --resume goes on and ends with the same weights."
)]
pub struct Args {
    /// Training configuration (YAML or JSON)
    #[arg(long, value_name = "FILE", required_unless_present = "init")]
    config: Option<PathBuf>,
    /// Output directory
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with a run that was stopped
    #[arg(long)]
    resume: bool,
    /// Start from this checkpoint
    #[arg(long, value_name = "MODEL")]
    init: Option<PathBuf>,
    /// Train on this text (.txt, .jsonl, .json) instead of the file's data
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Number of update steps
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Passes over the data
    #[arg(long, value_name = "X")]
    epochs: Option<f64>,
    /// Peak learning rate
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// Sequences per batch
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Tokens per sequence
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// Seed of initial values and data order
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// Trains.
pub fn run(args: &Args) -> Result<()> {
    let config = config(args)?;
    let progress = Progress::new("train", 0, "steps");
    let outcome = Trainer::run(&config, &args.out, args.resume, &progress)?;
    progress.finish();
    let mut out = Output::new();
    if args.json {
        out.json(&serde_json::to_value(&outcome)?)?;
    } else {
        let mut report = Report::new("Trained", format!("{}", outcome.path.display()));
        report.fact("parameters", report::human::count(outcome.parameters as u64));
        if outcome.resumed_from > 0 {
            report.fact("resumed from step", outcome.resumed_from.to_string());
        }
        report.section("").push(outcome.table());
        out.text(&report.terminal(Style::detect()))?;
    }
    out.finish()
}

fn config(args: &Args) -> Result<TrainConfig> {
    let mut config = match &args.config {
        Some(path) => {
            paths::existing("configuration", path)?;
            recipe::recipe::train_config(path)?
        }
        None => serde_json::from_value(serde_json::json!({ "data": [] }))?,
    };
    if let Some(init) = &args.init {
        paths::existing("model", init)?;
        config.init = Some(init.clone());
        config.model = None;
    }
    if let Some(text) = &args.text {
        paths::existing("text", text)?;
        config.data = vec![SourceConfig { text: Some(text.clone()), ..SourceConfig::default() }];
    }
    if config.data.is_empty() {
        return Err(Failure::error("nothing to train on: give --text FILE, or `data` in --config"));
    }
    if let Some(steps) = args.steps {
        (config.steps, config.epochs) = (Some(steps), None);
    }
    if let Some(epochs) = args.epochs {
        (config.steps, config.epochs) = (None, Some(epochs));
    }
    config.optimizer.learning_rate = args.learning_rate.unwrap_or(config.optimizer.learning_rate);
    config.batch_size = args.batch_size.unwrap_or(config.batch_size);
    config.sequence_length = args.sequence_length.unwrap_or(config.sequence_length);
    config.seed = args.seed.unwrap_or(config.seed);
    Ok(config)
}
