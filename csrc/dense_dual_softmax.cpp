// dual_softmax of few rows on a CPU. The legend is in dense/dual_softmax.py of the blocked backend.
#include "dense.h"
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <limits>

namespace fastkd {
namespace {

constexpr double kMaxSharedScale = 40.0;

// What multiplies row i's (and, of two, column i's) entries of the matrices in the gradient G, and G's diagonal.
template <class T>
struct Coefficients {
  T *of_w, *of_u, *of_x, *of_k, *diagonal;
};

// Row by row: X becomes U, Y becomes V, W is made, and their sums become the numbers of a row, [5, n].
template <class T>
FASTKD_INLINE void rows_loop(T* X, T* Y, T* W, const T* w, const T* k, T* stats, Coefficients<T> c, T* sums,
                             int64_t n, bool is_bounded, bool is_swapped) {
  const T low = std::numeric_limits<T>::lowest() / 4;  // finite, and its power is 0
  const T log2 = T(kLog2);
  double contrast = 0, consistency = 0;
  for (int64_t i = 0; i < n; ++i) {
    T *x = X + i * n, *y = Y + i * n, *product = W + i * n;
    const T positive = x[i];
    x[i] = y[i] = low;
    T max_x = 0, max_y = 0;
    if (!is_bounded) {
      max_x = max_y = low;
#pragma omp simd reduction(max : max_x, max_y)
      for (int64_t j = 0; j < n; ++j) {
        max_x = x[j] > max_x ? x[j] : max_x;
        max_y = y[j] > max_y ? y[j] : max_y;
      }
    }
    T p = 0, q = 0, e = 0;
#pragma omp simd reduction(+ : p, q, e)
    for (int64_t j = 0; j < n; ++j) {
      const T u = power_of_two(x[j] - max_x), v = power_of_two(y[j] - max_y), difference = (x[j] - y[j]) * u;
      x[j] = u;
      y[j] = v;
      product[j] = difference;
      p += u;
      q += v;
      e += difference;
    }
    const T p_ii = power_of_two(positive - max_x), q_ii = power_of_two(positive - max_y);
    const T la = is_bounded ? std::log1p(p / p_ii) : log_one_plus_power(max_x - positive + std::log2(p));
    const T lc = is_bounded ? std::log1p(q / q_ii) : log_one_plus_power(max_y - positive + std::log2(q));
    const T to_p = 1 / (p + p_ii), to_q = 1 / (q + q_ii), rest_p = p * to_p, rest_q = q * to_q;
    const T E = e * to_p * log2, kE = k[i] * E;
    stats[i] = la + positive * log2;
    stats[n + i] = lc + positive * log2;
    stats[2 * n + i] = E;
    stats[3 * n + i] = la;
    stats[4 * n + i] = lc;
    contrast += w[i] * (is_swapped ? lc : la);
    consistency += k[i] * (E - la + lc);
    const T of_q = is_swapped ? k[i] + w[i] : k[i], r = is_swapped ? -kE : w[i] - kE;
    c.diagonal[i] = -(kE + rest_q * of_q + rest_p * (r - k[i]));
    c.of_w[i] = k[i] * to_p * log2;
    c.of_u[i] = r * to_p;
    c.of_x[i] = of_q * to_q;
    c.of_k[i] = k[i] * to_p;
  }
  sums[0] = T(contrast);
  sums[1] = T(consistency);
}

// W becomes G; where the scale is not bounded, all but what V's rows give to G's columns, which V becomes.
template <class T>
FASTKD_INLINE void gradient_loop(const T* U, T* V, T* W, Coefficients<T> c, int64_t n, bool is_bounded) {
  for (int64_t i = 0; i < n; ++i, U += n, V += n, W += n) {
    const T of_w = c.of_w[i], of_u = c.of_u[i], of_x = c.of_x[i], of_k = c.of_k[i];
    if (is_bounded) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) W[j] = of_w * W[j] + (of_u + c.of_x[j]) * U[j] - c.of_k[j] * V[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        W[j] = of_w * W[j] + of_u * U[j];
        V[j] = of_x * V[j] - of_k * U[j];
      }
    }
    W[i] = c.diagonal[i];
    if (!is_bounded) V[i] = 0;
  }
}

