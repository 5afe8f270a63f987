//! `strata quantize`: the main job. Flags are the options of the compress room; the job is
//! `recipe`'s.

use std::path::PathBuf;

use compress::QuantizeOptions;
use recipe::{MeasureOptions, QuantizeJob};
use report::{Report, Style};

use crate::failure::Result;
use crate::output::Output;
use crate::paths;

/// Flags of `strata quantize`.
#[derive(clap::Args)]
#[command(
    after_help = "Example: strata quantize samples/almanac-3m --method awq --bits 4 --group-size 128 --out out/awq4\n\
    Killed at any time, the same command with --resume goes on and ends with the same bytes."
)]
pub struct Args {
    /// Model directory or file
    model: PathBuf,
    /// Output directory
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    options: QuantizeOptions,
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

/// Quantises.
pub fn run(args: Args) -> Result<()> {
    paths::existing("model", &args.model)?;
    for (what, path) in
        [("calibration text", &args.options.calibration.file), ("text", &args.measure.text)]
    {
        if let Some(path) = path {
            paths::existing(what, path)?;
        }
    }
    let job = QuantizeJob {
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

/// The key figures and the first section; the rest is in the file.
pub fn brief(report: &Report) -> Report {
    let mut brief = report.clone();
    brief.sections.truncate(1);
    brief
}
