//! The forward pass. Shapes: `b` batch, `s` sequence, `h` heads, `d` width of a head.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::config::{Family, ModelConfig};
use super::kv_cache::KvCache;
use super::rope::{Rope, Rotation};
use super::weights;
use crate::{Result, torch_ext};

pub(super) struct Linear {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

pub(super) struct Layer {
    pub(super) attention_norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Queries, keys and values in one product: the three above are views of its rows.
    pub(super) query_key_value: Linear,
    /// Norms of queries and keys (Qwen3).
    pub(super) query_key_norm: Option<(Tensor, Tensor)>,
    pub(super) output: Linear,
    pub(super) feed_forward_norm: Tensor,
    gate: Linear,
    up: Linear,
    /// Gate and up in one product: the two above are views of its rows.
    pub(super) gate_up: Tensor,
    pub(super) down: Linear,
}

/// A transformer with its weights on one device.
pub struct Transformer {
    config: ModelConfig,
    device: Device,
    kind: Kind,
    pub(super) rope: Rope,
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    /// `None` where the embedding is the output projection.
    head: Option<Tensor>,
    parameters: Vec<(String, Tensor)>,
}

/// Attended slots and packed widths are multiples of this, or the GPU's attention copies the bias in every layer.
pub const ALIGNED: usize = 8;

/// Where the tokens of a forward with a cache belong: int64 `[rows, width]`.
#[derive(Debug)]
pub struct CachePlaces {
    /// Positions in the sequence.
    pub positions: Tensor,
    /// Slots of the cache, where keys and values are written.
    pub slots: Tensor,
    /// What queries see of the slots at or before their own; without it, all.
    pub branches: Option<Branches>,
}

/// Windows whose tokens do not follow one another.
#[derive(Debug)]
pub struct Branches {
    /// Slot that the window of a row begins with, int64 `[rows, 1]`; a query sees every slot before it.
    pub first: Tensor,
    /// Bit i, as of an unsigned number: the query sees slot `first + i`. int64 `[rows, width]`.
    pub visible: Tensor,
}

impl CachePlaces {
    /// Of tokens whose slots are their positions.
    pub fn in_order(positions: Tensor) -> Self {
        CachePlaces { slots: positions.shallow_clone(), positions, branches: None }
    }

    /// True where a query sees a slot: `[rows, 1, group x width, attended]`, the queries `group` times one behind another.
    fn mask(&self, group: i64, attended: usize) -> Tensor {
        let queries = |of: &Tensor| of.repeat([1, group]).unsqueeze(1).unsqueeze(-1);
        let slots = Tensor::arange(attended as i64, (Kind::Int64, self.slots.device())).view([1, 1, 1, -1]);
        let before = slots.le_tensor(&queries(&self.slots));
        let Some(Branches { first, visible }) = &self.branches else { return before };
        let offset = slots - first.unsqueeze(-1).unsqueeze(-1);
        let bit = queries(visible).bitwise_right_shift(&offset.clamp(0, 63)).bitwise_and(1);
        before.logical_and(&bit.ne(0).logical_or(&offset.lt(0)))
    }
}

/// What a query may attend to.
enum Context<'c> {
    /// Everything before it in the same sequence, or what is added to its scores `[b, 1, s, s]` allows.
    Sequence(Option<Tensor>),
    /// The leading slots of a cache, written at these positions first, as far as what is added to the scores allows.
    Cache { cache: &'c mut KvCache, slots: &'c Tensor, attended: usize, bias: Tensor, ragged: Option<&'c Ragged> },
}

/// Rows of different lengths: all but attention sees their tokens one behind another, without the padding.
struct Ragged {
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
    /// Loads a Hugging Face folder.
    ///
    /// # Errors
    /// Names a file that is missing, cut off, or of an unsupported family or feature.
    pub fn load(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = ModelConfig::load(folder)?;
        let parameters = weights::read(folder, &config, device, kind)?;
        Ok(Self::assemble(config, parameters, device, kind))
    }

    /// Random weights (normal, 0.02; norms 1, biases 0), drawn on the CPU: the same for the same seed on every device.
    pub fn random(config: ModelConfig, seed: u64, device: Device, kind: Kind) -> Self {
        let parameters = weights::random(&config, seed, device, kind);
        Self::assemble(config, parameters, device, kind)
    }

    /// Noise drawn on the device: a shape to measure speed with, where drawing on the CPU would take minutes.
    pub fn noise(config: ModelConfig, device: Device, kind: Kind) -> Self {
        let _no_grad = tch::no_grad_guard();
        let draw = |shape: &[i64]| Tensor::empty(shape, (kind, device)).normal_(0.0, 0.02);
        let parameters = config.shapes().into_iter().map(|(name, shape)| (name, draw(&shape))).collect();
        Self::assemble(config, parameters, device, kind)
    }

