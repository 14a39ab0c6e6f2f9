//! Estimates the memory of a run on its device from shapes, at the moments when the most is in use:
//! in a training step, while prompts are answered, and while a checkpoint is written. It counts
//! tensors only, not what an allocator keeps in reserve.

mod probe;

use cllm_core::model::{Family, ModelConfig};
use cllm_core::train;
use serde::Serialize;
use tch::Kind;

use crate::data::batch::max_chunk_rows;
use crate::data::dataset::Example;
use crate::optimizer::MAX_UPDATE_ELEMENTS;
use crate::settings::{ConsistencySettings, Divergence, Objective, Settings, StateDtype};
use crate::validation::ProbeSize;

/// What the memory of a run depends on.
#[derive(Clone, Copy)]
pub struct Workload<'w> {
    pub config: &'w ModelConfig,
    /// Type of weights and activations.
    pub kind: Kind,
    pub settings: &'w Settings,
    pub examples: &'w [Example],
    /// Indices of examples.
    pub batches: &'w [Vec<usize>],
    /// The prompts that validation answers.
    pub probe: Option<ProbeSize>,
    pub world_size: usize,
}

/// Estimated bytes on the device of each process, for the largest of its batches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MemoryEstimate {
    /// The model with its adapters, and with an anchor also the frozen model, unless that is the
    /// model below the adapters.
    pub weights: u64,
    /// One number for each trained number, of the same type.
    pub gradients: u64,
    /// Moments, float32 master weights of bfloat16 weights (unless the state is bfloat16), and the
    /// moving average.
    pub optimizer: u64,
    /// What the forward saves for the backward, and the largest temporary tensors at the same time.
    pub activations: u64,
    /// Temporary tensors of the update, when the activations are already freed.
    pub update: u64,
    /// What validation adds to the first three: copies of weights, the KV cache of the prompts that
    /// are answered, and their forwards.
    pub validation: u64,
    /// What writing a checkpoint or the final model adds to the first three: copies of weights.
    pub saving: u64,
    /// The total at the moment when it is largest.
    pub peak: u64,
}

/// The sizes of a batch that determine its activations.
#[derive(Debug, Clone, Copy)]
struct BatchSize {
    num_tokens: f64,
    /// Elements of the biases of libtorch's attention.
    num_bias_elements: f64,
    /// Rows of logits in memory at a time, of the autoregressive and consistency losses.
    num_logit_rows: f64,
}

impl MemoryEstimate {
    pub fn new(workload: &Workload<'_>) -> Self {
        let Workload { config, kind, settings, examples, batches, .. } = *workload;
        let max_rows = max_chunk_rows(config) as f64;
        let activations = batches
            .iter()
            .map(|batch| BatchSize::new(config, batch, examples, &settings.consistency, max_rows))
            .map(|batch| match kind {
                Kind::BFloat16 if train::has_kernels(config) => cuda_activations(config, settings, batch),
                _ => eager_activations(config, kind.elt_size_in_bytes() as f64, settings, batch),
            })
            .fold(0.0, f64::max);
        let StaticBytes { weights, gradients, optimizer, update } = StaticBytes::new(workload);
        let (validation, saving) = (probe::validation_bytes(workload), probe::saving_bytes(workload));
        let temporary = [activations, update, validation, saving].into_iter().fold(0.0, f64::max);
        MemoryEstimate {
            weights: weights as u64,
            gradients: gradients as u64,
            optimizer: optimizer as u64,
            activations: activations as u64,
            update: update as u64,
            validation: validation as u64,
            saving: saving as u64,
            peak: (weights + gradients + optimizer + temporary) as u64,
        }
    }
}

impl MemoryEstimate {
    /// The peak of training steps alone.
    pub fn of_steps(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations.max(self.update)
    }
}

/// Whether master weights are held beside weights of type `kind`. Otherwise the weights are updated
/// themselves.
pub fn masters_are_copies(settings: &Settings, kind: Kind) -> bool {
    kind != Kind::Float && settings.optimizer.state_dtype == StateDtype::Float32
}

/// Bytes that do not depend on the batches.
struct StaticBytes {
    weights: f64,
    gradients: f64,
    optimizer: f64,
    /// Temporary tensors of the update, when the activations are already freed.
    update: f64,
}

