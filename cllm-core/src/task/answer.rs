//! Divides an answer into its code and the rest: code stands in fences as CommonMark defines them.
//! What of it counts is for each benchmark to say.

use std::sync::LazyLock;

use regex::Regex;

/// Columns of indentation from which a line is indented code, and no fence.
const CODE_INDENT: usize = 4;

/// A block of code between two fences.
#[derive(Debug, PartialEq)]
pub(super) struct FencedBlock<'a> {
    /// What follows the opening fence on its line, usually the language.
    pub(super) info: &'a str,
    /// The lines without the indentation of the opening fence.
    pub(super) content: String,
}

/// A text, divided into its fenced blocks and the rest.
///
/// A fence closes by a line of its own. Where none closes it, it ends with the line of code that ends
/// in its mark, or stays open, for models stop early. A list item indents its fences, so an indented
/// fence counts unless it stands in indented code.
#[derive(Debug, Default, PartialEq)]
pub(super) struct FencedText<'a> {
    pub(super) blocks: Vec<FencedBlock<'a>>,
    /// The lines outside the blocks.
    pub(super) unfenced: String,
}

impl<'a> FencedText<'a> {
    pub(super) fn read(text: &'a str) -> Self {
        let mut read = FencedText::default();
        let mut open: Option<Fence> = None;
        let mut surroundings = Surroundings::default();
        for line in text.split_inclusive('\n') {
            let line = match &open {
                Some(Fence { is_quoted: true, .. }) => unquoted(line).unwrap_or(line),
                _ => line,
            };
            let fence = Fence::parse(line);
            match (&open, fence) {
                (Some(opening), Some(fence)) if fence.closes(opening) => {
                    open = None;
                    surroundings = Surroundings::default();
                }
                (Some(opening), _) => {
                    let block = read.blocks.last_mut().expect("an open fence has its block");
                    block.content.push_str(without_indent(line, opening.indent));
                }
                (None, Some(fence)) if fence.may_open() && !surroundings.are_code(fence.indent) => {
                    read.blocks.push(FencedBlock { info: fence.info, content: String::new() });
                    open = Some(fence);
                }
                (None, _) => {
                    read.unfenced.push_str(line);
                    surroundings.add(line);
                }
            }
        }
        if let Some(opening) = &open {
            read.end_within_line(opening);
        }
        read
    }

    /// Ends the last block, which no line closes, at the first of its lines that ends in such a mark.
    fn end_within_line(&mut self, opening: &Fence) {
        let Some(block) = self.blocks.last_mut() else { return };
        let mut end = 0;
        for line in block.content.split_inclusive('\n') {
            let text = line.trim_end();
            let code = text.trim_end_matches(opening.marker);
            if text.len() - code.len() >= opening.length && !code.trim().is_empty() {
                self.unfenced.push_str(&block.content[end + line.len()..]);
                block.content.truncate(end + code.len());
                return block.content.push('\n');
            }
            end += line.len();
        }
    }
}

/// A line that begins with at least three backticks or tildes.
struct Fence<'a> {
    /// Whether it stands in a quotation, whose lines begin with `> `.
    is_quoted: bool,
    indent: usize,
    marker: char,
    length: usize,
    info: &'a str,
}

impl<'a> Fence<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (is_quoted, line) = unquoted(line).map_or((false, line), |line| (true, line));
        let text = line.trim();
        let marker = text.chars().next().filter(|c| matches!(c, '`' | '~'))?;
        let info = text.trim_start_matches(marker);
        let length = text.len() - info.len();
        (length >= 3).then(|| Fence { is_quoted, indent: indent(line), marker, length, info: info.trim() })
    }

    /// Backticks after the first ones make it code within a line: ```` ```SELECT 1``` ````.
    fn may_open(&self) -> bool {
        self.marker == '~' || !self.info.contains('`')
    }

    fn closes(&self, opening: &Fence) -> bool {
        !self.is_quoted
            && self.marker == opening.marker
            && self.length >= opening.length
            && self.info.is_empty()
            && self.indent < opening.indent + CODE_INDENT
    }
}

/// A line of a quotation without its mark.
fn unquoted(line: &str) -> Option<&str> {
    let text = line.strip_prefix('>')?;
    (!text.starts_with('>')).then(|| text.strip_prefix(' ').unwrap_or(text))
}

/// What stands before a line, outside of fences.
#[derive(Default)]
struct Surroundings {
    /// The last line that is not empty is indented like code.
    is_indented: bool,
    /// The last line that is not indented is an item of a list.
    is_list: bool,
}

impl Surroundings {
    fn add(&mut self, line: &str) {
        static LIST_ITEM: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"^\s*(?:[-*+]|\d{1,9}[.)])\s").expect("the pattern is valid"));
        if line.trim().is_empty() {
            return;
        }
        self.is_indented = indent(line) >= CODE_INDENT;
        if !self.is_indented {
            self.is_list = LIST_ITEM.is_match(line);
        }
    }

    /// Whether a line with such an indentation belongs to indented code, a docstring say.
    fn are_code(&self, indent: usize) -> bool {
        indent >= CODE_INDENT && self.is_indented && !self.is_list
    }
}

/// Columns of white space before a line's text; a tab leads to the next multiple of four.
fn indent(line: &str) -> usize {
    let blank = line.chars().take_while(|c| matches!(c, ' ' | '\t'));
    blank.fold(0, |column, c| if c == '\t' { column / 4 * 4 + 4 } else { column + 1 })
}

