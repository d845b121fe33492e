// The page, as in qm_spec/ops/page.py: the cache is [pages, G, P, C] with any strides and a contiguous last
// dimension; of the C elements of a slot the first d are the key, the next d the value, the rest its state.
#pragma once

#include "csrc/cuda/device.cuh"

namespace qm_spec {

// Merge state of a slot. A new page holds its previous owner's bytes: nothing read from it can be trusted.
struct SlotState {
  float mass;   // weight in the next merge
  float count;  // tokens that the entry stands for; 0: the slot is empty
  float level;  // of the group, in its first slot
  float spare;
};

template <typename T>
struct Cache {
  T* data;
  int64_t num_pages, num_heads, page_size, head_dim;
  int64_t page_stride, head_stride, slot_stride;  // in elements
  // Whether every slot begins at a multiple of four elements.
  bool aligned;

  // The slot's key; its value follows head_dim elements later.
  __device__ T* slot(int64_t page, int64_t head, int64_t offset) const {
    return data + page * page_stride + head * head_stride + offset * slot_stride;
  }
  __device__ SlotState* state(int64_t page, int64_t head, int64_t offset) const {
    return reinterpret_cast<SlotState*>(slot(page, head, offset) + 2 * head_dim);
  }
  // Page 0 is the null page, which is nobody's.
  __device__ bool holds(int64_t page) const { return page > 0 && page < num_pages; }
};

// A dimension of an int32 tensor, at any stride.
struct Integers {
  const int32_t* data;
  int64_t stride;

  __device__ int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// The page of each P tokens of each request: [B, columns].
struct BlockTable {
  const int32_t* data;
  int64_t num_requests, num_columns;
  int64_t row_stride, column_stride;

  __device__ int64_t page(int64_t request, int64_t column) const {
    return data[request * row_stride + column * column_stride];
  }
};

}  // namespace qm_spec
