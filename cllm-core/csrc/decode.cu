// The kernels of one decoding step, compiled at run time for one model's shape (NVRTC; no headers).
//
// A step forwards a ragged batch: T tokens of several rows. Token i belongs to cache row `row[i]` (-1: padding), its key and
// value go to slot `slot[i]`, its rotary position is `position[i]`. A tile is some tokens that follow one another in a row.
//
// Given as macros: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EPS, QK_NORM, ATTENTION_WARPS, DEPTH (chunks of a weight that a
// warp asks for at once), MOST_STAGED_BYTES (of tokens, in shared memory).
//
// Matrix products use mma.m16n8k16 with the weights as the left operand. The order of k inside a product is free as long as
// both sides agree, so each thread takes 8 neighbouring values (16 bytes) of a row for two products at once.
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define GROUP (HEADS / KV_HEADS)
#define HALF (HEAD_DIM / 2)
#define WARPS 8
#define CHUNKS (HEAD_DIM / 32)

// Both products of two pairs, each rounded once.
__device__ __forceinline__ u32 times(u32 a, u32 b) {
  u32 pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(0x80008000u));
  return pair;
}
// Weights pass through once a step: they need no place in L1.
__device__ __forceinline__ uint4 load_once(const uint4 *from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// Room for tokens in shared memory: 64 bytes after each row keep threads that read a column of several apart.
#define STAGED_BYTES(T, K) ((T) * ((K) + 32) * 2)
__device__ __forceinline__ void copy_async(uint4 *to, const uint4 *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

__device__ __forceinline__ void prefetch(const bf16 *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Two products over the 32 values of k that `a` (row g), `b` (row g + 8) and `x` (column g) hold.
__device__ __forceinline__ void mma_chunk(float (&c)[4], uint4 a, uint4 b, uint4 x) {
  mma(c, a.x, b.x, a.y, b.y, x.x, x.y);
  mma(c, a.z, b.z, a.w, b.w, x.z, x.w);
}

// Programmatic dependent launch: a kernel may begin while the one before it ends, but reads nothing of it before `wait`.
// GPUs before Hopper run kernels one after another.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A hash of (key of the position, token): 32 bits (the finaliser of SplitMix64, Steele et al. 2014).
__device__ __forceinline__ u32 hash(u64 key, u32 token) {
  u64 z = key + 0x9e3779b97f4a7c15ull * (u64)(token + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (u32)((z ^ (z >> 31)) >> 32);
}

// What is compared to choose a token: the logit, or with a temperature its Gumbel-max perturbation.
__device__ __forceinline__ float score(float logit, float inverse_temperature, u64 key, int token) {
  if (inverse_temperature == 0.f) return logit;
  // 23 bits: with one more, the half would round the largest up to 1.
  float uniform = ((float)(hash(key, (u32)token) >> 9) + 0.5f) * (1.f / 8388608.f);
  return logit * inverse_temperature - logf(-logf(uniform));
}

__device__ __forceinline__ bool better(float value, int id, float than, int than_id) {
  return value > than || (value == than && id < than_id);
}

// The best of what so many neighbouring lanes have found, for each of them.
__device__ __forceinline__ void take_best_of_lanes(int lanes, float &top, int &top_id) {
  for (int step = lanes / 2; step > 0; step >>= 1) {
    float value = __shfl_xor_sync(0xffffffffu, top, step);
    int id = __shfl_xor_sync(0xffffffffu, top_id, step);
    if (better(value, id, top, top_id)) top = value, top_id = id;
  }
}

// The best of what the threads of a block have found.
__device__ __forceinline__ void write_best_of_block(float top, int top_id, int *to) {
  __shared__ float values[32];
  __shared__ int ids[32];
  take_best_of_lanes(32, top, top_id);
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = top, ids[threadIdx.x / 32] = top_id;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < blockDim.x / 32; w++)
      if (better(values[w], ids[w], top, top_id)) top = values[w], top_id = ids[w];
    *to = top_id;
  }
}

// The first of a step: those after it, which may read the step's input before they wait, begin when it is there.
extern "C" __global__ void embed(const bf16 *table, const int *tokens, bf16 *x) {
  wait_for_predecessor();
  let_successor_start();
  const uint4 *from = (const uint4 *)(table + (size_t)tokens[blockIdx.x] * HIDDEN);
  uint4 *to = (uint4 *)(x + (size_t)blockIdx.x * HIDDEN);
  for (int i = threadIdx.x; i < HIDDEN / 8; i += blockDim.x) to[i] = from[i];
}

// Where keys and values of a layer lie: keys [rows, KV_HEADS, capacity, HEAD_DIM], values transposed, [rows, KV_HEADS,
// HEAD_DIM, capacity].
struct Cache {
  bf16 *keys, *values;
  int capacity;
  __device__ __forceinline__ bf16 *key(int row, int head, int slot) const {
    return keys + (((size_t)row * KV_HEADS + head) * capacity + slot) * HEAD_DIM;
  }
  __device__ __forceinline__ bf16 *value(int row, int head, int dim) const {
    return values + (((size_t)row * KV_HEADS + head) * HEAD_DIM + dim) * capacity;
  }
};

// Tables of cosines and sines [positions, HALF], the norms of Qwen3's queries and keys, and each token's position.
struct Rotation {
  const float *cosines, *sines;
  const bf16 *query_norm, *key_norm;
  const int *position;
};

// ---- Few tokens: the weights are read once, everything around them is fused. ----

enum { PLAIN, ROTATED, RESIDUAL, GATED, BEST };

// out[t, o] = sum_k weight[o, k] x[t, k] for T = 8 NT tokens; NORM: of x's RMS norm. One block makes 16 rows of the weight
// (GATED: 8 of the gate and the 8 of the up projection beside them; ROTATED: 8 of the first half of a head and the 8 that are
// rotated with them), its warps share k. More than 8 tokens are copied to shared memory first, if there is room: warps would ask L2 for
// them in halves of lines. Not for the widest products (GATED, BEST), whose many blocks would each copy them.
template <int NT, int MODE, bool NORM, int K, int O>
__device__ __forceinline__ void skinny(const bf16 *weight, const bf16 *x, const bf16 *norm_weight, const bf16 *bias,
                                       bf16 *out, float *best, int *best_id, int real, float inverse_temperature,
                                       const u64 *keys, const Cache cache = {}, const Rotation rotation = {},
                                       const int *row = 0, const int *slot = 0) {
  constexpr int T = NT * 8, ROWS = MODE == GATED ? 8 : 16;
  constexpr bool STAGED = NT > 1 && MODE != GATED && MODE != BEST && STAGED_BYTES(T, K) <= MOST_STAGED_BYTES;
  // With this pitch a warp writes without conflicts.
  __shared__ float partial[WARPS][T][20];
  __shared__ float squares[WARPS][T];
  static_assert(sizeof(partial) + sizeof(squares) <= 24 << 10, "SUMS_BYTES of the host");
  constexpr int COLUMNS = K / 8, PITCH = COLUMNS + 4;  // of a token's row, 16 bytes each
  extern __shared__ uint4 staged[];                    // STAGED: [T][PITCH]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  // ROTATED: the head of this block, and its first row.
  const int head = blockIdx.x / (HALF / 8), part = blockIdx.x % (HALF / 8) * 8;
  const int first = MODE == ROTATED ? head * HEAD_DIM + part : blockIdx.x * ROWS;
  const int upper = min(first + g, O - 1);
  const int lower = MODE == GATED ? O + upper : MODE == ROTATED ? upper + HALF : min(first + g + 8, O - 1);
  const uint4 *row_a = (const uint4 *)(weight + (size_t)upper * K) + t;
  const uint4 *row_b = (const uint4 *)(weight + (size_t)lower * K) + t;
  constexpr int chunks = K / 32;

  uint4 a[DEPTH], b[DEPTH];
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    int c = warp + d * WARPS;
    if (c < chunks) a[d] = load_once(row_a + c * 4), b[d] = load_once(row_b + c * 4);
  }
  let_successor_start();
  // ROTATED: a thread ends one pair of one token, whose place is a part of the step's input.
  const int own = threadIdx.x / 8, dim = part + threadIdx.x % 8;
  int own_row = -1, own_slot = 0;
  float cosine = 1.f, sine = 0.f;
  if (MODE == ROTATED && own < real) {
    static_assert(8 * T <= WARPS * 32, "a thread for every pair");
    own_row = row[own], own_slot = slot[own];
    if (head < HEADS + KV_HEADS) {
      const size_t at = (size_t)rotation.position[own] * HALF + dim;
      cosine = rotation.cosines[at], sine = rotation.sines[at];
    }
  }
  wait_for_predecessor();

  if (STAGED) {
    for (int i = threadIdx.x; i < real * COLUMNS; i += WARPS * 32)
      copy_async(&staged[i / COLUMNS * PITCH + i % COLUMNS], (const uint4 *)x + i);
  }
  // Sums that a thread ends: that of row i % ROWS for token i / ROWS, i = its index, and so on a block's width further.
  constexpr int ENDS = (ROWS * T + WARPS * 32 - 1) / (WARPS * 32);
  bf16 residual[ENDS];
  if (MODE == RESIDUAL) {
#pragma unroll
    for (int j = 0; j < ENDS; j++) {
      const int i = threadIdx.x + j * WARPS * 32, token = i / ROWS, o = first + i % ROWS;
      residual[j] = token < real && o < O ? out[(size_t)token * O + o] : 0;
    }
  }
  if (STAGED) wait_for_copies();

  float acc[NT][4] = {};
  float square[NT] = {};
  for (int base = warp; base < chunks; base += WARPS * DEPTH) {
    uint4 next_a[DEPTH], next_b[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int c = base + (DEPTH + d) * WARPS;
      if (c < chunks) next_a[d] = load_once(row_a + c * 4), next_b[d] = load_once(row_b + c * 4);
    }
    uint4 inputs[DEPTH][NT], scales_of[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int c = base + d * WARPS;
      if (NORM && c < chunks) scales_of[d] = ((const uint4 *)norm_weight)[c * 4 + t];
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        int token = nt * 8 + g;
        inputs[d][nt] = make_uint4(0, 0, 0, 0);
        if (c < chunks && token < real)
          inputs[d][nt] = STAGED ? staged[token * PITCH + c * 4 + t] : ((const uint4 *)(x + (size_t)token * K))[c * 4 + t];
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int c = base + d * WARPS;
      if (c < chunks) {
        uint4 scale = scales_of[d];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          uint4 v = inputs[d][nt];
          if (NORM) {
            u32 *pairs = (u32 *)&v;
            const u32 *scales = (const u32 *)&scale;
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float l = low(pairs[i]), h = high(pairs[i]);
              square[nt] += l * l + h * h;
              pairs[i] = times(pairs[i], scales[i]);
            }
          }
          mma_chunk(acc[nt], a[d], b[d], v);
        }
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) a[d] = next_a[d], b[d] = next_b[d];
  }
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    int token = nt * 8 + 2 * t;
    partial[warp][token][g] = acc[nt][0];
    partial[warp][token + 1][g] = acc[nt][1];
    partial[warp][token][g + 8] = acc[nt][2];
    partial[warp][token + 1][g + 8] = acc[nt][3];
    if (NORM) {
      float s = square[nt];
      s += __shfl_xor_sync(0xffffffffu, s, 1);
      s += __shfl_xor_sync(0xffffffffu, s, 2);
      if (t == 0) squares[warp][nt * 8 + g] = s;
    }
  }
  __syncthreads();
  auto scale_of = [&](int token) {
    if (!NORM) return 1.f;
    float s = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) s += squares[w][token];
    return rsqrtf(s / K + EPS);
  };
  auto sum_of = [&](int r, int token) {
    float s = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) s += partial[w][token][r];
    return s;
  };
  if (MODE == BEST) {
#pragma unroll
    for (int j = 0; j < ENDS; j++) {
      const int i = threadIdx.x + j * WARPS * 32, token = i / ROWS;
      float top = -INFINITY;
      int top_id = 0x7fffffff;
      if (token < real && first + i % ROWS < O) {
        int id = first + i % ROWS;
        float value = score(sum_of(i % ROWS, token) * scale_of(token), inverse_temperature, keys[token], id);
        if (better(value, id, top, top_id)) top = value, top_id = id;  // never what is no number
      }
      take_best_of_lanes(ROWS, top, top_id);
      if (i % ROWS == 0 && token < real) {
        best[(size_t)blockIdx.x * T + token] = top;
        best_id[(size_t)blockIdx.x * T + token] = top_id;
      }
    }
    return;
  }
  if (MODE == ROTATED) {
    if (own_row < 0) return;
    const float scale = scale_of(own);
    float one = sum_of(threadIdx.x % 8, own) * scale, two = sum_of(threadIdx.x % 8 + 8, own) * scale;
    if (bias) one += wide(bias[first + threadIdx.x % 8]), two += wide(bias[first + threadIdx.x % 8 + HALF]);
    if (head >= HEADS + KV_HEADS) {
      cache.value(own_row, head - HEADS - KV_HEADS, dim)[own_slot] = narrow(one);
      cache.value(own_row, head - HEADS - KV_HEADS, dim + HALF)[own_slot] = narrow(two);
      return;
    }
    bf16 *to = head < HEADS ? out + (size_t)own * QKV + head * HEAD_DIM : cache.key(own_row, head - HEADS, own_slot);
    to[dim] = narrow(one * cosine - two * sine);
    to[dim + HALF] = narrow(two * cosine + one * sine);
    return;
  }
