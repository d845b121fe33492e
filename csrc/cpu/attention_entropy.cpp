// attention_entropy: H_i = -sum_j A_ij log A_ij with A = softmax(X X^T / sqrt(D)), of tokens [B, N, D], to [B, N]; if
// causal, a token attends to itself and earlier ones only.
// Source: QuickMerge++, arXiv 2508.13204; reference in qm_spec/ops/attention_entropy.py.
//
// With m the largest score of a row, S = sum_j e^(s_j - m) and W = sum_j (s_j - m) e^(s_j - m) it is log S - W / S.
// Scores are symmetric: each tile of them is computed once, for its rows and, off the diagonal, for its columns; if
// causal, the rows of a tile off the diagonal are earlier than its columns and take nothing from it. No more than a tile
// is held. A row's (m, S, W) from two tiles are merged into one; who adds to which sum, and in which
// order, is fixed, so the result does not depend on the number of threads.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "csrc/cpu/products.h"
#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

constexpr int64_t kTile = 96;
// Sets of sums per sequence, each added to by one task: enough for many threads, and linear in N.
constexpr int64_t kMaxGroups = 64;
// Floats of converted and packed tokens held at a time, where there are several sequences.
constexpr int64_t kHeld = int64_t{1} << 24;

// Whole vectors of them are read and written: they begin at a multiple of 32, and have room up to the next.
struct Sums {
  float *largest, *total, *weighted;
  Sums at(int64_t i) const { return {largest + i, total + i, weighted + i}; }
};

void reset(Sums sums, int64_t count) {
  std::fill(sums.largest, sums.largest + count, -FLT_MAX);
  std::fill(sums.total, sums.total + count, 0.0f);
  std::fill(sums.weighted, sums.weighted + count, 0.0f);
}

// Add `part` to `sums`, as if their scores had been summed together.
template <class Vec>
QM_INLINE void merge(Sums part, int64_t count, Sums sums) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec a = load<Vec>(sums.largest + i), b = load<Vec>(part.largest + i), m = larger(a, b);
    const Vec weight_a = exp(a - m), weight_b = exp(b - m);
    const Vec total_a = load<Vec>(sums.total + i), total_b = load<Vec>(part.total + i);
    const Vec weighted_a = load<Vec>(sums.weighted + i), weighted_b = load<Vec>(part.weighted + i);
    store(m, sums.largest + i);
    store(weight_a * total_a + weight_b * total_b, sums.total + i);
    store(weight_a * (weighted_a + (a - m) * total_a) + weight_b * (weighted_b + (b - m) * total_b), sums.weighted + i);
  }
}

// The sums of each row, over its first `columns` scores, or over those up to the diagonal.
template <class Vec>
QM_INLINE void sum_rows(
    const float* scores, int64_t rows, int64_t columns, bool to_diagonal, float scale, Sums part) {
  const Ints<Vec> lanes = lane_numbers<Vec>();
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = scores + r * kTile;
    const int32_t count = static_cast<int32_t>(to_diagonal ? r + 1 : columns);
    Vec most = all<Vec>(-FLT_MAX);
    for (int32_t c = 0; c < count; c += kLanes) {
      most = larger(select(lanes + c < count, load<Vec>(s + c), most), most);
    }
    const float m = largest(most);
    Vec total = {}, weighted = {};
    for (int32_t c = 0; c < count; c += kLanes) {
      const Vec z = (load<Vec>(s + c) - m) * scale;
      const Vec e = select(lanes + c < count, exp(z), Vec{});
      total += e;
      weighted += select(lanes + c < count, z * e, Vec{});
    }
    part.largest[r] = m * scale;
    part.total[r] = sum(total);
    part.weighted[r] = sum(weighted);
  }
}

// The sums of each column, of whole vectors of columns.
template <class Vec>
QM_INLINE void sum_columns(const float* scores, int64_t rows, int64_t columns, float scale, Sums part) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const float* s = scores + c;
    Vec m = all<Vec>(-FLT_MAX);
    for (int64_t r = 0; r < rows; ++r) m = larger(load<Vec>(s + r * kTile), m);
    Vec total = {}, weighted = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec z = (load<Vec>(s + r * kTile) - m) * scale;
      const Vec e = exp(z);
      total += e;
      weighted += z * e;
    }
    store(m * scale, part.largest + c);
    store(total, part.total + c);
    store(weighted, part.weighted + c);
  }
}

