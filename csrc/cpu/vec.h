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
// Parts of a Vec.
typedef float EightVec __attribute__((vector_size(32)));
typedef float FourVec __attribute__((vector_size(16)));
typedef int32_t EightPick __attribute__((vector_size(32)));
typedef int32_t FourPick __attribute__((vector_size(16)));

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

// What the low half of each word stands for.
QM_INLINE Vec widened(BitVec bits, const BFloat16*) { return (Vec)(bits << 16); }
// Exponent and mantissa are shifted into place and scaled by 2^112, which handles subnormals as well.
QM_INLINE Vec widened(BitVec bits, const Float16*) {
  const BitVec magnitude = (bits & 0x7fffu) << 13;
  const BitVec finite = (BitVec)((Vec)magnitude * 0x1p112f);
  const BitVec special = magnitude | 0x7f800000u;
  return (Vec)((magnitude >= 0x0f800000u ? special : finite) | (bits & 0x8000u) << 16);
}

QM_INLINE Vec load(const float* x) { return read_bytes<Vec>(x); }
template <class T>
QM_INLINE Vec load(const T* x) {
  return widened(__builtin_convertvector(read_bytes<HalfVec>(x), BitVec), x);
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
// The same without a way through memory.
QM_INLINE Vec rounded_to(Vec v, const BFloat16*) {
  const BitVec bits = (BitVec)v;
  const BitVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  return v == v ? (Vec)rounded : v;
}

// One half of the lanes is combined with the other until one is left.
template <class Combine>
QM_INLINE float reduce(Vec v, Combine combine) {
  EightVec eights[2];
  std::memcpy(eights, &v, sizeof v);
  const EightVec eight = combine(eights[0], eights[1]);
  FourVec fours[2];
  std::memcpy(fours, &eight, sizeof eight);
  FourVec four = combine(fours[0], fours[1]);
  four = combine(four, __builtin_shuffle(four, (FourPick){2, 3, 0, 1}));
  four = combine(four, __builtin_shuffle(four, (FourPick){1, 0, 3, 2}));
  return four[0];
}

QM_INLINE float largest(Vec v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

QM_INLINE float smallest(Vec v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a < b ? a : b; });
}