#pragma unroll
  for (int j = 0; j < ENDS; j++) {
    const int i = threadIdx.x + j * WARPS * 32, r = i % ROWS, token = i / ROWS, o = first + r;
    if (token >= real || o >= O) continue;
    float value = sum_of(r, token) * scale_of(token);
    if (MODE == GATED) value = silu(value) * sum_of(r + ROWS, token) * scale_of(token);
    if (bias) value += wide(bias[o]);
    if (MODE == RESIDUAL) value += wide(residual[j]);
    out[(size_t)token * O + o] = narrow(value);
  }
}

#define SKINNY(NT)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) qkv_##NT(const bf16 *w, const bf16 *x, const bf16 *norm,           \
                                                             const bf16 *bias, bf16 *out, int real) {                  \
    skinny<NT, PLAIN, true, HIDDEN, QKV>(w, x, norm, bias, out, 0, 0, real, 0.f, 0);                                \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      qkv_rotated_##NT(const bf16 *w, const bf16 *x, const bf16 *norm, const bf16 *bias, bf16 *out, int real,          \
                       const int *row, const int *slot, const int *position, const float *cosines,                     \
                       const float *sines, bf16 *keys, bf16 *values, int capacity) {                                   \
    skinny<NT, ROTATED, true, HIDDEN, QKV>(w, x, norm, bias, out, 0, 0, real, 0.f, 0, {keys, values, capacity},        \
                              {cosines, sines, 0, 0, position}, row, slot);                                            \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) output_##NT(const bf16 *w, const bf16 *x, const bf16 *bias,        \
                                                                bf16 *out, int real) {                                 \
    skinny<NT, RESIDUAL, false, HEADS * HEAD_DIM, HIDDEN>(w, x, 0, bias, out, 0, 0, real, 0.f, 0);                  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) gate_up_##NT(const bf16 *w, const bf16 *x, const bf16 *norm,       \
                                                                 bf16 *out, int real) {                                \
    skinny<NT, GATED, true, HIDDEN, FFN>(w, x, norm, 0, out, 0, 0, real, 0.f, 0);                                   \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) down_##NT(const bf16 *w, const bf16 *x, bf16 *out, int real) {     \
    skinny<NT, RESIDUAL, false, FFN, HIDDEN>(w, x, 0, 0, out, 0, 0, real, 0.f, 0);                                  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) head_##NT(const bf16 *w, const bf16 *x, const bf16 *norm,          \
                                                              float *best, int *best_id, int real,                     \
                                                              float inverse_temperature, const u64 *keys) {            \
    skinny<NT, BEST, true, HIDDEN, VOCAB>(w, x, norm, 0, 0, best, best_id, real, inverse_temperature, keys);        \
  }
