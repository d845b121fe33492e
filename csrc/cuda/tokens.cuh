// What the kernels of whole sequences share on the device: sequences of tokens, sums of a block, tiles of products.
#pragma once

#include "csrc/cuda/device.cuh"

namespace qm_spec {

__device__ inline float to_float(double x) { return static_cast<float>(x); }
__device__ inline void store(double* to, float x) { *to = x; }

// B sequences of N rows of D numbers, contiguous.
template <typename T>
struct Sequences {
  T* data;
  int64_t batch, num_rows, dim;

  __host__ __device__ T* row(int64_t b, int64_t i) const { return data + (b * num_rows + i) * dim; }
};

constexpr int kThreads = 256;

// The block's sum, or its largest value, in every thread; the same for every order of threads. `shared` has room for
// a float of every thread, and may be used again at once.
struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
template <class Join>
__device__ float block_reduce(float x, Join join, float* shared) {
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] = join(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  const float result = shared[0];
  __syncthreads();
  return result;
}

// A tile of products: 64 rows times 64 columns by 256 threads, 4 x 4 each. Thread t has rows t / 16 + 16 i and columns
// t % 16 + 16 j. Sixteen terms of both sides stand in shared memory at a time.
constexpr int kSide = 64, kTerms = 16, kPerThread = 4, kAcross = 16;
// One column of padding spreads the writes over the banks.
constexpr size_t kTileFloats = 2 * kTerms * (kSide + 1);

// sums[i][j] = rows . columns over `dim` terms; rows and columns from `first_row` and `first_column` on, those beyond
// the ends count as 0. Every thread of the block must call it.
template <typename T, typename U>
__device__ void tile_products(
    const T* rows, int64_t num_rows, int64_t first_row, const U* columns, int64_t num_columns, int64_t first_column,
    int64_t dim, float* shared, float (&sums)[kPerThread][kPerThread]) {
  const int thread = static_cast<int>(threadIdx.x), down = thread / kAcross, across = thread % kAcross;
  float* row_terms = shared;
  float* column_terms = shared + kTerms * (kSide + 1);
  for (int i = 0; i < kPerThread; ++i)
    for (int j = 0; j < kPerThread; ++j) sums[i][j] = 0.0f;
  for (int64_t begin = 0; begin < dim; begin += kTerms) {
    for (int i = thread; i < kSide * kTerms; i += kThreads) {
      const int64_t place = i / kTerms, term = begin + i % kTerms;
      const int64_t row = first_row + place, column = first_column + place;
      const int to = i % kTerms * (kSide + 1) + static_cast<int>(place);
      row_terms[to] = row < num_rows && term < dim ? to_float(rows[row * dim + term]) : 0.0f;
      column_terms[to] = column < num_columns && term < dim ? to_float(columns[column * dim + term]) : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < kTerms; ++k) {
      const float* row = row_terms + k * (kSide + 1) + down;
      const float* column = column_terms + k * (kSide + 1) + across;
      for (int i = 0; i < kPerThread; ++i)
        for (int j = 0; j < kPerThread; ++j) sums[i][j] += row[kAcross * i] * column[kAcross * j];
    }
    __syncthreads();
  }
}

namespace {

// Grid (B * N): the norm of each row.
template <typename T>
__global__ void row_norms_kernel(Sequences<const T> x, bool squared, float* norms) {
  const int64_t i = blockIdx.x;
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < x.dim; k += kThreads) {
    const float value = to_float(x.data[i * x.dim + k]);
    sum += value * value;
  }
  sum = block_reduce(sum, Add(), shared_memory());
  if (threadIdx.x == 0) norms[i] = squared ? sum : sqrtf(sum);
}

}  // namespace

template <typename T, class Launch>
void row_norms(const Launch& launch, const Sequences<const T>& x, bool squared, float* norms) {
  if (x.batch * x.num_rows == 0) return;
  launch(
      row_norms_kernel<T>, dim3(static_cast<unsigned>(x.batch * x.num_rows)), dim3(kThreads), kThreads * sizeof(float),
      x, squared, norms);
}

}  // namespace qm_spec
