//! The kernels of attention over a packed stream (csrc/attention.cu), compiled for one model's shape.

use tch::{Device, Kind, Tensor};

use super::block_mask::{AttentionRanges, Meetings, meetings};
use super::nvrtc::{Argument, Kernel, Module};
use super::shape::KernelShape;
use crate::Result;
use Argument::{Data, Float, Int};

const SOURCE: &str = concat!(include_str!("../../csrc/bf16.cuh"), include_str!("../../csrc/attention.cu"));
/// Tokens of a tile, of queries and of keys.
const TILE: usize = 64;
const THREADS: usize = 128;

/// Kernels of one shape on one device. Tensors are contiguous, bf16 unless said; `T` tokens, a multiple of [`Self::TILE`].
pub struct AttentionKernels {
    shape: KernelShape,
    forward: Kernel,
    d_queries: Kernel,
    d_keys: Kernel,
}

/// What each token of a stream sees, on the device.
pub struct AttentionMask {
    /// First place and number of places of three ranges, int32 `[T, 3, 2]`.
    ranges: Tensor,
    of_queries: Lists,
    of_keys: Lists,
}

/// [`Meetings`] on the device, int32.
struct Lists {
    starts: Tensor,
    with: Tensor,
}

impl Lists {
    fn new(meetings: &Meetings, device: Device) -> Self {
        let numbers = |list: &[i32]| Tensor::from_slice(list).to_device(device);
        Lists { starts: numbers(&meetings.starts), with: numbers(&meetings.with) }
    }
}

impl AttentionMask {
    /// `seen`: of each token; a multiple of [`AttentionKernels::TILE`] of them, each of which sees itself.
    pub fn new(seen: &[AttentionRanges], device: Device) -> Self {
        let sees_itself = |(place, ranges): (usize, &AttentionRanges)| {
            ranges.iter().any(|&(start, end)| (start..end).contains(&(place as i32)))
        };
        assert!(seen.iter().enumerate().all(sees_itself) && seen.len().is_multiple_of(TILE));
        let ranges: Vec<i32> =
            seen.iter().flatten().flat_map(|&(start, end)| [start, end.saturating_sub(start).max(0)]).collect();
        let (of_queries, of_keys) = meetings(seen, TILE, TILE);
        AttentionMask {
            ranges: Tensor::from_slice(&ranges).to_device(device),
            of_queries: Lists::new(&of_queries, device),
            of_keys: Lists::new(&of_keys, device),
        }
    }
}

impl AttentionKernels {
    /// Tokens of a stream are a multiple of this.
    pub const TILE: usize = TILE;

    /// Shared memory of a block, the most that a kernel takes: six tiles, and beside them log-sums, deltas and ranges of two
    /// tiles of queries.
    pub fn shared_bytes(shape: &KernelShape) -> usize {
        6 * TILE * shape.head_dim * 2 + 2 * TILE * 8 * 4
    }

    /// Compiles and loads them.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the words of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape) -> Result<Self> {
        let module = Module::compiled(device, SOURCE, &shape.macros())?;
        let tile_bytes = TILE * shape.head_dim * 2;
        Ok(AttentionKernels {
            forward: module.kernel("attention", 5 * tile_bytes, false)?,
            d_queries: module.kernel("attention_d_queries", 6 * tile_bytes, false)?,
            d_keys: module.kernel("attention_d_keys", Self::shared_bytes(&shape), false)?,
            shape,
        })
    }

    /// Mixed values `[T, heads x head_dim]` of `qkv [T, (heads + 2 kv_heads) x head_dim]`, and what the backward needs: the
    /// logarithms to base 2 of the sums of the weights, float32 `[heads, T]`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], here and below.
    pub fn forward(&self, qkv: &Tensor, sight: &AttentionMask) -> Result<(Tensor, Tensor)> {
        let tokens = self.tokens(qkv, sight);
        let KernelShape { heads, head_dim, .. } = self.shape;
        let mixed = Tensor::f_empty([tokens as i64, (heads * head_dim) as i64], (Kind::BFloat16, qkv.device()))?;
        let log_sums = Tensor::f_empty([heads as i64, tokens as i64], (Kind::Float, qkv.device()))?;
        let lists = [&sight.ranges, &sight.of_queries.starts, &sight.of_queries.with].map(Data);
        let arguments =
            [&[Data(qkv)], &lists[..], &[self.scale(), Data(&mixed), Data(&log_sums), Int(tokens as i32)]].concat();
        // SAFETY: as declared in the source, sizes just checked; the lists name tiles of the stream.
        unsafe { self.forward.launch([tokens / TILE, heads], THREADS, &arguments)? };
        Ok((mixed, log_sums))
    }

    /// The gradient of `qkv` from that of the mixed values.
    pub fn backward(
        &self,
        qkv: &Tensor,
        mixed: &Tensor,
        log_sums: &Tensor,
        d_mixed: &Tensor,
        sight: &AttentionMask,
    ) -> Result<Tensor> {
        let tokens = self.tokens(qkv, sight);
        let KernelShape { heads, kv_heads, head_dim, .. } = self.shape;
        assert!([mixed, d_mixed].iter().all(|x| x.numel() == tokens * heads * head_dim));
        assert_eq!(log_sums.numel(), tokens * heads);
        let (d_qkv, deltas) = (qkv.f_empty_like()?, log_sums.f_empty_like()?);
        let AttentionMask { ranges, of_queries, of_keys } = sight;
        let (scale, count) = ([self.scale()], [Int(tokens as i32)]);
        let lists = [qkv, ranges, &of_queries.starts, &of_queries.with].map(Data);
        let rest = [mixed, log_sums, d_mixed, &d_qkv, &deltas].map(Data);
        // SAFETY: as above.
        unsafe {
            let arguments = [&lists[..], &scale, &rest, &count].concat();
            self.d_queries.launch([tokens / TILE, heads], THREADS, &arguments)?;
        }
        let lists = [qkv, ranges, &of_keys.starts, &of_keys.with].map(Data);
        let rest = [log_sums, &deltas, d_mixed, &d_qkv].map(Data);
        // SAFETY: as above.
        unsafe {
            let arguments = [&lists[..], &scale, &rest, &count].concat();
            self.d_keys.launch([tokens / TILE, kv_heads], THREADS, &arguments)?;
        }
        Ok(d_qkv)
    }

    fn tokens(&self, qkv: &Tensor, sight: &AttentionMask) -> usize {
        let KernelShape { heads, kv_heads, head_dim, .. } = self.shape;
        let tokens = sight.ranges.numel() / 6;
        assert!(tokens.is_multiple_of(TILE) && qkv.numel() == tokens * (heads + 2 * kv_heads) * head_dim);
        tokens
    }

    /// Of the scores, times the logarithm of e to base 2.
    fn scale(&self) -> Argument<'static> {
        Float(std::f32::consts::LOG2_E / (self.shape.head_dim as f32).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
            assert!(compile(SOURCE, (9, 0), &shape.macros()).unwrap().starts_with(b"\x7fELF"));
        }
    }
}
