//! Messages on stderr while a program works: single lines, and the progress of long work with its
//! rate and the time left. A terminal gets a bar; a log file gets a plain line every ten seconds,
//! so that it stays readable.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::printable::{obeys_escapes, to_printable};

static QUIET: AtomicBool = AtomicBool::new(false);
/// The bar on the terminal, which makes room for other lines.
static SHOWN_BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Turns off (or on again) everything that goes through [`log`] and [`Progress`].
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Prints one line on stderr, unless quiet.
pub fn log(line: impl AsRef<str>) {
    if QUIET.load(Ordering::Relaxed) {
        return;
    }
    let line = to_printable(&format!("{}\n", line.as_ref()));
    let bar = SHOWN_BAR.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match bar.filter(|bar| !bar.is_finished()) {
        Some(bar) => bar.suspend(|| write_stderr(&line)),
        None => write_stderr(&line),
    }
}

/// Prints the message of an error on stderr, even when quiet.
pub fn log_error(message: impl Display) {
    write_stderr(&to_printable(&format!("error: {message}\n")));
}

/// Writes text to stderr as it is, even when quiet. A closed terminal or pipe does not end the work.
pub fn write_stderr(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// A number with its noun in the right form: `1 step`, `2 steps`, `0 queries`, `3 batches`.
pub fn count<N: Display + PartialEq + From<u8>>(number: N, noun: &str) -> String {
    if number == N::from(1) {
        return format!("{number} {noun}");
    }
    let consonant_y = noun.strip_suffix('y').filter(|stem| !stem.ends_with(['a', 'e', 'i', 'o', 'u']));
    match consonant_y {
        Some(stem) => format!("{number} {stem}ies"),
        None if noun != "epoch" && ["s", "x", "ch", "sh"].iter().any(|end| noun.ends_with(end)) => {
            format!("{number} {noun}es")
        }
        None => format!("{number} {noun}s"),
    }
}

/// Progress of one long task.
pub struct Progress {
    label: String,
    total: u64,
    done: u64,
    /// Units done by an earlier run. They do not count towards the rate.
    done_before: u64,
    started: Instant,
    last_line: Instant,
    message: String,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts at `done` of `total` units; `done` is above 0 where a run resumes.
    pub fn new(label: &str, done: u64, total: u64) -> Self {
        let bar = (obeys_escapes(&std::io::stderr()) && !QUIET.load(Ordering::Relaxed)).then(|| {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len}{msg}");
            let bar = ProgressBar::new(total).with_prefix(label.to_owned()).with_position(done);
            bar.set_style(style.expect("the template is valid"));
            *SHOWN_BAR.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
            bar
        });
        let now = Instant::now();
        Progress {
            label: label.to_owned(),
            total,
            done,
            done_before: done,
            started: now,
            last_line: now,
            message: String::new(),
            bar,
        }
    }

    /// Sets the text shown after the numbers, such as a loss.
    pub fn set_message(&mut self, message: impl Into<String>) {
        self.message = message.into();
    }

    /// Counts `units` more as done. The last line is that of [`Self::finish`].
    pub fn advance(&mut self, units: u64) {
        self.done += units;
        if let Some(bar) = &self.bar {
            bar.set_message(self.details(self.started.elapsed()));
            bar.set_position(self.done);
        } else if self.done < self.total && self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            log(self.line(self.started.elapsed()));
        }
    }

    /// Ends the bar, or prints the last line.
    pub fn finish(self) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(self.details(self.started.elapsed()));
                bar.finish();
            }
            None => log(self.line(self.started.elapsed())),
        }
    }

    fn line(&self, elapsed: Duration) -> String {
        format!("{} {}/{}{}", self.label, self.done, self.total, self.details(elapsed))
    }

    /// The text after the count: `, 14.2/s, 5 s left, loss 1.3`.
    fn details(&self, elapsed: Duration) -> String {
        let (seconds, units) = (elapsed.as_secs_f64().max(1e-9), self.done - self.done_before);
        let mut parts = Vec::new();
        if units > 0 {
            let per_second = units as f64 / seconds;
            parts.push(pace(per_second));
            parts.push(match self.total.saturating_sub(self.done) {
                0 => format!("{} in all", duration(seconds)),
                left => format!("{} left", duration(left as f64 / per_second)),
            });
        } else if self.done >= self.total {
            parts.push("already complete".to_owned());
        }
        if !self.message.is_empty() {
            parts.push(self.message.clone());
        }
        parts.iter().map(|part| format!(", {part}")).collect()
    }
}

/// Units per second, or seconds per unit if a unit takes longer than one second.
fn pace(per_second: f64) -> String {
    match per_second {
        99.95.. => format!("{per_second:.0}/s"),
        0.95.. => format!("{per_second:.1}/s"),
        0.1.. => format!("{:.1} s each", 1.0 / per_second),
        _ => format!("{:.0} s each", 1.0 / per_second),
    }
}

/// Formats a time in the unit that a person would choose.
fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round();
    match seconds {
        ..90.0 => format!("{seconds:.0} s"),
        ..5400.0 => format!("{minutes} min"),
        _ => format!("{} h {} min", (minutes / 60.0).floor(), minutes % 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_done_total_rate_and_time_left() {
        let mut progress = Progress::new("collect", 10, 150);
        progress.bar = None;
        progress.done = 81;
        assert_eq!(progress.line(Duration::from_secs(5)), "collect 81/150, 14.2/s, 5 s left");
        progress.set_message("loss 1.3");
        assert_eq!(progress.line(Duration::from_secs(2698)), "collect 81/150, 38 s each, 44 min left, loss 1.3");
        progress.done = 150;
        assert_eq!(progress.line(Duration::from_secs(7000)), "collect 150/150, 50 s each, 1 h 57 min in all, loss 1.3");
    }

    #[test]
    fn no_rate_is_shown_if_nothing_was_done() {
        assert_eq!(Progress::new("collect", 0, 60).line(Duration::ZERO), "collect 0/60");
        assert_eq!(Progress::new("collect", 60, 60).line(Duration::ZERO), "collect 60/60, already complete");
    }

    #[test]
    fn nouns_agree_with_their_numbers() {
        assert_eq!(count(1, "step"), "1 step");
        assert_eq!(count(0usize, "step"), "0 steps");
        assert_eq!(count(2u64, "query"), "2 queries");
        assert_eq!((count(3, "batch"), count(4, "key")), ("3 batches".to_owned(), "4 keys".to_owned()));
        assert_eq!(count(2, "epoch"), "2 epochs");
    }
}
