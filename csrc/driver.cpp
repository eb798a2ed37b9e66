// libcuda, opened at run time, and the stubs that stand in for it.
#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace fastkd::driver {
namespace {

bool is_stubbed = false;
Counts counted;

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
}

Functions opened() {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY);
  if (library == nullptr) throw std::runtime_error(std::string("libcuda.so.1 cannot be opened: ") + dlerror());
  Functions found{};
  find(library, "cuLaunchKernelEx", found.launch);
  find(library, "cuTensorMapEncodeTiled", found.encode_tiled);
  find(library, "cuCtxGetCurrent", found.current_context);
  find(library, "cuDevicePrimaryCtxRetain", found.retain_primary_context);
  find(library, "cuCtxSetCurrent", found.set_context);
  find(library, "cuGetErrorString", found.error_text);
  return found;
}

const Functions stubs = {
    [](const LaunchConfig*, void*, void**, void**) {
      ++counted.launches;
      return 0;
    },
    [](TensorMap* map, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int,
       int, int, int) {
      ++counted.encodes;
      *map = {};
      return 0;
    },
    [](void** context) {
      *context = &counted;
      return 0;
    },
    [](void**, int) { return 0; },
    [](void*) { return 0; },
    [](Result, const char**) { return 0; },
};

}  // namespace

const Functions& functions() {
  if (is_stubbed) return stubs;
  static const Functions real = opened();
  return real;
}

const Counts& counts() { return counted; }

void use_stubs(bool wanted) {
  is_stubbed = wanted;
  counted = {};
}

void check(Result result, const char* what) {
  if (result == 0) return;
  const char* text = nullptr;
  functions().error_text(result, &text);
  throw std::runtime_error(std::string(what) + ": " + (text == nullptr ? "unknown error" : text));
}

}  // namespace fastkd::driver