impl StaticBytes {
    fn new(workload: &Workload<'_>) -> Self {
        let Workload { config, kind, settings, world_size, .. } = *workload;
        let element = kind.elt_size_in_bytes() as f64;
        let (parameters, trained) = (config.num_parameters() as f64, settings.trained_parameters(config) as f64);
        let shard = trained / world_size as f64;
        let is_bf16_state = settings.optimizer.state_dtype == StateDtype::Bfloat16;
        let state = match kind {
            _ if is_bf16_state => 4.0,
            Kind::Float => 8.0,
            _ => 12.0,
        };
        let average = if settings.optimizer.ema_decay.is_some() { 4.0 } else { 0.0 };
        // The update makes float32 copies of some gradients; with a bfloat16 state, of everything
        // it works on.
        let num_copies = if is_bf16_state { 8.0 } else { 1.0 };
        let copies = if kind == Kind::Float { 0.0 } else { num_copies * 4.0 * shard.min(MAX_UPDATE_ELEMENTS as f64) };
        // The sum over the gradients of all processes.
        let reduced = if world_size > 1 { element * shard } else { 0.0 };
        let own = if settings.lora.is_some() { parameters + trained } else { parameters };
        // Below adapters is the initial model. It is also the anchor, unless the settings name
        // another.
        let has_second_model =
            settings.is_anchored() && (settings.lora.is_none() || settings.consistency.anchor.is_some());
        StaticBytes {
            weights: element * (own + if has_second_model { parameters } else { 0.0 }),
            gradients: element * trained,
            optimizer: (state + average) * shard,
            update: copies + reduced,
        }
    }
}

impl BatchSize {
    fn new(
        config: &ModelConfig,
        batch: &[usize],
        examples: &[Example],
        consistency: &ConsistencySettings,
        max_rows: f64,
    ) -> Self {
        let sum =
            |size: &dyn Fn(&Example) -> usize| batch.iter().map(|&index| size(&examples[index])).sum::<usize>() as f64;
        let num_rows = sum(&|example| example.response_ids.len() + example.max_noisy_tokens(consistency))
            + consistency.anchor_prompt_fraction * sum(&|example| example.prompt_ids.len());
        BatchSize {
            num_tokens: sum(&|example| example.max_packed_tokens(consistency)),
            num_bias_elements: sum(&|example| {
                train::max_bias_elements(config, example.num_clean_tokens(), example.max_packed_tokens(consistency))
            }),
            num_logit_rows: num_rows.min(max_rows),
        }
    }
}

/// Widths of a layer's activations, in elements per token.
pub struct LayerWidths {
    pub hidden: f64,
    pub queries: f64,
    pub qkv: f64,
    heads: f64,
    pub ffn: f64,
}

impl LayerWidths {
    pub fn new(config: &ModelConfig) -> Self {
        let width = |size: i64| size as f64;
        LayerWidths {
            hidden: width(config.hidden_size),
            queries: width(config.num_heads * config.head_dim),
            qkv: width((config.num_heads + 2 * config.num_kv_heads) * config.head_dim),
            heads: width(config.num_heads),
            ffn: width(config.intermediate_size),
        }
    }
}

/// Bytes per token that all layers save, if a layer saves `saved` and a checkpointed one `input`.
/// One checkpointed layer at a time is recomputed in full.
fn saved_by_layers(config: &ModelConfig, settings: &Settings, saved: f64, input: f64) -> f64 {
    let num_layers = config.num_layers as f64;
    let num_checkpointed = num_layers.min(settings.checkpointed_layers as f64);
    let recomputed = if num_checkpointed > 0.0 { saved } else { 0.0 };
    (num_layers - num_checkpointed) * saved + num_checkpointed * input + recomputed
}

/// Activations of our CUDA kernels, in bfloat16. For each token a layer saves the inputs and
/// outputs of two norms, queries, keys and values, the attention output with a float32 logsumexp
/// per head, gate and up. The temporary tensors are, one after another: the output of the first
/// half of the feed-forward layer; the last hidden states, their gradient and the logits of a
/// chunk; two gradients of a layer.
fn cuda_activations(config: &ModelConfig, settings: &Settings, batch: BatchSize) -> f64 {
    let LayerWidths { hidden, queries, qkv, heads, ffn } = LayerWidths::new(config);
    let saved = 8.0 * hidden + 2.0 * (qkv + queries) + 4.0 * heads + 4.0 * ffn;
    let by_layers = saved_by_layers(config, settings, saved, 2.0 * hidden);
    let losses = batch.num_logit_rows * (2.0 * config.vocab_size as f64 + 4.0 * hidden);
    let layer = batch.num_tokens * 2.0 * ffn.max(qkv + queries);
    let num_logits = if settings.is_anchored() || settings.consistency.local_weight > 0.0 { 2.0 } else { 1.0 };
    batch.num_tokens * (by_layers + 6.0 * hidden) + (num_logits * losses).max(layer)
}

/// Activations of libtorch's operations, with b bytes per element. For each token a layer saves
/// - for each of two norms, the input in float32, the normalized input and the output: 4 + 2b over
///   the hidden size;
/// - queries, keys and values (expanded to all query heads) and the attention output, per sequence
///   and joined: 5b over all heads, and a float32 logsumexp per head;
/// - with norms of queries and keys, their input in float32 and the normalized input;
/// - gate, its activation, up and their product: 4b over the feed-forward width;
/// - the low-rank output of each adapter: b over the rank.
///
/// In addition there are the last norm, and the biases of the attention of noisy tokens and of sliding
/// windows.
fn eager_activations(config: &ModelConfig, element: f64, settings: &Settings, batch: BatchSize) -> f64 {
    let LayerWidths { hidden, queries, qkv, heads, ffn } = LayerWidths::new(config);
    let norm = (4.0 + 2.0 * element) * hidden;
    let head_norms = match config.family {
        Family::Qwen3 => (4.0 + element) * (queries + (qkv - queries) / 2.0),
        Family::Llama | Family::Mistral | Family::Qwen2 => 0.0,
    };
    let adapters = settings.lora.as_ref().map_or(0.0, |lora| lora.rank as f64 * lora.targets.len() as f64);
    let saved =
        element * adapters + 2.0 * norm + 5.0 * element * queries + 4.0 * heads + head_norms + 4.0 * element * ffn;
    let by_layers = saved_by_layers(config, settings, saved, element * hidden);
    batch.num_tokens * (by_layers + norm)
        + element * batch.num_bias_elements
        + eager_losses(config, settings, batch.num_logit_rows)
}

