// The kernels of a training step except its matrix products and its attention, compiled at run time
// for one model's shape. Tensors are bf16 unless their type says otherwise, sums are float32. T is
// the number of tokens; rows are contiguous.
//
// Macros from the host: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EPS; ALIGNED, whether every
// tensor of the model starts at a multiple of 16 bytes; QK_NORM, whether queries and keys have a
// norm (Qwen3); ROW_THREADS and ROWS_PER_BLOCK of the norms; HEAD_THREADS of the rotation; and the
// kinds of divergence: FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, NEG_LOG_ACCEPTANCE, LK_HYBRID.
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define HALF (HEAD_DIM / 2)
// Distance between rows of logits: the vocabulary, padded so that rows are aligned.
#define PITCH ((VOCAB + 7) / 8 * 8)

// Threads work on chunks of eight neighbouring values.
struct Float8 {
  float at[8];
};

// A chunk as it is stored.
struct Packed8 {
  u32 pairs[4];
  __device__ __forceinline__ float operator[](int i) const {
    return i % 2 ? high_to_f32(pairs[i / 2]) : low_to_f32(pairs[i / 2]);
  }
  __device__ __forceinline__ Float8 unpack() const {
    const Packed8 &x = *this;
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]};
  }
};

// 16 bytes at a time.
__device__ __forceinline__ Packed8 load_packed8(const bf16 *from) {
  uint4 x = *(const uint4 *)from;
  return {x.x, x.y, x.z, x.w};
}

__device__ __forceinline__ Float8 load8(const bf16 *from) { return load_packed8(from).unpack(); }

__device__ __forceinline__ void store8(bf16 *to, const Float8 &x) {
  *(uint4 *)to = make_uint4(pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3]), pack_bf16(x.at[4], x.at[5]),
                            pack_bf16(x.at[6], x.at[7]));
}

// The chunk of a row of WIDTH values that starts at a column. Rows may be unaligned, and chunks may
// reach past the end of a row, where they are zero and not written.
template <int WIDTH>
__device__ __forceinline__ Packed8 load_packed8(const bf16 *row, int column) {
  if constexpr (ALIGNED && WIDTH % 8 == 0) {
    return load_packed8(row + column);
  } else {
    Packed8 x = {};
    for (int i = 0; i < 8; i++)
      if (column + i < WIDTH) x.pairs[i / 2] |= (u32)row[column + i] << (i % 2 * 16);
    return x;
  }
}

template <int WIDTH>
__device__ __forceinline__ Float8 load8(const bf16 *row, int column) {
  return load_packed8<WIDTH>(row, column).unpack();
}

template <int WIDTH>
__device__ __forceinline__ Float8 load8(const float *row, int column) {
  if constexpr (WIDTH % 8 == 0) {
    float4 a = *(const float4 *)(row + column), b = *(const float4 *)(row + column + 4);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  } else {
    Float8 x = {};
    for (int i = 0; i < 8; i++)
      if (column + i < WIDTH) x.at[i] = row[column + i];
    return x;
  }
}

template <int WIDTH>
__device__ __forceinline__ void store8(bf16 *row, int column, const Float8 &x) {
  if constexpr (ALIGNED && WIDTH % 8 == 0) {
    store8(row + column, x);
  } else {
    for (int i = 0; i < 8; i++)
      if (column + i < WIDTH) row[column + i] = f32_to_bf16(x.at[i]);
  }
}

// Every thread gets the maximum over the block.
__device__ __forceinline__ float block_max(float x) {
  __shared__ float partial[32];
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float max = partial[0];
  for (int w = 1; w < blockDim.x / 32; w++) max = fmaxf(max, partial[w]);
  return max;
}

// Norms. ROW_THREADS threads share a row of HIDDEN values: thread t of them has its chunks t, t +
// ROW_THREADS, ...
#define ROW_CHUNKS ((HIDDEN + 7) / 8)
#define THREAD_CHUNKS ((ROW_CHUNKS + ROW_THREADS - 1) / ROW_THREADS)

struct RowThread {
  int thread = threadIdx.x % ROW_THREADS;

  __device__ __forceinline__ int column(int i) const { return (thread + i * ROW_THREADS) * 8; }
  __device__ __forceinline__ bool has(int i) const {
    return ROW_CHUNKS % ROW_THREADS == 0 || thread + i * ROW_THREADS < ROW_CHUNKS;
  }
  __device__ __forceinline__ void load(Packed8 (&x)[THREAD_CHUNKS], const bf16 *row) const {
#pragma unroll
    for (int i = 0; i < THREAD_CHUNKS; i++) x[i] = has(i) ? load_packed8<HIDDEN>(row, column(i)) : Packed8{};
  }
};

