//! Rewrites a text so that each number in it is spelled in ASCII, without TeX, markup and the digits
//! of other scripts. The reader of numbers then knows one form of each thing.

use std::sync::LazyLock;

use regex::Regex;

/// A space that stands between digits only to group them: thin, narrow or not breaking.
pub(super) const GAP: char = '\u{2009}';
/// Stands where an expression was whose value is not computed: a root, π, a fraction of variables.
pub(super) const EXPRESSION: char = '\u{FFFC}';

/// Commands of TeX whose arguments are no numbers of their own, and how many they have.
const EXPRESSION_COMMANDS: [(&str, usize); 6] =
    [(r"\sqrt", 1), (r"\binom", 2), (r"\dbinom", 2), (r"\overline", 1), (r"\bar", 1), (r"\log_", 1)];
const FRACTION_COMMANDS: [&str; 4] = [r"\frac", r"\dfrac", r"\tfrac", r"\cfrac"];

/// What is replaced, in this order.
static SPELLINGS: LazyLock<Vec<(Regex, String)>> = LazyLock::new(|| {
    let number = r"[+-]?[$€£¥₹]?\d[\d,]*(?:\.\d+)?(?:/\d+)?";
    let rules = [
        // Calculator annotations of GSM8K: `<<3+4=7>>`.
        (r"<<[^>]*>>".to_owned(), String::new()),
        (r"(?i)<sup>".to_owned(), "^{".to_owned()),
        (r"(?i)</sup>".to_owned(), "}".to_owned()),
        // Commands that only change how their argument looks.
        (
            r"\\(?:text|mbox|emph|underline|operatorname|boldsymbol|(?:text|math)[a-z]{2})\s*\{".to_owned(),
            "{".to_owned(),
        ),
        (r"\\(?:displaystyle|left|right)".to_owned(), String::new()),
        // Marks between thousands: `9{,}500`, `9,\!500`, `9\,500`.
        (r"\{,\}|,\\!".to_owned(), ",".to_owned()),
        (r"\{?\\(?:[,;:! ]|thinspace)\}?".to_owned(), GAP.to_string()),
        (r"\\([$%{}])".to_owned(), "$1".to_owned()),
        (r"\\[()\[\]]".to_owned(), " ".to_owned()),
        (r"\\(?:times|cdot|ast)".to_owned(), "×".to_owned()),
        (r"\\div".to_owned(), "÷".to_owned()),
        // The modulus of a residue.
        (r"[ \u{2009}]*(?:\(\s*\\?(?:b?mod)\s*\{?\d+\}?\s*\)|\\pmod\s*\{?\d+\}?)".to_owned(), String::new()),
        (r"\\pm".to_owned(), "±".to_owned()),
        // `1 and a half`, `2 and 1/2`.
        (r"(?i)(\d) and (?:a|one) half\b".to_owned(), "$1 1/2".to_owned()),
        (r"(?i)(\d) and (?:a|one) (?:quarter|fourth)\b".to_owned(), "$1 1/4".to_owned()),
        (r"(\d) and (\d/\d)\b".to_owned(), "$1 $2".to_owned()),
        // Bold, but not the power in `2**10`.
        (r"(?m)(^|[^0-9A-Za-z_*)])\*\*([^*\n]+)\*\*".to_owned(), "$1$2".to_owned()),
        (r"\\pi|π|√\s*(?:\([^)]*\)|\d+(?:\.\d+)?)|\bsqrt\([^)]*\)".to_owned(), EXPRESSION.to_string()),
        // Pairs, lists, sets and intervals: `(3, 5)`, `[1; 2]`.
        (
            format!(r"([(\[{{])\s*{number}(?:(?:\s*;\s*|\s*,\s+){number})+\s*,?\s*([)\]}}])"),
            format!("$1{EXPRESSION}$2"),
        ),
    ];
    rules.map(|(pattern, plain)| (Regex::new(&pattern).expect("the pattern is valid"), plain)).into()
});

