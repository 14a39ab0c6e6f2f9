// The little that tch does not bind. Every function returns 0, or 1 with the message in cllm_last_error().
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

// One AdamW step in place on float32 tensors: parameters, gradients, first and second moments, and two scalars: the gradients
// are divided by the one, and where the other is 1 nothing changes. A tch tensor's pointer is an at::Tensor*.
int cllm_fused_adamw(void *const *tensors, double number, double lr, double beta1, double beta2, double weight_decay,
                     double eps) {
  return guarded([&] {
    auto at = [&](size_t index) { return *static_cast<at::Tensor *>(tensors[index]); };
    std::vector<at::Tensor> p{at(0)}, g{at(1)}, m{at(2)}, v{at(3)}, step{at::full({}, number, at(0).options())};
    at::_fused_adamw_(p, g, m, v, {}, step, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false,
                      at(4), at(5));
  });
}

// Autograd adds to a gradient that is there in place, so that it stays where it is.
int cllm_collect_gradient(void *tensor, void *gradient) {
  return guarded([&] { static_cast<at::Tensor *>(tensor)->mutable_grad() = *static_cast<at::Tensor *>(gradient); });
}

int cllm_backward(void *tensor, void *gradient) {
  return guarded([&] { static_cast<at::Tensor *>(tensor)->backward(*static_cast<at::Tensor *>(gradient)); });
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
