// cosine_similarity: C_ij = x_i . x_j / (|x_i| |x_j|) of tokens [B, N, D], to [B, N, N]; a row of zeros gets 0.
// Source: the quickmerge README; reference in qm_spec/ops/cosine_similarity.py.
//
// Each tile on or above the diagonal is computed once, by one task, and written twice: as it is, and mirrored. So the
// result is symmetric bit by bit, and no element is written by two tasks.
#include <algorithm>
#include <cmath>

#include "csrc/cpu/products.h"
#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

constexpr int64_t kTile = 96;

QM_MULTIVERSION void divide(const float* x, float divisor, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] / divisor;
}

// The whole tile with rows and columns exchanged.
QM_MULTIVERSION void mirror(const float* tile, float* mirrored) {
  for (int64_t r = 0; r < kTile; r += 8)
    for (int64_t c = 0; c < kTile; c += 8) transpose_8x8(tile + r * kTile + c, kTile, mirrored + c * kTile + r, kTile);
}

Tensor cosine_similarity(Tensor tokens) {
  tokens = torch::stable::contiguous(tokens);
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1), dim = tokens.size(2);
  Tensor similarity = torch::stable::new_empty(tokens, {batch, num_tokens, num_tokens});
  const FloatRows x(tokens, "cosine_similarity");
  const FloatRowsOut out(similarity, "cosine_similarity");
  const Scratch units(num_tokens * dim), panels(whole_panels(num_tokens) * dim);

  for (int64_t b = 0; b < batch; ++b) {
    torch::stable::parallel_for(0, whole_panels(num_tokens) / kPanel, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(dim);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kPanel, count = std::min(kPanel, num_tokens - first);
        for (int64_t i = first; i < first + count; ++i) {
          const float* row = x.read((b * num_tokens + i) * dim, dim, scratch.get());
          divide(row, std::max(std::sqrt(dot(row, row, dim)), 1e-12f), dim, units.get() + i * dim);
        }
        pack_panels(units.get() + first * dim, count, dim, panels.get() + first * dim);
      }
    });
    const int64_t tiles = (num_tokens + kTile - 1) / kTile, groups = (tiles + 1) / 2;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(2 * kTile * kTile);
      float *scores = scratch.get(), *mirrored = scores + kTile * kTile;
      for (int64_t g = begin; g < end; ++g) {
        for_strips(tiles, g, groups, [&](int64_t i) {
          const int64_t row = i * kTile, num_rows = std::min(kTile, num_tokens - row);
          for (int64_t column = row; column < num_tokens; column += kTile) {
            const int64_t num_columns = std::min(kTile, num_tokens - column);
            products(
                units.get() + row * dim, num_rows, panels.get() + column * dim, whole_panels(num_columns) / kPanel, dim,
                scores, kTile);
            for (int64_t r = 0; r < num_rows; ++r)
              out.write((b * num_tokens + row + r) * num_tokens + column, num_columns, scores + r * kTile);
            if (column == row) continue;
            mirror(scores, mirrored);
            for (int64_t c = 0; c < num_columns; ++c)
              out.write((b * num_tokens + column + c) * num_tokens + row, num_rows, mirrored + c * kTile);
          }
        });
      }
    });
  }
  return similarity;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("cosine_similarity", TORCH_BOX(&cosine_similarity));
}

}  // namespace qm_spec
