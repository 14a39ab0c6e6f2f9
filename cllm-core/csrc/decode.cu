// The kernels of one decoding step, compiled at run time for one model's shape (NVRTC; no headers).
//
// A step forwards a ragged batch: T tokens of several cache rows, with nothing between the rows. A
// step of few tokens goes through the fused kernels, which read each weight once and do in the same
// pass everything around the product; for more tokens cuBLAS multiplies and smaller kernels do the
// rest.
//
// Macros from the host: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EPS, QK_NORM, WARPS (of a
// fused kernel's block), BLOCK_ROWS (rows of a weight per block), DEPTH (chunks of a weight that a
// warp loads ahead), SUMS_BYTES and MAX_STAGED_BYTES (shared memory of a fused kernel for sums and
// for tokens, at most), STAGING_PAD, SEGMENT (logits that a block of sample_segments reads),
// SAMPLE_THREADS (of such a block), ATTENTION_WARPS, WARP_QUERIES (query vectors of a warp of the
// attention), SLOTS_PER_READ (slots of the cache that it reads at a time), QUERY_PAD.
//
// Products use mma.m16n8k16 with the weight as the left operand. The order of k within a product
// does not matter as long as both operands agree, so each thread loads 8 neighbouring values (16
// bytes) of a row and uses them in two products. In a fragment g = lane / 4 is a row of the weight
// (and g + 8 the other), t = lane % 4 a pair of columns.
#define CHUNKS (HEAD_DIM / 32)

// The products of two pairs of bf16, each rounded once.
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
  u32 pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(0x80008000u));
  return pair;
}

// Weights are read once per step, so they bypass L1.
__device__ __forceinline__ uint4 load_once(const uint4 *from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// Shared memory for T tokens of width K. Padding after each row keeps threads that read the same
// column of several rows in different banks.
#define STAGED_BYTES(T, K) ((T) * ((K) + STAGING_PAD) * 2)
__device__ __forceinline__ void cp_async_16(uint4 *to, const uint4 *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

__device__ __forceinline__ void prefetch_l2(const bf16 *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// c += products over 32 values of k: `a` holds row g of the weight, `b` row g + 8, `x` token g.
__device__ __forceinline__ void mma_chunk(float (&c)[4], uint4 a, uint4 b, uint4 x) {
  mma(c, a.x, b.x, a.y, b.y, x.x, x.y);
  mma(c, a.z, b.z, a.w, b.w, x.z, x.w);
}

// Tiles of queries: `length` consecutive tokens of one row from token `first_token` on (row -1: an
// empty tile). All tokens of the row in this step are its window, whose first slot is `window`.
struct Tiles {
  const int *row, *first_token, *length, *window;
};

// Weights of the norms of queries and keys (Qwen3), else null.
struct QkNorm {
  const bf16 *query, *key;
};

// The arguments of ARGMAX and CANDIDATES, with the sampling noise of each token in `keys`. Both write
// the best score of each token and block [T, blocks]. ARGMAX also writes its id, and CANDIDATES the
// sum of exp(score - best) and all scores [T, blocks, BLOCK_ROWS].
struct SampleBlocks {
  float inverse_temperature;
  const u64 *keys;
  float *best;
  int *best_id;
  float *sums, *scores;
};

// The first kernel of a step copies the embeddings. Its successors may read the step's input before
// wait_for_predecessor(), so it lets them start only when that input has arrived.
extern "C" __global__ void embed(const bf16 *table, const int *tokens, bf16 *x) {
  wait_for_predecessor();
  let_successor_start();
  const uint4 *from = (const uint4 *)(table + (size_t)tokens[blockIdx.x] * HIDDEN);
  uint4 *to = (uint4 *)(x + (size_t)blockIdx.x * HIDDEN);
  for (int i = threadIdx.x; i < HIDDEN / 8; i += blockDim.x) to[i] = from[i];
}

// ---- Fused kernels, for few tokens ----

// How a fused kernel processes its product.
enum Epilogue {
  STORE,
  ROTATE_AND_CACHE,  // rotate queries and keys; keys and values go to the cache
  ADD_RESIDUAL,
  SWIGLU,
  ARGMAX,      // the best token among the block's rows, which are logits
  CANDIDATES,  // all scores there, the best, and the sum of the softmax
};

// The arguments of ROTATE_AND_CACHE.
struct RotateAndCache {
  Tokens tokens;
  Rope rope;
  Cache cache;
};

// out[t, o] = sum over k of weight[o, k] x[t, k], for up to T = 8 NT tokens; only the first
// `num_tokens` exist. With NORM, the RMS norm of x is multiplied instead of x itself. One block
// computes BLOCK_ROWS rows of the weight, and its warps split k. The rows are neighbours, with two
// exceptions: half of the rows for SWIGLU belong to the gate, and the others are the same rows of
// the up projection; half of the rows for ROTATE_AND_CACHE are in the first half of a head, and the
// others are those that they are rotated with.
//
// More than 8 tokens are first copied to shared memory if there is room, since warps would load
// them from L2 in halves of cache lines. The widest products (SWIGLU and those of logits) do without:
// each of their many blocks would make a copy.
template <int NT, Epilogue EPILOGUE, bool NORM, int K, int O>
__device__ __forceinline__ void fused_product(const bf16 *weight, const bf16 *x, const bf16 *norm, const bf16 *bias,
                                              bf16 *out, int num_tokens, const RotateAndCache rotate = {},
                                              const SampleBlocks sample = {}) {
  constexpr int T = NT * 8, ROWS = EPILOGUE == SWIGLU ? BLOCK_ROWS / 2 : BLOCK_ROWS;
  constexpr bool IS_WIDEST = EPILOGUE == SWIGLU || EPILOGUE == ARGMAX || EPILOGUE == CANDIDATES;
  constexpr bool STAGED = NT > 1 && !IS_WIDEST && STAGED_BYTES(T, K) <= MAX_STAGED_BYTES;
  static_assert(BLOCK_ROWS == 16, "the rows of one mma");
  // The padding of BLOCK_ROWS to 20 makes a warp's writes free of bank conflicts.
  __shared__ float partial[WARPS][T][20];
  __shared__ float squares[WARPS][T];
  static_assert(sizeof(partial) + sizeof(squares) <= SUMS_BYTES, "the host reserves this much");
  constexpr int COLUMNS = K / 8, PITCH = (K + STAGING_PAD) / 8;  // of a token's row, in chunks of 16 bytes
  extern __shared__ uint4 staged[];                              // if STAGED: [T][PITCH]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  // ROTATE_AND_CACHE: the head of this block and the first row within it.
  const int head = blockIdx.x / (HALF / 8), head_row = blockIdx.x % (HALF / 8) * 8;
  const int first = EPILOGUE == ROTATE_AND_CACHE ? head * HEAD_DIM + head_row : blockIdx.x * ROWS;
  const int upper = min(first + g, O - 1);
  const int lower = EPILOGUE == SWIGLU             ? O + upper
                    : EPILOGUE == ROTATE_AND_CACHE ? upper + HALF
                                                   : min(first + g + 8, O - 1);
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
  // ROTATE_AND_CACHE: each thread finishes one pair of one token. Where it goes is part of the
  // step's input.
  const int own = threadIdx.x / 8, dim = head_row + threadIdx.x % 8;
  int own_row = -1, own_slot = 0;
  float cosine = 1.f, sine = 0.f;
  if (EPILOGUE == ROTATE_AND_CACHE && own < num_tokens) {
    static_assert(8 * T <= WARPS * 32, "a thread for every pair");
    own_row = rotate.tokens.row[own], own_slot = rotate.tokens.slot[own];
    if (head < HEADS + KV_HEADS) {
      const size_t at = (size_t)rotate.tokens.position[own] * HALF + dim;
      cosine = rotate.rope.cosines[at], sine = rotate.rope.sines[at];
    }
  }
  wait_for_predecessor();

  if (STAGED) {
    for (int i = threadIdx.x; i < num_tokens * COLUMNS; i += WARPS * 32)
      cp_async_16(&staged[i / COLUMNS * PITCH + i % COLUMNS], (const uint4 *)x + i);
  }
  // Each thread finishes SUMS results: result i is row i % ROWS for token i / ROWS.
  constexpr int SUMS = (ROWS * T + WARPS * 32 - 1) / (WARPS * 32);
  bf16 residual[SUMS];
  if (EPILOGUE == ADD_RESIDUAL) {
#pragma unroll
    for (int j = 0; j < SUMS; j++) {
      const int i = threadIdx.x + j * WARPS * 32, token = i / ROWS, o = first + i % ROWS;
      residual[j] = token < num_tokens && o < O ? out[(size_t)token * O + o] : 0;
    }
  }
  if (STAGED) cp_async_wait_all();

  float acc[NT][4] = {};
  float square[NT] = {};
  for (int base = warp; base < chunks; base += WARPS * DEPTH) {
    uint4 next_a[DEPTH], next_b[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int c = base + (DEPTH + d) * WARPS;
      if (c < chunks) next_a[d] = load_once(row_a + c * 4), next_b[d] = load_once(row_b + c * 4);
    }
    uint4 inputs[DEPTH][NT], norms[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int c = base + d * WARPS;
      if (NORM && c < chunks) norms[d] = ((const uint4 *)norm)[c * 4 + t];
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        int token = nt * 8 + g;
        inputs[d][nt] = make_uint4(0, 0, 0, 0);
        if (c < chunks && token < num_tokens)
          inputs[d][nt] =
              STAGED ? staged[token * PITCH + c * 4 + t] : ((const uint4 *)(x + (size_t)token * K))[c * 4 + t];
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int c = base + d * WARPS;
      if (c < chunks) {
        uint4 scale = norms[d];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          uint4 v = inputs[d][nt];
          if (NORM) {
            u32 *pairs = (u32 *)&v;
            const u32 *scales = (const u32 *)&scale;
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float l = low_to_f32(pairs[i]), h = high_to_f32(pairs[i]);
              square[nt] += l * l + h * h;
              pairs[i] = multiply_pairs(pairs[i], scales[i]);
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
  auto norm_scale = [&](int token) {
    if (!NORM) return 1.f;
    float s = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) s += squares[w][token];
    return rsqrtf(s / K + EPS);
  };
  auto sum_warps = [&](int r, int token) {
    float s = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) s += partial[w][token][r];
    return s;
  };
  if constexpr (EPILOGUE == ARGMAX || EPILOGUE == CANDIDATES) {
#pragma unroll
    for (int j = 0; j < SUMS; j++) {
      const int i = threadIdx.x + j * WARPS * 32, token = i / ROWS;
      float top = -INFINITY;
      int top_id = NO_TOKEN;
      if (token < num_tokens && first + i % ROWS < O) {
        int id = first + i % ROWS;
        float score = sampling_score(sum_warps(i % ROWS, token) * norm_scale(token), sample.inverse_temperature,
                                     sample.keys[token], id);
        if (is_better(score, id, top, top_id)) top = score, top_id = id;
      }
      const size_t index = (size_t)token * gridDim.x + blockIdx.x;
      const float score = top;
      warp_argmax(ROWS, top, top_id);
      if (i % ROWS == 0 && token < num_tokens) sample.best[index] = top;
      if constexpr (EPILOGUE == ARGMAX) {
        if (i % ROWS == 0 && token < num_tokens) sample.best_id[index] = top_id;
      } else {
        float sum = score == -INFINITY ? 0.f : __expf(score - top);
        for (int step = ROWS / 2; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (token < num_tokens) sample.scores[index * ROWS + i % ROWS] = score;
        if (i % ROWS == 0 && token < num_tokens) sample.sums[index] = sum;
      }
    }
  } else if constexpr (EPILOGUE == ROTATE_AND_CACHE) {
    if (own_row < 0) return;
    const Cache &cache = rotate.cache;
    const float scale = norm_scale(own);
    float one = sum_warps(threadIdx.x % 8, own) * scale, two = sum_warps(threadIdx.x % 8 + 8, own) * scale;
    if (bias) {
      one += bf16_to_f32(bias[first + threadIdx.x % 8]);
      two += bf16_to_f32(bias[first + threadIdx.x % 8 + HALF]);
    }
    if (head >= HEADS + KV_HEADS) {
      cache.value(own_row, head - HEADS - KV_HEADS, dim)[own_slot] = f32_to_bf16(one);
      cache.value(own_row, head - HEADS - KV_HEADS, dim + HALF)[own_slot] = f32_to_bf16(two);
      return;
    }
    bf16 *to = head < HEADS ? out + (size_t)own * QKV + head * HEAD_DIM : cache.key(own_row, head - HEADS, own_slot);
    to[dim] = f32_to_bf16(one * cosine - two * sine);
    to[dim + HALF] = f32_to_bf16(two * cosine + one * sine);
  } else {
#pragma unroll
    for (int j = 0; j < SUMS; j++) {
      const int i = threadIdx.x + j * WARPS * 32, r = i % ROWS, token = i / ROWS, o = first + r;
      if (token >= num_tokens || o >= O) continue;
      float value = sum_warps(r, token) * norm_scale(token);
      if (EPILOGUE == SWIGLU) value = silu(value) * sum_warps(r + ROWS, token) * norm_scale(token);
      if (bias) value += bf16_to_f32(bias[o]);
      if (EPILOGUE == ADD_RESIDUAL) value += bf16_to_f32(residual[j]);
      out[(size_t)token * O + o] = f32_to_bf16(value);
    }
  }
}

// The fused kernels for up to 8 NT tokens. Grid: a block for every BLOCK_ROWS rows of the weight.
// qkv [T, QKV] is the projection of the norm of x [T, HIDDEN]; fused_qkv_rotated writes only the
// queries to it, rotated, and puts keys and values into the cache. x += the output projection of
// attn_out [T, HEADS * HEAD_DIM], and the down projection of inner [T, FFN] = silu(gate) * up.
// argmax_of_blocks finishes fused_sample, and candidates_of_blocks finishes fused_candidates.
#define FUSED_KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32)
#define FUSED_KERNELS(NT)                                                                                              \
  FUSED_KERNEL fused_qkv_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, const bf16 *bias, bf16 *qkv,        \
                              int num_tokens) {                                                                        \
    fused_product<NT, STORE, true, HIDDEN, QKV>(weight, x, norm, bias, qkv, num_tokens);                               \
  }                                                                                                                    \
  FUSED_KERNEL fused_qkv_rotated_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, const bf16 *bias,           \
                                      bf16 *qkv, int num_tokens,                                                       \
                                      const int *row, const int *slot, const int *position, const u64 *visible,        \
                                      const float *cosines, const float *sines,                                        \
                                      bf16 *keys, bf16 *values, int capacity) {                                        \
    fused_product<NT, ROTATE_AND_CACHE, true, HIDDEN, QKV>(                                                            \
        weight, x, norm, bias, qkv, num_tokens,                                                                        \
        {{row, slot, position, visible}, {cosines, sines}, {keys, values, capacity}});                                 \
  }                                                                                                                    \
  FUSED_KERNEL fused_output_##NT(const bf16 *weight, const bf16 *attn_out, const bf16 *bias, bf16 *x,                  \
                                 int num_tokens) {                                                                     \
    fused_product<NT, ADD_RESIDUAL, false, HEADS * HEAD_DIM, HIDDEN>(weight, attn_out, 0, bias, x, num_tokens);        \
  }                                                                                                                    \
  FUSED_KERNEL fused_gate_up_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, bf16 *inner, int num_tokens) {  \
    fused_product<NT, SWIGLU, true, HIDDEN, FFN>(weight, x, norm, 0, inner, num_tokens);                               \
  }                                                                                                                    \
  FUSED_KERNEL fused_down_##NT(const bf16 *weight, const bf16 *inner, bf16 *x, int num_tokens) {                       \
    fused_product<NT, ADD_RESIDUAL, false, FFN, HIDDEN>(weight, inner, 0, 0, x, num_tokens);                           \
  }                                                                                                                    \
  FUSED_KERNEL fused_sample_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, float *best, int *best_id,       \
                                 int num_tokens, float inverse_temperature, const u64 *keys) {                         \
    fused_product<NT, ARGMAX, true, HIDDEN, VOCAB>(weight, x, norm, 0, 0, num_tokens, {},                              \
                                                   {inverse_temperature, keys, best, best_id, 0, 0});                  \
  }                                                                                                                    \
  FUSED_KERNEL fused_candidates_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm,                              \
                                     float *best, float *sums, float *scores,                                          \
                                     int num_tokens, float inverse_temperature, const u64 *keys) {                     \
    fused_product<NT, CANDIDATES, true, HIDDEN, VOCAB>(weight, x, norm, 0, 0, num_tokens, {},                          \
                                                       {inverse_temperature, keys, best, 0, sums, scores});            \
  }
