//! `strata generate`: continues a text, token by token on the terminal.

use std::io::Read;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use data::Tokenizer;
use nn::{Model, Sampling};
use serde_json::json;

use crate::chat;
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::paths;

/// Flags of `strata generate`.
#[derive(clap::Args)]
#[command(
    after_help = "Example: strata generate samples/almanac-3m --prompt \"The capital of\" --greedy"
)]
pub struct Args {
    /// Model directory or file, plain or quantised
    model: PathBuf,
    /// Text to continue; `-` reads it from standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Flatness of the draw: 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Draw among the K likeliest tokens only; 0 means all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw among the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Makes tokens that occurred less likely; 1 changes nothing
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Seed of the draw
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Always take the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p"])]
    greedy: bool,
    /// End before this text (repeatable)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Wrap the prompt as a question in the model's chat template
    #[arg(long)]
    chat: bool,
    /// Print prompt, completion and speed as JSON at the end
    #[arg(long)]
    json: bool,
}

/// Continues the text.
pub fn run(args: &Args) -> Result<()> {
    paths::existing("model", &args.model)?;
    let model = Model::open(&args.model)?;
    let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
    let prompt = prompt(args)?;
    let mut stop_ids = tokenizer.eos_ids().to_vec();
    let mut stops = args.stop.clone();
    stops.retain(|stop| !stop.is_empty());
    let text = if args.chat {
        let wrapped = chat::wrap(tokenizer.chat_template(), &prompt).map_err(Failure::Error)?;
        for mark in wrapped.stops {
            match tokenizer.token(mark) {
                Some(id) => stop_ids.push(id),
                None => stops.push(mark.to_string()),
            }
        }
        wrapped.prompt
    } else {
        prompt.clone()
    };
    let mut tokens = tokenizer.encode(&text, true)?;
    if tokens.is_empty() {
        tokens.extend(tokenizer.bos());
    }
    let sampling = Sampling {
        temperature: if args.greedy { 0.0 } else { args.temperature },
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        max_tokens: args.max_tokens,
    };

    let mut out = Output::new();
    let mut stream = tokenizer.stream(true).after(&tokens);
    let mut matcher = StopMatcher::new(stops);
    let mut completion = String::new();
    let mut trouble = None;
    let mut show = |piece: &str, out: &mut Output| -> Result<()> {
        completion.push_str(piece);
        if args.json || piece.is_empty() { Ok(()) } else { out.now(piece) }
    };
    let started = Instant::now();
    let generated = nn::generate(&model, &tokens, &sampling, &stop_ids, &mut |token| {
        let step = stream.push(token).map_err(Failure::from).and_then(|text| {
            let (piece, ended) = matcher.push(&text.unwrap_or_default());
            show(&piece, &mut out)?;
            Ok(ended)
        });
        match step {
            Ok(false) => ControlFlow::Continue(()),
            Ok(true) => ControlFlow::Break(()),
            Err(failure) => {
                trouble = Some(failure);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(failure) = trouble {
        return Err(failure);
    }
    let rest = stream.finish()?.unwrap_or_default();
    let piece = matcher.finish(&rest);
    show(&piece, &mut out)?;
    let seconds = started.elapsed().as_secs_f64();
    let speed = generated.len() as f64 / seconds.max(1e-9);
    if args.json {
        out.json(&json!({
            "prompt": prompt,
            "completion": completion,
            "prompt_tokens": tokens.len(),
            "tokens": generated.len(),
            "seconds": seconds,
            "tokens_per_second": speed,
        }))?;
    } else {
        out.text("\n")?;
        out.finish()?;
        report::detail(&format!(
            "{} tokens after {} in {} ({speed:.1} tokens/s)",
            generated.len(),
            tokens.len(),
            report::human::seconds(seconds)
        ));
    }
    out.finish()
}

fn prompt(args: &Args) -> Result<String> {
    if args.prompt != "-" {
        return Ok(args.prompt.clone());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

/// Lets text through until a stop string begins. Text that may be the beginning of one waits.
struct StopMatcher {
    stops: Vec<String>,
    held: String,
    ended: bool,
}

impl StopMatcher {
    fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), ended: false }
    }

    /// Takes a piece; returns what may be shown, and whether a stop string was found.
    fn push(&mut self, piece: &str) -> (String, bool) {
        if self.ended {
            return (String::new(), true);
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            self.ended = true;
            return (std::mem::take(&mut self.held), true);
        }
        let waiting = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - waiting);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The last piece: what still waits is shown, because no stop string can complete any more.
    fn finish(&mut self, piece: &str) -> String {
        let (mut shown, ended) = self.push(piece);
        if !ended {
            shown.push_str(&std::mem::take(&mut self.held));
        }
        shown
    }
}

/// The number of bytes at the end of `text` that are the beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(at, _)| at).filter(|at| *at > 0);
    ends.filter(|at| stop.get(..*at).is_some_and(|begin| text.ends_with(begin))).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> String {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let mut text = String::new();
        for piece in pieces {
            let (part, ended) = matcher.push(piece);
            text.push_str(&part);
            if ended {
                return text;
            }
        }
        text + &matcher.finish("")
    }

    #[test]
    fn stop_strings_are_found_across_pieces_and_never_shown() {
        assert_eq!(shown(&["END"], &["a E", "N", "D b"]), "a ");
        assert_eq!(shown(&["END"], &["a E", "N", "X b"]), "a ENX b");
        assert_eq!(shown(&["END"], &["a EN"]), "a EN");
        assert_eq!(shown(&["\n\n", "é!"], &["x\n", "y é", "!z"]), "x\ny ");
        assert_eq!(shown(&["b", "ab"], &["xab"]), "x");
        assert_eq!(shown(&[], &["a", "b"]), "ab");
    }
}
