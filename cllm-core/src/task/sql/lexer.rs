//! Divides SQL into tokens, as far as finding and rewriting a query needs them. Any text has tokens:
//! what it holds may be no SQL.

/// A piece of the text. The tokens of a text join to the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    pub(super) text: &'a str,
    /// Its position in the text.
    pub(super) start: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Space,
    /// `-- …` up to the end of its line, or `/* … */`.
    Comment,
    /// A string or a quoted name, which may lack its end.
    Quoted,
    /// A keyword, a name or a number.
    Word,
    /// What no SQL holds and ends a query: three backticks, or the `</` of a tag.
    Foreign,
    Symbol,
}

impl<'a> Token<'a> {
    pub(super) fn is_word(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(word)
    }

    pub(super) fn is_symbol(&self, symbol: &str) -> bool {
        self.kind == Kind::Symbol && self.text == symbol
    }

    /// Whether SQL sees it: neither white space nor a comment.
    pub(super) fn is_significant(&self) -> bool {
        !matches!(self.kind, Kind::Space | Kind::Comment)
    }
}

pub(super) fn tokens(text: &str) -> impl Iterator<Item = Token<'_>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let (kind, length) = first_token(&text[start..])?;
        let token = Token { kind, text: &text[start..start + length], start };
        start += length;
        Some(token)
    })
}

/// Kind and length of the token with which the text begins.
fn first_token(text: &str) -> Option<(Kind, usize)> {
    let first = text.chars().next()?;
    let run = |belongs: fn(char) -> bool| text.find(|c| !belongs(c)).unwrap_or(text.len());
    Some(match first {
        _ if first.is_whitespace() => (Kind::Space, run(char::is_whitespace)),
        _ if is_word_char(first) => (Kind::Word, run(is_word_char)),
        _ if text.starts_with("--") => (Kind::Comment, run(|c| c != '\n')),
        _ if text.starts_with("/*") => (Kind::Comment, 2 + through(&text[2..], "*/")),
        _ if text.starts_with("```") => (Kind::Foreign, run(|c| c == '`')),
        _ if text.starts_with("</") => (Kind::Foreign, 2),
        '\'' => (Kind::Quoted, 1 + through(&text[1..], "'")),
        '"' => (Kind::Quoted, 1 + through(&text[1..], "\"")),
        '`' => (Kind::Quoted, 1 + through(&text[1..], "`")),
        '[' => (Kind::Quoted, 1 + through(&text[1..], "]")),
        _ => (Kind::Symbol, first.len_utf8()),
    })
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '$')
}

/// The length of the text up to and with `end`. A doubled quote within a string ends one token and
/// begins the next, which changes nothing here.
fn through(text: &str, end: &str) -> usize {
    text.find(end).map_or(text.len(), |at| at + end.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_names_and_comments_are_one_token_whatever_they_hold() {
        for whole in ["'a;--b'", "\"a'b\"", "`a;`", "[a;'b]", "-- it's; `", "/* ;'\n*/", "'never ends;", "/* nor this"]
        {
            assert_eq!(tokens(whole).map(|token| token.text).collect::<Vec<_>>(), [whole]);
        }
        let text = "SELECT T1.a, 'é''s' FROM t -- b\n;```x</";
        assert_eq!(tokens(text).map(|token| token.text).collect::<String>(), text);
        let kinds: Vec<Kind> = tokens("a 'b''c';").map(|token| token.kind).collect();
        assert_eq!(kinds, [Kind::Word, Kind::Space, Kind::Quoted, Kind::Quoted, Kind::Symbol]);
        assert!(tokens("'it''s; here' x").all(|token| !token.is_symbol(";")));
    }
}
