// The kernels of a training step except its matrix products and its attention, compiled at run time
// for one model's shape. Tensors are bf16 unless their type says otherwise, sums are float32. T is
// the number of tokens; rows are contiguous.
//
// Macros from the host: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EPS, and the kinds of
// divergence: FORWARD_KL, REVERSE_KL, JENSEN_SHANNON.
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define HALF (HEAD_DIM / 2)

// Threads read and write eight neighbouring values (16 bytes) at a time.
struct Float8 {
  float at[8];
};

__device__ __forceinline__ Float8 load8(const bf16 *from) {
  uint4 x = *(const uint4 *)from;
  return {low_to_f32(x.x), high_to_f32(x.x), low_to_f32(x.y), high_to_f32(x.y),
          low_to_f32(x.z), high_to_f32(x.z), low_to_f32(x.w), high_to_f32(x.w)};
}

__device__ __forceinline__ void store8(bf16 *to, const Float8 &x) {
  *(uint4 *)to = make_uint4(pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3]), pack_bf16(x.at[4], x.at[5]),
                            pack_bf16(x.at[6], x.at[7]));
}

// Every thread gets the sum over the block.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < blockDim.x / 32; w++) sum += partial[w];
  return sum;
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

// Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467). One block per row; its first HIDDEN /
// 8 threads have data.
extern "C" __global__ void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out) {
  size_t offset = (size_t)blockIdx.x * HIDDEN + threadIdx.x * 8;
  bool has_data = threadIdx.x < HIDDEN / 8;
  Float8 v = {};
  if (has_data) v = load8(x + offset);
  float squares = 0.f;
  for (int i = 0; i < 8; i++) squares += v.at[i] * v.at[i];
  float scale = rsqrtf(block_sum(squares) * (1.f / HIDDEN) + EPS);
  if (!has_data) return;
  Float8 w = load8(weight + threadIdx.x * 8);
  for (int i = 0; i < 8; i++) v.at[i] *= scale * w.at[i];
  store8(out + offset, v);
}

// d_x = d_residual + the gradient that d_out gives x; d_x may be d_residual. A block processes
// every gridDim.x-th row and writes its sum of the weight's gradient to d_weight_partial [blocks,
// HIDDEN].
extern "C" __global__ void rms_norm_backward(const bf16 *x, const bf16 *weight, const bf16 *d_out,
                                             const bf16 *d_residual, bf16 *d_x, float *d_weight_partial, int rows) {
  bool has_data = threadIdx.x < HIDDEN / 8;
  Float8 w = {}, d_weight = {};
  if (has_data) w = load8(weight + threadIdx.x * 8);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    size_t offset = (size_t)row * HIDDEN + threadIdx.x * 8;
    Float8 v = {}, d = {};
    if (has_data) v = load8(x + offset), d = load8(d_out + offset);
    float squares = 0.f, dot = 0.f;
    for (int i = 0; i < 8; i++) squares += v.at[i] * v.at[i], dot += v.at[i] * w.at[i] * d.at[i];
    float scale = rsqrtf(block_sum(squares) * (1.f / HIDDEN) + EPS);
    float shrink = block_sum(dot) * scale * scale * (1.f / HIDDEN);
    if (!has_data) continue;
    Float8 result = load8(d_residual + offset);
    for (int i = 0; i < 8; i++) {
      d_weight.at[i] += d.at[i] * v.at[i] * scale;
      result.at[i] += scale * (w.at[i] * d.at[i] - v.at[i] * shrink);
    }
    store8(d_x + offset, result);
  }
  if (!has_data) return;
  float *to = d_weight_partial + (size_t)blockIdx.x * HIDDEN + threadIdx.x * 8;
  for (int i = 0; i < 8; i++) to[i] = d_weight.at[i];
}

// inner [T, FFN] = silu(gate) * up, where gate_up [T, 2 FFN] holds both.
extern "C" __global__ void swiglu(const bf16 *gate_up, bf16 *inner, int tokens) {
  size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)tokens * (FFN / 8)) return;
  const bf16 *from = gate_up + index / (FFN / 8) * 2 * FFN + index % (FFN / 8) * 8;
  Float8 g = load8(from), u = load8(from + FFN);
  for (int i = 0; i < 8; i++) g.at[i] = silu(g.at[i]) * u.at[i];
  store8(inner + index * 8, g);
}

// In place: gate_up becomes its own gradient; d_inner becomes inner, which the weight gradient of
// the next product needs.
extern "C" __global__ void swiglu_backward(bf16 *gate_up, bf16 *d_inner, int tokens) {
  size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)tokens * (FFN / 8)) return;
  bf16 *from = gate_up + index / (FFN / 8) * 2 * FFN + index % (FFN / 8) * 8;
  Float8 g = load8(from), u = load8(from + FFN), d = load8(d_inner + index * 8), inner;
  for (int i = 0; i < 8; i++) {
    float sigmoid = 1.f / (1.f + __expf(-g.at[i])), silu = g.at[i] * sigmoid;
    inner.at[i] = silu * u.at[i];
    g.at[i] = d.at[i] * u.at[i] * sigmoid * (1.f + g.at[i] * (1.f - sigmoid));
    u.at[i] = d.at[i] * silu;
  }
  store8(from, g);
  store8(from + FFN, u);
  store8(d_inner + index * 8, inner);
}

