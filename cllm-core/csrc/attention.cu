// Attention over a packed batch, forward and backward, after FlashAttention-2 (Dao, arXiv
// 2307.08691). Each token attends to up to three ranges of tokens; a block mask lists which tiles
// of keys a tile of queries needs, so that the others are never read. No sum depends on the order
// in which blocks run, so results are the same in every run.
//
// Macros from the host: HEADS, KV_HEADS, HEAD_DIM (64 or 128), TILE (tokens of a tile), THREADS.
// Arguments, where T is the number of tokens, a multiple of TILE:
//   qkv [T, QKV]: queries, keys and values; attn_out [T, HEADS * HEAD_DIM]
//   logsumexp (to base 2) and deltas: float32 [HEADS, T]
//   ranges: int32 [T, 3, 2]: first key and number of keys of each range of a token
//   offsets, blocks: int32. Tile i is paired with blocks[offsets[i]] to blocks[offsets[i + 1] - 1]:
//     tiles of keys for a tile of queries, and the reverse in attention_d_kv. An entry is twice the
//     other tile's index, plus 1 if every query of the pair attends to every key.
// A block of threads has four warps; each works on 16 rows of the block's tile.
//
// mma.m16n8k16 spreads a 16 x 8 result over a warp: lane l holds columns 2 (l % 4) and 2 (l % 4) +
// 1 of the rows l / 4 (values 0 and 1) and l / 4 + 8 (values 2 and 3). "upper" and "lower" below
// are these two rows.
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define GROUP (HEADS / KV_HEADS)
#define ROW_CHUNKS (HEAD_DIM / 8)
#define TILE_BYTES (TILE * HEAD_DIM * 2)
#define LN_2 0.6931471805599453f
static_assert(THREADS == TILE / 16 * 32, "one warp per 16 rows of a tile");

struct Ranges {
  int first[3];
  u32 count[3];
  __device__ __forceinline__ void load(const int *from) {
    for (int i = 0; i < 3; i++) first[i] = from[2 * i], count[i] = from[2 * i + 1];
  }
  __device__ __forceinline__ bool contain(int key) const {
    return (u32)(key - first[0]) < count[0] || (u32)(key - first[1]) < count[1] || (u32)(key - first[2]) < count[2];
  }
};

// Shared-memory address of a chunk of 8 values in a row of a tile. Chunks are permuted within a
// row, so that the same chunk of neighbouring rows is in different banks.
__device__ __forceinline__ u32 swizzle(u32 tile, int row, int chunk) {
  return tile + (row * ROW_CHUNKS + (chunk ^ (row & 7))) * 16;
}

__device__ __forceinline__ void cp_async_16(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void cp_async_4(u32 to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits for all groups of copies but the last `pending`, and for the other threads of the block.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  __syncthreads();
}

// Copies TILE rows of HEAD_DIM values that are `stride` apart.
__device__ __forceinline__ void copy_tile(u32 to, const bf16 *from, size_t stride) {
  for (int i = threadIdx.x; i < TILE * ROW_CHUNKS; i += THREADS) {
    int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
    cp_async_16(swizzle(to, row, chunk), from + row * stride + chunk * 8);
  }
}

__device__ __forceinline__ void ldmatrix_x4(u32 (&x)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&x)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

// A warp's 16 rows, as results of mma: against the rows of a tile, and against the columns of a
// head.
typedef float Scores[TILE / 8][4];
typedef float HeadRows[HEAD_DIM / 8][4];
// Scores as the left operand ("A fragment") of the next product.
typedef u32 AFragment[TILE / 16][4];

// scores = rows `row` to `row + 15` of tile `a` times the transpose of tile `b`.
__device__ __forceinline__ void mma_qk(Scores &scores, u32 a, int row, u32 b) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
#pragma unroll
  for (int chunk = 0; chunk < ROW_CHUNKS; chunk += 2) {
    u32 left[4];
    ldmatrix_x4(left, swizzle(a, row + lane % 16, chunk + lane / 16));
#pragma unroll
    for (int n = 0; n < TILE / 16; n++) {
      u32 right[4];
      ldmatrix_x4(right, swizzle(b, n * 16 + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
      mma(scores[2 * n], left[0], left[1], left[2], left[3], right[0], right[1]);
      mma(scores[2 * n + 1], left[0], left[1], left[2], left[3], right[2], right[3]);
    }
  }
}

__device__ __forceinline__ void to_a_frag(AFragment &a, const Scores &scores) {
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
    a[k][0] = pack_bf16(scores[2 * k][0], scores[2 * k][1]);
    a[k][1] = pack_bf16(scores[2 * k][2], scores[2 * k][3]);
    a[k][2] = pack_bf16(scores[2 * k + 1][0], scores[2 * k + 1][1]);
    a[k][3] = pack_bf16(scores[2 * k + 1][2], scores[2 * k + 1][3]);
  }
}

// sum += a [16, TILE] times tile `b` [TILE, HEAD_DIM].
__device__ __forceinline__ void mma_pv(HeadRows &sum, const AFragment &a, u32 b) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; n++) {
      u32 right[4];
      ldmatrix_x4_trans(right, swizzle(b, k * 16 + lane % 16, n * 2 + lane / 16));
      mma(sum[2 * n], a[k][0], a[k][1], a[k][2], a[k][3], right[0], right[1]);
      mma(sum[2 * n + 1], a[k][0], a[k][1], a[k][2], a[k][3], right[2], right[3]);
    }
  }
}

