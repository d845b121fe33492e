#include "csrc/cpu/vector.h"

#include <cmath>

namespace qm_spec {

QM_MULTIVERSION void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
  if (weight == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * scale;
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

QM_MULTIVERSION void add(const float* x, const float* y, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] + y[i];
}

}  // namespace qm_spec
