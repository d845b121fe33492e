// Where a request's groups lie, and their levels.
#pragma once

#include "csrc/cuda/page.cuh"
#include "csrc/merge_config.h"

namespace qm_spec {

// Where a group lies: a page, and its first slot there.
struct Place {
  int64_t page, slot;
};

template <typename T>
__device__ Place place_of(
    const Cache<T>& cache, const BlockTable& table, const MergeConfig& config, int64_t request, int64_t group) {
  const int64_t groups_per_page = cache.page_size / config.group_size;
  return {table.page(request, group / groups_per_page), group % groups_per_page * config.group_size};
}

// The level of the schedule that a group should have, 0..schedule_levels.
__device__ inline int level_due(const MergeConfig& config, int64_t group, int64_t frontier) {
  int level = 0;
  while (level < config.schedule_levels && group < config.groups_due(level + 1, frontier)) ++level;
  return level;
}

// A level word, bounded against stale bytes.
__device__ inline int bounded_level(float word, const MergeConfig& config) {
  // NaN and infinity count as raw, as in the reference.
  if (!(word >= 1.0f && word <= FLT_MAX)) return 0;
  return word < static_cast<float>(config.num_levels) ? static_cast<int>(word) : config.num_levels;
}

// The group's level. All heads of a group have the same; head 0 is read.
template <typename T>
__device__ int level_at(const Cache<T>& cache, Place at, const MergeConfig& config) {
  return bounded_level(cache.state(at.page, 0, at.slot)->level, config);
}

}  // namespace qm_spec
