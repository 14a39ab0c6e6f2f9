// What kernels for Hopper share: tensor maps and the copy engine (TMA), barriers in shared memory,
// and the products of a warpgroup of four warps (wgmma).

// A tensor map (CUtensorMap): how the copy engine finds tiles of a tensor. It fills what is outside
// the tensor with zeros.
struct alignas(64) TensorMap {
  u64 words[16];
};

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Arrives at a barrier, whose phase then also waits for copies of so many bytes.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Every warp arrives once.
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until a phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred ended;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 ended, [%0], %1;\n@!ended bra AGAIN;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// Copies a tile of at most 64 columns, swizzled, whose rows have 128 bytes in shared memory.
__device__ __forceinline__ void copy_panel(u32 to, const TensorMap &from, int column, int group, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(&from), "r"(column), "r"(group), "r"(row), "r"(barrier)
      : "memory");
}

// Products run while the warpgroup goes on. They come in groups; begin_products() orders them after
// what was done to their registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last `pending`. Registers of products that it waited for must then
// be passed to settle(), so that the compiler moves no use of them to before the wait; those that
// are to be complete before a wait, too.
template <int pending>
__device__ __forceinline__ void wait_groups() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
template <int values>
__device__ __forceinline__ void settle(float (&x)[values]) {
#pragma unroll
  for (int i = 0; i < values; i++) asm volatile("" : "+f"(x[i]));
}

// How wgmma finds a tile (PTX ISA, matrix descriptor): its address, the distances of panels (128
// bytes of a row each) and of groups of 8 rows in units of 16 bytes, and the swizzle of 128 bytes.
// The same for all lanes, so that it stays in uniform registers.
template <int panel_bytes>
__device__ __forceinline__ u64 descriptor(u32 tile) {
  u32 low = __shfl_sync(0xffffffffu, tile, 0) >> 4 | panel_bytes >> 4 << 16;
  return (u64)(1024 >> 4 | 1 << 30) << 32 | low;
}

// The instructions list each register: N columns have N / 2 values in a thread.
#define REGISTERS_8 "%0,%1,%2,%3"
#define REGISTERS_16 REGISTERS_8 ",%4,%5,%6,%7"
#define REGISTERS_32 REGISTERS_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_64 REGISTERS_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_128                                                                   \
  REGISTERS_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%" \
               "49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FOUR(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VALUES_8(c) FOUR(c, 0)
#define VALUES_16(c) VALUES_8(c), FOUR(c, 4)
#define VALUES_32(c) VALUES_16(c), FOUR(c, 8), FOUR(c, 12)
#define VALUES_64(c) VALUES_32(c), FOUR(c, 16), FOUR(c, 20), FOUR(c, 24), FOUR(c, 28)
#define VALUES_128(c)                                                                                               \
  VALUES_64(c), FOUR(c, 32), FOUR(c, 36), FOUR(c, 40), FOUR(c, 44), FOUR(c, 48), FOUR(c, 52), FOUR(c, 56), FOUR(c, 60)
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" REGISTERS_##n "}, "
