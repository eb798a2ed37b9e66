// dual_softmax of few rows on a CPU. It makes the calls of dense/dual_softmax.py of the blocked backend in their order,
// and so gives its bits; between them there is no Python, which takes as long as they do. The legend is there.
#include "dense.h"
#include "module.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <limits>

namespace fastkd {

using at::Tensor;

namespace {

bool suits_linear(const Tensor& x, int64_t columns, int64_t min_linear) {
  return x.numel() * columns >= min_linear && x.scalar_type() == at::kFloat;
}

}  // namespace

Tensor product(const Tensor& x, const Tensor& w, int64_t min_linear, double scale) {
  const double largest = x.scalar_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                        : double(std::numeric_limits<float>::max());
  if (std::isfinite(scale) && std::abs(scale) > largest) scale = std::copysign(largest, scale);
  if (!suits_linear(x, w.size(0), min_linear)) {
    return scale == 1.0 ? at::mm(x, w.t()) : at::addmm(x.new_empty({}), x, w.t(), 0, scale);
  }
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto linear =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view, Scalars,
                        std::optional<std::string_view>)>();
  return linear.call(scale == 1.0 ? x : x * scale, w, std::nullopt, "none", Scalars(), "");
}

Tensor transposed_product(const Tensor& x, const Tensor& w, int64_t min_linear) {
  return suits_linear(x, w.size(1), min_linear) ? product(x.t().contiguous(), w.t(), min_linear) : at::mm(x.t(), w);
}

Tensor log_one_plus_power(const Tensor& x) {
  const Tensor y = x * kLog2;
  return at::logaddexp(y, at::zeros_like(y));
}

namespace {

constexpr double kMaxSharedScale = 40.0;

using Result = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

// w, k: what a row's contrast and its consistency are multiplied by. needs: whose gradients are wanted; empty: nobody's.
// The last of the results are these gradients, [1 or 2, n, D], and that of the scale.
Result dense_dual_softmax(const Tensor& units, const Tensor& scale, Tensor w, Tensor k, bool is_swapped,
                          Tensor inverse_norm, const std::vector<bool>& needs, int64_t min_linear) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  TORCH_CHECK_VALUE(units.dim() == 3 && units.size(0) == 2, "dense_dual_softmax: expected units [2, n, D]");
  const Tensor a = units.select(0, 0), b = units.select(0, 1);
  const double multiplier = scale.item<double>();
  const bool is_bounded = std::abs(multiplier) <= kMaxSharedScale;
  const bool is_double = units.scalar_type() == at::kDouble;
  const Tensor X = product(a, b, min_linear, multiplier / kLog2);
  Tensor positive = X.diagonal().clone();
  X.fill_diagonal_((is_double ? std::numeric_limits<double>::lowest() : double(std::numeric_limits<float>::lowest())) / 4);
  const int64_t n = X.size(0);
  const Tensor matrices = at::empty({3, n, n}, X.options());
  const Tensor U = matrices.select(0, 0), V = matrices.select(0, 1), W = matrices.select(0, 2);
  V.copy_(X.t());
  Tensor out = W;
  at::sub_out(out, X, V);
  Tensor of_positive, maxima;
  out = U;
  if (is_bounded) {
    at::exp2_out(out, X);
    V.exp2_();
    of_positive = positive.exp2();
  } else {
    maxima = at::stack({X.amax(1), V.amax(1)});
    at::sub_out(out, X, maxima.select(0, 0).unsqueeze(1));
    U.exp2_();
    V.sub_(maxima.select(0, 1).unsqueeze(1)).exp2_();
    of_positive = (positive - maxima).exp2_();
  }
  W.mul_(U);
  const Tensor sums = matrices.sum(2), others = sums.slice(0, 0, 2);
  Tensor losses;
  if (is_bounded) {
    losses = (others / of_positive).log1p_();
  } else {
    losses = log_one_plus_power((maxima - positive).add_(others.log2()));
  }
  const Tensor t = (others + of_positive).reciprocal_();
  const Tensor missing = others.mul_(t);
  const Tensor means = sums.slice(0, 2).mul_(t.slice(0, 0, 1)).mul_(kLog2);
  const Tensor stats = at::cat({losses + positive.mul_(kLog2), means, losses});
  const Tensor E = stats.select(0, 2), la = stats.select(0, 3), lc = stats.select(0, 4);
  const Tensor contrast = w.dot(is_swapped ? lc : la), consistency = k.dot((E - la).add_(lc));
  if (needs.empty()) return {contrast, consistency, stats, {}};

  const Tensor kE = k * E;
  Tensor x = is_swapped ? k + w : k, r = is_swapped ? kE.neg() : w - kE;
  const Tensor diagonal = at::addcmul(kE, missing.select(0, 1), x).addcmul_(missing.select(0, 0), r - k).neg_();
  const Tensor to_p = t.select(0, 0), to_q = t.select(0, 1);
  k = k * to_p;
  r = r.mul_(to_p);
  x = x * to_q;
  const Tensor& G = W.mul_((k * kLog2).unsqueeze(1)).addcmul_(U, r.unsqueeze(1));
  if (is_bounded) {
    G.addcmul_(U, x).addcmul_(V, k, -1);
  } else {
    G.add_(V.mul_(x.unsqueeze(1)).addcmul_(U, k.unsqueeze(1), -1).t());
  }
  G.diagonal().copy_(diagonal);
  Tensor grads, rows = units;
  if (needs[0] && needs[1]) {
    grads = at::stack({product(G, b.t(), min_linear), transposed_product(G, a, min_linear)});
  } else {
    const int64_t side = needs[0] ? 0 : 1;
    grads = (needs[0] ? product(G, b.t(), min_linear) : transposed_product(G, a, min_linear)).unsqueeze(0);
    rows = units.slice(0, side, side + 1);
    inverse_norm = inverse_norm.slice(0, side, side + 1);
  }
  const Tensor dots = at::linalg_vecdot(grads, rows);
  grads.addcmul_(rows, dots.unsqueeze(2), -1).mul_(inverse_norm * scale);
  return {contrast, consistency, stats, {grads, dots.select(0, 0).sum()}};
}

}  // namespace

void define_dense(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("dense_dual_softmax", &dense_dual_softmax, py::arg("units"), py::arg("scale"), py::arg("w"), py::arg("k"),
             py::arg("is_swapped"), py::arg("inverse_norm"), py::arg("needs"), py::arg("min_linear"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastkd
