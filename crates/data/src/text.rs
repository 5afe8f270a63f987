//! Documents from files, and token windows cut from them.
//!
//! A window is a run of `length` token ids. Four ways to cut are offered, each the rule of somebody:
//! [`calibration_awq`] (short documents packed end to end), [`calibration_random`] (random places in
//! the joined text, as GPTQ calibrates), [`consecutive`] (the joined text from its start, for
//! evaluation) and [`packed`] (documents between the tokenizer's begin and end marks, for training).

use crate::{Error, Result, Tokenizer};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use tensor::rng::Rng;

/// Documents in the order of their file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    /// Where they came from; empty for documents made in memory.
    pub path: PathBuf,
    /// The texts.
    pub texts: Vec<String>,
}

impl Documents {
    /// Documents made in memory.
    pub fn new(texts: Vec<String>) -> Self {
        Self { path: PathBuf::new(), texts }
    }

    /// Number of documents.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The documents split at blank lines; pieces without a visible character are dropped.
    pub fn split_blank_lines(&self) -> Documents {
        let texts = self.texts.iter().flat_map(|text| split_blank_lines(text)).collect();
        Documents { path: self.path.clone(), texts }
    }

    /// The documents with a blank line between neighbours, as one text.
    pub fn joined(&self) -> String {
        self.texts.join("\n\n")
    }

    fn name(&self) -> String {
        if self.path.as_os_str().is_empty() {
            "the documents".to_string()
        } else {
            self.path.display().to_string()
        }
    }
}

fn split_blank_lines(text: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut piece: Vec<&str> = Vec::new();
    for line in text.lines().chain(std::iter::once("")) {
        if !line.trim().is_empty() {
            piece.push(line);
        } else if !piece.is_empty() {
            pieces.push(piece.join("\n"));
            piece.clear();
        }
    }
    pieces
}

/// Loads documents from one file:
/// * `.txt` (and any other ending except the two below): the whole file is one document;
/// * `.jsonl`: one JSON object per line, the document under the key `text` (blank lines are skipped);
/// * `.json`: a list of strings, or of objects with the key `text`.
///
/// # Errors
/// Names the file, and the line of a `.jsonl` file, when something is not UTF-8, not JSON or not of
/// this shape, and when the file holds no text at all.
pub fn load(path: &Path) -> Result<Documents> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let good = e.utf8_error().valid_up_to();
        let line = e.as_bytes().iter().take(good).filter(|&&b| b == b'\n').count() + 1;
        Error::line(path, line, format!("byte {good} of the file is not UTF-8 text"))
    })?;
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let texts = match ending.as_str() {
        "jsonl" => parse_jsonl(path, &text)?,
        "json" => parse_json(path, &text)?,
        _ => vec![text],
    };
    if texts.iter().all(|t| t.trim().is_empty()) {
        return Err(Error::file(path, "holds no text"));
    }
    Ok(Documents { path: path.to_path_buf(), texts })
}

fn parse_jsonl(path: &Path, text: &str) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let value: serde_json::Value = serde_json::from_str(line)
            .map_err(|e| Error::line(path, index + 1, format!("not a JSON object: {e}")))?;
        texts.push(text_of(&value).ok_or_else(|| {
            Error::line(path, index + 1, "the object has no string under the key \"text\"")
        })?);
    }
    Ok(texts)
}

fn parse_json(path: &Path, text: &str) -> Result<Vec<String>> {
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|e| Error::line(path, e.line(), e.to_string()))?;
    let list = value
        .as_array()
        .ok_or_else(|| Error::file(path, "a .json file of documents must be a list of strings"))?;
    list.iter()
        .enumerate()
        .map(|(i, item)| {
            item.as_str().map(str::to_string).or_else(|| text_of(item)).ok_or_else(|| {
                Error::file(
                    path,
                    format!("element {i} is neither a string nor an object with a \"text\""),
                )
            })
        })
        .collect()
}

fn text_of(value: &serde_json::Value) -> Option<String> {
    value.get("text").and_then(|t| t.as_str()).map(str::to_string)
}

