//! How similar code is to its reference, for benchmarks that cannot tell whether it is correct.
//!
//! Code is split into words (runs of letters, digits and `_`) and single other characters; white
//! space does not count. If an answer has code fences, only the code in one of them counts: the last
//! that defines the reference's function, or else the last.

use std::collections::HashMap;

use cllm_core::task::compared_code;
use cllm_core::thought_text::without_thought;
use serde::{Deserialize, Serialize};

/// Similarity over all answers to their references.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Similarity {
    /// BLEU-4 of the whole corpus (Papineni et al., 2002) with one reference each, from 0 to 1. Not
    /// smoothed: 0 if no four tokens in a row agree.
    pub bleu: Option<f64>,
    /// Fraction of the references' tokens that precede the first difference of each answer.
    pub exact_prefix: Option<f64>,
}

/// The tokens of an answer and of its reference.
struct Pair<'t> {
    answer: Vec<&'t str>,
    reference: Vec<&'t str>,
}

impl Similarity {
    /// Computes the similarity over pairs of an answer and its reference. Both fields are `None` if
    /// the references have no tokens.
    pub fn from_pairs<'t>(pairs: impl Iterator<Item = (&'t str, &'t str)>) -> Self {
        let codes: Vec<(String, &str)> =
            pairs.map(|(answer, reference)| (compared_code(without_thought(answer), reference), reference)).collect();
        let pairs: Vec<Pair<'_>> =
            codes.iter().map(|(code, reference)| Pair { answer: tokens(code), reference: tokens(reference) }).collect();
        let reference_tokens: usize = pairs.iter().map(|pair| pair.reference.len()).sum();
        if reference_tokens == 0 {
            return Similarity { bleu: None, exact_prefix: None };
        }
        let prefix_tokens: usize = pairs.iter().map(Pair::common_prefix).sum();
        Similarity {
            bleu: Some(bleu(&pairs, reference_tokens)),
            exact_prefix: Some(prefix_tokens as f64 / reference_tokens as f64),
        }
    }
}

impl Pair<'_> {
    /// Number of tokens before the first difference.
    fn common_prefix(&self) -> usize {
        self.answer.iter().zip(&self.reference).take_while(|(one, other)| one == other).count()
    }
}

fn bleu(pairs: &[Pair<'_>], reference_tokens: usize) -> f64 {
    let answer_tokens: usize = pairs.iter().map(|pair| pair.answer.len()).sum();
    let mut mean_log_precision = 0.0;
    for order in 1..=4 {
        let (mut matches, mut total) = (0, 0);
        for pair in pairs {
            let (in_answer, in_reference) = (ngrams(&pair.answer, order), ngrams(&pair.reference, order));
            let clipped = |(ngram, &count): (_, &usize)| count.min(in_reference.get(ngram).copied().unwrap_or(0));
            total += in_answer.values().sum::<usize>();
            matches += in_answer.iter().map(clipped).sum::<usize>();
        }
        if matches == 0 {
            return 0.0;
        }
        mean_log_precision += (matches as f64 / total as f64).ln() / 4.0;
    }
    let log_brevity_penalty = (1.0 - reference_tokens as f64 / answer_tokens as f64).min(0.0);
    (mean_log_precision + log_brevity_penalty).exp()
}

/// How often each n-gram of this order occurs.
fn ngrams<'t, 's>(tokens: &'t [&'s str], order: usize) -> HashMap<&'t [&'s str], usize> {
    let mut counts = HashMap::new();
    tokens.windows(order).for_each(|ngram| *counts.entry(ngram).or_default() += 1);
    counts
}

fn tokens(code: &str) -> Vec<&str> {
    let is_word_char = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let length =
            if is_word_char(first) { rest.find(|c| !is_word_char(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_agree_with_a_computation_by_hand() {
        assert_eq!(tokens("def f_1(x):\n  return x"), ["def", "f_1", "(", "x", ")", ":", "return", "x"]);
        let similarity = |pairs: &[(&str, &str)]| Similarity::from_pairs(pairs.iter().copied());
        let same = similarity(&[("```python\na b  c d e\n```\nDone.", "a b c d e")]);
        assert_eq!((same.bleu, same.exact_prefix), (Some(1.0), Some(1.0)));
        // Precisions of orders 1 to 4: 5 of 6, 4 of 5, 3 of 4, 2 of 3 (a clipped `e`); 6 tokens for
        // 8.
        let actual = similarity(&[("a b c d e e", "a b c d e f g h")]);
        let precision: f64 = (5.0 / 6.0) * (4.0 / 5.0) * (3.0 / 4.0) * (2.0 / 3.0);
        let expected = precision.powf(0.25) * (1.0 - 8.0_f64 / 6.0).exp();
        assert!((actual.bleu.unwrap() - expected).abs() < 1e-12, "{actual:?}, {expected}");
        assert_eq!(actual.exact_prefix, Some(5.0 / 8.0));
        let short = similarity(&[("a b c d", "a b c d a")]).bleu.unwrap();
        assert!((short - (-0.25_f64).exp()).abs() < 1e-12, "nothing counts more often than it was written: {short}");
        assert_eq!(similarity(&[("a b c", "a b c d")]).bleu, Some(0.0), "not smoothed");
        assert_eq!(similarity(&[("", "a")]), Similarity { bleu: Some(0.0), exact_prefix: Some(0.0) });
        assert_eq!(similarity(&[]).bleu, None);
    }
}