FUSED_KERNELS(1)
FUSED_KERNELS(2)
FUSED_KERNELS(4)

// predicted[token] = the best token of all blocks of fused_sample, or of all segments of
// sample_segments. One block per token.
extern "C" __global__ void argmax_of_blocks(const float *best, const int *best_id, int num_blocks, int *predicted) {
  let_successor_start();
  wait_for_predecessor();
  float top = -INFINITY;
  int top_id = NO_TOKEN;
  for (int i = threadIdx.x; i < num_blocks; i += blockDim.x) {
    float score = best[(size_t)blockIdx.x * num_blocks + i];
    int id = best_id[(size_t)blockIdx.x * num_blocks + i];
    if (is_better(score, id, top, top_id)) top = score, top_id = id;
  }
  block_argmax(top, top_id);
  if (threadIdx.x == 0) predicted[blockIdx.x] = top_id;
}

// candidates[token] = pairs of a token and the bits of its probability, the softmax of the scores.
// Where there is no token, the id is -1. The blocks of fused_candidates and the segments of
// candidates_of_segments have a best score, a sum of exp(score - best), and a list of scores with
// their ids. Without `ids`, the list is of all tokens of the block. One block per token.
extern "C" __global__ void candidates_of_blocks(const float *best, const float *sums, const float *scores,
                                                const int *ids, int list_length, int num_blocks,
                                                int *candidates) {
  let_successor_start();
  wait_for_predecessor();
  // The best tokens are in the blocks with the best ones.
  Candidates blocks;
  for (int i = threadIdx.x; i < num_blocks; i += blockDim.x) {
    const size_t index = (size_t)blockIdx.x * num_blocks + i;
    blocks.add(best[index], i, sums[index]);
  }
  block_candidates(blocks);
  const int lane = threadIdx.x;
  if (lane >= 32) return;
  float list[MAX_CANDIDATES];
  int list_ids[MAX_CANDIDATES];
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++) {
    const bool exists = blocks.ids[r] != NO_TOKEN && lane < list_length;
    const int block = exists ? blocks.ids[r] : 0;
    const size_t index = ((size_t)blockIdx.x * num_blocks + block) * list_length + lane;
    list[r] = exists ? scores[index] : -INFINITY;
    list_ids[r] = exists && ids ? ids[index] : block * list_length + lane;
  }
  const Candidates top = warp_candidates(list, list_ids);
  if (lane > 0) return;
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++) {
    const bool exists = top.ids[r] != NO_TOKEN;
    const float probability = exists ? __expf(top.scores[r] - top.scores[0]) / blocks.sum : 0.f;
    ((int2 *)candidates)[blockIdx.x * MAX_CANDIDATES + r] =
        make_int2(exists ? top.ids[r] : -1, __float_as_int(probability));
  }
}

