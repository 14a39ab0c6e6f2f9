// The processes of a run: the TCP store at which they meet, and their collectives, those of c10d
// over NCCL on GPUs and Gloo on CPUs. Every function returns 0, or 1 with the message in
// cllm_last_error().
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <c10/util/Logging.h>

#include "guarded.h"

namespace {
using StorePointer = c10::intrusive_ptr<c10d::Store>;
using Group = c10::intrusive_ptr<c10d::Backend>;

c10d::Store &store_of(void *pointer) { return **static_cast<StorePointer *>(pointer); }

at::Tensor &tensor(void *pointer) { return *static_cast<at::Tensor *>(pointer); }

// Starts a collective and waits for it: with NCCL the current stream waits, with Gloo the thread.
int run(void *group, const std::function<c10::intrusive_ptr<c10d::Work>(c10d::Backend &)> &start) {
  return guarded([&] { start(**static_cast<Group *>(group))->wait(); });
}
}  // namespace

extern "C" {

// Connects to the store, which this process serves itself if `serves`, and waits for it at most
// `timeout_ms`. All keys begin with `prefix`. The caller owns the connection; threads may share it,
// but wait for one another.
int cllm_store_new(const char *host, int port, int serves, const char *prefix, int64_t timeout_ms, void **store) {
  return guarded([&] {
    // c10d warns of lost connections with pages of addresses. The message that follows is enough.
    FLAGS_caffe2_log_level = c10::GLOG_ERROR;
    c10d::TCPStoreOptions options;
    options.port = static_cast<uint16_t>(port);
    options.isServer = serves;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    *store = new StorePointer(c10::make_intrusive<c10d::PrefixStore>(prefix, tcp));
  });
}

int cllm_store_set(void *store, const char *key, const char *value) {
  return guarded([&] { store_of(store).set(std::string(key), std::string(value)); });
}

// `value` becomes null if there is no such key. Otherwise it is valid until the thread's next call.
int cllm_store_get(void *store, const char *key, const char **value) {
  return guarded([&] {
    static thread_local std::string found;
    *value = nullptr;
    if (store_of(store).check({key})) {
      found = store_of(store).get_to_str(key);
      *value = found.c_str();
    }
  });
}

// Adds to a counter, which begins at 0.
int cllm_store_add(void *store, const char *key, int64_t amount, int64_t *sum) {
  return guarded([&] { *sum = store_of(store).add(key, amount); });
}

// Waits until somebody has set the key.
int cllm_store_wait(void *store, const char *key, int64_t timeout_ms) {
  return guarded([&] { store_of(store).wait({key}, std::chrono::milliseconds(timeout_ms)); });
}

void cllm_store_free(void *store) {
  guarded([&] { delete static_cast<StorePointer *>(store); });
}

// Joins the other processes that have a connection to the same store; the group keeps this one.
// `gpu` is the index of the GPU for NCCL, or -1 for Gloo. The caller owns the group.
int cllm_group_new(void *store, int rank, int world_size, int gpu, int64_t timeout_ms, void **group) {
  return guarded([&] {
    auto timeout = std::chrono::milliseconds(timeout_ms);
    auto shared = *static_cast<StorePointer *>(store);
    Group backend;
    if (gpu < 0) {
      auto settings = c10d::ProcessGroupGloo::Options::create(timeout);
      settings->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
      backend = c10::make_intrusive<c10d::ProcessGroupGloo>(shared, rank, world_size, settings);
    } else {
      auto settings = c10d::ProcessGroupNCCL::Options::create();
      settings->timeout = timeout;
      auto nccl = c10::make_intrusive<c10d::ProcessGroupNCCL>(shared, rank, world_size, settings);
      nccl->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(gpu)));
      backend = nccl;
    }
    *group = new Group(backend);
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

// Starts to make `values` of process `root` the sum over all processes; in the others they become
// anything. Until the work is waited for, nobody else may touch them. The caller owns the work.
int cllm_group_reduce(void *group, void *values, int root, void **work) {
  return guarded([&] {
    c10d::ReduceOptions options;
    options.rootRank = root;
    std::vector<at::Tensor> tensors{tensor(values)};
    *work = new c10::intrusive_ptr<c10d::Work>((**static_cast<Group *>(group)).reduce(tensors, options));
  });
}

// With NCCL the current stream waits, with Gloo the thread.
int cllm_work_wait(void *work) {
  return guarded([&] { (*static_cast<c10::intrusive_ptr<c10d::Work> *>(work))->wait(); });
}

void cllm_work_free(void *work) {
  guarded([&] { delete static_cast<c10::intrusive_ptr<c10d::Work> *>(work); });
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

// Waits until every process has called this, and frees the group. Without it, an NCCL group warns
// when the process ends.
void cllm_group_free(void *group) {
  guarded([&] {
    std::unique_ptr<Group> owned(static_cast<Group *>(group));
    (*owned)->shutdown();
  });
}
}
