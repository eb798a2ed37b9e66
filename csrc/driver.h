// The few things of the CUDA driver that a launch needs. They are declared here and found in libcuda at run time, so
// that the launcher is built and tested where there is no CUDA. tests/host/test_plans.py compares what the
// driver receives with what Triton's launcher, compiled with cuda.h, gives it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastkd::driver {

using Result = int;  // CUresult; 0 is success

struct alignas(64) TensorMap {  // CUtensorMap
  uint64_t opaque[16];
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
static_assert(offsetof(LaunchConfig, stream) == 32 && sizeof(LaunchConfig) == 56, "not the layout of CUlaunchConfig");

struct Functions {
  Result (*launch)(const LaunchConfig*, void* function, void** parameters, void** extra);
  Result (*encode_tiled)(TensorMap*, int dtype, uint32_t rank, void* address, const uint64_t* sizes,
                         const uint64_t* byte_strides, const uint32_t* box, const uint32_t* element_strides,
                         int interleave, int swizzle, int l2_promotion, int fill);
  Result (*current_context)(void**);
  Result (*retain_primary_context)(void**, int device);
  Result (*set_context)(void*);
  Result (*error_text)(Result, const char**);
};

// The functions of libcuda.so.1, or the stubs. Throws std::runtime_error where there is no libcuda.
const Functions& functions();

// How often the stubs were called.
struct Counts {
  uint64_t launches = 0, encodes = 0;
};
const Counts& counts();

// From now on `functions` gives the stubs, with which nothing runs on a device, or libcuda. The counts start at zero.
void use_stubs(bool wanted);

// Throws std::runtime_error with the driver's text, unless the result is success.
void check(Result result, const char* what);

}  // namespace fastkd::driver
