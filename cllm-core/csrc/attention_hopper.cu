// Attention for Hopper and heads of at most 128 numbers, after FlashAttention-3 (Shah et al., arXiv
// 2407.08608). A block of threads stays on its multiprocessor and draws one item after the other: a
// group of tiles and a head. One thread copies tiles ahead of their use, with the copy engine
// (TMA). A warpgroup (four warps) for each tile of the group multiplies with wgmma, which reads the
// tiles from shared memory; while one warpgroup computes weights, the others' products run.
//
// More macros from the host: QUERY_PARTS and KEY_PARTS, the numbers of tiles in a group of queries
// and of keys; SHARED_BYTES, the shared memory of a block.
static_assert(HEAD_DIM <= 128, "the registers hold no wider heads");
#define THREADS(parts) (((parts) + 1) * 128)

__device__ __forceinline__ void copy_tile(u32 to, const TensorMap &from, int head, int token, u32 barrier) {
#pragma unroll
  for (int panel = 0; panel < PANELS; panel++)
    copy_panel(to + panel * PANEL_BYTES, from, panel * 64, head, token, barrier);
}

__device__ __forceinline__ void copy_bytes(u32 to, const void *from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ int4 load_shared_ints(u32 from) {
  int4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
  return x;
}

__device__ __forceinline__ void store_shared_ints(u32 to, int4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Buffers in shared memory that pass from the thread that copies to `parts` warpgroups, round and
// round. Each has two barriers, and four numbers that tell what it holds.
template <int parts, int buffers>
struct Ring {
  static constexpr int barrier_bytes = buffers * 32;
  u32 memory, bytes, barriers;
  int index = 0, parity = 0;

  __device__ __forceinline__ u32 full() const { return barriers + index * 32; }
  __device__ __forceinline__ u32 empty(int buffer) const { return barriers + buffer * 32 + 8; }
  __device__ __forceinline__ u32 numbers(int buffer) const { return barriers + buffer * 32 + 16; }
  __device__ __forceinline__ u32 at(int buffer) const { return memory + buffer * bytes; }
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < buffers; i++) barrier_init(barriers + i * 32, 1), barrier_init(empty(i), parts * 4);
  }
  __device__ __forceinline__ void advance() {
    if (++index == buffers) index = 0, parity ^= 1;
  }
  // The thread that copies: waits for the next buffer. Copies of so many bytes then go to full().
  __device__ __forceinline__ void open(int4 what, u32 copied_bytes) const {
    barrier_wait(empty(index), parity ^ 1);
    store_shared_ints(numbers(index), what);
    barrier_expect(full(), copied_bytes);
  }
  // Warpgroups: wait for the next buffer, and give one back.
  __device__ __forceinline__ int4 wait() const {
    barrier_wait(full(), parity);
    return load_shared_ints(numbers(index));
  }
  __device__ __forceinline__ void release(int buffer) const { barrier_arrive(empty(buffer)); }
};

// The memory of a block. An item has `item_tiles` tiles for each part. A stage has two tiles of the
// other kind, the bits of the mask for each part, and more bytes.
template <int parts_, int items, int item_tiles, int more_bytes_>
struct Layout {
  static constexpr int parts = parts_, more_bytes = more_bytes_, bits_bytes = TILE * 8;
  static constexpr int item_bytes = parts * item_tiles * TILE_BYTES;
  // Tiles start at multiples of 1,024 bytes, as the swizzle needs.
  static constexpr int stage_bytes = 2 * TILE_BYTES + (parts * bits_bytes + more_bytes + 1023) / 1024 * 1024;
  static constexpr int num_fit = (SHARED_BYTES - 1024 - 512 - items * item_bytes) / stage_bytes;
  static constexpr int stages = num_fit < 6 ? num_fit : 6;
  static_assert(stages >= 2, "not enough shared memory");
  Ring<parts, items> work;
  Ring<parts, stages> ring;
  // Pairs of the item that no stage was taken for yet.
  int left = 0;

  __device__ __forceinline__ Layout() {
    extern __shared__ uint4 memory[];
    u32 first = ((u32)__cvta_generic_to_shared(memory) + 1023) / 1024 * 1024;
    u32 stages_at = first + items * item_bytes, barriers = stages_at + stages * stage_bytes;
    work.memory = first, work.bytes = item_bytes, work.barriers = barriers;
    ring.memory = stages_at, ring.bytes = stage_bytes, ring.barriers = barriers + work.barrier_bytes;
    if (threadIdx.x == 0) work.init(), ring.init();
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
  }
  // Tile `kind` of a part of the current item.
  __device__ __forceinline__ u32 own(int kind, int part) const {
    return work.at(work.index) + (kind * parts + part) * TILE_BYTES;
  }
  __device__ __forceinline__ u32 tile(int stage, int kind) const { return ring.at(stage) + kind * TILE_BYTES; }
  __device__ __forceinline__ u32 bits(int stage, int part) const { return tile(stage, 2) + part * bits_bytes; }
  __device__ __forceinline__ u32 more(int stage) const { return bits(stage, parts); }

  // The thread that copies: opens the next stage for a pair, and copies the bits of its mask.
  __device__ __forceinline__ void open(int4 block, const u64 *all_bits) const {
    const int codes[3] = {block.y, block.z, block.w};
    int bytes = 2 * TILE_BYTES + more_bytes;
    for (int part = 0; part < parts; part++) bytes += codes[part] >= 0 ? bits_bytes : 0;
    ring.open(block, bytes);
    for (int part = 0; part < parts; part++)
      if (codes[part] >= 0)
        copy_bytes(bits(ring.index, part), all_bits + (size_t)codes[part] * TILE, bits_bytes, ring.full());
  }

  __device__ __forceinline__ int code(int stage, int part) const {
    int code;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(code) : "r"(ring.numbers(stage) + 4 + part * 4));
    return code;
  }
  // The stage of the item's next pair, or -1 if there is none or the part needs no such pair.
  __device__ __forceinline__ int adjacent(int part) {
    if (left == 0) return -1;
    barrier_wait(ring.full(), ring.parity);
    int stage = ring.index;
    if (code(stage, part) == ATTENDS_TO_NONE) return -1;
    left--, ring.advance();
    return stage;
  }
  // The stage of the next pair that the part needs, or -1. Others are given back; a long run of
  // them would fill the ring, so the caller holds no stage.
  __device__ __forceinline__ int next(int part) {
    int stage;
    while ((stage = adjacent(part)) < 0 && left > 0) {
      ring.release(ring.index);
      left--, ring.advance();
    }
    return stage;
  }
  // Excludes what the mask does. `row` is the lane's upper row.
  __device__ __forceinline__ void mask(Scores &scores, int stage, int part, int row, float excluded) const {
    if (code(stage, part) < 0) return;
    u64 upper, lower;
    u32 from = bits(stage, part) + row * 8;
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(upper) : "r"(from));
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(lower) : "r"(from + 64));
    mask_scores(scores, upper, lower, excluded);
  }
};

// The items that blocks of each kernel have drawn. Sums do not depend on who draws what.
__device__ int num_drawn[3];

// The next item, or -1. Every block stops at its first number that is too large, so whoever draws
// the last of these resets the count for the next launch.
__device__ __forceinline__ int draw(int kernel, int num_items) {
  int item = atomicAdd(&num_drawn[kernel], 1);
  if (item == num_items + (int)gridDim.x - 1) num_drawn[kernel] = 0;
  return item < num_items ? item : -1;
}

// Moves registers from the warpgroup of the thread that copies to the others. Numbers are such that
// the sum over all warpgroups stays.
template <int parts>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(parts == 3 ? 32 : 40));
}
template <int parts>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(parts == 3 ? 160 : 232));
}

__device__ __forceinline__ void settle(AFragment &a) {
#pragma unroll
  for (int k = 0; k < TILE / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[k][i]));
}

