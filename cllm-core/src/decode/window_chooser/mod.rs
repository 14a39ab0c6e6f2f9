//! How many draft tokens each sequence forwards, for windows whose width is chosen while decoding.
//!
//! A forward takes little longer with more tokens while it mostly waits for the weights, and much
//! longer once it computes. Draft tokens are therefore added as long as the expected number of new
//! tokens per second rises: those of the whole batch, since all of it waits for the same forward.

mod history;
mod prices;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::backend::padded_size;
use super::tree::MAX_TREE_TOKENS;
pub(super) use history::{AcceptanceHistory, Outcome};
use prices::StepPrices;

/// What a decoder has learnt about a strategy, its model and its machine. The choice never changes an answer,
/// only the number of forwards that it takes; since it depends on measured times, that number may
/// differ between runs.
#[derive(Default)]
pub(super) struct WindowChooser {
    pub(super) history: AcceptanceHistory,
    prices: StepPrices,
    /// Draft tokens that gain less than this are not worth planning.
    min_gain: f64,
    /// Padded number of tokens that the last choice left without drafts.
    resting_size: usize,
    /// Length of the rest after that choice, and how much of it is left.
    rest: usize,
    remaining_rest: usize,
}

/// The most forwards without a choice.
const MAX_REST: usize = 31;

/// Draft tokens are planned that gain at least this part of what the least of the last choice did.
const PLANNED_SHARE: f64 = 0.25;

/// What a draft token must gain in any case: less is worth nothing.
const MIN_GAIN: f64 = 1e-3;

/// What is planned after a choice of no drafts, and the least probability with which what a forward
/// drafts is of use to the next.
const SMALL_GAIN: f64 = 0.02;

/// What the gains of draft tokens follow from, the same for all sequences of a forward.
pub(super) struct Prospects<'h> {
    pub(super) history: &'h AcceptanceHistory,
    /// The probabilities that at least 1, 2, ... of the drafts that a forward makes are accepted by the
    /// next ([`AcceptanceHistory::survival`]).
    pub(super) survival: Vec<f64>,
    /// What a draft token must gain to be considered.
    pub(super) min_gain: f64,
}

impl<'h> Prospects<'h> {
    pub(super) fn new(history: &'h AcceptanceHistory, min_gain: f64) -> Self {
        let survival = history.survival(MAX_TREE_TOKENS - 1, min_gain.min(SMALL_GAIN));
        Prospects { history, survival, min_gain }
    }
}

/// The numbers of draft tokens of a forward.
pub(super) struct Choice {
    /// Of each sequence.
    pub(super) num_drafts: Vec<usize>,
    /// The drafts make the forward larger, and the time of that size is not known yet, or no longer.
    pub(super) is_probe: bool,
}

impl WindowChooser {
    /// Chooses the number of draft tokens of each sequence. `gains` are what its draft tokens are
    /// expected to add to its new tokens, in the order in which it would forward them; a sequence
    /// without a choice has none. `num_other_tokens` of their windows are forwarded anyway, such as
    /// the last token of each. A forward has each token of a window with drafts `num_copies` times.
    /// Prompts in the same forward do not count: they take their time whatever is chosen.
    pub(super) fn choose(&mut self, num_other_tokens: usize, gains: &[Vec<f64>], num_copies: usize) -> Choice {
        let max_tokens = self.prices.max_tokens(num_other_tokens);
        let mut last = (0, 0.0);
        let price = |num_tokens| {
            let size = padded_size(num_tokens);
            if last.0 != size {
                last = (size, self.prices.price(size));
            }
            last.1
        };
        let num_drafts = best_numbers_of_drafts(num_other_tokens, gains, num_copies, max_tokens, price);
        let last_gains = gains.iter().zip(&num_drafts).filter_map(|(gains, &number)| gains[..number].last());
        let least = last_gains.copied().reduce(f64::min);
        self.min_gain = least.map_or(SMALL_GAIN, |least| (least * PLANNED_SHARE).max(MIN_GAIN));
        let added = |&number: &usize| (0..number).map(|index| added_tokens(index, num_copies)).sum::<usize>();
        let size = padded_size(num_other_tokens + num_drafts.iter().map(added).sum::<usize>());
        let is_probe = size > padded_size(num_other_tokens) && self.prices.is_uncertain(size);
        let has_drafts = num_drafts.iter().any(|&number| number > 0);
        self.rest = if has_drafts { 0 } else { (2 * self.rest + 1).min(MAX_REST) };
        self.remaining_rest = self.rest;
        self.resting_size = padded_size(num_other_tokens);
        Choice { num_drafts, is_probe }
    }

