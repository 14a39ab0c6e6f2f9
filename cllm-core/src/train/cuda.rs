//! The training pass on a GPU in bf16: forward and backward of every layer by hand, with kernels of
//! our own.
//!
//! Only the tensors that the backward needs are saved, and matrix products accumulate directly into
//! the buffer of the gradients.

use tch::{Device, Kind, Tensor};

use super::gradients::{GradientSink, ModelPart, complete_without_gradients};
use super::linear::select;
use super::packed_batch::PackedBatch;
use crate::cuda::attention::{AttentionKernels, AttentionMask};
use crate::cuda::nvrtc::compute_capability;
use crate::cuda::train::{Logits, TrainKernels};
use crate::device::upload;
use crate::model::{Layer, Linear, ModelConfig, PerWindow, Transformer};
use crate::{Error, Result};

/// Why a model with weights of type `kind` cannot train with our own kernels on GPUs of a compute
/// capability, and trains with libtorch's operations instead, which take several times as long.
/// `None` if it can.
pub fn slow_path_reason(config: &ModelConfig, kind: Kind, (major, minor): (u32, u32)) -> Option<String> {
    let head_dim = config.head_dim;
    if kind != Kind::BFloat16 {
        Some(format!("the kernels compute in bfloat16, and the weights are {kind:?}"))
    } else if major < 8 {
        Some(format!("the kernels need compute capability 8.0 (Ampere) or later, and the GPU has {major}.{minor}"))
    } else if head_dim > AttentionKernels::MAX_HEAD_DIM as i64 {
        let max = AttentionKernels::MAX_HEAD_DIM;
        Some(format!("the kernels need a head_dim of at most {max}, and the model has {head_dim}"))
    } else if !AttentionKernels::supports(&config.kernel_shape(), (major, minor)) {
        Some(format!(
            "attention with a head_dim of {head_dim} needs more shared memory than compute capability {major}.{minor} has"
        ))
    } else {
        None
    }
}

/// [`slow_path_reason`] for a device of this machine. `None` on the CPU too, which has no other way.
///
/// # Errors
/// [`crate::Error::Torch`] if there is no such device.
pub fn slow_path_reason_on(config: &ModelConfig, kind: Kind, device: Device) -> Result<Option<String>> {
    let Device::Cuda(device) = device else { return Ok(None) };
    Ok(slow_path_reason(config, kind, compute_capability(device)?))
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
    /// Indices of the draft tokens, int64 `[drafts]`, if the adapters act on these alone. Then only
    /// these tokens have gradients.
    draft_rows: Option<Tensor>,
}

/// Saved activations of a layer, `[tokens, ..]` each, of the tokens that have gradients.
struct SavedActivations {
    input: Tensor,
    /// After the first norm.
    attn_input: Tensor,
    /// With norms and RoPE applied to queries and keys. Of all tokens, as are the two below.
    qkv: Tensor,
    attn_out: Tensor,
    /// Of the attention scores, to base 2.
    logsumexp: Tensor,
    /// Queries and keys before norms and RoPE, if they have norms.
    qk: Option<Tensor>,
    /// The residual stream between attention and feed-forward.
    residual: Tensor,
    /// After the second norm.
    mlp_input: Tensor,
    gate_up: Tensor,
    low_ranks: LowRanks,
}

/// The products with every A of the adapters, `JoinedAdapters::low_rank`, of the inputs of a layer's
/// products. They are so small that checkpointed layers save them too.
#[derive(Default)]
struct LowRanks {
    qkv: Option<Tensor>,
    o: Option<Tensor>,
    gate_up: Option<Tensor>,
    down: Option<Tensor>,
}

/// Saved activations of the whole model.
pub(super) struct CudaPass<'p> {
    model: &'p Transformer,
    batch: &'p CudaBatch,
    /// Inputs of the checkpointed layers among those that have gradients, of all tokens.
    checkpoints: Vec<(Tensor, LowRanks)>,
    /// Of the layers after those.
    saved: Vec<SavedActivations>,
    /// Output of the last layer, of the tokens that have gradients.
    last: Tensor,
}

