// Products of weights with a few rows: each weight is read from memory once, whatever the number of rows.
#pragma once

#include <initializer_list>
#include <vector>

#include "csrc/cpu/kernel.h"

namespace qm_spec {

// One of an operator's list of weights, which must be of `count` tensors.
inline const Tensor& one_of(const std::vector<Tensor>& weights, size_t i, size_t count, const char* op) {
  STD_TORCH_CHECK(weights.size() == count, op, ": weights must be ", count, " tensors, got ", weights.size());
  return weights[i];
}

// A weight [rows, columns] of float32, float16 or bfloat16, contiguous. The tensor must outlive this.
struct Matrix {
  Matrix(const Tensor& weight, const char* op);

  const int64_t rows, columns;
  const void* const data;
  const ScalarType type;
};

// out[b, r] = sum_k weight[r, k] x[b, k], out [B, rows]; a row of x begins `x_stride` behind the one before.
struct Product {
  const Matrix* weight;
  const float* x;
  int64_t x_stride;
  float* out;
};

// Compute all of them over `batch` rows of x, in float32 and as one parallel region. The order of additions depends on
// the columns alone, so a row gets the same result in any batch and by any number of threads.
void multiply(std::initializer_list<Product> products, int64_t batch);

}  // namespace qm_spec
