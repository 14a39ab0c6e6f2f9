//! Two answers side by side in a terminal, with the text of each forward in a colour of its own.

use unicode_width::UnicodeWidthChar;

/// Successive forwards cycle through these colours.
pub(super) const COLOURS: [&str; 4] = ["\x1b[36m", "\x1b[33m", "\x1b[32m", "\x1b[35m"];
pub(super) const RESET_COLOUR: &str = "\x1b[0m";
/// In terminals with fewer columns, the answers are shown one below the other.
const MIN_WIDTH: usize = 60;
const GAP: &str = " │ ";
/// Lines of the terminal that show no answer: title, status, and the prompt below.
const NUM_OTHER_LINES: usize = 4;

/// How many lines of each answer fit into a terminal of this size.
pub(super) fn max_text_lines(width: usize, height: usize) -> usize {
    let lines = match width < MIN_WIDTH {
        true => height.saturating_sub(2 * NUM_OTHER_LINES) / 2,
        false => height.saturating_sub(NUM_OTHER_LINES),
    };
    lines.max(1)
}

/// One of the two answers, as far as it has grown.
#[derive(Debug, Clone, Default)]
pub(super) struct Column {
    pub(super) title: String,
    /// The text of each forward, already safe for a terminal.
    pub(super) texts: Vec<String>,
    pub(super) status: String,
}

/// Characters of a line, each with the number of its forward; `None` outside the answer's text.
type Line = Vec<(char, Option<usize>)>;

/// The lines that show both answers in a terminal of `width` columns, with the last `max_lines` of
/// each answer's text. `colour` tells the forwards apart.
pub(super) fn side_by_side(columns: &[Column; 2], width: usize, max_lines: usize, colour: bool) -> Vec<String> {
    let paint = |line: &Line| paint(line, colour);
    if width < MIN_WIDTH {
        return columns
            .iter()
            .flat_map(|column| lines(column, width.max(1), max_lines))
            .map(|line| paint(&line))
            .collect();
    }
    let column_width = (width - GAP.chars().count()) / 2;
    let [left, right] = columns.each_ref().map(|column| lines(column, column_width, max_lines));
    // Titles and statuses line up.
    let height = left.len().max(right.len());
    let [left, right] = [left, right].map(|lines| pad_to_height(lines, height));
    let join = |(left, right): (Line, Line)| {
        let padding = " ".repeat(column_width - width_of(&left));
        format!("{}{padding}{GAP}{}", paint(&left), paint(&right))
    };
    left.into_iter().zip(right).map(join).collect()
}

fn lines(column: &Column, width: usize, max_lines: usize) -> Vec<Line> {
    let plain = |text: &str| -> Line { text.chars().map(|character| (character, None)).collect() };
    let cut = |text: &str| wrap(&plain(text), width).into_iter().next().unwrap_or_default();
    let text: Line = column
        .texts
        .iter()
        .enumerate()
        .flat_map(|(forward, text)| text.chars().map(move |character| (character, Some(forward))))
        .collect();
    let body = wrap(&text, width);
    let skipped = body.len().saturating_sub(max_lines);
    let shown = body.into_iter().skip(skipped);
    std::iter::once(cut(&column.title)).chain(shown).chain([cut(&column.status)]).collect()
}

/// Breaks a text at line ends, and wherever the next character does not fit.
fn wrap(text: &Line, width: usize) -> Vec<Line> {
    let mut lines = vec![Line::new()];
    let mut used = 0;
    for &(character, forward) in text {
        let wide = character.width().unwrap_or(0);
        if character == '\n' || used + wide > width && used > 0 {
            lines.push(Line::new());
            used = 0;
        }
        if character != '\n' && wide <= width {
            used += wide;
            let last = lines.len() - 1;
            lines[last].push((character, forward));
        }
    }
    lines
}

/// Inserts empty lines before the last line.
fn pad_to_height(mut lines: Vec<Line>, height: usize) -> Vec<Line> {
    let last = lines.pop().unwrap_or_default();
    lines.resize(height - 1, Line::new());
    lines.push(last);
    lines
}

fn width_of(line: &Line) -> usize {
    line.iter().map(|(character, _)| character.width().unwrap_or(0)).sum()
}

fn paint(line: &Line, colour: bool) -> String {
    let mut text = String::new();
    let mut current = None;
    for &(character, forward) in line {
        if colour && forward != current {
            text.push_str(forward.map_or(RESET_COLOUR, |forward| COLOURS[forward % COLOURS.len()]));
            current = forward;
        }
        text.push(character);
    }
    if current.is_some() {
        text.push_str(RESET_COLOUR);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(title: &str, texts: &[&str], status: &str) -> Column {
        Column { title: title.into(), texts: texts.iter().map(|&text| text.into()).collect(), status: status.into() }
    }

    #[test]
    fn two_answers_are_level_side_by_side() {
        let columns =
            [column("ar", &["one ", "two\n", "three"], "3 tokens"), column("jacobi", &["one two"], "2 tokens")];
        let shown = side_by_side(&columns, 63, 9, false);
        let row = |left: &str, right: &str| format!("{left:<30} │ {right}");
        assert_eq!(
            shown,
            [row("ar", "jacobi"), row("one two", "one two"), row("three", ""), row("3 tokens", "2 tokens")]
        );
    }

    #[test]
    fn a_narrow_terminal_shows_one_answer_below_the_other_and_wraps() {
        assert_eq!([max_text_lines(59, 30), max_text_lines(60, 30), max_text_lines(90, 2)], [11, 26, 1]);
        let columns = [column("ar", &["abcdefg"], "-"), column("jacobi", &["hi"], "-")];
        assert_eq!(side_by_side(&columns, 5, 9, false), ["ar", "abcde", "fg", "-", "jacob", "hi", "-"]);
    }

    #[test]
    fn wide_characters_take_two_columns_and_the_last_lines_are_shown() {
        let columns = [column("", &["数数数a"], ""), column("", &["1\n2\n3"], "")];
        let body = |width: usize, max_lines: usize| {
            lines(&columns[0], width, max_lines).iter().map(|line| paint(line, false)).collect::<Vec<_>>()
        };
        assert_eq!(body(3, 9), ["", "数", "数", "数a", ""]);
        assert_eq!(body(1, 9), ["", "a", ""]);
        let last: Vec<String> = lines(&columns[1], 9, 2).iter().map(|line| paint(line, false)).collect();
        assert_eq!(last, ["", "2", "3", ""]);
        // Padding counts columns, not characters.
        let shown = side_by_side(&columns, 63, 9, false);
        assert!(
            shown[1].starts_with("数数数a")
                && shown[1].ends_with("│ 1")
                && shown[1].chars().filter(|&c| c == ' ').count() == 25,
            "{shown:?}"
        );
    }

    #[test]
    fn successive_forwards_have_different_colours() {
        let line = &side_by_side(&[column("t", &["a", "b"], "s"), Column::default()], 80, 9, true)[1];
        assert!(line.starts_with("\x1b[36ma\x1b[33mb\x1b[0m "), "{line:?}");
    }
}