    /// Writes config.json and safetensors in `kind` into an existing folder (sharded past 5 GB, `format: pt`).
    ///
    /// # Errors
    /// File-system errors.
    pub fn save(&self, folder: &Path, kind: Kind) -> Result<()> {
        weights::write(folder, &self.config, &self.parameters, kind, weights::SHARD_BYTES)
    }

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

    /// Every weight under its Hugging Face name, in a fixed order; tied weights once. They share storage with the model.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// Makes every weight a leaf that collects gradients, or none.
    pub fn set_requires_grad(&self, on: bool) {
        for (_, tensor) in &self.parameters {
            let _ = tensor.set_requires_grad(on);
        }
    }

    /// Final hidden states `[b, s, hidden]` (after the last norm) without a cache, with gradients.
    /// `tokens`, `positions`: int64 `[b, s]`; `mask`: bool `[b, 1, s, s]`, true where attention is
    /// allowed (every row needs at least one), or `None` for plain causal attention.
    pub fn hidden(&self, tokens: &Tensor, positions: &Tensor, mask: Option<&Tensor>) -> Tensor {
        self.forward(tokens, positions, Context::Sequence(mask.map(|mask| self.bias(mask))))
    }

    /// Final hidden states `[tokens, hidden]` of the leading `lengths` tokens of each row, with a cache: keys and values are
    /// written at their slots, then each query attends to those at or before its own, as far as it sees them. `tokens`: int64
    /// `[rows, width]`; `attended`: number of leading slots that any row needs. No gradient flows.
    pub fn hidden_cached(
        &self,
        tokens: &Tensor,
        places: &CachePlaces,
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
        self.forward(&tokens, &places.positions, context).flatten(0, 1)
    }

    /// What is added to the scores where `mask` is true (0) and false (minus infinity); made once, not once a layer.
    fn bias(&self, mask: &Tensor) -> Tensor {
        let bias = Tensor::full(mask.size(), f64::NEG_INFINITY, (self.kind, self.device));
        bias.masked_fill(mask, 0.0)
    }

    /// Logits in float32 `[.., vocab]` of hidden states, computed in float32 (no gradient); for choosing tokens.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], such as memory that ran out.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        torch_ext::matmul_float32(hidden, self.projection())
    }

    /// Logits in float32 `[.., vocab]` with gradients; for losses.
    pub fn train_logits(&self, hidden: &Tensor) -> Tensor {
        hidden.linear::<&Tensor>(self.projection(), None).to_kind(Kind::Float)
    }

    /// The output projection `[vocab, hidden]`.
    pub(super) fn projection(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    fn forward(&self, tokens: &Tensor, positions: &Tensor, mut context: Context<'_>) -> Tensor {
        let rotation = self.rope.rotation(positions, self.kind);
        let mut x = Tensor::embedding(&self.embedding, tokens, -1, false, false);
        for (index, layer) in self.layers.iter().enumerate() {
            let attended =
                self.attention(index, layer, &self.rms_norm(&x, &layer.attention_norm), &rotation, &mut context);
            x = attended + x;
            let normed = self.rms_norm(&x, &layer.feed_forward_norm);
            x = layer.down.apply(&(layer.gate.apply(&normed).silu() * layer.up.apply(&normed))) + x;
        }
        self.rms_norm(&x, &self.norm)
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
            Context::Sequence(_) => None,
        };
        let (batch, length) = match context {
            Context::Cache { slots, .. } => slots.size2().unwrap_or_default(),
            Context::Sequence(_) => (x.size()[0], x.size()[1]),
        };
        let heads = |projected: Tensor| {
            let padded = match ragged {
                Some(ragged) => projected.squeeze_dim(0).index_select(0, &ragged.tokens),
                None => projected,
            };
            padded.view([batch, length, -1, self.config.head_dim])
        };
        let (mut queries, mut keys) = (heads(layer.query.apply(x)), heads(layer.key.apply(x)));
        if let Some((query_norm, key_norm)) = &layer.query_key_norm {
            queries = self.rms_norm(&queries, query_norm);
            keys = self.rms_norm(&keys, key_norm);
        }
        let queries = rotation.apply(&queries.transpose(1, 2));
        let keys = rotation.apply(&keys.transpose(1, 2));
        let values = heads(layer.value.apply(x)).transpose(1, 2);
        let (key_heads, width) = (self.config.num_kv_heads, self.config.head_dim);
        let group = self.config.num_heads / key_heads;
        // `enable_gqa` leaves only the slow kernel that holds every score when there is a mask, so groups are laid out here.
        let mixed = match context {
            Context::Sequence(bias) => {
                let widened = |x: &Tensor| {
                    let shape = [batch, key_heads, group, length, width];
                    if group == 1 { x.shallow_clone() } else { x.unsqueeze(2).expand(shape, false).flatten(1, 2) }
                };
                attend(&queries, &widened(&keys), &widened(&values), bias.as_ref())
            }
            Context::Cache { cache, slots, attended, bias, .. } => {
                let (keys, values) = cache.update(index, &keys, &values, slots, *attended);
                // No copy of the cache: a group's heads become more queries of the same key head.
                let folded = queries.reshape([batch, key_heads, group * length, width]);
                attend(&folded, &keys, &values, Some(bias)).reshape([batch, key_heads * group, length, width])
            }
        };
        let mixed = mixed.transpose(1, 2).reshape([batch, length, -1]);
        layer.output.apply(&match ragged {
            Some(ragged) => mixed.flatten(0, 1).index_select(0, &ragged.places).unsqueeze(0),
            None => mixed,
        })
    }

