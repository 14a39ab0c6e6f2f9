//! How like its reference code is, where nothing says whether it is right.
//!
//! Code is cut into words (runs of letters, digits and `_`) and single other signs; white space counts for nothing, and of an
//! answer with a code fence what stands in the first.

use std::collections::HashMap;

use cllm_core::task::extract_code;
use serde::{Deserialize, Serialize};

/// Likeness of answers to their references, over all of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Similarity {
    /// BLEU-4 of the whole corpus (Papineni et al., 2002), one reference each, not smoothed: 0 where no four tokens in a row agree.
    pub bleu: Option<f64>,
    /// Share of the references' tokens before each answer's first other one.
    pub exact_prefix: Option<f64>,
}

impl Similarity {
    /// Of pairs of an answer and its reference.
    pub fn of<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let pairs: Vec<_> =
            pairs.map(|(answer, reference)| (tokens(extract_code(answer, |_| true)), tokens(reference))).collect();
        let wanted: usize = pairs.iter().map(|(_, reference)| reference.len()).sum();
        if wanted == 0 {
            return Similarity { bleu: None, exact_prefix: None };
        }
        let same = |(answer, reference): &(Vec<&str>, Vec<&str>)| {
            answer.iter().zip(reference).take_while(|(one, other)| one == other).count()
        };
        let prefix: usize = pairs.iter().map(same).sum();
        Similarity { bleu: Some(bleu(&pairs, wanted)), exact_prefix: Some(prefix as f64 / wanted as f64) }
    }
}

fn bleu(pairs: &[(Vec<&str>, Vec<&str>)], wanted: usize) -> f64 {
    let written: usize = pairs.iter().map(|(answer, _)| answer.len()).sum();
    let mut logs = 0.0;
    for order in 1..=4 {
        let (mut found, mut total) = (0, 0);
        for (answer, reference) in pairs {
            let (answer, reference) = (grams(answer, order), grams(reference, order));
            total += answer.values().sum::<usize>();
            found +=
                answer.iter().map(|(gram, &count)| count.min(reference.get(gram).copied().unwrap_or(0))).sum::<usize>();
        }
        if found == 0 {
            return 0.0;
        }
        logs += (found as f64 / total as f64).ln() / 4.0;
    }
    let brevity = (1.0 - wanted as f64 / written as f64).min(0.0);
    (logs + brevity).exp()
}

fn grams<'t, 's>(tokens: &'t [&'s str], order: usize) -> HashMap<&'t [&'s str], usize> {
    let mut counts = HashMap::new();
    tokens.windows(order).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

fn tokens(code: &str) -> Vec<&str> {
    let of_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = if of_word(first) { rest.find(|c| !of_word(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_a_hand_computation() {
        assert_eq!(tokens("def f_1(x):\n  return x"), ["def", "f_1", "(", "x", ")", ":", "return", "x"]);
        let of = |pairs: &[(&str, &str)]| Similarity::of(pairs.iter().copied());
        let same = of(&[("```python\na b  c d e\n```\nDone.", "a b c d e")]);
        assert_eq!((same.bleu, same.exact_prefix), (Some(1.0), Some(1.0)));
        // Of orders 1 to 4: 5 of 6, 4 of 5, 3 of 4, 2 of 3 (a clipped `e`); 6 tokens for 8.
        let found = of(&[("a b c d e e", "a b c d e f g h")]);
        let precision: f64 = (5.0 / 6.0) * (4.0 / 5.0) * (3.0 / 4.0) * (2.0 / 3.0);
        let wanted = precision.powf(0.25) * (1.0 - 8.0_f64 / 6.0).exp();
        assert!((found.bleu.unwrap() - wanted).abs() < 1e-12, "{found:?}, {wanted}");
        assert_eq!(found.exact_prefix, Some(5.0 / 8.0));
        let short = of(&[("a b c d", "a b c d a")]).bleu.unwrap();
        assert!((short - (-0.25_f64).exp()).abs() < 1e-12, "nothing counts more often than it was written: {short}");
        assert_eq!(of(&[("a b c", "a b c d")]).bleu, Some(0.0), "not smoothed");
        assert_eq!(of(&[("", "a")]), Similarity { bleu: Some(0.0), exact_prefix: Some(0.0) });
        assert_eq!(of(&[]).bleu, None);
    }
}