SKINNY(1)
SKINNY(2)
SKINNY(4)

// The best of all blocks of `head`: one block a token.
extern "C" __global__ void best_of_blocks(const float *best, const int *best_id, int blocks, int stride, int *predicted) {
  let_successor_start();
  wait_for_predecessor();
  float top = -INFINITY;
  int top_id = 0x7fffffff;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
    float value = best[(size_t)i * stride + blockIdx.x];
    int id = best_id[(size_t)i * stride + blockIdx.x];
    if (better(value, id, top, top_id)) top = value, top_id = id;
  }
  write_best_of_block(top, top_id, &predicted[blockIdx.x]);
}

// ---- Many tokens: cuBLAS multiplies, these do the rest. ----

// x += delta (where there is one); normed = RMS norm of x. One block a token.
extern "C" __global__ void add_norm(bf16 *x, const bf16 *delta, const bf16 *weight, bf16 *normed) {
  __shared__ float sums[32];
  let_successor_start();
  wait_for_predecessor();
  uint4 *row = (uint4 *)(x + (size_t)blockIdx.x * HIDDEN);
  const uint4 *added = (const uint4 *)(delta + (size_t)blockIdx.x * HIDDEN);
  float square = 0.f;
  for (int i = threadIdx.x; i < HIDDEN / 8; i += blockDim.x) {
    uint4 v = row[i];
    u32 *pairs = (u32 *)&v;
    if (delta) {
      uint4 d = added[i];
      const u32 *others = (const u32 *)&d;
      for (int j = 0; j < 4; j++) pairs[j] = pack(low(pairs[j]) + low(others[j]), high(pairs[j]) + high(others[j]));
      row[i] = v;
    }
    for (int j = 0; j < 4; j++) square += low(pairs[j]) * low(pairs[j]) + high(pairs[j]) * high(pairs[j]);
  }
  square = warp_sum(square);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = square;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < blockDim.x / 32; w++) total += sums[w];
  float scale = rsqrtf(total / HIDDEN + EPS);
  uint4 *to = (uint4 *)(normed + (size_t)blockIdx.x * HIDDEN);
  for (int i = threadIdx.x; i < HIDDEN / 8; i += blockDim.x) {
    uint4 v = row[i], w = ((const uint4 *)weight)[i];
    u32 *pairs = (u32 *)&v;
    const u32 *scales = (const u32 *)&w;
    for (int j = 0; j < 4; j++)
      pairs[j] = pack(low(pairs[j]) * scale * low(scales[j]), high(pairs[j]) * scale * high(scales[j]));
    to[i] = v;
  }
}

