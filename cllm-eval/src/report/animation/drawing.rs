//! Draws two timed answers side by side.

use std::fmt::Write;

use cllm_core::decode::Strategy;

use super::layout::{Fragment, layout};
use super::timed_answer::TimedAnswer;
use crate::records::{AnswerRecord, Header};
use crate::role::Role;
use crate::svg::escape;
use crate::table::format_whole;
use crate::words::with_commas;

/// How long the slower answer plays in the animation, in seconds.
pub(in crate::report) const PLAY_SECONDS: f64 = 8.0;
/// How long the finished answers stay before the animation starts again, in seconds.
const PAUSE_SECONDS: f64 = 3.0;

const WIDTH: f64 = 880.0;
const MARGIN: f64 = 26.0;
/// Distance between the two columns.
const GUTTER: f64 = 28.0;
const COLUMN_WIDTH: f64 = (WIDTH - 2.0 * MARGIN - GUTTER) / 2.0;
/// Width of a character of the answers. Text is stretched to it, so that the layout fits any
/// monospace font.
const CHAR_WIDTH: f64 = 8.4;
const LINE_HEIGHT: f64 = 23.0;
/// Baseline of an answer's first line.
const FIRST_BASELINE: f64 = 92.0;

const STYLE: &str = "\
text{fill:#1c2330;font:15px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}\
.title{font-size:18px;font-weight:600}\
.answer{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}\
.soft{fill:#566072}.small{font-size:13px}\
.paper{fill:#fff;stroke:#d9dee7}.track{fill:#eceff4}\
.teacher0{fill:#e8ebf1}.teacher1{fill:#d5dae4}.student0{fill:#dbe9fd}.student1{fill:#bcd7fb}\
.teacher{fill:#6b7688}.student{fill:#1f5fc4}tspan.student{font-weight:600}\
@media(prefers-color-scheme:dark){text{fill:#e6e9ef}.soft{fill:#a3adbd}\
.paper{fill:#14171d;stroke:#353d4a}.track{fill:#232934}\
.teacher0{fill:#272e39}.teacher1{fill:#384252}.student0{fill:#1b3763}.student1{fill:#2a5193}\
.teacher{fill:#9aa5b7}.student{fill:#74a7ff}}\
@media(prefers-reduced-motion:reduce){*{animation:none!important}}";

/// One side of the picture.
struct Column<'r> {
    timed: TimedAnswer<'r>,
    fragments: Vec<Fragment>,
    /// Left edge, in units of the picture.
    x: f64,
    /// Prefix of its keyframes.
    prefix: char,
}

pub(super) struct Drawing<'r> {
    header: &'r Header,
    columns: [Column<'r>; 2],
    /// Seconds of the animation per measured second.
    time_scale: f64,
}

