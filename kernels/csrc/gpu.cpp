// Whether a GPU backend has registered itself with libtorch (which it does by being loaded). Not here: devices.

#include <ATen/detail/CUDAHooksInterface.h>

extern "C" int tandem_gpu_registered() {
  try {
    // ROCm registers under the same name.
    return at::CUDAHooksRegistry()->Has("CUDAHooks") ? 1 : 0;
  } catch (...) {
    return 0;
  }
}
