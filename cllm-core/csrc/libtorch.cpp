// The few functions of libtorch that tch does not bind. A pointer to a tensor is tch's own: an
// at::Tensor*. Every function returns 0, or 1 with the message in cllm_last_error().
#include <ATen/ATen.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "guarded.h"

std::string &last_error() {
  thread_local std::string message;
  return message;
}

namespace {
// Counts the bytes that tensors on the CPU have. libtorch tells it about every allocation of the
// thread that it was pushed on, and of the backward passes that this thread starts.
struct CpuMemory : c10::MemoryReportingInfoBase {
  std::mutex mutex;
  int64_t current = 0, peak = 0;

  void reportMemoryUsage(void *, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    std::lock_guard<std::mutex> lock(mutex);
    current += bytes;
    peak = std::max(peak, current);
  }
  bool memoryProfilingEnabled() const override { return true; }
};
}  // namespace

extern "C" {

const char *cllm_last_error() { return last_error().c_str(); }

// One AdamW step in place. `tensors`, all float32: weights, gradients, exp_avg, exp_avg_sq, and two
// scalars, one that gradients are divided by and one that skips the step if it is 1. `step` counts
// from 1.
int cllm_fused_adamw(void *const *tensors, double step, double lr, double beta1, double beta2, double weight_decay,
                     double eps) {
  return guarded([&] {
    auto at = [&](size_t index) { return *static_cast<at::Tensor *>(tensors[index]); };
    std::vector<at::Tensor> p{at(0)}, g{at(1)}, m{at(2)}, v{at(3)}, steps{at::full({}, step, at(0).options())};
    at::_fused_adamw_(p, g, m, v, {}, steps, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false,
                      at(4), at(5));
  });
}

// tensor.grad = grad. Autograd adds to an existing gradient in place, so it keeps its address.
int cllm_set_grad(void *tensor, void *grad) {
  return guarded([&] { static_cast<at::Tensor *>(tensor)->mutable_grad() = *static_cast<at::Tensor *>(grad); });
}

int cllm_drop_grad(void *tensor) {
  return guarded([&] { static_cast<at::Tensor *>(tensor)->mutable_grad().reset(); });
}

int cllm_backward(void *tensor, void *grad) {
  return guarded([&] { static_cast<at::Tensor *>(tensor)->backward(*static_cast<at::Tensor *>(grad)); });
}

// A copy in pinned memory. tch passes a device, which libtorch warns about.
int cllm_pin_memory(void *tensor, void **pinned) {
  return guarded([&] { *pinned = new at::Tensor(static_cast<at::Tensor *>(tensor)->pin_memory()); });
}

// Bytes that tensors of a GPU use now, and the peak since the last reset.
int cllm_gpu_memory(int device, int64_t *current, int64_t *peak) {
  return guarded([&] {
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto &bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
    *current = bytes.current;
    *peak = bytes.peak;
  });
}

// The peak of what the allocator has taken from the GPU, in use or not, since the last reset.
int cllm_peak_reserved_gpu_memory(int device, int64_t *peak) {
  return guarded([&] {
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *peak = stats.reserved_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  });
}

int cllm_cpu_memory_begin() {
  return guarded([] {
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<CpuMemory>());
  });
}

int cllm_cpu_memory_end(int64_t *peak) {
  return guarded([&] {
    auto info = c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
    *peak = static_cast<CpuMemory *>(info.get())->peak;
  });
}

int cllm_reset_peak_gpu_memory(int device) {
  return guarded([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}
}
