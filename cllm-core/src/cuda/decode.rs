//! The kernels of a decoding step (csrc/decode.cu), compiled for one model's shape.
//!
//! All functions are safe: a launch checks its tensors against the kernel's signature, and the
//! indices that kernels follow come in a [`ForwardInput`], whose contents were checked when they
//! were written.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::batch_products::{self, BatchProducts};
use super::draft_adapters::{AdapterRanks, DraftAdapters};
use super::forward_input::{ForwardInput, InitialRows, InputLimits, MAX_INTS_PER_OUTPUT, SamplingOptions};
use super::launch::{Argument, Kernel, Param, Signature, aligned, bf16, count, float32, int, int32, nullable, uint64};
use super::nvrtc::{Macros, Module, compute_capability, max_shared_bytes, num_multiprocessors};
use super::shape::KernelShape;
use super::slot_moves::SlotMoves;
use super::tiles::{MAX_SMALL_STEP_TOKENS, MAX_TILE_QUERIES, SLOTS_PER_READ, WARP_QUERIES, tile_tokens};
use crate::{Error, Result};
use Argument::{Int, Optional, Tensor as Data};

const SOURCE: &str = concat!(
    include_str!("../../csrc/bf16.cuh"),
    include_str!("../../csrc/decode.cuh"),
    include_str!("../../csrc/sampling.cuh"),
    include_str!("../../csrc/decode.cu")
);

/// Maximum number of tokens of a fused kernel's block. With more, blocks multiply groups of so many.
const GROUP_TOKENS: usize = 32;
/// Width of a model up to which several groups are faster than other kernels: faster at 576, slower at
/// 1,024, where each block has more to do.
const MAX_GROUPED_WIDTH: usize = 768;
/// Minimum number of tokens for which the gate and up projections are faster with SwiGLU in the same
/// kernel, on Hopper and unless the model is wide.
const MIN_BATCH_TOKENS: usize = 1024;
/// Rows of a weight that a block of a fused kernel multiplies.
const BLOCK_ROWS: usize = 16;
/// Warps of a fused kernel's block.
const WARPS: usize = 8;
/// Maximum shared memory that a fused kernel needs for its sums.
const SUMS_BYTES: usize = 24 << 10;
/// Elements between the tokens that a fused kernel keeps in shared memory.
const STAGING_PAD: usize = 32;
/// Elements between the tokens of A x that a cluster of a fused kernel keeps in shared memory.
const LOW_RANK_PAD: usize = 8;
/// Maximum number of blocks that share the work for A x.
const MAX_FUSED_CLUSTER: usize = 8;
/// Maximum rank of a product's adapters for which clusters compute A x: the registers of a block hold
/// two tiles of A beside one of the weight.
const MAX_CLUSTER_RANK: usize = 2 * BLOCK_ROWS * MAX_FUSED_CLUSTER;
/// Elements between the queries that a small step's attention rotates in shared memory.
const QUERY_PAD: usize = 8;
/// Elements between the sums that the warps of the attention merge: their maximum, their weights, and
/// padding.
const SUMS_PAD: usize = 8;
/// Tokens of which a block rotates a head.
const ROTATE_TOKENS: usize = 16;
/// Warps of a block of the attention if there are many tiles: as many as a tile can need.
const BATCH_WARPS: usize = MAX_TILE_QUERIES / WARP_QUERIES;
/// Chunks of `SLOTS_PER_READ` slots, times groups of `WARP_QUERIES` query vectors, for which another
/// block of a cluster takes part: with fewer, merging takes longer than it saves.
const BLOCK_WORK: usize = 16;
/// Numbers of blocks that may share the slots of a tile, in a cluster: every GPU from Hopper on
/// supports them.
const CLUSTER_BLOCKS: [usize; 3] = [8, 4, 2];
/// Threads per block of kernels whose threads each process neighbouring values.
const THREADS: usize = 256;
/// Threads of a block that finds the nucleus of a token.
const NUCLEUS_THREADS: usize = 1024;
/// Logits of a token that a block samples from.
const SEGMENT: usize = 8192;
/// Number of the likeliest tokens of a position that a forward can give.
pub const MAX_CANDIDATES: usize = 4;
/// Maximum number of logits in memory at a time, unless there are more rows than `SEGMENT`s in it:
/// 256 MiB in float32.
pub const MAX_LOGITS: usize = 64 << 20;

/// Whether the kernels can compute a model: they process 32 values of a row at a time.
pub fn supports(shape: &KernelShape) -> bool {
    [shape.hidden, shape.ffn, shape.head_dim].iter().all(|size| size.is_multiple_of(32))
        && shape.head_dim <= 256
        && shape.group() <= MAX_TILE_QUERIES
}

/// Maximum number of tokens of a step for which the fused kernels are faster than cuBLAS.
pub fn max_fused_tokens(shape: &KernelShape) -> usize {
    match shape.hidden {
        0..=MAX_GROUPED_WIDTH => 3 * GROUP_TOKENS,
        _ if is_wide(shape) => 8,
        _ => GROUP_TOKENS,
    }
}

/// Maximum number of tokens of a step after all of which the fused kernels sample.
pub fn max_sampled_tokens(shape: &KernelShape) -> usize {
    max_fused_tokens(shape).min(GROUP_TOKENS)
}

fn is_wide(shape: &KernelShape) -> bool {
    shape.hidden > 2048
}

/// Warps of a block of the attention if there are few tiles.
fn attention_warps(shape: &KernelShape) -> usize {
    // Their keys and values fill the shared memory.
    match shape.head_dim {
        0..=64 => 16,
        65..=128 => 8,
        _ => 4,
    }
}

/// Chunks of keys or values that a warp of the attention has in shared memory.
fn ring_depth(capability: (u32, u32)) -> usize {
    if max_shared_bytes(capability) >= 160 << 10 { 2 } else { 1 }
}

/// Shared memory of a warp of the attention for keys and values, then for its part of the sums.
fn warp_bytes(shape: &KernelShape, capability: (u32, u32)) -> usize {
    let chunk_bytes = SLOTS_PER_READ * shape.head_dim * 2;
    (ring_depth(capability) * chunk_bytes).max(WARP_QUERIES * (shape.head_dim + SUMS_PAD) * 4)
}

/// Shared memory for the rotated queries of a tile (`queries` in the source).
fn query_bytes(shape: &KernelShape) -> usize {
    MAX_TILE_QUERIES * (shape.head_dim + QUERY_PAD) * 2
}

fn max_staged_bytes(capability: (u32, u32)) -> usize {
    max_shared_bytes(capability).saturating_sub(SUMS_BYTES)
}

/// Shared memory for the tokens of a fused kernel, in rows of `width`; 0 if the kernel does not
/// copy them (`STAGED_BYTES` and `STAGED` in the source).
fn staged_bytes(num_tokens: usize, width: usize, capability: (u32, u32)) -> usize {
    let bytes = num_tokens * (width + STAGING_PAD) * 2;
    if num_tokens > 8 && bytes <= max_staged_bytes(capability) { bytes } else { 0 }
}

/// Shared memory for A x of so many tokens.
fn low_rank_bytes(num_tokens: usize, rank: usize) -> usize {
    num_tokens * (rank + LOW_RANK_PAD) * 2
}

/// Whether the clusters of fused kernels compute A x of adapters for themselves. With wide models it
/// takes a kernel of its own: each cluster would read as much of A as of the weight.
fn in_clusters(shape: &KernelShape, ranks: AdapterRanks, capability: (u32, u32)) -> bool {
    let widths = [(shape.hidden, ranks.qkv), (shape.attn(), ranks.output), (0, ranks.gate_up), (shape.ffn, ranks.down)];
    let fits = |(width, rank)| {
        let bytes = staged_bytes(GROUP_TOKENS, width, capability) + low_rank_bytes(GROUP_TOKENS, rank);
        rank <= MAX_CLUSTER_RANK && bytes <= max_staged_bytes(capability)
    };
    capability.0 >= 9 && !is_wide(shape) && widths.into_iter().all(fits)
}

