//! The kernels of attention over a packed batch (csrc/attention.cu, and csrc/attention_hopper.cu for
//! Hopper), compiled for one model's shape.

use tch::{Device, Kind, Tensor};

use super::block_mask::{AttentionRanges, BlockMask, ENTRY, TILE, block_masks};
use super::launch::{Argument, Kernel, Param, Signature, aligned, bf16, count, float, float32, int32, tiles, uint64};
use super::nvrtc::{HOPPER, Macros, Module, compute_capability, max_shared_bytes, num_multiprocessors};
use super::shape::KernelShape;
use crate::device::upload;
use crate::{Error, Result};
use Argument::{Float, Tensor as Data};

/// Widest heads that the kernels for Hopper are made for.
const MAX_HOPPER_HEAD_DIM: usize = 128;

/// The tokens that each token of a batch attends to, on a device.
pub struct AttentionMask {
    num_tokens: usize,
    of_queries: DeviceBlockMask,
    /// In the backward, if that differs.
    backward_of_queries: Option<DeviceBlockMask>,
    of_keys: DeviceBlockMask,
    /// Unsigned 64-bit numbers, as pairs of int32.
    bits: Tensor,
}

/// A [`BlockMask`] on a device, int32.
struct DeviceBlockMask {
    offsets: Tensor,
    blocks: Tensor,
}

impl DeviceBlockMask {
    fn new(mask: &BlockMask, device: Device) -> Result<Self> {
        Ok(DeviceBlockMask {
            offsets: upload(&mask.offsets, device)?,
            blocks: upload(mask.entries.as_flattened(), device)?,
        })
    }
}

impl AttentionMask {
    /// The mask of a batch, whose number of tokens is a multiple of [`TILE`], for groups of so many
    /// tiles of queries and of keys. `draft_rows`: see [`AttentionKernels::mask`].
    fn new(
        ranges: &[AttentionRanges],
        parts: (usize, usize),
        draft_rows: Option<&[i64]>,
        device: Device,
    ) -> Result<Self> {
        let num_tokens = ranges.len();
        let is_valid = |(token, ranges): (usize, &AttentionRanges)| {
            ranges.iter().any(|&(start, end)| (start..end).contains(&(token as i32)))
                && ranges.iter().all(|&(start, end)| start >= end || (start >= 0 && end <= num_tokens as i32))
        };
        if !ranges.iter().enumerate().all(is_valid) || !num_tokens.is_multiple_of(TILE) {
            return Err(Error::internal(format!("the attention ranges do not fit a batch of {num_tokens} tokens")));
        }
        let draft_tiles = draft_rows.map(|rows| {
            let mut draft_tiles = vec![false; num_tokens / TILE];
            rows.iter().for_each(|&row| draft_tiles[row as usize / TILE] = true);
            draft_tiles
        });
        let masks = block_masks(ranges, parts, draft_tiles.as_deref());
        let backward_of_queries = masks.backward_of_queries.as_ref();
        let bits: Vec<i32> = masks.bits.iter().flat_map(|word| [*word as i32, (word >> 32) as i32]).collect();
        Ok(AttentionMask {
            num_tokens,
            of_queries: DeviceBlockMask::new(&masks.of_queries, device)?,
            backward_of_queries: backward_of_queries.map(|mask| DeviceBlockMask::new(mask, device)).transpose()?,
            of_keys: DeviceBlockMask::new(&masks.of_keys, device)?,
            bits: upload(&bits, device)?,
        })
    }

    fn arguments<'m>(&'m self, mask: &'m DeviceBlockMask) -> [Argument<'m>; 3] {
        [&mask.offsets, &mask.blocks, &self.bits].map(Data)
    }
}

/// The sizes that determine the shapes of the kernels' arguments.
struct Sizes {
    shape: KernelShape,
    tokens: usize,
    /// Groups of tiles of the block mask.
    groups: usize,
    /// Entries of the block mask.
    entries: usize,
    /// Tiles that have bits.
    tiles_with_bits: usize,
    multiprocessors: usize,
}

