//! `strata repro`: checks the papers' claims.

use crate::failure::{Failure, Result};

/// Flags of `strata repro`.
#[derive(clap::Args)]
#[command(hide = true)]
#[group(id = "which", required = true, multiple = false, args = ["slug", "room", "all"])]
pub struct Args {
    /// The method whose claim is checked
    slug: Option<String>,
    /// Every method of this room
    #[arg(long, value_name = "ROOM")]
    room: Option<String>,
    /// Every method
    #[arg(long)]
    all: bool,
    /// Fewer seeds and settings
    #[arg(long)]
    fast: bool,
    /// Print a list of {"slug", "claim", "measured", "baselines", "seeds", "holds"}
    #[arg(long)]
    json: bool,
}

/// Checks the claims.
pub fn run(args: &Args) -> Result<()> {
    let _ = (&args.slug, &args.room, args.all, args.fast, args.json);
    Err(Failure::error("`strata repro` is not available in this build"))
}
