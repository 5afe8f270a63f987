//! `strata eval`: what a model can do, as numbers, with thresholds for scripts.

use std::path::{Path, PathBuf};

use data::almanac::{Almanac, Fact};
use data::{Tokenizer, text};
use nn::Model;
use report::{Progress, Style, Table};
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::output::{Output, write_json};
use crate::paths;

/// Flags of `strata eval`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  strata eval samples/almanac-3m --task facts\n  \
    strata eval MODEL --task perplexity --text test.txt --window 512 --stride 256\n  \
    strata eval MODEL --task perplexity --text test.txt --at-most 12   # exit code 1 above 12\n  \
    strata eval MODEL --task images --data test_batch.bin.gz")]
pub struct Args {
    /// Model directory or file, plain or quantised
    model: PathBuf,
    /// What to measure
    #[arg(long, value_enum)]
    task: Task,
    /// Text for perplexity and accuracy (.txt; .jsonl or .json with `text`)
    #[arg(long, value_name = "FILE", required_if_eq_any = [("task", "perplexity"), ("task", "accuracy")])]
    text: Option<PathBuf>,
    /// Questions for choice: JSONL of {"question", "choices", "answer"}
    #[arg(long, value_name = "FILE", required_if_eq("task", "choice"))]
    questions: Option<PathBuf>,
    /// Labelled images for images: CIFAR-10 records or IDX, plain or gzipped
    #[arg(long, value_name = "FILE", required_if_eq("task", "images"))]
    data: Option<PathBuf>,
    /// Labels of IDX images [default: the file beside them, labels-idx1 for images-idx3]
    #[arg(long, value_name = "FILE", requires = "data")]
    labels: Option<PathBuf>,
    /// Use only the first N images
    #[arg(long, value_name = "N", requires = "data")]
    images: Option<usize>,
    /// Facts for facts: the facts.json of `strata data almanac` [default: the almanac that the
    /// model was trained on, or the embedded one]
    #[arg(long, value_name = "FILE")]
    facts: Option<PathBuf>,
    /// Tokens per window [default: the model's context, at most 1024]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens from one window to the next (perplexity) [default: half a window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Use only the first N tokens of the text
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Exit with code 1 when the result is above X
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    at_most: Option<f64>,
    /// Exit with code 1 when the result is below X (accuracies: 0 to 1; facts: held-out prompts)
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    at_least: Option<f64>,
    /// Also write the JSON to this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What to measure.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Task {
    /// exp of the mean loss, by sliding windows
    Perplexity,
    /// How often the likeliest next token is right
    Accuracy,
    /// Whether the almanac's facts are known
    Facts,
    /// Multiple choice by log-likelihood
    Choice,
    /// How often an image gets the right label (resnet, vit, mlp)
    Images,
}

/// A measured result: for people, for scripts, and the one number that thresholds look at.
struct Measured {
    tables: Vec<Table>,
    json: Value,
    name: &'static str,
    figure: f64,
}

/// Measures.
pub fn run(args: &Args) -> Result<()> {
    paths::existing("model", &args.model)?;
    for (what, path) in [
        ("text", &args.text),
        ("questions", &args.questions),
        ("facts", &args.facts),
        ("data", &args.data),
        ("labels", &args.labels),
    ] {
        if let Some(path) = path {
            paths::existing(what, path)?;
        }
    }
    let measured = if args.task == Task::Images { images(args)? } else { language(args)? };
    let mut out = Output::new();
    if args.json {
        out.json(&measured.json)?;
    } else {
        let tables = measured.tables.iter().map(|t| t.terminal(Style::detect()));
        out.text(&tables.collect::<Vec<_>>().join("\n"))?;
    }
    out.finish()?;
    if let Some(path) = &args.out {
        write_json(path, &measured.json)?;
    }
    check(args, &measured)
}

/// The tasks of language models.
fn language(args: &Args) -> Result<Measured> {
    let model = Model::open(&args.model)?;
    let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
    match args.task {
        Task::Perplexity => perplexity(args, &model, &tokenizer),
        Task::Accuracy => accuracy(args, &model, &tokenizer),
        Task::Facts => facts(args, &model, &tokenizer),
        Task::Choice => choice(args, &model, &tokenizer),
        Task::Images => images(args),
    }
}

fn images(args: &Args) -> Result<Measured> {
    let Some(path) = &args.data else {
        return Err(Failure::error("--task images needs --data FILE"));
    };
    let model = nn::open_network(&args.model)?;
    let mut images = data::Images::load(path, args.labels.as_deref())?;
    if let Some(limit) = args.images {
        images.truncate(limit);
    }
    let (network, weights) = (model.network.as_ref(), model.weights.as_ref());
    eval::check_images(network, &images)?;
    let progress = Progress::new("images", images.len() as u64, "images");
    let scores = eval::classify_with(network, weights, &images, &progress)?;
    progress.finish();
    let mut tables = vec![scores.table()];
    if report::verbosity() > 0 {
        tables.push(scores.class_table());
    }
    Ok(Measured {
        tables,
        name: "top-1 accuracy",
        figure: scores.accuracy,
        json: serde_json::to_value(scores)?,
    })
}

