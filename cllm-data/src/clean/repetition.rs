//! Detects loops in a response. Each function looks at its tokens or its text alone.

use std::collections::{HashMap, HashSet};

/// Whether one token occurs at least `min_length` times in a row.
pub(super) fn has_token_run(ids: &[i32], min_length: usize) -> bool {
    ids.chunk_by(|a, b| a == b).any(|run| run.len() >= min_length)
}

/// Fraction of the n-grams that repeat an earlier one.
pub(super) fn repeated_ngram_fraction(ids: &[i32], n: usize) -> f64 {
    let total = ids.len().saturating_sub(n - 1);
    if total == 0 {
        return 0.0;
    }
    let distinct: HashSet<&[i32]> = ids.windows(n).collect();
    1.0 - distinct.len() as f64 / total as f64
}

/// Whether the response ends in `repeats` copies of a sequence of 2 to `max_period` tokens.
pub(super) fn has_periodic_tail(ids: &[i32], max_period: usize, repeats: usize) -> bool {
    (2..=max_period).take_while(|period| period * repeats <= ids.len()).any(|period| {
        let tail = &ids[ids.len() - period * repeats..];
        tail.iter().zip(&tail[period..]).all(|(a, b)| a == b)
    })
}

/// Whether a line or sentence of at least `min_bytes` bytes occurs at least `repeats` times among
/// `max_sentences` of them in a row. Over a longer stretch, a text repeats itself without being in a
/// loop.
pub(super) fn has_repeated_sentence(text: &str, min_bytes: usize, repeats: usize, max_sentences: usize) -> bool {
    let mut occurrences: HashMap<&str, Vec<usize>> = HashMap::new();
    let sentences = text.split(['\n', '.', '!', '?', ';']).map(str::trim);
    sentences.filter(|sentence| sentence.len() >= min_bytes).enumerate().any(|(index, sentence)| {
        let indices = occurrences.entry(sentence).or_default();
        indices.push(index);
        indices.len() >= repeats && index - indices[indices.len() - repeats] < max_sentences
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_check_detects_its_loop_and_passes_a_plain_response() {
        let plain: Vec<i32> = (0..60).collect();
        assert!(!has_token_run(&plain, 10) && has_token_run(&[vec![1, 2], vec![7; 10]].concat(), 10));
        assert_eq!(repeated_ngram_fraction(&plain, 4), 0.0);
        assert!(repeated_ngram_fraction(&[1, 2, 3, 4].repeat(10), 4) > 0.8);
        assert!(!has_periodic_tail(&plain, 32, 3));
        assert!(has_periodic_tail(&[vec![9, 9, 8], [1, 2, 3].repeat(3)].concat(), 32, 3));
        assert!(!has_periodic_tail(&[[1, 2, 3].repeat(3), vec![4]].concat(), 32, 3));
        assert!(has_repeated_sentence("He has 3 apples. He has 3 apples.\nHe has 3 apples", 8, 3, 64));
        assert!(!has_repeated_sentence("ok. ok. ok. He has 3 apples.", 8, 3, 64));
    }

    #[test]
    fn sentences_of_a_long_response_may_come_back() {
        let text = |distance: usize| {
            let others = |start: usize| (1..distance).map(|index| format!("Step {start} {index} is new. ")).collect();
            ["Let me check.".to_owned(), others(1), "Let me check.".to_owned(), others(2), "Let me check.".to_owned()]
                .concat()
        };
        assert!(has_repeated_sentence(&text(31), 8, 3, 64));
        assert!(!has_repeated_sentence(&text(32), 8, 3, 64));
    }
}
