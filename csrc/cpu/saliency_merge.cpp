// saliency_merge: x_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j, of tokens [B, N, D], masses [B, N] and the
// slot of each token [B, N], -1 at padding, to [B, K, D], sizes [B, K] and summed masses [B, K].
// Source: QuickMerge++, arXiv 2508.13204; reference in qm_spec/ops/saliency_merge.py.
#include <tuple>

#include "csrc/cpu/group_means.h"

namespace qm_spec {
namespace {

std::tuple<Tensor, Tensor, Tensor> saliency_merge(Tensor tokens, Tensor mass, Tensor cluster, int64_t num_slots) {
  tokens = torch::stable::contiguous(tokens);
  mass = torch::stable::contiguous(mass);
  cluster = torch::stable::contiguous(cluster);
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1), dim = tokens.size(2);
  Tensor merged = torch::stable::new_empty(tokens, {batch, num_slots, dim});
  Tensor sizes = torch::stable::new_empty(mass, {batch, num_slots});
  Tensor masses = torch::stable::new_empty(mass, {batch, num_slots});
  const Groups groups(
      static_cast<const int64_t*>(cluster.data_ptr()), batch, num_tokens, num_slots, "saliency_merge");
  float* size = static_cast<float*>(sizes.data_ptr());
  for (int64_t k = 0; k < groups.num_groups; ++k) size[k] = static_cast<float>(groups.begin[k + 1] - groups.begin[k]);
  group_means(
      groups, FloatRows(tokens, "saliency_merge"), static_cast<const float*>(mass.data_ptr()), dim,
      FloatRowsOut(merged, "saliency_merge"), static_cast<float*>(masses.data_ptr()));
  return {merged, sizes, masses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("saliency_merge", TORCH_BOX(&saliency_merge));
}

}  // namespace qm_spec