static DIGIT: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^\p{Nd}$").expect("the pattern is valid"));
/// Longer arguments are none: no number needs them, and each command would look for the end again.
const MAX_ARGUMENT: usize = 1000;
/// What the arguments of a fraction must be for it to be a number.
static ARGUMENT: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^\s*(-?)[$€£¥₹]?(\d[\d,]*(?:\.\d+)?)\s*$").expect("the pattern is valid"));

pub(super) fn to_plain(text: &str) -> String {
    let mut text = without_commands(&plain_characters(text));
    for (pattern, plain) in SPELLINGS.iter() {
        text = pattern.replace_all(&text, plain.as_str()).into_owned();
    }
    text
}

fn plain_characters(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut is_raised = false;
    for c in text.chars() {
        let raised = superscript(c);
        match (is_raised, raised) {
            (false, Some(_)) => plain.push_str("^{"),
            (true, None) => plain.push('}'),
            _ => {}
        }
        is_raised = raised.is_some();
        match (raised, vulgar_fraction(c)) {
            (Some(digit), _) => plain.push(digit),
            (None, Some(fraction)) => {
                // `1½` is `1 1/2`.
                if plain.ends_with(|before: char| before.is_ascii_digit()) {
                    plain.push(' ');
                }
                plain.push_str(fraction);
            }
            (None, None) => plain.extend(plain_character(c)),
        }
    }
    if is_raised {
        plain.push('}');
    }
    plain
}

/// `None` for a character without width.
fn plain_character(c: char) -> Option<char> {
    Some(match c {
        _ if c.is_ascii() => c,
        // Hyphens, minus signs and the en dash.
        '\u{2010}'..='\u{2013}' | '\u{2212}' | '\u{FE63}' | '\u{FF0D}' => '-',
        '\u{A0}' | '\u{2002}'..='\u{200A}' | '\u{202F}' | '\u{205F}' => GAP,
        '\u{200B}'..='\u{200F}' | '\u{2060}' | '\u{FEFF}' => return None,
        '\u{66B}' => '.',
        '\u{66C}' => ',',
        '·' | '⋅' | '∙' | '✕' => '×',
        '⁄' | '∕' => '/',
        // Full-width forms of ASCII.
        '\u{FF01}'..='\u{FF0F}' | '\u{FF1A}'..='\u{FF5E}' => char::from_u32(u32::from(c) - 0xFEE0).unwrap_or(c),
        _ => digit(c).and_then(|value| char::from_digit(value, 10)).unwrap_or(c),
    })
}

/// The value of a decimal digit of any script. Unicode keeps the ten digits of a script together
/// and in order.
fn digit(c: char) -> Option<u32> {
    let is_digit = |c: char| DIGIT.is_match(c.encode_utf8(&mut [0; 4]));
    let before = |c: char| char::from_u32(u32::from(c) - 1).filter(|&before| is_digit(before));
    is_digit(c).then(|| std::iter::successors(before(c), |&c| before(c)).count() as u32 % 10)
}

fn superscript(c: char) -> Option<char> {
    let all = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺".chars().zip("0123456789-+".chars());
    all.into_iter().find_map(|(raised, plain)| (raised == c).then_some(plain))
}

fn vulgar_fraction(c: char) -> Option<&'static str> {
    Some(match c {
        '¼' => "1/4",
        '½' => "1/2",
        '¾' => "3/4",
        '⅐' => "1/7",
        '⅑' => "1/9",
        '⅒' => "1/10",
        '⅓' => "1/3",
        '⅔' => "2/3",
        '⅕' => "1/5",
        '⅖' => "2/5",
        '⅗' => "3/5",
        '⅘' => "4/5",
        '⅙' => "1/6",
        '⅚' => "5/6",
        '⅛' => "1/8",
        '⅜' => "3/8",
        '⅝' => "5/8",
        '⅞' => "7/8",
        _ => return None,
    })
}

