// merge_groups_: merge in place every group of M tokens that has grown old; cache [pages, G, P, C], block table
// [B, columns], frontier [B]. In each group, for each KV head by itself:
//
//   A = softmax(K K^T / sqrt(d)),  H_i = -sum_j A_ij log A_ij,  s = H scaled to 0..1 within the group
//   pi = softmax(s / tau),  m = pi s + (1 - pi) eps
//   the R entries of the highest mass stay in place; every other joins the nearest of them by cosine similarity
//   x_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j  for keys and values; masses and counts add up
//
// Source: QuickMerge++, arXiv 2508.13204; reference in qm_spec/ops/merge_groups.py and merge_entries.py.
//
// Grids depend on shapes alone. What is due follows from the frontier by arithmetic and from one word per group; the
// rest of a block's work is skipped. A block whose request has nothing old enough reads its frontier and ends.
//
// Several requests of a batch may hold the same page, at the same column, for pages are shared from the front. Which
// of them merges a group is decided by what the launch does not change, so that all of them decide alike: the table, the
// frontiers, and for spans the groups within. The others may see the group's level before or after, and do nothing in
// either case.
#pragma once

#include "csrc/cuda/groups.cuh"

namespace qm_spec {

// What merge_groups_ works on.
template <typename T>
struct Merge {
  Cache<T> cache;
  BlockTable table;
  Integers frontier;
  MergeConfig config;
};

namespace {

// Blocks of a launch, spread over the requests, if there are groups enough.
constexpr int64_t kMergeBlocks = 4096;
constexpr int kMostMergeWarps = 8;
constexpr size_t kMergeSharedBytes = 48 * 1024;

// One warp's scratch for the group it merges: `rows` are [M][d + 1], so that a column of rows spreads over all banks.
struct Group {
  float* rows;
  float *mass, *count, *weight;       // [M] each, of the entries before a merge
  float *merged_mass, *merged_count;  // [M] each, of the entries after it
  float* score;                       // [M], entropies, then inverse norms
  int *is_centre, *home;              // [M] each; home: the entry after the merge that an entry joins
  int* is_dropped;                    // [M], in the place of home, before the first assignment
  int64_t size, dim, row_stride;

