//! `strata completions SHELL`.

use crate::args;
use crate::failure::Result;
use crate::output::Output;

/// Flags of `strata completions`.
#[derive(clap::Args)]
#[command(
    after_help = "Example: strata completions bash > ~/.local/share/bash-completion/completions/strata"
)]
pub struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

/// Prints the completion script.
pub fn run(args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "strata", &mut script);
    let mut out = Output::new();
    out.text(&String::from_utf8_lossy(&script))?;
    out.finish()
}
