//! The forward pass of a decoder-only transformer: Llama, Mistral, Qwen2 and Qwen3.
//!
//! Shapes in comments: `b` batch, `s` sequence, `d` width of a head.

use tch::{Device, Kind, Tensor};

use super::attention::{Attention, CachedAttention, CausalAttention, Padding, SlotMapping};
use super::config::ModelConfig;
use super::init;
use super::kv_cache::{KvCache, SLOT_ALIGNMENT};
use super::linear::Linear;
use super::lora::{AdaptedTokens, LoraAdapters, LoraConfig, LoraTarget};
use super::params::ParamBuffer;
use super::quantized::{BaseDtype, ModelParams};
use super::rope::{RotaryEmbedding, Rotation};
use crate::Result;
use crate::cuda::libtorch;

/// A layer, with the names of its weights in Hugging Face checkpoints.
pub(crate) struct Layer {
    /// See [`ModelConfig::sliding_windows`].
    pub(crate) sliding_window: Option<i32>,
    pub(crate) input_layernorm: Tensor,
    /// `q_proj`, `k_proj` and `v_proj` in one product.
    pub(crate) qkv_proj: Linear,
    /// `q_norm` and `k_norm` (Qwen3).
    pub(crate) qk_norm: Option<(Tensor, Tensor)>,
    pub(crate) o_proj: Linear,
    pub(crate) post_attention_layernorm: Tensor,
    /// `gate_proj` and `up_proj` in one product.
    pub(crate) gate_up_proj: Linear,
    pub(crate) down_proj: Linear,
}

/// A transformer with its weights on one device.
pub struct Transformer {
    config: ModelConfig,
    device: Device,
    kind: Kind,
    pub(crate) rope: RotaryEmbedding,
    pub(crate) embed_tokens: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor,
    /// `None` if the embedding is the output projection too.
    lm_head: Option<Tensor>,
    /// Every weight under its Hugging Face name. The tensors above are views of it.
    params: ModelParams,
    /// The tensors that collect gradients, each with the names in [`Self::trainable`] that it joins.
    leaves: Vec<(Tensor, Vec<String>)>,
    adapters: Option<LoraAdapters>,
}

// Construction.
impl Transformer {
    /// Random weights for training from scratch, the same on every device for the same seed.
    pub fn random(config: ModelConfig, seed: u64, device: Device, kind: Kind) -> Self {
        let params = init::random_params(&config, seed, device, kind);
        Self::from_params(config, params)
    }

    /// Random weights for speed measurements only, drawn on the device.
    pub fn random_on_device(config: ModelConfig, device: Device, kind: Kind) -> Self {
        let params = init::random_params_on_device(&config, device, kind);
        Self::from_params(config, params)
    }

    /// The model over a buffer that holds every weight of the configuration.
    pub(crate) fn from_params(config: ModelConfig, params: ParamBuffer) -> Self {
        Self::new(config, ModelParams { params, quantized: None })
    }

    /// The model over every weight of the configuration.
    pub(crate) fn new(config: ModelConfig, params: ModelParams) -> Self {
        let mut weights = Weights { params: &params, leaves: Vec::new() };
        let embed_tokens = weights.get("model.embed_tokens.weight");
        let layers = config
            .sliding_windows
            .iter()
            .enumerate()
            .map(|(index, &sliding_window)| {
                let layer = format!("model.layers.{index}");
                let q_norm = weights.find(&format!("{layer}.self_attn.q_norm.weight"));
                let k_norm = weights.find(&format!("{layer}.self_attn.k_norm.weight"));
                Layer {
                    sliding_window,
                    input_layernorm: weights.get(&format!("{layer}.input_layernorm.weight")),
                    qkv_proj: weights.linear(&format!("{layer}.self_attn"), &["q_proj", "k_proj", "v_proj"]),
                    qk_norm: q_norm.zip(k_norm),
                    o_proj: weights.linear(&format!("{layer}.self_attn"), &["o_proj"]),
                    post_attention_layernorm: weights.get(&format!("{layer}.post_attention_layernorm.weight")),
                    gate_up_proj: weights.linear(&format!("{layer}.mlp"), &["gate_proj", "up_proj"]),
                    down_proj: weights.linear(&format!("{layer}.mlp"), &["down_proj"]),
                }
            })
            .collect();
        let norm = weights.get("model.norm.weight");
        let lm_head = weights.find("lm_head.weight");
        let leaves = weights.leaves;
        let (device, kind) = (params.params.buffer().device(), params.params.kind());
        let rope = RotaryEmbedding::new(&config.rope_scaling, config.head_dim, config.rope_theta, device);
        Transformer { config, device, kind, rope, embed_tokens, layers, norm, lm_head, params, leaves, adapters: None }
    }
}

