// The kernels of one decoding step, compiled at run time for one model's shape (NVRTC; no headers).
//
// A step forwards a ragged batch: T tokens of several cache rows, with nothing between the rows. A
// step of few tokens goes through the fused kernels, which read each weight once and do in the same
// pass everything around the product; for more tokens cuBLAS multiplies and smaller kernels do the
// rest.
//
// Macros from the host: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EPS, QK_NORM, WARPS (of a
// fused kernel's block), BLOCK_ROWS (rows of a weight per block), GROUP_TOKENS (tokens of a group),
// MAX_DEPTH (chunks of a weight that a warp loads ahead, at most), SUMS_BYTES and MAX_STAGED_BYTES
// (shared memory of a fused kernel for sums and for tokens, at most), STAGING_PAD, SEGMENT (logits
// that a block of sample_segments reads), SAMPLE_THREADS (of such a block), NUCLEUS_THREADS (of a
// block of keep_nucleus), ROTATE_TOKENS (of which a block rotates a head), and for the attention:
// WARP_QUERIES (query vectors of a warp), SLOTS_PER_READ (slots of the cache that it reads at a
// time), ATTENTION_WARPS (of a block, for few tiles), BATCH_WARPS and BATCH_BLOCKS (of a block, and
// blocks of a multiprocessor, for many), BLOCK_WORK (chunks of slots, times groups of query
// vectors, for another block of a cluster), RING_DEPTH (chunks of keys or values that a warp has in
// shared memory), WARP_BYTES (of shared memory, for them or its sums), SUMS_PAD, QUERY_PAD; for the
// adapters of draft tokens: ADAPTED (whether there are any), the ranks of all adapters of a product
// together, QKV_RANK, OUTPUT_RANK, GATE_UP_RANK and DOWN_RANK, IN_CLUSTERS (whether the clusters of
// fused kernels compute A x), MAX_FUSED_CLUSTER (blocks of such a cluster, at most) and LOW_RANK_PAD.
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

// A pair of bf16 times a factor and a pair of weights.
__device__ __forceinline__ u32 scale_pair(u32 pair, float factor, u32 weights) {
  return pack_bf16(low_to_f32(pair) * factor * low_to_f32(weights), high_to_f32(pair) * factor * high_to_f32(weights));
}

// A block reads its rows of a weight once, so they bypass L1.
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

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last PENDING groups of the thread.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}


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

// The arguments of ARGMAX and CANDIDATES, with the temperature of each token (the bits of its inverse)
// and the sampling noise in `keys`. Both write
// the best score of each token and block [T, blocks]. ARGMAX also writes its id, and CANDIDATES the
// sum of exp(score - best) and all scores [T, blocks, BLOCK_ROWS].
struct SampleBlocks {
  const int *inverse_temperatures;
  const u64 *keys;
  float *best;
  int *best_id;
  float *sums, *scores;
};

// The first kernel of a step copies the embeddings, and that of the layers after the shared ones rows
// of the residual stream. Its successors may read the step's input before wait_for_predecessor(), so
// it lets them start only when that input has arrived.
extern "C" __global__ void copy_rows(const bf16 *table, const int *tokens, bf16 *x) {
  wait_for_predecessor();
  let_successor_start();
  const uint4 *from = (const uint4 *)(table + (size_t)tokens[blockIdx.x] * HIDDEN);
  uint4 *to = (uint4 *)(x + (size_t)blockIdx.x * HIDDEN);
  for (int i = threadIdx.x; i < HIDDEN / 8; i += blockDim.x) to[i] = from[i];
}

// Thread blocks in a cluster, and the index of this one. Only GPUs from Hopper on have clusters.
__device__ __forceinline__ int cluster_blocks() {
  int count = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
#endif
  return count;
}
__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// Waits for all blocks of the cluster that have not ended.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The halves of a barrier of all blocks: what is written before arriving can be read after waiting.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Writes a number to the same address in the shared memory of a block of the cluster.
__device__ __forceinline__ void store_to_block(int rank, u32 *own, u32 x) {
#if __CUDA_ARCH__ >= 900
  u32 address = (u32)__cvta_generic_to_shared(own);
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
#endif
}

// ---- Fused kernels, for few tokens ----

