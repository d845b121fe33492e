// Sixteen floats at a time.
//
// Kernels are templates on `Vec`, a vector of 64 bytes, or for AVX2 a pair of vectors of 32 (pair.h). QM_DISPATCH chooses
// (dispatch.h); everything here is inlined into the kernel and compiled for its set.
#pragma once

#include <algorithm>
#include <cstring>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/pair.h"

namespace qm_spec {

constexpr int64_t kLanes = 16;

// The two half types of a cache as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// `count` rounded up to whole vectors.
QM_INLINE int64_t to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class Vec>
QM_INLINE Vec all(float x) {
  return Vec{} + x;
}

template <class V, class T>
QM_INLINE V read_bytes(const T* from) {
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::low);
    return {read_bytes<Half>(from), read_bytes<Half>(reinterpret_cast<const char*>(from) + sizeof(Half))};
  } else {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
}

template <class V, class T>
QM_INLINE void write_bytes(V v, T* to) {
  if constexpr (kIsPair<V>) {
    write_bytes(v.low, to);
    write_bytes(v.high, reinterpret_cast<char*>(to) + sizeof v.low);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

// 0, 1, 2, ...
template <class Vec>
QM_INLINE Ints<Vec> lane_numbers() {
  constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return read_bytes<Ints<Vec>>(kNumbers);
}

// What the low half of each word stands for.
template <class BitVec>
QM_INLINE auto widened(BitVec bits, const BFloat16*) {
  return as<float>(bits << 16);
}
// Exponent and mantissa are shifted into place and scaled by 2^112, which handles subnormals as well.
template <class BitVec>
QM_INLINE auto widened(BitVec bits, const Float16*) {
  const BitVec magnitude = (bits & 0x7fffu) << 13;
  const BitVec finite = as<uint32_t>(as<float>(magnitude) * 0x1p112f);
  const BitVec special = magnitude | 0x7f800000u;
  return as<float>(select(magnitude >= 0x0f800000u, special, finite) | (bits & 0x8000u) << 16);
}

template <class Vec>
QM_INLINE Vec load(const float* x) {
  return read_bytes<Vec>(x);
}
template <class Vec, class T>
QM_INLINE Vec load(const T* x) {
  return widened(converted<uint32_t>(read_bytes<Lanes<Vec, uint16_t>>(x)), x);
}

template <class Vec>
QM_INLINE void store(Vec v, float* x) {
  write_bytes(v, x);
}

// To nearest, ties to even, as in torch.
template <class Vec>
QM_INLINE void store(Vec v, BFloat16* x) {
  using BitVec = Bits<Vec>;
  const BitVec bits = as<uint32_t>(v);
  const BitVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const BitVec whole = select((bits & 0x7fffffffu) > 0x7f800000u, BitVec{} + 0x7fc0u, rounded);
  write_bytes(converted<uint16_t>(whole), x);
}

template <class Vec>
QM_INLINE void store(Vec v, Float16* x) {
  using BitVec = Bits<Vec>;
  const BitVec sign = as<uint32_t>(v) & 0x80000000u, bits = as<uint32_t>(v) ^ sign;
  const BitVec special = select(bits > 0x7f800000u, BitVec{} + 0x7e00u, BitVec{} + 0x7c00u);
  // Adding one half shifts the mantissa of a subnormal result into place and rounds it.
  const BitVec small = as<uint32_t>(as<float>(bits) + 0.5f) - 0x3f000000u;
  const BitVec normal = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
  const BitVec whole = select(bits >= 0x47800000u, special, select(bits < 0x38800000u, small, normal));
  write_bytes(converted<uint16_t>(whole | sign >> 16), x);
}

// A row of `count` elements as floats, with zeros up to to_lanes(count).
template <class Vec, class T>
QM_INLINE void load_row(const T* row, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load<Vec>(row + i), out + i);
  if (i < count) {
    T rest[kLanes] = {};
    std::memcpy(rest, row + i, (count - i) * sizeof(T));
    store(load<Vec>(rest), out + i);
  }
}

// The same row as it is, with zeros up to a multiple of 2 * kLanes.
template <class Vec>
QM_INLINE void load_row(const BFloat16* row, int64_t count, BFloat16* out) {
  std::memcpy(out, row, count * sizeof *row);
  std::fill(out + count, out + (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes), BFloat16{0});
}

// The first `count` floats of a row that is padded to whole vectors.
template <class Vec, class T>
QM_INLINE void store_row(const float* row, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load<Vec>(row + i), out + i);
  if (i < count) {
    T rest[kLanes];
    store(load<Vec>(row + i), rest);
    std::memcpy(out + i, rest, (count - i) * sizeof(T));
  }
}

template <class Vec>
QM_INLINE void store_row(const BFloat16* row, int64_t count, BFloat16* out) {
  std::memcpy(out, row, count * sizeof *row);
}

// What is left of floats after they were stored as T.
template <class Vec>
QM_INLINE Vec rounded_to(Vec v, const float*) {
  return v;
}
template <class Vec, class T>
QM_INLINE Vec rounded_to(Vec v, const T*) {
  T stored[kLanes];
  store(v, stored);
  return load<Vec>(stored);
}
// The same without a way through memory.
template <class Vec>
QM_INLINE Vec rounded_to(Vec v, const BFloat16*) {
  const Bits<Vec> bits = as<uint32_t>(v);
  const Bits<Vec> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  return select(v == v, as<float>(rounded), v);
}

// A vector's worth of elements of type S as floats.
template <class Vec, class S>
struct Floats;

template <class Vec>
struct Floats<Vec, float> {
  Floats() = default;
  template <class V>
  QM_INLINE explicit Floats(const V* from) : lanes(load<Vec>(from)) {}
  QM_INLINE void set(float weight, const Floats& x) { lanes = weight * x.lanes; }
  QM_INLINE void add(float weight, const Floats& x) { lanes += weight * x.lanes; }
  // As what is left of them after they were stored as T.
  template <class T>
  QM_INLINE void store_rounded(float* to) const {
    store(rounded_to(lanes, static_cast<const T*>(nullptr)), to);
  }

  Vec lanes;
};

#if QM_HAS_SETS
// Those at even places and those at odd ones.
template <>
struct Floats<SixteenVec, BFloat16> {
  Floats() = default;
  QM_INLINE explicit Floats(const BFloat16* from) {
    const Bits<SixteenVec> pairs = read_bytes<Bits<SixteenVec>>(from);
    even = as<float>(pairs << 16), odd = as<float>(pairs & 0xffff0000u);
  }
  QM_INLINE void set(float weight, const Floats& x) { even = weight * x.even, odd = weight * x.odd; }
  QM_INLINE void add(float weight, const Floats& x) { even += weight * x.even, odd += weight * x.odd; }
  template <class T>
  QM_INLINE void store_rounded(BFloat16* to) const {
    typedef uint16_t ShortVec __attribute__((vector_size(64)));
    ShortVec halves;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(even), "v"(odd));
    const ShortVec pairs = __builtin_shuffle(
        halves, (ShortVec){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    std::memcpy(to, &pairs, sizeof pairs);
  }

  SixteenVec even, odd;
};
#endif

// The sums and the products of a vector's worth of elements of x and y, of a type.
template <class V>
QM_INLINE V add_products(V sums, V x, V y, const float*) {
  return sums + x * y;
}
#if QM_HAS_SETS
// Of bfloat16 in pairs, for processors with avx512_bf16. As assembler, because an intrinsic can be inlined only into
// functions whose own declarations name the instruction set.
QM_INLINE SixteenVec add_products(SixteenVec sums, SixteenVec x, SixteenVec y, const BFloat16*) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(y));
  return sums;
}
#endif

// One half of the lanes is combined with the other until four are left.
template <class V, class Combine>
QM_INLINE FourVec fold(V v, Combine combine) {
  if constexpr (kIsPair<V>) {
    return fold(combine(v.low, v.high), combine);
  } else if constexpr (sizeof(V) > sizeof(FourVec)) {
    typedef float Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return fold(combine(halves[0], halves[1]), combine);
  } else {
    return v;
  }
}

// The same until one is left.
template <class Vec, class Combine>
QM_INLINE float reduce(Vec v, Combine combine) {
  FourVec four = fold(v, combine);
  four = combine(four, __builtin_shuffle(four, (FourPick){2, 3, 0, 1}));
  four = combine(four, __builtin_shuffle(four, (FourPick){1, 0, 3, 2}));
  return four[0];
}

struct Add {
  template <class V>
  QM_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

template <class Vec>
QM_INLINE float largest(Vec v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return larger(a, b); });
}

template <class Vec>
QM_INLINE float smallest(Vec v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return smaller(a, b); });
}

template <class Vec>
QM_INLINE float sum(Vec v) {
  return reduce(v, Add());
}

// The sums of four vectors' lanes; the additions are those of `sum`, four at a time.
template <class V>
QM_INLINE FourVec sums_of_four(const V* v) {
  const FourVec q[4] = {fold(v[0], Add()), fold(v[1], Add()), fold(v[2], Add()), fold(v[3], Add())};
  const FourVec x = __builtin_shuffle(q[0], q[1], FourPick{0, 4, 1, 5}) +
                    __builtin_shuffle(q[0], q[1], FourPick{2, 6, 3, 7});
  const FourVec y = __builtin_shuffle(q[2], q[3], FourPick{0, 4, 1, 5}) +
                    __builtin_shuffle(q[2], q[3], FourPick{2, 6, 3, 7});
  return __builtin_shuffle(x, y, FourPick{0, 1, 4, 5}) + __builtin_shuffle(x, y, FourPick{2, 3, 6, 7});
}

// e^r for |r| <= log(2)/2.
template <class Vec>
QM_INLINE Vec exp_series(Vec r) {
  Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// fast_exp and fast_log of every lane, by the same operations.
template <class Vec>
QM_INLINE Vec exp(Vec x) {
  constexpr float kRound = 12582912.0f;
  const Vec least = all<Vec>(-87.3f), most = all<Vec>(88.8f);
  const Vec low = select(x < least, least, x), bounded = select(low > most, most, low);
  const Vec shifted = bounded * 1.44269504f + kRound, n = shifted - kRound;
  const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec scale = as<float>((as<uint32_t>(shifted) + 126u) << 23);
  return select(x < -87.3f, Vec{}, exp_series(r) * scale * 2.0f);
}

// 2^x of x <= 0, at least 2^-126 instead of 0; at most 2 units in the last place off.
template <class Vec>
QM_INLINE Vec exp2_of_negative(Vec x) {
  constexpr float kRound = 12582912.0f;
  const Vec bounded = larger(x, all<Vec>(-126.0f));
  const Vec shifted = bounded + kRound, r = bounded - (shifted - kRound);
  // Relative minimax of 2^r for |r| <= 1/2 that is 1 at 0.
  Vec p = 1.5594678e-4f * r + 1.3406643e-3f;
  p = p * r + 9.6176928e-3f;
  p = p * r + 5.5503104e-2f;
  p = p * r + 2.4022652e-1f;
  p = p * r + 6.9314724e-1f;
  p = p * r + 1.0f;
  return as<float>(as<uint32_t>(p) + (as<uint32_t>(shifted) << 23));
}

template <class Vec>
QM_INLINE Vec log(Vec x) {
  const Bits<Vec> bits = as<uint32_t>(x) - 0x3f3504f3u;
  const Vec e = converted<float>(as<int32_t>(bits) >> 23);
  const Vec f = as<float>((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
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

template <class Vec>
QM_INLINE Vec sqrt(Vec x) {
  if constexpr (kIsPair<Vec>) {
    return {sqrt(x.low), sqrt(x.high)};
  } else {
    for (size_t i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
  }
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
template <class Vec, class T>
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
      const Bits<Vec> words = read_bytes<Bits<Vec>>(halves);
      if constexpr (kCount == 8) {
        column[i] = as<float>(words);
      } else {
        column[2 * i] = widened(words & 0xffffu, type);
        column[2 * i + 1] = widened(words >> 16, type);
      }
    }
  }
};

// Pairs of lanes in each quarter of two vectors, and quarters of two vectors.
constexpr SixteenPick kLowLanes = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
constexpr SixteenPick kHighLanes = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
constexpr SixteenPick kLowPairs = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
constexpr SixteenPick kHighPairs = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
constexpr SixteenPick kLowQuarters = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
constexpr SixteenPick kHighQuarters = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
constexpr SixteenPick kEvenQuarters = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
constexpr SixteenPick kOddQuarters = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};

// The sums of sixteen vectors: lane i of the result is the sum of the lanes of v[i].
QM_INLINE SixteenVec sums_of(const SixteenVec* v) {
  const auto add = [](SixteenVec a, SixteenVec b, SixteenPick low, SixteenPick high) __attribute__((always_inline)) {
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  };
  SixteenVec fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    fours[i] = add(add(v[4 * i], v[4 * i + 1], kLowLanes, kHighLanes),
                   add(v[4 * i + 2], v[4 * i + 3], kLowLanes, kHighLanes), kLowPairs, kHighPairs);
  return add(add(fours[0], fours[1], kLowQuarters, kHighQuarters), add(fours[2], fours[3], kLowQuarters, kHighQuarters),
             kEvenQuarters, kOddQuarters);
}

QM_INLINE EightPair sums_of(const EightVec* v) {
  const FourVec low[2] = {sums_of_four(v), sums_of_four(v + 4)}, high[2] = {sums_of_four(v + 8), sums_of_four(v + 12)};
  return {read_bytes<EightVec>(low), read_bytes<EightVec>(high)};
}

// What fills a register, and how many rows of four sums of it stay in registers.
template <class Vec>
struct Register {
  using Part = Vec;
  static constexpr int kRows = 4;
};
template <class Half>
struct Register<Pair<Half>> {
  using Part = Half;
  static constexpr int kRows = 2;
};

// Lane 4 * i + j: row a[i] . row b[j] for i and j below 4; rows are whole vectors. kSame: a is b.
template <class Vec, bool kSame, class S>
QM_INLINE Vec multiply_4x4(const S* const* a, const S* const* b, int64_t width) {
  using Part = typename Register<Vec>::Part;
  constexpr int kRows = Register<Vec>::kRows;
  // Not `= {}`, which GCC does in memory, where the sums then stay.
  Part sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sums[i] = Part{};
#pragma GCC unroll 4
  for (int first = 0; first < 4; first += kRows)
    for (int64_t c = 0; c < width; c += sizeof(Part) / sizeof(S)) {
      const Part y[4] = {read_bytes<Part>(b[0] + c), read_bytes<Part>(b[1] + c), read_bytes<Part>(b[2] + c),
                         read_bytes<Part>(b[3] + c)};
#pragma GCC unroll 4
      for (int i = first; i < first + kRows; ++i) {
        const Part x = kSame ? y[i] : read_bytes<Part>(a[i] + c);
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
QM_INLINE SixteenVec transposed_4x4(SixteenVec v) {
  return __builtin_shuffle(v, (SixteenPick){0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
}
QM_INLINE EightPair transposed_4x4(EightPair v) {
  return {__builtin_shuffle(v.low, v.high, EightPick{0, 4, 8, 12, 1, 5, 9, 13}),
          __builtin_shuffle(v.low, v.high, EightPick{2, 6, 10, 14, 3, 7, 11, 15})};
}

// Four vectors of four quarters as columns.
QM_INLINE void transpose_quarters(SixteenVec* v) {
  const SixteenVec a = __builtin_shuffle(v[0], v[1], kLowQuarters), b = __builtin_shuffle(v[2], v[3], kLowQuarters);
  const SixteenVec c = __builtin_shuffle(v[0], v[1], kHighQuarters), d = __builtin_shuffle(v[2], v[3], kHighQuarters);
  v[0] = __builtin_shuffle(a, b, kEvenQuarters), v[1] = __builtin_shuffle(a, b, kOddQuarters);
  v[2] = __builtin_shuffle(c, d, kEvenQuarters), v[3] = __builtin_shuffle(c, d, kOddQuarters);
}
QM_INLINE void transpose_quarters(EightPair* v) {
  const auto first = [](EightVec a, EightVec b) __attribute__((always_inline)) {
    return __builtin_shuffle(a, b, EightPick{0, 1, 2, 3, 8, 9, 10, 11});
  };
  const auto second = [](EightVec a, EightVec b) __attribute__((always_inline)) {
    return __builtin_shuffle(a, b, EightPick{4, 5, 6, 7, 12, 13, 14, 15});
  };
  const EightPair a = v[0], b = v[1], c = v[2], d = v[3];
  v[0] = {first(a.low, b.low), first(c.low, d.low)}, v[1] = {second(a.low, b.low), second(c.low, d.low)};
  v[2] = {first(a.high, b.high), first(c.high, d.high)}, v[3] = {second(a.high, b.high), second(c.high, d.high)};
}

}  // namespace qm_spec
