#include "csrc/cpu/linear.h"

#include <algorithm>
#include <vector>

#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

// Rows of the weight that are one task: a cache line of results.
constexpr int64_t kRows = 16;
// Columns read at a time: a vector of bfloat16 in pairs, or two of float32.
constexpr int64_t kStep = 2 * kLanes;
// Columns summed before a partial sum is put away: a task's weights stay in the second-level cache for all rows of x,
// and the error of long sums stays small.
constexpr int64_t kColumns = 1024;
// Multiplications that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

// Rows of x [batch, stride], laid out as the weight's type wants them, with zeros behind the last column, and their
// sums [batch, kRows].
struct Rows {
  const float* x;
  int64_t stride, batch;
  float* sums;
};

// One half of kStep weights as floats: the first and the second kLanes of them or, of bfloat16, those at even and at
// odd places, which takes one instruction: they are the upper halves of the floats.
template <class Vec, class T>
QM_INLINE Vec load_half(const T* w, int half) {
  return load<Vec>(w + half * kLanes);
}
template <class Vec>
QM_INLINE Vec load_half(const BFloat16* w, int half) {
  const Bits<Vec> pairs = read_bytes<Bits<Vec>>(w);
  return as<float>(half == 0 ? pairs << 16 : pairs & 0xffff0000u);
}

// Lay a row of x out in the same order.
void prepare(const float* row, int64_t columns, bool even_first, float* out) {
  const int64_t padded = (columns + kStep - 1) / kStep * kStep;
  std::fill(std::copy_n(row, columns, out), out + padded, 0.0f);
  if (!even_first) return;
  for (int64_t k = 0; k < padded; k += kStep) {
    float step[kStep];
    std::copy_n(out + k, kStep, step);
    for (int64_t i = 0; i < kLanes; ++i) out[k + i] = step[2 * i], out[k + kLanes + i] = step[2 * i + 1];
  }
}

// out[0..3] += the sums of four vectors' lanes.
template <class Vec>
QM_INLINE void add_sums(const Vec* v, float* out) {
  write_bytes(read_bytes<FourVec>(out) + sums_of_four(v), out);
}

// sums += w[i] . x[b] over kStep columns.
template <class T, class Vec, int kWeights, int kBatch>
QM_INLINE void add_step(const T* w, int64_t w_stride, const float* x, int64_t x_stride, Vec (&sums)[kBatch][kWeights]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vec weights[kWeights];
#pragma GCC unroll 8
    for (int i = 0; i < kWeights; ++i) weights[i] = load_half<Vec>(w + i * w_stride, half);
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) {
      const Vec row = load<Vec>(x + b * x_stride + half * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kWeights; ++i) sums[b][i] += weights[i] * row;
    }
  }
}

// out[b, i] += w[i] . x[b] over `count` columns, for b and i from 0 on. The kWeights * kBatch sums stay in registers.
template <class Vec, class T, int kWeights, int kBatch>
QM_INLINE void block(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t count, float* out) {
  Vec sums[kBatch][kWeights] = {};
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < kWeights; ++i) {
      const T* const ahead = w + (kWeights + i) * w_stride + k;
      __builtin_prefetch(ahead);
      if (sizeof(T) == 4) __builtin_prefetch(ahead + kLanes);
    }
    add_step(w + k, w_stride, x + k, x_stride, sums);
  }
  if (k < count) {
    T rest[kWeights][kStep] = {};
    for (int i = 0; i < kWeights; ++i) std::memcpy(rest[i], w + i * w_stride + k, (count - k) * sizeof(T));
    add_step(rest[0], kStep, x + k, x_stride, sums);
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBatch; ++b) {
    if constexpr (kWeights % 4 == 0) {
#pragma GCC unroll 2
      for (int i = 0; i < kWeights; i += 4) add_sums(sums[b] + i, out + b * kRows + i);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kWeights; ++i) out[b * kRows + i] += sum(sums[b][i]);
    }
  }
}