// How a fused kernel processes its product.
enum Epilogue {
  STORE,
  ROTATE_AND_CACHE,  // rotate queries and keys; keys and values go to the cache
  ADD_RESIDUAL,
  LOW_RANK,  // store for draft tokens, without the scale of the norm; zeros for others
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

// The adapters of a product for draft tokens: y += B A x. LOW_RANK computes low_rank [T, R] = A x, with
// zeros for tokens that are not `adapted`. The others add lora_b [rows, R] times it. If they have
// `lora_a` [R, K], the blocks of each of their clusters compute A x for themselves, which takes less
// time than a kernel of its own: each block multiplies some tiles of 16 rows of A together with its
// rows of the weight, by the same tokens.
struct Adapters {
  const int *adapted;
  const bf16 *lora_a, *low_rank, *lora_b;
};

// out[t, o] = sum over k of weight[o, k] x[t, k], for up to T = 8 NT tokens; only the first
// `num_tokens` exist. If T = GROUP_TOKENS, there may be more: the blocks with index y multiply group y
// of T tokens, side by side with those of the other groups, which read the same weight from L2. With
// NORM, the RMS norm of x is multiplied instead of x itself. One block computes BLOCK_ROWS rows of the
// weight, and its warps split k. The rows are neighbours, with two exceptions: half of the rows for
// SWIGLU belong to the gate, and the others are the same rows of the up projection; half of the rows
// for ROTATE_AND_CACHE are in the first half of a head, and the others are those that they are rotated
// with. With adapters of rank R, their product continues the sums, so that those of other tokens stay
// as they are to the bit.
//
// More than 8 tokens are first copied to shared memory if there is room, since warps would load
// them from L2 in halves of cache lines. The widest products (SWIGLU and those of logits) do without:
// each of their many blocks would make a copy.
template <int NT, Epilogue EPILOGUE, bool NORM, int K, int O, int R = 0>
__device__ __forceinline__ void fused_product(const bf16 *weight, const bf16 *x, const bf16 *norm, const bf16 *bias,
                                              bf16 *out, int num_tokens, Adapters adapters = {},
                                              RotateAndCache rotate = {}, const SampleBlocks sample = {}) {
  constexpr int T = NT * 8, ROWS = EPILOGUE == SWIGLU ? BLOCK_ROWS / 2 : BLOCK_ROWS;
  constexpr bool IS_LOGITS = EPILOGUE == ARGMAX || EPILOGUE == CANDIDATES;
  constexpr bool IS_WIDEST = EPILOGUE == SWIGLU || IS_LOGITS;
  constexpr bool STAGED = NT > 1 && !IS_WIDEST && STAGED_BYTES(T, K) <= MAX_STAGED_BYTES;
  static_assert(BLOCK_ROWS == 16, "the rows of one mma");
  if constexpr (T == GROUP_TOKENS && !IS_LOGITS) {
    const int first_token = blockIdx.y * T;
    x += (size_t)first_token * K, out += (size_t)first_token * O;
    num_tokens = min(num_tokens - first_token, T);
    rotate.tokens.row += first_token, rotate.tokens.slot += first_token, rotate.tokens.position += first_token;
    adapters.adapted += first_token, adapters.low_rank += (size_t)first_token * R;
  }
  // The padding of BLOCK_ROWS to 20 makes a warp's writes free of bank conflicts.
  __shared__ float partial[WARPS][T][20];
  __shared__ float squares[WARPS][T];
  static_assert(sizeof(partial) + sizeof(squares) <= SUMS_BYTES, "the host reserves this much");
  constexpr int COLUMNS = K / 8, PITCH = (K + STAGING_PAD) / 8;  // of a token's row, in chunks of 16 bytes
  extern __shared__ uint4 staged[];                              // if STAGED: [T][PITCH]
  // A x, if the cluster computes it: [T][LOW_RANK_PITCH] after the staged tokens.
  constexpr bool IN_CLUSTER = R > 0 && IN_CLUSTERS;
  constexpr int LOW_RANK_PITCH = R + LOW_RANK_PAD;
  bf16 *low_rank = (bf16 *)(staged + (STAGED ? T * PITCH : 0));
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  // ROTATE_AND_CACHE: the head of this block and the first row within it.
  const int head = blockIdx.x / (HALF / 8), head_row = blockIdx.x % (HALF / 8) * 8;
  const int first = EPILOGUE == ROTATE_AND_CACHE ? head * HEAD_DIM + head_row : blockIdx.x * ROWS;
  const int upper = min(first + g, O - 1);
  const int lower = EPILOGUE == SWIGLU             ? O + upper
                    : EPILOGUE == ROTATE_AND_CACHE ? min(upper + HALF, O - 1)
                                                   : min(first + g + 8, O - 1);
  // Tile 0 has rows of the weight, the others those of A that this block multiplies for its cluster. Blocks
  // for which none are left multiply the last ones and drop the result.
  constexpr int TILES = 1 + (IN_CLUSTER ? (R / 16 + MAX_FUSED_CLUSTER - 1) / MAX_FUSED_CLUSTER : 0);
  const int first_low_tile = IN_CLUSTER ? cluster_rank() * (TILES - 1) : 0;
  const uint4 *rows_a[TILES], *rows_b[TILES];
  rows_a[0] = (const uint4 *)(weight + (size_t)upper * K) + t;
  rows_b[0] = (const uint4 *)(weight + (size_t)lower * K) + t;
#pragma unroll
  for (int i = 1; i < TILES; i++) {
    const int low_tile = min(first_low_tile + i - 1, R / 16 - 1);
    rows_a[i] = (const uint4 *)(adapters.lora_a + (size_t)(low_tile * 16 + g) * K) + t;
    rows_b[i] = rows_a[i] + K;
  }
  // A warp multiplies every WARPS-th chunk of k, DEPTH chunks at a time. Tiles of A take registers, so with
  // them no round loads more than it needs.
  constexpr int chunks = K / 32, WARP_CHUNKS = (chunks + WARPS - 1) / WARPS;
  constexpr int ROUNDS = (WARP_CHUNKS + MAX_DEPTH - 1) / MAX_DEPTH;
  constexpr int DEPTH = TILES > 1 ? (WARP_CHUNKS + ROUNDS - 1) / ROUNDS : MAX_DEPTH;
  uint4 a[DEPTH][TILES], b[DEPTH][TILES];
  auto load_rows = [&](uint4 (&a)[DEPTH][TILES], uint4 (&b)[DEPTH][TILES], int base) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int c = base + d * WARPS;
      if (c >= chunks) continue;
#pragma unroll
      for (int i = 0; i < TILES; i++) a[d][i] = load_once(rows_a[i] + c * 4), b[d][i] = load_once(rows_b[i] + c * 4);
    }
  };
  load_rows(a, b, warp);
  // The chunks of B that continue this warp's sums.
  constexpr int ADAPTER_CHUNKS = (R / 32 + WARPS - 1) / WARPS;
  uint4 adapter_a[ADAPTER_CHUNKS + 1], adapter_b[ADAPTER_CHUNKS + 1];
#pragma unroll
  for (int i = 0; i < ADAPTER_CHUNKS; i++) {
    const int c = warp + i * WARPS;
    if (c >= R / 32) continue;
    adapter_a[i] = ((const uint4 *)(adapters.lora_b + (size_t)upper * R))[c * 4 + t];
    adapter_b[i] = ((const uint4 *)(adapters.lora_b + (size_t)lower * R))[c * 4 + t];
  }
  if constexpr (IN_CLUSTER) cluster_arrive();
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
  auto load_token = [&](int token, int c) {
    if (c >= chunks || token >= num_tokens) return make_uint4(0, 0, 0, 0);
    return STAGED ? staged[token * PITCH + c * 4 + t] : ((const uint4 *)(x + (size_t)token * K))[c * 4 + t];
  };

  float acc[TILES][NT][4] = {};
  float square[NT] = {};
  for (int base = warp; base < chunks; base += WARPS * DEPTH) {
    uint4 next_a[DEPTH][TILES], next_b[DEPTH][TILES];
    load_rows(next_a, next_b, base + DEPTH * WARPS);
    uint4 inputs[DEPTH][NT], norms[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int c = base + d * WARPS;
      if (NORM && c < chunks) norms[d] = ((const uint4 *)norm)[c * 4 + t];
#pragma unroll
      for (int nt = 0; nt < NT; nt++) inputs[d][nt] = load_token(nt * 8 + g, c);
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
#pragma unroll
          for (int i = 0; i < TILES; i++) mma_chunk(acc[i][nt], a[d][i], b[d][i], v);
        }
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
#pragma unroll
      for (int i = 0; i < TILES; i++) a[d][i] = next_a[d][i], b[d][i] = next_b[d][i];
  }
  auto publish_sums = [&](int nt, const float (&sums)[4]) {
    const int token = nt * 8 + 2 * t;
    partial[warp][token][g] = sums[0];
    partial[warp][token + 1][g] = sums[1];
    partial[warp][token][g + 8] = sums[2];
    partial[warp][token + 1][g + 8] = sums[3];
  };
  if constexpr (IN_CLUSTER) {
    // All blocks have started.
    cluster_wait();
#pragma unroll
    for (int i = 1; i < TILES; i++) {
      if (i > 1) __syncthreads();
#pragma unroll
      for (int nt = 0; nt < NT; nt++) publish_sums(nt, acc[i][nt]);
      __syncthreads();
      const int low_tile = first_low_tile + i - 1;
      if (low_tile >= R / 16) continue;
      // Each thread finishes a pair of rows of a token.
      for (int pair = threadIdx.x; pair < 8 * T; pair += WARPS * 32) {
        const int token = pair / 8, row = pair % 8 * 2;
        float one = 0.f, two = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) one += partial[w][token][row], two += partial[w][token][row + 1];
        const bool is_draft = token < num_tokens && adapters.adapted[token];
        u32 *own = (u32 *)(low_rank + token * LOW_RANK_PITCH + low_tile * 16 + row);
        for (int block = 0; block < cluster_blocks(); block++)
          store_to_block(block, own, is_draft ? pack_bf16(one, two) : 0);
      }
    }
    __syncwarp();
    cluster_barrier();
  }
