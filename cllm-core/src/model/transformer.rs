//! The forward pass. Shapes: `b` batch, `s` sequence, `h` heads, `d` width of a head.

use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::kv_cache::KvCache;
use super::lora::{Adapter, Adapters};
use super::params::ParamBuffer;
use super::rope::{Rope, Rotation};
use crate::Result;
use crate::cuda::libtorch;
use crate::train::EagerBatch;

pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
    pub(crate) adapters: Vec<Adapter>,
}

pub(crate) struct Layer {
    pub(crate) attention_norm: Tensor,
    /// Queries, keys and values in one product.
    pub(crate) query_key_value: Linear,
    /// Norms of queries and keys (Qwen3).
    pub(crate) query_key_norm: Option<(Tensor, Tensor)>,
    pub(crate) output: Linear,
    pub(crate) feed_forward_norm: Tensor,
    /// Gate and up in one product.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

/// A transformer with its weights on one device.
pub struct Transformer {
    config: ModelConfig,
    device: Device,
    kind: Kind,
    pub(crate) rope: Rope,
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor,
    /// `None` where the embedding is the output projection.
    head: Option<Tensor>,
    /// Every weight under its Hugging Face name; the tensors above are views of it.
    weights: ParamBuffer,
    /// What collects gradients: the tensors above, with the names that each joins.
    leaves: Vec<(Tensor, Vec<String>)>,
    pub(crate) adapters: Option<Adapters>,
}

/// Attended slots and packed widths are multiples of this, or the GPU's attention copies the bias in every layer.
pub const ALIGNED: usize = 8;

/// Where the tokens of a forward with a cache belong: int64 `[rows, width]`.
#[derive(Debug)]
pub struct SlotMapping {
    /// Positions in the sequence.
    pub positions: Tensor,
    /// Slots of the cache, where keys and values are written.
    pub slots: Tensor,
    /// What queries see of the slots at or before their own; without it, all.
    pub tree_mask: Option<TreeMask>,
}

/// Windows whose tokens do not follow one another.
#[derive(Debug)]
pub struct TreeMask {
    /// Slot that the window of a row begins with, int64 `[rows, 1]`; a query sees every slot before it.
    pub first_slot: Tensor,
    /// Bit i, as of an unsigned number: the query sees slot `first_slot + i`. int64 `[rows, width]`.
    pub visible: Tensor,
}

impl SlotMapping {
    /// Of tokens whose slots are their positions.
    pub fn sequential(positions: Tensor) -> Self {
        SlotMapping { slots: positions.shallow_clone(), positions, tree_mask: None }
    }

