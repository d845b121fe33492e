#include "csrc/cpu/products.h"

#include <algorithm>

#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

// Vectors of 4, 8 and 16 floats, at any address.
typedef float Vector4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Vector8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Vector16 __attribute__((vector_size(64), aligned(4), may_alias));

// Terms added in a row before a partial sum is put away: rows and panels of a tile stay in the second-level
// cache, and the error of long sums stays small.
constexpr int64_t kDepth = 512;

// kRows x (kVectors * width) sums stay in registers while the terms go by.
template <typename Vector, int kRows, int kVectors>
QM_INLINE void block(
    const float* rows, int64_t row_stride, const float* panel, int64_t depth, bool add, float* out, int64_t stride) {
  constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = *reinterpret_cast<const Vector*>(panel + k * kPanel + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float x = rows[r * row_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vector* place = reinterpret_cast<Vector*>(out + r * stride + v * kWidth);
      *place = add ? *place + sum[r][v] : sum[r][v];
    }
  }
}

template <typename Vector, int kRows, int kVectors>
QM_INLINE void tile(
    const float* rows, int64_t num_rows, const float* panels, int64_t num_panels, int64_t dim, float* out,
    int64_t stride) {
  constexpr int64_t kWidth = kVectors * sizeof(Vector) / sizeof(float);
  for (int64_t begin = 0; begin < dim; begin += kDepth) {
    const int64_t depth = std::min(kDepth, dim - begin);
    for (int64_t p = 0; p < num_panels; ++p) {
      for (int64_t part = 0; part < kPanel; part += kWidth) {
        const float* panel = panels + (p * dim + begin) * kPanel + part;
        float* to = out + p * kPanel + part;
        int64_t i = 0;
        for (; i + kRows <= num_rows; i += kRows)
          block<Vector, kRows, kVectors>(rows + i * dim + begin, dim, panel, depth, begin > 0, to + i * stride, stride);
        for (; i + 4 <= num_rows; i += 4)
          block<Vector, 4, kVectors>(rows + i * dim + begin, dim, panel, depth, begin > 0, to + i * stride, stride);
        for (; i < num_rows; ++i)
          block<Vector, 1, kVectors>(rows + i * dim + begin, dim, panel, depth, begin > 0, to + i * stride, stride);
      }
    }
  }
  if (dim == 0)
    for (int64_t i = 0; i < num_rows; ++i) std::fill(out + i * stride, out + i * stride + num_panels * kPanel, 0.0f);
}

using Tile = void(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);

#if QM_HAS_SETS
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))) void tile_avx512(
    const float* rows, int64_t num_rows, const float* panels, int64_t num_panels, int64_t dim, float* out,
    int64_t stride) {
  tile<Vector16, 12, 2>(rows, num_rows, panels, num_panels, dim, out, stride);
}

__attribute__((target("avx2,fma"))) void tile_avx2(
    const float* rows, int64_t num_rows, const float* panels, int64_t num_panels, int64_t dim, float* out,
    int64_t stride) {
  tile<Vector8, 6, 2>(rows, num_rows, panels, num_panels, dim, out, stride);
}
#endif

void tile_default(
    const float* rows, int64_t num_rows, const float* panels, int64_t num_panels, int64_t dim, float* out,
    int64_t stride) {
  tile<Vector4, 4, 2>(rows, num_rows, panels, num_panels, dim, out, stride);
}

Tile* choose_tile() {
#if QM_HAS_SETS
  if (kWidestSet == InstructionSet::kAvx512) return tile_avx512;
  if (kWidestSet == InstructionSet::kAvx2) return tile_avx2;
#endif
  return tile_default;
}

// The last elements, with zeros behind them.
template <class Vec>
QM_INLINE Vec load_some(const float* x, int64_t count) {
  float padded[kLanes] = {};
  std::memcpy(padded, x, count * sizeof(float));
  return load<Vec>(padded);
}

template <class Vec>
QM_INLINE float sum_of_products(const float* x, const float* y, int64_t count) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total += load<Vec>(x + i) * load<Vec>(y + i);
  total += load_some<Vec>(x + i, count - i) * load_some<Vec>(y + i, count - i);
  return sum(total);
}

template <class Vec>
QM_INLINE float sum_of_squared_differences(const float* x, const float* y, int64_t count) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec difference = load<Vec>(x + i) - load<Vec>(y + i);
    total += difference * difference;
  }
  const Vec difference = load_some<Vec>(x + i, count - i) - load_some<Vec>(y + i, count - i);
  return sum(total + difference * difference);
}

// Eight rows and terms at a time are transposed in registers; what is left at the end goes one by one.
QM_MULTIVERSION void pack(const float* rows, int64_t num_rows, int64_t dim, float* panels) {
  for (int64_t first = 0; first < num_rows; first += kPanel, panels += dim * kPanel) {
    const int64_t count = std::min(kPanel, num_rows - first);
    const int64_t whole_rows = count / 8 * 8, whole_terms = dim / 8 * 8;
    if (count < kPanel) std::fill_n(panels, dim * kPanel, 0.0f);
    for (int64_t j = 0; j < whole_rows; j += 8)
      for (int64_t k = 0; k < whole_terms; k += 8)
        transpose_8x8(rows + (first + j) * dim + k, dim, panels + k * kPanel + j, kPanel);
    for (int64_t k = 0; k < dim; ++k)
      for (int64_t j = k < whole_terms ? whole_rows : 0; j < count; ++j)
        panels[k * kPanel + j] = rows[(first + j) * dim + k];
  }
}

}  // namespace

float dot(const float* x, const float* y, int64_t count) { return QM_DISPATCH(sum_of_products, x, y, count); }

float squared_distance(const float* x, const float* y, int64_t count) {
  return QM_DISPATCH(sum_of_squared_differences, x, y, count);
}

void pack_panels(const float* rows, int64_t num_rows, int64_t dim, float* panels) { pack(rows, num_rows, dim, panels); }

void products(
    const float* rows, int64_t num_rows, const float* panels, int64_t num_panels, int64_t dim, float* out,
    int64_t stride) {
  static Tile* const chosen = choose_tile();
  chosen(rows, num_rows, panels, num_panels, dim, out, stride);
}

}  // namespace qm_spec