#pragma unroll
  for (int i = 0; i < ADAPTER_CHUNKS; i++) {
    const int c = warp + i * WARPS;
    if (c >= R / 32) continue;
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      const int token = nt * 8 + g;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (token < num_tokens)
        v = IN_CLUSTER ? *((const uint4 *)(low_rank + token * LOW_RANK_PITCH) + c * 4 + t)
                       : ((const uint4 *)(adapters.low_rank + (size_t)token * R))[c * 4 + t];
      mma_chunk(acc[0][nt], adapter_a[i], adapter_b[i], v);
    }
  }
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    publish_sums(nt, acc[0][nt]);
    if (NORM) {
      const float sum = quad_sum(square[nt]);
      if (t == 0) squares[warp][nt * 8 + g] = sum;
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
  if constexpr (IS_LOGITS) {
#pragma unroll
    for (int j = 0; j < SUMS; j++) {
      const int i = threadIdx.x + j * WARPS * 32, token = i / ROWS;
      float top = -INFINITY;
      int top_id = NO_TOKEN;
      if (token < num_tokens && first + i % ROWS < O) {
        int id = first + i % ROWS;
        float score = sampling_score(sum_warps(i % ROWS, token) * norm_scale(token),
                                     __int_as_float(sample.inverse_temperatures[token]), sample.keys[token], id);
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
    if (own_row < 0 || head >= HEADS + 2 * KV_HEADS) return;
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
      if (EPILOGUE == LOW_RANK) {
        out[(size_t)token * O + o] = adapters.adapted[token] ? f32_to_bf16(sum_warps(r, token)) : 0;
        continue;
      }
      float value = sum_warps(r, token) * norm_scale(token);
      if (EPILOGUE == SWIGLU) value = silu(value) * sum_warps(r + ROWS, token) * norm_scale(token);
      if (bias) value += bf16_to_f32(bias[o]);
      if (EPILOGUE == ADD_RESIDUAL) value += bf16_to_f32(residual[j]);
      out[(size_t)token * O + o] = f32_to_bf16(value);
    }
  }
}

// The fused kernels for up to 8 TILES tokens, or groups of them. Grid: a block for every BLOCK_ROWS rows
// of the weight and, for groups, every GROUP_TOKENS tokens.
// qkv [T, QKV] is the projection of the norm of x [T, HIDDEN]; fused_qkv_rotated writes only the
// queries to it, rotated, and puts keys and values into the cache. x += the output projection of
// attn_out [T, HEADS * HEAD_DIM], and the down projection of inner [T, FFN] = silu(gate) * up.
// The last four numbers are the ranks of adapters.
#define FUSED_KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32)
// The gate and up projections have more blocks than most GPUs have multiprocessors. With tiles of A, two
// blocks fit on one only if their registers are limited.
#define ADAPTED_GATE_UP_KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, 1 + IN_CLUSTERS)
#define FUSED_KERNELS(NT, TILES, GATE_UP_KERNEL, QKV_R, OUTPUT_R, GATE_UP_R, DOWN_R)                                   \
  FUSED_KERNEL fused_qkv_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, const bf16 *bias, bf16 *qkv,        \
                              int num_tokens, const int *adapted, const bf16 *lora_a, const bf16 *low_rank,            \
                              const bf16 *lora_b) {                                                                    \
    fused_product<TILES, STORE, true, HIDDEN, QKV, QKV_R>(weight, x, norm, bias, qkv, num_tokens,                      \
                                                          {adapted, lora_a, low_rank, lora_b});                        \
  }                                                                                                                    \
  FUSED_KERNEL fused_qkv_rotated_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, const bf16 *bias,           \
                                      bf16 *qkv, int num_tokens, const int *adapted, const bf16 *lora_a,               \
                                      const bf16 *low_rank, const bf16 *lora_b,                                        \
                                      const int *row, const int *slot, const int *position, const u64 *visible,        \
                                      const float *cosines, const float *sines,                                        \
                                      bf16 *keys, bf16 *values, int capacity) {                                        \
    fused_product<TILES, ROTATE_AND_CACHE, true, HIDDEN, QKV, QKV_R>(                                                  \
        weight, x, norm, bias, qkv, num_tokens, {adapted, lora_a, low_rank, lora_b},                                   \
        {{row, slot, position, visible}, {cosines, sines}, {keys, values, capacity}});                                 \
  }                                                                                                                    \
  FUSED_KERNEL fused_output_##NT(const bf16 *weight, const bf16 *attn_out, const bf16 *bias, bf16 *x,                  \
                                 int num_tokens, const int *adapted, const bf16 *lora_a, const bf16 *low_rank,         \
                                 const bf16 *lora_b) {                                                                 \
    fused_product<TILES, ADD_RESIDUAL, false, HEADS * HEAD_DIM, HIDDEN, OUTPUT_R>(weight, attn_out, 0, bias, x,        \
                                                                                  num_tokens, {adapted, lora_a,        \
                                                                                  low_rank, lora_b});                  \
  }                                                                                                                    \
  GATE_UP_KERNEL fused_gate_up_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, bf16 *inner, int num_tokens,  \
                                    const int *adapted, const bf16 *lora_a, const bf16 *low_rank,                      \
                                    const bf16 *lora_b) {                                                              \
    fused_product<TILES, SWIGLU, true, HIDDEN, FFN, GATE_UP_R>(weight, x, norm, 0, inner, num_tokens,                  \
                                                               {adapted, lora_a, low_rank, lora_b});                   \
  }                                                                                                                    \
  FUSED_KERNEL fused_down_##NT(const bf16 *weight, const bf16 *inner, bf16 *x, int num_tokens,                         \
                               const int *adapted, const bf16 *lora_a, const bf16 *low_rank, const bf16 *lora_b) {     \
    fused_product<TILES, ADD_RESIDUAL, false, FFN, HIDDEN, DOWN_R>(weight, inner, 0, 0, x, num_tokens,                 \
                                                                   {adapted, lora_a, low_rank, lora_b});               \
  }
