// What the operations of few rows on a CPU share: products, unit rows, the way back to the raw rows. The operations are
// those of the blocked backend's dense/*.py, where their legends are. Here every element-wise step is part of a loop
// that runs over a row once: with few rows, starting torch's operations takes as long as what they do.
#include "dense.h"
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastkd {

namespace {

bool suits_linear(const Tensor& x, int64_t columns, int64_t min_linear) {
  return x.numel() * columns >= min_linear && x.scalar_type() == at::kFloat;
}

template <class T>
FASTKD_INLINE T squares(const T* x, int64_t D) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += x[d] * x[d];
  return sum;
}

// As unit_rows_quickly in numerics.py. Returns whether every norm was in the plain range; what is written holds only
// then.
template <class T>
FASTKD_INLINE bool unit_rows_loop(const T* x, T* units, T* inverse_norm, int64_t n, int64_t D, T shortest, T longest) {
  for (int64_t i = 0; i < n; ++i, x += D, units += D) {
    const T norm = std::sqrt(squares(x, D));
    if (!(norm > shortest && norm < longest)) return false;
    inverse_norm[i] = 1 / norm;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) units[d] = x[d] / norm;  // exact where a row has one number
  }
  return true;
}

// As to_raw_rows; inverse_norm may be null.
template <class T>
FASTKD_INLINE double raw_rows_loop(T* grad, const T* rows, const T* inverse_norm, int64_t n, int64_t D, T scale) {
  double of_scale = 0;
  for (int64_t i = 0; i < n; ++i, grad += D, rows += D) {
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; ++d) dot += grad[d] * rows[d];
    of_scale += dot;
    const T along = inverse_norm ? dot : T(0), inverse = inverse_norm ? inverse_norm[i] : T(1);
    // One after the other: the product of inverse and scale can overflow where their results do not.
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) grad[d] = (grad[d] - rows[d] * along) * inverse * scale;
  }
  return of_scale;
}

FASTKD_CLONES bool unit_rows(const float* x, float* u, float* r, int64_t n, int64_t D, float shortest, float longest) {
  return unit_rows_loop(x, u, r, n, D, shortest, longest);
}
bool unit_rows(const double* x, double* u, double* r, int64_t n, int64_t D, double shortest, double longest) {
  return unit_rows_loop(x, u, r, n, D, shortest, longest);
}
FASTKD_CLONES double raw_rows(float* grad, const float* rows, const float* inverse_norm, int64_t n, int64_t D,
                              float scale) {
  return raw_rows_loop(grad, rows, inverse_norm, n, D, scale);
}
double raw_rows(double* grad, const double* rows, const double* inverse_norm, int64_t n, int64_t D, double scale) {
  return raw_rows_loop(grad, rows, inverse_norm, n, D, scale);
}

}  // namespace

// Unit rows of the sides, [sides, n, D], and their inverse norms [sides, n, 1]; nothing where a norm is not between the
// bounds. The sides are contiguous and of one shape, in float or double.
std::optional<std::pair<Tensor, Tensor>> unit_rows_of(const std::vector<Tensor>& sides, double shortest,
                                                      double longest) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  const int64_t n = sides.at(0).size(0), D = sides[0].size(1), count = static_cast<int64_t>(sides.size());
  const Tensor units = at::empty({count, n, D}, sides[0].options());
  const Tensor inverse_norm = at::empty({count, n, 1}, sides[0].options());
  for (int64_t side = 0; side < count; ++side) {
    const Tensor& x = sides[side];
    TORCH_CHECK_VALUE(x.is_contiguous() && x.dim() == 2 && x.sizes() == sides[0].sizes() && x.device().is_cpu() &&
                          x.scalar_type() == units.scalar_type(),
                      "unit_rows: expected contiguous rows of one shape and dtype on a CPU");
    const bool is_plain = AT_DISPATCH_FLOATING_TYPES(units.scalar_type(), "unit_rows", [&] {
      return unit_rows(x.const_data_ptr<scalar_t>(), units.mutable_data_ptr<scalar_t>() + side * n * D,
                       inverse_norm.mutable_data_ptr<scalar_t>() + side * n, n, D, scalar_t(shortest),
                       scalar_t(longest));
    });
    if (!is_plain) return std::nullopt;
  }
  return std::make_pair(units, inverse_norm);
}

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
  return linear.call(scale == 1.0 ? x : x.mul(scale), w, std::nullopt, "none", Scalars(), "");
}

Tensor transposed_product(const Tensor& x, const Tensor& w, int64_t min_linear) {
  return suits_linear(x, w.size(1), min_linear) ? product(x.t().contiguous(), w.t(), min_linear) : at::mm(x.t(), w);
}

double to_raw_rows(const Tensor& grad, const Tensor& rows, const std::optional<Tensor>& inverse_norm, double scale) {
  return AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "to_raw_rows", [&] {
    return raw_rows(grad.mutable_data_ptr<scalar_t>(), rows.const_data_ptr<scalar_t>(),
                    inverse_norm ? inverse_norm->const_data_ptr<scalar_t>() : nullptr, grad.size(0),
                    grad.size(1), scalar_t(scale));
  });
}

namespace {

// at::full raises where a finite number is too large for its dtype.
double rounded(double value, const Tensor& like) {
  return like.scalar_type() == at::kFloat ? double(static_cast<float>(value)) : value;
}

}  // namespace

Tensor number(double value, const Tensor& like) { return at::full({}, rounded(value, like), like.options()); }

Tensor row_factors(const std::optional<Tensor>& weight, double factor, int64_t n, const Tensor& like) {
  if (!weight) return at::full({n}, rounded(factor, like), like.options());
  return weight->to(like.scalar_type()).mul(factor).contiguous();
}

}  // namespace fastkd
