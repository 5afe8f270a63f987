//! `strata convert`: a checkpoint in another container. What is kept and what is refused is
//! `recipe`'s.

use std::path::PathBuf;

use recipe::{ConvertJob, ConvertOptions};
use report::Style;

use crate::failure::Result;
use crate::output::Output;
use crate::paths;

/// Flags of `strata convert`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n\
    \x20 strata convert samples/almanac-3m --to gguf --type q4_0 --out almanac-q4_0.gguf\n\
    \x20 strata convert out/almanac-gptq --to gguf --out almanac.gguf   (keeps the codes where GGUF can hold them)\n\
    \x20 strata convert model.gguf --to safetensors --type f16 --out out/model\n\
    docs/formats.md says what every container holds and who reads it.")]
pub struct Args {
    /// Model directory or file
    model: PathBuf,
    /// Output: a directory, or for GGUF a file
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    #[command(flatten)]
    options: ConvertOptions,
    /// Replace an existing output
    #[arg(long)]
    overwrite: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Converts.
pub fn run(args: Args) -> Result<()> {
    paths::existing("model", &args.model)?;
    let job = ConvertJob {
        model: args.model,
        out: args.out,
        options: args.options,
        overwrite: args.overwrite,
    };
    let converted = job.run()?;
    let mut out = Output::new();
    if args.json {
        out.json(&serde_json::to_value(&converted)?)?;
    } else {
        out.text(&converted.report().terminal(Style::detect()))?;
    }
    out.finish()
}
