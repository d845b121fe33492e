// Vectors of sixteen lanes: GCC's and Clang's vector types, and pairs of them.
//
// GCC compares and shuffles a vector larger than a register lane by lane, and keeps it in memory from one turn of a loop
// to the next. So where registers have 32 bytes, sixteen floats are a pair of vectors, with the same operators.
#pragma once

#include <type_traits>

#include "csrc/cpu/kernel.h"

namespace qm_spec {

typedef float SixteenVec __attribute__((vector_size(64)));
typedef float EightVec __attribute__((vector_size(32)));
typedef float FourVec __attribute__((vector_size(16)));
typedef int32_t SixteenPick __attribute__((vector_size(64)));
typedef int32_t EightPick __attribute__((vector_size(32)));
typedef int32_t FourPick __attribute__((vector_size(16)));

// Two vectors as one, with the operators of a vector; a scalar stands for all lanes.
template <class Half>
struct Pair {
  using Element = std::decay_t<decltype(Half{}[0])>;
  Half low, high;
};

using EightPair = Pair<EightVec>;

template <class Half>
QM_INLINE Pair<Half> pair(Half low, Half high) {
  return {low, high};
}

#define QM_LANEWISE(op)                                                              \
  template <class A, class B>                                                        \
  QM_INLINE auto operator op(Pair<A> a, Pair<B> b) {                                 \
    return pair(a.low op b.low, a.high op b.high);                                   \
  }                                                                                  \
  template <class A>                                                                 \
  QM_INLINE auto operator op(Pair<A> a, typename Pair<A>::Element b) {               \
    return pair(a.low op b, a.high op b);                                            \
  }                                                                                  \
  template <class A>                                                                 \
  QM_INLINE auto operator op(typename Pair<A>::Element a, Pair<A> b) {               \
    return pair(a op b.low, a op b.high);                                            \
  }
QM_LANEWISE(+)
QM_LANEWISE(-)
QM_LANEWISE(*)
QM_LANEWISE(/)
QM_LANEWISE(&)
QM_LANEWISE(|)
QM_LANEWISE(^)
QM_LANEWISE(<<)
QM_LANEWISE(>>)
QM_LANEWISE(<)
QM_LANEWISE(>)
QM_LANEWISE(>=)
QM_LANEWISE(==)
#undef QM_LANEWISE

template <class A>
QM_INLINE Pair<A> operator-(Pair<A> a) {
  return {-a.low, -a.high};
}
template <class A, class B>
QM_INLINE Pair<A>& operator+=(Pair<A>& a, const B& b) {
  return a = a + b;
}
template <class A, class B>
QM_INLINE Pair<A>& operator*=(Pair<A>& a, const B& b) {
  return a = a * b;
}

// Whether Vec is a pair: there are half as many registers as AVX-512 has, and each holds half of a Vec.
template <class Vec>
constexpr bool kIsPair = false;
template <class Half>
constexpr bool kIsPair<Pair<Half>> = true;

// As many E as V has lanes.
template <class V, class E>
struct LanesOf {
  typedef E type __attribute__((vector_size(sizeof(V) / sizeof(V{}[0]) * sizeof(E))));
};
template <class Half, class E>
struct LanesOf<Pair<Half>, E> {
  using type = Pair<typename LanesOf<Half, E>::type>;
};
template <class V, class E>
using Lanes = typename LanesOf<V, E>::type;
template <class V>
using Ints = Lanes<V, int32_t>;
template <class V>
using Bits = Lanes<V, uint32_t>;

// The same bytes as lanes of E.
template <class E, class V>
QM_INLINE Lanes<V, E> as(V v) {
  return (Lanes<V, E>)v;
}
template <class E, class Half>
QM_INLINE Pair<Lanes<Half, E>> as(Pair<Half> v) {
  return {as<E>(v.low), as<E>(v.high)};
}

// The same numbers as E.
template <class E, class V>
QM_INLINE Lanes<V, E> converted(V v) {
  return __builtin_convertvector(v, Lanes<V, E>);
}
template <class E, class Half>
QM_INLINE Pair<Lanes<Half, E>> converted(Pair<Half> v) {
  return {converted<E>(v.low), converted<E>(v.high)};
}

// Lanes of `a` where the comparison holds, else of `b`.
template <class Mask, class V>
QM_INLINE V select(Mask mask, V a, V b) {
  return mask ? a : b;
}
template <class Mask, class Half>
QM_INLINE Pair<Half> select(Pair<Mask> mask, Pair<Half> a, Pair<Half> b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}

template <class V>
QM_INLINE V larger(V a, V b) {
  return select(a > b, a, b);
}

template <class V>
QM_INLINE V smaller(V a, V b) {
  return select(a < b, a, b);
}

}  // namespace qm_spec
