//! The `strata` binary. This file is a table of contents: it parses, runs, and maps what happened
//! to an exit code (0 done, 1 a stated claim or threshold does not hold, 2 error, 130 interrupted).
//! One file per verb under `commands`; the work is done by the crates below.

mod args;
mod chat;
mod commands;
mod failure;
mod output;
mod paths;
mod system;

use std::process::ExitCode;

use failure::Failure;

fn main() -> ExitCode {
    system::exit_130_on_interrupt();
    let cli = args::parse();
    // Keeping freed memory makes training a third faster; a quantisation, whose promise is a small
    // peak, gives large buffers back instead.
    if !matches!(
        cli.command,
        commands::Command::Quantize(_) | commands::Command::Convert(_) | commands::Command::Run(_)
    ) {
        tensor::memory::tune_allocator();
    }
    report::set_verbosity(cli.global.verbosity());
    if cli.global.no_color {
        report::Style::disable_color();
    }
    let result = system::use_threads(cli.global.threads).and_then(|()| commands::run(cli.command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader went away (`strata inspect m | head`): that is its decision, not an error.
        Err(Failure::ClosedPipe) => ExitCode::SUCCESS,
        Err(Failure::DoesNotHold(what)) => {
            failure::print("does not hold", &what);
            ExitCode::from(1)
        }
        Err(Failure::Error(message)) => {
            failure::print("error", &message);
            ExitCode::from(2)
        }
    }
}
