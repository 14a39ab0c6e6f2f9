//! Kernels are compiled for the sizes of a model, so that loops have constant bounds and are
//! unrolled.

/// The model sizes that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    pub vocab: usize,
    /// Added to the variance in RMS norms.
    pub eps: f64,
    /// Whether queries and keys have a norm of their own (Qwen3).
    pub query_key_norm: bool,
}

impl KernelShape {
    /// Number of query heads that share a head of keys.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of the queries, and of the attention's output.
    pub(super) fn attn(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the queries, keys and values together.
    pub(super) fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Whether every tensor of the model starts at a multiple of 16 bytes in a buffer of all of them.
    pub(super) fn is_aligned(&self) -> bool {
        let keys = self.kv_heads * self.head_dim;
        let norms = if self.query_key_norm { self.head_dim } else { 0 };
        [self.hidden, self.ffn, self.attn(), keys, norms].iter().all(|size| size.is_multiple_of(8))
    }

    pub(super) fn macros(&self) -> Vec<(&'static str, String)> {
        vec![
            ("HIDDEN", self.hidden.to_string()),
            ("HEADS", self.heads.to_string()),
            ("KV_HEADS", self.kv_heads.to_string()),
            ("HEAD_DIM", self.head_dim.to_string()),
            ("FFN", self.ffn.to_string()),
            ("VOCAB", self.vocab.to_string()),
            ("EPS", format!("{:e}f", self.eps)),
        ]
    }
}

/// Shapes that the tests of several modules use.
#[cfg(test)]
impl KernelShape {
    /// SmolLM2-135M.
    pub(crate) const SMOLLM2: KernelShape = KernelShape {
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocab: 49152,
        eps: 1e-5,
        query_key_norm: false,
    };

    /// A tiny model whose tiles have 2 tokens, since a warp processes 16 query vectors.
    pub(crate) const TWO_TOKEN_TILES: KernelShape =
        KernelShape { hidden: 128, heads: 8, kv_heads: 1, head_dim: 32, ffn: 256, vocab: 100, ..Self::SMOLLM2 };
}
