// soft_target of few logits on a CPU. It makes the calls of dense/soft_target.py of the blocked backend in their order,
// and so gives its bits; between them there is no Python, which takes as long as they do. The legend is there.
#include "dense.h"
#include "module.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <limits>

namespace fastkd {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_soft_target(
    const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& weight, double temperature, double label_smoothing, double factor, bool needs_grad) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  TORCH_CHECK_VALUE(student_logits.dim() == 2, "dense_soft_target: expected logits [B, C]");
  const auto dtype = student_logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = student_logits.to(dtype), t = teacher_logits.to(dtype);
  const int64_t n = x.size(0), classes = x.size(1);
  Tensor w = weight ? weight->to(dtype) * factor : at::full({n}, factor, x.options());
  const Tensor largest = x.amax(1, true);
  const Tensor Z = at::empty({labels ? 3 : 2, n, classes}, x.options());
  const Tensor Z_x = Z.select(0, 0), Z_t = Z.select(0, 1);
  Tensor out = Z_x;
  at::sub_out(out, x, largest);
  out = Z_t;
  at::sub_out(out, t, t.amax(1, true));
  if (labels) {
    out = Z.select(0, 2);
    at::mul_out(out, Z_x, at::scalar_tensor(1 / kLog2, at::kDouble));
  }
  Z.slice(0, 0, 2).mul_(1 / (temperature * kLog2));
  const Tensor E = Z.exp2(), E_x = E.select(0, 0), E_t = E.select(0, 1);
  const Tensor sums = E.sum(2), logs = sums.log();
  Tensor losses = at::linalg_vecdot(E_t, Z_t.sub_(Z_x)).div_(sums.select(0, 1)).mul_(kLog2);
  losses.add_(logs.select(0, 0)).sub_(logs.select(0, 1));
  const Tensor kd = losses.dot(w).mul_(temperature * temperature);
  std::vector<Tensor> gradients;
  if (needs_grad) {
    E.slice(0, 0, 2).mul_((w * temperature / sums.slice(0, 0, 2)).unsqueeze(2));
    gradients.push_back(E_x.sub_(E_t));
  }
  if (!labels) return {at::zeros({}, x.options()), kd, gradients};

  const Tensor given = labels->unsqueeze(1), label = given.clamp(0, classes - 1);
  w = w.unsqueeze(1).where(label == given, std::numeric_limits<double>::quiet_NaN());
  const Tensor log_sum = logs.select(0, 2).unsqueeze(1);
  losses = (largest - x.gather(1, label)).add_(log_sum);
  if (label_smoothing > 0) {
    const Tensor of_all = (largest - x.mean(1, true)).add_(log_sum);
    losses.mul_(1 - label_smoothing).add_(of_all.mul_(label_smoothing));
  }
  const Tensor ce = losses.squeeze(1).dot(w.squeeze(1));
  if (needs_grad) {
    const Tensor grad = E.select(0, 2).mul_(w / sums.select(0, 2).unsqueeze(1));
    if (label_smoothing > 0) grad.sub_(w * (label_smoothing / classes));
    gradients.push_back(grad.scatter_add_(1, label, w * (label_smoothing - 1)));
  }
  return {ce, kd, gradients};
}

}  // namespace

void define_dense_soft_target(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("dense_soft_target", &dense_soft_target, py::arg("student_logits"), py::arg("teacher_logits"),
             py::arg("labels"), py::arg("weight"), py::arg("temperature"), py::arg("label_smoothing"),
             py::arg("factor"), py::arg("needs_grad"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastkd
