//! The prompts of evaluations, which training data must not contain, whatever their system message.

use std::collections::HashSet;
use std::path::PathBuf;

use cllm_core::chat_template::SystemFrame;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::Trajectory;
use cllm_core::{Result, fingerprint, interrupt, prompt_set};

use super::{hash_bytes, hash_ids};

pub(super) struct EvaluationPrompts {
    /// Hashes of the prompts as they are.
    ids: HashSet<u128>,
    /// Hashes of the rendered conversations without their system messages.
    without_system: HashSet<u128>,
    /// `None` if no prompt can be compared without its system message.
    frame: Option<SystemFrame>,
}

impl EvaluationPrompts {
    /// Reads and renders the prompts.
    pub(super) fn read(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Self> {
        let frame = (!paths.is_empty()).then(|| tokenizer.system_frame()).flatten();
        let (mut ids, mut without_system) = (HashSet::new(), HashSet::new());
        for path in paths {
            for sample in prompt_set::read(path)? {
                interrupt::check()?;
                let encoded = tokenizer.encode_prompt(&sample.prompt);
                ids.insert(hash_ids(&encoded.map_err(|error| error.in_row(path, &sample.id))?.1));
                if let Some(frame) = &frame {
                    let texts = tokenizer.render_system_variants(&sample.prompt);
                    without_system.extend(texts.iter().map(|text| hash_bytes(frame.without_system(text).as_bytes())));
                }
            }
        }
        Ok(EvaluationPrompts { ids, without_system, frame })
    }

    /// Hash of all prompts, in whatever files and order. `None` if there are none.
    pub(super) fn fingerprint(&self) -> Option<String> {
        let mut hashes: Vec<u128> = self.ids.iter().chain(&self.without_system).copied().collect();
        hashes.sort_unstable();
        let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
        (!hashes.is_empty()).then(|| fingerprint::hash_bytes(&bytes))
    }

    /// Whether a row, with this hash of its prompt, has one of the prompts.
    pub(super) fn contain(&self, row: &Trajectory, prompt_hash: u128) -> bool {
        let is_in = |frame: &SystemFrame| {
            self.without_system.contains(&hash_bytes(frame.without_system(&row.prompt).as_bytes()))
        };
        self.ids.contains(&prompt_hash) || self.frame.as_ref().is_some_and(is_in)
    }
}