const MASK: &[Param<Sizes>] = &[
    int32("offsets", |s| s.groups + 1),
    aligned(|_| 16, int32("blocks", |s| s.entries * ENTRY)),
    aligned(|_| 16, uint64("bits", |s| s.tiles_with_bits * TILE * 2)),
];
const QKV: Param<Sizes> = bf16("qkv", |s| s.tokens * s.shape.qkv());
const QKV_TILES: Param<Sizes> =
    tiles("qkv", |s| [s.tokens, s.shape.heads + 2 * s.shape.kv_heads, s.shape.head_dim], |_| TILE);
const D_QKV: Param<Sizes> = bf16("d_qkv", |s| s.tokens * s.shape.qkv());
const ATTN_OUT: Param<Sizes> = bf16("attn_out", |s| s.tokens * s.shape.attn());
const D_ATTN_OUT: Param<Sizes> = bf16("d_attn_out", |s| s.tokens * s.shape.attn());
const D_ATTN_OUT_TILES: Param<Sizes> = tiles("d_attn_out", |s| [s.tokens, s.shape.heads, s.shape.head_dim], |_| TILE);
const LOGSUMEXP: Param<Sizes> = aligned(|_| 16, float32("logsumexp", |s| s.tokens * s.shape.heads));
const DELTAS: Param<Sizes> = aligned(|_| 16, float32("deltas", |s| s.tokens * s.shape.heads));
const SCALE: Param<Sizes> = float("scale");
const NUM_TOKENS: Param<Sizes> = count("tokens", |s| s.tokens);

const FORWARD: Signature<Sizes> = Signature {
    name: "attention",
    grid: |s| [s.groups, s.shape.heads],
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
    grid: |s| [s.groups, s.shape.kv_heads * d_kv_splits(&s.shape)],
    params: &[&[QKV], MASK, &[SCALE, LOGSUMEXP, DELTAS, D_ATTN_OUT, D_QKV, NUM_TOKENS]],
    ..FORWARD
};

const HOPPER_FORWARD: Signature<Sizes> = Signature {
    grid: |s| [s.multiprocessors, 1],
    threads: |_| hopper_threads(HOPPER_PARTS.0),
    params: &[&[QKV_TILES], MASK, &[SCALE, ATTN_OUT, LOGSUMEXP, NUM_TOKENS]],
    ..FORWARD
};
const HOPPER_D_QUERIES: Signature<Sizes> = Signature {
    name: D_QUERIES.name,
    params: &[&[QKV_TILES], MASK, &[SCALE, ATTN_OUT, LOGSUMEXP, D_ATTN_OUT_TILES, D_QKV, DELTAS, NUM_TOKENS]],
    ..HOPPER_FORWARD
};
const HOPPER_D_KV: Signature<Sizes> = Signature {
    name: D_KV.name,
    threads: |_| hopper_threads(HOPPER_PARTS.1),
    params: &[&[QKV_TILES], MASK, &[SCALE, LOGSUMEXP, DELTAS, D_ATTN_OUT_TILES, D_QKV, NUM_TOKENS]],
    ..HOPPER_FORWARD
};

/// Threads of a block of csrc/attention.cu.
const THREADS: usize = 128;
/// Tiles of queries and of keys in a group of csrc/attention_hopper.cu: as many as the registers
/// allow, since the group shares the copies of its other tiles.
const HOPPER_PARTS: (usize, usize) = (3, 2);

/// A warpgroup for each tile of a group, and one that copies.
const fn hopper_threads(parts: usize) -> usize {
    (parts + 1) * 128
}

