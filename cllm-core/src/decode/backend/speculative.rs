//! Two models side by side: one decides, the other guesses. On a GPU their steps run at once.

use crate::Result;
use crate::decode::{Choice, Chunk, Forward, Predicted, Window};
use crate::model::SlotMove;

pub(crate) struct Drafted<'d> {
    model: &'d mut dyn Forward,
    drafter: &'d mut dyn Forward,
}

impl<'d> Drafted<'d> {
    pub(crate) fn new(model: &'d mut dyn Forward, drafter: &'d mut dyn Forward) -> Self {
        Drafted { model, drafter }
    }
}

impl Forward for Drafted<'_> {
    fn begin(&mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>], choice: Choice) -> Result<()> {
        self.model.begin(chunks, windows, choice)?;
        self.drafter.begin(chunks, windows, choice)
    }

    fn finish(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predicted>> {
        let decided = self.model.finish(windows)?;
        let guessed = self.drafter.finish(windows)?;
        let both = decided.into_iter().zip(guessed);
        Ok(both.map(|(own, other)| Predicted { drafts: Some(other.tokens), ..own }).collect())
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        self.model.move_slots(moves)?;
        self.drafter.move_slots(moves)
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.model.copy_row(from, to)?;
        self.drafter.copy_row(from, to)
    }

    fn prompt_tokens(&self) -> usize {
        self.model.prompt_tokens().min(self.drafter.prompt_tokens())
    }
}
