//! The kernels of a decoding step (csrc/decode.cu), compiled for one model's shape.

use tch::Tensor;

use super::nvrtc::{Argument, Kernel, Module, compile, compute_capability, max_shared_bytes};
use super::shape::{KernelShape, MAX_FUSED_TOKENS, SMALL_STEP};
use crate::Result;
use Argument::{Data, Float, Int, MaybeData};

const SOURCE: &str = concat!(include_str!("../../csrc/bf16.cuh"), include_str!("../../csrc/decode.cu"));
/// Rows of a weight that one block multiplies.
const BLOCK_ROWS: usize = 16;
/// Shared memory that the sums of a fused kernel take at most.
const SUMS_BYTES: usize = 24 << 10;
const FEW_THREADS: usize = 256;

/// Most shared memory for the tokens of a fused kernel.
fn most_staged_bytes(capability: (u32, u32)) -> usize {
    max_shared_bytes(capability).saturating_sub(SUMS_BYTES)
}

/// Shared memory for the tokens of a fused kernel, rows of `width` (`STAGED_BYTES` in the source); 0 where they are not copied.
fn staged_bytes(tokens: usize, width: usize, capability: (u32, u32)) -> usize {
    let bytes = tokens * (width + 32) * 2;
    if tokens > 8 && bytes <= most_staged_bytes(capability) { bytes } else { 0 }
}

/// What the source is told.
fn macros(shape: &KernelShape, capability: (u32, u32)) -> Vec<(&'static str, String)> {
    let mut macros = shape.macros();
    macros.push(("MOST_STAGED_BYTES", most_staged_bytes(capability).to_string()));
    macros
}

/// The kernels that multiply weights with at most so many tokens.
struct Few {
    tokens: usize,
    qkv: Kernel,
    qkv_rotated: Kernel,
    output: Kernel,
    gate_up: Kernel,
    down: Kernel,
    head: Kernel,
}

/// Kernels of one shape on one device. Tensors are contiguous, bf16 unless said; `T` tokens.
pub struct DecodeKernels {
    /// What they were compiled for.
    pub shape: KernelShape,
    few: [Few; 3],
    embed: Kernel,
    best_of_blocks: Kernel,
    add_norm: Kernel,
    gated: Kernel,
    best_token: Kernel,
    rotate_and_cache: Kernel,
    attention: Kernel,
    rotate_and_attend: Kernel,
}

/// Where the tokens of a step belong; int32 unless said.
#[derive(Debug)]
pub struct Places {
    /// Cache row of each token `[T]`, -1 for padding.
    pub row: Tensor,
    /// Slot of its key and value `[T]`.
    pub slot: Tensor,
    /// Its rotary position `[T]`.
    pub position: Tensor,
    /// Slots of its window that it sees, as bits of 64-bit numbers: int32 `[2 T]`.
    pub visible: Tensor,
    /// Cache row of each tile, -1 for none.
    pub tile_row: Tensor,
    /// First token of each tile.
    pub tile_token: Tensor,
    /// Tokens of each tile.
    pub tile_length: Tensor,
    /// First slot of the window that each tile belongs to.
    pub tile_window: Tensor,
}

/// What attention finds in a projection.
#[derive(Debug, Clone, Copy)]
pub enum Queries {
    /// Queries, keys and values as they were projected.
    Plain,
    /// Rotated queries; keys and values are in the cache.
    Rotated,
}

/// The cache of a layer and how keys get there.
#[derive(Debug)]
pub struct LayerCache<'t> {
    /// `[rows, kv_heads, capacity, head_dim]`
    pub keys: &'t Tensor,
    /// `[rows, kv_heads, head_dim, capacity]`
    pub values: &'t Tensor,
    /// Slots of a row.
    pub capacity: usize,
    /// Cosines and sines, float32 `[positions, head_dim / 2]`.
    pub table: &'t (Tensor, Tensor),
    /// Weights of the norms of queries and keys, where the model has them.
    pub norms: Option<&'t (Tensor, Tensor)>,
}

/// How tokens are chosen.
#[derive(Debug)]
pub struct SamplingParams {
    /// 0 for the likeliest.
    pub inverse_temperature: f32,
    /// Key of each output's randomness, 64-bit numbers: int32 `[2 outputs]`.
    pub keys: Tensor,
}