/// The kernels for a kind of GPU.
struct Version {
    source: &'static str,
    /// Tiles of queries and of keys in a group.
    parts: (usize, usize),
    /// Forward, gradient of queries, gradients of keys and values.
    signatures: [&'static Signature<Sizes>; 3],
    /// Shared memory of a block of each.
    shared_bytes: [usize; 3],
    macros: Macros,
}

impl Version {
    fn new(shape: &KernelShape, capability: (u32, u32)) -> Self {
        let mut macros = shape.macros();
        if capability == HOPPER && shape.head_dim <= MAX_HOPPER_HEAD_DIM {
            // Each kernel has as many stages as fit.
            let shared_bytes = max_shared_bytes(HOPPER);
            let (query_parts, key_parts) = HOPPER_PARTS;
            macros.extend(
                [("QUERY_PARTS", query_parts), ("KEY_PARTS", key_parts), ("SHARED_BYTES", shared_bytes)]
                    .map(|(name, value)| (name, value.to_string())),
            );
            return Version {
                source: concat!(
                    include_str!("../../csrc/bf16.cuh"),
                    include_str!("../../csrc/hopper.cuh"),
                    include_str!("../../csrc/attention.cuh"),
                    include_str!("../../csrc/attention_hopper.cu")
                ),
                parts: HOPPER_PARTS,
                signatures: [&HOPPER_FORWARD, &HOPPER_D_QUERIES, &HOPPER_D_KV],
                shared_bytes: [shared_bytes; 3],
                macros,
            };
        }
        let tile_bytes = shape.head_dim.next_multiple_of(64) * TILE * 2;
        Version {
            source: concat!(
                include_str!("../../csrc/bf16.cuh"),
                include_str!("../../csrc/attention.cuh"),
                include_str!("../../csrc/attention.cu")
            ),
            parts: (1, 1),
            signatures: [&FORWARD, &D_QUERIES, &D_KV],
            shared_bytes: [
                // Queries, and two stages of keys and values.
                5 * tile_bytes,
                // The same, and the gradients of the queries' outputs.
                6 * tile_bytes,
                // Keys, values, and two stages of queries and gradients with the logsumexp and delta
                // of each query.
                6 * tile_bytes + 2 * TILE * 2 * 4,
            ],
            macros,
        }
    }
}

/// Blocks that share the columns of a head in csrc/attention.cu's `attention_d_kv`.
fn d_kv_splits(shape: &KernelShape) -> usize {
    if shape.head_dim > 128 { 2 } else { 1 }
}

/// Kernels of one shape on one device. Tensors are contiguous, bfloat16 unless said otherwise; `T`
/// is the number of tokens, a multiple of [`Self::TILE`].
pub struct AttentionKernels {
    shape: KernelShape,
    /// The shape with heads that the kernels can compute: of a multiple of 8 numbers.
    padded: KernelShape,
    device: Device,
    multiprocessors: usize,
    parts: (usize, usize),
    forward: Kernel<Sizes>,
    d_queries: Kernel<Sizes>,
    d_kv: Kernel<Sizes>,
}

impl AttentionKernels {
    /// Number of tokens in a tile.
    pub const TILE: usize = TILE;
    /// Widest heads that the kernels are made for.
    pub const MAX_HEAD_DIM: usize = 256;

    /// Whether there are kernels for this width of heads (up to 256), and GPUs of a compute
    /// capability have the shared memory that they need.
    pub fn supports(shape: &KernelShape, capability: (u32, u32)) -> bool {
        let shared_bytes = Version::new(&padded(shape), capability).shared_bytes;
        shape.head_dim <= Self::MAX_HEAD_DIM && shared_bytes.iter().all(|bytes| *bytes <= max_shared_bytes(capability))
    }

    /// Compiles and loads the kernels.
    ///
    /// # Errors
    /// [`Error::Torch`] with the message of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape) -> Result<Self> {
        let padded = padded(&shape);
        let version = Version::new(&padded, compute_capability(device)?);
        let module = Module::compiled(device, version.source, &version.macros)?;
        let kernel =
            |index: usize| Kernel::new(&module, version.signatures[index], "", version.shared_bytes[index], false);
        Ok(AttentionKernels {
            shape,
            padded,
            device: Device::Cuda(device),
            multiprocessors: num_multiprocessors(device)?,
            parts: version.parts,
            forward: kernel(0)?,
            d_queries: kernel(1)?,
            d_kv: kernel(2)?,
        })
    }

