//! Why a command did not end well, and how that is told.

use std::error::Error;
use std::io::{IsTerminal, Write};

/// Why a command did not end well.
#[derive(Debug)]
pub enum Failure {
    /// A stated claim or threshold does not hold: exit code 1.
    DoesNotHold(String),
    /// Anything that kept the command from doing its work: exit code 2.
    Error(String),
    /// Standard output was closed by its reader: exit code 0.
    ClosedPipe,
}

/// Result of a command.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// An error with this message.
    pub fn error(message: impl Into<String>) -> Self {
        Self::Error(message.into())
    }
}

// Every error of the crates below, and of input and output.
impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let boxed: Box<dyn Error + Send + Sync> = error.into();
        if let Some(io) = boxed.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::BrokenPipe
        {
            return Self::ClosedPipe;
        }
        let mut message = boxed.to_string();
        let mut source = boxed.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        Self::Error(with_suggestion(message))
    }
}

/// Adds the nearest known name to a complaint of a file parser about an unknown key or value
/// (``unknown field `bts`, expected one of `bits`, `group_size` ``).
fn with_suggestion(message: String) -> String {
    let Some((_, rest)) =
        message.split_once("unknown field `").or_else(|| message.split_once("unknown variant `"))
    else {
        return message;
    };
    if message.contains("did you mean") {
        return message;
    }
    let mut quoted = rest.split('`').step_by(2);
    let Some(wrong) = quoted.next() else { return message };
    let known: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
    match method::nearest(wrong, known) {
        Some(name) => format!("{message}; did you mean `{name}`?"),
        None => message,
    }
}

/// Prints `label: message` on standard error.
pub fn print(label: &str, message: &str) {
    let mut stderr = std::io::stderr();
    let color = stderr.is_terminal() && report::Style::colors_allowed();
    let label = if color { format!("\u{1b}[1;31m{label}:\u{1b}[0m") } else { format!("{label}:") };
    // Messages quote names from files; a control character must not reach the terminal.
    let message: String = message
        .chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c })
        .collect();
    let _ = writeln!(stderr, "{label} {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_pipe_is_not_an_error() {
        let io = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(matches!(Failure::from(io), Failure::ClosedPipe));
        let io = std::io::Error::other("disk on fire");
        assert!(matches!(Failure::from(io), Failure::Error(m) if m.contains("disk on fire")));
    }

    #[test]
    fn unknown_keys_get_the_nearest_name() {
        let text = "x.yaml: unknown field `bts`, expected one of `bits`, `group_size` at line 2";
        assert!(with_suggestion(text.into()).ends_with("did you mean `bits`?"));
        let text = "unknown field `zzz`, expected `bits` or `samples`";
        assert_eq!(with_suggestion(text.into()), text);
        assert_eq!(with_suggestion("plain".into()), "plain");
    }
}
