// When groups and spans of groups merge, as in qm_spec/config.py.
#pragma once

#include "csrc/cuda/page.cuh"

namespace qm_spec {

// Level 0 is raw; levels 1..num_counts leave held[level] entries of each group; at each level above, the one entry of
// a span of groups joins that of the span beside it.
struct Schedule {
  static constexpr int kMostCounts = 16;

  int64_t window, group_size;
  int num_counts, num_levels;
  int held[kMostCounts + 1];

  // Groups that an entry spans.
  __host__ __device__ int64_t span(int level) const {
    return level <= num_counts ? 1 : int64_t{1} << (level - num_counts);
  }
  // Entries of one group; past the schedule, of one span.
  __host__ __device__ int entries(int level) const { return level <= num_counts ? held[level] : 1; }
  // The binary logarithm of the windows that must follow; past the schedule two levels share a distance.
  __host__ __device__ int distance_log2(int level) const {
    return level <= num_counts ? level - 1 : level - 1 - (level - num_counts) / 2;
  }
  // Groups, counted from position 0, that are old enough for a level; a multiple of its span.
  __host__ __device__ int64_t groups_due(int level, int64_t frontier) const {
    const int64_t tokens = frontier - (window << distance_log2(level));
    return tokens < 0 ? 0 : tokens / (span(level) * group_size) * span(level);
  }
  // The level of the schedule that a group should have, 0..num_counts.
  __device__ int level_due(int64_t group, int64_t frontier) const {
    int level = 0;
    while (level < num_counts && group < groups_due(level + 1, frontier)) ++level;
    return level;
  }
};

// `schedule` has num_counts numbers, at most kMostCounts.
inline Schedule make_schedule(
    int64_t window, int64_t group_size, const int64_t* schedule, int num_counts, int64_t doublings) {
  Schedule result{window, group_size, num_counts, num_counts, {static_cast<int>(group_size)}};
  for (int i = 0; i < num_counts; ++i) result.held[i + 1] = static_cast<int>(schedule[i]);
  if (result.held[num_counts] == 1) result.num_levels += static_cast<int>(doublings);
  return result;
}

// Where a group lies: a page, and its first slot there.
struct Place {
  int64_t page, slot;
};

template <typename T>
__device__ Place place_of(
    const Cache<T>& cache, const BlockTable& table, const Schedule& schedule, int64_t request, int64_t group) {
  const int64_t groups_per_page = cache.page_size / schedule.group_size;
  return {table.page(request, group / groups_per_page), group % groups_per_page * schedule.group_size};
}

// A level word, bounded against stale bytes.
__device__ inline int bounded_level(float word, const Schedule& schedule) {
  // NaN and infinity count as raw, as in the reference.
  if (!(word >= 1.0f && word <= FLT_MAX)) return 0;
  return word < static_cast<float>(schedule.num_levels) ? static_cast<int>(word) : schedule.num_levels;
}

// The group's level. All heads of a group have the same; head 0 is read.
template <typename T>
__device__ int level_at(const Cache<T>& cache, Place at, const Schedule& schedule) {
  return bounded_level(cache.state(at.page, 0, at.slot)->level, schedule);
}

}  // namespace qm_spec