// ---- Kernels between the products of cuBLAS, for many tokens ----

// x += delta (unless it is null); normed = the RMS norm of x. One block per token.
extern "C" __global__ void add_rms_norm(bf16 *x, const bf16 *delta, const bf16 *weight, bf16 *normed) {
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
      for (int j = 0; j < 4; j++)
        pairs[j] = pack_bf16(low_to_f32(pairs[j]) + low_to_f32(others[j]),
                             high_to_f32(pairs[j]) + high_to_f32(others[j]));
      row[i] = v;
    }
    for (int j = 0; j < 4; j++)
      square += low_to_f32(pairs[j]) * low_to_f32(pairs[j]) + high_to_f32(pairs[j]) * high_to_f32(pairs[j]);
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
      pairs[j] = pack_bf16(low_to_f32(pairs[j]) * scale * low_to_f32(scales[j]),
                           high_to_f32(pairs[j]) * scale * high_to_f32(scales[j]));
    to[i] = v;
  }
}

// inner [T, FFN] = silu(gate) * up, where gate_up [T, 2 FFN] holds both.
extern "C" __global__ void swiglu(const bf16 *gate_up, bf16 *inner, int num_tokens) {
  let_successor_start();
  wait_for_predecessor();
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)num_tokens * (FFN / 8)) return;
  size_t token = i / (FFN / 8), column = i % (FFN / 8);
  const bf16 *row = gate_up + token * 2 * FFN;
  uint4 g = ((const uint4 *)row)[column], u = ((const uint4 *)(row + FFN))[column];
  u32 *gates = (u32 *)&g;
  const u32 *ups = (const u32 *)&u;
  for (int j = 0; j < 4; j++)
    gates[j] = pack_bf16(silu(low_to_f32(gates[j])) * low_to_f32(ups[j]),
                         silu(high_to_f32(gates[j])) * high_to_f32(ups[j]));
  ((uint4 *)(inner + token * FFN))[column] = g;
}

#define NUM_SEGMENTS ((VOCAB + SEGMENT - 1) / SEGMENT)

// A block of the kernels that sample from a segment of SEGMENT logits of a token. Rows of logits,
// `pitch` apart, hold the segments from `first_segment` on. Grid: (T, segments of a row).
struct SegmentLogits {
  static constexpr int LENGTH = SEGMENT / SAMPLE_THREADS;  // of a thread's part
  float4 quads[LENGTH / 4];
  int segment, first_id;

