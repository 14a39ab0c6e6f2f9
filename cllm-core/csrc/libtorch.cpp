// The few functions of libtorch that tch does not bind. A pointer to a tensor is tch's own: an
// at::Tensor*. Every function returns 0, or 1 with the message in cllm_last_error().
#include <ATen/ATen.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <vector>

#include "guarded.h"

std::string &last_error() {
  thread_local std::string message;
  return message;
}

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

int cllm_backward(void *tensor, void *grad) {
  return guarded([&] { static_cast<at::Tensor *>(tensor)->backward(*static_cast<at::Tensor *>(grad)); });
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

int cllm_reset_peak_gpu_memory(int device) {
  return guarded([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}
}
