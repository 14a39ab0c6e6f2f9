//! Matrix products of many tokens with what follows them in the same kernel
//! (csrc/batch_products.cu), for Hopper.

use tch::Tensor;

use super::launch::{Argument, Kernel, Param, Signature, count, float32, int32, nullable, tiles};
use super::nvrtc::{HOPPER, Macros, Module, compute_capability, num_multiprocessors};
use super::shape::KernelShape;
use crate::Result;
use Argument::{Optional, Tensor as Data};

const SOURCE: &str = concat!(
    include_str!("../../csrc/bf16.cuh"),
    include_str!("../../csrc/decode.cuh"),
    include_str!("../../csrc/sampling.cuh"),
    include_str!("../../csrc/hopper.cuh"),
    include_str!("../../csrc/batch_products.cu")
);

/// Tokens in a tile, and rows of a half of a tile of the weight.
const TILE_TOKENS: usize = 128;
/// Shared memory: a ring of 4 chunks of tokens and weights and its barriers, each from a multiple of
/// 1,024 bytes on; and for the feed-forward layer a tile of its output.
const ARGMAX_BYTES: usize = (4 * 48 + 2) << 10;
const GATE_UP_BYTES: usize = ARGMAX_BYTES + (32 << 10);

struct Sizes {
    shape: KernelShape,
    tokens: usize,
    /// Of the adapters.
    rank: usize,
    multiprocessors: usize,
}

const NORMED: Param<Sizes> = tiles("normed", |s| [s.tokens, 1, s.shape.hidden], |_| TILE_TOKENS);
const NUM_TOKENS: Param<Sizes> = count("num_tokens", |s| s.tokens);

const GATE_UP: Signature<Sizes> = Signature {
    name: "batch_gate_up",
    grid: |s| [s.multiprocessors, 1],
    threads: |_| 384,
    params: &[&[
        NORMED,
        tiles("weight", |s| [2 * s.shape.ffn, 1, s.shape.hidden], |_| TILE_TOKENS),
        tiles("inner", |s| [s.tokens, 1, s.shape.ffn], |_| 64),
        nullable(tiles("low_rank", |s| [s.tokens, 1, s.rank], |_| TILE_TOKENS)),
        nullable(tiles("lora_b", |s| [2 * s.shape.ffn, 1, s.rank], |_| TILE_TOKENS)),
        NUM_TOKENS,
        count("rank", |s| s.rank),
    ]],
};
const ARGMAX: Signature<Sizes> = Signature {
    name: "batch_argmax",
    params: &[&[
        NORMED,
        tiles("weight", |s| [s.shape.vocab, 1, s.shape.hidden], |_| TILE_TOKENS),
        float32("best", |s| s.tokens * num_tiles(&s.shape)),
        int32("best_id", |s| s.tokens * num_tiles(&s.shape)),
        NUM_TOKENS,
    ]],
    ..GATE_UP
};

/// Tiles of the vocabulary.
pub(super) fn num_tiles(shape: &KernelShape) -> usize {
    shape.vocab.div_ceil(2 * TILE_TOKENS)
}

/// Kernels of one shape on one device. Tensors are contiguous, bfloat16 unless said otherwise; `T`
/// is the number of tokens.
pub(super) struct BatchProducts {
    shape: KernelShape,
    multiprocessors: usize,
    gate_up: Kernel<Sizes>,
    argmax: Kernel<Sizes>,
}

impl BatchProducts {
    /// Compiles and loads the kernels with the macros of all kernels of a decoding step. `None` if the
    /// device is not of Hopper.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] with the message of the compiler or the driver; below,
    /// [`crate::Error::Internal`] if a tensor does not fit.
    pub(super) fn new(device: usize, shape: KernelShape, macros: &Macros) -> Result<Option<Self>> {
        if compute_capability(device)? != HOPPER {
            return Ok(None);
        }
        let module = Module::compiled(device, SOURCE, macros)?;
        let kernel = |signature, shared_bytes| Kernel::new(&module, signature, "", shared_bytes, true);
        Ok(Some(BatchProducts {
            shape,
            multiprocessors: num_multiprocessors(device)?,
            gate_up: kernel(&GATE_UP, GATE_UP_BYTES)?,
            argmax: kernel(&ARGMAX, ARGMAX_BYTES)?,
        }))
    }

    /// `inner [T, ffn]` = silu(gate) * up, where `weight` holds the rows of the gate, then those of
    /// the up projection of `normed [T, hidden]`. `adapters`: `low_rank [T, rank]` and `lora_b [2 ffn,
    /// rank]`, whose product is added before.
    pub(super) fn gate_up(
        &self,
        weight: &Tensor,
        normed: &Tensor,
        inner: &Tensor,
        adapters: Option<(&Tensor, &Tensor)>,
    ) -> Result<()> {
        let (low_rank, lora_b) = adapters.unzip();
        let rank = lora_b.map_or(0, |lora_b| lora_b.size()[1] as usize);
        let sizes = Sizes { rank, ..self.sizes(normed) };
        let arguments = [Data(normed), Data(weight), Data(inner), Optional(low_rank), Optional(lora_b)];
        // SAFETY: no argument is an index.
        unsafe { self.gate_up.launch(&sizes, &arguments) }
    }

    /// The largest logit after each row of `normed [T, hidden]` in each tile of the vocabulary,
    /// float32 `best [T, tiles]`, and its token, int32 `best_id [T, tiles]`.
    pub(super) fn argmax(&self, head: &Tensor, normed: &Tensor, best: &Tensor, best_id: &Tensor) -> Result<()> {
        let arguments = [Data(normed), Data(head), Data(best), Data(best_id)];
        // SAFETY: no argument is an index.
        unsafe { self.argmax.launch(&self.sizes(normed), &arguments) }
    }

    fn sizes(&self, normed: &Tensor) -> Sizes {
        let tokens = normed.numel() / self.shape.hidden;
        Sizes { shape: self.shape, tokens, rank: 0, multiprocessors: self.multiprocessors }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::tests::assert_declared;
    use crate::cuda::nvrtc::compile;

    #[test]
    fn the_kernels_compile_and_match_their_signatures() {
        let small = KernelShape::SMOLLM2;
        let wide = KernelShape { hidden: 4096, heads: 32, kv_heads: 32, head_dim: 128, ffn: 11008, ..small };
        for shape in [small, wide, KernelShape::TWO_TOKEN_TILES] {
            let macros = [shape.macros(), vec![("MAX_CANDIDATES", "1".to_owned())]].concat();
            assert!(compile(SOURCE, HOPPER, &macros).unwrap().is_elf(), "{shape:?}");
        }
        for signature in [&GATE_UP, &ARGMAX] {
            assert_declared(SOURCE, signature);
        }
        assert_eq!(SOURCE.matches("\"C\" __global__").count(), 2, "a kernel has no signature");
    }
}
