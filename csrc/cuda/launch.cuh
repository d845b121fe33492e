// What the host side of every kernel of the merged cache uses: tensors as the kernels see them, and the launch.
#pragma once

// Without it torch's headers leave out what they know of CUDA.
#ifndef USE_CUDA
#define USE_CUDA
#endif

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "csrc/cuda/groups.cuh"

namespace qm_spec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Launches kernels on the current stream of a device.
class Launcher {
 public:
  explicit Launcher(int32_t device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  template <class... Parameters>
  void operator()(
      void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Parameters... arguments) const {
    // A block gets more than 48 KiB of shared memory only if it says so.
    if (shared_bytes > 48 * 1024)
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(shared_bytes)));
    kernel<<<grid, block, shared_bytes, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  cudaStream_t stream_;
};

// Call `run(T*)` with the element type of the cache.
template <class Run>
void dispatch(const Tensor& cache, const char* op, Run&& run) {
  switch (cache.scalar_type()) {
    case ScalarType::Float: return run(static_cast<float*>(nullptr));
    case ScalarType::Half: return run(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16: return run(static_cast<__nv_bfloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(
          false, op, ": the cache must be float32, float16 or bfloat16, got scalar type ",
          static_cast<int>(cache.scalar_type()));
  }
}

inline void check_device(const Tensor& tensor, const Tensor& cache, const char* op, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == cache.get_device_index(),
      op, ": ", name, " must be on the device of the cache, cuda:", cache.get_device_index());
}

inline bool starts_at_multiple(const Tensor& tensor, int64_t elements) {
  bool result = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % (elements * tensor.element_size()) == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) result = result && tensor.stride(i) % elements == 0;
  return result;
}

template <typename T>
Cache<T> cache_view(const Tensor& cache, int64_t head_dim, const char* op) {
  const int64_t elements = 2 * head_dim + static_cast<int64_t>(sizeof(SlotState) / sizeof(T));
  STD_TORCH_CHECK(
      cache.dim() == 4 && cache.size(3) == elements && cache.stride(3) == 1,
      op, ": the cache must be [pages, G, P, ", elements, "] with a contiguous last dimension");
  STD_TORCH_CHECK(
      starts_at_multiple(cache, sizeof(float) / sizeof(T)),
      op, ": every slot of the cache must begin at a multiple of 4 bytes");
  return {static_cast<T*>(cache.data_ptr()), cache.size(0), cache.size(1), cache.size(2), head_dim,
          cache.stride(0), cache.stride(1), cache.stride(2), starts_at_multiple(cache, 4)};
}

inline Integers integers(const Tensor& tensor, const Tensor& cache, const char* op, const char* name) {
  check_device(tensor, cache, op, name);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1,
      op, ": ", name, " must be one-dimensional and int32");
  return {static_cast<const int32_t*>(tensor.data_ptr()), tensor.stride(0)};
}

inline BlockTable block_table_view(const Tensor& table, const Tensor& cache, const char* op) {
  check_device(table, cache, op, "block_table");
  // Requests are a dimension of the grid.
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Int && table.dim() == 2 && table.size(0) < 65536,
      op, ": block_table must be [B, columns] int32 with B below 65536");
  return {static_cast<const int32_t*>(table.data_ptr()), table.size(0), table.size(1), table.stride(0),
          table.stride(1)};
}

}  // namespace qm_spec