  __device__ __forceinline__ SegmentLogits(const float *logits, int pitch, int first_segment)
      : segment(first_segment + blockIdx.y), first_id(segment * SEGMENT + threadIdx.x * 4) {
    const float4 *row =
        (const float4 *)(logits + (size_t)blockIdx.x * pitch + (size_t)blockIdx.y * SEGMENT) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < LENGTH / 4; j++) quads[j] = row[j * SAMPLE_THREADS];
  }
  __device__ __forceinline__ float logit(int i) const { return ((const float *)quads)[i]; }
  __device__ __forceinline__ int id(int i) const { return first_id + i / 4 * (4 * SAMPLE_THREADS) + i % 4; }
};

// The best score and its token in each segment, written to best and best_id [T, NUM_SEGMENTS].
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    sample_segments(const float *logits, int pitch, int first_segment, float inverse_temperature, const u64 *keys,
                    float *best, int *best_id) {
  let_successor_start();
  wait_for_predecessor();
  const SegmentLogits x(logits, pitch, first_segment);
  // The largest logit of the block.
  __shared__ float maxima[SAMPLE_THREADS / 32];
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < x.LENGTH; i++)
    if (x.id(i) < VOCAB) max = fmaxf(max, x.logit(i));
  for (int step = 16; step > 0; step >>= 1) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = max;
  __syncthreads();
  for (int w = 0; w < SAMPLE_THREADS / 32; w++) max = fmaxf(max, maxima[w]);

  // Noise takes longer to compute than logits to load, so it is computed only for tokens that can
  // win with the largest noise, or the largest for their bits, against the largest logit with the
  // smallest noise.
  const bool is_greedy = inverse_temperature == 0.f;
  const float factor = is_greedy ? 1.f : inverse_temperature;
  const float bound = is_greedy ? max : max * factor + MIN_NOISE, reach = is_greedy ? 0.f : MAX_NOISE;
  const u64 key = keys[blockIdx.x];
  float top = -INFINITY;
  int top_id = NO_TOKEN;
#pragma unroll
  for (int i = 0; i < x.LENGTH; i++) {
    const int id = x.id(i);
    float score = x.logit(i) * factor;
    if (id >= VOCAB || score + reach < bound) continue;
    if (!is_greedy) {
      u32 bits = hash(key, (u32)id) >> 9;
      if (score + max_noise(bits) < fmaxf(bound, top)) continue;
      score += noise(bits);
    }
    if (is_better(score, id, top, top_id)) top = score, top_id = id;
  }
  block_argmax(top, top_id);
  if (threadIdx.x != 0) return;
  best[(size_t)blockIdx.x * NUM_SEGMENTS + x.segment] = top;
  best_id[(size_t)blockIdx.x * NUM_SEGMENTS + x.segment] = top_id;
}

// For each segment, [T, NUM_SEGMENTS]: the best score, the sum of exp(score - best), and the
// MAX_CANDIDATES best scores with their ids. All scores count for the softmax, so all need their
// noise.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    candidates_of_segments(const float *logits, int pitch, int first_segment, float inverse_temperature,
                           const u64 *keys, float *best, float *sums, float *scores, int *ids) {
  __shared__ int winners[MAX_CANDIDATES], winner_ids[MAX_CANDIDATES][32];
  __shared__ float winner_scores[MAX_CANDIDATES][32];
  let_successor_start();
  wait_for_predecessor();
  const SegmentLogits x(logits, pitch, first_segment);
  static_assert(x.LENGTH == 32, "a lane for each score of a thread");
  const u64 key = keys[blockIdx.x];
  float score[x.LENGTH], top = -INFINITY, sum = 0.f;
  int top_id = NO_TOKEN;
#pragma unroll
  for (int i = 0; i < x.LENGTH; i++) {
    score[i] = -INFINITY;
    if (x.id(i) >= VOCAB) continue;
    score[i] = sampling_score(x.logit(i), inverse_temperature, key, x.id(i));
    if (is_better(score[i], x.id(i), top, top_id)) top = score[i], top_id = x.id(i);
  }
#pragma unroll
  for (int i = 0; i < x.LENGTH; i++)
    if (score[i] > -INFINITY) sum += __expf(score[i] - top);

  // The best tokens are those of the threads with the best ones.
  Candidates threads;
  threads.add(top, top_id, sum);
  block_candidates(threads);
  if (threadIdx.x == 0)
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++) winners[r] = threads.ids[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++)
    if (winners[r] == top_id && top_id != NO_TOKEN)
#pragma unroll
      for (int i = 0; i < x.LENGTH; i++) winner_scores[r][i] = score[i], winner_ids[r][i] = x.id(i);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float list[MAX_CANDIDATES];
  int list_ids[MAX_CANDIDATES];
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++) {
    list[r] = threads.ids[r] != NO_TOKEN ? winner_scores[r][threadIdx.x] : -INFINITY;
    list_ids[r] = winner_ids[r][threadIdx.x];
  }
  const Candidates found = warp_candidates(list, list_ids);
  if (threadIdx.x > 0) return;
  const size_t index = (size_t)blockIdx.x * NUM_SEGMENTS + x.segment;
  best[index] = threads.scores[0], sums[index] = threads.sum;
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++) {
    scores[index * MAX_CANDIDATES + r] = found.scores[r];
    ids[index * MAX_CANDIDATES + r] = found.ids[r];
  }
}

