//! Any prompts with a reference: right is the same text, white space at the ends aside, or the same number.

use super::gsm8k::number;

pub(super) fn is_right(reference: &str, answer: &str) -> bool {
    let (reference, answer) = (reference.trim(), answer.trim());
    reference == answer || number(reference).is_some_and(|wanted| number(answer) == Some(wanted))
}

#[cfg(test)]
mod tests {
    use super::is_right;

    #[test]
    fn texts_and_numbers() {
        assert!(is_right("Paris", " Paris\n") && !is_right("Paris", "paris"));
        assert!(is_right("1,000", "1000.0") && !is_right("1000", "1001"));
    }
}