/// Blocks that share the work for A x: at least one for each of its tiles of rows, or as many as there
/// may be, each of which then has two (`TILES` in the source).
fn fused_cluster(rank: usize) -> usize {
    (rank / BLOCK_ROWS).next_power_of_two().min(MAX_FUSED_CLUSTER)
}

fn macros(shape: &KernelShape, ranks: AdapterRanks, capability: (u32, u32)) -> Macros {
    let mut macros = [shape.macros(), ranks.macros()].concat();
    macros.extend([
        ("QK_NORM", u8::from(shape.query_key_norm).to_string()),
        ("WARPS", WARPS.to_string()),
        ("BLOCK_ROWS", BLOCK_ROWS.to_string()),
        ("GROUP_TOKENS", GROUP_TOKENS.to_string()),
        // Short rows are loaded at once. For long ones, more blocks on a multiprocessor help more
        // than loading far ahead.
        ("MAX_DEPTH", if is_wide(shape) { 2 } else { 4 }.to_string()),
        ("SUMS_BYTES", SUMS_BYTES.to_string()),
        ("MAX_STAGED_BYTES", max_staged_bytes(capability).to_string()),
        ("STAGING_PAD", STAGING_PAD.to_string()),
        ("IN_CLUSTERS", u8::from(in_clusters(shape, ranks, capability)).to_string()),
        ("MAX_FUSED_CLUSTER", MAX_FUSED_CLUSTER.to_string()),
        ("LOW_RANK_PAD", LOW_RANK_PAD.to_string()),
        ("SEGMENT", SEGMENT.to_string()),
        ("SAMPLE_THREADS", THREADS.to_string()),
        ("NUCLEUS_THREADS", NUCLEUS_THREADS.to_string()),
        ("MAX_CANDIDATES", MAX_CANDIDATES.to_string()),
        ("ATTENTION_WARPS", attention_warps(shape).to_string()),
        ("WARP_QUERIES", WARP_QUERIES.to_string()),
        ("SLOTS_PER_READ", SLOTS_PER_READ.to_string()),
        ("QUERY_PAD", QUERY_PAD.to_string()),
        ("RING_DEPTH", ring_depth(capability).to_string()),
        ("WARP_BYTES", warp_bytes(shape, capability).to_string()),
        ("SUMS_PAD", SUMS_PAD.to_string()),
        ("BATCH_WARPS", BATCH_WARPS.to_string()),
        // Blocks on a multiprocessor, as registers allow.
        ("BATCH_BLOCKS", if shape.head_dim <= 64 { 4 } else { 2 }.to_string()),
        ("BLOCK_WORK", BLOCK_WORK.to_string()),
        ("ROTATE_TOKENS", ROTATE_TOKENS.to_string()),
    ]);
    macros
}

/// The sizes that determine the shapes of the kernels' arguments. Sizes that a kernel does not use
/// are 0.
#[derive(Clone, Copy)]
struct Sizes {
    shape: KernelShape,
    ranks: AdapterRanks,
    tokens: usize,
    /// Rows of the table that the residual stream begins with.
    table_rows: usize,
    outputs: usize,
    tiles: usize,
    /// Thread blocks that share a tile.
    tile_blocks: usize,
    /// Thread blocks of a fused kernel's cluster.
    fused_blocks: usize,
    rows: usize,
    capacity: usize,
    /// Segments of the vocabulary in a slice.
    segments: usize,
    /// Blocks that each found the best of some tokens of the vocabulary.
    blocks: usize,
    /// Number of tokens that each of them lists for the candidates.
    list: usize,
    layers: usize,
    moves: usize,
}

impl Sizes {
    fn new(shape: KernelShape, tokens: usize) -> Self {
        Sizes {
            shape,
            ranks: AdapterRanks::default(),
            tokens,
            table_rows: 0,
            outputs: 0,
            tiles: 0,
            tile_blocks: 1,
            fused_blocks: 1,
            rows: 0,
            capacity: 0,
            segments: 0,
            blocks: 0,
            list: 0,
            layers: 0,
            moves: 0,
        }
    }
}

const TOKENS: &[Param<Sizes>] = &[
    int32("row", |s| s.tokens),
    int32("slot", |s| s.tokens),
    int32("position", |s| s.tokens),
    uint64("visible", |s| 2 * s.tokens),
];
const TILES: &[Param<Sizes>] = &[
    int32("tile_row", |s| s.tiles),
    int32("tile_first_token", |s| s.tiles),
    int32("tile_length", |s| s.tiles),
    int32("tile_window", |s| s.tiles),
];
/// The largest position is that of the last slot.
const ROPE: &[Param<Sizes>] = &[
    aligned(|_| 16, float32("cosines", |s| s.capacity * s.shape.head_dim / 2)),
    aligned(|_| 16, float32("sines", |s| s.capacity * s.shape.head_dim / 2)),
];
const QK_NORM: &[Param<Sizes>] =
    &[nullable(bf16("query_norm", |s| s.shape.head_dim)), nullable(bf16("key_norm", |s| s.shape.head_dim))];
const CACHE: &[Param<Sizes>] = &[bf16("keys", cache_len), bf16("values", cache_len), count("capacity", |s| s.capacity)];

/// The logits of a slice.
const LOGITS: &[Param<Sizes>] = &[
    aligned(|_| 16, float32("logits", |s| s.outputs * s.segments * SEGMENT)),
    count("pitch", |s| s.segments * SEGMENT),
];

const WEIGHT_QKV: Param<Sizes> = bf16("weight", |s| s.shape.qkv() * s.shape.hidden);
const WEIGHT_VOCAB: Param<Sizes> = bf16("weight", |s| s.shape.vocab * s.shape.hidden);
const X: Param<Sizes> = bf16("x", |s| s.tokens * s.shape.hidden);
const NORM: Param<Sizes> = bf16("norm", |s| s.shape.hidden);
const QKV: Param<Sizes> = bf16("qkv", |s| s.tokens * s.shape.qkv());
const BIAS_QKV: Param<Sizes> = nullable(aligned(|_| 2, bf16("bias", |s| s.shape.qkv())));
const ATTN_OUT: Param<Sizes> = bf16("attn_out", |s| s.tokens * s.shape.attn());
const INNER: Param<Sizes> = bf16("inner", |s| s.tokens * s.shape.ffn);
const NUM_TOKENS: Param<Sizes> = count("num_tokens", |s| s.tokens);
const KEYS: Param<Sizes> = uint64("keys", |s| 2 * s.outputs);
/// The bits of float32 numbers, here and below.
const INVERSE_TEMPERATURES: Param<Sizes> = int32("inverse_temperatures", |s| s.outputs);
const TOP_PS: Param<Sizes> = int32("top_ps", |s| s.outputs);
const BEST: Param<Sizes> = float32("best", |s| s.outputs * s.blocks);
const BEST_ID: Param<Sizes> = int32("best_id", |s| s.outputs * s.blocks);
const SUMS: Param<Sizes> = float32("sums", |s| s.outputs * s.blocks);
const SCORES: Param<Sizes> = float32("scores", |s| s.outputs * s.blocks * s.list);
const IDS: Param<Sizes> = int32("ids", |s| s.outputs * s.blocks * s.list);
const NUM_BLOCKS: Param<Sizes> = count("num_blocks", |s| s.blocks);

const ADAPTED: Param<Sizes> = int32("adapted", |s| s.tokens);

/// The adapters of a product, or null: A, A x and B.
const fn adapters(
    lora_a: fn(&Sizes) -> usize,
    low_rank: fn(&Sizes) -> usize,
    lora_b: fn(&Sizes) -> usize,
) -> [Param<Sizes>; 4] {
    [
        nullable(ADAPTED),
        nullable(bf16("lora_a", lora_a)),
        nullable(bf16("low_rank", low_rank)),
        nullable(bf16("lora_b", lora_b)),
    ]
}
const QKV_ADAPTERS: &[Param<Sizes>] =
    &adapters(|s| s.ranks.qkv * s.shape.hidden, |s| s.tokens * s.ranks.qkv, |s| s.shape.qkv() * s.ranks.qkv);
