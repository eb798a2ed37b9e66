// What the operations of few rows share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastkd {

constexpr double kLog2 = 0.69314718055994530942;

// scale x w^T and x^T w, as in gemm.py of the blocked backend. min_linear: as there.
at::Tensor product(const at::Tensor& x, const at::Tensor& w, int64_t min_linear, double scale = 1.0);
at::Tensor transposed_product(const at::Tensor& x, const at::Tensor& w, int64_t min_linear);

// Turns the gradient of the rows that were multiplied, [n, D], into that of the raw rows, in place, and returns its share
// in the gradient of the scale. Without inverse norms the rows were multiplied as they are.
double to_raw_rows(const at::Tensor& grad, const at::Tensor& rows, const std::optional<at::Tensor>& inverse_norm,
                   double scale);

// A 0-dim tensor in the dtype of `like`. A sum that is too large for float32 is infinite there, as in torch's operations.
at::Tensor number(double value, const at::Tensor& like);

// A factor for every row: the factor itself, or times the weights, in the dtype of `like`.
at::Tensor row_factors(const std::optional<at::Tensor>& weight, double factor, int64_t n, const at::Tensor& like);

}  // namespace fastkd
