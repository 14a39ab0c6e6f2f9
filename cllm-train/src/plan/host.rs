//! The memory of the host that a run needs.

use cllm_core::checkpoint::STREAMING_BYTES;
use serde::Serialize;

use crate::checkpoint::host_bytes_of_save;
use crate::data::dataset::Example;
use crate::memory::MemoryEstimate;
use crate::plan::device::PlannedDevice;
use crate::plan::disk::DiskEstimate;

/// What a process needs beside its data and tensors: the program, libtorch, threads.
const CPU_PROGRAM_BYTES: u64 = 410_000_000;
/// The same with CUDA's libraries, a tenth of which is read only when the program ends.
const CUDA_PROGRAM_BYTES: u64 = 1_320_000_000;
/// When a process ends, unloading libtorch reads so much of its libraries that was not in memory.
const UNLOADING_BYTES: u64 = 105_000_000;
/// Of the CPU's activations, which come and go, the allocator holds so much more, in gaps that are
/// too small for the next tensor.
const GAPS_PER_ACTIVATION: f64 = 0.35;

/// Estimated bytes of all processes on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HostEstimate {
    /// The programs and libraries.
    pub program: u64,
    /// The data.
    pub examples: u64,
    /// Weights, gradients, optimizer and activations, if the device is the CPU.
    pub tensors: u64,
    /// What the CPU's tensors need beyond their size: gaps between them, or, where those are small,
    /// what of the libraries is read when the processes end.
    pub overhead: u64,
    /// Pieces of files that are read or written, or, where there is plenty of memory, a checkpoint
    /// that waits to be written while training goes on.
    pub streaming: u64,
    /// All of it.
    pub peak: u64,
}

impl HostEstimate {
    /// `has_checkpoints` is whether any is saved between two steps.
    pub fn new(
        examples: &[Example],
        memory: &MemoryEstimate,
        disk: &DiskEstimate,
        device: &PlannedDevice,
        has_checkpoints: bool,
    ) -> Self {
        let num_processes = device.local_world_size as u64;
        let of_each = |bytes: u64| num_processes * bytes;
        let examples = of_each(examples.iter().map(Example::num_bytes).sum());
        let pieces = (STREAMING_BYTES as u64).min(disk.final_model);
        let of_save = if has_checkpoints { host_bytes_of_save(disk.checkpoint) } else { 0 };
        let (program, tensors, overhead, pieces) = if device.is_cpu() {
            let gaps = GAPS_PER_ACTIVATION * memory.activations as f64;
            // Files are read before the first step and written after the last, when the memory of
            // the activations is free.
            let pieces = pieces.saturating_sub(memory.activations);
            (CPU_PROGRAM_BYTES, memory.peak, UNLOADING_BYTES.max(gaps as u64), pieces)
        } else {
            (CUDA_PROGRAM_BYTES, 0, 0, pieces)
        };
        let [program, tensors, overhead, pieces] = [program, tensors, overhead, pieces].map(of_each);
        let streaming = of_save.max(pieces);
        let peak = program + examples + tensors + overhead + streaming;
        HostEstimate { program, examples, tensors, overhead, streaming, peak }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Peaks of `cllm-train run` without checkpoints on the CPU, of models with 0.14 to 219 million
    /// weights, as the system counted them.
    #[test]
    fn runs_on_the_cpu_needed_what_is_planned() {
        // Millions of weights, megabytes of activations and of the process.
        for (weights, activations, measured) in [
            (0.140, 27.6, 553.0),
            (0.234, 46.6, 571.0),
            (0.234, 239.9, 726.0),
            (4.328, 515.1, 1141.0),
            (4.328, 1028.8, 1906.0),
            (27.534, 678.1, 1814.0),
            (109.594, 1355.8, 4044.0),
            (218.662, 2625.2, 7575.0),
        ] {
            let bytes = |megabytes: f64| (1e6 * megabytes) as u64;
            let memory = MemoryEstimate {
                weights: bytes(4.0 * weights),
                gradients: bytes(4.0 * weights),
                optimizer: bytes(8.0 * weights),
                activations: bytes(activations),
                update: 0,
                validation: 0,
                saving: 0,
                peak: bytes(16.0 * weights + activations),
            };
            let disk = DiskEstimate {
                checkpoint: bytes(12.0 * weights),
                final_model: bytes(4.0 * weights),
                peak: bytes(4.0 * weights),
                needed: bytes(4.0 * weights),
                needed_if_interrupted: bytes(12.0 * weights),
            };
            let planned = HostEstimate::new(&[], &memory, &disk, &PlannedDevice::present(Device::Cpu), false).peak;
            let ratio = planned as f64 / 1e6 / measured;
            assert!((0.95..1.05).contains(&ratio), "{weights} million weights: planned {ratio:.3} of {measured} MB");
        }
    }
}
