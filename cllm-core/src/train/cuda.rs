//! The training pass on a GPU in bf16: forward and backward of every layer by hand, with kernels of
//! our own.
//!
//! Only the tensors that the backward needs are saved, and matrix products accumulate directly into
//! the buffer of the gradients.

use tch::{Device, Kind, Tensor};

use super::packed_batch::PackedBatch;
use crate::Result;
use crate::cuda::attention::{AttentionKernels, AttentionMask};
use crate::cuda::nvrtc::compute_capability;
use crate::cuda::train::TrainKernels;
use crate::model::{Layer, Linear, ModelConfig, PerWindow, Transformer};

/// Whether our own kernels can train a model of this configuration, in bf16 on a GPU with enough
/// shared memory.
pub fn has_kernels(config: &ModelConfig) -> bool {
    TrainKernels::supports(&config.kernel_shape())
}

/// A batch on the GPU, padded to whole tiles of attention, and the kernels for its model.
pub(super) struct CudaBatch {
    kernels: TrainKernels,
    attention: AttentionKernels,
    attention_masks: PerWindow<AttentionMask>,
    /// int64 `[tokens]`, padding included.
    tokens: Tensor,
    /// Cosines and sines of each token, float32 `[tokens, head_dim / 2]`.
    cos_sin: (Tensor, Tensor),
    /// Number of tokens without the padding.
    num_tokens: i64,
}

/// Saved activations of a layer, `[tokens, ..]` each.
struct SavedActivations {
    input: Tensor,
    /// After the first norm.
    attn_input: Tensor,
    /// With RoPE applied to queries and keys.
    qkv: Tensor,
    attn_out: Tensor,
    /// Of the attention scores, to base 2.
    logsumexp: Tensor,
    /// The residual stream between attention and feed-forward.
    residual: Tensor,
    /// After the second norm.
    mlp_input: Tensor,
    gate_up: Tensor,
}

/// Saved activations of the whole model.
pub(super) struct CudaPass<'p> {
    model: &'p Transformer,
    batch: &'p CudaBatch,
    /// Inputs of the checkpointed layers.
    checkpoints: Vec<Tensor>,
    /// Of the layers after those.
    saved: Vec<SavedActivations>,
    /// Output of the last layer.
    last: Tensor,
}

impl CudaBatch {
    /// `None` for models and GPUs that the kernels do not support.
    pub(super) fn new(batch: &PackedBatch, model: &Transformer) -> Result<Option<Self>> {
        let Device::Cuda(device) = model.device() else { return Ok(None) };
        let shape = model.config().kernel_shape();
        if model.kind() != Kind::BFloat16
            || !TrainKernels::supports(&shape)
            || !AttentionKernels::supports(&shape, compute_capability(device)?)
        {
            return Ok(None);
        }
        let num_tokens = batch.tokens.len();
        let mut padded = batch.clone();
        padded.push_causal(&vec![0; num_tokens.next_multiple_of(AttentionKernels::TILE) - num_tokens]);
        let to_device = |ids: &[i32]| Tensor::from_slice(ids).to_device(model.device()).to_kind(Kind::Int64);
        let attention = AttentionKernels::new(device, shape)?;
        let mask = |window| attention.mask(&padded.ranges_within(window));
        Ok(Some(CudaBatch {
            kernels: TrainKernels::new(device, shape)?,
            attention_masks: PerWindow::new(model.config(), mask).transpose()?,
            attention,
            tokens: to_device(&padded.tokens),
            cos_sin: model.rope.cos_sin(&to_device(&padded.positions)),
            num_tokens: num_tokens as i64,
        }))
    }

    pub(super) fn kernels(&self) -> &TrainKernels {
        &self.kernels
    }

