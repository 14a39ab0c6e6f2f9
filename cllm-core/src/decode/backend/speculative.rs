//! Speculative decoding: a target model and a draft model forward the same windows. On a GPU their
//! forwards overlap.

use super::{Backend, Outputs, Predictions, PromptChunk, Window};
use crate::Result;
use crate::model::{SlotCopy, SlotMove};

pub(in crate::decode) struct SpeculativeBackend<'d> {
    target: &'d mut dyn Backend,
    draft: &'d mut dyn Backend,
}

impl<'d> SpeculativeBackend<'d> {
    pub(in crate::decode) fn new(target: &'d mut dyn Backend, draft: &'d mut dyn Backend) -> Self {
        SpeculativeBackend { target, draft }
    }
}

impl Backend for SpeculativeBackend<'_> {
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], outputs: Outputs) -> Result<()> {
        self.target.launch(chunks, windows, outputs)?;
        self.draft.launch(chunks, windows, outputs)
    }

    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>> {
        let predicted = self.target.collect(windows)?;
        let drafted = self.draft.collect(windows)?;
        let both = predicted.into_iter().zip(drafted);
        Ok(both.map(|(target, draft)| Predictions { drafted: Some(draft.tokens), ..target }).collect())
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        self.target.move_slots(moves)?;
        self.draft.move_slots(moves)
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.target.copy_row(from, to)?;
        self.draft.copy_row(from, to)
    }

    fn copy_slots(&mut self, copy: &SlotCopy) -> Result<()> {
        self.target.copy_slots(copy)?;
        self.draft.copy_slots(copy)
    }

    fn max_prompt_tokens(&self) -> usize {
        self.target.max_prompt_tokens().min(self.draft.max_prompt_tokens())
    }
}
