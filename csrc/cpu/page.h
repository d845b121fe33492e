// The page, as in qm_spec/ops/page.py: the cache is [pages, G, P, C] with any strides and a contiguous last
// dimension; of the C elements of a slot the first d are the key, the next d the value, the rest its state.
#pragma once

#include <cstring>

#include "csrc/cpu/kernel.h"

namespace qm_spec {

// Merge state of a slot. A new page holds its previous owner's bytes: nothing read from it can be trusted.
struct SlotState {
  float mass;   // weight in the next merge
  float count;  // tokens that the entry stands for; 0: the slot is empty
  float level;  // of the group, in its first slot
  float spare;
};

class PagedCache {
 public:
  // `op` is named in errors. The tensor must outlive this.
  PagedCache(const Tensor& cache, int64_t head_dim, const char* op)
      : num_pages(cache.size(0)),
        num_heads(cache.size(1)),
        page_size(cache.size(2)),
        head_dim(head_dim),
        type(cache.scalar_type()),
        element_bytes(type == ScalarType::Float ? 4 : 2),
        data_(static_cast<char*>(cache.data_ptr())),
        page_stride_bytes_(cache.stride(0) * element_bytes),
        head_stride_bytes_(cache.stride(1) * element_bytes),
        slot_stride_bytes_(cache.stride(2) * element_bytes) {
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        op, ": the cache must be float32, float16 or bfloat16, got scalar type ", static_cast<int>(type));
    const int64_t elements = 2 * head_dim + static_cast<int64_t>(sizeof(SlotState)) / element_bytes;
    STD_TORCH_CHECK(
        cache.size(3) == elements && cache.stride(3) == 1,
        op, ": the cache must be [pages, G, P, ", elements, "] with a contiguous last dimension, got ",
        cache.size(3), " elements ", cache.stride(3), " apart");
  }

  const int64_t num_pages, num_heads, page_size, head_dim;
  const ScalarType type;
  const int64_t element_bytes;

  char* key(int64_t page, int64_t head, int64_t slot) const {
    return data_ + page * page_stride_bytes_ + head * head_stride_bytes_ + slot * slot_stride_bytes_;
  }
  char* value(int64_t page, int64_t head, int64_t slot) const {
    return key(page, head, slot) + head_dim * element_bytes;
  }
  // The last 16 bytes of the slot.
  char* state_bytes(int64_t page, int64_t head, int64_t slot) const {
    return key(page, head, slot) + 2 * head_dim * element_bytes;
  }
  SlotState state(int64_t page, int64_t head, int64_t slot) const {
    SlotState state;
    std::memcpy(&state, state_bytes(page, head, slot), sizeof state);
    return state;
  }
  SlotState state(const char* key) const {
    SlotState state;
    std::memcpy(&state, key + 2 * head_dim * element_bytes, sizeof state);
    return state;
  }
  void set_state(int64_t page, int64_t head, int64_t slot, const SlotState& state) const {
    std::memcpy(state_bytes(page, head, slot), &state, sizeof state);
  }
  // From one head to the next.
  int64_t head_stride_bytes() const { return head_stride_bytes_; }
  // From one slot of a page to the next.
  int64_t slot_stride_bytes() const { return slot_stride_bytes_; }
  // Of key, value and state, side by side.
  int64_t slot_bytes() const { return 2 * head_dim * element_bytes + static_cast<int64_t>(sizeof(SlotState)); }

 private:
  char* data_;
  int64_t page_stride_bytes_, head_stride_bytes_, slot_stride_bytes_;
};

// A dimension of an int32 or int64 tensor, at any stride.
class Integers {
 public:
  Integers(const void* data, bool wide, int64_t stride) : data_(data), wide_(wide), stride_(stride) {}
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i * stride_] : static_cast<const int32_t*>(data_)[i * stride_];
  }

 private:
  const void* data_;
  bool wide_;
  int64_t stride_;
};

// Row `row` of a 2-D tensor of integers, or, without one, a 1-D tensor. The tensor must outlive the result.
inline Integers integers(const Tensor& tensor, const char* op, int64_t row = 0) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      wide || tensor.scalar_type() == ScalarType::Int,
      op, ": tables and lengths must be int32 or int64, got scalar type ", static_cast<int>(tensor.scalar_type()));
  const int64_t offset = tensor.dim() == 2 ? row * tensor.stride(0) : 0;
  const char* data = static_cast<const char*>(tensor.data_ptr()) + offset * (wide ? 8 : 4);
  return {data, wide, tensor.stride(tensor.dim() - 1)};
}

}  // namespace qm_spec