/// Token windows of one length, end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Token ids, `[count, length]`.
    pub tokens: Vec<u32>,
    /// Tokens per window.
    pub length: usize,
}

impl Windows {
    /// Number of windows.
    pub fn count(&self) -> usize {
        self.tokens.len().checked_div(self.length).unwrap_or(0)
    }

    /// The windows in order, each of `length` token ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.tokens.chunks_exact(self.length.max(1))
    }

    /// The first `count` windows (all of them when there are fewer).
    pub fn take(mut self, count: usize) -> Windows {
        self.tokens.truncate(count.saturating_mul(self.length));
        self
    }

    /// The windows in a random order given by the generator.
    pub fn shuffled(&self, rng: &mut Rng) -> Windows {
        let mut order: Vec<usize> = (0..self.count()).collect();
        rng.shuffle(&mut order);
        let windows: Vec<&[u32]> = self.iter().collect();
        let tokens = order.iter().filter_map(|&i| windows.get(i)).flat_map(|w| w.iter().copied());
        Windows { tokens: tokens.collect(), length: self.length }
    }
}

fn check(samples: usize, length: usize) -> Result<()> {
    if samples == 0 {
        return Err(Error::Argument("at least one calibration sample is needed".into()));
    }
    check_length(length)
}

fn check_length(length: usize) -> Result<()> {
    if length == 0 {
        return Err(Error::Argument("a window of 0 tokens holds nothing: use 1 or more".into()));
    }
    Ok(())
}

/// Calibration windows by the rule of the AWQ reference (Lin et al. 2023): shuffle the documents,
/// strip each, tokenise, skip empty ones and those longer than `length` tokens, take documents until
/// `samples` are kept, join them, cut into consecutive windows of `length` and drop the tail. There
/// are therefore fewer windows than `samples`.
///
/// The order depends on `seed` only, by this crate's generator: a given seed does not select the
/// same documents as the reference, whose shuffle is another one.
///
/// # Errors
/// [`Error::TooFewTokens`] when the kept documents do not fill one window; [`Error::Argument`] for
/// zero samples or length.
pub fn calibration_awq(
    documents: &Documents,
    tokenizer: &Tokenizer,
    samples: usize,
    length: usize,
    seed: u64,
) -> Result<Windows> {
    check(samples, length)?;
    let mut order: Vec<usize> = (0..documents.len()).collect();
    Rng::stream(seed, "calibration").shuffle(&mut order);
    let (mut tokens, mut kept, mut empty, mut long) = (Vec::new(), 0usize, 0usize, 0usize);
    for text in order.iter().filter_map(|&i| documents.texts.get(i)) {
        let text = text.trim();
        let ids = if text.is_empty() { Vec::new() } else { tokenizer.encode(text, true)? };
        if ids.is_empty() {
            empty += 1;
            continue;
        }
        if ids.len() > length {
            long += 1;
            continue;
        }
        tokens.extend(ids);
        kept += 1;
        if kept == samples {
            break;
        }
    }
    if tokens.len() < length {
        return Err(Error::TooFewTokens {
            needed: length,
            found: tokens.len(),
            purpose: format!("one calibration window from {}", documents.name()),
            hint: format!(
                " ({kept} documents were kept, {long} skipped for being longer than {length} \
                 tokens, {empty} for being empty)"
            ),
        });
    }
    let whole = tokens.len() / length * length;
    tokens.truncate(whole);
    Ok(Windows { tokens, length })
}

/// Calibration windows by the rule of GPTQ (Frantar et al. 2022): the documents are joined by blank
/// lines and tokenised as one text; every window starts at a random token of it.
///
/// # Errors
/// [`Error::TooFewTokens`] when the text does not hold more than `length` tokens (the rule draws the
/// start from `0..tokens - length`); [`Error::Argument`] for zero samples or length.
pub fn calibration_random(
    documents: &Documents,
    tokenizer: &Tokenizer,
    samples: usize,
    length: usize,
    seed: u64,
) -> Result<Windows> {
    check(samples, length)?;
    let all = joined_tokens(documents, tokenizer)?;
    if all.len() <= length {
        return Err(Error::TooFewTokens {
            needed: length + 1,
            found: all.len(),
            purpose: format!("random windows of {length} tokens from {}", documents.name()),
            hint: String::new(),
        });
    }
    let mut rng = Rng::stream(seed, "calibration");
    let mut tokens = Vec::with_capacity(samples.saturating_mul(length).min(1 << 28));
    for _ in 0..samples {
        let start = rng.below(all.len() - length);
        tokens.extend_from_slice(all.get(start..start + length).unwrap_or_default());
    }
    Ok(Windows { tokens, length })
}

