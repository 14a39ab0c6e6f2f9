// What all kernels of a decoding step share, whatever the GPU.
//
// Macros from the host: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EPS.
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define GROUP (HEADS / KV_HEADS)
#define HALF (HEAD_DIM / 2)

// Programmatic dependent launch: a kernel may start while its predecessor ends, but must not read
// the predecessor's results before wait_for_predecessor(). GPUs before Hopper run kernels one after
// another.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Arguments of kernels in groups. Kernels take them flat, a group per line: as parameters of a
// kernel, structs made the compiler use up to 8 more registers in the same code.

// Tokens of a step. Token i belongs to row `row[i]` of the cache (-1 for padding); its key and
// value go to slot `slot[i]`, its rotary position is `position[i]`. `visible[i]` says which slots
// of its own window the token attends to (see `attend`).
struct Tokens {
  const int *row, *slot, *position;
  const u64 *visible;
};

// The cache of one layer: keys [rows, KV_HEADS, capacity, HEAD_DIM], and values transposed, [rows,
// KV_HEADS, HEAD_DIM, capacity].
struct Cache {
  bf16 *keys, *values;
  int capacity;
  __device__ __forceinline__ bf16 *key(int row, int head, int slot) const {
    return keys + (((size_t)row * KV_HEADS + head) * capacity + slot) * HEAD_DIM;
  }
  __device__ __forceinline__ bf16 *value(int row, int head, int dim) const {
    return values + (((size_t)row * KV_HEADS + head) * HEAD_DIM + dim) * capacity;
  }
};

// Tables of cosines and sines [positions, HALF].
struct Rope {
  const float *cosines, *sines;
};
