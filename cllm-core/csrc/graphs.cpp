// Streams and CUDA graphs. Every function returns 0, or 1 with the message in cllm_last_error().
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "guarded.h"

using c10::cuda::CUDAStream;

namespace {
CUDAStream stream_of(int device, int64_t id) {
  return CUDAStream::unpack3(id, static_cast<c10::DeviceIndex>(device), c10::DeviceType::CUDA);
}
}  // namespace

extern "C" {

// A stream of libtorch's pool, by its id.
int cllm_stream_new(int device, int64_t *id) {
  return guarded([&] { *id = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, static_cast<c10::DeviceIndex>(device)).id(); });
}

int cllm_stream_current(int device, int64_t *id) {
  return guarded([&] { *id = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).id(); });
}

// Makes it the stream of this thread's work on the device.
int cllm_stream_set(int device, int64_t id) {
  return guarded([&] { c10::cuda::setCurrentCUDAStream(stream_of(device, id)); });
}

int cllm_stream_synchronize(int device, int64_t id) {
  return guarded([&] { stream_of(device, id).synchronize(); });
}

// A memory pool that graphs which never run at once share.
int cllm_graph_pool(uint64_t *pool) {
  return guarded([&] {
    auto id = at::cuda::graph_pool_handle();
    pool[0] = id.first, pool[1] = id.second;
  });
}

// Begins to record what this thread puts on its stream, which is not the default one.
int cllm_graph_begin(const uint64_t *pool, void **graph) {
  return guarded([&] {
    auto made = std::make_unique<at::cuda::CUDAGraph>();
    made->capture_begin({pool[0], pool[1]}, cudaStreamCaptureModeThreadLocal);
    *graph = made.release();
  });
}

int cllm_graph_end(void *graph) {
  return guarded([&] { static_cast<at::cuda::CUDAGraph *>(graph)->capture_end(); });
}

int cllm_graph_replay(void *graph) {
  return guarded([&] { static_cast<at::cuda::CUDAGraph *>(graph)->replay(); });
}

void cllm_graph_free(void *graph) { delete static_cast<at::cuda::CUDAGraph *>(graph); }

// Zeros, int32, in memory of the host that a device can read; the caller owns the tensor.
int cllm_pinned_ints(int64_t count, void **tensor) {
  return guarded([&] {
    *tensor = new at::Tensor(at::zeros({count}, at::TensorOptions().dtype(at::kInt).pinned_memory(true)));
  });
}

// to.copy_(from) without waiting; for pinned memory.
int cllm_copy_async(void *to, void *from) {
  return guarded([&] { static_cast<at::Tensor *>(to)->copy_(*static_cast<at::Tensor *>(from), /*non_blocking=*/true); });
}
}