#define LEFT(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// scores = tile `a` times the transpose of tile `b`.
__device__ __forceinline__ void wgmma_qk(Scores &scores, u32 a, u32 b) {
  const u64 left = descriptor<PANEL_BYTES>(a), right = descriptor<PANEL_BYTES>(b);
#pragma unroll
  for (int k = 0; k < HEAD_PAD / 16; k++) {
    const u64 offset = (k / 4 * PANEL_BYTES + k % 4 * 32) / 16;
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" WGMMA(64) "%32, %33, add, 1, 1, 0, 0;\n}"
                 : VALUES_64(scores)
                 : "l"(left + offset), "l"(right + offset), "r"(k));
  }
}

// Adds to `columns` columns a [64, 16] times the 16 rows that `b` describes.
template <int columns>
__device__ __forceinline__ void wgmma_columns(float *c, const u32 (&a)[4], u64 b) {
  if constexpr (columns == 128)
    asm volatile(WGMMA(128) "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;" : VALUES_128(c) : LEFT(a), "l"(b));
  if constexpr (columns == 64)
    asm volatile(WGMMA(64) "{%32,%33,%34,%35}, %36, 1, 1, 1, 1;" : VALUES_64(c) : LEFT(a), "l"(b));
  if constexpr (columns == 32)
    asm volatile(WGMMA(32) "{%16,%17,%18,%19}, %20, 1, 1, 1, 1;" : VALUES_32(c) : LEFT(a), "l"(b));
  if constexpr (columns == 16)
    asm volatile(WGMMA(16) "{%8,%9,%10,%11}, %12, 1, 1, 1, 1;" : VALUES_16(c) : LEFT(a), "l"(b));
}

// sum += a [64, TILE] times tile `b` [TILE, HEAD_DIM].
__device__ __forceinline__ void wgmma_pv(HeadRows &sum, const AFragment &a, u32 b) {
  const u64 tile = descriptor<PANEL_BYTES>(b);
  // Columns in whole panels, or in both.
  const int whole = HEAD_PAD == 128 ? 128 : HEAD_PAD / 64 * 64, panel = whole / 64 * PANEL_BYTES / 16;
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
    const u64 rows = tile + k * 16 * 128 / 16;
    wgmma_columns<whole>(sum, a[k], rows);
    wgmma_columns<(HEAD_PAD & 32)>(sum + whole / 2, a[k], rows + panel);
    wgmma_columns<(HEAD_PAD & 16)>(sum + (HEAD_PAD - 16) / 2, a[k], rows + panel + (HEAD_PAD & 32) * 2 / 16);
  }
}

// Copies what a kernel of queries needs, for one item after the other.
template <typename Shared, typename CopyOwn>
__device__ __forceinline__ void copy_items_of_queries(Shared &shared, int kernel, int num_groups, const TensorMap &qkv,
                                                      const int *offsets, const int4 *blocks, const u64 *bits,
                                                      CopyOwn copy_own) {
  for (int item; (item = draw(kernel, num_groups * HEADS)) >= 0; shared.work.advance()) {
    // Late queries first: they have the most keys if the mask is causal.
    int head = item / num_groups, group = num_groups - 1 - item % num_groups, kv_head = head / GROUP;
    int first = offsets[group], last = offsets[group + 1];
    shared.work.open({group, head, last - first, 0}, shared.item_bytes);
    for (int part = 0; part < shared.parts; part++) copy_own(head, (group * shared.parts + part) * TILE, part);
    int4 next = blocks[first];
    for (int index = first; index < last; index++, shared.ring.advance()) {
      int4 block = next;
      if (index + 1 < last) next = blocks[index + 1];
      shared.open(block, bits);
      int stage = shared.ring.index, token = block.x * TILE;
      copy_tile(shared.tile(stage, 0), qkv, HEADS + kv_head, token, shared.ring.full());
      copy_tile(shared.tile(stage, 1), qkv, HEADS + KV_HEADS + kv_head, token, shared.ring.full());
    }
  }
  shared.work.open({0, 0, -1, 0}, 0);
}

