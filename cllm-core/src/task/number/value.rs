//! The value of a number as it is spelled, exactly: 0.1 is a tenth and 2/6 is a third.

use std::ops::Neg;
use std::sync::LazyLock;

use num_bigint::BigInt;
use regex::Regex;

use super::plain::GAP;

/// Longer spellings are read as no number: no answer needs them, and their arithmetic is slow.
const MAX_CHARS: usize = 400;
/// Largest power that is computed.
const MAX_EXPONENT: u32 = 400;

/// A rational number.
#[derive(Debug, Clone)]
pub(in crate::task) struct Number {
    numerator: BigInt,
    /// Never 0.
    denominator: BigInt,
}

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        &self.numerator * &other.denominator == &other.numerator * &self.denominator
    }
}

impl Neg for Number {
    type Output = Number;

    fn neg(self) -> Number {
        Number { numerator: -self.numerator, ..self }
    }
}

/// Digits with or without marks between thousands, and with or without decimals. The marks stand
/// between groups of exactly three digits and are all alike. A comma is never a decimal point:
/// `3,5` might as well be a list.
static DECIMAL: LazyLock<Regex> = LazyLock::new(|| {
    // The Indian grouping is 12,34,567.
    let indian = r"[1-9]\d?(?:,\d{2})+,\d{3}";
    let grouped = [",", "'", "’", "_", " ", &GAP.to_string()].map(|mark| format!(r"[1-9]\d{{0,2}}(?:{mark}\d{{3}})+"));
    pattern(&format!(r"(?P<whole>{}|{indian}|\d+)(?:\.(?P<decimals>\d+))?|\.(?P<only_decimals>\d+)", grouped.join("|")))
});
static SCIENTIFIC: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?P<factor>[\d.,]+)[eE](?P<exponent>[+-]?\d+)"));
/// `6.02 × 10^23`; a factor that is missing is 1.
static POWER: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"(?:(?P<factor>[\d.,]+) ?[*×xX] ?)?(?P<base>[\d.,]+)(?: ?\^ ?| ?\*\* ?)\{?(?P<exponent>[+-]?\d+)\}?")
});
static FRACTION: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?P<above>[^/]*?) ?/ ?(?P<below>[^/]*)"));
/// `1 1/2`.
static MIXED: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?P<whole>.*\d) (?P<above>\d+)/(?P<below>\d+)"));

/// Compiles a pattern of a whole spelling.
fn pattern(text: &str) -> Regex {
    Regex::new(&format!("^(?:{text})$")).expect("the pattern is valid")
}

impl Number {
    /// Reads one spelling without a sign. `None` if it is no single number: a list, a time, a
    /// version, a sum, a number with an ambiguous comma.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_CHARS {
            return None;
        }
        let readers = [Self::decimal, Self::scientific, Self::power, Self::mixed, Self::fraction];
        readers.into_iter().find_map(|read| read(text))
    }

    fn decimal(text: &str) -> Option<Self> {
        let found = DECIMAL.captures(text)?;
        let group = |name: &str| found.name(name).map_or("", |digits| digits.as_str());
        let decimals = [group("decimals"), group("only_decimals")].concat();
        let digits: String = group("whole").chars().filter(char::is_ascii_digit).chain(decimals.chars()).collect();
        let denominator = BigInt::from(10).pow(u32::try_from(decimals.len()).ok()?);
        Some(Number { numerator: digits.parse().ok()?, denominator })
    }

    fn scientific(text: &str) -> Option<Self> {
        let found = SCIENTIFIC.captures(text)?;
        Some(Self::decimal(&found["factor"])?.times(Self::from(10).to_power(&found["exponent"])?))
    }

    fn power(text: &str) -> Option<Self> {
        let found = POWER.captures(text)?;
        let factor = found.name("factor").map_or(Some(Self::from(1)), |factor| Self::decimal(factor.as_str()))?;
        let base = Self::decimal(&found["base"])?;
        // Only powers of ten make a spelling of one number out of a product.
        let is_product = found.name("factor").is_some() && base != Self::from(10);
        if is_product { None } else { Some(factor.times(base.to_power(&found["exponent"])?)) }
    }

    fn mixed(text: &str) -> Option<Self> {
        let found = MIXED.captures(text)?;
        let (whole, part) = (Self::decimal(&found["whole"])?, Self::fraction(text.rsplit(' ').next()?)?);
        let is_proper = part.numerator < part.denominator && whole.denominator == BigInt::from(1);
        let numerator = whole.numerator * &part.denominator + part.numerator;
        is_proper.then_some(Number { numerator, denominator: part.denominator })
    }

    fn fraction(text: &str) -> Option<Self> {
        let found = FRACTION.captures(text)?;
        let (above, below) = (Self::decimal(&found["above"])?, Self::decimal(&found["below"])?);
        Some(above.times(below.inverse()?))
    }

    pub(super) fn times(self, other: Number) -> Number {
        let numerator = self.numerator * other.numerator;
        Number { numerator, denominator: self.denominator * other.denominator }
    }

    fn inverse(self) -> Option<Self> {
        let is_zero = self.numerator == BigInt::from(0);
        (!is_zero).then_some(Number { numerator: self.denominator, denominator: self.numerator })
    }

    /// `None` for a power that is too large to compute.
    fn to_power(&self, exponent: &str) -> Option<Self> {
        let exponent: i32 = exponent.parse().ok()?;
        let size = exponent.unsigned_abs();
        if size > MAX_EXPONENT {
            return None;
        }
        let power = Number { numerator: self.numerator.pow(size), denominator: self.denominator.pow(size) };
        if exponent < 0 { power.inverse() } else { Some(power) }
    }
}

impl From<u64> for Number {
    fn from(value: u64) -> Self {
        Number { numerator: value.into(), denominator: 1.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_number_are_equal() {
        for (spelling, same) in [
            ("1,234,567", "1234567"),
            ("1 234 567", "1234567.000"),
            ("9'500", "9500"),
            ("12,34,567", "1234567"),
            ("9_500", "9500"),
            ("007", "7"),
            (".5", "0.50"),
            ("3/4", "0.75"),
            ("3 / 4", "6/8"),
            ("1,000/4", "250"),
            ("1 1/2", "1.5"),
            ("1e3", "1000"),
            ("2.5E-1", "1/4"),
            ("2^10", "1024"),
            ("10**3", "1000"),
            ("10^{-2}", "0.01"),
            ("6.02 × 10^23", "602e21"),
        ] {
            let (value, expected) = (Number::parse(spelling), Number::parse(same));
            assert!(value.is_some() && value == expected, "{spelling}: {value:?}, {same}: {expected:?}");
        }
        assert_ne!(Number::parse("0.3"), Number::parse("0.30000000000000004"));
        assert_ne!(Number::parse("9007199254740993"), Number::parse("9007199254740992"));
    }

    #[test]
    fn what_is_no_single_number_has_no_value() {
        for text in [
            "1,2,3",
            "3,5",
            "12,34",
            "1,2345",
            "0,500",
            "1,234,56",
            "1.2.3",
            "1.234,56",
            "7:30",
            "3:2",
            "1/2/3",
            "6/0",
            "2 × 9",
            "3 + 4",
            "2 × 3^4",
            "7h30",
            "12 34",
            "1,234 567",
            "1e999999999",
            "9^999",
            "5 7/2",
            "",
        ] {
            assert_eq!(Number::parse(text), None, "{text}");
        }
        assert_eq!(Number::parse(&"9".repeat(MAX_CHARS + 1)), None);
    }
}