// Writes the lane's part of its upper and lower row, each times a factor. `to` is the upper row,
// the lower one is 8 further.
__device__ __forceinline__ void store_rows(bf16 *to, size_t stride, const HeadRows &rows, float upper, float lower) {
  int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 8; n++) {
    *(u32 *)(to + n * 8 + quad_lane * 2) = pack_bf16(rows[n][0] * upper, rows[n][1] * upper);
    *(u32 *)(to + 8 * stride + n * 8 + quad_lane * 2) = pack_bf16(rows[n][2] * lower, rows[n][3] * lower);
  }
}

__device__ __forceinline__ float exp2_approx(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// Copies a tile's keys and values of one head; the values follow the keys.
__device__ __forceinline__ void copy_kv_tile(u32 to, const bf16 *keys) {
  copy_tile(to, keys, QKV);
  copy_tile(to + TILE_BYTES, keys + KV_HEADS * HEAD_DIM, QKV);
}

__device__ __forceinline__ const bf16 *keys_of_tile(const bf16 *qkv, int tile, int kv_head) {
  return qkv + (size_t)tile * TILE * QKV + (HEADS + kv_head) * HEAD_DIM;
}

// The tiles of keys and values that a tile of queries needs, blocks[first] to blocks[last - 1].
// They pass through two stages of shared memory: while one is used, the next arrives.
struct KvStages {
  const bf16 *qkv;
  const int *blocks;
  int head, first, last;
  u32 memory;

  __device__ __forceinline__ u32 stage(int index) const { return memory + (index - first) % 2 * 2 * TILE_BYTES; }
  __device__ __forceinline__ void copy(int index) const {
    const bf16 *from = keys_of_tile(qkv, blocks[index] / 2, head / GROUP);
    copy_kv_tile(stage(index), from);
    cp_async_commit();
  }
  // Starts the copy of the next tile, waits for that of this one and returns its address.
  __device__ __forceinline__ u32 wait(int index) const {
    if (index + 1 < last) {
      copy(index + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    return stage(index);
  }
};

// attn_out = softmax(scale / log2(e) * q k^T) v over the keys that the mask allows. `scale`
// includes log2(e), since weights are computed with exp2. Grid: (tiles of queries, HEADS).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention(const bf16 *qkv, const int *ranges, const int *offsets, const int *blocks, float scale, bf16 *attn_out,
              float *logsumexp, int tokens) {
  extern __shared__ uint4 memory[];
  u32 queries = (u32)__cvta_generic_to_shared(memory), keys = queries + TILE_BYTES;
  int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  int token = tile * TILE + row + lane / 4;
  const KvStages kv = {qkv, blocks, head, offsets[tile], offsets[tile + 1], keys};
  copy_tile(queries, qkv + (size_t)tile * TILE * QKV + head * HEAD_DIM, QKV);
  kv.copy(kv.first);
  Ranges upper, lower;
  upper.load(ranges + (size_t)token * 6);
  lower.load(ranges + (size_t)(token + 8) * 6);
  HeadRows sum = {};
  float row_max[2] = {-INFINITY, -INFINITY}, weight_sum[2] = {0.f, 0.f};
  for (int index = kv.first; index < kv.last; index++) {
    u32 stage = kv.wait(index);
    int key = blocks[index] / 2 * TILE + lane % 4 * 2;
    Scores scores;
    mma_qk(scores, queries, row, stage);
    if (blocks[index] % 2 == 0) {
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (!(i < 2 ? upper : lower).contain(key + n * 8 + i % 2)) scores[n][i] = -INFINITY;
    }
    float shrink[2], shift[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float max = row_max[half];
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) max = fmaxf(max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      max = quad_max(max);
      // A row may attend to nothing in this tile and the ones before.
      shift[half] = max == -INFINITY ? 0.f : max * scale;
      shrink[half] = exp2_approx(row_max[half] * scale - shift[half]);
      row_max[half] = max;
      weight_sum[half] *= shrink[half];
    }
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[n][i] = exp2_approx(scores[n][i] * scale - shift[i / 2]);
        weight_sum[i / 2] += scores[n][i];
      }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[n][i] *= shrink[i / 2];
    AFragment weights;
    to_a_frag(weights, scores);
    mma_pv(sum, weights, stage + TILE_BYTES);
    __syncthreads();
  }
  weight_sum[0] = quad_sum(weight_sum[0]), weight_sum[1] = quad_sum(weight_sum[1]);
  bf16 *to = attn_out + (size_t)token * HEADS * HEAD_DIM + head * HEAD_DIM;
  store_rows(to, HEADS * HEAD_DIM, sum, 1.f / weight_sum[0], 1.f / weight_sum[1]);
  if (lane % 4 == 0) {
    logsumexp[(size_t)head * tokens + token] = row_max[0] * scale + log2f(weight_sum[0]);
    logsumexp[(size_t)head * tokens + token + 8] = row_max[1] * scale + log2f(weight_sum[1]);
  }
}

// The gradient of the queries, and delta [HEADS, T] = the row sums of attn_out * d_attn_out, which
// attention_d_kv needs. Grid: (tiles of queries, HEADS).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_d_queries(const bf16 *qkv, const int *ranges, const int *offsets, const int *blocks, float scale,
                        const bf16 *attn_out, const float *logsumexp, const bf16 *d_attn_out, bf16 *d_qkv,
                        float *deltas, int tokens) {
  extern __shared__ uint4 memory[];
  u32 queries = (u32)__cvta_generic_to_shared(memory), gradients = queries + TILE_BYTES, keys = gradients + TILE_BYTES;
  int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  int token = tile * TILE + row + lane / 4;
  const KvStages kv = {qkv, blocks, head, offsets[tile], offsets[tile + 1], keys};
  const size_t width = HEADS * HEAD_DIM;
  copy_tile(queries, qkv + (size_t)tile * TILE * QKV + head * HEAD_DIM, QKV);
  copy_tile(gradients, d_attn_out + (size_t)tile * TILE * width + head * HEAD_DIM, width);
  kv.copy(kv.first);
  Ranges upper, lower;
  upper.load(ranges + (size_t)token * 6);
  lower.load(ranges + (size_t)(token + 8) * 6);
  float delta[2], row_logsumexp[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    size_t from = (size_t)(token + 8 * half) * width + head * HEAD_DIM + lane % 4 * (HEAD_DIM / 4);
    float sum = 0.f;
    for (int i = 0; i < HEAD_DIM / 4; i += 8) {
      uint4 a = *(const uint4 *)(attn_out + from + i), b = *(const uint4 *)(d_attn_out + from + i);
      sum += low_to_f32(a.x) * low_to_f32(b.x) + high_to_f32(a.x) * high_to_f32(b.x) +
             low_to_f32(a.y) * low_to_f32(b.y) + high_to_f32(a.y) * high_to_f32(b.y);
      sum += low_to_f32(a.z) * low_to_f32(b.z) + high_to_f32(a.z) * high_to_f32(b.z) +
             low_to_f32(a.w) * low_to_f32(b.w) + high_to_f32(a.w) * high_to_f32(b.w);
    }
    size_t at = (size_t)head * tokens + token + 8 * half;
    delta[half] = quad_sum(sum);
    row_logsumexp[half] = logsumexp[at];
    if (lane % 4 == 0) deltas[at] = delta[half];
  }
  HeadRows sum = {};
  for (int index = kv.first; index < kv.last; index++) {
    u32 stage = kv.wait(index);
    int key = blocks[index] / 2 * TILE + lane % 4 * 2;
    bool full = blocks[index] % 2;
    Scores scores, d_weights;
    mma_qk(scores, queries, row, stage);
    mma_qk(d_weights, gradients, row, stage + TILE_BYTES);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        bool visible = full || (i < 2 ? upper : lower).contain(key + n * 8 + i % 2);
        float weight = visible ? exp2_approx(scores[n][i] * scale - row_logsumexp[i / 2]) : 0.f;
        scores[n][i] = weight * (d_weights[n][i] - delta[i / 2]);
      }
    AFragment d_scores;
    to_a_frag(d_scores, scores);
    mma_pv(sum, d_scores, stage);
    __syncthreads();
  }
  // ln 2 cancels the log2(e) in `scale`.
  float factor = scale * LN_2;
  store_rows(d_qkv + (size_t)token * QKV + head * HEAD_DIM, QKV, sum, factor, factor);
}

