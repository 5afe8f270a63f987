//! The verbs, one file each.

pub mod completions;
pub mod convert;
pub mod data;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod methods;
pub mod prune;
pub mod quantize;
pub mod repro;
pub mod run;
pub mod train;

use crate::failure::Result;

/// What `strata` can do.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Show what is inside a checkpoint: layers, roles, sizes, norms, outliers
    Inspect(inspect::Args),
    /// Make a checkpoint smaller and report what that cost
    Quantize(Box<quantize::Args>),
    /// Set weights to zero and report what that cost
    Prune(Box<prune::Args>),
    /// Write a checkpoint in another container: safetensors, GGUF, packed and sparse formats
    Convert(Box<convert::Args>),
    /// Measure a model: perplexity, accuracy, facts, multiple choice
    Eval(eval::Args),
    /// Continue a text
    Generate(generate::Args),
    /// Train a model from scratch, or train one further
    Train(train::Args),
    /// Make data
    Data(data::Args),
    /// Run a recipe: a job written down in YAML
    Run(run::Args),
    /// List the methods, or explain one with its options
    Methods(methods::Args),
    /// Check the claims of the papers that the methods come from
    Repro(repro::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
}

/// Runs the verb.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Quantize(args) => quantize::run(*args),
        Command::Prune(args) => prune::run(*args),
        Command::Convert(args) => convert::run(*args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Methods(args) => methods::run(&args),
        Command::Repro(args) => repro::run(&args),
        Command::Completions(args) => completions::run(&args),
    }
}
