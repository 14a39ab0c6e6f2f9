//! Refuses a run, before it loads anything, that certainly cannot end.

use std::path::Path;

use cllm_core::capacity::HostMemory;
use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::ModelConfig;
use cllm_core::{Error, Result, progress};
use tch::Device;

use crate::data::dataset::Example;
use crate::plan::device::PlannedDevice;
use crate::plan::needs::{Available, Comparisons, Needs, RunInputs};
use crate::plan::proposal::Proposals;
use crate::plan::text;
use crate::settings::Settings;
use crate::validation::ProbeSize;

/// Estimates of memory may be too high by this share.
const ESTIMATE_ERROR: f64 = 0.05;

/// Refuses a run whose checkpoints do not fit on the disk, or whose tensors are certainly more than
/// its device has. Every process must call it; the main one looks.
///
/// # Errors
/// [`Error::Environment`] with the numbers and settings that fit.
pub fn refuse_what_cannot_fit(
    settings: &Settings,
    (device, group): (Device, &ProcessGroup),
    config: &ModelConfig,
    examples: &[Example],
    probe: Option<ProbeSize>,
    tokenizer_folder: &Path,
) -> Result<()> {
    let refusal = if group.is_main() {
        let planned = PlannedDevice::new(settings)?;
        let inputs = RunInputs::new(settings, planned, config, examples, probe, tokenizer_folder)?;
        let available = Available { device: None, ..Available::detect(settings, &inputs.device)? };
        let capacity = libtorch::gpu_capacity(device).map(|(_, total)| total);
        let needs = inputs.needs(settings)?;
        let refusal = refusal(&inputs, settings, &needs, &certain(available, capacity))?;
        if refusal.is_none()
            && let Some(warning) = text::interruption_warning(&needs.disk, Some(available.disk))
        {
            progress::log(warning);
        }
        refusal
    } else {
        None
    };
    match group.broadcast(refusal, device)? {
        None => Ok(()),
        Some(message) => Err(Error::environment(message)),
    }
}

/// The most that there can be of memory, whatever else runs now.
fn certain(available: Available, gpu_capacity: Option<u64>) -> Available {
    let most = |bytes: u64| (bytes as f64 / (1.0 - ESTIMATE_ERROR)) as u64;
    let host = available.host.map(|host| HostMemory { total: most(host.total), available: most(host.total) });
    Available { device: gpu_capacity.map(most), host, ..available }
}

/// Why the run cannot fit, and settings that fit.
fn refusal(
    inputs: &RunInputs<'_>,
    settings: &Settings,
    needs: &Needs,
    available: &Available,
) -> Result<Option<String>> {
    let comparisons = Comparisons::new(needs, available);
    if comparisons.fit() {
        return Ok(None);
    }
    let proposals = Proposals::find(inputs, settings, &comparisons, available)?;
    let parts = text::advices(&comparisons, &proposals);
    Ok(Some(format!("{}: {}", settings.output.display(), parts.join("\n"))))
}

#[cfg(test)]
mod tests {
    use cllm_core::capacity::HostMemory;
    use cllm_core::model::{AdaptedTokens, LoraConfig, ModelShape};
    use serde_json::json;
    use tch::Kind;

    use super::*;
    use crate::data::dataset::Block;

    const LARGE: u64 = 1 << 50;