/// The weights of a buffer by their names, with a record of those that were used.
struct Weights<'p> {
    params: &'p ModelParams,
    leaves: Vec<(Tensor, Vec<String>)>,
}

impl Weights<'_> {
    fn find(&mut self, name: &str) -> Option<Tensor> {
        self.find_joined(vec![name.to_owned()])
    }

    fn get(&mut self, name: &str) -> Tensor {
        self.find(name).expect("the buffer holds every weight of the configuration")
    }

    /// Projections of the same input, joined: their weights are neighbors in the buffer.
    fn linear(&mut self, module: &str, projections: &[&str]) -> Linear {
        let names = |tensor: &str| -> Vec<String> {
            projections.iter().map(|name| format!("{module}.{name}.{tensor}")).collect()
        };
        let (weight, scales) = match &self.params.quantized {
            Some(quantized) => quantized.get_joined(&names("weight")).unzip(),
            None => (self.find_joined(names("weight")), None),
        };
        let weight = weight.expect("the buffer holds every weight of the configuration");
        Linear { weight, scales, bias: self.find_joined(names("bias")), adapters: None }
    }

    fn find_joined(&mut self, names: Vec<String>) -> Option<Tensor> {
        let tensor = self.params.params.get_joined(&names)?;
        self.leaves.push((tensor.shallow_clone(), names));
        Some(tensor)
    }
}

// The forward pass.
impl Transformer {
    /// Final hidden states `[b, s, hidden]`, after the last norm, of causal attention without a
    /// cache; gradients flow. `tokens` and `positions`: int64 `[b, s]`.
    pub fn forward(&self, tokens: &Tensor, positions: &Tensor) -> Tensor {
        self.forward_with(tokens, positions, &mut CausalAttention::new(&self.config, positions, self.kind), None)
    }

    /// Final hidden states `[tokens, hidden]` of the leading `lengths` tokens of each row, at least
    /// one; the rest of a row is padding, in whose slots the key and value of its last token are
    /// written. `tokens`: int64 `[rows, width]`. `num_attended`: the number of leading slots that
    /// contain all that any row sees. `draft_rows`: the indices of the draft tokens among the tokens
    /// returned, int64 `[drafts]`, for adapters that act on these alone. No gradient flows.
    pub fn forward_cached(
        &self,
        tokens: &Tensor,
        mapping: &SlotMapping,
        lengths: &[usize],
        cache: &mut KvCache,
        num_attended: usize,
        draft_rows: Option<&Tensor>,
    ) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let width = tokens.size()[1] as usize;
        let padding = Padding::new(lengths, width, self.device);
        let pack = |x: &Tensor| padding.as_ref().map_or_else(|| x.shallow_clone(), |padding| padding.pack(x));
        let num_attended = num_attended.next_multiple_of(SLOT_ALIGNMENT);
        let mut attention = CachedAttention::new(&self.config, cache, mapping, num_attended, padding.as_ref());
        self.forward_with(&pack(tokens), &pack(&mapping.positions), &mut attention, draft_rows).flatten(0, 1)
    }

    fn forward_with(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attention,
        draft_rows: Option<&Tensor>,
    ) -> Tensor {
        let rotation = self.rope.rotation(positions, self.kind);
        let mut x = self.embed(tokens);
        for index in 0..self.layers.len() {
            x = self.layer_forward(index, &x, &rotation, attention, draft_rows);
        }
        self.rms_norm(&x, &self.norm)
    }

    pub(crate) fn embed(&self, tokens: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed_tokens, tokens, -1, false, false)
    }

    /// `[b, s, hidden]` to the same. `draft_rows`: the indices of the draft tokens among all b x s
    /// tokens, int64 `[drafts]`, for adapters that act on these alone.
    pub(crate) fn layer_forward(
        &self,
        index: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
        draft_rows: Option<&Tensor>,
    ) -> Tensor {
        let layer = &self.layers[index];
        let x =
            self.self_attention(index, &self.rms_norm(x, &layer.input_layernorm), rotation, attention, draft_rows) + x;
        mlp(layer, &self.rms_norm(&x, &layer.post_attention_layernorm), draft_rows) + x
    }

    fn self_attention(
        &self,
        index: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
        draft_rows: Option<&Tensor>,
    ) -> Tensor {
        let layer = &self.layers[index];
        let (b, s, _) = x.size3().expect("hidden states have three dimensions");
        let ModelConfig { num_heads, num_kv_heads, head_dim, .. } = self.config;

        // 1. Project, and split into heads: [b, s, heads, d].
        let qkv = layer.qkv_proj.forward(x, draft_rows).view([b, s, num_heads + 2 * num_kv_heads, head_dim]);
        let [q, k, v] = split(&qkv, [num_heads, num_kv_heads, num_kv_heads]);

        // 2. Norm of each head (Qwen3).
        let (q, k) = match &layer.qk_norm {
            Some((q_norm, k_norm)) => (self.rms_norm(&q, q_norm), self.rms_norm(&k, k_norm)),
            None => (q, k),
        };

        // 3. Heads first, [b, heads, s, d], and RoPE.
        let q = rotation.apply(&q.transpose(1, 2));
        let k = rotation.apply(&k.transpose(1, 2));
        let v = v.transpose(1, 2);

        // 4. Attend; a cache is read and written here.
        let out = attention.attend(index, layer.sliding_window, &q, &k, &v);

        // 5. Join the heads, and project.
        layer.o_proj.forward(&out.transpose(1, 2).reshape([b, s, num_heads * head_dim]), draft_rows)
    }

    /// RMS norm over the last dimension, computed in float32.
    pub(crate) fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), self.config.rms_norm_eps)
    }

    /// Logits `[.., vocab]` in the model's own type, with gradients.
    pub fn project(&self, hidden: &Tensor) -> Tensor {
        hidden.linear::<&Tensor>(self.lm_head(), None)
    }

    /// Logits `[.., vocab]` in float32 with gradients, for losses.
    pub fn logits_with_grad(&self, hidden: &Tensor) -> Tensor {
        self.project(hidden).to_kind(Kind::Float)
    }

    /// Logits `[.., vocab]` computed in float32 without gradients, for sampling: bf16 results would
    /// tie too often.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], for instance when memory runs out.
    pub fn compute_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        libtorch::matmul_float32(hidden, self.lm_head())
    }

    /// The output projection `[vocab, hidden]`.
    pub(crate) fn lm_head(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The output projection padded to a multiple of 8 rows, `[vocab.., hidden]`. The numbers in the
    /// padding are finite.
    ///
    /// # Errors
    /// [`crate::Error::Torch`].
    pub fn padded_lm_head(&self) -> Result<Tensor> {
        ParamBuffer::with_room(self.lm_head())
    }
}

