//! Two models side by side: one decides, the other guesses. On a GPU their steps run at once.

use crate::Result;
use crate::decode::{Chunk, Forward, Predicted, Sampling, Window};
use crate::model::SlotMove;

pub(crate) struct Drafted<'d> {
    model: &'d mut dyn Forward,
    draft_model: &'d mut dyn Forward,
}

impl<'d> Drafted<'d> {
    pub(crate) fn new(model: &'d mut dyn Forward, draft_model: &'d mut dyn Forward) -> Self {
        Drafted { model, draft_model }
    }
}

impl Forward for Drafted<'_> {
    fn begin(&mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>], sampling: Sampling) -> Result<()> {
        self.model.begin(chunks, windows, sampling)?;
        self.draft_model.begin(chunks, windows, sampling)
    }

    fn finish(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predicted>> {
        let decided = self.model.finish(windows)?;
        let guessed = self.draft_model.finish(windows)?;
        let both = decided.into_iter().zip(guessed);
        Ok(both.map(|(own, other)| Predicted { drafts: Some(other.tokens), ..own }).collect())
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        self.model.move_slots(moves)?;
        self.draft_model.move_slots(moves)
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.model.copy_row(from, to)?;
        self.draft_model.copy_row(from, to)
    }

    fn prompt_tokens(&self) -> usize {
        self.model.prompt_tokens().min(self.draft_model.prompt_tokens())
    }
}
