//! Noise that makes the choice of the largest logit a draw from the softmax (Gumbel-max; Maddison et al., arXiv 1411.0030).
//! It is a hash of (row, position, token): csrc/decode.cu computes the same.

/// How the next token is chosen from the logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The token with the largest logit, the lowest id among equals.
    Greedy,
    /// A token drawn from the softmax of the logits divided by this temperature, which is above 0. The noise of a position depends on
    /// nothing but (seed, sample id, position), so every strategy gives the very answer that one token at a time would give.
    Temperature(f64),
}

impl Sampling {
    /// From a setting: greedy at 0.
    pub fn from_temperature(temperature: f64) -> Self {
        if temperature == 0.0 { Sampling::Greedy } else { Sampling::Temperature(temperature) }
    }

    /// Whether the token with the largest logit is chosen.
    pub fn is_greedy(self) -> bool {
        self == Sampling::Greedy
    }

    /// What the kernels multiply logits by; 0 tells them to choose greedily.
    pub(crate) fn inverse_temperature(self) -> f32 {
        match self {
            Sampling::Greedy => 0.0,
            Sampling::Temperature(temperature) => (1.0 / temperature) as f32,
        }
    }
}

/// Key of the noise at a position of a row.
pub(crate) fn position_key(row_key: u64, position: usize) -> u64 {
    mix(row_key.wrapping_add(GOLDEN.wrapping_mul(position as u64 + 1)))
}

/// The token with the largest noisy logit, the lowest id among equals.
pub(crate) fn choose(logits: &[f32], temperature: f64, key: u64) -> i32 {
    let inverse = (1.0 / temperature) as f32;
    let mut best = (f32::NEG_INFINITY, 0);
    for (token, &logit) in logits.iter().enumerate() {
        let score = logit * inverse + gumbel(key, token as u64);
        if score > best.0 {
            best = (score, token as i32);
        }
    }
    best.1
}

fn gumbel(key: u64, token: u64) -> f32 {
    gumbel_of((mix(key.wrapping_add(GOLDEN.wrapping_mul(token + 1))) >> 32) as u32)
}

/// Of 23 bits, so that a half added to any of them is exact: of the largest 24, it would make 1, and noise without end.
fn gumbel_of(bits: u32) -> f32 {
    let uniform = ((bits >> 9) as f32 + 0.5) / (1u32 << 23) as f32;
    -(-uniform.ln()).ln()
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
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
        assert!((16.0..17.0).contains(&gumbel_of(u32::MAX)), "{}", gumbel_of(u32::MAX));
        assert!((-3.0..-2.0).contains(&gumbel_of(0)), "{}", gumbel_of(0));
    }

    #[test]
    fn choices_follow_the_softmax() {
        let logits = [1.0f32, 0.0, -1.0, 2.0, 0.5];
        for temperature in [0.5, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let draws = 40_000;
            let mut counts = [0f64; 5];
            for draw in 0..draws {
                counts[choose(&logits, temperature, position_key(draw / 200, draw as usize % 200)) as usize] += 1.0;
            }
            let expected = weights.iter().map(|weight| weight / total * draws as f64);
            let squares: f64 =
                counts.iter().zip(expected).map(|(&count, expected)| (count - expected).powi(2) / expected).sum();
            // Chi-squared with 4 degrees of freedom: 18.5 is passed once in 1,000 sets of draws; the draws are fixed.
            assert!(squares < 18.5, "temperature {temperature}: {squares}, {counts:?}");
        }
    }
}
