// The settings of the merged cache, as `MergeConfig.pack` of qm_spec/config.py packs them, and when groups and spans of
// groups merge. Shared by the kernels of all devices, so without torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define QM_HOST_DEVICE __host__ __device__
#else
#define QM_HOST_DEVICE
#endif

namespace qm_spec {

// Level 0 is raw; levels 1..schedule_levels leave held(level) entries of each group; at each level above, the one entry
// of a span of groups joins that of the span beside it.
class MergeConfig {
 public:
  MergeConfig() = default;

  // From the number of levels of the schedule, the schedule, and the six settings below.
  explicit MergeConfig(const std::vector<int64_t>& packed) {
    const int64_t levels = packed.empty() ? 0 : packed[0];
    check(levels >= 1 && levels <= kMostLevels && static_cast<int64_t>(packed.size()) == levels + 7,
          "another version of qm_spec packed it; build the kernels again");
    const int64_t* setting = packed.data() + 1 + levels;
    window = setting[0];
    group_size = setting[1];
    const int64_t doublings = setting[2], saliency = setting[3];
    temperature = static_cast<float>(to_double(setting[4]));
    epsilon = static_cast<float>(to_double(setting[5]));
    check(group_size >= 2 && group_size <= 256 && window >= group_size + 2 && window <= 1 << 20,
          "window or group_size is out of range");
    held_[0] = static_cast<int>(group_size);
    for (int64_t level = 1; level <= levels; ++level) {
      const int64_t count = packed[level];
      check(count < held_[level - 1] && (count >= 1 || (count == 0 && levels == 1)), "schedule must fall to 1 or more");
      held_[level] = static_cast<int>(count);
    }
    check(doublings >= 0 && doublings <= 16, "doublings is out of range");
    schedule_levels = static_cast<int>(levels);
    num_levels = schedule_levels + (held_[levels] == 1 ? static_cast<int>(doublings) : 0);
    // In the order of SALIENCIES: entropy, inverse_entropy.
    check(saliency == 0 || saliency == 1, "the kernels do not know saliency " + std::to_string(saliency));
    entropy_sign = saliency == 0 ? 1.0f : -1.0f;
    check(temperature > 0 && epsilon > 0 && epsilon < 1, "temperature or epsilon is out of range");
  }

  int64_t window, group_size;
  int schedule_levels, num_levels;
  float entropy_sign;  // 1: high entropy is salient, -1: low entropy is
  float temperature, epsilon;

  // Entries of one group at a level; past the schedule, of one span.
  QM_HOST_DEVICE int held(int level) const { return level <= schedule_levels ? held_[level] : 1; }
  // The binary logarithm of the groups that an entry spans at a level.
  QM_HOST_DEVICE int span_log2(int level) const { return level <= schedule_levels ? 0 : level - schedule_levels; }
  // Groups that an entry spans.
  QM_HOST_DEVICE int64_t span(int level) const { return int64_t{1} << span_log2(level); }
  // The binary logarithm of the windows that must follow; past the schedule two levels share a distance.
  QM_HOST_DEVICE int distance_log2(int level) const { return level - 1 - span_log2(level) / 2; }
  // Groups, counted from position 0, that are old enough for a level; a multiple of its span.
  QM_HOST_DEVICE int64_t groups_due(int level, int64_t frontier) const {
    const int64_t tokens = frontier - (window << distance_log2(level));
    return tokens < 0 ? 0 : tokens / group_size >> span_log2(level) << span_log2(level);
  }

 private:
  static constexpr int kMostLevels = 16;

  static void check(bool holds, const std::string& problem) {
    if (!holds) throw std::runtime_error("MergeConfig: " + problem);
  }
  static double to_double(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  int held_[kMostLevels + 1];
};

}  // namespace qm_spec
