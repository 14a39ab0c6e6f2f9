//! The memory of the host that a run needs.

use cllm_core::checkpoint::STREAMING_BYTES;
use serde::Serialize;

use crate::checkpoint::host_bytes_of_save;
use crate::data::dataset::Example;
use crate::memory::MemoryEstimate;
use crate::plan::device::PlannedDevice;

/// What a process needs before it reads anything: the program and libtorch.
const CPU_PROGRAM_BYTES: u64 = 300_000_000;
/// The same with CUDA's libraries, a tenth of which is read only when the program ends.
const CUDA_PROGRAM_BYTES: u64 = 1_320_000_000;

/// Estimated bytes of all processes on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HostEstimate {
    /// The programs and libraries.
    pub program: u64,
    /// The data.
    pub examples: u64,
    /// Weights, gradients, optimizer and activations, if the device is the CPU.
    pub tensors: u64,
    /// Pieces of files that are read or written, or, where there is plenty of memory, a checkpoint
    /// that waits to be written while training goes on.
    pub streaming: u64,
    /// All of it.
    pub peak: u64,
}

impl HostEstimate {
    /// `checkpoint_bytes` are those of a checkpoint that is saved between two steps; `None` without
    /// any.
    pub fn new(
        examples: &[Example],
        memory: &MemoryEstimate,
        device: &PlannedDevice,
        checkpoint_bytes: Option<u64>,
    ) -> Self {
        let num_processes = device.local_world_size as u64;
        let of_each = |bytes: u64| num_processes * bytes;
        let is_cpu = device.is_cpu();
        let program = of_each(if is_cpu { CPU_PROGRAM_BYTES } else { CUDA_PROGRAM_BYTES });
        let tensors = if is_cpu { of_each(memory.peak) } else { 0 };
        let examples = of_each(examples.iter().map(Example::num_bytes).sum());
        let streaming = checkpoint_bytes.map_or(0, host_bytes_of_save).max(of_each(STREAMING_BYTES as u64));
        HostEstimate { program, examples, tensors, streaming, peak: program + examples + tensors + streaming }
    }
}
