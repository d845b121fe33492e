// cosine_similarity: C_ij = x_i . x_j / (|x_i| |x_j|) of tokens [B, N, D], to [B, N, N]; a row of zeros gets 0.
// Source: the quickmerge README; reference in qm_spec/ops/cosine_similarity.py.
//
// Norms first, then one block for every tile; those on or above the diagonal write their tile and its mirror image, so
// the result is symmetric bit by bit and no element is written twice. The others have nothing to do.
#pragma once

#include "csrc/cuda/tokens.cuh"

namespace qm_spec {
namespace {

constexpr float kLeastNorm = 1e-12f;

// Grid (tiles of columns, tiles of rows, B).
template <typename T>
__global__ void cosine_similarity_kernel(Sequences<const T> x, const float* norms, T* similarity) {
  if (blockIdx.x < blockIdx.y) return;
  const int64_t b = blockIdx.z, n = x.num_rows;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kSide;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kSide;
  const int down = static_cast<int>(threadIdx.x) / kAcross, across = static_cast<int>(threadIdx.x) % kAcross;
  float products[kPerThread][kPerThread];
  tile_products(x.row(b, 0), n, first_row, x.row(b, 0), n, first_column, x.dim, shared_memory(), products);
  T* out = similarity + b * n * n;
  for (int i = 0; i < kPerThread; ++i) {
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t row = first_row + down + kAcross * i, column = first_column + across + kAcross * j;
      // Below the diagonal the mirror image of another thread's element stands.
      if (row >= n || column >= n || row > column) continue;
      const float value =
          products[i][j] / fmaxf(norms[b * n + row], kLeastNorm) / fmaxf(norms[b * n + column], kLeastNorm);
      store(out + row * n + column, value);
      if (row != column) store(out + column * n + row, value);
    }
  }
}

}  // namespace

// `norms` is scratch, [B, N].
template <typename T, class Launch>
void cosine_similarity(const Launch& launch, const Sequences<const T>& x, float* norms, T* similarity) {
  if (x.batch * x.num_rows == 0) return;
  row_norms(launch, x, false, norms);
  const unsigned tiles = static_cast<unsigned>(divide_up<int64_t>(x.num_rows, kSide));
  const dim3 grid(tiles, tiles, static_cast<unsigned>(x.batch));
  launch(
      cosine_similarity_kernel<T>, grid, dim3(kThreads), kTileFloats * sizeof(float), x, static_cast<const float*>(norms),
      similarity);
}

}  // namespace qm_spec
