// Dot products of rows: the matrix product behind scores, similarities and distances, tile by tile.
#pragma once

#include "csrc/cpu/convert.h"

namespace qm_spec {

// Rows are taken as columns of a product in panels of 32, which is two AVX-512 vectors.
constexpr int64_t kPanel = 32;

// `n` rounded up to whole panels.
inline int64_t whole_panels(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// Lay `num_rows` rows [num_rows, dim] out as panels [whole_panels(num_rows) / 32, dim, 32]; missing rows are 0.
void pack_panels(const float* rows, int64_t num_rows, int64_t dim, float* panels);

// out[i, j] = rows[i] . columns[j] for `num_rows` rows and whole panels of columns; `stride` is the length of a
// row of `out`, at least 32 * num_panels. An element's value does not depend on its place in the tile.
void products(
    const float* rows, int64_t num_rows, const float* panels, int64_t num_panels, int64_t dim, float* out,
    int64_t stride);

// x . y and |x - y|^2 of `count` floats.
float dot(const float* x, const float* y, int64_t count);
float squared_distance(const float* x, const float* y, int64_t count);

// Call `strip(i)` for the tile rows of the upper triangle of `tiles` x `tiles` that group `g` of `groups` has to do.
// Row i has tiles - i tiles; with its mirror image it has as many as every other pair, so that groups are alike.
template <typename Strip>
void for_strips(int64_t tiles, int64_t g, int64_t groups, const Strip& strip) {
  for (int64_t i = g; i < (tiles + 1) / 2; i += groups) {
    strip(i);
    if (i != tiles - 1 - i) strip(tiles - 1 - i);
  }
}

}  // namespace qm_spec
