// What the operations of few rows share.
#pragma once

#include <ATen/ATen.h>

namespace fastkd {

constexpr double kLog2 = 0.69314718055994530942;

// scale x w^T and x^T w, as in gemm.py of the blocked backend. min_linear: as there.
at::Tensor product(const at::Tensor& x, const at::Tensor& w, int64_t min_linear, double scale = 1.0);
at::Tensor transposed_product(const at::Tensor& x, const at::Tensor& w, int64_t min_linear);

// log(1 + 2^x)
at::Tensor log_one_plus_power(const at::Tensor& x);

}  // namespace fastkd