// The gradients of keys and values. The block for a tile and a head of keys iterates over all query
// heads that share the head, and over the tiles of queries in its list. Scores are transposed: a
// row belongs to a key. Grid: (tiles of keys, KV_HEADS).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_d_kv(const bf16 *qkv, const int *ranges, const int *offsets, const int *blocks, float scale,
                   const float *logsumexp, const float *deltas, const bf16 *d_attn_out, bf16 *d_qkv, int tokens) {
  extern __shared__ uint4 memory[];
  // A stage: queries and their gradients, followed by the ranges, logsumexp and delta of each
  // query.
  const int row_bytes = TILE * 8 * 4;
  const u32 stage_bytes = 2 * TILE_BYTES + row_bytes;
  u32 keys = (u32)__cvta_generic_to_shared(memory), values = keys + TILE_BYTES, queries = values + TILE_BYTES;
  int tile = blockIdx.x, kv_head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  int token = tile * TILE + row + lane / 4;
  int first = offsets[tile], num_blocks = offsets[tile + 1] - first;
  const size_t width = HEADS * HEAD_DIM;
  auto copy_queries = [&](int index) {
    int head = kv_head * GROUP + index / num_blocks;
    size_t at = (size_t)(blocks[first + index % num_blocks] / 2) * TILE;
    u32 to = queries + index % 2 * stage_bytes;
    copy_tile(to, qkv + at * QKV + head * HEAD_DIM, QKV);
    copy_tile(to + TILE_BYTES, d_attn_out + at * width + head * HEAD_DIM, width);
    to += 2 * TILE_BYTES;
    if (threadIdx.x < TILE * 6 / 4) cp_async_16(to + threadIdx.x * 16, ranges + at * 6 + threadIdx.x * 4);
    const float *from = (threadIdx.x < TILE ? logsumexp : deltas) + (size_t)head * tokens + at + threadIdx.x % TILE;
    cp_async_4(to + TILE * 24 + threadIdx.x * 4, from);
    cp_async_commit();
  };
  copy_kv_tile(keys, keys_of_tile(qkv, tile, kv_head));
  copy_queries(0);
  HeadRows d_keys = {}, d_values = {};
  for (int index = 0; index < num_blocks * GROUP; index++) {
    if (index + 1 < num_blocks * GROUP) {
      copy_queries(index + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    u32 stage = queries + index % 2 * stage_bytes;
    const char *row_data = (const char *)memory + 2 * TILE_BYTES + index % 2 * stage_bytes + 2 * TILE_BYTES;
    const int *row_ranges = (const int *)row_data;
    const float *row_logsumexp = (const float *)(row_data + TILE * 24), *delta = row_logsumexp + TILE;
    bool full = blocks[first + index % num_blocks] % 2;
    Scores weights, scores;
    mma_qk(weights, keys, row, stage);
    mma_qk(scores, values, row, stage + TILE_BYTES);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        int query = n * 8 + lane % 4 * 2 + column;
        Ranges visible;
        if (!full) visible.load(row_ranges + query * 6);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int i = half * 2 + column;
          bool is_visible = full || visible.contain(token + 8 * half);
          weights[n][i] = is_visible ? exp2_approx(weights[n][i] * scale - row_logsumexp[query]) : 0.f;
          scores[n][i] = weights[n][i] * (scores[n][i] - delta[query]);
        }
      }
    AFragment a;
    to_a_frag(a, weights);
    mma_pv(d_values, a, stage + TILE_BYTES);
    to_a_frag(a, scores);
    mma_pv(d_keys, a, stage);
    __syncthreads();
  }
  float factor = scale * LN_2;
  bf16 *to = d_qkv + (size_t)token * QKV + (HEADS + kv_head) * HEAD_DIM;
  store_rows(to, QKV, d_keys, factor, factor);
  store_rows(to + KV_HEADS * HEAD_DIM, QKV, d_values, 1.f, 1.f);
}