/// Writes fractions of TeX with a slash, and [`EXPRESSION`] for what is not computed.
fn without_commands(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        rest = &rest[at..];
        let fraction = FRACTION_COMMANDS.iter().find_map(|command| rest.strip_prefix(command));
        let other = EXPRESSION_COMMANDS.iter().find_map(|(name, count)| Some((rest.strip_prefix(name)?, *count)));
        rest = match (fraction.and_then(two_arguments), other) {
            (Some((above, below, after)), _) => {
                push_fraction(&mut plain, above, below);
                after
            }
            (None, Some((after, count))) => {
                plain.push(EXPRESSION);
                (0..count).fold(after, |after, _| argument(after).map_or(after, |(_, after)| after))
            }
            (None, None) => {
                plain.push('\\');
                &rest[1..]
            }
        };
    }
    plain + rest
}

fn push_fraction(plain: &mut String, above: &str, below: &str) {
    let (Some(above), Some(below)) = (ARGUMENT.captures(above), ARGUMENT.captures(below)) else {
        return plain.push(EXPRESSION);
    };
    // `1\frac12` is `1 1/2`.
    if plain.ends_with(|before: char| before.is_ascii_digit()) {
        plain.push(' ');
    }
    let sign = if above[1] == below[1] { "" } else { "-" };
    plain.push_str(&format!("{sign}{}/{}", &above[2], &below[2]));
}

fn two_arguments(text: &str) -> Option<(&str, &str, &str)> {
    let (first, after) = argument(text)?;
    let (second, after) = argument(after)?;
    Some((first, second, after))
}

/// The argument of a command, and what follows it: a group in braces, or one character. An optional
/// argument in brackets before it is left out.
fn argument(text: &str) -> Option<(&str, &str)> {
    let mut text = text.trim_start();
    let near = |text: &str| text.floor_char_boundary(MAX_ARGUMENT);
    if let Some(end) = text.strip_prefix('[').and_then(|optional| optional[..near(optional)].find(']')) {
        text = text[end + 2..].trim_start();
    }
    match text.strip_prefix('{') {
        Some(inside) => {
            let content = split_at_closing_brace(&inside[..near(inside)]).0;
            let is_too_long = content.len() < inside.len() && !inside[content.len()..].starts_with('}');
            (!is_too_long).then(|| (content, inside[content.len()..].strip_prefix('}').unwrap_or_default()))
        }
        None => text.chars().next().map(|first| text.split_at(first.len_utf8())),
    }
}

/// Divides a text at the brace that closes a group whose opening brace precedes the text. A group
/// that is never closed goes to the end.
pub(super) fn split_at_closing_brace(text: &str) -> (&str, &str) {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return (&text[..at], &text[at + 1..]),
            '}' => depth -= 1,
            _ => {}
        }
    }
    (text, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spelled_one_way() {
        for (text, expected) in [
            (r"9{,}500 9\,500 9,\!500", "9,500 9\u{2009}500 9,500"),
            ("9\u{202f}500, −5 and 1\u{200b}8", "9\u{2009}500, -5 and 18"),
            ("१२ ١٢ 𝟙𝟠 １８％", "12 12 18 18%"),
            (r"\frac{3}{4} \dfrac34 1\frac{1}{2} -\frac{1,000}{3}", "3/4 3/4 1 1/2 -1,000/3"),
            (r"\frac{x}{2} \sqrt[3]{8} 2\sqrt{\frac{1}{4}} 5\pi √16", "\u{FFFC} \u{FFFC} 2\u{FFFC} 5\u{FFFC} \u{FFFC}"),
            ("½ 1½ 10² cm²", "1/2 1 1/2 10^{2} cm^{2}"),
            (r"\text{18 dollars} \mathbf{18} \$18 18\%", "{18 dollars} {18} $18 18%"),
            ("**18** 2**10 **Total:** 2 * 3", "18 2**10 Total: 2 * 3"),
            ("(3, 5) [1; 2) {1, 2} (1,234)", "(\u{FFFC}) [\u{FFFC}) {\u{FFFC}} (1,234)"),
            ("3*4=<<3*4=12>>12", "3*4=12"),
            (r"a\ 5 \\frac{3}{4}", "a\u{2009}5 \\3/4"),
        ] {
            assert_eq!(to_plain(text), expected, "{text}");
        }
    }
}
