// What the kernels of the merged cache share on the device: conversions, warps, shared memory.
//
// Kernels stand in .cuh files that include neither torch nor the CUDA runtime, and are launched through an object
// that is handed in. So tests/support/cuda_emulation can compile the same source for the CPU and run it there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace qm_spec {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest, ties to even.
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// Four neighbouring elements, moved at once where they are aligned.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

template <typename T>
__device__ inline Four<T> load_four(const T* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Four<T>*>(from);
  return {{from[0], from[1], from[2], from[3]}};
}

template <typename T>
__device__ inline void store_four(T* to, const Four<T>& four, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
    for (int i = 0; i < 4; ++i) to[i] = four.x[i];
  }
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// The block's dynamic shared memory; the emulation brings its own.
#ifdef __CUDACC__
__device__ inline float* shared_memory() {
  extern __shared__ float4 qm_spec_shared[];
  return reinterpret_cast<float*>(qm_spec_shared);
}
#endif

template <typename N>
__host__ __device__ constexpr N divide_up(N number, N divisor) {
  return (number + divisor - 1) / divisor;
}

// Plain functions, for the standard library's are not known on the device.
template <typename N>
__host__ __device__ constexpr N smaller(N a, N b) {
  return b < a ? b : a;
}

template <typename N>
__host__ __device__ constexpr N larger(N a, N b) {
  return b > a ? b : a;
}

}  // namespace qm_spec