QM_INLINE float sum(Vec v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

// e^r for |r| <= log(2)/2.
QM_INLINE Vec exp_series(Vec r) {
  Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// fast_exp and fast_log of every lane, by the same operations.
QM_INLINE Vec exp(Vec x) {
  constexpr float kRound = 12582912.0f;
  const Vec low = x < -87.3f ? all(-87.3f) : x, bounded = low > 88.8f ? all(88.8f) : low;
  const Vec shifted = bounded * 1.44269504f + kRound, n = shifted - kRound;
  const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec scale = (Vec)(((BitVec)shifted + 126u) << 23);
  return x < -87.3f ? Vec{} : exp_series(r) * scale * 2.0f;
}

// The same for x <= 0, at least e^-87 instead of 0.
QM_INLINE Vec exp_of_negative(Vec x) {
  constexpr float kRound = 12582912.0f;
  const Vec bounded = x > -87.0f ? x : all(-87.0f);
  const Vec shifted = bounded * 1.44269504f + kRound, n = shifted - kRound;
  const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  return exp_series(r) * (Vec)(((BitVec)shifted + 127u) << 23);
}

QM_INLINE Vec log(Vec x) {
  const BitVec bits = (BitVec)x - 0x3f3504f3u;
  const Vec e = __builtin_convertvector((IntVec)bits >> 23, Vec);
  const Vec f = (Vec)((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  Vec p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * f * f - e * 2.12194440e-4f - 0.5f * f * f;
  return f + p + e * 0.693359375f;
}

QM_INLINE Vec sqrt(Vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// Eight rows of eight floats become columns.
QM_INLINE void transpose_8x8(EightVec* r) {
  using Row = EightVec;
  using Pick = EightPick;
  Row pairs[8], quads[8];
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
    r[i] = __builtin_shuffle(quads[i], quads[i + 4], Pick{0, 1, 2, 3, 8, 9, 10, 11});
    r[i + 4] = __builtin_shuffle(quads[i], quads[i + 4], Pick{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// The same in memory: out[c * out_stride + r] = rows[r * stride + c].
QM_INLINE void transpose_8x8(const float* rows, int64_t stride, float* out, int64_t out_stride) {
  EightVec r[8];
  for (int i = 0; i < 8; ++i) r[i] = read_bytes<EightVec>(rows + i * stride);
  transpose_8x8(r);
  for (int i = 0; i < 8; ++i) std::memcpy(out + i * out_stride, &r[i], sizeof r[i]);
}

// Columns of sixteen rows as floats: 32 bytes of each row.
template <class T>
struct Columns {
  static constexpr int kCount = 32 / sizeof(T);
  Vec column[kCount];

  // From `byte` of each row on.
  QM_INLINE Columns(const char* const* rows, int64_t byte) {
    EightVec low[8], high[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      low[i] = read_bytes<EightVec>(rows[i] + byte);
      high[i] = read_bytes<EightVec>(rows[i + 8] + byte);
    }
    transpose_8x8(low);
    transpose_8x8(high);
    const T* type = nullptr;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const EightVec halves[2] = {low[i], high[i]};
      const BitVec words = read_bytes<BitVec>(halves);
      if constexpr (kCount == 8) {
        column[i] = (Vec)words;
      } else {
        column[2 * i] = widened(words & 0xffffu, type);
        column[2 * i + 1] = widened(words >> 16, type);
      }
    }
  }
};

// The sums of eight vectors of eight: out[i] = the sum of the lanes of v[i].
QM_INLINE EightVec sums_of(const EightVec* v) {
  EightVec pairs[4], quads[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], (EightPick){0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(v[2 * i], v[2 * i + 1], (EightPick){2, 3, 10, 11, 6, 7, 14, 15});
  for (int i = 0; i < 2; ++i)
    quads[i] = __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], (EightPick){0, 2, 8, 10, 4, 6, 12, 14}) +
               __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], (EightPick){1, 3, 9, 11, 5, 7, 13, 15});
  return __builtin_shuffle(quads[0], quads[1], (EightPick){0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(quads[0], quads[1], (EightPick){4, 5, 6, 7, 12, 13, 14, 15});
}

// out[4 * i + j] = row a[i] . row b[j] for i and j below 4; rows are of `width` floats, a multiple of 16. kSame: a is b.
template <bool kSame>
QM_INLINE void multiply_4x4(const float* const* a, const float* const* b, int64_t width, float* out) {
  Vec sums[16] = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec y[4] = {load(b[0] + c), load(b[1] + c), load(b[2] + c), load(b[3] + c)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec x = kSame ? y[i] : load(a[i] + c);
#pragma GCC unroll 4
      for (int j = kSame ? i : 0; j < 4; ++j) sums[4 * i + j] += x * y[j];
    }
  }
  EightVec eights[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int from = kSame && i / 4 > i % 4 ? i % 4 * 4 + i / 4 : i;
    EightVec halves[2];
    std::memcpy(halves, &sums[from], sizeof halves);
    eights[i] = halves[0] + halves[1];
  }
  for (int i = 0; i < 16; i += 8) {
    const EightVec eight = sums_of(eights + i);
    std::memcpy(out + i, &eight, sizeof eight);
  }
}

// Four rows of four floats as columns: out[c * out_stride + r] = rows[4 * r + c].
QM_INLINE void transpose_4x4(const float* rows, float* out, int64_t out_stride) {
  FourVec r[4], t[4];
  std::memcpy(r, rows, sizeof r);
  for (int i = 0; i < 2; ++i) {
    t[2 * i] = __builtin_shuffle(r[2 * i], r[2 * i + 1], (FourPick){0, 4, 1, 5});
    t[2 * i + 1] = __builtin_shuffle(r[2 * i], r[2 * i + 1], (FourPick){2, 6, 3, 7});
  }
  for (int i = 0; i < 2; ++i) {
    const FourVec even = __builtin_shuffle(t[i], t[i + 2], (FourPick){0, 1, 4, 5});
    const FourVec odd = __builtin_shuffle(t[i], t[i + 2], (FourPick){2, 3, 6, 7});
    std::memcpy(out + 2 * i * out_stride, &even, sizeof even);
    std::memcpy(out + (2 * i + 1) * out_stride, &odd, sizeof odd);
  }
}

}  // namespace qm_spec
