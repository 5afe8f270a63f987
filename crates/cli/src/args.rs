//! The command surface: global flags and the list of verbs. Each verb's own flags stand with it in
//! `commands`.

use clap::{ColorChoice, CommandFactory, FromArgMatches, Parser};

use crate::commands::Command;

/// A workbench for the weights inside neural networks.
#[derive(Parser)]
#[command(
    name = "strata",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 a stated claim or threshold does not hold, 2 error, \
                  130 interrupted.\n\
                  Every command has --help; tables are printed as JSON with --json."
)]
pub struct Cli {
    /// Flags that every verb takes.
    #[command(flatten)]
    pub global: Global,
    /// The verb.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every verb takes.
#[derive(clap::Args)]
pub struct Global {
    /// Say less: no progress, no notes
    #[arg(short, long, global = true, help_heading = "Global options")]
    quiet: bool,
    /// Say more (repeatable)
    #[arg(
        short,
        long,
        global = true,
        action = clap::ArgAction::Count,
        conflicts_with = "quiet",
        help_heading = "Global options"
    )]
    verbose: u8,
    /// No colours (also: NO_COLOR=1)
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_color: bool,
    /// Worker threads [default: all cores]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    pub threads: Option<usize>,
}

impl Global {
    /// -1 quiet, 0 normal, 1 and more detailed.
    pub fn verbosity(&self) -> i8 {
        if self.quiet { -1 } else { self.verbose.min(9) as i8 }
    }
}

/// Reads the command line; prints help or a usage error (exit code 2) and ends the process when
/// that is what it asks for.
pub fn parse() -> Cli {
    // Help and usage errors are printed while parsing, before any flag is known.
    let plain = std::env::args_os().any(|arg| arg == "--no-color");
    let color = if plain { ColorChoice::Never } else { ColorChoice::Auto };
    let matches = command().color(color).get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// The whole surface as clap sees it: for parsing and for shell completions.
pub fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_surface_is_consistent() {
        super::command().debug_assert();
    }

    /// Flattened option structs whose fields have the same name would answer for each other; clap
    /// itself looks for that in debug builds only.
    #[test]
    fn no_two_arguments_of_a_verb_share_an_id() {
        let mut command = super::command();
        command.build();
        for verb in command.get_subcommands() {
            let mut seen = std::collections::BTreeSet::new();
            for argument in verb.get_arguments() {
                let id = argument.get_id().to_string();
                assert!(seen.insert(id), "{}: {}", verb.get_name(), argument.get_id());
            }
        }
    }
}