const OUTPUT_ADAPTERS: &[Param<Sizes>] =
    &adapters(|s| s.ranks.output * s.shape.attn(), |s| s.tokens * s.ranks.output, |s| s.shape.hidden * s.ranks.output);
const GATE_UP_ADAPTERS: &[Param<Sizes>] = &adapters(
    |s| s.ranks.gate_up * s.shape.hidden,
    |s| s.tokens * s.ranks.gate_up,
    |s| 2 * s.shape.ffn * s.ranks.gate_up,
);
const DOWN_ADAPTERS: &[Param<Sizes>] =
    &adapters(|s| s.ranks.down * s.shape.ffn, |s| s.tokens * s.ranks.down, |s| s.shape.hidden * s.ranks.down);

/// Number of elements of the keys or of the values of a layer.
fn cache_len(sizes: &Sizes) -> usize {
    sizes.rows * sizes.shape.kv_heads * sizes.capacity * sizes.shape.head_dim
}

/// Blocks of `fused_sample`.
fn num_sample_blocks(sizes: &Sizes) -> usize {
    sizes.shape.vocab.div_ceil(BLOCK_ROWS)
}

/// Groups of tokens of the fused kernels.
fn num_groups(sizes: &Sizes) -> usize {
    sizes.tokens.div_ceil(GROUP_TOKENS)
}

/// Segments of the vocabulary, the last of which may be shorter.
fn num_segments(sizes: &Sizes) -> usize {
    sizes.shape.vocab.div_ceil(SEGMENT)
}

/// Outputs and segments of the vocabulary whose logits are in memory at a time.
#[derive(Debug, Clone, PartialEq)]
struct Slice {
    outputs: Range<usize>,
    segments: Range<usize>,
}

/// Slices of the vocabulary for all outputs or, for a nucleus, of the outputs with all their logits.
fn slices(sizes: &Sizes, sampling: SamplingOptions) -> Vec<Slice> {
    let (num_outputs, num_segments) = (sizes.outputs, num_segments(sizes));
    match sampling.has_nucleus {
        true => even_ranges(num_outputs, MAX_LOGITS / (num_segments * SEGMENT))
            .map(|outputs| Slice { outputs, segments: 0..num_segments })
            .collect(),
        false => even_ranges(num_segments, MAX_LOGITS / (num_outputs * SEGMENT))
            .map(|segments| Slice { outputs: 0..num_outputs, segments })
            .collect(),
    }
}

/// Ranges of at most `max_len` numbers, or of one, that are as even as possible.
fn even_ranges(len: usize, max_len: usize) -> impl Iterator<Item = Range<usize>> {
    let step = len.div_ceil(len.div_ceil(max_len.max(1)));
    (0..len).step_by(step).map(move |first| first..(first + step).min(len))
}

/// Memory for what blocks find: the best scores with their tokens or, for candidates, the best scores,
/// the sums for the softmax and the scores of the lists.
fn block_results(sizes: &Sizes, sampling: SamplingOptions, device: Device) -> Result<Vec<Tensor>> {
    let num_results = sizes.outputs * sizes.blocks;
    let results = match sampling.gives_candidates {
        true => vec![(num_results, Kind::Float), (num_results, Kind::Float), (num_results * sizes.list, Kind::Float)],
        false => vec![(num_results, Kind::Float), (num_results, Kind::Int)],
    };
    let empty = |(len, kind)| Ok(Tensor::f_empty([len as i64], (kind, device))?);
    results.into_iter().map(empty).collect()
}

