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
use crate::plan::needs::{Comparisons, Needs, Outset, Room};
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
        let planned = PlannedDevice { world_size: group.world_size(), ..PlannedDevice::present(device) };
        let outset = Outset::new(settings, planned, config, examples, probe, tokenizer_folder)?;
        let room = Room { device: None, ..Room::detect(settings, &outset.device)? };
        let capacity = libtorch::gpu_capacity(device).map(|(_, total)| total);
        let needs = outset.needs(settings)?;
        let refusal = refusal(&outset, settings, &needs, &certain(room, capacity))?;
        if refusal.is_none()
            && let Some(warning) = text::interruption_warning(&needs.disk, Some(room.disk))
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
fn certain(room: Room, gpu_capacity: Option<u64>) -> Room {
    let most = |bytes: u64| (bytes as f64 / (1.0 - ESTIMATE_ERROR)) as u64;
    let host = room.host.map(|host| HostMemory { total: most(host.total), available: most(host.total) });
    Room { device: gpu_capacity.map(most), host, ..room }
}

/// Why the run cannot fit, and settings that fit.
fn refusal(outset: &Outset<'_>, settings: &Settings, needs: &Needs, room: &Room) -> Result<Option<String>> {
    let comparisons = Comparisons::new(needs, room);
    if comparisons.fit() {
        return Ok(None);
    }
    let proposals = Proposals::find(outset, settings, &comparisons, room)?;
    let parts = text::advices(&comparisons, &proposals);
    Ok(Some(format!("{}: {}", settings.output.display(), parts.join("\n"))))
}

#[cfg(test)]
mod tests {
    use cllm_core::capacity::HostMemory;
    use serde_json::json;
    use tch::Kind;

    use super::*;

    const LARGE: u64 = 1 << 50;

    /// The refusal of a run of a model with 7 million parameters where there is so much room.
    fn refusal_in(settings: &Settings, kind: Kind, room: &Room) -> Option<String> {
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
        let name = if kind == Kind::Float { "cpu" } else { "cuda:0" };
        let device = PlannedDevice {
            name: name.to_owned(),
            kind,
            present: None,
            gpu: None,
            available_bytes: None,
            world_size: 1,
        };
        let outset = Outset {
            device,
            config: &config,
            examples: &examples,
            probe: None,
            tokenizer_bytes: 0,
            stored: Default::default(),
        };
        refusal(&outset, settings, &outset.needs(settings).unwrap(), room).unwrap()
    }

    fn room(device: Option<u64>, host: u64, disk: u64) -> Room {
        Room { device, host: Some(HostMemory { total: host, available: host }), disk }
    }

    fn settings() -> Settings {
        Settings { output: "runs/a".into(), model: Some("m".to_owned()), save_every: Some(1), ..Settings::default() }
    }

    #[test]
    fn a_full_disk_is_told_with_the_numbers_and_what_to_change() {
        assert_eq!(refusal_in(&settings(), Kind::Float, &room(None, LARGE, LARGE)), None);
        // Three checkpoints of 85 MB are there at a time.
        let message = refusal_in(&settings(), Kind::Float, &room(None, LARGE, 200_000_000)).unwrap();
        for part in ["runs/a: disk does not fit: ", " MB are missing", "max_checkpoints=1"] {
            assert!(message.contains(part), "{message}");
        }
        let message = refusal_in(&settings(), Kind::Float, &room(None, LARGE, 1000)).unwrap();
        assert!(message.contains("make room or choose another output"), "{message}");
    }

    #[test]
    fn memory_that_no_machine_state_could_give_is_refused_and_what_may_fit_is_not() {
        let refused =
            |kind: Kind, room: Room, capacity: Option<u64>| refusal_in(&settings(), kind, &certain(room, capacity));
        // The CPU's tensors are in the memory of the host.
        let message = refused(Kind::Float, room(None, 500_000_000, LARGE), None).unwrap();
        assert!(
            message.contains("host memory does not fit: ") && message.contains("checkpointed_layers="),
            "{message}"
        );
        let message = refused(Kind::BFloat16, room(None, LARGE, LARGE), Some(300_000_000)).unwrap();
        assert!(message.contains("device memory does not fit: "), "{message}");
        assert_eq!(refused(Kind::BFloat16, room(None, LARGE, LARGE), Some(LARGE)), None);
        // Within the error of the estimate, a run may fit.
        let megabytes: Vec<u64> = (1..4000).collect();
        let host = |megabytes: u64| room(None, megabytes * 1_000_000, LARGE);
        let enough = megabytes.partition_point(|&host_mb| refused(Kind::Float, host(host_mb), None).is_some());
        let planned =
            megabytes.partition_point(|&host_mb| refusal_in(&settings(), Kind::Float, &host(host_mb)).is_some());
        let ratio = enough as f64 / planned as f64;
        assert!((0.94..0.96).contains(&ratio), "{ratio}");
    }
}
