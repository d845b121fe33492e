// The entries that a request attends to, found by walking its groups; as in qm_spec/ops/entries.py.
//
// Past one entry per group a span of 2, 4, 8... groups has one entry, in the first slot of its first group. The walk
// steps over the span's other groups and reads of them the last one's state at most, so it costs time by the entries and
// not by the tokens.
#pragma once

#include <algorithm>
#include <cmath>

#include "csrc/cpu/page.h"
#include "csrc/merge_config.h"

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
    const int64_t of_table = column(group), page = pages_[of_table];
    STD_TORCH_CHECK(
        page >= 0 && page < cache_.num_pages,
        "block_table: pages must be in 0..", cache_.num_pages - 1, ", got ", page, " for group ", group);
    return {page, (group - of_table * groups_per_page_) * config_.group_size};
  }

  // The group's level, bounded to 0..L. All heads of a group have the same; head 0 is read.
  static int64_t level(const SlotState& first, const MergeConfig& config) {
    if (!std::isfinite(first.level) || first.level < 1.0f) return 0;
    return static_cast<int64_t>(std::min(first.level, static_cast<float>(config.num_levels)));
  }
  SlotState state(const Place& at) const { return cache_.state(at.page, 0, at.slot); }
  SlotState first_state(int64_t group) const { return state(place(group)); }

  // Fetch the state that `first_state` reads. Inlined by force: GCC drops calls of a function that does nothing else.
  QM_INLINE void prefetch(int64_t group) const {
    const int64_t of_table = column(group), page = pages_[of_table];
    // What is wrong with the table is said when the group is read.
    if (page < 0 || page >= cache_.num_pages) return;
    __builtin_prefetch(cache_.state_bytes(page, 0, (group - of_table * groups_per_page_) * config_.group_size));
  }

  // Whether the 2^log2 groups from `group` on, whose first one has the level of such a span, are one span.
  //
  // The first group has the level even where this request parts from the one that merged it (they share its first
  // pages only), and then its own groups behind are alive. Inside a page they cannot part: pages are written from the
  // front and shared whole. Else the span is whole if its last group bears the mark: whoever merged it had this last
  // group, and with it every page of the span, for pages are shared from the front.
  bool is_span(int64_t group, int64_t log2) const {
    const int64_t last = group + (int64_t{1} << log2) - 1;
    if (column(group) == column(last)) return true;
    const SlotState state = first_state(last);
    return !(state.count > 0.0f) && level(state, config_) >= config_.schedule_levels + log2;
  }

  // The groups that the walk steps over from `group` on, which has the level of a span of 2^log2: all of it where it is
  // whole, else the largest part that is. No group from `end` on is read.
  int64_t step(int64_t group, int64_t log2, int64_t end) const {
    while (log2 > 0 && ((group & ((int64_t{1} << log2) - 1)) || group + (int64_t{1} << log2) > end ||
                        !is_span(group, log2)))
      --log2;
    return int64_t{1} << log2;
  }

 private:
  // Of the block table; a division costs as much as all the rest of a step.
  int64_t column(int64_t group) const { return is_power_ ? group >> shift_ : group / groups_per_page_; }

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
  const int64_t size = config.group_size, whole = num_tokens / size, end = whole + (num_tokens % size > 0);
  // What follows from a level is kept while neighbours have the same: the next step's address does not wait for the
  // word of the one before.
  float word = NAN;
  int64_t level = 0, held = 0, log2 = 0;
  for (int64_t group = 0; group < end;) {
    const Place at = groups.place(group);
    const SlotState first = groups.state(at);
    if (first.level != word) {
      word = first.level, level = RequestGroups::level(first, config);
      held = config.held(level), log2 = config.span_log2(level);
    }
    // Nothing behind the request's tokens is seen.
    const int64_t tokens = num_tokens - group * size;
    if (level == 0) {
      visit(EntryRun{at.page, at.slot, std::min(size, tokens), group * size});
      ++group;
      continue;
    }
    // Of a span only the first group holds an entry.
    if (held > 0 && (level <= config.schedule_levels || first.count > 0.0f))
      visit(EntryRun{at.page, at.slot, std::min(held, tokens), -1});
    group += groups.step(group, log2, whole);
  }
}

// The count of a merged entry in attention, where a span of groups counts as one group; stale bytes do no harm.
inline float bounded_count(float count, const MergeConfig& config) {
  return std::isfinite(count) ? std::clamp(count, 0.0f, static_cast<float>(config.group_size)) : 0.0f;
}

}  // namespace qm_spec
