// One pass over one or two sets of rows: L2-normalise, cast, pack them into one buffer. Free of torch headers.
#pragma once

#include <cstdint>

namespace fastkd {

// Rows no longer than this count as zero; fastkd.numerics.NORM_EPS.
constexpr double kNormEps = 1e-12;

// Rows are divided by their largest magnitude before squaring: the square of 1e30 overflows float, that of 1e-30
// vanishes. Within these bounds the divisor's reciprocal is accurate; beyond the lower one a row counts as zero, beyond
// the upper one the squares still fit.
template <typename Real>
struct DivisorBounds {
  static constexpr Real low = Real(1e-20), high = Real(1e30);
};
template <>
struct DivisorBounds<double> {
  static constexpr double low = 1e-100, high = 1e300;
};

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// first, second: n rows of D contiguous elements, first_stride and second_stride elements from row to row; stack: 2, or
// 1 for the first alone. packed: [stack, n, D]. inverse_norm: [stack, n], float64 for float64 inputs, else float32; zero for rows that count as zero.
struct PackRows {
  const void* first;
  const void* second;
  int64_t first_stride;
  int64_t second_stride;
  void* packed;
  void* inverse_norm;
  int64_t stack;
  int64_t n;
  int64_t D;
  DType from;
  DType to;
  bool normalize;
};

// Launches on `stream`, a cudaStream_t. Returns a cudaError_t.
int pack_rows_cuda(const PackRows& arguments, void* stream);

}  // namespace fastkd
