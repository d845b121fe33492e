// What every CPU kernel uses: the stable ABI, run-time dispatch by instruction set, and scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <new>

// GCC compiles one file for several instruction sets. QM_SPEC_NO_AVX512 leaves the widest out, so that a processor that
// has it can test and time what others run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define QM_HAS_SETS 1
#ifdef QM_SPEC_NO_AVX512
#define QM_SETS "default", "arch=x86-64-v3"
#else
#define QM_SETS "default", "arch=x86-64-v3", "arch=x86-64-v4"
#endif
// One function of plain loops, compiled for each of them and chosen when the module is loaded; functions of vectors go
// through QM_DISPATCH of dispatch.h. What it calls must be inlined into it (QM_INLINE) to be compiled for the set too; a
// lambda handed to parallel_for is not.
#define QM_MULTIVERSION __attribute__((target_clones(QM_SETS)))
#else
#define QM_HAS_SETS 0
#define QM_MULTIVERSION
#endif
#define QM_INLINE inline __attribute__((always_inline))

namespace qm_spec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class InstructionSet { kDefault, kAvx2, kAvx512 };

// The widest that the processor has and the kernels use, found when the module is loaded.
inline const InstructionSet kWidestSet = [] {
#if QM_HAS_SETS
  __builtin_cpu_init();
#ifndef QM_SPEC_NO_AVX512
  if (__builtin_cpu_supports("x86-64-v4")) return InstructionSet::kAvx512;
#endif
  if (__builtin_cpu_supports("x86-64-v3")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kDefault;
}();

// Floats at an address that suits every vector, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(::operator new[](static_cast<size_t>(count > 0 ? count : 1) * sizeof(float), kAlign))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* data) const { ::operator delete[](data, kAlign); }
  };
  std::unique_ptr<float[], Free> data_;
};

}  // namespace qm_spec
