// gumbel_softmax: the operator; formula, shapes, source and kernel stand in gumbel_softmax.cuh.
#include "csrc/cuda/gumbel_softmax.cuh"

#include <tuple>

#include "csrc/cuda/tokens_launch.cuh"

namespace qm_spec {
namespace {

std::tuple<Tensor, Tensor> gumbel_softmax_cuda(
    Tensor logits, double temperature, double noise, int64_t seed, int64_t offset) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  logits = torch::stable::contiguous(logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  Tensor probabilities = torch::stable::empty_like(logits);
  Tensor perturbed = torch::stable::new_empty(logits, {num_rows, num_columns}, ScalarType::Float);
  const Launcher launch(logits.get_device_index());
  // Rows are the first dimension of the grid, which is large.
  dispatch_tokens(torch::stable::unsqueeze(logits, 0), "gumbel_softmax", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gumbel_softmax(
        launch, Gumbel<T>{data<const T>(logits), data<T>(probabilities), data<float>(perturbed), num_rows, num_columns,
                          static_cast<float>(temperature), static_cast<float>(noise), static_cast<uint64_t>(seed),
                          static_cast<uint64_t>(offset)});
  });
  return {probabilities, perturbed};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) { m.impl("gumbel_softmax", TORCH_BOX(&gumbel_softmax_cuda)); }

}  // namespace qm_spec
