//! Python's `%` on texts. minijinja's operator takes numbers only and cannot be replaced, so a
//! template's `left % right` becomes `(left)|python_modulo(right)` before it is compiled.

use std::sync::LazyLock;

use regex::Regex;

/// Name of the filter that computes `%`.
pub(super) const MODULO: &str = "python_modulo";

static RAW: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?s)^\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}").expect("the pattern is valid")
});
/// Words that end an operand.
const KEYWORDS: [&str; 9] = ["and", "or", "not", "in", "is", "if", "elif", "else", "for"];

/// Maximum bytes of a tag: the longer it is, the deeper its expressions may nest.
pub(super) const MAX_TAG_BYTES: usize = 32 << 10;

/// A tag that has more.
#[derive(Debug)]
pub(super) struct LongTag {
    /// From 1.
    pub(super) line: usize,
}

/// Replaces the operator in all expressions of a template.
pub(super) fn replace_operator(source: &str) -> Result<String, LongTag> {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find(['{']) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let skipped = if let Some(raw) = RAW.find(rest) {
            raw.end()
        } else if rest.starts_with("{#") {
            rest.find("#}").map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with("{{") || rest.starts_with("{%") {
            let (text, length) = Expression::new(rest).rewrite();
            if length > MAX_TAG_BYTES {
                let before = &source[..source.len() - rest.len()];
                return Err(LongTag { line: before.matches('\n').count() + 1 });
            }
            out.push_str(&text);
            rest = &rest[length..];
            continue;
        } else {
            1
        };
        out.push_str(&rest[..skipped]);
        rest = &rest[skipped..];
    }
    Ok(out + rest)
}

/// A level of brackets.
#[derive(Default)]
struct Level {
    /// Where in the output the current product begins: operands joined by `*`, `/`, `//` and `%`.
    product: usize,
    /// Whether the right operand of a `%` is still open.
    is_open: bool,
}

/// One tag while it is rewritten.
struct Expression<'s> {
    source: &'s str,
    /// The text that ends the tag.
    end: &'static str,
    out: String,
    levels: Vec<Level>,
    /// Whether the last token can be a left operand, so that a sign after it is an operator.
    after_operand: bool,
}

impl<'s> Expression<'s> {
    fn new(source: &'s str) -> Self {
        let end = if source.starts_with("{{") { "}}" } else { "%}" };
        let out = source[..2].to_owned();
        Expression { source, end, out, levels: vec![Level { product: 2, is_open: false }], after_operand: false }
    }

    /// The rewritten tag, and the length of its source.
    fn rewrite(mut self) -> (String, usize) {
        let mut at = 2;
        while at < self.source.len() && !self.is_end(at) {
            at += self.take_token(at);
        }
        self.close_operand();
        let rest = &self.source[at..];
        let tail = rest.find(self.end).map_or(0, |end| end + 2);
        self.out.push_str(&rest[..tail]);
        (self.out, at + tail)
    }

    fn is_end(&self, at: usize) -> bool {
        let rest = &self.source[at..];
        self.levels.len() == 1 && rest.strip_prefix(['-', '+']).unwrap_or(rest).starts_with(self.end)
    }

    /// Copies or rewrites the token at `at`, and returns its length.
    fn take_token(&mut self, at: usize) -> usize {
        let rest = &self.source[at..];
        let first = rest.chars().next().unwrap_or(' ');
        match first {
            '\'' | '"' => self.push_operand(&rest[..text_length(rest, first)]),
            _ if first.is_alphanumeric() || first == '_' => {
                let is_part = |character: char| character.is_alphanumeric() || character == '_';
                let word = &rest[..rest.find(|character| !is_part(character)).unwrap_or(rest.len())];
                let is_attribute = self.out.trim_end().ends_with('.');
                if KEYWORDS.contains(&word) && !is_attribute {
                    self.push_separator(word)
                } else {
                    self.push_operand(word)
                }
            }
            '(' | '[' | '{' => {
                self.out.push(first);
                self.levels.push(Level { product: self.out.len(), is_open: false });
                self.after_operand = false;
                1
            }
            ')' | ']' | '}' => {
                self.close_operand();
                if self.levels.len() > 1 {
                    self.levels.pop();
                }
                self.push_operand(&rest[..1])
            }
            '%' => self.push_modulo(),
            '*' if rest.starts_with("**") => self.push_operator("**"),
            '*' | '/' => {
                self.close_operand();
                self.push_operator(&rest[..1])
            }
            '|' | '.' => self.push_operator(&rest[..1]),
            '+' | '-' if !self.after_operand => self.push_operator(&rest[..1]),
            _ if first.is_whitespace() => {
                self.out.push(first);
                first.len_utf8()
            }
            _ => self.push_separator(&rest[..first.len_utf8()]),
        }
    }

    fn push_operand(&mut self, token: &str) -> usize {
        self.out.push_str(token);
        self.after_operand = true;
        token.len()
    }

    fn push_operator(&mut self, token: &str) -> usize {
        self.out.push_str(token);
        self.after_operand = false;
        token.len()
    }

    fn push_separator(&mut self, token: &str) -> usize {
        self.close_operand();
        self.push_operator(token);
        let length = self.out.len();
        self.level().product = length;
        token.len()
    }

    fn push_modulo(&mut self) -> usize {
        self.close_operand();
        let product = self.level().product;
        let left = self.out.split_off(product);
        self.out.push_str(&format!(" ({})|{MODULO}(", left.trim()));
        self.level().is_open = true;
        self.push_operator("") + 1
    }

    fn close_operand(&mut self) {
        if std::mem::take(&mut self.level().is_open) {
            self.out.push(')');
        }
    }

    fn level(&mut self) -> &mut Level {
        self.levels.last_mut().expect("the first level is never closed")
    }
}

/// Length of a quoted text, with its quotes.
fn text_length(rest: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        match character {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            _ if character == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_operators_in_expressions_are_replaced() {
        for (source, expected) in [
            ("{{ '%s' % x }} 5 % 2", "{{ ('%s')|python_modulo( x )}} 5 % 2"),
            ("{% if i % 2 == 0 -%}", "{% if (i)|python_modulo( 2 )== 0 -%}"),
            ("{{ a + b * c % d * e }}", "{{ a + (b * c)|python_modulo( d )* e }}"),
            ("{{ f(x % y)[z % w] }}", "{{ f( (x)|python_modulo( y))[ (z)|python_modulo( w)] }}"),
            ("{% raw %}{{ a % b }}{% endraw %}{# a % b #}", "{% raw %}{{ a % b }}{% endraw %}{# a % b #}"),
            ("{{ '%}' ~ {'a': 1} }}{%", "{{ '%}' ~ {'a': 1} }}{%"),
            ("{{ \u{202e}-}}", "{{ \u{202e}-}}"),
        ] {
            assert_eq!(replace_operator(source).unwrap(), expected);
        }
    }
}