    /// True where a query sees a slot: `[rows, 1, group x width, attended]`, the queries `group` times one behind another.
    fn mask(&self, group: i64, attended: usize) -> Tensor {
        let queries = |of: &Tensor| of.repeat([1, group]).unsqueeze(1).unsqueeze(-1);
        let slots = Tensor::arange(attended as i64, (Kind::Int64, self.slots.device())).view([1, 1, 1, -1]);
        let before = slots.le_tensor(&queries(&self.slots));
        let Some(TreeMask { first_slot, visible }) = &self.tree_mask else { return before };
        let offset = slots - first_slot.unsqueeze(-1).unsqueeze(-1);
        let bit = queries(visible).bitwise_right_shift(&offset.clamp(0, 63)).bitwise_and(1);
        before.logical_and(&bit.ne(0).logical_or(&offset.lt(0)))
    }
}

/// What a query may attend to.
pub(crate) enum Context<'c> {
    /// Everything before it in the same sequence.
    Causal,
    /// What the stream lets it see.
    Packed(&'c EagerBatch),
    /// The leading slots of a cache, written at these positions first, as far as what is added to the scores allows.
    Cache { cache: &'c mut KvCache, slots: &'c Tensor, attended: usize, bias: Tensor, ragged: Option<&'c Ragged> },
}

/// Rows of different lengths: all but attention sees their tokens one behind another, without the padding.
pub(crate) struct Ragged {
    /// Number of each token among the places `[rows x width]`, int64 `[tokens]`.
    places: Tensor,
    /// Token of each place, the first one for padding, int64 `[rows x width]`.
    tokens: Tensor,
}

impl Ragged {
    /// `None` where every row is full.
    fn new(lengths: &[usize], width: usize, device: Device) -> Option<Self> {
        if lengths.iter().all(|&length| length == width) {
            return None;
        }
        let (mut places, mut tokens) = (Vec::new(), vec![0; lengths.len() * width]);
        for (row, &length) in lengths.iter().enumerate() {
            for (offset, token) in tokens[row * width..][..length].iter_mut().enumerate() {
                *token = places.len() as i64;
                places.push((row * width + offset) as i64);
            }
        }
        let on_device = |numbers: Vec<i64>| Tensor::from_slice(&numbers).to_device(device);
        Some(Ragged { places: on_device(places), tokens: on_device(tokens) })
    }
}

impl Transformer {
    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Type of weights and activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Every weight under its Hugging Face name, in a fixed order, adapters aside; tied weights once. They share storage with
    /// the model.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.weights.tensors()
    }

    /// The buffer that holds every weight.
    pub fn weights(&self) -> &ParamBuffer {
        &self.weights
    }

    /// What training changes: every weight, or the adapters alone where there are any.
    pub fn trainable(&self) -> &ParamBuffer {
        self.adapters.as_ref().map_or(&self.weights, |adapters| &adapters.numbers)
    }

    /// The same weights, in the same storage, without adapters.
    pub fn without_adapters(&self) -> Self {
        Self::assemble(self.config.clone(), self.weights.shallow_clone())
    }

    /// Weights and adapters become what collects no gradients; adapters are taken away.
    pub(crate) fn freeze(&mut self) {
        for (leaf, _) in &self.leaves {
            let _ = leaf.set_requires_grad(false);
        }
        for layer in &mut self.layers {
            for linear in [&mut layer.query_key_value, &mut layer.output, &mut layer.gate_up, &mut layer.down] {
                linear.adapters.clear();
            }
        }
        self.adapters = None;
    }

    /// From now on every backward adds to the gradients in the buffer that is returned, laid out as [`Self::trainable`].
    ///
    /// # Errors
    /// [`crate::Error::Torch`], such as memory that ran out.
    pub fn collect_gradients(&self) -> Result<ParamBuffer> {
        let gradients = self.trainable().zeros_like(self.kind);
        let leaves = match &self.adapters {
            None => &self.leaves,
            Some(adapters) => &adapters.leaves(),
        };
        for (leaf, names) in leaves {
            let gradient = gradients.joined(names).unwrap_or_else(|| unreachable!("the layouts are the same"));
            libtorch::accumulate_grad_into(&leaf.set_requires_grad(true), &gradient)?;
        }
        Ok(gradients)
    }

    /// Final hidden states `[b, s, hidden]` (after the last norm) of plain causal attention without a cache, with gradients.
    /// `tokens`, `positions`: int64 `[b, s]`.
    pub fn forward(&self, tokens: &Tensor, positions: &Tensor) -> Tensor {
        self.forward_in(tokens, positions, Context::Causal)
    }

    /// Final hidden states `[tokens, hidden]` of the leading `lengths` tokens of each row, with a cache: keys and values are
    /// written at their slots, then each query attends to those at or before its own, as far as it sees them. `tokens`: int64
    /// `[rows, width]`; `attended`: number of leading slots that any row needs. No gradient flows.
    pub fn forward_cached(
        &self,
        tokens: &Tensor,
        places: &SlotMapping,
        lengths: &[usize],
        cache: &mut KvCache,
        attended: usize,
    ) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let ragged = Ragged::new(lengths, tokens.size()[1] as usize, self.device);
        let tokens = match &ragged {
            Some(ragged) => tokens.view([-1]).index_select(0, &ragged.places).unsqueeze(0),
            None => tokens.shallow_clone(),
        };
        let attended = attended.next_multiple_of(ALIGNED);
        // The query heads that share a key head stand behind one another in the sequence of queries (see `attention`).
        let bias = self.bias(&places.mask(self.config.num_heads / self.config.num_kv_heads, attended));
        let context = Context::Cache { cache, slots: &places.slots, attended, bias, ragged: ragged.as_ref() };
        self.forward_in(&tokens, &places.positions, context).flatten(0, 1)
    }

