// gumbel_softmax: softmax((s + noise g) / temperature) over the last dimension of logits [R, N], and s + noise g.
// g = -log(-log u) with u = (bits / 2^9 + 1/2) / 2^23, where the bits are those of Philox4x32-10.
// Source: QuickMerge++, arXiv 2508.13204; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; reference
// in qm_spec/ops/gumbel_softmax.py.
//
// Element e of the whole tensor takes word e mod 4 of counter (e / 4, offset) under the key `seed`: a function of these
// alone, whoever computes it.
#include <algorithm>
#include <limits>
#include <tuple>

#include "csrc/cpu/convert.h"
#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

QM_INLINE uint32_t high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }

// The four words of `count` counters, from `first` on.
QM_MULTIVERSION void philox(uint64_t first, int64_t count, uint64_t offset, uint64_t seed, uint32_t* words) {
  const uint32_t offset_low = static_cast<uint32_t>(offset), offset_high = static_cast<uint32_t>(offset >> 32);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(i);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = offset_low, c3 = offset_high;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint32_t h0 = high(0xd2511f53u, c0), l0 = 0xd2511f53u * c0;
      const uint32_t h1 = high(0xcd9e8d57u, c2), l1 = 0xcd9e8d57u * c2;
      c0 = h1 ^ c1 ^ k0;
      c1 = l1;
      c2 = h0 ^ c3 ^ k1;
      c3 = l0;
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

// Rows are padded to whole vectors from here on.
template <class Vec>
QM_INLINE void perturb(float* logits, const uint32_t* bits, float noise, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Bits<Vec> upper = read_bytes<Bits<Vec>>(bits + i) >> 9;
    const Vec u = (converted<float>(as<int32_t>(upper)) + 0.5f) * 0x1p-23f;
    store(load<Vec>(logits + i) - noise * log(-log(u)), logits + i);
  }
}

template <class Vec>
QM_INLINE void softmax(float* logits, float temperature, int64_t count) {
  std::fill(logits + count, logits + to_lanes(count), -std::numeric_limits<float>::infinity());
  Vec most = load<Vec>(logits);
  for (int64_t i = kLanes; i < count; i += kLanes) most = larger(load<Vec>(logits + i), most);
  const float m = largest(most);
  Vec totals = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec e = exp((load<Vec>(logits + i) - m) / temperature);
    store(e, logits + i);
    totals += e;
  }
  const float total = sum(totals);
  for (int64_t i = 0; i < count; i += kLanes) store(load<Vec>(logits + i) / total, logits + i);
}

std::tuple<Tensor, Tensor> gumbel_softmax(
    Tensor logits, double temperature, double noise, int64_t seed, int64_t offset) {
  logits = torch::stable::contiguous(logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  Tensor probabilities = torch::stable::empty_like(logits);
  Tensor perturbed = torch::stable::new_empty(logits, {num_rows, num_columns}, ScalarType::Float);
  const FloatRows s(logits, "gumbel_softmax");
  const FloatRowsOut out(probabilities, "gumbel_softmax");
  float* noisy = static_cast<float*>(perturbed.data_ptr());

  if (num_columns == 0) return {probabilities, perturbed};
  const int64_t grain = std::max<int64_t>(1, 4096 / num_columns);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(to_lanes(num_columns));
    float* values = scratch.get();
    // The first and the last counter of a row may reach into its neighbours.
    const int64_t counters = to_lanes(num_columns) / 4 + 1;
    const std::unique_ptr<uint32_t[]> words(new uint32_t[4 * counters]);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * num_columns;
      const float* from = s.read(first, num_columns, values);
      if (from != values) std::copy_n(from, num_columns, values);
      if (noise != 0) {
        philox(first / 4, counters, static_cast<uint64_t>(offset), static_cast<uint64_t>(seed), words.get());
        QM_DISPATCH(perturb, values, words.get() + first % 4, static_cast<float>(noise), num_columns);
      }
      std::copy_n(values, num_columns, noisy + first);
      QM_DISPATCH(softmax, values, static_cast<float>(temperature), num_columns);
      out.write(first, num_columns, values);
    }
  });
  return {probabilities, perturbed};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&gumbel_softmax));
}

}  // namespace qm_spec
