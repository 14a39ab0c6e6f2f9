//! Steps on a GPU as CUDA graphs. A step's rows lie one behind another, without padding between them; their number is rounded
//! up to one of few sizes. The second step of a size is recorded, and from then on one launch replays it: it copies its input from
//! pinned memory, forwards it, and copies the predictions back.

use std::collections::HashMap;
use std::ops::Range;

use tch::{Kind, Tensor};

use super::cuda_model::{Fused, StepInput, StepSize};
use crate::cuda::decode::{self, Places};
use crate::cuda::graphs::{self, Graph, GraphPool, PinnedInts, Stream};
use crate::decode::{Chunk, Forward, Place, Predicted, Sampling, Window};
use crate::model::{SlotMove, Transformer};
use crate::{Error, Result};

/// Tokens of prompts that a step takes at most beside the windows.
const PROMPT_TOKENS: usize = 4096;

pub(crate) struct RecordedModel<'m> {
    // Graphs go before the memory that they use.
    steps: HashMap<(StepSize, u32), Step>,
    buffers: Buffers,
    stream: Stream,
    model: Fused<'m>,
    device: tch::Device,
    rows: usize,
    vocab: usize,
}

/// A size that was met once, or a recorded one.
enum Step {
    Met,
    Recorded(Graph),
}

/// What steps read and write, and the graphs' own memory; graphs hold their addresses.
struct Buffers {
    pool: GraphPool,
    host_input: PinnedInts,
    input: Tensor,
    host_predicted: PinnedInts,
    predicted: Tensor,
}

/// Where the parts of a step's input lie, as ranges of int32.
struct Layout {
    /// 64-bit numbers come first: they want even addresses.
    visible: Range<usize>,
    keys: Range<usize>,
    tokens: Range<usize>,
    row: Range<usize>,
    slot: Range<usize>,
    position: Range<usize>,
    tile_row: Range<usize>,
    tile_token: Range<usize>,
    tile_length: Range<usize>,
    tile_window: Range<usize>,
}

impl Layout {
    fn of(size: StepSize) -> Self {
        let mut end = 0;
        let mut part = |length: usize| {
            let start = end;
            end += length;
            start..end
        };
        Layout {
            visible: part(2 * size.tokens),
            keys: part(2 * size.outputs),
            tokens: part(size.tokens),
            row: part(size.tokens),
            slot: part(size.tokens),
            position: part(size.tokens),
            tile_row: part(size.tiles),
            tile_token: part(size.tiles),
            tile_length: part(size.tiles),
            tile_window: part(size.tiles),
        }
    }

    fn len(&self) -> usize {
        self.tile_window.end
    }

    /// Views of the parts of a device tensor.
    fn views(&self, input: &Tensor, inverse_temperature: f32) -> StepInput {
        let part = |range: &Range<usize>| input.narrow(0, range.start as i64, range.len() as i64);
        StepInput {
            tokens: part(&self.tokens),
            places: Places {
                row: part(&self.row),
                slot: part(&self.slot),
                position: part(&self.position),
                visible: part(&self.visible),
                tile_row: part(&self.tile_row),
                tile_token: part(&self.tile_token),
                tile_length: part(&self.tile_length),
                tile_window: part(&self.tile_window),
            },
            sampling: decode::SamplingParams { inverse_temperature, keys: part(&self.keys) },
        }
    }
}

impl Buffers {
    fn new(ints: usize, outputs: usize, device: tch::Device) -> Result<Self> {
        let zeros = |length: usize| Tensor::f_zeros([length as i64], (Kind::Int, device));
        let buffers = Buffers {
            pool: GraphPool::new()?,
            host_input: PinnedInts::new(ints)?,
            input: zeros(ints)?,
            host_predicted: PinnedInts::new(outputs)?,
            predicted: zeros(outputs)?,
        };
        // Steps have a stream of their own: weights and the empty cache must be there, and zeros that came late, as beside another
        // process, would wipe out a step's input.
        graphs::synchronize_current_stream(device)?;
        Ok(buffers)
    }
}

impl<'m> RecordedModel<'m> {
    /// `None` where the kernels cannot compute the model.
    pub(crate) fn new(model: &'m Transformer, rows: usize, capacity: usize) -> Result<Option<Self>> {
        let Some(fused) = Fused::new(model, rows, capacity)? else { return Ok(None) };
        let tch::Device::Cuda(index) = model.device() else { return Ok(None) };
        Ok(Some(RecordedModel {
            steps: HashMap::new(),
            buffers: Buffers::new(1, 1, model.device())?,
            stream: Stream::new(index)?,
            model: fused,
            device: model.device(),
            rows,
            vocab: model.config().vocab_size as usize,
        }))
    }

