// attention_entropy: H_i = -sum_j A_ij log A_ij with A = softmax(X X^T / sqrt(D)), of tokens [B, N, D], to [B, N]; if
// causal, a token attends to itself and earlier ones only.
// Source: QuickMerge++, arXiv 2508.13204; reference in qm_spec/ops/attention_entropy.py.
//
// A block has 64 rows and goes over all columns, 64 at a time. With m the largest score so far, every thread keeps
// (m, S = sum e^(s - m), W = sum (s - m) e^(s - m)) of its own columns; at the end those of a row are brought
// together, and H = log S - W / S. No score is written to memory.
#pragma once

#include "csrc/cuda/tokens.cuh"

namespace qm_spec {

struct EntropySums {
  float largest, total, weighted;

  __device__ void add(const EntropySums& other) {
    if (other.total == 0.0f) return;
    const float m = fmaxf(largest, other.largest), own = largest - m, others = other.largest - m;
    const float own_factor = total == 0.0f ? 0.0f : expf(own), factor = expf(others);
    weighted = factor * (other.weighted + others * other.total) +
               (total == 0.0f ? 0.0f : own_factor * (weighted + own * total));
    total = own_factor * total + factor * other.total;
    largest = m;
  }
};

namespace {

// Grid (tiles of rows, B).
template <typename T>
__global__ void attention_entropy_kernel(Sequences<const T> x, bool causal, float scale, float* entropy) {
  float* shared = shared_memory();
  const int64_t b = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.x) * kSide;
  const int thread = static_cast<int>(threadIdx.x), down = thread / kAcross, across = thread % kAcross;
  EntropySums own[kPerThread];
  for (int i = 0; i < kPerThread; ++i) own[i] = {-FLT_MAX, 0.0f, 0.0f};
  const int64_t end = causal ? smaller(first_row + kSide, x.num_rows) : x.num_rows;
  for (int64_t first_column = 0; first_column < end; first_column += kSide) {
    float scores[kPerThread][kPerThread];
    tile_products(
        x.row(b, 0), x.num_rows, first_row, x.row(b, 0), x.num_rows, first_column, x.dim, shared, scores);
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t row = first_row + down + kAcross * i;
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t column = first_column + across + kAcross * j;
        if (column < x.num_rows && !(causal && column > row)) own[i].add({scores[i][j] * scale, 1.0f, 0.0f});
      }
    }
  }
  // Sums of every row and thread across: [64][16] of each kind.
  float *largest = shared, *total = largest + kSide * kAcross, *weighted = total + kSide * kAcross;
  for (int i = 0; i < kPerThread; ++i) {
    const int to = (down + kAcross * i) * kAcross + across;
    largest[to] = own[i].largest;
    total[to] = own[i].total;
    weighted[to] = own[i].weighted;
  }
  __syncthreads();
  if (thread < kSide && first_row + thread < x.num_rows) {
    EntropySums sums{-FLT_MAX, 0.0f, 0.0f};
    for (int i = thread * kAcross; i < (thread + 1) * kAcross; ++i) sums.add({largest[i], total[i], weighted[i]});
    entropy[b * x.num_rows + first_row + thread] = logf(sums.total) - sums.weighted / sums.total;
  }
}

}  // namespace

template <typename T, class Launch>
void attention_entropy(const Launch& launch, const Sequences<const T>& x, bool causal, float* entropy) {
  if (x.batch * x.num_rows == 0) return;
  const size_t floats = larger<size_t>(kTileFloats, 3 * kSide * kAcross);
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(x.num_rows, kSide)), static_cast<unsigned>(x.batch));
  const float scale = 1.0f / sqrtf(static_cast<float>(x.dim));
  launch(attention_entropy_kernel<T>, grid, dim3(kThreads), floats * sizeof(float), x, causal, scale, entropy);
}

}  // namespace qm_spec