const FUSED_QKV: Signature<Sizes> = Signature {
    name: "fused_qkv_",
    grid: |s| [s.shape.qkv().div_ceil(BLOCK_ROWS).next_multiple_of(s.fused_blocks), num_groups(s)],
    threads: |_| WARPS * 32,
    params: &[&[WEIGHT_QKV, X, NORM, BIAS_QKV, QKV, NUM_TOKENS], QKV_ADAPTERS],
};
const FUSED_QKV_ROTATED: Signature<Sizes> = Signature {
    name: "fused_qkv_rotated_",
    params: &[&[WEIGHT_QKV, X, NORM, BIAS_QKV, QKV, NUM_TOKENS], QKV_ADAPTERS, TOKENS, ROPE, CACHE],
    ..FUSED_QKV
};
const FUSED_OUTPUT: Signature<Sizes> = Signature {
    name: "fused_output_",
    grid: |s| [s.shape.hidden.div_ceil(BLOCK_ROWS).next_multiple_of(s.fused_blocks), num_groups(s)],
    threads: |_| WARPS * 32,
    params: &[
        &[
            bf16("weight", |s| s.shape.hidden * s.shape.attn()),
            ATTN_OUT,
            nullable(aligned(|_| 2, bf16("bias", |s| s.shape.hidden))),
            X,
            NUM_TOKENS,
        ],
        OUTPUT_ADAPTERS,
    ],
};
const FUSED_GATE_UP: Signature<Sizes> = Signature {
    name: "fused_gate_up_",
    // Half of the rows of a block are from the gate and half from the up projection.
    grid: |s| [s.shape.ffn.div_ceil(BLOCK_ROWS / 2).next_multiple_of(s.fused_blocks), num_groups(s)],
    threads: |_| WARPS * 32,
    params: &[&[bf16("weight", |s| 2 * s.shape.ffn * s.shape.hidden), X, NORM, INNER, NUM_TOKENS], GATE_UP_ADAPTERS],
};
const FUSED_DOWN: Signature<Sizes> = Signature {
    name: "fused_down_",
    grid: |s| [s.shape.hidden.div_ceil(BLOCK_ROWS).next_multiple_of(s.fused_blocks), num_groups(s)],
    threads: |_| WARPS * 32,
    params: &[&[bf16("weight", |s| s.shape.hidden * s.shape.ffn), INNER, X, NUM_TOKENS], DOWN_ADAPTERS],
};
const LOW_RANK_QKV: Signature<Sizes> = Signature {
    name: "fused_low_rank_qkv_",
    grid: |s| [s.ranks.qkv.div_ceil(BLOCK_ROWS), num_groups(s)],
    threads: |_| WARPS * 32,
    params: &[&[
        bf16("lora_a", |s| s.ranks.qkv * s.shape.hidden),
        X,
        NORM,
        ADAPTED,
        bf16("low_rank", |s| s.tokens * s.ranks.qkv),
        NUM_TOKENS,
    ]],
};
const LOW_RANK_OUTPUT: Signature<Sizes> = Signature {
    name: "fused_low_rank_output_",
    grid: |s| [s.ranks.output.div_ceil(BLOCK_ROWS), num_groups(s)],
    params: &[&[
        bf16("lora_a", |s| s.ranks.output * s.shape.attn()),
        ATTN_OUT,
        ADAPTED,
        bf16("low_rank", |s| s.tokens * s.ranks.output),
        NUM_TOKENS,
    ]],
    ..LOW_RANK_QKV
};
const LOW_RANK_GATE_UP: Signature<Sizes> = Signature {
    name: "fused_low_rank_gate_up_",
    grid: |s| [s.ranks.gate_up.div_ceil(BLOCK_ROWS), num_groups(s)],
    params: &[&[
        bf16("lora_a", |s| s.ranks.gate_up * s.shape.hidden),
        X,
        NORM,
        ADAPTED,
        bf16("low_rank", |s| s.tokens * s.ranks.gate_up),
        NUM_TOKENS,
    ]],
    ..LOW_RANK_QKV
};
const LOW_RANK_DOWN: Signature<Sizes> = Signature {
    name: "fused_low_rank_down_",
    grid: |s| [s.ranks.down.div_ceil(BLOCK_ROWS), num_groups(s)],
    params: &[&[
        bf16("lora_a", |s| s.ranks.down * s.shape.ffn),
        INNER,
        ADAPTED,
        bf16("low_rank", |s| s.tokens * s.ranks.down),
        NUM_TOKENS,
    ]],
    ..LOW_RANK_QKV
};
const FUSED_SAMPLE: Signature<Sizes> = Signature {
    name: "fused_sample_",
    grid: |s| [num_sample_blocks(s), 1],
    threads: |_| WARPS * 32,
    params: &[&[WEIGHT_VOCAB, X, NORM, BEST, BEST_ID, NUM_TOKENS, INVERSE_TEMPERATURES, KEYS]],
};
const FUSED_CANDIDATES: Signature<Sizes> = Signature {
    name: "fused_candidates_",
    params: &[&[WEIGHT_VOCAB, X, NORM, BEST, SUMS, SCORES, NUM_TOKENS, INVERSE_TEMPERATURES, KEYS]],
    ..FUSED_SAMPLE
};
const ARGMAX_OF_BLOCKS: Signature<Sizes> = Signature {
    name: "argmax_of_blocks",
    grid: |s| [s.outputs, 1],
    threads: |s| s.blocks.next_multiple_of(32).min(1024),
    params: &[&[BEST, BEST_ID, NUM_BLOCKS, int32("predicted", |s| s.outputs)]],
};
const CANDIDATES_OF_BLOCKS: Signature<Sizes> = Signature {
    name: "candidates_of_blocks",
    params: &[&[
        BEST,
        SUMS,
        SCORES,
        nullable(IDS),
        count("list_length", |s| s.list),
        NUM_BLOCKS,
        aligned(|_| 8, int32("candidates", |s| s.outputs * MAX_INTS_PER_OUTPUT)),
    ]],
    ..ARGMAX_OF_BLOCKS
};
const COPY_ROWS: Signature<Sizes> = Signature {
    name: "copy_rows",
    grid: |s| [s.tokens, 1],
    threads: |_| 64,
    params: &[&[bf16("table", |s| s.table_rows * s.shape.hidden), int32("tokens", |s| s.tokens), X]],
};
const ADD_RMS_NORM: Signature<Sizes> = Signature {
    name: "add_rms_norm",
    grid: |s| [s.tokens, 1],
    threads: |s| (s.shape.hidden / 8).next_multiple_of(32).min(THREADS),
    params: &[&[
        X,
        nullable(bf16("delta", |s| s.tokens * s.shape.hidden)),
        bf16("weight", |s| s.shape.hidden),
        bf16("normed", |s| s.tokens * s.shape.hidden),
    ]],
};
const SWIGLU: Signature<Sizes> = Signature {
    name: "swiglu",
    grid: |s| [(s.tokens * s.shape.ffn / 8).div_ceil(THREADS), 1],
    threads: |_| THREADS,
    params: &[&[bf16("gate_up", |s| s.tokens * 2 * s.shape.ffn), INNER, NUM_TOKENS]],
};
const SAMPLE_SEGMENTS: Signature<Sizes> = Signature {
    name: "sample_segments",
    grid: |s| [s.outputs, s.segments],
    threads: |_| THREADS,
    params: &[LOGITS, &[int("first_segment"), INVERSE_TEMPERATURES, KEYS, BEST, BEST_ID]],
};
const CANDIDATES_OF_SEGMENTS: Signature<Sizes> = Signature {
    name: "candidates_of_segments",
    params: &[LOGITS, &[int("first_segment"), INVERSE_TEMPERATURES, KEYS, BEST, SUMS, SCORES, IDS]],
    ..SAMPLE_SEGMENTS
};
const KEEP_NUCLEUS: Signature<Sizes> = Signature {
    name: "keep_nucleus",
    grid: |s| [s.outputs, 1],
    threads: |_| NUCLEUS_THREADS,
    params: &[LOGITS, &[INVERSE_TEMPERATURES, TOP_PS]],
};
const ROTATE_AND_CACHE: Signature<Sizes> = Signature {
    name: "rotate_and_cache",
    grid: |s| [s.tokens.div_ceil(ROTATE_TOKENS), s.shape.heads + 2 * s.shape.kv_heads],
    threads: |_| THREADS / 2,
    params: &[&[QKV], TOKENS, ROPE, QK_NORM, CACHE, &[NUM_TOKENS]],
};
const MOVE_SLOTS: Signature<Sizes> = Signature {
    name: "move_slots",
    grid: |s| [s.layers * s.shape.kv_heads, s.rows],
    threads: |s| s.shape.head_dim,
    params: &[&[
        int32("first_move", |s| s.rows + 1),
        int32("from", |s| s.moves),
        int32("to", |s| s.moves),
        bf16("keys", |s| s.layers * cache_len(s)),
        bf16("values", |s| s.layers * cache_len(s)),
        count("capacity", |s| s.capacity),
        count("num_rows", |s| s.rows),
    ]],
};
const ATTENTION: Signature<Sizes> = Signature {
    name: "attention_",
    grid: |s| [s.tiles * s.tile_blocks, s.shape.kv_heads],
    threads: |s| attention_warps(&s.shape) * 32,
    params: &[&[QKV], TOKENS, TILES, ROPE, QK_NORM, CACHE, &[int("max_distance"), ATTN_OUT]],
};
const ROTATE_AND_ATTEND: Signature<Sizes> = Signature { name: "rotate_and_attend_", ..ATTENTION };
const BATCH_ATTENTION: Signature<Sizes> = Signature { threads: |_| BATCH_WARPS * 32, ..ATTENTION };
const ROTATE_AND_ATTEND_BATCH: Signature<Sizes> = Signature { name: ROTATE_AND_ATTEND.name, ..BATCH_ATTENTION };

/// The fused kernels for up to `max_tokens` tokens, or for groups of so many.
struct FusedKernels {
    max_tokens: usize,
    plain: FusedProducts,
    /// With adapters for drafts, if there are any.
    adapted: Option<AdaptedProducts>,
    sample: Kernel<Sizes>,
    candidates: Kernel<Sizes>,
}

struct FusedProducts {
    qkv: Kernel<Sizes>,
    qkv_rotated: Kernel<Sizes>,
    output: Kernel<Sizes>,
    gate_up: Kernel<Sizes>,
    down: Kernel<Sizes>,
}

/// Fused kernels with adapters.
struct AdaptedProducts {
    products: FusedProducts,
    /// What the products continue, unless their clusters compute it.
    low_rank: Option<LowRankProducts>,
}

struct LowRankProducts {
    qkv: Kernel<Sizes>,
    output: Kernel<Sizes>,
    gate_up: Kernel<Sizes>,
    down: Kernel<Sizes>,
}

/// The attention for few tiles or for many.
struct AttentionKernels {
    /// For queries that are rotated already.
    rotated: Kernel<Sizes>,
    /// Also rotates queries and keys and fills the cache.
    plain: Kernel<Sizes>,
}

/// Kernels of one shape on one device. Tensors are contiguous, bfloat16 unless said otherwise; `T`
/// is the number of tokens.
pub struct DecodeKernels {
    shape: KernelShape,
    ranks: AdapterRanks,
    /// For up to 8 and 16 tokens, and for groups of up to 32.
    fused: [FusedKernels; 3],
    copy_rows: Kernel<Sizes>,
    argmax_of_blocks: Kernel<Sizes>,
    candidates_of_blocks: Kernel<Sizes>,
    /// On Hopper.
    batch_products: Option<BatchProducts>,
    add_rms_norm: Kernel<Sizes>,
    swiglu: Kernel<Sizes>,
    sample_segments: Kernel<Sizes>,
    candidates_of_segments: Kernel<Sizes>,
    keep_nucleus: Kernel<Sizes>,
    rotate_and_cache: Kernel<Sizes>,
    move_slots: Kernel<Sizes>,
    few_tiles: AttentionKernels,
    many_tiles: AttentionKernels,
    /// How many clusters of each of `CLUSTER_BLOCKS` run at the same time; empty for GPUs before
    /// Hopper.
    max_clusters: Vec<(usize, usize)>,
    num_multiprocessors: usize,
}