impl CudaBatch {
    /// `None` for models and GPUs that the kernels do not support.
    pub(super) fn new(batch: &PackedBatch, model: &Transformer) -> Result<Option<Self>> {
        let Device::Cuda(device) = model.device() else { return Ok(None) };
        let shape = model.config().kernel_shape();
        if slow_path_reason_on(model.config(), model.kind(), model.device())?.is_some() {
            return Ok(None);
        }
        let num_tokens = batch.tokens.len();
        let mut padded = batch.clone();
        padded.push_causal(&vec![0; num_tokens.next_multiple_of(AttentionKernels::TILE) - num_tokens]);
        let to_device = |ids: &[i32]| Ok::<_, Error>(upload(ids, model.device())?.f_to_kind(Kind::Int64)?);
        let attention = AttentionKernels::new(device, shape)?;
        let draft_rows = model.adapts_drafts().then_some(&batch.draft_rows[..]);
        let mask = |window| attention.mask(&padded.ranges_within(window), draft_rows);
        Ok(Some(CudaBatch {
            kernels: TrainKernels::new(device, shape)?,
            attention_masks: PerWindow::new(model.config(), mask).transpose()?,
            attention,
            tokens: to_device(&padded.tokens)?,
            cos_sin: model.rope.cos_sin(&to_device(&padded.positions)?),
            num_tokens: num_tokens as i64,
            draft_rows: draft_rows.map(|rows| upload(rows, model.device())).transpose()?,
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
        let (mut checkpoints, mut saved) = (Vec::new(), Vec::new());
        let first_layer = model.first_adapted_layer();
        let (last, hidden) = self.run_layers(model, |layer, activations| {
            if layer < first_layer {
                return Ok(());
            }
            if layer < checkpointed_layers {
                checkpoints.push((activations.input, activations.low_ranks));
            } else {
                saved.push(self.with_gradients(activations)?);
            }
            Ok(())
        })?;
        let last = select(&last, self.draft_rows())?;
        Ok((hidden, CudaPass { model, batch: self, checkpoints, saved, last }))
    }

    /// Like [`Self::forward`], but saves nothing for a backward.
    pub(super) fn hidden_states(&self, model: &Transformer) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        Ok(self.run_layers(model, |_, _| Ok(()))?.1)
    }

    /// The output of the last layer, and the final hidden states without the padding. `save` gets
    /// the index and the activations of each layer.
    fn run_layers(
        &self,
        model: &Transformer,
        mut save: impl FnMut(usize, SavedActivations) -> Result<()>,
    ) -> Result<(Tensor, Tensor)> {
        if let Some(adapters) = model.adapters() {
            adapters.round()?;
        }
        let mut x = model.embed_tokens.f_index_select(0, &self.tokens)?;
        let mut update = None;
        for (index, layer) in model.layers.iter().enumerate() {
            let (input, attn_input) = self.norm(x, update, &layer.input_layernorm)?;
            let mut activations = self.layer_activations(layer, input, attn_input, LowRanks::default())?;
            x = activations.residual.shallow_clone();
            let activated = self.kernels.swiglu(&activations.gate_up)?;
            update = Some(layer.down_proj.project(&activated, self.draft_rows(), &mut activations.low_ranks.down)?);
            save(index, activations)?;
        }
        let (last, hidden) = self.norm(x, update, &model.norm)?;
        Ok((last, hidden.f_narrow(0, 0, self.num_tokens)?))
    }

    /// Adds an update to the residual stream `x`, in the memory of the update. Returns the sum and
    /// its norm.
    fn norm(&self, x: Tensor, update: Option<Tensor>, weight: &Tensor) -> Result<(Tensor, Tensor)> {
        let normed = self.kernels.rms_norm(&x, update.as_ref(), weight)?;
        Ok((update.unwrap_or(x), normed))
    }

    fn draft_rows(&self) -> Option<&Tensor> {
        self.draft_rows.as_ref()
    }

    /// What the backward of a layer needs of all activations of all tokens.
    fn with_gradients(&self, all: SavedActivations) -> Result<SavedActivations> {
        let Some(rows) = self.draft_rows() else { return Ok(all) };
        let of_drafts = |x: &Tensor| x.f_index_select(0, rows);
        Ok(SavedActivations {
            input: of_drafts(&all.input)?,
            attn_input: of_drafts(&all.attn_input)?,
            qk: all.qk.as_ref().map(of_drafts).transpose()?,
            residual: of_drafts(&all.residual)?,
            mlp_input: of_drafts(&all.mlp_input)?,
            gate_up: of_drafts(&all.gate_up)?,
            ..all
        })
    }

    /// All activations of a layer but the output of its feed-forward layer. `attn_input` is the
    /// norm of its input; `low_ranks` are those that were saved.
    fn layer_activations(
        &self,
        layer: &Layer,
        input: Tensor,
        attn_input: Tensor,
        mut low_ranks: LowRanks,
    ) -> Result<SavedActivations> {
        let drafts = self.draft_rows();
        let qkv = layer.qkv_proj.project(&attn_input, drafts, &mut low_ranks.qkv)?;
        let qk = self.kernels.rotate(&qkv, self.cos_sin(), qk_norm(layer))?;
        let (attn_out, logsumexp) = self.attention.forward(&qkv, self.attention_masks.get(layer.sliding_window))?;
        let update = layer.o_proj.project(&attn_out, drafts, &mut low_ranks.o)?;
        let (residual, mlp_input) = self.norm(input.shallow_clone(), Some(update), &layer.post_attention_layernorm)?;
        let gate_up = layer.gate_up_proj.project(&mlp_input, drafts, &mut low_ranks.gate_up)?;
        Ok(SavedActivations {
            input,
            attn_input,
            qkv,
            qk,
            attn_out,
            logsumexp,
            residual,
            mlp_input,
            gate_up,
            low_ranks,
        })
    }

    /// `d_x` is the gradient of the layer's output and becomes, in place, that of its input.
    /// Tensors are dropped as soon as they are no longer needed.
    fn layer_backward(&self, layer: &Layer, saved: SavedActivations, d_x: &Tensor) -> Result<()> {
        let SavedActivations {
            input,
            attn_input,
            qkv,
            qk,
            attn_out,
            logsumexp,
            residual,
            mlp_input,
            gate_up,
            low_ranks,
        } = saved;

        let (d_activated, d_low_rank) = layer.down_proj.backward_input(d_x)?;
        self.kernels.swiglu_backward(&gate_up, &d_activated)?;
        // The kernel worked in place: it left the gradient of gate and up, and their product.
        let (d_gate_up, activated) = (gate_up, d_activated);
        layer.down_proj.backward_weights(&activated, d_x, low_ranks.down.zip(d_low_rank))?;
        drop(activated);
        let (d_mlp_input, d_low_rank) = layer.gate_up_proj.backward_input(&d_gate_up)?;
        layer.gate_up_proj.backward_weights(&mlp_input, &d_gate_up, low_ranks.gate_up.zip(d_low_rank))?;
        drop((d_gate_up, mlp_input));
        self.norm_backward(&residual, &layer.post_attention_layernorm, &d_mlp_input, d_x)?;
        drop((d_mlp_input, residual));

        let (d_attn_out, d_low_rank) = layer.o_proj.backward_input(d_x)?;
        let own_attn_out = select(&attn_out, self.draft_rows())?;
        layer.o_proj.backward_weights(&own_attn_out, d_x, low_ranks.o.zip(d_low_rank))?;
        drop(own_attn_out);
        let d_qkv = self.attention_backward(layer, &qkv, &attn_out, &logsumexp, d_attn_out)?;
        drop((qkv, attn_out));
        self.rotate_backward(layer, &d_qkv, qk)?;
        let (d_attn_input, d_low_rank) = layer.qkv_proj.backward_input(&d_qkv)?;
        layer.qkv_proj.backward_weights(&attn_input, &d_qkv, low_ranks.qkv.zip(d_low_rank))?;
        self.norm_backward(&input, &layer.input_layernorm, &d_attn_input, d_x)
    }

    /// The gradient of queries, keys and values, of the tokens that have gradients.
    fn attention_backward(
        &self,
        layer: &Layer,
        qkv: &Tensor,
        attn_out: &Tensor,
        logsumexp: &Tensor,
        d_attn_out: Tensor,
    ) -> Result<Tensor> {
        let mask = self.attention_masks.get(layer.sliding_window);
        let d_attn_out = match self.draft_rows() {
            Some(rows) => attn_out.f_zeros_like()?.f_index_copy_(0, rows, &d_attn_out)?,
            None => d_attn_out,
        };
        select(&self.attention.backward(qkv, attn_out, logsumexp, &d_attn_out, mask)?, self.draft_rows())
    }

    /// Adds to `d_x` the gradient of the norm's input `x`, and to the gradient of its weight.
    fn norm_backward(&self, x: &Tensor, weight: &Tensor, d_out: &Tensor, d_x: &Tensor) -> Result<()> {
        let terms = self.kernels.rms_norm_backward(x, weight, d_out, d_x)?;
        add_to_gradient(weight, &terms)
    }

    /// Turns the gradient of rotated queries and keys into that of the projections, in place, and
    /// adds to the gradients of the weights of their norms.
    fn rotate_backward(&self, layer: &Layer, d_qkv: &Tensor, qk: Option<Tensor>) -> Result<()> {
        let norms = qk_norm(layer).zip(qk.as_ref());
        let (cos, sin) = self.cos_sin();
        let (cos, sin) = (select(cos, self.draft_rows())?, select(sin, self.draft_rows())?);
        let terms = self.kernels.rotate_backward(d_qkv, (&cos, &sin), norms)?;
        if let (Some((q_norm, k_norm)), Some(terms)) = (&layer.qk_norm, terms) {
            add_to_gradient(q_norm, &terms.select(1, 0))?;
            add_to_gradient(k_norm, &terms.select(1, 1))?;
        }
        Ok(())
    }

    fn cos_sin(&self) -> (&Tensor, &Tensor) {
        (&self.cos_sin.0, &self.cos_sin.1)
    }
}

fn qk_norm(layer: &Layer) -> Option<(&Tensor, &Tensor)> {
    layer.qk_norm.as_ref().map(|(q_norm, k_norm)| (q_norm, k_norm))
}

/// Adds the sum of `terms [terms, ..]` to the gradient of a weight, if it collects one.
fn add_to_gradient(weight: &Tensor, terms: &Tensor) -> Result<()> {
    if weight.requires_grad() {
        let _ = weight.grad().f_add_(&terms.f_sum_dim_intlist(0, false, Kind::Float)?)?;
    }
    Ok(())
}

impl CudaPass<'_> {
    pub(super) fn backward(self, d_hidden: &Tensor, gradients: &dyn GradientSink) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let CudaPass { model, batch, mut checkpoints, mut saved, last } = self;
        if last.numel() == 0 {
            return complete_without_gradients(0..model.layers.len(), gradients);
        }
        let d_hidden = match batch.draft_rows() {
            Some(rows) => d_hidden.f_index_select(0, rows)?,
            None => d_hidden.f_constant_pad_nd([0, 0, 0, batch.tokens.numel() as i64 - batch.num_tokens])?,
        };
        let d_x = d_hidden.f_zeros_like()?;
        batch.norm_backward(&last, &model.norm, &d_hidden, &d_x)?;
        drop((d_hidden, last));
        let first_layer = model.first_adapted_layer();
        for (index, layer) in model.layers.iter().enumerate().skip(first_layer).rev() {
            let activations = match saved.pop() {
                Some(activations) => activations,
                None => {
                    let (input, low_ranks) =
                        checkpoints.pop().expect("every layer with gradients is saved or checkpointed");
                    let (input, attn_input) = batch.norm(input, None, &layer.input_layernorm)?;
                    batch.with_gradients(batch.layer_activations(layer, input, attn_input, low_ranks)?)?
                }
            };
            gradients.begin(ModelPart::Layer(index))?;
            batch.layer_backward(layer, activations, &d_x)?;
            gradients.complete(ModelPart::Layer(index))?;
        }
        complete_without_gradients(0..first_layer, gradients)?;
        if model.embed_tokens.requires_grad() {
            let vocab_size = model.embed_tokens.size()[0];
            let d_embedding = Tensor::f_embedding_dense_backward(&d_x, &batch.tokens, vocab_size, -1, false)?;
            gradients.begin(ModelPart::Embedding)?;
            let _ = model.embed_tokens.grad().f_add_(&d_embedding)?;
            gradients.complete(ModelPart::Embedding)?;
        }
        Ok(())
    }
}