// attn_out = softmax(q k^T) v over the keys that the mask allows.
extern "C" __global__ void __launch_bounds__(THREADS(QUERY_PARTS), 1)
    attention(const __grid_constant__ TensorMap qkv, const int *offsets, const int *blocks, const u64 *bits, float scale,
              bf16 *attn_out, float *logsumexp, int tokens) {
  Layout<QUERY_PARTS, 2, 1, 0> shared;
  int part = threadIdx.x / 128, lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  if (part == QUERY_PARTS) {
    give_registers<QUERY_PARTS>();
    const int num_groups = (tokens / TILE + QUERY_PARTS - 1) / QUERY_PARTS;
    auto copy_own = [&](int head, int token, int part) {
      copy_tile(shared.own(0, part), qkv, head, token, shared.work.full());
    };
    if (threadIdx.x % 128 == 0)
      copy_items_of_queries(shared, 0, num_groups, qkv, offsets, (const int4 *)blocks, bits, copy_own);
    return;
  }
  take_registers<QUERY_PARTS>();
  for (int4 item; (item = shared.work.wait()).z >= 0; shared.work.advance()) {
    int head = item.y, token = (item.x * QUERY_PARTS + part) * TILE + row;
    shared.left = item.z;
    u32 queries = shared.own(0, part);
    HeadRows sum = {};
    Scores scores;
    AFragment weights;
    Softmax softmax = {scale};
    float shrink[2];
    // Each iteration is a run of pairs that this part needs.
    for (int stage; (stage = shared.next(part)) >= 0;) {
      begin_products();
      wgmma_qk(scores, queries, shared.tile(stage, 0));
      end_group();
      wait_groups<0>();
      settle(scores);
      shared.mask(scores, stage, part, row, -INFINITY);
      softmax.add(scores, shrink);
      multiply_rows(sum, shrink);
      to_a_frag(weights, scores);
      // The weights of a tile are computed while those of the one before are multiplied by values.
      for (int after; (after = shared.adjacent(part)) >= 0; stage = after) {
        settle(scores), settle(weights), settle(sum);
        begin_products();
        wgmma_qk(scores, queries, shared.tile(after, 0));
        end_group();
        wgmma_pv(sum, weights, shared.tile(stage, 1));
        end_group();
        wait_groups<1>();
        settle(scores);
        shared.mask(scores, after, part, row, -INFINITY);
        softmax.add(scores, shrink);
        settle(scores), settle(softmax.sum);
        wait_groups<0>();
        settle(sum), settle(weights);
        shared.ring.release(stage);
        multiply_rows(sum, shrink);
        to_a_frag(weights, scores);
      }
      settle(weights), settle(sum);
      begin_products();
      wgmma_pv(sum, weights, shared.tile(stage, 1));
      end_group();
      wait_groups<0>();
      settle(sum);
      shared.ring.release(stage);
    }
    shared.work.release(shared.work.index);
    // The last group may be incomplete.
    if (token >= tokens) continue;
    softmax.finish();
    bf16 *to = attn_out + (size_t)token * HEADS * HEAD_DIM + head * HEAD_DIM;
    store_rows(to, HEADS * HEAD_DIM, sum, 1.f / softmax.sum[0], 1.f / softmax.sum[1]);
    if (lane % 4 == 0) {
      logsumexp[(size_t)head * tokens + token] = softmax.logsumexp(0);
      logsumexp[(size_t)head * tokens + token + 8] = softmax.logsumexp(1);
    }
  }
}

// The stages of a backward kernel, one of which still belongs to products that run.
template <typename Shared>
struct HeldStage {
  Shared &shared;
  int stage = -1;

  __device__ __forceinline__ void release() {
    if (stage >= 0) shared.ring.release(stage);
    stage = -1;
  }
  __device__ __forceinline__ int next(int part) {
    int next = shared.adjacent(part);
    if (next >= 0) return next;
    wait_groups<0>();
    release();
    return shared.next(part);
  }
  // Starts scores = a times the transpose of the next stage's first tile and d_weights = b times
  // that of the second, and waits for the first product and all before.
  __device__ __forceinline__ void begin_scores(Scores &scores, Scores &d_weights, u32 a, u32 b, int next) {
    settle(scores);
    begin_products();
    wgmma_qk(scores, a, shared.tile(next, 0));
    end_group();
    wait_groups<1>();
    release();
    stage = next;
    settle(d_weights);
    begin_products();
    wgmma_qk(d_weights, b, shared.tile(next, 1));
    end_group();
    wait_groups<1>();
    settle(scores);
  }
};

// The gradient of the queries, and delta [HEADS, T] = the row sums of attn_out * d_attn_out, which
// attention_d_kv needs.
extern "C" __global__ void __launch_bounds__(THREADS(QUERY_PARTS), 1)
    attention_d_queries(const __grid_constant__ TensorMap qkv, const int *offsets, const int *blocks, const u64 *bits,
                        float scale, const bf16 *attn_out, const float *logsumexp,
                        const __grid_constant__ TensorMap d_attn_out, bf16 *d_qkv, float *deltas, int tokens) {
  typedef Layout<QUERY_PARTS, PANELS == 1 ? 2 : 1, 2, 0> Shared;
  Shared shared;
  int part = threadIdx.x / 128, lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  if (part == QUERY_PARTS) {
    give_registers<QUERY_PARTS>();
    const int num_groups = (tokens / TILE + QUERY_PARTS - 1) / QUERY_PARTS;
    auto copy_own = [&](int head, int token, int part) {
      copy_tile(shared.own(0, part), qkv, head, token, shared.work.full());
      copy_tile(shared.own(1, part), d_attn_out, head, token, shared.work.full());
    };
    if (threadIdx.x % 128 == 0)
      copy_items_of_queries(shared, 1, num_groups, qkv, offsets, (const int4 *)blocks, bits, copy_own);
    return;
  }
  take_registers<QUERY_PARTS>();
  for (int4 item; (item = shared.work.wait()).z >= 0; shared.work.advance()) {
    int head = item.y, token = (item.x * QUERY_PARTS + part) * TILE + row;
    shared.left = item.z;
    u32 queries = shared.own(0, part), gradients = shared.own(1, part);
    float delta[2] = {}, row_logsumexp[2] = {};
    if (token < tokens) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const bf16 *from = attn_out + ((size_t)(token + 8 * half) * HEADS + head) * HEAD_DIM;
        float sum = 0.f;
        for (int chunk = lane % 4; chunk < HEAD_DIM / 8; chunk += 4) {
          int4 gradient = load_shared_ints(swizzle(gradients, row + 8 * half, chunk));
          sum += dot_8(*(const uint4 *)(from + chunk * 8), *(const uint4 *)&gradient);
        }
        size_t at = (size_t)head * tokens + token + 8 * half;
        delta[half] = quad_sum(sum);
        row_logsumexp[half] = logsumexp[at];
        if (lane % 4 == 0) deltas[at] = delta[half];
      }
    }
    HeadRows sum = {};
    Scores weights, d_scores;
    AFragment a;
    HeldStage<Shared> held = {shared};
    for (int stage; (stage = held.next(part)) >= 0;) {
      held.begin_scores(weights, d_scores, queries, gradients, stage);
      settle(sum), settle(a);
      weights_of_rows(weights, scale, row_logsumexp);
      shared.mask(weights, stage, part, row, 0.f);
      settle(weights);
      wait_groups<0>();
      settle(d_scores);
      d_scores_of_rows(d_scores, weights, delta);
      to_a_frag(a, d_scores);
      settle(a), settle(sum);
      begin_products();
      wgmma_pv(sum, a, shared.tile(stage, 0));
      end_group();
    }
    wait_groups<0>();
    settle(sum);
    shared.work.release(shared.work.index);
    if (token >= tokens) continue;
    // ln 2 cancels the log2(e) in `scale`.
    float factor = scale * LN_2;
    store_rows(d_qkv + (size_t)token * QKV + head * HEAD_DIM, QKV, sum, factor, factor);
  }
}

