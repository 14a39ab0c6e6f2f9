//! The matrix products of a decoding step of up to 64 tokens on Hopper (csrc/layer_products.cu),
//! compiled for one model's shape.

use std::ops::RangeInclusive;

use tch::{Device, Kind, Tensor};

use super::decode::max_fused_tokens;
use super::draft_adapters::{AdapterRanks, DraftAdapters};
use super::forward_input::{ForwardInput, InitialRows};
use super::launch::{Argument, Kernel, Param, Signature, aligned, bf16, count, float32, int, int32, nullable, tiles};
use super::nvrtc::{HOPPER, Macros, Module, compute_capability, num_multiprocessors};
use super::shape::KernelShape;
use crate::{Error, Result};
use Argument::{Int, Optional, Tensor as Data};

const SOURCE: &str = concat!(
    include_str!("../../csrc/bf16.cuh"),
    include_str!("../../csrc/decode.cuh"),
    include_str!("../../csrc/hopper.cuh"),
    include_str!("../../csrc/layer_products.cu")
);

/// Maximum number of tokens of each version of the kernel.
const VERSIONS: [usize; 3] = [16, 32, MAX_TOKENS];
/// Maximum number of tokens of a step: the rows of one wgmma.
const MAX_TOKENS: usize = 64;
/// Threads of a block: a warpgroup that multiplies, and three more warps.
const THREADS: usize = 224;
/// Shared memory of a block.
const SHARED_BYTES: usize = 224 << 10;
/// Maximum number of rows of a weight that a block multiplies (`weight_bytes` of a slot).
const MAX_ROWS: usize = 192;
/// The products between two attentions, in the order of the kernel.
const OUTPUT: i32 = 0;
const DOWN: i32 = 2;
const NEXT: i32 = 3;
/// Counts of a launch: of the products but the last, and of those with A of adapters.
const COUNTS: usize = 7;
/// Rows of A of adapters that a block multiplies, at most: with more, it would be late with its rows
/// of a weight.
const MAX_ADAPTER_ROWS: usize = 32;

/// The sizes that determine the shapes of the kernels' arguments.
#[derive(Clone, Copy)]
struct Sizes {
    shape: KernelShape,
    ranks: AdapterRanks,
    tokens: usize,
    /// Rows of the table that the residual stream begins with.
    table_rows: usize,
    /// Maximum number of tokens of the kernel.
    max_tokens: usize,
    multiprocessors: usize,
    /// Launches of a step.
    launches: usize,
}

/// Rows of a weight that each block multiplies.
fn block_rows(rows: usize, multiprocessors: usize) -> usize {
    rows.div_ceil(multiprocessors).next_multiple_of(8)
}

/// Numbers of tokens for which the products were measured to be fastest, on 132 multiprocessors.
/// Fewer tokens are for the fused kernels, and more for cuBLAS.
fn fastest_tokens(shape: &KernelShape) -> RangeInclusive<usize> {
    if shape.hidden >= 2048 { 9..=32 } else { max_fused_tokens(shape) + 1..=MAX_TOKENS }
}

/// Whether the products are the fastest for some steps of a model, and blocks on so many
/// multiprocessors can multiply its weights and adapters.
fn supports(shape: &KernelShape, ranks: AdapterRanks, multiprocessors: usize) -> bool {
    let rows = |rows| block_rows(rows, multiprocessors);
    !fastest_tokens(shape).is_empty()
        && [rows(shape.qkv()), rows(shape.hidden), 2 * rows(shape.ffn)].iter().all(|rows| *rows <= MAX_ROWS)
        && max_rank(ranks) <= MAX_ADAPTER_ROWS * multiprocessors
}

/// The largest rank of the adapters of a product, at least 1.
fn max_rank(ranks: AdapterRanks) -> usize {
    ranks.all().into_iter().fold(1, usize::max)
}

/// Rows of A of adapters that a block multiplies: as few as blocks without rows of a weight can share.
fn adapter_rows(shape: &KernelShape, ranks: AdapterRanks, multiprocessors: usize) -> usize {
    let busy = [shape.qkv(), shape.hidden, shape.ffn].map(|rows| rows.div_ceil(block_rows(rows, multiprocessors)));
    let num_idle = multiprocessors - busy.into_iter().fold(0, usize::max).min(multiprocessors - 1);
    max_rank(ranks).div_ceil(num_idle).next_multiple_of(8).min(MAX_ADAPTER_ROWS)
}

