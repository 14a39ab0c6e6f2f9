//! Batches are packed on a thread of their own, so that the device waits for none.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use cllm_core::fingerprint;
use cllm_core::model::ModelConfig;

use crate::data::dataset::Example;
use crate::data::packing::{Batch, Counts};
use crate::data::schedule::Schedule;
use crate::settings::Settings;

/// Steps that lie ready.
const AHEAD: usize = 2;
/// Logits that exist at once: 256 MiB of float32, a few times over.
const LOGITS: usize = 1 << 26;

/// Most rows of logits of a chunk.
pub fn rows_at_once(config: &ModelConfig) -> usize {
    (LOGITS / config.vocab_size as usize).max(1)
}

/// The batches of a step.
#[derive(Default)]
pub struct StepBatches {
    /// Those that this process takes.
    pub batches: Vec<Batch>,
    /// What those of all processes hold.
    pub counts: Counts,
}

/// What packs the batches of a run.
#[derive(Clone, Copy)]
pub struct Packer<'p> {
    settings: &'p Settings,
    examples: &'p [Example],
    /// Most logits of a chunk.
    rows: usize,
}

impl<'p> Packer<'p> {
    /// For a model of this shape.
    pub fn new(settings: &'p Settings, examples: &'p [Example], config: &ModelConfig) -> Self {
        Packer { settings, examples, rows: rows_at_once(config) }
    }

    /// Packs some responses for a pass of an epoch.
    pub fn batch(&self, responses: &[usize], epoch: usize) -> Batch {
        let pack = |&index: &usize| {
            let example = &self.examples[index];
            let mut rng = fingerprint::derive_rng(self.settings.seed, &example.id, epoch as u64);
            example.pack(&self.settings.consistency, &mut rng)
        };
        let sequences: Vec<_> = responses.iter().map(pack).collect();
        Batch::new(
            &sequences,
            self.rows,
            self.settings.is_anchored().then_some(self.settings.consistency.anchor_prompt_fraction),
        )
    }

    /// The batches of every step from `first` on, in order: those of process `rank` of `world`. What the others take is packed
    /// too, so that everyone knows the counts of all.
    pub fn ahead<'s>(
        self,
        scope: &'s Scope<'s, '_>,
        schedule: &'s Schedule,
        first: usize,
        (rank, world): (usize, usize),
    ) -> Receiver<StepBatches>
    where
        'p: 's,
    {
        let (sender, receiver) = sync_channel(AHEAD);
        scope.spawn(move || {
            let mut order = (usize::MAX, Vec::new());
            for step in first..schedule.steps() {
                let (epoch, within) = schedule.place(step);
                if order.0 != epoch {
                    order = (epoch, schedule.batches(epoch));
                }
                let group = order.1.chunks(self.settings.accumulation).nth(within).unwrap_or_default();
                let mut found = StepBatches::default();
                for (index, responses) in group.iter().enumerate() {
                    let batch = self.batch(responses, epoch);
                    found.counts.add(batch.counts);
                    if index % world == rank {
                        found.batches.push(batch);
                    }
                }
                // Nobody takes it any more where the run has ended.
                if sender.send(found).is_err() {
                    return;
                }
            }
        });
        receiver
    }
}
