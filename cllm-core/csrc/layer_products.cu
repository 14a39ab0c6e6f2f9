// The matrix products of a decoding step of up to 64 tokens, for Hopper. One kernel computes all
// products between two attentions: the output projection, the feed-forward layer, and the
// projection of the next layer's queries, keys and values.
//
// The time of a step is that of reading the weights once, so they must never stop flowing. A block
// stays on its multiprocessor and owns a range of rows of each weight. One of its threads copies
// their tiles into a ring of shared memory with the copy engine (TMA). It knows the order of all
// weights, needs no results of the products before, and so runs ahead of them, and of the kernel
// before. Another thread copies the tokens when they are complete. A warpgroup multiplies: tokens
// are the left operand of wgmma, padded to 64 rows of whatever is in memory, since each row of a
// product depends on its own token only.
//
// An RMS norm is a scale for each token and weights for each column. Who writes the residual stream
// x also writes x times the weights of the norm that follows (`scaled`), and sums of its squares.
// Who multiplies `scaled` finishes the norm with the scale.
//
// Adapters for draft tokens add B A x to a product. Some blocks, the last ones first, own rows of A,
// multiply them before their rows of the weight, and write A x, with zeros for tokens that are no
// drafts. It is complete long before the other blocks have multiplied their rows of the weight, whose
// sums then go on with rows of B times A x: no block waits, and sums of other tokens keep their bits.
//
// More macros from the host: MAX_TOKENS; BLOCKS, the number of blocks; SHARED_BYTES, the shared
// memory of a block; QKV_ROWS, HIDDEN_ROWS and FFN_ROWS, the rows of a block (multiples of 8);
// QKV_RANK, OUTPUT_RANK, GATE_UP_RANK and DOWN_RANK, the rows of A (or 0); LOW_RANK, the largest of
// them; ADAPTER_ROWS, the rows of A of a block (a multiple of 8).
#define CONSUMERS 128  // threads that multiply
#define CEIL(a, b) (((a) + (b) - 1) / (b))
#define CHUNK 64  // columns of a tile
// Blocks that have rows of the residual stream.
#define HIDDEN_BLOCKS CEIL(HIDDEN, HIDDEN_ROWS)

enum { OUTPUT, GATE_UP, DOWN, NEXT };

// How a weight [parts * rows, columns] is cut: a block has `own_rows` rows of each part, and copies
// `slot_chunks` tiles of them at a time. `adapter_chunks` more tiles come from B and `low_rank`.
struct Product {
  const TensorMap *weight, *tokens, *lora_b;
  int parts, rows, own_rows, own_chunks, adapter_chunks, slot_chunks;

  __device__ __forceinline__ int chunks() const { return own_chunks + adapter_chunks; }
  __device__ __forceinline__ int blocks() const { return CEIL(rows, own_rows); }
  __device__ __forceinline__ int tile_bytes() const { return parts * own_rows * 128; }
};

// Slots in shared memory, each for tiles of weights and of tokens: `full` when both copies are
// there, `empty` when they have been multiplied.
template <int N>
struct Ring {
  // What most slots could hold. The tiles of narrow weights come several at a time.
  static constexpr int weight_bytes = 24 << 10, max_chunks = N > 32 ? 2 : N > 16 ? 3 : 6;
  static constexpr int token_bytes = max_chunks * N * 128;
  static constexpr int slots = (SHARED_BYTES - 2048) / (weight_bytes + token_bytes);
  u32 memory, barriers;
  int index = 0, parity = 0;

  __device__ __forceinline__ u32 full() const { return barriers + index * 16; }
  __device__ __forceinline__ u32 empty() const { return barriers + index * 16 + 8; }
  // Tokens come first, since the padding of the last ones may be anything but outside memory.
  __device__ __forceinline__ u32 tokens() const { return memory + index * token_bytes; }
  __device__ __forceinline__ u32 weights() const { return memory + slots * token_bytes + index * weight_bytes; }
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < slots; i++) barrier_init(barriers + i * 16, 2), barrier_init(barriers + i * 16 + 8, 4);
  }
  __device__ __forceinline__ void advance() {
    if (++index == slots) index = 0, parity ^= 1;
  }
};

