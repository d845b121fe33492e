// Means of groups of rows, weighted by mass: what saliency_merge and weighted_kmeans_update have in common.
#pragma once

#include "csrc/cpu/convert.h"

namespace qm_spec {

// The slots of B sequences of N tokens, and who belongs to them.
struct Groups {
  // `slot` is [batch, num_tokens], -1 at padding; `op` is named where it holds anything outside -1..num_slots-1.
  Groups(const int64_t* slot, int64_t batch, int64_t num_tokens, int64_t num_slots, const char* op);

  int64_t num_tokens, num_slots;  // of a sequence
  int64_t num_groups;  // batch * num_slots
  std::unique_ptr<int64_t[]> group;  // [batch * num_tokens]: of each token, -1 at padding
  std::unique_ptr<int64_t[]> begin;  // [num_groups + 1], into `member`
  std::unique_ptr<int64_t[]> member;  // tokens, counted over all sequences, of each group in their order
};

// Write sum_j m_j x_j / sum_j m_j of each group to `out` [num_groups, dim], and its sum of masses to `masses`
// [num_groups] unless that is null; 0 where there are no members or no mass.
void group_means(
    const Groups& groups, const FloatRows& x, const float* mass, int64_t dim, const FloatRowsOut& out, float* masses);

}  // namespace qm_spec
