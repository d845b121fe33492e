// attention_entropy: the operator; formula, shapes, source and kernel stand in attention_entropy.cuh.
#include "csrc/cuda/attention_entropy.cuh"

#include "csrc/cuda/tokens_launch.cuh"

namespace qm_spec {
namespace {

Tensor attention_entropy_cuda(Tensor tokens, bool causal) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  tokens = torch::stable::contiguous(tokens);
  Tensor entropy = torch::stable::new_empty(tokens, {tokens.size(0), tokens.size(1)}, ScalarType::Float);
  const Launcher launch(tokens.get_device_index());
  dispatch_tokens(tokens, "attention_entropy", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    attention_entropy(launch, sequences<T>(tokens), causal, data<float>(entropy));
  });
  return entropy;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) { m.impl("attention_entropy", TORCH_BOX(&attention_entropy_cuda)); }

}  // namespace qm_spec
