//! Sampling: how a token is chosen from the logits.
//!
//! Above temperature 0, noise is added to the scaled logits and the largest sum wins, which draws
//! from the softmax (the Gumbel-max trick; Maddison et al., arXiv 1411.0030). The noise is a hash
//! of (seed, sample, position, token) rather than the state of a generator: whichever forward
//! reaches a position samples the same token there, so every strategy gives the answer of
//! autoregressive decoding, and a draft token is accepted with the probability that the model gives
//! it. csrc/decode.cu computes the same noise.
//!
//! A token's score is its logit for greedy decoding, or else its scaled logit with noise. The
//! candidates of a position are the tokens with the largest scores, and their probabilities are the
//! softmax of the scores: for greedy decoding those of the model, and above temperature 0 a measure of
//! how clearly a token won with the noise that its position has in every forward.

pub(super) use crate::cuda::decode::MAX_CANDIDATES;

/// How the next token is chosen from the logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The token with the largest logit; ties go to the lowest id.
    Greedy,
    /// A draw from the softmax of the logits divided by this temperature, which is above 0.
    Temperature(f64),
}

impl Sampling {
    /// Converts the setting `temperature`, where 0 means greedy.
    pub fn from_temperature(temperature: f64) -> Self {
        if temperature == 0.0 { Sampling::Greedy } else { Sampling::Temperature(temperature) }
    }

    /// Whether the token with the largest logit is always chosen.
    pub fn is_greedy(self) -> bool {
        self == Sampling::Greedy
    }

    /// The factor that logits are scaled by; 0 means greedy.
    pub(super) fn inverse_temperature(self) -> f32 {
        match self {
            Sampling::Greedy => 0.0,
            Sampling::Temperature(temperature) => (1.0 / temperature) as f32,
        }
    }
}

/// A token that may come next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    /// -1 for none: a small vocabulary has fewer candidates than there is room for.
    pub(super) token: i32,
    pub(super) probability: f32,
}

/// The likeliest tokens of a position. The first is the one that is chosen.
pub(super) type Candidates = [Candidate; MAX_CANDIDATES];

pub(super) const NO_CANDIDATES: Candidates = [Candidate { token: -1, probability: 0.0 }; MAX_CANDIDATES];

/// Key of the noise at a position of a sequence.
pub(super) fn position_key(sequence_key: u64, position: usize) -> u64 {
    mix(sequence_key.wrapping_add(GOLDEN.wrapping_mul(position as u64 + 1)))
}

/// The token with the largest score; ties go to the lowest id.
pub(super) fn sample(logits: &[f32], inverse_temperature: f32, position_key: u64) -> i32 {
    let (mut max_score, mut best) = (f32::NEG_INFINITY, 0);
    for (token, score) in scores(logits, inverse_temperature, position_key) {
        if score > max_score {
            (max_score, best) = (score, token);
        }
    }
    best
}

/// The tokens with the largest scores; ties go to the lowest ids.
pub(super) fn sample_candidates(logits: &[f32], inverse_temperature: f32, position_key: u64) -> Candidates {
    let mut best = [(0, f32::NEG_INFINITY); MAX_CANDIDATES];
    let mut sum = 0.0;
    for (token, score) in scores(logits, inverse_temperature, position_key) {
        // The sum is relative to the largest score so far.
        let max_score = best[0].1.max(score);
        sum = sum * (best[0].1 - max_score).exp() + (score - max_score).exp();
        let rank = best.partition_point(|&(_, other)| other >= score);
        if rank < MAX_CANDIDATES {
            best[rank..].rotate_right(1);
            best[rank] = (token, score);
        }
    }
    let max_score = best[0].1;
    let mut candidates = NO_CANDIDATES;
    for (candidate, (token, score)) in candidates.iter_mut().zip(best.into_iter().take(logits.len())) {
        *candidate = Candidate { token, probability: (score - max_score).exp() / sum };
    }
    candidates
}

/// Each token with its score.
fn scores(logits: &[f32], inverse_temperature: f32, position_key: u64) -> impl Iterator<Item = (i32, f32)> {
    let score = move |token, logit| match inverse_temperature {
        0.0 => logit,
        inverse => logit * inverse + gumbel(position_key, token as u64),
    };
    logits.iter().enumerate().map(move |(token, &logit)| (token as i32, score(token, logit)))
}

fn gumbel(position_key: u64, token: u64) -> f32 {
    gumbel_from_bits((mix(position_key.wrapping_add(GOLDEN.wrapping_mul(token + 1))) >> 32) as u32)
}

/// Uses 23 bits, so that adding a half to any of them is exact. With 24 bits the largest would
/// round to 1, and its noise would be infinite.
fn gumbel_from_bits(bits: u32) -> f32 {
    let uniform = ((bits >> 9) as f32 + 0.5) / (1u32 << 23) as f32;
    -(-uniform.ln()).ln()
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_and_the_smallest_noise_are_finite() {
        assert!((16.0..17.0).contains(&gumbel_from_bits(u32::MAX)), "{}", gumbel_from_bits(u32::MAX));
        assert!((-3.0..-2.0).contains(&gumbel_from_bits(0)), "{}", gumbel_from_bits(0));
    }

    #[test]
    fn candidates_are_the_best_tokens_with_the_softmax_of_their_scores() {
        let logits: Vec<f32> = (0..50).map(|token| (token as f32 * 0.7).sin() * 3.0).collect();
        for draw in 0..20 {
            let key = position_key(draw, 3);
            let mut by_score: Vec<(i32, f32)> = scores(&logits, 1.25, key).collect();
            by_score.sort_by(|one, other| other.1.total_cmp(&one.1));
            let sum: f32 = by_score.iter().map(|(_, score)| score.exp()).sum();
            let candidates = sample_candidates(&logits, 1.25, key);
            assert_eq!(candidates[0].token, sample(&logits, 1.25, key));
            for (candidate, (token, score)) in candidates.iter().zip(by_score) {
                assert_eq!(candidate.token, token);
                assert!((candidate.probability - score.exp() / sum).abs() < 1e-5, "{candidate:?}");
            }
        }
        let few = sample_candidates(&logits[..2], 1.25, 7);
        assert!(few[1].token >= 0 && few[2..] == NO_CANDIDATES[2..], "{few:?}");
        assert!((few[0].probability + few[1].probability - 1.0).abs() < 1e-6, "{few:?}");
    }

    #[test]
    fn sampled_tokens_follow_the_softmax() {
        let logits = [1.0f32, 0.0, -1.0, 2.0, 0.5];
        for temperature in [0.5, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let inverse = Sampling::Temperature(temperature).inverse_temperature();
            let num_draws = 40_000;
            let mut counts = [0f64; 5];
            for draw in 0..num_draws {
                counts[sample(&logits, inverse, position_key(draw / 200, draw as usize % 200)) as usize] += 1.0;
            }
            let expected = weights.iter().map(|weight| weight / total * num_draws as f64);
            let chi_squared: f64 =
                counts.iter().zip(expected).map(|(&count, expected)| (count - expected).powi(2) / expected).sum();
            // With 4 degrees of freedom, one set of draws in 1,000 exceeds 18.5. These draws are
            // fixed.
            assert!(chi_squared < 18.5, "temperature {temperature}: {chi_squared}, {counts:?}");
        }
    }
}
