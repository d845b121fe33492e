// When groups and spans of groups merge, as in qm_spec/config.py.
#pragma once

#include <algorithm>
#include <vector>

#include "csrc/cpu/kernel.h"

namespace qm_spec {

// Level 0 is raw; levels 1..schedule_levels leave schedule[level - 1] entries of each group; at each level above,
// the one entry of a span of groups joins that of the span beside it.
struct MergeConfig {
  MergeConfig(int64_t window, int64_t group_size, const std::vector<int64_t>& schedule, int64_t doublings)
      : window(window),
        group_size(group_size),
        schedule_levels(static_cast<int64_t>(schedule.size())),
        num_levels(schedule_levels + (!schedule.empty() && schedule.back() == 1 ? doublings : 0)),
        held_(schedule) {
    held_.insert(held_.begin(), group_size);
    const bool falls = std::is_sorted(held_.rbegin(), held_.rend()) && held_.back() >= 0;
    STD_TORCH_CHECK(
        window > 0 && !schedule.empty() && falls && doublings >= 0 && doublings <= 16,
        "MergeConfig: window, group_size, schedule and doublings are out of range");
  }

  const int64_t window, group_size, schedule_levels, num_levels;

  // Entries of one group at a level; past the schedule, of one span.
  int64_t held(int64_t level) const { return level <= schedule_levels ? held_[level] : 1; }
  // The binary logarithm of the groups that an entry spans at a level.
  int64_t span_log2(int64_t level) const { return std::max<int64_t>(0, level - schedule_levels); }
  // The binary logarithm of the windows that must follow; past the schedule two levels share a distance.
  int64_t distance_log2(int64_t level) const { return level - 1 - span_log2(level) / 2; }
  // Groups, counted from position 0, that are old enough for a level; a multiple of its span.
  int64_t groups_due(int64_t level, int64_t frontier) const {
    const int64_t tokens = frontier - (window << distance_log2(level));
    return tokens < 0 ? 0 : tokens / group_size >> span_log2(level) << span_log2(level);
  }

 private:
  std::vector<int64_t> held_;
};

}  // namespace qm_spec
