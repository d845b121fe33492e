#include "csrc/cpu/draft_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

// Entries that are read together, so that a horizontal sum costs little.
constexpr int64_t kEntries = 4;

QM_INLINE float to_float(float value) { return value; }

QM_INLINE float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

// As `load` in vec.h.
QM_INLINE float to_float(Float16 value) {
  const uint32_t bits = value.bits, magnitude = (bits & 0x7fffu) << 13;
  const uint32_t finite = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_from_bits((magnitude >= 0x0f800000u ? special : finite) | (bits & 0x8000u) << 16);
}

// out[e] = query . key of entry e.
template <class T>
QM_INLINE void scores(const float* query, const void* const* keys, int64_t count, int64_t dim, float* out) {
  for (int64_t e = 0; e < count; e += kEntries) {
    // A last block that is not full computes its last entry several times.
    const int64_t last = count - 1 - e;
    const T* a = static_cast<const T*>(keys[e]);
    const T* b = static_cast<const T*>(keys[e + std::min<int64_t>(1, last)]);
    const T* c = static_cast<const T*>(keys[e + std::min<int64_t>(2, last)]);
    const T* d = static_cast<const T*>(keys[e + std::min<int64_t>(3, last)]);
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < dim; ++i) {
      s0 += query[i] * to_float(a[i]);
      s1 += query[i] * to_float(b[i]);
      s2 += query[i] * to_float(c[i]);
      s3 += query[i] * to_float(d[i]);
    }
    const float sums[kEntries] = {s0, s1, s2, s3};
    std::copy_n(sums, std::min(kEntries, count - e), out + e);
  }
}

// out += sum_e weights[e] value of entry e; the value stands behind the key.
template <class T>
QM_INLINE void add_values(const float* weights, const void* const* keys, int64_t count, int64_t dim, float* out) {
  for (int64_t e = 0; e < count; e += kEntries) {
    const int64_t last = count - 1 - e;
    const T* v[kEntries];
    float w[kEntries];
    for (int64_t i = 0; i < kEntries; ++i) {
      v[i] = static_cast<const T*>(keys[e + std::min(i, last)]) + dim;
      w[i] = i <= last ? weights[e + i] : 0.0f;
    }
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i)
      out[i] += (w[0] * to_float(v[0][i]) + w[1] * to_float(v[1][i])) +
                (w[2] * to_float(v[2][i]) + w[3] * to_float(v[3][i]));
  }
}

// The same for the cache's type.
QM_MULTIVERSION void scores(
    ScalarType type, const float* query, const void* const* keys, int64_t count, int64_t dim, float* out) {
  if (type == ScalarType::Float) {
    scores<float>(query, keys, count, dim, out);
  } else if (type == ScalarType::BFloat16) {
    scores<BFloat16>(query, keys, count, dim, out);
  } else {
    scores<Float16>(query, keys, count, dim, out);
  }
}

QM_MULTIVERSION void add_values(
    ScalarType type, const float* weights, const void* const* keys, int64_t count, int64_t dim, float* out) {
  if (type == ScalarType::Float) {
    add_values<float>(weights, keys, count, dim, out);
  } else if (type == ScalarType::BFloat16) {
    add_values<BFloat16>(weights, keys, count, dim, out);
  } else {
    add_values<Float16>(weights, keys, count, dim, out);
  }
}

// Adds the bias of each entry and returns the largest score.
QM_MULTIVERSION float add_bias(
    const float* distance, const float* log_count, int64_t count, float slope, float far_bias, float step,
    float* scores) {
  float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t e = 0; e < count; ++e) {
    const float near = -slope * (distance[e] + step), far = far_bias + log_count[e];
    scores[e] += distance[e] >= 0.0f ? near : far;
    largest = scores[e] > largest ? scores[e] : largest;
  }
  return largest;
}

QM_MULTIVERSION float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

QM_MULTIVERSION void add_scaled(const float* x, float scale, int64_t count, float* sum) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += scale * x[i];
}

// scores = exp(scores - largest); returns their sum.
QM_MULTIVERSION float exponentials(float largest, int64_t count, float* scores) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) {
    scores[e] = fast_exp(scores[e] - largest);
    sum += scores[e];
  }
  return sum;
}

QM_MULTIVERSION void scale(float factor, int64_t count, float* x) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace

DraftMemory::DraftMemory(const PagedCache& cache, const MergeConfig& config, Integers pages, int64_t num_tokens)
    : cache_(&cache) {
  std::vector<EntryRun> runs;
  const RequestGroups groups(cache, config, pages);
  walk_entries(groups, config, num_tokens, [&](const EntryRun& run) {
    runs.push_back(run);
    for (int64_t i = 0; i < run.length; ++i)
      distance_.push_back(run.position < 0 ? -1.0f : static_cast<float>(num_tokens - 1 - run.position - i));
  });
  const int64_t count = num_entries();
  keys_.reserve(cache.num_heads * count);
  log_count_.reserve(cache.num_heads * count);
  for (int64_t head = 0; head < cache.num_heads; ++head)
    for (const EntryRun& run : runs)
      for (int64_t slot = run.slot; slot < run.slot + run.length; ++slot) {
        keys_.push_back(cache.key(run.page, head, slot));
        const float tokens = run.position < 0 ? bounded_count(cache.state(run.page, head, slot).count, config) : 1.0f;
        log_count_.push_back(std::log(tokens));
      }
}

void DraftMemory::attend(
    const float* query, int64_t head, float slope, float far_bias, int64_t step, const float* drafted_keys,
    const float* drafted_values, int64_t drafted_stride, float* weights, float* out) const {
  const int64_t count = num_entries(), dim = cache_->head_dim;
  const void* const* keys = keys_.data() + head * count;
  std::fill(out, out + dim, 0.0f);
  scores(cache_->type, query, keys, count, dim, weights);
  const float* log_count = log_count_.data() + head * count;
  float largest = add_bias(distance_.data(), log_count, count, slope, far_bias, static_cast<float>(step), weights);
  for (int64_t j = 0; j < step; ++j) {
    const float age = static_cast<float>(step - 1 - j);
    weights[count + j] = dot(query, drafted_keys + j * drafted_stride, dim) - slope * age;
    largest = std::max(largest, weights[count + j]);
  }
  // Nothing to attend to.
  if (largest == -std::numeric_limits<float>::infinity()) return;
  const float sum = exponentials(largest, count + step, weights);
  add_values(cache_->type, weights, keys, count, dim, out);
  for (int64_t j = 0; j < step; ++j) add_scaled(drafted_values + j * drafted_stride, weights[count + j], dim, out);
  scale(1.0f / sum, dim, out);
}

}  // namespace qm_spec