    /// Root-mean-square norm over the last dimension, computed in float32.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), self.config.rms_norm_eps)
    }

    fn assemble(config: ModelConfig, mut parameters: Vec<(String, Tensor)>, device: Device, kind: Kind) -> Self {
        let joined: Vec<_> = (0..config.num_layers)
            .map(|layer| {
                let mut join = |parts: &[&str], kind: &str| {
                    let names: Vec<_> =
                        parts.iter().map(|part| format!("model.layers.{layer}.{part}_proj.{kind}")).collect();
                    join_rows(&mut parameters, &names)
                };
                let attention = ["self_attn.q", "self_attn.k", "self_attn.v"];
                (join(&attention, "weight"), join(&attention, "bias"), join(&["mlp.gate", "mlp.up"], "weight"))
            })
            .collect();
        let find =
            |name: &str| parameters.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor.shallow_clone());
        let expected =
            |found: Option<Tensor>| found.unwrap_or_else(|| unreachable!("there is every name of the config"));
        let all = |name: &str| expected(find(name));
        let layers = (0..config.num_layers)
            .zip(joined)
            .map(|(layer, (query_key_value, bias, gate_up))| {
                let name = |part: &str| format!("model.layers.{layer}.{part}");
                let linear = |part: &str| Linear {
                    weight: all(&name(&format!("{part}.weight"))),
                    bias: find(&name(&format!("{part}.bias"))),
                };
                let norm = |part: &str| all(&name(&format!("{part}.weight")));
                Layer {
                    attention_norm: norm("input_layernorm"),
                    query: linear("self_attn.q_proj"),
                    key: linear("self_attn.k_proj"),
                    value: linear("self_attn.v_proj"),
                    query_key_value: Linear { weight: expected(query_key_value), bias },
                    query_key_norm: (config.family == Family::Qwen3)
                        .then(|| (norm("self_attn.q_norm"), norm("self_attn.k_norm"))),
                    output: linear("self_attn.o_proj"),
                    feed_forward_norm: norm("post_attention_layernorm"),
                    gate: linear("mlp.gate_proj"),
                    up: linear("mlp.up_proj"),
                    gate_up: expected(gate_up),
                    down: linear("mlp.down_proj"),
                }
            })
            .collect();
        Transformer {
            rope: Rope::new(&config, device),
            embedding: all("model.embed_tokens.weight"),
            layers,
            norm: all("model.norm.weight"),
            head: find("lm_head.weight"),
            config,
            device,
            kind,
            parameters,
        }
    }
}

/// Copies some weights one under another into one tensor and makes them views of it; none where one is missing.
fn join_rows(parameters: &mut [(String, Tensor)], names: &[String]) -> Option<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let place = |name: &String| parameters.iter().position(|(other, _)| other == name);
    let places: Vec<usize> = names.iter().map(place).collect::<Option<_>>()?;
    let joined = Tensor::cat(&places.iter().map(|&place| &parameters[place].1).collect::<Vec<_>>(), 0);
    let mut first = 0;
    for place in places {
        let rows = parameters[place].1.size()[0];
        parameters[place].1 = joined.narrow(0, first, rows);
        first += rows;
    }
    Some(joined)
}

/// Attention with what is added to the scores, or plainly causal without.
fn attend(queries: &Tensor, keys: &Tensor, values: &Tensor, bias: Option<&Tensor>) -> Tensor {
    Tensor::scaled_dot_product_attention(queries, keys, values, bias, 0.0, bias.is_none(), None, false)
}

impl Linear {
    fn apply(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}
