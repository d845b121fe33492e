// Sixteen floats at a time, as GCC's and Clang's vector types: one AVX-512 register, two of AVX2, four of SSE.
//
// Everything here is inlined into functions marked QM_MULTIVERSION and compiled for their instruction sets.
#pragma once

#include <cstring>

#include "csrc/cpu/kernel.h"
#include "csrc/cpu/math.h"

namespace qm_spec {

constexpr int64_t kLanes = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

// The two half types of a cache as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// `count` rounded up to whole vectors.
QM_INLINE int64_t to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

QM_INLINE Vec all(float x) { return Vec{} + x; }

template <class V, class T>
QM_INLINE V read_bytes(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

QM_INLINE Vec load(const float* x) { return read_bytes<Vec>(x); }

QM_INLINE Vec load(const BFloat16* x) {
  return (Vec)(__builtin_convertvector(read_bytes<HalfVec>(x), BitVec) << 16);
}

// Exponent and mantissa are shifted into place and scaled by 2^112, which handles subnormals as well.
QM_INLINE Vec load(const Float16* x) {
  const BitVec bits = __builtin_convertvector(read_bytes<HalfVec>(x), BitVec);
  const BitVec magnitude = (bits & 0x7fffu) << 13;
  const BitVec finite = (BitVec)((Vec)magnitude * 0x1p112f);
  const BitVec special = magnitude | 0x7f800000u;
  return (Vec)((magnitude >= 0x0f800000u ? special : finite) | (bits & 0x8000u) << 16);
}

QM_INLINE void store(Vec v, float* x) { std::memcpy(x, &v, sizeof v); }

// To nearest, ties to even, as in torch.
QM_INLINE void store(Vec v, BFloat16* x) {
  const BitVec bits = (BitVec)v;
  const BitVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const BitVec whole = (bits & 0x7fffffffu) > 0x7f800000u ? BitVec{} + 0x7fc0u : rounded;
  const HalfVec half = __builtin_convertvector(whole, HalfVec);
  std::memcpy(x, &half, sizeof half);
}

QM_INLINE void store(Vec v, Float16* x) {
  const BitVec sign = (BitVec)v & 0x80000000u, bits = (BitVec)v ^ sign;
  const BitVec special = bits > 0x7f800000u ? BitVec{} + 0x7e00u : BitVec{} + 0x7c00u;
  // Adding one half shifts the mantissa of a subnormal result into place and rounds it.
  const BitVec small = (BitVec)((Vec)bits + 0.5f) - 0x3f000000u;
  const BitVec normal = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
  const BitVec whole = bits >= 0x47800000u ? special : bits < 0x38800000u ? small : normal;
  const HalfVec half = __builtin_convertvector(whole | sign >> 16, HalfVec);
  std::memcpy(x, &half, sizeof half);
}

// A row of `count` elements as floats, with zeros up to to_lanes(count).
template <class T>
QM_INLINE void load_row(const T* row, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(row + i), out + i);
  if (i < count) {
    T rest[kLanes] = {};
    std::memcpy(rest, row + i, (count - i) * sizeof(T));
    store(load(rest), out + i);
  }
}

// The first `count` floats of a row that is padded to whole vectors.
template <class T>
QM_INLINE void store_row(const float* row, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(row + i), out + i);
  if (i < count) {
    T rest[kLanes];
    store(load(row + i), rest);
    std::memcpy(out + i, rest, (count - i) * sizeof(T));
  }
}

// What is left of floats after they were stored as T.
QM_INLINE Vec rounded_to(Vec v, const float*) { return v; }
template <class T>
QM_INLINE Vec rounded_to(Vec v, const T*) {
  T stored[kLanes];
  store(v, stored);
  return load(stored);
}

QM_INLINE float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

QM_INLINE float sum(Vec v) {
  float part[kLanes];
  store(v, part);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// fast_exp and fast_log of every lane.
QM_INLINE Vec exp(Vec x) {
  float lane[kLanes];
  store(x, lane);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) lane[i] = fast_exp(lane[i]);
  return load(lane);
}

QM_INLINE Vec log(Vec x) {
  float lane[kLanes];
  store(x, lane);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) lane[i] = fast_log(lane[i]);
  return load(lane);
}

// Eight rows of eight floats as columns: out[c * out_stride + r] = rows[r * stride + c].
QM_INLINE void transpose_8x8(const float* rows, int64_t stride, float* out, int64_t out_stride) {
  typedef float Row __attribute__((vector_size(32)));
  typedef int32_t Pick __attribute__((vector_size(32)));
  Row r[8], pairs[8], quads[8];
  for (int i = 0; i < 8; ++i) r[i] = read_bytes<Row>(rows + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shuffle(r[i], r[i + 1], Pick{0, 8, 1, 9, 4, 12, 5, 13});
    pairs[i + 1] = __builtin_shuffle(r[i], r[i + 1], Pick{2, 10, 3, 11, 6, 14, 7, 15});
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = __builtin_shuffle(pairs[i + j], pairs[i + j + 2], Pick{0, 1, 8, 9, 4, 5, 12, 13});
      quads[i + 2 * j + 1] = __builtin_shuffle(pairs[i + j], pairs[i + j + 2], Pick{2, 3, 10, 11, 6, 7, 14, 15});
    }
  }
  for (int i = 0; i < 4; ++i) {
    const Row low = __builtin_shuffle(quads[i], quads[i + 4], Pick{0, 1, 2, 3, 8, 9, 10, 11});
    const Row high = __builtin_shuffle(quads[i], quads[i + 4], Pick{4, 5, 6, 7, 12, 13, 14, 15});
    std::memcpy(out + i * out_stride, &low, sizeof low);
    std::memcpy(out + (i + 4) * out_stride, &high, sizeof high);
  }
}

// Sixteen rows of `width` floats, a multiple of 16, as `width` vectors: out[c * 16 + r] = rows[r * width + c].
QM_INLINE void transpose_16(const float* rows, int64_t width, float* out) {
  for (int64_t c = 0; c < width; c += 8) {
    transpose_8x8(rows + c, width, out + c * kLanes, kLanes);
    transpose_8x8(rows + 8 * width + c, width, out + c * kLanes + 8, kLanes);
  }
}

// out[r * out_stride + lane] = sum_k rows[r * stride + k] * columns[k * column_stride + lane], for kRows rows
// whose sums stay in registers.
template <int kRows>
QM_INLINE void multiply(
    const float* rows, int64_t stride, const float* columns, int64_t column_stride, int64_t depth, bool add,
    float* out, int64_t out_stride) {
  Vec sums[kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec column = load(columns + k * column_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r] += rows[r * stride + k] * column;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store(add ? load(out + r * out_stride) + sums[r] : sums[r], out + r * out_stride);
}

// The same for any number of rows.
QM_INLINE void multiply(
    const float* rows, int64_t num_rows, int64_t stride, const float* columns, int64_t column_stride, int64_t depth,
    bool add, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 6 <= num_rows; r += 6)
    multiply<6>(rows + r * stride, stride, columns, column_stride, depth, add, out + r * out_stride, out_stride);
  for (; r + 4 <= num_rows; r += 4)
    multiply<4>(rows + r * stride, stride, columns, column_stride, depth, add, out + r * out_stride, out_stride);
  for (; r + 2 <= num_rows; r += 2)
    multiply<2>(rows + r * stride, stride, columns, column_stride, depth, add, out + r * out_stride, out_stride);
  if (r < num_rows)
    multiply<1>(rows + r * stride, stride, columns, column_stride, depth, add, out + r * out_stride, out_stride);
}

}  // namespace qm_spec
