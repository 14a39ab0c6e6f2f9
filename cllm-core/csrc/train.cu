// What a training step computes beside its matrix products and its attention, compiled at run time for one model's shape.
// bf16 in memory, float32 in registers. T tokens; every row of a tensor is contiguous.
//
// Given as macros: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EPS.
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define HALF (HEAD_DIM / 2)

struct Eight {
  float at[8];
};

__device__ __forceinline__ Eight read(const bf16 *from) {
  uint4 x = *(const uint4 *)from;
  return {low(x.x), high(x.x), low(x.y), high(x.y), low(x.z), high(x.z), low(x.w), high(x.w)};
}

__device__ __forceinline__ void write(bf16 *to, const Eight &x) {
  *(uint4 *)to = make_uint4(pack(x.at[0], x.at[1]), pack(x.at[2], x.at[3]), pack(x.at[4], x.at[5]), pack(x.at[6], x.at[7]));
}

// Sums of a value over all threads of the block, known to each.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float parts[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < blockDim.x / 32; w++) sum += parts[w];
  return sum;
}

__device__ __forceinline__ float block_max(float x) {
  __shared__ float parts[32];
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float top = parts[0];
  for (int w = 1; w < blockDim.x / 32; w++) top = fmaxf(top, parts[w]);
  return top;
}

// Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467) of a row a block; HIDDEN / 8 threads work.
extern "C" __global__ void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out) {
  size_t place = (size_t)blockIdx.x * HIDDEN + threadIdx.x * 8;
  bool works = threadIdx.x < HIDDEN / 8;
  Eight v = {};
  if (works) v = read(x + place);
  float squares = 0.f;
  for (int i = 0; i < 8; i++) squares += v.at[i] * v.at[i];
  float scale = rsqrtf(block_sum(squares) * (1.f / HIDDEN) + EPS);
  if (!works) return;
  Eight w = read(weight + threadIdx.x * 8);
  for (int i = 0; i < 8; i++) v.at[i] *= scale * w.at[i];
  write(out + place, v);
}

// d_x = d_residual + what follows from d_out; may be written over d_residual. Each block takes rows in turn and leaves its part of
// the weight's gradient in `parts` [blocks, HIDDEN].
extern "C" __global__ void rms_norm_backward(const bf16 *x, const bf16 *weight, const bf16 *d_out, const bf16 *d_residual, bf16 *d_x,
                                         float *parts, int rows) {
  bool works = threadIdx.x < HIDDEN / 8;
  Eight w = {}, d_weight = {};
  if (works) w = read(weight + threadIdx.x * 8);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    size_t place = (size_t)row * HIDDEN + threadIdx.x * 8;
    Eight v = {}, d = {};
    if (works) v = read(x + place), d = read(d_out + place);
    float squares = 0.f, dot = 0.f;
    for (int i = 0; i < 8; i++) squares += v.at[i] * v.at[i], dot += v.at[i] * w.at[i] * d.at[i];
    float scale = rsqrtf(block_sum(squares) * (1.f / HIDDEN) + EPS);
    float shrink = block_sum(dot) * scale * scale * (1.f / HIDDEN);
    if (!works) continue;
    Eight result = read(d_residual + place);
    for (int i = 0; i < 8; i++) {
      d_weight.at[i] += d.at[i] * v.at[i] * scale;
      result.at[i] += scale * (w.at[i] * d.at[i] - v.at[i] * shrink);
    }
    write(d_x + place, result);
  }
  if (!works) return;
  float *to = parts + (size_t)blockIdx.x * HIDDEN + threadIdx.x * 8;
  for (int i = 0; i < 8; i++) to[i] = d_weight.at[i];
}

// inner [T, FFN] = silu(gate) * up of [T, 2 FFN].
extern "C" __global__ void gate(const bf16 *gate_up, bf16 *inner, int tokens) {
  size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)tokens * (FFN / 8)) return;
  const bf16 *from = gate_up + index / (FFN / 8) * 2 * FFN + index % (FFN / 8) * 8;
  Eight g = read(from), u = read(from + FFN);
  for (int i = 0; i < 8; i++) g.at[i] = silu(g.at[i]) * u.at[i];
  write(inner + index * 8, g);
}

// In place: gate_up becomes its gradient, d_inner becomes inner, which the product before it still needs.
extern "C" __global__ void gate_backward(bf16 *gate_up, bf16 *d_inner, int tokens) {
  size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)tokens * (FFN / 8)) return;
  bf16 *from = gate_up + index / (FFN / 8) * 2 * FFN + index % (FFN / 8) * 8;
  Eight g = read(from), u = read(from + FFN), d = read(d_inner + index * 8), inner;
  for (int i = 0; i < 8; i++) {
    float sigmoid = 1.f / (1.f + __expf(-g.at[i])), silu = g.at[i] * sigmoid;
    inner.at[i] = silu * u.at[i];
    g.at[i] = d.at[i] * u.at[i] * sigmoid * (1.f + g.at[i] * (1.f - sigmoid));
    u.at[i] = d.at[i] * silu;
  }
  write(from, g);
  write(from + FFN, u);
  write(d_inner + index * 8, inner);
}