// ---- The cache ----

// Moves keys and values to other slots of their row, in all layers: of row r, from slot `from[i]` to
// slot `to[i]` for every i from first_move[r] up to first_move[r + 1]. No move of a row goes to a
// slot that a later one reads, so they can be read and written in groups. Grid: (layers * KV_HEADS,
// rows); a thread moves one dimension of a head.
extern "C" __global__ void move_slots(const int *first_move, const int *from, const int *to,
                                      bf16 *keys, bf16 *values, int capacity, int num_rows) {
  let_successor_start();
  wait_for_predecessor();
  constexpr int GROUP_MOVES = 8;
  const int layer = blockIdx.x / KV_HEADS, head = blockIdx.x % KV_HEADS, row = blockIdx.y, dim = threadIdx.x;
  const size_t offset = (size_t)layer * num_rows * KV_HEADS * capacity * HEAD_DIM;
  const Cache cache = {keys + offset, values + offset, capacity};
  const int end = first_move[row + 1];
  for (int group = first_move[row]; group < end; group += GROUP_MOVES) {
    bf16 key[GROUP_MOVES], value[GROUP_MOVES];
#pragma unroll
    for (int i = 0; i < GROUP_MOVES; i++) {
      if (group + i >= end) break;
      key[i] = cache.key(row, head, from[group + i])[dim];
      value[i] = cache.value(row, head, dim)[from[group + i]];
    }
#pragma unroll
    for (int i = 0; i < GROUP_MOVES; i++) {
      if (group + i >= end) break;
      cache.key(row, head, to[group + i])[dim] = key[i];
      cache.value(row, head, dim)[to[group + i]] = value[i];
    }
  }
}

// ---- Attention ----

// Rotates a head, after its RMS norm if the model has one (Qwen3). The lanes of a warp share the
// work.
__device__ __forceinline__ void rotate_head(const bf16 *from, bf16 *to, const bf16 *norm, const float *cosine,
                                            const float *sine) {
  const int lane = threadIdx.x & 31;
  float scale = 1.f;
  if (QK_NORM) {
    float square = 0.f;
    for (int i = lane; i < HEAD_DIM; i += 32) square += bf16_to_f32(from[i]) * bf16_to_f32(from[i]);
    scale = rsqrtf(warp_sum(square) / HEAD_DIM + EPS);
  }
  for (int i = lane; i < HALF; i += 32) {
    float first = bf16_to_f32(from[i]), second = bf16_to_f32(from[i + HALF]);
    if (QK_NORM) {
      first = bf16_to_f32(f32_to_bf16(first * scale * bf16_to_f32(norm[i])));
      second = bf16_to_f32(f32_to_bf16(second * scale * bf16_to_f32(norm[i + HALF])));
    }
    to[i] = f32_to_bf16(first * cosine[i] - second * sine[i]);
    to[i + HALF] = f32_to_bf16(second * cosine[i] + first * sine[i]);
  }
}

__device__ __forceinline__ void store_value(const bf16 *from, const Cache &cache, int row, int head, int slot) {
  for (int i = threadIdx.x & 31; i < HEAD_DIM; i += 32) cache.value(row, head, i)[slot] = from[i];
}

// Rotates queries in place, and puts rotated keys and values into the cache. One block per token.
extern "C" __global__ void rotate_and_cache(bf16 *qkv,
                                            const int *row, const int *slot, const int *position, const u64 *visible,
                                            const float *cosines, const float *sines,
                                            const bf16 *query_norm, const bf16 *key_norm,
                                            bf16 *keys, bf16 *values, int capacity) {
  const Tokens tokens = {row, slot, position, visible};
  const Rope rope = {cosines, sines};
  const QkNorm norm = {query_norm, key_norm};
  const Cache cache = {keys, values, capacity};
  let_successor_start();
  wait_for_predecessor();
  const int token = blockIdx.x;
  if (tokens.row[token] < 0) return;
  const float *cosine = rope.cosines + (size_t)tokens.position[token] * HALF;
  const float *sine = rope.sines + (size_t)tokens.position[token] * HALF;
  for (int head = threadIdx.x >> 5; head < HEADS + 2 * KV_HEADS; head += blockDim.x >> 5) {
    bf16 *x = qkv + (size_t)token * QKV + head * HEAD_DIM;
    if (head < HEADS)
      rotate_head(x, x, norm.query, cosine, sine);
    else if (head < HEADS + KV_HEADS)
      rotate_head(x, cache.key(tokens.row[token], head - HEADS, tokens.slot[token]), norm.key, cosine, sine);
    else
      store_value(x, cache, tokens.row[token], head - HEADS - KV_HEADS, tokens.slot[token]);
  }
}

// The bits of `visible` whose tokens are at most `max_distance` positions before the token. In a
// tree, the slot of a token says too little: it may be larger than its position.
__device__ __forceinline__ u64 visible_within(const Tokens &tokens, int window_token, int token, int max_distance) {
  u64 visible = tokens.visible[token];
  if (max_distance >= 64) return visible;
#pragma unroll 1
  for (int i = 0; i < min(token + 1 - window_token, 64); i++)
    if (tokens.position[token] - tokens.position[window_token + i] > max_distance) visible &= ~(1ull << i);
  return visible;
}