/// The thresholds. A result that is not a number holds nothing.
fn check(args: &Args, measured: &Measured) -> Result<()> {
    let (name, figure) = (measured.name, measured.figure);
    let unmet = match (args.at_most, args.at_least) {
        (Some(limit), _) if figure.is_nan() || figure > limit => format!("at most {limit}"),
        (_, Some(limit)) if figure.is_nan() || figure < limit => format!("at least {limit}"),
        _ => return Ok(()),
    };
    Err(Failure::DoesNotHold(format!("{name} is {figure:.6}, stated: {unmet}")))
}

fn perplexity(args: &Args, model: &Model, tokenizer: &Tokenizer) -> Result<Measured> {
    let tokens = tokens(args, tokenizer)?;
    let window = window(args, model);
    let stride = args.stride.unwrap_or((window / 2).max(1));
    let steps = tokens.len().saturating_sub(window).div_ceil(stride.max(1)) + 1;
    let progress = Progress::new("perplexity", steps as u64, "windows");
    let result = eval::perplexity_with(model, &tokens, window, stride, &progress)?;
    progress.finish();
    Ok(Measured {
        tables: vec![result.table()],
        json: serde_json::to_value(result)?,
        name: "perplexity",
        figure: result.perplexity,
    })
}

fn accuracy(args: &Args, model: &Model, tokenizer: &Tokenizer) -> Result<Measured> {
    let tokens = tokens(args, tokenizer)?;
    let result = eval::next_token_accuracy(model, &tokens, window(args, model))?;
    Ok(Measured {
        tables: vec![result.table()],
        json: serde_json::to_value(result)?,
        name: "next-token accuracy",
        figure: result.accuracy,
    })
}

fn facts(args: &Args, model: &Model, tokenizer: &Tokenizer) -> Result<Measured> {
    let facts: Vec<Fact> = match &args.facts {
        Some(path) => read_facts(path)?,
        None => {
            let own = recipe::measure::almanac_of(model.checkpoint.directory());
            own.unwrap_or_else(Almanac::embedded).facts().to_vec()
        }
    };
    let prompts: usize =
        facts.iter().map(|f| f.prompts_train.len() + f.prompts_heldout.len()).sum();
    let progress = Progress::new("facts", prompts as u64, "prompts");
    let scores = eval::facts::facts_with(model, tokenizer, &facts, &progress)?;
    progress.finish();
    let mut json = serde_json::to_value(&scores)?;
    let figure = scores.heldout.accuracy();
    if let Some(object) = json.as_object_mut() {
        object.insert("train_accuracy".into(), json!(scores.train.accuracy()));
        object.insert("heldout_accuracy".into(), json!(figure));
    }
    let mut tables = vec![scores.table()];
    if report::verbosity() > 0 {
        tables.push(scores.relation_table());
    }
    Ok(Measured { tables, json, name: "held-out fact accuracy", figure })
}

fn read_facts(path: &Path) -> Result<Vec<Fact>> {
    let bytes = std::fs::read(path)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::error(format!(
            "{} is not a list of facts ({error}); `strata data almanac` writes one as facts.json",
            path.display()
        ))
    })
}

fn choice(args: &Args, model: &Model, tokenizer: &Tokenizer) -> Result<Measured> {
    let Some(path) = &args.questions else {
        return Err(Failure::error("--task choice needs --questions FILE"));
    };
    let questions = eval::read_questions(path)?;
    let scores = eval::multiple_choice(model, tokenizer, &questions)?;
    let mut json = serde_json::to_value(scores)?;
    let figure = scores.normalized.accuracy();
    if let Some(object) = json.as_object_mut() {
        object.insert("accuracy".into(), json!(scores.sum.accuracy()));
        object.insert("accuracy_normalized".into(), json!(figure));
    }
    let name = "multiple-choice accuracy (per byte)";
    Ok(Measured { tables: vec![scores.table()], json, name, figure })
}

/// The whole text with the marks that the tokenizer puts around a text.
fn tokens(args: &Args, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let Some(path) = &args.text else {
        return Err(Failure::error("this task needs --text FILE"));
    };
    let mut tokens = text::joined_tokens(&text::load(path)?, tokenizer)?;
    if let Some(limit) = args.tokens {
        tokens.truncate(limit);
    }
    Ok(tokens)
}

fn window(args: &Args, model: &Model) -> usize {
    args.window.unwrap_or(model.decoder.config.max_position_embeddings.min(1024))
}
