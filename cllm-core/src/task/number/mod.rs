//! Reads the number that a text answers with: one reader for every benchmark that compares numbers.
//!
//! What counts is the last of the numbers in a box (`\boxed{18}`) or at once after `####`, or else
//! the last number of the text. A number is read exactly, and only if it is one number for certain:
//! a fraction, a power or scientific notation is one number; a list, a time, a ratio, a version, a
//! date or a sum is none; and a comma groups thousands or makes the number unreadable.

mod plain;
mod scan;
mod value;

use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

use plain::split_at_closing_brace;
use scan::Found;
pub(super) use value::Number;

static BOX: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\\f?boxed\s*|\\fbox\s*").expect("the pattern is valid"));
/// `####` at once before a number, or before an equation whose other side is the number.
static MARK: LazyLock<Regex> = LazyLock::new(|| {
    let decoration = r"(?:[\s#$€£¥₹*_(){}\[\]=≈~`+-]|\\boxed|\\approx|USD|EUR|GBP|Rs\.?)*";
    Regex::new(&format!(r"####{decoration}(?:\d[^=\n]*={decoration})?$")).expect("the pattern is valid")
});
/// What stands between two equations.
static SEPARATOR: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[,;]|\b(?:or|and)\b").expect("the pattern is valid"));
/// Units with their exponents, as in `12 cm^2` and `9.8 { m}/{s}^{2}`. Of single letters, only those of
/// metres and seconds have one: `3t^2` is a term.
static UNITS: LazyLock<Regex> = LazyLock::new(|| {
    let raised = r"\s*\}?\s*\^\{?[+-]?\d\}?";
    let space = format!(r"[\s{{}}/.×{}]", plain::GAP);
    Regex::new(&format!(r"^(?:{space}|[A-Za-z]{{2,}}(?:{raised})?|[ms]{raised}|[A-Za-z])*$"))
        .expect("the pattern is valid")
});
static EQUALS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"=|≈|\\approx").expect("the pattern is valid"));

/// The number that a text answers with.
pub(super) fn final_number(text: &str) -> Option<Number> {
    let text = plain::to_plain(text);
    let found = scan::scan(&text);
    let answers = [last_marked(&text, &found), last_boxed(&text, &found)];
    match answers.into_iter().flatten().max_by_key(|(at, _)| *at) {
        Some((_, value)) => value,
        None => found.into_iter().filter_map(|found| found.value).next_back(),
    }
}

/// Whether an answer has the reference's number.
pub(super) fn same_final_number(reference: &str, answer: &str) -> bool {
    final_number(reference).is_some_and(|expected| final_number(answer) == Some(expected))
}

/// The number that a text consists of, apart from currency, unit signs, markup and punctuation.
pub(super) fn whole_number(text: &str) -> Option<Number> {
    let text = plain::to_plain(text);
    let [Found { span, value, .. }]: [Found; 1] = scan::scan(&text).try_into().ok()?;
    let around = [&text[..span.start], &text[span.end..]].concat();
    let is_alone = !BOX.replace_all(&around, "").contains(char::is_alphanumeric);
    value.filter(|_| is_alone)
}

/// Where the last `####` before a number stands, and the number. What is spelled like a number and
/// is none answers with no number.
fn last_marked(text: &str, found: &[Found]) -> Option<(usize, Option<Number>)> {
    let mark = |found: &Found| {
        // The line of the number and the one before it.
        let before = &text[..found.digits_start];
        let start = before.rmatch_indices('\n').nth(1).map_or(0, |(at, _)| at);
        MARK.find(&before[start..]).map(|mark| start + mark.start())
    };
    let marked: Vec<(usize, &Found)> = found.iter().filter_map(|found| Some((mark(found)?, found))).collect();
    let &(last, _) = marked.last()?;
    let value = marked.iter().rev().filter(|(at, _)| *at == last).find_map(|(_, found)| found.value.clone());
    Some((last, value))
}

/// Where the last box stands, and the one number in it or in the last part of its equation. A box
/// with several numbers answers with none of them.
fn last_boxed(text: &str, found: &[Found]) -> Option<(usize, Option<Number>)> {
    let command = BOX.find_iter(text).last()?;
    let content = box_content(text, command.end());
    let start = content.start + last_side(&text[content.clone()]);
    let mut inside = found.iter().filter(|found| (start..content.end).contains(&found.digits_start));
    let value = match (inside.next(), inside.next()) {
        (Some(only), None) => only.value.clone(),
        (Some(first), Some(_)) if UNITS.is_match(&text[first.span.end..content.end]) => first.value.clone(),
        _ => None,
    };
    Some((command.start(), value))
}

/// Where the last side of an equation begins; 0 for what is no single equation, such as `x=5, y=6`.
fn last_side(content: &str) -> usize {
    let signs: Vec<_> = EQUALS.find_iter(content).collect();
    let (Some(first), Some(last)) = (signs.first(), signs.last()) else { return 0 };
    let is_one = signs.len() == 1 || !SEPARATOR.is_match(&content[first.end()..last.start()]);
    if is_one { last.end() } else { 0 }
}

