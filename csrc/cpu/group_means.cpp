// Every group is one task's own: no races, and the same order of additions for any number of threads. A task sums many
// groups at once and reads their rows in the order in which they stand, each once: memory delivers them up to twice as
// fast as group by group.
#include "csrc/cpu/group_means.h"

#include <algorithm>
#include <vector>

namespace qm_spec {
namespace {

// Additions in a row before a partial sum is put away, which keeps the error of long sums small.
constexpr int64_t kRun = 64;
// Columns, and groups of them, summed at a time: the sums stay in the second-level cache.
constexpr int64_t kColumns = 512;
constexpr int64_t kGroups = 256;
// Rows that are asked for ahead.
constexpr int64_t kAhead = 4;

QM_MULTIVERSION void scale(const float* x, float factor, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = factor * x[i];
}

QM_MULTIVERSION void add_scaled(const float* x, float factor, int64_t count, float* sum) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * x[i];
}

// A sum in runs of kRun rows; nothing needs to be zeroed before.
struct Sum {
  float *total, *run;

  // Add factor * x as the row with this number.
  void add(int64_t number, const float* x, float factor, int64_t count) const {
    if (number % kRun != 0) return add_scaled(x, factor, count, run);
    put_away(number, count);
    scale(x, factor, count, run);
  }

  // The sum of the first `number` rows.
  const float* finish(int64_t number, int64_t count) const {
    if (number == 0) std::fill_n(run, count, 0.0f);
    if (number <= kRun) return run;
    put_away(number, count);
    return total;
  }

 private:
  void put_away(int64_t number, int64_t count) const {
    if (number == kRun) std::copy_n(run, count, total);
    if (number > kRun) add_scaled(run, 1.0f, count, total);
  }
};

}  // namespace

Groups::Groups(const int64_t* slot, int64_t batch, int64_t num_tokens, int64_t num_slots, const char* op)
    : num_tokens(num_tokens), num_slots(num_slots), num_groups(batch * num_slots),
      group(new int64_t[batch * num_tokens]), begin(new int64_t[num_groups + 1]()),
      member(new int64_t[batch * num_tokens]) {
  // Shifted by one: after the last loop begin[k + 1] is where group k ends, which is where k + 1 begins.
  for (int64_t i = 0; i < batch * num_tokens; ++i) {
    STD_TORCH_CHECK(
        slot[i] >= -1 && slot[i] < num_slots, op, ": cluster must be in -1..", num_slots - 1, ", got ", slot[i]);
    group[i] = slot[i] < 0 ? -1 : i / num_tokens * num_slots + slot[i];
    if (slot[i] >= 0 && group[i] + 2 <= num_groups) ++begin[group[i] + 2];
  }
  for (int64_t k = 1; k <= num_groups; ++k) begin[k] += begin[k - 1];
  for (int64_t i = 0; i < batch * num_tokens; ++i)
    if (group[i] >= 0) member[begin[group[i] + 1]++] = i;
}

void group_means(
    const Groups& groups, const FloatRows& x, const float* mass, int64_t dim, const FloatRowsOut& out, float* masses) {
  if (groups.num_groups == 0) return;
  const int64_t num_members = groups.begin[groups.num_groups];
  // Of each member; divided before the sums, so that a group of one is copied bit by bit.
  const Scratch shares(num_members);
  for (int64_t k = 0; k < groups.num_groups; ++k) {
    double total = 0;
    for (int64_t j = groups.begin[k]; j < groups.begin[k + 1]; ++j) total += mass[groups.member[j]];
    for (int64_t j = groups.begin[k]; j < groups.begin[k + 1]; ++j)
      shares.get()[j] = total == 0 ? 0.0f : static_cast<float>(mass[groups.member[j]] / total);
    if (masses != nullptr) masses[k] = static_cast<float>(total);
  }
  // Work is counted in rows, those read and the one written of each group, so that threads have the same of it.
  const int64_t* const begin_of = groups.begin.get();
  const int64_t rows = num_members + groups.num_groups, chunks = (dim + kColumns - 1) / kColumns;
  const auto group_at = [&](int64_t row) {
    int64_t low = 0, high = groups.num_groups;
    while (low < high) {
      const int64_t k = (low + high) / 2;
      if (begin_of[k] + k < row) low = k + 1;
      else high = k;
    }
    return low;
  };
  torch::stable::parallel_for(0, rows * chunks, 64, [&](int64_t begin, int64_t end) {
    const Scratch scratch((2 * kGroups + 1) * kColumns);
    float* const converted = scratch.get() + 2 * kGroups * kColumns;
    std::vector<int64_t> members;
    int64_t next[kGroups];
    while (begin < end) {
      const int64_t column = begin / rows * kColumns, count = std::min(kColumns, dim - column);
      const int64_t first_row = begin % rows, last_row = std::min(rows, first_row + end - begin);
      begin += last_row - first_row;
      const int64_t last_group = group_at(last_row);
      for (int64_t first = group_at(first_row); first < last_group; first += kGroups) {
        const int64_t last = std::min(first + kGroups, last_group);
        // Summed where the result stands, if it may: pages of scratch memory that are not touched cost nothing.
        const auto sum_of = [&](int64_t k) {
          float *total = scratch.get() + (k - first) * kColumns, *run = out.in_place(k * dim + column);
          return Sum{total, run != nullptr ? run : total + kGroups * kColumns};
        };
        const int64_t first_token = first / groups.num_slots * groups.num_tokens;
        const int64_t last_token = ((last - 1) / groups.num_slots + 1) * groups.num_tokens;
        members.resize(last_token - first_token + 1);
        int64_t num = 0;
        for (int64_t i = first_token; i < last_token; ++i) {
          members[num] = i;
          num += groups.group[i] >= first && groups.group[i] < last;
        }
        std::copy_n(begin_of + first, last - first, next);
        for (int64_t j = 0; j < num; ++j) {
          if (j + kAhead < num) x.prefetch(members[j + kAhead] * dim + column, count);
          const int64_t k = groups.group[members[j]], place = next[k - first]++;
          const float* row = x.read(members[j] * dim + column, count, converted);
          sum_of(k).add(place - begin_of[k], row, shares.get()[place], count);
        }
        for (int64_t k = first; k < last; ++k) {
          const float* sum = sum_of(k).finish(begin_of[k + 1] - begin_of[k], count);
          if (sum != out.in_place(k * dim + column)) out.write(k * dim + column, count, sum);
        }
      }
    }
  });
}

}  // namespace qm_spec
