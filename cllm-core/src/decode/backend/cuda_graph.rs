//! The backend for GPUs: forwards as CUDA graphs ([`GraphRunner`]).
//!
//! A graph has fixed shapes. A forward therefore packs its tokens without padding between sequences
//! and pads the total to one of a few sizes ([`padded_size`]).

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::Device;

use super::cuda_model::CudaModel;
use super::{Backend, Outputs, Predictions, PromptChunk, Window, padded_size};
use crate::cuda::forward_input::{Draw, ForwardShape, InputToken, InputWriter, SamplingOptions};
use crate::cuda::graph_runner::GraphRunner;
use crate::decode::sampling::{Candidate, Candidates, NO_CANDIDATES};
use crate::decode::tree::Node;
use crate::model::{SlotCopy, SlotMove, Transformer};
use crate::{Error, Result};

/// A forward of our kernels that caches prompts has at most this many tokens.
pub const MAX_PROMPT_TOKENS: usize = 4096;

/// Held by one forward at a time that occupies its whole device: its blocks wait for each other, and
/// would wait forever for ones that those of another such forward keep out. (Processes take turns on
/// a device anyway.)
static WHOLE_DEVICE: Mutex<()> = Mutex::new(());

pub(in crate::decode) struct CudaGraphBackend<'m> {
    // Dropped first: it waits for forwards, which use the model's weights and cache.
    runner: GraphRunner,
    /// Held while a forward occupies the whole device.
    whole_device: Option<MutexGuard<'static, ()>>,
    model: CudaModel<'m>,
    vocab_size: usize,
    /// What the last forward was to give.
    sampling: SamplingOptions,
}

impl<'m> CudaGraphBackend<'m> {
    /// Returns `None` if the model is not on a GPU or our kernels do not support it. `whole_device`
    /// is that of [`CudaModel::new`].
    pub(in crate::decode) fn new(
        model: &'m Transformer,
        num_rows: usize,
        capacity: usize,
        whole_device: bool,
    ) -> Result<Option<Self>> {
        let Some(cuda_model) = CudaModel::new(model, num_rows, capacity, whole_device)? else { return Ok(None) };
        let Device::Cuda(index) = model.device() else { return Ok(None) };
        Ok(Some(CudaGraphBackend {
            runner: GraphRunner::new(index, cuda_model.input_limits())?,
            whole_device: None,
            model: cuda_model,
            vocab_size: model.config().vocab_size as usize,
            sampling: SamplingOptions { is_greedy: true, gives_candidates: false, has_nucleus: false },
        }))
    }

    fn shape(&self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>]) -> ForwardShape {
        let num_window_tokens: usize = windows.iter().map(Window::len).sum();
        let num_prompt_tokens: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let num_tokens = padded_size(num_window_tokens + num_prompt_tokens);
        let num_outputs = match num_tokens <= self.model.max_sampled_tokens() {
            true => num_tokens,
            false => padded_size(num_window_tokens).min(num_tokens),
        };
        let num_adapted: usize = windows.iter().map(|window| window.num_adapted).sum();
        let num_plain = num_window_tokens + num_prompt_tokens - num_adapted;
        let shared = (num_adapted > 0).then(|| self.model.shared_shape(padded_size(num_plain))).flatten();
        ForwardShape {
            num_tokens,
            num_outputs,
            num_tiles: self.model.max_tiles(num_tokens),
            has_adapted: num_adapted > 0,
            shared,
        }
    }
}

