// The Python module fastkd._native. fastkd/native.py loads it after it has compared the versions.
#include "module.h"
#include "functions.h"

#define FASTKD_STRING_OF(x) #x
#define FASTKD_STRING(x) FASTKD_STRING_OF(x)

// Python reads this text from the file before it loads the library.
extern "C" __attribute__((used, visibility("default"))) const char fastkd_native_built_for[] =
    "fastkd_native built for torch " FASTKD_STRING(FASTKD_TORCH) ", CUDA " FASTKD_STRING(FASTKD_CUDA)
    ", Python " FASTKD_STRING(PY_MAJOR_VERSION) "." FASTKD_STRING(PY_MINOR_VERSION)
    " and interface " FASTKD_STRING(FASTKD_INTERFACE);

PYBIND11_MODULE(_native, module) {
  namespace py = pybind11;
  using namespace fastkd;
#ifdef FASTKD_WITH_GATHER
  define_gather(module);
#endif
  define_launcher(module);
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.def("unit_rows", &unit_rows_of, py::arg("sides"), py::arg("shortest"), py::arg("longest"), without_gil);
  module.def("dense_contrast", &dense_contrast, py::arg("queries"), py::arg("keys"), py::arg("scale"),
             py::arg("query_labels"), py::arg("key_labels"), py::arg("positive_index"), py::arg("by_label"),
             py::arg("exclude_self"), py::arg("is_bounded"), py::arg("weight"), py::arg("factor"),
             py::arg("inverse_q"), py::arg("inverse_k"), py::arg("needs"), py::arg("min_linear"), without_gil);
  module.def("dense_dual_softmax", &dense_dual_softmax, py::arg("units"), py::arg("inverse_norm"), py::arg("scale"),
             py::arg("weight"), py::arg("factors"), py::arg("is_swapped"), py::arg("needs"), py::arg("min_linear"),
             without_gil);
  module.def("dense_soft_target", &dense_soft_target, py::arg("student_logits"), py::arg("teacher_logits"),
             py::arg("labels"), py::arg("weight"), py::arg("temperature"), py::arg("label_smoothing"),
             py::arg("factor"), py::arg("needs_grad"), without_gil);
  module.def("soft_target_rows", &soft_target_rows, py::arg("student_logits"), py::arg("teacher_logits"),
             py::arg("labels"), py::arg("student_scale"), py::arg("teacher_scale"), py::arg("exclude_label"),
             py::arg("eps"), py::arg("moments"), without_gil);
  module.def("soft_target_rows_gradient", &soft_target_rows_gradient, py::arg("student_logits"),
             py::arg("teacher_logits"), py::arg("labels"), py::arg("student_scale"), py::arg("teacher_scale"),
             py::arg("kept"), py::arg("upstream"), py::arg("exclude_label"), py::arg("eps"), without_gil);
  module.def("dual_softmax_pair_sums", &pair_sums, py::arg("X"), py::arg("Y"), py::arg("p"), py::arg("weighted"),
             py::arg("q"), py::arg("first_row"), py::arg("first_column"), without_gil);
  module.def("dual_softmax_pair_gradients", &pair_gradients, py::arg("X"), py::arg("Y"), py::arg("G"),
             py::arg("mirrored"), py::arg("r"), py::arg("x"), py::arg("k"), py::arg("k_of_d"), py::arg("first_row"),
             py::arg("first_column"), without_gil);
  module.def("gram_tile_sums", &tile_sums, py::arg("S"), py::arg("T"), py::arg("sums"), py::arg("first_row"),
             py::arg("first_column"), without_gil);
  module.def("gram_tile_gradient", &tile_gradient, py::arg("S"), py::arg("T"), py::arg("factors"),
             py::arg("first_row"), py::arg("first_column"), without_gil);
  module.def("triplet_angles", &triplet_angles, py::arg("gram_s"), py::arg("inverse_s"), py::arg("gram_t"),
             py::arg("inverse_t"), py::arg("first"), py::arg("last"), py::arg("threads"), without_gil);
}
