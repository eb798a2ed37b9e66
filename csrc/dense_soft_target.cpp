// soft_target of few logits on a CPU. The legend is in dense/soft_target.py of the blocked backend.
#include "dense.h"
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

namespace fastkd {
namespace {

// Sums over more classes are added in double: after thousands of additions float32 has lost digits.
constexpr int64_t kBlock = 1024;

// The options of both losses; labels may be null. needs_grad: whether gradients are kept.
struct Options {
  const int64_t* labels;
  double temperature, label_smoothing;
  bool needs_grad;
};

template <class T>
FASTKD_INLINE T largest_of(const T* x, int64_t classes) {
  T largest = x[0];
#pragma omp simd reduction(max : largest)
  for (int64_t c = 0; c < classes; ++c) largest = x[c] > largest ? x[c] : largest;
  return largest;
}

// The weighted sums of cross-entropy and KD. of_kd and of_ce: the gradients of the student's logits, of_ce only with
// labels. Without needs_grad they are a single row, for a row's powers.
template <class T>
FASTKD_INLINE std::pair<double, double> rows_loop(const T* x, const T* t, const T* w, T* of_kd, T* of_ce, int64_t n,
                                                  int64_t classes, Options options) {
  const T to_powers = T(1 / (options.temperature * kLog2)), smoothing = T(options.label_smoothing);
  const int64_t step = options.needs_grad ? classes : 0;
  double ce = 0, kd = 0;
  for (int64_t i = 0; i < n; ++i, x += classes, t += classes, of_kd += step, of_ce += step) {
    const T largest_x = largest_of(x, classes), largest_t = largest_of(t, classes);
    double total_x = 0, total_t = 0, excess = 0, difference = 0;
    for (int64_t first = 0; first < classes; first += kBlock) {
      const int64_t last = std::min(first + kBlock, classes);
      T sum_x = 0, sum_t = 0, sum_excess = 0, sum_difference = 0;
#pragma omp simd reduction(+ : sum_x, sum_t, sum_excess, sum_difference)
      for (int64_t c = first; c < last; ++c) {
        const T log_p = (x[c] - largest_x) * to_powers, log_q = (t[c] - largest_t) * to_powers;
        const T p = power_of_two(log_p), q = power_of_two(log_q);
        of_kd[c] = p;
        sum_x += p;
        sum_t += q;
        sum_excess += p - q;
        sum_difference += q * (log_q - log_p);
      }
      total_x += sum_x;
      total_t += sum_t;
      excess += sum_excess;
      difference += sum_difference;
    }
    kd += double(w[i]) * (difference / total_t * kLog2 + log_ratio(total_x, total_t, excess));
    const T of_p = w[i] * T(options.temperature) / T(total_x), of_q = w[i] * T(options.temperature) / T(total_t);
    if (options.needs_grad) {
#pragma omp simd
      for (int64_t c = 0; c < classes; ++c) {
        of_kd[c] = of_p * of_kd[c] - of_q * power_of_two((t[c] - largest_t) * to_powers);
      }
    }
    if (!options.labels) continue;

    const int64_t given = options.labels[i], label = std::min(std::max(given, int64_t(0)), classes - 1);
    const T weight = given == label ? w[i] : std::numeric_limits<T>::quiet_NaN();
    double total = 0, below = 0;
    for (int64_t first = 0; first < classes; first += kBlock) {
      const int64_t last = std::min(first + kBlock, classes);
      T sum = 0, sum_below = 0;
#pragma omp simd reduction(+ : sum, sum_below)
      for (int64_t c = first; c < last; ++c) {
        const T difference = x[c] - largest_x, p = power_of_two(difference * T(1 / kLog2));
        of_ce[c] = p;
        sum += p;
        sum_below += difference;
      }
      total += sum;
      below += sum_below;
    }
    const double log_total = std::log(total);
    double loss = largest_x - x[label] + log_total;
    if (smoothing > 0) loss = loss * (1 - smoothing) + (log_total - below / double(classes)) * smoothing;
    ce += double(weight) * loss;
    if (!options.needs_grad) continue;
    const T of_powers = weight / T(total), of_all = weight * (smoothing / T(classes));
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) of_ce[c] = of_ce[c] * of_powers - of_all;
    of_ce[label] -= weight * (1 - smoothing);
  }
  return {ce, kd * options.temperature * options.temperature};
}

FASTKD_CLONES std::pair<double, double> rows(const float* x, const float* t, const float* w, float* of_kd, float* of_ce,
                                             int64_t n, int64_t classes, Options options) {
  return rows_loop(x, t, w, of_kd, of_ce, n, classes, options);
}
std::pair<double, double> rows(const double* x, const double* t, const double* w, double* of_kd, double* of_ce,
                               int64_t n, int64_t classes, Options options) {
  return rows_loop(x, t, w, of_kd, of_ce, n, classes, options);
}

}  // namespace

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_soft_target(
    const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& weight, double temperature, double label_smoothing, double factor, bool needs_grad) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  TORCH_CHECK_VALUE(student_logits.dim() == 2, "dense_soft_target: expected logits [B, C]");
  const auto dtype = student_logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = student_logits.to(dtype).contiguous(), t = teacher_logits.to(dtype).contiguous();
  const Tensor w = row_factors(weight, factor, x.size(0), x), given = labels ? labels->contiguous() : Tensor();
  const int64_t rows_kept = needs_grad ? x.size(0) : 1;
  std::vector<Tensor> gradients{at::empty({rows_kept, x.size(1)}, x.options())};
  if (labels) gradients.push_back(at::empty_like(gradients[0]));
  const Options options{labels ? given.const_data_ptr<int64_t>() : nullptr, temperature, label_smoothing, needs_grad};
  const auto [ce, kd] = AT_DISPATCH_FLOATING_TYPES(dtype, "dense_soft_target", [&] {
    return rows(x.const_data_ptr<scalar_t>(), t.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                gradients.front().mutable_data_ptr<scalar_t>(), gradients.back().mutable_data_ptr<scalar_t>(),
                x.size(0), x.size(1), options);
  });
  return {number(ce, x), number(kd, x), needs_grad ? gradients : std::vector<Tensor>{}};
}

}  // namespace fastkd