    /// What the next choice is made from.
    pub(super) fn prospects(&self) -> Prospects<'_> {
        Prospects::new(&self.history, self.min_gain)
    }

    /// Whether the next forward has no drafts, without a choice. After a choice of none, one forward
    /// rests, and more the more often that was the choice, so that what is autoregressive decoding
    /// also takes its time.
    pub(super) fn rests(&mut self, num_other_tokens: usize) -> bool {
        if self.resting_size != padded_size(num_other_tokens) {
            (self.rest, self.remaining_rest) = (0, 0);
        }
        let rests = self.remaining_rest > 0;
        self.remaining_rest -= usize::from(rests);
        rests
    }

    /// Learns how long a forward of `num_tokens`, all of windows, took.
    pub(super) fn observe_step(&mut self, num_tokens: usize, seconds: f64) {
        self.prices.observe(num_tokens, seconds);
    }
}

/// The numbers of draft tokens with which the expected number of new tokens per unit of time is
/// largest. Every sequence adds one token without any, so no choice is worse than autoregressive
/// decoding by these gains and prices. `price` is the time of a forward by its number of tokens;
/// larger forwards than `max_tokens` are not considered.
fn best_numbers_of_drafts(
    num_other_tokens: usize,
    gains: &[Vec<f64>],
    num_copies: usize,
    max_tokens: usize,
    mut price: impl FnMut(usize) -> f64,
) -> Vec<usize> {
    let mut candidates: BinaryHeap<Candidate> = BinaryHeap::new();
    candidates.extend(gains.iter().enumerate().filter_map(|(row, gains)| Candidate::new(row, gains, 0)));
    let mut rows = Vec::new();
    let mut num_tokens = num_other_tokens;
    let mut expected = gains.len() as f64;
    let mut best = (expected / price(num_other_tokens), 0);
    while let Some(Candidate { gain, row: Reverse(row), index }) = candidates.pop() {
        rows.push(row);
        num_tokens += added_tokens(index, num_copies);
        if num_tokens > max_tokens {
            break;
        }
        expected += gain;
        let speed = expected / price(num_tokens);
        if speed > best.0 {
            best = (speed, rows.len());
        } else if speed < best.0 / 2.0 {
            break;
        }
        candidates.extend(Candidate::new(row, &gains[row], index + 1));
    }
    let mut num_drafts = vec![0; gains.len()];
    rows[..best.1].iter().for_each(|&row| num_drafts[row] += 1);
    num_drafts
}

/// How many tokens a forward gets by one more draft token of a sequence that has `index` of them. The
/// first also brings the copies of its last token.
fn added_tokens(index: usize, num_copies: usize) -> usize {
    if index == 0 { 2 * num_copies - 1 } else { num_copies }
}

/// The next draft token of a sequence. The one with the largest gain comes first.
#[derive(PartialEq)]
struct Candidate {
    gain: f64,
    row: Reverse<usize>,
    index: usize,
}

impl Candidate {
    fn new(row: usize, gains: &[f64], index: usize) -> Option<Self> {
        gains.get(index).map(|&gain| Candidate { gain, row: Reverse(row), index })
    }
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.gain.total_cmp(&other.gain).then(self.row.cmp(&other.row))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time of a forward that waits for the weights up to 32 tokens and computes beyond that.
    fn flat_to_32(num_tokens: usize) -> f64 {
        (num_tokens as f64 / 32.0).max(1.0)
    }

