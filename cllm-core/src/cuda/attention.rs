//! The kernels of attention over a packed batch (csrc/attention.cu), compiled for one model's
//! shape.

use tch::{Device, Kind, Tensor};

use super::block_mask::{AttentionRanges, BlockMask, block_masks};
use super::launch::{Argument, Kernel, Param, Signature, aligned, bf16, count, float, float32, int32};
use super::nvrtc::{Macros, Module, max_shared_bytes};
use super::shape::KernelShape;
use crate::{Error, Result};
use Argument::{Float, Tensor as Data};

const SOURCE: &str = concat!(include_str!("../../csrc/bf16.cuh"), include_str!("../../csrc/attention.cu"));
/// Number of tokens in a tile, whether of queries or of keys.
const TILE: usize = 64;
/// Threads of a block: a warp for every 16 tokens of a tile.
const THREADS: usize = TILE / 16 * 32;

fn macros(shape: &KernelShape) -> Macros {
    let mut macros = shape.macros();
    macros.extend([("TILE", TILE.to_string()), ("THREADS", THREADS.to_string())]);
    macros
}

/// The tokens that each token of a batch attends to, on a device.
pub struct AttentionMask {
    /// First key and number of keys of three ranges, int32 `[T, 3, 2]`.
    ranges: Tensor,
    of_queries: DeviceBlockMask,
    of_keys: DeviceBlockMask,
}

/// A [`BlockMask`] on a device, int32.
struct DeviceBlockMask {
    offsets: Tensor,
    blocks: Tensor,
}

impl DeviceBlockMask {
    fn new(mask: &BlockMask, device: Device) -> Self {
        let to_device = |list: &[i32]| Tensor::from_slice(list).to_device(device);
        DeviceBlockMask { offsets: to_device(&mask.offsets), blocks: to_device(&mask.blocks) }
    }
}

impl AttentionMask {
    /// The mask of a batch, whose number of tokens is a multiple of [`AttentionKernels::TILE`].
    ///
    /// # Errors
    /// [`Error::Internal`] for another number of tokens, or if a token does not attend to itself or
    /// attends to one outside the batch.
    pub fn new(ranges: &[AttentionRanges], device: Device) -> Result<Self> {
        let num_tokens = ranges.len() as i32;
        let is_valid = |(token, ranges): (usize, &AttentionRanges)| {
            ranges.iter().any(|&(start, end)| (start..end).contains(&(token as i32)))
                && ranges.iter().all(|&(start, end)| start >= end || (start >= 0 && end <= num_tokens))
        };
        if !ranges.iter().enumerate().all(is_valid) || !ranges.len().is_multiple_of(TILE) {
            return Err(Error::internal(format!("the attention ranges do not fit a batch of {num_tokens} tokens")));
        }
        let lengths = |&(start, end): &(i32, i32)| [start, end.saturating_sub(start).max(0)];
        let numbers: Vec<i32> = ranges.iter().flatten().flat_map(lengths).collect();
        let (of_queries, of_keys) = block_masks(ranges, TILE, TILE);
        Ok(AttentionMask {
            ranges: Tensor::from_slice(&numbers).to_device(device),
            of_queries: DeviceBlockMask::new(&of_queries, device),
            of_keys: DeviceBlockMask::new(&of_keys, device),
        })
    }

    fn num_tokens(&self) -> usize {
        self.ranges.numel() / 6
    }

    /// The arguments for a kernel that iterates over tiles of queries.
    fn by_queries(&self) -> [Argument<'_>; 3] {
        [&self.ranges, &self.of_queries.offsets, &self.of_queries.blocks].map(Data)
    }

    /// The arguments for a kernel that iterates over tiles of keys.
    fn by_keys(&self) -> [Argument<'_>; 3] {
        [&self.ranges, &self.of_keys.offsets, &self.of_keys.blocks].map(Data)
    }
}

/// The sizes that determine the shapes of the kernels' arguments.
struct Sizes {
    shape: KernelShape,
    tokens: usize,
    /// Pairs of tiles of the block mask.
    blocks: usize,
}

