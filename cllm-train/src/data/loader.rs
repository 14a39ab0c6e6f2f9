//! Packs the batches of a run on a thread of its own, ahead of training, so that the device never
//! waits for them.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use cllm_core::distributed::ProcessGroup;
use cllm_core::fingerprint;
use cllm_core::model::ModelConfig;

use crate::data::batch::{Batch, BatchCounts, max_chunk_rows};
use crate::data::dataset::Example;
use crate::data::packing::PackedSequence;
use crate::data::schedule::Schedule;
use crate::settings::Settings;

const MAX_STEPS_AHEAD: usize = 2;

/// The batches of one step.
#[derive(Default)]
pub struct StepBatches {
    /// The batches that this process trains on.
    pub batches: Vec<Batch>,
    /// Counts over the batches of all processes.
    pub counts: BatchCounts,
}

/// Selects the batches of a step that a process trains on: every `world_size`-th one, starting with
/// number `rank`.
#[derive(Clone, Copy)]
pub struct RankShard {
    rank: usize,
    world_size: usize,
}

impl RankShard {
    /// All batches, in a single process.
    pub fn all() -> Self {
        RankShard { rank: 0, world_size: 1 }
    }

    pub fn for_process(group: &ProcessGroup) -> Self {
        RankShard { rank: group.rank(), world_size: group.world_size() }
    }
}

/// Packs the examples of a run into batches.
#[derive(Clone, Copy)]
pub struct BatchLoader<'l> {
    settings: &'l Settings,
    examples: &'l [Example],
    max_chunk_rows: usize,
}

impl<'l> BatchLoader<'l> {
    pub fn new(settings: &'l Settings, examples: &'l [Example], config: &ModelConfig) -> Self {
        BatchLoader { settings, examples, max_chunk_rows: max_chunk_rows(config) }
    }

    /// Packs some examples, by their indices, for an epoch. The same epoch always draws the same
    /// blocks and states.
    pub fn batch(&self, example_indices: &[usize], epoch: usize) -> Batch {
        let consistency = &self.settings.consistency;
        let pack = |&index: &usize| {
            let example = &self.examples[index];
            let mut rng = fingerprint::derive_rng(self.settings.seed, &example.id, epoch as u64);
            PackedSequence::sample(example, consistency, &mut rng)
        };
        let sequences: Vec<_> = example_indices.iter().map(pack).collect();
        let anchor_prompt_fraction = self.settings.is_anchored().then_some(consistency.anchor_prompt_fraction);
        Batch::new(&sequences, self.max_chunk_rows, anchor_prompt_fraction)
    }

    /// Packs the batches of a step. The batches of the other processes are packed too, because
    /// every process needs the counts of all.
    pub fn step_batches(&self, batches: &[Vec<usize>], epoch: usize, shard: RankShard) -> StepBatches {
        let mut step = StepBatches::default();
        for (number, example_indices) in batches.iter().enumerate() {
            let batch = self.batch(example_indices, epoch);
            step.counts.add(batch.counts);
            if number % shard.world_size == shard.rank {
                step.batches.push(batch);
            }
        }
        step
    }

    /// Packs the batches of every step from `first_step` on, in order, on a thread of `scope`.
    pub fn load_ahead<'s>(
        self,
        scope: &'s Scope<'s, '_>,
        schedule: &'s Schedule,
        first_step: usize,
        shard: RankShard,
    ) -> Receiver<StepBatches>
    where
        'l: 's,
    {
        let (sender, receiver) = sync_channel(MAX_STEPS_AHEAD);
        scope.spawn(move || {
            let (mut epoch_in_memory, mut epoch_batches) = (None, Vec::new());
            for step in first_step..schedule.num_steps() {
                let (epoch, step_in_epoch) = schedule.locate(step);
                if epoch_in_memory != Some(epoch) {
                    (epoch_in_memory, epoch_batches) = (Some(epoch), schedule.batches(epoch));
                }
                let batches = epoch_batches.chunks(self.settings.accumulation).nth(step_in_epoch);
                let batches = batches.expect("the schedule counts only steps that have batches");
                // The receiver is gone once the run has ended.
                if sender.send(self.step_batches(batches, epoch, shard)).is_err() {
                    return;
                }
            }
        });
        receiver
    }
}