    /// The mask of a batch, whose number of tokens is a multiple of [`Self::TILE`]. If only draft tokens
    /// have gradients, `draft_rows` are their indices, and what the backward gives for others is
    /// undefined.
    ///
    /// # Errors
    /// [`Error::Internal`] for another number of tokens, or if a token does not attend to itself or
    /// attends to one outside the batch.
    pub fn mask(&self, ranges: &[AttentionRanges], draft_rows: Option<&[i64]>) -> Result<AttentionMask> {
        AttentionMask::new(ranges, self.parts, draft_rows, self.device)
    }

    /// The attention's output `[T, heads x head_dim]` for `qkv [T, (heads + 2 kv_heads) x
    /// head_dim]`, and what the backward needs: the logsumexp of each row of scores to base 2,
    /// float32 `[heads, T]`.
    ///
    /// # Errors
    /// [`Error::Internal`] if a tensor does not fit, else [`Error::Torch`]; here and below.
    pub fn forward(&self, qkv: &Tensor, mask: &AttentionMask) -> Result<(Tensor, Tensor)> {
        let qkv = self.pad(qkv)?;
        let sizes = self.sizes(mask, &mask.of_queries);
        let KernelShape { heads, .. } = self.padded;
        let empty = |size: [usize; 2], kind| Tensor::f_empty(size.map(|size| size as i64), (kind, qkv.device()));
        let attn_out = empty([sizes.tokens, self.padded.attn()], Kind::BFloat16)?;
        let logsumexp = empty([heads, sizes.tokens], Kind::Float)?;
        let rest = [self.scale(), Data(&attn_out), Data(&logsumexp)];
        let arguments = [&[Data(&qkv)], &mask.arguments(&mask.of_queries)[..], &rest].concat();
        // SAFETY: the mask refers only to tiles of the batch and to its own bits.
        unsafe { self.forward.launch(&sizes, &arguments)? };
        Ok((self.unpad(attn_out)?, logsumexp))
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
        let (qkv, attn_out, d_attn_out) = (self.pad(qkv)?, self.pad(attn_out)?, self.pad(d_attn_out)?);
        let (d_qkv, deltas) = (qkv.f_empty_like()?, logsumexp.f_empty_like()?);
        let rest = [&attn_out, logsumexp, &d_attn_out, &d_qkv, &deltas].map(Data);
        let of_queries = mask.backward_of_queries.as_ref().unwrap_or(&mask.of_queries);
        let arguments = [&[Data(&qkv)], &mask.arguments(of_queries)[..], &[self.scale()], &rest].concat();
        // SAFETY: as above.
        unsafe { self.d_queries.launch(&self.sizes(mask, of_queries), &arguments)? };
        let rest = [logsumexp, &deltas, &d_attn_out, &d_qkv].map(Data);
        let arguments = [&[Data(&qkv)], &mask.arguments(&mask.of_keys)[..], &[self.scale()], &rest].concat();
        // SAFETY: as above.
        unsafe { self.d_kv.launch(&self.sizes(mask, &mask.of_keys), &arguments)? };
        self.unpad(d_qkv)
    }

    /// Appends zeros to every head of `x [T, heads x head_dim]`.
    fn pad(&self, x: &Tensor) -> Result<Tensor> {
        let (head_dim, padded) = (self.shape.head_dim as i64, self.padded.head_dim as i64);
        if head_dim == padded {
            return Ok(x.shallow_clone());
        }
        let rows = x.size()[0];
        Ok(x.f_view([rows, -1, head_dim])?.f_constant_pad_nd([0, padded - head_dim])?.f_view([rows, -1])?)
    }