    /// Final hidden states `[tokens, hidden]`.
    pub(super) fn forward<'p>(
        &'p self,
        model: &'p Transformer,
        checkpointed_layers: usize,
    ) -> Result<(Tensor, CudaPass<'p>)> {
        let _no_grad = tch::no_grad_guard();
        let mut x = self.embed(model)?;
        let (mut checkpoints, mut saved) = (Vec::new(), Vec::new());
        for (index, layer) in model.layers.iter().enumerate() {
            let (output, activations) = self.layer_forward(layer, x)?;
            x = output;
            if index < checkpointed_layers { checkpoints.push(activations.input) } else { saved.push(activations) }
        }
        let hidden = self.final_norm(model, &x)?;
        Ok((hidden, CudaPass { model, batch: self, checkpoints, saved, last: x }))
    }

    /// Like [`Self::forward`], but saves nothing for a backward.
    pub(super) fn hidden_states(&self, model: &Transformer) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let mut x = self.embed(model)?;
        for layer in &model.layers {
            x = self.layer_forward(layer, x)?.0;
        }
        self.final_norm(model, &x)
    }

    fn embed(&self, model: &Transformer) -> Result<Tensor> {
        Ok(model.embed_tokens.f_index_select(0, &self.tokens)?)
    }

    fn final_norm(&self, model: &Transformer, x: &Tensor) -> Result<Tensor> {
        Ok(self.kernels.rms_norm(x, &model.norm)?.f_narrow(0, 0, self.num_tokens)?)
    }

    fn layer_forward(&self, layer: &Layer, input: Tensor) -> Result<(Tensor, SavedActivations)> {
        let attn_input = self.kernels.rms_norm(&input, &layer.input_layernorm)?;
        let qkv = layer.qkv_proj.forward(&attn_input);
        self.kernels.rotate(&qkv, (&self.cos_sin.0, &self.cos_sin.1), false)?;
        let (attn_out, logsumexp) = self.attention.forward(&qkv, self.attention_masks.get(layer.sliding_window))?;
        let residual = layer.o_proj.forward_add(&input, &attn_out)?;

        let mlp_input = self.kernels.rms_norm(&residual, &layer.post_attention_layernorm)?;
        let gate_up = layer.gate_up_proj.forward(&mlp_input);
        let output = layer.down_proj.forward_add(&residual, &self.kernels.swiglu(&gate_up)?)?;

        Ok((output, SavedActivations { input, attn_input, qkv, attn_out, logsumexp, residual, mlp_input, gate_up }))
    }

    /// `d_x` is the gradient of the layer's output and becomes, in place, that of its input.
    /// Tensors are dropped as soon as they are no longer needed.
    fn layer_backward(&self, layer: &Layer, saved: SavedActivations, d_x: &Tensor) -> Result<()> {
        let SavedActivations { input, attn_input, qkv, attn_out, logsumexp, residual, mlp_input, gate_up } = saved;

        let d_activated = layer.down_proj.backward_input(d_x)?;
        self.kernels.swiglu_backward(&gate_up, &d_activated)?;
        // The kernel worked in place: it left the gradient of gate and up, and their product.
        let (d_gate_up, activated) = (gate_up, d_activated);
        layer.down_proj.backward_weights(&activated, d_x)?;
        drop(activated);
        let d_mlp_input = layer.gate_up_proj.backward_input(&d_gate_up)?;
        layer.gate_up_proj.backward_weights(&mlp_input, &d_gate_up)?;
        drop((d_gate_up, mlp_input));
        self.norm_backward(&residual, &layer.post_attention_layernorm, &d_mlp_input, d_x)?;
        drop((d_mlp_input, residual));

        let d_attn_out = layer.o_proj.backward_input(d_x)?;
        layer.o_proj.backward_weights(&attn_out, d_x)?;
        let mask = self.attention_masks.get(layer.sliding_window);
        let d_qkv = self.attention.backward(&qkv, &attn_out, &logsumexp, &d_attn_out, mask)?;
        drop((qkv, attn_out, d_attn_out));
        self.kernels.rotate(&d_qkv, (&self.cos_sin.0, &self.cos_sin.1), true)?;
        let d_attn_input = layer.qkv_proj.backward_input(&d_qkv)?;
        layer.qkv_proj.backward_weights(&attn_input, &d_qkv)?;
        self.norm_backward(&input, &layer.input_layernorm, &d_attn_input, d_x)
    }

    /// Adds to `d_x` the gradient of the norm's input `x`, and to the gradient of its weight.
    fn norm_backward(&self, x: &Tensor, weight: &Tensor, d_out: &Tensor, d_x: &Tensor) -> Result<()> {
        let d_weight = self.kernels.rms_norm_backward(x, weight, d_out, d_x)?;
        if weight.requires_grad() {
            let _ = weight.grad().f_add_(&d_weight)?;
        }
        Ok(())
    }
}

impl CudaPass<'_> {
    pub(super) fn backward(self, d_hidden: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let CudaPass { model, batch, mut checkpoints, mut saved, last } = self;
        let num_padding_tokens = batch.tokens.numel() as i64 - batch.num_tokens;
        let d_hidden = d_hidden.f_constant_pad_nd([0, 0, 0, num_padding_tokens])?;
        let d_x = d_hidden.f_zeros_like()?;
        batch.norm_backward(&last, &model.norm, &d_hidden, &d_x)?;
        drop((d_hidden, last));
        for layer in model.layers.iter().rev() {
            let activations = match saved.pop() {
                Some(activations) => activations,
                None => {
                    let input = checkpoints.pop().expect("every layer is saved or checkpointed");
                    batch.layer_forward(layer, input)?.1
                }
            };
            batch.layer_backward(layer, activations, &d_x)?;
        }
        if model.embed_tokens.requires_grad() {
            let vocab_size = model.embed_tokens.size()[0];
            let d_embedding = Tensor::f_embedding_dense_backward(&d_x, &batch.tokens, vocab_size, -1, false)?;
            let _ = model.embed_tokens.grad().f_add_(&d_embedding)?;
        }
        Ok(())
    }
}

/// Adds to the gradient of the output projection, and returns the gradient of
/// `hidden [rows, hidden]`. `d_logits`: the gradient of its logits, `[rows, vocab]`.
///
/// # Errors
/// [`crate::Error::Torch`], for instance when memory runs out.
pub fn project_backward(model: &Transformer, hidden: &Tensor, d_logits: &Tensor) -> Result<Tensor> {
    let lm_head = Linear { weight: model.lm_head().shallow_clone(), bias: None, adapters: Vec::new() };
    lm_head.backward_weights(hidden, d_logits)?;
    lm_head.backward_input(d_logits)
}
