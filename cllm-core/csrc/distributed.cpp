// Collectives of processes that train together: those of c10d, over NCCL on GPUs and Gloo on CPUs.
// The processes meet through a TCP store. Every function returns 0, or 1 with the message in
// cllm_last_error().
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "guarded.h"

namespace {
struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::Backend> backend;
};

at::Tensor &tensor(void *pointer) { return *static_cast<at::Tensor *>(pointer); }

// Starts a collective and waits for it: with NCCL the current stream waits, with Gloo the thread.
int run(void *group, const std::function<c10::intrusive_ptr<c10d::Work>(c10d::Backend &)> &start) {
  return guarded([&] { start(*static_cast<Group *>(group)->backend)->wait(); });
}
}  // namespace

extern "C" {

// Joins the other processes at the store, which this process serves itself if `serves`. The store's
// keys begin with `prefix`. `gpu` is the index of the GPU for NCCL, or -1 for Gloo. The caller owns
// the group.
int cllm_group_new(const char *host, int port, int serves, const char *prefix, int rank, int world_size, int gpu,
                   int64_t timeout_ms, void **group) {
  return guarded([&] {
    auto timeout = std::chrono::milliseconds(timeout_ms);
    c10d::TCPStoreOptions options;
    options.port = static_cast<uint16_t>(port);
    options.isServer = serves;
    options.numWorkers = static_cast<size_t>(world_size);
    options.waitWorkers = false;
    options.timeout = timeout;
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    c10::intrusive_ptr<c10d::Store> store = c10::make_intrusive<c10d::PrefixStore>(prefix, tcp);
    c10::intrusive_ptr<c10d::Backend> backend;
    if (gpu < 0) {
      auto settings = c10d::ProcessGroupGloo::Options::create(timeout);
      settings->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
      backend = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world_size, settings);
    } else {
      auto settings = c10d::ProcessGroupNCCL::Options::create();
      settings->timeout = timeout;
      auto nccl = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world_size, settings);
      nccl->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(gpu)));
      backend = nccl;
    }
    *group = new Group{store, backend};
  });
}

int cllm_group_all_reduce(void *group, void *values) {
  return run(group, [&](c10d::Backend &backend) {
    std::vector<at::Tensor> tensors{tensor(values)};
    return backend.allreduce(tensors);
  });
}

int cllm_group_reduce_scatter(void *group, void *output, void *input) {
  return run(group, [&](c10d::Backend &backend) {
    return backend._reduce_scatter_base(tensor(output), tensor(input));
  });
}

int cllm_group_all_gather(void *group, void *output, void *input) {
  return run(group, [&](c10d::Backend &backend) { return backend._allgather_base(tensor(output), tensor(input)); });
}

int cllm_group_broadcast(void *group, void *values, int root) {
  return run(group, [&](c10d::Backend &backend) {
    c10d::BroadcastOptions options;
    options.rootRank = root;
    std::vector<at::Tensor> tensors{tensor(values)};
    return backend.broadcast(tensors, options);
  });
}

// Without this, an NCCL group warns when the process ends.
void cllm_group_free(void *group) {
  guarded([&] {
    std::unique_ptr<Group> owned(static_cast<Group *>(group));
    owned->backend->shutdown();
  });
}
}
