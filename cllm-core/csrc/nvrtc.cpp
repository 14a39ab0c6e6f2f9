// Compiles kernels at run time and launches them. NVRTC and the CUDA driver are opened when they
// are first needed, so that the programs start on machines without either. Every function returns
// 0, or 1 with the message in cllm_last_error().
#include <c10/core/Allocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <dlfcn.h>
#include <nvrtc.h>

#include <climits>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "guarded.h"

namespace {
void *open_library(const std::vector<std::string> &names) {
  std::string tried;
  for (const auto &name : names) {
    if (void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    tried += std::string(tried.empty() ? "" : "; ") + dlerror();
  }
  throw std::runtime_error(tried);
}

// The wheel of torch has NVRTC in a folder next to torch's own; otherwise the loader must find it.
// NVRTC needs a second library, which it finds only if it is loaded already.
void *open_nvrtc() {
  const std::string compiler = "libnvrtc.so.13", builtins = "libnvrtc-builtins.so.13.0";
  Dl_info info;
  char real[PATH_MAX];
  std::string folder;
  if (dladdr(reinterpret_cast<void *>(&c10::GetAllocator), &info) && realpath(info.dli_fname, real)) {
    folder = real;
    for (int up = 0; up < 3; up++) folder.erase(folder.rfind('/'));
    folder += "/nvidia/cu13/lib/";
  }
  open_library({folder + builtins, builtins});
  return open_library({folder + compiler, compiler});
}

template <typename F>
F *symbol(void *library, const char *name) {
  void *address = dlsym(library, name);
  if (!address) throw std::runtime_error(dlerror());
  return reinterpret_cast<F *>(address);
}

struct Nvrtc {
  void *library = open_nvrtc();
  decltype(&nvrtcCreateProgram) create = symbol<decltype(nvrtcCreateProgram)>(library, "nvrtcCreateProgram");
  decltype(&nvrtcCompileProgram) compile = symbol<decltype(nvrtcCompileProgram)>(library, "nvrtcCompileProgram");
  decltype(&nvrtcGetProgramLogSize) log_size =
      symbol<decltype(nvrtcGetProgramLogSize)>(library, "nvrtcGetProgramLogSize");
  decltype(&nvrtcGetProgramLog) log = symbol<decltype(nvrtcGetProgramLog)>(library, "nvrtcGetProgramLog");
  decltype(&nvrtcGetCUBINSize) code_size = symbol<decltype(nvrtcGetCUBINSize)>(library, "nvrtcGetCUBINSize");
  decltype(&nvrtcGetCUBIN) code = symbol<decltype(nvrtcGetCUBIN)>(library, "nvrtcGetCUBIN");
  decltype(&nvrtcDestroyProgram) destroy = symbol<decltype(nvrtcDestroyProgram)>(library, "nvrtcDestroyProgram");
};

struct Driver {
  void *library = open_library({"libcuda.so.1"});
  decltype(&cuModuleLoadData) load = symbol<decltype(cuModuleLoadData)>(library, "cuModuleLoadData");
  decltype(&cuModuleGetFunction) function = symbol<decltype(cuModuleGetFunction)>(library, "cuModuleGetFunction");
  decltype(&cuFuncSetAttribute) attribute = symbol<decltype(cuFuncSetAttribute)>(library, "cuFuncSetAttribute");
  decltype(&cuOccupancyMaxActiveClusters) clusters =
      symbol<decltype(cuOccupancyMaxActiveClusters)>(library, "cuOccupancyMaxActiveClusters");
  decltype(&cuLaunchKernelEx) launch = symbol<decltype(cuLaunchKernelEx)>(library, "cuLaunchKernelEx");
  decltype(&cuDeviceGet) device = symbol<decltype(cuDeviceGet)>(library, "cuDeviceGet");
  decltype(&cuDeviceGetAttribute) property = symbol<decltype(cuDeviceGetAttribute)>(library, "cuDeviceGetAttribute");
  decltype(&cuMemGetInfo) memory = symbol<decltype(cuMemGetInfo)>(library, "cuMemGetInfo_v2");
  decltype(&cuTensorMapEncodeTiled) tensor_map =
      symbol<decltype(cuTensorMapEncodeTiled)>(library, "cuTensorMapEncodeTiled");
  decltype(&cuGetErrorString) error = symbol<decltype(cuGetErrorString)>(library, "cuGetErrorString");
};

const Driver &driver() {
  static const Driver driver;
  return driver;
}

void check(CUresult result, const std::string &what) {
  if (result == CUDA_SUCCESS) return;
  const char *text = nullptr;
  driver().error(result, &text);
  throw std::runtime_error(what + ": " + (text ? text : "unknown error of the CUDA driver"));
}

// Makes the context of a device current, which functions of the driver need.
void make_current(int device) {
  c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
  // This creates the context. Synchronizing the whole device would, too, but would break what
  // another thread captures.
  c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).synchronize();
}

CUlaunchAttribute cluster_attribute(unsigned num_blocks) {
  CUlaunchAttribute attribute = {};
  attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attribute.value.clusterDim = {num_blocks, 1, 1};
  return attribute;
}
}  // namespace

