//! Durations and counts of the timed steps, and what they say about the use of the device.

use cllm_core::Result;
use cllm_core::distributed::ProcessGroup;
use cllm_core::environment::Hardware;
use cllm_core::model::{AdaptedTokens, ModelConfig};
use cllm_core::statistics::median;
use tch::{Device, Tensor};

use crate::data::loader::StepBatches;
use crate::settings::Settings;

/// Totals over the timed steps, and the seconds of each.
#[derive(Default)]
pub(super) struct Timings {
    step_seconds: Vec<f64>,
    pub(super) wait_seconds: f64,
    pub(super) num_batches: usize,
    pub(super) num_tokens: usize,
    pub(super) num_blocks: usize,
    pub(super) num_examples: usize,
    /// Pairs of tokens that attention does not mask, summed over the layers.
    num_attended_pairs: usize,
}

impl Timings {
    pub(super) fn add(&mut self, step: &StepBatches, config: &ModelConfig, seconds: f64, wait_seconds: f64) {
        self.step_seconds.push(seconds);
        self.wait_seconds += wait_seconds;
        self.num_tokens += step.counts.num_tokens;
        self.num_blocks += step.counts.num_blocks;
        for batch in &step.batches {
            self.num_batches += 1;
            self.num_examples += batch.packed.sequence_ends.len();
            self.num_attended_pairs += batch.packed.num_attended_pairs(config);
        }
    }

    /// Sums the counts that each process knows only for its own batches.
    pub(super) fn sum_over_processes(&mut self, group: &ProcessGroup, device: Device) -> Result<()> {
        let counts = [&mut self.num_batches, &mut self.num_examples, &mut self.num_attended_pairs];
        let sums = Tensor::from_slice(&counts.each_ref().map(|count| **count as i64)).to_device(device);
        group.all_reduce(&sums)?;
        for (index, count) in counts.into_iter().enumerate() {
            *count = sums.int64_value(&[index as i64]) as usize;
        }
        Ok(())
    }

    fn seconds(&self) -> f64 {
        self.step_seconds.iter().sum()
    }

    pub(super) fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.seconds()
    }

    pub(super) fn median_step_seconds(&self) -> f64 {
        median(self.step_seconds.iter().copied()).expect("num_steps is at least 1")
    }
}

/// Floating-point operations per second, compared with the peak of the GPUs.
pub(super) struct Throughput {
    pub(super) mfu: Option<f64>,
    pub(super) mfu_dense_attention: Option<f64>,
    pub(super) peak_flops: Option<f64>,
}

impl Throughput {
    pub(super) fn new(
        timings: &Timings,
        config: &ModelConfig,
        training: &Settings,
        device: Device,
        world_size: usize,
    ) -> Self {
        let gpu = Hardware::detect(device).gpu_model();
        let peak_flops = gpu.map(|gpu| gpu.bf16_flops * world_size as f64);
        let flops_per_pair = (12 * config.num_heads * config.head_dim) as f64;
        let num_trained = training.trained_parameters(config);
        let num_frozen = if training.lora.is_some() { config.num_parameters() } else { 0 };
        let matmul_flops = (6 * num_trained + 4 * num_frozen) as f64 * timings.num_tokens as f64;
        // Otherwise the backward is that of some tokens or layers alone.
        let is_whole = training.lora.as_ref().is_none_or(|lora| lora.on == AdaptedTokens::All && lora.first_layer == 0);
        let mfu = |num_pairs: usize| {
            peak_flops
                .filter(|_| is_whole)
                .map(|peak| (matmul_flops + flops_per_pair * num_pairs as f64) / timings.seconds() / peak)
        };
        Throughput {
            mfu: mfu(timings.num_attended_pairs),
            mfu_dense_attention: mfu(timings.num_tokens * training.max_example_tokens * config.num_layers as usize),
            peak_flops,
        }
    }
}