    /// The refusal of a run of a model with 7 million parameters where so much is available.
    fn refusal_in(settings: &Settings, kind: Kind, available: &Available) -> Option<String> {
        let config = json!({
            "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 1024,
            "num_hidden_layers": 6, "num_attention_heads": 4, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&config).unwrap();
        let example = |index: usize| Example {
            id: index.to_string(),
            prompt_ids: vec![1; 100],
            response_ids: vec![2; 400],
            blocks: Vec::new(),
            labelled: vec![true; 400],
        };
        let examples: Vec<Example> = (0..64).map(example).collect();
        let inputs = RunInputs::of_unknown_device(kind, 1, &config, &examples);
        refusal(&inputs, settings, &inputs.needs(settings).unwrap(), available).unwrap()
    }

    fn available(device: Option<u64>, host: u64, disk: u64) -> Available {
        Available { device, host: Some(HostMemory { total: host, available: host }), disk, is_here: true }
    }

    fn settings() -> Settings {
        Settings { output: "runs/a".into(), model: Some("m".to_owned()), save_every: Some(1), ..Settings::plain() }
    }

    #[test]
    fn a_full_disk_is_told_with_the_numbers_and_what_to_change() {
        assert_eq!(refusal_in(&settings(), Kind::Float, &available(None, LARGE, LARGE)), None);
        // Three checkpoints of 85 MB are there at a time.
        let message = refusal_in(&settings(), Kind::Float, &available(None, LARGE, 200_000_000)).unwrap();
        for part in ["runs/a: disk does not fit: ", " MB short", "max_checkpoints=1"] {
            assert!(message.contains(part), "{message}");
        }
        let message = refusal_in(&settings(), Kind::Float, &available(None, LARGE, 1000)).unwrap();
        assert!(message.contains("make room or choose another output"), "{message}");
        let elsewhere = Available { is_here: false, ..available(None, 1000, 1000) };
        assert_eq!(refusal_in(&settings(), Kind::BFloat16, &elsewhere), None, "not the disk of that machine");
    }

    #[test]
    fn memory_that_no_machine_state_could_give_is_refused_and_what_may_fit_is_not() {
        let refused = |kind: Kind, available: Available, capacity: Option<u64>| {
            refusal_in(&settings(), kind, &certain(available, capacity))
        };
        // The CPU's tensors are in the memory of the host.
        let message = refused(Kind::Float, available(None, 1_200_000_000, LARGE), None).unwrap();
        assert!(
            message.contains("host memory does not fit: ") && message.contains("checkpointed_layers="),
            "{message}"
        );
        let message = refused(Kind::BFloat16, available(None, 500_000_000, LARGE), Some(LARGE)).unwrap();
        assert!(message.contains("short; free memory, use a machine with more"), "{message}");
        let message = refused(Kind::BFloat16, available(None, LARGE, LARGE), Some(300_000_000)).unwrap();
        assert!(message.contains("device memory does not fit: "), "{message}");
        assert_eq!(refused(Kind::BFloat16, available(None, LARGE, LARGE), Some(LARGE)), None);
        // Within the error of the estimate, a run may fit.
        let megabytes: Vec<u64> = (1..4000).collect();
        let host = |megabytes: u64| available(None, megabytes * 1_000_000, LARGE);
        let enough = megabytes.partition_point(|&host_mb| refused(Kind::Float, host(host_mb), None).is_some());
        let planned =
            megabytes.partition_point(|&host_mb| refusal_in(&settings(), Kind::Float, &host(host_mb)).is_some());
        let ratio = enough as f64 / planned as f64;
        assert!((0.94..0.96).contains(&ratio), "{ratio}");
    }

    /// 16.4 GB of weights leave no room for a second copy, which only adapters for all tokens are
    /// merged into.
    #[test]
    fn adapters_for_drafts_of_an_8b_model_validate_on_a_gpu_of_24_gb() {
        let config = ModelConfig::from_json(&ModelShape::Qwen3_8B.json()).unwrap();
        let block = |start: usize| Block { start, states: vec![vec![3; 16], vec![2; 16]], augmented: Vec::new() };
        let example = Example {
            blocks: (0..10).map(|index| block(16 * index)).collect(),
            ..Example::labelled("a".to_owned(), vec![1; 400], vec![2; 160])
        };
        let examples = vec![example; 64];
        let probe = ProbeSize { num_prompts: 32, num_prompt_tokens: 32 * 300, max_prompt_tokens: 400, slots: 688 };
        let inputs =
            RunInputs { probe: Some(probe), ..RunInputs::of_unknown_device(Kind::BFloat16, 1, &config, &examples) };
        let refused = |on: AdaptedTokens| {
            let lora = Some(LoraConfig { on, first_layer: 18, ..LoraConfig::default() });
            let settings = Settings { lora, max_batch_tokens: 4096, ..settings() };
            let available = certain(available(None, LARGE, LARGE), Some(24_000_000_000));
            refusal(&inputs, &settings, &inputs.needs(&settings).unwrap(), &available).unwrap()
        };
        assert_eq!(refused(AdaptedTokens::Drafts), None);
        assert!(refused(AdaptedTokens::All).is_some_and(|message| message.contains("device memory does not fit")));
    }
}
