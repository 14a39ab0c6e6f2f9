// The beginning of every kernel source: bfloat16 conversions, tensor-core products and
// reductions. Kernels are compiled at run time by NVRTC, which has no headers, so even INFINITY is
// defined here.
typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INFINITY __int_as_float(0x7f800000)

// A u32 often holds a pair of bf16 numbers: the lower one in its low half.
__device__ __forceinline__ float low_to_f32(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_to_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float bf16_to_f32(bf16 x) { return __uint_as_float(((u32)x) << 16); }
__device__ __forceinline__ u32 pack_bf16(float lower, float upper) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
}
__device__ __forceinline__ bf16 f32_to_bf16(float x) { return (bf16)(pack_bf16(x, 0.f) & 0xffffu); }

// c += a b, with the fragments of one warp (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Every lane gets the sum over the warp.
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Every thread of a block gets the sum over all, in the same order each time.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < blockDim.x / 32; w++) sum += sums[w];
  return sum;
}

// Each quad (four neighbouring lanes) holds the values of one row of an mma result; every lane gets
// the row's sum or maximum.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }
