// Sixteen floats at a time, as GCC's and Clang's vector types: one AVX-512 register, two of AVX2, four of SSE.
//
// Everything here is inlined into functions marked QM_MULTIVERSION and compiled for their instruction sets.
#pragma once

#include <algorithm>
#include <cstring>

#include "csrc/cpu/kernel.h"
#include "csrc/cpu/math.h"

namespace qm_spec {

constexpr int64_t kLanes = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));
typedef uint16_t ShortVec __attribute__((vector_size(64)));
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

// The same row as it is, with zeros up to a multiple of 2 * kLanes.
QM_INLINE void load_row(const BFloat16* row, int64_t count, BFloat16* out) {
  std::memcpy(out, row, count * sizeof *row);
  std::fill(out + count, out + (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes), BFloat16{0});
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

QM_INLINE void store_row(const BFloat16* row, int64_t count, BFloat16* out) {
  std::memcpy(out, row, count * sizeof *row);
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

// A vector's worth of elements of type S as floats.
template <class S>
struct Floats;

template <>
struct Floats<float> {
  Floats() = default;
  template <class V>
  QM_INLINE explicit Floats(const V* from) : lanes(load(from)) {}
  QM_INLINE void set(float weight, const Floats& x) { lanes = weight * x.lanes; }
  QM_INLINE void add(float weight, const Floats& x) { lanes += weight * x.lanes; }
  // As what is left of them after they were stored as T.
  template <class T>
  QM_INLINE void store_rounded(float* to) const {
    store(rounded_to(lanes, static_cast<const T*>(nullptr)), to);
  }

  Vec lanes;
};

#if defined(__x86_64__)
// Those at even places and those at odd ones.
template <>
struct Floats<BFloat16> {
  Floats() = default;
  QM_INLINE explicit Floats(const BFloat16* from) {
    const BitVec pairs = read_bytes<BitVec>(from);
    even = (Vec)(pairs << 16), odd = (Vec)(pairs & 0xffff0000u);
  }
  QM_INLINE void set(float weight, const Floats& x) { even = weight * x.even, odd = weight * x.odd; }
  QM_INLINE void add(float weight, const Floats& x) { even += weight * x.even, odd += weight * x.odd; }
  template <class T>
  QM_INLINE void store_rounded(BFloat16* to) const {
    ShortVec halves;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(even), "v"(odd));
    const ShortVec pairs = __builtin_shuffle(
        halves, (ShortVec){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    std::memcpy(to, &pairs, sizeof pairs);
  }

  Vec even, odd;
};
#endif

// The sums and the products of a vector's worth of elements of x and y, of a type.
QM_INLINE Vec add_products(Vec sums, Vec x, Vec y, const float*) { return sums + x * y; }
#if defined(__x86_64__)
// Of bfloat16 in pairs, for processors with avx512_bf16. As assembler, because an intrinsic can be inlined only into
// functions whose own declarations name the instruction set.
QM_INLINE Vec add_products(Vec sums, Vec x, Vec y, const BFloat16*) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(y));
  return sums;
}
#endif

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

// 2^x of x <= 0, at least 2^-126 instead of 0; at most 2 units in the last place off.
QM_INLINE Vec exp2_of_negative(Vec x) {
  constexpr float kRound = 12582912.0f;
  const Vec bounded = x > -126.0f ? x : all(-126.0f);
  const Vec shifted = bounded + kRound, r = bounded - (shifted - kRound);
  // Relative minimax of 2^r for |r| <= 1/2 that is 1 at 0.
  Vec p = 1.5594678e-4f * r + 1.3406643e-3f;
  p = p * r + 9.6176928e-3f;
  p = p * r + 5.5503104e-2f;
  p = p * r + 2.4022652e-1f;
  p = p * r + 6.9314724e-1f;
  p = p * r + 1.0f;
  return (Vec)((BitVec)p + ((BitVec)shifted << 23));
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

// Pairs of lanes in each quarter of two vectors, and quarters of two vectors.
constexpr IntVec kLowLanes = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
constexpr IntVec kHighLanes = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
constexpr IntVec kLowPairs = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
constexpr IntVec kHighPairs = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
constexpr IntVec kLowQuarters = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
constexpr IntVec kHighQuarters = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
constexpr IntVec kEvenQuarters = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
constexpr IntVec kOddQuarters = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};

// The sums of sixteen vectors: lane i of the result is the sum of the lanes of v[i].
QM_INLINE Vec sums_of(const Vec* v) {
  const auto add = [](Vec a, Vec b, IntVec low, IntVec high) __attribute__((always_inline)) {
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  };
  Vec fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    fours[i] = add(add(v[4 * i], v[4 * i + 1], kLowLanes, kHighLanes),
                   add(v[4 * i + 2], v[4 * i + 3], kLowLanes, kHighLanes), kLowPairs, kHighPairs);
  return add(add(fours[0], fours[1], kLowQuarters, kHighQuarters), add(fours[2], fours[3], kLowQuarters, kHighQuarters),
             kEvenQuarters, kOddQuarters);
}

// Lane 4 * i + j: row a[i] . row b[j] for i and j below 4; rows are whole vectors. kSame: a is b.
template <bool kSame, class S>
QM_INLINE Vec multiply_4x4(const S* const* a, const S* const* b, int64_t width) {
  // Not `= {}`, which GCC does in memory, where the sums then stay.
  Vec sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sums[i] = Vec{};
  for (int64_t c = 0; c < width; c += sizeof(Vec) / sizeof(S)) {
    const Vec y[4] = {read_bytes<Vec>(b[0] + c), read_bytes<Vec>(b[1] + c), read_bytes<Vec>(b[2] + c),
                      read_bytes<Vec>(b[3] + c)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec x = kSame ? y[i] : read_bytes<Vec>(a[i] + c);
#pragma GCC unroll 4
      for (int j = kSame ? i : 0; j < 4; ++j) sums[4 * i + j] = add_products(sums[4 * i + j], x, y[j], a[i]);
    }
  }
  if (kSame)
#pragma GCC unroll 4
    for (int i = 1; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < i; ++j) sums[4 * i + j] = sums[4 * j + i];
  return sums_of(sums);
}

// Four rows of four lanes as columns.
QM_INLINE Vec transposed_4x4(Vec v) {
  return __builtin_shuffle(v, (IntVec){0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
}

// Four vectors of four quarters as columns.
QM_INLINE void transpose_quarters(Vec* v) {
  const Vec a = __builtin_shuffle(v[0], v[1], kLowQuarters), b = __builtin_shuffle(v[2], v[3], kLowQuarters);
  const Vec c = __builtin_shuffle(v[0], v[1], kHighQuarters), d = __builtin_shuffle(v[2], v[3], kHighQuarters);
  v[0] = __builtin_shuffle(a, b, kEvenQuarters), v[1] = __builtin_shuffle(a, b, kOddQuarters);
  v[2] = __builtin_shuffle(c, d, kEvenQuarters), v[3] = __builtin_shuffle(c, d, kOddQuarters);
}

}  // namespace qm_spec
