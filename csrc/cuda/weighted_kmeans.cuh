// weighted_kmeans_assign: the nearest live centre of each token by Euclidean distance (ties: the earlier), and the
// squared distance to it; of points [B, N, D], centres [B, K, D], masks [B, N] and [B, K], to [B, N] twice.
// weighted_kmeans_update: give every live slot without members a token that its own cluster can spare, then average
// each cluster weighted by mass (see saliency_merge.cuh); to clusters [B, N] and centres [B, K, D].
// Source: the quickmergepp README, "weighted k-means"; reference in qm_spec/ops/weighted_kmeans.py.
#pragma once

#include "csrc/cuda/saliency_merge.cuh"
#include "csrc/cuda/tokens.cuh"

namespace qm_spec {

// What weighted_kmeans_assign works on.
template <typename T>
struct Assign {
  Sequences<const T> points;
  Sequences<const float> centres;
  const float* squared_norms;  // [B, K], of the centres
  const bool *mask, *live;
  int64_t* cluster;
  float* distance;
};

// What the repair works on, for each of B sequences; `nearest` and `taker` are scratch, [B, K].
struct Repair {
  int64_t batch, num_tokens, num_slots;
  const float *mass, *distance;
  const bool* live;
  const int64_t* cluster;
  int64_t *nearest, *taker, *repaired;
};

namespace {

// Grid (tiles of tokens, B). Every thread keeps the best of its own columns; at the end those of a row are compared.
template <typename T>
__global__ void weighted_kmeans_assign_kernel(Assign<T> to) {
  float* shared = shared_memory();
  const int64_t b = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.x) * kSide;
  const int64_t num_tokens = to.points.num_rows, num_slots = to.centres.num_rows;
  const int thread = static_cast<int>(threadIdx.x), down = thread / kAcross, across = thread % kAcross;
  float best[kPerThread];
  int32_t slot[kPerThread];
  for (int i = 0; i < kPerThread; ++i) {
    best[i] = INFINITY;
    slot[i] = -1;
  }
  for (int64_t first_column = 0; first_column < num_slots; first_column += kSide) {
    float products[kPerThread][kPerThread];
    tile_products(
        to.points.row(b, 0), num_tokens, first_row, to.centres.row(b, 0), num_slots, first_column, to.points.dim,
        shared, products);
    for (int i = 0; i < kPerThread; ++i) {
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t column = first_column + across + kAcross * j;
        if (column >= num_slots || !to.live[b * num_slots + column]) continue;
        const float score = to.squared_norms[b * num_slots + column] - 2.0f * products[i][j];
        if (score < best[i]) {
          best[i] = score;
          slot[i] = static_cast<int32_t>(column);
        }
      }
    }
  }
  // Slots stand in shared memory as the floats they are exactly.
  float *scores = shared, *slots = shared + kSide * kAcross;
  for (int i = 0; i < kPerThread; ++i) {
    scores[(down + kAcross * i) * kAcross + across] = best[i];
    slots[(down + kAcross * i) * kAcross + across] = static_cast<float>(slot[i]);
  }
  __syncthreads();
  if (thread < kSide && first_row + thread < num_tokens) {
    float score = INFINITY, chosen = -1.0f;
    for (int i = thread * kAcross; i < (thread + 1) * kAcross; ++i) {
      if (slots[i] >= 0.0f && (scores[i] < score || (scores[i] == score && slots[i] < chosen))) {
        score = scores[i];
        chosen = slots[i];
      }
    }
    const int64_t token = b * num_tokens + first_row + thread;
    to.cluster[token] = to.mask[token] ? static_cast<int64_t>(chosen) : -1;
  }
}

// Grid (B * N): the squared distance of each token to its centre.
template <typename T>
__global__ void centre_distance_kernel(Assign<T> to) {
  const int64_t token = blockIdx.x, b = token / to.points.num_rows, k = to.cluster[token];
  float sum = 0.0f;
  if (k >= 0) {
    const T* x = to.points.data + token * to.points.dim;
    const float* c = to.centres.row(b, k);
    for (int64_t i = threadIdx.x; i < to.points.dim; i += kThreads) {
      const float difference = to_float(x[i]) - c[i];
      sum += difference * difference;
    }
  }
  sum = block_reduce(sum, Add(), shared_memory());
  if (threadIdx.x == 0) to.distance[token] = sum;
}

// Grid (B). Ranks are counted, not sorted: the square of the tokens, and only where a slot is empty.
__global__ void weighted_kmeans_repair_kernel(Repair of) {
  const int64_t b = blockIdx.x, tokens = of.num_tokens, slots = of.num_slots;
  const float *mass = of.mass + b * tokens, *distance = of.distance + b * tokens;
  const bool* live = of.live + b * slots;
  const int64_t* cluster = of.cluster + b * tokens;
  int64_t *nearest = of.nearest + b * slots, *taker = of.taker + b * slots, *repaired = of.repaired + b * tokens;
  // The nearest member of every slot, -1 where there is none.
  for (int64_t k = threadIdx.x; k < slots; k += kThreads) {
    int64_t found = -1;
    for (int64_t i = 0; i < tokens; ++i)
      if (cluster[i] == k && (found < 0 || distance[i] < distance[found])) found = i;
    nearest[k] = found;
  }
  __syncthreads();
  // taker[e] is the e-th live slot without members.
  int64_t num_empty = 0;
  for (int64_t k = 0; k < slots; ++k) {
    if (!live[k] || nearest[k] >= 0) continue;
    if (threadIdx.x == 0) taker[num_empty] = k;
    ++num_empty;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < tokens; i += kThreads) {
    const int64_t k = cluster[i];
    int64_t rank = num_empty;
    if (num_empty > 0 && k >= 0 && k < slots && nearest[k] != i) {
      // Tokens to spare that go before this one: by falling mass * distance (ties: the earlier).
      rank = 0;
      const float cost = mass[i] * distance[i];
      for (int64_t j = 0; j < tokens; ++j) {
        const int64_t other = cluster[j];
        if (other < 0 || other >= slots || nearest[other] == j) continue;
        const float other_cost = mass[j] * distance[j];
        rank += other_cost > cost || (other_cost == cost && j < i);
      }
    }
    repaired[i] = rank < num_empty ? taker[rank] : k;
  }
}

}  // namespace

// `squared_norms` is scratch, [B, K].
template <typename T, class Launch>
void weighted_kmeans_assign(const Launch& launch, const Assign<T>& to, float* squared_norms) {
  if (to.points.batch * to.points.num_rows == 0) return;
  row_norms(launch, to.centres, true, squared_norms);
  const size_t floats = larger<size_t>(kTileFloats, 2 * kSide * kAcross);
  const dim3 grid(
      static_cast<unsigned>(divide_up<int64_t>(to.points.num_rows, kSide)), static_cast<unsigned>(to.points.batch));
  launch(weighted_kmeans_assign_kernel<T>, grid, dim3(kThreads), floats * sizeof(float), to);
  launch(
      centre_distance_kernel<T>, dim3(static_cast<unsigned>(to.points.batch * to.points.num_rows)), dim3(kThreads),
      kThreads * sizeof(float), to);
}

template <typename T, class Launch>
void weighted_kmeans_update(const Launch& launch, const Repair& repair, const MergeSlots<T, float>& means) {
  if (repair.batch * repair.num_tokens > 0)
    launch(weighted_kmeans_repair_kernel, dim3(static_cast<unsigned>(repair.batch)), dim3(kThreads), size_t{0}, repair);
  saliency_merge(launch, means);
}

}  // namespace qm_spec