/// SwiGLU.
fn mlp(layer: &Layer, x: &Tensor, draft_rows: Option<&Tensor>) -> Tensor {
    let gate_up = layer.gate_up_proj.forward(x, draft_rows).chunk(2, -1);
    layer.down_proj.forward(&(gate_up[0].silu() * &gate_up[1]), draft_rows)
}

/// Splits the heads of `[b, s, heads, d]`.
fn split<const N: usize>(x: &Tensor, num_heads: [i64; N]) -> [Tensor; N] {
    x.split_with_sizes(num_heads, 2).try_into().expect("there is one tensor for each size")
}

// Weights, gradients and adapters.
impl Transformer {
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// Type of weights and activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The buffer of all weights that are not quantized, without adapters.
    pub fn weights(&self) -> &ParamBuffer {
        &self.params.params
    }

    /// Every weight that is not quantized under its Hugging Face name, in a fixed order, without
    /// adapters. Tied weights come once. The tensors share their memory with the model.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.params.params.tensors()
    }

    /// Whether the projections of the layers are in int8.
    pub fn is_quantized(&self) -> bool {
        self.params.quantized.is_some()
    }

    /// The model with its projections in int8, without adapters.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], for instance when memory runs out.
    pub fn to_quantized(&self) -> Result<Self> {
        let params = ModelParams::zeros(&self.config, self.device, self.kind, BaseDtype::Int8);
        self.named_parameters().iter().try_for_each(|(name, weight)| params.set(name, weight))?;
        Ok(Self::new(self.config.clone(), params))
    }

    /// The parameters that training changes: the adapters if there are any, otherwise every weight.
    pub fn trainable(&self) -> &ParamBuffer {
        self.adapters.as_ref().map_or(&self.params.params, |adapters| &adapters.params)
    }

    /// From now on every backward adds to the gradients in the returned buffer, which has the
    /// layout of [`Self::trainable`].
    ///
    /// # Errors
    /// [`crate::Error::Torch`], for instance when memory runs out.
    pub fn collect_gradients(&self) -> Result<ParamBuffer> {
        let trainable = self.trainable();
        let gradients = trainable.zeros_like(trainable.kind());
        for (leaf, names) in &self.leaves {
            let gradient = gradients.get_joined(names).expect("gradients have the layout of the trained parameters");
            libtorch::accumulate_grad_into(&leaf.set_requires_grad(true), &gradient)?;
        }
        Ok(gradients)
    }

    /// Every trained weight that is one tensor in a pass, such as the joined projections of queries,
    /// keys and values, with the name of the first that it joins and the index of its first element
    /// in [`Self::trainable`], in the order of the layers.
    pub(crate) fn leaves(&self) -> impl Iterator<Item = (Tensor, &str, i64)> {
        self.leaves.iter().map(|(leaf, names)| {
            let start = self.trainable().start_of(&names[0]).expect("the buffer holds every trained tensor");
            (leaf.shallow_clone(), names[0].as_str(), start)
        })
    }

    pub(crate) fn adapters(&self) -> Option<&LoraAdapters> {
        self.adapters.as_ref()
    }

    /// Whether there are adapters that act on draft tokens alone.
    pub fn adapts_drafts(&self) -> bool {
        self.adapters.as_ref().is_some_and(|adapters| adapters.config.on == AdaptedTokens::Drafts)
    }

    /// The first layer with adapters; 0 without any. Nothing before it is trained, and the layers
    /// before it read draft tokens as they read all others.
    pub(crate) fn first_adapted_layer(&self) -> usize {
        self.adapters.as_ref().map_or(0, |adapters| adapters.config.first_layer)
    }

    /// Adds fresh adapters drawn from `seed`, and drops any that exist; the weights no longer
    /// collect gradients. Until the adapters are trained, the model computes what it did without
    /// them.
    pub fn add_adapters(&mut self, lora: &LoraConfig, seed: u64) {
        self.set_adapters(LoraAdapters::random(lora, seed, &self.config, self.device, Kind::Float, self.kind));
    }

    /// As [`Self::add_adapters`], in the model's type: adapters to decode with, which are not trained.
    pub fn add_adapters_for_decoding(&mut self, lora: &LoraConfig, seed: u64) {
        self.set_adapters(LoraAdapters::random(lora, seed, &self.config, self.device, self.kind, self.kind));
    }

    /// As [`Self::add_adapters`], with adapters that exist.
    pub(crate) fn set_adapters(&mut self, adapters: LoraAdapters) {
        for (leaf, _) in self.leaves.drain(..) {
            let _ = leaf.set_requires_grad(false);
        }
        for (index, layer) in self.layers.iter_mut().enumerate() {
            for (linear, projections) in layer.linears_mut(&self.config) {
                linear.adapters = adapters.joined(index, &projections, &mut self.leaves);
            }
        }
        self.adapters = Some(adapters);
    }

    /// The same weights, in the same memory, without adapters.
    pub fn without_adapters(&self) -> Self {
        Self::new(self.config.clone(), self.params.shallow_clone())
    }

    /// A copy with the adapters merged into its weights, for decoding; `None` if there are none, or
    /// they act on draft tokens alone. Later changes of the adapters do not reach it.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], for instance when memory runs out.
    pub fn to_merged(&self) -> Result<Option<Self>> {
        let Some(adapters) = self.adapters.as_ref().filter(|_| !self.adapts_drafts()) else { return Ok(None) };
        let _no_grad = tch::no_grad_guard();
        let params = ParamBuffer::zeros(self.config.parameter_shapes(), self.device, self.kind);
        for (name, mut merged) in params.tensors() {
            let weight = self.params.dequantized(&name, self.kind)?;
            match adapters.find(&name) {
                Some(adapter) => merged.f_copy_(&adapter.merge(&weight, self.kind)?)?,
                None => merged.f_copy_(&weight)?,
            }
        }
        Ok(Some(Self::from_params(self.config.clone(), params)))
    }
}

impl Layer {
    /// Every product, with the projections that it computes and the first output of each.
    fn linears_mut(&mut self, config: &ModelConfig) -> [(&mut Linear, Vec<(LoraTarget, i64)>); 4] {
        let q_width = config.num_heads * config.head_dim;
        let kv_width = config.num_kv_heads * config.head_dim;
        let qkv = [(LoraTarget::QProj, 0), (LoraTarget::KProj, q_width), (LoraTarget::VProj, q_width + kv_width)];
        let gate_up = [(LoraTarget::GateProj, 0), (LoraTarget::UpProj, config.intermediate_size)];
        [
            (&mut self.qkv_proj, qkv.into()),
            (&mut self.o_proj, vec![(LoraTarget::OProj, 0)]),
            (&mut self.gate_up_proj, gate_up.into()),
            (&mut self.down_proj, vec![(LoraTarget::DownProj, 0)]),
        ]
    }
}
