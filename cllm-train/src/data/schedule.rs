//! Assigns the examples to batches and steps. The order is a function of (seed, epoch), so it never
//! has to be saved.

use cllm_core::progress::count;
use cllm_core::{Error, Result, fingerprint, interrupt};
use rand::seq::SliceRandom;

use crate::data::dataset::Example;
use crate::settings::Settings;

/// Batches that are filled together, longest example first. A larger pool leaves less space unused,
/// a smaller one keeps the order more random.
const NUM_POOLED_BATCHES: usize = 16;

/// The order of a run's examples.
pub struct Schedule {
    /// Maximum number of packed tokens of each example.
    example_tokens: Vec<usize>,
    seed: u64,
    max_batch_tokens: usize,
    max_example_tokens: usize,
    /// Number of steps before the end of each epoch.
    epoch_ends: Vec<usize>,
    /// Number of examples that are longer than `max_example_tokens`.
    pub num_excluded: usize,
    /// Packed tokens of the longest example, excluded or not.
    longest: usize,
    /// Packed tokens of the whole run, without padding.
    pub num_tokens: usize,
}

impl Schedule {
    /// Schedules a run over these examples.
    ///
    /// # Errors
    /// [`Error::Usage`] if every example is too long.
    pub fn new(examples: &[Example], settings: &Settings) -> Result<Self> {
        let example_tokens: Vec<usize> =
            examples.iter().map(|example| example.max_packed_tokens(&settings.consistency)).collect();
        let num_excluded = example_tokens.iter().filter(|&&tokens| tokens > settings.max_example_tokens).count();
        let longest = example_tokens.iter().max().copied().unwrap_or(0);
        if num_excluded == example_tokens.len() {
            return Err(Error::usage(format!(
                "max_example_tokens={} excludes every example: the shortest has {} packed tokens, and {}",
                settings.max_example_tokens,
                example_tokens.iter().min().copied().unwrap_or(0),
                advice_for(longest, settings.max_batch_tokens)
            )));
        }
        let mut schedule = Schedule {
            example_tokens,
            seed: settings.seed,
            max_batch_tokens: settings.max_batch_tokens,
            max_example_tokens: settings.max_example_tokens,
            epoch_ends: Vec::new(),
            num_excluded,
            longest,
            num_tokens: 0,
        };
        let max_steps = settings.max_steps.unwrap_or(usize::MAX);
        let mut num_steps = 0;
        for epoch in 0..settings.epochs {
            interrupt::check()?;
            let batches = schedule.batches(epoch);
            let steps = batches.chunks(settings.accumulation).take(max_steps - num_steps);
            num_steps += steps.len();
            schedule.num_tokens += steps.flatten().map(|batch| schedule.batch_tokens(batch)).sum::<usize>();
            schedule.epoch_ends.push(num_steps);
            if num_steps >= max_steps {
                break;
            }
        }
        Ok(schedule)
    }

    /// Says how many examples are excluded, and which settings would include them; `None` if none is.
    pub fn exclusion(&self) -> Option<String> {
        let (num_excluded, max_tokens) = (self.num_excluded, self.max_example_tokens);
        (num_excluded > 0).then(|| {
            let (examples, advice) = (count(num_excluded, "example"), advice_for(self.longest, self.max_batch_tokens));
            format!("excluded {examples} of more than {max_tokens} packed tokens; {advice}")
        })
    }

    /// Number of epochs that begin.
    pub fn num_epochs(&self) -> usize {
        self.epoch_ends.len()
    }

    /// Number of steps of the whole run.
    pub fn num_steps(&self) -> usize {
        self.epoch_ends.last().copied().unwrap_or(0)
    }

    /// The epoch of a step, and the step's number within it; all counted from 0.
    pub fn locate(&self, step: usize) -> (usize, usize) {
        let epoch = self.epoch_ends.partition_point(|&end| end <= step);
        let epoch_start = if epoch == 0 { 0 } else { self.epoch_ends[epoch - 1] };
        (epoch, step - epoch_start)
    }