    /// A step of every size takes as long.
    fn free(_: usize) -> f64 {
        1.0
    }

    /// Every token takes as long as the first.
    fn linear(num_tokens: usize) -> f64 {
        num_tokens as f64
    }

    #[test]
    fn draft_tokens_are_added_while_they_gain_more_than_they_cost() {
        // Geometrically falling gains, as of drafts that are accepted with this probability.
        let drafts = |rate: f64| (1..=63).map(|depth| rate.powi(depth)).collect::<Vec<f64>>();
        type Case<'c> = (&'c str, Vec<Vec<f64>>, fn(usize) -> f64, &'c [usize]);
        let cases: [Case<'_>; 8] = [
            ("free steps take everything", vec![drafts(0.9)], free, &[63]),
            ("as many as are free", vec![drafts(0.9)], flat_to_32, &[31]),
            ("prices that rise as fast as tokens take none", vec![drafts(0.9)], linear, &[0]),
            ("a batch shares what is free", vec![drafts(0.9); 8], flat_to_32, &[3; 8]),
            ("a full batch takes none", vec![drafts(0.9); 32], flat_to_32, &[0; 32]),
            ("a fuller one neither", vec![drafts(0.9); 128], flat_to_32, &[0; 128]),
            ("the surer drafts come first", vec![drafts(0.9), vec![0.1; 63]], flat_to_32, &[21, 9]),
            ("a sequence may have none", vec![vec![], drafts(0.9)], flat_to_32, &[0, 30]),
        ];
        for (name, gains, price, expected) in cases {
            assert_eq!(best_numbers_of_drafts(gains.len(), &gains, 1, usize::MAX, price), expected, "{name}");
        }
    }