// Put the entropies in the place of the largest scores.
template <class Vec>
QM_INLINE void finish(Sums sums, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec total = load<Vec>(sums.total + i);
    store(log(total) - load<Vec>(sums.weighted + i) / total, sums.largest + i);
  }
}

Tensor attention_entropy(Tensor tokens, bool causal) {
  tokens = torch::stable::contiguous(tokens);
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1), dim = tokens.size(2);
  Tensor entropy = torch::stable::new_empty(tokens, {batch, num_tokens}, ScalarType::Float);
  if (batch == 0 || num_tokens == 0) return entropy;
  const FloatRows x(tokens, "attention_entropy");
  float* out = static_cast<float*>(entropy.data_ptr());
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));

  // Small tiles where there are few, so that several threads find work.
  const int64_t tile = num_tokens <= 512 ? kPanel : kTile;
  const int64_t tiles = (num_tokens + tile - 1) / tile;
  const int64_t groups = std::min((tiles + 1) / 2, kMaxGroups);
  const int64_t places = whole_panels(num_tokens), strips = places / kPanel;
  const int64_t row_floats = num_tokens * dim, panel_floats = places * dim, sum_floats = 3 * places;
  const int64_t item_floats = row_floats + panel_floats + groups * sum_floats;
  const int64_t held = std::min(batch, std::max<int64_t>(1, kHeld / item_floats));
  const Scratch rows(held * row_floats), panels(held * panel_floats), sums(held * groups * sum_floats);

  for (int64_t first = 0; first < batch; first += held) {
    const int64_t items = std::min(held, batch - first);
    // Converted by then, if they are not float32 anyway.
    const auto rows_of = [&](int64_t b) { return x.read((first + b) * row_floats, 0, rows.get() + b * row_floats); };
    const auto sums_of = [&](int64_t b, int64_t g) {
      float* at = sums.get() + (b * groups + g) * sum_floats;
      return Sums{at, at + places, at + 2 * places};
    };
    torch::stable::parallel_for(0, items * strips, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / strips, row = task % strips * kPanel, count = std::min(kPanel, num_tokens - row);
        const float* from =
            x.read((first + b) * row_floats + row * dim, count * dim, rows.get() + b * row_floats + row * dim);
        pack_panels(from, count, dim, panels.get() + b * panel_floats + row * dim);
      }
    });
    torch::stable::parallel_for(0, items * groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(kTile * kTile + 3 * kTile);
      float* scores = scratch.get();
      const Sums part{scores + kTile * kTile, scores + kTile * kTile + kTile, scores + kTile * kTile + 2 * kTile};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / groups, g = task % groups;
        const float* from = rows_of(b);
        const Sums own = sums_of(b, g);
        reset(own, places);
        for_strips(tiles, g, groups, [&](int64_t i) {
          const int64_t row = i * tile, num_rows = std::min(tile, num_tokens - row);
          for (int64_t column = row; column < num_tokens; column += tile) {
            const int64_t num_columns = std::min(tile, num_tokens - column);
            products(
                from + row * dim, num_rows, panels.get() + b * panel_floats + column * dim,
                whole_panels(num_columns) / kPanel, dim, scores, kTile);
            // On the diagonal a tile's columns are its rows, and need no sums across lanes.
            if (causal ? column == row : column != row) {
              QM_DISPATCH(sum_rows, scores, num_rows, num_columns, causal, scale, part);
              QM_DISPATCH(merge, part, num_rows, own.at(row));
            }
            if (causal && column == row) continue;
            QM_DISPATCH(sum_columns, scores, num_rows, num_columns, scale, part);
            QM_DISPATCH(merge, part, num_columns, own.at(column));
          }
        });
      }
    });
    torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Sums all = sums_of(b, 0);
        for (int64_t g = 1; g < groups; ++g) QM_DISPATCH(merge, sums_of(b, g), places, all);
        QM_DISPATCH(finish, all, num_tokens);
        std::copy_n(all.largest, num_tokens, out + (first + b) * num_tokens);
      }
    });
  }
  return entropy;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("attention_entropy", TORCH_BOX(&attention_entropy));
}

}  // namespace qm_spec