// out[token, head] = softmax(q k^T / sqrt(HEAD_DIM)) v over the slots that the token attends to:
// all slots before its window, and the slots of the window up to its own whose bit is set in
// `visible` (bit i is the slot i after the window's start; slots 64 or more after it always count).
// Of these, only the tokens at the last `max_distance` + 1 positions up to its own: the sliding
// window of the layer, if it has one. Grid: (tiles, KV_HEADS).
//
// A block has GROUP * length query vectors (the query heads that share its head of keys, for each
// token of its tile). They are split into groups of 16; the host makes tiles so small that there
// are no more groups than warps. The warps of a group split the keys in chunks of 32, and their
// results are merged at the end.
//
// ROTATE, for small steps, does the work of rotate_and_cache too, which saves a kernel. Each block
// caches all keys and values of its window up to the end of its tile, so blocks of the same window
// write the same values.
template <bool ROTATE>
__device__ __forceinline__ void attend(const bf16 *qkv, const Tokens &tokens, const Tiles &tiles, const Rope &rope,
                                       const QkNorm &norm, const Cache &cache, int max_distance, bf16 *out) {
  static_assert(WARP_QUERIES == 16, "the rows of one mma");
  static_assert(SLOTS_PER_READ == 32, "a chunk of keys has a slot per lane");
  // [ATTENTION_WARPS][16][HEAD_DIM + 2]; for ROTATE then the queries [16 groups][HEAD_DIM +
  // QUERY_PAD].
  extern __shared__ float merged[];
  bf16 *queries = (bf16 *)(merged + ATTENTION_WARPS * 16 * (HEAD_DIM + 2));
  constexpr int PITCH = HEAD_DIM + QUERY_PAD;
  let_successor_start();
  // Tiles and slots are the step's input, so they do not wait for the predecessor; nor does the
  // prefetch of keys and values.
  const int tile = blockIdx.x, key_head = blockIdx.y, cache_row = tiles.row[tile];
  if (cache_row < 0) return;
  const int first = tiles.first_token[tile], length = tiles.length[tile], window = tiles.window[tile];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int count = length * GROUP, groups = (count + 15) / 16;
  const int last_slot = tokens.slot[first + length - 1];
  const int window_token = first - (tokens.slot[first] - window);  // the first token of the window
  // No position is larger than its slot, so the tile attends to nothing in the chunks before this.
  int first_position = tokens.position[first + min(lane, length - 1)];
  for (int step = 16; step > 0; step >>= 1)
    first_position = min(first_position, __shfl_xor_sync(0xffffffffu, first_position, step));
  const int first_chunk = max(first_position - max_distance, 0) / 32;
  // Warps per group of query vectors, but no more than there are chunks of keys.
  const int splits = min(ATTENTION_WARPS / groups, last_slot / 32 + 1 - first_chunk);
  const int group = warp / splits, split = warp % splits;
  const bf16 *k = cache.key(cache_row, key_head, 0), *v = cache.value(cache_row, key_head, 0);
  if (group < groups)
    for (int chunk = first_chunk + split; chunk * 32 <= last_slot; chunk += splits) {
      for (int d = 0; d < HEAD_DIM; d += 64) prefetch_l2(k + (size_t)(chunk * 32 + lane) * HEAD_DIM + d);
      for (int d = lane; d < HEAD_DIM; d += 32) prefetch_l2(v + (size_t)d * cache.capacity + chunk * 32);
    }
  wait_for_predecessor();

  if (ROTATE) {
    const int fresh = last_slot - window + 1;
    for (int item = warp; item < 2 * fresh + count; item += ATTENTION_WARPS) {
      const int m = item - 2 * fresh;
      const int token = m >= 0 ? first + m / GROUP : window_token + item / 2;
      const bf16 *from = qkv + (size_t)token * QKV;
      const float *cosine = rope.cosines + (size_t)tokens.position[token] * HALF;
      const float *sine = rope.sines + (size_t)tokens.position[token] * HALF;
      if (m >= 0)
        rotate_head(from + (key_head * GROUP + m % GROUP) * HEAD_DIM, queries + m * PITCH, norm.query, cosine, sine);
      else if (item % 2 == 0)
        rotate_head(from + (HEADS + key_head) * HEAD_DIM, cache.key(cache_row, key_head, tokens.slot[token]), norm.key,
                    cosine, sine);
      else
        store_value(from + (HEADS + KV_HEADS + key_head) * HEAD_DIM, cache, cache_row, key_head, tokens.slot[token]);
    }
    __syncthreads();
  }

  float o[HEAD_DIM / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, weight_sum[2] = {0.f, 0.f};
  uint4 q[2][CHUNKS];
  int own_first[2];
  u32 own_count[2];
  u64 own_visible[2];
  if (group < groups) {
    for (int r = 0; r < 2; r++) {
      int m = group * 16 + g + 8 * r;
      bool exists = m < count;
      int token = first + (exists ? m / GROUP : 0), head = key_head * GROUP + (exists ? m % GROUP : 0);
      own_first[r] = max(tokens.position[token] - max_distance, 0);
      own_count[r] = exists ? tokens.slot[token] + 1 - own_first[r] : 0;
      own_visible[r] = visible_within(tokens, window_token, token, max_distance);
      const bf16 *vector = ROTATE ? queries + (exists ? m : 0) * PITCH : qkv + (size_t)token * QKV + head * HEAD_DIM;
      for (int c = 0; c < CHUNKS; c++) q[r][c] = ((const uint4 *)vector)[c * 4 + t];
    }
    const float scale = rsqrtf((float)HEAD_DIM) * 1.44269504f;  // log2(e): weights are computed with exp2
    for (int chunk = first_chunk + split; chunk * 32 <= last_slot; chunk += splits) {
      float s[4][4] = {};
      // Keys are assigned to the columns of product j so that a thread's scores belong to 8
      // neighbouring keys.
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int key = chunk * 32 + 8 * (g >> 1) + 2 * j + (g & 1);
        const uint4 *from = (const uint4 *)(k + (size_t)key * HEAD_DIM) + t;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) mma_chunk(s[j], q[0][c], q[1][c], from[c * 4]);
      }
#if HEAD_DIM > 64
      // With eight warps there are enough registers to load the values before the scores are known.
      uint4 values[HEAD_DIM / 8];
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; d++)
        values[d] = *((const uint4 *)(v + (size_t)(d * 8 + g) * cache.capacity + chunk * 32) + t);
#endif
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float chunk_max = -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            int key = chunk * 32 + 8 * t + 2 * j + i, offset = key - window;
            bool is_visible = (u32)(key - own_first[r]) < own_count[r] &&
                              (offset < 0 || offset >= 64 || ((own_visible[r] >> offset) & 1));
            float &value = s[j][2 * r + i];
            value = is_visible ? value * scale : -INFINITY;
            chunk_max = fmaxf(chunk_max, value);
          }
        chunk_max = quad_max(chunk_max);
        float max = fmaxf(row_max[r], chunk_max);
        float shift = max == -INFINITY ? 0.f : max;
        float shrink = exp2f(row_max[r] - shift);
        row_max[r] = max;
        weight_sum[r] *= shrink;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) o[d][2 * r] *= shrink, o[d][2 * r + 1] *= shrink;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float &value = s[j][2 * r + i];
            value = exp2f(value - shift);
            weight_sum[r] += value;
          }
      }
      u32 p[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++) p[j][0] = pack_bf16(s[j][0], s[j][1]), p[j][1] = pack_bf16(s[j][2], s[j][3]);
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; d++) {
#if HEAD_DIM > 64
        uint4 x = values[d];
#else
        uint4 x = *((const uint4 *)(v + (size_t)(d * 8 + g) * cache.capacity + chunk * 32) + t);
#endif
        mma(o[d], p[0][0], p[0][1], p[1][0], p[1][1], x.x, x.y);
        mma(o[d], p[2][0], p[2][1], p[3][0], p[3][1], x.z, x.w);
      }
    }
    for (int r = 0; r < 2; r++) weight_sum[r] = quad_sum(weight_sum[r]);
    // Each line: a warp's sum for one query vector, its maximum, and its sum of weights.
    float *own_lines = merged + (size_t)warp * 16 * (HEAD_DIM + 2);
    for (int r = 0; r < 2; r++) {
      float *line = own_lines + (g + 8 * r) * (HEAD_DIM + 2);
      for (int d = 0; d < HEAD_DIM / 8; d++) {
        line[d * 8 + 2 * t] = o[d][2 * r];
        line[d * 8 + 2 * t + 1] = o[d][2 * r + 1];
      }
      if (t == 0) line[HEAD_DIM] = row_max[r], line[HEAD_DIM + 1] = weight_sum[r];
    }
  }
  __syncthreads();
  // One warp merges the splits of a query vector.
  for (int m = warp; m < count; m += ATTENTION_WARPS) {
    const float *lines = merged + ((size_t)(m / 16) * splits * 16 + m % 16) * (HEAD_DIM + 2);
    float max = -INFINITY;
    for (int i = 0; i < splits; i++) max = fmaxf(max, lines[(size_t)i * 16 * (HEAD_DIM + 2) + HEAD_DIM]);
    float total = 0.f, sums[HEAD_DIM / 32] = {};
    for (int i = 0; i < splits; i++) {
      const float *line = lines + (size_t)i * 16 * (HEAD_DIM + 2);
      float factor = exp2f(line[HEAD_DIM] - max);
      total += factor * line[HEAD_DIM + 1];
      for (int d = 0; d < HEAD_DIM / 32; d++) sums[d] += factor * line[d * 32 + lane];
    }
    bf16 *to = out + ((size_t)(first + m / GROUP) * HEADS + key_head * GROUP + m % GROUP) * HEAD_DIM;
    for (int d = 0; d < HEAD_DIM / 32; d++) to[d * 32 + lane] = f32_to_bf16(sums[d] / total);
  }
}

