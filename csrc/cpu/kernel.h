// What every CPU kernel uses: the stable ABI, run-time dispatch by instruction set, and scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <new>

// One function, compiled for each instruction set and chosen when the module is loaded. What it calls must be
// inlined into it (QM_INLINE) to be compiled for the set too; a lambda handed to parallel_for is not.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define QM_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define QM_MULTIVERSION
#endif
#define QM_INLINE inline __attribute__((always_inline))

namespace qm_spec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