FUSED_KERNELS(1, 1, FUSED_KERNEL, 0, 0, 0, 0)
FUSED_KERNELS(2, 2, FUSED_KERNEL, 0, 0, 0, 0)
FUSED_KERNELS(4, 4, FUSED_KERNEL, 0, 0, 0, 0)

// The low-rank products of draft tokens with A [R, ...] that the kernels above continue.
#if ADAPTED
#define LOW_RANK_KERNELS(NT)                                                                                           \
  FUSED_KERNEL fused_low_rank_qkv_##NT(const bf16 *lora_a, const bf16 *x, const bf16 *norm, const int *adapted,        \
                                       bf16 *low_rank, int num_tokens) {                                               \
    fused_product<NT, LOW_RANK, true, HIDDEN, QKV_RANK>(lora_a, x, norm, 0, low_rank, num_tokens, {adapted, 0, 0, 0}); \
  }                                                                                                                    \
  FUSED_KERNEL fused_low_rank_output_##NT(const bf16 *lora_a, const bf16 *attn_out, const int *adapted,                \
                                          bf16 *low_rank, int num_tokens) {                                            \
    fused_product<NT, LOW_RANK, false, HEADS * HEAD_DIM, OUTPUT_RANK>(lora_a, attn_out, 0, 0, low_rank, num_tokens,    \
                                                                      {adapted, 0, 0, 0});                             \
  }                                                                                                                    \
  FUSED_KERNEL fused_low_rank_gate_up_##NT(const bf16 *lora_a, const bf16 *x, const bf16 *norm, const int *adapted,    \
                                           bf16 *low_rank, int num_tokens) {                                           \
    fused_product<NT, LOW_RANK, true, HIDDEN, GATE_UP_RANK>(lora_a, x, norm, 0, low_rank, num_tokens,                  \
                                                            {adapted, 0, 0, 0});                                       \
  }                                                                                                                    \
  FUSED_KERNEL fused_low_rank_down_##NT(const bf16 *lora_a, const bf16 *inner, const int *adapted,                     \
                                        bf16 *low_rank, int num_tokens) {                                              \
    fused_product<NT, LOW_RANK, false, FFN, DOWN_RANK>(lora_a, inner, 0, 0, low_rank, num_tokens, {adapted, 0, 0, 0}); \
  }
FUSED_KERNELS(adapted_1, 1, ADAPTED_GATE_UP_KERNEL, QKV_RANK, OUTPUT_RANK, GATE_UP_RANK, DOWN_RANK)
FUSED_KERNELS(adapted_2, 2, ADAPTED_GATE_UP_KERNEL, QKV_RANK, OUTPUT_RANK, GATE_UP_RANK, DOWN_RANK)
FUSED_KERNELS(adapted_4, 4, ADAPTED_GATE_UP_KERNEL, QKV_RANK, OUTPUT_RANK, GATE_UP_RANK, DOWN_RANK)
#if !IN_CLUSTERS
LOW_RANK_KERNELS(1)
LOW_RANK_KERNELS(2)
LOW_RANK_KERNELS(4)
#endif
#endif

// The next tokens of x [T, HIDDEN]. argmax_of_blocks finishes fused_sample, and candidates_of_blocks
// finishes fused_candidates.
#define SAMPLE_KERNELS(NT)                                                                                             \
  FUSED_KERNEL fused_sample_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm, float *best, int *best_id,       \
                                 int num_tokens, const int *inverse_temperatures, const u64 *keys) {                   \
    fused_product<NT, ARGMAX, true, HIDDEN, VOCAB>(weight, x, norm, 0, 0, num_tokens, {}, {},                          \
                                                   {inverse_temperatures, keys, best, best_id, 0, 0});                 \
  }                                                                                                                    \
  FUSED_KERNEL fused_candidates_##NT(const bf16 *weight, const bf16 *x, const bf16 *norm,                              \
                                     float *best, float *sums, float *scores,                                          \
                                     int num_tokens, const int *inverse_temperatures, const u64 *keys) {               \
    fused_product<NT, CANDIDATES, true, HIDDEN, VOCAB>(weight, x, norm, 0, 0, num_tokens, {}, {},                      \
                                                       {inverse_temperatures, keys, best, 0, sums, scores});           \
  }
SAMPLE_KERNELS(1)
SAMPLE_KERNELS(2)
SAMPLE_KERNELS(4)

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
      pairs[j] = scale_pair(pairs[j], scale, scales[j]);
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

// Sets the logits of a token to -INFINITY outside the nucleus: the likeliest tokens whose probabilities
// sum to top_p (Holtzman et al. 2019). Equal logits are in it or not together. Rows of logits, `pitch`
// apart, hold the whole vocabulary; those with a top_p of 1 stay as they are. One block per token.
extern "C" __global__ void __launch_bounds__(NUCLEUS_THREADS)
    keep_nucleus(float *logits, int pitch, const int *inverse_temperatures, const int *top_ps) {
  __shared__ u32 max_ranks[NUCLEUS_THREADS / 32];
  let_successor_start();
  wait_for_predecessor();
  const float top_p = __int_as_float(top_ps[blockIdx.x]);
  if (top_p >= 1.f) return;
  const float inverse_temperature = __int_as_float(inverse_temperatures[blockIdx.x]);
  float *row = logits + (size_t)blockIdx.x * pitch;
  u32 max_rank = 0;
  for (int i = threadIdx.x; i < VOCAB; i += NUCLEUS_THREADS) max_rank = max(max_rank, rank_of(row[i]));
  max_rank = __reduce_max_sync(0xffffffffu, max_rank);
  if (threadIdx.x % 32 == 0) max_ranks[threadIdx.x / 32] = max_rank;
  __syncthreads();
  for (int w = 0; w < NUCLEUS_THREADS / 32; w++) max_rank = max(max_rank, max_ranks[w]);
  const float max_logit = score_of(max_rank);

  // The sum of the weights of all tokens of at least a rank falls as the rank rises, so bisection finds
  // the highest one whose tokens have enough.
  const auto weights_from = [&](u32 rank) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < VOCAB; i += NUCLEUS_THREADS)
      if (rank_of(row[i]) >= rank) sum += __expf((row[i] - max_logit) * inverse_temperature);
    return block_sum(sum);
  };
  const float needed = top_p * weights_from(0);
  u32 enough = 0, too_high = max_rank + 1;
  while (too_high - enough > 1) {
    const u32 middle = enough + (too_high - enough) / 2;
    if (weights_from(middle) >= needed)
      enough = middle;
    else
      too_high = middle;
  }
  for (int i = threadIdx.x; i < VOCAB; i += NUCLEUS_THREADS)
    if (rank_of(row[i]) < enough) row[i] = -INFINITY;
}