// Every thread of a row gets the sums of both values over the row. All threads of the block must
// call it, the first time with `call` 0, then 1, and so on.
__device__ __forceinline__ float2 row_sums(float x, float y, int call) {
  x = warp_sum(x), y = warp_sum(y);
  if constexpr (ROW_THREADS > 32) {
    // A warp may write for the next call while others still read for this one.
    __shared__ float2 partial[2][32];
    const int warps = ROW_THREADS / 32, first = threadIdx.x / ROW_THREADS * warps;
    if (threadIdx.x % 32 == 0) partial[call % 2][threadIdx.x / 32] = make_float2(x, y);
    __syncthreads();
    x = y = 0.f;
    for (int w = first; w < first + warps; w++) x += partial[call % 2][w].x, y += partial[call % 2][w].y;
  }
  return make_float2(x, y);
}

// Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467) of x, or of the sum of x and `update`,
// which then replaces `update`.
extern "C" __global__ void rms_norm(const bf16 *x, bf16 *update, const bf16 *weight, bf16 *out, int rows) {
  const RowThread part{};
  size_t row = (size_t)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / ROW_THREADS;
  bool has_row = row < rows;
  Packed8 v[THREAD_CHUNKS] = {}, added[THREAD_CHUNKS] = {}, w[THREAD_CHUNKS];
  if (has_row) part.load(v, x + row * HIDDEN);
  if (has_row && update) part.load(added, update + row * HIDDEN);
  part.load(w, weight);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < THREAD_CHUNKS; i++) {
    // The norm is that of the rounded sum, as it is stored.
    for (int pair = 0; pair < 4; pair++)
      v[i].pairs[pair] = pack_bf16(v[i][2 * pair] + added[i][2 * pair], v[i][2 * pair + 1] + added[i][2 * pair + 1]);
    for (int j = 0; j < 8; j++) squares += v[i][j] * v[i][j];
  }
  float scale = rsqrtf(row_sums(squares, 0.f, 0).x * (1.f / HIDDEN) + EPS);
  if (!has_row) return;
#pragma unroll
  for (int i = 0; i < THREAD_CHUNKS; i++) {
    if (!part.has(i)) continue;
    Float8 sum, normed;
    for (int j = 0; j < 8; j++) sum.at[j] = v[i][j], normed.at[j] = v[i][j] * scale * w[i][j];
    if (update) store8<HIDDEN>(update + row * HIDDEN, part.column(i), sum);
    store8<HIDDEN>(out + row * HIDDEN, part.column(i), normed);
  }
}