fn macros(shape: &KernelShape, ranks: AdapterRanks, multiprocessors: usize) -> Macros {
    let mut macros = [shape.macros(), ranks.macros()].concat();
    let rows = |rows| block_rows(rows, multiprocessors).to_string();
    macros.extend([
        ("MAX_TOKENS", MAX_TOKENS.to_string()),
        ("PRODUCT_THREADS", THREADS.to_string()),
        ("SHARED_BYTES", SHARED_BYTES.to_string()),
        ("QKV_ROWS", rows(shape.qkv())),
        ("HIDDEN_ROWS", rows(shape.hidden)),
        ("FFN_ROWS", rows(shape.ffn)),
        ("LOW_RANK", max_rank(ranks).to_string()),
        ("ADAPTER_ROWS", adapter_rows(shape, ranks, multiprocessors).to_string()),
    ]);
    macros
}

/// Blocks that have rows of the residual stream.
fn hidden_blocks(sizes: &Sizes) -> usize {
    sizes.shape.hidden.div_ceil(hidden_rows(sizes))
}

fn hidden_rows(sizes: &Sizes) -> usize {
    block_rows(sizes.shape.hidden, sizes.multiprocessors)
}

fn ffn_rows(sizes: &Sizes) -> usize {
    block_rows(sizes.shape.ffn, sizes.multiprocessors)
}

fn qkv_rows(sizes: &Sizes) -> usize {
    block_rows(sizes.shape.qkv(), sizes.multiprocessors)
}

const fn lora_a(name: &'static str, sizes: fn(&Sizes) -> [usize; 3]) -> Param<Sizes> {
    nullable(tiles(name, sizes, |s| adapter_rows(&s.shape, s.ranks, s.multiprocessors)))
}

const fn token_tiles(name: &'static str, sizes: fn(&Sizes) -> [usize; 3]) -> Param<Sizes> {
    tiles(name, sizes, |s| s.max_tokens)
}

const fn norm(name: &'static str) -> Param<Sizes> {
    bf16(name, |s| s.shape.hidden)
}

const X: Param<Sizes> = bf16("x", |s| s.tokens * s.shape.hidden);
const SCALED: Param<Sizes> = bf16("scaled", |s| s.tokens * s.shape.hidden);
const SQUARES: Param<Sizes> = float32("squares", |s| hidden_blocks(s) * MAX_TOKENS);