// The best score and its token in each segment, written to best and best_id [T, NUM_SEGMENTS].
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    sample_segments(const float *logits, int pitch, int first_segment, const int *inverse_temperatures, const u64 *keys,
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
  const float inverse_temperature = __int_as_float(inverse_temperatures[blockIdx.x]);
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
    candidates_of_segments(const float *logits, int pitch, int first_segment, const int *inverse_temperatures,
                           const u64 *keys, float *best, float *sums, float *scores, int *ids) {
  __shared__ int winners[MAX_CANDIDATES], winner_ids[MAX_CANDIDATES][32];
  __shared__ float winner_scores[MAX_CANDIDATES][32];
  let_successor_start();
  wait_for_predecessor();
  const SegmentLogits x(logits, pitch, first_segment);
  static_assert(x.LENGTH == 32, "a lane for each score of a thread");
  const float inverse_temperature = __int_as_float(inverse_temperatures[blockIdx.x]);
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

// Neighbouring lanes that rotate a head together: each takes 8 numbers of its first half and those
// of its second half that they are rotated with. A power of two, so some lanes may have nothing.
#define HEAD_LANES (HALF <= 16 ? 2 : HALF <= 32 ? 4 : HALF <= 64 ? 8 : 16)

// Rotates a head, after its RMS norm if the model has one (Qwen3). All lanes of a warp take part;
// those with `to` = 0 write nothing.
__device__ __forceinline__ void rotate_head(const bf16 *from, bf16 *to, const bf16 *norm, const float *cosine,
                                            const float *sine) {
  const int piece = threadIdx.x % HEAD_LANES;
  const bool exists = piece < HALF / 8;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  uint4 first = exists ? ((const uint4 *)from)[piece] : zero, second = exists ? ((const uint4 *)(from + HALF))[piece] : zero;
  u32 *firsts = (u32 *)&first, *seconds = (u32 *)&second;
  if (QK_NORM) {
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      square += low_to_f32(firsts[i]) * low_to_f32(firsts[i]) + high_to_f32(firsts[i]) * high_to_f32(firsts[i]);
      square += low_to_f32(seconds[i]) * low_to_f32(seconds[i]) + high_to_f32(seconds[i]) * high_to_f32(seconds[i]);
    }
    for (int step = HEAD_LANES / 2; step > 0; step >>= 1) square += __shfl_xor_sync(0xffffffffu, square, step);
    const float scale = rsqrtf(square / HEAD_DIM + EPS);
    if (exists) {
      const uint4 first_norm = ((const uint4 *)norm)[piece], second_norm = ((const uint4 *)(norm + HALF))[piece];
      const u32 *first_norms = (const u32 *)&first_norm, *second_norms = (const u32 *)&second_norm;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        firsts[i] = scale_pair(firsts[i], scale, first_norms[i]);
        seconds[i] = scale_pair(seconds[i], scale, second_norms[i]);
      }
    }
  }
  if (!exists || !to) return;
  float cosines[8], sines[8];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    ((float4 *)cosines)[i] = ((const float4 *)cosine)[piece * 2 + i];
    ((float4 *)sines)[i] = ((const float4 *)sine)[piece * 2 + i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float x = low_to_f32(firsts[i]), y = low_to_f32(seconds[i]);
    const float z = high_to_f32(firsts[i]), w = high_to_f32(seconds[i]);
    const float *c = cosines + 2 * i, *s = sines + 2 * i;
    firsts[i] = pack_bf16(x * c[0] - y * s[0], z * c[1] - w * s[1]);
    seconds[i] = pack_bf16(y * c[0] + x * s[0], w * c[1] + z * s[1]);
  }
  ((uint4 *)to)[piece] = first, ((uint4 *)(to + HALF))[piece] = second;
}

// Stores 8 numbers of a value into the cache.
__device__ __forceinline__ void store_value(const bf16 *from, const Cache &cache, int row, int head, int slot, int piece) {
  const uint4 x = ((const uint4 *)from)[piece];
  bf16 *to = cache.value(row, head, piece * 8) + slot;
#pragma unroll
  for (int i = 0; i < 8; i++) to[(size_t)i * cache.capacity] = ((const bf16 *)&x)[i];
}

// Rotates queries in place, and puts rotated keys and values into the cache. Grid: (blocks of
// ROTATE_TOKENS tokens, heads of queries, keys and values).
extern "C" __global__ void rotate_and_cache(bf16 *qkv,
                                            const int *row, const int *slot, const int *position, const u64 *visible,
                                            const float *cosines, const float *sines,
                                            const bf16 *query_norm, const bf16 *key_norm,
                                            bf16 *keys, bf16 *values, int capacity, int num_tokens) {
  const Cache cache = {keys, values, capacity};
  let_successor_start();
  const int first = blockIdx.x * ROTATE_TOKENS, count = min(num_tokens - first, ROTATE_TOKENS), head = blockIdx.y;
  bf16 *x = qkv + (size_t)first * QKV + head * HEAD_DIM;
  wait_for_predecessor();
  if (head >= HEADS + KV_HEADS) {
    // Neighbouring threads have neighbouring slots, so that they write to the same cache lines.
    for (int i = threadIdx.x; i < count * (HEAD_DIM / 8); i += blockDim.x) {
      const int token = i % count;
      if (row[first + token] >= 0)
        store_value(x + (size_t)token * QKV, cache, row[first + token], head - HEADS - KV_HEADS, slot[first + token],
                    i / count);
    }
    return;
  }
  constexpr int HEADS_OF_WARP = 32 / HEAD_LANES;
  for (int base = (threadIdx.x >> 5) * HEADS_OF_WARP; base < count; base += (blockDim.x >> 5) * HEADS_OF_WARP) {
    const int own = base + (threadIdx.x & 31) / HEAD_LANES, token = min(own, count - 1);
    const int cache_row = row[first + token];
    bf16 *from = x + (size_t)token * QKV;
    bf16 *to = own >= count || cache_row < 0 ? 0
               : head < HEADS                ? from
                                             : cache.key(cache_row, head - HEADS, slot[first + token]);
    const size_t angles = (size_t)position[first + token] * HALF;
    rotate_head(from, to, head < HEADS ? query_norm : key_norm, cosines + angles, sines + angles);
  }
}

