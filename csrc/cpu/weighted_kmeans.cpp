// weighted_kmeans_assign: the nearest live centre of each token by Euclidean distance (ties: the earlier), and the
// squared distance to it; of points [B, N, D], centres [B, K, D], masks [B, N] and [B, K], to [B, N] twice.
// weighted_kmeans_update: give every live slot without members a token that its own cluster can spare, then average
// each cluster weighted by mass; to clusters [B, N] and centres [B, K, D].
// Source: the quickmergepp README, "weighted k-means"; reference in qm_spec/ops/weighted_kmeans.py.
#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "csrc/cpu/group_means.h"
#include "csrc/cpu/products.h"
#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

constexpr int64_t kTile = 96;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Replace products by |c|^2 - 2 x.c, which orders the centres as their distances do, and return the smallest. Whole
// vectors are looked at: behind the last centre stands infinity.
template <class Vec>
QM_INLINE float smallest(float* scores, const float* squared_norms, int64_t count) {
  Vec least = all<Vec>(kInfinity);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec score = load<Vec>(squared_norms + i) - 2.0f * load<Vec>(scores + i);
    store(score, scores + i);
    least = smaller(score, least);
  }
  return -largest(-least);
}

std::tuple<Tensor, Tensor> assign(Tensor points, Tensor centres, Tensor mask, Tensor live) {
  points = torch::stable::contiguous(points);
  centres = torch::stable::contiguous(centres);
  mask = torch::stable::contiguous(mask);
  live = torch::stable::contiguous(live);
  const int64_t batch = points.size(0), num_tokens = points.size(1), dim = points.size(2);
  const int64_t num_slots = centres.size(1);
  Tensor clusters = torch::stable::new_empty(points, {batch, num_tokens}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(points, {batch, num_tokens}, ScalarType::Float);
  const FloatRows x(points, "weighted_kmeans_assign");
  const float* c = static_cast<const float*>(centres.data_ptr());
  const bool *is_token = static_cast<const bool*>(mask.data_ptr()), *is_live = static_cast<const bool*>(live.data_ptr());
  int64_t* cluster = static_cast<int64_t*>(clusters.data_ptr());
  float* distance = static_cast<float*>(distances.data_ptr());

  const int64_t slots = whole_panels(num_slots), tiles = (num_tokens + kTile - 1) / kTile;
  const Scratch panels(batch * slots * dim), norms(batch * slots);
  torch::stable::parallel_for(0, batch * slots / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (slots / kPanel), first = task % (slots / kPanel) * kPanel;
      const int64_t count = std::min(kPanel, num_slots - first);
      const float* from = c + (b * num_slots + first) * dim;
      pack_panels(from, count, dim, panels.get() + (b * slots + first) * dim);
      for (int64_t k = 0; k < kPanel; ++k)
        norms.get()[b * slots + first + k] =
            k < count && is_live[b * num_slots + first + k] ? dot(from + k * dim, from + k * dim, dim) : kInfinity;
    }
  });
  torch::stable::parallel_for(0, batch * tiles, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kTile * kTile + kTile * dim);
    float *scores = scratch.get(), *converted = scores + kTile * kTile;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, row = task % tiles * kTile, num_rows = std::min(kTile, num_tokens - row);
      const int64_t first = b * num_tokens + row;
      const float* rows = x.read(first * dim, num_rows * dim, converted);
      float best[kTile];
      std::fill(best, best + kTile, kInfinity);
      std::fill(cluster + first, cluster + first + num_rows, int64_t{-1});
      for (int64_t column = 0; column < num_slots; column += kTile) {
        const int64_t count = std::min(kTile, num_slots - column);
        products(
            rows, num_rows, panels.get() + (b * slots + column) * dim, whole_panels(count) / kPanel, dim, scores, kTile);
        for (int64_t r = 0; r < num_rows; ++r) {
          float* score = scores + r * kTile;
          const float least = QM_DISPATCH(smallest, score, norms.get() + b * slots + column, count);
          if (!(least < best[r])) continue;
          best[r] = least;
          cluster[first + r] = column + (std::find(score, score + count, least) - score);
        }
      }
      for (int64_t r = 0; r < num_rows; ++r) {
        int64_t& k = cluster[first + r];
        if (!is_token[first + r]) k = -1;
        distance[first + r] = k >= 0 ? squared_distance(rows + r * dim, c + (b * num_slots + k) * dim, dim) : 0.0f;
      }
    }
  });
  return {clusters, distances};
}

// Give the e-th live slot without members the e-th of the tokens that can be spared: those that are not the nearest
// of their cluster, by falling mass * distance (ties: the earlier).
void repair(
    const float* mass, const float* distance, const bool* live, int64_t num_tokens, int64_t num_slots,
    int64_t* cluster) {
  std::vector<int64_t> nearest(num_slots, -1), empty, spare;
  for (int64_t i = 0; i < num_tokens; ++i) {
    const int64_t k = cluster[i];
    if (k >= 0 && (nearest[k] < 0 || distance[i] < distance[nearest[k]])) nearest[k] = i;
  }
  for (int64_t k = 0; k < num_slots; ++k)
    if (live[k] && nearest[k] < 0) empty.push_back(k);
  if (empty.empty()) return;
  for (int64_t i = 0; i < num_tokens; ++i)
    if (cluster[i] >= 0 && nearest[cluster[i]] != i) spare.push_back(i);
  const int64_t count = std::min(empty.size(), spare.size());
  std::partial_sort(spare.begin(), spare.begin() + count, spare.end(), [&](int64_t a, int64_t b) {
    const float cost_a = mass[a] * distance[a], cost_b = mass[b] * distance[b];
    return cost_a != cost_b ? cost_a > cost_b : a < b;
  });
  for (int64_t e = 0; e < count; ++e) cluster[spare[e]] = empty[e];
}

std::tuple<Tensor, Tensor> update(Tensor points, Tensor mass, Tensor cluster, Tensor distance, Tensor live) {
  points = torch::stable::contiguous(points);
  mass = torch::stable::contiguous(mass);
  distance = torch::stable::contiguous(distance);
  live = torch::stable::contiguous(live);
  const int64_t batch = points.size(0), num_tokens = points.size(1), dim = points.size(2), num_slots = live.size(1);
  cluster = torch::stable::contiguous(cluster);
  Tensor clusters = torch::stable::clone(cluster);
  Tensor centres = torch::stable::new_empty(points, {batch, num_slots, dim}, ScalarType::Float);
  const float* m = static_cast<const float*>(mass.data_ptr());
  int64_t* slot = static_cast<int64_t*>(clusters.data_ptr());
  for (int64_t i = 0; i < batch * num_tokens; ++i)
    STD_TORCH_CHECK(
        slot[i] >= -1 && slot[i] < num_slots,
        "weighted_kmeans_update: cluster must be in -1..", num_slots - 1, ", got ", slot[i]);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      repair(
          m + b * num_tokens, static_cast<const float*>(distance.data_ptr()) + b * num_tokens,
          static_cast<const bool*>(live.data_ptr()) + b * num_slots, num_tokens, num_slots, slot + b * num_tokens);
  });
  const Groups groups(slot, batch, num_tokens, num_slots, "weighted_kmeans_update");
  group_means(
      groups, FloatRows(points, "weighted_kmeans_update"), m, dim, FloatRowsOut(centres, "weighted_kmeans_update"),
      nullptr);
  return {clusters, centres};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("weighted_kmeans_assign", TORCH_BOX(&assign));
  m.impl("weighted_kmeans_update", TORCH_BOX(&update));
}

}  // namespace qm_spec