// sums [64 tokens, COLUMNS] += a [64, 16] times b [COLUMNS, 16] transposed.
template <int COLUMNS>
__device__ __forceinline__ void wgmma_rows(float *sums, u64 a, u64 b) {
  constexpr int n = COLUMNS >= 128 ? 128 : COLUMNS >= 64 ? 64 : COLUMNS >= 32 ? 32 : COLUMNS >= 16 ? 16 : 8;
  if constexpr (n == 128) asm volatile(WGMMA(128) "%64, %65, 1, 1, 1, 0, 0;" : VALUES_128(sums) : "l"(a), "l"(b));
  if constexpr (n == 64) asm volatile(WGMMA(64) "%32, %33, 1, 1, 1, 0, 0;" : VALUES_64(sums) : "l"(a), "l"(b));
  if constexpr (n == 32) asm volatile(WGMMA(32) "%16, %17, 1, 1, 1, 0, 0;" : VALUES_32(sums) : "l"(a), "l"(b));
  if constexpr (n == 16) asm volatile(WGMMA(16) "%8, %9, 1, 1, 1, 0, 0;" : VALUES_16(sums) : "l"(a), "l"(b));
  if constexpr (n == 8) asm volatile(WGMMA(8) "%4, %5, 1, 1, 1, 0, 0;" : VALUES_8(sums) : "l"(a), "l"(b));
  if constexpr (COLUMNS > n) wgmma_rows<COLUMNS - n>(sums + n / 2, a, b + n * 128 / 16);
}

// Multiplies all tokens by the block's rows of a weight.
template <int N, int COLUMNS>
__device__ __forceinline__ void multiply(float (&sums)[COLUMNS / 2], const Product &product, Ring<N> &ring) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0.f;
  u32 used = 0;
  for (int left = product.chunks(); left > 0; left -= product.slot_chunks, ring.advance()) {
    barrier_wait(ring.full(), ring.parity);
    for (int chunk = 0; chunk < min(left, product.slot_chunks); chunk++) {
      settle(sums);
      begin_products();
      const u64 a = descriptor<16>(ring.tokens() + chunk * N * 128);
      const u64 b = descriptor<16>(ring.weights() + chunk * COLUMNS * 128);
#pragma unroll
      for (int k = 0; k < CHUNK / 16; k++) wgmma_rows<COLUMNS>(sums, a + k * 2, b + k * 2);
      end_group();
    }
    wait_groups<1>();
    if (used) barrier_arrive(used);
    used = ring.empty();
  }
  wait_groups<0>();
  settle(sums);
  barrier_arrive(used);
}

// Counts of blocks that have finished a product.
__device__ __forceinline__ void add_release(int *count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ __forceinline__ void wait_for_count(const int *count, int expected) {
  int value;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
  while (value != expected);
}

// Calls finish(token, row, index of the first of two sums) for the lane's pairs of neighbouring
// rows from `first_row` on. A lane has two tokens.
template <int ROWS, typename F>
__device__ __forceinline__ void for_pairs(int num_tokens, int first_row, int num_rows, F finish) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int token = threadIdx.x / 32 * 16 + half * 8 + lane / 4;
    if (token >= num_tokens) break;
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) {
      const int row = first_row + i * 8 + lane % 4 * 2;
      if (row < num_rows) finish(token, row, i * 4 + half * 2);
    }
  }
}

// What the kernel reads and writes besides tiles.
struct Buffers {
  const bf16 *output_bias, *qkv_bias, *post_norm, *next_norm;
  bf16 *x, *scaled;
  float *squares;
  bf16 *inner, *qkv;
  int num_tokens;
  const int *adapted;
  bf16 *low_rank;
};

// The adapters: A and B of each product, and A x of all products, [T, NEXT + 1, LOW_RANK].
struct Adapters {
  const TensorMap *lora_a[NEXT + 1], *lora_b[NEXT + 1], *low_rank;

  static constexpr __device__ __forceinline__ int rank(int index) {
    return index == OUTPUT ? OUTPUT_RANK : index == GATE_UP ? GATE_UP_RANK : index == DOWN ? DOWN_RANK : QKV_RANK;
  }
};

// Two neighbouring numbers of a bias, which may start anywhere; zeros if it is null.
__device__ __forceinline__ u32 load_bias(const bf16 *bias, int row) {
  return bias ? bias[row] | (u32)bias[row + 1] << 16 : 0;
}