    /// The batches of an epoch as indices of examples, in a new random order each epoch. Within a
    /// pool, each example goes into the first batch with enough space, longest first.
    pub fn batches(&self, epoch: usize) -> Vec<Vec<usize>> {
        let mut rng = fingerprint::derive_rng(self.seed, "order", epoch as u64);
        let mut order: Vec<usize> = (0..self.example_tokens.len())
            .filter(|&index| self.example_tokens[index] <= self.max_example_tokens)
            .collect();
        order.shuffle(&mut rng);
        let mean_tokens = self.batch_tokens(&order) / order.len().max(1);
        let pool_size = (self.max_batch_tokens / mean_tokens.max(1)).max(1) * NUM_POOLED_BATCHES;
        let mut batches: Vec<Vec<usize>> = Vec::new();
        // Space left in each open batch, and its examples.
        let mut open: Vec<(usize, Vec<usize>)> = Vec::new();
        for pool in order.chunks_mut(pool_size) {
            pool.sort_by_key(|&index| std::cmp::Reverse(self.example_tokens[index]));
            for &index in pool.iter() {
                let tokens = self.example_tokens[index];
                match open.iter_mut().find(|(space, _)| *space >= tokens) {
                    Some((space, batch)) => {
                        *space -= tokens;
                        batch.push(index);
                    }
                    None => open.push((self.max_batch_tokens - tokens, vec![index])),
                }
            }
            // The emptiest batch stays open for the next pool, so that only the last batch of an
            // epoch is not full.
            let emptiest = open.iter().enumerate().max_by_key(|(_, (space, _))| *space).map(|(number, _)| number);
            let kept_open = emptiest.map(|number| open.swap_remove(number));
            batches.extend(open.drain(..).map(|(_, batch)| batch));
            open.extend(kept_open);
        }
        batches.extend(open.into_iter().map(|(_, batch)| batch));
        for batch in &mut batches {
            batch.shuffle(&mut rng);
        }
        batches.shuffle(&mut rng);
        batches
    }

    fn batch_tokens(&self, example_indices: &[usize]) -> usize {
        example_indices.iter().map(|&index| self.example_tokens[index]).sum()
    }
}

/// The settings with which the longest example can be trained on.
fn advice_for(longest: usize, max_batch_tokens: usize) -> String {
    let batch = if longest > max_batch_tokens { format!(" and max_batch_tokens={longest}") } else { String::new() };
    format!("the longest has {longest}: set max_example_tokens={longest}{batch}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(settings: &Settings) -> Schedule {
        try_schedule(settings).unwrap()
    }

    fn try_schedule(settings: &Settings) -> Result<Schedule> {
        let example = |index: usize| Example {
            id: format!("s{index}"),
            prompt_ids: vec![1; 5],
            response_ids: vec![2; 1 + index * 7 % 40],
            blocks: Vec::new(),
            labelled: vec![true; 1 + index * 7 % 40],
        };
        Schedule::new(&(0..50).map(example).collect::<Vec<_>>(), settings)
    }

    #[test]
    fn settings_that_include_excluded_examples_are_named() {
        let settings = |max_example_tokens| Settings { max_batch_tokens: 44, max_example_tokens, ..Settings::plain() };
        let advice = "the longest has 45: set max_example_tokens=45 and max_batch_tokens=45";
        let excluded = schedule(&settings(43)).exclusion().unwrap();
        assert_eq!(excluded, format!("excluded 2 examples of more than 43 packed tokens; {advice}"));
        let error = try_schedule(&settings(5)).err().unwrap().to_string();
        assert_eq!(
            error,
            format!("max_example_tokens=5 excludes every example: the shortest has 6 packed tokens, and {advice}")
        );
        let all = Settings { max_batch_tokens: 100, ..settings(45) };
        assert_eq!(schedule(&all).exclusion(), None);
        assert!(
            schedule(&Settings { max_example_tokens: 43, ..all })
                .exclusion()
                .unwrap()
                .ends_with("max_example_tokens=45")
        );
    }

    #[test]
    fn an_epoch_has_every_example_once_and_its_batches_are_full() {
        let settings = Settings { max_batch_tokens: 100, max_example_tokens: 44, epochs: 3, ..Settings::plain() };
        let schedule = schedule(&settings);
        let batches = schedule.batches(0);
        let mut scheduled: Vec<usize> = batches.iter().flatten().copied().collect();
        scheduled.sort_unstable();
        let short: Vec<usize> = (0..50).filter(|index| 6 + index * 7 % 40 <= 44).collect();
        assert_eq!((scheduled, schedule.num_excluded), (short.clone(), 50 - short.len()));
        assert!(batches.iter().all(|batch| schedule.batch_tokens(batch) <= 100));
        assert_eq!(batches.len(), schedule.batch_tokens(&short).div_ceil(100), "almost no space is left unused");
        assert_ne!(batches, schedule.batches(1));
    }

    #[test]
    fn every_step_belongs_to_an_epoch() {
        let settings = Settings { max_batch_tokens: 100, max_example_tokens: 100, epochs: 3, ..Settings::plain() };
        let all = schedule(&settings);
        let epoch_steps: Vec<usize> = (0..3).map(|epoch| all.batches(epoch).len()).collect();
        assert_eq!(all.num_steps(), epoch_steps.iter().sum::<usize>());
        let located: Vec<_> = (0..all.num_steps()).map(|step| all.locate(step)).collect();
        let expected: Vec<_> =
            (0..3).flat_map(|epoch| (0..epoch_steps[epoch]).map(move |step| (epoch, step))).collect();
        assert_eq!(located, expected);
        assert_eq!(schedule(&Settings { max_steps: Some(2), ..settings }).num_steps(), 2);
    }
}