/// A weight `[out, in]`, its bias `[out]`, and adapters.
pub type FusedWeight<'t> = (&'t Tensor, Option<&'t Tensor>, Option<&'t DraftAdapters>);

/// The state of the queries, keys and values that the attention kernel reads.
#[derive(Debug, Clone, Copy)]
pub enum Queries {
    /// All three are as they were projected.
    Plain,
    /// Queries are rotated; keys and values are in the cache.
    Rotated,
}

/// The KV cache of a layer, with the rotations and norms of queries and keys.
#[derive(Debug)]
pub struct LayerCache<'t> {
    /// `[rows, kv_heads, capacity, head_dim]`
    pub keys: &'t Tensor,
    /// `[rows, kv_heads, head_dim, capacity]`
    pub values: &'t Tensor,
    /// Cosines and sines of every position, float32 `[capacity, head_dim / 2]`.
    pub rope_table: &'t (Tensor, Tensor),
    /// Weights of the norms of queries and keys, if the model has them.
    pub norms: Option<&'t (Tensor, Tensor)>,
    /// Number of tokens that a token attends to, itself included; `None` if it is all before it.
    pub sliding_window: Option<i32>,
}

impl DecodeKernels {
    /// Compiles and loads the kernels, for adapters of these ranks.
    ///
    /// # Errors
    /// [`Error::Torch`] with the message of the compiler or the driver.
    pub fn new(device: usize, shape: KernelShape, ranks: AdapterRanks) -> Result<Self> {
        let capability = compute_capability(device)?;
        let macros = macros(&shape, ranks, capability);
        let module = Module::compiled(device, SOURCE, &macros)?;
        // GPUs from Hopper on can start a kernel while the one before it ends.
        let overlaps = capability.0 >= 9;
        let kernel = |signature, shared_bytes| Kernel::new(&module, signature, "", shared_bytes, overlaps);
        let fused = |num_tiles: usize| {
            let max_tokens = num_tiles * 8;
            let suffix = num_tiles.to_string();
            let kernel = |signature, suffix: &str, shared| Kernel::new(&module, signature, suffix, shared, overlaps);
            let staged = |width| staged_bytes(max_tokens, width, capability);
            let products = |suffix: &str, bytes: [usize; 4]| {
                Ok::<_, Error>(FusedProducts {
                    qkv: kernel(&FUSED_QKV, suffix, bytes[0])?,
                    qkv_rotated: kernel(&FUSED_QKV_ROTATED, suffix, bytes[0])?,
                    output: kernel(&FUSED_OUTPUT, suffix, bytes[1])?,
                    gate_up: kernel(&FUSED_GATE_UP, suffix, bytes[2])?,
                    down: kernel(&FUSED_DOWN, suffix, bytes[3])?,
                })
            };
            let bytes = [staged(shape.hidden), staged(shape.attn()), 0, staged(shape.ffn)];
            let adapted = || {
                let suffix_adapted = format!("adapted_{suffix}");
                if in_clusters(&shape, ranks, capability) {
                    let low_rank = ranks.all().map(|rank| low_rank_bytes(max_tokens, rank));
                    let bytes = std::array::from_fn(|product| bytes[product] + low_rank[product]);
                    return Ok(AdaptedProducts { products: products(&suffix_adapted, bytes)?, low_rank: None });
                }
                let low_rank = LowRankProducts {
                    qkv: kernel(&LOW_RANK_QKV, &suffix, staged(shape.hidden))?,
                    output: kernel(&LOW_RANK_OUTPUT, &suffix, staged(shape.attn()))?,
                    gate_up: kernel(&LOW_RANK_GATE_UP, &suffix, staged(shape.hidden))?,
                    down: kernel(&LOW_RANK_DOWN, &suffix, staged(shape.ffn))?,
                };
                let products = products(&suffix_adapted, bytes)?;
                Ok::<_, Error>(AdaptedProducts { products, low_rank: Some(low_rank) })
            };
            Ok::<_, Error>(FusedKernels {
                max_tokens,
                plain: products(&suffix, bytes)?,
                adapted: ranks.is_adapted().then(adapted).transpose()?,
                sample: kernel(&FUSED_SAMPLE, &suffix, 0)?,
                candidates: kernel(&FUSED_CANDIDATES, &suffix, 0)?,
            })
        };
        let attention = |[rotated, plain]: [&'static Signature<Sizes>; 2], suffix: &str, num_warps| {
            let ring_bytes = num_warps * warp_bytes(&shape, capability);
            Ok::<_, Error>(AttentionKernels {
                rotated: Kernel::new(&module, rotated, suffix, ring_bytes, overlaps)?,
                plain: Kernel::new(&module, plain, suffix, ring_bytes + query_bytes(&shape), overlaps)?,
            })
        };
        let few_tiles = attention([&ATTENTION, &ROTATE_AND_ATTEND], "few", attention_warps(&shape))?;
        let cluster_blocks = if overlaps { &CLUSTER_BLOCKS[..] } else { &[] };
        let max_clusters = cluster_blocks
            .iter()
            .map(|&blocks| Ok((blocks, few_tiles.plain.max_clusters(&Sizes::new(shape, 0), blocks)?)))
            .collect::<Result<_>>()?;
        Ok(DecodeKernels {
            fused: [fused(1)?, fused(2)?, fused(4)?],
            copy_rows: kernel(&COPY_ROWS, 0)?,
            argmax_of_blocks: kernel(&ARGMAX_OF_BLOCKS, 0)?,
            candidates_of_blocks: kernel(&CANDIDATES_OF_BLOCKS, 0)?,
            batch_products: BatchProducts::new(device, shape, &macros)?,
            add_rms_norm: kernel(&ADD_RMS_NORM, 0)?,
            swiglu: kernel(&SWIGLU, 0)?,
            sample_segments: kernel(&SAMPLE_SEGMENTS, 0)?,
            candidates_of_segments: kernel(&CANDIDATES_OF_SEGMENTS, 0)?,
            keep_nucleus: kernel(&KEEP_NUCLEUS, 0)?,
            rotate_and_cache: kernel(&ROTATE_AND_CACHE, 0)?,
            move_slots: kernel(&MOVE_SLOTS, 0)?,
            few_tiles,
            many_tiles: attention([&BATCH_ATTENTION, &ROTATE_AND_ATTEND_BATCH], "many", BATCH_WARPS)?,
            num_multiprocessors: num_multiprocessors(device)?,
            max_clusters,
            shape,
            ranks,
        })
    }

    /// The kernels for a step of so many tokens.
    fn fused(&self, num_tokens: usize) -> &FusedKernels {
        let [small, medium, groups] = &self.fused;
        [small, medium].into_iter().find(|fused| num_tokens <= fused.max_tokens).unwrap_or(groups)
    }

    fn sizes(&self, num_tokens: usize) -> Sizes {
        Sizes { ranks: self.ranks, ..Sizes::new(self.shape, num_tokens) }
    }

    /// Sizes of an input, which must have been checked for this shape.
    fn input_sizes(&self, input: &ForwardInput) -> Result<Sizes> {
        let forward = input.shape();
        Ok(Sizes {
            tokens: forward.num_tokens,
            outputs: forward.num_outputs,
            tiles: forward.num_tiles,
            ..self.cache_sizes(input.limits())?
        })
    }

    /// Sizes of the cache, for indices that were checked with these limits.
    fn cache_sizes(&self, limits: &InputLimits) -> Result<Sizes> {
        if limits.model != self.shape {
            return Err(Error::internal("the input was written for another model"));
        }
        Ok(Sizes { rows: limits.num_rows, capacity: limits.capacity, ..self.sizes(0) })
    }

