//! How text reaches a terminal: colours or not, and how wide.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by `--no-color`; read by every later [`Style::detect`].
static NEVER_COLOR: AtomicBool = AtomicBool::new(false);

/// How a terminal rendering looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Whether to use colours and bold.
    pub color: bool,
    /// The widest line in characters; `usize::MAX` for no limit.
    pub width: usize,
}

impl Style {
    /// The style of standard output: colours only on a terminal, when `NO_COLOR` is unset or empty
    /// and `TERM` is not `dumb`; the terminal's width, or no limit where there is no terminal.
    pub fn detect() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let width = match terminal_size::terminal_size() {
            Some((terminal_size::Width(w), _)) if terminal => usize::from(w).max(20),
            _ => usize::MAX,
        };
        Self { color: terminal && Self::colors_allowed(), width }
    }

    /// No colours, no limit.
    pub fn plain() -> Self {
        Self { color: false, width: usize::MAX }
    }

    /// Turns colours off for the rest of the process.
    pub fn disable_color() {
        NEVER_COLOR.store(true, Ordering::Relaxed);
    }

    /// Whether `--no-color`, `NO_COLOR` and `TERM` permit colours.
    pub fn colors_allowed() -> bool {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        !NEVER_COLOR.load(Ordering::Relaxed) && !set("NO_COLOR") && !dumb
    }

    pub(crate) fn paint(self, code: &str, text: &str) -> String {
        if self.color && !text.is_empty() {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_string()
        }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }
}
