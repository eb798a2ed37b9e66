// The Python module fastkd._native. fastkd/native.py loads it after it has compared the versions.
#include "module.h"

#define FASTKD_STRING_OF(x) #x
#define FASTKD_STRING(x) FASTKD_STRING_OF(x)

// Python reads this text from the file before it loads the library.
extern "C" __attribute__((used, visibility("default"))) const char fastkd_native_built_for[] =
    "fastkd_native built for torch " FASTKD_STRING(FASTKD_TORCH) ", CUDA " FASTKD_STRING(FASTKD_CUDA)
    ", Python " FASTKD_STRING(PY_MAJOR_VERSION) "." FASTKD_STRING(PY_MINOR_VERSION)
    " and interface " FASTKD_STRING(FASTKD_INTERFACE);

PYBIND11_MODULE(_native, module) {
#ifdef FASTKD_WITH_GATHER
  fastkd::define_gather(module);
#endif
  fastkd::define_dense(module);
  fastkd::define_dense_contrast(module);
  fastkd::define_dense_dual_softmax(module);
  fastkd::define_dense_soft_target(module);
  fastkd::define_dense_soft_target_rows(module);
  fastkd::define_dual_softmax_tiles(module);
  fastkd::define_gram_tiles(module);
  fastkd::define_launcher(module);
  fastkd::define_triplet_angles(module);
}