// The slots that a token attends to.
struct VisibleSlots {
  int first, window;
  u32 count;   // from `first` up to the token's own
  u64 within;  // bit i: the slot i of the window
  __device__ __forceinline__ bool contains(int slot) const {
    const int offset = slot - window;
    return (u32)(slot - first) < count && (offset < 0 || offset >= 64 || ((within >> offset) & 1));
  }
};

// In a tree, the slot of a token says too little about its distance: it may be larger than its
// position.
__device__ __forceinline__ VisibleSlots visible_slots(const Tokens &tokens, int window_token, int window, int token,
                                                      int max_distance) {
  const int position = tokens.position[token], first = max(position - max_distance, 0);
  VisibleSlots slots = {first, window, (u32)(tokens.slot[token] + 1 - first), tokens.visible[token]};
  if (max_distance >= 64) return slots;
#pragma unroll 1
  for (int i = 0; i < min(token + 1 - window_token, 64); i++)
    if (position - tokens.position[window_token + i] > max_distance) slots.within &= ~(1ull << i);
  return slots;
}

// 2^x, or 0 if that would be denormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Thread block clusters: blocks that run at the same time and read each other's shared memory. GPUs
// before Hopper have none; there each block is alone.
// What another block of the cluster has at the address of a number in shared memory.
__device__ __forceinline__ float load_from_block(int rank, const float *own) {
  float x = 0.f;
#if __CUDA_ARCH__ >= 900
  u32 address = (u32)__cvta_generic_to_shared(own);
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
#endif
  return x;
}

// A part of softmax(q k^T) v for one query vector, over some of the slots: the sum of values that is
// not divided yet (each lane of a warp has HEAD_DIM / 32 numbers), the maximum of the scores, and
// the sum of the weights relative to it. In memory it is a line of HEAD_DIM + 2 numbers.
#define LINE (HEAD_DIM + SUMS_PAD)
struct Partial {
  float sums[HEAD_DIM / 32], max, weights;
};

// Merges `count` parts in this order. load(i, d) is number d of the line of part i.
template <typename Load>
__device__ __forceinline__ Partial merge(int count, Load load) {
  const int lane = threadIdx.x & 31;
  Partial all = {{}, -INFINITY, 0.f};
  for (int i = 0; i < count; i++) all.max = fmaxf(all.max, load(i, HEAD_DIM));
  const float shift = all.max == -INFINITY ? 0.f : all.max;
#pragma unroll 4
  for (int i = 0; i < count; i++) {
    const float factor = exp2_approx(load(i, HEAD_DIM) - shift);
    all.weights += factor * load(i, HEAD_DIM + 1);
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 32; d++) all.sums[d] += factor * load(i, d * 32 + lane);
  }
  return all;
}

// Keys [32 slots, HEAD_DIM] or values [HEAD_DIM, 32 slots] of a chunk, in pieces of 16 bytes.
#define ITEM_PIECES (4 * HEAD_DIM)

// Where a piece of a slot's key is in shared memory: rows of a multiple of 128 bytes swap their
// halves of 64 in every other row, so that threads that read two rows read from different banks.
__device__ __forceinline__ int key_piece(int slot, int piece) {
  return slot * (HEAD_DIM / 8) + (HEAD_DIM % 64 == 0 ? piece ^ (slot & 1) * 4 : piece);
}

// Copies an item to shared memory: the pieces from `first` on in steps of `step`.
__device__ __forceinline__ void copy_keys(uint4 *to, const bf16 *from, int first, int step) {
#pragma unroll 4
  for (int i = first; i < ITEM_PIECES; i += step)
    cp_async_16(to + key_piece(i / (HEAD_DIM / 8), i % (HEAD_DIM / 8)), (const uint4 *)from + i);
}
__device__ __forceinline__ void copy_values(uint4 *to, const bf16 *from, int capacity, int first, int step) {
#pragma unroll 4
  for (int i = first; i < ITEM_PIECES; i += step)
    cp_async_16(to + i, (const uint4 *)(from + (size_t)(i / 4) * capacity) + i % 4);
}

// Warps wait for those that share their ring.
__device__ __forceinline__ void ring_barrier(int ring, int num_warps) {
  if (num_warps == 1)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(ring + 1), "r"(num_warps * 32) : "memory");
}

// Scores of 16 query vectors with 32 slots become weights: s[j][2 r + i] is that of row g + 8 r and
// slot 8 t + 2 j + i. Returns what earlier sums shrink by, since weights are relative to the largest
// score so far.
__device__ __forceinline__ float2 weigh(float (&s)[4][4], float scale, float (&row_max)[2], float (&weight_sum)[2]) {
  float shrink[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float max = row_max[r];
#pragma unroll
    for (int j = 0; j < 4; j++) max = fmaxf(max, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    max = quad_max(max);
    const float shift = max == -INFINITY ? 0.f : max * scale;
    shrink[r] = exp2_approx(row_max[r] * scale - shift);
    row_max[r] = max;
    weight_sum[r] *= shrink[r];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float &value = s[j][2 * r + i];
        value = exp2_approx(value * scale - shift);
        weight_sum[r] += value;
      }
  }
  return make_float2(shrink[0], shrink[1]);
}