impl Backend for CudaGraphBackend<'_> {
    #[allow(unsafe_code)]
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], outputs: Outputs) -> Result<()> {
        self.sampling = SamplingOptions {
            is_greedy: windows.iter().all(|window| window.sampling.is_greedy()),
            gives_candidates: outputs.candidates,
            has_nucleus: windows.iter().any(|window| window.sampling.top_p() < 1.0),
        };
        let shape = self.shape(chunks, windows);
        write_input(&mut self.runner.write_input(shape)?, chunks, windows)?;
        // No forward of this backend is running any more.
        self.whole_device = None;
        if self.model.occupies_device(shape) {
            self.whole_device = Some(WHOLE_DEVICE.lock().unwrap_or_else(PoisonError::into_inner));
        }
        let model = &self.model;
        // SAFETY: a forward uses the weights, which the model borrows for longer than the runner
        // lives, and the cache, which it owns, never replaces and drops after the runner.
        unsafe { self.runner.launch(self.sampling, |input, results| model.forward(input, results)) }
    }

    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>> {
        let num_outputs: usize = windows.iter().map(Window::len).sum();
        let ints_per_output = self.sampling.ints_per_output();
        let results = &self.runner.results()?[..num_outputs * ints_per_output];
        self.whole_device = None;
        let sampled: Vec<i32> = results.iter().copied().step_by(ints_per_output).collect();
        let candidates: Vec<Candidates> = match self.sampling.gives_candidates {
            true => results.chunks(ints_per_output).map(candidates).collect(),
            false => Vec::new(),
        };
        // NaN logits have no maximum. The next forward would use such a token as an index into the
        // embedding.
        if sampled.iter().any(|&token| token < 0 || token as usize >= self.vocab_size) {
            return Err(Error::negative(
                "the model's logits are not numbers: its weights are damaged, or they overflow in bfloat16",
            ));
        }
        Ok(Predictions::split(windows, &sampled, &candidates))
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        self.runner.on_stream(|| self.model.move_slots(moves))
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.runner.on_stream(|| {
            self.model.copy_row(from, to);
            Ok(())
        })
    }

    fn copy_slots(&mut self, copy: &SlotCopy) -> Result<()> {
        self.runner.on_stream(|| {
            self.model.copy_slots(copy);
            Ok(())
        })
    }

    fn max_prompt_tokens(&self) -> usize {
        MAX_PROMPT_TOKENS
    }
}

/// The candidates of an output, from pairs of a token and the bits of its probability.
fn candidates(result: &[i32]) -> Candidates {
    let mut candidates = NO_CANDIDATES;
    for (candidate, pair) in candidates.iter_mut().zip(result.chunks(2)) {
        *candidate = Candidate { token: pair[0], probability: f32::from_bits(pair[1].cast_unsigned()) };
    }
    candidates
}

