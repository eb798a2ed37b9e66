// The angles of all triplets of rows on a CPU: blocked/triplet_angles.py takes as many passes as there are operations here.
//
// An angle is the same with its two ends exchanged, so that only ends j < k are visited, in tiles that stay in the first
// cache. Every anchor i passes over a tile before the next tile comes. Threads share out the tiles, and each has its own
// sums per anchor; these are added in the order of the threads.
#include "dense.h"
#include "functions.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kTileRows = 32, kTileColumns = 64;  // of ends j and k

// The Gram matrix and the inverse distances of one network, [N, N] each.
template <class T>
struct Side {
  const T *gram, *inverse;
};

// Gradients for the gradient 1 of the sum. ends [N, N]: of the Gram matrix, by the ends j and k of all anchors. of_gram
// and of_inverse [anchors, N]: sums over one end, from which blocked/triplet_angles.py makes the rest.
template <class T>
struct Gradients {
  T *ends, *of_gram, *of_inverse;
};

struct Ranges {
  int64_t N, first, last;  // the rows, and the anchors among them
};

// The Huber loss of angles that differ by d. Its derivative is d, clamped to [-1, 1].
template <class T>
FASTKD_INLINE T clamped(T d) {
  d = d < T(-1) ? T(-1) : d;
  return d > T(1) ? T(1) : d;
}

// Adds the triplets of all anchors whose ends lie in the tile of rows from j0 and columns from k0. The ends and sums of
// the tile are added where they lie. Returns twice the sum of the losses, as both orders of the ends count.
template <class T>
FASTKD_INLINE double tile_loop(Side<T> s, Side<T> t, Gradients<T> g, Ranges ranges, int64_t j0, int64_t k0) {
  const int64_t N = ranges.N, j1 = std::min(j0 + kTileRows, N), k1 = std::min(k0 + kTileColumns, N);
  T ends[kTileRows * kTileColumns] = {};
  double total = 0;
  for (int64_t i = ranges.first; i < ranges.last; ++i) {
    const T *gram_s = s.gram + i * N, *gram_t = t.gram + i * N, *inverse_s = s.inverse + i * N;
    const T *inverse_t = t.inverse + i * N, own_s = gram_s[i], own_t = gram_t[i];
    T *of_gram = g.of_gram + (i - ranges.first) * N, *of_inverse = g.of_inverse + (i - ranges.first) * N;
    for (int64_t j = j0; j < j1; ++j) {
      const T *row_s = s.gram + j * N, *row_t = t.gram + j * N;
      T* row_ends = ends + (j - j0) * kTileColumns - k0;
      const T c_s = gram_s[j] - own_s, c_t = gram_t[j] - own_t, u_s = inverse_s[j], u_t = inverse_t[j];
      T sum = 0, sum_gram = 0, sum_inverse = 0;
#pragma omp simd reduction(+ : sum, sum_gram, sum_inverse)
      for (int64_t k = std::max(k0, j + 1); k < k1; ++k) {
        const T scale = u_s * inverse_s[k];
        const T a = (row_s[k] - c_s - gram_s[k]) * scale;
        const T b = (row_t[k] - c_t - gram_t[k]) * (u_t * inverse_t[k]);
        const T d = a - b, slope = clamped(d), q = slope * scale, r = slope * a;
        sum += slope * (d - T(0.5) * slope);
        row_ends[k] += q;
        sum_gram += q;
        of_gram[k] += q;
        sum_inverse += r;
        of_inverse[k] += r;
      }
      of_gram[j] += sum_gram;
      of_inverse[j] += sum_inverse;
      total += sum;
    }
  }
  for (int64_t j = j0; j < j1; ++j) {
    for (int64_t k = std::max(k0, j + 1); k < k1; ++k) {
      g.ends[j * N + k] = g.ends[k * N + j] = ends[(j - j0) * kTileColumns + k - k0];
    }
  }
  return 2 * total;
}

// The triplets whose two ends are one row: both angles are 1, but where a row has no direction.
template <class T>
double diagonal(Side<T> s, Side<T> t, Gradients<T> g, Ranges ranges) {
  const int64_t N = ranges.N;
  double total = 0;
  for (int64_t j = 0; j < N; ++j) {
    T end = 0;
    for (int64_t i = ranges.first; i < ranges.last; ++i) {
      const int64_t ij = i * N + j, ii = i * N + i, jj = j * N + j, at = (i - ranges.first) * N + j;
      const T scale = s.inverse[ij] * s.inverse[ij];
      const T a = (s.gram[jj] - (s.gram[ij] - s.gram[ii]) - s.gram[ij]) * scale;
      const T b = (t.gram[jj] - (t.gram[ij] - t.gram[ii]) - t.gram[ij]) * (t.inverse[ij] * t.inverse[ij]);
      const T d = a - b, slope = clamped(d);
      total += slope * (d - T(0.5) * slope);
      end += slope * scale;
      g.of_gram[at] += slope * scale;
      g.of_inverse[at] += slope * a;
    }
    g.ends[j * N + j] = end;
  }
  return total;
}

