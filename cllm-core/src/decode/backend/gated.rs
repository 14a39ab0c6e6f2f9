//! Gated adapters: one model verifies a window and proposes the next, in the same forward. The window
//! is in it twice, as the model reads it and as the model with its adapters for drafts reads it. A
//! window after which nothing is proposed is in it once.
//! Keys and values of the second copy are in the slots after the window, where the next window
//! overwrites them.
//!
//! The adapters that act on draft tokens alone are gated LoRA (Samragh et al., arXiv 2507.11851).

use super::{Backend, Outputs, Predictions, PromptChunk, Window};
use crate::Result;
use crate::decode::sampling::Sampling;
use crate::decode::tree::{Node, TokenTree};
use crate::model::{SlotCopy, SlotMove};

pub(in crate::decode) struct GatedBackend<'d> {
    model: &'d mut dyn Backend,
    doubled: Vec<DoubledWindow>,
}

/// A window that is in a forward twice if it needs proposals.
pub(super) struct DoubledWindow {
    start: usize,
    last_token: i32,
    /// The draft, and then the window again.
    draft: Vec<i32>,
    /// `None` for a window that is in the forward once. Such windows do not branch.
    tree: Option<TokenTree>,
    is_closing: bool,
    sampling: Sampling,
    sequence_key: u64,
}

impl DoubledWindow {
    pub(super) fn new(window: &Window<'_>) -> Self {
        let (mut draft, mut tree) = (window.draft.to_vec(), None);
        if window.needs_proposals() {
            let nodes: Vec<Node> = (0..window.len()).map(|offset| window.node(offset)).collect();
            draft.extend(window.tokens());
            tree = Some(TokenTree::doubled(&nodes));
        }
        DoubledWindow {
            start: window.start,
            last_token: window.last_token,
            draft,
            tree,
            is_closing: window.is_closing,
            sampling: window.sampling,
            sequence_key: window.sequence_key,
        }
    }

    pub(super) fn window(&self) -> Window<'_> {
        let DoubledWindow { start, last_token, ref draft, ref tree, is_closing, sampling, sequence_key } = *self;
        let num_adapted = if tree.is_some() { draft.len().div_ceil(2) } else { 0 };
        let tree = tree.as_ref();
        Window { start, last_token, draft, tree, num_adapted, is_closing, sampling, sequence_key }
    }
}

impl<'d> GatedBackend<'d> {
    pub(in crate::decode) fn new(model: &'d mut dyn Backend) -> Self {
        GatedBackend { model, doubled: Vec::new() }
    }
}

impl Backend for GatedBackend<'_> {
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], outputs: Outputs) -> Result<()> {
        self.doubled = windows.iter().map(DoubledWindow::new).collect();
        let doubled: Vec<Window<'_>> = self.doubled.iter().map(DoubledWindow::window).collect();
        self.model.launch(chunks, &doubled, outputs)
    }

    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>> {
        let doubled: Vec<Window<'_>> = self.doubled.iter().map(DoubledWindow::window).collect();
        let predictions = self.model.collect(&doubled)?.into_iter().zip(windows);
        Ok(predictions.map(|(predictions, window)| split(predictions, window.len())).collect())
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        self.model.move_slots(moves)
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.model.copy_row(from, to)
    }

    fn copy_slots(&mut self, copy: &SlotCopy) -> Result<()> {
        self.model.copy_slots(copy)
    }

    fn max_prompt_tokens(&self) -> usize {
        self.model.max_prompt_tokens()
    }
}

/// What a forward of a doubled window gives for the window of `len` tokens.
fn split(mut predictions: Predictions, len: usize) -> Predictions {
    if predictions.tokens.len() == len {
        return predictions;
    }
    let drafted = predictions.tokens.split_off(len);
    predictions.candidates.drain(..len.min(predictions.candidates.len()));
    Predictions { drafted: Some(drafted), ..predictions }
}