FASTKD_CLONES void rows(float* X, float* Y, float* W, const float* w, const float* k, float* stats,
                        Coefficients<float> c, float* sums, int64_t n, bool is_bounded, bool is_swapped) {
  rows_loop(X, Y, W, w, k, stats, c, sums, n, is_bounded, is_swapped);
}
void rows(double* X, double* Y, double* W, const double* w, const double* k, double* stats, Coefficients<double> c,
          double* sums, int64_t n, bool is_bounded, bool is_swapped) {
  rows_loop(X, Y, W, w, k, stats, c, sums, n, is_bounded, is_swapped);
}
FASTKD_CLONES void gradient(const float* U, float* V, float* W, Coefficients<float> c, int64_t n, bool is_bounded) {
  gradient_loop(U, V, W, c, n, is_bounded);
}
void gradient(const double* U, double* V, double* W, Coefficients<double> c, int64_t n, bool is_bounded) {
  gradient_loop(U, V, W, c, n, is_bounded);
}

}  // namespace

// The sums of contrast and consistency, the numbers of every row, and the gradients of the raw rows and of the scale.
// needs: of which side the gradient is wanted; empty: of none, and then there is no gradient at all.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> dense_dual_softmax(
    const Tensor& units, const std::optional<Tensor>& inverse_norm, const Tensor& scale,
    const std::optional<Tensor>& weight, std::pair<double, double> factors, bool is_swapped,
    const std::vector<bool>& needs, int64_t min_linear) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  TORCH_CHECK_VALUE(units.dim() == 3 && units.size(0) == 2, "dense_dual_softmax: expected units [2, n, D]");
  const Tensor a = units.select(0, 0), b = units.select(0, 1);
  const int64_t n = units.size(1);
  const double multiplier = scale.item<double>();
  const bool is_bounded = std::abs(multiplier) <= kMaxSharedScale;
  const Tensor U = product(a, b, min_linear, multiplier / kLog2), V = U.t().contiguous(), W = at::empty_like(U);
  const Tensor w = row_factors(weight, factors.first, n, U), k = row_factors(weight, factors.second, n, U);
  const Tensor stats = at::empty({5, n}, U.options()), rest = at::empty({5, n}, U.options());
  const Tensor sums = at::empty({2}, U.options());
  AT_DISPATCH_FLOATING_TYPES(U.scalar_type(), "dense_dual_softmax", [&] {
    using T = scalar_t;
    T *u = U.mutable_data_ptr<T>(), *v = V.mutable_data_ptr<T>(), *d = W.mutable_data_ptr<T>();
    T* of = rest.mutable_data_ptr<T>();
    const Coefficients<T> c{of, of + n, of + 2 * n, of + 3 * n, of + 4 * n};
    rows(u, v, d, w.const_data_ptr<T>(), k.const_data_ptr<T>(), stats.mutable_data_ptr<T>(), c,
         sums.mutable_data_ptr<T>(), n, is_bounded, is_swapped);
    if (!needs.empty()) gradient(u, v, d, c, n, is_bounded);
  });
  const Tensor contrast = sums.select(0, 0).clone(), consistency = sums.select(0, 1).clone();
  if (needs.empty()) return {contrast, consistency, stats, {}};

  const Tensor& G = is_bounded ? W : W.add_(V.t());
  std::vector<Tensor> gradients(3, at::empty({0}, U.options()));
  double of_scale = 0;
  for (int side : {1, 0}) {  // the scale's gradient is that of the first side which is computed
    if (!needs[side]) continue;
    gradients[side] = side ? transposed_product(G, a, min_linear) : product(G, b.t(), min_linear);
    of_scale = to_raw_rows(gradients[side], side ? b : a, inverse_norm->select(0, side), multiplier);
  }
  gradients[2] = number(of_scale, U);
  return {contrast, consistency, stats, gradients};
}

}  // namespace fastkd
