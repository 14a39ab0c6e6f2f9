// Matrix products of many tokens on Hopper with what follows them in the same kernel, so that the
// product itself is never written to memory.
//
// A block stays on its multiprocessor and computes one tile of the product after the other. One of
// its threads copies chunks of 64 columns of tokens and weights into a ring of shared memory with
// the copy engine (TMA). Two warpgroups multiply 64 tokens each by 256 rows of the weight.
#define TILE_TOKENS 128
#define BATCH_THREADS 384
#define STAGES 4
#define HALF_BYTES (128 * 128)  // a chunk of 128 tokens, or of half of the tile's rows
#define STAGE_BYTES (3 * HALF_BYTES)
#define CEIL(a, b) (((a) + (b) - 1) / (b))

// sum += a [64 tokens, 16] times b [128 rows, 16] transposed.
__device__ __forceinline__ void multiply_half(float (&sum)[64], u64 a, u64 b) {
  asm volatile(WGMMA(128) "%64, %65, 1, 1, 1, 0, 0;" : VALUES_128(sum) : "l"(a), "l"(b));
}

// A product that continues another: low_rank [num_tokens, rank] times lora_b [rows, rank] transposed.
struct Adapters {
  const TensorMap *low_rank, *lora_b;
  int rank;
};

// The product of tokens [num_tokens, k] and a weight [rows, k] transposed, and of adapters. Half h of tile i of the
// weight is its 128 rows from first_row(i, h) on. Calls finish(sum, token, i) for each tile, where
// sum[h][4 j + 2 r + c] belongs to token + 8 r and to row 8 j + threadIdx.x % 4 * 2 + c of half h.
template <typename Row, typename Finish>
__device__ __forceinline__ void for_tiles(const TensorMap &tokens, const TensorMap &weight, int num_tokens, int k,
                                          const Adapters &adapters, int row_tiles, u32 base, Row first_row,
                                          Finish finish) {
  const u32 barriers = base + STAGES * STAGE_BYTES;
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) barrier_init(barriers + i * 16, 1), barrier_init(barriers + i * 16 + 8, 8);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  let_successor_start();
  const int token_tiles = CEIL(num_tokens, TILE_TOKENS), tiles = token_tiles * row_tiles;
  const int own_chunks = CEIL(k, 64), chunks = own_chunks + CEIL(adapters.rank, 64);
  int stage = 0, parity = 0;
  auto advance = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };
  if (threadIdx.x >= 256) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != 256) return;
    wait_for_predecessor();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
      for (int chunk = 0; chunk < chunks; chunk++, advance()) {
        const u32 full = barriers + stage * 16, to = base + stage * STAGE_BYTES;
        barrier_wait(full + 8, parity ^ 1);
        barrier_expect(full, STAGE_BYTES);
        const bool is_own = chunk < own_chunks;
        const int column = (is_own ? chunk : chunk - own_chunks) * 64;
        copy_panel(to, is_own ? tokens : *adapters.low_rank, column, 0, tile % token_tiles * TILE_TOKENS, full);
#pragma unroll
        for (int half = 0; half < 2; half++)
          copy_panel(to + (half + 1) * HALF_BYTES, is_own ? weight : *adapters.lora_b, column, 0,
                     first_row(tile / token_tiles, half), full);
      }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  wait_for_predecessor();
  const int warpgroup = threadIdx.x / 128;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sum[2][64] = {};
    u32 used = 0;
    for (int chunk = 0; chunk < chunks; chunk++, advance()) {
      const u32 full = barriers + stage * 16, at = base + stage * STAGE_BYTES;
      barrier_wait(full, parity);
      settle(sum[0]), settle(sum[1]);
      begin_products();
      const u64 a = descriptor<16>(at + warpgroup * HALF_BYTES / 2), b = descriptor<16>(at + HALF_BYTES);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        multiply_half(sum[0], a + i * 2, b + i * 2);
        multiply_half(sum[1], a + i * 2, b + i * 2 + HALF_BYTES / 16);
      }
      end_group();
      wait_groups<1>();
      if (used) barrier_arrive(used);
      used = full + 8;
    }
    wait_groups<0>();
    settle(sum[0]), settle(sum[1]);
    barrier_arrive(used);
    finish(sum, tile % token_tiles * TILE_TOKENS + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, tile / token_tiles);
  }
}

// The first multiple of 1,024 bytes in shared memory, as swizzled tiles need.
__device__ __forceinline__ u32 aligned_memory() {
  extern __shared__ uint4 memory[];
  return ((u32)__cvta_generic_to_shared(memory) + 1023) / 1024 * 1024;
}

