//! Progress on stderr with rate and time left: a bar in a terminal, a plain line every ten seconds elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

static QUIET: AtomicBool = AtomicBool::new(false);
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows no progress from here on.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Says one line on stderr, unless quiet.
pub fn say(line: impl AsRef<str>) {
    if !QUIET.load(Ordering::Relaxed) {
        show(&format!("{}\n", line.as_ref()));
    }
}

/// Puts text on stderr as it is. A terminal or a pipe that is gone does not end the work.
pub fn show(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Progress of one piece of work.
pub struct Progress {
    label: String,
    total: u64,
    done: u64,
    start_at: u64,
    started: Instant,
    last_line: Instant,
    message: String,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts at `done` of `total` units; what a resumed run had done before does not count in the rate.
    pub fn new(label: &str, done: u64, total: u64) -> Self {
        let bar = (std::io::stderr().is_terminal() && !QUIET.load(Ordering::Relaxed)).then(|| {
            let bar = ProgressBar::new(total).with_prefix(label.to_owned()).with_position(done);
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {per_sec} left {eta} {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        Progress {
            label: label.to_owned(),
            total,
            done,
            start_at: done,
            started: now,
            last_line: now,
            message: String::new(),
            bar,
        }
    }

    /// Sets what stands beside the numbers: a loss, a rate of tokens.
    pub fn message(&mut self, message: impl Into<String>) {
        self.message = message.into();
        if let Some(bar) = &self.bar {
            bar.set_message(self.message.clone());
        }
    }

    /// Counts `units` more as done.
    pub fn advance(&mut self, units: u64) {
        self.done += units;
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            say(self.line());
        }
    }

    /// Ends the bar, or says the last line.
    pub fn finish(self) {
        match &self.bar {
            Some(bar) => bar.finish(),
            None => say(self.line()),
        }
    }

    fn line(&self) -> String {
        let elapsed = self.started.elapsed().as_secs_f64();
        let rate = (self.done - self.start_at) as f64 / elapsed.max(1e-9);
        let left = self.total.saturating_sub(self.done) as f64 / rate.max(1e-9);
        let left = if rate > 0.0 { format!("{left:.0} s left") } else { "time left unknown".to_owned() };
        let gap = if self.message.is_empty() { "" } else { ", " };
        format!("{} {}/{}, {rate:.1}/s, {left}{gap}{}", self.label, self.done, self.total, self.message)
    }
}
