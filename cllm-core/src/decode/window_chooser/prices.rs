//! How long forwards take by their number of tokens, measured while decoding.

use std::collections::BTreeMap;
use std::ops::RangeBounds;

use crate::decode::backend::padded_size;

/// Times of forwards by their padded size.
///
/// A size whose time is not known counts as cheap as it can be: at least as much as any smaller one,
/// and at least its share of any larger one; the largest of all is expected to grow at least half as
/// much as the two sizes before it. What was measured counts for less with every forward since. So a
/// size that looks almost worth its price is tried now and then, and is measured by that.
#[derive(Debug, Default)]
pub(super) struct StepPrices {
    measured: BTreeMap<usize, Price>,
    /// Number of forwards so far.
    num_steps: u64,
}

#[derive(Debug)]
struct Price {
    seconds: f64,
    num_measurements: u32,
    /// Number of forwards before the last one of this size.
    last_step: u64,
}

/// Forwards of a size before its time is known: on a GPU, the first allocates, the second is
/// captured, and the third is like all others.
const NUM_WARM_UPS: u32 = 3;

/// By how much a measurement changes a known time at most, so that an interrupted forward counts
/// little.
const MAX_CHANGE: f64 = 0.05;

/// By how much a time counts for less with every forward since it was measured.
const FORGETTING: f64 = 1e-3;

/// How much larger than all known sizes the next that is tried may be.
const MAX_LEAP: usize = 4;

impl StepPrices {
    pub(super) fn observe(&mut self, num_tokens: usize, seconds: f64) {
        self.num_steps += 1;
        let new = || Price { seconds: f64::INFINITY, num_measurements: 0, last_step: 0 };
        let price = self.measured.entry(padded_size(num_tokens)).or_insert_with(new);
        price.num_measurements += 1;
        price.last_step = self.num_steps;
        if price.num_measurements <= NUM_WARM_UPS {
            price.seconds = price.seconds.min(seconds);
        } else {
            price.seconds = seconds.clamp(price.seconds * (1.0 - MAX_CHANGE), price.seconds * (1.0 + MAX_CHANGE));
        }
    }

    /// The time of a forward; without any measurement, all take the same.
    pub(super) fn price(&self, num_tokens: usize) -> f64 {
        let size = padded_size(num_tokens);
        if let Some(price) = self.measured.get(&size).filter(|price| price.is_known()) {
            return price.seconds * (-FORGETTING * self.age(price)).exp();
        }
        // The bounds are not forgotten: a size that was never tried may take very long.
        let mut smaller = self.known(..size).rev();
        let [below, before] = [smaller.next(), smaller.next()];
        let above = self.known(size..).next();
        match (before, below, above) {
            (Some((first, from)), Some((second, to)), None) => {
                let slope = ((to - from) / (second - first) as f64).max(0.0);
                to + (size - second) as f64 * slope / 2.0
            }
            (_, Some((_, seconds)), None) => seconds,
            (_, below, Some((larger, seconds))) => {
                let share = seconds * size as f64 / larger as f64;
                share.max(below.map_or(0.0, |(_, seconds)| seconds))
            }
            (_, None, None) => 1.0,
        }
    }

    /// The sizes within a range whose times are known.
    fn known(&self, sizes: impl RangeBounds<usize>) -> impl DoubleEndedIterator<Item = (usize, f64)> {
        let known = self.measured.range(sizes).filter(|(_, price)| price.is_known());
        known.map(|(&size, price)| (size, price.seconds))
    }

    /// Number of forwards since a size was measured.
    fn age(&self, price: &Price) -> f64 {
        (self.num_steps - price.last_step) as f64
    }

    /// Whether the time of a forward is not known yet, or no longer.
    pub(super) fn is_uncertain(&self, num_tokens: usize) -> bool {
        let price = self.measured.get(&padded_size(num_tokens));
        price.is_none_or(|price| !price.is_known() || self.age(price) * FORGETTING > MAX_CHANGE)
    }

    /// The largest forward to consider, if one has at least `min_tokens`: a much larger one than all
    /// known ones could take very long.
    pub(super) fn max_tokens(&self, min_tokens: usize) -> usize {
        let largest_known = self.known(..).next_back().map_or(0, |(size, _)| size);
        (largest_known * MAX_LEAP).max(padded_size(min_tokens))
    }
}

impl Price {
    fn is_known(&self) -> bool {
        self.num_measurements >= NUM_WARM_UPS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(times: &[(usize, f64)]) -> StepPrices {
        let mut prices = StepPrices::default();
        for _ in 0..NUM_WARM_UPS {
            times.iter().for_each(|&(num_tokens, seconds)| prices.observe(num_tokens, seconds));
        }
        prices.num_steps = 0;
        prices.measured.values_mut().for_each(|price| price.last_step = 0);
        prices
    }

    #[test]
    fn unknown_sizes_are_as_cheap_as_they_can_be() {
        assert_eq!(StepPrices::default().price(5), StepPrices::default().price(64));
        let prices = measured(&[(4, 1.0), (32, 4.0)]);
        // As cheap as a smaller one or as its share of a larger one; beyond all, the growth goes on.
        for (num_tokens, expected) in [
            (4, 1.0),
            (3, 1.0),
            (2, 0.5),
            (1, 0.25),
            (8, 1.0),
            (16, 2.0),
            (30, 4.0),
            (64, 4.0 + 32.0 * 3.0 / 28.0 / 2.0),
        ] {
            assert_eq!(prices.price(num_tokens), expected, "{num_tokens} tokens");
        }
        assert_eq!(measured(&[(4, 1.0)]).price(64), 1.0, "nothing is known of the growth");
        assert_eq!(prices.max_tokens(1), 128);
        assert_eq!(StepPrices::default().max_tokens(3), 4, "the first forwards draft what is free");
    }

    #[test]
    fn slow_first_forwards_and_interruptions_hardly_count() {
        let mut prices = StepPrices::default();
        for seconds in [9.0, 3.0] {
            prices.observe(8, seconds);
            assert!(prices.is_uncertain(8));
        }
        prices.observe(8, 1.0);
        assert!((prices.price(8) - 1.0).abs() < 1e-9 && !prices.is_uncertain(8));
        prices.observe(8, 50.0);
        assert!((prices.price(8) - 1.05).abs() < 1e-9);
        (0..100).for_each(|_| prices.observe(8, 2.0));
        assert!((prices.price(8) - 2.0).abs() < 1e-9, "a lasting change counts in full");
    }

    #[test]
    fn what_was_measured_long_ago_counts_for_less_until_it_is_measured_again() {
        let mut prices = measured(&[(8, 1.0), (16, 2.0)]);
        (0..500).for_each(|_| prices.observe(8, 1.0));
        assert!(prices.price(16) < 1.3 && prices.is_uncertain(16), "{}", prices.price(16));
        prices.observe(16, 2.0);
        assert_eq!(prices.price(16), 2.0);
        assert!(!prices.is_uncertain(16));
    }
}