const EMBED_SCALED: Signature<Sizes> = Signature {
    name: "embed_scaled",
    grid: |s| [s.tokens, 1],
    threads: |_| 256,
    params: &[&[
        bf16("table", |s| s.table_rows * s.shape.hidden),
        int32("tokens", |s| s.tokens),
        norm("norm"),
        X,
        SCALED,
        SQUARES,
        int32("counts", |s| s.launches * COUNTS),
        count("num_counts", |s| s.launches * COUNTS),
    ]],
};
const PRODUCTS: Signature<Sizes> = Signature {
    name: "layer_products_",
    grid: |s| [s.multiprocessors, 1],
    threads: |_| THREADS,
    params: &[
        &[
            tiles("output_tiles", |s| [s.shape.hidden, 1, s.shape.attn()], hidden_rows),
            tiles("gate_up_tiles", |s| [2 * s.shape.ffn, 1, s.shape.hidden], ffn_rows),
            tiles("down_tiles", |s| [s.shape.hidden, 1, s.shape.ffn], hidden_rows),
            tiles("next_tiles", |s| [s.shape.qkv(), 1, s.shape.hidden], qkv_rows),
            token_tiles("attn_out_tiles", |s| [s.tokens, 1, s.shape.attn()]),
            token_tiles("scaled_tiles", |s| [s.tokens, 1, s.shape.hidden]),
            token_tiles("inner_tiles", |s| [s.tokens, 1, s.shape.ffn]),
        ],
        &[
            lora_a("output_a", |s| [s.ranks.output, 1, s.shape.attn()]),
            nullable(tiles("output_b", |s| [s.shape.hidden, 1, s.ranks.output], hidden_rows)),
            lora_a("gate_up_a", |s| [s.ranks.gate_up, 1, s.shape.hidden]),
            nullable(tiles("gate_up_b", |s| [2 * s.shape.ffn, 1, s.ranks.gate_up], ffn_rows)),
            lora_a("down_a", |s| [s.ranks.down, 1, s.shape.ffn]),
            nullable(tiles("down_b", |s| [s.shape.hidden, 1, s.ranks.down], hidden_rows)),
            lora_a("next_a", |s| [s.ranks.qkv, 1, s.shape.hidden]),
            nullable(tiles("next_b", |s| [s.shape.qkv(), 1, s.ranks.qkv], qkv_rows)),
            nullable(token_tiles("low_rank_tiles", |s| [MAX_TOKENS, 4, max_rank(s.ranks)])),
        ],
        &[
            int("first"),
            int("last"),
            nullable(aligned(|_| 2, bf16("output_bias", |s| s.shape.hidden))),
            nullable(aligned(|_| 2, bf16("qkv_bias", |s| s.shape.qkv()))),
            norm("post_norm"),
            norm("next_norm"),
        ],
        &[
            X,
            SCALED,
            SQUARES,
            bf16("inner", |s| s.tokens * s.shape.ffn),
            bf16("qkv", |s| s.tokens * s.shape.qkv()),
            count("num_tokens", |s| s.tokens),
        ],
        &[
            int32("counts", |_| COUNTS),
            int32("adapted", |s| s.tokens),
            nullable(bf16("low_rank", |s| MAX_TOKENS * 4 * max_rank(s.ranks))),
        ],
    ],
};

/// The kernels of one shape on one device. Tensors are contiguous, bfloat16 unless said otherwise;
/// `T` is the number of tokens.
pub struct LayerProducts {
    /// Of a step without tokens.
    sizes: Sizes,
    /// For up to as many tokens as [`VERSIONS`] says.
    versions: [Kernel<Sizes>; VERSIONS.len()],
    /// If there are adapters for drafts.
    adapted: Option<Adapted>,
    embed: Kernel<Sizes>,
    /// How many blocks have finished each product of each launch, int32.
    counts: Tensor,
}

/// The kernels for steps with draft tokens that have adapters.
struct Adapted {
    versions: [Kernel<Sizes>; VERSIONS.len()],
    /// A x of every product, `[MAX_TOKENS, products, rank]`. Columns that no product writes are read as
    /// factors of zeros.
    low_rank: Tensor,
}

/// What the products of a step read and write between each other.
pub struct Activations {
    /// The residual stream, `[T, hidden]`.
    pub x: Tensor,
    /// The residual stream times the weights of the next norm, `[T, hidden]`.
    scaled: Tensor,
    /// Each block's sums of squares of the residual stream, float32 `[blocks, MAX_TOKENS]`.
    squares: Tensor,
    /// `[T, ffn]`
    inner: Tensor,
    /// `[T, qkv]`
    pub qkv: Tensor,
    /// `[T, heads x head_dim]`
    pub attn_out: Tensor,
}

/// The weights between two attentions, and their biases. The last layer has no `qkv` after it.
pub struct ProductWeights<'t> {
    /// `[hidden, heads x head_dim]`, and `[hidden]`.
    pub output: (&'t Tensor, Option<&'t Tensor>),
    /// Of the norm before the feed-forward layer, `[hidden]`.
    pub post_norm: &'t Tensor,
    /// `[2 ffn, hidden]`
    pub gate_up: &'t Tensor,
    /// `[hidden, ffn]`
    pub down: &'t Tensor,
    /// Of the norm after the feed-forward layer, `[hidden]`.
    pub next_norm: &'t Tensor,
    /// Of the next layer, `[qkv, hidden]`, and `[qkv]`.
    pub qkv: (&'t Tensor, Option<&'t Tensor>),
    pub adapters: ProductAdapters<'t>,
}

