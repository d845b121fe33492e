// saliency_merge: x_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j, of tokens [B, N, D], masses [B, N] and the
// slot of each token [B, N], -1 at padding, to [B, K, D], sizes [B, K] and summed masses [B, K].
// Source: QuickMerge++, arXiv 2508.13204; reference in qm_spec/ops/saliency_merge.py.
//
// A block has one slot and 128 of its columns, and looks through the sequence for the slot's tokens. All its threads
// read the same slot numbers, which the cache holds, and a token's numbers are read by its slot's block alone. So there
// are no races, and the order of additions is that of the tokens.
#pragma once

#include "csrc/cuda/tokens.cuh"

namespace qm_spec {

// What saliency_merge works on; sizes and masses may be null.
template <typename T, typename Out>
struct MergeSlots {
  Sequences<const T> tokens;
  const float* mass;
  const int64_t* cluster;
  int64_t num_slots;
  Out* merged;
  float *sizes, *masses;
};

namespace {

constexpr int kColumns = 128;
// Additions in a row before a partial sum is put away, which keeps the error of long sums small.
constexpr int kRun = 64;

// Grid (K, chunks of columns, B).
template <typename T, typename Out>
__global__ void saliency_merge_kernel(MergeSlots<T, Out> of) {
  const Sequences<const T>& x = of.tokens;
  const int64_t k = blockIdx.x, b = blockIdx.z, column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x;
  const int64_t* cluster = of.cluster + b * x.num_rows;
  const float* mass = of.mass + b * x.num_rows;
  double total = 0.0;
  int64_t size = 0;
  for (int64_t i = 0; i < x.num_rows; ++i) {
    if (cluster[i] != k) continue;
    total += mass[i];
    ++size;
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    if (of.sizes != nullptr) of.sizes[b * of.num_slots + k] = static_cast<float>(size);
    if (of.masses != nullptr) of.masses[b * of.num_slots + k] = static_cast<float>(total);
  }
  if (column >= x.dim) return;
  float sum = 0.0f, run = 0.0f;
  int num_added = 0;
  for (int64_t i = 0; i < x.num_rows && total != 0.0; ++i) {
    if (cluster[i] != k) continue;
    // Divided first, so that a group of one is copied bit by bit.
    run += static_cast<float>(mass[i] / total) * to_float(x.row(b, i)[column]);
    if (++num_added % kRun == 0) {
      sum += run;
      run = 0.0f;
    }
  }
  store(of.merged + (b * of.num_slots + k) * x.dim + column, sum + run);
}

}  // namespace

template <typename T, typename Out, class Launch>
void saliency_merge(const Launch& launch, const MergeSlots<T, Out>& of) {
  if (of.tokens.batch * of.num_slots == 0) return;
  // Sizes and masses are written also where there are no columns.
  const int64_t chunks = larger<int64_t>(1, divide_up<int64_t>(of.tokens.dim, kColumns));
  const dim3 grid(
      static_cast<unsigned>(of.num_slots), static_cast<unsigned>(chunks), static_cast<unsigned>(of.tokens.batch));
  launch(saliency_merge_kernel<T, Out>, grid, dim3(kColumns), size_t{0}, of);
}

}  // namespace qm_spec
