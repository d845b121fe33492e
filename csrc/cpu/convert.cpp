#include "csrc/cpu/convert.h"

#include <torch/headeronly/util/Half.h>

#include "csrc/cpu/math.h"

namespace qm_spec {
namespace {

QM_MULTIVERSION void from_bfloat16(const uint16_t* in, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = float_from_bits(static_cast<uint32_t>(in[i]) << 16);
}

// Exponent and mantissa are shifted into place and scaled by 2^112, which handles subnormals as well.
QM_MULTIVERSION void from_float16(const uint16_t* in, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = in[i];
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t finite = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    out[i] = float_from_bits((magnitude >= 0x0f800000u ? special : finite) | (bits & 0x8000u) << 16);
  }
}

QM_MULTIVERSION void to_bfloat16(const float* in, int64_t count, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_from_float(in[i]);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

void to_float16(const float* in, int64_t count, c10::Half* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = c10::Half(in[i]);
}

void from_float64(const double* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

void to_float64(const float* in, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i];
}

void check_type(ScalarType type, const char* op) {
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
          type == ScalarType::Double,
      op, ": the kernel takes float16, bfloat16, float32 or float64, got scalar type ", static_cast<int>(type));
}

}  // namespace

FloatRows::FloatRows(const Tensor& tensor, const char* op) : data_(tensor.data_ptr()), type_(tensor.scalar_type()) {
  check_type(type_, op);
}

const float* FloatRows::read(int64_t offset, int64_t count, float* scratch) const {
  if (type_ == ScalarType::Float) return static_cast<const float*>(data_) + offset;
  if (type_ == ScalarType::Double) {
    from_float64(static_cast<const double*>(data_) + offset, count, scratch);
    return scratch;
  }
  const uint16_t* half = static_cast<const uint16_t*>(data_) + offset;
  if (type_ == ScalarType::BFloat16) {
    from_bfloat16(half, count, scratch);
  } else {
    from_float16(half, count, scratch);
  }
  return scratch;
}

FloatRowsOut::FloatRowsOut(Tensor& tensor, const char* op) : data_(tensor.data_ptr()), type_(tensor.scalar_type()) {
  check_type(type_, op);
}

void FloatRowsOut::write(int64_t offset, int64_t count, const float* values) const {
  if (type_ == ScalarType::Float) {
    std::memcpy(static_cast<float*>(data_) + offset, values, static_cast<size_t>(count) * sizeof(float));
  } else if (type_ == ScalarType::BFloat16) {
    to_bfloat16(values, count, static_cast<uint16_t*>(data_) + offset);
  } else if (type_ == ScalarType::Double) {
    to_float64(values, count, static_cast<double*>(data_) + offset);
  } else {
    to_float16(values, count, static_cast<c10::Half*>(data_) + offset);
  }
}

}  // namespace qm_spec