FASTKD_CLONES double tile(Side<float> s, Side<float> t, Gradients<float> g, Ranges ranges, int64_t j0, int64_t k0) {
  return tile_loop(s, t, g, ranges, j0, k0);
}
double tile(Side<double> s, Side<double> t, Gradients<double> g, Ranges ranges, int64_t j0, int64_t k0) {
  return tile_loop(s, t, g, ranges, j0, k0);
}

// Calls work(worker) for every worker, side by side where the system gives threads.
template <class Work>
void on_threads(int64_t workers, const Work& work) {
  std::vector<std::thread> threads;
  int64_t started = 1;
  try {
    for (; started < workers; ++started) threads.emplace_back(work, started);
  } catch (const std::system_error&) {  // no more threads: this one does what is left
  }
  work(int64_t(0));
  for (int64_t worker = started; worker < workers; ++worker) work(worker);
  for (std::thread& thread : threads) thread.join();
}

template <class T>
double all_tiles(Side<T> s, Side<T> t, std::vector<Gradients<T>> per_worker, Ranges ranges) {
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t j0 = 0; j0 < ranges.N; j0 += kTileRows) {
    for (int64_t k0 = j0 / kTileColumns * kTileColumns; k0 < ranges.N; k0 += kTileColumns) tiles.emplace_back(j0, k0);
  }
  const int64_t workers = static_cast<int64_t>(per_worker.size());
  std::vector<double> totals(workers);
  on_threads(workers, [&](int64_t worker) {
    for (size_t index = worker; index < tiles.size(); index += workers) {
      totals[worker] += tile(s, t, per_worker[worker], ranges, tiles[index].first, tiles[index].second);
    }
  });
  double total = diagonal(s, t, per_worker[0], ranges);
  for (const double part : totals) total += part;
  return total;
}

}  // namespace

// The sum of the losses, and ends, of_gram and of_inverse of Gradients.
std::tuple<Tensor, Tensor, Tensor, Tensor> triplet_angles(const Tensor& gram_s, const Tensor& inverse_s,
                                                          const Tensor& gram_t, const Tensor& inverse_t, int64_t first,
                                                          int64_t last, int64_t threads) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // nothing here is differentiated
  const int64_t N = gram_s.size(0);
  for (const Tensor& x : {gram_s, inverse_s, gram_t, inverse_t}) {
    TORCH_CHECK_VALUE(x.is_contiguous() && x.dim() == 2 && x.size(0) == N && x.size(1) == N && x.device().is_cpu() &&
                          x.scalar_type() == gram_s.scalar_type(),
                      "triplet_angles: expected contiguous matrices of one shape and dtype on a CPU");
  }
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= N, "triplet_angles: got anchors beyond the rows");
  const int64_t pieces = (N + kTileRows - 1) / kTileRows;
  const int64_t workers = std::max<int64_t>(1, std::min(threads, pieces * pieces / 8));
  const Tensor ends = at::empty({N, N}, gram_s.options());
  const Tensor sums = at::zeros({workers, 2, last - first, N}, gram_s.options());
  const double total = AT_DISPATCH_FLOATING_TYPES(gram_s.scalar_type(), "triplet_angles", [&] {
    using T = scalar_t;
    std::vector<Gradients<T>> per_worker;
    for (int64_t worker = 0; worker < workers; ++worker) {
      T* own = sums.mutable_data_ptr<T>() + worker * 2 * (last - first) * N;
      per_worker.push_back({ends.mutable_data_ptr<T>(), own, own + (last - first) * N});
    }
    return all_tiles<T>({gram_s.const_data_ptr<T>(), inverse_s.const_data_ptr<T>()},
                        {gram_t.const_data_ptr<T>(), inverse_t.const_data_ptr<T>()}, per_worker, {N, first, last});
  });
  const Tensor added = workers == 1 ? sums[0] : sums.sum(0);
  return {number(total, gram_s), ends, added[0], added[1]};
}

}  // namespace fastkd
