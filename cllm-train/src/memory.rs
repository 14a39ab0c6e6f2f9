//! Estimates the memory of a run on its device from shapes, at the moments when the most is in use:
//! in a training step, while prompts are answered, and while a checkpoint is written. It counts
//! tensors only, not what an allocator keeps in reserve or the padding of parameter buffers (a few
//! megabytes).

mod activations;
mod probe;
mod widths;

use cllm_core::model::{BaseDtype, ModelConfig};
use serde::Serialize;
use tch::Kind;

use crate::data::batch::max_chunk_rows;
use crate::data::dataset::Example;
use crate::optimizer::MAX_AVERAGED_ELEMENTS;
use crate::settings::{Settings, StateDtype};
use crate::validation::ProbeSize;
use activations::{BatchSize, cuda_activations, eager_activations};
pub use widths::{LayerWidths, TrainedProduct, trained_products};

/// What the memory of a run depends on.
#[derive(Clone, Copy)]
pub struct Workload<'w> {
    pub config: &'w ModelConfig,
    /// Type of weights and activations.
    pub kind: Kind,
    /// Whether libtorch's operations train the model, and not our kernels.
    pub is_eager: bool,
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
    /// The model with its adapters (float32, with a copy in the model's type), and with an anchor
    /// also the frozen model, unless that is the model below the adapters.
    pub weights: u64,
    /// One number for each trained number, of the same type.
    pub gradients: u64,
    /// Moments, float32 master weights of trained bfloat16 weights (unless the state is bfloat16),
    /// and the moving average.
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

impl MemoryEstimate {
    pub fn new(workload: &Workload<'_>) -> Self {
        let Workload { config, kind, settings, examples, batches, .. } = *workload;
        let max_rows = max_chunk_rows(config, !workload.is_eager) as f64;
        let activations = batches
            .iter()
            .map(|batch| BatchSize::new(config, settings, batch, examples, max_rows))
            .map(|batch| match workload.is_eager {
                false => cuda_activations(config, settings, batch),
                true => eager_activations(config, kind.elt_size_in_bytes() as f64, settings, batch),
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
    pub fn training_peak(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations.max(self.update)
    }
}

/// Type of what is trained on a model of type `kind`: adapters are float32.
pub fn trained_kind(settings: &Settings, kind: Kind) -> Kind {
    if settings.lora.is_some() { Kind::Float } else { kind }
}

/// Type of the weights below adapters.
fn base_dtype(settings: &Settings) -> BaseDtype {
    settings.lora.as_ref().map_or(BaseDtype::Model, |lora| lora.base_dtype)
}

/// Whether master weights are held beside weights of type `kind`. Otherwise the weights are updated
/// themselves.
pub fn masters_are_copies(settings: &Settings, kind: Kind) -> bool {
    trained_kind(settings, kind) != Kind::Float && settings.optimizer.state_dtype == StateDtype::Float32
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
        let trained_element = trained_kind(settings, kind).elt_size_in_bytes() as f64;
        let shard = trained / world_size as f64;
        let is_bf16_state = settings.optimizer.state_dtype == StateDtype::Bfloat16;
        // Two moments, and the master weights.
        let num_states = if masters_are_copies(settings, kind) { 3 } else { 2 };
        let state = (num_states * settings.optimizer.state_dtype.num_bytes()) as f64;
        let average = if settings.optimizer.ema_decay.is_some() { 4.0 } else { 0.0 };
        // The average is updated from float32 copies of some weights.
        let is_copied = is_bf16_state && settings.optimizer.ema_decay.is_some();
        let copies = if is_copied { 4.0 * shard.min(MAX_AVERAGED_ELEMENTS as f64) } else { 0.0 };
        // The sum over the gradients of all processes.
        let is_sharded = settings.shards_gradients(world_size);
        let reduced = if world_size > 1 && !is_sharded { trained_element * shard } else { 0.0 };
        let adapters = match (settings.lora.is_some(), kind) {
            (false, _) => 0.0,
            (true, Kind::Float) => trained_element * trained,
            (true, _) => (trained_element + element) * trained,
        };
        let own = base_dtype(settings).weight_bytes(config, kind) as f64;
        let second = if settings.has_second_model() { element * parameters } else { 0.0 };
        StaticBytes {
            weights: own + second + adapters,
            gradients: trained_element * if is_sharded { shard + unsharded_gradients(config) } else { trained },
            optimizer: (state + average) * shard,
            update: copies + reduced,
        }
    }
}

/// The most gradients that exist as a whole at a time where they are sharded: those of the layer that
/// the backward is at and of the part before it, which are being summed. Tied embeddings have theirs
/// from the losses to the end of the backward; otherwise, a part may be an embedding or the output
/// projection.
fn unsharded_gradients(config: &ModelConfig) -> f64 {
    let embedding = config.vocab_size * config.hidden_size;
    let num_embeddings = if config.tied_embeddings { 1 } else { 2 };
    let layer = (config.num_parameters() - num_embeddings * embedding) / config.num_layers;
    let others = if config.tied_embeddings { embedding + layer } else { embedding.max(layer) };
    (layer + others) as f64
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use cllm_core::cuda::libtorch::with_peak_cpu_memory;
    use cllm_core::device::default_kind;
    use cllm_core::distributed::ProcessGroup;
    use cllm_core::model::{AdaptedTokens, LoraConfig, LoraTarget, ModelShape, ParamBuffer};
    use serde_json::{Value, json};
    use tch::Device;

    use super::*;
    use crate::data::dataset::Block;
    use crate::data::division::RankShard;
    use crate::data::loader::BatchLoader;
    use crate::models::Models;
    use crate::optimizer::OptimizerState;
    use crate::settings::{Divergence, Objective};
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

    fn examples(count: usize) -> Vec<Example> {
        let example = |index: usize| Example {
            id: index.to_string(),
            prompt_ids: vec![1; 40],
            response_ids: vec![2; 160],
            blocks: (0..10)
                .map(|block| Block { start: 16 * block, states: vec![vec![3; 16], vec![2; 16]], augmented: Vec::new() })
                .collect(),
            labelled: vec![true; 160],
        };
        (0..count).map(example).collect()
    }

    /// The estimate for training steps on a batch of all examples.
    fn planned(config: &ModelConfig, settings: &Settings, examples: &[Example], device: Device) -> MemoryEstimate {
        MemoryEstimate::new(&Workload {
            config,
            kind: default_kind(device),
            is_eager: !device.is_cuda(),
            settings,
            examples,
            batches: &[(0..examples.len()).collect()],
            probe: None,
            world_size: 1,
        })
    }

    /// Takes some of these steps.
    fn train(config: &ModelConfig, settings: &Settings, examples: &[Example], device: Device, num_steps: usize) {
        let models = Models::random(config.clone(), settings, device).unwrap();
        let mut optimizer = OptimizerState::new(&models.student, settings, Rc::new(ProcessGroup::single())).unwrap();
        let loader = BatchLoader::new(settings, examples, &models.student).unwrap();
        for number in 1..=num_steps {
            let step = loader.step_batches(&[(0..examples.len()).collect()], 0, RankShard::all());
            let _ = train_step(&models, &mut optimizer, settings, &step, number, 0.0).unwrap();
        }
    }

    /// The same with adapters for drafts alone.
    fn on_drafts(settings: &Settings) -> Settings {
        let lora = LoraConfig { on: AdaptedTokens::Drafts, ..LoraConfig::default() };
        let mut settings = Settings { lora: Some(lora), ..settings.clone() };
        settings.consistency.ar_weight = 0.0;
        settings
    }

    /// The estimate of training steps over the bytes that libtorch allocated in one of them.
    fn planned_over_measured(config: &ModelConfig, settings: &Settings) -> f64 {
        tch::set_num_threads(1);
        let examples = examples(4);
        let planned = planned(config, settings, &examples, Device::Cpu);
        let ((), measured) = with_peak_cpu_memory(|| train(config, settings, &examples, Device::Cpu, 1)).unwrap();
        (planned.training_peak() as i64 + padding_bytes(config, settings)) as f64 / measured as f64
    }

    /// Elements that only align buffers weigh in a tiny model: those of weights, gradients, moments
    /// and the average.
    fn padding_bytes(config: &ModelConfig, settings: &Settings) -> i64 {
        let padding = |num_elements: i64| 4 * (ParamBuffer::padded_len(num_elements) - num_elements);
        let num_states = if settings.optimizer.ema_decay.is_some() { 4 } else { 3 };
        let (all, trained) = (padding(config.num_parameters()), padding(settings.trained_parameters(config)));
        // Adapters and the anchor are a second buffer of weights.
        let second = if settings.lora.is_some() {
            trained
        } else if settings.is_anchored() {
            all
        } else {
            0
        };
        all + second + num_states * trained
    }

    #[test]
    fn steps_need_what_is_planned() {
        let settings = Settings { max_batch_tokens: 2048, ..Settings::plain() };
        let all_checkpointed = Settings { checkpointed_layers: 4, ..settings.clone() };
        let adapters = Settings { lora: Some(LoraConfig::default()), ..settings.clone() };
        let on_drafts = on_drafts(&settings);
        let mut on_drafts_from_third_layer = on_drafts.clone();
        on_drafts_from_third_layer.lora.as_mut().unwrap().first_layer = 2;
        let on_drafts_checkpointed = Settings { checkpointed_layers: 4, ..on_drafts.clone() };
        let mut on_drafts_without_down = on_drafts.clone();
        on_drafts_without_down.lora.as_mut().unwrap().targets.remove(&LoraTarget::DownProj);
        let mut from_third_layer = adapters.clone();
        from_third_layer.lora.as_mut().unwrap().first_layer = 2;
        let from_third_checkpointed = Settings { checkpointed_layers: 3, ..from_third_layer.clone() };
        let mut quantized = adapters.clone();
        quantized.lora.as_mut().unwrap().base_dtype = BaseDtype::Int8;
        let quantized_checkpointed = Settings { checkpointed_layers: 4, ..quantized.clone() };
        let mut average = settings.clone();
        average.optimizer.ema_decay = Some(0.9);
        let mut anchored = settings.clone();
        anchored.consistency.anchor_weight = 0.5;
        let mut reverse = settings.clone();
        reverse.consistency.divergence = Divergence::Reverse;
        let mut jsd = settings.clone();
        jsd.consistency.divergence = Divergence::Jsd;
        let mut nla = settings.clone();
        nla.consistency.divergence = Divergence::Nla;
        nla.consistency.after_miss_weight = 0.25;
        let mut lk_hybrid = settings.clone();
        lk_hybrid.consistency.divergence = Divergence::LkHybrid;
        let half = Settings { checkpointed_layers: 2, ..settings.clone() };
        let sft = Settings { objective: Objective::Sft, ..settings.clone() };
        for (name, more, settings) in [
            ("llama", json!({}), &settings),
            ("llama, checkpointed", json!({}), &all_checkpointed),
            ("llama, adapters", json!({}), &adapters),
            ("llama, adapters of the last layers", json!({}), &from_third_layer),
            ("llama, adapters of the last layers, one checkpointed", json!({}), &from_third_checkpointed),
            ("wide, adapters on int8", json!({"hidden_size": 256, "intermediate_size": 704}), &quantized),
            (
                "wide, adapters on int8, checkpointed",
                json!({"hidden_size": 256, "intermediate_size": 704}),
                &quantized_checkpointed,
            ),
            ("llama, average", json!({}), &average),
            ("llama, anchored", json!({}), &anchored),
            ("llama, sft", json!({}), &sft),
            ("llama, half checkpointed", json!({}), &half),
            ("wide vocabulary, reverse", json!({"vocab_size": 10000}), &reverse),
            ("wide vocabulary, jsd", json!({"vocab_size": 10000}), &jsd),
            ("wide vocabulary, nla", json!({"vocab_size": 10000}), &nla),
            ("wide vocabulary, lk_hybrid", json!({"vocab_size": 10000}), &lk_hybrid),
            ("wide vocabulary, anchored", json!({"vocab_size": 10000}), &anchored),
            ("wide vocabulary, sft", json!({"vocab_size": 10000}), &sft),
            ("small vocabulary", json!({"vocab_size": 100}), &settings),
            ("small vocabulary, checkpointed", json!({"vocab_size": 100}), &all_checkpointed),
            ("small vocabulary, wide ffn", json!({"vocab_size": 100, "intermediate_size": 704}), &settings),
            ("small vocabulary, adapters", json!({"vocab_size": 100}), &adapters),
            ("adapters on drafts", json!({}), &on_drafts),
            ("adapters on drafts, wide vocabulary", json!({"vocab_size": 10000}), &on_drafts),
            ("adapters on drafts, small vocabulary", json!({"vocab_size": 100}), &on_drafts),
            ("adapters on drafts, wide ffn", json!({"vocab_size": 100, "intermediate_size": 704}), &on_drafts),
            ("adapters on drafts of the last layers", json!({"vocab_size": 100}), &on_drafts_from_third_layer),
            ("adapters on drafts, checkpointed", json!({"vocab_size": 100}), &on_drafts_checkpointed),
            ("adapters on drafts of some projections", json!({"vocab_size": 100}), &on_drafts_without_down),
            ("qwen3, adapters on drafts", json!({"model_type": "qwen3", "head_dim": 64}), &on_drafts),
            ("qwen2", json!({"model_type": "qwen2"}), &settings),
            ("qwen3", json!({"model_type": "qwen3", "head_dim": 64}), &settings),
            ("mistral, wide vocabulary", json!({"model_type": "mistral", "vocab_size": 10000}), &settings),
        ] {
            let ratio = planned_over_measured(&config(more), settings);
            assert!((0.95..1.05).contains(&ratio), "{name}: planned {ratio:.3} of what was measured");
        }
    }

    /// The peaks of runs of SmolLM2-135M in docs/results.md. The batches here have the mean share of
    /// noisy tokens, and the largest batches of the runs had a few more.
    #[test]
    fn runs_with_adapters_for_drafts_needed_what_is_planned() {
        let config = ModelConfig::from_json(&ModelShape::SmolLm2_135M.json()).unwrap();
        for (name, num_states, (prompt, response), measured) in [
            ("Spider", 3, (164, 32), 3_707_729_408.0),
            ("GSM8K", 2, (80, 96), 4_298_409_472.0),
            ("chat", 2, (60, 160), 4_653_137_408.0),
            ("code", 2, (60, 128), 4_609_673_216.0),
        ] {
            let mut settings = on_drafts(&Settings::plain());
            settings.optimizer.ema_decay = Some(0.998);
            settings.consistency.states_per_block = num_states;
            let lora = settings.lora.as_mut().unwrap();
            (lora.rank, lora.first_layer) = (32, 15);
            lora.targets.remove(&LoraTarget::DownProj);
            let block = |start: usize| Block { start, states: vec![vec![3; 16]; 4], augmented: Vec::new() };
            let example = Example {
                blocks: (0..response / 16).map(|index| block(16 * index)).collect(),
                ..Example::labelled("a".to_owned(), vec![1; prompt], vec![2; response])
            };
            let num_examples = 24_576 / example.max_packed_tokens(&settings.consistency);
            let planned = MemoryEstimate::new(&Workload {
                config: &config,
                kind: Kind::BFloat16,
                is_eager: false,
                settings: &settings,
                examples: &vec![example; num_examples],
                batches: &[(0..num_examples).collect()],
                probe: None,
                world_size: 1,
            });
            let ratio = planned.training_peak() as f64 / measured;
            assert!((0.9..1.0).contains(&ratio), "{name}: planned {ratio:.3} of what was measured");
        }
    }

    /// 16 bytes for each of 8.2 billion weights would need 131 GB in one process.
    #[test]
    fn an_8b_model_with_a_float32_state_fits_two_gpus_of_80_gb_with_sharded_gradients() {
        let config = ModelConfig::from_json(&ModelShape::Qwen3_8B.json()).unwrap();
        let examples = examples(1);
        let static_bytes = |accumulation: usize| {
            let settings = Settings { accumulation, ..Settings::plain() };
            let StaticBytes { weights, gradients, optimizer, .. } = StaticBytes::new(&Workload {
                config: &config,
                kind: Kind::BFloat16,
                is_eager: false,
                settings: &settings,
                examples: &examples,
                batches: &[],
                probe: None,
                world_size: 2,
            });
            weights + gradients + optimizer
        };
        assert!((74e9..78e9).contains(&static_bytes(2)), "{}", static_bytes(2));
        assert!((81e9..83e9).contains(&static_bytes(4)), "{}", static_bytes(4));
    }

    mod needs_gpu {
        use cllm_core::cuda::libtorch::{gpu_memory, reset_peak_gpu_memory};
        use cllm_testing::gpu;

        use super::*;

        #[test]
        #[ignore = "needs a GPU: scripts/test --gpu"]
        fn steps_on_a_gpu_need_what_is_planned() {
            let device = gpu::gpu();
            let settings = Settings { max_batch_tokens: 8192, ..Settings::plain() };
            let checkpointed = Settings { checkpointed_layers: 99, ..settings.clone() };
            let mut bf16_state = checkpointed.clone();
            bf16_state.optimizer.state_dtype = StateDtype::Bfloat16;
            let adapters = Settings { lora: Some(LoraConfig::default()), ..settings.clone() };
            let on_drafts = on_drafts(&settings);
            let mut on_drafts_of_last = on_drafts.clone();
            on_drafts_of_last.lora.as_mut().unwrap().first_layer = 4;
            let on_drafts_checkpointed = Settings { checkpointed_layers: 99, ..on_drafts.clone() };
            let mut anchored = settings.clone();
            anchored.consistency.anchor_weight = 0.5;
            let config = |more: Value| {
                let mut json = json!({
                    "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
                    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": true,
                    "max_position_embeddings": 2048, "model_type": "llama",
                });
                json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                ModelConfig::from_json(&json).unwrap()
            };
            let examples = examples(20);
            let mut ratios = Vec::new();
            let mut compare = |name: &'static str, more: &Value, variant: &'static str, settings: &Settings| {
                let config = config(more.clone());
                let planned = planned(&config, settings, &examples, device).training_peak();
                reset_peak_gpu_memory(device);
                train(&config, settings, &examples, device, 3);
                let (_, measured) = gpu_memory(device).unwrap();
                let ratio = planned as f64 / measured as f64;
                eprintln!("{name}, {variant}: planned {ratio:.3} of {measured} bytes");
                ratios.push((name, variant, ratio));
            };
            let of_drafts = [
                ("adapters on drafts", &on_drafts),
                ("adapters on drafts of the last layers", &on_drafts_of_last),
                ("adapters on drafts, checkpointed", &on_drafts_checkpointed),
            ];
            for (name, more) in [
                ("llama", json!({})),
                ("llama, untied", json!({"tie_word_embeddings": false})),
                ("qwen2", json!({"model_type": "qwen2"})),
                ("qwen3", json!({"model_type": "qwen3", "head_dim": 128})),
                ("heads of 80", json!({"head_dim": 80})),
                ("heads of 100, padded", json!({"head_dim": 100})),
            ] {
                let variants = [
                    ("all layers saved", &settings),
                    ("checkpointed", &checkpointed),
                    ("bfloat16 state", &bf16_state),
                    ("adapters", &adapters),
                    ("anchored", &anchored),
                ];
                for (variant, settings) in variants.into_iter().chain(of_drafts) {
                    compare(name, &more, variant, settings);
                }
            }
            // The losses need less than the forward of the last layer.
            for (variant, settings) in of_drafts {
                compare("small vocabulary", &json!({"vocab_size": 1000}), variant, settings);
            }
            let wrong: Vec<_> = ratios.iter().filter(|(.., ratio)| !(0.95..1.05).contains(ratio)).collect();
            assert!(wrong.is_empty(), "{wrong:?}");
        }
    }
}
