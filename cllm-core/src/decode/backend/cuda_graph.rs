//! The backend for GPUs: forwards as CUDA graphs.
//!
//! Launching the kernels of a forward one by one can take the CPU longer than the GPU needs to run
//! them, so forwards are captured as graphs. A graph has fixed shapes and addresses. A forward
//! therefore packs its tokens without padding between sequences, pads the total to one of a few
//! sizes ([`captured_size`]), and reads its input from buffers that never move. The second forward
//! of a shape is captured; from then on a single launch copies the input from pinned memory, runs
//! the model and copies the predictions back.

use std::collections::HashMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::cuda_model::{CudaModel, ForwardInput, ForwardShape};
use super::{Backend, Predictions, PromptChunk, Window};
use crate::cuda::decode::{Places, SamplingParams};
use crate::cuda::graphs::{self, Graph, GraphPool, PinnedInts, Stream};
use crate::decode::sampling::Sampling;
use crate::decode::tree::Node;
use crate::model::{SlotMove, Transformer};
use crate::{Error, Result};

const MAX_PROMPT_TOKENS: usize = 4096;

/// The number of tokens that a forward of `num_tokens` is padded to: a power of two, a midpoint
/// between two powers from 64 on, or a multiple of 1,024 above that. Each size costs a capture and
/// the memory of a graph.
fn captured_size(num_tokens: usize) -> usize {
    match num_tokens {
        0 => 0,
        1025.. => num_tokens.next_multiple_of(1024),
        _ => {
            let power = num_tokens.next_power_of_two();
            let between = power / 4 * 3;
            if power > 64 && num_tokens <= between { between } else { power }
        }
    }
}

pub(in crate::decode) struct CudaGraphBackend<'m> {
    // Dropped in this order: graphs before the memory that they use.
    graphs: HashMap<GraphKey, GraphState>,
    buffers: Buffers,
    stream: Stream,
    model: CudaModel<'m>,
    device: Device,
    num_rows: usize,
    vocab_size: usize,
}

/// Everything that is fixed in a graph; the inverse temperature as its bits.
type GraphKey = (ForwardShape, u32);

enum GraphState {
    /// One forward of this shape has run. It did the first-time work, such as allocating
    /// workspaces, that a capture must not contain.
    SeenOnce,
    Captured(Graph),
}

/// The memory whose addresses the graphs hold.
struct Buffers {
    pool: GraphPool,
    host_input: PinnedInts,
    input: Tensor,
    host_predicted: PinnedInts,
    predicted: Tensor,
}

impl Buffers {
    fn new(num_ints: usize, num_outputs: usize, device: Device) -> Result<Self> {
        let zeros = |length: usize| Tensor::f_zeros([length as i64], (Kind::Int, device));
        let buffers = Buffers {
            pool: GraphPool::new()?,
            host_input: PinnedInts::new(num_ints)?,
            input: zeros(num_ints)?,
            host_predicted: PinnedInts::new(num_outputs)?,
            predicted: zeros(num_outputs)?,
        };
        // Forwards run on a stream of their own, so weights, the empty cache and these zeros must
        // be there before the first: zeros that arrive late would wipe out its input.
        graphs::synchronize_current_stream(device)?;
        Ok(buffers)
    }
}

impl<'m> CudaGraphBackend<'m> {
    /// Returns `None` if the model is not on a GPU or our kernels do not support it.
    pub(in crate::decode) fn new(model: &'m Transformer, num_rows: usize, capacity: usize) -> Result<Option<Self>> {
        let Some(cuda_model) = CudaModel::new(model, num_rows, capacity)? else { return Ok(None) };
        let Device::Cuda(index) = model.device() else { return Ok(None) };
        Ok(Some(CudaGraphBackend {
            graphs: HashMap::new(),
            buffers: Buffers::new(1, 1, model.device())?,
            stream: Stream::new(index)?,
            model: cuda_model,
            device: model.device(),
            num_rows,
            vocab_size: model.config().vocab_size as usize,
        }))
    }