// Rotates queries and keys of qkv [T, QKV] in place by the angles of cos and sin [T, HALF]; `sign` -1 turns them back.
extern "C" __global__ void rotate(bf16 *qkv, const float *cos, const float *sin, float sign, int tokens) {
  const int heads = HEADS + KV_HEADS, chunks = HALF / 8;
  size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)tokens * heads * chunks) return;
  size_t token = index / (heads * chunks);
  int head = index / chunks % heads, chunk = index % chunks;
  bf16 *place = qkv + token * QKV + head * HEAD_DIM + chunk * 8;
  Eight a = read(place), b = read(place + HALF);
  const float *c = cos + token * HALF + chunk * 8, *s = sin + token * HALF + chunk * 8;
  for (int i = 0; i < 8; i++) {
    float x = a.at[i], y = b.at[i], turn = sign * s[i];
    a.at[i] = x * c[i] - y * turn;
    b.at[i] = y * c[i] + x * turn;
  }
  write(place, a);
  write(place + HALF, b);
}

// Logarithm of the sum of exponentials of a row of logits [rows, VOCAB] a block.
extern "C" __global__ void log_sum(const bf16 *logits, float *out) {
  const bf16 *row = logits + (size_t)blockIdx.x * VOCAB;
  float top = -INFINITY, sum = 0.f;
  for (int place = threadIdx.x * 8; place < VOCAB; place += blockDim.x * 8) {
    Eight x = read(row + place);
    float most = x.at[0];
    for (int i = 1; i < 8; i++) most = fmaxf(most, x.at[i]);
    if (most > top) sum *= __expf(top - most), top = most;
    for (int i = 0; i < 8; i++) sum += __expf(x.at[i] - top);
  }
  float whole = block_max(top);
  sum = block_sum(top == -INFINITY ? 0.f : sum * __expf(top - whole));
  if (threadIdx.x == 0) out[blockIdx.x] = whole + logf(sum);
}

// A row a block: the divergence of the student's distribution from a target's, and in the place of the student's logits their
// gradient times `scale`. kind 0: KL(target || student), 1: KL(student || target), 2: Jensen-Shannon.
extern "C" __global__ void divergence(bf16 *logits, const float *log_sums, const bf16 *targets, const float *target_log_sums,
                                      const long long *target_rows, int kind, float scale, float *out) {
  bf16 *student = logits + (size_t)blockIdx.x * VOCAB;
  const bf16 *target = targets + (size_t)target_rows[blockIdx.x] * VOCAB;
  float student_sum = log_sums[blockIdx.x], target_sum = target_log_sums[target_rows[blockIdx.x]];
  // Sums over the row of target * (log target - log middle) and student * (log student - log middle).
  float of_target = 0.f, of_student = 0.f;
  for (int place = threadIdx.x * 8; place < VOCAB; place += blockDim.x * 8) {
    Eight x = read(student + place), y = read(target + place);
    for (int i = 0; i < 8; i++) {
      float lq = x.at[i] - student_sum, lp = y.at[i] - target_sum, q = __expf(lq), p = __expf(lp);
      if (kind == 0) {
        of_target += p * (lp - lq);
        x.at[i] = scale * (q - p);
      } else if (kind == 1) {
        of_student += q * (lq - lp);
      } else {
        float middle = __logf(0.5f * (p + q) + 1e-38f);
        of_target += p > 0.f ? p * (lp - middle) : 0.f;
        of_student += q > 0.f ? q * (lq - middle) : 0.f;
      }
    }
    if (kind == 0) write(student + place, x);
  }
  of_target = block_sum(of_target), of_student = block_sum(of_student);
  if (threadIdx.x == 0) out[blockIdx.x] = kind == 2 ? 0.5f * (of_target + of_student) : of_target + of_student;
  if (kind == 0) return;
  for (int place = threadIdx.x * 8; place < VOCAB; place += blockDim.x * 8) {
    Eight x = read(student + place), y = read(target + place);
    for (int i = 0; i < 8; i++) {
      float lq = x.at[i] - student_sum, lp = y.at[i] - target_sum, q = __expf(lq);
      float against = kind == 1 ? lp : __logf(0.5f * (__expf(lp) + q) + 1e-38f);
      x.at[i] = q > 0.f ? scale * (kind == 1 ? 1.f : 0.5f) * q * (lq - against - of_student) : 0.f;
    }
    write(student + place, x);
  }
}

// A row a block: cross-entropy of a label (none where it is negative), and KL from a frozen teacher's distribution where there is one (else null); the
// student's logits become the gradient of both, each times its scale.
extern "C" __global__ void cross_entropy(bf16 *logits, const float *log_sums, const long long *labels, float scale,
                                         const bf16 *teacher, const float *teacher_log_sums, float teacher_scale, float *out,
                                         float *teacher_out) {
  bf16 *student = logits + (size_t)blockIdx.x * VOCAB;
  float student_sum = log_sums[blockIdx.x], divergence = 0.f;
  int label = (int)labels[blockIdx.x];
  bool taught = label >= 0;
  float of_label = taught ? wide(student[label]) : student_sum;
  if (!taught) scale = 0.f;
  __syncthreads();
  for (int place = threadIdx.x * 8; place < VOCAB; place += blockDim.x * 8) {
    Eight x = read(student + place), y = {};
    if (teacher) y = read(teacher + (size_t)blockIdx.x * VOCAB + place);
    for (int i = 0; i < 8; i++) {
      float lq = x.at[i] - student_sum, q = __expf(lq);
      float d = scale * (q - (place + i == label ? 1.f : 0.f));
      if (teacher) {
        float lp = y.at[i] - teacher_log_sums[blockIdx.x], p = __expf(lp);
        divergence += p * (lp - lq);
        d += teacher_scale * (q - p);
      }
      x.at[i] = d;
    }
    write(student + place, x);
  }
  if (teacher) divergence = block_sum(divergence);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = student_sum - of_label;
    if (teacher) teacher_out[blockIdx.x] = divergence;
  }
}