    /// Begins a step, or the layers after the shared ones: the residual stream `x [T, hidden]` = rows
    /// of a table.
    ///
    /// # Errors
    /// [`Error::Internal`] if a tensor does not fit, else [`Error::Torch`]; here and below.
    pub(crate) fn begin(&self, rows: InitialRows<'_>, input: &ForwardInput, x: &Tensor) -> Result<()> {
        let sizes = Sizes { table_rows: rows.num_rows, ..self.input_sizes(input)? };
        let arguments = [Data(rows.table), Data(rows.indices), Data(x)];
        // SAFETY: the writer of the input has checked the indices.
        unsafe { self.copy_rows.launch(&sizes, &arguments) }
    }

    /// `qkv [T, qkv]` = the projection of the RMS norm of `x [T, hidden]`, for steps of few tokens.
    /// Queries are rotated, and keys and values go to the layer's cache, unless the model norms
    /// whole heads first. `adapters` act on draft tokens; here and below.
    pub fn fused_qkv(
        &self,
        (weight, bias, adapters): FusedWeight<'_>,
        (x, norm): (&Tensor, &Tensor),
        qkv: &Tensor,
        input: &ForwardInput,
        layer: &LayerCache<'_>,
    ) -> Result<Queries> {
        let with_adapters = self.with_adapters(input, adapters, |kernels, sizes, lora_a, low_rank| {
            let arguments = [lora_a, x, norm, &input.adapted, low_rank].map(Data);
            // SAFETY: no argument is an index.
            unsafe { kernels.qkv.launch(sizes, &arguments) }
        })?;
        let products = with_adapters.products;
        let projection = [Data(weight), Data(x), Data(norm), Optional(bias), Data(qkv)];
        if self.shape.query_key_norm {
            // SAFETY: no argument is an index.
            unsafe { with_adapters.launch(&products.qkv, &projection, &[])? };
            return Ok(Queries::Plain);
        }
        let rest = [&token_arguments(input)[..], &layer.rope(), &layer.cache()].concat();
        // SAFETY: the input's rows, slots and positions are those of the cache.
        unsafe { with_adapters.launch(&products.qkv_rotated, &projection, &rest)? };
        Ok(Queries::Rotated)
    }

    /// `x [T, hidden]` += the output projection of `attn_out [T, heads x head_dim]`, for steps of
    /// few tokens.
    pub fn fused_output(
        &self,
        (weight, bias, adapters): FusedWeight<'_>,
        attn_out: &Tensor,
        x: &Tensor,
        input: &ForwardInput,
    ) -> Result<()> {
        let with_adapters = self.with_adapters(input, adapters, |kernels, sizes, lora_a, low_rank| {
            let arguments = [lora_a, attn_out, &input.adapted, low_rank].map(Data);
            // SAFETY: no argument is an index.
            unsafe { kernels.output.launch(sizes, &arguments) }
        })?;
        let projection = [Data(weight), Data(attn_out), Optional(bias), Data(x)];
        // SAFETY: no argument is an index.
        unsafe { with_adapters.launch(&with_adapters.products.output, &projection, &[]) }
    }

    /// `inner [T, ffn]` = silu(gate) * up of the RMS norm of `x [T, hidden]`, for steps of few
    /// tokens.
    pub fn fused_gate_up(
        &self,
        (weight, adapters): (&Tensor, Option<&DraftAdapters>),
        (x, norm): (&Tensor, &Tensor),
        inner: &Tensor,
        input: &ForwardInput,
    ) -> Result<()> {
        let with_adapters = self.with_adapters(input, adapters, |kernels, sizes, lora_a, low_rank| {
            let arguments = [lora_a, x, norm, &input.adapted, low_rank].map(Data);
            // SAFETY: no argument is an index.
            unsafe { kernels.gate_up.launch(sizes, &arguments) }
        })?;
        let projection = [weight, x, norm, inner].map(Data);
        // SAFETY: no argument is an index.
        unsafe { with_adapters.launch(&with_adapters.products.gate_up, &projection, &[]) }
    }

    /// `x [T, hidden]` += the down projection of `inner [T, ffn]`, for steps of few tokens.
    pub fn fused_down(
        &self,
        (weight, adapters): (&Tensor, Option<&DraftAdapters>),
        inner: &Tensor,
        x: &Tensor,
        input: &ForwardInput,
    ) -> Result<()> {
        let with_adapters = self.with_adapters(input, adapters, |kernels, sizes, lora_a, low_rank| {
            let arguments = [lora_a, inner, &input.adapted, low_rank].map(Data);
            // SAFETY: no argument is an index.
            unsafe { kernels.down.launch(sizes, &arguments) }
        })?;
        let projection = [weight, inner, x].map(Data);
        // SAFETY: no argument is an index.
        unsafe { with_adapters.launch(&with_adapters.products.down, &projection, &[]) }
    }

    /// The kernels for products with these adapters. If their clusters do not compute A x of draft
    /// tokens, `multiply` computes it.
    fn with_adapters<'k>(
        &'k self,
        input: &'k ForwardInput,
        adapters: Option<&'k DraftAdapters>,
        multiply: impl FnOnce(&LowRankProducts, &Sizes, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<WithAdapters<'k>> {
        let sizes = self.input_sizes(input)?;
        let kernels = self.fused(sizes.tokens);
        let Some(adapters) = adapters else {
            return Ok(WithAdapters { products: &kernels.plain, sizes, adapters: None, low_rank: None });
        };
        let Some(adapted) = &kernels.adapted else {
            return Err(Error::internal("the kernels were compiled without adapters"));
        };
        let (products, lora_a) = (&adapted.products, &adapters.lora_a);
        let adapters = Some((adapters, &input.adapted));
        let Some(low_rank_products) = &adapted.low_rank else {
            let sizes = Sizes { fused_blocks: fused_cluster(lora_a.size()[0] as usize), ..sizes };
            return Ok(WithAdapters { products, sizes, adapters, low_rank: None });
        };
        let size = [sizes.tokens as i64, lora_a.size()[0]];
        let low_rank = Tensor::f_empty(size, (Kind::BFloat16, lora_a.device()))?;
        multiply(low_rank_products, &sizes, lora_a, &low_rank)?;
        Ok(WithAdapters { products, sizes, adapters, low_rank: Some(low_rank) })
    }

    /// Samples the token after each row of `x [T, hidden]`, or gives the candidates there: int32
    /// `results [T x ints_per_output]` ([`SamplingOptions::ints_per_output`]). For steps of few tokens
    /// that are all outputs.
    pub fn fused_sample(
        &self,
        head: &Tensor,
        x: &Tensor,
        norm: &Tensor,
        input: &ForwardInput,
        results: &Tensor,
    ) -> Result<()> {
        let sizes = self.input_sizes(input)?;
        if sizes.outputs != sizes.tokens || sizes.tokens > GROUP_TOKENS {
            return Err(Error::internal("the fused kernels sample after every token of one group"));
        }
        let kernels = self.fused(sizes.tokens);
        let sizes = Sizes { blocks: num_sample_blocks(&sizes), list: BLOCK_ROWS, ..sizes };
        let found = block_results(&sizes, input.sampling, x.device())?;
        let mut found: Vec<Argument<'_>> = found.iter().map(Data).collect();
        let arguments = [&[Data(head), Data(x), Data(norm)], &found[..], &sampling_arguments(input)].concat();
        let kernel = if input.sampling.gives_candidates {
            // The lists are of all tokens of a block, so their ids are known.
            found.push(Optional(None));
            &kernels.candidates
        } else {
            &kernels.sample
        };
        // SAFETY: no argument is an index.
        unsafe { kernel.launch(&sizes, &arguments)? };
        self.finish_sampling(&sizes, input, &found, results)
    }