// gate and up [T, 2 FFN] -> silu(gate) * up [T, FFN].
extern "C" __global__ void gated(const bf16 *both, bf16 *out, int tokens) {
  let_successor_start();
  wait_for_predecessor();
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)tokens * (FFN / 8)) return;
  size_t token = i / (FFN / 8), column = i % (FFN / 8);
  uint4 g = ((const uint4 *)(both + token * 2 * FFN))[column], u = ((const uint4 *)(both + token * 2 * FFN + FFN))[column];
  u32 *gates = (u32 *)&g;
  const u32 *ups = (const u32 *)&u;
  for (int j = 0; j < 4; j++)
    gates[j] = pack(silu(low(gates[j])) * low(ups[j]), silu(high(gates[j])) * high(ups[j]));
  ((uint4 *)(out + token * FFN))[column] = g;
}

// The best token of each row of logits [tokens, VOCAB]: one block a token.
extern "C" __global__ void best_token(const float *logits, float inverse_temperature, const u64 *keys, int *predicted) {
  let_successor_start();
  wait_for_predecessor();
  const float *row = logits + (size_t)blockIdx.x * VOCAB;
  u64 key = keys[blockIdx.x];
  float top = -INFINITY;
  int top_id = 0x7fffffff;
  for (int i = threadIdx.x; i < VOCAB; i += blockDim.x) {
    float value = score(row[i], inverse_temperature, key, i);
    if (better(value, i, top, top_id)) top = value, top_id = i;
  }
  write_best_of_block(top, top_id, &predicted[blockIdx.x]);
}