// Attention for queries that are rotated already, with all keys and values in the cache.
extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32)
    attention(const bf16 *qkv,
              const int *row, const int *slot, const int *position, const u64 *visible,
              const int *tile_row, const int *tile_first_token, const int *tile_length, const int *tile_window,
              const float *cosines, const float *sines,
              const bf16 *query_norm, const bf16 *key_norm,
              bf16 *keys, bf16 *values, int capacity,
              int max_distance, bf16 *attn_out) {
  attend<false>(qkv, {row, slot, position, visible}, {tile_row, tile_first_token, tile_length, tile_window},
                {cosines, sines}, {query_norm, key_norm}, {keys, values, capacity}, max_distance, attn_out);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32)
    rotate_and_attend(const bf16 *qkv,
                      const int *row, const int *slot, const int *position, const u64 *visible,
                      const int *tile_row, const int *tile_first_token, const int *tile_length, const int *tile_window,
                      const float *cosines, const float *sines,
                      const bf16 *query_norm, const bf16 *key_norm,
                      bf16 *keys, bf16 *values, int capacity,
                      int max_distance, bf16 *attn_out) {
  attend<true>(qkv, {row, slot, position, visible}, {tile_row, tile_first_token, tile_length, tile_window},
               {cosines, sines}, {query_norm, key_norm}, {keys, values, capacity}, max_distance, attn_out);
}
