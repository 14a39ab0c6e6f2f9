//! Decoder-only transformers of the Llama line from Hugging Face folders.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::Result;

/// A resolved model configuration: no field is optional any more.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Ids of the vocabulary.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Layers.
    pub num_layers: i64,
    /// Most positions the model knows.
    pub max_positions: usize,
}

/// Preallocated keys and values of `rows` sequences; slot = position, so that a rollback is only bookkeeping.
pub struct KvCache {}

impl KvCache {
    /// An empty cache.
    pub fn new(config: &ModelConfig, rows: usize, capacity: usize, device: Device, kind: Kind) -> Self {
        let _ = (config, rows, capacity, device, kind);
        todo!()
    }

    /// Keeps only these rows, in this order.
    pub fn select(&mut self, rows: &[i64]) {
        let _ = rows;
        todo!()
    }

    /// Slots of each row.
    pub fn capacity(&self) -> usize {
        todo!()
    }
}

/// A transformer with its weights on one device.
pub struct Transformer {}

impl Transformer {
    /// Loads a Hugging Face folder.
    ///
    /// # Errors
    /// Names a file that is missing, cut off, or of an unsupported family or feature.
    pub fn load(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let _ = (folder, device, kind);
        todo!()
    }

    /// Random weights (normal, 0.02), the same for the same seed on every device.
    pub fn random(config: ModelConfig, seed: u64, device: Device, kind: Kind) -> Self {
        let _ = (config, seed, device, kind);
        todo!()
    }

    /// Writes config.json and safetensors in `kind` into an existing folder (sharded past 5 GB, `format: pt`).
    ///
    /// # Errors
    /// File-system errors.
    pub fn save(&self, folder: &Path, kind: Kind) -> Result<()> {
        let _ = (folder, kind);
        todo!()
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        todo!()
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        todo!()
    }

    /// Type of weights and activations.
    pub fn kind(&self) -> Kind {
        todo!()
    }

    /// Every weight under its Hugging Face name, in a fixed order; tied weights once. They share storage with the model.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        todo!()
    }

    /// Final hidden states `[batch, seq, hidden]` (after the last norm) without a cache, with gradients.
    /// `tokens`, `positions`: int64 `[batch, seq]`; `mask`: bool `[batch, 1, seq, seq]`, true where attention is
    /// allowed (every row needs at least one), or `None` for plain causal attention.
    pub fn hidden(&self, tokens: &Tensor, positions: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let _ = (tokens, positions, mask);
        todo!()
    }

    /// Final hidden states `[rows, width, hidden]` with a cache: keys and values are written at slots `positions`
    /// (int64 `[rows, width]`), then each query attends to every slot at or before its own position.
    /// `attended`: number of leading slots that any row needs.
    pub fn hidden_cached(&self, tokens: &Tensor, positions: &Tensor, cache: &mut KvCache, attended: usize) -> Tensor {
        let _ = (tokens, positions, cache, attended);
        todo!()
    }

    /// Logits in float32 `[.., vocab]` of hidden states, computed in float32 (no gradient); for choosing tokens.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let _ = hidden;
        todo!()
    }

    /// Logits in float32 `[.., vocab]` with gradients; for losses.
    pub fn train_logits(&self, hidden: &Tensor) -> Tensor {
        let _ = hidden;
        todo!()
    }
}
