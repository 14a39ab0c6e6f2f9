//! What a run writes to the disk, and the most that it has there at a time.

use cllm_core::model::ModelConfig;
use serde::Serialize;
use tch::Kind;

use crate::memory::{masters_are_copies, trained_kind};
use crate::run_folder::{Kept, StoredBytes, StoredCheckpoint, kept_checkpoints};
use crate::settings::Settings;

/// Bytes in the folder of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DiskEstimate {
    /// A checkpoint to resume from.
    pub checkpoint: u64,
    /// The final model.
    pub final_model: u64,
    /// The most that the folder has at a time, if the run is not interrupted. A checkpoint or a
    /// model is complete before an older one is removed.
    pub peak: u64,
    /// How much of that the folder does not have yet: what must be free.
    pub needed: u64,
    /// What must be free for a run that may be interrupted once, whenever that is: an interruption
    /// writes a checkpoint beside what is there.
    pub needed_if_interrupted: u64,
}

impl DiskEstimate {
    /// Estimates a run that takes `num_steps` in all. `stored` is what its folder has already, and
    /// `tokenizer_bytes` are written with every model.
    pub fn new(
        settings: &Settings,
        config: &ModelConfig,
        kind: Kind,
        num_steps: usize,
        tokenizer_bytes: u64,
        stored: &StoredBytes,
    ) -> Self {
        let sizes = Sizes::new(settings, config, kind, tokenizer_bytes);
        let mut folder = RunFolder {
            checkpoints: stored.checkpoints.clone(),
            final_model: stored.final_model,
            peak: 0,
            interrupted_peak: 0,
        };
        let before = folder.num_bytes();
        (folder.peak, folder.interrupted_peak) = (before, before);
        if !stored.is_finished {
            folder.train(settings, sizes, num_steps, stored.best_step);
        }
        let missing = |peak: u64| (peak - before).saturating_sub(stored.unfinished);
        DiskEstimate {
            checkpoint: sizes.checkpoint(),
            final_model: sizes.final_model,
            peak: folder.peak,
            needed: missing(folder.peak),
            needed_if_interrupted: missing(folder.peak.max(folder.interrupted_peak)),
        }
    }
}

/// Bytes of the final model of a run, with those of its tokenizer.
pub fn final_model_bytes(settings: &Settings, config: &ModelConfig, kind: Kind, tokenizer_bytes: u64) -> u64 {
    Sizes::new(settings, config, kind, tokenizer_bytes).final_model
}

/// The folder of a run while it goes on.
struct RunFolder {
    checkpoints: Vec<StoredCheckpoint>,
    final_model: u64,
    /// The most that it had at a time.
    peak: u64,
    /// The most that it would have had while the checkpoint of an interruption was written.
    interrupted_peak: u64,
}

impl RunFolder {
    fn num_bytes(&self) -> u64 {
        let checkpoints = self.checkpoints.iter().map(|checkpoint| checkpoint.model + checkpoint.state);
        checkpoints.sum::<u64>() + self.final_model
    }

    /// Saves what a run does from the last checkpoint on. `best_step` is the best one so far, and any
    /// validation of prompts may find a better one.
    fn train(&mut self, settings: &Settings, sizes: Sizes, num_steps: usize, mut best_step: Option<usize>) {
        let first = 1 + self.checkpoints.iter().rfind(|checkpoint| checkpoint.state > 0).map_or(0, |last| last.step);
        self.allow_interruption(sizes);
        for step in first..num_steps {
            let is_best = settings.validation.prompts.is_some() && step.is_multiple_of(settings.validation.every);
            let is_due = settings.saves_after(step);
            if is_best {
                best_step = Some(step);
            }
            if is_best || is_due {
                self.save(settings, sizes, step, is_due, best_step);
            }
            // A checkpoint that is due is not written once more.
            if !is_due {
                self.allow_interruption(sizes);
            }
        }
        // The new model is complete before an old one is removed.
        self.peak = self.peak.max(self.num_bytes() + sizes.final_model);
        self.final_model = sizes.final_model;
        if settings.keep_state {
            self.save(settings, sizes, num_steps, true, best_step);
        }
    }

    fn allow_interruption(&mut self, sizes: Sizes) {
        self.interrupted_peak = self.interrupted_peak.max(self.num_bytes() + sizes.checkpoint());
    }

    fn save(&mut self, settings: &Settings, sizes: Sizes, step: usize, has_state: bool, best_step: Option<usize>) {
        let state = if has_state { sizes.state } else { 0 };
        self.checkpoints.push(StoredCheckpoint { step, model: sizes.model, state });
        self.peak = self.peak.max(self.num_bytes());
        let described: Vec<_> =
            self.checkpoints.iter().map(|checkpoint| (checkpoint.step, checkpoint.state > 0)).collect();
        let mut kept = kept_checkpoints(&described, best_step, settings.max_checkpoints).into_iter();
        self.checkpoints.retain_mut(|checkpoint| {
            let kept = kept.next().unwrap_or(Kept::Nothing);
            if kept == Kept::ModelOnly {
                checkpoint.state = 0;
            }
            kept != Kept::Nothing
        });
    }
}

