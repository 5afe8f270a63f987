//! `strata inspect`: what is inside a checkpoint, as a tree, by layer or by tensor.

mod rows;
mod statistics;
mod tree;

use std::path::PathBuf;

use report::{Report, Style, human};
use serde_json::{Value, json};

use crate::failure::Result;
use crate::output::Output;
use crate::paths;
use rows::Content;

/// Flags of `strata inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory or file (.safetensors, .bin, .pt, .gguf)
    model: PathBuf,
    /// The tree of modules with sums at every node (the default)
    #[arg(long, group = "view")]
    tree: bool,
    /// One row per layer of the network, quantised layers as the weights they stand for
    #[arg(long, group = "view")]
    layers: bool,
    /// One row per stored tensor
    #[arg(long, group = "view")]
    tensors: bool,
    /// Levels of the tree to show [default: all]
    #[arg(long, value_name = "N")]
    depth: Option<usize>,
    /// Only names that match this pattern (repeatable)
    #[arg(long, value_name = "PATTERN")]
    only: Vec<method::Pattern>,
    /// Do not read the weights: no norms, outliers and sparsity
    #[arg(long)]
    no_statistics: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows what is inside.
pub fn run(args: &Args) -> Result<()> {
    paths::existing("model", &args.model)?;
    let checkpoint = store::Checkpoint::open(&args.model)?;
    let content = if args.layers {
        Content::layers(checkpoint, &args.only, !args.no_statistics)?
    } else {
        Content::tensors(checkpoint, &args.only, !args.no_statistics)?
    };
    let mut out = Output::new();
    if args.json {
        out.json(&as_json(args, &content)?)?;
    } else {
        let mut report = Report::new(content.title(), "");
        for (label, value) in content.summary() {
            report.fact(label, value);
        }
        let table = if args.layers || args.tensors {
            content.table(args.layers)
        } else {
            tree::Node::of(&content.rows).table(args.depth.unwrap_or(usize::MAX))
        };
        report.section("").push(table);
        if !args.no_statistics {
            report.section("").text(
                "norm: root of the sum of squares; outliers: share of weights beyond six standard \
                 deviations; sparsity: share of zeros.",
            );
        }
        out.text(&report.terminal(Style::detect()))?;
    }
    out.finish()
}

fn as_json(args: &Args, content: &Content) -> Result<Value> {
    let mut value = json!({
        "path": args.model,
        "container": content.container,
        "architecture": content.architecture,
        "parameters": content.parameters(),
        "bytes": content.bytes(),
    });
    let (key, rows) = if args.layers {
        ("layers", Value::Array(content.rows.iter().map(rows::Row::json).collect()))
    } else if args.tensors {
        ("tensors", Value::Array(content.rows.iter().map(rows::Row::json).collect()))
    } else {
        ("tree", tree::Node::of(&content.rows).json(args.depth.unwrap_or(usize::MAX)))
    };
    if let Some(object) = value.as_object_mut() {
        object.insert(key.into(), rows);
    }
    report::detail(&format!("{} in {key}", human::bytes(content.bytes())));
    Ok(value)
}