// d_x = d_residual + the gradient that d_out gives x; d_x may be d_residual. A block writes its sum
// of the weight's gradient to d_weight_partial [blocks, HIDDEN].
extern "C" __global__ void __launch_bounds__(ROWS_PER_BLOCK *ROW_THREADS, ROW_THREADS > 256 ? 1 : 2)
    rms_norm_backward(const bf16 *x, const bf16 *weight, const bf16 *d_out, const bf16 *d_residual, bf16 *d_x,
                      float *d_weight_partial, int rows) {
  const RowThread part{};
  const int row_in_block = threadIdx.x / ROW_THREADS;
  Packed8 w[THREAD_CHUNKS];
  part.load(w, weight);
  Float8 d_weight[THREAD_CHUNKS] = {};
  int call = 0;
  for (int first = blockIdx.x * ROWS_PER_BLOCK; first < rows; first += gridDim.x * ROWS_PER_BLOCK, call++) {
    size_t offset = (size_t)(first + row_in_block) * HIDDEN;
    bool has_row = first + row_in_block < rows;
    Packed8 v[THREAD_CHUNKS] = {}, d[THREAD_CHUNKS] = {}, residual[THREAD_CHUNKS];
    if (has_row) part.load(v, x + offset), part.load(d, d_out + offset), part.load(residual, d_residual + offset);
    float squares = 0.f, dot = 0.f;
#pragma unroll
    for (int i = 0; i < THREAD_CHUNKS; i++)
      for (int j = 0; j < 8; j++) squares += v[i][j] * v[i][j], dot += v[i][j] * w[i][j] * d[i][j];
    float2 sums = row_sums(squares, dot, call);
    float scale = rsqrtf(sums.x * (1.f / HIDDEN) + EPS), shrink = sums.y * scale * scale * (1.f / HIDDEN);
    if (!has_row) continue;
#pragma unroll
    for (int i = 0; i < THREAD_CHUNKS; i++) {
      if (!part.has(i)) continue;
      Float8 result;
      for (int j = 0; j < 8; j++) {
        d_weight[i].at[j] += d[i][j] * v[i][j] * scale;
        result.at[j] = residual[i][j] + scale * (w[i][j] * d[i][j] - v[i][j] * shrink);
      }
      store8<HIDDEN>(d_x + offset, part.column(i), result);
    }
  }
  // The threads of the block's rows add up one after another, so that every run gives the same sum.
  __shared__ float shared_sums[ROWS_PER_BLOCK > 1 ? HIDDEN : 1];
  float *to = d_weight_partial + (size_t)blockIdx.x * HIDDEN, *sums = ROWS_PER_BLOCK > 1 ? shared_sums : to;
  for (int turn = 0; turn < ROWS_PER_BLOCK; turn++) {
    if (turn == row_in_block) {
#pragma unroll
      for (int i = 0; i < THREAD_CHUNKS; i++)
        for (int j = 0; j < 8; j++) {
          int column = part.column(i) + j;
          if (column < HIDDEN) sums[column] = (turn ? sums[column] : 0.f) + d_weight[i].at[j];
        }
    }
    __syncthreads();
  }
  if (ROWS_PER_BLOCK > 1)
    for (int i = threadIdx.x; i < HIDDEN; i += blockDim.x) to[i] = sums[i];
}

// A chunk of a row of gate_up [T, 2 FFN], which holds both, and the index of the row.
struct GateUp {
  size_t token;
  int column;
  __device__ __forceinline__ bool find(int tokens) {
    const int chunks = (FFN + 7) / 8;
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    token = index / chunks, column = index % chunks * 8;
    return token < tokens;
  }
};

// inner [T, FFN] = silu(gate) * up, where gate_up [T, 2 FFN] holds both.
extern "C" __global__ void swiglu(const bf16 *gate_up, bf16 *inner, int tokens) {
  GateUp at;
  if (!at.find(tokens)) return;
  const bf16 *gate = gate_up + at.token * 2 * FFN;
  Float8 g = load8<FFN>(gate, at.column), u = load8<FFN>(gate + FFN, at.column);
  for (int i = 0; i < 8; i++) g.at[i] = silu(g.at[i]) * u.at[i];
  store8<FFN>(inner + at.token * FFN, at.column, g);
}

// In place: gate_up becomes its own gradient; d_inner becomes inner, which the weight gradient of
// the next product needs.
extern "C" __global__ void swiglu_backward(bf16 *gate_up, bf16 *d_inner, int tokens) {
  GateUp at;
  if (!at.find(tokens)) return;
  bf16 *gate = gate_up + at.token * 2 * FFN, *row = d_inner + at.token * FFN;
  Float8 g = load8<FFN>(gate, at.column), u = load8<FFN>(gate + FFN, at.column), d = load8<FFN>(row, at.column), inner;
  for (int i = 0; i < 8; i++) {
    float sigmoid = 1.f / (1.f + __expf(-g.at[i])), silu = g.at[i] * sigmoid;
    inner.at[i] = silu * u.at[i];
    g.at[i] = d.at[i] * u.at[i] * sigmoid * (1.f + g.at[i] * (1.f - sigmoid));
    u.at[i] = d.at[i] * silu;
  }
  store8<FFN>(gate, at.column, g);
  store8<FFN>(gate + FFN, at.column, u);
  store8<FFN>(row, at.column, inner);
}

// Rotation. HEAD_THREADS threads of a warp share a head of the queries or keys: each has a chunk of
// its first half and the same chunk of its second half.
struct HeadThread {
  int column = threadIdx.x % HEAD_THREADS * 8;

