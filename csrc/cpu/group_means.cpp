// The members of each slot are listed first (counting sort), so every slot is one task's own: no races, the same
// order of additions for any number of threads, and each row is read once.
#include "csrc/cpu/group_means.h"

#include <algorithm>

namespace qm_spec {
namespace {

constexpr int64_t kColumns = 512;
// Additions in a row before a partial sum is put away, which keeps the error of long sums small.
constexpr int64_t kRun = 64;

QM_MULTIVERSION void add_scaled(const float* x, float scale, int64_t count, float* sum) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += scale * x[i];
}

}  // namespace

Groups::Groups(const int64_t* slot, int64_t batch, int64_t num_tokens, int64_t num_slots, const char* op)
    : num_groups(batch * num_slots), begin(new int64_t[num_groups + 1]()), member(new int64_t[batch * num_tokens]) {
  // Shifted by one: after the last loop begin[k + 1] is where group k ends, which is where k + 1 begins.
  for (int64_t i = 0; i < batch * num_tokens; ++i) {
    STD_TORCH_CHECK(
        slot[i] >= -1 && slot[i] < num_slots, op, ": cluster must be in -1..", num_slots - 1, ", got ", slot[i]);
    const int64_t next = i / num_tokens * num_slots + slot[i] + 2;
    if (slot[i] >= 0 && next <= num_groups) ++begin[next];
  }
  for (int64_t k = 1; k <= num_groups; ++k) begin[k] += begin[k - 1];
  for (int64_t i = 0; i < batch * num_tokens; ++i)
    if (slot[i] >= 0) member[begin[i / num_tokens * num_slots + slot[i] + 1]++] = i;
}

void group_means(
    const Groups& groups, const FloatRows& x, const float* mass, int64_t dim, const FloatRowsOut& out, float* masses) {
  const int64_t chunks = std::max<int64_t>(1, (dim + kColumns - 1) / kColumns);
  torch::stable::parallel_for(0, groups.num_groups * chunks, 8, [&](int64_t first, int64_t last) {
    const Scratch scratch(3 * kColumns);
    float *sum = scratch.get(), *run = sum + kColumns, *row = run + kColumns;
    for (int64_t task = first; task < last; ++task) {
      const int64_t k = task / chunks, column = task % chunks * kColumns, count = std::min(kColumns, dim - column);
      const int64_t *member = groups.member.get() + groups.begin[k], *end = groups.member.get() + groups.begin[k + 1];
      double total = 0;
      for (const int64_t* i = member; i < end; ++i) total += mass[*i];
      if (column == 0 && masses != nullptr) masses[k] = static_cast<float>(total);
      std::fill(sum, sum + kColumns, 0.0f);
      while (member < end) {
        const int64_t* stop = std::min(member + kRun, end);
        std::fill(run, run + kColumns, 0.0f);
        for (; member < stop; ++member) {
          // Divided first, so that a group of one is copied bit by bit.
          const float share = total == 0 ? 0.0f : static_cast<float>(mass[*member] / total);
          add_scaled(x.read(*member * dim + column, count, row), share, count, run);
        }
        add_scaled(run, 1.0f, count, sum);
      }
      out.write(k * dim + column, count, sum);
    }
  });
}

}  // namespace qm_spec
