//! A transformer's forward on a GPU in bfloat16, made of our own kernels, with a KV cache of its
//! own. Tokens of different sequences are packed into one ragged batch, each with a slot and a
//! position of its own. Shapes are static, so that a forward can be captured as a CUDA graph.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::cuda::decode::{self, DecodeKernels, LayerCache, Queries};
use crate::cuda::draft_adapters::{self, AdapterRanks, DraftAdapters, LayerAdapters};
use crate::cuda::forward_input::{ForwardInput, ForwardShape, InitialRows, InputLimits, SharedShape};
use crate::cuda::layer_products::{LayerProducts, Part, ProductAdapters, ProductWeights};
use crate::cuda::nvrtc::compute_capability;
use crate::cuda::shape::KernelShape;
use crate::cuda::slot_moves::SlotMoves;
use crate::cuda::tiles;
use crate::model::{Layer, Linear, ModelConfig, SlotCopy, SlotMove, Transformer};
use crate::{Error, Result};

/// Older GPUs lack bfloat16 arithmetic in their tensor cores.
const MIN_COMPUTE_CAPABILITY: u32 = 8;

/// Whether our kernels decode a model with weights of this type, on GPUs of compute capability 8.0 or
/// later, and not libtorch's operations.
pub fn has_kernels(config: &ModelConfig, kind: Kind) -> bool {
    kind == Kind::BFloat16 && decode::supports(&config.kernel_shape())
}

pub(super) struct CudaModel<'m> {
    model: &'m Transformer,
    /// Of every layer, if there are adapters for drafts.
    adapters: Option<Vec<LayerAdapters>>,
    /// Number of shared layers without adapters, if later ones have adapters for drafts.
    num_shared_layers: usize,
    kernels: DecodeKernels,
    /// If the GPU supports them and the model has the whole device.
    products: Option<LayerProducts>,
    shape: KernelShape,
    /// Cosines and sines of every position.
    rope_table: (Tensor, Tensor),
    /// `[layers, rows, kv_heads, capacity, head_dim]`
    keys: Tensor,
    /// `[layers, rows, kv_heads, head_dim, capacity]`: transposed, as the attention kernel
    /// multiplies them.
    values: Tensor,
}

/// The residual stream after some layers: `x + delta`, each `[T, hidden]`.
struct Residual {
    x: Tensor,
    /// What the next norm adds to `x`, if anything.
    delta: Option<Tensor>,
}

impl<'m> CudaModel<'m> {
    /// Returns `None` for models that the kernels do not support, such as those with adapters for all
    /// tokens that are not merged.
    ///
    /// With `whole_device`, kernels may occupy all multiprocessors and wait for their own blocks.
    /// Two such kernels at a time could each keep the other's blocks out and wait for ever, so of
    /// models whose forwards overlap only one has it.
    pub(super) fn new(
        model: &'m Transformer,
        num_rows: usize,
        capacity: usize,
        whole_device: bool,
    ) -> Result<Option<Self>> {
        let Device::Cuda(device) = model.device() else { return Ok(None) };
        let (shape, num_layers) = (model.config().kernel_shape(), model.layers.len());
        if !has_kernels(model.config(), model.kind())
            || model.adapters().is_some_and(|_| !model.adapts_drafts())
            || model.is_quantized()
            || compute_capability(device)?.0 < MIN_COMPUTE_CAPABILITY
        {
            return Ok(None);
        }
        let capacity = capacity.next_multiple_of(tiles::SLOTS_PER_READ);
        let zeros = |inner: [usize; 2]| {
            let [rows, kv_heads, outer, inner] = [num_rows, shape.kv_heads, inner[0], inner[1]].map(|size| size as i64);
            Tensor::f_zeros([num_layers as i64, rows, kv_heads, outer, inner], (Kind::BFloat16, model.device()))
        };
        let adapters = model.adapts_drafts().then(|| model.layers.iter().map(layer_adapters).collect::<Result<_>>());
        let adapters: Option<Vec<LayerAdapters>> = adapters.transpose()?;
        let num_shared_layers = model.first_adapted_layer();
        let ranks = adapters.as_ref().map_or(AdapterRanks::default(), |layers| layers[num_shared_layers].ranks());
        Ok(Some(CudaModel {
            model,
            adapters,
            num_shared_layers,
            kernels: DecodeKernels::new(device, shape, ranks)?,
            products: if whole_device { LayerProducts::new(device, shape, ranks, num_layers)? } else { None },
            shape,
            rope_table: model.rope.cos_sin(&Tensor::arange(capacity as i64, (Kind::Float, model.device()))),
            keys: zeros([capacity, shape.head_dim])?,
            values: zeros([shape.head_dim, capacity])?,
        }))
    }