// ---- Attention ----

// Rotates a head `from` to `to`, after its RMS norm by `norm` where the model has one (Qwen3). A warp does it together.
__device__ __forceinline__ void rotate(const bf16 *from, bf16 *to, const bf16 *norm, const float *cosine, const float *sine) {
  const int lane = threadIdx.x & 31;
  float scale = 1.f;
  if (QK_NORM) {
    float square = 0.f;
    for (int i = lane; i < HEAD_DIM; i += 32) square += wide(from[i]) * wide(from[i]);
    scale = rsqrtf(warp_sum(square) / HEAD_DIM + EPS);
  }
  for (int i = lane; i < HALF; i += 32) {
    float first = wide(from[i]), second = wide(from[i + HALF]);
    if (QK_NORM) {
      first = wide(narrow(first * scale * wide(norm[i])));
      second = wide(narrow(second * scale * wide(norm[i + HALF])));
    }
    to[i] = narrow(first * cosine[i] - second * sine[i]);
    to[i + HALF] = narrow(second * cosine[i] + first * sine[i]);
  }
}

__device__ __forceinline__ void store_value(const bf16 *from, const Cache &cache, int row, int head, int slot) {
  for (int i = threadIdx.x & 31; i < HEAD_DIM; i += 32) cache.value(row, head, i)[slot] = from[i];
}

