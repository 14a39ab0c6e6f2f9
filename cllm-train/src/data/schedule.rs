//! Which responses make which step: a function of (seed, epoch), so that no order is ever saved.

use cllm_core::{Error, Result, fingerprint, interrupt};
use rand::seq::SliceRandom;

use crate::data::dataset::Example;
use crate::settings::Settings;

/// Batches that are filled together, longest response first: full to the brim, and still a random order.
const POOL_BATCHES: usize = 16;

/// The order of a run.
pub struct Schedule {
    /// Packed length of each response.
    lengths: Vec<usize>,
    seed: u64,
    max_batch_tokens: usize,
    max_example_tokens: usize,
    /// Steps before the end of each epoch.
    ends: Vec<usize>,
    /// Responses that are too long.
    pub left_out: usize,
    /// Packed tokens of the whole run, padding aside.
    pub tokens: usize,
}

impl Schedule {
    /// The schedule of a run over these responses.
    ///
    /// # Errors
    /// [`Error::Usage`] when every response is too long.
    pub fn new(examples: &[Example], settings: &Settings) -> Result<Self> {
        let lengths: Vec<usize> = examples.iter().map(|example| example.packed_len(&settings.consistency)).collect();
        let left_out = lengths.iter().filter(|&&length| length > settings.max_example_tokens).count();
        if left_out == lengths.len() {
            let least = lengths.iter().min().copied().unwrap_or(0);
            return Err(Error::usage(format!(
                "max_example_tokens ({}) leaves out every response: the shortest has {least} packed tokens",
                settings.max_example_tokens
            )));
        }
        let mut schedule = Schedule {
            lengths,
            seed: settings.seed,
            max_batch_tokens: settings.max_batch_tokens,
            max_example_tokens: settings.max_example_tokens,
            ends: Vec::new(),
            left_out,
            tokens: 0,
        };
        let most = settings.max_steps.unwrap_or(usize::MAX);
        let mut steps = 0;
        for epoch in 0..settings.epochs {
            interrupt::check()?;
            let batches = schedule.batches(epoch);
            let groups = batches.chunks(settings.accumulation).take(most - steps);
            steps += groups.len();
            schedule.tokens += groups.flatten().flatten().map(|&index| schedule.lengths[index]).sum::<usize>();
            schedule.ends.push(steps);
            if steps >= most {
                break;
            }
        }
        Ok(schedule)
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Epoch of a step (counted from 0), and the steps of that epoch before it.
    pub fn place(&self, step: usize) -> (usize, usize) {
        let epoch = self.ends.partition_point(|&end| end <= step);
        (epoch, step - if epoch == 0 { 0 } else { self.ends[epoch - 1] })
    }

    /// The batches of an epoch, drawn anew each: indices of responses, first fit.
    pub fn batches(&self, epoch: usize) -> Vec<Vec<usize>> {
        let mut rng = fingerprint::derive_rng(self.seed, "order", epoch as u64);
        let mut order: Vec<usize> =
            (0..self.lengths.len()).filter(|&index| self.lengths[index] <= self.max_example_tokens).collect();
        order.shuffle(&mut rng);
        let mean = order.iter().map(|&index| self.lengths[index]).sum::<usize>() / order.len().max(1);
        let pool = (self.max_batch_tokens / mean.max(1)).max(1) * POOL_BATCHES;
        // What is left of a pool goes on to the next, so that only the last batch of an epoch is not full.
        let mut open: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut batches: Vec<Vec<usize>> = Vec::new();
        for pool in order.chunks_mut(pool) {
            pool.sort_by_key(|&index| std::cmp::Reverse(self.lengths[index]));
            for &index in pool.iter() {
                let length = self.lengths[index];
                match open.iter_mut().find(|(free, _)| *free >= length) {
                    Some((free, batch)) => {
                        *free -= length;
                        batch.push(index);
                    }
                    None => open.push((self.max_batch_tokens - length, vec![index])),
                }
            }
            let emptiest = open.iter().enumerate().max_by_key(|(_, (free, _))| *free).map(|(place, _)| place);
            let kept = emptiest.map(|place| open.swap_remove(place));
            batches.extend(open.drain(..).map(|(_, batch)| batch));
            open.extend(kept);
        }
        batches.extend(open.into_iter().map(|(_, batch)| batch));
        for batch in &mut batches {
            batch.shuffle(&mut rng);
        }
        batches.shuffle(&mut rng);
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(settings: &Settings) -> Schedule {
        let example = |index: usize| Example {
            id: format!("s{index}"),
            prompt: vec![1; 5],
            response: vec![2; 1 + index * 7 % 40],
            blocks: Vec::new(),
            labels: true,
        };
        Schedule::new(&(0..50).map(example).collect::<Vec<_>>(), settings).unwrap()
    }

    #[test]
    fn an_epoch_holds_every_response_once_within_the_budget() {
        let settings = Settings { max_batch_tokens: 100, max_example_tokens: 44, epochs: 3, ..Settings::default() };
        let schedule = schedule(&settings);
        let batches = schedule.batches(0);
        let mut seen: Vec<usize> = batches.iter().flatten().copied().collect();
        seen.sort_unstable();
        let short: Vec<usize> = (0..50).filter(|index| 6 + index * 7 % 40 <= 44).collect();
        assert_eq!((seen, schedule.left_out), (short.clone(), 50 - short.len()));
        for batch in &batches {
            assert!(batch.iter().map(|&index| schedule.lengths[index]).sum::<usize>() <= 100);
        }
        let tokens: usize = short.iter().map(|&index| schedule.lengths[index]).sum();
        assert_eq!(batches.len(), tokens.div_ceil(100), "little is left free");
        assert_ne!(batches, schedule.batches(1));
    }

    #[test]
    fn every_step_has_its_place_in_an_epoch() {
        let settings = Settings { max_batch_tokens: 100, max_example_tokens: 100, epochs: 3, ..Settings::default() };
        let all = schedule(&settings);
        let lengths: Vec<usize> = (0..3).map(|epoch| all.batches(epoch).len()).collect();
        assert_eq!(all.steps(), lengths.iter().sum::<usize>());
        let places: Vec<_> = (0..all.steps()).map(|step| all.place(step)).collect();
        let expected: Vec<_> =
            (0..3).flat_map(|epoch| (0..lengths[epoch]).map(move |within| (epoch, within))).collect();
        assert_eq!(places, expected);
        assert_eq!(schedule(&Settings { max_steps: Some(2), ..settings }).steps(), 2);
    }
}