/// Machine code for a shape; needs no GPU.
///
/// # Errors
/// [`crate::Error::Torch`] with the compiler's words.
pub fn machine_code(shape: &KernelShape, capability: (u32, u32)) -> Result<Vec<u8>> {
    compile(SOURCE, capability, &macros(shape, capability))
}

impl DecodeKernels {
    /// Compiles and loads them.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the words of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape) -> Result<Self> {
        let capability = compute_capability(device)?;
        let module = Module::compiled(device, SOURCE, &macros(&shape, capability))?;
        // Hopper and later start a kernel while the one before it ends.
        let overlaps = capability.0 >= 9;
        let overlapping = |name: &str| module.kernel(name, 0, overlaps);
        let few = |tiles: usize| {
            let tokens = tiles * 8;
            let named = |name: &str, shared_bytes| module.kernel(&format!("{name}_{tiles}"), shared_bytes, overlaps);
            let staged = |width| staged_bytes(tokens, width, capability);
            Ok::<_, crate::Error>(Few {
                tokens,
                qkv: named("qkv", staged(shape.hidden))?,
                qkv_rotated: named("qkv_rotated", staged(shape.hidden))?,
                output: named("output", staged(shape.heads * shape.head_dim))?,
                gate_up: named("gate_up", 0)?,
                down: named("down", staged(shape.ffn))?,
                head: named("head", 0)?,
            })
        };
        Ok(DecodeKernels {
            few: [few(1)?, few(2)?, few(4)?],
            embed: overlapping("embed")?,
            best_of_blocks: overlapping("best_of_blocks")?,
            add_norm: overlapping("add_norm")?,
            gated: overlapping("gated")?,
            best_token: overlapping("best_token")?,
            rotate_and_cache: overlapping("rotate_and_cache")?,
            attention: module.kernel("attention", shape.merging_bytes(), overlaps)?,
            rotate_and_attend: module.kernel(
                "rotate_and_attend",
                shape.merging_bytes() + shape.query_bytes(),
                overlaps,
            )?,
            shape,
        })
    }

    /// The smallest that takes so many tokens.
    fn few(&self, tokens: usize) -> &Few {
        self.few
            .iter()
            .find(|few| tokens <= few.tokens)
            .unwrap_or_else(|| unreachable!("at most {MAX_FUSED_TOKENS} tokens"))
    }

    /// `x [T, hidden]` = rows of `table [vocab, hidden]`; tokens int32 `[T]`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], here and below.
    pub fn embed(&self, table: &Tensor, tokens: &Tensor, x: &Tensor) -> Result<()> {
        let count = tokens.numel();
        assert_eq!(x.numel(), count * self.shape.hidden);
        // SAFETY: as declared in the source; ids were checked against the vocabulary by whoever made them.
        unsafe { self.embed.launch([count, 1], 64, &[Data(table), Data(tokens), Data(x)]) }
    }

    /// `out [T, qkv]` = projections of the RMS norm of `x [T, hidden]`; T <= [`MAX_FUSED_TOKENS`]. Queries are rotated, keys and
    /// values go into the layer's cache, unless a norm wants to see whole heads first.
    pub fn fused_qkv(
        &self,
        (weight, bias): (&Tensor, Option<&Tensor>),
        x: &Tensor,
        norm: &Tensor,
        out: &Tensor,
        places: &Places,
        layer: &LayerCache<'_>,
    ) -> Result<Queries> {
        let tokens = x.numel() / self.shape.hidden;
        assert_eq!((weight.numel(), out.numel()), (self.shape.qkv() * self.shape.hidden, tokens * self.shape.qkv()));
        let grid = [self.shape.qkv().div_ceil(BLOCK_ROWS), 1];
        let few = self.few(tokens);
        let plain = [Data(weight), Data(x), Data(norm), MaybeData(bias), Data(out), Int(tokens as i32)];
        if self.shape.query_key_norm {
            // SAFETY: as declared in the source, sizes just checked.
            unsafe { few.qkv.launch(grid, FEW_THREADS, &plain)? };
            return Ok(Queries::Plain);
        }
        let places = [&places.row, &places.slot, &places.position, &layer.table.0, &layer.table.1].map(Data);
        let cache = [Data(layer.keys), Data(layer.values), Int(layer.capacity as i32)];
        let arguments = [&plain[..], &places, &cache].concat();
        // SAFETY: as declared in the source; whoever made the places keeps slots and positions within the capacity.
        unsafe { few.qkv_rotated.launch(grid, FEW_THREADS, &arguments)? };
        Ok(Queries::Rotated)
    }

    /// `x [T, hidden]` += the output projection of `mixed [T, heads x head_dim]`; T <= [`MAX_FUSED_TOKENS`].
    pub fn fused_output(&self, weight: &Tensor, mixed: &Tensor, bias: Option<&Tensor>, x: &Tensor) -> Result<()> {
        let tokens = x.numel() / self.shape.hidden;
        assert_eq!(mixed.numel(), tokens * self.shape.heads * self.shape.head_dim);
        let arguments = [Data(weight), Data(mixed), MaybeData(bias), Data(x), Int(tokens as i32)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.few(tokens).output.launch([self.shape.hidden.div_ceil(BLOCK_ROWS), 1], FEW_THREADS, &arguments) }
    }

    /// `inner [T, ffn]` = silu(gate) * up of the RMS norm of `x [T, hidden]`; T <= [`MAX_FUSED_TOKENS`].
    pub fn fused_gate_up(&self, weight: &Tensor, x: &Tensor, norm: &Tensor, inner: &Tensor) -> Result<()> {
        let tokens = x.numel() / self.shape.hidden;
        assert_eq!((weight.numel(), inner.numel()), (2 * self.shape.ffn * self.shape.hidden, tokens * self.shape.ffn));
        let arguments = [Data(weight), Data(x), Data(norm), Data(inner), Int(tokens as i32)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe {
            self.few(tokens).gate_up.launch([self.shape.ffn.div_ceil(BLOCK_ROWS / 2), 1], FEW_THREADS, &arguments)
        }
    }

    /// `x [T, hidden]` += the down projection of `inner [T, ffn]`; T <= [`MAX_FUSED_TOKENS`].
    pub fn fused_down(&self, weight: &Tensor, inner: &Tensor, x: &Tensor) -> Result<()> {
        let tokens = x.numel() / self.shape.hidden;
        assert_eq!(inner.numel(), tokens * self.shape.ffn);
        let arguments = [Data(weight), Data(inner), Data(x), Int(tokens as i32)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.few(tokens).down.launch([self.shape.hidden.div_ceil(BLOCK_ROWS), 1], FEW_THREADS, &arguments) }
    }

    /// The token chosen after each of `x [T, hidden]`: int32 `predicted [T]`; T <= [`MAX_FUSED_TOKENS`].
    pub fn fused_sample(
        &self,
        head: &Tensor,
        x: &Tensor,
        norm: &Tensor,
        sampling: &SamplingParams,
        predicted: &Tensor,
    ) -> Result<()> {
        let tokens = predicted.numel();
        assert_eq!((x.numel(), sampling.keys.numel()), (tokens * self.shape.hidden, tokens * 2));
        let few = self.few(tokens);
        let blocks = self.shape.vocab.div_ceil(BLOCK_ROWS);
        let empty = |kind| Tensor::f_empty([(blocks * few.tokens) as i64], (kind, x.device()));
        let (best, best_id) = (empty(tch::Kind::Float)?, empty(tch::Kind::Int)?);
        let arguments = [
            Data(head),
            Data(x),
            Data(norm),
            Data(&best),
            Data(&best_id),
            Int(tokens as i32),
            Float(sampling.inverse_temperature),
            Data(&sampling.keys),
        ];
        let joined = [Data(&best), Data(&best_id), Int(blocks as i32), Int(few.tokens as i32), Data(predicted)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe {
            few.head.launch([blocks, 1], FEW_THREADS, &arguments)?;
            self.best_of_blocks.launch([tokens, 1], 1024, &joined)
        }
    }

    /// `x [T, hidden]` += `delta`; `normed` = its RMS norm.
    pub fn add_rms_norm(&self, x: &Tensor, delta: Option<&Tensor>, weight: &Tensor, normed: &Tensor) -> Result<()> {
        let hidden = self.shape.hidden;
        assert!(x.numel() == normed.numel() && delta.is_none_or(|delta| delta.numel() == x.numel()));
        let threads = (hidden / 8).next_multiple_of(32).min(256);
        let arguments = [Data(x), MaybeData(delta), Data(weight), Data(normed)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.add_norm.launch([x.numel() / hidden, 1], threads, &arguments) }
    }

    /// `out [T, ffn]` = silu of the first half of `both [T, 2 ffn]`, times the second.
    pub fn swiglu(&self, both: &Tensor, out: &Tensor) -> Result<()> {
        assert_eq!(both.numel(), out.numel() * 2);
        let arguments = [Data(both), Data(out), Int((out.numel() / self.shape.ffn) as i32)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.gated.launch([(out.numel() / 8).div_ceil(256), 1], 256, &arguments) }
    }

    /// The token chosen by each row of float32 `logits [T, vocab]`: int32 `predicted [T]`.
    pub fn sample(&self, logits: &Tensor, sampling: &SamplingParams, predicted: &Tensor) -> Result<()> {
        let tokens = predicted.numel();
        assert_eq!((logits.numel(), sampling.keys.numel()), (tokens * self.shape.vocab, tokens * 2));
        let arguments = [Data(logits), Float(sampling.inverse_temperature), Data(&sampling.keys), Data(predicted)];
        // SAFETY: as declared in the source, sizes just checked.
        unsafe { self.best_token.launch([tokens, 1], 512, &arguments) }
    }

    /// `mixed [T, heads x head_dim]`: the attention of the queries of `qkv [T, qkv]` over what each sees of the layer's cache.
    /// Plain queries and keys are normed (where the model does) and rotated, and keys and values put into the cache; the
    /// rotated queries may take the place of the plain ones.
    pub fn attention(
        &self,
        queries: Queries,
        qkv: &Tensor,
        places: &Places,
        layer: &LayerCache<'_>,
        mixed: &Tensor,
    ) -> Result<()> {
        let Places { row, slot, position, visible, tile_row, tile_token, tile_length, tile_window } = places;
        let (query_norm, key_norm) = (layer.norms.map(|norms| &norms.0), layer.norms.map(|norms| &norms.1));
        let rotation = [Data(&layer.table.0), Data(&layer.table.1), MaybeData(query_norm), MaybeData(key_norm)];
        let cache = [Data(layer.keys), Data(layer.values), Int(layer.capacity as i32)];
        let by_itself = matches!(queries, Queries::Plain) && row.numel() <= SMALL_STEP;
        if matches!(queries, Queries::Plain) && !by_itself {
            let places = [qkv, row, slot, position].map(Data);
            let arguments = [&places[..], &rotation, &cache].concat();
            // SAFETY: as declared in the source; whoever made the places keeps slots and positions within the capacity.
            unsafe { self.rotate_and_cache.launch([row.numel(), 1], 256, &arguments)? };
        }
        let tiles = [tile_row, tile_token, tile_length, tile_window, slot, visible, mixed].map(Data);
        let arguments = [&[Data(qkv)], &cache[..2], &tiles, &cache[2..], &rotation, &[Data(position)]].concat();
        let kernel = if by_itself { &self.rotate_and_attend } else { &self.attention };
        // SAFETY: as above.
        unsafe { kernel.launch([tile_row.numel(), self.shape.kv_heads], self.shape.attention_warps() * 32, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_compile_for_every_kind_of_model_without_a_gpu() {
        let small = KernelShape {
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            vocab: 49152,
            eps: 1e-5,
            query_key_norm: false,
        };
        let qwen3 = KernelShape { hidden: 1024, heads: 16, kv_heads: 8, head_dim: 128, query_key_norm: true, ..small };
        let tiny = KernelShape { hidden: 128, heads: 4, kv_heads: 4, head_dim: 32, ffn: 256, vocab: 512, ..small };
        // GPUs differ in the shared memory that tokens are copied to.
        let gpus = [(8, 0), (8, 6), (12, 0)].map(|capability| (small, capability));
        for (shape, capability) in [(small, (9, 0)), (qwen3, (9, 0)), (tiny, (9, 0))].into_iter().chain(gpus) {
            assert!(shape.is_supported());
            let code = machine_code(&shape, capability).unwrap();
            assert!(code.starts_with(b"\x7fELF"), "{shape:?} {capability:?}");
        }
        assert!(!KernelShape { head_dim: 80, ..small }.is_supported());
    }
}
