// A tile of two Gram matrices on a CPU, for blocked/gram_sums.py: its sums, and its part of the gradient.
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>


namespace fastkd {
namespace {

// Sums of squares of S and of T, and of their products: for rows, and, if by_column, for columns. In double, because the
// loss is the difference of such sums.
struct Sums {
  double *s, *t, *both;
};

template <class T>
FASTKD_INLINE void sums_loop(const T* S, const T* Y, int64_t n, int64_t N, Sums rows, Sums columns, bool by_column) {
  for (int64_t i = 0; i < n; ++i, S += N, Y += N) {
    double s = 0, t = 0, both = 0;
#pragma omp simd reduction(+ : s, t, both)
    for (int64_t j = 0; j < N; ++j) {
      const double x = S[j], y = Y[j];
      s += x * x;
      t += y * y;
      both += x * y;
    }
    rows.s[i] += s;
    rows.t[i] += t;
    rows.both[i] += both;
    if (!by_column) continue;
#pragma omp simd
    for (int64_t j = 0; j < N; ++j) {
      const double x = S[j], y = Y[j];
      columns.s[j] += x * x;
      columns.t[j] += y * y;
      columns.both[j] += x * y;
    }
  }
}

// S becomes (a_i + a_j) S + (b_i + b_j) Y.
template <class T>
FASTKD_INLINE void gradient_loop(T* S, const T* Y, int64_t n, int64_t N, const T* a_rows, const T* a_columns,
                                 const T* b_rows, const T* b_columns) {
  for (int64_t i = 0; i < n; ++i, S += N, Y += N) {
    const T a = a_rows[i], b = b_rows[i];
#pragma omp simd
    for (int64_t j = 0; j < N; ++j) S[j] = (a + a_columns[j]) * S[j] + (b + b_columns[j]) * Y[j];
  }
}

FASTKD_CLONES void sums(const float* S, const float* Y, int64_t n, int64_t N, Sums rows, Sums columns, bool by_column) {
  sums_loop(S, Y, n, N, rows, columns, by_column);
}
void sums(const double* S, const double* Y, int64_t n, int64_t N, Sums rows, Sums columns, bool by_column) {
  sums_loop(S, Y, n, N, rows, columns, by_column);
}
FASTKD_CLONES void gradient(float* S, const float* Y, int64_t n, int64_t N, const float* a_rows,
                            const float* a_columns, const float* b_rows, const float* b_columns) {
  gradient_loop(S, Y, n, N, a_rows, a_columns, b_rows, b_columns);
}
void gradient(double* S, const double* Y, int64_t n, int64_t N, const double* a_rows, const double* a_columns,
              const double* b_rows, const double* b_columns) {
  gradient_loop(S, Y, n, N, a_rows, a_columns, b_rows, b_columns);
}

void check(const Tensor& S, const Tensor& Y, const Tensor& numbers, at::ScalarType dtype, int64_t first_row,
           int64_t first_column) {
  TORCH_CHECK_VALUE(S.is_contiguous() && Y.is_contiguous() && S.dim() == 2 && S.sizes() == Y.sizes() &&
                        S.scalar_type() == Y.scalar_type() && S.device().is_cpu() && Y.device().is_cpu(),
                    "gram_tile: expected contiguous tiles of one shape and dtype on a CPU");
  TORCH_CHECK_VALUE(numbers.is_contiguous() && numbers.dim() == 2 && numbers.scalar_type() == dtype &&
                        first_row + S.size(0) <= numbers.size(1) && first_column + S.size(1) <= numbers.size(1),
                    "gram_tile: expected numbers of all rows");
}

}  // namespace

// Adds a tile's sums to those of all rows, [3, N] in double. A tile on the diagonal has none for its columns.
void tile_sums(const Tensor& S, const Tensor& Y, const Tensor& of_rows, int64_t first_row, int64_t first_column) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  check(S, Y, of_rows, at::kDouble, first_row, first_column);
  const auto from = [&](int64_t start) {
    double* first = of_rows.mutable_data_ptr<double>() + start;
    return Sums{first, first + of_rows.size(1), first + 2 * of_rows.size(1)};
  };
  AT_DISPATCH_FLOATING_TYPES(S.scalar_type(), "gram_tile", [&] {
    sums(S.const_data_ptr<scalar_t>(), Y.const_data_ptr<scalar_t>(), S.size(0), S.size(1), from(first_row),
         from(first_column), first_row != first_column);
  });
}

// Turns S into the derivatives of the tile. factors [2, N]: a and b of all rows.
void tile_gradient(const Tensor& S, const Tensor& Y, const Tensor& factors, int64_t first_row, int64_t first_column) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check(S, Y, factors, S.scalar_type(), first_row, first_column);
  AT_DISPATCH_FLOATING_TYPES(S.scalar_type(), "gram_tile", [&] {
    const scalar_t *a = factors.const_data_ptr<scalar_t>(), *b = a + factors.size(1);
    gradient(S.mutable_data_ptr<scalar_t>(), Y.const_data_ptr<scalar_t>(), S.size(0), S.size(1), a + first_row,
             a + first_column, b + first_row, b + first_column);
  });
}

}  // namespace fastkd
