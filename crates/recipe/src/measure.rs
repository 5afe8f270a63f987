//! The same measurement before and after: perplexity on held-out text, facts where they apply.

use crate::Result;
use data::almanac::{Almanac, Split};
use data::{Tokenizer, text};
use eval::{FactScores, Perplexity};
use nn::Model;
use std::path::{Path, PathBuf};

/// What a job measures before and after.
#[derive(
    Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema, clap::Args,
)]
#[serde(default, deny_unknown_fields)]
pub struct MeasureOptions {
    /// Held-out text for perplexity; without it the almanac's test text is used
    #[arg(long = "evaluate", value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens per evaluation window
    #[arg(long = "evaluate-window", default_value_t = 256)]
    pub window: usize,
    /// At most this many tokens of the text are used; 0 means all
    #[arg(long = "evaluate-tokens", default_value_t = 65536)]
    pub tokens: usize,
    /// Skip the measurement before and after
    #[arg(long = "no-evaluate")]
    pub skip: bool,
}

impl Default for MeasureOptions {
    fn default() -> Self {
        Self { text: None, window: 256, tokens: 65536, skip: false }
    }
}

/// What was measured on one model.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Measures {
    /// Perplexity on the held-out text.
    pub perplexity: Perplexity,
    /// Facts of the almanac, for models that were trained on it.
    pub facts: Option<FactScores>,
}

/// The text and facts of a measurement, tokenised once for both sides.
pub struct Measurement {
    tokenizer: Tokenizer,
    tokens: Vec<u32>,
    window: usize,
    almanac: Option<Almanac>,
    /// What the text is, for the report.
    pub source: String,
}

impl Measurement {
    /// Prepares the measurement of the model in `path`.
    pub fn new(model: &Model, options: &MeasureOptions) -> Result<Self> {
        let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
        let trained_on = almanac_of(model.checkpoint.directory());
        let (documents, source) = match &options.text {
            Some(path) => (text::load(path)?, path.display().to_string()),
            None => {
                let almanac = trained_on.clone().unwrap_or_else(Almanac::embedded);
                (almanac.documents(Split::Test), "the almanac's test text".to_string())
            }
        };
        let mut tokens = text::document_tokens(&documents, &tokenizer)?;
        if options.tokens > 0 {
            tokens.truncate(options.tokens);
        }
        let window = options.window.min(model.decoder.config.max_position_embeddings);
        Ok(Self { tokenizer, tokens, window, almanac: trained_on, source })
    }

    /// Measures one model.
    pub fn run(&self, model: &Model, label: &str) -> Result<Measures> {
        let windows = (self.tokens.len() / self.window.max(1)) as u64;
        let progress = report::Progress::new(&format!("evaluate {label}"), windows, "windows");
        let perplexity =
            eval::perplexity_with(model, &self.tokens, self.window, self.window, &progress)?;
        progress.finish();
        let facts = match &self.almanac {
            Some(almanac) => Some(eval::facts(model, &self.tokenizer, almanac.facts())?),
            None => None,
        };
        Ok(Measures { perplexity, facts })
    }

    /// Perplexity alone.
    pub fn perplexity(&self, model: &Model) -> Result<f64> {
        Ok(eval::perplexity(model, &self.tokens, self.window, self.window)?.perplexity)
    }

    /// How far the predictions of `other` are from those of `reference`, on at most 8,192 tokens.
    pub fn compare(&self, reference: &Model, other: &Model) -> Result<eval::Comparison> {
        let tokens = self.tokens.get(..self.tokens.len().min(8192)).unwrap_or_default();
        Ok(eval::compare(reference, other, tokens, self.window)?)
    }
}

/// The almanac that a model was trained on, if its `strata.json` says so (directly, or through the
/// job that made it).
pub fn almanac_of(directory: &Path) -> Option<Almanac> {
    let bytes = std::fs::read(directory.join("strata.json")).ok()?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
    find_seed(&value, 0).map(|seed| Almanac::generate(seed, data::almanac::Size::Standard))
}

/// The seed of the first `almanac` object inside `value`.
fn find_seed(value: &serde_json::Value, depth: usize) -> Option<u64> {
    if depth > 16 {
        return None;
    }
    match value {
        serde_json::Value::Object(map) => match map.get("almanac") {
            Some(serde_json::Value::Object(almanac)) => {
                Some(almanac.get("seed").and_then(|s| s.as_u64()).unwrap_or(0))
            }
            _ => map.values().find_map(|v| find_seed(v, depth + 1)),
        },
        serde_json::Value::Array(items) => items.iter().find_map(|v| find_seed(v, depth + 1)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_almanac_is_found_through_the_job_that_made_a_model() {
        let trained = serde_json::json!({"config": {"data": [{"almanac": {"seed": 3}}]}});
        assert_eq!(find_seed(&trained, 0), Some(3));
        let quantised = serde_json::json!({"provenance": {"model": trained}});
        assert_eq!(find_seed(&quantised, 0), Some(3));
        assert_eq!(find_seed(&serde_json::json!({"config": {"text": "a"}}), 0), None);
    }
}
