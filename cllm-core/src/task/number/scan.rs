//! Finds the numbers of a plain text, and decides by what stands around each of them whether it is
//! a number at all.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

use super::plain::{EXPRESSION, GAP};
use super::value::Number;

/// A number, or what is spelled like one and is none: a time, a list, a power of a variable.
pub(super) struct Found {
    /// Where the digits begin.
    pub(super) digits_start: usize,
    /// The spelling with its sign, its currency and its word of scale.
    pub(super) span: Range<usize>,
    /// `None` if it is no number.
    pub(super) value: Option<Number>,
}

/// Digits with everything between them that may make one thing of them.
static CLUSTER: LazyLock<Regex> = LazyLock::new(|| {
    let operator = r"(?:[+×÷/:xX]|\*\*?)";
    let operand = r"[$€£¥₹]?-?\.?\d+";
    pattern(&format!(
        r"\.?\d+(?:[.,:'’_/{GAP} -]\d+|(?:{operator}| {operator} ){operand}|[eE][+-]\d+|[A-Za-z]+\d+|\^\{{[+-]?\d+\}}|\^[+-]?\d+)*|{EXPRESSION}"
    ))
});
/// A name such as `A4`, `GPT-3` or `x_2`, but not a currency such as `USD18` or a command such as `\approx18`.
static NAME: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\\?)([A-Za-z]+\.?|[A-Z]{2,}-)$|[0-9A-Za-z)}]_\{?-?$"));
static CURRENCY: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?:Rs\.?|(?:USD|EUR|GBP|INR|CAD|AUD|CNY|JPY)-?)$"));
/// What makes the digits after it an exponent, a root, a deviation or an operand.
static OPERAND_AFTER: LazyLock<Regex> = LazyLock::new(|| {
    let left = format!(r"[0-9A-Za-z)\]}}%{EXPRESSION}]");
    pattern(&format!(r"\^\{{?[+-]?$|±\s?$|{EXPRESSION} ?-?$|{left}(?:[+×÷*/]| [+×÷*/] )[$€£¥₹]?-?$"))
});
static POWER_OF_NAME: LazyLock<Regex> = LazyLock::new(|| pattern(r"[A-Za-z)\]}]\*\*-?$"));
/// A raised unit: `^\circ`, `^{th}`.
static RAISED_UNIT: LazyLock<Regex> = LazyLock::new(|| pattern(r"^\^\{?\s*(?:\\circ|°|\{?\s*(?:st|nd|rd|th)\b)"));
/// What makes the digits before it a part of an expression.
static OPERAND_BEFORE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^(?:\^| ?(?:±|\+/-)|\*\*[A-Za-z(]|\.{EXPRESSION}| ?[*×/+÷-]? ?{EXPRESSION}| [+×÷*] [A-Za-z(\\]|[+×÷*/]\()"
    ))
});
/// A variable whose coefficient the digits are. Letters of units are none, and after a space only what
/// no sentence goes on with: `5 a day`.
static VARIABLE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(r"^(?:(?:[abijnqrxyz]|[abcnxyz]{{2,3}})\b|[ {GAP}](?:[nxyz]|[xyz]{{2,3}})[ \t]*(?:$|[^\w \t]))"))
});
/// `5x faster` says how often.
static TIMES: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^x (?:as|more|less|the|that|this|what|his|her|their|its|\w+er)\b"));
/// A minus sign before the digits. One with a space after it is a sign where it cannot be a dash, a
/// bullet or a subtraction.
static MINUS: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"(?:^|[^0-9A-Za-z)\]}%-])-$|(?:^\s*|[=(\[{<≈:#]\s*|\b(?:is|equals)\s+|(?:^|[\s(])\$)- $|(?i)\bnegative\s$|(?i)(?:^|[=(\[{:]|\b(?:is|equals|gives|get))\s*minus\s$",
    )
});
static CURRENCY_SYMBOL: LazyLock<Regex> = LazyLock::new(|| pattern(r"[$€£¥₹]\s?$"));
/// Words and letters of scale, in the order of [`SCALES`].
static SCALE: LazyLock<Regex> = LazyLock::new(|| {
    let words = "(?i:(hundred)|(thousand)|(million)|(billion)|(trillion))";
    pattern(&format!(r"^(?:[ {GAP}-]?{words}|([ {GAP}]?k|K)|(M|mn)|(B|bn))\b"))
});
/// With a currency, more letters can be no unit: `$5m`.
static CURRENCY_SCALE: LazyLock<Regex> =
    LazyLock::new(|| pattern(&format!(r"^[ {GAP}]?(?:()()()()()([kK])|([mM]|mn)|([bB]|bn))\b")));
const SCALES: [u64; 8] = [100, 1_000, 1_000_000, 1_000_000_000, 1_000_000_000_000, 1_000, 1_000_000, 1_000_000_000];
/// The number of an item of a list, at the start of its line.
static ITEM: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?m)^[ \t>#*-]*(\d{1,3})[.)][ \t]+\S"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the pattern is valid")
}

/// All numbers of a plain text, in order.
pub(super) fn scan(text: &str) -> Vec<Found> {
    let items = item_numbers(text);
    let mut found = Vec::new();
    for cluster in CLUSTER.find_iter(text).filter(|cluster| !items.contains(&cluster.start())) {
        // In `No.5` the point is none of the number's.
        let has_foreign_point = cluster.as_str().starts_with('.')
            && text[..cluster.start()]
                .ends_with(|before: char| before.is_ascii_alphanumeric() || ".)".contains(before));
        let start = cluster.start() + usize::from(has_foreign_point);
        let is_name = is_part_of_name(text, start, cluster.end());
        let parts = parts(&text[start..cluster.end()]).into_iter().skip(usize::from(is_name));
        found.extend(parts.map(|part| Found::read(text, start + part.start..start + part.end)));
    }
    found
}

/// Where the numbers of list items begin. One item does not make a list: `18. So he is right.`
fn item_numbers(text: &str) -> HashSet<usize> {
    let mut starts = HashSet::new();
    let mut next = 1;
    for item in ITEM.captures_iter(text) {
        if item[1].parse() == Ok(next) {
            starts.insert(item.get(1).map_or(0, |number| number.start()));
            next += 1;
        }
    }
    if starts.len() > 1 { starts } else { HashSet::new() }
}

fn is_part_of_name(text: &str, start: usize, end: usize) -> bool {
    let before = &text[..start];
    let is_power = POWER_OF_NAME.is_match(before) && !text[end..].starts_with("**");
    let is_name = NAME.captures(before).is_some_and(|name| match (name.get(1), name.get(2)) {
        (Some(backslash), Some(letters)) => {
            let may_be_sentence = letters.as_str().ends_with('.');
            backslash.is_empty() && !CURRENCY.is_match(letters.as_str()) && !may_be_sentence
        }
        _ => true,
    });
    is_power || is_name
}

/// The parts of a cluster that may be numbers of their own. Spaces and a hyphen may join digits to
/// one number or stand between two, as in `5-6 days`.
fn parts(cluster: &str) -> Vec<Range<usize>> {
    let whole = 0..cluster.len();
    if Number::parse(cluster).is_some() {
        return vec![whole];
    }
    let is_between_digits = |at: usize| {
        let bytes = cluster.as_bytes();
        bytes[at - 1].is_ascii_digit() && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)
    };
    let separator = if cluster.contains(' ') { ' ' } else { '-' };
    let ends: Vec<usize> =
        cluster.match_indices(separator).map(|(at, _)| at).filter(|&at| at > 0 && is_between_digits(at)).collect();
    // `2024-01-15` is a date.
    if ends.is_empty() || (separator == '-' && ends.len() > 1) {
        return vec![whole];
    }
    let starts = std::iter::once(0).chain(ends.iter().map(|end| end + 1));
    let ranges = starts.zip(ends.iter().copied().chain([cluster.len()]));
    ranges
        .flat_map(|(start, end)| {
            parts(&cluster[start..end]).into_iter().map(move |part| part.start + start..part.end + start)
        })
        .collect()
}

impl Found {
    /// Reads what is spelled at `digits`, with its surroundings.
    fn read(text: &str, digits: Range<usize>) -> Self {
        let (before, after) = (&text[..digits.start], &text[digits.end..]);
        let value = Number::parse(&text[digits.clone()])
            .filter(|_| !OPERAND_AFTER.is_match(before))
            .filter(|_| !OPERAND_BEFORE.is_match(after) || RAISED_UNIT.is_match(after))
            .filter(|_| !VARIABLE.is_match(after) || TIMES.is_match(after));
        let (start, is_negative) = sign(before);
        let has_currency = CURRENCY_SYMBOL.is_match(before);
        let mut end = digits.end;
        let mut scaled = value.map(|value| if is_negative { -value } else { value });
        while let Some((length, factor)) = scale(&text[end..], has_currency) {
            scaled = scaled.map(|value| value.times(Number::from(factor)));
            end += length;
        }
        Found { digits_start: digits.start, span: start..end, value: scaled }
    }
}

/// Length and factor of the word or the letter of scale with which a text begins.
fn scale(text: &str, has_currency: bool) -> Option<(usize, u64)> {
    let of_currency = || CURRENCY_SCALE.captures(text).filter(|_| has_currency);
    let found = SCALE.captures(text).or_else(of_currency)?;
    let index = (0..SCALES.len()).find(|&index| found.get(index + 1).is_some_and(|group| !group.is_empty()))?;
    Some((found[0].len(), SCALES[index]))
}

/// Where the sign or the currency before the digits begins, and whether the sign is a minus.
fn sign(before: &str) -> (usize, bool) {
    let without_currency = CURRENCY_SYMBOL.find(before).map_or(before, |symbol| &before[..symbol.start()]);
    for before in [before, without_currency] {
        if MINUS.is_match(before) {
            let word = before.trim_end().trim_end_matches(|c: char| c == '-' || c.is_ascii_alphabetic());
            return (word.len(), true);
        }
    }
    (without_currency.len(), false)
}
