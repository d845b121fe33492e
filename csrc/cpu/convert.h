// Rows of any float type as float32, in which all kernels compute, and back.
#pragma once

#include "csrc/cpu/kernel.h"

namespace qm_spec {

// A read-only tensor of float16, bfloat16, float32 or float64, contiguous.
class FloatRows {
 public:
  // `op` is named in the error for any other type. The tensor must outlive this.
  FloatRows(const Tensor& tensor, const char* op);

  // `count` elements from `offset` on: where they stand if they are float32, else converted into `scratch`.
  const float* read(int64_t offset, int64_t count, float* scratch) const;

  // Ask for `count` elements from `offset` on, which are read soon; they need not be there.
  void prefetch(int64_t offset, int64_t count) const;

 private:
  const void* data_;
  ScalarType type_;
};

// The same for writing, rounded to nearest, ties to even.
class FloatRowsOut {
 public:
  FloatRowsOut(Tensor& tensor, const char* op);
  void write(int64_t offset, int64_t count, const float* values) const;

  // Where the element at `offset` stands if it is float32, else null.
  float* in_place(int64_t offset) const;

 private:
  void* data_;
  ScalarType type_;
};

}  // namespace qm_spec
