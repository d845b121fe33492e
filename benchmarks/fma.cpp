// The float32 operations per second that the processor could do: multiply-adds of registers alone, compiled for the
// machine at hand by fma.py.
#include <chrono>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

// Sums that do not wait for each other: latency times multiply-adds begun per cycle is 8 to 10. They leave registers
// for the factors, 16 in all where there is no AVX-512.
constexpr int kSums = 12;

}  // namespace

// Operations per second of one thread over `rounds` rounds.
extern "C" double fma_flops_per_s(long rounds) {
  Vector sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + 0.01f * i;
  // Sums converge to 1, so that no operation is slow.
  Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;
  const auto begin = std::chrono::steady_clock::now();
  for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
  // Looked at, so that the loop is not left out.
  volatile float seen = 0;
  for (int i = 0; i < kSums; ++i) seen = seen + sums[i][0];
  return 2.0 * kSums * (kBytes / sizeof(float)) * rounds / spent.count();
}