// Rotates queries in place, and puts keys and values into the cache. One block a token.
extern "C" __global__ void rotate_and_cache(bf16 *qkv, const int *row, const int *slot, const int *position,
                                            const float *cosines, const float *sines, const bf16 *query_norm,
                                            const bf16 *key_norm, bf16 *keys, bf16 *values, int capacity) {
  let_successor_start();
  wait_for_predecessor();
  const int token = blockIdx.x;
  if (row[token] < 0) return;
  const Cache cache = {keys, values, capacity};
  const float *cosine = cosines + (size_t)position[token] * HALF, *sine = sines + (size_t)position[token] * HALF;
  for (int head = threadIdx.x >> 5; head < HEADS + 2 * KV_HEADS; head += blockDim.x >> 5) {
    bf16 *x = qkv + (size_t)token * QKV + head * HEAD_DIM;
    if (head < HEADS)
      rotate(x, x, query_norm, cosine, sine);
    else if (head < HEADS + KV_HEADS)
      rotate(x, cache.key(row[token], head - HEADS, slot[token]), key_norm, cosine, sine);
    else
      store_value(x, cache, row[token], head - HEADS - KV_HEADS, slot[token]);
  }
}

// out[token, head] = softmax(q k^T / sqrt(HEAD_DIM)) v over the slots that a token sees: all before its row's window (which
// starts at `window`), and of the window those at or before its own slot whose bit is set in `visible` (bits from the window's
// start on; what lies 64 or more after it is always visible). Blocks: (tile, key head). Warps share the 16-row pieces of the tile's
// GROUP * length query vectors, and the keys of each piece in chunks of 32.
//
// ROTATE: for few tokens, does the work of `rotate_and_cache` too, and saves that kernel. A tile's block puts all that its window
// holds up to the tile's end into the cache, so blocks of one window write the same.
template <bool ROTATE>
__device__ __forceinline__ void attend(const bf16 *qkv, const Cache cache, const int *tile_row, const int *tile_token,
                                       const int *tile_length, const int *tile_window, const int *slot,
                                       const u64 *visible, bf16 *out, const Rotation rotation) {
  extern __shared__ float merged[];  // [WARPS][16][HEAD_DIM + 2], then with ROTATE the queries [16 x pieces][HEAD_DIM + 8]
  bf16 *queries = (bf16 *)(merged + ATTENTION_WARPS * 16 * (HEAD_DIM + 2));
  constexpr int PITCH = HEAD_DIM + 8;
  let_successor_start();
  // Places are the step's input: they do not wait for the predecessor. Nor do keys and values on their way to L2.
  const int tile = blockIdx.x, key_head = blockIdx.y, cache_row = tile_row[tile];
  if (cache_row < 0) return;
  const int first = tile_token[tile], length = tile_length[tile], window = tile_window[tile];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int count = length * GROUP, pieces = (count + 15) / 16;
  const int last_slot = slot[first + length - 1];
  // Warps that share a piece, and no more of them than there are chunks of keys. The host keeps pieces <= warps.
  const int sharers = min(ATTENTION_WARPS / pieces, last_slot / 32 + 1);
  const int piece = warp / sharers, share = warp % sharers;
  const bf16 *k = cache.key(cache_row, key_head, 0), *v = cache.value(cache_row, key_head, 0);
  if (piece < pieces)
    for (int chunk = share; chunk * 32 <= last_slot; chunk += sharers) {
      for (int part = 0; part < HEAD_DIM; part += 64) prefetch(k + (size_t)(chunk * 32 + lane) * HEAD_DIM + part);
      for (int d = lane; d < HEAD_DIM; d += 32) prefetch(v + (size_t)d * cache.capacity + chunk * 32);
    }
  wait_for_predecessor();

  if (ROTATE) {
    const int fresh = last_slot - window + 1, window_token = first + length - fresh;
    for (int item = warp; item < 2 * fresh + count; item += ATTENTION_WARPS) {
      const int m = item - 2 * fresh;
      const int token = m >= 0 ? first + m / GROUP : window_token + item / 2;
      const bf16 *from = qkv + (size_t)token * QKV;
      const float *cosine = rotation.cosines + (size_t)rotation.position[token] * HALF;
      const float *sine = rotation.sines + (size_t)rotation.position[token] * HALF;
      if (m >= 0)
        rotate(from + (key_head * GROUP + m % GROUP) * HEAD_DIM, queries + m * PITCH, rotation.query_norm, cosine, sine);
      else if (item % 2 == 0)
        rotate(from + (HEADS + key_head) * HEAD_DIM, cache.key(cache_row, key_head, slot[token]), rotation.key_norm, cosine, sine);
      else
        store_value(from + (HEADS + KV_HEADS + key_head) * HEAD_DIM, cache, cache_row, key_head, slot[token]);
    }
    __syncthreads();
  }

  float o[HEAD_DIM / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  uint4 q[2][CHUNKS];
  int own_slot[2];
  u64 own_visible[2];
  if (piece < pieces) {
    for (int r = 0; r < 2; r++) {
      int m = piece * 16 + g + 8 * r;
      bool there = m < count;
      int token = first + (there ? m / GROUP : 0), head = key_head * GROUP + (there ? m % GROUP : 0);
      own_slot[r] = there ? slot[token] : -1;
      own_visible[r] = visible[token];
      const bf16 *vector = ROTATE ? queries + (there ? m : 0) * PITCH : qkv + (size_t)token * QKV + head * HEAD_DIM;
      for (int c = 0; c < CHUNKS; c++) q[r][c] = ((const uint4 *)vector)[c * 4 + t];
    }
    const float scale = rsqrtf((float)HEAD_DIM) * 1.44269504f;  // exponents of two
    for (int chunk = share; chunk * 32 <= last_slot; chunk += sharers) {
      float s[4][4] = {};
      // The key at column n of product j is chosen so that a thread's scores are of 8 neighbouring keys.
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int key = chunk * 32 + 8 * (g >> 1) + 2 * j + (g & 1);
        const uint4 *from = (const uint4 *)(k + (size_t)key * HEAD_DIM) + t;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) mma_chunk(s[j], q[0][c], q[1][c], from[c * 4]);
      }
#if HEAD_DIM > 64
      // Eight warps have the registers to ask for the values before the scores are there.
      uint4 ahead[HEAD_DIM / 8];
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; d++)
        ahead[d] = *((const uint4 *)(v + (size_t)(d * 8 + g) * cache.capacity + chunk * 32) + t);
#endif
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float best = -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            int key = chunk * 32 + 8 * t + 2 * j + i, after = key - window;
            bool seen = key <= own_slot[r] && (after < 0 || after >= 64 || ((own_visible[r] >> after) & 1));
            float &value = s[j][2 * r + i];
            value = seen ? value * scale : -INFINITY;
            best = fmaxf(best, value);
          }
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        float higher = fmaxf(top[r], best);
        float base = higher == -INFINITY ? 0.f : higher;
        float shrink = exp2f(top[r] - base);
        top[r] = higher;
        sum[r] *= shrink;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) o[d][2 * r] *= shrink, o[d][2 * r + 1] *= shrink;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float &value = s[j][2 * r + i];
            value = exp2f(value - base);
            sum[r] += value;
          }
      }
      u32 p[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++) p[j][0] = pack(s[j][0], s[j][1]), p[j][1] = pack(s[j][2], s[j][3]);
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; d++) {
#if HEAD_DIM > 64
        uint4 x = ahead[d];
#else
        uint4 x = *((const uint4 *)(v + (size_t)(d * 8 + g) * cache.capacity + chunk * 32) + t);
#endif
        mma(o[d], p[0][0], p[0][1], p[1][0], p[1][1], x.x, x.y);
        mma(o[d], p[2][0], p[2][1], p[3][0], p[3][1], x.z, x.w);
      }
    }
    for (int r = 0; r < 2; r++) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    }
    float *mine = merged + (size_t)warp * 16 * (HEAD_DIM + 2);
    for (int r = 0; r < 2; r++) {
      float *line = mine + (g + 8 * r) * (HEAD_DIM + 2);
      for (int d = 0; d < HEAD_DIM / 8; d++) line[d * 8 + 2 * t] = o[d][2 * r], line[d * 8 + 2 * t + 1] = o[d][2 * r + 1];
      if (t == 0) line[HEAD_DIM] = top[r], line[HEAD_DIM + 1] = sum[r];
    }
  }
  __syncthreads();
  // One warp joins the shares of a query vector.
  for (int m = warp; m < count; m += ATTENTION_WARPS) {
    const float *lines = merged + ((size_t)(m / 16) * sharers * 16 + m % 16) * (HEAD_DIM + 2);
    float highest = -INFINITY;
    for (int i = 0; i < sharers; i++) highest = fmaxf(highest, lines[(size_t)i * 16 * (HEAD_DIM + 2) + HEAD_DIM]);
    float total = 0.f, parts[HEAD_DIM / 32] = {};
    for (int i = 0; i < sharers; i++) {
      const float *line = lines + (size_t)i * 16 * (HEAD_DIM + 2);
      float factor = exp2f(line[HEAD_DIM] - highest);
      total += factor * line[HEAD_DIM + 1];
      for (int d = 0; d < HEAD_DIM / 32; d++) parts[d] += factor * line[d * 32 + lane];
    }
    bf16 *to = out + ((size_t)(first + m / GROUP) * HEADS + key_head * GROUP + m % GROUP) * HEAD_DIM;
    for (int d = 0; d < HEAD_DIM / 32; d++) to[d * 32 + lane] = narrow(parts[d] / total);
  }
}

#define ATTENTION(NAME, ROTATE)                                                                                        \
  extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32)                                                   \
      NAME(const bf16 *qkv, bf16 *keys, bf16 *values, const int *tile_row, const int *tile_token,                      \
           const int *tile_length, const int *tile_window, const int *slot, const u64 *visible, bf16 *out,             \
           int capacity, const float *cosines, const float *sines, const bf16 *query_norm, const bf16 *key_norm,       \
           const int *position) {                                                                                      \
    attend<ROTATE>(qkv, {keys, values, capacity}, tile_row, tile_token, tile_length, tile_window, slot, visible, out,  \
                   {cosines, sines, query_norm, key_norm, position});                                                  \
  }
ATTENTION(attention, false)
ATTENTION(rotate_and_attend, true)