    /// Merges what blocks found.
    fn finish_sampling(
        &self,
        sizes: &Sizes,
        input: &ForwardInput,
        found: &[Argument<'_>],
        results: &Tensor,
    ) -> Result<()> {
        let kernel = if input.sampling.gives_candidates { &self.candidates_of_blocks } else { &self.argmax_of_blocks };
        // SAFETY: the ids of lists are not followed.
        unsafe { kernel.launch(sizes, &[found, &[Data(results)]].concat()) }
    }

    /// `x [T, hidden]` += `delta`; `normed` = the RMS norm of `x`.
    pub fn add_rms_norm(&self, x: &Tensor, delta: Option<&Tensor>, weight: &Tensor, normed: &Tensor) -> Result<()> {
        let sizes = self.sizes(x.numel() / self.shape.hidden);
        // SAFETY: no argument is an index.
        unsafe { self.add_rms_norm.launch(&sizes, &[Data(x), Optional(delta), Data(weight), Data(normed)]) }
    }

    /// `inner [T, ffn]` = silu(gate) * up, where `weight [2 ffn, hidden]` holds the rows of the gate,
    /// then those of the up projection of `normed [T, hidden]`.
    pub fn gate_up(
        &self,
        (weight, adapters): (&Tensor, Option<&DraftAdapters>),
        normed: &Tensor,
        inner: &Tensor,
        is_draft: Option<&Tensor>,
    ) -> Result<()> {
        let sizes = self.sizes(normed.numel() / self.shape.hidden);
        let adapters = adapters.zip(is_draft);
        match &self.batch_products {
            Some(products) if sizes.tokens >= MIN_BATCH_TOKENS && !is_wide(&self.shape) => {
                let low_rank = adapters.map(|(adapters, is_draft)| adapters.low_rank(normed, is_draft)).transpose()?;
                let adapters = low_rank.as_ref().zip(adapters.map(|(adapters, _)| &adapters.lora_b));
                products.gate_up(weight, normed, inner, adapters)
            }
            _ => {
                let gate_up = normed.f_linear::<&Tensor>(weight, None)?;
                if let Some((adapters, is_draft)) = adapters {
                    adapters.add_to(&gate_up, normed, is_draft)?;
                }
                // SAFETY: no argument is an index.
                unsafe { self.swiglu.launch(&sizes, &[Data(&gate_up), Data(inner)]) }
            }
        }
    }

    /// Samples the token after each row of `normed [outputs, hidden]`, or gives the candidates there:
    /// int32 `results`, as those of [`Self::fused_sample`].
    pub fn sample(&self, head: &Tensor, normed: &Tensor, input: &ForwardInput, results: &Tensor) -> Result<()> {
        match &self.batch_products {
            Some(products) if input.sampling.is_argmax() => {
                self.choose_likeliest(products, head, normed, input, results)
            }
            _ => self.sample_logits(head, normed, input, results),
        }
    }

    /// Chooses the likeliest token after each row, without logits in memory.
    fn choose_likeliest(
        &self,
        products: &BatchProducts,
        head: &Tensor,
        normed: &Tensor,
        input: &ForwardInput,
        results: &Tensor,
    ) -> Result<()> {
        let sizes = Sizes { blocks: batch_products::num_tiles(&self.shape), ..self.input_sizes(input)? };
        let found = block_results(&sizes, input.sampling, normed.device())?;
        products.argmax(head, normed, &found[0], &found[1])?;
        self.finish_sampling(&sizes, input, &[Data(&found[0]), Data(&found[1])], results)
    }

    /// Samples, or gives candidates, with logits in float32, for a slice of them at a time.
    fn sample_logits(&self, head: &Tensor, normed: &Tensor, input: &ForwardInput, results: &Tensor) -> Result<()> {
        let sizes = self.input_sizes(input)?;
        let sizes = Sizes { blocks: num_segments(&sizes), list: MAX_CANDIDATES, ..sizes };
        let mut found = block_results(&sizes, input.sampling, normed.device())?;
        let kernel = if input.sampling.gives_candidates {
            found.push(Tensor::f_empty(found[2].size(), (Kind::Int, normed.device()))?);
            &self.candidates_of_segments
        } else {
            &self.sample_segments
        };
        for Slice { outputs, segments } in slices(&sizes, input.sampling) {
            // Of a tensor with as many numbers for each output.
            let of_outputs = |tensor: &Tensor| {
                let per_output = tensor.size()[0] / sizes.outputs as i64;
                let (first, len) = (outputs.start as i64 * per_output, outputs.len() as i64 * per_output);
                tensor.f_narrow(0, first, len).map_err(Error::from)
            };
            let slice_sizes = Sizes { outputs: outputs.len(), segments: segments.len(), ..sizes };
            let (first_token, pitch) = (segments.start * SEGMENT, segments.len() * SEGMENT);
            let width = pitch.min(self.shape.vocab - first_token) as i64;
            let rows = head.f_narrow(0, first_token as i64, width)?;
            let logits = Tensor::f_empty([outputs.len() as i64, pitch as i64], (Kind::Float, normed.device()))?;
            let _ = of_outputs(normed)?.f_mm_dtype_out(&logits.f_narrow(1, 0, width)?, &rows.f_tr()?, Kind::Float)?;
            let inverse_temperatures = of_outputs(&input.inverse_temperatures)?;
            if input.sampling.has_nucleus {
                let top_ps = of_outputs(&input.top_ps)?;
                let arguments = [&logits, &inverse_temperatures, &top_ps].map(Data);
                // SAFETY: the kernel ignores logits beyond the vocabulary, all of which is in the slice.
                unsafe { self.keep_nucleus.launch(&slice_sizes, &arguments)? };
            }
            let found = found.iter().map(&of_outputs).collect::<Result<Vec<_>>>()?;
            let found: Vec<Argument<'_>> = found.iter().map(Data).collect();
            let keys = of_outputs(&input.keys)?;
            let slice = [Data(&logits), Int(segments.start as i32), Data(&inverse_temperatures), Data(&keys)];
            // SAFETY: the kernel ignores tokens beyond the vocabulary, and the segments before the
            // first of this slice have been sampled.
            unsafe { kernel.launch(&slice_sizes, &[&slice[..], &found].concat())? };
        }
        let found: Vec<Argument<'_>> = found.iter().map(Data).collect();
        self.finish_sampling(&sizes, input, &found, results)
    }

    /// Moves keys `[layers, rows, kv_heads, capacity, head_dim]` and values `[layers, rows, kv_heads,
    /// head_dim, capacity]` to other slots.
    pub fn move_slots(&self, moves: &SlotMoves, keys: &Tensor, values: &Tensor) -> Result<()> {
        let sizes = self.cache_sizes(&moves.limits)?;
        let sizes = Sizes { layers: keys.numel() / cache_len(&sizes), moves: moves.len(), ..sizes };
        let arguments = [&moves.first_move, &moves.from, &moves.to, keys, values].map(Data);
        // SAFETY: rows and slots are those of the cache, and the moves of a row do not get in each
        // other's way.
        unsafe { self.move_slots.launch(&sizes, &arguments) }
    }

    /// `attn_out [T, heads x head_dim]`: attention of the queries in `qkv [T, qkv]` over the slots
    /// of the layer's cache that each of them sees. Plain queries and keys are first normed (if the
    /// model does so) and rotated, and keys and values go to the cache; the rotated queries may
    /// overwrite the plain ones.
    pub fn attention(
        &self,
        queries: Queries,
        qkv: &Tensor,
        input: &ForwardInput,
        layer: &LayerCache<'_>,
        attn_out: &Tensor,
    ) -> Result<()> {
        let sizes = self.input_sizes(input)?;
        if self.shape.query_key_norm != layer.norms.is_some() {
            return Err(Error::internal("the norms of queries and keys are missing or unexpected"));
        }
        let tokens = token_arguments(input);
        let (rope, norms, cache) = (layer.rope(), layer.norms(), layer.cache());
        let is_plain = matches!(queries, Queries::Plain);
        let rotates = is_plain && sizes.tokens <= MAX_SMALL_STEP_TOKENS;
        if is_plain && !rotates {
            let arguments = [&[Data(qkv)], &tokens[..], &rope, &norms, &cache].concat();
            // SAFETY: the input's rows, slots and positions are those of the cache.
            unsafe { self.rotate_and_cache.launch(&sizes, &arguments)? };
        }
        let ForwardInput { tile_row, tile_first_token, tile_length, tile_window, .. } = input;
        let tiles = [tile_row, tile_first_token, tile_length, tile_window].map(Data);
        let rest = [Int(layer.max_distance()), Data(attn_out)];
        let arguments = [&[Data(qkv)], &tokens[..], &tiles, &rope, &norms, &cache, &rest].concat();
        let num_clusters = sizes.tiles * self.shape.kv_heads;
        let is_many = 2 * num_clusters >= 3 * self.num_multiprocessors;
        let kernels = if is_many { &self.many_tiles } else { &self.few_tiles };
        let kernel = if rotates { &kernels.plain } else { &kernels.rotated };
        let tile_blocks = self.tile_blocks(&sizes);
        // SAFETY: as above; also, each tile of the input is within the tokens of one row, whose slots
        // are consecutive from that of its window on, and no longer than `tile_tokens`.
        unsafe { kernel.launch_clusters(&Sizes { tile_blocks, ..sizes }, tile_blocks, &arguments) }
    }

    /// Thread blocks that share a tile and a head of keys: as many as let all clusters run at the
    /// same time, and no more than have work when the cache is full.
    fn tile_blocks(&self, sizes: &Sizes) -> usize {
        let num_clusters = sizes.tiles * self.shape.kv_heads;
        let groups = (tile_tokens(&self.shape, sizes.tokens) * self.shape.group()).div_ceil(WARP_QUERIES);
        let max_blocks = (sizes.capacity / SLOTS_PER_READ * groups).div_ceil(BLOCK_WORK).next_power_of_two();
        let fits = |&&(blocks, max_clusters): &&(usize, usize)| blocks <= max_blocks && num_clusters <= max_clusters;
        self.max_clusters.iter().find(fits).map_or(1, |&(blocks, _)| blocks)
    }
}

fn sampling_arguments(input: &ForwardInput) -> [Argument<'_>; 2] {
    [Data(&input.inverse_temperatures), Data(&input.keys)]
}

/// Fused kernels with what they need to add the adapters of a product.
struct WithAdapters<'k> {
    products: &'k FusedProducts,
    sizes: Sizes,
    /// The adapters, and which tokens they act on.
    adapters: Option<(&'k DraftAdapters, &'k Tensor)>,
    /// A x, if it was computed before.
    low_rank: Option<Tensor>,
}