    fn size(&self, chunks: &[Chunk<'_>], windows: &[Window<'_>]) -> StepSize {
        let outputs: usize = windows.iter().map(Window::len).sum();
        let prompt: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let tokens = rounded_up(outputs + prompt);
        // The fused kernels predict after every token.
        let few = tokens <= self.model.max_fused_tokens();
        let outputs = if few { tokens } else { rounded_up(outputs).min(tokens) };
        let tiles = (self.rows + tokens.div_ceil(self.model.tile(tokens))).min(tokens);
        StepSize { tokens, outputs, tiles }
    }

    /// Makes room; what was recorded reads the old buffers and is forgotten.
    fn reserve(&mut self, ints: usize, outputs: usize) -> Result<()> {
        let (had_ints, had_outputs) = (self.buffers.input.numel(), self.buffers.predicted.numel());
        if ints > had_ints || outputs > had_outputs {
            self.steps.clear();
            self.buffers = Buffers::new((2 * ints).max(had_ints), (2 * outputs).max(had_outputs), self.device)?;
        }
        Ok(())
    }

    /// Puts one step on the stream.
    fn launch(&self, size: StepSize, inverse_temperature: f32) -> Result<()> {
        let layout = Layout::of(size);
        let input = self.buffers.input.narrow(0, 0, layout.len() as i64);
        let predicted = self.buffers.predicted.narrow(0, 0, size.outputs as i64);
        self.buffers.host_input.send(&input)?;
        self.model.step(&layout.views(&input, inverse_temperature), &predicted)?;
        if size.outputs > 0 { self.buffers.host_predicted.receive(&predicted) } else { Ok(()) }
    }

    fn run(&mut self, size: StepSize, inverse_temperature: f32) -> Result<()> {
        let key = (size, inverse_temperature.to_bits());
        match self.steps.get(&key) {
            Some(Step::Recorded(graph)) => graph.replay()?,
            None => {
                self.launch(size, inverse_temperature)?;
                self.steps.insert(key, Step::Met);
            }
            Some(Step::Met) => {
                let (graph, ()) = self.stream.record(&self.buffers.pool, || self.launch(size, inverse_temperature))?;
                graph.replay()?;
                self.steps.insert(key, Step::Recorded(graph));
            }
        }
        Ok(())
    }
}

impl Drop for RecordedModel<'_> {
    /// What still runs reads and writes memory that somebody else may get next. A failure was or will be told by whoever asks.
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
    }
}

impl Forward for RecordedModel<'_> {
    fn begin(&mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>], sampling: Sampling) -> Result<()> {
        let size = self.size(chunks, windows);
        let layout = Layout::of(size);
        self.reserve(layout.len(), size.outputs)?;
        let tile = self.model.tile(size.tokens);
        Input { ints: self.buffers.host_input.as_mut_slice(), layout, tile, tokens: 0, tiles: 0 }.fill(chunks, windows);
        let _on_stream = self.stream.enter()?;
        self.run(size, sampling.inverse_temperature())
    }

    fn finish(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predicted>> {
        self.stream.synchronize()?;
        let outputs: usize = windows.iter().map(Window::len).sum();
        let predicted = &self.buffers.host_predicted.as_mut_slice()[..outputs];
        // Of logits that are no numbers none is the largest; the next step would look such a token up.
        if predicted.iter().any(|&token| token < 0 || token as usize >= self.vocab) {
            return Err(Error::negative(
                "the model's logits are not numbers: its weights are damaged, or overflow in bf16",
            ));
        }
        Ok(Predicted::each(windows, predicted))
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        let _on_stream = self.stream.enter()?;
        self.model.move_slots(moves);
        Ok(())
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        let _on_stream = self.stream.enter()?;
        self.model.copy_row(from, to);
        Ok(())
    }

    fn prompt_tokens(&self) -> usize {
        PROMPT_TOKENS
    }
}

/// Fills the input of one step.
struct Input<'b> {
    ints: &'b mut [i32],
    layout: Layout,
    tile: usize,
    tokens: usize,
    tiles: usize,
}