// The lane's part of the residual stream, and what its rows are multiplied by and get added. Loaded
// ahead of the product, since each of these loads would otherwise follow a store.
struct Residual {
  u32 x[HIDDEN_ROWS / 4], norm[HIDDEN_ROWS / 8], bias[HIDDEN_ROWS / 8];

  __device__ __forceinline__ Residual(const Buffers &from, const bf16 *weight, const bf16 *added) {
    for_pairs<HIDDEN_ROWS>(from.num_tokens, blockIdx.x * HIDDEN_ROWS, HIDDEN, [&](int token, int row, int i) {
      x[i / 2] = *(const u32 *)(from.x + (size_t)token * HIDDEN + row);
      norm[i / 4] = *(const u32 *)(weight + row);
      bias[i / 4] = load_bias(added, row);
    });
  }
};

// x += the product. Also writes what the next norm needs.
__device__ __forceinline__ void finish_residual(const float (&sums)[HIDDEN_ROWS / 2], const Buffers &to,
                                                const Residual &residual) {
  float squares[2] = {};
  for_pairs<HIDDEN_ROWS>(to.num_tokens, blockIdx.x * HIDDEN_ROWS, HIDDEN, [&](int token, int row, int i) {
    const u32 x = residual.x[i / 2], norm = residual.norm[i / 4], bias = residual.bias[i / 4];
    const u32 pair =
        pack_bf16(low_to_f32(x) + sums[i] + low_to_f32(bias), high_to_f32(x) + sums[i + 1] + high_to_f32(bias));
    const float one = low_to_f32(pair), two = high_to_f32(pair);
    *(u32 *)(to.x + (size_t)token * HIDDEN + row) = pair;
    *(u32 *)(to.scaled + (size_t)token * HIDDEN + row) = pack_bf16(one * low_to_f32(norm), two * high_to_f32(norm));
    squares[i / 2 % 2] += one * one + two * two;
  });
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int token = threadIdx.x / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
    const float sum = quad_sum(squares[half]);
    if (token < to.num_tokens && threadIdx.x % 4 == 0) to.squares[blockIdx.x * MAX_TOKENS + token] = sum;
  }
}

// inner = silu(gate) * up. All results are computed before any is stored, so that no load or
// function waits for a store.
__device__ __forceinline__ void finish_swiglu(const float (&sums)[FFN_ROWS], const Buffers &to, const float *scales) {
  const int first_row = blockIdx.x * FFN_ROWS;
  u32 active[FFN_ROWS / 4];
  for_pairs<FFN_ROWS>(to.num_tokens, first_row, FFN, [&](int token, int row, int i) {
    const float scale = scales[token], *up = sums + FFN_ROWS / 2;
    active[i / 2] = pack_bf16(silu(sums[i] * scale) * up[i] * scale, silu(sums[i + 1] * scale) * up[i + 1] * scale);
  });
  for_pairs<FFN_ROWS>(to.num_tokens, first_row, FFN, [&](int token, int row, int i) {
    *(u32 *)(to.inner + (size_t)token * FFN + row) = active[i / 2];
  });
}

// qkv = the product + bias
__device__ __forceinline__ void finish_qkv(const float (&sums)[QKV_ROWS / 2], const Buffers &to, const float *scales) {
  const int first_row = blockIdx.x * QKV_ROWS;
  u32 projected[QKV_ROWS / 4];
  for_pairs<QKV_ROWS>(to.num_tokens, first_row, QKV, [&](int token, int row, int i) {
    const u32 bias = load_bias(to.qkv_bias, row);
    const float scale = scales[token];
    projected[i / 2] = pack_bf16(sums[i] * scale + low_to_f32(bias), sums[i + 1] * scale + high_to_f32(bias));
  });
  for_pairs<QKV_ROWS>(to.num_tokens, first_row, QKV, [&](int token, int row, int i) {
    *(u32 *)(to.qkv + (size_t)token * QKV + row) = projected[i / 2];
  });
}

// low_rank = the product with rows of A, for draft tokens; zeros for others.
__device__ __forceinline__ void finish_low_rank(const float (&sums)[ADAPTER_ROWS / 2], const Buffers &to, int index,
                                                int first_row) {
  for_pairs<ADAPTER_ROWS>(to.num_tokens, first_row, Adapters::rank(index), [&](int token, int row, int i) {
    *(u32 *)(to.low_rank + (size_t)(token * (NEXT + 1) + index) * LOW_RANK + row) =
        to.adapted[token] ? pack_bf16(sums[i], sums[i + 1]) : 0;
  });
}

