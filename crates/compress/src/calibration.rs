//! From `--calibration` to token windows.

use crate::block::Calibration;
use crate::options::{CalibrationOptions, Method, Sampling};
use crate::{Error, Result};
use data::{Tokenizer, text};
use std::path::Path;

/// Draws the calibration windows of a job. `fallback` is the text that is used when no file is
/// given. A JSON list of token id lists is taken as it is, without a tokenizer.
pub fn windows(
    options: &CalibrationOptions,
    method: Method,
    tokenizer: impl FnOnce() -> Result<Tokenizer>,
    fallback: impl FnOnce() -> Result<text::Documents>,
) -> Result<Calibration> {
    if let Some(file) = &options.file
        && let Some(ids) = token_lists(file)?
    {
        return from_lists(file, ids, options);
    }
    let documents = match &options.file {
        Some(file) => text::load(file)?,
        None => fallback()?,
    };
    let tokenizer = tokenizer()?;
    let (samples, length, seed) = (options.samples, options.sequence_length, options.seed);
    let random = || text::calibration_random(&documents, &tokenizer, samples, length, seed);
    let by_documents = || text::calibration_awq(&documents, &tokenizer, samples, length, seed);
    let windows = match options.sampling {
        Sampling::Documents => by_documents()?,
        Sampling::Auto if matches!(method, Method::Awq | Method::Adadim) => match by_documents() {
            // Few or long documents: the reference's rule keeps none of them.
            Err(error @ data::Error::TooFewTokens { .. }) => {
                report::warn(&format!("{error}; taking random windows of the joined text instead"));
                random()?
            }
            other => other?,
        },
        _ => random()?,
    };
    Calibration::new(windows.tokens, windows.length)
}

/// The file's content if it is a JSON list of lists of numbers.
fn token_lists(file: &Path) -> Result<Option<Vec<Vec<u32>>>> {
    if file.extension().is_none_or(|e| e != "json") {
        return Ok(None);
    }
    let bytes = std::fs::read(file)
        .map_err(|source| Error::Io { path: file.display().to_string(), source })?;
    Ok(serde_json::from_slice(&bytes).ok())
}

fn from_lists(
    file: &Path,
    ids: Vec<Vec<u32>>,
    options: &CalibrationOptions,
) -> Result<Calibration> {
    let length = options.sequence_length;
    let mut tokens = Vec::new();
    for (index, window) in ids.iter().take(options.samples).enumerate() {
        let window = window.get(..length).ok_or_else(|| {
            Error::Options(format!(
                "{}: window {index} holds {} token ids, fewer than --sequence-length {length}",
                file.display(),
                window.len()
            ))
        })?;
        tokens.extend_from_slice(window);
    }
    Calibration::new(tokens, length)
}
