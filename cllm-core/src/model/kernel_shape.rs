//! The sizes that CUDA kernels are compiled for, from a model's configuration.

use super::config::{Family, ModelConfig};
use crate::cuda::shape::KernelShape;

impl ModelConfig {
    pub(crate) fn kernel_shape(&self) -> KernelShape {
        let size = |value: i64| value as usize;
        KernelShape {
            hidden: size(self.hidden_size),
            heads: size(self.num_heads),
            kv_heads: size(self.num_kv_heads),
            head_dim: size(self.head_dim),
            ffn: size(self.intermediate_size),
            vocab: size(self.vocab_size),
            eps: self.rms_norm_eps,
            query_key_norm: self.family == Family::Qwen3,
        }
    }
}
