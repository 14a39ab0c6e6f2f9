//! Formats a comparison for the terminal.

use cllm_core::progress::count;

use super::comparison::{Comparison, Side, SpeedComparison};
use crate::table::{format_interval, format_number, format_percent, format_points, format_speed};
use crate::terminal::{self, stacked, wrap};

const HEADS: [&str; 6] = ["", "model/strategy", "accuracy", "unfinished", "tokens per\nforward", "tokens/s"];

impl Comparison {
    /// Formats a table of both sides, the differences, and the conclusion.
    pub fn text(&self) -> String {
        let speed = self.speed.as_ref();
        let rows = [
            self.row("A", &self.a, speed.and_then(|speed| speed.a_tokens_per_second)),
            self.row("B", &self.b, speed.and_then(|speed| speed.b_tokens_per_second)),
        ];
        let speed = speed.map_or_else(String::new, SpeedComparison::text);
        let runs = [("A", &self.a), ("B", &self.b)].map(|(name, side)| format!("{name}: {}\n", side.run.display()));
        let lines = self.accuracy_text() + &speed + &self.verdict;
        let lines: String = lines.lines().map(wrap).collect();
        runs.concat() + &terminal::table(&HEADS, 2, rows) + &lines
    }

    fn row(&self, name: &str, side: &Side, tokens_per_second: Option<f64>) -> Vec<String> {
        vec![
            name.to_owned(),
            format!("{}/{}", side.role, side.strategy),
            stacked(format_percent(side.accuracy), side.ci95, |end| format!("{:.1}", 100.0 * end)),
            format!("{} of {}", side.unfinished, self.pairs),
            format_number(side.tokens_per_forward, 2, ""),
            format_speed(tokens_per_second),
        ]
    }

    fn accuracy_text(&self) -> String {
        let left_out = match (self.unpaired_a, self.unpaired_b) {
            (0, 0) => String::new(),
            (a, b) => format!("; left out: {a} only in A, {b} only in B"),
        };
        // A may have no correct answer.
        let kept = self.correct_kept_fraction.map_or_else(String::new, |kept| {
            format!("; of A's correct answers B keeps {}", format_percent(Some(kept)))
        });
        format!(
            "{} of {}, {} of them scored{left_out}\n\
             accuracy, B − A: {} points{}\n\
             correct only in A: {}; correct only in B: {}{kept}; same tokens: {}\n",
            count(self.pairs, "example"),
            self.title,
            self.scored,
            self.difference.map_or_else(|| "-".to_owned(), format_points),
            format_interval(self.ci95, format_points),
            self.a_only,
            self.b_only,
            format_percent(self.equal_tokens),
        )
    }
}

impl SpeedComparison {
    fn text(&self) -> String {
        let caveat = if self.same_machine { "" } else { "; the machines or libraries differ" };
        format!(
            "speed-up of B over A: {}{} on {} timed in both{caveat}\n",
            format_number(self.ratio, 2, "x"),
            format_interval(self.ci95, |ratio| format!("{ratio:.2}x")),
            count(self.examples, "example")
        )
    }
}