/// Adapters of these weights for draft tokens.
#[derive(Clone, Copy, Default)]
pub struct ProductAdapters<'t> {
    pub output: Option<&'t DraftAdapters>,
    pub gate_up: Option<&'t DraftAdapters>,
    pub down: Option<&'t DraftAdapters>,
    pub qkv: Option<&'t DraftAdapters>,
}

/// The products that a launch computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Part {
    /// Queries, keys and values of the first of some layers.
    First,
    /// From the output projection of a layer to the queries, keys and values of the next.
    Middle,
    /// From the output projection of the last of them on.
    Last,
}

impl LayerProducts {
    /// Compiles and loads the kernels for models of so many layers, with adapters of these ranks. `None`
    /// if the GPU has no wgmma, other kernels are faster, or the weights or the adapters are too large.
    ///
    /// # Errors
    /// [`Error::Torch`] with the message of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape, ranks: AdapterRanks, num_layers: usize) -> Result<Option<Self>> {
        let multiprocessors = num_multiprocessors(device)?;
        if compute_capability(device)? != HOPPER || !supports(&shape, ranks, multiprocessors) {
            return Ok(None);
        }
        let module = Module::compiled(device, SOURCE, &macros(&shape, ranks, multiprocessors))?;
        let versions = |prefix: &str| {
            let version =
                |max_tokens| Kernel::new(&module, &PRODUCTS, &format!("{prefix}{max_tokens}"), SHARED_BYTES, true);
            let [small, medium, large] = VERSIONS.map(version);
            Ok::<_, Error>([small?, medium?, large?])
        };
        let adapted = || {
            let size = [MAX_TOKENS, 4, max_rank(ranks)].map(|size| size as i64);
            let low_rank = Tensor::f_zeros(size, (Kind::BFloat16, Device::Cuda(device)))?;
            Ok::<_, Error>(Adapted { versions: versions("adapted_")?, low_rank })
        };
        let launches = num_layers + 1;
        let sizes = Sizes { shape, ranks, tokens: 0, table_rows: 0, max_tokens: 0, multiprocessors, launches };
        Ok(Some(LayerProducts {
            sizes,
            versions: versions("")?,
            adapted: ranks.is_adapted().then(adapted).transpose()?,
            embed: Kernel::new(&module, &EMBED_SCALED, "", 0, true)?,
            counts: Tensor::f_empty([(sizes.launches * COUNTS) as i64], (Kind::Int, Device::Cuda(device)))?,
        }))
    }

    /// Whether a step of so many tokens is faster with these kernels than with the fused ones or
    /// cuBLAS.
    #[must_use]
    pub fn are_fastest(&self, num_tokens: usize) -> bool {
        fastest_tokens(&self.sizes.shape).contains(&num_tokens)
    }

    /// Memory for a step.
    ///
    /// # Errors
    /// [`Error::Torch`] if there is not enough.
    pub fn activations(&self, num_tokens: usize) -> Result<Activations> {
        let (shape, device) = (self.sizes.shape, self.counts.device());
        let empty = |sizes: [usize; 2], kind| Tensor::f_empty(sizes.map(|size| size as i64), (kind, device));
        let tokens = |width| empty([num_tokens, width], Kind::BFloat16);
        Ok(Activations {
            x: tokens(shape.hidden)?,
            scaled: tokens(shape.hidden)?,
            squares: empty([hidden_blocks(&self.sizes), MAX_TOKENS], Kind::Float)?,
            inner: tokens(shape.ffn)?,
            qkv: tokens(shape.qkv())?,
            attn_out: tokens(shape.attn())?,
        })
    }

    /// Begins a step, or the layers after the shared ones: the residual stream = rows of a table.
    /// `norm [hidden]` is the first of the next layer.
    ///
    /// # Errors
    /// [`Error::Internal`] if a tensor does not fit, else [`Error::Torch`]; here and below.
    pub(crate) fn begin(
        &self,
        rows: InitialRows<'_>,
        norm: &Tensor,
        input: &ForwardInput,
        to: &Activations,
    ) -> Result<()> {
        let sizes = Sizes { table_rows: rows.num_rows, ..self.input_sizes(input)? };
        let tensors = [rows.table, rows.indices, norm, &to.x, &to.scaled, &to.squares, &self.counts];
        // SAFETY: the writer of the input has checked the indices.
        unsafe { self.embed.launch(&sizes, &tensors.map(Data)) }
    }

    /// The products of launch `index` since [`Self::begin`], from 0. They read `attn_out`, update the
    /// residual stream and write `qkv`; weights that are not of this part are not read.
    ///
    /// There is a block for each multiprocessor, and blocks wait for each other: at a time, only one
    /// such kernel may run on a device.
    pub fn multiply(
        &self,
        (index, part): (usize, Part),
        weights: &ProductWeights<'_>,
        input: &ForwardInput,
        activations: &Activations,
    ) -> Result<()> {
        let sizes = self.input_sizes(input)?;
        let version = VERSIONS.iter().position(|version| sizes.tokens <= *version);
        let version = version.ok_or_else(|| Error::internal(format!("products of {} tokens", sizes.tokens)))?;
        let sizes = Sizes { max_tokens: VERSIONS[version], ..sizes };
        let Activations { x, scaled, squares, inner, qkv, attn_out } = activations;
        let ProductWeights { output, post_norm, gate_up, down, next_norm, qkv: next, adapters } = *weights;
        let adapted = self.adapted.as_ref().filter(|_| input.shape().has_adapted);
        let adapter_tiles = match adapted {
            Some(_) => [adapters.output, adapters.gate_up, adapters.down, adapters.qkv],
            None => [None; 4],
        };
        let adapter_tiles = adapter_tiles.iter().flat_map(|adapters| {
            let adapters = adapters.as_ref();
            [adapters.map(|adapters| &adapters.lora_a), adapters.map(|adapters| &adapters.lora_b)].map(Optional)
        });
        let adapter_tiles: Vec<Argument<'_>> = adapter_tiles.collect();
        let low_rank = Optional(adapted.map(|adapted| &adapted.low_rank));
        let versions = adapted.map_or(&self.versions, |adapted| &adapted.versions);
        let (first, last) = match part {
            Part::First => (NEXT, NEXT),
            Part::Middle => (OUTPUT, NEXT),
            Part::Last => (OUTPUT, DOWN),
        };
        let counts = self.counts.f_narrow(0, (index * COUNTS) as i64, COUNTS as i64)?;
        let arguments = [
            &[output.0, gate_up, down, next.0, attn_out, scaled, inner].map(Data)[..],
            &adapter_tiles,
            &[low_rank],
            &[Int(first), Int(last), Optional(output.1), Optional(next.1), Data(post_norm), Data(next_norm)],
            &[x, scaled, squares, inner, qkv, &counts, &input.adapted].map(Data),
            &[low_rank],
        ];
        // SAFETY: no argument is an index.
        unsafe { versions[version].launch(&sizes, &arguments.concat()) }
    }

    fn input_sizes(&self, input: &ForwardInput) -> Result<Sizes> {
        if input.limits().model != self.sizes.shape {
            return Err(Error::internal("the input was written for another model"));
        }
        Ok(Sizes { tokens: input.shape().num_tokens, ..self.sizes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::tests::assert_declared;
    use crate::cuda::nvrtc::compile;

    #[test]
    fn the_products_compile_for_every_kind_of_model_without_a_gpu() {
        let small = KernelShape::SMOLLM2;
        let qwen3 = KernelShape { hidden: 1024, heads: 16, kv_heads: 8, head_dim: 128, query_key_norm: true, ..small };
        let tiny = KernelShape { hidden: 96, heads: 6, kv_heads: 2, head_dim: 32, ffn: 160, vocab: 203, ..small };
        for shape in [small, qwen3, tiny] {
            let ranks = if shape == tiny { AdapterRanks::SOME } else { AdapterRanks::default() };
            assert!(compile(SOURCE, HOPPER, &macros(&shape, ranks, 132)).unwrap().is_elf(), "{shape:?}");
        }
    }

    #[test]
    fn the_signatures_match_the_source() {
        for signature in [&EMBED_SCALED, &PRODUCTS] {
            assert_declared(SOURCE, signature);
        }
        let num_kernels = SOURCE.matches("\"C\" __global__").count();
        assert_eq!(num_kernels, 2, "a kernel has no signature");
    }
}