// The same for `num_weights` rows of w and all rows of x: kBatch of x by kWide of w, and what is left of x one by kDeep.
template <class Vec, class T, int kDeep, int kWide, int kBatch>
QM_INLINE void blocks(const T* w, int64_t num_weights, int64_t w_stride, int64_t first, int64_t count, const Rows& rows) {
  w += first;
  int64_t b = 0;
  for (; b + kBatch <= rows.batch; b += kBatch) {
    const float* x = rows.x + b * rows.stride + first;
    float* sums = rows.sums + b * kRows;
    int64_t i = 0;
    for (; i + kWide <= num_weights; i += kWide)
      block<Vec, T, kWide, kBatch>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
    for (; i < num_weights; ++i) block<Vec, T, 1, kBatch>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
  }
  for (; b < rows.batch; ++b) {
    const float* x = rows.x + b * rows.stride + first;
    float* sums = rows.sums + b * kRows;
    int64_t i = 0;
    for (; i + kDeep <= num_weights; i += kDeep)
      block<Vec, T, kDeep, 1>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
    for (; i < num_weights; ++i) block<Vec, T, 1, 1>(w + i * w_stride, w_stride, x, rows.stride, count, sums + i);
  }
}

// The sums, the weights and a row of x stay in registers: AVX-512 has room for four times as many Vecs as AVX2.
template <class Vec, class T>
QM_INLINE void all_columns(const T* w, int64_t num_weights, int64_t columns, const Rows& rows) {
  constexpr int kDeep = kIsPair<Vec> ? 4 : 8, kWide = kIsPair<Vec> ? 2 : 4;
  std::fill(rows.sums, rows.sums + rows.batch * kRows, 0.0f);
  for (int64_t first = 0; first < columns; first += kColumns)
    blocks<Vec, T, kDeep, kWide, kWide>(w, num_weights, columns, first, std::min(kColumns, columns - first), rows);
}

template <class Vec>
QM_INLINE void any_type(
    ScalarType type, const void* weight, int64_t offset, int64_t num_weights, int64_t columns, const Rows& rows) {
  if (type == ScalarType::Float) {
    all_columns<Vec>(static_cast<const float*>(weight) + offset, num_weights, columns, rows);
  } else if (type == ScalarType::BFloat16) {
    all_columns<Vec>(static_cast<const BFloat16*>(weight) + offset, num_weights, columns, rows);
  } else {
    all_columns<Vec>(static_cast<const Float16*>(weight) + offset, num_weights, columns, rows);
  }
}

int64_t num_tasks(const Matrix& weight) { return (weight.rows + kRows - 1) / kRows; }

int64_t padded_columns(const Matrix& weight) { return (weight.columns + kStep - 1) / kStep * kStep; }

}  // namespace

Matrix::Matrix(const Tensor& weight, const char* op)
    : rows(weight.size(0)), columns(weight.size(1)), data(weight.data_ptr()), type(weight.scalar_type()) {
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      op, ": weights must be float32, float16 or bfloat16, got scalar type ", static_cast<int>(type));
  STD_TORCH_CHECK(weight.is_contiguous(), op, ": weights must be contiguous, got one of [", rows, ", ", columns, "]");
}

void multiply(std::initializer_list<Product> products, int64_t batch) {
  int64_t total = 0, columns = 1, floats = 0;
  for (const Product& product : products) {
    total += num_tasks(*product.weight);
    columns = std::max(columns, product.weight->columns);
    floats += batch * padded_columns(*product.weight);
  }
  const Scratch prepared(floats);
  float* next = prepared.get();
  std::vector<const float*> rows;
  for (const Product& product : products) {
    const Matrix& w = *product.weight;
    rows.push_back(next);
    for (int64_t b = 0; b < batch; ++b, next += padded_columns(w))
      prepare(product.x + b * product.x_stride, w.columns, w.type == ScalarType::BFloat16, next);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / (kRows * columns * batch));
  torch::stable::parallel_for(0, total, grain, [&](int64_t first, int64_t last) {
    const Scratch sums(batch * kRows);
    int64_t before = 0;
    const float* const* x = rows.data();
    for (const Product& product : products) {
      const Matrix& w = *product.weight;
      const Rows all{*x++, padded_columns(w), batch, sums.get()};
      const int64_t end = std::min(last - before, num_tasks(w));
      for (int64_t i = std::max<int64_t>(first - before, 0); i < end; ++i) {
        const int64_t row = i * kRows, count = std::min(kRows, w.rows - row);
        QM_DISPATCH(any_type, w.type, w.data, row * w.columns, count, w.columns, all);
        for (int64_t b = 0; b < batch; ++b)
          std::copy_n(sums.get() + b * kRows, count, product.out + b * w.rows + row);
      }
      before += num_tasks(w);
    }
  });
}

}  // namespace qm_spec
