//! A training pass on a GPU in bf16: every layer forward and backward by hand, with kernels of our own, so that only what the
//! backward needs is kept and gradients are added to where they belong by the products themselves.

use tch::{Device, Kind, Tensor};

use super::packed_batch::PackedBatch;
use crate::Result;
use crate::cuda::attention::{AttentionKernels, AttentionMask};
use crate::cuda::nvrtc::{compute_capability, max_shared_bytes};
use crate::cuda::train::TrainKernels;
use crate::model::{Layer, Linear, ModelConfig, Transformer};

/// A stream and the kernels for the model that it is made for.
pub(crate) struct CudaBatch {
    kernels: TrainKernels,
    attention: AttentionKernels,
    sight: AttentionMask,
    /// int64 `[tokens]`, padding included.
    tokens: Tensor,
    /// Cosines and sines of each token, float32 `[tokens, head_dim / 2]`.
    angles: (Tensor, Tensor),
    /// Tokens without the padding.
    length: i64,
}

/// What the backward of a layer needs; `[tokens, ..]` each.
struct Kept {
    x: Tensor,
    normed: Tensor,
    /// Queries and keys rotated.
    qkv: Tensor,
    mixed: Tensor,
    log_sums: Tensor,
    attended: Tensor,
    attended_normed: Tensor,
    gate_up: Tensor,
}

/// What the backward of the whole needs.
pub(crate) struct FusedPass {
    /// Inputs of the leading layers, which are computed again.
    inputs: Vec<Tensor>,
    kept: Vec<Kept>,
    last: Tensor,
}

impl CudaBatch {
    /// `None` for models that the kernels cannot compute.
    pub(crate) fn new(stream: &PackedBatch, model: &Transformer) -> Result<Option<Self>> {
        let Device::Cuda(device) = model.device() else { return Ok(None) };
        let shape = model.config().kernel_shape();
        let room = max_shared_bytes(compute_capability(device)?);
        if model.kind() != Kind::BFloat16
            || !TrainKernels::supports(&shape)
            || room < AttentionKernels::shared_bytes(&shape)
        {
            return Ok(None);
        }
        let mut padded = stream.clone();
        let length = stream.tokens.len();
        padded.push_causal(&vec![0; length.next_multiple_of(AttentionKernels::TILE) - length]);
        let numbers = |ids: &[i32]| Tensor::from_slice(ids).to_device(model.device()).to_kind(Kind::Int64);
        Ok(Some(CudaBatch {
            kernels: TrainKernels::new(device, shape)?,
            sight: AttentionMask::new(&padded.attention_ranges, model.device()),
            attention: AttentionKernels::new(device, shape)?,
            tokens: numbers(&padded.tokens),
            angles: model.rope.angles(&numbers(&padded.positions)),
            length: length as i64,
        }))
    }

    pub(crate) fn kernels(&self) -> &TrainKernels {
        &self.kernels
    }

    /// Final hidden states `[tokens, hidden]`, and what the backward needs where the leading `recomputed` layers are computed
    /// again; nothing without.
    pub(crate) fn forward(&self, model: &Transformer, recomputed: Option<usize>) -> Result<(Tensor, FusedPass)> {
        let _no_grad = tch::no_grad_guard();
        let mut x = model.embedding.f_index_select(0, &self.tokens)?;
        let (mut inputs, mut all) = (Vec::new(), Vec::new());
        for (index, layer) in model.layers.iter().enumerate() {
            let (kept, output) = self.layer(layer, x)?;
            x = output;
            match recomputed {
                None => {}
                Some(recomputed) if index < recomputed => inputs.push(kept.x),
                Some(_) => all.push(kept),
            }
        }
        let hidden = self.kernels.rms_norm(&x, &model.norm)?.f_narrow(0, 0, self.length)?;
        Ok((hidden, FusedPass { inputs, kept: all, last: x }))
    }

    fn layer(&self, layer: &Layer, x: Tensor) -> Result<(Kept, Tensor)> {
        let normed = self.kernels.rms_norm(&x, &layer.attention_norm)?;
        let qkv = layer.query_key_value.apply(&normed);
        self.kernels.rotate(&qkv, (&self.angles.0, &self.angles.1), false)?;
        let (mixed, log_sums) = self.attention.forward(&qkv, &self.sight)?;
        let attended = layer.output.add_to(&x, &mixed)?;
        let attended_normed = self.kernels.rms_norm(&attended, &layer.feed_forward_norm)?;
        let gate_up = layer.gate_up.apply(&attended_normed);
        let output = layer.down.add_to(&attended, &self.kernels.swiglu(&gate_up)?)?;
        Ok((Kept { x, normed, qkv, mixed, log_sums, attended, attended_normed, gate_up }, output))
    }

