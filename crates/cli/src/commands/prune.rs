//! `strata prune`: weights to zero. Flags are the options of the compress room; the job is
//! `recipe`'s.

use std::path::PathBuf;

use compress::PruneOptions;
use recipe::{MeasureOptions, PruneJob};
use report::Style;

use super::quantize::brief;
use crate::failure::Result;
use crate::output::Output;
use crate::paths;

/// Flags of `strata prune`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    strata prune samples/almanac-3m --method sparsegpt --sparsity 0.5 --out out/half\n  \
    strata prune samples/almanac-3m --method wanda --pattern 2:4 --format sparse-24-bitmask --out out/24\n  \
    strata prune samples/almanac-3m --method d-pruner --dialect law --sparsity 0.6 --out out/law\n\
    Killed at any time, the same command with --resume goes on and ends with the same bytes.")]
pub struct Args {
    /// Model directory or file
    model: PathBuf,
    /// Output directory
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    options: PruneOptions,
    #[command(flatten, next_help_heading = "Measured before and after")]
    measure: MeasureOptions,
    /// Go on with a job that was stopped
    #[arg(long)]
    resume: bool,
    /// Replace an existing output directory
    #[arg(long)]
    overwrite: bool,
    /// Print the whole report as JSON
    #[arg(long)]
    json: bool,
}

/// Prunes.
pub fn run(args: Args) -> Result<()> {
    paths::existing("model", &args.model)?;
    for (what, path) in [
        ("calibration text", &args.options.calibration.file),
        ("domain text", &args.options.domain.file),
        ("domain test text", &args.options.domain.domain_test),
        ("text", &args.measure.text),
    ] {
        if let Some(path) = path {
            paths::existing(what, path)?;
        }
    }
    let job = PruneJob {
        model: args.model,
        out: args.out,
        options: args.options,
        measure: args.measure,
        resume: args.resume,
        overwrite: args.overwrite,
    };
    let finished = job.run()?;
    let mut out = Output::new();
    if args.json {
        out.json(&finished.report.json())?;
    } else {
        out.text(&brief(&finished.report).terminal(Style::detect()))?;
        out.text(&format!("\n{}\n", finished.path.join("report.html").display()))?;
    }
    out.finish()
}
