//! Progress on standard error: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{human, messages};

/// How often a plain line may appear where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Shorter work is not worth a last line.
const WORTH_A_LINE: Duration = Duration::from_secs(1);

/// All bars of the process, so that messages can be printed above them.
static BARS: OnceLock<MultiProgress> = OnceLock::new();

/// A progress display. Cheap to clone; clones show the same bar. Silent when quiet.
#[derive(Clone)]
pub struct Progress {
    inner: Arc<Inner>,
}

struct Inner {
    label: String,
    unit: String,
    total: u64,
    done: AtomicU64,
    started: Instant,
    show: Show,
}

enum Show {
    Nothing,
    Bar(ProgressBar),
    Plain(Mutex<Plain>),
}

struct Plain {
    last: Option<Instant>,
    message: String,
    finished: bool,
}

impl Progress {
    /// A display of `total` units of work (`unit` is a plural, `"blocks"`; `"bytes"` are shown in
    /// human units; 0 for an unknown total).
    pub fn new(label: &str, total: u64, unit: &str) -> Self {
        if messages::verbosity() < 0 {
            return Self::hidden();
        }
        let show = if std::io::stderr().is_terminal() {
            Show::Bar(bar(label, total, unit))
        } else {
            Show::Plain(Mutex::new(Plain { last: None, message: String::new(), finished: false }))
        };
        Self::with(label, total, unit, show)
    }

    /// A display that shows nothing.
    pub fn hidden() -> Self {
        Self::with("", 0, "", Show::Nothing)
    }

    fn with(label: &str, total: u64, unit: &str, show: Show) -> Self {
        Self {
            inner: Arc::new(Inner {
                label: label.to_string(),
                unit: unit.to_string(),
                total,
                done: AtomicU64::new(0),
                started: Instant::now(),
                show,
            }),
        }
    }

    /// Adds `amount` to what is done.
    pub fn inc(&self, amount: u64) {
        let done = self.inner.done.fetch_add(amount, Ordering::Relaxed).saturating_add(amount);
        self.show(done);
    }

    /// Sets what is done.
    pub fn set(&self, done: u64) {
        self.inner.done.store(done, Ordering::Relaxed);
        self.show(done);
    }

    /// What is done so far.
    pub fn position(&self) -> u64 {
        self.inner.done.load(Ordering::Relaxed)
    }

    /// Sets the words beside the bar.
    pub fn message(&self, text: &str) {
        match &self.inner.show {
            Show::Nothing => {}
            Show::Bar(bar) => bar.set_message(text.to_string()),
            Show::Plain(plain) => {
                plain.lock().unwrap_or_else(PoisonError::into_inner).message = text.to_string();
            }
        }
    }

    /// Ends the display: the bar goes away and one line says what was done and how long it took
    /// (not for work of less than a second, unless details are wanted).
    pub fn finish(&self) {
        match &self.inner.show {
            Show::Nothing => return,
            Show::Bar(bar) if bar.is_finished() => return,
            Show::Bar(bar) => bar.finish_and_clear(),
            Show::Plain(plain) => {
                let mut plain = plain.lock().unwrap_or_else(PoisonError::into_inner);
                if std::mem::replace(&mut plain.finished, true) {
                    return;
                }
            }
        }
        let inner = &self.inner;
        if inner.started.elapsed() < WORTH_A_LINE && messages::verbosity() < 1 {
            return;
        }
        messages::line(&format!(
            "{}: {} in {}",
            inner.label,
            inner.amount(self.position()),
            human::seconds(inner.started.elapsed().as_secs_f64())
        ));
    }

    fn show(&self, done: u64) {
        match &self.inner.show {
            Show::Nothing => {}
            Show::Bar(bar) => bar.set_position(done),
            Show::Plain(plain) => {
                let mut plain = plain.lock().unwrap_or_else(PoisonError::into_inner);
                // The first line comes after the first interval: short work stays silent until
                // its last line.
                let since = plain.last.unwrap_or(self.inner.started).elapsed();
                if since < PLAIN_INTERVAL || plain.finished {
                    return;
                }
                plain.last = Some(Instant::now());
                let text = self.inner.plain_line(done, &plain.message);
                drop(plain);
                messages::line(&text);
            }
        }
    }
}

impl Inner {
    fn amount(&self, done: u64) -> String {
        if self.unit == "bytes" {
            human::bytes(done)
        } else if done < 100_000 {
            format!("{done} {}", self.unit)
        } else {
            format!("{} {}", human::count(done), self.unit)
        }
    }

    fn plain_line(&self, done: u64, message: &str) -> String {
        let mut text = format!("{}: {}", self.label, self.amount(done));
        if self.total > 0 {
            let share = done as f64 / self.total as f64;
            text = format!(
                "{}: {} of {} ({:.0} %)",
                self.label,
                self.amount(done),
                self.amount(self.total),
                share * 100.0
            );
            let elapsed = self.started.elapsed().as_secs_f64();
            if share > 0.0 && share < 1.0 {
                text.push_str(&format!(
                    ", {} left",
                    human::seconds((elapsed / share - elapsed).round())
                ));
            }
        }
        if !message.is_empty() {
            text.push_str(&format!(", {message}"));
        }
        text
    }
}

fn bar(label: &str, total: u64, unit: &str) -> ProgressBar {
    let bars = BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
    let bar = bars.add(if total > 0 { ProgressBar::new(total) } else { ProgressBar::no_length() });
    let amount = match (unit, total) {
        ("bytes", 0) => "{binary_bytes}",
        ("bytes", _) => "{binary_bytes}/{binary_total_bytes}",
        (_, 0) => "{human_pos}",
        _ => "{human_pos}/{human_len}",
    };
    let unit = if unit == "bytes" { String::new() } else { format!(" {}", braces(unit)) };
    let template = if total > 0 {
        format!(
            "{} {{bar:24}} {amount}{unit}  {{elapsed}} (eta {{eta}})  {{wide_msg}}",
            braces(label)
        )
    } else {
        format!("{} {{spinner}} {amount}{unit}  {{elapsed}}  {{wide_msg}}", braces(label))
    };
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

/// A label is text, not a template.
fn braces(text: &str) -> String {
    text.replace('{', "{{").replace('}', "}}")
}

/// Runs `f` with the bars out of the way.
pub(crate) fn suspend<R>(f: impl FnOnce() -> R) -> R {
    match BARS.get() {
        Some(bars) => bars.suspend(f),
        None => f(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_their_count() {
        let progress = Progress::hidden();
        let clone = progress.clone();
        clone.inc(3);
        progress.inc(4);
        assert_eq!(clone.position(), 7);
        progress.set(1);
        assert_eq!(clone.position(), 1);
        progress.finish();
        progress.finish();
    }

    #[test]
    fn a_plain_line_says_how_far_it_is() {
        let progress = Progress::with("Quantising", 8, "blocks", Show::Nothing);
        assert_eq!(progress.inner.plain_line(8, ""), "Quantising: 8 blocks of 8 blocks (100 %)");
        let unknown = Progress::with("Reading", 0, "bytes", Show::Nothing);
        assert_eq!(unknown.inner.plain_line(2048, "a.gguf"), "Reading: 2.00 KiB, a.gguf");
    }
}