/// The token ids of all documents joined by blank lines, with the marks that the tokenizer puts
/// around a text (one begin mark in front, if any).
pub fn joined_tokens(documents: &Documents, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    tokenizer.encode(&documents.joined(), true)
}

/// Consecutive windows of the joined text from its start; the tail that fills no window is dropped.
///
/// # Errors
/// [`Error::TooFewTokens`] when there is not one whole window.
pub fn consecutive(documents: &Documents, tokenizer: &Tokenizer, length: usize) -> Result<Windows> {
    check_length(length)?;
    cut(joined_tokens(documents, tokenizer)?, length, documents)
}

/// The documents one after the other, each tokenised on its own with the tokenizer's marks and
/// followed by the end mark (when the tokenizer has one and has not put it there itself).
pub fn document_tokens(documents: &Documents, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let encoded: Vec<Vec<u32>> = documents
        .texts
        .par_iter()
        .map(|text| {
            let mut ids = tokenizer.encode(text, true)?;
            if let Some(eos) = tokenizer.eos()
                && ids.last() != Some(&eos)
            {
                ids.push(eos);
            }
            Ok(ids)
        })
        .collect::<Result<_>>()?;
    Ok(encoded.concat())
}

/// Windows over [`document_tokens`]: what a network is trained on.
///
/// # Errors
/// [`Error::TooFewTokens`] when there is not one whole window.
pub fn packed(documents: &Documents, tokenizer: &Tokenizer, length: usize) -> Result<Windows> {
    check_length(length)?;
    cut(document_tokens(documents, tokenizer)?, length, documents)
}

