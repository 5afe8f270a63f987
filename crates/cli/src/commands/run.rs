//! `strata run`: a recipe, stage after stage.

use std::path::PathBuf;

use recipe::{Recipe, StageResult};
use report::Style;
use serde_json::{Value, json};

use crate::commands::quantize::brief;
use crate::failure::Result;
use crate::output::Output;
use crate::paths;

/// Flags of `strata run`.
#[derive(clap::Args)]
pub struct Args {
    /// Recipe file (YAML)
    recipe: PathBuf,
    /// Go on where an earlier run was stopped: finished stages are skipped
    #[arg(long)]
    resume: bool,
    /// Print the results of all stages as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the recipe.
pub fn run(args: &Args) -> Result<()> {
    paths::existing("recipe", &args.recipe)?;
    let recipe = Recipe::read(&args.recipe)?;
    let mut out = Output::new();
    let mut results = Vec::new();
    let mut trouble = None;
    recipe.run(args.resume, |result| {
        let shown = if args.json {
            stage_json(result).map(|value| results.push(value))
        } else {
            out.now(&stage_text(result))
        };
        if let Err(failure) = shown {
            trouble.get_or_insert(failure);
        }
    })?;
    if let Some(failure) = trouble {
        return Err(failure);
    }
    if args.json {
        out.json(&Value::Array(results))?;
    }
    out.finish()
}

fn stage_text(result: &StageResult) -> String {
    let style = Style::detect();
    match result {
        StageResult::Trained(outcome) => {
            format!("{}{}\n\n", outcome.table().terminal(style), outcome.path.display())
        }
        StageResult::Quantized(finished) => format!(
            "{}\n{}\n\n",
            brief(&finished.report).terminal(style),
            finished.path.join("report.html").display()
        ),
        StageResult::Pruned(finished) => format!(
            "{}\n{}\n\n",
            brief(&finished.report).terminal(style),
            finished.path.join("report.html").display()
        ),
        StageResult::Converted(converted) => converted.report().terminal(style) + "\n",
        StageResult::Measured(measures) => {
            let mut text = measures.perplexity.table().terminal(style);
            if let Some(facts) = &measures.facts {
                text.push('\n');
                text.push_str(&facts.table().terminal(style));
            }
            text + "\n"
        }
    }
}

fn stage_json(result: &StageResult) -> Result<Value> {
    Ok(match result {
        StageResult::Trained(outcome) => {
            json!({"stage": "train", "out": outcome.path, "result": outcome})
        }
        StageResult::Quantized(finished) => {
            json!({"stage": "quantize", "out": finished.path, "result": finished.report.json()})
        }
        StageResult::Pruned(finished) => {
            json!({"stage": "prune", "out": finished.path, "result": finished.report.json()})
        }
        StageResult::Converted(converted) => {
            json!({"stage": "convert", "out": converted.path, "result": converted})
        }
        StageResult::Measured(measures) => {
            json!({"stage": "evaluate", "result": serde_json::to_value(measures.as_ref())?})
        }
    })
}
