//! `strata repro`: checks the papers' claims on the samples and, where present, on real models.

use std::path::PathBuf;

use report::Style;
use repro::{Reproduction, Settings};
use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::output::Output;

/// Flags of `strata repro`.
#[derive(clap::Args)]
#[command(after_help = "Exit code 1 when a claim does not hold.")]
#[command(group(clap::ArgGroup::new("which").required(true).args(["slug", "room", "all"])))]
pub struct Args {
    /// The method whose claims are checked
    slug: Option<String>,
    /// Every method of this room
    #[arg(long, value_name = "ROOM")]
    room: Option<String>,
    /// Every method
    #[arg(long)]
    all: bool,
    /// A subset that ends in about a minute
    #[arg(long)]
    fast: bool,
    /// The directory with Strata's sample models
    #[arg(long, value_name = "DIR", default_value = "samples")]
    samples: PathBuf,
    /// Also write the page as HTML to this file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print a list of {"slug", "claim", "measured", "baselines", "seeds", "holds"}
    #[arg(long)]
    json: bool,
}

/// Checks the claims.
pub fn run(args: &Args) -> Result<()> {
    let selected = select(args)?;
    let mut settings = Settings::usual(args.fast);
    settings.samples.clone_from(&args.samples);
    let (page, claims) = repro::run(&selected, &settings)?;
    let mut out = Output::new();
    if args.json {
        out.json(&Value::Array(claims.iter().map(report::Claim::json).collect()))?;
    } else {
        out.text(&page.terminal(Style::detect()))?;
    }
    out.finish()?;
    if let Some(path) = &args.report {
        store::write_atomic(path, page.html().as_bytes())?;
    }
    let failed: Vec<&str> =
        claims.iter().filter(|c| c.holds == Some(false)).map(|c| c.claim.as_str()).collect();
    if failed.is_empty() { Ok(()) } else { Err(Failure::DoesNotHold(failed.join("; "))) }
}

fn select(args: &Args) -> Result<Vec<&'static Reproduction>> {
    let all = || repro::ALL.iter();
    let unknown = |what, wrong: &str, known: Vec<&str>| {
        Failure::Error(method::did_you_mean(what, wrong, &known))
    };
    if let Some(slug) = &args.slug {
        let found = all().find(|r| r.slug == slug);
        let found =
            found.ok_or_else(|| unknown("reproduction", slug, all().map(|r| r.slug).collect()))?;
        return Ok(vec![found]);
    }
    if let Some(room) = &args.room {
        let found: Vec<_> = all().filter(|r| r.room == room).collect();
        if found.is_empty() {
            let mut rooms: Vec<&str> = all().map(|r| r.room).collect();
            rooms.dedup();
            return Err(unknown("room", room, rooms));
        }
        return Ok(found);
    }
    Ok(all().collect())
}
