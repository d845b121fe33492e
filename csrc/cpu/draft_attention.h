// Attention of one draft row to a request's entries, read where they stand in their pages, and to what it drafted.
#pragma once

#include <vector>

#include "csrc/cpu/entries.h"

namespace qm_spec {

// The entries of one request, found once for all draft steps.
class DraftMemory {
 public:
  // Find the entries of the first `num_tokens` tokens. The cache must outlive this.
  DraftMemory(const PagedCache& cache, const MergeConfig& config, Integers pages, int64_t num_tokens);

  int64_t num_entries() const { return static_cast<int64_t>(distance_.size()); }

  // out = softmax(scores) values of one query head.
  //
  // Scores are query . key plus -slope * distance at raw entries, `step` draft steps later, and at drafted tokens, or
  // far_bias + log(min(count, group_size)) at merged entries. Without an entry and a drafted token, out is 0.
  //
  //   query    [d], already divided by sqrt(d)
  //   head     the key/value head
  //   drafted  keys [step, d] and values [step, d] of the tokens drafted so far, `drafted_stride` apart
  //   weights  [entries + step], scratch
  void attend(
      const float* query, int64_t head, float slope, float far_bias, int64_t step, const float* drafted_keys,
      const float* drafted_values, int64_t drafted_stride, float* weights, float* out) const;

 private:
  const PagedCache* cache_;
  // Per entry: tokens behind the newest one where raw, else -1.
  std::vector<float> distance_;
  // [G, E]: the entry's key, and the logarithm of its count.
  std::vector<const void*> keys_;
  std::vector<float> log_count_;
};

}  // namespace qm_spec
