//! The models of a run, before and after their weights are loaded.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use cllm_core::checkpoint::{self, hub};
use cllm_core::cuda::libtorch;
use cllm_core::decode::{DecodeOptions, Decoder, Strategy, required_slots};
use cllm_core::model::Transformer;
use cllm_core::{Error, Result, device};
use tch::Device;

use super::prompts::Prompts;
use crate::config::RunSettings;
use crate::draft_adapters;
use crate::records::ModelEntry;
use crate::role::Role;

/// A model whose weights are not loaded yet.
pub(super) struct IdentifiedModel {
    pub(super) role: Role,
    pub(super) folder: PathBuf,
    pub(super) entry: ModelEntry,
}

impl IdentifiedModel {
    /// Finds a model by its folder or id.
    ///
    /// # Errors
    /// When there is no such model, or one of its files is missing or broken.
    pub(super) fn locate(role: Role, name: &str) -> Result<Self> {
        let folder = hub::locate(name)?;
        let config = checkpoint::load_config(&folder)?;
        checkpoint::check(&folder)?;
        let entry = ModelEntry {
            role,
            path: folder.display().to_string(),
            fingerprint: checkpoint::fingerprint(&folder)?,
            parameters: config.num_parameters(),
            chat_template: None,
            adapts_teacher: false,
        };
        Ok(IdentifiedModel { role, folder, entry })
    }

    /// Whether this is `base` with adapters.
    ///
    /// # Errors
    /// When a file of the model is missing or broken.
    pub(super) fn adapts(&self, base: &IdentifiedModel) -> Result<bool> {
        let folder = checkpoint::base_folder(&self.folder)?;
        let real = |folder: &Path| folder.canonicalize().map_err(Error::io(folder));
        // Reading all weights once more takes a while.
        Ok(real(&folder)? == real(&base.folder)? || checkpoint::fingerprint(&folder)? == base.entry.fingerprint)
    }

    /// As [`draft_adapters::check`], for a student.
    ///
    /// # Errors
    /// As there.
    pub(super) fn check_adapters(&self, strategies: &[Strategy]) -> Result<()> {
        match self.role {
            Role::Student => draft_adapters::check(&self.folder, strategies, "strategies=[ar, {gated: {n: 16}}]"),
            Role::Teacher => Ok(()),
        }
    }
}

/// A model on its device, with its prompts.
pub(super) struct LoadedModel {
    pub(super) role: Role,
    pub(super) model: Rc<Transformer>,
    /// The model that proposes tokens in [`Strategy::Drafted`].
    pub(super) draft_model: Option<Rc<Transformer>>,
    pub(super) prompts: Prompts,
    /// GPU memory of the weights, and of those of the draft model, in bytes; 0 on the CPU.
    weight_bytes: u64,
    /// GPU memory in use before this model was loaded, in bytes.
    memory_before_bytes: u64,
    /// Peak GPU memory at batch 1 by strategy; empty on the CPU.
    pub(super) batch1_peak_bytes: Vec<(Strategy, u64)>,
}

impl LoadedModel {
    /// # Errors
    /// When a file of the model is missing or broken, or memory runs out.
    pub(super) fn load(model: IdentifiedModel, prompts: Prompts, device: Device) -> Result<Self> {
        let memory_before_bytes = memory_in_use(device);
        let transformer = checkpoint::load(&model.folder, device, device::default_kind(device))?;
        Ok(LoadedModel {
            role: model.role,
            model: Rc::new(transformer),
            draft_model: None,
            prompts,
            weight_bytes: memory_in_use(device).saturating_sub(memory_before_bytes),
            memory_before_bytes,
            batch1_peak_bytes: Vec::new(),
        })
    }

    /// Creates a decoder for `rows` answers at once to any of the prompts, with the draft model if
    /// a strategy needs it.
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub(super) fn decoder(&self, rows: usize, strategies: &[Strategy]) -> Result<Decoder<'_>> {
        let longest = self.prompts.max_prompt_tokens();
        let slots = |&strategy: &Strategy| required_slots(longest, &self.prompts.stop, strategy);
        let decoder = Decoder::new(&self.model, rows, strategies.iter().map(slots).max().unwrap_or(0))?;
        match &self.draft_model {
            Some(draft_model) if strategies.iter().any(|strategy| strategy.needs_draft_model()) => {
                decoder.with_draft_model(draft_model)
            }
            _ => Ok(decoder),
        }
    }

    /// Sets the model that proposes tokens in [`Strategy::Drafted`].
    pub(super) fn draft_with(&mut self, draft_model: &LoadedModel) {
        self.draft_model = Some(Rc::clone(&draft_model.model));
        self.weight_bytes += draft_model.weight_bytes;
    }

    /// Peak GPU memory since the last reset, excluding what was in use before this model was
    /// loaded. `None` on the CPU.
    pub(super) fn peak_memory_bytes(&self) -> Option<u64> {
        self.peak_memory_beyond(self.memory_before_bytes)
    }

    /// Peak GPU memory of this model during some work, without what others use when it begins: another
    /// model, and workspaces of libtorch, which stay allocated whichever model was the first to need them.
    /// `None` on the CPU.
    ///
    /// # Errors
    /// Those of the work.
    pub(super) fn peak_memory_of(&self, work: impl FnOnce() -> Result<()>) -> Result<Option<u64>> {
        let device = self.model.device();
        libtorch::reset_peak_gpu_memory(device);
        let others_bytes = memory_in_use(device).saturating_sub(self.weight_bytes);
        work()?;
        Ok(self.peak_memory_beyond(others_bytes))
    }

    fn peak_memory_beyond(&self, others_bytes: u64) -> Option<u64> {
        libtorch::gpu_memory(self.model.device()).map(|(_, peak)| peak.saturating_sub(others_bytes))
    }
}

fn memory_in_use(device: Device) -> u64 {
    libtorch::gpu_memory(device).map_or(0, |(current, _)| current)
}

pub(super) fn decode_options(strategy: Strategy, settings: &RunSettings) -> DecodeOptions {
    DecodeOptions { sampling: settings.sampling(), ..DecodeOptions::greedy(strategy, settings.seed) }
}