/// A line after so many columns of indentation have been removed from it, as far as it has them.
fn without_indent(line: &str, columns: usize) -> &str {
    let mut rest = line;
    while let Some(next) = rest.strip_prefix([' ', '\t']) {
        if indent(&line[..line.len() - next.len()]) > columns {
            break;
        }
        rest = next;
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The blocks' info strings and contents, and the rest.
    fn read(text: &str) -> (Vec<(&str, String)>, String) {
        let FencedText { blocks, unfenced } = FencedText::read(text);
        (blocks.into_iter().map(|block| (block.info, block.content)).collect(), unfenced)
    }

    fn one(text: &str) -> (&str, String) {
        let (mut blocks, _) = read(text);
        assert_eq!(blocks.len(), 1, "{text}");
        blocks.remove(0)
    }

    #[test]
    fn blocks_and_the_text_around_them_keep_their_order() {
        let text = "First\n```python title=\"a.py\"\na\n```\nthen\n~~~\nb\n~~~\nend";
        let blocks = vec![("python title=\"a.py\"", "a\n".to_owned()), ("", "b\n".to_owned())];
        assert_eq!(read(text), (blocks, "First\nthen\nend".to_owned()));
        assert_eq!(read("no fence"), (vec![], "no fence".to_owned()));
        assert_eq!(read("").0, vec![]);
    }

    #[test]
    fn a_fence_closes_only_by_a_line_of_its_own_that_is_as_long_and_of_its_kind() {
        assert_eq!(one("```\nx = '```'\ny```\n```"), ("", "x = '```'\ny```\n".to_owned()));
        assert_eq!(one("````md\n```\na\n```\n````"), ("md", "```\na\n```\n".to_owned()));
        assert_eq!(one("```\na\n`````  \nb"), ("", "a\n".to_owned()));
        assert_eq!(one("~~~\n```\n~~~"), ("", "```\n".to_owned()));
        assert_eq!(one("```\n``` python\n```"), ("", "``` python\n".to_owned()));
        assert_eq!(one("```\r\na\r\n```\r\nb"), ("", "a\r\n".to_owned()));
        let docstring = "def f():\n    \"\"\"\n    ```\n    1\n    ```\n    \"\"\"\n";
        assert_eq!(one(&format!("```python\n{docstring}```")), ("python", docstring.to_owned()));
    }

    #[test]
    fn the_last_fence_may_stay_open() {
        assert_eq!(one("So:\n```sql\nSELECT 1"), ("sql", "SELECT 1".to_owned()));
        assert_eq!(read("    return 1\n```\n"), (vec![("", String::new())], "    return 1\n".to_owned()));
    }

    #[test]
    fn a_fence_that_no_line_closes_ends_at_the_end_of_a_line_of_code() {
        for (text, content, unfenced) in [
            ("```\na\n  b```", "a\n  b\n", ""),
            ("So:\n```python\na\n  b ```\nIt's b.\n", "a\n  b \n", "So:\nIt's b.\n"),
            ("````\na```\nb````\nc", "a```\nb\n", "c"),
            ("~~~\na```\nb~~~\nc```", "a```\nb\n", "c```"),
        ] {
            let (blocks, rest) = read(text);
            assert_eq!((blocks[0].1.as_str(), rest.as_str()), (content, unfenced), "{text}");
        }
    }

    #[test]
    fn a_quoted_fence_loses_the_marks_of_its_quotation() {
        let text = "> So:\n> ```\n> a\n>   b\n>\n> c\n> ```\n> end";
        assert_eq!(read(text), (vec![("", "a\n  b\n\nc\n".to_owned())], "> So:\n> end".to_owned()));
        assert_eq!(one("```\n>>> f()\n> ```\n```"), ("", ">>> f()\n> ```\n".to_owned()));
    }

    #[test]
    fn code_within_a_line_is_no_fence() {
        for text in ["```SELECT 1```", "Use ```SELECT 1```.", "``\na\n``", "x = 1 ```\ny"] {
            assert_eq!(read(text), (vec![], text.to_owned()));
        }
        assert_eq!(one("~~~ `a`\nb\n~~~"), ("`a`", "b\n".to_owned()), "a tilde fence may name backticks");
    }

    #[test]
    fn the_indentation_of_a_fence_is_taken_from_its_lines() {
        assert_eq!(
            one("1. So:\n\n   ```\n   if a:\n       b\n  c\n   ```\n2. d"),
            ("", "if a:\n    b\nc\n".to_owned())
        );
        assert_eq!(one("- a\n    - b:\n      ```\n      c\n      ```"), ("", "c\n".to_owned()));
        assert_eq!(one("1.  a\n    b\n    ```\n    c\n    ```"), ("", "c\n".to_owned()));
        assert_eq!(one("So:\n\n\t```\n\ta\n\t\tb\n\t```"), ("", "a\n\tb\n".to_owned()));
        assert_eq!(one("   ```\n   a\n```"), ("", "a\n".to_owned()));
    }

    #[test]
    fn a_fence_in_a_docstring_of_unfenced_code_is_no_fence() {
        for text in [
            "def f():\n    \"\"\"Example:\n\n    Run:\n    ```\n    f()\n    ```\n    \"\"\"\n",
            "    \"\"\"Example:\n    ```\n    f()\n    ```\n    \"\"\"\n    return 1\n",
        ] {
            assert_eq!(read(text), (vec![], text.to_owned()));
        }
        // After a fence its surroundings are forgotten.
        assert_eq!(read("    a\n```\n```\n    ```\n    b\n    ```").0.len(), 2);
    }
}
