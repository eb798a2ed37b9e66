// The parts of the Python module fastkd._native. Each file of csrc/ that is called from Python defines one.
#pragma once

// torch's own copy of pybind11 is used: an object that torch registered, as a ProcessGroup, can only be received by a
// module that was compiled with the same version of pybind11's internals.
#include <torch/csrc/utils/pybind.h>

namespace fastkd {

void define_dense(pybind11::module_& module);
void define_dense_contrast(pybind11::module_& module);
void define_dense_dual_softmax(pybind11::module_& module);
void define_dense_soft_target(pybind11::module_& module);
void define_dense_soft_target_rows(pybind11::module_& module);
void define_dual_softmax_tiles(pybind11::module_& module);
void define_gather(pybind11::module_& module);  // where torch has torch.distributed
void define_gram_tiles(pybind11::module_& module);
void define_launcher(pybind11::module_& module);
void define_triplet_angles(pybind11::module_& module);

}  // namespace fastkd