impl Input<'_> {
    fn fill(mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>]) {
        for window in windows {
            for offset in 0..window.len() {
                let at = self.layout.keys.start + 2 * (self.tokens + offset);
                self.long(at, window.noise_key(offset));
            }
            self.row(window.row, window.start, window.tokens(), |offset| window.place(offset));
        }
        for chunk in chunks {
            self.row(chunk.row, chunk.start, chunk.tokens.iter().copied(), Place::in_order);
        }
        // Attention's blocks of empty tiles end at once: one that waits for the projection keeps what comes after in order.
        debug_assert!(self.tiles > 0, "a step of no tokens");
        let Layout { tokens, row, slot, position, tile_row, .. } = &self.layout;
        self.ints[row.start + self.tokens..row.end].fill(-1);
        for part in [tokens, slot, position] {
            self.ints[part.start + self.tokens..part.end].fill(0);
        }
        self.ints[tile_row.start + self.tiles..tile_row.end].fill(-1);
    }

    fn long(&mut self, at: usize, value: u64) {
        (self.ints[at], self.ints[at + 1]) = (value as i32, (value >> 32) as i32);
    }

    /// Adds tokens of a row, whose slots follow one another from `start` on.
    fn row(&mut self, row: usize, start: usize, tokens: impl Iterator<Item = i32>, place: impl Fn(usize) -> Place) {
        let first = self.tokens;
        for (offset, token) in tokens.enumerate() {
            let (at, Place { depth, visible, .. }) = (self.tokens, place(offset));
            self.ints[self.layout.tokens.start + at] = token;
            self.ints[self.layout.row.start + at] = row as i32;
            self.ints[self.layout.slot.start + at] = (start + offset) as i32;
            self.ints[self.layout.position.start + at] = (start + depth) as i32;
            self.long(self.layout.visible.start + 2 * at, visible);
            self.tokens += 1;
        }
        let layout = &self.layout;
        for token in (first..self.tokens).step_by(self.tile) {
            let at = self.tiles;
            self.ints[layout.tile_row.start + at] = row as i32;
            self.ints[layout.tile_token.start + at] = token as i32;
            self.ints[layout.tile_length.start + at] = self.tile.min(self.tokens - token) as i32;
            self.ints[layout.tile_window.start + at] = start as i32;
            self.tiles += 1;
        }
    }
}

/// The next of the sizes that are recorded: powers of two, with one between them from 32 on, and multiples of 1,024.
fn rounded_up(count: usize) -> usize {
    match count {
        0 => 0,
        1025.. => count.next_multiple_of(1024),
        _ => {
            let power = count.next_power_of_two();
            let between = power / 4 * 3;
            if power > 64 && count <= between { between } else { power }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::tree::Tree;

    #[test]
    fn sizes_are_few_and_never_too_small() {
        assert_eq!([0, 1, 3, 17, 33, 65, 97, 500, 1025].map(rounded_up), [0, 1, 4, 32, 64, 96, 128, 512, 2048]);
        assert!((1..5000).all(|count| rounded_up(count) >= count));
    }

    #[test]
    fn rows_lie_one_behind_another_in_tiles() {
        let size = StepSize { tokens: 8, outputs: 8, tiles: 5 };
        let layout = Layout::of(size);
        let mut ints = vec![7; layout.len()];
        let window = Window { row: 0, start: 4, known: 11, guesses: &[12, 13], tree: None, key: 1 };
        let chunk = Chunk { row: 2, start: 0, tokens: &[21, 22, 23] };
        Input { ints: &mut ints, layout: Layout::of(size), tile: 2, tokens: 0, tiles: 0 }.fill(&[chunk], &[window]);
        assert_eq!(ints[layout.tokens], [11, 12, 13, 21, 22, 23, 0, 0]);
        assert_eq!(ints[layout.row], [0, 0, 0, 2, 2, 2, -1, -1]);
        assert_eq!(ints[layout.slot], [4, 5, 6, 0, 1, 2, 0, 0]);
        assert_eq!(ints[layout.position], [4, 5, 6, 0, 1, 2, 0, 0]);
        assert_eq!(ints[layout.visible.start..layout.visible.start + 12], [-1; 12]);
        assert_eq!(ints[layout.tile_row], [0, 0, 2, 2, -1]);
        assert_eq!(ints[layout.tile_token.start..layout.tile_token.start + 4], [0, 2, 3, 5]);
        assert_eq!(ints[layout.tile_length.start..layout.tile_length.start + 4], [2, 1, 2, 1]);
        assert_eq!(ints[layout.tile_window.start..layout.tile_window.start + 4], [4, 4, 0, 0]);
    }

    #[test]
    fn a_tree_lies_in_neighbouring_slots_at_the_positions_of_its_branches() {
        let size = StepSize { tokens: 4, outputs: 4, tiles: 4 };
        let layout = Layout::of(size);
        let mut ints = vec![7; layout.len()];
        let tree = Tree::new([0, 0, 2]);
        let window = Window { row: 0, start: 4, known: 11, guesses: &[12, 13, 14], tree: Some(&tree), key: 1 };
        Input { ints: &mut ints, layout: Layout::of(size), tile: 4, tokens: 0, tiles: 0 }.fill(&[], &[window]);
        assert_eq!(ints[layout.slot], [4, 5, 6, 7]);
        assert_eq!(ints[layout.position], [4, 5, 5, 6]);
        assert_eq!(ints[layout.visible], [0b1, 0, 0b11, 0, 0b101, 0, 0b1101, 0]);
        // Two tokens at the same position are chosen with the same noise.
        assert_eq!(
            ints[layout.keys.start + 2..layout.keys.start + 4],
            ints[layout.keys.start + 4..layout.keys.start + 6]
        );
    }
}
