//! Sampling: how a token is chosen from the logits.
//!
//! Above temperature 0, noise is added to the scaled logits and the largest sum wins, which draws
//! from the softmax (the Gumbel-max trick; Maddison et al., arXiv 1411.0030). The noise is a hash
//! of (seed, sample, position, token) rather than the state of a generator: whichever forward
//! reaches a position samples the same token there, so every strategy gives the answer of
//! autoregressive decoding, and a draft token is accepted with the probability that the model gives
//! it. csrc/decode.cu computes the same noise.
//!
//! Nucleus sampling (Holtzman et al., arXiv 1904.09751) draws from the likeliest tokens alone, with the
//! same noise: the others have the score of an impossible token. Which tokens these are depends on the
//! logits only, so it changes nothing of the above.
//!
//! A token's score is its logit for greedy decoding, or else its scaled logit with noise. The
//! candidates of a position are the tokens with the largest scores, and their probabilities are the
//! softmax of the scores: for greedy decoding those of the model, and above temperature 0 a measure of
//! how clearly a token won with the noise that its position has in every forward.

pub(super) use crate::cuda::decode::MAX_CANDIDATES;

/// Below this temperature a sampled token is the likeliest one. Logits divided by far less than this
/// are not finite.
const MIN_TEMPERATURE: f64 = 1e-5;

/// How the next token is chosen from the logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The token with the largest logit; ties go to the lowest id.
    Greedy,
    /// A draw from the softmax of the logits divided by this temperature, which is above 0.
    Temperature(f64),
    /// The same from the nucleus alone: the likeliest tokens whose probabilities sum to `top_p`, which
    /// is below 1.
    Nucleus { temperature: f64, top_p: f64 },
}

impl Sampling {
    /// Converts the setting `temperature`, where 0 means greedy, and so do temperatures too low to
    /// choose any other token.
    pub fn from_temperature(temperature: f64) -> Self {
        if temperature < MIN_TEMPERATURE { Sampling::Greedy } else { Sampling::Temperature(temperature) }
    }

    /// Draws from the nucleus alone. It is everything for 1, and always has the likeliest token, which
    /// greedy decoding chooses.
    pub fn with_top_p(self, top_p: f64) -> Self {
        match self {
            Sampling::Temperature(temperature) if top_p < 1.0 => Sampling::Nucleus { temperature, top_p },
            _ => self,
        }
    }

    /// Whether the token with the largest logit is always chosen.
    pub fn is_greedy(self) -> bool {
        self == Sampling::Greedy
    }

    /// The factor that logits are scaled by; 0 means greedy.
    pub(super) fn inverse_temperature(self) -> f32 {
        match self {
            Sampling::Greedy => 0.0,
            Sampling::Temperature(temperature) | Sampling::Nucleus { temperature, .. } => (1.0 / temperature) as f32,
        }
    }