fn cut(mut tokens: Vec<u32>, length: usize, documents: &Documents) -> Result<Windows> {
    let whole = tokens.len() / length * length;
    if whole == 0 {
        return Err(Error::TooFewTokens {
            needed: length,
            found: tokens.len(),
            purpose: format!("one window from {}", documents.name()),
            hint: String::new(),
        });
    }
    tokens.truncate(whole);
    Ok(Windows { tokens, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token per letter a to z, and per other byte-level character that the tests use.
    fn letters() -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        let tokens = ('a'..='z').chain(['Ġ', 'Ċ']).enumerate();
        let vocabulary: Vec<String> = tokens.map(|(i, c)| format!("\"{c}\": {i}")).collect();
        std::fs::write(dir.path().join("vocab.json"), format!("{{{}}}", vocabulary.join(",")))
            .unwrap();
        std::fs::write(dir.path().join("merges.txt"), "").unwrap();
        Tokenizer::from_dir(dir.path()).unwrap()
    }

    fn documents(texts: &[&str]) -> Documents {
        Documents::new(texts.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn files_load_by_their_ending() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            load(&path)
        };
        assert_eq!(
            file("a.txt", b"one\n\n\ntwo\nthree\n").unwrap().texts,
            ["one\n\n\ntwo\nthree\n"]
        );
        let split = file("a.txt", b"one\n \n\ntwo\nthree\n").unwrap().split_blank_lines();
        assert_eq!(split.texts, ["one", "two\nthree"]);
        let lines = file("a.jsonl", b"{\"text\": \"x\", \"n\": 1}\n\n{\"text\": \"y\"}").unwrap();
        assert_eq!(lines.texts, ["x", "y"]);
        assert_eq!(file("a.json", br#"["x", {"text": "y"}]"#).unwrap().texts, ["x", "y"]);
        let error = |name, bytes: &[u8]| file(name, bytes).unwrap_err().to_string();
        assert!(error("b.jsonl", b"{\"text\": \"x\"}\n{\"texts\": 1}").contains("b.jsonl:2: "));
        assert!(
            error("b.jsonl", b"{\"text\": \"x\"}\nword").contains("b.jsonl:2: not a JSON object")
        );
        assert!(error("b.json", b"[\"a\",\n3]").contains("element 1"));
        assert!(error("b.json", b"{}").contains("list of strings"));
        assert!(error("b.json", b"[\"a\",\n").contains("b.json:2"));
        assert!(error("b.txt", b"a\nb\xff").contains("b.txt:2: byte 3"));
        assert!(error("b.txt", b" \n").contains("holds no text"));
        assert!(load(&dir.path().join("no.txt")).unwrap_err().to_string().contains("no.txt"));
    }

    #[test]
    fn awq_windows_follow_the_rule() {
        let tokenizer = letters();
        // Kept: the four of at most 3 letters; the empty and the long one are skipped.
        let docs = documents(&[" abc ", "", "defghij", "de", "fgh", "  ", "i"]);
        let windows = calibration_awq(&docs, &tokenizer, 10, 3, 5).unwrap();
        assert_eq!((windows.count(), windows.tokens.len()), (3, 9));
        let mut order: Vec<usize> = (0..7).collect();
        Rng::stream(5, "calibration").shuffle(&mut order);
        let kept = |i: &usize| [0, 3, 4, 6].contains(i);
        let text: String =
            order.iter().filter(|i| kept(i)).map(|&i| docs.texts[i].trim()).collect();
        assert_eq!(windows.tokens, tokenizer.encode(&text[..9], false).unwrap());
        assert_eq!(windows, calibration_awq(&docs, &tokenizer, 10, 3, 5).unwrap());
        // Two documents kept: at most 6 tokens.
        assert!(calibration_awq(&docs, &tokenizer, 2, 3, 5).unwrap().count() <= 2);
        let error = calibration_awq(&docs, &tokenizer, 10, 20, 5).unwrap_err().to_string();
        assert!(error.contains("only 16 ") && error.contains("5 documents were kept"), "{error}");
        let error = calibration_awq(&docs, &tokenizer, 10, 1, 5).unwrap();
        assert_eq!(error.tokens, [8]);
        assert!(calibration_awq(&docs, &tokenizer, 0, 3, 5).is_err());
    }

    #[test]
    fn random_windows_lie_in_the_joined_text() {
        let tokenizer = letters();
        let docs = documents(&["abcdef", "ghijkl"]);
        let all = tokenizer.encode("abcdef\n\nghijkl", false).unwrap();
        let windows = calibration_random(&docs, &tokenizer, 50, 5, 1).unwrap();
        assert_eq!(windows.count(), 50);
        assert!(windows.iter().all(|w| all.windows(5).any(|x| x == w)));
        let starts: std::collections::HashSet<&[u32]> = windows.iter().collect();
        assert!(starts.len() > 5);
        assert_ne!(windows, calibration_random(&docs, &tokenizer, 50, 5, 2).unwrap());
        assert!(calibration_random(&docs, &tokenizer, 1, 14, 1).is_err());
        assert_eq!(calibration_random(&docs, &tokenizer, 1, 13, 1).unwrap().tokens, all[..13]);
    }

    #[test]
    fn consecutive_and_packed_windows_drop_the_tail() {
        let tokenizer = letters();
        let docs = documents(&["abc", "de"]);
        let windows = consecutive(&docs, &tokenizer, 3).unwrap();
        assert_eq!(windows.tokens, tokenizer.encode("abc\n\nd", false).unwrap());
        assert_eq!(packed(&docs, &tokenizer, 2).unwrap().tokens, [0, 1, 2, 3]);
        let mut rng = Rng::new(1);
        let mut shuffled = windows.shuffled(&mut rng).tokens;
        shuffled.sort_unstable();
        let mut sorted = windows.tokens.clone();
        sorted.sort_unstable();
        assert_eq!(shuffled, sorted);
        assert_eq!(windows.take(1).tokens, [0, 1, 2]);
        let error = consecutive(&docs, &tokenizer, 8).unwrap_err().to_string();
        assert!(error.contains("8 tokens are needed") && error.contains("only 7"), "{error}");
    }
}