// out[token, head] = softmax(q k^T / sqrt(HEAD_DIM)) v over the slots that the token attends to:
// all slots before its window, and the slots of the window up to its own whose bit is set in
// `visible` (bit i is the slot i after the window's start; slots 64 or more after it always count).
// Of these, only the tokens at the last `max_distance` + 1 positions up to its own: the sliding
// window of the layer, if it has one. Grid: (tiles * blocks of a cluster, KV_HEADS).
//
// A tile has GROUP * length query vectors (the query heads that share its head of keys, for each of
// its tokens). They are split into groups of 16, no more than there are warps. The slots are split
// over the blocks of a cluster, then over the warps of a group, in chunks of 32. Short contexts leave
// blocks of the cluster without work.
//
// Warps of different groups with the same chunks share a ring in shared memory, which keys and
// values enter ahead of their use: those before the window even before the predecessor ends.
//
// ROTATE, for small steps, does the work of rotate_and_cache too, which saves a kernel. Each tile
// caches the keys and values of its window up to its end, so tiles of the same window write the same
// values.
template <int NUM_WARPS, bool ROTATE>
__device__ __forceinline__ void attend(const bf16 *qkv, const Tokens &tokens, const Tiles &tiles, const Rope &rope,
                                       const QkNorm &norm, const Cache &cache, int max_distance, bf16 *out) {
  static_assert(WARP_QUERIES == 16, "the rows of one mma");
  static_assert(SLOTS_PER_READ == 32, "the slots of a chunk");
  static_assert(WARP_BYTES >= 16 * RING_DEPTH * ITEM_PIECES && WARP_BYTES >= 16 * LINE * 4, "the host reserves this");
  // The rings, whose memory holds lines of parts at the end; for ROTATE then the queries [16
  // groups][HEAD_DIM + QUERY_PAD].
  extern __shared__ uint4 rings[];
  float *lines = (float *)rings;
  bf16 *queries = (bf16 *)((char *)rings + NUM_WARPS * WARP_BYTES);
  constexpr int PITCH = HEAD_DIM + QUERY_PAD;
  let_successor_start();
  // Tiles and slots are the step's input, so they do not wait for the predecessor; nor do keys and
  // values of earlier steps.
  const int tile = blockIdx.x / cluster_blocks(), rank = cluster_rank(), key_head = blockIdx.y;
  const int cache_row = tiles.row[tile];
  if (cache_row < 0) return;
  const int first = tiles.first_token[tile], length = tiles.length[tile], window = tiles.window[tile];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int count = length * GROUP, groups = (count + 15) / 16;
  const int last_slot = tokens.slot[first + length - 1];
  const int window_token = first - (tokens.slot[first] - window);  // the first token of the window
  // No position is larger than its slot, so the tile attends to nothing in the chunks before this.
  int first_position = 0x7fffffff;
  for (int i = lane; i < length; i += 32) first_position = min(first_position, tokens.position[first + i]);
  for (int step = 16; step > 0; step >>= 1)
    first_position = min(first_position, __shfl_xor_sync(0xffffffffu, first_position, step));
  int first_chunk = max(first_position - max_distance, 0) / 32, num_chunks = last_slot / 32 + 1 - first_chunk;
  // The blocks that have chunks, and the share of this one.
  const int max_splits = NUM_WARPS / groups;
  const int blocks = min(cluster_blocks(), (num_chunks * groups + BLOCK_WORK - 1) / BLOCK_WORK);
  if (rank >= blocks) return;
  const int end_chunk = first_chunk + num_chunks * (rank + 1) / blocks;
  first_chunk += num_chunks * rank / blocks, num_chunks = end_chunk - first_chunk;
  const int splits = min(max_splits, num_chunks);
  const int group = warp % groups, split = warp / groups;

  // Item 2 i of a ring is the keys of the split's chunk i, and item 2 i + 1 the values.
  const int depth = splits * 2 <= NUM_WARPS ? 2 * RING_DEPTH : RING_DEPTH;
  const int num_items = split < splits ? (num_chunks - split + splits - 1) / splits * 2 : 0;
  uint4 *ring = rings + split * depth * ITEM_PIECES;
  const bf16 *k = cache.key(cache_row, key_head, 0), *v = cache.value(cache_row, key_head, 0);
  auto copy = [&](int item) {
    if (item < num_items) {
      uint4 *to = ring + item % depth * ITEM_PIECES;
      const int chunk = first_chunk + split + item / 2 * splits;
      if (item % 2 == 0)
        copy_keys(to, k + (size_t)chunk * 32 * HEAD_DIM, group * 32 + lane, groups * 32);
      else
        copy_values(to, v + chunk * 32, cache.capacity, group * 32 + lane, groups * 32);
    }
    cp_async_commit();
  };
  int copied = 0;
  for (; copied < depth && (first_chunk + split + copied / 2 * splits + 1) * 32 <= window; copied++) copy(copied);
  wait_for_predecessor();

  if (ROTATE) {
    // The slots of the window in this block's chunks.
    const int start = max(window, first_chunk * 32), fresh = max(min(last_slot + 1, end_chunk * 32) - start, 0);
    const int fresh_token = window_token + start - window;
    constexpr int HEADS_OF_WARP = 32 / HEAD_LANES;
    for (int base = warp * HEADS_OF_WARP; base < fresh + count; base += NUM_WARPS * HEADS_OF_WARP) {
      const int item = base + lane / HEAD_LANES, m = min(item - fresh, count - 1);
      const bool is_key = item < fresh;
      const int token = is_key ? fresh_token + item : first + m / GROUP;
      const int head = is_key ? HEADS + key_head : key_head * GROUP + m % GROUP;
      bf16 *to = is_key                  ? cache.key(cache_row, key_head, start + item)
                 : item < fresh + count ? queries + m * PITCH
                                        : 0;
      const size_t angles = (size_t)tokens.position[token] * HALF;
      rotate_head(qkv + (size_t)token * QKV + head * HEAD_DIM, to, is_key ? norm.key : norm.query, rope.cosines + angles,
                  rope.sines + angles);
    }
    for (int i = threadIdx.x; i < fresh * (HEAD_DIM / 8); i += NUM_WARPS * 32)
      store_value(qkv + (size_t)(fresh_token + i % fresh) * QKV + (HEADS + KV_HEADS + key_head) * HEAD_DIM, cache,
                  cache_row, key_head, start + i % fresh, i / fresh);
    __syncthreads();
  }
  for (; copied < depth; copied++) copy(copied);
  auto wait_for_copy = [&] {
    if (depth == RING_DEPTH)
      cp_async_wait<RING_DEPTH - 1>();
    else
      cp_async_wait<2 * RING_DEPTH - 1>();
    ring_barrier(split, groups);
  };

  const float scale = rsqrtf((float)HEAD_DIM) * 1.44269504f;  // log2(e): weights are computed with exp2
  float o[HEAD_DIM / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, weight_sum[2] = {0.f, 0.f};
  uint4 q[2][CHUNKS];
  VisibleSlots visible[2];
  if (split < splits) {
    for (int r = 0; r < 2; r++) {
      int m = group * 16 + g + 8 * r;
      bool exists = m < count;
      int token = first + (exists ? m / GROUP : 0), head = key_head * GROUP + (exists ? m % GROUP : 0);
      const bf16 *vector = ROTATE ? queries + (exists ? m : 0) * PITCH : qkv + (size_t)token * QKV + head * HEAD_DIM;
      for (int c = 0; c < CHUNKS; c++) q[r][c] = ((const uint4 *)vector)[c * 4 + t];
      visible[r] = visible_slots(tokens, window_token, window, token, max_distance);
    }
    // All tokens of the tile attend to all slots of the chunks from first_clear to end_clear.
    const int first_clear = (max(last_slot - max_distance, 0) + 31) / 32, end_clear = window / 32;
    for (int item = 0; item < num_items; item += 2) {
      const int chunk = first_chunk + split + item / 2 * splits;
      float s[4][4] = {};
      wait_for_copy();
      const uint4 *keys = ring + item % depth * ITEM_PIECES;
      // Keys are assigned to the columns of product j so that a thread's scores belong to 8
      // neighbouring keys.
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int key = 8 * (g >> 1) + 2 * j + (g & 1);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) mma_chunk(s[j], q[0][c], q[1][c], keys[key_piece(key, c * 4 + t)]);
      }
      ring_barrier(split, groups);
      copy(item + depth);
      if (chunk < first_clear || chunk >= end_clear) {
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (!visible[i / 2].contains(chunk * 32 + 8 * t + 2 * j + i % 2)) s[j][i] = -INFINITY;
      }
      const float2 shrink = weigh(s, scale, row_max, weight_sum);
      if (__any_sync(0xffffffffu, shrink.x != 1.f || shrink.y != 1.f)) {
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
          o[d][0] *= shrink.x, o[d][1] *= shrink.x, o[d][2] *= shrink.y, o[d][3] *= shrink.y;
      }
      u32 p[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++) p[j][0] = pack_bf16(s[j][0], s[j][1]), p[j][1] = pack_bf16(s[j][2], s[j][3]);
      wait_for_copy();
      const uint4 *values = ring + (item + 1) % depth * ITEM_PIECES;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; d++) {
        uint4 x = values[(d * 8 + g) * 4 + t];
        mma(o[d], p[0][0], p[0][1], p[1][0], p[1][1], x.x, x.y);
        mma(o[d], p[2][0], p[2][1], p[3][0], p[3][1], x.z, x.w);
      }
      ring_barrier(split, groups);
      copy(item + 1 + depth);
    }
    for (int r = 0; r < 2; r++) weight_sum[r] = quad_sum(weight_sum[r]);
  }
  // The rings are done with.
  __syncthreads();
  if (split < splits)
    for (int r = 0; r < 2; r++) {
      if (group * 16 + g + 8 * r >= count) continue;
      float *line = lines + (warp * 16 + g + 8 * r) * LINE;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; d++)
        *(float2 *)(line + d * 8 + 2 * t) = make_float2(o[d][2 * r], o[d][2 * r + 1]);
      if (t == 0) line[HEAD_DIM] = row_max[r] * scale, line[HEAD_DIM + 1] = weight_sum[r];
    }
  __syncthreads();

  auto store = [&](int m, const Partial &all) {
    bf16 *to = out + ((size_t)(first + m / GROUP) * HEADS + key_head * GROUP + m % GROUP) * HEAD_DIM;
    for (int d = 0; d < HEAD_DIM / 32; d++) to[d * 32 + lane] = f32_to_bf16(all.sums[d] / all.weights);
  };
  // One warp merges the splits of a query vector.
  for (int m = warp; m < (splits == 1 && blocks > 1 ? 0 : count); m += NUM_WARPS) {
    float *line = lines + m * LINE;
    const Partial all = merge(splits, [&](int i, int d) { return line[i * groups * 16 * LINE + d]; });
    if (blocks == 1) {
      store(m, all);
      continue;
    }
    __syncwarp();
    for (int d = 0; d < HEAD_DIM / 32; d++) line[d * 32 + lane] = all.sums[d];
    if (lane == 0) line[HEAD_DIM] = all.max, line[HEAD_DIM + 1] = all.weights;
  }
  if (blocks == 1) return;
  cluster_barrier();
  for (int m = rank * NUM_WARPS + warp; m < count; m += blocks * NUM_WARPS)
    store(m, merge(blocks, [&](int i, int d) { return load_from_block(i, lines + m * LINE + d); }));
  // The others may still read this block's shared memory.
  cluster_barrier();
}

