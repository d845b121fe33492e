// Exponential and logarithm in float32 that a loop can be vectorised with, on every instruction set.
#pragma once

#include <cstring>

#include "csrc/cpu/kernel.h"

namespace qm_spec {

QM_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

QM_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// e^x, at most 2 units in the last place off; 0 below -87.3, +inf above 88.7, NaN for NaN.
// Cody and Waite's reduction to |r| <= log(2)/2, then Cephes' polynomial.
QM_INLINE float fast_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x < -87.3f ? -87.3f : (x > 88.8f ? 88.8f : x);
  const float shifted = bounded * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^(n - 1), and 2 apart, so that the largest n still has an exponent.
  const float scale = float_from_bits((bits_from_float(shifted) + 126u) << 23);
  const float y = p * scale * 2.0f;
  return x < -87.3f ? 0.0f : y;
}

// log x of a positive normal number, at most 2 units in the last place off. Cephes' polynomial.
QM_INLINE float fast_log(float x) {
  // The exponent is taken so that the mantissa lies between sqrt(1/2) and sqrt(2).
  const uint32_t bits = bits_from_float(x) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = float_from_bits((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * f * f - e * 2.12194440e-4f - 0.5f * f * f;
  return f + p + e * 0.693359375f;
}

}  // namespace qm_spec
