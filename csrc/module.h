// The parts of the Python module fastkd._native that need more of torch's Python than functions of tensors do.
#pragma once

// torch's own copy of pybind11 is used: an object that torch registered, as a ProcessGroup, can only be received by a
// module that was compiled with the same version of pybind11's internals.
#include <torch/csrc/utils/pybind.h>

namespace fastkd {

void define_gather(pybind11::module_& module);  // where torch has torch.distributed
void define_launcher(pybind11::module_& module);

}  // namespace fastkd