// The scales of the tokens' RMS norms, computed by one warp.
__device__ __forceinline__ void compute_scales(float *scales, const float *squares, int num_tokens) {
  for (int token = threadIdx.x % 32; token < num_tokens; token += 32) {
    float sum = 0.f;
#pragma unroll 16
    for (int i = 0; i < HIDDEN_BLOCKS; i++) sum += squares[i * MAX_TOKENS + token];
    scales[token] = rsqrtf(sum / HIDDEN + EPS);
  }
}

// Waits for compute_scales().
__device__ __forceinline__ void sync_scales() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS + 32) : "memory"); }

// Calls copy(first chunk, number of chunks) for each slot of a product, when it is empty.
template <int N, typename F>
__device__ __forceinline__ void fill_slots(const Product &product, Ring<N> &ring, F copy) {
  for (int chunk = 0; chunk < product.chunks(); chunk += product.slot_chunks, ring.advance()) {
    barrier_wait(ring.empty(), ring.parity ^ 1);
    copy(chunk, min(product.slot_chunks, product.chunks() - chunk));
  }
}

// The products from `first` to `last`. `counts`: how many blocks have finished each of them [NEXT],
// and how many each product with A [NEXT + 1].
template <int N, bool HAS_ADAPTERS>
__device__ __forceinline__ void compute_products(const TensorMap &output_tiles, const TensorMap &gate_up_tiles,
                                                 const TensorMap &down_tiles, const TensorMap &next_tiles,
                                                 const TensorMap &attn_out_tiles, const TensorMap &scaled_tiles,
                                                 const TensorMap &inner_tiles, const Adapters &adapters, int first,
                                                 int last, const Buffers &buffers, int *counts) {
  extern __shared__ uint4 memory[];
  __shared__ float scales[N];
  Ring<N> ring = {((u32)__cvta_generic_to_shared(memory) + 1023) / 1024 * 1024};
  ring.barriers = ring.memory + ring.slots * (ring.token_bytes + ring.weight_bytes);
  if (threadIdx.x == 0) ring.init();
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  let_successor_start();

  auto cut = [&](const TensorMap &weight, const TensorMap &tokens, int parts, int rows, int own_rows, int columns) {
    const int fit = ring.weight_bytes / (parts * own_rows * 128);
    return Product{&weight, &tokens, 0, parts, rows, own_rows, CEIL(columns, CHUNK), 0, min(fit, ring.max_chunks)};
  };
  auto product_without_adapters = [&](int index) {
    if (index == OUTPUT) return cut(output_tiles, attn_out_tiles, 1, HIDDEN, HIDDEN_ROWS, HEADS * HEAD_DIM);
    if (index == GATE_UP) return cut(gate_up_tiles, scaled_tiles, 2, FFN, FFN_ROWS, HIDDEN);
    if (index == DOWN) return cut(down_tiles, inner_tiles, 1, HIDDEN, HIDDEN_ROWS, FFN);
    return cut(next_tiles, scaled_tiles, 1, QKV, QKV_ROWS, HIDDEN);
  };
  auto product = [&](int index) {
    Product p = product_without_adapters(index);
    if (HAS_ADAPTERS) p.lora_b = adapters.lora_b[index], p.adapter_chunks = CEIL(Adapters::rank(index), CHUNK);
    return p;
  };
  // The product with A.
  auto low_rank_product = [&](int index) {
    const Product p = product_without_adapters(index);
    return cut(*adapters.lora_a[index], *p.tokens, 1, Adapters::rank(index), ADAPTER_ROWS, p.own_chunks * CHUNK);
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The block's part of a product with A, counted from the last block.
  const int low_rank_block = gridDim.x - 1 - blockIdx.x;
  auto has_rows = [&](const Product &p) { return blockIdx.x < p.blocks(); };
  auto has_low_rank_rows = [&](int index) {
    return HAS_ADAPTERS && low_rank_block * ADAPTER_ROWS < Adapters::rank(index);
  };
  auto wait_for_tokens = [&](int index) {
    if (index > first) wait_for_count(counts + index - 1, product(index - 1).blocks());
  };
  if (warp == CONSUMERS / 32) {
    if (lane != 0) return;
    for (int index = first; index <= last; index++) {
      if (has_low_rank_rows(index)) {
        const Product p = low_rank_product(index);
        fill_slots(p, ring, [&](int chunk, int num_chunks) {
          barrier_expect(ring.full(), num_chunks * p.tile_bytes());
          for (int i = 0; i < num_chunks; i++)
            copy_panel(ring.weights() + i * ADAPTER_ROWS * 128, *p.weight, (chunk + i) * CHUNK, 0,
                       low_rank_block * ADAPTER_ROWS, ring.full());
        });
      }
      const Product p = product(index);
      if (!has_rows(p)) continue;
      fill_slots(p, ring, [&](int chunk, int num_chunks) {
        barrier_expect(ring.full(), num_chunks * p.tile_bytes());
        for (int i = 0; i < num_chunks; i++) {
          const bool is_own = !HAS_ADAPTERS || chunk + i < p.own_chunks;
          for (int part = 0; part < p.parts; part++)
            copy_panel(ring.weights() + (i * p.parts + part) * p.own_rows * 128, is_own ? *p.weight : *p.lora_b,
                       (is_own ? chunk + i : chunk + i - p.own_chunks) * CHUNK, 0,
                       part * p.rows + blockIdx.x * p.own_rows, ring.full());
        }
      });
    }
  } else if (warp == CONSUMERS / 32 + 1) {
    if (lane != 0) return;
    wait_for_predecessor();
    auto copy_tokens = [&](const Product &p, int index) {
      wait_for_tokens(index);
      asm volatile("fence.proxy.async;" ::: "memory");
      fill_slots(p, ring, [&](int chunk, int num_chunks) {
        barrier_expect(ring.full(), num_chunks * N * 128);
        for (int i = 0; i < num_chunks; i++) {
          const u32 to = ring.tokens() + i * N * 128;
          const int adapter_chunk = chunk + i - p.own_chunks;
          if (!HAS_ADAPTERS || adapter_chunk < 0) {
            copy_panel(to, *p.tokens, (chunk + i) * CHUNK, 0, 0, ring.full());
            continue;
          }
          if (adapter_chunk == 0) {
            wait_for_count(counts + NEXT + index, CEIL(Adapters::rank(index), ADAPTER_ROWS));
            asm volatile("fence.proxy.async;" ::: "memory");
          }
          copy_panel(to, *adapters.low_rank, adapter_chunk * CHUNK, index, 0, ring.full());
        }
      });
    };
    for (int index = first; index <= last; index++) {
      if (has_low_rank_rows(index)) copy_tokens(low_rank_product(index), index);
      const Product p = product(index);
      if (has_rows(p)) copy_tokens(p, index);
    }
  } else if (warp == CONSUMERS / 32 + 2) {
    wait_for_predecessor();
    for (int index = first; index <= last; index++) {
      if (index == OUTPUT || index == DOWN || !has_rows(product(index))) continue;
      wait_for_tokens(index);
      compute_scales(scales, buffers.squares, buffers.num_tokens);
      asm volatile("bar.arrive 1, %0;" ::"n"(CONSUMERS + 32) : "memory");
    }
  } else {
    wait_for_predecessor();
    // The copy engine reads the results.
    auto publish = [&](int *count) {
      asm volatile("fence.proxy.async;" ::: "memory");
      asm volatile("bar.sync 2, %0;" ::"n"(CONSUMERS) : "memory");
      if (threadIdx.x == 0) add_release(count);
    };
    for (int index = first; index <= last; index++) {
      if (has_low_rank_rows(index)) {
        float sums[ADAPTER_ROWS / 2];
        multiply<N, ADAPTER_ROWS>(sums, low_rank_product(index), ring);
        finish_low_rank(sums, buffers, index, low_rank_block * ADAPTER_ROWS);
        publish(counts + NEXT + index);
      }
      const Product p = product(index);
      if (!has_rows(p)) continue;
      if (index == GATE_UP) {
        float sums[FFN_ROWS];
        multiply<N, 2 * FFN_ROWS>(sums, p, ring);
        sync_scales();
        finish_swiglu(sums, buffers, scales);
      } else if (index == NEXT) {
        float sums[QKV_ROWS / 2];
        multiply<N, QKV_ROWS>(sums, p, ring);
        sync_scales();
        finish_qkv(sums, buffers, scales);
      } else {
        const bool is_output = index == OUTPUT;
        const Residual residual(buffers, is_output ? buffers.post_norm : buffers.next_norm,
                                is_output ? buffers.output_bias : 0);
        float sums[HIDDEN_ROWS / 2];
        multiply<N, HIDDEN_ROWS>(sums, p, ring);
        finish_residual(sums, buffers, residual);
      }
      if (index < last) publish(counts + index);
    }
  }
}

#define LAYER_PRODUCTS(NT, TOKENS, HAS_ADAPTERS)                                                                      \
  extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)                                                       \
      layer_products_##NT(                                                                                            \
          const __grid_constant__ TensorMap output_tiles, const __grid_constant__ TensorMap gate_up_tiles,            \
          const __grid_constant__ TensorMap down_tiles, const __grid_constant__ TensorMap next_tiles,                 \
          const __grid_constant__ TensorMap attn_out_tiles, const __grid_constant__ TensorMap scaled_tiles,           \
          const __grid_constant__ TensorMap inner_tiles,                                                              \
          const __grid_constant__ TensorMap output_a, const __grid_constant__ TensorMap output_b,                     \
          const __grid_constant__ TensorMap gate_up_a, const __grid_constant__ TensorMap gate_up_b,                   \
          const __grid_constant__ TensorMap down_a, const __grid_constant__ TensorMap down_b,                         \
          const __grid_constant__ TensorMap next_a, const __grid_constant__ TensorMap next_b,                         \
          const __grid_constant__ TensorMap low_rank_tiles, int first, int last, const bf16 *output_bias,             \
          const bf16 *qkv_bias, const bf16 *post_norm, const bf16 *next_norm, bf16 *x, bf16 *scaled,                  \
          float *squares, bf16 *inner, bf16 *qkv, int num_tokens, int *counts, const int *adapted,                    \
          bf16 *low_rank) {                                                                                           \
    const Adapters adapters = {{&output_a, &gate_up_a, &down_a, &next_a},                                             \
                               {&output_b, &gate_up_b, &down_b, &next_b},                                             \
                               &low_rank_tiles};                                                                      \
    compute_products<TOKENS, HAS_ADAPTERS>(                                                                           \
        output_tiles, gate_up_tiles, down_tiles, next_tiles, attn_out_tiles, scaled_tiles, inner_tiles, adapters,     \
        first, last,                                                                                                  \
        {output_bias, qkv_bias, post_norm, next_norm, x, scaled, squares, inner, qkv, num_tokens, adapted, low_rank}, \
        counts);                                                                                                      \
  }
