#include "csrc/cpu/linear.h"

#include <algorithm>

#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

// Rows of the weight that are one task: a cache line of results.
constexpr int64_t kRows = 16;
// Columns summed before a partial sum is put away: a task's weights stay in the second-level cache for all rows of x,
// and the error of long sums stays small.
constexpr int64_t kColumns = 1024;
// Multiplications that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

// A few rows of x with their sums [batch, kRows].
struct Rows {
  const float* x;
  int64_t stride, batch;
  float* sums;
};

// sums[b, i] += w[i] . x[b] over `count` columns, for b and i from 0 on. The kWeights * kBatch sums stay in registers.
template <class T, int kWeights, int kBatch>
QM_INLINE void block(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t count, float* out) {
  Vec sums[kBatch][kWeights] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    Vec weights[kWeights];
#pragma GCC unroll 8
    for (int i = 0; i < kWeights; ++i) weights[i] = load(w + i * w_stride + k);
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) {
      const Vec row = load(x + b * x_stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < kWeights; ++i) sums[b][i] += weights[i] * row;
    }
  }
  if (k < count) {
    T weights[kLanes] = {};
    float row[kLanes] = {};
    for (int b = 0; b < kBatch; ++b) {
      std::memcpy(row, x + b * x_stride + k, (count - k) * sizeof(float));
      for (int i = 0; i < kWeights; ++i) {
        std::memcpy(weights, w + i * w_stride + k, (count - k) * sizeof(T));
        sums[b][i] += load(weights) * load(row);
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBatch; ++b) {
#pragma GCC unroll 8
    for (int i = 0; i < kWeights; ++i) out[b * kRows + i] += sum(sums[b][i]);
  }
}

// The same for `num_weights` rows of w and all rows of x: kBatch of x by kWide of w, and what is left of x one by kDeep.
template <class T, int kDeep, int kWide, int kBatch>
QM_INLINE void blocks(const T* w, int64_t num_weights, int64_t w_stride, int64_t first, int64_t count, const Rows& rows) {
  w += first;
  int64_t b = 0;
  for (; b + kBatch <= rows.batch; b += kBatch) {
    const float* x = rows.x + b * rows.stride + first;
    float* sums = rows.sums + b * kRows;
    int64_t i = 0;
    for (; i + kWide <= num_weights; i += kWide)
      block<T, kWide, kBatch>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
    for (; i < num_weights; ++i) block<T, 1, kBatch>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
  }
  for (; b < rows.batch; ++b) {
    const float* x = rows.x + b * rows.stride + first;
    float* sums = rows.sums + b * kRows;
    int64_t i = 0;
    for (; i + kDeep <= num_weights; i += kDeep)
      block<T, kDeep, 1>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
    for (; i < num_weights; ++i) block<T, 1, 1>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
  }
}

template <class T, int kDeep, int kWide, int kBatch>
QM_INLINE void all_columns(const T* w, int64_t num_weights, int64_t columns, const Rows& rows) {
  std::fill(rows.sums, rows.sums + rows.batch * kRows, 0.0f);
  for (int64_t first = 0; first < columns; first += kColumns)
    blocks<T, kDeep, kWide, kBatch>(w, num_weights, columns, first, std::min(kColumns, columns - first), rows);
}

template <int kDeep, int kWide, int kBatch>
QM_INLINE void any_type(
    ScalarType type, const void* weight, int64_t offset, int64_t num_weights, int64_t columns, const Rows& rows) {
  if (type == ScalarType::Float) {
    const float* w = static_cast<const float*>(weight) + offset;
    all_columns<float, kDeep, kWide, kBatch>(w, num_weights, columns, rows);
  } else if (type == ScalarType::BFloat16) {
    const BFloat16* w = static_cast<const BFloat16*>(weight) + offset;
    all_columns<BFloat16, kDeep, kWide, kBatch>(w, num_weights, columns, rows);
  } else {
    const Float16* w = static_cast<const Float16*>(weight) + offset;
    all_columns<Float16, kDeep, kWide, kBatch>(w, num_weights, columns, rows);
  }
}

using Task = void(ScalarType, const void*, int64_t, int64_t, int64_t, const Rows&);

// A Vec is one of 32 registers with AVX-512, and two of 16 with AVX2: the shapes differ.
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))) void task_avx512(
    ScalarType type, const void* weight, int64_t offset, int64_t num_weights, int64_t columns, const Rows& rows) {
  any_type<8, 4, 4>(type, weight, offset, num_weights, columns, rows);
}

__attribute__((target("avx2,fma"))) void task_avx2(
    ScalarType type, const void* weight, int64_t offset, int64_t num_weights, int64_t columns, const Rows& rows) {
  any_type<4, 2, 2>(type, weight, offset, num_weights, columns, rows);
}
#endif

void task_default(
    ScalarType type, const void* weight, int64_t offset, int64_t num_weights, int64_t columns, const Rows& rows) {
  any_type<4, 2, 2>(type, weight, offset, num_weights, columns, rows);
}

Task* choose_task() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return task_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return task_avx2;
#endif
  return task_default;
}

int64_t num_tasks(const Matrix& weight) { return (weight.rows + kRows - 1) / kRows; }

}  // namespace

Matrix::Matrix(const Tensor& weight, const char* op)
    : rows(weight.size(0)), columns(weight.size(1)), data(weight.data_ptr()), type(weight.scalar_type()) {
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      op, ": weights must be float32, float16 or bfloat16, got scalar type ", static_cast<int>(type));
  STD_TORCH_CHECK(weight.is_contiguous(), op, ": weights must be contiguous, got one of [", rows, ", ", columns, "]");
}

void multiply(std::initializer_list<Product> products, int64_t batch) {
  static Task* const task = choose_task();
  int64_t total = 0, columns = 1;
  for (const Product& product : products) {
    total += num_tasks(*product.weight);
    columns = std::max(columns, product.weight->columns);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / (kRows * columns * batch));
  torch::stable::parallel_for(0, total, grain, [&](int64_t first, int64_t last) {
    const Scratch sums(batch * kRows);
    int64_t before = 0;
    for (const Product& product : products) {
      const Matrix& w = *product.weight;
      const int64_t end = std::min(last - before, num_tasks(w));
      for (int64_t i = std::max<int64_t>(first - before, 0); i < end; ++i) {
        const int64_t row = i * kRows, count = std::min(kRows, w.rows - row);
        task(w.type, w.data, row * w.columns, count, w.columns, {product.x, product.x_stride, batch, sums.get()});
        for (int64_t b = 0; b < batch; ++b)
          std::copy_n(sums.get() + b * kRows, count, product.out + b * w.rows + row);
      }
      before += num_tasks(w);
    }
  });
}

}  // namespace qm_spec
