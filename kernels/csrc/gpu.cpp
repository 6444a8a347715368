// Whether a GPU backend has registered itself with libtorch (which it does by being loaded), and the memory of a GPU.

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>

extern "C" int tandem_gpu_registered() {
  try {
    // ROCm registers under the same name.
    return at::CUDAHooksRegistry()->Has("CUDAHooks") ? 1 : 0;
  } catch (...) {
    return 0;
  }
}

// Bytes of GPU `index` that are free, and all of them. 0 when libtorch could not say.
extern "C" int tandem_gpu_memory(int index, uint64_t* free_bytes, uint64_t* total_bytes) {
  try {
    at::globalContext().lazyInitDevice(at::kCUDA);
    const auto memory = at::getDeviceAllocator(at::kCUDA)->getMemoryInfo(static_cast<c10::DeviceIndex>(index));
    *free_bytes = memory.first;
    *total_bytes = memory.second;
    return 1;
  } catch (...) {
    return 0;
  }
}
