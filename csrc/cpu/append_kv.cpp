// append_kv_: keys and values [T, G, d] of T rows into their slots of the cache, each with mass 1, count 1 and level 0.
// Reference in qm_spec/ops/append_kv.py.
#include "csrc/cpu/append_kv.h"

#include <algorithm>

#include "csrc/cpu/page.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

// What one thread should have to copy before another is woken.
constexpr int64_t kGrainBytes = 64 << 10;

template <class Vec, class From, class To>
QM_INLINE void convert(const char* from, int64_t count, char* to) {
  float row[kLanes];
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t part = std::min(kLanes, count - i);
    load_row<Vec>(reinterpret_cast<const From*>(from) + i, part, row);
    store_row<Vec>(row, part, reinterpret_cast<To*>(to) + i);
  }
}

template <class Vec, class From>
QM_INLINE void convert_to(const char* from, int64_t count, ScalarType type, char* to) {
  if (type == ScalarType::Float) convert<Vec, From, float>(from, count, to);
  if (type == ScalarType::BFloat16) convert<Vec, From, BFloat16>(from, count, to);
  if (type == ScalarType::Half) convert<Vec, From, Float16>(from, count, to);
}

template <class Vec>
QM_INLINE void copy_row(const char* from, ScalarType from_type, int64_t count, ScalarType type, char* to) {
  if (from_type == ScalarType::Float) convert_to<Vec, float>(from, count, type, to);
  if (from_type == ScalarType::BFloat16) convert_to<Vec, BFloat16>(from, count, type, to);
  if (from_type == ScalarType::Half) convert_to<Vec, Float16>(from, count, type, to);
}

// A [T, G, d] tensor whose rows are contiguous.
struct Rows {
  Rows(const Tensor& tensor)
      : tensor(tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor)),
        type(tensor.scalar_type()),
        bytes(type == ScalarType::Float ? 4 : 2) {
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "append_kv_: key and value must be float32, float16 or bfloat16, got scalar type ", static_cast<int>(type));
    data = static_cast<const char*>(this->tensor.data_ptr());
    row_stride = this->tensor.stride(0) * bytes;
    head_stride = this->tensor.stride(1) * bytes;
  }
  const char* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }

  Tensor tensor;
  ScalarType type;
  int64_t bytes, row_stride, head_stride;
  const char* data;
};

}  // namespace

void append_kv(Tensor cache_tensor, Tensor key, Tensor value, Tensor slots) {
  const int64_t num_rows = key.size(0), head_dim = key.size(2);
  STD_TORCH_CHECK(
      value.size(0) == num_rows && value.size(1) == key.size(1) && value.size(2) == head_dim &&
          key.size(1) == cache_tensor.size(1) && slots.size(0) == num_rows,
      "append_kv_: key and value must be [T, G, d] and slots [T]");
  const PagedCache cache(cache_tensor, head_dim, "append_kv_");
  const Rows keys(key), values(value);
  const Integers slot_of = integers(slots, "append_kv_");
  const int64_t num_slots = cache.num_pages * cache.page_size;
  const int64_t row_bytes = head_dim * cache.element_bytes;
  const bool same_type = keys.type == cache.type && values.type == cache.type;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (cache.num_heads * (2 * row_bytes + 16)));
  parallel(num_rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t slot = slot_of[row];
      // Negative slots mark padding, and page 0 is nobody's.
      if (slot < cache.page_size) continue;
      STD_TORCH_CHECK(slot < num_slots, "append_kv_: slots must be below ", num_slots, ", got ", slot);
      const int64_t page = slot / cache.page_size, offset = slot % cache.page_size;
      for (int64_t head = 0; head < cache.num_heads; ++head) {
        char *to = cache.key(page, head, offset), *to_value = to + row_bytes;
        if (same_type) {
          std::memcpy(to, keys.at(row, head), row_bytes);
          std::memcpy(to_value, values.at(row, head), row_bytes);
        } else {
          QM_DISPATCH(copy_row, keys.at(row, head), keys.type, head_dim, cache.type, to);
          QM_DISPATCH(copy_row, values.at(row, head), values.type, head_dim, cache.type, to_value);
        }
        cache.set_state(page, head, offset, {1.0f, 1.0f, 0.0f, 0.0f});
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) { m.impl("append_kv_", TORCH_BOX(&append_kv)); }

}  // namespace qm_spec
