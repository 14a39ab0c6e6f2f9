// The little that tch does not bind. Every function returns 0, or 1 with the message in cllm_last_error().
#include <ATen/ATen.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <vector>

#include "guarded.h"

std::string &last_error() {
  thread_local std::string message;
  return message;
}

namespace {
// A tch tensor's pointer is an at::Tensor*.
std::vector<at::Tensor> list(void *const *tensors, size_t count) {
  std::vector<at::Tensor> result;
  result.reserve(count);
  for (size_t i = 0; i < count; i++) result.push_back(*static_cast<at::Tensor *>(tensors[i]));
  return result;
}
}  // namespace

extern "C" {

const char *cllm_last_error() { return last_error().c_str(); }

// One AdamW step over all parameters (float32), in place. step: float32 scalar tensors, one each, incremented by the caller.
// scale, skip: float32 scalar tensors; the gradients are divided by scale, and where skip is 1 nothing changes.
int cllm_fused_adamw(void *const *parameters, void *const *gradients, void *const *first, void *const *second,
                     void *const *steps, size_t count, double lr, double beta1, double beta2, double weight_decay,
                     double eps, void *scale, void *skip) {
  return guarded([&] {
    auto p = list(parameters, count), g = list(gradients, count), m = list(first, count), v = list(second, count),
         s = list(steps, count);
    at::_fused_adamw_(p, g, m, v, {}, s, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false,
                      *static_cast<at::Tensor *>(scale), *static_cast<at::Tensor *>(skip));
  });
}

// The 2-norm over all tensors as one scalar tensor on their device; the caller owns the result.
int cllm_global_norm(void *const *tensors, size_t count, void **norm) {
  return guarded([&] {
    auto norms = at::_foreach_norm(list(tensors, count));
    *norm = new at::Tensor(at::stack(norms).to(at::kFloat).norm());
  });
}

// Bytes now in use and the peak since the last reset, of the caching allocator of one CUDA device.
int cllm_cuda_memory(int device, int64_t *current, int64_t *peak) {
  return guarded([&] {
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto &bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
    *current = bytes.current;
    *peak = bytes.peak;
  });
}

int cllm_cuda_reset_peak(int device) {
  return guarded([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}
}
