//! `strata data`: makes data. One verb below it: `almanac`.

use std::path::{Path, PathBuf};

use data::almanac::{Almanac, Size};
use report::{Cell, Column, Report, Style, Table, human};

use crate::failure::{Failure, Result};
use crate::output::Output;

/// Flags of `strata data`.
#[derive(clap::Args)]
pub struct Args {
    /// What to make.
    #[command(subcommand)]
    kind: Kind,
}

#[derive(clap::Subcommand)]
enum Kind {
    /// Generate the almanac: a small world of facts, stories, dialects, dialogues and drills
    Almanac(AlmanacArgs),
}

#[derive(clap::Args)]
struct AlmanacArgs {
    /// Seed of the world
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Size of the world
    #[arg(long, value_enum, default_value_t = WorldSize::Standard)]
    size: WorldSize,
    /// Output directory
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace an existing output directory
    #[arg(long)]
    overwrite: bool,
    /// Print the statistics as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum WorldSize {
    /// The size that the sample models are trained on
    Standard,
    /// A small world for tests
    Tiny,
}

/// Makes the data.
pub fn run(args: &Args) -> Result<()> {
    let Kind::Almanac(args) = &args.kind;
    if args.out.exists() && !args.overwrite {
        return Err(Failure::error(format!(
            "output {} exists; give another --out, or --overwrite",
            args.out.display()
        )));
    }
    let size = match args.size {
        WorldSize::Standard => Size::Standard,
        WorldSize::Tiny => Size::Tiny,
    };
    let partial = partial(&args.out)?;
    if partial.exists() {
        std::fs::remove_dir_all(&partial)?;
    }
    let statistics = Almanac::generate(args.seed, size).write(&partial)?;
    if args.out.exists() {
        std::fs::remove_dir_all(&args.out)?;
    }
    std::fs::rename(&partial, &args.out)?;
    let mut out = Output::new();
    if args.json {
        out.json(&serde_json::to_value(&statistics)?)?;
    } else {
        let mut report = Report::new(
            format!("Almanac of seed {}", args.seed),
            format!("in {}", args.out.display()),
        );
        let texts: Vec<&String> = statistics.texts.keys().collect();
        for (label, value) in statistics.rows() {
            // The texts get a table of their own.
            if !texts.contains(&&label) {
                report.fact(label, value);
            }
        }
        let columns = vec![
            Column::left("file"),
            Column::right("texts"),
            Column::right("size"),
            Column::right("tokens"),
        ];
        let mut table = Table::new("", columns);
        for (name, text) in &statistics.texts {
            table.push(vec![
                Cell::text(name),
                Cell::Int(text.documents as i64),
                Cell::Bytes(text.bytes as u64),
                Cell::Count(text.tokens as u64),
            ]);
        }
        let columns = vec![
            Column::left("relation"),
            Column::right("facts"),
            Column::right("objects"),
            Column::right("trained wordings"),
            Column::right("held-out wordings"),
        ];
        let mut relations = Table::new("", columns);
        for r in &statistics.relations {
            let numbers = [r.facts, r.objects, r.trained, r.heldout];
            let mut row = vec![Cell::text(&r.name)];
            row.extend(numbers.map(|n| Cell::Int(n as i64)));
            relations.push(row);
        }
        report.section("Texts").push(table);
        report.section("Relations").push(relations);
        out.text(&report.terminal(Style::detect()))?;
        let total: usize = statistics.texts.values().map(|t| t.bytes).sum();
        report::detail(&format!("{} of text in all", human::bytes(total as u64)));
    }
    out.finish()
}

/// The directory in which an output grows, beside its final place.
fn partial(out: &Path) -> Result<PathBuf> {
    let Some(name) = out.file_name() else {
        return Err(Failure::error(format!("{} is not a directory name", out.display())));
    };
    let mut name = name.to_os_string();
    name.push(".partial");
    Ok(out.with_file_name(name))
}