LAYER_PRODUCTS(16, 16, false)
LAYER_PRODUCTS(32, 32, false)
LAYER_PRODUCTS(64, 64, false)
#if ADAPTED
LAYER_PRODUCTS(adapted_16, 16, true)
LAYER_PRODUCTS(adapted_32, 32, true)
LAYER_PRODUCTS(adapted_64, 64, true)
#endif

// The first kernel of a step, or of the layers after the shared ones: embeddings or rows of the
// residual stream, and what the first norm needs. It resets the counts.
extern "C" __global__ void embed_scaled(const bf16 *table, const int *tokens, const bf16 *norm, bf16 *x, bf16 *scaled,
                                        float *squares, int *counts, int num_counts) {
  wait_for_predecessor();
  let_successor_start();
  __shared__ float sums[32];
  const int token = blockIdx.x;
  for (int i = token * blockDim.x + threadIdx.x; i < num_counts; i += gridDim.x * blockDim.x) counts[i] = 0;
  float square = 0.f;
  for (int column = threadIdx.x; column < HIDDEN; column += blockDim.x) {
    const bf16 value = table[(size_t)tokens[token] * HIDDEN + column];
    x[(size_t)token * HIDDEN + column] = value;
    scaled[(size_t)token * HIDDEN + column] = f32_to_bf16(bf16_to_f32(value) * bf16_to_f32(norm[column]));
    square += bf16_to_f32(value) * bf16_to_f32(value);
  }
  square = warp_sum(square);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = square;
  __syncthreads();
  float total = 0.f;
  for (int warp = 0; warp < blockDim.x / 32; warp++) total += sums[warp];
  for (int i = threadIdx.x; i < HIDDEN_BLOCKS; i += blockDim.x) squares[i * MAX_TOKENS + token] = i == 0 ? total : 0.f;
}