/// What a box holds, given the end of its command: a group in braces, or the rest of the line.
fn box_content(text: &str, start: usize) -> Range<usize> {
    match text[start..].strip_prefix('{') {
        Some(inside) => start + 1..start + 1 + split_at_closing_brace(inside).0.len(),
        None => start..start + text[start..].find(['\n', ' ']).unwrap_or(text.len() - start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_counts_however_it_is_spelled() {
        for (reference, answer) in [
            ("9500", r"The total is \boxed{9{,}500}."),
            ("9500", r"So 9\,500 in all"),
            ("9500", "9\u{202f}500"),
            ("9500", "9 500"),
            ("9500", "$9,500.00"),
            ("9500", "9'500"),
            ("9500", r"9,\!500"),
            ("-5", "It is \u{2212}5."),
            ("-5", "It is -5"),
            ("-5", "- 5"),
            ("-5", "x = - 5"),
            ("-5", "-$5"),
            ("-5", "$-5$"),
            ("-5", "negative 5 degrees"),
            ("6", "It takes 5-6 days"),
            ("6", "It takes 5–6 days"),
            ("6", "It takes 5 - 6 days"),
            ("12", "12 (१२)"),
            ("12", "一共是１２个"),
            ("12", "答案是12。"),
            ("12", "Answer: 12!"),
            ("12", "**12** eggs"),
            ("12", "__12__"),
            ("12", "`12`"),
            ("12", "12kg of 12 kg"),
            ("12", "USD12"),
            ("12", "Rs.12"),
            ("12", "€ 12"),
            ("12", "12€"),
            ("12", "12%"),
            ("12", r"12\%"),
            ("12", "the 12th"),
            ("12", "12°"),
            ("12", r"12^\circ"),
            ("12", r"12^{\text{th}}"),
            ("12", "12 cm^2"),
            ("5", "5 m"),
            ("5", "5 g of 5 h"),
            ("5", "5m"),
            ("5", "5 L"),
            ("5", "It is 5x faster"),
            ("5", "5 a day"),
            ("12", "12 m²"),
            ("12", "12 km/h"),
            ("12", "12 x_1"),
            ("12", "12 of A4"),
            ("12", "No.12"),
            ("1000", "1e3"),
            ("1000", "10^3"),
            ("1000", r"1 \times 10^{3}"),
            ("0.75", "3/4"),
            ("0.75", r"\frac{3}{4}"),
            ("1.5", "1½"),
            ("2.5", r"2\frac{1}{2} cups"),
            ("2000000", "2 million"),
            ("5000", "5k"),
            ("5000000", "$5 million"),
            ("12000000", "12M"),
            ("1500000", "$1.5M"),
            ("2000000000", "$2B"),
            ("2000000000", "€2 bn"),
            ("5000000", "£5m"),
            ("2500", "2.5 k"),
            ("2500", "$2.5 K"),
            ("300", "300 K"),
            ("-5", "minus 5"),
            ("-5", "The answer is minus 5."),
            ("5", "10 minus 5"),
            ("1.5", "1 and a half"),
            ("2.25", "2 and a quarter hours"),
            ("2.5", "2 and 1/2 cups"),
            ("100000", "1,00,000"),
            ("1234567", "₹12,34,567.00"),
            ("7", "7 (mod 9)"),
            ("7", r"7 \pmod{9}"),
            ("7", "3 + 4 = 7"),
            ("2", "Steps:\n1. Add them\n1 + 1 = 2\n2. Done\n"),
            ("18", "18. That is all."),
        ] {
            assert!(same_final_number(reference, answer), "{reference}: {answer} gives {:?}", final_number(answer));
        }
    }

    #[test]
    fn what_only_ends_with_the_digits_does_not_count() {
        for (reference, answer) in [
            ("3/4", "It is 1/4."),
            ("1,2,3", "123"),
            ("123", "1,2,3"),
            ("1234", "12 34"),
            ("34", "12\u{2009}34"),
            ("23", "about 6.02e23"),
            ("23", r"about 6.02 \times 10^{23}"),
            ("35", "(3,5)"),
            ("5", "(3,5)"),
            ("5", "(3, 5)"),
            ("5", "{3; 5}"),
            ("35", "3,5"),
            ("5", "3,5"),
            ("3.5", "3,5"),
            ("30", "at 7:30"),
            ("2", "3:2"),
            ("2", "3 : 2"),
            ("10", "2^10"),
            ("10", "2**10"),
            ("10", r"2^{10}"),
            ("10", "x^10"),
            ("2", "x**2"),
            ("2", "10²"),
            ("10", "10²"),
            ("2", "2^n"),
            ("3", "1.2.3"),
            ("2.3", "1.2.3"),
            ("15", "2024-01-15"),
            ("2024", "01/15/2024"),
            ("2", "18 + 2"),
            ("9", "2 × 9"),
            ("16", "√16"),
            ("3", r"2\sqrt{3}"),
            ("2", r"2\sqrt{3}"),
            ("5", "5π"),
            ("5", r"5\pi"),
            ("2", r"\frac{x}{2}"),
            ("3", r"0.\overline{3}"),
            ("4", "A4"),
            ("2", "x_2"),
            ("2", "H2O"),
            ("8", r"\log_2 8"),
            ("5", "±5"),
            ("5", "5±1"),
            ("5", r"5 \pm 1"),
            ("5", "5y + 3"),
            ("5", "x = 5y"),
            ("5", "5a"),
            ("5", "5n + 2"),
            ("5", "5x"),
            ("5", "5 x"),
            ("5", "5 x^2"),
            ("5", "5xy"),
            ("12", "12M"),
            ("2", "$2B"),
            ("19", "COVID-19"),
            ("3", "GPT-3"),
            ("1", "1 and a half"),
            ("17", "17 mod 5"),
            ("5", "-5"),
            ("-5", "5"),
            ("2", "2 million"),
            ("1", "1½"),
            ("6", "#### 6/10"),
            ("2", "1. Add\n2. Subtract"),
            ("0.3", "0.30000000000000004"),
        ] {
            assert!(!same_final_number(reference, answer), "{reference}: {answer} gives {:?}", final_number(answer));
        }
    }

    #[test]
    fn a_marked_or_boxed_number_wins_over_the_last_one() {
        for (reference, answer) in [
            ("18", r"Thus \boxed{18}, after 2 steps"),
            ("18", r"\boxed{\text{18 dollars}} of 20"),
            ("18", r"\boxed{\$18} of 20"),
            ("18", r"\boxed{x = 18}, 20"),
            ("18", r"\boxed{2 \times 9 = 18}, 20"),
            ("18", r"$\boxed{ \mathbf{18} }$ in 2 days"),
            ("18", r"\boxed{3} and then \boxed{18}, 2"),
            ("18", r"\fbox{18} in 2 days"),
            ("18", r"\boxed 18 in 2 days"),
            ("18", r"\boxed{18 in the end"),
            ("3/4", r"\boxed{\frac{3}{4}} of 8"),
            ("12", r"\boxed{12 \text{ cm}^2}"),
            ("12", r"\boxed{12\text{ m}^2}"),
            ("12", r"\boxed{12\,\text{m}^3}"),
            ("12", r"\boxed{12\ \mathrm{cm}^{2}}"),
            ("12", r"\boxed{12 cm^2}"),
            ("12", r"\boxed{12 cm²}"),
            ("9.8", r"\boxed{a = 9.8 \text{ m}/\text{s}^2}"),
            ("18", "#### 18 apples, not 20"),
            ("18", "#### $18.00 of 20"),
            ("18", "#### **18** of 20"),
            ("18", r"#### \boxed{18} of 20"),
            ("18", "####18 of 20"),
            ("18", "####\n18 of 20"),
            ("18", "#### 17\nNo:\n#### 18\nin 2 days"),
            ("18", "#### 9 × 2 = 18\nin 2 days"),
            ("-18", "#### -18 of 20"),
            ("-18", "#### - 18 of 20"),
            ("20", "#### Step 2: total\n18 + 2 = 20\nThe answer is 20."),
            ("20", "#### 1. Start\n5\n#### 2. Total\nIt is 20"),
        ] {
            assert!(same_final_number(reference, answer), "{reference}: {answer} gives {:?}", final_number(answer));
        }
        for (reference, answer) in [
            ("5", r"3 + 2 = 5, \boxed{(3, 5)}"),
            ("5", r"5: \boxed{3, 5}"),
            ("6", r"\boxed{x=5, y=6}"),
            ("5", r"5: \boxed{\text{yes}}"),
            ("3", r"3: \boxed{3(x)^2}"),
            ("3", r"3: \boxed{3\sin^2 x}"),
            ("3", r"3: \boxed{3-x^2}"),
            ("3", r"3: \boxed{3t^2}"),
            ("3", r"3: \boxed{3x^2}"),
            ("5", "5\n#### 7:30"),
            ("5", "5\n#### (3, 5)"),
            ("18", "#### 18\n#### 17"),
        ] {
            assert!(!same_final_number(reference, answer), "{reference}: {answer} gives {:?}", final_number(answer));
        }
    }

    #[test]
    fn a_whole_text_may_be_one_number() {
        let number = |text: &str| Number::parse(text);
        for text in ["1000", " $1,000.00 ", "1e3.", "**1000**", r"\boxed{1{,}000}", "1 000!", "1000%", "(1000)"] {
            assert_eq!(whole_number(text), number("1000"), "{text}");
        }
        for text in ["", "Paris", "1000 dollars", "10 or 1000", "7:30", "x1000", "1,0,0,0"] {
            assert_eq!(whole_number(text), None, "{text}");
        }
    }
}
