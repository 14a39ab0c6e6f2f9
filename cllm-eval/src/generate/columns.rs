//! Two answers beside each other in a terminal, each forward's text in a colour of its own.

use unicode_width::UnicodeWidthChar;

/// Colours that neighbouring forwards take in turn.
pub(super) const COLOURS: [&str; 4] = ["\x1b[36m", "\x1b[33m", "\x1b[32m", "\x1b[35m"];
pub(super) const PLAIN: &str = "\x1b[0m";
/// Terminals with fewer columns have the answers one under the other.
const NARROW: usize = 60;
const GAP: &str = " │ ";

/// Lines of a terminal that no answer's text has: titles, states, and the line below.
const OTHER_LINES: usize = 4;

/// Lines of each answer's text that a terminal of so many columns and lines has room for.
pub(super) fn room(width: usize, height: usize) -> usize {
    let lines = match width < NARROW {
        true => height.saturating_sub(2 * OTHER_LINES) / 2,
        false => height.saturating_sub(OTHER_LINES),
    };
    lines.max(1)
}

/// An answer as far as it is there.
#[derive(Debug, Clone, Default)]
pub(super) struct Column {
    pub(super) title: String,
    /// The text that each forward made final, fit for a terminal.
    pub(super) pieces: Vec<String>,
    /// How it stands.
    pub(super) status: String,
}

/// A line on the screen: characters, and the number of the forward that each came with; none for what is no answer.
type Line = Vec<(char, Option<usize>)>;

/// The lines of both answers for a terminal of `width` columns: of each answer's text the last `most` lines. `colour` marks the
/// forwards.
pub(super) fn screen(columns: &[Column; 2], width: usize, most: usize, colour: bool) -> Vec<String> {
    let paint = |line: &Line| painted(line, colour);
    if width < NARROW {
        return columns.iter().flat_map(|column| lines(column, width.max(1), most)).map(|line| paint(&line)).collect();
    }
    let each = (width - GAP.chars().count()) / 2;
    let [left, right] = columns.each_ref().map(|column| lines(column, each, most));
    // Titles first and states last stand level.
    let height = left.len().max(right.len());
    let [left, right] = [left, right].map(|lines| stretched(lines, height));
    let beside = |(left, right): (Line, Line)| {
        let padding = " ".repeat(each - width_of(&left));
        format!("{}{padding}{GAP}{}", paint(&left), paint(&right))
    };
    left.into_iter().zip(right).map(beside).collect()
}

fn lines(column: &Column, width: usize, most: usize) -> Vec<Line> {
    let plain = |text: &str| -> Line { text.chars().map(|character| (character, None)).collect() };
    let cut = |text: &str| wrapped(&plain(text), width).into_iter().next().unwrap_or_default();
    let text: Line = column
        .pieces
        .iter()
        .enumerate()
        .flat_map(|(forward, piece)| piece.chars().map(move |character| (character, Some(forward))))
        .collect();
    let body = wrapped(&text, width);
    let skipped = body.len().saturating_sub(most);
    let shown = body.into_iter().skip(skipped);
    std::iter::once(cut(&column.title)).chain(shown).chain([cut(&column.status)]).collect()
}

/// Cut at line ends and wherever the next character finds no room.
fn wrapped(text: &Line, width: usize) -> Vec<Line> {
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

/// As many lines as `height`, the new ones before the last.
fn stretched(mut lines: Vec<Line>, height: usize) -> Vec<Line> {
    let last = lines.pop().unwrap_or_default();
    lines.resize(height - 1, Line::new());
    lines.push(last);
    lines
}

fn width_of(line: &Line) -> usize {
    line.iter().map(|(character, _)| character.width().unwrap_or(0)).sum()
}

fn painted(line: &Line, colour: bool) -> String {
    let mut text = String::new();
    let mut now = None;
    for &(character, forward) in line {
        if colour && forward != now {
            text.push_str(forward.map_or(PLAIN, |forward| COLOURS[forward % COLOURS.len()]));
            now = forward;
        }
        text.push(character);
    }
    if now.is_some() {
        text.push_str(PLAIN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(title: &str, pieces: &[&str], status: &str) -> Column {
        Column {
            title: title.into(),
            pieces: pieces.iter().map(|&piece| piece.into()).collect(),
            status: status.into(),
        }
    }

    #[test]
    fn two_answers_stand_level_beside_each_other() {
        let columns =
            [column("ar", &["one ", "two\n", "three"], "3 tokens"), column("jacobi", &["one two"], "2 tokens")];
        let shown = screen(&columns, 63, 9, false);
        let row = |left: &str, right: &str| format!("{left:<30} │ {right}");
        assert_eq!(
            shown,
            [row("ar", "jacobi"), row("one two", "one two"), row("three", ""), row("3 tokens", "2 tokens")]
        );
    }

    #[test]
    fn a_narrow_terminal_has_them_one_under_the_other_and_wraps() {
        assert_eq!([room(59, 30), room(60, 30), room(90, 2)], [11, 26, 1]);
        let columns = [column("ar", &["abcdefg"], "-"), column("jacobi", &["hi"], "-")];
        assert_eq!(screen(&columns, 5, 9, false), ["ar", "abcde", "fg", "-", "jacob", "hi", "-"]);
    }

    #[test]
    fn wide_characters_take_two_places_and_the_last_lines_are_shown() {
        let columns = [column("", &["数数数a"], ""), column("", &["1\n2\n3"], "")];
        let body = |width: usize, most: usize| {
            lines(&columns[0], width, most).iter().map(|line| painted(line, false)).collect::<Vec<_>>()
        };
        assert_eq!(body(3, 9), ["", "数", "数", "数a", ""]);
        assert_eq!(body(1, 9), ["", "a", ""]);
        let last: Vec<String> = lines(&columns[1], 9, 2).iter().map(|line| painted(line, false)).collect();
        assert_eq!(last, ["", "2", "3", ""]);
        // Padding counts places, not characters.
        let shown = screen(&columns, 63, 9, false);
        assert!(
            shown[1].starts_with("数数数a")
                && shown[1].ends_with("│ 1")
                && shown[1].chars().filter(|&c| c == ' ').count() == 25,
            "{shown:?}"
        );
    }

    #[test]
    fn neighbouring_forwards_have_different_colours() {
        let line = &screen(&[column("t", &["a", "b"], "s"), Column::default()], 80, 9, true)[1];
        assert!(line.starts_with("\x1b[36ma\x1b[33mb\x1b[0m "), "{line:?}");
    }
}
