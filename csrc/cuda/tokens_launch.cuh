// What the host side of the kernels of whole sequences uses: tensors as the kernels see them.
#pragma once

#include "csrc/cuda/launch.cuh"
#include "csrc/cuda/tokens.cuh"

namespace qm_spec {

// Call `run(T*)` with the element type of the tokens.
template <class Run>
void dispatch_tokens(const Tensor& tokens, const char* op, Run&& run) {
  // The batch is a dimension of the grid.
  STD_TORCH_CHECK(tokens.size(0) < 65536, op, ": the batch must be below 65536, got ", tokens.size(0));
  switch (tokens.scalar_type()) {
    case ScalarType::Float: return run(static_cast<float*>(nullptr));
    case ScalarType::Half: return run(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16: return run(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Double: return run(static_cast<double*>(nullptr));
    default:
      STD_TORCH_CHECK(
          false, op, ": the kernel takes float16, bfloat16, float32 or float64, got scalar type ",
          static_cast<int>(tokens.scalar_type()));
  }
}

// A contiguous tensor on the device of `tokens`.
inline Tensor beside(const Tensor& tensor, const Tensor& tokens, const char* op, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == tokens.get_device_index(),
      op, ": ", name, " must be on cuda:", tokens.get_device_index());
  return torch::stable::contiguous(tensor);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
Sequences<const T> sequences(const Tensor& tensor) {
  return {data<const T>(tensor), tensor.size(0), tensor.size(1), tensor.size(2)};
}

}  // namespace qm_spec
