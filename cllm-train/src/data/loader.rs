//! Packs the batches of a run on a thread of its own, ahead of training, so that the device never
//! waits for them.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use cllm_core::model::Transformer;
use cllm_core::{Result, fingerprint, train};
use tch::Kind;

use crate::data::batch::{Batch, BatchCounts, max_chunk_rows};
use crate::data::dataset::Example;
use crate::data::division::{ExampleSize, RankShard, divide};
use crate::data::packing::PackedSequence;
use crate::data::schedule::Schedule;
use crate::settings::Settings;

const MAX_STEPS_AHEAD: usize = 2;

/// The batches of one step.
#[derive(Default)]
pub struct StepBatches {
    /// The batches that this process trains on.
    pub batches: Vec<Batch>,
    /// Number of batches of the process that has the most.
    pub max_batches: usize,
    /// Counts over the batches of all processes.
    pub counts: BatchCounts,
}

/// Packs the examples of a run into batches.
#[derive(Clone, Copy)]
pub struct BatchLoader<'l> {
    settings: &'l Settings,
    examples: &'l [Example],
    max_chunk_rows: usize,
    /// What attention to one token costs, if a token of a sequence costs 1 without it.
    pair_cost: f64,
}

impl<'l> BatchLoader<'l> {
    /// Packs for training `model`.
    ///
    /// # Errors
    /// [`cllm_core::Error::Torch`] if there is no such GPU.
    pub fn new(settings: &'l Settings, examples: &'l [Example], model: &Transformer) -> Result<Self> {
        let (config, kind) = (model.config(), model.kind());
        // By the usual counts of operations, in forward and backward.
        let flops_per_pair = (12 * config.num_layers * config.num_heads * config.head_dim) as f64;
        let pair_cost = flops_per_pair / (6 * config.num_parameters()) as f64;
        let has_kernels = kind == Kind::BFloat16 && train::slow_path_reason_on(config, kind, model.device())?.is_none();
        Ok(BatchLoader { settings, examples, max_chunk_rows: max_chunk_rows(config, has_kernels), pair_cost })
    }

    /// Packs some examples, by their indices, for an epoch. The same epoch always draws the same
    /// blocks and states.
    pub fn batch(&self, example_indices: &[usize], epoch: usize) -> Batch {
        let sequences: Vec<_> = example_indices.iter().map(|&index| self.draw(index, epoch)).collect();
        Batch::new(&sequences, self.max_chunk_rows, self.anchor_prompt_fraction())
    }

    /// Draws the blocks and states of an example for an epoch.
    fn draw(&self, index: usize, epoch: usize) -> PackedSequence {
        let example = &self.examples[index];
        let mut rng = fingerprint::derive_rng(self.settings.seed, &example.id, epoch as u64);
        PackedSequence::sample(example, &self.settings.consistency, &mut rng)
    }

    fn anchor_prompt_fraction(&self) -> Option<f64> {
        self.settings.is_anchored().then_some(self.settings.consistency.anchor_prompt_fraction)
    }

    /// Packs the batches of a step that this process trains on. Of the others only the states are
    /// drawn, because every process needs the counts of all.
    pub fn step_batches(&self, batches: &[Vec<usize>], epoch: usize, shard: RankShard) -> StepBatches {
        let mut step = StepBatches::default();
        let shares = divide(batches, shard.world_size, self.settings.max_batch_tokens, |index| self.size(index));
        for (rank, share) in shares.iter().enumerate() {
            step.max_batches = step.max_batches.max(share.len());
            if rank == shard.rank {
                step.batches = share.iter().map(|example_indices| self.batch(example_indices, epoch)).collect();
                step.batches.iter().for_each(|batch| step.counts.add(batch.counts));
            } else {
                let of_example = |&index| BatchCounts::of(&self.draw(index, epoch), self.anchor_prompt_fraction());
                share.iter().flatten().map(of_example).for_each(|counts| step.counts.add(counts));
            }
        }
        step
    }

    /// What an example takes at most. A noisy token attends to half of the response on average.
    fn size(&self, index: usize) -> ExampleSize {
        let (example, consistency) = (&self.examples[index], &self.settings.consistency);
        let (prompt_len, response_len) = (example.prompt_ids.len(), example.response_ids.len());
        let (num_clean, num_tokens) = (prompt_len + response_len, example.max_packed_tokens(consistency));
        let num_pairs = num_clean * num_clean / 2 + (num_tokens - num_clean) * (prompt_len + response_len / 2);
        ExampleSize { num_tokens, cost: num_tokens as f64 + self.pair_cost * num_pairs as f64 }
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

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelConfig;
    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::data::dataset::Block;

    #[test]
    fn every_process_knows_the_counts_of_all_and_packs_its_own_batches() {
        let config = ModelConfig::from_json(&json!({
            "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "tie_word_embeddings": true,
        }));
        let example = |index: usize| Example {
            id: format!("s{index}"),
            prompt_ids: vec![1; 3],
            response_ids: vec![2; 8],
            blocks: [0, 4]
                .map(|start| Block {
                    start,
                    states: vec![vec![3; 4], vec![2, 3, 3, 3], vec![2; 4]],
                    augmented: Vec::new(),
                })
                .into(),
            labelled: vec![index.is_multiple_of(2); 8],
        };
        let examples: Vec<Example> = (0..9).map(example).collect();
        let mut settings = Settings { max_batch_tokens: 64, ..Settings::plain() };
        (settings.consistency.local_weight, settings.consistency.anchor_weight) = (1.0, 1.0);
        let model = Transformer::random(config.unwrap(), 0, Device::Cpu, Kind::Float);
        let loader = BatchLoader::new(&settings, &examples, &model).unwrap();
        let batches = [vec![0, 1], vec![2, 3], vec![4, 5], vec![6, 7], vec![8]];
        let alone = loader.step_batches(&batches, 3, RankShard::all());
        assert_eq!(alone.batches.len(), 5);
        for world_size in [2, 3, 6] {
            let mut packed = BatchCounts::default();
            for rank in 0..world_size {
                let step = loader.step_batches(&batches, 3, RankShard { rank, world_size });
                assert_eq!(step.counts, alone.counts, "{rank} of {world_size}");
                step.batches.iter().for_each(|batch| packed.add(batch.counts));
                assert!(step.batches.len() <= step.max_batches);
            }
            assert_eq!(packed, alone.counts, "{world_size}");
        }
    }
}