/// Float32 copies `[rows, vocab]` in memory at a time: the logits, their log-probabilities, and the
/// temporary tensors of a divergence and of its backward.
fn eager_losses(config: &ModelConfig, settings: &Settings, num_rows: f64) -> f64 {
    let copies = match (settings.objective, settings.consistency.divergence) {
        (Objective::Sft, _) => 4.0,
        (Objective::Consistency, Divergence::Forward) => 5.0,
        (Objective::Consistency, Divergence::Reverse) => 6.0,
        (Objective::Consistency, Divergence::Jsd) => 9.0,
    };
    let anchor = if settings.is_anchored() { 3.0 } else { 0.0 };
    (copies + anchor) * num_rows * 4.0 * config.vocab_size as f64
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use cllm_core::cuda::libtorch::with_peak_cpu_memory;
    use cllm_core::distributed::ProcessGroup;
    use cllm_core::model::LoraConfig;
    use serde_json::{Value, json};
    use tch::Device;

    use super::*;
    use crate::data::dataset::Block;
    use crate::data::loader::{BatchLoader, RankShard};
    use crate::models::Models;
    use crate::optimizer::OptimizerState;
    use crate::step::train_step;

    fn config(more: Value) -> ModelConfig {
        let mut json = json!({
            "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
            "max_position_embeddings": 2048,
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ModelConfig::from_json(&json).unwrap()
    }

    fn examples() -> Vec<Example> {
        let example = |index: usize| Example {
            id: index.to_string(),
            prompt_ids: vec![1; 40],
            response_ids: vec![2; 160],
            blocks: (0..10)
                .map(|block| Block { start: 16 * block, states: vec![vec![3; 16], vec![2; 16]], augmented: Vec::new() })
                .collect(),
            labelled: vec![true; 160],
        };
        (0..4).map(example).collect()
    }

    /// The estimate of training steps over the bytes that libtorch allocated in one of them.
    fn planned_over_measured(config: &ModelConfig, settings: &Settings) -> f64 {
        tch::set_num_threads(1);
        let examples = examples();
        let batches = vec![(0..examples.len()).collect::<Vec<_>>()];
        let planned = MemoryEstimate::new(&Workload {
            config,
            kind: Kind::Float,
            settings,
            examples: &examples,
            batches: &batches,
            probe: None,
            world_size: 1,
        });
        let ((), measured) = with_peak_cpu_memory(|| {
            let models = Models::random(config.clone(), settings, Device::Cpu).unwrap();
            let group = Rc::new(ProcessGroup::single());
            let mut optimizer = OptimizerState::new(&models.student, &settings.optimizer, 0, group).unwrap();
            let loader = BatchLoader::new(settings, &examples, config);
            for number in 1..=1 {
                let step = loader.step_batches(&batches, 0, RankShard::all());
                let _ = train_step(&models, &mut optimizer, settings, &step, number, 0.0).unwrap();
            }
        })
        .unwrap();
        planned.of_steps() as f64 / measured as f64
    }

    #[test]
    fn steps_need_what_is_planned() {
        let settings = Settings { max_batch_tokens: 2048, ..Settings::default() };
        let all_checkpointed = Settings { checkpointed_layers: 4, ..settings.clone() };
        let adapters = Settings { lora: Some(LoraConfig::default()), ..settings.clone() };
        let mut average = settings.clone();
        average.optimizer.ema_decay = Some(0.9);
        let mut anchored = settings.clone();
        anchored.consistency.anchor_weight = 0.5;
        let sft = Settings { objective: Objective::Sft, ..settings.clone() };
        for (name, more, settings) in [
            ("llama", json!({}), &settings),
            ("llama, checkpointed", json!({}), &all_checkpointed),
            ("llama, adapters", json!({}), &adapters),
            ("llama, average", json!({}), &average),
            ("llama, anchored", json!({}), &anchored),
            ("llama, sft", json!({}), &sft),
            ("qwen2", json!({"model_type": "qwen2"}), &settings),
            ("qwen3", json!({"model_type": "qwen3", "head_dim": 64}), &settings),
            ("mistral, wide vocabulary", json!({"model_type": "mistral", "vocab_size": 10000}), &settings),
        ] {
            let ratio = planned_over_measured(&config(more), settings);
            eprintln!("{name}: planned {ratio:.3} of measured");
        }
    }
}
