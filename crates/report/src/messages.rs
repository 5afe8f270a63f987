//! Messages to people on standard error, above any progress bar.

use std::io::Write;
use std::sync::atomic::{AtomicI8, Ordering};

use crate::progress;

static VERBOSITY: AtomicI8 = AtomicI8::new(0);

/// Sets how much is said: -1 quiet (warnings only), 0 normal, 1 and more detailed.
pub fn set_verbosity(level: i8) {
    VERBOSITY.store(level, Ordering::Relaxed);
}

/// How much is said; see [`set_verbosity`].
pub fn verbosity() -> i8 {
    VERBOSITY.load(Ordering::Relaxed)
}

/// Prints a line unless quiet.
pub fn note(text: &str) {
    if verbosity() >= 0 {
        line(text);
    }
}

/// Prints a line when the user asked for details (`-v`).
pub fn detail(text: &str) {
    if verbosity() >= 1 {
        line(text);
    }
}

/// Prints `warning: ...`, also when quiet.
pub fn warn(text: &str) {
    line(&format!("warning: {text}"));
}

/// A line on standard error. A closed standard error is nobody's error.
pub(crate) fn line(text: &str) {
    progress::suspend(|| {
        let _ = writeln!(std::io::stderr(), "{text}");
    });
}
