// saliency_merge: x_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j, of tokens [B, N, D], masses [B, N] and the
// slot of each token [B, N], -1 at padding, to [B, K, D], sizes [B, K] and summed masses [B, K].
// Source: QuickMerge++, arXiv 2508.13204; reference in qm_spec/ops/saliency_merge.py.
//
// The tokens of each slot are listed first (counting sort), so every slot is one task's own: no races, the same
// order of additions for any number of threads, and each token is read once.
#include <algorithm>
#include <tuple>
#include <vector>

#include "csrc/cpu/convert.h"

namespace qm_spec {
namespace {

constexpr int64_t kColumns = 512;
// Additions in a row before a partial sum is put away, which keeps the error of long sums small.
constexpr int64_t kRun = 64;

QM_MULTIVERSION void add_scaled(const float* x, float scale, int64_t count, float* sum) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += scale * x[i];
}

std::tuple<Tensor, Tensor, Tensor> saliency_merge(Tensor tokens, Tensor mass, Tensor cluster, int64_t num_slots) {
  tokens = torch::stable::contiguous(tokens);
  mass = torch::stable::contiguous(mass);
  cluster = torch::stable::contiguous(cluster);
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1), dim = tokens.size(2);
  Tensor merged = torch::stable::new_empty(tokens, {batch, num_slots, dim});
  Tensor sizes = torch::stable::new_empty(mass, {batch, num_slots});
  Tensor masses = torch::stable::new_empty(mass, {batch, num_slots});
  const FloatRows x(tokens, "saliency_merge");
  const FloatRowsOut out(merged, "saliency_merge");
  const float* m = static_cast<const float*>(mass.data_ptr());
  const int64_t* slot = static_cast<const int64_t*>(cluster.data_ptr());
  float* size_out = static_cast<float*>(sizes.data_ptr());
  float* mass_out = static_cast<float*>(masses.data_ptr());

  std::vector<int64_t> begin(batch * num_slots + 1, 0), member(batch * num_tokens);
  for (int64_t i = 0; i < batch * num_tokens; ++i) {
    STD_TORCH_CHECK(
        slot[i] >= -1 && slot[i] < num_slots,
        "saliency_merge: cluster must be in -1..", num_slots - 1, ", got ", slot[i]);
    if (slot[i] >= 0) ++begin[i / num_tokens * num_slots + slot[i] + 1];
  }
  for (int64_t k = 0; k < batch * num_slots; ++k) begin[k + 1] += begin[k];
  std::vector<int64_t> next(begin.begin(), begin.end());
  for (int64_t i = 0; i < batch * num_tokens; ++i)
    if (slot[i] >= 0) member[next[i / num_tokens * num_slots + slot[i]]++] = i;

  const int64_t chunks = std::max<int64_t>(1, (dim + kColumns - 1) / kColumns);
  torch::stable::parallel_for(0, batch * num_slots * chunks, 8, [&](int64_t first, int64_t last) {
    const Scratch scratch(3 * kColumns);
    float *sum = scratch.get(), *run = sum + kColumns, *row = run + kColumns;
    for (int64_t task = first; task < last; ++task) {
      const int64_t k = task / chunks, column = task % chunks * kColumns;
      const int64_t count = std::min(kColumns, dim - column);
      double total = 0;
      for (int64_t i = begin[k]; i < begin[k + 1]; ++i) total += m[member[i]];
      if (column == 0) {
        size_out[k] = static_cast<float>(begin[k + 1] - begin[k]);
        mass_out[k] = static_cast<float>(total);
      }
      std::fill(sum, sum + kColumns, 0.0f);
      for (int64_t i = begin[k]; i < begin[k + 1];) {
        const int64_t end = std::min(i + kRun, begin[k + 1]);
        std::fill(run, run + kColumns, 0.0f);
        for (; i < end; ++i) {
          // Divided first, so that a group of one is copied bit by bit.
          const float share = total == 0 ? 0.0f : static_cast<float>(m[member[i]] / total);
          add_scaled(x.read(member[i] * dim + column, count, row), share, count, run);
        }
        add_scaled(run, 1.0f, count, sum);
      }
      out.write(k * dim + column, count, sum);
    }
  });
  return {merged, sizes, masses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("saliency_merge", TORCH_BOX(&saliency_merge));
}

}  // namespace qm_spec
