//! Standard output: text, tables, JSON. Every write may fail, and a closed pipe ends the command.

use std::io::{BufWriter, StdoutLock, Write};

use serde_json::Value;

use crate::failure::Result;

/// Standard output, buffered.
pub struct Output {
    writer: BufWriter<StdoutLock<'static>>,
}

impl Output {
    /// Takes standard output for the rest of the command.
    pub fn new() -> Self {
        Self { writer: BufWriter::new(std::io::stdout().lock()) }
    }

    /// Prints text as it is.
    pub fn text(&mut self, text: &str) -> Result<()> {
        self.writer.write_all(text.as_bytes())?;
        Ok(())
    }

    /// Prints a piece of a stream, visible at once.
    pub fn now(&mut self, text: &str) -> Result<()> {
        self.text(text)?;
        self.finish()
    }

    /// Prints JSON, indented, with a line break at the end.
    pub fn json(&mut self, value: &Value) -> Result<()> {
        serde_json::to_writer_pretty(&mut self.writer, value).map_err(std::io::Error::from)?;
        self.text("\n")
    }

    /// Flushes: must be called at the end, because a failure while dropping would go unseen.
    pub fn finish(&mut self) -> Result<()> {
        self.writer.flush()?;
        Ok(())
    }
}

/// Writes JSON to a file, whole or not at all.
pub fn write_json(path: &std::path::Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    store::write_atomic(path, &text)?;
    Ok(())
}