const MASK: &[Param<Sizes>] = &[
    aligned(16, int32("ranges", |s| s.tokens * 6)),
    int32("offsets", |s| s.tokens / TILE + 1),
    int32("blocks", |s| s.blocks),
];
const QKV: Param<Sizes> = bf16("qkv", |s| s.tokens * s.shape.qkv());
const D_QKV: Param<Sizes> = bf16("d_qkv", |s| s.tokens * s.shape.qkv());
const ATTN_OUT: Param<Sizes> = bf16("attn_out", |s| s.tokens * s.shape.attn());
const D_ATTN_OUT: Param<Sizes> = bf16("d_attn_out", |s| s.tokens * s.shape.attn());
const LOGSUMEXP: Param<Sizes> = float32("logsumexp", |s| s.tokens * s.shape.heads);
const DELTAS: Param<Sizes> = float32("deltas", |s| s.tokens * s.shape.heads);
const SCALE: Param<Sizes> = float("scale");
const NUM_TOKENS: Param<Sizes> = count("tokens", |s| s.tokens);

const FORWARD: Signature<Sizes> = Signature {
    name: "attention",
    grid: |s| [s.tokens / TILE, s.shape.heads],
    threads: |_| THREADS,
    params: &[&[QKV], MASK, &[SCALE, ATTN_OUT, LOGSUMEXP, NUM_TOKENS]],
};
const D_QUERIES: Signature<Sizes> = Signature {
    name: "attention_d_queries",
    params: &[&[QKV], MASK, &[SCALE, ATTN_OUT, LOGSUMEXP, D_ATTN_OUT, D_QKV, DELTAS, NUM_TOKENS]],
    ..FORWARD
};
const D_KV: Signature<Sizes> = Signature {
    name: "attention_d_kv",
    grid: |s| [s.tokens / TILE, s.shape.kv_heads],
    threads: |_| THREADS,
    params: &[&[QKV], MASK, &[SCALE, LOGSUMEXP, DELTAS, D_ATTN_OUT, D_QKV, NUM_TOKENS]],
};

/// Kernels of one shape on one device. Tensors are contiguous, bfloat16 unless said otherwise; `T`
/// is the number of tokens, a multiple of [`Self::TILE`].
pub struct AttentionKernels {
    shape: KernelShape,
    forward: Kernel<Sizes>,
    d_queries: Kernel<Sizes>,
    d_kv: Kernel<Sizes>,
}

impl AttentionKernels {
    /// Number of tokens in a tile.
    pub const TILE: usize = TILE;

    /// Whether GPUs of a compute capability have the shared memory that the kernels need.
    pub fn supports(shape: &KernelShape, capability: (u32, u32)) -> bool {
        d_kv_shared_bytes(shape) <= max_shared_bytes(capability)
    }