  __host__ __device__ static int64_t num_floats(int64_t size, int64_t dim) { return size * (dim + 1 + 8); }
  __device__ Group(float* memory, int64_t size, int64_t dim) : size(size), dim(dim), row_stride(dim + 1) {
    rows = memory;
    mass = rows + size * row_stride;
    count = mass + size;
    weight = count + size;
    merged_mass = weight + size;
    merged_count = merged_mass + size;
    score = merged_count + size;
    is_centre = reinterpret_cast<int*>(score + size);
    is_dropped = home = is_centre + size;
  }
  __device__ float dot(int64_t i, int64_t j) const {
    const float *a = rows + i * row_stride, *b = rows + j * row_stride;
    float sum = 0.0f;
    for (int64_t c = 0; c < dim; ++c) sum += a[c] * b[c];
    return sum;
  }
};

__device__ inline int lane_id() { return threadIdx.x % kWarp; }

// Read `num` rows of keys, or of values, which stand one slot apart.
template <typename T>
__device__ void read_rows(const Group& group, const T* first, int64_t slot_stride, int num) {
  for (int i = 0; i < num; ++i)
    for (int64_t c = lane_id(); c < group.dim; c += kWarp)
      group.rows[i * group.row_stride + c] = to_float(first[i * slot_stride + c]);
  __syncwarp();
}

// Weigh the raw tokens by the entropy of their attention to each other: group.mass from group.rows.
__device__ inline void weigh(const Group& group, const MergeConfig& config) {
  const int64_t size = group.size;
  const float scale = 1.0f / sqrtf(static_cast<float>(group.dim));
  for (int64_t i = lane_id(); i < size; i += kWarp) {
    // With z = score - largest: entropy = log sum e^z - sum z e^z / sum e^z; kept up as the largest grows.
    float largest = -INFINITY, total = 0.0f, weighted = 0.0f;
    for (int64_t j = 0; j < size; ++j) {
      const float score = group.dot(i, j) * scale;
      if (score > largest) {
        const float fall = largest - score, factor = expf(fall);
        weighted = total == 0.0f ? 0.0f : factor * (weighted + fall * total);
        total *= factor;
        largest = score;
      }
      const float z = score - largest, e = expf(z);
      total += e;
      weighted += z * e;
    }
    group.score[i] = config.entropy_sign * (logf(total) - weighted / total);
  }
  __syncwarp();
  float low = INFINITY, high = -INFINITY;
  for (int64_t j = 0; j < size; ++j) {
    low = fminf(low, group.score[j]);
    high = fmaxf(high, group.score[j]);
  }
  const float spread = high - low;
  // Where all tokens are alike, every saliency is a half.
  const auto scaled = [&](int64_t i) { return spread > 1e-6f ? (group.score[i] - low) / spread : 0.5f; };
  const float peak = (spread > 1e-6f ? 1.0f : 0.5f) / config.temperature;
  float total = 0.0f;
  for (int64_t j = 0; j < size; ++j) total += expf(scaled(j) / config.temperature - peak);
  for (int64_t i = lane_id(); i < size; i += kWarp) {
    const float s = scaled(i), pi = expf(s / config.temperature - peak) / total;
    group.mass[i] = pi * s + (1.0f - pi) * config.epsilon;
  }
  __syncwarp();
}

// Whether entry j comes before entry i in the order of falling mass; ties: the earlier one; NaN first.
__device__ inline bool is_heavier(const float* mass, int64_t j, int64_t i) {
  const float a = mass[j] == mass[j] ? mass[j] : INFINITY, b = mass[i] == mass[i] ? mass[i] : INFINITY;
  return a > b || (a == b && j < i);
}

// An entry's share of its cluster, of which all may have been dropped.
__device__ inline float share_of(float mass, float total) { return mass / (total > 0.0f ? total : 1.0f); }

// Find the entry after the merge that each of `old` entries joins, and its weight there; rows are keys.
__device__ inline void assign(const Group& group, int old, int keep) {
  const int lane = lane_id();
  for (int i = lane; i < old; i += kWarp) {
    int rank = 0;
    for (int j = 0; j < old; ++j) rank += is_heavier(group.mass, j, i);
    group.is_centre[i] = rank < keep;
    group.score[i] = 1.0f / fmaxf(sqrtf(group.dot(i, i)), 1e-12f);
  }
  __syncwarp();
  for (int i = lane; i < old; i += kWarp) {
    float nearest = -INFINITY;
    int home = 0, number = 0;
    for (int j = 0; j < old; ++j) {
      if (!group.is_centre[j]) continue;
      // Its own norm would divide all similarities of an entry alike.
      const float similarity = group.dot(i, j) * group.score[j];
      if (j == i || (!group.is_centre[i] && similarity > nearest)) {
        nearest = similarity;
        home = number;
      }
      ++number;
    }
    group.home[i] = home;
  }
  __syncwarp();
  for (int k = lane; k < keep; k += kWarp) {
    float mass = 0.0f, count = 0.0f;
    for (int i = 0; i < old; ++i) {
      if (group.home[i] != k) continue;
      mass += group.mass[i];
      count += group.count[i];
    }
    group.merged_mass[k] = mass;
    group.merged_count[k] = count;
  }
  __syncwarp();
  for (int i = lane; i < old; i += kWarp)
    group.weight[i] = share_of(group.mass[i], group.merged_mass[group.home[i]]);
  __syncwarp();
}

// Whether an entry, whose key and value stand side by side, is finite; if not, it becomes zeros. For a whole warp.
template <typename T>
__device__ bool keep_finite(T* entry, int64_t head_dim, float mass) {
  // Only what is finite gives 0 times 0.
  bool is_finite = mass * 0.0f == 0.0f;
  for (int64_t c = lane_id(); c < 2 * head_dim; c += kWarp) is_finite &= to_float(entry[c]) * 0.0f == 0.0f;
  is_finite = !__any_sync(kAllLanes, !is_finite);
  for (int64_t c = lane_id(); !is_finite && c < 2 * head_dim; c += kWarp) store(entry + c, 0.0f);
  // Other lanes read them.
  __syncwarp();
  return is_finite;
}

// Write the weighted means of `old` rows to the first `keep` slots.
template <typename T>
__device__ void write_means(const Group& group, T* first, int64_t slot_stride, int old, int keep) {
  for (int k = 0; k < keep; ++k) {
    for (int64_t c = lane_id(); c < group.dim; c += kWarp) {
      float mean = 0.0f;
      for (int i = 0; i < old; ++i)
        if (group.home[i] == k) mean += group.weight[i] * group.rows[i * group.row_stride + c];
      store(first + k * slot_stride + c, mean);
    }
  }
  // Lanes keep to their own columns, and need not rely on it: what comes next overwrites the rows.
  __syncwarp();
}

// Bring one head of a group from level `old_level` to `new_level` of the schedule, through every level between them
// with what it stores there: the result does not depend on when the group was visited. Entry i's mass and count are
// lane i's alone, except within `assign`, which begins after a barrier.
template <typename T>
__device__ void merge_group(
    const Merge<T>& merge, const Group& group, Place at, int64_t head, int old_level, int new_level) {
  const Cache<T>& cache = merge.cache;
  const MergeConfig& config = merge.config;
  T *keys = cache.slot(at.page, head, at.slot), *values = keys + cache.head_dim;
  for (int i = 0; i < config.held(old_level); ++i) {
    const SlotState* state = cache.state(at.page, head, at.slot + i);
    const bool is_finite = keep_finite(keys + i * cache.slot_stride, cache.head_dim, state->mass);
    if (lane_id() != i % kWarp) continue;
    group.mass[i] = is_finite ? state->mass : 0.0f;
    group.count[i] = state->count;
    group.is_dropped[i] = !is_finite;
  }
  for (int level = old_level + 1; level <= new_level; ++level) {
    const int old = config.held(level - 1), keep = config.held(level);
    if (keep == 0) break;
    read_rows(group, keys, cache.slot_stride, old);
    if (level == 1) {
      weigh(group, config);
      // Keys too large for their products leave no number either.
      for (int i = lane_id(); i < old; i += kWarp)
        if (group.is_dropped[i] || !(group.mass[i] * 0.0f == 0.0f)) group.mass[i] = 0.0f;
      __syncwarp();
    }
    assign(group, old, keep);
    write_means(group, keys, cache.slot_stride, old, keep);
    read_rows(group, values, cache.slot_stride, old);
    write_means(group, values, cache.slot_stride, old, keep);
    for (int k = lane_id(); k < keep; k += kWarp) {
      group.mass[k] = group.merged_mass[k];
      group.count[k] = group.merged_count[k];
    }
  }
  const int keep = config.held(new_level);
  for (int i = lane_id(); i < config.group_size; i += kWarp) {
    const bool is_entry = i < keep;
    *cache.state(at.page, head, at.slot + i) = SlotState{
        is_entry ? group.mass[i] : 0.0f, is_entry ? group.count[i] : 0.0f,
        i == 0 ? static_cast<float>(new_level) : 0.0f, 0.0f};
  }
}

// Levels within groups. Grid (X, B); all warps of a block scan the same groups, and each takes a share of the heads.
// Groups X, 2X, 3X... apart are one block's, so that old groups, which stand together, spread over all blocks.
template <typename T>
__global__ void merge_levels_kernel(Merge<T> merge) {
  const Cache<T>& cache = merge.cache;
  const MergeConfig& config = merge.config;
  const int64_t request = blockIdx.y, frontier = merge.frontier[request];
  const int64_t groups_per_page = cache.page_size / config.group_size;
  const int64_t end = smaller(config.groups_due(1, frontier), merge.table.num_columns * groups_per_page);
  const int lane = lane_id(), warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const Group memory(
      shared_memory() + warp * Group::num_floats(config.group_size, cache.head_dim), config.group_size,
      cache.head_dim);
  for (int64_t base = blockIdx.x; base < end; base += int64_t{gridDim.x} * kWarp) {
    const int64_t mine = base + int64_t{gridDim.x} * lane;
    int old_level = 0;
    bool due = false;
    if (mine < end) {
      const Place at = place_of(cache, merge.table, config, request, mine);
      if (cache.holds(at.page)) {
        old_level = level_at(cache, at, config);
        due = old_level < level_due(config, mine, frontier);
      }
    }
    unsigned waiting = __ballot_sync(kAllLanes, due);
    // Every warp has seen the levels before the first one changes them.
    __syncthreads();
    for (; waiting != 0; waiting &= waiting - 1) {
      const int source = __ffs(waiting) - 1;
      const int64_t group = base + int64_t{gridDim.x} * source, column = group / groups_per_page;
      const int from = __shfl_sync(kAllLanes, old_level, source), to = level_due(config, group, frontier);
      const Place at = place_of(cache, merge.table, config, request, group);
      // Of the requests that hold the group the one that is furthest beyond it merges it; ties: the first one.
      bool is_others = false;
      for (int64_t other = lane; other < merge.table.num_requests; other += kWarp) {
        if (merge.table.page(other, column) != at.page) continue;
        const int level = level_due(config, group, merge.frontier[other]);
        is_others |= level > to || (level == to && other < request);
      }
      if (__any_sync(kAllLanes, is_others)) continue;
      for (int64_t head = warp; head < cache.num_heads; head += num_warps)
        merge_group(merge, memory, at, head, from, to);
    }
  }
}

// Merge the one entry of the group at `second` into that of the group at `first`, for one KV head, and mark the span's
// last group.
template <typename T>
__device__ void merge_pair(
    const Cache<T>& cache, const MergeConfig& config, Place first, Place second, Place last, int64_t head, int level) {
  const SlotState a = *cache.state(first.page, head, first.slot), b = *cache.state(second.page, head, second.slot);
  T *to = cache.slot(first.page, head, first.slot), *from = cache.slot(second.page, head, second.slot);
  const float mass_a = keep_finite(to, cache.head_dim, a.mass) ? a.mass : 0.0f;
  const float mass_b = keep_finite(from, cache.head_dim, b.mass) ? b.mass : 0.0f;
  const float mass = mass_a + mass_b, weight_a = share_of(mass_a, mass), weight_b = share_of(mass_b, mass);
  // Key and value stand side by side.
  for (int64_t c = lane_id(); c < 2 * cache.head_dim; c += kWarp)
    store(to + c, weight_a * to_float(to[c]) + weight_b * to_float(from[c]));
  // Every lane has read both states.
  __syncwarp();
  for (int64_t i = lane_id(); i < config.group_size; i += kWarp) {
    const bool is_first = i == 0;
    const float word = is_first ? static_cast<float>(level) : 0.0f;
    *cache.state(first.page, head, first.slot + i) =
        SlotState{is_first ? mass : 0.0f, is_first ? a.count + b.count : 0.0f, word, 0.0f};
    *cache.state(second.page, head, second.slot + i) = SlotState{0.0f, 0.0f, word, 0.0f};
    *cache.state(last.page, head, last.slot + i) = SlotState{0.0f, 0.0f, word, 0.0f};
  }
}

// Whether the 2^log2 groups from `group` on, the first of which has the level of such a span, are one span of this
// request.
//
// The first has the level also where another request merged it with pages that this one does not share. Inside a page
// they cannot part. Else the span is whole if its last group bears the mark of the merge: whoever did it had that group.
template <typename T>
__device__ bool is_whole(const Merge<T>& merge, int64_t request, int64_t group, int log2) {
  const int64_t groups_per_page = merge.cache.page_size / merge.config.group_size;
  const int64_t last = group + (int64_t{1} << log2) - 1;
  if (group / groups_per_page == last / groups_per_page) return true;
  const Place at = place_of(merge.cache, merge.table, merge.config, request, last);
  if (!merge.cache.holds(at.page)) return false;
  const SlotState state = *merge.cache.state(at.page, 0, at.slot);
  return !(state.count > 0.0f) && bounded_level(state.level, merge.config) >= merge.config.schedule_levels + log2;
}

// Whether the request's two spans from `group` on, of half a span of `level` each, can become one: both are whole, and
// the second one's level is `level` - 1, or `most` at most. Of what is read here this launch changes the levels of the
// second one and of its last group, which were `level` - 1.
template <typename T>
__device__ bool is_pair(const Merge<T>& merge, int64_t request, int64_t group, int level, int most) {
  const MergeConfig& config = merge.config;
  const int log2 = level - config.schedule_levels - 1;
  const int64_t half = int64_t{1} << log2;
  const Place second = place_of(merge.cache, merge.table, config, request, group + half);
  if (!merge.cache.holds(second.page)) return false;
  const int second_level = level_at(merge.cache, second, config);
  return second_level >= level - 1 && second_level <= most && is_whole(merge, request, group, log2) &&
         is_whole(merge, request, group + half, log2);
}

// One doubling of spans: two neighbours become one. Grid (X, B); each warp works alone.
template <typename T>
__global__ void merge_spans_kernel(Merge<T> merge, int level) {
  const Cache<T>& cache = merge.cache;
  const MergeConfig& config = merge.config;
  const int64_t request = blockIdx.y, frontier = merge.frontier[request];
  const int64_t groups_per_page = cache.page_size / config.group_size, span = config.span(level);
  const int64_t end = smaller(config.groups_due(level, frontier), merge.table.num_columns * groups_per_page) / span;
  const int lane = lane_id();
  const int64_t num_warps = blockDim.x / kWarp * int64_t{gridDim.x};
  const int64_t first_span = blockIdx.x * int64_t{blockDim.x / kWarp} + threadIdx.x / kWarp;
  for (int64_t base = first_span; base < end; base += num_warps * kWarp) {
    const int64_t mine = base + num_warps * lane;
    bool due = false;
    if (mine < end) {
      const Place first = place_of(cache, merge.table, config, request, mine * span);
      due = cache.holds(first.page) && level_at(cache, first, config) == level - 1 &&
            is_pair(merge, request, mine * span, level, level - 1);
    }
    for (unsigned waiting = __ballot_sync(kAllLanes, due); waiting != 0; waiting &= waiting - 1) {
      const int64_t group = (base + num_warps * (__ffs(waiting) - 1)) * span;
      const Place first = place_of(cache, merge.table, config, request, group);
      const Place second = place_of(cache, merge.table, config, request, group + span / 2);
      const Place last = place_of(cache, merge.table, config, request, group + span - 1);
      // Requests may share the span's first pages and not the rest: the first of them that can merge it gives the
      // entry its content. It may have done so by now, and then the level of its second half is `level`.
      bool is_others = false;
      for (int64_t other = lane; other < request; other += kWarp)
        is_others |= group < config.groups_due(level, merge.frontier[other]) &&
                     merge.table.page(other, group / groups_per_page) == first.page &&
                     is_pair(merge, other, group, level, level);
      if (__any_sync(kAllLanes, is_others)) continue;
      for (int64_t head = 0; head < cache.num_heads; ++head)
        merge_pair(cache, config, first, second, last, head, level);
    }
  }
}

}  // namespace

// The levels within groups, then one launch per doubling, since a span's halves may be other blocks' work. Doublings
// that no request is long enough for, whose table has this many columns, need none.
template <typename T, class Launch>
void merge_groups(const Launch& launch, const Merge<T>& merge) {
  const Cache<T>& cache = merge.cache;
  const MergeConfig& config = merge.config;
  const int64_t num_requests = merge.table.num_requests, num_tokens = merge.table.num_columns * cache.page_size;
  if (num_requests == 0 || config.groups_due(1, num_tokens) == 0) return;
  const int64_t most_blocks = larger<int64_t>(1, kMergeBlocks / num_requests);
  const auto grid = [&](int64_t work) {
    return dim3(static_cast<unsigned>(smaller(most_blocks, work)), static_cast<unsigned>(num_requests));
  };
  const size_t warp_bytes = Group::num_floats(config.group_size, cache.head_dim) * sizeof(float);
  const int64_t num_warps = larger<int64_t>(
      1, smaller<int64_t>(smaller<int64_t>(kMostMergeWarps, cache.num_heads), kMergeSharedBytes / warp_bytes));
  launch(
      merge_levels_kernel<T>, grid(divide_up<int64_t>(num_tokens / config.group_size, kWarp)),
      dim3(static_cast<unsigned>(num_warps * kWarp)), num_warps * warp_bytes, merge);
  for (int level = config.schedule_levels + 1; level <= config.num_levels; ++level) {
    const int64_t num_spans = config.groups_due(level, num_tokens) / config.span(level);
    if (num_spans == 0) break;
    constexpr int64_t kWarps = 4;
    launch(
        merge_spans_kernel<T>, grid(divide_up(num_spans, kWarps * kWarp)), dim3(kWarps * kWarp), size_t{0}, merge,
        level);
  }
}

}  // namespace qm_spec
