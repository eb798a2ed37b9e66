// fastkd_native::pack_rows on a CPU, and the call of the CUDA kernel. pack_rows in fastkd/distributed/pack.py computes
// the same in Python. Its docstring says what is returned.
#include "pack_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#ifdef FASTKD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastkd {
namespace {

constexpr int64_t kLanes = 16;  // so many partial results that a compiler can keep them in vector registers

// Calls function(i, i % kLanes) for each i < D. Whole blocks come first, because a compiler can vectorise them.
template <typename Function>
void for_each_lane(int64_t D, Function&& function) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) function(i + k, k);
  }
  for (int64_t k = 0; i + k < D; ++k) function(i + k, k);
}

template <typename Real, typename From, typename To>
void pack_row(const From* source, To* target, Real* inverse_norm, int64_t D, bool normalize) {
  if (!normalize) {
    for (int64_t i = 0; i < D; ++i) target[i] = static_cast<To>(static_cast<Real>(source[i]));
    *inverse_norm = 1;
    return;
  }
  Real largest_of[kLanes] = {}, squares_of[kLanes] = {};
  Real poison_of[kLanes] = {};  // becomes NaN if an element is not finite; the comparison below would miss a NaN
  for_each_lane(D, [&](int64_t i, int64_t k) {
    const Real magnitude = std::abs(static_cast<Real>(source[i]));
    largest_of[k] = largest_of[k] < magnitude ? magnitude : largest_of[k];
    poison_of[k] += magnitude - magnitude;
  });
  const Real largest = *std::max_element(largest_of, largest_of + kLanes);
  const Real divisor = std::clamp(largest, DivisorBounds<Real>::low, DivisorBounds<Real>::high);
  const Real inverse_divisor = 1 / divisor;
  for_each_lane(D, [&](int64_t i, int64_t k) {
    const Real scaled = static_cast<Real>(source[i]) * inverse_divisor;
    squares_of[k] += scaled * scaled;
  });
  Real squares = 0;
  for (int64_t k = 0; k < kLanes; ++k) squares += squares_of[k] + poison_of[k];
  const Real inverse_scaled_norm = 1 / std::sqrt(squares);
  const bool is_zero = divisor <= static_cast<Real>(kNormEps) * inverse_scaled_norm;  // false for NaN, which then stays
  if (is_zero) {
    std::fill(target, target + D, To(0));
    *inverse_norm = 0;
    return;
  }
  for (int64_t i = 0; i < D; ++i) {
    target[i] = static_cast<To>(static_cast<Real>(source[i]) * inverse_divisor * inverse_scaled_norm);
  }
  *inverse_norm = inverse_divisor * inverse_scaled_norm;
}

template <typename Real, typename From, typename To>
void pack_side(const at::Tensor& x, To* packed, Real* inverse_norm, bool normalize) {
  const int64_t D = x.size(1), stride = x.stride(0);
  const From* source = x.const_data_ptr<From>();
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, 16384 / D), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_row<Real>(source + i * stride, packed + i * D, inverse_norm + i, D, normalize);
    }
  });
}

void check(at::TensorList rows, at::ScalarType dtype, bool normalize) {
  TORCH_CHECK_VALUE(rows.size() == 1 || rows.size() == 2, "pack_rows: got ", rows.size(), " tensors, expected 1 or 2");
  const at::Tensor &first = rows.front(), &second = rows.back();
  TORCH_CHECK_VALUE(first.dim() == 2 && first.sizes() == second.sizes(), "pack_rows: got shapes ", first.sizes(),
                    " and ", second.sizes(), ", expected [n, D] of each");
  TORCH_CHECK_TYPE(first.scalar_type() == second.scalar_type(), "pack_rows: got ", first.scalar_type(), " and ",
                   second.scalar_type(), ", expected one dtype");
  TORCH_CHECK_VALUE(first.device() == second.device(), "pack_rows: got tensors on two devices");
  if (!normalize && first.scalar_type() == dtype) return;
  for (const at::ScalarType type : {first.scalar_type(), dtype}) {
    TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                     "pack_rows: got ", type, ", expected float64, float32, bfloat16 or float16");
  }
}

at::Tensor with_dense_rows(const at::Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
}

std::tuple<at::Tensor, at::Tensor> outputs(at::TensorList rows, at::ScalarType dtype) {
  const at::Tensor& first = rows.front();
  const int64_t k = rows.size(), n = first.size(0);
  const at::ScalarType real = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {at::empty({k, n, first.size(1)}, first.options().dtype(dtype)),
          at::empty({k, n, 1}, first.options().dtype(real))};
}

// Copies rows of any dtype that travel as they are. A view would not do: their owner may write to them meanwhile.
std::tuple<at::Tensor, at::Tensor> stacked(at::TensorList rows) {
  at::Tensor inverse_norm = std::get<1>(outputs(rows, rows.front().scalar_type()));
  return {at::stack(rows), inverse_norm.fill_(1)};
}

std::tuple<at::Tensor, at::Tensor> pack_rows_on_cpu(at::TensorList rows, at::ScalarType dtype, bool normalize) {
  check(rows, dtype, normalize);
  const at::Tensor& first = rows.front();
  if (!normalize && first.scalar_type() == dtype) return stacked(rows);
  auto [packed, inverse_norm] = outputs(rows, dtype);
  const int64_t n = first.size(0), elements = first.numel();
  if (elements == 0) return {packed, inverse_norm};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, first.scalar_type(), "pack_rows", [&] {
    using From = scalar_t;
    using Real = std::conditional_t<std::is_same_v<From, double>, double, float>;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "pack_rows", [&] {
      for (size_t side = 0; side < rows.size(); ++side) {
        pack_side<Real, From>(with_dense_rows(rows[side]), packed.mutable_data_ptr<scalar_t>() + side * elements,
                              inverse_norm.mutable_data_ptr<Real>() + side * n, normalize);
      }
    });
  });
  return {packed, inverse_norm};
}

#ifdef FASTKD_WITH_CUDA
DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

std::tuple<at::Tensor, at::Tensor> pack_rows_on_cuda(at::TensorList rows, at::ScalarType dtype, bool normalize) {
  check(rows, dtype, normalize);
  const at::Tensor& first = rows.front();
  const c10::cuda::CUDAGuard guard(first.device());
  if (!normalize && first.scalar_type() == dtype) return stacked(rows);
  auto [packed, inverse_norm] = outputs(rows, dtype);
  if (first.numel() == 0) return {packed, inverse_norm};
  const at::Tensor dense_first = with_dense_rows(first), dense_second = with_dense_rows(rows.back());
  const PackRows arguments{dense_first.const_data_ptr(),
                           dense_second.const_data_ptr(),
                           dense_first.stride(0),
                           dense_second.stride(0),
                           packed.mutable_data_ptr(),
                           inverse_norm.mutable_data_ptr(),
                           static_cast<int64_t>(rows.size()),
                           first.size(0),
                           first.size(1),
                           dtype_of(first.scalar_type()),
                           dtype_of(dtype),
                           normalize};
  const int error = pack_rows_cuda(arguments, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return {packed, inverse_norm};
}
#endif

}  // namespace

TORCH_LIBRARY(fastkd_native, library) {
  library.def("pack_rows(Tensor[] rows, ScalarType dtype, bool normalize) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastkd_native, CPU, library) { library.impl("pack_rows", pack_rows_on_cpu); }

#ifdef FASTKD_WITH_CUDA
TORCH_LIBRARY_IMPL(fastkd_native, CUDA, library) { library.impl("pack_rows", pack_rows_on_cuda); }
#endif

}  // namespace fastkd
