//! `strata methods`: the cards of all rooms.

use method::MethodCard;
use report::{Cell, Column, Report, Style, Table};
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::output::Output;

/// Flags of `strata methods`.
#[derive(clap::Args)]
pub struct Args {
    /// Explain this method and list its options
    slug: Option<String>,
    /// Print JSON; for one method this includes the JSON Schema of its options
    #[arg(long)]
    json: bool,
}

/// The methods of all rooms.
pub fn all() -> impl Iterator<Item = &'static MethodCard> {
    compress::METHODS.iter()
}

/// Lists the methods or explains one.
pub fn run(args: &Args) -> Result<()> {
    let mut out = Output::new();
    match &args.slug {
        None if args.json => out.json(&Value::Array(all().map(card_json).collect()))?,
        None => {
            out.text(&list().terminal(Style::detect()))?;
            out.text("\nstrata methods SLUG explains one of them with its options.\n")?;
        }
        Some(slug) => {
            let card = MethodCard::find(slug, all()).map_err(Failure::Error)?;
            if args.json {
                let mut value = card_json(card);
                if let Some(object) = value.as_object_mut() {
                    object.insert("options".into(), serde_json::to_value(card.options())?);
                    object.insert("schema".into(), serde_json::to_value((card.schema)())?);
                }
                out.json(&value)?;
            } else {
                out.text(&explain(card).terminal(Style::detect()))?;
            }
        }
    }
    out.finish()
}

fn card_json(card: &MethodCard) -> Value {
    json!({
        "slug": card.slug,
        "title": card.title,
        "room": card.room,
        "paper": card.paper,
        "summary": card.summary,
    })
}

fn list() -> Table {
    let columns = ["method", "room", "title", "paper"].map(Column::left).to_vec();
    let mut table = Table::new("", columns);
    for card in all() {
        table.push([card.slug, card.room, card.title, card.paper].map(Cell::text).to_vec());
    }
    table
}

fn explain(card: &MethodCard) -> Report {
    let mut report = Report::new(format!("{}: {}", card.slug, card.title), card.summary);
    report.fact("room", card.room);
    report.fact("paper", card.paper);
    let section = report.section("Options");
    // One paragraph per option reads better than a table cell of five lines.
    for row in card.options() {
        let default = match &row.default {
            Some(value) => format!("default {value}"),
            None => "required".to_string(),
        };
        section.text(format!("{}: {}, {default}\n    {}", row.name, row.kind, row.description));
    }
    report
}
