#include "csrc/cpu/convert.h"

#include <algorithm>

#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

template <class Vec, class T>
QM_INLINE void to_floats(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load<Vec>(in + i), out + i);
  if (i == count) return;
  T rest[kLanes] = {};
  float converted[kLanes];
  std::memcpy(rest, in + i, (count - i) * sizeof(T));
  store(load<Vec>(rest), converted);
  std::memcpy(out + i, converted, (count - i) * sizeof(float));
}

template <class Vec, class T>
QM_INLINE void from_floats(const float* in, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load<Vec>(in + i), out + i);
  if (i == count) return;
  float rest[kLanes] = {};
  T converted[kLanes];
  std::memcpy(rest, in + i, (count - i) * sizeof(float));
  store(load<Vec>(rest), converted);
  std::memcpy(out + i, converted, (count - i) * sizeof(T));
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
  switch (type_) {
    case ScalarType::Float:
      return static_cast<const float*>(data_) + offset;
    case ScalarType::Half:
      QM_DISPATCH(to_floats, static_cast<const Float16*>(data_) + offset, count, scratch);
      return scratch;
    case ScalarType::BFloat16:
      QM_DISPATCH(to_floats, static_cast<const BFloat16*>(data_) + offset, count, scratch);
      return scratch;
    default:
      std::copy_n(static_cast<const double*>(data_) + offset, count, scratch);
      return scratch;
  }
}

void FloatRows::prefetch(int64_t offset, int64_t count) const {
  constexpr int64_t kLine = 64;
  const int64_t size = type_ == ScalarType::Double ? 8 : type_ == ScalarType::Float ? 4 : 2;
  const char* from = static_cast<const char*>(data_) + offset * size;
  for (int64_t at = 0; at < count * size; at += kLine) __builtin_prefetch(from + at);
}

FloatRowsOut::FloatRowsOut(Tensor& tensor, const char* op) : data_(tensor.data_ptr()), type_(tensor.scalar_type()) {
  check_type(type_, op);
}

void FloatRowsOut::write(int64_t offset, int64_t count, const float* values) const {
  switch (type_) {
    case ScalarType::Float:
      std::copy_n(values, count, static_cast<float*>(data_) + offset);
      return;
    case ScalarType::Half:
      QM_DISPATCH(from_floats, values, count, static_cast<Float16*>(data_) + offset);
      return;
    case ScalarType::BFloat16:
      QM_DISPATCH(from_floats, values, count, static_cast<BFloat16*>(data_) + offset);
      return;
    default:
      std::copy_n(values, count, static_cast<double*>(data_) + offset);
  }
}

float* FloatRowsOut::in_place(int64_t offset) const {
  return type_ == ScalarType::Float ? static_cast<float*>(data_) + offset : nullptr;
}

}  // namespace qm_spec
