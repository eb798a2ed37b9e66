// Reads one or two sets of rows once, L2-normalises and casts them, and packs them into one buffer. This header includes
// no torch headers, so that the CUDA file compiles in seconds.
#pragma once

#include <cstdint>

namespace fastkd {

// Rows no longer than this count as zero. It equals fastkd.numerics.NORM_EPS.
constexpr double kNormEps = 1e-12;

// Rows are divided by their largest magnitude before squaring, because in float the square of 1e30 overflows and the
// square of 1e-30 vanishes. Within these bounds the divisor's reciprocal is accurate. Below the lower bound a row counts
// as zero. Above the upper bound the squares still fit.
template <typename Real>
struct DivisorBounds {
  static constexpr Real low = Real(1e-20), high = Real(1e30);
};
template <>
struct DivisorBounds<double> {
  static constexpr double low = 1e-100, high = 1e300;
};

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// first, second: n rows of D contiguous elements; first_stride, second_stride: elements from one row to the next.
// stack: 2, or 1 if there is only the first set. packed: [stack, n, D]. inverse_norm: [stack, n], float64 for float64
// inputs and float32 otherwise, and zero for rows that count as zero.
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

// Launches the kernel on `stream`, which is a cudaStream_t. Returns a cudaError_t.
int pack_rows_cuda(const PackRows& arguments, void* stream);

}  // namespace fastkd