    #[test]
    fn no_choice_is_expected_to_be_slower_than_autoregressive_decoding() {
        let mut random = 1u64;
        let mut next = || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) as f64 / (1u64 << 31) as f64
        };
        for _ in 0..500 {
            let gains: Vec<Vec<f64>> = (0..1 + (next() * 9.0) as usize)
                .map(|_| (0..(next() * 20.0) as usize).map(|_| next()).collect())
                .collect();
            let mut prices = vec![1.0];
            (0..300).for_each(|index| prices.push(prices[index] + next() * 0.3));
            let widths = best_numbers_of_drafts(gains.len(), &gains, 1, usize::MAX, |num_tokens| prices[num_tokens]);
            let expected: f64 =
                gains.iter().zip(&widths).map(|(gains, &width)| 1.0 + gains[..width].iter().sum::<f64>()).sum();
            let speed = expected / prices[gains.len() + widths.iter().sum::<usize>()];
            assert!(speed >= gains.len() as f64 / prices[gains.len()], "{widths:?} of {gains:?}");
        }
    }

    #[test]
    fn a_forward_is_never_larger_than_allowed() {
        assert_eq!(best_numbers_of_drafts(2, &[vec![1.0; 63], vec![0.5; 63]], 1, 8, free), [6, 0]);
        assert_eq!(best_numbers_of_drafts(2, &[vec![1.0; 63], vec![0.5; 63]], 1, 2, free), [0, 0]);
    }

    #[test]
    fn tokens_that_are_forwarded_twice_cost_twice() {
        // Forwards of up to 32 tokens take as long as one. Two copies of 16 tokens are so many.
        let drafts = vec![vec![0.9; 63]; 2];
        assert_eq!(best_numbers_of_drafts(1, &drafts[..1], 2, usize::MAX, flat_to_32), [15]);
        assert_eq!(best_numbers_of_drafts(1, &drafts[..1], 1, usize::MAX, flat_to_32), [31]);
        // A first draft token also brings the second copy of the last token.
        let linear = |num_tokens: usize| num_tokens as f64;
        assert_eq!(best_numbers_of_drafts(1, &[vec![0.9, 0.1]], 2, usize::MAX, linear), [0]);
        assert_eq!(best_numbers_of_drafts(2, &drafts, 2, 5, free), [1, 0]);
        assert_eq!(best_numbers_of_drafts(2, &drafts, 2, 4, free), [0, 0]);
    }

    #[test]
    fn the_best_width_is_found_by_measuring_and_left_rarely() {
        const NUM_FORWARDS: usize = 3000;
        let gains: Vec<f64> = (1..=63).map(|depth| 0.8f64.powi(depth)).collect();
        let expected_tokens = |num_drafts: usize| 1.0 + gains[..num_drafts].iter().sum::<f64>();
        for (num_sequences, price) in [
            (1, flat_to_32 as fn(usize) -> f64),
            (1, free),
            (1, linear),
            (8, flat_to_32),
            (32, flat_to_32),
            (128, flat_to_32),
            (128, linear),
        ] {
            let price = |num_tokens: usize| price(padded_size(num_tokens));
            let best_speed = (0..64)
                .map(|num_drafts| {
                    let num_tokens = num_sequences * (1 + num_drafts);
                    num_sequences as f64 * expected_tokens(num_drafts) / price(num_tokens)
                })
                .fold(0.0, f64::max);
            let mut chooser = WindowChooser::default();
            let (mut num_probes, mut tokens, mut seconds) = (0, 0.0, 0.0);
            for _ in 0..NUM_FORWARDS {
                if chooser.rests(num_sequences) {
                    chooser.observe_step(num_sequences, price(num_sequences));
                    tokens += num_sequences as f64;
                    seconds += price(num_sequences);
                    continue;
                }
                let choice = chooser.choose(num_sequences, &vec![gains.clone(); num_sequences], 1);
                let num_tokens = num_sequences + choice.num_drafts.iter().sum::<usize>();
                chooser.observe_step(num_tokens, price(num_tokens));
                num_probes += usize::from(choice.is_probe);
                tokens += choice.num_drafts.into_iter().map(expected_tokens).sum::<f64>();
                seconds += price(num_tokens);
            }
            let share = tokens / seconds / best_speed;
            assert!(share > 0.98, "{num_sequences} sequences: {share} of the best speed");
            assert!(num_probes < NUM_FORWARDS / 20, "{num_sequences} sequences: {num_probes} probes");
        }
    }

    #[test]
    fn drafts_that_gain_far_less_than_those_of_the_last_choice_are_not_planned() {
        let mut chooser = WindowChooser::default();
        let gains = [vec![0.5, 0.25, 0.125, 0.0625, 0.03125]];
        assert_eq!(chooser.min_gain, 0.0);
        chooser.choose(1, &gains, 1);
        assert_eq!(chooser.min_gain, SMALL_GAIN, "no drafts, since no larger size is known");
        for num_tokens in [1, 2, 4, 8] {
            (0..3).for_each(|_| chooser.observe_step(num_tokens, 1.0));
        }
        assert_eq!(chooser.choose(1, &gains, 1).num_drafts, [5]);
        assert_eq!(chooser.min_gain, 0.03125 * PLANNED_SHARE);
    }

    #[test]
    fn after_choices_of_no_drafts_more_and_more_forwards_rest() {
        let mut chooser = WindowChooser::default();
        let mut num_rests = |num_sequences: usize, gain: f64| {
            chooser.choose(num_sequences, &vec![vec![gain; 3]; num_sequences], 1);
            let rests: Vec<bool> = (0..40).map(|_| chooser.rests(num_sequences)).collect();
            assert!(rests.is_sorted_by(|one, next| one >= next), "{rests:?}");
            rests.into_iter().filter(|&rests| rests).count()
        };
        // Nothing is known of larger forwards, so the first have no drafts.
        assert_eq!([1, 1, 1, 1, 1, 1, 1].map(|one| num_rests(one, 0.0)), [1, 3, 7, 15, 31, 31, 31]);
        assert_eq!(num_rests(3, 1.0), 0, "a forward of four takes a fourth");
    }
}
