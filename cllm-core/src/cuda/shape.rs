//! The sizes of a model that kernels are compiled for.

/// Most tokens that the fused kernels take; above, cuBLAS is the faster.
pub const MAX_FUSED_TOKENS: usize = 32;
/// Most tokens of a step whose attention rotates and caches by itself.
pub(super) const SMALL_STEP: usize = 32;

/// What the kernels are compiled for.
#[derive(Debug, Clone, Copy)]
pub struct KernelShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Ids of the vocabulary.
    pub vocab: usize,
    /// Added to the variance in the norms.
    pub eps: f64,
    /// Whether queries and keys are normed.
    pub query_key_norm: bool,
}

impl KernelShape {
    /// Whether the kernels can compute it: they take 32 values of a row at a time.
    pub fn is_supported(&self) -> bool {
        [self.hidden, self.ffn, self.head_dim].iter().all(|size| size.is_multiple_of(32))
            && self.head_dim <= 256
            && self.heads / self.kv_heads <= 16 * self.attention_warps()
    }

    /// Most tokens of a tile of queries: a warp takes 16 query vectors.
    pub fn tile(&self, tokens: usize) -> usize {
        let group = self.heads / self.kv_heads;
        // Small tiles let more multiprocessors share few tokens.
        if tokens <= SMALL_STEP { (16 / group).max(1) } else { (16 * self.attention_warps() / group).min(16) }
    }

    /// Most tokens of a step that the fused kernels take: above, cuBLAS is the faster, for wide models sooner.
    pub fn max_fused_tokens(&self) -> usize {
        if self.is_wide() { 8 } else { MAX_FUSED_TOKENS }
    }

    pub(super) fn is_wide(&self) -> bool {
        self.hidden > 2048
    }

    pub(super) fn attention_warps(&self) -> usize {
        // A thread of the wider heads needs more registers.
        if self.head_dim <= 64 { 16 } else { 8 }
    }

    /// Room for the parts of an attention's sum.
    pub(super) fn merging_bytes(&self) -> usize {
        self.attention_warps() * 16 * (self.head_dim + 2) * 4
    }

    /// Room for the rotated queries of a small step's tile.
    pub(super) fn query_bytes(&self) -> usize {
        (self.tile(1) * self.heads / self.kv_heads).next_multiple_of(16) * (self.head_dim + 8) * 2
    }

    pub(super) fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
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
            ("QK_NORM", u8::from(self.query_key_norm).to_string()),
            // Short rows are wanted at once; for long ones more blocks on a multiprocessor do more than a deeper look ahead.
            ("DEPTH", if self.is_wide() { 2 } else { 4 }.to_string()),
            ("ATTENTION_WARPS", self.attention_warps().to_string()),
        ]
    }
}