// Rotates the queries and keys of qkv [T, QKV] in place by angles with these cosines and sines [T,
// HALF]. `sign` is 1, or -1 to rotate back.
extern "C" __global__ void rotate(bf16 *qkv, const float *cosines, const float *sines, float sign, int tokens) {
  const int heads = HEADS + KV_HEADS, chunks = HALF / 8;
  size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)tokens * heads * chunks) return;
  size_t token = index / (heads * chunks);
  int head = index / chunks % heads, chunk = index % chunks;
  bf16 *at = qkv + token * QKV + head * HEAD_DIM + chunk * 8;
  Float8 a = load8(at), b = load8(at + HALF);
  const float *c = cosines + token * HALF + chunk * 8, *s = sines + token * HALF + chunk * 8;
  for (int i = 0; i < 8; i++) {
    float x = a.at[i], y = b.at[i], sine = sign * s[i];
    a.at[i] = x * c[i] - y * sine;
    b.at[i] = y * c[i] + x * sine;
  }
  store8(at, a);
  store8(at + HALF, b);
}

// logsumexp of each row of logits [rows, VOCAB]. One block per row.
extern "C" __global__ void logsumexp(const bf16 *logits, float *out) {
  const bf16 *row = logits + (size_t)blockIdx.x * VOCAB;
  float max = -INFINITY, sum = 0.f;
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load8(row + id);
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
// given as logits. The student's logits become their gradient times `scale`. `kind`: FORWARD_KL is
// KL(p_t || p_s), REVERSE_KL is KL(p_s || p_t). One block per row of the student; row i is compared
// with row target_rows[i] of the targets.
extern "C" __global__ void divergence(bf16 *logits, const float *logsumexps, const bf16 *targets,
                                      const float *target_logsumexps, const long long *target_rows, int kind,
                                      float scale, float *out) {
  bf16 *student = logits + (size_t)blockIdx.x * VOCAB;
  const bf16 *target = targets + (size_t)target_rows[blockIdx.x] * VOCAB;
  float student_logsumexp = logsumexps[blockIdx.x], target_logsumexp = target_logsumexps[target_rows[blockIdx.x]];
  // sum of p_t (log p_t - log m) and of p_s (log p_s - log m), where m is the other distribution
  // or, for Jensen-Shannon, the mean.
  float target_sum = 0.f, student_sum = 0.f;
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load8(student + id), y = load8(target + id);
    for (int i = 0; i < 8; i++) {
      float log_s = x.at[i] - student_logsumexp, log_t = y.at[i] - target_logsumexp;
      float p_s = __expf(log_s), p_t = __expf(log_t);
      if (kind == FORWARD_KL) {
        target_sum += p_t * (log_t - log_s);
        x.at[i] = scale * (p_s - p_t);
      } else if (kind == REVERSE_KL) {
        student_sum += p_s * (log_s - log_t);
      } else {
        float log_m = __logf(0.5f * (p_t + p_s) + 1e-38f);
        target_sum += p_t > 0.f ? p_t * (log_t - log_m) : 0.f;
        student_sum += p_s > 0.f ? p_s * (log_s - log_m) : 0.f;
      }
    }
    if (kind == FORWARD_KL) store8(student + id, x);
  }
  target_sum = block_sum(target_sum), student_sum = block_sum(student_sum);
  if (threadIdx.x == 0)
    out[blockIdx.x] = kind == JENSEN_SHANNON ? 0.5f * (target_sum + student_sum) : target_sum + student_sum;
  if (kind == FORWARD_KL) return;
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load8(student + id), y = load8(target + id);
    for (int i = 0; i < 8; i++) {
      float log_s = x.at[i] - student_logsumexp, log_t = y.at[i] - target_logsumexp, p_s = __expf(log_s);
      float log_m = kind == REVERSE_KL ? log_t : __logf(0.5f * (__expf(log_t) + p_s) + 1e-38f);
      x.at[i] = p_s > 0.f ? scale * (kind == REVERSE_KL ? 1.f : 0.5f) * p_s * (log_s - log_m - student_sum) : 0.f;
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
  bf16 *student = logits + (size_t)blockIdx.x * VOCAB;
  float student_logsumexp = logsumexps[blockIdx.x], divergence = 0.f;
  int label = (int)labels[blockIdx.x];
  bool has_label = label >= 0;
  float label_logit = has_label ? bf16_to_f32(student[label]) : student_logsumexp;
  if (!has_label) scale = 0.f;
  __syncthreads();
  for (int id = threadIdx.x * 8; id < VOCAB; id += blockDim.x * 8) {
    Float8 x = load8(student + id), y = {};
    if (teacher) y = load8(teacher + (size_t)blockIdx.x * VOCAB + id);
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
