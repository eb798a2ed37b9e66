// contrast of few rows on a CPU. The legend is in dense/contrast.py of the blocked backend.
#include "dense.h"
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

namespace fastkd {
namespace {

// Which keys count as what for a query; what is absent is null.
struct Mask {
  const int64_t *query_labels, *key_labels, *positive_index;
  bool by_label, exclude_self, is_bounded;
};

// Makes U of a row of logits in place, and returns its sum and its maximum, or 0 where the logits are bounded.
template <class T>
FASTKD_INLINE std::pair<T, T> powers(T* x, int64_t N, bool is_bounded) {
  T maximum = 0, total = 0;
  if (!is_bounded) {
    maximum = std::numeric_limits<T>::lowest();  // a row of nothing but -inf has powers of 0
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < N; ++j) maximum = x[j] > maximum ? x[j] : maximum;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < N; ++j) {
    const T u = power_of_two(x[j] - maximum);
    x[j] = u;
    total += u;
  }
  return {total, maximum};
}

// X becomes U, and then, with_gradient, G = dL/dX. stats: two numbers per query, [2, n]. w: what multiplies a query's loss.
// Returns the sum.
template <class T>
FASTKD_INLINE double rows_loop(T* X, const T* w, T* stats, int64_t n, int64_t N, Mask mask, bool with_gradient) {
  const T log2 = T(kLog2), infinity = std::numeric_limits<T>::infinity();
  double sum = 0;
  for (int64_t i = 0; i < n; ++i, X += N) {
    const int64_t* const keys = mask.key_labels;
    const int64_t label = mask.query_labels ? mask.query_labels[i] : 0;
    if (mask.by_label) {
      T count = 0, of_positives = 0;
      if (mask.exclude_self) X[i] = 0;
#pragma omp simd reduction(+ : count, of_positives)
      for (int64_t j = 0; j < N; ++j) {
        count += keys[j] == label ? T(1) : T(0);
        of_positives += keys[j] == label ? X[j] : T(0);
      }
      if (mask.exclude_self) {
        count -= 1;
        X[i] = -infinity;
      }
      const T mean = of_positives / (count < 1 ? T(1) : count);
      const auto [total, maximum] = powers(X, N, mask.is_bounded);
      const bool without = count == 0;  // no loss, no gradient
      const T power = mask.is_bounded ? power_of_two(mean) : T(1), log_total = std::log2(total);
      const T loss = mask.is_bounded ? std::log1p((total - power) / power) : (maximum - mean + log_total) * log2;
      stats[i] = (maximum + log_total) * log2;
      stats[n + i] = count;
      if (!without) sum += double(w[i]) * loss;
      if (!with_gradient) continue;
      const T of_all = without ? T(0) : w[i] / total, of_positive = without ? T(0) : w[i] / count;
#pragma omp simd
      for (int64_t j = 0; j < N; ++j) X[j] = of_all * X[j] - (keys[j] == label ? of_positive : T(0));
      if (mask.exclude_self) X[i] = 0;
    } else {
      const int64_t index = mask.positive_index ? std::min(std::max(mask.positive_index[i], int64_t(0)), N - 1) : i;
      const T positive = X[index];
      if (keys) {
#pragma omp simd
        for (int64_t j = 0; j < N; ++j) X[j] = keys[j] == label ? -infinity : X[j];
      }
      if (mask.exclude_self) X[i] = -infinity;
      X[index] = -infinity;
      const auto [others, maximum] = powers(X, N, mask.is_bounded);
      const T of_positive = power_of_two(positive - maximum), factor = 1 / (others + of_positive);
      T loss = mask.is_bounded ? std::log1p(others / of_positive)
                               : log_one_plus_power(maximum - positive + std::log2(others));
      // An infinite positive would make the other logits vanish.
      if (!mask.is_bounded && !std::isfinite(positive)) loss = std::numeric_limits<T>::quiet_NaN();
      stats[i] = loss;
      stats[n + i] = positive * log2;
      sum += double(w[i]) * loss;
      if (!with_gradient) continue;
      const T of_others = w[i] * factor;
#pragma omp simd
      for (int64_t j = 0; j < N; ++j) X[j] *= of_others;
      X[index] = -(w[i] * (others * factor));
    }
  }
  return sum;
}

FASTKD_CLONES double rows(float* X, const float* w, float* stats, int64_t n, int64_t N, Mask mask, bool with_gradient) {
  return rows_loop(X, w, stats, n, N, mask, with_gradient);
}
double rows(double* X, const double* w, double* stats, int64_t n, int64_t N, Mask mask, bool with_gradient) {
  return rows_loop(X, w, stats, n, N, mask, with_gradient);
}

const int64_t* numbers(const Optional& x, Tensor& holder) {
  if (!x) return nullptr;
  holder = x->to(at::kLong).contiguous();  // labels may be codes, int32
  return holder.const_data_ptr<int64_t>();
}

}  // namespace

// The weighted sum, two numbers per query, and the gradients of the raw queries and keys (empty where not wanted) and of
// the scale. needs: whether queries and keys want theirs; empty: nobody does, and then there is no gradient at all.
std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_contrast(
    const Tensor& q, const Optional& keys, const Tensor& scale, const Optional& query_labels,
    const Optional& key_labels, const Optional& positive_index, bool by_label, bool exclude_self, bool is_bounded,
    const Optional& weight, double factor, const Optional& inverse_q, const Optional& inverse_k,
    const std::vector<bool>& needs, int64_t min_linear) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  TORCH_CHECK_VALUE(q.dim() == 2, "dense_contrast: expected queries [n, D]");
  TORCH_CHECK_VALUE(!by_label || (query_labels && key_labels), "dense_contrast: expected labels");
  const double multiplier = scale.item<double>();
  const Tensor k = keys ? *keys : q;
  const Tensor X = product(q, k, min_linear, multiplier / kLog2);
  const int64_t n = X.size(0), N = X.size(1);
  TORCH_CHECK_VALUE(positive_index || by_label || n == N, "dense_contrast: expected a key for every query");
  const Tensor w = row_factors(weight, factor, n, X), stats = at::empty({2, n}, X.options());
  Tensor own_labels, labels, index;
  const Mask mask{query_labels && key_labels ? numbers(query_labels, own_labels) : nullptr,
                  query_labels ? numbers(key_labels, labels) : nullptr,
                  numbers(positive_index, index), by_label, exclude_self, is_bounded};
  const double sum = AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "dense_contrast", [&] {
    return rows(X.mutable_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(), stats.mutable_data_ptr<scalar_t>(), n, N,
                mask, !needs.empty());
  });
  const Tensor total = number(sum, X);
  if (needs.empty()) return {total, stats, {}};

  const Tensor& G = X;
  std::vector<Tensor> gradients(3, at::empty({0}, X.options()));
  double of_scale = 0;
  if (!keys) {
    G.add_(G.t().contiguous());
    gradients[0] = product(G, q.t(), min_linear);
    of_scale = to_raw_rows(gradients[0], q, inverse_q, multiplier) / 2;  // G_ij is in the sums of row i and of row j
  } else {
    if (needs[1]) {
      gradients[1] = transposed_product(G, q, min_linear);
      of_scale = to_raw_rows(gradients[1], k, inverse_k, multiplier);
    }
    if (needs[0]) {
      gradients[0] = product(G, k.t(), min_linear);
      of_scale = to_raw_rows(gradients[0], q, inverse_q, multiplier);
    }
  }
  gradients[2] = number(of_scale, X);
  return {total, stats, gradients};
}

}  // namespace fastkd