/// Windows come first, so the outputs are the leading tokens; then the chunks.
fn write_input(writer: &mut InputWriter<'_>, chunks: &[PromptChunk<'_>], windows: &[Window<'_>]) -> Result<()> {
    for (row, window) in windows.iter().enumerate() {
        let token = |(offset, id)| {
            let Node { depth, visible, .. } = window.node(offset);
            let draw = Draw {
                inverse_temperature: window.sampling.inverse_temperature(),
                top_p: window.sampling.top_p(),
                key: window.noise_key(offset),
            };
            let is_adapted = offset >= window.first_adapted();
            InputToken { id, position: window.start + depth, visible, draw: Some(draw), is_adapted }
        };
        writer.push_row(row, window.start, window.tokens().enumerate().map(token))?;
    }
    for chunk in chunks {
        let token = |(offset, &id)| {
            let Node { depth, visible, .. } = Node::in_order(offset);
            InputToken { id, position: chunk.start + depth, visible, draw: None, is_adapted: false }
        };
        writer.push_row(chunk.row, chunk.start, chunk.tokens.iter().enumerate().map(token))?;
    }
    // Thread blocks of empty tiles end at once. At least one tile must wait for the projection
    // before it, or the kernels after the attention could start too early.
    debug_assert!(!windows.is_empty() || !chunks.is_empty(), "a forward without tokens");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::cuda::forward_input::{InputLayout, InputLimits};
    use crate::cuda::shape::KernelShape;
    use crate::decode::sampling::Sampling;
    use crate::decode::tree::TokenTree;

    /// The input for these chunks and windows, written into a buffer that was filled with sevens.
    fn written(shape: ForwardShape, chunks: &[PromptChunk<'_>], windows: &[Window<'_>]) -> (InputLayout, Vec<i32>) {
        let model = KernelShape::TWO_TOKEN_TILES;
        let layout = InputLayout::new(shape);
        let mut ints = vec![7; layout.len()];
        let mut writer = InputWriter::new(&mut ints, shape, InputLimits { model, num_rows: 3, capacity: 32 });
        write_input(&mut writer, chunks, windows).unwrap();
        (layout, ints)
    }

    #[test]
    fn windows_come_before_chunks() {
        let shape = ForwardShape { num_tokens: 8, num_outputs: 8, num_tiles: 5, has_adapted: true, shared: None };
        let window = Window {
            start: 4,
            last_token: 11,
            draft: &[12, 13],
            tree: None,
            num_adapted: 1,
            is_closing: false,
            sampling: Sampling::Temperature(0.5).with_top_p(0.25),
            sequence_key: 1,
        };
        let chunk = PromptChunk { row: 2, start: 0, tokens: &[21, 22, 23] };
        let (layout, ints) = written(shape, &[chunk], &[window]);
        assert_eq!(ints[layout.tokens], [11, 12, 13, 21, 22, 23, 0, 0]);
        assert_eq!(ints[layout.row], [0, 0, 0, 2, 2, 2, -1, -1]);
        assert_eq!(ints[layout.slot], [4, 5, 6, 0, 1, 2, 0, 0]);
        assert_eq!(ints[layout.position], [4, 5, 6, 0, 1, 2, 0, 0]);
        assert_eq!(ints[layout.adapted], [0, 0, 1, 0, 0, 0, 0, 0]);
        assert_eq!(ints[layout.visible.start..layout.visible.start + 12], [-1; 12]);
        assert_eq!(ints[layout.tile_row], [0, 0, 2, 2, -1]);
        let floats = |range: Range<usize>| ints[range].iter().map(|&bits| f32::from_bits(bits.cast_unsigned()));
        assert!(floats(layout.inverse_temperatures).eq([2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]));
        assert!(floats(layout.top_ps).eq([0.25, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0]));
    }

    #[test]
    fn a_tree_occupies_neighboring_slots_at_the_positions_of_its_branches() {
        let shape = ForwardShape { num_tokens: 4, num_outputs: 4, num_tiles: 4, has_adapted: false, shared: None };
        let tree = TokenTree::new([0, 0, 2]);
        let window = Window {
            start: 4,
            last_token: 11,
            draft: &[12, 13, 14],
            tree: Some(&tree),
            num_adapted: 0,
            is_closing: false,
            sampling: Sampling::Greedy,
            sequence_key: 1,
        };
        let (layout, ints) = written(shape, &[], &[window]);
        assert_eq!(ints[layout.slot], [4, 5, 6, 7]);
        assert_eq!(ints[layout.position], [4, 5, 5, 6]);
        assert_eq!(ints[layout.visible], [0b1, 0, 0b11, 0, 0b101, 0, 0b1101, 0]);
        // Two tokens at the same position get the same noise.
        let key = |index: usize| &ints[layout.keys.start + 2 * index..layout.keys.start + 2 * index + 2];
        assert_eq!(key(1), key(2));
    }

    mod needs_gpu {
        use serde_json::json;
        use tch::{Kind, Tensor};

        use super::*;
        use crate::decode::backend::eager::EagerBackend;
        use crate::decode::sampling::MAX_CANDIDATES;
        use crate::model::ModelConfig;

        /// A random model in bfloat16 on the GPU, and in float32 on the CPU.
        fn on_gpu_and_cpu(vocab_size: usize) -> (Transformer, Transformer) {
            let config = ModelConfig::from_json(&json!({
                "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 96, "intermediate_size": 160,
                "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
            }));
            let config = config.unwrap();
            let on_gpu = Transformer::random(config.clone(), 7, Device::Cuda(0), Kind::BFloat16);
            let on_cpu = Transformer::random(config, 7, Device::Cpu, Kind::Float);
            for ((_, mut rounded), (_, mut exact)) in
                on_gpu.named_parameters().into_iter().zip(on_cpu.named_parameters())
            {
                if rounded.dim() == 2 {
                    rounded *= 4.0;
                }
                exact.copy_(&rounded.to_device(Device::Cpu));
            }
            (on_gpu, on_cpu)
        }

        /// Fails unless both give the same tokens with about the same probabilities.
        fn assert_close(on_gpu: &Candidates, on_cpu: &Candidates, case: &str) {
            for (rank, (one, other)) in on_gpu.iter().zip(on_cpu).enumerate() {
                let tolerance = 0.25 * other.probability + 1e-5;
                let is_tied = on_cpu.iter().enumerate().any(|(index, candidate)| {
                    index != rank && (candidate.probability - other.probability).abs() < 2.0 * tolerance
                });
                // What comes after the last is not known.
                let may_differ = is_tied || rank == MAX_CANDIDATES - 1;
                assert!((one.probability - other.probability).abs() < tolerance, "{case}: {on_gpu:?}, {on_cpu:?}");
                assert!(may_differ || one.token == other.token, "{case}: {on_gpu:?}, {on_cpu:?}");
            }
        }

        #[test]
        #[ignore = "needs a GPU: scripts/test --gpu"]
        fn candidates_equal_those_of_the_float32_model_up_to_rounding() {
            let _no_grad = tch::no_grad_guard();
            for vocab_size in [3, 203, 20_000] {
                let (on_gpu, on_cpu) = on_gpu_and_cpu(vocab_size);
                let mut gpu = CudaGraphBackend::new(&on_gpu, 8, 64, true).unwrap().unwrap();
                let mut cpu = EagerBackend::new(&on_cpu, 8, 64).unwrap();
                // The fused kernels for 8, 16 and 32 tokens, and cuBLAS.
                for (num_rows, width) in [(1, 1), (1, 5), (4, 4), (2, 13), (1, 40), (8, 16)] {
                    let draft: Vec<i32> = (1..width).map(|offset| offset * 37 % vocab_size as i32).collect();
                    let window = |row: usize| Window {
                        start: 0,
                        last_token: (row * 11 % vocab_size) as i32,
                        draft: &draft,
                        tree: None,
                        num_adapted: 0,
                        is_closing: false,
                        sampling: Sampling::Greedy,
                        sequence_key: row as u64,
                    };
                    // All greedy, all sampled, and each row in another way.
                    for temperatures in [[0.0, 0.0], [0.8, 0.8], [0.8, 0.0]] {
                        let sampling = |row: usize| Sampling::from_temperature(temperatures[row % 2]);
                        let window = |row| Window { sampling: sampling(row), ..window(row) };
                        let windows: Vec<Window<'_>> = (0..num_rows).map(window).collect();
                        let outputs = Outputs { candidates: true };
                        let forward = |backend: &mut dyn Backend| {
                            backend.launch(&[], &windows, outputs).unwrap();
                            backend.collect(&windows).unwrap()
                        };
                        let expected = forward(&mut cpu);
                        // The first of a size runs without a graph, the second is captured.
                        for round in 0..3 {
                            for (given, expected) in forward(&mut gpu).iter().zip(&expected) {
                                let case =
                                    format!("{vocab_size} tokens, {num_rows} x {width}, {temperatures:?}, {round}");
                                assert_eq!(given.candidates.len(), expected.candidates.len(), "{case}");
                                for (given, expected) in given.candidates.iter().zip(&expected.candidates) {
                                    assert_close(given, expected, &case);
                                }
                                let first = given.candidates.iter().map(|candidates| candidates[0].token);
                                assert!(first.eq(given.tokens.iter().copied()), "{case}");
                            }
                        }
                    }
                }
            }
        }

        /// Of every token of a vocabulary after each of `tokens [rows, width]`, flat: how probable the
        /// likelier ones are together. And after each of `tokens`, how often one is drawn from the second
        /// half of the nucleus.
        fn nuclei(model: &Transformer, tokens: &Tensor, temperature: f64, top_p: f64) -> (Vec<f32>, Vec<f64>) {
            let positions = Tensor::arange(tokens.size()[1], (Kind::Int64, Device::Cpu)).expand_as(tokens);
            let logits = model.compute_logits(&model.forward(tokens, &positions)).unwrap();
            let (sorted, ids) = (logits / temperature).softmax(-1, Kind::Double).sort(-1, true);
            let before = sorted.cumsum(-1, Kind::Double) - &sorted;
            let sum_within = |low: f64, high: f64| {
                let is_within = before.ge(low).logical_and(&before.lt(high));
                (&sorted * is_within).sum_dim_intlist(-1, false, Kind::Double).view([-1])
            };
            let in_second_half = sum_within(top_p / 2.0, top_p) / sum_within(0.0, top_p);
            let before = before.zeros_like().scatter(-1, &ids, &before).to_kind(Kind::Float).view([-1]);
            (Vec::try_from(before).unwrap(), Vec::try_from(in_second_half).unwrap())
        }

        #[test]
        #[ignore = "needs a GPU: scripts/test --gpu"]
        fn tokens_come_from_the_nucleus_of_the_float32_model_up_to_rounding() {
            const TOP_P: f64 = 0.6;
            let _no_grad = tch::no_grad_guard();
            for vocab_size in [203, 20_000] {
                let (on_gpu, on_cpu) = on_gpu_and_cpu(vocab_size);
                let mut gpu = CudaGraphBackend::new(&on_gpu, 64, 64, true).unwrap().unwrap();
                // The fused kernels, those for all products between two attentions, and cuBLAS.
                for (num_rows, width) in [(1, 8), (2, 13), (64, 16)] {
                    let draft: Vec<i32> = (1..width).map(|offset| offset * 37 % vocab_size as i32).collect();
                    let last_token = |row: usize| (row * 11 % vocab_size) as i32;
                    // Beside others, some rows are greedy.
                    let sampling = |row: usize| match row % 4 {
                        3 => Sampling::Greedy,
                        _ => Sampling::Temperature(0.8).with_top_p(TOP_P),
                    };
                    let tokens: Vec<i32> =
                        (0..num_rows).flat_map(|row| [&[last_token(row)], &draft[..]].concat()).collect();
                    let tokens = Tensor::from_slice(&tokens).to_kind(Kind::Int64).view([num_rows as i64, -1]);
                    let (before, in_second_half) = nuclei(&on_cpu, &tokens, 0.8, TOP_P);
                    for candidates in [false, true] {
                        let (mut num_late, mut expected) = (0.0, 0.0);
                        for draw in 0..20_000 / (num_rows as u64 * width as u64) {
                            let window = |row: usize| Window {
                                start: 0,
                                last_token: last_token(row),
                                draft: &draft,
                                tree: None,
                                num_adapted: 0,
                                is_closing: false,
                                sampling: sampling(row),
                                sequence_key: draw * 64 + row as u64,
                            };
                            let windows: Vec<Window<'_>> = (0..num_rows).map(window).collect();
                            gpu.launch(&[], &windows, Outputs { candidates }).unwrap();
                            let sampled = gpu.collect(&windows).unwrap().into_iter().flat_map(|given| given.tokens);
                            for (index, token) in sampled.enumerate() {
                                let before = f64::from(before[index * vocab_size + token as usize]);
                                let is_greedy = sampling(index / width as usize).is_greedy();
                                let limit = if is_greedy { 0.0 } else { TOP_P };
                                assert!(before < limit + 0.1, "{vocab_size}, {num_rows} x {width}: {before}");
                                if !is_greedy {
                                    num_late += f64::from(u8::from(before >= TOP_P / 2.0));
                                    expected += in_second_half[index];
                                }
                            }
                        }
                        assert!(
                            (num_late - expected).abs() < 0.1 * expected + 100.0,
                            "{vocab_size}, {num_rows} x {width}: {num_late} tokens from the second half, not {expected}"
                        );
                    }
                }
            }
        }
    }
}
