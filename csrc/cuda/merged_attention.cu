// merged_attention: the operator; formulas, shapes, source and kernels stand in merged_attention.cuh.
#include "csrc/cuda/merged_attention.cuh"

#include <tuple>

#include "csrc/cuda/launch.cuh"

namespace qm_spec {
namespace {

constexpr char kOp[] = "merged_attention";

Tensor per_head(const Tensor& tensor, const Tensor& cache, const char* name) {
  check_device(tensor, cache, kOp, name);
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

std::tuple<Tensor, Tensor, Tensor> merged_attention_cuda(
    Tensor query, Tensor cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor slopes,
    Tensor far_bias, int64_t max_rows, std::vector<int64_t> packed) {
  const MergeConfig config(packed);
  check_device(query, cache, kOp, "query");
  const int64_t num_rows = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  STD_TORCH_CHECK(
      query.scalar_type() == cache.scalar_type() && query.stride(2) == 1,
      kOp, ": query must have the dtype of the cache and a contiguous last dimension; convert it first");
  STD_TORCH_CHECK(
      head_dim % 4 == 0 && head_dim > 0 && head_dim <= kMostDim,
      kOp, ": the head size must be a multiple of 4 up to ", kMostDim, ", got ", head_dim);
  STD_TORCH_CHECK(
      cache.size(2) % config.group_size == 0,
      kOp, ": group_size ", config.group_size, " must divide the page size ", cache.size(2));
  const BlockTable table = block_table_view(block_table, cache, kOp);
  const Integers lengths = integers(seq_lens, cache, kOp, "seq_lens");
  const Integers starts = integers(query_start_loc, cache, kOp, "query_start_loc");
  STD_TORCH_CHECK(
      seq_lens.size(0) == table.num_requests,
      kOp, ": seq_lens must be [", table.num_requests, "], got [", seq_lens.size(0), "]");
  const torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  slopes = per_head(slopes, cache, "slopes");
  far_bias = per_head(far_bias, cache, "far_bias");
  Tensor output = torch::stable::empty_like(query);
  Tensor lse = torch::stable::new_empty(query, {num_rows, num_heads}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(query, {num_rows, num_heads}, ScalarType::Float);
  if (num_rows == 0 || num_heads == 0) return {output, lse, entropy};

  max_rows = larger<int64_t>(0, smaller(max_rows, num_rows));
  const int64_t tiles = num_query_tiles(max_rows, num_heads / cache.size(1));
  const int splits = choose_splits(
      table.num_columns * cache.size(2) / config.group_size, table.num_requests * cache.size(1) * tiles);
  const int64_t parts = table.num_requests * max_rows * num_heads * splits;
  Tensor partial_values = torch::stable::new_empty(query, {parts, head_dim}, ScalarType::Float);
  Tensor partial_stats = torch::stable::new_empty(query, {parts, 3}, ScalarType::Float);
  const Launcher launch(cache.get_device_index());
  dispatch(cache, kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Attention<T> to{};
    to.cache = cache_view<T>(cache, head_dim, kOp);
    to.table = table;
    to.seq_lens = lengths;
    to.query_start_loc = starts;
    to.config = config;
    to.query = static_cast<const T*>(query.data_ptr());
    to.output = static_cast<T*>(output.data_ptr());
    to.query_row_stride = query.stride(0);
    to.query_head_stride = query.stride(1);
    to.output_row_stride = output.stride(0);
    to.output_head_stride = output.stride(1);
    to.num_rows = num_rows;
    to.num_heads = num_heads;
    to.max_rows = max_rows;
    to.slopes = static_cast<const float*>(slopes.data_ptr());
    to.far_bias = static_cast<const float*>(far_bias.data_ptr());
    to.lse = static_cast<float*>(lse.data_ptr());
    to.entropy = static_cast<float*>(entropy.data_ptr());
    to.partial_values = static_cast<float*>(partial_values.data_ptr());
    to.partial_stats = static_cast<Stats*>(partial_stats.data_ptr());
    to.num_splits = splits;
    merged_attention(launch, to);
  });
  return {output, lse, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) { m.impl("merged_attention", TORCH_BOX(&merged_attention_cuda)); }

}  // namespace qm_spec
