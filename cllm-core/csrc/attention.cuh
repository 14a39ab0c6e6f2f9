// What the attention kernels of all GPUs share: the layout of tiles in shared memory, masks, the
// softmax and its gradient. Attention is over a packed batch, forward and backward, after
// FlashAttention-2 (Dao, arXiv 2307.08691). A block mask lists which tiles of keys a tile of
// queries needs, so that the others are never read. No sum depends on the order in which blocks
// run, so results are the same in every run.
//
// Macros from the host: HEADS, KV_HEADS, HEAD_DIM (a multiple of 8).
// Arguments of the kernels, where T is the number of tokens, a multiple of 64:
//   qkv [T, QKV]: queries, keys and values; attn_out and d_attn_out [T, HEADS * HEAD_DIM]
//   logsumexp (to base 2) and deltas: float32 [HEADS, T]
//   offsets, blocks, bits: the block mask. Group i of tiles (of queries, or of keys in
//     attention_d_kv) is paired with the tiles in entries offsets[i] to offsets[i + 1] - 1 of
//     blocks. An entry has four numbers: the other tile's index, and for each tile of the group
//     ATTENDS_TO_ALL, ATTENDS_TO_NONE or the index of 64 rows of bits. Bit j of row i tells whether
//     token i of the group's tile is paired with token j of the other.
//   scale: that of the scores times log2(e), since weights are computed with exp2
//
// Four warps work on the 64 rows of a tile, each on 16. A product of tensor cores spreads 16 x 8
// results over a warp: lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of the rows l / 4 (values 0
// and 1) and l / 4 + 8 (values 2 and 3). "upper" and "lower" below are these two rows.
#define TILE 64
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define GROUP (HEADS / KV_HEADS)
// Heads are padded with zeros in shared memory: to the depth of a product, and so that half of a
// wide head is a multiple of it, too.
#define HEAD_PAD (HEAD_DIM > 128 ? (HEAD_DIM + 31) / 32 * 32 : (HEAD_DIM + 15) / 16 * 16)
// A tile in shared memory consists of panels of 64 columns, 128 bytes a row.
#define PANELS ((HEAD_DIM + 63) / 64)
#define PANEL_BYTES (TILE * 128)
#define TILE_BYTES (PANELS * PANEL_BYTES)
#define ATTENDS_TO_ALL -1
#define ATTENDS_TO_NONE -2
#define LN_2 0.6931471805599453f

// A warp's 16 rows of results, four values for each 8 columns: against the rows of a tile, and
// against the columns of a head.
typedef float Scores[TILE / 2];
typedef float HeadRows[HEAD_PAD / 2];
// Scores as the left operand ("A fragment") of the next product.
typedef u32 AFragment[TILE / 16][4];

// Shared-memory address of a chunk of 8 columns in a row of a tile. Chunks are permuted within a
// panel's row, so that the same chunk of neighbouring rows is in different banks. The copy engine
// of Hopper calls this layout "swizzle 128B".
__device__ __forceinline__ u32 swizzle(u32 tile, int row, int chunk) {
  return tile + chunk / 8 * PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

__device__ __forceinline__ float2 load_shared_pair(u32 from) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from));
  return pair;
}

__device__ __forceinline__ float exp2_approx(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

__device__ __forceinline__ void to_a_frag(AFragment &a, const Scores &scores) {
#pragma unroll
  for (int k = 0; k < TILE / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) a[k][i] = pack_bf16(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
}

// Replaces the scores that the mask excludes. `upper` and `lower` are bits of the lane's rows.
__device__ __forceinline__ void mask_scores(Scores &scores, u64 upper, u64 lower, float excluded) {
  const int column = threadIdx.x % 4 * 2;
  upper >>= column, lower >>= column;
#pragma unroll
  for (int i = 0; i < TILE / 2; i++)
    if (((i % 4 < 2 ? upper : lower) >> (i / 4 * 8 + i % 2) & 1) == 0) scores[i] = excluded;
}

// The softmax of the lane's two rows over the tiles so far.
struct Softmax {
  float scale;
  // What is subtracted from scores, to base 2: a maximum, but not always the latest one. Weights
  // below 2^8 are exact enough, and most tiles then leave the earlier sums as they are
  // (FlashAttention-4 does so, too).
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  // Turns the scores of a tile into weights. The sums of earlier tiles must be multiplied by
  // `shrink`.
  __device__ __forceinline__ void add(Scores &scores, float (&shrink)[2]) {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float max = -INFINITY;
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) max = fmaxf(max, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
      max = quad_max(max) * scale;
      bool grows = max > reference[half] + 8.f;
      shrink[half] = grows ? exp2_approx(reference[half] - max) : 1.f;
      if (grows) reference[half] = max;
      // A row may attend to nothing in this tile and the ones before.
      shift[half] = reference[half] == -INFINITY ? 0.f : reference[half];
      sum[half] *= shrink[half];
    }
#pragma unroll
    for (int i = 0; i < TILE / 2; i++) {
      scores[i] = exp2_approx(scores[i] * scale - shift[i % 4 / 2]);
      sum[i % 4 / 2] += scores[i];
    }
  }

  // Completes the sums, of which each lane of a quad has a part.
  __device__ __forceinline__ void finish() { sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]); }
  __device__ __forceinline__ float logsumexp(int half) const { return reference[half] + log2f(sum[half]); }
};

