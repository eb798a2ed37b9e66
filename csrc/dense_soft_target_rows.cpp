// soft_target_rows on a CPU. The legend is in soft_target_rows.py of the blocked backend.
#include "dense.h"
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kBlock = 1024;  // as in dense_soft_target.cpp
constexpr int64_t kBase = 5, kPerView = 5;

// The tensors of a call; labels may be null. eps: what is added to the standard deviation of rows, if they are
// standardised. moments: whether the derivatives by the scales are wanted.
template <class T>
struct Call {
  const T *x, *y;
  const int64_t* labels;
  const T *scale_x, *scale_y;  // [views, n]
  int64_t n, classes, views;
  bool exclude_label, standardize, moments;
  double eps;
};

template <class T>
int64_t label_of(const Call<T>& call, int64_t i) {
  return call.labels ? std::min(std::max(call.labels[i], int64_t(0)), call.classes - 1) : 0;
}

template <class T>
FASTKD_INLINE T largest_of(const T* x, int64_t classes) {
  T largest = -std::numeric_limits<T>::infinity();
  int is_nan = 0;
#pragma omp simd reduction(max : largest) reduction(| : is_nan)
  for (int64_t c = 0; c < classes; ++c) {
    largest = x[c] > largest ? x[c] : largest;
    is_nan |= x[c] != x[c];
  }
  return is_nan ? std::numeric_limits<T>::quiet_NaN() : largest;
}

// Copies a row, with the largest logit of the other classes in the label's place, and returns that logit.
template <class T>
FASTKD_INLINE T without_label(const T* x, T* copy, int64_t classes, int64_t label) {
  std::copy(x, x + classes, copy);
  copy[label] = -std::numeric_limits<T>::infinity();
  return copy[label] = largest_of(copy, classes);
}

// The mean and the standard deviation of a row less its maximum.
template <class T>
FASTKD_INLINE std::pair<double, double> mean_and_std(const T* x, T largest, int64_t classes) {
  double total = 0, squares = 0;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t last = std::min(first + kBlock, classes);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = first; c < last; ++c) sum += x[c] - largest;
    total += sum;
  }
  const T mean = T(total / double(classes));
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t last = std::min(first + kBlock, classes);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = first; c < last; ++c) sum += (x[c] - largest - mean) * (x[c] - largest - mean);
    squares += sum;
  }
  return {mean, std::sqrt(squares / double(classes - 1))};
}

struct Sums {
  double u = 0, v = 0, excess = 0, v_d = 0, v_zy = 0, u_zx = 0, v_zx = 0, v_zy_d = 0;
};

// a and b in base 2.
template <bool MOMENTS, class T>
FASTKD_INLINE Sums sums_of(const T* x, const T* y, int64_t classes, T largest_x, T largest_y, T a, T b) {
  Sums sums;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t last = std::min(first + kBlock, classes);
    T sum_u = 0, sum_v = 0, excess = 0, v_d = 0, v_zy = 0, u_zx = 0, v_zx = 0, v_zy_d = 0;
#pragma omp simd reduction(+ : sum_u, sum_v, excess, v_d, v_zy, u_zx, v_zx, v_zy_d)
    for (int64_t c = first; c < last; ++c) {
      const T zx = x[c] - largest_x, zy = y[c] - largest_y, d = b * zy - a * zx;
      const T u = power_of_two(a * zx), v = power_of_two(b * zy);
      sum_u += u;
      sum_v += v;
      excess += u - v;
      v_d += v * d;
      v_zy += v * zy;
      if (MOMENTS) {
        u_zx += u * zx;
        v_zx += v * zx;
        v_zy_d += v * zy * d;
      }
    }
    sums.u += sum_u;
    sums.v += sum_v;
    sums.excess += excess;
    sums.v_d += v_d;
    sums.v_zy += v_zy;
    sums.u_zx += u_zx;
    sums.v_zx += v_zx;
    sums.v_zy_d += v_zy_d;
  }
  return sums;
}

