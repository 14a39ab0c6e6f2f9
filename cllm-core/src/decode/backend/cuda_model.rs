//! A decoding step on a GPU in bf16, with kernels of our own: a ragged batch of tokens, each at a place of its own in the
//! cache. Shapes are static, so that a step can be recorded as a CUDA graph.

use tch::{Device, Kind, Tensor};

use crate::cuda::decode::{DecodeKernels, LayerCache, Places, Queries, SamplingParams};
use crate::cuda::libtorch;
use crate::cuda::nvrtc::compute_capability;
use crate::model::{Layer, SlotMove, Transformer};
use crate::{Error, Result};

/// Slots are read 32 at a time.
const CAPACITY_STEP: usize = 32;

/// A transformer's weights, the kernels for its shape and the keys and values of some rows.
pub(crate) struct Fused<'m> {
    model: &'m Transformer,
    kernels: DecodeKernels,
    /// Cosines and sines of every position.
    table: (Tensor, Tensor),
    /// `[layers, rows, kv_heads, capacity, head_dim]`
    keys: Tensor,
    /// `[layers, rows, kv_heads, head_dim, capacity]`: transposed, as the products read them.
    values: Tensor,
    capacity: usize,
}

/// How much a step holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct StepSize {
    /// Tokens, padding included.
    pub(crate) tokens: usize,
    /// So many leading tokens are followed by a prediction.
    pub(crate) outputs: usize,
    /// Tiles of queries, empty ones included.
    pub(crate) tiles: usize,
}

/// What a step is given; all of it on the model's device.
pub(crate) struct StepInput {
    /// int32 `[T]`.
    pub(crate) tokens: Tensor,
    pub(crate) places: Places,
    pub(crate) sampling: SamplingParams,
}

impl<'m> Fused<'m> {
    /// For models that the kernels can compute; `None` for others, such as one with adapters that are not merged.
    pub(crate) fn new(model: &'m Transformer, rows: usize, capacity: usize) -> Result<Option<Self>> {
        let Device::Cuda(device) = model.device() else { return Ok(None) };
        let (shape, layers) = (model.config().kernel_shape(), model.config().num_layers);
        if model.kind() != Kind::BFloat16
            || model.adapters.is_some()
            || !shape.is_supported()
            || compute_capability(device)?.0 < 8
        {
            return Ok(None);
        }
        let capacity = capacity.next_multiple_of(CAPACITY_STEP);
        let empty = |inner: [usize; 2]| {
            let [rows, heads, outer, inner] = [rows, shape.kv_heads, inner[0], inner[1]].map(|size| size as i64);
            Tensor::f_zeros([layers, rows, heads, outer, inner], (Kind::BFloat16, model.device()))
        };
        Ok(Some(Fused {
            model,
            kernels: DecodeKernels::new(device, shape)?,
            table: model.rope.angles(&Tensor::arange(capacity as i64, (Kind::Float, model.device()))),
            keys: empty([capacity, shape.head_dim])?,
            values: empty([shape.head_dim, capacity])?,
            capacity,
        }))
    }

    /// Most tokens of a tile in a step of so many tokens.
    pub(crate) fn tile(&self, tokens: usize) -> usize {
        self.kernels.shape.tile(tokens)
    }

    /// Most tokens that go through the fused kernels.
    pub(crate) fn max_fused_tokens(&self) -> usize {
        self.kernels.shape.max_fused_tokens()
    }

    /// Copies one row of the cache over another.
    pub(crate) fn copy_row(&mut self, from: usize, to: usize) {
        for cache in [&self.keys, &self.values] {
            cache.select(1, to as i64).copy_(&cache.select(1, from as i64));
        }
    }

    /// Copies keys and values between slots of the cache; all are read before any is written.
    pub(crate) fn move_slots(&mut self, moves: &[SlotMove]) {
        let [rows, from, to] = SlotMove::indices(moves, self.keys.device());
        let keys = |slots| [None, Some(&rows), None, Some(slots)];
        let values = |slots| [None, Some(&rows), None, None, Some(slots)];
        let read = (self.keys.index(&keys(&from)), self.values.index(&values(&from)));
        let _ = self.keys.index_put_(&keys(&to), &read.0, false);
        let _ = self.values.index_put_(&values(&to), &read.1, false);
    }

