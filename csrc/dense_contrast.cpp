// contrast of few rows on a CPU. It makes the calls of dense/contrast.py of the blocked backend in their order, and so
// gives its bits. The legend is there.
#include "dense.h"
#include "module.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <limits>

namespace fastkd {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Result = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Makes U of X in place. Returns the rows' maxima, or an undefined tensor where they are not needed.
Tensor exponentials(Tensor& X, bool is_bounded) {
  if (is_bounded) {
    X.exp2_();
    return {};
  }
  const bool is_double = X.scalar_type() == at::kDouble;
  const double lowest = is_double ? std::numeric_limits<double>::lowest() : std::numeric_limits<float>::lowest();
  const Tensor maximum = X.amax(1).clamp_min_(lowest);
  X.sub_(maximum.unsqueeze(1)).exp2_();
  return maximum;
}

// Gradients of the raw rows, and of the scale.
std::pair<Tensor, Tensor> raw(Tensor grad, const Tensor& rows, const Optional& inverse_norm, const Tensor& scale) {
  const Tensor dots = at::linalg_vecdot(grad, rows);
  if (inverse_norm) {
    grad.addcmul_(rows, dots.unsqueeze(1), -1).mul_(*inverse_norm * scale);
  } else {
    grad.mul_(scale);
  }
  return {grad, dots.sum()};
}

// w: what a query's loss is multiplied by. needs: whether the gradients of queries and keys are wanted; empty: nobody's.
// The last of the results are these gradients, empty where not wanted, and that of the scale.
Result dense_contrast(const Tensor& q, const Optional& keys, const Tensor& scale, const Optional& query_labels,
                      const Optional& key_labels, const Optional& positive_index, bool by_label, bool exclude_self,
                      bool is_bounded, const Tensor& w, const Optional& inverse_q, const Optional& inverse_k,
                      const std::vector<bool>& needs, int64_t min_linear) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  TORCH_CHECK_VALUE(q.dim() == 2, "dense_contrast: expected queries [n, D]");
  TORCH_CHECK_VALUE(!by_label || (query_labels && key_labels), "dense_contrast: expected labels");
  Tensor X = product(q, keys ? *keys : q, min_linear, scale.item<double>() / kLog2);
  Tensor same, index, count, t, missing, losses, stats;
  if (query_labels && key_labels) same = at::eq(query_labels->unsqueeze(1), *key_labels);
  if (by_label) {
    same = same.to(X.scalar_type());
    if (exclude_self) same.fill_diagonal_(0);
    count = same.sum(1);
    const Tensor of_positives = is_bounded ? X * same : at::where(same.gt(0), X, 0);
    Tensor mean = of_positives.sum(1) / count.clamp_min(1);
    if (exclude_self) X.fill_diagonal_(-kInfinity);
    Tensor maximum = exponentials(X, is_bounded), total = X.sum(1), lse;
    const Tensor without = count.eq(0);
    t = total.reciprocal().masked_fill_(without, 0);
    if (is_bounded) {
      const Tensor power = mean.exp2_();
      losses = (total - power).div_(power).log1p_();
      lse = total.log_();
    } else {
      total.log2_();
      losses = (maximum - mean).add_(total).mul_(kLog2);
      lse = maximum.add_(total).mul_(kLog2);
    }
    losses.masked_fill_(without, 0);
    stats = at::stack({lse, count});
  } else {
    if (positive_index) index = positive_index->clamp(0, X.size(1) - 1).unsqueeze(1);
    Tensor positive = positive_index ? X.gather(1, index).select(1, 0) : X.diagonal().clone();
    if (same.defined()) X.masked_fill_(same, -kInfinity);
    if (exclude_self || !positive_index) X.fill_diagonal_(-kInfinity);
    if (positive_index) X.scatter_(1, index, -kInfinity);
    const Tensor maximum = exponentials(X, is_bounded);
    Tensor others = X.sum(1), of_positive;
    if (is_bounded) {
      of_positive = positive.exp2();
      losses = (others / of_positive).log1p_();
    } else {
      of_positive = (positive - maximum).exp2_();
      losses = log_one_plus_power((maximum - positive).add_(others.log2()));
      losses = at::where(positive.isfinite(), losses, std::numeric_limits<double>::quiet_NaN());
    }
    t = (others + of_positive).reciprocal_();
    missing = others.mul_(t);
    stats = at::stack({losses, positive.mul_(kLog2)});
  }
  const Tensor total = w.dot(losses);
  if (needs.empty()) return {total, stats, {}};

  const Tensor& G = X.mul_((w * t).unsqueeze(1));
  if (by_label) {
    G.addcmul_(same, (w / count.clamp_min(1)).unsqueeze(1), -1);
  } else {
    const Tensor of_positive = (w * missing).neg_();
    if (positive_index) {
      G.scatter_(1, index, of_positive.unsqueeze(1));
    } else {
      G.diagonal().copy_(of_positive);
    }
  }
  Tensor grad_q = at::empty({0}, w.options()), grad_k = grad_q, grad_scale;
  if (!keys) {
    std::tie(grad_q, grad_scale) = raw(product(G.add_(G.t().contiguous()), q.t(), min_linear), q, inverse_q, scale);
    return {total, stats, {grad_q, grad_k, grad_scale / 2}};
  }
  if (needs[1]) {
    std::tie(grad_k, grad_scale) = raw(transposed_product(G, q, min_linear), *keys, inverse_k, scale);
  }
  if (needs[0]) std::tie(grad_q, grad_scale) = raw(product(G, keys->t(), min_linear), q, inverse_q, scale);
  return {total, stats, {grad_q, grad_k, grad_scale}};
}

}  // namespace

void define_dense_contrast(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("dense_contrast", &dense_contrast, py::arg("queries"), py::arg("keys"), py::arg("scale"),
             py::arg("query_labels"), py::arg("key_labels"), py::arg("positive_index"), py::arg("by_label"),
             py::arg("exclude_self"), py::arg("is_bounded"), py::arg("w"), py::arg("inverse_q"), py::arg("inverse_k"),
             py::arg("needs"), py::arg("min_linear"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastkd
