// A pair of tiles of dual_softmax on a CPU, where one plain exponential per logit is safe. The legend is in
// dual_softmax.py of the blocked backend, which takes as many passes as there are operations here.
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>

namespace fastkd {
namespace {

// Sums of a row: of 2^X_ij, of 2^X_ij (X_ij - Y_ij), and of 2^Y_ij.
template <class T>
struct Sums {
  T *p, *weighted, *q;
};

// Factors of a row, as in _Factors.
template <class T>
struct Factors {
  const T *r, *x, *k, *k_of_d;
};

template <class T>
FASTKD_INLINE void sums_loop(const T* X, const T* Y, int64_t n, int64_t N, Sums<T> rows, Sums<T> cols) {
  for (int64_t i = 0; i < n; ++i, X += N, Y += N) {
    T p = 0, weighted = 0, q = 0;
#pragma omp simd reduction(+ : p, weighted, q)
    for (int64_t j = 0; j < N; ++j) {
      const T u = power_of_two(X[j]), v = power_of_two(Y[j]), d = X[j] - Y[j];
      p += u;
      weighted += u * d;
      q += v;
      cols.p[j] += v;
      cols.weighted[j] -= v * d;
      cols.q[j] += u;
    }
    rows.p[i] += p;
    rows.weighted[i] += weighted;
    rows.q[i] += q;
  }
}

// G of the tile, and G of the mirrored one, transposed.
template <class T>
FASTKD_INLINE void gradients_loop(const T* X, const T* Y, T* G, T* mirrored, int64_t n, int64_t N, Factors<T> rows,
                                  Factors<T> cols) {
  for (int64_t i = 0; i < n; ++i, X += N, Y += N, G += N, mirrored += N) {
    const T r = rows.r[i], x = rows.x[i], k = rows.k[i], k_of_d = rows.k_of_d[i];
#pragma omp simd
    for (int64_t j = 0; j < N; ++j) {
      const T u = power_of_two(X[j]), v = power_of_two(Y[j]), d = X[j] - Y[j];
      G[j] = u * (k_of_d * d + r + cols.x[j]) - v * cols.k[j];
      mirrored[j] = v * (cols.r[j] - cols.k_of_d[j] * d + x) - u * k;
    }
  }
}

FASTKD_CLONES void sums(const float* X, const float* Y, int64_t n, int64_t N, Sums<float> rows, Sums<float> cols) {
  sums_loop(X, Y, n, N, rows, cols);
}
void sums(const double* X, const double* Y, int64_t n, int64_t N, Sums<double> rows, Sums<double> cols) {
  sums_loop(X, Y, n, N, rows, cols);
}
FASTKD_CLONES void gradients(const float* X, const float* Y, float* G, float* mirrored, int64_t n, int64_t N,
                             Factors<float> rows, Factors<float> cols) {
  gradients_loop(X, Y, G, mirrored, n, N, rows, cols);
}
void gradients(const double* X, const double* Y, double* G, double* mirrored, int64_t n, int64_t N,
               Factors<double> rows, Factors<double> cols) {
  gradients_loop(X, Y, G, mirrored, n, N, rows, cols);
}

void check(const Tensor& tile, const Tensor& X) {
  TORCH_CHECK_VALUE(tile.is_contiguous() && tile.sizes() == X.sizes() && tile.scalar_type() == X.scalar_type(),
                    "dual_softmax_pair: expected contiguous tiles of one shape and dtype");
}

}  // namespace

// Adds a pair's sums to those of all rows: p, weighted, q, [n] each. The pair's rows and columns start at these indices.
void pair_sums(const Tensor& X, const Tensor& Y, const Tensor& p, const Tensor& weighted, const Tensor& q,
               int64_t first_row, int64_t first_column) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  for (const Tensor& tile : {X, Y}) check(tile, X);
  AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "dual_softmax_pair", [&] {
    using T = scalar_t;
    const auto from = [&](int64_t start) {
      return Sums<T>{p.mutable_data_ptr<T>() + start, weighted.mutable_data_ptr<T>() + start,
                     q.mutable_data_ptr<T>() + start};
    };
    sums(X.const_data_ptr<T>(), Y.const_data_ptr<T>(), X.size(0), X.size(1), from(first_row), from(first_column));
  });
}

// Writes a pair's gradients. The factors are those of all rows, [n] each.
void pair_gradients(const Tensor& X, const Tensor& Y, const Tensor& G, const Tensor& mirrored, const Tensor& r,
                    const Tensor& x, const Tensor& k, const Tensor& k_of_d, int64_t first_row, int64_t first_column) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (const Tensor& tile : {X, Y, G, mirrored}) check(tile, X);
  AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "dual_softmax_pair", [&] {
    using T = scalar_t;
    const auto from = [&](int64_t start) {
      return Factors<T>{r.const_data_ptr<T>() + start, x.const_data_ptr<T>() + start, k.const_data_ptr<T>() + start,
                        k_of_d.const_data_ptr<T>() + start};
    };
    gradients(X.const_data_ptr<T>(), Y.const_data_ptr<T>(), G.mutable_data_ptr<T>(), mirrored.mutable_data_ptr<T>(),
              X.size(0), X.size(1), from(first_row), from(first_column));
  });
}

}  // namespace fastkd