  __device__ __forceinline__ void load(Float8 &a, Float8 &b, const bf16 *head) const {
    a = b = Float8{};
    if (column < HALF) a = load8<HALF>(head, column), b = load8<HALF>(head + HALF, column);
  }
  __device__ __forceinline__ void store(bf16 *head, const Float8 &a, const Float8 &b) const {
    if (column < HALF) store8<HALF>(head, column, a), store8<HALF>(head + HALF, column, b);
  }
  // Rotates the pairs of a token by angles with these cosines and sines; `sign` is 1, or -1 to
  // rotate back.
  __device__ __forceinline__ void rotate(Float8 &a, Float8 &b, const float *cosines, const float *sines, size_t token,
                                         float sign) const {
    if (column >= HALF) return;
    Float8 c = load8<HALF>(cosines + token * HALF, column), s = load8<HALF>(sines + token * HALF, column);
    for (int i = 0; i < 8; i++) {
      float x = a.at[i], y = b.at[i], sine = sign * s.at[i];
      a.at[i] = x * c.at[i] - y * sine;
      b.at[i] = y * c.at[i] + x * sine;
    }
  }
  // Every thread of the head gets the sum over the head. All threads of the warp must call it.
  static __device__ __forceinline__ float sum(float x) {
    for (int step = HEAD_THREADS / 2; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

// Norms the queries and keys of qkv [T, QKV] if they have norms, and rotates them by angles with
// these cosines and sines [T, HALF], in place. What they were is copied to qk [T, HEADS + KV_HEADS,
// HEAD_DIM], which like the weights of the norms is null without norms.
extern "C" __global__ void rotate(bf16 *qkv, const float *cosines, const float *sines, const bf16 *q_norm,
                                  const bf16 *k_norm, bf16 *qk, int tokens) {
  const HeadThread part{};
  const int heads = HEADS + KV_HEADS;
  size_t index = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / HEAD_THREADS, token = index / heads;
  int head = index % heads;
  bool has_head = token < tokens;
  bf16 *at = qkv + token * QKV + head * HEAD_DIM;
  Float8 a = {}, b = {};
  if (has_head) part.load(a, b, at);
  if constexpr (QK_NORM) {
    float squares = 0.f;
    for (int i = 0; i < 8; i++) squares += a.at[i] * a.at[i] + b.at[i] * b.at[i];
    float scale = rsqrtf(part.sum(squares) * (1.f / HEAD_DIM) + EPS);
    if (has_head) part.store(qk + index * HEAD_DIM, a, b);
    Float8 u, w;
    part.load(u, w, head < HEADS ? q_norm : k_norm);
    for (int i = 0; i < 8; i++) a.at[i] *= scale * u.at[i], b.at[i] *= scale * w.at[i];
  }
  if (!has_head) return;
  part.rotate(a, b, cosines, sines, token, 1.f);
  part.store(at, a, b);
}

// In place, d_qkv [T, QKV] becomes the gradient of what `rotate` was given. A block writes its sums
// of the gradients of both norms' weights to d_weights_partial [blocks, 2, HEAD_DIM].
extern "C" __global__ void rotate_backward(bf16 *d_qkv, const float *cosines, const float *sines, const bf16 *q_norm,
                                           const bf16 *k_norm, const bf16 *qk, float *d_weights_partial, int tokens) {
  const HeadThread part{};
  const int heads_per_block = blockDim.x / HEAD_THREADS, head_in_block = threadIdx.x / HEAD_THREADS;
  for (int is_key = 0; is_key < 2; is_key++) {
    const int first_head = is_key ? HEADS : 0;
    const u32 heads = is_key ? KV_HEADS : HEADS;
    Float8 u = {}, w = {}, d_u = {}, d_w = {};
    if (QK_NORM) part.load(u, w, is_key ? k_norm : q_norm);
    for (size_t first = (size_t)blockIdx.x * heads_per_block; first < (size_t)tokens * heads;
         first += (size_t)gridDim.x * heads_per_block) {
      size_t index = first + head_in_block, token = index / heads;
      int head = first_head + index % heads;
      bool has_head = token < tokens;
      bf16 *at = d_qkv + token * QKV + head * HEAD_DIM;
      Float8 a = {}, b = {};
      if (has_head) part.load(a, b, at), part.rotate(a, b, cosines, sines, token, -1.f);
      if constexpr (QK_NORM) {
        Float8 x = {}, y = {};
        if (has_head) part.load(x, y, qk + (token * (HEADS + KV_HEADS) + head) * HEAD_DIM);
        float squares = 0.f, dot = 0.f;
        for (int i = 0; i < 8; i++) {
          squares += x.at[i] * x.at[i] + y.at[i] * y.at[i];
          dot += x.at[i] * u.at[i] * a.at[i] + y.at[i] * w.at[i] * b.at[i];
        }
        float scale = rsqrtf(part.sum(squares) * (1.f / HEAD_DIM) + EPS);
        float shrink = part.sum(dot) * scale * scale * (1.f / HEAD_DIM);
        for (int i = 0; i < 8; i++) {
          d_u.at[i] += a.at[i] * x.at[i] * scale, d_w.at[i] += b.at[i] * y.at[i] * scale;
          a.at[i] = scale * (u.at[i] * a.at[i] - x.at[i] * shrink);
          b.at[i] = scale * (w.at[i] * b.at[i] - y.at[i] * shrink);
        }
      }
      if (has_head) part.store(at, a, b);
    }
    if constexpr (QK_NORM) {
      // The heads of the block add up one after another, so that every run gives the same sum.
      __shared__ float sums[HEAD_DIM];
      for (int turn = 0; turn < heads_per_block; turn++) {
        if (turn == head_in_block)
          for (int i = 0; i < 8; i++)
            if (part.column + i < HALF) {
              float *to = sums + part.column + i;
              to[0] = (turn ? to[0] : 0.f) + d_u.at[i], to[HALF] = (turn ? to[HALF] : 0.f) + d_w.at[i];
            }
        __syncthreads();
      }
      float *to = d_weights_partial + ((size_t)blockIdx.x * 2 + is_key) * HEAD_DIM;
      for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) to[i] = sums[i];
      __syncthreads();
    }
  }
}

// Eight neighbouring logits of a row. The padding counts for nothing.
__device__ __forceinline__ Float8 load_logits(const bf16 *row, int id) {
  Float8 x = load8(row + id);
  if (VOCAB % 8 != 0 && id + 8 > VOCAB)
    for (int i = VOCAB % 8; i < 8; i++) x.at[i] = -1e30f;
  return x;
}

// logsumexp of each row of logits [rows, PITCH]. One block per row.
extern "C" __global__ void logsumexp(const bf16 *logits, float *out) {
  const bf16 *row = logits + (size_t)blockIdx.x * PITCH;
  float max = -INFINITY, sum = 0.f;
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load_logits(row, id);
    float max8 = x.at[0];
    for (int i = 1; i < 8; i++) max8 = fmaxf(max8, x.at[i]);
    if (max8 > max) sum *= __expf(max - max8), max = max8;
    for (int i = 0; i < 8; i++) sum += __expf(x.at[i] - max);
  }
  float row_max = block_max(max);
  sum = block_sum(max == -INFINITY ? 0.f : sum * __expf(max - row_max));
  if (threadIdx.x == 0) out[blockIdx.x] = row_max + logf(sum);
}

// out[row] = the divergence between the student's distribution p_s and a target distribution p_t,
// given as logits. The student's logits become their gradient times `scale` and, unless `weights` is
// null, weights[row]. `kind`: FORWARD_KL is KL(p_t || p_s), REVERSE_KL is KL(p_s || p_t); with the
// acceptance a = sum of min(p_s, p_t), NEG_LOG_ACCEPTANCE is -log a and LK_HYBRID is
// w KL(p_t || p_s) + (1 - w) (1 - a) with the constant w = exp(-3 a). One block per row of the
// student; row i is compared with row target_rows[i] of the targets.
extern "C" __global__ void divergence(bf16 *logits, const float *logsumexps, const bf16 *targets,
                                      const float *target_logsumexps, const long long *target_rows,
                                      const float *weights, int kind, float scale, float *out) {
  bf16 *student = logits + (size_t)blockIdx.x * PITCH;
  const bf16 *target = targets + (size_t)target_rows[blockIdx.x] * PITCH;
  float student_logsumexp = logsumexps[blockIdx.x], target_logsumexp = target_logsumexps[target_rows[blockIdx.x]];
  const bool by_acceptance = kind == NEG_LOG_ACCEPTANCE || kind == LK_HYBRID;
  if (weights) scale *= weights[blockIdx.x];
  // sum of p_t (log p_t - log m) and of p_s (log p_s - log m), where m is the other distribution
  // or, for Jensen-Shannon, the mean.
  float target_sum = 0.f, student_sum = 0.f;
  // a, and the part of it where p_s is the smaller, so that more of it is accepted.
  float acceptance = 0.f, smaller_sum = 0.f;
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load_logits(student, id), y = load_logits(target, id);
    for (int i = 0; i < 8; i++) {
      float log_s = x.at[i] - student_logsumexp, log_t = y.at[i] - target_logsumexp;
      float p_s = __expf(log_s), p_t = __expf(log_t);
      if (kind == FORWARD_KL) {
        target_sum += p_t * (log_t - log_s);
        x.at[i] = scale * (p_s - p_t);
      } else if (kind == REVERSE_KL) {
        student_sum += p_s * (log_s - log_t);
      } else if (by_acceptance) {
        target_sum += p_t * (log_t - log_s);
        acceptance += fminf(p_s, p_t);
        smaller_sum += p_s < p_t ? p_s : 0.f;
      } else {
        float log_m = __logf(0.5f * (p_t + p_s) + 1e-38f);
        target_sum += p_t > 0.f ? p_t * (log_t - log_m) : 0.f;
        student_sum += p_s > 0.f ? p_s * (log_s - log_m) : 0.f;
      }
    }
    if (kind == FORWARD_KL) store8(student + id, x);
  }
  target_sum = block_sum(target_sum), student_sum = block_sum(student_sum);
  float kl_weight = 0.f;
  if (by_acceptance) {
    acceptance = fmaxf(block_sum(acceptance), 1e-30f), smaller_sum = block_sum(smaller_sum);
    kl_weight = kind == LK_HYBRID ? __expf(-3.f * acceptance) : 0.f;
  }
  if (threadIdx.x == 0) {
    float sum = target_sum + student_sum;
    out[blockIdx.x] = kind == JENSEN_SHANNON       ? 0.5f * sum
                      : kind == NEG_LOG_ACCEPTANCE ? -__logf(acceptance)
                      : kind == LK_HYBRID          ? kl_weight * sum + (1.f - kl_weight) * (1.f - acceptance)
                                                   : sum;
  }
  if (kind == FORWARD_KL) return;
  const float acceptance_scale = kind == NEG_LOG_ACCEPTANCE ? scale / acceptance : scale * (1.f - kl_weight);
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load_logits(student, id), y = load_logits(target, id);
    for (int i = 0; i < 8; i++) {
      float log_s = x.at[i] - student_logsumexp, log_t = y.at[i] - target_logsumexp, p_s = __expf(log_s);
      if (by_acceptance) {
        float p_t = __expf(log_t), is_smaller = p_s < p_t ? 1.f : 0.f;
        x.at[i] = acceptance_scale * p_s * (smaller_sum - is_smaller) + scale * kl_weight * (p_s - p_t);
      } else {
        float log_m = kind == REVERSE_KL ? log_t : __logf(0.5f * (__expf(log_t) + p_s) + 1e-38f);
        x.at[i] = p_s > 0.f ? scale * (kind == REVERSE_KL ? 1.f : 0.5f) * p_s * (log_s - log_m - student_sum) : 0.f;
      }
    }
    store8(student + id, x);
  }
}

// out[row] = the cross-entropy of a label (0 for a negative one, which means none). With a frozen
// teacher (without one, its pointers are null), teacher_out[row] = KL(teacher || student) of the
// same row. The student's logits become the gradient of both, each times its own scale. One block
// per row.
extern "C" __global__ void cross_entropy(bf16 *logits, const float *logsumexps, const long long *labels, float scale,
                                         const bf16 *teacher, const float *teacher_logsumexps, float teacher_scale,
                                         float *out, float *teacher_out) {
  bf16 *student = logits + (size_t)blockIdx.x * PITCH;
  float student_logsumexp = logsumexps[blockIdx.x], divergence = 0.f;
  int label = (int)labels[blockIdx.x];
  bool has_label = label >= 0;
  float label_logit = has_label ? bf16_to_f32(student[label]) : student_logsumexp;
  if (!has_label) scale = 0.f;
  __syncthreads();
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load_logits(student, id), y = {};
    if (teacher) y = load_logits(teacher + (size_t)blockIdx.x * PITCH, id);
    for (int i = 0; i < 8; i++) {
      float log_s = x.at[i] - student_logsumexp, p_s = __expf(log_s);
      float d = scale * (p_s - (id + i == label ? 1.f : 0.f));
      if (teacher) {
        float log_t = y.at[i] - teacher_logsumexps[blockIdx.x], p_t = __expf(log_t);
        divergence += p_t * (log_t - log_s);
        d += teacher_scale * (p_s - p_t);
      }
      x.at[i] = d;
    }
    store8(student + id, x);
  }
  if (teacher) divergence = block_sum(divergence);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = student_logsumexp - label_logit;
    if (teacher) teacher_out[blockIdx.x] = divergence;
  }
}
