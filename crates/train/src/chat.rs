//! Dialogues to tokens: a plain template, and which tokens are learnt.
//!
//! `<|user|>question<|end|><|assistant|>answer<|end|>`: the loss counts the answer and the mark
//! that ends it, never the question or the marks that open a turn. Text inside a message cannot
//! forge a mark when the marks are special tokens, because messages are tokenised on their own.

use crate::error::{Error, Result};
use data::Tokenizer;
pub use data::almanac::Message;
use serde::Deserialize;
use std::path::Path;

/// Ends every message.
pub const END: &str = "<|end|>";

#[derive(Deserialize)]
struct Line {
    messages: Vec<Message>,
}

/// Tokens of a dialogue and whether each is a target.
pub fn render(messages: &[Message], tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<bool>)> {
    let mut tokens = Vec::new();
    let mut counted = Vec::new();
    let mut add = |ids: &[u32], counts: bool| {
        tokens.extend_from_slice(ids);
        counted.resize(tokens.len(), counts);
    };
    if let Some(bos) = tokenizer.bos() {
        add(&[bos], false);
    }
    let mark = |text: &str| -> Result<Vec<u32>> {
        Ok(match tokenizer.token(text) {
            Some(id) => vec![id],
            None => tokenizer.encode(text, false)?,
        })
    };
    for message in messages {
        let answer = message.role == "assistant";
        add(&mark(&format!("<|{}|>", message.role))?, false);
        add(&tokenizer.encode(&message.content, false)?, answer);
        add(&mark(END)?, answer);
    }
    Ok((tokens, counted))
}

/// Reads JSONL of `{"messages": [{"role": ..., "content": ...}, ...]}`.
pub fn read(path: &Path) -> Result<Vec<Vec<Message>>> {
    let text = std::fs::read_to_string(path).map_err(crate::error::io(path))?;
    let refuse = |line: usize, reason: String| Error::Document {
        path: path.to_path_buf(),
        line: line + 1,
        reason,
    };
    let mut dialogues = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let parsed: Line = serde_json::from_str(line).map_err(|e| refuse(number, e.to_string()))?;
        for message in &parsed.messages {
            if !["system", "user", "assistant"].contains(&message.role.as_str()) {
                let role = &message.role;
                let reason = format!("role `{role}`; known are system, user, assistant");
                return Err(refuse(number, reason));
            }
        }
        if !parsed.messages.iter().any(|m| m.role == "assistant") {
            return Err(refuse(number, "no message of the assistant, so nothing to learn".into()));
        }
        dialogues.push(parsed.messages);
    }
    Ok(dialogues)
}