__device__ __forceinline__ void multiply_rows(HeadRows &rows, const float (&factor)[2]) {
  if (!__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
  for (int i = 0; i < HEAD_PAD / 2; i++) rows[i] *= factor[i % 4 / 2];
}

// Scores become weights, of queries in rows or, for transposed scores, in columns. `numbers` is the
// shared-memory address of the logsumexp of each column.
__device__ __forceinline__ void weights_of_rows(Scores &scores, float scale, const float (&logsumexp)[2]) {
#pragma unroll
  for (int i = 0; i < TILE / 2; i++) scores[i] = exp2_approx(scores[i] * scale - logsumexp[i % 4 / 2]);
}
__device__ __forceinline__ void weights_of_columns(Scores &scores, float scale, u32 numbers) {
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) {
    float2 logsumexp = load_shared_pair(numbers + n * 32 + threadIdx.x % 4 * 8);
#pragma unroll
    for (int i = 0; i < 4; i++)
      scores[4 * n + i] = exp2_approx(scores[4 * n + i] * scale - (i % 2 ? logsumexp.y : logsumexp.x));
  }
}

// Gradients of weights become gradients of scores; `numbers` has the delta of each column.
__device__ __forceinline__ void d_scores_of_rows(Scores &d_weights, const Scores &weights, const float (&delta)[2]) {
#pragma unroll
  for (int i = 0; i < TILE / 2; i++) d_weights[i] = weights[i] * (d_weights[i] - delta[i % 4 / 2]);
}
__device__ __forceinline__ void d_scores_of_columns(Scores &d_weights, const Scores &weights, u32 numbers) {
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) {
    float2 delta = load_shared_pair(numbers + n * 32 + threadIdx.x % 4 * 8);
#pragma unroll
    for (int i = 0; i < 4; i++)
      d_weights[4 * n + i] = weights[4 * n + i] * (d_weights[4 * n + i] - (i % 2 ? delta.y : delta.x));
  }
}

// The sum of products of 8 pairs.
__device__ __forceinline__ float dot_8(uint4 a, uint4 b) {
  return low_to_f32(a.x) * low_to_f32(b.x) + high_to_f32(a.x) * high_to_f32(b.x) + low_to_f32(a.y) * low_to_f32(b.y) +
         high_to_f32(a.y) * high_to_f32(b.y) + low_to_f32(a.z) * low_to_f32(b.z) +
         high_to_f32(a.z) * high_to_f32(b.z) + low_to_f32(a.w) * low_to_f32(b.w) + high_to_f32(a.w) * high_to_f32(b.w);
}

// Writes the lane's part of its upper and lower row, each times a factor, from column `first` of a
// head on. `to` is the upper row, the lower one is 8 further.
template <int values>
__device__ __forceinline__ void store_rows(bf16 *to, size_t stride, const float (&rows)[values], float upper, float lower,
                                           int first = 0) {
#pragma unroll
  for (int n = 0; n < values / 4; n++) {
    int column = first + n * 8 + threadIdx.x % 4 * 2;
    if (column >= HEAD_DIM) return;
    *(u32 *)(to + column) = pack_bf16(rows[4 * n] * upper, rows[4 * n + 1] * upper);
    *(u32 *)(to + 8 * stride + column) = pack_bf16(rows[4 * n + 2] * lower, rows[4 * n + 3] * lower);
  }
}