/// Adds to the gradient of the output projection, and returns the gradient of
/// `hidden [rows, hidden]`. `d_logits` have become their own gradient.
///
/// # Errors
/// [`crate::Error::Torch`], for instance when memory runs out.
pub fn project_backward(model: &Transformer, hidden: &Tensor, d_logits: &Logits) -> Result<Tensor> {
    let lm_head = Linear { weight: model.lm_head().shallow_clone(), scales: None, bias: None, adapters: None };
    lm_head.backward_weights(hidden, &d_logits.values(), None)?;
    Ok(d_logits.padded().f_mm(&model.padded_lm_head()?)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_slow_way_has_a_reason_that_names_what_is_wrong() {
        let reason = |model_type: &str, head_dim: i64, kind: Kind, capability: (u32, u32)| {
            let config = ModelConfig::from_json(&json!({
                "model_type": model_type, "vocab_size": 513, "hidden_size": 16384, "intermediate_size": 96,
                "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": head_dim,
            }));
            slow_path_reason(&config.unwrap(), kind, capability)
        };
        for model_type in ["llama", "mistral", "qwen2", "qwen3"] {
            for head_dim in [6, 64, 80, 100, 128, 256] {
                assert_eq!(reason(model_type, head_dim, Kind::BFloat16, (9, 0)), None, "{model_type} {head_dim}");
            }
        }
        for (reason, part) in [
            (reason("llama", 128, Kind::Float, (9, 0)), "weights are Float"),
            (reason("llama", 128, Kind::BFloat16, (7, 5)), "8.0 (Ampere) or later, and the GPU has 7.5"),
            (reason("qwen2", 264, Kind::BFloat16, (9, 0)), "head_dim of at most 256, and the model has 264"),
            (reason("llama", 256, Kind::BFloat16, (8, 6)), "head_dim of 256 needs more shared memory"),
        ] {
            assert!(reason.as_ref().is_some_and(|reason| reason.contains(part)), "{reason:?}: {part}");
        }
    }
}