    /// Upper bounds of the indices in a forward's input.
    pub(super) fn input_limits(&self) -> InputLimits {
        let size = |dimension| self.keys.size()[dimension] as usize;
        InputLimits { model: self.shape, num_rows: size(1), capacity: size(3) }
    }

    /// Maximum number of tiles of the attention, in a forward of `num_tokens`.
    pub(super) fn max_tiles(&self, num_tokens: usize) -> usize {
        tiles::max_tiles(&self.shape, num_tokens, self.input_limits().num_rows)
    }

    /// Maximum number of tokens of a forward that samples after all of them, windows or not.
    pub(super) fn max_sampled_tokens(&self) -> usize {
        decode::max_sampled_tokens(&self.shape)
    }

    /// The sizes of the shared layers, for so many tokens without those that have adapters; `None` if
    /// all layers have adapters.
    pub(super) fn shared_shape(&self, num_tokens: usize) -> Option<SharedShape> {
        let num_tiles = self.max_tiles(num_tokens);
        (self.num_shared_layers > 0).then_some(SharedShape { num_tokens, num_tiles })
    }

    /// Whether a forward has kernels that occupy all multiprocessors and wait for their own blocks.
    pub(super) fn occupies_device(&self, shape: ForwardShape) -> bool {
        let shared = shape.shared.map(|shared| shared.num_tokens);
        [Some(shape.num_tokens), shared].into_iter().flatten().any(|num_tokens| self.products_for(num_tokens).is_some())
    }

    /// The kernels for all products between two attentions, if they are the fastest.
    fn products_for(&self, num_tokens: usize) -> Option<&LayerProducts> {
        self.products.as_ref().filter(|products| products.are_fastest(num_tokens))
    }

    /// Copies a row of the cache over another.
    pub(super) fn copy_row(&mut self, from: usize, to: usize) {
        for cache in [&self.keys, &self.values] {
            cache.select(1, to as i64).copy_(&cache.select(1, from as i64));
        }
    }

    /// Copies slots of a row to another row.
    pub(super) fn copy_slots(&mut self, copy: &SlotCopy) {
        for (cache, slot_dimension) in [(&self.keys, 2), (&self.values, 3)] {
            copy.apply(&cache.transpose(0, 1), slot_dimension);
        }
    }

