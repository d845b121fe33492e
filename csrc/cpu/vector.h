// Vectors of float32, in which the prior computes between its products.
#pragma once

#include "csrc/cpu/convert.h"

namespace qm_spec {

// A vector of any float type as float32, read once. The tensor must outlive this.
class Vector {
 public:
  Vector(const Tensor& tensor, const char* op)
      : scratch_(tensor.scalar_type() == ScalarType::Float ? 0 : tensor.numel()),
        data_(FloatRows(tensor, op).read(0, tensor.numel(), scratch_.get())) {}
  const float* data() const { return data_; }
  float operator[](int64_t i) const { return data_[i]; }

 private:
  Scratch scratch_;
  const float* data_;
};

// out = x / sqrt(mean(x^2) + eps) * weight; a weight of null is 1 everywhere.
void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out);

// out = x + y
void add(const float* x, const float* y, int64_t count, float* out);

}  // namespace qm_spec
