//! What a run writes to the disk, and the most that it has there at a time.

use cllm_core::model::ModelConfig;
use serde::Serialize;
use tch::Kind;

use crate::checkpoint::StoredBytes;
use crate::memory::masters_are_copies;
use crate::settings::{Settings, StateDtype};

/// Bytes in the folder of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DiskEstimate {
    /// One checkpoint.
    pub checkpoint: u64,
    /// The final model.
    pub final_model: u64,
    /// The most that the folder has at a time. A checkpoint or a model is complete before an older
    /// one is removed.
    pub peak: u64,
    /// How much of that the folder does not have yet: what must be free.
    pub needed: u64,
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
        let Sizes { checkpoint, final_model } = Sizes::new(settings, config, kind, tokenizer_bytes);
        let mut folders: Vec<u64> = stored.checkpoints.iter().map(|(_, bytes)| *bytes).collect();
        let total = |folders: &[u64]| folders.iter().sum::<u64>() + stored.final_model;
        let before = total(&folders);
        let mut peak = before;
        let max_kept = settings.max_checkpoints + usize::from(settings.validation.prompts.is_some());
        let steps_done = stored.checkpoints.last().map_or(0, |(step, _)| *step);
        if steps_done < num_steps || stored.final_model == 0 {
            // After so many saves, every other one finds the same number of folders.
            let num_saves = num_saves(settings, steps_done, num_steps).min(folders.len() + max_kept + 1);
            for _ in 0..num_saves {
                folders.push(checkpoint);
                peak = peak.max(total(&folders));
                folders.drain(..folders.len().saturating_sub(max_kept));
            }
            peak = peak.max(total(&folders) + final_model);
        }
        DiskEstimate { checkpoint, final_model, peak, needed: (peak - before).saturating_sub(stored.unfinished) }
    }
}

struct Sizes {
    checkpoint: u64,
    final_model: u64,
}

impl Sizes {
    fn new(settings: &Settings, config: &ModelConfig, kind: Kind, tokenizer_bytes: u64) -> Self {
        let element = kind.elt_size_in_bytes() as u64;
        let (parameters, trained) = (config.num_parameters() as u64, settings.trained_parameters(config) as u64);
        let number = match settings.optimizer.state_dtype {
            StateDtype::Float32 => 4,
            StateDtype::Bfloat16 => 2,
        };
        let has_average = settings.optimizer.ema_decay.is_some();
        // The saved model has the master weights too, where they are the same numbers.
        let are_saved = !masters_are_copies(settings, kind) && !has_average && settings.lora.is_none();
        let num_stored = if are_saved { 2 } else { 3 };
        let average = if has_average { 4 } else { 0 };
        let trained_weights = element * trained + tokenizer_bytes;
        let adapter = if settings.lora.is_some() { trained_weights } else { 0 };
        Sizes {
            checkpoint: trained_weights + (num_stored * number + average) * trained,
            final_model: element * parameters + tokenizer_bytes + adapter,
        }
    }
}

/// Checkpoints after step `steps_done`. Any validation of prompts may find the best so far.
fn num_saves(settings: &Settings, steps_done: usize, num_steps: usize) -> usize {
    let multiples = |every: usize| (num_steps.saturating_sub(1) / every).saturating_sub(steps_done / every);
    let validations = settings.validation.prompts.as_ref().map_or(0, |_| multiples(settings.validation.every));
    settings.save_every.map_or(0, multiples) + validations + usize::from(steps_done < num_steps)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use cllm_core::model::LoraConfig;
    use serde_json::json;

    use super::*;

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
        let mut settings = Settings::default();
        assert_eq!(bytes(&settings, Kind::Float), (12 * all + 7, 4 * all + 7));
        assert_eq!(bytes(&settings, Kind::BFloat16), (14 * all + 7, 2 * all + 7));
        settings.optimizer.ema_decay = Some(0.9);
        assert_eq!(bytes(&settings, Kind::BFloat16), (18 * all + 7, 2 * all + 7));
        settings.optimizer.state_dtype = StateDtype::Bfloat16;
        assert_eq!(bytes(&settings, Kind::BFloat16), (12 * all + 7, 2 * all + 7));
        let lora = LoraConfig { rank: 2, ..LoraConfig::default() };
        let adapters = lora.num_parameters(&config()) as u64;
        let settings = Settings { lora: Some(lora), ..Settings::default() };
        assert_eq!(bytes(&settings, Kind::BFloat16), (14 * adapters + 7, 2 * all + 7 + 2 * adapters + 7));
    }

    #[test]
    fn the_peak_is_while_a_new_checkpoint_or_the_final_model_stands_beside_the_old_ones() {
        let peak = |settings: &Settings| {
            let DiskEstimate { checkpoint, final_model, peak, needed } =
                estimate(settings, Kind::Float, &StoredBytes::default());
            assert_eq!(peak, needed);
            let (checkpoints, rest) = (peak / checkpoint, peak % checkpoint);
            (checkpoints, if rest == final_model { "final" } else { "" })
        };
        let mut settings = Settings { save_every: Some(200), max_checkpoints: 2, ..Settings::default() };
        assert_eq!(peak(&settings), (3, ""), "two are kept while the third is written");
        settings.validation.prompts = Some(PathBuf::from("p"));
        assert_eq!(peak(&settings), (4, ""), "the best as well");
        settings.max_checkpoints = 100;
        assert_eq!(peak(&settings), (9, "final"), "steps 200 to 800, validations at the same, and the last");
        assert_eq!(peak(&Settings { save_every: None, ..Settings::default() }), (1, "final"));
    }

    #[test]
    fn what_a_stopped_run_left_is_counted_once() {
        let settings = Settings { save_every: Some(200), max_checkpoints: 2, ..Settings::default() };
        let DiskEstimate { checkpoint, final_model, needed: fresh, .. } =
            estimate(&settings, Kind::Float, &StoredBytes::default());
        assert_eq!(fresh, 3 * checkpoint);
        let needed = |steps: &[usize], final_model: u64, unfinished: u64| {
            let checkpoints = steps.iter().map(|&step| (step, checkpoint)).collect();
            estimate(&settings, Kind::Float, &StoredBytes { checkpoints, final_model, unfinished }).needed
        };
        assert_eq!(needed(&[200, 400], 0, 0), checkpoint, "one more while an old one is still there");
        assert_eq!(needed(&[200, 400], 0, 50), checkpoint - 50, "a killed process left a part, which is removed first");
        assert_eq!(needed(&[200, 400, 600, 800], 0, 0), checkpoint, "max_checkpoints was larger before");
        assert_eq!(needed(&[800, 1000], 0, 0), final_model, "only the final model is missing");
        assert_eq!(needed(&[800, 1000], final_model, 0), 0, "the run is complete");
        assert_eq!(needed(&[800], final_model, 0), checkpoint + final_model, "a longer run replaces the final model");
    }
}
