// append_kv_: the operator; formula, shapes, source and kernel stand in append_kv.cuh.
#include "csrc/cuda/append_kv.cuh"

#include "csrc/cuda/launch.cuh"

namespace qm_spec {
namespace {

constexpr char kOp[] = "append_kv_";

template <typename T>
Rows<const T> rows_view(const Tensor& rows, const Tensor& cache, const char* name) {
  check_device(rows, cache, kOp, name);
  STD_TORCH_CHECK(
      rows.scalar_type() == cache.scalar_type() && rows.stride(2) == 1,
      kOp, ": ", name, " must have the dtype of the cache and a contiguous last dimension; convert it first");
  return {static_cast<const T*>(rows.data_ptr()), rows.stride(0), rows.stride(1), starts_at_multiple(rows, 4)};
}

void append_kv_cuda(Tensor cache, Tensor key, Tensor value, Tensor slots) {
  check_device(slots, cache, kOp, "slots");
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long, kOp, ": slots must be int64");
  if (slots.numel() == 0 || cache.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  const Launcher launch(cache.get_device_index());
  dispatch(cache, kOp, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    append_kv(
        launch, Append<T>{cache_view<T>(cache, key.size(2), kOp), rows_view<T>(key, cache, "key"),
                          rows_view<T>(value, cache, "value"), static_cast<const int64_t*>(slots.data_ptr()),
                          slots.stride(0), slots.size(0)});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CUDA, m) { m.impl("append_kv_", TORCH_BOX(&append_kv_cuda)); }

}  // namespace qm_spec
