// Kernels with the faults that the emulation is there to find; each writes 64 numbers.
#pragma once

#include "cuda_on_cpu.h"

namespace faults {

// None: every thread reads what the thread opposite wrote.
inline void none(float* out) {
  float* shared = qm_spec::shared_memory();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

// The same without the barrier: what is read depends on who came first.
inline void no_barrier(float* out) {
  float* shared = qm_spec::shared_memory();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

// Half of the threads never come to the barrier.
inline void half_a_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0.0f;
}

// The lanes of a warp take part in different exchanges.
inline void split_warp(float* out) {
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(0xffffffffu, 1.0f, 1) : __ballot_sync(0xffffffffu, true);
}

// Written behind the shared memory that was asked for.
inline void too_far(float* out) {
  qm_spec::shared_memory()[threadIdx.x + 1] = 0.0f;
  out[threadIdx.x] = 0.0f;
}

// Four numbers at once, from an address that is no multiple of 16 bytes.
inline void misaligned(float* out) {
  const float4 four = *reinterpret_cast<const float4*>(qm_spec::shared_memory() + threadIdx.x / 4);
  out[threadIdx.x] = four.x;
}

inline void run(int number, float* out) {
  void (*const kernels[])(float*) = {none, no_barrier, half_a_barrier, split_warp, too_far, misaligned};
  cuda_on_cpu::Launcher()(kernels[number], dim3(1), dim3(64), 64 * sizeof(float), out);
}

}  // namespace faults