// Attention for queries that are rotated already, with all keys and values in the cache, and with
// ROTATE. For few tiles, blocks have many warps and form clusters; for many, blocks are so small that
// several share a multiprocessor, and wait for memory in turn.
#define ATTENTION_KERNELS(NT, NUM_WARPS, MIN_BLOCKS)                                                                   \
  extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_BLOCKS)                                             \
  attention_##NT(const bf16 *qkv,                                                                                      \
                 const int *row, const int *slot, const int *position, const u64 *visible,                             \
                 const int *tile_row, const int *tile_first_token, const int *tile_length, const int *tile_window,     \
                 const float *cosines, const float *sines, const bf16 *query_norm, const bf16 *key_norm,               \
                 bf16 *keys, bf16 *values, int capacity, int max_distance, bf16 *attn_out) {                           \
    attend<NUM_WARPS, false>(qkv, {row, slot, position, visible},                                                      \
                             {tile_row, tile_first_token, tile_length, tile_window}, {cosines, sines},                 \
                             {query_norm, key_norm}, {keys, values, capacity}, max_distance, attn_out);                \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_BLOCKS)                                             \
  rotate_and_attend_##NT(const bf16 *qkv,                                                                              \
                         const int *row, const int *slot, const int *position, const u64 *visible,                     \
                         const int *tile_row, const int *tile_first_token, const int *tile_length,                     \
                         const int *tile_window,                                                                       \
                         const float *cosines, const float *sines, const bf16 *query_norm, const bf16 *key_norm,       \
                         bf16 *keys, bf16 *values, int capacity, int max_distance, bf16 *attn_out) {                   \
    attend<NUM_WARPS, true>(qkv, {row, slot, position, visible},                                                       \
                            {tile_row, tile_first_token, tile_length, tile_window}, {cosines, sines},                  \
                            {query_norm, key_norm}, {keys, values, capacity}, max_distance, attn_out);                 \
  }
ATTENTION_KERNELS(few, ATTENTION_WARPS, 1)
ATTENTION_KERNELS(many, BATCH_WARPS, BATCH_BLOCKS)
