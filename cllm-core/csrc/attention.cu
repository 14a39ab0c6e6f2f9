// Attention for GPUs from Ampere on, and for heads that are too wide for attention_hopper.cu. A
// block of threads works on one tile; the tiles that it needs pass through two stages of shared
// memory: while one is used, the next arrives.
#define THREADS 128
// The gradients of keys and values of a wide head do not fit into the registers, so each of two
// blocks sums half of the columns.
#define D_KV_SPLITS (HEAD_PAD > 128 ? 2 : 1)
#define D_KV_COLUMNS (HEAD_PAD / D_KV_SPLITS)

// Copies 16 bytes, or writes zeros.
__device__ __forceinline__ void cp_async_16(u32 to, const void *from, bool exists = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0));
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

// Copies a head of 64 tokens that are `stride` numbers apart.
__device__ __forceinline__ void copy_tile(u32 to, const bf16 *from, size_t stride) {
  const int chunks = HEAD_PAD / 8;
  for (int i = threadIdx.x; i < TILE * chunks; i += THREADS) {
    int row = i / chunks, chunk = i % chunks;
    bool exists = chunk < HEAD_DIM / 8;
    cp_async_16(swizzle(to, row, chunk), from + row * stride + (exists ? chunk * 8 : 0), exists);
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

// The two products of 8 columns each that a left operand and 16 columns of a right one have.
__device__ __forceinline__ void mma_16_columns(float *c, const u32 (&a)[4], const u32 (&b)[4]) {
  mma(*(float(*)[4])c, a[0], a[1], a[2], a[3], b[0], b[1]);
  mma(*(float(*)[4])(c + 4), a[0], a[1], a[2], a[3], b[2], b[3]);
}

// scores = rows `row` to `row + 15` of tile `a` times the transpose of tile `b`.
__device__ __forceinline__ void mma_qk(Scores &scores, u32 a, int row, u32 b) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TILE / 2; i++) scores[i] = 0.f;
#pragma unroll
  for (int chunk = 0; chunk < HEAD_PAD / 8; chunk += 2) {
    u32 left[4];
    ldmatrix_x4(left, swizzle(a, row + lane % 16, chunk + lane / 16));
#pragma unroll
    for (int n = 0; n < TILE / 16; n++) {
      u32 right[4];
      ldmatrix_x4(right, swizzle(b, n * 16 + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
      mma_16_columns(scores + 8 * n, left, right);
    }
  }
}

// sum += a [16, TILE] times the columns of tile `b` from `first` on.
template <int values>
__device__ __forceinline__ void mma_pv(float (&sum)[values], const AFragment &a, u32 b, int first = 0) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
    for (int n = 0; n < values / 8; n++) {
      u32 right[4];
      ldmatrix_x4_trans(right, swizzle(b, k * 16 + lane % 16, first / 8 + n * 2 + lane / 16));
      mma_16_columns(sum + 8 * n, a[k], right);
    }
  }
}

// Copies a tile's keys and values of one head; the values follow the keys.
__device__ __forceinline__ void copy_kv_tile(u32 to, const bf16 *qkv, int tile, int kv_head) {
  const bf16 *keys = qkv + (size_t)tile * TILE * QKV + (HEADS + kv_head) * HEAD_DIM;
  copy_tile(to, keys, QKV);
  copy_tile(to + TILE_BYTES, keys + KV_HEADS * HEAD_DIM, QKV);
}

// The tiles of keys and values that a tile of queries needs.
struct KvStages {
  const bf16 *qkv;
  const int4 *blocks;
  int head, first, last;
  u32 memory;

