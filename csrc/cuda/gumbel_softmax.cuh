// gumbel_softmax: softmax((s + noise g) / temperature) over the last dimension of logits [R, N], and s + noise g.
// g = -log(-log u) with u = (bits / 2^9 + 1/2) / 2^23, where the bits are those of Philox4x32-10.
// Source: QuickMerge++, arXiv 2508.13204; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; reference
// in qm_spec/ops/gumbel_softmax.py.
//
// Element e of the whole tensor takes word e mod 4 of counter (e / 4, offset) under the key `seed`.
#pragma once

#include "csrc/cuda/tokens.cuh"

namespace qm_spec {

struct Words {
  uint32_t word[4];
};

__device__ inline Words philox(uint64_t counter, uint64_t offset, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xd2511f53u} * c0, right = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(right);
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(left);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// What gumbel_softmax works on.
template <typename T>
struct Gumbel {
  const T* logits;
  T* probabilities;
  float* perturbed;
  int64_t num_rows, num_columns;
  float temperature, noise;
  uint64_t seed, offset;
};

namespace {

// Grid (R): one row a block.
template <typename T>
__global__ void gumbel_softmax_kernel(Gumbel<T> to) {
  float* shared = shared_memory();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * to.num_columns, last = first + to.num_columns;
  float most = -INFINITY;
  // A counter at the row's ends may reach into its neighbours.
  for (int64_t counter = first / 4 + threadIdx.x; counter * 4 < last; counter += kThreads) {
    const Words words = philox(static_cast<uint64_t>(counter), to.offset, to.seed);
    for (int w = 0; w < 4; ++w) {
      const int64_t e = counter * 4 + w;
      if (e < first || e >= last) continue;
      float value = to_float(to.logits[e]);
      if (to.noise != 0.0f) {
        const float u = (static_cast<float>(words.word[w] >> 9) + 0.5f) * (1.0f / 8388608.0f);
        value -= to.noise * logf(-logf(u));
      }
      to.perturbed[e] = value;
      most = fmaxf(most, value);
    }
  }
  most = block_reduce(most, Max(), shared);
  // After the barriers above, every thread sees what the others of its block wrote.
  float total = 0.0f;
  for (int64_t e = first + threadIdx.x; e < last; e += kThreads)
    total += expf((to.perturbed[e] - most) / to.temperature);
  total = block_reduce(total, Add(), shared);
  for (int64_t e = first + threadIdx.x; e < last; e += kThreads)
    store(to.probabilities + e, expf((to.perturbed[e] - most) / to.temperature) / total);
}

}  // namespace

template <typename T, class Launch>
void gumbel_softmax(const Launch& launch, const Gumbel<T>& to) {
  if (to.num_rows * to.num_columns == 0) return;
  launch(
      gumbel_softmax_kernel<T>, dim3(static_cast<unsigned>(to.num_rows)), dim3(kThreads), kThreads * sizeof(float), to);
}

}  // namespace qm_spec
