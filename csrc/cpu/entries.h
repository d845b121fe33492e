// The entries that a request attends to, found by walking its groups; as in qm_spec/ops/entries.py.
//
// Past one entry per group a span of 2, 4, 8... groups has one entry, in the first slot of its first group. The walk
// steps over the span's other groups without reading them, so it costs time by the entries and not by the tokens.
#pragma once

#include <algorithm>
#include <cmath>

#include "csrc/cpu/merge_config.h"
#include "csrc/cpu/page.h"

namespace qm_spec {

// Where a group lies.
struct Place {
  int64_t page, slot;
};

// The groups of one request, counted from position 0.
class RequestGroups {
 public:
  // Everything must outlive this. No table column past ceil(tokens / P) is read as long as no such group is asked for.
  RequestGroups(const PagedCache& cache, const MergeConfig& config, Integers pages)
      : cache_(cache), config_(config), pages_(pages), groups_per_page_(cache.page_size / config.group_size) {
    while (int64_t{1} << shift_ < groups_per_page_) ++shift_;
    is_power_ = int64_t{1} << shift_ == groups_per_page_;
  }

  Place place(int64_t group) const {
    // A division costs as much as all the rest of a step.
    const int64_t column = is_power_ ? group >> shift_ : group / groups_per_page_;
    const int64_t page = pages_[column];
    STD_TORCH_CHECK(
        page >= 0 && page < cache_.num_pages,
        "block_table: pages must be in 0..", cache_.num_pages - 1, ", got ", page, " for group ", group);
    return {page, (group - column * groups_per_page_) * config_.group_size};
  }

  // The group's level, bounded to 0..L. All heads of a group have the same; head 0 is read.
  static int64_t level(const SlotState& first, const MergeConfig& config) {
    if (!std::isfinite(first.level) || first.level < 1.0f) return 0;
    return static_cast<int64_t>(std::min(first.level, static_cast<float>(config.num_levels)));
  }
  SlotState first_state(int64_t group) const {
    const Place at = place(group);
    return cache_.state(at.page, 0, at.slot);
  }

  // Fetch the state that `first_state` reads.
  void prefetch(int64_t group) const {
    const int64_t column = is_power_ ? group >> shift_ : group / groups_per_page_, page = pages_[column];
    // What is wrong with the table is said when the group is read.
    if (page < 0 || page >= cache_.num_pages) return;
    __builtin_prefetch(cache_.state_bytes(page, 0, (group - column * groups_per_page_) * config_.group_size));
  }

  // Whether the 2^log2 groups from `group` on are one span, of which only `group` can have an entry.
  //
  // The span's head has the level even where this request parts from the one that merged it (they share its first
  // pages only), and then its own groups behind are alive. It is whole if its last group was merged into the one
  // before, those two into the two before and so on up to the head: then whoever merged it had this last group, and
  // with it every page of the span, for pages are shared from the front.
  bool is_span(int64_t group, int64_t log2) const {
    for (int64_t i = 0; i < log2; ++i) {
      const SlotState tail = first_state(group + (int64_t{1} << log2) - (int64_t{1} << i));
      if (tail.count > 0.0f || level(tail, config_) <= config_.schedule_levels + i) return false;
    }
    return true;
  }

  // The groups that the walk steps over from `group` on: 2^j of a whole span, else the largest part of it that is one.
  // `first` is the group's state, and no group from `end` on is read.
  int64_t step(int64_t group, const SlotState& first, int64_t end) const {
    int64_t log2 = config_.span_log2(level(first, config_));
    while (log2 > 0 && ((group & ((int64_t{1} << log2) - 1)) || group + (int64_t{1} << log2) > end ||
                        !is_span(group, log2)))
      --log2;
    return int64_t{1} << log2;
  }

 private:
  const PagedCache& cache_;
  const MergeConfig& config_;
  Integers pages_;
  int64_t groups_per_page_;
  int shift_ = 0;
  bool is_power_;
};

// Neighbouring slots of one group that hold entries, the same for every KV head.
struct EntryRun {
  int64_t page, slot, length;
  int64_t position;  // of the first token where raw, else -1: merged entries have no position
};

// Call `visit(const EntryRun&)` for every run of entries among the request's first `num_tokens` tokens, oldest first.
template <class Visit>
void walk_entries(const RequestGroups& groups, const MergeConfig& config, int64_t num_tokens, Visit&& visit) {
  const int64_t size = config.group_size, end = (num_tokens + size - 1) / size;
  for (int64_t group = 0; group < end;) {
    const Place at = groups.place(group);
    const SlotState first = groups.first_state(group);
    const int64_t level = RequestGroups::level(first, config);
    // Nothing behind the request's tokens is seen.
    const int64_t tokens = num_tokens - group * size;
    if (level == 0) {
      visit(EntryRun{at.page, at.slot, std::min(size, tokens), group * size});
      ++group;
      continue;
    }
    // Of a span only the first group holds an entry.
    const int64_t held = level > config.schedule_levels && !(first.count > 0.0f) ? 0 : config.held(level);
    if (held > 0) visit(EntryRun{at.page, at.slot, std::min(held, tokens), -1});
    group += groups.step(group, first, num_tokens / size);
  }
}

// The count of a merged entry, bounded against stale bytes.
inline float bounded_count(float count, const MergeConfig& config) {
  return std::isfinite(count) ? std::clamp(count, 0.0f, config.largest_count()) : 0.0f;
}

}  // namespace qm_spec