    /// Compiles and loads the kernels.
    ///
    /// # Errors
    /// [`Error::Torch`] with the message of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape) -> Result<Self> {
        let module = Module::compiled(device, SOURCE, &macros(&shape))?;
        let kernel = |signature, shared_bytes| Kernel::new(&module, signature, "", shared_bytes, false);
        Ok(AttentionKernels {
            // Queries, and two stages of keys and values.
            forward: kernel(&FORWARD, 5 * tile_bytes(&shape))?,
            // The same, and the gradients of the queries' outputs.
            d_queries: kernel(&D_QUERIES, 6 * tile_bytes(&shape))?,
            d_kv: kernel(&D_KV, d_kv_shared_bytes(&shape))?,
            shape,
        })
    }

    /// The attention's output `[T, heads x head_dim]` for `qkv [T, (heads + 2 kv_heads) x
    /// head_dim]`, and what the backward needs: the logsumexp of each row of scores to base 2,
    /// float32 `[heads, T]`.
    ///
    /// # Errors
    /// [`Error::Internal`] if a tensor does not fit, else [`Error::Torch`]; here and below.
    pub fn forward(&self, qkv: &Tensor, mask: &AttentionMask) -> Result<(Tensor, Tensor)> {
        let sizes = self.sizes(mask, &mask.of_queries);
        let KernelShape { heads, .. } = self.shape;
        let empty = |size: [usize; 2], kind| Tensor::f_empty(size.map(|size| size as i64), (kind, qkv.device()));
        let attn_out = empty([sizes.tokens, self.shape.attn()], Kind::BFloat16)?;
        let logsumexp = empty([heads, sizes.tokens], Kind::Float)?;
        let rest = [self.scale(), Data(&attn_out), Data(&logsumexp)];
        // SAFETY: the mask refers only to tiles and tokens of the batch.
        unsafe { self.forward.launch(&sizes, &[&[Data(qkv)], &mask.by_queries()[..], &rest].concat())? };
        Ok((attn_out, logsumexp))
    }

    /// The gradient of `qkv` from that of the attention's output.
    pub fn backward(
        &self,
        qkv: &Tensor,
        attn_out: &Tensor,
        logsumexp: &Tensor,
        d_attn_out: &Tensor,
        mask: &AttentionMask,
    ) -> Result<Tensor> {
        let (d_qkv, deltas) = (qkv.f_empty_like()?, logsumexp.f_empty_like()?);
        let rest = [attn_out, logsumexp, d_attn_out, &d_qkv, &deltas].map(Data);
        let arguments = [&[Data(qkv)], &mask.by_queries()[..], &[self.scale()], &rest].concat();
        // SAFETY: the mask refers only to tiles and tokens of the batch.
        unsafe { self.d_queries.launch(&self.sizes(mask, &mask.of_queries), &arguments)? };
        let rest = [logsumexp, &deltas, d_attn_out, &d_qkv].map(Data);
        let arguments = [&[Data(qkv)], &mask.by_keys()[..], &[self.scale()], &rest].concat();
        // SAFETY: as above.
        unsafe { self.d_kv.launch(&self.sizes(mask, &mask.of_keys), &arguments)? };
        Ok(d_qkv)
    }

    fn sizes(&self, mask: &AttentionMask, block_mask: &DeviceBlockMask) -> Sizes {
        Sizes { shape: self.shape, tokens: mask.num_tokens(), blocks: block_mask.blocks.numel() }
    }

    /// Factor of the scores. It includes log2(e), since kernels compute weights with exp2.
    fn scale(&self) -> Argument<'static> {
        Float(std::f32::consts::LOG2_E / (self.shape.head_dim as f32).sqrt())
    }
}

fn tile_bytes(shape: &KernelShape) -> usize {
    TILE * shape.head_dim * 2
}

/// Shared memory of a block of `attention_d_kv`, which needs the most: keys, values, and two stages
/// of queries and gradients with 8 numbers for each query (its ranges, logsumexp and delta).
fn d_kv_shared_bytes(shape: &KernelShape) -> usize {
    6 * tile_bytes(shape) + 2 * TILE * 8 * 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::tests::assert_declared;
    use crate::cuda::nvrtc::compile;

    #[test]
    fn the_kernels_compile_without_a_gpu() {
        for (heads, kv_heads, head_dim) in [(9, 3, 64), (32, 8, 128)] {
            let shape = KernelShape {
                hidden: heads * head_dim,
                heads,
                kv_heads,
                head_dim,
                ffn: 512,
                vocab: 512,
                eps: 1e-5,
                query_key_norm: false,
            };
            assert!(compile(SOURCE, (9, 0), &macros(&shape)).unwrap().is_elf());
            assert!(AttentionKernels::supports(&shape, (9, 0)) && !AttentionKernels::supports(&shape, (7, 5)));
        }
    }

    #[test]
    fn the_signatures_match_the_source() {
        let signatures = [FORWARD, D_QUERIES, D_KV];
        for signature in &signatures {
            assert_declared(SOURCE, signature);
        }
        assert_eq!(SOURCE.matches("\"C\" __global__").count(), signatures.len(), "a kernel has no signature");
    }

    #[test]
    fn a_mask_that_leads_outside_the_batch_is_refused() {
        let causal: Vec<AttentionRanges> = (0..64).map(|token| [(0, token + 1), (0, 0), (0, 0)]).collect();
        let refused = |ranges: &[AttentionRanges]| AttentionMask::new(ranges, Device::Cpu).is_err();
        let with = |ranges: AttentionRanges| [&causal[..63], &[ranges]].concat();
        assert!(!refused(&causal) && !refused(&with([(0, 1), (63, 64), (9, 2)])));
        assert!(refused(&causal[..63]), "not a multiple of the tile");
        assert!(refused(&with([(0, 63), (0, 0), (0, 0)])), "not the token itself");
        assert!(refused(&with([(0, 65), (0, 0), (0, 0)])) && refused(&with([(-1, 64), (0, 0), (0, 0)])));
    }
}
