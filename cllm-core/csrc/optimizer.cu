// AdamW (Loshchilov & Hutter, arXiv 1711.05101) over flat buffers: one pass reads the gradients,
// weights and moments and writes the new ones. Each thread processes eight neighbouring elements;
// the number of elements is a multiple of eight.
//
// Parameters of both kernels:
//   gradient_scale: divisor of the gradients, on the device. skip: 1 leaves everything as it is.
//   num_decayed: leading elements whose weights decay, to `decay` times their value.
//   step_size: the learning rate over the first moment's bias correction.
//   deviation_scale: 1 over the square root of the second moment's bias correction.
#define ELEMENTS 8

struct AdamW {
  float gradient_scale, decay, beta1, beta2, step_size, deviation_scale, eps;
  long long num_decayed;

  __device__ __forceinline__ void update(float &weight, float &exp_avg, float &exp_avg_sq, float gradient,
                                         long long index) const {
    gradient *= gradient_scale;
    exp_avg = beta1 * exp_avg + (1.f - beta1) * gradient;
    exp_avg_sq = beta2 * exp_avg_sq + (1.f - beta2) * gradient * gradient;
    if (index < num_decayed) weight *= decay;
    weight -= step_size * exp_avg / (sqrtf(exp_avg_sq) * deviation_scale + eps);
  }
};

__device__ __forceinline__ void load(float (&x)[ELEMENTS], const bf16 *from) {
  uint4 pairs = *(const uint4 *)from;
  x[0] = low_to_f32(pairs.x), x[1] = high_to_f32(pairs.x), x[2] = low_to_f32(pairs.y), x[3] = high_to_f32(pairs.y);
  x[4] = low_to_f32(pairs.z), x[5] = high_to_f32(pairs.z), x[6] = low_to_f32(pairs.w), x[7] = high_to_f32(pairs.w);
}

__device__ __forceinline__ void load(float (&x)[ELEMENTS], const float *from) {
  float4 a = *(const float4 *)from, b = *(const float4 *)(from + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void store(float *to, const float (&x)[ELEMENTS]) {
  *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
  *(float4 *)(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

// Rounds to the nearest number in bfloat16, as GPUs before Ampere have no instruction for it.
__device__ __forceinline__ u32 round_to_nearest(float x, float y) {
  u32 low = __float_as_uint(x), high = __float_as_uint(y);
  low += 0x7fffu + (low >> 16 & 1), high += 0x7fffu + (high >> 16 & 1);
  return low >> 16 | (high & 0xffff0000u);
}

__device__ __forceinline__ void store(bf16 *to, const float (&x)[ELEMENTS]) {
  *(uint4 *)to = make_uint4(round_to_nearest(x[0], x[1]), round_to_nearest(x[2], x[3]), round_to_nearest(x[4], x[5]),
                            round_to_nearest(x[6], x[7]));
}

// 128 random bits for a counter and a key: Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011).
__device__ __forceinline__ uint4 philox(uint4 counter, u64 key) {
  u32 key_low = (u32)key, key_high = (u32)(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u64 a = (u64)0xD2511F53u * counter.x, b = (u64)0xCD9E8D57u * counter.z;
    counter = make_uint4((u32)(b >> 32) ^ counter.y ^ key_low, (u32)b, (u32)(a >> 32) ^ counter.w ^ key_high, (u32)a);
    key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
  }
  return counter;
}

// Rounds to either neighbour in bfloat16, with a probability in proportion to its nearness: the
// noise carries from the lower half of the number into the upper half as often as it should.
__device__ __forceinline__ u32 round_stochastically(float x, float y, u32 noise) {
  u32 low = __float_as_uint(x) + (noise & 0xffffu), high = __float_as_uint(y) + (noise >> 16);
  return low >> 16 | (high & 0xffff0000u);
}

__device__ __forceinline__ void store_rounded(bf16 *to, const float (&x)[ELEMENTS], uint4 noise) {
  *(uint4 *)to = make_uint4(round_stochastically(x[0], x[1], noise.x), round_stochastically(x[2], x[3], noise.y),
                            round_stochastically(x[4], x[5], noise.z), round_stochastically(x[6], x[7], noise.w));
}

// Weights and moments in bfloat16, rounded stochastically. The noise depends on `seed` and on the
// index of an element in the whole buffer, of which these elements begin at `first_element`.
extern "C" __global__ void adamw_bf16(const bf16 *gradients, const float *gradient_scale, const float *skip,
                                      long long num_decayed, float decay, float beta1, float beta2, float step_size,
                                      float deviation_scale, float eps, bf16 *weights, bf16 *exp_avg,
                                      bf16 *exp_avg_sq, long long first_element, long long seed, int threads) {
  size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, at = thread * ELEMENTS;
  if (thread >= threads || *skip != 0.f) return;
  const AdamW adamw = {1.f / *gradient_scale, decay, beta1, beta2, step_size, deviation_scale, eps, num_decayed};
  float g[ELEMENTS], w[ELEMENTS], m[ELEMENTS], v[ELEMENTS];
  load(g, gradients + at), load(w, weights + at), load(m, exp_avg + at), load(v, exp_avg_sq + at);
  for (int i = 0; i < ELEMENTS; i++) adamw.update(w[i], m[i], v[i], g[i], at + i);
  u64 counter = (u64)first_element / ELEMENTS + thread;
  auto noise = [&](u32 tensor) { return philox(make_uint4((u32)counter, (u32)(counter >> 32), tensor, 0), seed); };
  store_rounded(weights + at, w, noise(0));
  store_rounded(exp_avg + at, m, noise(1));
  store_rounded(exp_avg_sq + at, v, noise(2));
}

// Master weights and moments in float32; `weights` are the master weights rounded.
extern "C" __global__ void adamw_float32(const bf16 *gradients, const float *gradient_scale, const float *skip,
                                         long long num_decayed, float decay, float beta1, float beta2, float step_size,
                                         float deviation_scale, float eps, float *master_weights, float *exp_avg,
                                         float *exp_avg_sq, bf16 *weights, int threads) {
  size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, at = thread * ELEMENTS;
  if (thread >= threads || *skip != 0.f) return;
  const AdamW adamw = {1.f / *gradient_scale, decay, beta1, beta2, step_size, deviation_scale, eps, num_decayed};
  float g[ELEMENTS], w[ELEMENTS], m[ELEMENTS], v[ELEMENTS];
  load(g, gradients + at), load(w, master_weights + at), load(m, exp_avg + at), load(v, exp_avg_sq + at);
  for (int i = 0; i < ELEMENTS; i++) adamw.update(w[i], m[i], v[i], g[i], at + i);
  store(master_weights + at, w), store(exp_avg + at, m), store(exp_avg_sq + at, v), store(weights + at, w);
}