template <class T>
FASTKD_INLINE void forward_loop(const Call<T>& call, T* found, T* kept) {
  const int64_t n = call.n, classes = call.classes, plane = call.views * n;
  const int64_t copied = call.exclude_label ? classes : 0;
  std::vector<T> copies(2 * copied);
  for (int64_t i = 0; i < n; ++i) {
    const T *x = call.x + i * classes, *y = call.y + i * classes;
    const int64_t label = label_of(call, i);
    T* copy = copies.data();
    const T largest_x = copied ? without_label(x, copy, classes, label) : largest_of(x, classes);
    const T largest_y = copied ? without_label(y, copy + classes, classes, label) : largest_of(y, classes);
    double mean = 0, spread_x = 1, spread_y = 1;
    if (call.standardize) {
      std::tie(mean, spread_x) = mean_and_std(x, largest_x, classes);
      spread_x += call.eps;
      spread_y = mean_and_std(y, largest_y, classes).second + call.eps;
    }
    const double base[kBase] = {double(largest_x), double(largest_y), mean, spread_x, spread_y};
    for (int64_t m = 0; m < kBase; ++m) kept[m * n + i] = T(base[m]);
    const double own_x = call.labels ? x[label] - largest_x : T(0), own_y = call.labels ? y[label] - largest_y : T(0);
    const double no_label = !call.labels || call.labels[i] == label ? 0 : std::numeric_limits<double>::quiet_NaN();
    if (copied) x = copy, y = copy + classes;
    for (int64_t k = 0; k < call.views; ++k) {
      const int64_t at = k * n + i;
      const double a = call.scale_x[at] / spread_x, b = call.scale_y[at] / spread_y;
      const T a2 = T(a / kLog2), b2 = T(b / kLog2);
      Sums sums = call.moments ? sums_of<true>(x, y, classes, largest_x, largest_y, a2, b2)
                               : sums_of<false>(x, y, classes, largest_x, largest_y, a2, b2);
      if (copied) sums.u -= 1, sums.v -= 1;  // a class of the largest logits adds nothing to the other sums
      const double mean_d = sums.v_d / sums.v * kLog2, mean_zy = sums.v_zy / sums.v, mean_zx = sums.u_zx / sums.u;
      found[at] = T(mean_d + log_ratio(sums.u, sums.v, sums.excess));
      found[plane + at] = T(std::log(sums.v) - b * mean_zy);
      found[2 * plane + at] = call.labels ? T(a * own_x - std::log(sums.u) + no_label) : T(0);
      found[3 * plane + at] = call.labels ? T(b * own_y - std::log(sums.v) + no_label) : T(0);
      T* by_view = kept + kBase * n + at;
      by_view[0] = T(sums.u);
      by_view[plane] = T(sums.v);
      by_view[2 * plane] = T(mean_zx - sums.v_zx / sums.v);
      by_view[3 * plane] = T(sums.v_zy_d / sums.v * kLog2 - mean_zy * mean_d);
      by_view[4 * plane] = T(own_x - mean_zx);
    }
  }
}

template <class T>
FASTKD_INLINE void backward_loop(const Call<T>& call, const T* kept, const T* upstream, T* grad) {
  const int64_t n = call.n, classes = call.classes, plane = call.views * n;
  for (int64_t i = 0; i < n; ++i, grad += classes) {
    const T *x = call.x + i * classes, *y = call.y + i * classes;
    const int64_t label = label_of(call, i);
    const T largest_x = kept[i], largest_y = kept[n + i], mean = kept[2 * n + i];
    const T spread_x = kept[3 * n + i], spread_y = kept[4 * n + i];
    const T no_label = !call.labels || call.labels[i] == label ? T(0) : std::numeric_limits<T>::quiet_NaN();
    double at_label = 0, of_spread = 0;
    for (int64_t k = 0; k < call.views; ++k) {
      const int64_t at = k * n + i;
      const T *by_view = kept + kBase * n + at, g = upstream[at] + no_label, h = upstream[2 * plane + at];
      const T a = call.scale_x[at] / spread_x, b = call.scale_y[at] / spread_y;
      const T of_u = a * (g - h) / by_view[0], of_v = a * g / by_view[plane];
      const T a2 = T(a / kLog2), b2 = T(b / kLog2);
      at_label += double(a) * h;
      of_spread += double(g * by_view[2 * plane] + h * by_view[4 * plane]) * a;
      if (k == 0) {
#pragma omp simd
        for (int64_t c = 0; c < classes; ++c) {
          grad[c] = of_u * power_of_two(a2 * (x[c] - largest_x)) - of_v * power_of_two(b2 * (y[c] - largest_y));
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < classes; ++c) {
          grad[c] += of_u * power_of_two(a2 * (x[c] - largest_x)) - of_v * power_of_two(b2 * (y[c] - largest_y));
        }
      }
    }
    if (call.labels) grad[label] = T((call.exclude_label ? no_label : grad[label]) + at_label);
    const T std = T(spread_x - T(call.eps));
    if (!call.standardize || std <= 0) continue;
    const T of_logit = T(-of_spread / (double(spread_x) * std * double(classes - 1)));
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) grad[c] += of_logit * (x[c] - largest_x - mean);
  }
}

