// CUDA streams and graphs. A stream is named by its device and its id in libtorch's pool. Every
// function returns 0, or 1 with the message in cllm_last_error().
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "guarded.h"

using c10::cuda::CUDAStream;

namespace {
CUDAStream unpack(int device, int64_t id) {
  return CUDAStream::unpack3(id, static_cast<c10::DeviceIndex>(device), c10::DeviceType::CUDA);
}
}  // namespace

extern "C" {

int cllm_stream_new(int device, int64_t *id) {
  return guarded([&] {
    *id = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, static_cast<c10::DeviceIndex>(device)).id();
  });
}

int cllm_stream_current(int device, int64_t *id) {
  return guarded([&] { *id = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).id(); });
}

// Makes the stream this thread's current one.
int cllm_stream_set_current(int device, int64_t id) {
  return guarded([&] { c10::cuda::setCurrentCUDAStream(unpack(device, id)); });
}

int cllm_stream_synchronize(int device, int64_t id) {
  return guarded([&] { unpack(device, id).synchronize(); });
}

// A memory pool for graphs that never run at the same time.
int cllm_graph_pool_new(uint64_t *pool) {
  return guarded([&] {
    auto id = at::cuda::graph_pool_handle();
    pool[0] = id.first, pool[1] = id.second;
  });
}

// Starts to capture the work that this thread puts on its current stream, which must not be the
// default one. The caller owns the graph.
int cllm_graph_capture_begin(const uint64_t *pool, void **graph) {
  return guarded([&] {
    auto owned = std::make_unique<at::cuda::CUDAGraph>();
    owned->capture_begin({pool[0], pool[1]}, cudaStreamCaptureModeThreadLocal);
    *graph = owned.release();
  });
}

int cllm_graph_capture_end(void *graph) {
  return guarded([&] { static_cast<at::cuda::CUDAGraph *>(graph)->capture_end(); });
}

int cllm_graph_replay(void *graph) {
  return guarded([&] { static_cast<at::cuda::CUDAGraph *>(graph)->replay(); });
}

void cllm_graph_free(void *graph) { delete static_cast<at::cuda::CUDAGraph *>(graph); }

// int32 zeros in pinned memory of the host. The caller owns the tensor.
int cllm_pinned_zeros(int64_t count, void **tensor) {
  return guarded([&] {
    *tensor = new at::Tensor(at::zeros({count}, at::TensorOptions().dtype(at::kInt).pinned_memory(true)));
  });
}

// Starts to.copy_(from) between a GPU and the host. Of memory of the host that is not pinned, CUDA makes
// a copy of its own before it returns.
int cllm_copy_async(void *to, void *from) {
  return guarded([&] {
    static_cast<at::Tensor *>(to)->copy_(*static_cast<at::Tensor *>(from), /*non_blocking=*/true);
  });
}
}
