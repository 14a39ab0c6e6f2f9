// Attention over a packed stream, forward and backward, after FlashAttention-2 (Dao, arXiv 2307.08691): each token sees up to
// three ranges of tokens, and tiles of queries meet only those tiles of keys of which they see something. No sum depends on the
// order in which blocks run.
//
// Given as macros: HEADS, KV_HEADS, HEAD_DIM (64 or 128). T tokens, a multiple of TILE. qkv [T, QKV] holds queries, keys and
// values; mixed [T, HEADS * HEAD_DIM]; log_sums and deltas float32 [HEADS, T], to base 2; ranges int32 [T, 3, 2]: first place and
// number of places. A block has four warps; each takes 16 rows of its tile.
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define GROUP (HEADS / KV_HEADS)
#define TILE 64
#define THREADS 128
#define ROW_CHUNKS (HEAD_DIM / 8)
#define TILE_BYTES (TILE * HEAD_DIM * 2)

struct Ranges {
  int first[3];
  u32 count[3];
  __device__ __forceinline__ void read(const int *from) {
    for (int i = 0; i < 3; i++) first[i] = from[2 * i], count[i] = from[2 * i + 1];
  }
  __device__ __forceinline__ bool sees(int key) const {
    return (u32)(key - first[0]) < count[0] || (u32)(key - first[1]) < count[1] || (u32)(key - first[2]) < count[2];
  }
};

// Address in shared memory of 8 values of a row of a tile; neighbouring rows lie in other banks.
__device__ __forceinline__ u32 place(u32 tile, int row, int chunk) {
  return tile + (row * ROW_CHUNKS + (chunk ^ (row & 7))) * 16;
}

__device__ __forceinline__ void copy_16(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void copy_4(u32 to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void copies_begin() { asm volatile("cp.async.commit_group;"); }

// Until all copies have arrived but the last `pending` groups.
template <int pending>
__device__ __forceinline__ void copies_end() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  __syncthreads();
}

// Rows of HEAD_DIM values that lie `stride` apart.
__device__ __forceinline__ void copy_tile(u32 to, const bf16 *from, size_t stride) {
  for (int i = threadIdx.x; i < TILE * ROW_CHUNKS; i += THREADS) {
    int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
    copy_16(place(to, row, chunk), from + row * stride + chunk * 8);
  }
}

__device__ __forceinline__ void matrices(u32 (&x)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void matrices_transposed(u32 (&x)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

typedef float Scores[TILE / 8][4];
typedef float Rows[HEAD_DIM / 8][4];
typedef u32 Left[TILE / 16][4];

// scores = 16 rows of tile `a` from `row` on, times all rows of tile `b`.
__device__ __forceinline__ void dot(Scores &scores, u32 a, int row, u32 b) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
#pragma unroll
  for (int chunk = 0; chunk < ROW_CHUNKS; chunk += 2) {
    u32 left[4];
    matrices(left, place(a, row + lane % 16, chunk + lane / 16));
#pragma unroll
    for (int n = 0; n < TILE / 16; n++) {
      u32 right[4];
      matrices(right, place(b, n * 16 + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
      mma(scores[2 * n], left[0], left[1], left[2], left[3], right[0], right[1]);
      mma(scores[2 * n + 1], left[0], left[1], left[2], left[3], right[2], right[3]);
    }
  }
}

// What a product left becomes the left side of the next.
__device__ __forceinline__ void as_left(Left &left, const Scores &scores) {
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
    left[k][0] = pack(scores[2 * k][0], scores[2 * k][1]);
    left[k][1] = pack(scores[2 * k][2], scores[2 * k][3]);
    left[k][2] = pack(scores[2 * k + 1][0], scores[2 * k + 1][1]);
    left[k][3] = pack(scores[2 * k + 1][2], scores[2 * k + 1][3]);
  }
}

// sum += left [16, TILE] times the rows of tile `b`.
__device__ __forceinline__ void add_mixed(Rows &sum, const Left &left, u32 b) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; n++) {
      u32 right[4];
      matrices_transposed(right, place(b, k * 16 + lane % 16, n * 2 + lane / 16));
      mma(sum[2 * n], left[k][0], left[k][1], left[k][2], left[k][3], right[0], right[1]);
      mma(sum[2 * n + 1], left[k][0], left[k][1], left[k][2], left[k][3], right[2], right[3]);
    }
  }
}

// Rows `row` and `row + 8` of this thread's quarter, each times a factor.
__device__ __forceinline__ void write_rows(bf16 *to, size_t stride, const Rows &rows, float upper, float lower) {
  int quarter = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 8; n++) {
    *(u32 *)(to + n * 8 + quarter * 2) = pack(rows[n][0] * upper, rows[n][1] * upper);
    *(u32 *)(to + 8 * stride + n * 8 + quarter * 2) = pack(rows[n][2] * lower, rows[n][3] * lower);
  }
}

__device__ __forceinline__ float exp_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// Over the four threads that hold a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ const bf16 *keys_of(const bf16 *qkv, int tile, int head) {
  return qkv + (size_t)tile * TILE * QKV + (HEADS + head) * HEAD_DIM;
}

// `starts` and `with`: for each query tile its key tiles, twice their number, plus 1 where every query sees every key. `scale`:
// of the scores, times the logarithm of e to base 2.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention(const bf16 *qkv, const int *ranges, const int *starts, const int *with, float scale, bf16 *mixed, float *log_sums,
              int tokens) {
  extern __shared__ uint4 memory[];
  u32 queries = (u32)__cvta_generic_to_shared(memory), keys = queries + TILE_BYTES;
  int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  int token = tile * TILE + row + lane / 4;
  int first = starts[tile], last = starts[tile + 1];
  auto copy_keys = [&](int index) {
    const bf16 *from = keys_of(qkv, with[index] / 2, head / GROUP);
    u32 to = keys + (index - first) % 2 * 2 * TILE_BYTES;
    copy_tile(to, from, QKV);
    copy_tile(to + TILE_BYTES, from + KV_HEADS * HEAD_DIM, QKV);
    copies_begin();
  };
  copy_tile(queries, qkv + (size_t)tile * TILE * QKV + head * HEAD_DIM, QKV);
  copy_keys(first);
  Ranges upper, lower;
  upper.read(ranges + (size_t)token * 6);
  lower.read(ranges + (size_t)(token + 8) * 6);
  Rows sum = {};
  float top[2] = {-INFINITY, -INFINITY}, weight[2] = {0.f, 0.f};
  for (int index = first; index < last; index++) {
    if (index + 1 < last) {
      copy_keys(index + 1);
      copies_end<1>();
    } else {
      copies_end<0>();
    }
    u32 now = keys + (index - first) % 2 * 2 * TILE_BYTES;
    int key = with[index] / 2 * TILE + lane % 4 * 2;
    Scores scores;
    dot(scores, queries, row, now);
    if (with[index] % 2 == 0) {
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (!(i < 2 ? upper : lower).sees(key + n * 8 + i % 2)) scores[n][i] = -INFINITY;
    }
    float shrink[2], shift[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = top[half];
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      most = row_max(most);
      // A row may see nothing of this tile, nor of those before.
      shift[half] = most == -INFINITY ? 0.f : most * scale;
      shrink[half] = exp_2(top[half] * scale - shift[half]);
      top[half] = most;
      weight[half] *= shrink[half];
    }
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[n][i] = exp_2(scores[n][i] * scale - shift[i / 2]);
        weight[i / 2] += scores[n][i];
      }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[n][i] *= shrink[i / 2];
    Left left;
    as_left(left, scores);
    add_mixed(sum, left, now + TILE_BYTES);
    __syncthreads();
  }
  weight[0] = row_sum(weight[0]), weight[1] = row_sum(weight[1]);
  bf16 *to = mixed + (size_t)token * HEADS * HEAD_DIM + head * HEAD_DIM;
  write_rows(to, HEADS * HEAD_DIM, sum, 1.f / weight[0], 1.f / weight[1]);
  if (lane % 4 == 0) {
    log_sums[(size_t)head * tokens + token] = top[0] * scale + log2f(weight[0]);
    log_sums[(size_t)head * tokens + token + 8] = top[1] * scale + log2f(weight[1]);
  }
}

// The gradient of the queries, and what the other kernel needs of each: the sum over mixed * d_mixed.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_d_queries(const bf16 *qkv, const int *ranges, const int *starts, const int *with, float scale, const bf16 *mixed,
                        const float *log_sums, const bf16 *d_mixed, bf16 *d_qkv, float *deltas, int tokens) {
  extern __shared__ uint4 memory[];
  u32 queries = (u32)__cvta_generic_to_shared(memory), gradients = queries + TILE_BYTES, keys = gradients + TILE_BYTES;
  int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  int token = tile * TILE + row + lane / 4;
  int first = starts[tile], last = starts[tile + 1];
  auto copy_keys = [&](int index) {
    const bf16 *from = keys_of(qkv, with[index] / 2, head / GROUP);
    u32 to = keys + (index - first) % 2 * 2 * TILE_BYTES;
    copy_tile(to, from, QKV);
    copy_tile(to + TILE_BYTES, from + KV_HEADS * HEAD_DIM, QKV);
    copies_begin();
  };
  const size_t width = HEADS * HEAD_DIM;
  copy_tile(queries, qkv + (size_t)tile * TILE * QKV + head * HEAD_DIM, QKV);
  copy_tile(gradients, d_mixed + (size_t)tile * TILE * width + head * HEAD_DIM, width);
  copy_keys(first);
  Ranges upper, lower;
  upper.read(ranges + (size_t)token * 6);
  lower.read(ranges + (size_t)(token + 8) * 6);
  float delta[2], log_sum[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    size_t from = (size_t)(token + 8 * half) * width + head * HEAD_DIM + lane % 4 * (HEAD_DIM / 4);
    float sum = 0.f;
    for (int i = 0; i < HEAD_DIM / 4; i += 8) {
      uint4 a = *(const uint4 *)(mixed + from + i), b = *(const uint4 *)(d_mixed + from + i);
      sum += low(a.x) * low(b.x) + high(a.x) * high(b.x) + low(a.y) * low(b.y) + high(a.y) * high(b.y);
      sum += low(a.z) * low(b.z) + high(a.z) * high(b.z) + low(a.w) * low(b.w) + high(a.w) * high(b.w);
    }
    size_t at = (size_t)head * tokens + token + 8 * half;
    delta[half] = row_sum(sum);
    log_sum[half] = log_sums[at];
    if (lane % 4 == 0) deltas[at] = delta[half];
  }
  Rows sum = {};
  for (int index = first; index < last; index++) {
    if (index + 1 < last) {
      copy_keys(index + 1);
      copies_end<1>();
    } else {
      copies_end<0>();
    }
    u32 now = keys + (index - first) % 2 * 2 * TILE_BYTES;
    int key = with[index] / 2 * TILE + lane % 4 * 2;
    bool full = with[index] % 2;
    Scores scores, d_weights;
    dot(scores, queries, row, now);
    dot(d_weights, gradients, row, now + TILE_BYTES);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        bool seen = full || (i < 2 ? upper : lower).sees(key + n * 8 + i % 2);
        float weight = seen ? exp_2(scores[n][i] * scale - log_sum[i / 2]) : 0.f;
        scores[n][i] = weight * (d_weights[n][i] - delta[i / 2]);
      }
    Left left;
    as_left(left, scores);
    add_mixed(sum, left, now);
    __syncthreads();
  }
  // The logarithm of 2 takes back what `scale` holds for exp2.
  float factor = scale * 0.6931471805599453f;
  write_rows(d_qkv + (size_t)token * QKV + head * HEAD_DIM, QKV, sum, factor, factor);
}

// The gradients of keys and values: a key tile and a head of keys a block, over all query heads that share it and the query tiles
// of its list. Scores lie transposed: a row is a key.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_d_keys(const bf16 *qkv, const int *ranges, const int *starts, const int *with, float scale, const float *log_sums,
                     const float *deltas, const bf16 *d_mixed, bf16 *d_qkv, int tokens) {
  extern __shared__ uint4 memory[];
  const int numbers = TILE * 8 * 4;
  const u32 stage = 2 * TILE_BYTES + numbers;
  u32 keys = (u32)__cvta_generic_to_shared(memory), values = keys + TILE_BYTES, queries = values + TILE_BYTES;
  int tile = blockIdx.x, kv_head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  int token = tile * TILE + row + lane / 4;
  int first = starts[tile], met = starts[tile + 1] - first;
  const size_t width = HEADS * HEAD_DIM;
  // Queries, their gradients, their ranges, log-sums and deltas.
  auto copy_queries = [&](int index) {
    int head = kv_head * GROUP + index / met;
    size_t at = (size_t)(with[first + index % met] / 2) * TILE;
    u32 to = queries + index % 2 * stage;
    copy_tile(to, qkv + at * QKV + head * HEAD_DIM, QKV);
    copy_tile(to + TILE_BYTES, d_mixed + at * width + head * HEAD_DIM, width);
    to += 2 * TILE_BYTES;
    if (threadIdx.x < TILE * 6 / 4) copy_16(to + threadIdx.x * 16, ranges + at * 6 + threadIdx.x * 4);
    const float *sums = (threadIdx.x < TILE ? log_sums : deltas) + (size_t)head * tokens + at + threadIdx.x % TILE;
    copy_4(to + TILE * 24 + threadIdx.x * 4, sums);
    copies_begin();
  };
  const bf16 *from = keys_of(qkv, tile, kv_head);
  copy_tile(keys, from, QKV);
  copy_tile(values, from + KV_HEADS * HEAD_DIM, QKV);
  copy_queries(0);
  Rows d_keys = {}, d_values = {};
  for (int index = 0; index < met * GROUP; index++) {
    if (index + 1 < met * GROUP) {
      copy_queries(index + 1);
      copies_end<1>();
    } else {
      copies_end<0>();
    }
    u32 now = queries + index % 2 * stage;
    const char *base = (const char *)memory + 2 * TILE_BYTES + index % 2 * stage + 2 * TILE_BYTES;
    const int *range = (const int *)base;
    const float *log_sum = (const float *)(base + TILE * 24), *delta = log_sum + TILE;
    bool full = with[first + index % met] % 2;
    Scores weights, scores;
    dot(weights, keys, row, now);
    dot(scores, values, row, now + TILE_BYTES);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        int query = n * 8 + lane % 4 * 2 + column;
        Ranges seen;
        if (!full) seen.read(range + query * 6);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int i = half * 2 + column;
          bool sees = full || seen.sees(token + 8 * half);
          weights[n][i] = sees ? exp_2(weights[n][i] * scale - log_sum[query]) : 0.f;
          scores[n][i] = weights[n][i] * (scores[n][i] - delta[query]);
        }
      }
    Left left;
    as_left(left, weights);
    add_mixed(d_values, left, now + TILE_BYTES);
    as_left(left, scores);
    add_mixed(d_keys, left, now);
    __syncthreads();
  }
  float factor = scale * 0.6931471805599453f;
  bf16 *to = d_qkv + (size_t)token * QKV + (HEADS + kv_head) * HEAD_DIM;
  write_rows(to, QKV, d_keys, factor, factor);
  write_rows(to + KV_HEADS * HEAD_DIM, QKV, d_values, 1.f, 1.f);
}