    /// Forwards the tokens and writes the choice after each of the leading outputs: int32 `predicted [outputs]`.
    /// With few tokens, all of them are outputs.
    pub(crate) fn step(&self, input: &StepInput, predicted: &Tensor) -> Result<()> {
        let tokens = input.tokens.numel();
        let x = self.empty(tokens, self.model.config().hidden_size)?;
        self.kernels.embed(&self.model.embedding, &input.tokens, &x)?;
        if tokens <= self.max_fused_tokens() { self.few(input, &x, predicted) } else { self.many(input, &x, predicted) }
    }

    fn few(&self, input: &StepInput, x: &Tensor, predicted: &Tensor) -> Result<()> {
        let (kernels, tokens) = (&self.kernels, input.tokens.numel());
        let heads = |count: i64| self.empty(tokens, count * self.model.config().head_dim);
        let config = self.model.config();
        let (qkv, mixed) = (heads(config.num_heads + 2 * config.num_kv_heads)?, heads(config.num_heads)?);
        let inner = self.empty(tokens, self.model.config().intermediate_size)?;
        for (index, layer) in self.model.layers.iter().enumerate() {
            let projection = (&layer.query_key_value.weight, layer.query_key_value.bias.as_ref());
            self.with_cache(index, layer, |cache| {
                let queries = kernels.fused_qkv(projection, x, &layer.attention_norm, &qkv, &input.places, cache)?;
                kernels.attention(queries, &qkv, &input.places, cache, &mixed)
            })?;
            kernels.fused_output(&layer.output.weight, &mixed, layer.output.bias.as_ref(), x)?;
            kernels.fused_gate_up(&layer.gate_up.weight, x, &layer.feed_forward_norm, &inner)?;
            kernels.fused_down(&layer.down.weight, &inner, x)?;
        }
        kernels.fused_sample(self.model.projection(), x, &self.model.norm, &input.sampling, predicted)
    }

    fn many(&self, input: &StepInput, x: &Tensor, predicted: &Tensor) -> Result<()> {
        let (kernels, tokens) = (&self.kernels, input.tokens.numel());
        let mixed = self.empty(tokens, self.model.config().num_heads * self.model.config().head_dim)?;
        let normed = self.empty(tokens, self.model.config().hidden_size)?;
        let inner = self.empty(tokens, self.model.config().intermediate_size)?;
        let mut delta: Option<Tensor> = None;
        for (index, layer) in self.model.layers.iter().enumerate() {
            kernels.add_rms_norm(x, delta.as_ref(), &layer.attention_norm, &normed)?;
            drop(delta.take());
            let projection = &layer.query_key_value;
            let qkv = normed.f_linear(&projection.weight, projection.bias.as_ref())?;
            self.with_cache(index, layer, |cache| {
                kernels.attention(Queries::Plain, &qkv, &input.places, cache, &mixed)
            })?;
            let attended = mixed.f_linear(&layer.output.weight, layer.output.bias.as_ref())?;
            kernels.add_rms_norm(x, Some(&attended), &layer.feed_forward_norm, &normed)?;
            drop(attended);
            let both = normed.f_linear::<&Tensor>(&layer.gate_up.weight, None)?;
            kernels.swiglu(&both, &inner)?;
            drop(both);
            delta = Some(inner.f_linear::<&Tensor>(&layer.down.weight, None)?);
        }
        let outputs = predicted.numel() as i64;
        if outputs == 0 {
            return Ok(());
        }
        let leading = |tensor: &Tensor| tensor.narrow(0, 0, outputs);
        let last = delta.as_ref().map(leading);
        let normed = leading(&normed);
        kernels.add_rms_norm(&leading(x), last.as_ref(), &self.model.norm, &normed)?;
        let logits = libtorch::matmul_float32(&normed, self.model.projection())?;
        kernels.sample(&logits, &input.sampling, predicted)
    }

    fn with_cache(&self, index: usize, layer: &Layer, work: impl FnOnce(&LayerCache<'_>) -> Result<()>) -> Result<()> {
        work(&LayerCache {
            keys: &self.keys.get(index as i64),
            values: &self.values.get(index as i64),
            capacity: self.capacity,
            table: &self.table,
            norms: layer.query_key_norm.as_ref(),
        })
    }

    fn empty(&self, tokens: usize, width: i64) -> Result<Tensor> {
        Tensor::f_empty([tokens as i64, width], (Kind::BFloat16, self.model.device())).map_err(Error::from)
    }
}
