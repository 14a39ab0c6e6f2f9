//! Rules that find loops in an answer; each is a pure function of its tokens or text.

use std::collections::HashMap;

/// Whether one token occurs `times` times in a row.
pub fn token_run(ids: &[i32], times: usize) -> bool {
    ids.chunk_by(|a, b| a == b).any(|run| run.len() >= times)
}

/// Share of the n-grams that are repeats of earlier ones.
pub fn repeated_share(ids: &[i32], n: usize) -> f64 {
    let total = ids.len().saturating_sub(n - 1);
    if total == 0 {
        return 0.0;
    }
    let distinct: std::collections::HashSet<&[i32]> = ids.windows(n).collect();
    1.0 - distinct.len() as f64 / total as f64
}

/// Whether the answer ends in a piece of at most `longest` tokens that stands there `times` times in a row.
pub fn periodic_tail(ids: &[i32], longest: usize, times: usize) -> bool {
    (2..=longest).take_while(|period| period * times <= ids.len()).any(|period| {
        let tail = &ids[ids.len() - period * times..];
        tail.iter().zip(&tail[period..]).all(|(a, b)| a == b)
    })
}

/// Whether a line or sentence of at least `letters` letters occurs `times` times.
pub fn repeated_sentence(text: &str, letters: usize, times: usize) -> bool {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    let sentences = text.split(['\n', '.', '!', '?', ';']).map(str::trim).filter(|piece| piece.len() >= letters);
    sentences.into_iter().any(|sentence| {
        let count = counts.entry(sentence).or_default();
        *count += 1;
        *count >= times
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_fires_on_its_loop_and_not_on_a_plain_answer() {
        let plain: Vec<i32> = (0..60).collect();
        assert!(!token_run(&plain, 10) && token_run(&[vec![1, 2], vec![7; 10]].concat(), 10));
        assert_eq!(repeated_share(&plain, 4), 0.0);
        assert!(repeated_share(&[1, 2, 3, 4].repeat(10), 4) > 0.8);
        assert!(!periodic_tail(&plain, 32, 3));
        assert!(periodic_tail(&[vec![9, 9, 8], [1, 2, 3].repeat(3)].concat(), 32, 3));
        assert!(!periodic_tail(&[[1, 2, 3].repeat(3), vec![4]].concat(), 32, 3));
        assert!(repeated_sentence("He has 3 apples. He has 3 apples.\nHe has 3 apples", 8, 3));
        assert!(!repeated_sentence("ok. ok. ok. He has 3 apples.", 8, 3));
    }
}
