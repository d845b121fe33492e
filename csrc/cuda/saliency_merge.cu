// saliency_merge: the operator; formula, shapes, source and kernel stand in saliency_merge.cuh.
#include "csrc/cuda/saliency_merge.cuh"

#include <tuple>

#include "csrc/cuda/tokens_launch.cuh"

namespace qm_spec {
namespace {

constexpr char kOp[] = "saliency_merge";

std::tuple<Tensor, Tensor, Tensor> saliency_merge_cuda(
    Tensor tokens, Tensor mass, Tensor cluster, int64_t num_slots) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  tokens = torch::stable::contiguous(tokens);
  mass = beside(mass, tokens, kOp, "mass");
  cluster = beside(cluster, tokens, kOp, "cluster");
  Tensor merged = torch::stable::new_empty(tokens, {tokens.size(0), num_slots, tokens.size(2)});
  Tensor sizes = torch::stable::new_empty(mass, {tokens.size(0), num_slots});
  Tensor masses = torch::stable::new_empty(mass, {tokens.size(0), num_slots});
  const Launcher launch(tokens.get_device_index());
  dispatch_tokens(tokens, kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    saliency_merge(
        launch, MergeSlots<T, T>{sequences<T>(tokens), data<const float>(mass), data<const int64_t>(cluster), num_slots,
                                 data<T>(merged), data<float>(sizes), data<float>(masses)});
  });
  return {merged, sizes, masses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) { m.impl("saliency_merge", TORCH_BOX(&saliency_merge_cuda)); }

}  // namespace qm_spec
