// start_gather packs the rows of this rank and starts the collectives that bring the rows of all ranks.
// start_gather in fastkd/distributed/exchange.py does the same on torch.distributed. Its docstring says what is
// returned. It is a function of the Python module and no torch operator, because torch's operators take a process group
// and give works only in a box that Python has to open.
#include "module.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <tuple>
#include <vector>

namespace fastkd {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;

std::tuple<at::Tensor, at::Tensor> pack_rows(at::TensorList rows, at::ScalarType dtype, bool normalize) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastkd_native::pack_rows", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(at::TensorList, at::ScalarType, bool)>();
  return op.call(rows, dtype, normalize);
}

// Rows travel as bytes, because not every backend moves every dtype.
at::Tensor bytes(const at::Tensor& x) { return x.view({-1}).view(at::kByte); }

// sizes: how many rows each rank holds. bounds: the rows at which equal numbers of rows are cut into chunks; empty if
// the ranks hold unequal numbers. A work keeps the tensors of its collective alive until the collective is done.
std::tuple<at::Tensor, at::Tensor, at::Tensor, Works> start_gather(const std::vector<at::Tensor>& rows,
                                                                   at::ScalarType dtype, bool normalize,
                                                                   const std::vector<int64_t>& sizes,
                                                                   const std::vector<int64_t>& bounds,
                                                                   const Group& group) {
  TORCH_CHECK_VALUE(!rows.empty() && rows[0].dim() == 2, "start_gather: got no rows, expected tensors [n, D]");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  const int64_t world_size = group->getSize(), rank = group->getRank();
  const int64_t n = rows[0].size(0), width = static_cast<int64_t>(rows.size()) * rows[0].size(1);
  TORCH_CHECK_VALUE(static_cast<int64_t>(sizes.size()) == world_size && sizes[rank] == n, "start_gather: got ", n,
                    " rows, expected one size a rank, this rank's among them, in ", sizes);
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  const at::Tensor gathered = at::empty({total * width}, rows[0].options().dtype(dtype));
  Works works;

  if (bounds.empty()) {
    auto [units, inverse_norm] = pack_rows(rows, dtype, normalize);
    int64_t start = 0;
    for (int64_t source = 0; source < world_size; ++source) {
      const int64_t elements = sizes[source] * width;
      if (elements == 0) continue;
      const at::Tensor part = gathered.narrow(0, start, elements);
      start += elements;
      if (source == rank) part.copy_(units.view({-1}));
      std::vector<at::Tensor> tensors = {bytes(part)};
      c10d::BroadcastOptions options;
      options.rootRank = source;
      works.push_back(group->broadcast(tensors, options));
    }
    return {units, inverse_norm, gathered, works};
  }

  TORCH_CHECK_VALUE(bounds.size() >= 2 && bounds.front() == 0 && bounds.back() == n && total == world_size * n,
                    "start_gather: got bounds ", bounds, " for ranks with ", sizes, " rows");
  std::vector<at::Tensor> packed, inverse_norms;
  for (size_t chunk = 0; chunk + 1 < bounds.size(); ++chunk) {
    const int64_t first = bounds[chunk], count = bounds[chunk + 1] - first;
    std::vector<at::Tensor> part;
    for (const at::Tensor& x : rows) part.push_back(x.narrow(0, first, count));
    auto [units, inverse_norm] = pack_rows(part, dtype, normalize);
    at::Tensor target = bytes(gathered.narrow(0, world_size * first * width, world_size * count * width));
    at::Tensor source = bytes(units);
    works.push_back(group->_allgather_base(target, source));
    packed.push_back(units);
    inverse_norms.push_back(inverse_norm);
  }
  if (packed.size() == 1) return {packed[0], inverse_norms[0], gathered, works};
  return {at::cat(packed, 1), at::cat(inverse_norms, 1), gathered, works};
}

}  // namespace

void define_gather(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("start_gather", start_gather, py::arg("rows"), py::arg("dtype"), py::arg("normalize"), py::arg("sizes"),
             py::arg("bounds"), py::arg("group"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastkd
