//! Runs forwards as CUDA graphs.
//!
//! Launching the kernels of a forward one by one can take the CPU longer than the GPU needs to run
//! them, so forwards are captured as graphs. A graph has fixed shapes and addresses, so the runner
//! owns the buffers that forwards read and write. The second forward of a shape is captured; from
//! then on a single launch copies the input from pinned memory, runs the model and copies the
//! results back.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::forward_input::{
    ForwardInput, ForwardShape, InputLayout, InputLimits, InputWriter, MAX_INTS_PER_OUTPUT, SamplingOptions,
};
use super::graphs::{self, Graph, GraphPool, PinnedInts, Stream};
use crate::{Error, Result};

/// Forwards of one model over one cache, on a stream of their own.
pub(crate) struct GraphRunner {
    // Dropped in this order: graphs before the memory that they use.
    graphs: HashMap<GraphKey, GraphState>,
    buffers: Buffers,
    stream: Stream,
    device: Device,
    limits: InputLimits,
    /// Shape of the forward whose input the buffer holds.
    shape: Option<ForwardShape>,
    /// Number of ints that the last forward gives.
    num_results: usize,
    /// Whether a forward may still read or write pinned memory.
    is_running: bool,
}

/// Everything that is fixed in a graph.
type GraphKey = (ForwardShape, SamplingOptions);

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
    host_results: PinnedInts,
    results: Tensor,
}

impl Buffers {
    fn new(num_ints: usize, num_outputs: usize, device: Device) -> Result<Self> {
        let zeros = |length: usize| Tensor::f_zeros([length as i64], (Kind::Int, device));
        let buffers = Buffers {
            pool: GraphPool::new()?,
            host_input: PinnedInts::new(num_ints)?,
            input: zeros(num_ints)?,
            host_results: PinnedInts::new(num_outputs * MAX_INTS_PER_OUTPUT)?,
            results: zeros(num_outputs * MAX_INTS_PER_OUTPUT)?,
        };
        // Forwards run on a stream of their own, so weights, the empty cache and these zeros must
        // be there before the first: zeros that arrive late would wipe out its input.
        graphs::synchronize_current_stream(device)?;
        Ok(buffers)
    }
}

impl GraphRunner {
    /// A runner for a GPU. Weights and cache must be complete on the current stream.
    ///
    /// # Errors
    /// [`Error::Internal`] for limits that the kernels do not support, else [`Error::Torch`]; here
    /// and below.
    pub(crate) fn new(gpu: usize, limits: InputLimits) -> Result<Self> {
        limits.check()?;
        let device = Device::Cuda(gpu);
        Ok(GraphRunner {
            graphs: HashMap::new(),
            buffers: Buffers::new(1, 1, device)?,
            stream: Stream::new(gpu)?,
            device,
            limits,
            shape: None,
            num_results: 0,
            is_running: false,
        })
    }

    /// Starts to write the input of a forward. If the forward before it is still running, waits for
    /// it.
    pub(crate) fn write_input(&mut self, shape: ForwardShape) -> Result<InputWriter<'_>> {
        self.wait()?;
        let num_ints = InputLayout::new(shape).len();
        self.reserve(num_ints, shape.num_outputs)?;
        self.shape = Some(shape);
        // SAFETY: no forward is running, so no copy of this memory is under way.
        let ints = unsafe { self.buffers.host_input.as_mut_slice() };
        Ok(InputWriter::new(&mut ints[..num_ints], shape, self.limits))
    }

    /// Starts the forward whose input was written. `forward` puts the model's work on the current
    /// stream; it gets the input and the int32 tensor `[outputs x ints_per_output]` for its results
    /// ([`SamplingOptions::ints_per_output`]).
    ///
    /// # Safety
    /// Whenever `forward` is called for a shape, its work is the same. All memory that it uses
    /// besides its arguments and its own allocations, such as weights and the cache, stays alive
    /// and at its address for as long as the runner lives: a graph keeps only addresses.
    pub(crate) unsafe fn launch(
        &mut self,
        sampling: SamplingOptions,
        forward: impl Fn(&ForwardInput, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let shape = self.shape.ok_or_else(|| Error::internal("a forward without input"))?;
        self.is_running = true;
        self.num_results = shape.num_outputs * sampling.ints_per_output();
        let enqueue = || self.enqueue(shape, sampling, &forward);
        let key = (shape, sampling);
        let _on_stream = self.stream.enter()?;
        match self.graphs.get(&key) {
            None => {
                enqueue()?;
                self.graphs.insert(key, GraphState::SeenOnce);
            }
            Some(GraphState::SeenOnce) => {
                let (graph, ()) = self.stream.record(&self.buffers.pool, enqueue)?;
                // SAFETY: as for the next one.
                unsafe { graph.replay()? };
                self.graphs.insert(key, GraphState::Captured(graph));
            }
            // SAFETY: the buffers are those of the capture (`reserve` drops graphs with them), they
            // hold an input of the captured shape, and the caller vouches for all else.
            Some(GraphState::Captured(graph)) => unsafe { graph.replay()? },
        }
        Ok(())
    }

    /// Waits for the forward and returns its results, `[outputs x ints_per_output]`.
    pub(crate) fn results(&mut self) -> Result<&[i32]> {
        self.wait()?;
        // SAFETY: no forward is running, so no copy of this memory is under way.
        Ok(unsafe { &self.buffers.host_results.as_mut_slice()[..self.num_results] })
    }

    /// Runs other work on the stream of the forwards, after those that have been started.
    pub(crate) fn on_stream(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _on_stream = self.stream.enter()?;
        work()
    }

    fn wait(&mut self) -> Result<()> {
        if self.is_running {
            self.stream.synchronize()?;
            self.is_running = false;
        }
        Ok(())
    }

    /// Grows the buffers if they are too small. Graphs that were captured with the old ones are
    /// dropped.
    fn reserve(&mut self, num_ints: usize, num_outputs: usize) -> Result<()> {
        let (old_ints, old_outputs) = (self.buffers.input.numel(), self.buffers.results.numel() / MAX_INTS_PER_OUTPUT);
        if num_ints > old_ints || num_outputs > old_outputs {
            self.graphs.clear();
            self.buffers = Buffers::new((2 * num_ints).max(old_ints), (2 * num_outputs).max(old_outputs), self.device)?;
        }
        Ok(())
    }

    /// Puts the work of one forward on the stream.
    fn enqueue(
        &self,
        shape: ForwardShape,
        sampling: SamplingOptions,
        forward: impl Fn(&ForwardInput, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let input = self.buffers.input.narrow(0, 0, InputLayout::new(shape).len() as i64);
        let num_results = shape.num_outputs * sampling.ints_per_output();
        let results = self.buffers.results.narrow(0, 0, num_results as i64);
        self.buffers.host_input.send(&input)?;
        // SAFETY: the copy brings what the writer wrote for this shape, and nothing else writes to
        // the buffer.
        let input = unsafe { ForwardInput::new(&input, shape, self.limits, sampling) };
        forward(&input, &results)?;
        if shape.num_outputs > 0 { self.buffers.host_results.receive(&results) } else { Ok(()) }
    }
}

impl Drop for GraphRunner {
    /// Waits for work that is still running, since it uses memory that is about to be freed. An
    /// error here was or will be reported by whoever collects the forward.
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
    }
}
