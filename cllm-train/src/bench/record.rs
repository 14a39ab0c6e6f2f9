//! What `bench` measures of a model.

use cllm_core::bench_results::BenchRecord;
use cllm_core::progress::count;
use serde::{Deserialize, Serialize};

use super::host::HostUsage;
use super::settings::BenchSettings;
use crate::byte_size::format_bytes;
use crate::settings::Settings;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelKind {
    /// Every weight.
    Full,
    /// Low-rank adapters beside frozen weights.
    Lora,
}

impl ModelKind {
    pub(super) fn of(training: &Settings) -> Self {
        if training.lora.is_some() { ModelKind::Lora } else { ModelKind::Full }
    }
}

/// Measurements of one model; docs/data-format.md describes the fields.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainBenchRecord {
    pub(super) name: String,
    pub(super) kind: ModelKind,
    pub(super) parameters: i64,
    /// Each with a GPU of its own.
    pub(super) num_processes: usize,
    pub(super) num_steps: usize,
    /// Median over the timed steps, including the optimizer and waiting for batches.
    pub(super) step_seconds: f64,
    /// Packed tokens, divided by the seconds of all timed steps.
    pub(super) tokens_per_second: f64,
    /// Noisy blocks, divided by the same seconds.
    pub(super) blocks_per_second: f64,
    pub(super) examples_per_second: f64,
    /// Mean number of tokens in a forward.
    pub(super) mean_batch_tokens: f64,
    /// Model FLOPs over the seconds and `peak_flops`: 6 x trained and 4 x frozen parameters x tokens,
    /// plus 12 x layers x width of all heads for each pair of tokens that attention does not mask.
    /// Recomputation does not count. `None` on devices whose peak is not known, and with adapters that
    /// act on draft tokens alone or leave out layers.
    pub(super) mfu: Option<f64>,
    /// The same, if attention counts every pair of tokens in a sequence of `max_example_tokens`.
    pub(super) mfu_dense_attention: Option<f64>,
    /// Peak of all GPUs together, in operations per second.
    pub(super) peak_flops: Option<f64>,
    /// Of the tensors of the main process.
    pub(super) peak_memory_bytes: Option<u64>,
    /// The peak of what libtorch took from that GPU, in use or not.
    #[serde(default)]
    pub(super) peak_reserved_bytes: Option<u64>,
    /// The peak that `plan` estimates for training steps.
    pub(super) planned_memory_bytes: u64,
    #[serde(flatten)]
    pub(super) host: HostUsage,
    /// Seconds that the training thread waited for batches, in all timed steps.
    pub(super) batch_wait_seconds: f64,
    /// Blocks per second of the paper's training step with `transformers`, from the baseline's
    /// file.
    pub(super) transformers_blocks_per_second: Option<f64>,
    pub(super) settings: BenchSettings,
}

impl BenchRecord for TrainBenchRecord {
    fn name(&self) -> &str {
        &self.name
    }
}

impl TrainBenchRecord {
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "{}: {:.1} M parameters, {} of {:.3} s (median), {:.0} tokens in a batch\n\
             {:.0} packed tokens/s, {:.0} blocks/s, {:.1} examples/s; waited {:.2} s for batches\n",
            self.name,
            self.parameters as f64 / 1e6,
            count(self.num_steps, "step"),
            self.step_seconds,
            self.mean_batch_tokens,
            self.tokens_per_second,
            self.blocks_per_second,
            self.examples_per_second,
            self.batch_wait_seconds,
        );
        if let (Some(mfu), Some(dense)) = (self.mfu, self.mfu_dense_attention) {
            let (mfu, dense) = (100.0 * mfu, 100.0 * dense);
            text += &format!("{mfu:.1} % of the device's bf16 peak ({dense:.1} % counting masked attention too)\n");
        }
        let planned = format_bytes(self.planned_memory_bytes);
        text += &match self.peak_memory_bytes {
            Some(peak) => format!("memory {} at the peak, {planned} planned", format_bytes(peak)),
            None => format!("memory {planned} planned"),
        };
        text + &self.host.text()
    }
}