impl WithAdapters<'_> {
    /// Launches a kernel, whose arguments for adapters are between these.
    ///
    /// # Safety
    /// As for [`Kernel::launch`].
    unsafe fn launch(&self, kernel: &Kernel<Sizes>, before: &[Argument<'_>], after: &[Argument<'_>]) -> Result<()> {
        let adapters = [
            Optional(self.adapters.map(|(_, adapted)| adapted)),
            Optional(self.adapters.map(|(adapters, _)| &adapters.lora_a)),
            Optional(self.low_rank.as_ref()),
            Optional(self.adapters.map(|(adapters, _)| &adapters.lora_b)),
        ];
        // SAFETY: as here; the arguments for adapters are no indices.
        unsafe { kernel.launch_clusters(&self.sizes, self.sizes.fused_blocks, &[before, &adapters, after].concat()) }
    }
}

fn token_arguments(input: &ForwardInput) -> [Argument<'_>; 4] {
    [&input.row, &input.slot, &input.position, &input.visible].map(Data)
}

impl LayerCache<'_> {
    fn rope(&self) -> [Argument<'_>; 2] {
        [Data(&self.rope_table.0), Data(&self.rope_table.1)]
    }

    fn norms(&self) -> [Argument<'_>; 2] {
        [Optional(self.norms.map(|norms| &norms.0)), Optional(self.norms.map(|norms| &norms.1))]
    }

    fn cache(&self) -> [Argument<'_>; 2] {
        [Data(self.keys), Data(self.values)]
    }

    /// How far before a token are the positions that it attends to, at most.
    fn max_distance(&self) -> i32 {
        self.sliding_window.map_or(i32::MAX, |window| window - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::tests::assert_declared;
    use crate::cuda::nvrtc::compile;

    #[test]
    fn the_kernels_compile_for_every_kind_of_model_without_a_gpu() {
        let small = KernelShape::SMOLLM2;
        let qwen3 = KernelShape { hidden: 1024, heads: 16, kv_heads: 8, head_dim: 128, query_key_norm: true, ..small };
        let tiny = KernelShape { hidden: 128, heads: 4, kv_heads: 4, head_dim: 32, ffn: 256, vocab: 512, ..small };
        // GPUs differ in how much shared memory there is for copies of tokens.
        let gpus = [(8, 0), (8, 6), (12, 0)].map(|capability| (small, capability));
        for (shape, capability) in [(small, (9, 0)), (qwen3, (9, 0)), (tiny, (9, 0))].into_iter().chain(gpus) {
            assert!(supports(&shape));
            let ranks = if shape == tiny { AdapterRanks::SOME } else { AdapterRanks::default() };
            let code = compile(SOURCE, capability, &macros(&shape, ranks, capability)).unwrap();
            assert!(code.is_elf(), "{shape:?} {capability:?}");
        }
        assert!(!supports(&KernelShape { head_dim: 80, ..small }));
    }

    #[test]
    fn slices_of_logits_fit_memory_and_keep_a_nucleus_whole() {
        let sizes = Sizes { outputs: 3000, ..Sizes::new(KernelShape::SMOLLM2, 3000) };
        for has_nucleus in [false, true] {
            let sampling = SamplingOptions { is_greedy: false, gives_candidates: false, has_nucleus };
            let slices = slices(&sizes, sampling);
            assert!(slices.len() > 1, "{slices:?}");
            let (mut outputs, mut segments) = (0, 0);
            for slice in &slices {
                assert!(slice.outputs.len() * slice.segments.len() * SEGMENT <= MAX_LOGITS, "{slice:?}");
                let whole = if has_nucleus { &slice.segments } else { &slice.outputs };
                assert_eq!(*whole, 0..if has_nucleus { num_segments(&sizes) } else { 3000 });
                outputs += slice.outputs.len();
                segments += slice.segments.len();
            }
            assert_eq!(
                if has_nucleus { outputs } else { segments },
                if has_nucleus { 3000 } else { num_segments(&sizes) }
            );
        }
    }

    #[test]
    fn the_signatures_match_the_source() {
        let fused =
            [FUSED_QKV, FUSED_QKV_ROTATED, FUSED_OUTPUT, FUSED_GATE_UP, FUSED_DOWN, FUSED_SAMPLE, FUSED_CANDIDATES];
        let low_rank = [LOW_RANK_QKV, LOW_RANK_OUTPUT, LOW_RANK_GATE_UP, LOW_RANK_DOWN];
        let others = [
            COPY_ROWS,
            ARGMAX_OF_BLOCKS,
            CANDIDATES_OF_BLOCKS,
            ADD_RMS_NORM,
            SWIGLU,
            SAMPLE_SEGMENTS,
            CANDIDATES_OF_SEGMENTS,
            KEEP_NUCLEUS,
            MOVE_SLOTS,
        ];
        let attention = [ROTATE_AND_CACHE, ATTENTION, ROTATE_AND_ATTEND];
        for signature in fused.iter().chain(&low_rank).chain(&others).chain(&attention) {
            assert_declared(SOURCE, signature);
        }
        let num_kernels = SOURCE.matches("_KERNEL fused").count() + SOURCE.matches("\"C\" __global__").count() - 2;
        assert_eq!(
            num_kernels,
            fused.len() + low_rank.len() + others.len() + attention.len(),
            "a kernel has no signature"
        );
    }
}