    /// Moves keys and values to other slots of the cache.
    pub(super) fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        let moves = moves.iter().map(|slot| (slot.row, slot.from, slot.to));
        let moves = SlotMoves::new(moves, self.input_limits(), self.keys.device())?;
        self.kernels.move_slots(&moves, &self.keys, &self.values)
    }

    /// Forwards the tokens, writes their keys and values into the cache, and samples a token after
    /// each of the leading outputs, or gives the candidates there: int32 `results [outputs x
    /// ints_per_output]`. The fused kernels sample after every token.
    pub(super) fn forward(&self, input: &ForwardInput, results: &Tensor) -> Result<()> {
        let (first, end) = (self.num_shared_layers, self.model.layers.len());
        let embeddings = |input| ForwardInput::embeddings(input, &self.model.embed_tokens);
        let residual = match input.shared() {
            None if first > 0 && input.shape().has_adapted => {
                return Err(Error::internal("the shared layers have no input"));
            }
            None => self.forward_layers(0..end, input, embeddings(input))?,
            Some(shared) => {
                let x = self.forward_layers(0..first, shared, embeddings(shared))?.sum()?;
                self.forward_layers(first..end, input, input.rows_of_shared(&x))?
            }
        };
        match residual {
            Residual { x, delta: None } => self.sample_few(&x, input, results),
            Residual { x, delta } => self.sample(&x, delta.as_ref(), input, results),
        }
    }

    /// Some layers, with the kernels that are fastest for as many tokens. The residual stream begins
    /// with `rows`.
    fn forward_layers(&self, layers: Range<usize>, input: &ForwardInput, rows: InitialRows<'_>) -> Result<Residual> {
        let num_tokens = input.shape().num_tokens;
        if let Some(products) = self.products_for(num_tokens) {
            let x = self.forward_with_products(products, layers, input, rows)?;
            return Ok(Residual { x, delta: None });
        }
        let x = self.empty(num_tokens, self.model.config().hidden_size)?;
        self.kernels.begin(rows, input, &x)?;
        if num_tokens <= decode::max_fused_tokens(&self.shape) {
            self.forward_fused(layers, input, &x)?;
            return Ok(Residual { x, delta: None });
        }
        let delta = self.forward_with_cublas(layers, input, &x)?;
        Ok(Residual { x, delta })
    }

    /// Only the attention of every layer, for queries, keys and values `qkv [T, ...]` that are not
    /// rotated yet.
    pub(super) fn attention_alone(&self, input: &ForwardInput, qkv: &Tensor, attn_out: &Tensor) -> Result<()> {
        self.model.layers.iter().enumerate().try_for_each(|(index, layer)| {
            self.with_cache(index, layer, |cache| self.kernels.attention(Queries::Plain, qkv, input, cache, attn_out))
        })
    }

    /// With few tokens, reading the weights dominates the time. Kernels that fuse norms,
    /// projections and activations read them fastest.
    fn forward_fused(&self, layers: Range<usize>, input: &ForwardInput, x: &Tensor) -> Result<()> {
        let (kernels, config, num_tokens) = (&self.kernels, self.model.config(), input.shape().num_tokens);
        let heads = |num_heads: i64| self.empty(num_tokens, num_heads * config.head_dim);
        let (qkv, attn_out) = (heads(config.num_heads + 2 * config.num_kv_heads)?, heads(config.num_heads)?);
        let inner = self.empty(num_tokens, config.intermediate_size)?;
        for index in layers {
            let (layer, adapters) = (&self.model.layers[index], self.adapters(index, input));
            let projection = (&layer.qkv_proj.weight, layer.qkv_proj.bias.as_ref(), adapters.qkv);
            self.with_cache(index, layer, |cache| {
                let queries = kernels.fused_qkv(projection, (x, &layer.input_layernorm), &qkv, input, cache)?;
                kernels.attention(queries, &qkv, input, cache, &attn_out)
            })?;
            let projection = (&layer.o_proj.weight, layer.o_proj.bias.as_ref(), adapters.output);
            kernels.fused_output(projection, &attn_out, x, input)?;
            let projection = (&layer.gate_up_proj.weight, adapters.gate_up);
            kernels.fused_gate_up(projection, (x, &layer.post_attention_layernorm), &inner, input)?;
            kernels.fused_down((&layer.down_proj.weight, adapters.down), &inner, x, input)?;
        }
        Ok(())
    }

    /// With up to some dozens of tokens, reading the weights dominates the time. One kernel for all
    /// products between two attentions reads them almost without a pause.
    fn forward_with_products(
        &self,
        products: &LayerProducts,
        Range { start, end }: Range<usize>,
        input: &ForwardInput,
        rows: InitialRows<'_>,
    ) -> Result<Tensor> {
        let layers = &self.model.layers;
        let activations = products.activations(input.shape().num_tokens)?;
        products.begin(rows, &layers[start].input_layernorm, input, &activations)?;
        for index in start..=end {
            let (last, next) = (index.saturating_sub(1).max(start), index.min(end - 1));
            let (before, after) = (&layers[last], &layers[next]);
            let part = match index {
                _ if index == start => Part::First,
                _ if index == end => Part::Last,
                _ => Part::Middle,
            };
            let weights = ProductWeights {
                output: (&before.o_proj.weight, before.o_proj.bias.as_ref()),
                post_norm: &before.post_attention_layernorm,
                gate_up: &before.gate_up_proj.weight,
                down: &before.down_proj.weight,
                next_norm: if part == Part::Last { &self.model.norm } else { &after.input_layernorm },
                qkv: (&after.qkv_proj.weight, after.qkv_proj.bias.as_ref()),
                adapters: ProductAdapters { qkv: self.adapters(next, input).qkv, ..self.adapters(last, input) },
            };
            products.multiply((index - start, part), &weights, input, &activations)?;
            if part != Part::Last {
                let (qkv, attn_out) = (&activations.qkv, &activations.attn_out);
                self.with_cache(index, after, |cache| {
                    self.kernels.attention(Queries::Plain, qkv, input, cache, attn_out)
                })?;
            }
        }
        Ok(activations.x)
    }

    /// With more tokens, the matrix products dominate the time, and cuBLAS computes them fastest.
    /// Returns the output of the last layer, which has to be added to `x`.
    fn forward_with_cublas(&self, layers: Range<usize>, input: &ForwardInput, x: &Tensor) -> Result<Option<Tensor>> {
        let (kernels, config, num_tokens) = (&self.kernels, self.model.config(), input.shape().num_tokens);
        let attn_out = self.empty(num_tokens, config.num_heads * config.head_dim)?;
        let normed = self.empty(num_tokens, config.hidden_size)?;
        let inner = self.empty(num_tokens, config.intermediate_size)?;
        let is_draft = input.shape().has_adapted.then(|| draft_adapters::is_draft(input)).transpose()?;
        let project = |linear: &Linear, adapters: Option<&DraftAdapters>, x: &Tensor| {
            let product = x.f_linear(&linear.weight, linear.bias.as_ref())?;
            if let Some((adapters, is_draft)) = adapters.zip(is_draft.as_ref()) {
                adapters.add_to(&product, x, is_draft)?;
            }
            Ok::<_, Error>(product)
        };
        // The output of the previous layer. The next norm adds it to `x`.
        let mut delta: Option<Tensor> = None;
        for index in layers {
            let (layer, adapters) = (&self.model.layers[index], self.adapters(index, input));
            kernels.add_rms_norm(x, delta.as_ref(), &layer.input_layernorm, &normed)?;
            drop(delta.take());
            let qkv = project(&layer.qkv_proj, adapters.qkv, &normed)?;
            self.with_cache(index, layer, |cache| kernels.attention(Queries::Plain, &qkv, input, cache, &attn_out))?;
            let projected = project(&layer.o_proj, adapters.output, &attn_out)?;
            kernels.add_rms_norm(x, Some(&projected), &layer.post_attention_layernorm, &normed)?;
            drop(projected);
            let gate_up = (&layer.gate_up_proj.weight, adapters.gate_up);
            kernels.gate_up(gate_up, &normed, &inner, is_draft.as_ref())?;
            delta = Some(project(&layer.down_proj, adapters.down, &inner)?);
        }
        Ok(delta)
    }

    /// The adapters of a layer, if the forward has tokens that are read with them.
    fn adapters(&self, layer: usize, input: &ForwardInput) -> ProductAdapters<'_> {
        let layers = self.adapters.as_ref().filter(|_| input.shape().has_adapted);
        layers.map_or_else(ProductAdapters::default, |layers| {
            let LayerAdapters { qkv, output, gate_up, down } = &layers[layer];
            let [qkv, output, gate_up, down] = [qkv, output, gate_up, down].map(Option::as_ref);
            ProductAdapters { qkv, output, gate_up, down }
        })
    }

    /// Samples after the leading tokens of `x [T, hidden]`: after all if they are few. The fused kernels
    /// have a few logits of the vocabulary each, which is not enough for a nucleus.
    fn sample_few(&self, x: &Tensor, input: &ForwardInput, results: &Tensor) -> Result<()> {
        if input.shape().num_tokens > self.max_sampled_tokens() || input.sampling().has_nucleus {
            return self.sample(x, None, input, results);
        }
        self.kernels.fused_sample(self.model.lm_head(), x, &self.model.norm, input, results)
    }

    /// Samples after the leading tokens of `x + delta`, `[T, hidden]`.
    fn sample(&self, x: &Tensor, delta: Option<&Tensor>, input: &ForwardInput, results: &Tensor) -> Result<()> {
        let num_outputs = input.shape().num_outputs;
        if num_outputs == 0 {
            return Ok(());
        }
        let leading = |tensor: &Tensor| tensor.narrow(0, 0, num_outputs as i64);
        let normed = self.empty(num_outputs, self.model.config().hidden_size)?;
        self.kernels.add_rms_norm(&leading(x), delta.map(leading).as_ref(), &self.model.norm, &normed)?;
        self.kernels.sample(self.model.lm_head(), &normed, input, results)
    }

    fn with_cache(&self, index: usize, layer: &Layer, work: impl FnOnce(&LayerCache<'_>) -> Result<()>) -> Result<()> {
        work(&LayerCache {
            keys: &self.keys.get(index as i64),
            values: &self.values.get(index as i64),
            rope_table: &self.rope_table,
            norms: layer.qk_norm.as_ref(),
            sliding_window: layer.sliding_window,
        })
    }

    fn empty(&self, num_tokens: usize, width: i64) -> Result<Tensor> {
        Tensor::f_empty([num_tokens as i64, width], (Kind::BFloat16, self.model.device())).map_err(Error::from)
    }
}

impl Residual {
    fn sum(self) -> Result<Tensor> {
        if let Some(delta) = &self.delta {
            let _ = self.x.shallow_clone().f_add_(delta)?;
        }
        Ok(self.x)
    }
}

/// The adapters of a layer as the kernels multiply with them.
fn layer_adapters(layer: &Layer) -> Result<LayerAdapters> {
    let adapters = |linear: &Linear| {
        let joined = linear.adapters.as_ref().map(|adapters| {
            let (lora_a, lora_b) =
                adapters.as_one(linear.weight.size()[0], linear.weight.kind(), draft_adapters::RANK_MULTIPLE)?;
            Ok::<_, Error>(DraftAdapters { lora_a, lora_b })
        });
        joined.transpose()
    };
    Ok(LayerAdapters {
        qkv: adapters(&layer.qkv_proj)?,
        output: adapters(&layer.o_proj)?,
        gate_up: adapters(&layer.gate_up_proj)?,
        down: adapters(&layer.down_proj)?,
    })
}