    /// Adds to the gradients of the weights what follows from that of the hidden states.
    pub(crate) fn backward(&self, model: &Transformer, pass: FusedPass, gradient: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let FusedPass { mut inputs, mut kept, last } = pass;
        let padding = self.tokens.numel() as i64 - self.length;
        let gradient = gradient.f_constant_pad_nd([0, 0, 0, padding])?;
        let d_x = gradient.f_zeros_like()?;
        self.norm_backward(&last, &model.norm, &gradient, &d_x)?;
        drop((gradient, last));
        for layer in model.layers.iter().rev() {
            let kept = match (kept.pop(), inputs.pop()) {
                (Some(kept), input) => {
                    inputs.extend(input);
                    kept
                }
                (None, Some(input)) => self.layer(layer, input)?.0,
                (None, None) => unreachable!("every layer left something"),
            };
            self.layer_backward(layer, kept, &d_x)?;
        }
        if model.embedding.requires_grad() {
            let rows = model.embedding.size()[0];
            let added = Tensor::f_embedding_dense_backward(&d_x, &self.tokens, rows, -1, false)?;
            let _ = model.embedding.grad().f_add_(&added)?;
        }
        Ok(())
    }

    /// `d_x` comes as the gradient of the layer's output and becomes that of its input.
    fn layer_backward(&self, layer: &Layer, kept: Kept, d_x: &Tensor) -> Result<()> {
        let Kept { x, normed, qkv, mixed, log_sums, attended, attended_normed, gate_up } = kept;
        let d_inner = layer.down.input_gradient(d_x)?;
        self.kernels.swiglu_backward(&gate_up, &d_inner)?;
        // What was the gradient of the product is now the product.
        let (d_gate_up, inner) = (gate_up, d_inner);
        layer.down.collect(&inner, d_x)?;
        drop(inner);
        let d_normed = layer.gate_up.input_gradient(&d_gate_up)?;
        layer.gate_up.collect(&attended_normed, &d_gate_up)?;
        drop((d_gate_up, attended_normed));
        self.norm_backward(&attended, &layer.feed_forward_norm, &d_normed, d_x)?;
        drop((d_normed, attended));
        let d_mixed = layer.output.input_gradient(d_x)?;
        layer.output.collect(&mixed, d_x)?;
        let d_qkv = self.attention.backward(&qkv, &mixed, &log_sums, &d_mixed, &self.sight)?;
        drop((qkv, mixed, d_mixed));
        self.kernels.rotate(&d_qkv, (&self.angles.0, &self.angles.1), true)?;
        let d_normed = layer.query_key_value.input_gradient(&d_qkv)?;
        layer.query_key_value.collect(&normed, &d_qkv)?;
        self.norm_backward(&x, &layer.attention_norm, &d_normed, d_x)
    }

    fn norm_backward(&self, x: &Tensor, weight: &Tensor, d_out: &Tensor, d_x: &Tensor) -> Result<()> {
        let d_weight = self.kernels.rms_norm_backward(x, weight, d_out, d_x)?;
        if weight.requires_grad() {
            let _ = weight.grad().f_add_(&d_weight)?;
        }
        Ok(())
    }
}

/// Whether there are kernels of our own to train it in bf16, on a GPU that has room for them.
pub fn has_kernels(config: &ModelConfig) -> bool {
    TrainKernels::supports(&config.kernel_shape())
}

/// Adds to the gradient of the output projection what follows from that of the logits `[rows, vocab]` of some hidden states
/// `[rows, hidden]`; theirs is returned.
///
/// # Errors
/// [`crate::Error::Torch`], such as memory that ran out.
pub fn project_backward(model: &Transformer, hidden: &Tensor, d_logits: &Tensor) -> Result<Tensor> {
    let projection = Linear { weight: model.projection().shallow_clone(), bias: None, adapters: Vec::new() };
    projection.collect(hidden, d_logits)?;
    projection.input_gradient(d_logits)
}
impl Linear {
    /// `x` + the projection of `input`.
    fn add_to(&self, x: &Tensor, input: &Tensor) -> Result<Tensor> {
        let sum = x.f_addmm(input, &self.weight.f_tr()?)?;
        for adapter in &self.adapters {
            let _ = adapter.of(&sum, 1).f_add_(&adapter.apply(input))?;
        }
        Ok(match &self.bias {
            Some(bias) => sum.f_add(bias)?,
            None => sum,
        })
    }

    /// The gradient of the input from that of the output.
    fn input_gradient(&self, d_output: &Tensor) -> Result<Tensor> {
        let d_input = d_output.f_mm(&self.weight)?;
        for adapter in &self.adapters {
            let d_thin = adapter.of(d_output, 1).f_mm(&adapter.up)? * adapter.scale;
            let _ = d_input.shallow_clone().f_addmm_(&d_thin, &adapter.down)?;
        }
        Ok(d_input)
    }

    /// Adds to the gradients of the weights, where they collect any.
    fn collect(&self, input: &Tensor, d_output: &Tensor) -> Result<()> {
        if self.weight.requires_grad() {
            let _ = self.weight.grad().f_addmm_(&d_output.f_tr()?, input)?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.requires_grad()) {
            let _ = bias.grad().f_add_(&d_output.f_sum_dim_intlist(0, false, Kind::Float)?)?;
        }
        for adapter in self.adapters.iter().filter(|adapter| adapter.up.requires_grad()) {
            let own = adapter.of(d_output, 1) * adapter.scale;
            let _ = adapter.up.grad().f_addmm_(&own.f_tr()?, &input.f_mm(&adapter.down.f_tr()?)?)?;
            let _ = adapter.down.grad().f_addmm_(&own.f_mm(&adapter.up)?.f_tr()?, input)?;
        }
        Ok(())
    }
}