    /// What is added to the scores where `mask` is true (0) and false (minus infinity); made once, not once a layer.
    pub(crate) fn bias(&self, mask: &Tensor) -> Tensor {
        let bias = Tensor::full(mask.size(), f64::NEG_INFINITY, (self.kind, self.device));
        bias.masked_fill(mask, 0.0)
    }

    /// Logits in float32 `[.., vocab]` of hidden states, computed in float32 (no gradient); for choosing tokens.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], such as memory that ran out.
    pub fn compute_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        libtorch::matmul_float32(hidden, self.projection())
    }

    /// Logits `[.., vocab]` in the model's own type, with gradients.
    pub fn project(&self, hidden: &Tensor) -> Tensor {
        hidden.linear::<&Tensor>(self.projection(), None)
    }

    /// Logits in float32 `[.., vocab]` with gradients; for losses.
    pub fn logits_with_grad(&self, hidden: &Tensor) -> Tensor {
        self.project(hidden).to_kind(Kind::Float)
    }

    /// The output projection `[vocab, hidden]`.
    pub(crate) fn projection(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    pub(crate) fn embed(&self, tokens: &Tensor) -> Tensor {
        Tensor::embedding(&self.embedding, tokens, -1, false, false)
    }

    fn forward_in(&self, tokens: &Tensor, positions: &Tensor, mut context: Context<'_>) -> Tensor {
        let rotation = self.rope.rotation(positions, self.kind);
        let mut x = self.embed(tokens);
        for index in 0..self.layers.len() {
            x = self.layer(index, &x, &rotation, &mut context);
        }
        self.rms_norm(&x, &self.norm)
    }

    /// One layer: `[b, s, hidden]` to the same.
    pub(crate) fn layer(&self, index: usize, x: &Tensor, rotation: &Rotation, context: &mut Context<'_>) -> Tensor {
        let layer = &self.layers[index];
        let x = self.attention(index, layer, &self.rms_norm(x, &layer.attention_norm), rotation, context) + x;
        let gate_up = layer.gate_up.apply(&self.rms_norm(&x, &layer.feed_forward_norm)).chunk(2, -1);
        layer.down.apply(&(gate_up[0].silu() * &gate_up[1])) + x
    }

    fn attention(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        rotation: &Rotation,
        context: &mut Context<'_>,
    ) -> Tensor {
        let ragged = match context {
            Context::Cache { ragged, .. } => *ragged,
            Context::Causal | Context::Packed(_) => None,
        };
        let (batch, length) = match context {
            Context::Cache { slots, .. } => slots.size2().unwrap_or_default(),
            Context::Causal | Context::Packed(_) => (x.size()[0], x.size()[1]),
        };
        let projected = match (layer.query_key_value.apply(x), ragged) {
            (projected, Some(ragged)) => projected.squeeze_dim(0).index_select(0, &ragged.tokens),
            (projected, None) => projected,
        };
        let (key_heads, width) = (self.config.num_kv_heads, self.config.head_dim);
        let heads = [self.config.num_heads, key_heads, key_heads];
        let parts = projected.view([batch, length, -1, width]).split_with_sizes(heads, 2);
        let [mut queries, mut keys] = [0, 1].map(|part| parts[part].shallow_clone());
        if let Some((query_norm, key_norm)) = &layer.query_key_norm {
            queries = self.rms_norm(&queries, query_norm);
            keys = self.rms_norm(&keys, key_norm);
        }
        let queries = rotation.apply(&queries.transpose(1, 2));
        let keys = rotation.apply(&keys.transpose(1, 2));
        let values = parts[2].transpose(1, 2);
        let mixed = match context {
            Context::Causal => attend(&queries, &keys, &values, None),
            Context::Packed(stream) => stream.attend(&queries, &keys, &values),
            Context::Cache { cache, slots, attended, bias, .. } => {
                let (keys, values) = cache.update(index, &keys, &values, slots, *attended);
                // No copy of the cache: a group's heads become more queries of the same key head.
                let folded = queries.reshape([batch, key_heads, -1, width]);
                attend(&folded, &keys, &values, Some(bias)).reshape([batch, -1, length, width])
            }
        };
        let mixed = mixed.transpose(1, 2).reshape([batch, length, -1]);
        layer.output.apply(&match ragged {
            Some(ragged) => mixed.flatten(0, 1).index_select(0, &ragged.places).unsqueeze(0),
            None => mixed,
        })
    }

    /// Root-mean-square norm over the last dimension, computed in float32.
    pub(crate) fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), self.config.rms_norm_eps)
    }

    pub(crate) fn assemble(config: ModelConfig, weights: ParamBuffer) -> Self {
        let mut leaves = Vec::new();
        let mut leaf = |names: Vec<String>| {
            let tensor = weights.joined(&names)?;
            leaves.push((tensor.shallow_clone(), names));
            Some(tensor)
        };
        let expected =
            |found: Option<Tensor>| found.unwrap_or_else(|| unreachable!("there is every name of the config"));
        let embedding = expected(leaf(vec!["model.embed_tokens.weight".to_owned()]));
        let layers = (0..config.num_layers)
            .map(|layer| {
                let mut part = |parts: &[&str], kind: &str| {
                    leaf(parts.iter().map(|part| format!("model.layers.{layer}.{part}.{kind}")).collect())
                };
                let mut linear = |parts: &[&str]| Linear {
                    weight: expected(part(parts, "weight")),
                    bias: part(parts, "bias"),
                    adapters: Vec::new(),
                };
                let query_key_value = linear(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]);
                let output = linear(&["self_attn.o_proj"]);
                let (gate_up, down) = (linear(&["mlp.gate_proj", "mlp.up_proj"]), linear(&["mlp.down_proj"]));
                let mut norm = |name: &str| part(&[name], "weight");
                Layer {
                    attention_norm: expected(norm("input_layernorm")),
                    query_key_norm: norm("self_attn.q_norm").zip(norm("self_attn.k_norm")),
                    feed_forward_norm: expected(norm("post_attention_layernorm")),
                    query_key_value,
                    output,
                    gate_up,
                    down,
                }
            })
            .collect();
        Transformer {
            device: weights.buffer().device(),
            kind: weights.buffer().kind(),
            rope: Rope::new(&config, weights.buffer().device()),
            embedding,
            layers,
            norm: expected(leaf(vec!["model.norm.weight".to_owned()])),
            head: leaf(vec!["lm_head.weight".to_owned()]),
            config,
            weights,
            leaves,
            adapters: None,
        }
    }
}

/// Attention of queries `[b, h, s, d]` to keys and values `[b, kv_heads, t, d]`, with what is added to the scores or plainly
/// causal without.
pub(crate) fn attend(queries: &Tensor, keys: &Tensor, values: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let group = queries.size()[1] / keys.size()[1];
    // `enable_gqa` leaves only the slow kernel that holds every score when there is a mask, so groups are laid out here.
    let widened = |x: &Tensor| {
        let [batch, heads, length, width] = <[i64; 4]>::try_from(x.size()).unwrap_or_default();
        match group {
            1 => x.shallow_clone(),
            _ => x.unsqueeze(2).expand([batch, heads, group, length, width], false).flatten(1, 2),
        }
    };
    let (keys, values) = (widened(keys), widened(values));
    Tensor::scaled_dot_product_attention(queries, &keys, &values, bias, 0.0, bias.is_none(), None, false)
}

impl Linear {
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let product = x.linear(&self.weight, self.bias.as_ref());
        for adapter in &self.adapters {
            let _ = adapter.of(&product, -1).g_add_(&adapter.apply(x));
        }
        product
    }
}