    fn shape(&self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>]) -> ForwardShape {
        let num_window_tokens: usize = windows.iter().map(Window::len).sum();
        let num_prompt_tokens: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let num_tokens = captured_size(num_window_tokens + num_prompt_tokens);
        // The fused kernels sample after every token.
        let is_fused = num_tokens <= self.model.max_fused_tokens();
        let num_outputs = if is_fused { num_tokens } else { captured_size(num_window_tokens).min(num_tokens) };
        let num_tiles = (self.num_rows + num_tokens.div_ceil(self.model.tile_tokens(num_tokens))).min(num_tokens);
        ForwardShape { num_tokens, num_outputs, num_tiles }
    }

    /// Grows the buffers if they are too small. Graphs that were captured with the old ones are
    /// dropped.
    fn reserve(&mut self, num_ints: usize, num_outputs: usize) -> Result<()> {
        let (old_ints, old_outputs) = (self.buffers.input.numel(), self.buffers.predicted.numel());
        if num_ints > old_ints || num_outputs > old_outputs {
            self.graphs.clear();
            self.buffers = Buffers::new((2 * num_ints).max(old_ints), (2 * num_outputs).max(old_outputs), self.device)?;
        }
        Ok(())
    }

    /// Puts the work of one forward on the stream.
    fn enqueue(&self, shape: ForwardShape, inverse_temperature: f32) -> Result<()> {
        let layout = InputLayout::new(shape);
        let input = self.buffers.input.narrow(0, 0, layout.len() as i64);
        let predicted = self.buffers.predicted.narrow(0, 0, shape.num_outputs as i64);
        self.buffers.host_input.send(&input)?;
        self.model.forward(&layout.views(&input, inverse_temperature), &predicted)?;
        if shape.num_outputs > 0 { self.buffers.host_predicted.receive(&predicted) } else { Ok(()) }
    }

    fn run(&mut self, shape: ForwardShape, inverse_temperature: f32) -> Result<()> {
        let key = (shape, inverse_temperature.to_bits());
        match self.graphs.get(&key) {
            None => {
                self.enqueue(shape, inverse_temperature)?;
                self.graphs.insert(key, GraphState::SeenOnce);
            }
            Some(GraphState::SeenOnce) => {
                let enqueue = || self.enqueue(shape, inverse_temperature);
                let (graph, ()) = self.stream.record(&self.buffers.pool, enqueue)?;
                graph.replay()?;
                self.graphs.insert(key, GraphState::Captured(graph));
            }
            Some(GraphState::Captured(graph)) => graph.replay()?,
        }
        Ok(())
    }
}

impl Drop for CudaGraphBackend<'_> {
    /// Waits for work that is still running, since it uses memory that is about to be freed. An
    /// error here was or will be reported by whoever collects the forward.
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
    }
}

impl Backend for CudaGraphBackend<'_> {
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], sampling: Sampling) -> Result<()> {
        let shape = self.shape(chunks, windows);
        let layout = InputLayout::new(shape);
        self.reserve(layout.len(), shape.num_outputs)?;
        let tile_tokens = self.model.tile_tokens(shape.num_tokens);
        InputWriter::new(self.buffers.host_input.as_mut_slice(), layout, tile_tokens).write(chunks, windows);
        let _on_stream = self.stream.enter()?;
        self.run(shape, sampling.inverse_temperature())
    }

    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>> {
        self.stream.synchronize()?;
        let num_outputs: usize = windows.iter().map(Window::len).sum();
        let sampled = &self.buffers.host_predicted.as_mut_slice()[..num_outputs];
        // NaN logits have no largest one. The next forward would use such a token as an index into
        // the embedding.
        if sampled.iter().any(|&token| token < 0 || token as usize >= self.vocab_size) {
            return Err(Error::negative(
                "the model's logits are not numbers: its weights are damaged, or they overflow in bfloat16",
            ));
        }
        Ok(Predictions::split(windows, sampled))
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

    fn max_prompt_tokens(&self) -> usize {
        MAX_PROMPT_TOKENS
    }
}

/// The parts of a forward's input in one buffer of int32: a single copy to the device brings all of
/// them.
struct InputLayout {
    // Numbers of 64 bits come first, because they need even addresses.
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

impl InputLayout {
    fn new(shape: ForwardShape) -> Self {
        let ForwardShape { num_tokens, num_outputs, num_tiles } = shape;
        let mut end = 0;
        let mut next = |length: usize| {
            let start = end;
            end += length;
            start..end
        };
        InputLayout {
            visible: next(2 * num_tokens),
            keys: next(2 * num_outputs),
            tokens: next(num_tokens),
            row: next(num_tokens),
            slot: next(num_tokens),
            position: next(num_tokens),
            tile_row: next(num_tiles),
            tile_token: next(num_tiles),
            tile_length: next(num_tiles),
            tile_window: next(num_tiles),
        }
    }

    fn len(&self) -> usize {
        self.tile_window.end
    }

    /// The parts as views of the buffer on the device.
    fn views(&self, input: &Tensor, inverse_temperature: f32) -> ForwardInput {
        let view = |range: &Range<usize>| input.narrow(0, range.start as i64, range.len() as i64);
        ForwardInput {
            tokens: view(&self.tokens),
            places: Places {
                row: view(&self.row),
                slot: view(&self.slot),
                position: view(&self.position),
                visible: view(&self.visible),
                tile_row: view(&self.tile_row),
                tile_token: view(&self.tile_token),
                tile_length: view(&self.tile_length),
                tile_window: view(&self.tile_window),
            },
            sampling: SamplingParams { inverse_temperature, keys: view(&self.keys) },
        }
    }
}

/// Writes the input of one forward into pinned memory. A tile is a run of tokens of one row, of at
/// most `tile_tokens`, whose attention one thread block computes.
struct InputWriter<'b> {
    ints: &'b mut [i32],
    layout: InputLayout,
    tile_tokens: usize,
    num_tokens: usize,
    num_tiles: usize,
}

impl<'b> InputWriter<'b> {
    fn new(ints: &'b mut [i32], layout: InputLayout, tile_tokens: usize) -> Self {
        InputWriter { ints, layout, tile_tokens, num_tokens: 0, num_tiles: 0 }
    }

