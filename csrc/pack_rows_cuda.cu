// The CUDA kernel of pack_rows. One warp packs one row. Where rows are aligned, one load reads 16 bytes. There are no
// atomics, and addresses have 64 bits.
#include "pack_rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastkd {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <typename To, typename From>
__device__ To convert(From x) {
  return static_cast<To>(x);
}
template <>
__device__ float convert(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ float convert(__half x) {
  return __half2float(x);
}
template <>
__device__ __nv_bfloat16 convert(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __half convert(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 convert(double x) {
  return __double2bfloat16(x);
}
template <>
__device__ __half convert(double x) {
  return __double2half(x);
}

// These are approximate, to 2 ulp. The exact ones call a subroutine, around which the compiler spills registers.
__device__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ double reciprocal(double x) { return 1.0 / x; }
__device__ float reciprocal_sqrt(float x) { return rsqrtf(x); }
__device__ double reciprocal_sqrt(double x) { return rsqrt(x); }

template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Vector {
  T value[N];
};

template <typename T>
__device__ T warp_max(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

template <typename T>
__device__ T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// A lane reads the vectors lane, lane + 32, ... of its row. The first HELD of them stay in registers. The rest of a
// longer row is read again, from the cache.
template <typename From, typename To, int WIDTH, int HELD>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 6) pack_rows_kernel(PackRows arguments) {
  using Real = typename Accumulate<From>::type;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (row >= arguments.stack * arguments.n) return;
  const bool is_second = row >= arguments.n;
  const int64_t index = is_second ? row - arguments.n : row;
  const From* source = static_cast<const From*>(is_second ? arguments.second : arguments.first) +
                       index * (is_second ? arguments.second_stride : arguments.first_stride);
  To* target = static_cast<To*>(arguments.packed) + row * arguments.D;
  const int64_t vectors = arguments.D / WIDTH;
  const int lane = threadIdx.x;

  Vector<From, WIDTH> held[HELD];
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    const int64_t v = lane + static_cast<int64_t>(k) * kWarp;
    if (v < vectors) held[k] = reinterpret_cast<const Vector<From, WIDTH>*>(source)[v];
  }
  auto for_each = [&](auto&& function) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      const int64_t v = lane + static_cast<int64_t>(k) * kWarp;
      if (v < vectors) function(v, held[k]);
    }
    for (int64_t v = lane + static_cast<int64_t>(HELD) * kWarp; v < vectors; v += kWarp) {
      const Vector<From, WIDTH> loaded = reinterpret_cast<const Vector<From, WIDTH>*>(source)[v];
      function(v, loaded);
    }
  };

  // Each row takes two reciprocals. With a division per element the kernel would not keep up with the memory.
  Real inverse_divisor = 1, inverse_scaled_norm = 1;
  bool is_zero = false;
  if (arguments.normalize) {
    Real largest = 0, poison = 0;  // poison becomes NaN if an element is not finite; the comparison would miss a NaN
    for_each([&](int64_t, const Vector<From, WIDTH>& x) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const Real magnitude = fabs(convert<Real>(x.value[i]));
        largest = magnitude > largest ? magnitude : largest;
        poison += magnitude - magnitude;
      }
    });
    largest = warp_max(largest);
    poison = warp_sum(poison);
    const Real divisor = fmin(fmax(largest, DivisorBounds<Real>::low), DivisorBounds<Real>::high);
    inverse_divisor = reciprocal(divisor);
    Real squares = 0;
    for_each([&](int64_t, const Vector<From, WIDTH>& x) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const Real scaled = convert<Real>(x.value[i]) * inverse_divisor;
        squares += scaled * scaled;
      }
    });
    inverse_scaled_norm = reciprocal_sqrt(warp_sum(squares) + poison);
    is_zero = divisor <= static_cast<Real>(kNormEps) * inverse_scaled_norm;  // false for NaN, which then stays
  }
  for_each([&](int64_t v, const Vector<From, WIDTH>& x) {
    Vector<To, WIDTH> unit;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const Real value = convert<Real>(x.value[i]);
      const Real result = arguments.normalize ? (is_zero ? Real(0) : value * inverse_divisor * inverse_scaled_norm) : value;
      unit.value[i] = convert<To>(result);
    }
    reinterpret_cast<Vector<To, WIDTH>*>(target)[v] = unit;
  });
  if (lane == 0) {
    static_cast<Real*>(arguments.inverse_norm)[row] = is_zero ? Real(0) : inverse_divisor * inverse_scaled_norm;
  }
}

int64_t blocks(const PackRows& arguments) {
  return (arguments.stack * arguments.n + kWarpsPerBlock - 1) / kWarpsPerBlock;
}

template <typename From, typename To>
void launch(const PackRows& arguments, cudaStream_t stream) {
  constexpr int WIDTH = 16 / sizeof(From);
  auto aligned = [&](const void* rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % WIDTH == 0;
  };
  const bool wide = arguments.D % WIDTH == 0 && aligned(arguments.first, arguments.first_stride) &&
                    aligned(arguments.second, arguments.second_stride);
  const dim3 block(kWarp, kWarpsPerBlock);
  const dim3 grid(static_cast<unsigned>(blocks(arguments)));
  if (wide) {
    pack_rows_kernel<From, To, WIDTH, 4><<<grid, block, 0, stream>>>(arguments);
  } else {
    pack_rows_kernel<From, To, 1, 8><<<grid, block, 0, stream>>>(arguments);
  }
}

template <typename From>
void launch_to(const PackRows& arguments, cudaStream_t stream) {
  switch (arguments.to) {
    case DType::kFloat64:
      return launch<From, double>(arguments, stream);
    case DType::kFloat32:
      return launch<From, float>(arguments, stream);
    case DType::kBFloat16:
      return launch<From, __nv_bfloat16>(arguments, stream);
    case DType::kFloat16:
      return launch<From, __half>(arguments, stream);
  }
}

}  // namespace

int pack_rows_cuda(const PackRows& arguments, void* stream) {
  if (arguments.n == 0) return cudaSuccess;
  if (blocks(arguments) > INT32_MAX) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (arguments.from) {
    case DType::kFloat64:
      launch_to<double>(arguments, on);
      break;
    case DType::kFloat32:
      launch_to<float>(arguments, on);
      break;
    case DType::kBFloat16:
      launch_to<__nv_bfloat16>(arguments, on);
      break;
    case DType::kFloat16:
      launch_to<__half>(arguments, on);
      break;
  }
  return cudaGetLastError();
}

}  // namespace fastkd
