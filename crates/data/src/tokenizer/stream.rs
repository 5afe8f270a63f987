//! Incremental decoding: text as soon as its characters are whole.

use super::Tokenizer;
use crate::Result;

/// Longest run of tokens that may wait for the rest of a character (four bytes suffice in valid
/// text); after that the text is given out as the decoder has it.
const LONGEST_WAIT: usize = 8;

/// Decodes tokens one by one; text comes out only when no character is cut in two. The pieces joined
/// are the text that decoding all tokens at once would give.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    // Tokens of the last piece given out: the next piece is decoded behind them, because decoders
    // treat the first token of a text differently (its leading space).
    context: Vec<u32>,
    waiting: Vec<u32>,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, context: Vec::new(), waiting: Vec::new() }
    }

    /// Starts behind the tokens of a prompt, which are not given out themselves. Without this the
    /// leading space of the first token may be lost.
    pub fn after(mut self, prompt: &[u32]) -> Self {
        self.context = prompt.iter().copied().skip(prompt.len().saturating_sub(16)).collect();
        self
    }

    /// Takes one token; returns the text that is complete now, if any.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.waiting.push(id);
        self.give(self.waiting.len() >= LONGEST_WAIT)
    }

    /// The text of the tokens that still wait (bytes that never became a character show as U+FFFD).
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn finish(&mut self) -> Result<Option<String>> {
        self.give(true)
    }

    fn give(&mut self, force: bool) -> Result<Option<String>> {
        if self.waiting.is_empty() {
            return Ok(None);
        }
        let before = self.tokenizer.decode(&self.context, self.skip_special)?;
        let together = [self.context.as_slice(), self.waiting.as_slice()].concat();
        let text = self.tokenizer.decode(&together, self.skip_special)?;
        let new = match text.strip_prefix(before.as_str()) {
            Some(new) => new.to_string(),
            // Some decoders spoil a whole run of bytes while its last character is incomplete.
            None if !force => return Ok(None),
            None => self.tokenizer.decode(&self.waiting, self.skip_special)?,
        };
        if new.ends_with('\u{FFFD}') && !force {
            return Ok(None);
        }
        if new.is_empty() {
            // Nothing visible (a special token): it still counts as context.
            self.context.append(&mut self.waiting);
            let surplus = self.context.len().saturating_sub(16);
            self.context.drain(..surplus);
            return Ok(None);
        }
        // When the context was all invisible, its tokens decide whether a leading space is kept.
        self.context = std::mem::take(&mut self.waiting);
        Ok(Some(new))
    }
}