// The gradients of keys and values. An item iterates over all query heads that share its head of
// keys, and over the tiles of queries in its list. Scores are transposed: a row belongs to a key.
extern "C" __global__ void __launch_bounds__(THREADS(KEY_PARTS), 1)
    attention_d_kv(const __grid_constant__ TensorMap qkv, const int *offsets, const int *blocks, const u64 *bits,
                   float scale, const float *logsumexp, const float *deltas, const __grid_constant__ TensorMap d_attn_out,
                   bf16 *d_qkv, int tokens) {
  // A stage ends with the logsumexp and delta of each query.
  const int numbers_bytes = TILE * 4;
  typedef Layout<KEY_PARTS, PANELS == 1 ? 2 : 1, 2, 2 * numbers_bytes> Shared;
  Shared shared;
  int part = threadIdx.x / 128, lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  if (part == KEY_PARTS) {
    give_registers<KEY_PARTS>();
    const int num_groups = (tokens / TILE + KEY_PARTS - 1) / KEY_PARTS;
    if (threadIdx.x % 128 != 0) return;
    for (int item; (item = draw(2, num_groups * KV_HEADS)) >= 0; shared.work.advance()) {
      int kv_head = item / num_groups, group = item % num_groups, first = offsets[group];
      int num_pairs = offsets[group + 1] - first;
      shared.work.open({group, kv_head, num_pairs * GROUP, 0}, shared.item_bytes);
      for (int part = 0; part < KEY_PARTS; part++) {
        int token = (group * KEY_PARTS + part) * TILE;
        copy_tile(shared.own(0, part), qkv, HEADS + kv_head, token, shared.work.full());
        copy_tile(shared.own(1, part), qkv, HEADS + KV_HEADS + kv_head, token, shared.work.full());
      }
      const int4 *pairs = (const int4 *)blocks + first;
      int4 next = pairs[0];
      for (int head = kv_head * GROUP; head < (kv_head + 1) * GROUP; head++) {
        for (int index = 0; index < num_pairs; index++, shared.ring.advance()) {
          int4 block = next;
          next = pairs[index + 1 < num_pairs ? index + 1 : 0];
          shared.open(block, bits);
          int stage = shared.ring.index, token = block.x * TILE;
          size_t at = (size_t)head * tokens + token;
          copy_tile(shared.tile(stage, 0), qkv, head, token, shared.ring.full());
          copy_tile(shared.tile(stage, 1), d_attn_out, head, token, shared.ring.full());
          copy_bytes(shared.more(stage), logsumexp + at, numbers_bytes, shared.ring.full());
          copy_bytes(shared.more(stage) + numbers_bytes, deltas + at, numbers_bytes, shared.ring.full());
        }
      }
    }
    shared.work.open({0, 0, -1, 0}, 0);
    return;
  }
  take_registers<KEY_PARTS>();
  for (int4 item; (item = shared.work.wait()).z >= 0; shared.work.advance()) {
    int kv_head = item.y, token = (item.x * KEY_PARTS + part) * TILE + row;
    shared.left = item.z;
    u32 keys = shared.own(0, part), values = shared.own(1, part);
    HeadRows d_keys = {}, d_values = {};
    Scores weights, d_scores;
    AFragment a, b;
    HeldStage<Shared> held = {shared};
    for (int stage; (stage = held.next(part)) >= 0;) {
      held.begin_scores(weights, d_scores, keys, values, stage);
      settle(d_keys), settle(d_values), settle(a), settle(b);
      weights_of_columns(weights, scale, shared.more(stage));
      shared.mask(weights, stage, part, row, 0.f);
      settle(weights);
      wait_groups<0>();
      settle(d_scores);
      d_scores_of_columns(d_scores, weights, shared.more(stage) + numbers_bytes);
      to_a_frag(a, weights);
      to_a_frag(b, d_scores);
      settle(a), settle(b), settle(d_keys), settle(d_values);
      begin_products();
      wgmma_pv(d_values, a, shared.tile(stage, 1));
      wgmma_pv(d_keys, b, shared.tile(stage, 0));
      end_group();
    }
    wait_groups<0>();
    settle(d_keys), settle(d_values);
    shared.work.release(shared.work.index);
    if (token >= tokens) continue;
    float factor = scale * LN_2;
    bf16 *to = d_qkv + (size_t)token * QKV + (HEADS + kv_head) * HEAD_DIM;
    store_rows(to, QKV, d_keys, factor, factor);
    store_rows(to + KV_HEADS * HEAD_DIM, QKV, d_values, 1.f, 1.f);
  }
}