  __device__ __forceinline__ u32 stage(int index) const { return memory + (index - first) % 2 * 2 * TILE_BYTES; }
  __device__ __forceinline__ void copy(int index) const {
    copy_kv_tile(stage(index), qkv, blocks[index].x, head / GROUP);
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

// Excludes what the mask of a pair of tiles does; `row` is the lane's upper row.
__device__ __forceinline__ void mask_pair(Scores &scores, int4 block, const u64 *bits, int row, float excluded) {
  if (block.y < 0) return;
  const u64 *rows = bits + (size_t)block.y * TILE + row;
  mask_scores(scores, rows[0], rows[8], excluded);
}

// attn_out = softmax(q k^T) v over the keys that the mask allows. Grid: (tiles of queries, HEADS).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention(const bf16 *qkv, const int *offsets, const int *blocks, const u64 *bits, float scale, bf16 *attn_out,
              float *logsumexp, int tokens) {
  extern __shared__ uint4 memory[];
  u32 queries = (u32)__cvta_generic_to_shared(memory), keys = queries + TILE_BYTES;
  int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  int row = warp_row + lane / 4, token = tile * TILE + row;
  const KvStages kv = {qkv, (const int4 *)blocks, head, offsets[tile], offsets[tile + 1], keys};
  copy_tile(queries, qkv + (size_t)tile * TILE * QKV + head * HEAD_DIM, QKV);
  kv.copy(kv.first);
  HeadRows sum = {};
  Softmax softmax = {scale};
  for (int index = kv.first; index < kv.last; index++) {
    u32 stage = kv.wait(index);
    Scores scores;
    mma_qk(scores, queries, warp_row, stage);
    mask_pair(scores, kv.blocks[index], bits, row, -INFINITY);
    float shrink[2];
    softmax.add(scores, shrink);
    multiply_rows(sum, shrink);
    AFragment weights;
    to_a_frag(weights, scores);
    mma_pv(sum, weights, stage + TILE_BYTES);
    __syncthreads();
  }
  softmax.finish();
  bf16 *to = attn_out + (size_t)token * HEADS * HEAD_DIM + head * HEAD_DIM;
  store_rows(to, HEADS * HEAD_DIM, sum, 1.f / softmax.sum[0], 1.f / softmax.sum[1]);
  if (lane % 4 == 0) {
    logsumexp[(size_t)head * tokens + token] = softmax.logsumexp(0);
    logsumexp[(size_t)head * tokens + token + 8] = softmax.logsumexp(1);
  }
}

// The gradient of the queries, and delta [HEADS, T] = the row sums of attn_out * d_attn_out, which
// attention_d_kv needs. Grid: (tiles of queries, HEADS).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_d_queries(const bf16 *qkv, const int *offsets, const int *blocks, const u64 *bits, float scale,
                        const bf16 *attn_out, const float *logsumexp, const bf16 *d_attn_out, bf16 *d_qkv,
                        float *deltas, int tokens) {
  extern __shared__ uint4 memory[];
  u32 queries = (u32)__cvta_generic_to_shared(memory), gradients = queries + TILE_BYTES, keys = gradients + TILE_BYTES;
  int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  int row = warp_row + lane / 4, token = tile * TILE + row;
  const KvStages kv = {qkv, (const int4 *)blocks, head, offsets[tile], offsets[tile + 1], keys};
  const size_t width = HEADS * HEAD_DIM;
  copy_tile(queries, qkv + (size_t)tile * TILE * QKV + head * HEAD_DIM, QKV);
  copy_tile(gradients, d_attn_out + (size_t)tile * TILE * width + head * HEAD_DIM, width);
  kv.copy(kv.first);
  float delta[2], row_logsumexp[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    size_t from = (size_t)(token + 8 * half) * width + head * HEAD_DIM;
    float sum = 0.f;
    for (int i = lane % 4 * 8; i < HEAD_DIM; i += 32)
      sum += dot_8(*(const uint4 *)(attn_out + from + i), *(const uint4 *)(d_attn_out + from + i));
    size_t at = (size_t)head * tokens + token + 8 * half;
    delta[half] = quad_sum(sum);
    row_logsumexp[half] = logsumexp[at];
    if (lane % 4 == 0) deltas[at] = delta[half];
  }
  HeadRows sum = {};
  for (int index = kv.first; index < kv.last; index++) {
    u32 stage = kv.wait(index);
    Scores weights, d_scores;
    mma_qk(weights, queries, warp_row, stage);
    mma_qk(d_scores, gradients, warp_row, stage + TILE_BYTES);
    weights_of_rows(weights, scale, row_logsumexp);
    mask_pair(weights, kv.blocks[index], bits, row, 0.f);
    d_scores_of_rows(d_scores, weights, delta);
    AFragment a;
    to_a_frag(a, d_scores);
    mma_pv(sum, a, stage);
    __syncthreads();
  }
  // ln 2 cancels the log2(e) in `scale`.
  float factor = scale * LN_2;
  store_rows(d_qkv + (size_t)token * QKV + head * HEAD_DIM, QKV, sum, factor, factor);
}

// The gradients of keys and values. The block for a tile and a head of keys iterates over all query
// heads that share the head, and over the tiles of queries in its list. Scores are transposed: a
// row belongs to a key. Grid: (tiles of keys, KV_HEADS * D_KV_SPLITS).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_d_kv(const bf16 *qkv, const int *offsets, const int *blocks, const u64 *bits, float scale,
                   const float *logsumexp, const float *deltas, const bf16 *d_attn_out, bf16 *d_qkv, int tokens) {
  extern __shared__ uint4 memory[];
  // A stage: queries and their gradients, followed by the logsumexp and delta of each query.
  const u32 stage_bytes = 2 * TILE_BYTES + 2 * TILE * 4;
  u32 keys = (u32)__cvta_generic_to_shared(memory), values = keys + TILE_BYTES, queries = values + TILE_BYTES;
  int tile = blockIdx.x, kv_head = blockIdx.y / D_KV_SPLITS, column = blockIdx.y % D_KV_SPLITS * D_KV_COLUMNS;
  int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, row = warp_row + lane / 4, token = tile * TILE + row;
  const int4 *pairs = (const int4 *)blocks + offsets[tile];
  int num_pairs = offsets[tile + 1] - offsets[tile];
  const size_t width = HEADS * HEAD_DIM;
  auto copy_queries = [&](int index) {
    int head = kv_head * GROUP + index / num_pairs;
    size_t at = (size_t)pairs[index % num_pairs].x * TILE;
    u32 to = queries + index % 2 * stage_bytes;
    copy_tile(to, qkv + at * QKV + head * HEAD_DIM, QKV);
    copy_tile(to + TILE_BYTES, d_attn_out + at * width + head * HEAD_DIM, width);
    const float *from = (threadIdx.x < TILE ? logsumexp : deltas) + (size_t)head * tokens + at + threadIdx.x % TILE;
    cp_async_4(to + 2 * TILE_BYTES + threadIdx.x * 4, from);
    cp_async_commit();
  };
  copy_kv_tile(keys, qkv, tile, kv_head);
  copy_queries(0);
  float d_keys[D_KV_COLUMNS / 2] = {}, d_values[D_KV_COLUMNS / 2] = {};
  for (int index = 0; index < num_pairs * GROUP; index++) {
    if (index + 1 < num_pairs * GROUP) {
      copy_queries(index + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    u32 stage = queries + index % 2 * stage_bytes, numbers = stage + 2 * TILE_BYTES;
    Scores weights, d_scores;
    mma_qk(weights, keys, warp_row, stage);
    mma_qk(d_scores, values, warp_row, stage + TILE_BYTES);
    weights_of_columns(weights, scale, numbers);
    mask_pair(weights, pairs[index % num_pairs], bits, row, 0.f);
    d_scores_of_columns(d_scores, weights, numbers + TILE * 4);
    AFragment a;
    to_a_frag(a, weights);
    mma_pv(d_values, a, stage + TILE_BYTES, column);
    to_a_frag(a, d_scores);
    mma_pv(d_keys, a, stage, column);
    __syncthreads();
  }
  float factor = scale * LN_2;
  bf16 *to = d_qkv + (size_t)token * QKV + (HEADS + kv_head) * HEAD_DIM;
  store_rows(to, QKV, d_keys, factor, factor, column);
  store_rows(to + KV_HEADS * HEAD_DIM, QKV, d_values, 1.f, 1.f, column);
}