__device__ __forceinline__ void warpgroup_barrier() {
  asm volatile("bar.sync %0, 128;" ::"r"((int)threadIdx.x / 128 + 1) : "memory");
}

// A division that rounds twice is as good as an exact one before the result is rounded to bf16.
__device__ __forceinline__ float fast_silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Stores four matrices of 8 x 8 bf16 in shared memory; each group of 8 lanes gives the addresses of
// the rows of one.
__device__ __forceinline__ void store_matrices(u32 row, const u32 (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(pairs[0]),
               "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

__device__ __forceinline__ void write_tile(const TensorMap &to, int column, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&to),
               "r"(column), "r"(0), "r"(row), "r"(from)
               : "memory");
}

// inner [T, FFN] = silu(gate) * up of normed [T, HIDDEN], with adapters if their rank is not 0. A tile has 128 columns of both. A warpgroup
// collects its 64 tokens in shared memory, in two panels of 64 columns, which the copy engine writes.
extern "C" __global__ void __launch_bounds__(BATCH_THREADS)
    batch_gate_up(const __grid_constant__ TensorMap normed, const __grid_constant__ TensorMap weight,
                  const __grid_constant__ TensorMap inner, const __grid_constant__ TensorMap low_rank,
                  const __grid_constant__ TensorMap lora_b, int num_tokens, int rank) {
  const u32 base = aligned_memory();
  const u32 panels = base + STAGES * STAGE_BYTES + 1024 + threadIdx.x / 128 * HALF_BYTES;
  const bool writes = threadIdx.x % 128 == 0;
  auto first_row = [](int tile, int half) { return half * FFN + tile * 128; };
  auto finish = [&](const float (&sum)[2][64], int token, int tile) {
    // The copy engine has read the tile before.
    if (writes) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    warpgroup_barrier();
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      // Matrices: 8 columns of 16 tokens, then the next 8 columns.
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float *gate = &sum[0][j * 4 + i * 2], *up = &sum[1][j * 4 + i * 2];
        pairs[i] = pack_bf16(fast_silu(gate[0]) * up[0], fast_silu(gate[1]) * up[1]);
      }
      // The copy engine expects the 8 columns of row r at piece ^ (r % 8).
      const int piece = j + lane / 16;
      store_matrices(panels + piece / 8 * (HALF_BYTES / 2) + row * 128 + (piece ^ row) % 8 * 16, pairs);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warpgroup_barrier();
    if (!writes) return;
    write_tile(inner, tile * 128, token, panels);
    write_tile(inner, tile * 128 + 64, token, panels + HALF_BYTES / 2);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  };
  for_tiles(normed, weight, num_tokens, HIDDEN, {&low_rank, &lora_b, rank}, CEIL(FFN, 128), base, first_row, finish);
  if (writes) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// The largest logit of each token in each tile of 256 tokens of the vocabulary, and which it is: best
// and best_id [T, VOCAB_TILES], for argmax_of_blocks.
#define VOCAB_TILES CEIL(VOCAB, 256)
extern "C" __global__ void __launch_bounds__(BATCH_THREADS)
    batch_argmax(const __grid_constant__ TensorMap normed, const __grid_constant__ TensorMap weight, float *best,
                 int *best_id, int num_tokens) {
  auto first_row = [](int tile, int half) { return tile * 256 + half * 128; };
  auto finish = [&](const float (&sum)[2][64], int token, int tile) {
    const int first_id = tile * 256 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++, token += 8) {
      float top = -INFINITY;
      int top_id = NO_TOKEN;
#pragma unroll
      for (int i = 0; i < 64; i++) {
        const int id = first_id + i / 32 * 128 + i / 2 % 16 * 8 + i % 2;
        const float logit = sum[i / 32][i / 2 % 16 * 4 + r * 2 + i % 2];
        if (logit > top && id < VOCAB) top = logit, top_id = id;
      }
      // Four lanes have the columns of a token.
      warp_argmax(4, top, top_id);
      if (threadIdx.x % 4 != 0 || token >= num_tokens) continue;
      best[(size_t)token * VOCAB_TILES + tile] = top;
      best_id[(size_t)token * VOCAB_TILES + tile] = top_id;
    }
  };
  for_tiles(normed, weight, num_tokens, HIDDEN, {}, VOCAB_TILES, aligned_memory(), first_row, finish);
}
