// cosine_similarity: the operator; formula, shapes, source and kernel stand in cosine_similarity.cuh.
#include "csrc/cuda/cosine_similarity.cuh"

#include "csrc/cuda/tokens_launch.cuh"

namespace qm_spec {
namespace {

Tensor cosine_similarity_cuda(Tensor tokens) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  tokens = torch::stable::contiguous(tokens);
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1);
  // Tiles of rows are a dimension of the grid.
  STD_TORCH_CHECK(
      num_tokens <= 65535 * kSide, "cosine_similarity: at most ", 65535 * kSide, " tokens, got ", num_tokens);
  Tensor similarity = torch::stable::new_empty(tokens, {batch, num_tokens, num_tokens});
  Tensor norms = torch::stable::new_empty(tokens, {batch, num_tokens}, ScalarType::Float);
  const Launcher launch(tokens.get_device_index());
  dispatch_tokens(tokens, "cosine_similarity", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cosine_similarity(launch, sequences<T>(tokens), data<float>(norms), data<T>(similarity));
  });
  return similarity;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) { m.impl("cosine_similarity", TORCH_BOX(&cosine_similarity_cuda)); }

}  // namespace qm_spec