    /// The sum of the probabilities of the tokens that may be chosen.
    pub(super) fn top_p(self) -> f32 {
        match self {
            Sampling::Greedy | Sampling::Temperature(_) => 1.0,
            Sampling::Nucleus { top_p, .. } => top_p as f32,
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
pub(super) fn sample(logits: &[f32], sampling: Sampling, position_key: u64) -> i32 {
    let (mut max_score, mut best) = (f32::NEG_INFINITY, 0);
    for (token, score) in scores(logits, sampling, position_key) {
        if score > max_score {
            (max_score, best) = (score, token);
        }
    }
    best
}

/// The tokens with the largest scores; ties go to the lowest ids.
pub(super) fn sample_candidates(logits: &[f32], sampling: Sampling, position_key: u64) -> Candidates {
    let mut best = [(-1, f32::NEG_INFINITY); MAX_CANDIDATES];
    let mut sum = 0.0;
    for (token, score) in scores(logits, sampling, position_key).filter(|&(_, score)| score > f32::NEG_INFINITY) {
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
    for (candidate, (token, score)) in candidates.iter_mut().zip(best) {
        *candidate = Candidate { token, probability: (score - max_score).exp() / sum };
    }
    // As in `sample`, if no logit is a number.
    candidates[0].token = candidates[0].token.max(0);
    candidates
}

/// Each token with its score.
fn scores(logits: &[f32], sampling: Sampling, position_key: u64) -> impl Iterator<Item = (i32, f32)> {
    let (inverse_temperature, threshold) = (sampling.inverse_temperature(), nucleus_threshold(logits, sampling));
    let score = move |token, logit| match inverse_temperature {
        0.0 => logit,
        _ if logit < threshold => f32::NEG_INFINITY,
        inverse => logit * inverse + gumbel(position_key, token as u64),
    };
    logits.iter().enumerate().map(move |(token, &logit)| (token as i32, score(token, logit)))
}

/// The smallest logit in the nucleus. Tokens with equal logits are in it or not together.
fn nucleus_threshold(logits: &[f32], sampling: Sampling) -> f32 {
    let top_p = sampling.top_p();
    if top_p >= 1.0 {
        return f32::NEG_INFINITY;
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| f64::from((logit - max) * sampling.inverse_temperature()).exp();
    let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    // All tokens that are less likely than this are less likely together than what is left out.
    let min_weight = (1.0 - f64::from(top_p)) / logits.len() as f64 * total;
    let mut likely: Vec<f32> = logits.iter().copied().filter(|&logit| weight(logit) >= min_weight).collect();
    likely.sort_unstable_by(|one, other| other.total_cmp(one));
    let mut sum = 0.0;
    let is_last = |&logit: &f32| {
        sum += weight(logit);
        sum >= f64::from(top_p) * total
    };
    likely.iter().copied().find(is_last).or(likely.last().copied()).unwrap_or(f32::NEG_INFINITY)
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
        let sampling = Sampling::Temperature(0.8);
        for draw in 0..20 {
            let key = position_key(draw, 3);
            let mut by_score: Vec<(i32, f32)> = scores(&logits, sampling, key).collect();
            by_score.sort_by(|one, other| other.1.total_cmp(&one.1));
            let sum: f32 = by_score.iter().map(|(_, score)| score.exp()).sum();
            let candidates = sample_candidates(&logits, sampling, key);
            assert_eq!(candidates[0].token, sample(&logits, sampling, key));
            for (candidate, (token, score)) in candidates.iter().zip(by_score) {
                assert_eq!(candidate.token, token);
                assert!((candidate.probability - score.exp() / sum).abs() < 1e-5, "{candidate:?}");
            }
        }
        let few = sample_candidates(&logits[..2], sampling, 7);
        assert!(few[1].token >= 0 && few[2..] == NO_CANDIDATES[2..], "{few:?}");
        assert!((few[0].probability + few[1].probability - 1.0).abs() < 1e-6, "{few:?}");
    }

    /// Fails unless sampled tokens have these weights.
    fn assert_weights(logits: &[f32], sampling: Sampling, weights: &[f64]) {
        let total: f64 = weights.iter().sum();
        let num_draws = 40_000;
        let mut counts = vec![0f64; logits.len()];
        for draw in 0..num_draws {
            counts[sample(logits, sampling, position_key(draw / 200, draw as usize % 200)) as usize] += 1.0;
        }
        let expected = weights.iter().map(|weight| weight / total * num_draws as f64);
        let cells = counts.iter().zip(expected).filter(|&(_, expected)| expected > 0.0);
        let chi_squared: f64 = cells.map(|(&count, expected)| (count - expected).powi(2) / expected).sum();
        // With 4 degrees of freedom, one set of draws in 1,000 exceeds 18.5. These draws are fixed.
        assert!(chi_squared < 18.5, "{sampling:?}: {chi_squared}, {counts:?}");
        let has_impossible = counts.iter().zip(weights).any(|(&count, &weight)| weight == 0.0 && count > 0.0);
        assert!(!has_impossible, "{sampling:?}: {counts:?}");
    }

    #[test]
    fn sampled_tokens_follow_the_softmax() {
        let logits = [1.0f32, 0.0, -1.0, 2.0, 0.5];
        for temperature in [0.5, 1.0, 2.0] {
            let weights = logits.map(|logit| (f64::from(logit) / temperature).exp());
            assert_weights(&logits, Sampling::Temperature(temperature), &weights);
        }
    }

    #[test]
    fn a_nucleus_has_the_likeliest_tokens_up_to_its_probability_and_the_softmax_of_these() {
        let probabilities = [0.1, 0.4, 0.05, 0.25, 0.1, 0.1];
        for temperature in [0.5, 1.0] {
            let logits = probabilities.map(|probability: f64| (temperature * probability.ln()) as f32 + 3.0);
            for (top_p, in_nucleus) in [
                (0.0, [false, true, false, false, false, false]),
                (0.39, [false, true, false, false, false, false]),
                (0.41, [false, true, false, true, false, false]),
                (0.64, [false, true, false, true, false, false]),
                // Equal tokens are in it together.
                (0.66, [true, true, false, true, true, true]),
                (0.94, [true, true, false, true, true, true]),
                (0.96, [true; 6]),
            ] {
                let sampling = Sampling::Temperature(temperature).with_top_p(top_p);
                let weights: Vec<f64> =
                    probabilities.iter().zip(in_nucleus).map(|(p, is_in)| p * f64::from(u8::from(is_in))).collect();
                assert_weights(&logits, sampling, &weights);
                let candidates = sample_candidates(&logits, sampling, 7);
                let num_candidates = in_nucleus.iter().filter(|&&is_in| is_in).count().min(MAX_CANDIDATES);
                let listed = candidates.iter().take_while(|candidate| candidate.token >= 0);
                assert!(listed.clone().all(|candidate| in_nucleus[candidate.token as usize]), "{candidates:?}");
                assert_eq!(listed.count(), num_candidates, "{candidates:?}");
                assert_eq!(candidates[0].token, sample(&logits, sampling, 7));
            }
        }
    }

    #[test]
    fn temperatures_whose_scores_would_not_be_finite_are_greedy() {
        for temperature in [0.0, f64::MIN_POSITIVE, 1e-39, 1e-9] {
            assert_eq!(Sampling::from_temperature(temperature), Sampling::Greedy);
        }
        let lowest = Sampling::from_temperature(MIN_TEMPERATURE);
        let logits = [0.0, -100.0, 99.0, 100.0, f32::NEG_INFINITY];
        assert!(scores(&logits, lowest, 3).all(|(_, score)| !score.is_nan()));
        assert_eq!(sample(&logits, lowest, 3), 3);
    }

    #[test]
    fn a_nucleus_of_all_tokens_is_no_nucleus() {
        assert_eq!(Sampling::Temperature(0.7).with_top_p(1.0), Sampling::Temperature(0.7));
        assert_eq!(Sampling::Greedy.with_top_p(0.5), Sampling::Greedy);
    }
}
