// Loops over rows of few numbers, compiled for several kinds of processor.
//
// A loop is an always inlined template over float and double. The instance for float is marked FASTKD_CLONES: it exists
// once for each instruction set, and the loader chooses. Reductions say so by a pragma, because their order matters.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// The loader of glibc chooses; musl's cannot, and has one instance, as other processors and compilers have.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FASTKD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTKD_CLONES
#endif
#define FASTKD_INLINE __attribute__((always_inline)) inline

namespace fastkd {

// 2^x to 1.5 units in the last place. Below 2^-126 it is 0, from 2^128 on it is infinite; NaN stays NaN.
FASTKD_INLINE float power_of_two(float x) {
  x = x < -127.0f ? -127.0f : x;
  x = x > 128.0f ? 128.0f : x;
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: its last bits are x, rounded to an integer
  const float f = x - (shifted - 12582912.0f);
  float p = 1.535336e-4f;  // the polynomial of degree 6 whose relative error over [-1/2, 1/2] is smallest, 2e-9
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;  // of any bits, because NaN is no integer
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline double power_of_two(double x) { return std::exp2(x); }

// log(x / t), from x - t too: where they are almost equal, the difference of their logarithms would be rounding.
inline double log_ratio(double x, double t, double excess) {
  return excess < 0 ? -std::log1p(-excess / x) : std::log1p(excess / t);
}

// log(1 + 2^x)
template <class T>
T log_one_plus_power(T x) {
  const T y = x * T(0.69314718055994530942);
  return y > 0 ? y + std::log1p(std::exp(-y)) : std::log1p(std::exp(y));
}

}  // namespace fastkd
