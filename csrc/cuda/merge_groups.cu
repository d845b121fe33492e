// merge_groups_: the operator; formulas, shapes, source and kernels stand in merge_groups.cuh.
#include "csrc/cuda/merge_groups.cuh"

#include "csrc/cuda/launch.cuh"

namespace qm_spec {
namespace {

constexpr char kOp[] = "merge_groups_";

void merge_groups_cuda(
    Tensor cache, Tensor block_table, Tensor frontier, int64_t head_dim, std::vector<int64_t> packed) {
  const MergeConfig config(packed);
  const BlockTable table = block_table_view(block_table, cache, kOp);
  const Integers frontiers = integers(frontier, cache, kOp, "frontier");
  STD_TORCH_CHECK(
      frontier.size(0) == table.num_requests,
      kOp, ": frontier must be [", table.num_requests, "], got [", frontier.size(0), "]");
  STD_TORCH_CHECK(
      cache.size(2) % config.group_size == 0,
      kOp, ": group_size ", config.group_size, " must divide the page size ", cache.size(2));
  if (block_table.numel() == 0 || cache.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  const Launcher launch(cache.get_device_index());
  dispatch(cache, kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    merge_groups(launch, Merge<T>{cache_view<T>(cache, head_dim, kOp), table, frontiers, config});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) { m.impl("merge_groups_", TORCH_BOX(&merge_groups_cuda)); }

}  // namespace qm_spec
