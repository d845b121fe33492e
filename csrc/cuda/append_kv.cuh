// append_kv_: write key and value [T, G, d] with mass 1, count 1 and level 0 into the slots [T] of the cache.
// Source: ours; reference in qm_spec/ops/append_kv.py.
#pragma once

#include "csrc/cuda/page.cuh"

namespace qm_spec {

// Rows [T, G, d] with a contiguous last dimension; strides in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride, head_stride;
  // Whether every head's row begins at a multiple of four elements.
  bool aligned;

  __device__ T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// What append_kv_ works on.
template <typename T>
struct Append {
  Cache<T> cache;
  Rows<const T> key, value;
  const int64_t* slots;
  int64_t slots_stride, num_rows;
};

namespace {

constexpr int kAppendThreads = 128;

// Grid (T): one row a block, four elements a thread.
template <typename T>
__global__ void append_kv_kernel(Append<T> to) {
  const Cache<T>& cache = to.cache;
  const int64_t row = blockIdx.x, slot = to.slots[row * to.slots_stride];
  // Negative slots are padding, and page 0 is nobody's.
  if (slot < cache.page_size || slot >= cache.num_pages * cache.page_size) return;
  const int64_t page = slot / cache.page_size, offset = slot % cache.page_size;
  const int64_t dim = cache.head_dim, fours = divide_up<int64_t>(dim, 4);
  for (int64_t i = threadIdx.x; i < cache.num_heads * fours; i += blockDim.x) {
    const int64_t head = i / fours, column = i % fours * 4;
    const T *key = to.key.at(row, head) + column, *value = to.value.at(row, head) + column;
    T* slot_key = cache.slot(page, head, offset) + column;
    if (column + 4 <= dim) {
      store_four(slot_key, load_four(key, to.key.aligned), cache.aligned);
      // The value begins at a multiple of four elements only if d is one.
      store_four(slot_key + dim, load_four(value, to.value.aligned), cache.aligned && dim % 4 == 0);
    } else {
      for (int64_t c = 0; c < dim - column; ++c) {
        slot_key[c] = key[c];
        slot_key[dim + c] = value[c];
      }
    }
    if (column == 0) *cache.state(page, head, offset) = SlotState{1.0f, 1.0f, 0.0f, 0.0f};
  }
}

}  // namespace

template <typename T, class Launch>
void append_kv(const Launch& launch, const Append<T>& to) {
  if (to.num_rows == 0) return;
  launch(append_kv_kernel<T>, dim3(static_cast<unsigned>(to.num_rows)), dim3(kAppendThreads), size_t{0}, to);
}

}  // namespace qm_spec