impl<'r> Drawing<'r> {
    pub(super) fn new(header: &'r Header, [left, right]: [TimedAnswer<'r>; 2]) -> Self {
        let max_seconds = left.speed.seconds.max(right.speed.seconds);
        let column = |timed: TimedAnswer<'r>, x, prefix| {
            let fragments = layout(timed.texts, (COLUMN_WIDTH / CHAR_WIDTH) as usize);
            Column { timed, fragments, x, prefix }
        };
        let right_x = MARGIN + COLUMN_WIDTH + GUTTER;
        let columns = [column(left, MARGIN, 'a'), column(right, right_x, 'b')];
        Drawing { header, columns, time_scale: PLAY_SECONDS / max_seconds }
    }

    /// Duration of one loop, in seconds.
    fn period(&self) -> f64 {
        PLAY_SECONDS + PAUSE_SECONDS
    }

    /// The percentage of the loop at which a measured time is reached.
    fn percent(&self, seconds: f64) -> f64 {
        100.0 * seconds * self.time_scale / self.period()
    }

    pub(super) fn to_svg(&self) -> String {
        let num_lines =
            self.columns.iter().flat_map(|column| &column.fragments).map(|fragment| fragment.line + 1).max();
        let bar_y = FIRST_BASELINE + LINE_HEIGHT * num_lines.unwrap_or(1) as f64;
        let height = bar_y + 100.0;
        let title = escape(&self.title());
        let mut svg = format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" xml:space="preserve" role="img" aria-label="{title}"><title>{title}</title><style>{STYLE}{}</style>"#,
            self.keyframes()
        );
        let _ = write!(
            svg,
            r#"<rect class="paper" x="0.5" y="0.5" width="{}" height="{}" rx="10"/>"#,
            WIDTH - 1.0,
            height - 1.0
        );
        for column in &self.columns {
            self.draw_column(&mut svg, column, bar_y);
        }
        for (line, y) in self.footer().into_iter().zip([height - 32.0, height - 13.0]) {
            let line = escape(&line);
            let _ = write!(svg, r#"<text class="soft small" x="{MARGIN}" y="{y}">{line}</text>"#);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// One step-wise animation per forward, which shows its text, and one per column for the bar
    /// that shows its time.
    fn keyframes(&self) -> String {
        let period = self.period();
        let mut css =
            format!(".forward{{animation:{period}s step-end infinite}}.bar{{animation:{period}s linear infinite}}");
        for Column { timed, prefix, x, .. } in &self.columns {
            let seconds = &timed.speed.seconds;
            for (forward, end) in timed.speed.forward_ends().into_iter().enumerate() {
                let percent = self.percent(end);
                let _ = write!(css, "@keyframes {prefix}{forward}{{0%{{opacity:0}}{percent:.3}%{{opacity:1}}}}");
            }
            let percent = self.percent(*seconds);
            let _ = write!(
                css,
                ".{prefix}bar{{animation-name:{prefix}bar;transform-origin:{x}px 0}}\
                 @keyframes {prefix}bar{{0%{{transform:scaleX(0)}}{percent:.3}%{{transform:none}}}}"
            );
        }
        css
    }

    fn draw_column(&self, svg: &mut String, column: &Column<'_>, bar_y: f64) {
        let Column { timed, fragments, x, prefix } = column;
        let (class, speed) = (timed.answer.role.name(), timed.speed);
        let _ = write!(
            svg,
            r#"<text class="title" x="{x}" y="36">{}</text><text class="soft" x="{x}" y="60">{}</text>"#,
            heading(timed.answer),
            tokens_per_forward(timed)
        );
        for fragment in fragments {
            draw_fragment(svg, fragment, column);
        }
        let length = COLUMN_WIDTH * speed.seconds * self.time_scale / PLAY_SECONDS;
        let _ = write!(
            svg,
            r#"<rect class="track" x="{x}" y="{bar_y}" width="{COLUMN_WIDTH}" height="8" rx="4"/><rect class="bar {prefix}bar {class}" x="{x}" y="{bar_y}" width="{length:.1}" height="8" rx="4"/>"#
        );
        let tokens = format_whole(speed.tokens);
        let tokens_per_second = with_commas(&format!("{:.0}", timed.tokens_per_second()));
        let _ = write!(
            svg,
            r#"<g class="forward" style="animation-name:{prefix}{}"><text x="{x}" y="{}">{tokens} tokens in {}: {tokens_per_second} tokens/s{}</text></g>"#,
            speed.forwards - 1,
            bar_y + 30.0,
            duration(speed.seconds),
            self.speedup(column),
        );
    }

    /// The speed-up, which follows the speed of the second column.
    fn speedup(&self, column: &Column<'_>) -> String {
        if column.prefix == self.columns[0].prefix {
            return String::new();
        }
        format!(r#", <tspan class="student">{}</tspan>"#, self.speedup_words())
    }

    fn speedup_words(&self) -> String {
        let [left, right] = self.columns.each_ref().map(|column| column.timed.tokens_per_second());
        format!("{:.2}x as fast", right / left)
    }

    fn title(&self) -> String {
        let [left, right] = self.columns.each_ref().map(|column| heading(column.timed.answer));
        format!("One example answered twice. Left: {left}. Right: {right}, {} at batch 1.", self.speedup_words())
    }

    fn footer(&self) -> [String; 2] {
        let Header { benchmark, split, hardware, settings, .. } = self.header;
        let machine = hardware.gpu.as_ref().unwrap_or(&hardware.cpu);
        let id = &self.columns[0].timed.answer.id;
        [
            format!(
                "{}, example {id}. {machine}, {}, batch 1, times exclude prefill.",
                settings.title(*benchmark, split),
                hardware.dtype
            ),
            format!(
                "Played {}. Text of one shade was accepted in the same forward pass.",
                playback_speed(self.time_scale)
            ),
        ]
    }
}

fn draw_fragment(svg: &mut String, fragment: &Fragment, column: &Column<'_>) {
    let Fragment { forward, line, column: start, width, text } = fragment;
    let class = column.timed.answer.role.name();
    let (x, width) = (column.x + CHAR_WIDTH * *start as f64, CHAR_WIDTH * *width as f64);
    let baseline = FIRST_BASELINE + LINE_HEIGHT * *line as f64;
    let spaces = |text: &str| CHAR_WIDTH * (text.chars().take_while(|&character| character == ' ').count()) as f64;
    let (before, after) = (spaces(text), spaces(&text.chars().rev().collect::<String>()));
    let _ = write!(
        svg,
        r#"<g class="forward" style="animation-name:{}{forward}"><rect class="{class}{}" x="{x:.1}" y="{:.1}" width="{width:.1}" height="20" rx="3"/><text class="answer" x="{:.1}" y="{baseline:.1}" textLength="{:.1}" lengthAdjust="spacingAndGlyphs">{}</text></g>"#,
        column.prefix,
        forward % 2,
        baseline - 15.0,
        x + before,
        width - before - after,
        escape(text.trim_matches(' '))
    );
}

fn heading(answer: &AnswerRecord) -> String {
    let model = match answer.role {
        Role::Teacher => "Teacher",
        Role::Student => "Student",
    };
    let decoding = match answer.strategy {
        Strategy::Ar => "autoregressive",
        Strategy::Jacobi { .. } | Strategy::Rolling { .. } | Strategy::MultiBlock { .. } => "Jacobi",
        Strategy::Drafted { .. } => "speculative",
        Strategy::Gated { .. } => "gated",
        Strategy::Lookahead { .. } => "lookahead",
    };
    format!("{model}, {decoding} decoding")
}

fn tokens_per_forward(timed: &TimedAnswer<'_>) -> String {
    let value = timed.speed.tokens as f64 / timed.speed.forwards as f64;
    match timed.answer.strategy {
        Strategy::Ar => "1 token per forward".to_owned(),
        strategy => format!("{value:.2} tokens per forward ({strategy})"),
    }
}

pub(in crate::report) fn duration(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", 1000.0 * seconds) } else { format!("{seconds:.2} s") }
}

/// Describes the speed of the animation, given how many of its seconds show one measured second.
pub(in crate::report) fn playback_speed(time_scale: f64) -> String {
    match time_scale {
        slower if slower >= 1.05 => format!("{slower:.0} times slower than measured"),
        faster if faster <= 0.95 => format!("{:.1} times faster than measured", 1.0 / faster),
        _ => "at the measured speed".to_owned(),
    }
}
