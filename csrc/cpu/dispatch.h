// Kernels on vectors, compiled for each instruction set and chosen when they are called.
#pragma once

#include <type_traits>
#include <utility>

#include "csrc/cpu/pair.h"

namespace qm_spec {

// Names the Vec that a kernel is called for.
template <class V>
struct Type {
  using Vec = V;
};

// An argument on its way to a kernel. What is small goes by value: the caller's own can then stay in a register.
template <class T, class Value = std::remove_reference_t<T>>
using Passed =
    std::conditional_t<std::is_trivially_copyable_v<Value> && sizeof(Value) <= 2 * sizeof(void*), Value, T&&>;

// Apart from its caller, as the others have to be: inlined, it would give the caller its own large frame.
template <class Kernel, class... Args>
__attribute__((noinline)) auto run_default(Kernel kernel, Passed<Args>... args) {
  return kernel(Type<SixteenVec>(), args...);
}
#if QM_HAS_SETS
template <class Kernel, class... Args>
__attribute__((target("arch=x86-64-v3"))) auto run_avx2(Kernel kernel, Passed<Args>... args) {
  return kernel(Type<EightPair>(), args...);
}
template <class Kernel, class... Args>
__attribute__((target("arch=x86-64-v4"))) auto run_avx512(Kernel kernel, Passed<Args>... args) {
  return kernel(Type<SixteenVec>(), args...);
}
#endif

template <class Kernel, class... Args>
QM_INLINE auto run_widest(Kernel kernel, Args&&... args) {
#if QM_HAS_SETS
  if (kWidestSet == InstructionSet::kAvx512) return run_avx512<Kernel, Args...>(kernel, std::forward<Args>(args)...);
  if (kWidestSet == InstructionSet::kAvx2) return run_avx2<Kernel, Args...>(kernel, std::forward<Args>(args)...);
#endif
  return run_default<Kernel, Args...>(kernel, std::forward<Args>(args)...);
}

// kernel<Vec>(arguments), compiled for each instruction set; `kernel` is marked QM_INLINE.
#define QM_DISPATCH(kernel, ...)                                              \
  run_widest(                                                                 \
      [](auto type, auto&&... args) __attribute__((always_inline)) {          \
        return kernel<typename decltype(type)::Vec>(args...);                 \
      },                                                                      \
      __VA_ARGS__)

}  // namespace qm_spec