    /// Windows come first, so the outputs are the leading tokens; then the chunks, then padding.
    fn write(mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>]) {
        for (row, window) in windows.iter().enumerate() {
            for offset in 0..window.len() {
                let index = self.layout.keys.start + 2 * (self.num_tokens + offset);
                self.write_u64(index, window.noise_key(offset));
            }
            self.write_row(row, window.start, window.tokens(), |offset| window.node(offset));
        }
        for chunk in chunks {
            self.write_row(chunk.row, chunk.start, chunk.tokens.iter().copied(), Node::in_order);
        }
        self.write_padding();
    }

    /// Padding belongs to row -1, which kernels skip.
    fn write_padding(&mut self) {
        // Thread blocks of empty tiles end at once. At least one tile must wait for the projection
        // before it, or the kernels after the attention could start too early.
        debug_assert!(self.num_tiles > 0, "a forward without tokens");
        let InputLayout { tokens, row, slot, position, tile_row, .. } = &self.layout;
        self.ints[row.start + self.num_tokens..row.end].fill(-1);
        for part in [tokens, slot, position] {
            self.ints[part.start + self.num_tokens..part.end].fill(0);
        }
        self.ints[tile_row.start + self.num_tiles..tile_row.end].fill(-1);
    }

    fn write_u64(&mut self, index: usize, value: u64) {
        (self.ints[index], self.ints[index + 1]) = (value as i32, (value >> 32) as i32);
    }

    /// Adds tokens of a row, in the slots from `start` on.
    fn write_row(&mut self, row: usize, start: usize, tokens: impl Iterator<Item = i32>, node: impl Fn(usize) -> Node) {
        let first = self.num_tokens;
        for (offset, token) in tokens.enumerate() {
            let (index, Node { depth, visible, .. }) = (self.num_tokens, node(offset));
            self.ints[self.layout.tokens.start + index] = token;
            self.ints[self.layout.row.start + index] = row as i32;
            self.ints[self.layout.slot.start + index] = (start + offset) as i32;
            self.ints[self.layout.position.start + index] = (start + depth) as i32;
            self.write_u64(self.layout.visible.start + 2 * index, visible);
            self.num_tokens += 1;
        }
        let layout = &self.layout;
        for token in (first..self.num_tokens).step_by(self.tile_tokens) {
            let index = self.num_tiles;
            self.ints[layout.tile_row.start + index] = row as i32;
            self.ints[layout.tile_token.start + index] = token as i32;
            self.ints[layout.tile_length.start + index] = self.tile_tokens.min(self.num_tokens - token) as i32;
            self.ints[layout.tile_window.start + index] = start as i32;
            self.num_tiles += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::tree::TokenTree;

    /// What the writer puts into a buffer of sevens.
    fn written(
        shape: ForwardShape,
        tile_tokens: usize,
        chunks: &[PromptChunk<'_>],
        windows: &[Window<'_>],
    ) -> (InputLayout, Vec<i32>) {
        let layout = InputLayout::new(shape);
        let mut ints = vec![7; layout.len()];
        InputWriter::new(&mut ints, InputLayout::new(shape), tile_tokens).write(chunks, windows);
        (layout, ints)
    }

    #[test]
    fn captured_sizes_are_few_and_never_too_small() {
        assert_eq!([0, 1, 3, 17, 33, 65, 97, 500, 1025].map(captured_size), [0, 1, 4, 32, 64, 96, 128, 512, 2048]);
        assert!((1..5000).all(|num_tokens| captured_size(num_tokens) >= num_tokens));
    }

    #[test]
    fn rows_are_packed_one_after_another_and_cut_into_tiles() {
        let shape = ForwardShape { num_tokens: 8, num_outputs: 8, num_tiles: 5 };
        let window = Window { start: 4, last_token: 11, draft: &[12, 13], tree: None, sequence_key: 1 };
        let chunk = PromptChunk { row: 2, start: 0, tokens: &[21, 22, 23] };
        let (layout, ints) = written(shape, 2, &[chunk], &[window]);
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
    fn a_tree_takes_neighboring_slots_at_the_positions_of_its_branches() {
        let shape = ForwardShape { num_tokens: 4, num_outputs: 4, num_tiles: 4 };
        let tree = TokenTree::new([0, 0, 2]);
        let window = Window { start: 4, last_token: 11, draft: &[12, 13, 14], tree: Some(&tree), sequence_key: 1 };
        let (layout, ints) = written(shape, 4, &[], &[window]);
        assert_eq!(ints[layout.slot], [4, 5, 6, 7]);
        assert_eq!(ints[layout.position], [4, 5, 5, 6]);
        assert_eq!(ints[layout.visible], [0b1, 0, 0b11, 0, 0b101, 0, 0b1101, 0]);
        // Two tokens at the same position get the same noise.
        let key = |index: usize| &ints[layout.keys.start + 2 * index..layout.keys.start + 2 * index + 2];
        assert_eq!(key(1), key(2));
    }
}