/// Bytes of what a run saves.
#[derive(Clone, Copy)]
struct Sizes {
    /// The model or the adapter in a checkpoint.
    model: u64,
    /// The training state in a checkpoint.
    state: u64,
    final_model: u64,
}

impl Sizes {
    fn checkpoint(&self) -> u64 {
        self.model + self.state
    }

    fn new(settings: &Settings, config: &ModelConfig, kind: Kind, tokenizer_bytes: u64) -> Self {
        let element = kind.elt_size_in_bytes() as u64;
        let (parameters, trained) = (config.num_parameters() as u64, settings.trained_parameters(config) as u64);
        let number = settings.optimizer.state_dtype.num_bytes();
        let has_average = settings.optimizer.ema_decay.is_some();
        // The saved model has the master weights too, where they are the same numbers.
        let are_saved = !masters_are_copies(settings, kind) && !has_average && settings.lora.is_none();
        let num_stored = if are_saved { 2 } else { 3 };
        let average = if has_average { 4 } else { 0 };
        let model = trained_kind(settings, kind).elt_size_in_bytes() as u64 * trained + tokenizer_bytes;
        let whole_model = element * parameters + tokenizer_bytes;
        Sizes {
            model,
            state: (num_stored * number + average) * trained,
            final_model: match settings.lora {
                None => whole_model,
                Some(_) if settings.adapts_drafts() => model,
                Some(_) => whole_model + model,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use cllm_core::model::{AdaptedTokens, LoraConfig};
    use serde_json::json;

    use super::*;
    use crate::settings::StateDtype;

    fn config() -> ModelConfig {
        let json = json!({
            "model_type": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "tie_word_embeddings": true,
        });
        ModelConfig::from_json(&json).unwrap()
    }

    fn estimate(settings: &Settings, kind: Kind, stored: &StoredBytes) -> DiskEstimate {
        DiskEstimate::new(settings, &config(), kind, 1000, 7, stored)
    }

    #[test]
    fn sizes_are_those_of_the_numbers_in_the_files() {
        let bytes = |settings: &Settings, kind: Kind| {
            let DiskEstimate { checkpoint, final_model, .. } = estimate(settings, kind, &StoredBytes::default());
            (checkpoint, final_model)
        };
        let all = config().num_parameters() as u64;
        let mut settings = Settings::plain();
        assert_eq!(bytes(&settings, Kind::Float), (12 * all + 7, 4 * all + 7));
        assert_eq!(bytes(&settings, Kind::BFloat16), (14 * all + 7, 2 * all + 7));
        settings.optimizer.ema_decay = Some(0.9);
        assert_eq!(bytes(&settings, Kind::BFloat16), (18 * all + 7, 2 * all + 7));
        settings.optimizer.state_dtype = StateDtype::Bfloat16;
        assert_eq!(bytes(&settings, Kind::BFloat16), (12 * all + 7, 2 * all + 7));
        let lora = LoraConfig { rank: 2, ..LoraConfig::default() };
        let adapters = lora.num_parameters(&config()) as u64;
        let settings = Settings { lora: Some(lora), ..Settings::plain() };
        assert_eq!(bytes(&settings, Kind::BFloat16), (16 * adapters + 7, 2 * all + 7 + 4 * adapters + 7));
        let lora = LoraConfig { rank: 2, on: AdaptedTokens::Drafts, ..LoraConfig::default() };
        let settings = Settings { lora: Some(lora), ..Settings::plain() };
        assert_eq!(bytes(&settings, Kind::BFloat16), (16 * adapters + 7, 4 * adapters + 7), "no merged model");
    }

    #[test]
    fn the_peak_is_while_a_new_checkpoint_or_the_final_model_stands_beside_the_old_ones() {
        let peak = |settings: &Settings| {
            let DiskEstimate { checkpoint, final_model, peak, needed, .. } =
                estimate(settings, Kind::Float, &StoredBytes::default());
            assert_eq!(peak, needed);
            // In float32, a model in a checkpoint is as large as the final one.
            let counts = (0..10).flat_map(|checkpoints| (0..3).map(move |models| (checkpoints, models)));
            let has_peak = |(checkpoints, models): &(u64, u64)| checkpoints * checkpoint + models * final_model == peak;
            counts.into_iter().find(has_peak).unwrap()
        };
        let mut settings = Settings { save_every: Some(200), max_checkpoints: 2, ..Settings::plain() };
        assert_eq!(peak(&settings), (3, 0), "two are kept while the third is written");
        assert_eq!(peak(&Settings { save_every: Some(400), ..settings.clone() }), (2, 1), "steps 400 and 800");
        settings.validation.prompts = Some(PathBuf::from("p"));
        assert_eq!(peak(&settings), (4, 0), "the best as well");
        settings.validation.every = 150;
        assert_eq!(peak(&settings), (3, 1), "the best was saved without training state");
        settings.max_checkpoints = 100;
        settings.validation.every = 200;
        assert_eq!(peak(&settings), (4, 1), "steps 200 to 800");
        settings.keep_state = true;
        assert_eq!(peak(&settings), (5, 1), "and the last");
        for save_every in [None, Some(0)] {
            assert_eq!(peak(&Settings { save_every, ..Settings::plain() }), (0, 1));
        }
    }

    #[test]
    fn an_interruption_needs_room_for_its_checkpoint() {
        let checkpoints = |settings: &Settings, stored: &StoredBytes| {
            let DiskEstimate { checkpoint, needed_if_interrupted, .. } = estimate(settings, Kind::BFloat16, stored);
            needed_if_interrupted as f64 / checkpoint as f64
        };
        let none = StoredBytes::default();
        let settings = |save_every: Option<usize>| Settings { save_every, max_checkpoints: 2, ..Settings::plain() };
        for save_every in [None, Some(0), Some(1000)] {
            assert_eq!(checkpoints(&settings(save_every), &none), 1.0, "{save_every:?}");
        }
        assert_eq!(checkpoints(&settings(Some(600)), &none), 2.0, "after step 600");
        assert_eq!(checkpoints(&settings(Some(200)), &none), 3.0, "one of three in any case");
        let of_largest_model =
            Settings { lora: Some(LoraConfig { rank: 1, ..LoraConfig::default() }), ..settings(None) };
        let DiskEstimate { checkpoint, needed, needed_if_interrupted, .. } =
            estimate(&of_largest_model, Kind::BFloat16, &none);
        assert!(needed > checkpoint && needed_if_interrupted == needed, "the final model is larger");
        let left = StoredCheckpoint { step: 500, model: 100, state: 100 };
        let interrupted = StoredBytes { checkpoints: vec![left], ..none };
        assert_eq!(checkpoints(&settings(None), &interrupted), 1.0, "a second interruption writes another");
    }

    #[test]
    fn the_best_checkpoint_of_a_stopped_run_stays_beside_the_newest() {
        let mut settings = Settings { save_every: Some(200), max_checkpoints: 2, ..Settings::plain() };
        settings.validation.prompts = Some(PathBuf::from("p"));
        settings.validation.every = 2000;
        let none = StoredBytes::default();
        let DiskEstimate { checkpoint, final_model, .. } = estimate(&settings, Kind::Float, &none);
        let stored = |step: usize, state: u64| StoredCheckpoint { step, model: final_model, state };
        let checkpoints = vec![stored(200, 0), stored(400, checkpoint - final_model)];
        let peak = |best_step: Option<usize>| {
            let stored = StoredBytes { checkpoints: checkpoints.clone(), best_step, ..none.clone() };
            estimate(&settings, Kind::Float, &stored).peak
        };
        assert_eq!(peak(None), 3 * checkpoint);
        assert_eq!(peak(Some(200)), 3 * checkpoint + final_model, "until there is a better one");
    }

    #[test]
    fn what_a_stopped_run_left_is_counted_once() {
        let settings = Settings { save_every: Some(200), max_checkpoints: 2, ..Settings::plain() };
        let DiskEstimate { checkpoint, final_model, needed: fresh, .. } =
            estimate(&settings, Kind::Float, &StoredBytes::default());
        assert_eq!(fresh, 3 * checkpoint);
        let needed = |steps: &[usize], final_model: u64, unfinished: u64, is_finished: bool| {
            let stored = |&step: &usize| StoredCheckpoint { step, model: 100, state: checkpoint - 100 };
            let checkpoints = steps.iter().map(stored).collect();
            let stored = StoredBytes { checkpoints, best_step: None, final_model, unfinished, is_finished };
            estimate(&settings, Kind::Float, &stored).needed
        };
        assert_eq!(needed(&[200, 400], 0, 0, false), checkpoint, "one more while an old one is still there");
        let of_killed = needed(&[200, 400], 0, 50, false);
        assert_eq!(of_killed, checkpoint - 50, "a killed process left a part, which is removed first");
        assert_eq!(needed(&[200, 400, 600, 800], 0, 0, false), final_model, "max_checkpoints was larger before");
        assert_eq!(needed(&[800, 999], 0, 0, false), final_model, "only the final model is missing");
        assert_eq!(needed(&[200, 400], final_model, 0, true), 0, "the run is finished");
        assert_eq!(needed(&[600, 800], final_model, 0, false), final_model, "a killed run replaces the final model");
    }
}