    /// Takes off what [`Self::pad`] appends.
    fn unpad(&self, x: Tensor) -> Result<Tensor> {
        let (head_dim, padded) = (self.shape.head_dim as i64, self.padded.head_dim as i64);
        if head_dim == padded {
            return Ok(x);
        }
        let rows = x.size()[0];
        Ok(x.f_view([rows, -1, padded])?.f_narrow(2, 0, head_dim)?.f_reshape([rows, -1])?)
    }

    fn sizes(&self, mask: &AttentionMask, block_mask: &DeviceBlockMask) -> Sizes {
        Sizes {
            shape: self.padded,
            tokens: mask.num_tokens,
            groups: block_mask.offsets.numel() - 1,
            entries: block_mask.blocks.numel() / ENTRY,
            tiles_with_bits: mask.bits.numel() / (TILE * 2),
            multiprocessors: self.multiprocessors,
        }
    }

    /// Factor of the scores. It includes log2(e), since kernels compute weights with exp2.
    fn scale(&self) -> Argument<'static> {
        Float(std::f32::consts::LOG2_E / (self.shape.head_dim as f32).sqrt())
    }
}

fn padded(shape: &KernelShape) -> KernelShape {
    KernelShape { head_dim: shape.head_dim.next_multiple_of(8), ..*shape }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::tests::assert_declared;
    use crate::cuda::nvrtc::compile;

    fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> KernelShape {
        KernelShape { hidden: heads * head_dim, heads, kv_heads, head_dim, ..KernelShape::SMOLLM2 }
    }

    #[test]
    fn the_kernels_compile_without_a_gpu() {
        for (heads, kv_heads, head_dim) in [(9, 3, 64), (7, 1, 80), (8, 8, 96), (32, 8, 128), (8, 2, 256)] {
            let shape = shape(heads, kv_heads, head_dim);
            for capability in [(8, 0), HOPPER] {
                let version = Version::new(&shape, capability);
                assert!(compile(version.source, capability, &version.macros).unwrap().is_elf(), "{head_dim}");
            }
        }
    }

    #[test]
    fn a_gpu_supports_the_widths_that_its_memory_allows() {
        let supports = |head_dim, capability| AttentionKernels::supports(&shape(8, 2, head_dim), capability);
        for head_dim in [64, 80, 96, 128] {
            assert!(supports(head_dim, (8, 0)) && supports(head_dim, (8, 9)) && supports(head_dim, HOPPER));
            assert!(!supports(head_dim, (7, 5)));
        }
        assert!(supports(256, HOPPER) && !supports(256, (8, 0)));
        assert!(supports(100, HOPPER) && !supports(264, HOPPER));
    }

    #[test]
    fn the_signatures_match_the_source() {
        for (head_dim, capability) in [(128, (8, 0)), (128, HOPPER)] {
            let Version { source, signatures, .. } = Version::new(&shape(8, 2, head_dim), capability);
            for signature in signatures {
                assert_declared(source, signature);
            }
            assert_eq!(source.matches("\"C\" __global__").count(), signatures.len(), "a kernel has no signature");
        }
    }

    #[test]
    fn a_mask_that_leads_outside_the_batch_is_refused() {
        let causal: Vec<AttentionRanges> = (0..64).map(|token| [(0, token + 1), (0, 0), (0, 0)]).collect();
        let refused = |ranges: &[AttentionRanges]| AttentionMask::new(ranges, (1, 1), None, Device::Cpu).is_err();
        let with = |ranges: AttentionRanges| [&causal[..63], &[ranges]].concat();
        assert!(!refused(&causal) && !refused(&with([(0, 1), (63, 64), (9, 2)])));
        assert!(refused(&causal[..63]), "not a multiple of the tile");
        assert!(refused(&with([(0, 63), (0, 0), (0, 0)])), "not the token itself");
        assert!(refused(&with([(0, 65), (0, 0), (0, 0)])) && refused(&with([(-1, 64), (0, 0), (0, 0)])));
    }
}