FASTKD_CLONES void forward(const Call<float>& call, float* found, float* kept) { forward_loop(call, found, kept); }
void forward(const Call<double>& call, double* found, double* kept) { forward_loop(call, found, kept); }
FASTKD_CLONES void backward(const Call<float>& call, const float* kept, const float* upstream, float* grad) {
  backward_loop(call, kept, upstream, grad);
}
void backward(const Call<double>& call, const double* kept, const double* upstream, double* grad) {
  backward_loop(call, kept, upstream, grad);
}

// The inputs of a call as the loops read them; they live as long as this does.
struct Inputs {
  Tensor x, y, labels, scale_x, scale_y;

  Inputs(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& given, const Tensor& student_scale,
         const Tensor& teacher_scale)
      : labels(given ? given->contiguous() : Tensor()) {
    TORCH_CHECK_VALUE(student.dim() == 2 && student.sizes() == teacher.sizes() && student_scale.dim() == 2 &&
                          student_scale.size(1) == student.size(0) && student_scale.sizes() == teacher_scale.sizes() &&
                          (!given || given->numel() == student.size(0)),
                      "soft_target_rows: expected logits [B, C], labels [B] and scales [K, B]");
    const auto dtype = student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    x = student.to(dtype).contiguous(), y = teacher.to(dtype).contiguous();
    scale_x = student_scale.to(dtype).contiguous(), scale_y = teacher_scale.to(dtype).contiguous();
  }

  template <class T>
  Call<T> call(bool exclude_label, const std::optional<double>& eps, bool moments) const {
    return {x.const_data_ptr<T>(),
            y.const_data_ptr<T>(),
            labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr,
            scale_x.const_data_ptr<T>(),
            scale_y.const_data_ptr<T>(),
            x.size(0),
            x.size(1),
            scale_x.size(0),
            exclude_label,
            eps.has_value(),
            moments,
            eps.value_or(0)};
  }
};

}  // namespace

std::pair<Tensor, Tensor> soft_target_rows(const Tensor& student_logits, const Tensor& teacher_logits,
                                           const std::optional<Tensor>& labels, const Tensor& student_scale,
                                           const Tensor& teacher_scale, bool exclude_label, std::optional<double> eps,
                                           bool moments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  const Inputs inputs(student_logits, teacher_logits, labels, student_scale, teacher_scale);
  const int64_t views = student_scale.size(0), n = inputs.x.size(0);
  const Tensor found = at::empty({4, views, n}, inputs.x.options());
  const Tensor kept = at::empty({kBase + kPerView * views, n}, inputs.x.options());
  AT_DISPATCH_FLOATING_TYPES(inputs.x.scalar_type(), "soft_target_rows", [&] {
    forward(inputs.call<scalar_t>(exclude_label, eps, moments), found.mutable_data_ptr<scalar_t>(),
            kept.mutable_data_ptr<scalar_t>());
  });
  return {found, kept};
}

Tensor soft_target_rows_gradient(const Tensor& student_logits, const Tensor& teacher_logits,
                                 const std::optional<Tensor>& labels, const Tensor& student_scale,
                                 const Tensor& teacher_scale, const Tensor& kept, const Tensor& upstream,
                                 bool exclude_label, std::optional<double> eps) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Inputs inputs(student_logits, teacher_logits, labels, student_scale, teacher_scale);
  const int64_t views = student_scale.size(0), n = inputs.x.size(0);
  TORCH_CHECK_VALUE(kept.is_contiguous() && kept.numel() == (kBase + kPerView * views) * n &&
                        upstream.is_contiguous() && upstream.numel() == 4 * views * n &&
                        kept.scalar_type() == inputs.x.scalar_type() && upstream.scalar_type() == kept.scalar_type(),
                    "soft_target_rows: expected what the forward kept, and gradients [4, K, B]");
  const Tensor grad = at::empty_like(inputs.x);
  AT_DISPATCH_FLOATING_TYPES(inputs.x.scalar_type(), "soft_target_rows_gradient", [&] {
    backward(inputs.call<scalar_t>(exclude_label, eps, false), kept.const_data_ptr<scalar_t>(),
             upstream.const_data_ptr<scalar_t>(), grad.mutable_data_ptr<scalar_t>());
  });
  return grad.to(student_logits.scalar_type());
}

}  // namespace fastkd