extern "C" {

// Compiles CUDA C++ to machine code. Needs no GPU. The caller frees the code with cllm_free_code().
int cllm_compile(const char *source, const char *const *options, size_t num_options, char **code, size_t *code_bytes) {
  return guarded([&] {
    static const Nvrtc nvrtc;
    nvrtcProgram program = nullptr;
    if (nvrtc.create(&program, source, "kernels.cu", 0, nullptr, nullptr))
      throw std::runtime_error("NVRTC cannot create a program");
    nvrtcResult failed = nvrtc.compile(program, static_cast<int>(num_options), options);
    if (failed != NVRTC_SUCCESS) {
      size_t length = 0;
      nvrtc.log_size(program, &length);
      std::string log(length, ' ');
      nvrtc.log(program, log.data());
      nvrtc.destroy(&program);
      throw std::runtime_error("kernels do not compile: " + log);
    }
    nvrtc.code_size(program, code_bytes);
    *code = static_cast<char *>(std::malloc(*code_bytes));
    nvrtc.code(program, *code);
    nvrtc.destroy(&program);
  });
}

void cllm_free_code(char *code) { std::free(code); }

// Major and minor compute capability of a device.
int cllm_compute_capability(int device, int *capability) {
  return guarded([&] {
    CUdevice handle;
    check(driver().device(&handle, device), "opening the GPU");
    check(driver().property(&capability[0], CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle), "querying the GPU");
    check(driver().property(&capability[1], CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle), "querying the GPU");
  });
}

// Number of multiprocessors of a device.
int cllm_num_multiprocessors(int device, int *count) {
  return guarded([&] {
    CUdevice handle;
    check(driver().device(&handle, device), "opening the GPU");
    check(driver().property(count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle), "querying the GPU");
  });
}

// Bytes of a device that are free, and all that it has.
int cllm_gpu_capacity(int device, int64_t *free, int64_t *total) {
  return guarded([&] {
    make_current(device);
    size_t free_bytes = 0, total_bytes = 0;
    check(driver().memory(&free_bytes, &total_bytes), "querying the GPU's memory");
    *free = static_cast<int64_t>(free_bytes);
    *total = static_cast<int64_t>(total_bytes);
  });
}

// How the copy engine finds tiles of `tile_rows` rows, at most 64 columns wide, of a group in a
// tensor [rows, groups, columns] in bfloat16; sizes are in this order.
int cllm_tensor_map(void *first, const uint64_t *sizes, uint32_t tile_rows, void *map) {
  return guarded([&] {
    const cuuint64_t dims[] = {sizes[2], sizes[1], sizes[0]}, strides[] = {sizes[2] * 2, sizes[1] * sizes[2] * 2};
    const cuuint32_t box[] = {64, 1, tile_rows}, steps[] = {1, 1, 1};
    check(driver().tensor_map(static_cast<CUtensorMap *>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, first, dims,
                              strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
          "describing a tensor to the copy engine");
  });
}

// Loads machine code into the context of a device. It stays loaded until the process ends.
int cllm_load_module(int device, const char *code, void **module) {
  return guarded([&] {
    make_current(device);
    CUmodule loaded;
    check(driver().load(&loaded, code), "loading kernels");
    *module = loaded;
  });
}

// A kernel by its name. Its blocks may use this much dynamic shared memory.
int cllm_get_kernel(void *module, const char *name, int shared_bytes, void **kernel) {
  return guarded([&] {
    CUfunction function;
    check(driver().function(&function, static_cast<CUmodule>(module), name), name);
    if (shared_bytes > 0)
      check(driver().attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes), name);
    *kernel = function;
  });
}

// How many clusters of a kernel run at the same time on an otherwise idle device.
int cllm_max_clusters(int device, void *kernel, unsigned cluster_blocks, unsigned num_threads, unsigned shared_bytes,
                      int *count) {
  return guarded([&] {
    make_current(device);
    CUlaunchAttribute attribute = cluster_attribute(cluster_blocks);
    CUlaunchConfig config = {};
    config.gridDimX = cluster_blocks, config.gridDimY = 1, config.gridDimZ = 1;
    config.blockDimX = num_threads, config.blockDimY = 1, config.blockDimZ = 1;
    config.sharedMemBytes = shared_bytes;
    config.attrs = &attribute, config.numAttrs = 1;
    check(driver().clusters(count, static_cast<CUfunction>(kernel), &config), "querying the GPU's clusters");
  });
}

// Puts a kernel on the current stream. `cluster_blocks` neighbours in the first dimension of the grid
// form a cluster. If the kernel `overlaps`, it may start before its predecessor ends, and waits for
// it by itself (griddepcontrol.wait).
int cllm_launch(int device, void *kernel, const unsigned *grid, unsigned cluster_blocks, unsigned num_threads,
                unsigned shared_bytes, int overlaps, void **arguments) {
  return guarded([&] {
    CUlaunchAttribute attributes[2] = {};
    unsigned num_attributes = 0;
    if (overlaps) {
      CUlaunchAttribute &attribute = attributes[num_attributes++];
      attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
      attribute.value.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster_blocks > 1) attributes[num_attributes++] = cluster_attribute(cluster_blocks);
    CUlaunchConfig config = {};
    config.gridDimX = grid[0], config.gridDimY = grid[1], config.gridDimZ = 1;
    config.blockDimX = num_threads, config.blockDimY = 1, config.blockDimZ = 1;
    config.sharedMemBytes = shared_bytes;
    config.hStream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
    config.attrs = attributes;
    config.numAttrs = num_attributes;
    check(driver().launch(&config, static_cast<CUfunction>(kernel), arguments, nullptr), "launching a kernel");
  });
}
}
