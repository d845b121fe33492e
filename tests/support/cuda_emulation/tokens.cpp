// The kernels of whole sequences, built for the CPU: what their host side does, for plain arrays, called through ctypes.
#include "cuda_on_cpu.h"

#include "csrc/cuda/attention_entropy.cuh"
#include "csrc/cuda/cosine_similarity.cuh"
#include "csrc/cuda/gumbel_softmax.cuh"
#include "csrc/cuda/saliency_merge.cuh"
#include "csrc/cuda/weighted_kmeans.cuh"

namespace {

using namespace qm_spec;

thread_local std::string error;

// Run with the element type: 0 float32, 1 float16, 2 bfloat16, 3 float64. Returns the error, or null.
template <class Run>
const char* dispatch(int type, uint64_t seed, Run&& run) {
  cuda_on_cpu::Machine::get().seed(seed);
  try {
    if (type == 0) run(static_cast<float*>(nullptr));
    if (type == 1) run(static_cast<__half*>(nullptr));
    if (type == 2) run(static_cast<__nv_bfloat16*>(nullptr));
    if (type == 3) run(static_cast<double*>(nullptr));
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}

// As torch's memory is: not written yet.
std::vector<float> scratch(int64_t count) { return std::vector<float>(count, NAN); }

const cuda_on_cpu::Launcher kLaunch;

}  // namespace

extern "C" {

const char* attention_entropy(
    int type, uint64_t seed, const void* tokens, int64_t batch, int64_t num_tokens, int64_t dim, bool causal,
    float* entropy) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    attention_entropy(kLaunch, Sequences<const T>{static_cast<const T*>(tokens), batch, num_tokens, dim}, causal, entropy);
  });
}

const char* cosine_similarity(
    int type, uint64_t seed, const void* tokens, int64_t batch, int64_t num_tokens, int64_t dim, void* similarity) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    std::vector<float> norms = scratch(batch * num_tokens);
    cosine_similarity(
        kLaunch, Sequences<const T>{static_cast<const T*>(tokens), batch, num_tokens, dim}, norms.data(),
        static_cast<T*>(similarity));
  });
}

const char* gumbel_softmax(
    int type, uint64_t seed, const void* logits, int64_t num_rows, int64_t num_columns, double temperature, double noise,
    int64_t noise_seed, int64_t offset, void* probabilities, float* perturbed) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    gumbel_softmax(
        kLaunch, Gumbel<T>{static_cast<const T*>(logits), static_cast<T*>(probabilities), perturbed, num_rows,
                           num_columns, static_cast<float>(temperature), static_cast<float>(noise),
                           static_cast<uint64_t>(noise_seed), static_cast<uint64_t>(offset)});
  });
}

const char* saliency_merge(
    int type, uint64_t seed, const void* tokens, int64_t batch, int64_t num_tokens, int64_t dim, const float* mass,
    const int64_t* cluster, int64_t num_slots, void* merged, float* sizes, float* masses) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Sequences<const T> x{static_cast<const T*>(tokens), batch, num_tokens, dim};
    saliency_merge(
        kLaunch, MergeSlots<T, T>{x, mass, cluster, num_slots, static_cast<T*>(merged), sizes, masses});
  });
}

const char* weighted_kmeans_assign(
    int type, uint64_t seed, const void* points, int64_t batch, int64_t num_tokens, int64_t dim, const float* centres,
    int64_t num_slots, const bool* mask, const bool* live, int64_t* cluster, float* distance) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    std::vector<float> norms = scratch(batch * num_slots);
    weighted_kmeans_assign(
        kLaunch, Assign<T>{{static_cast<const T*>(points), batch, num_tokens, dim}, {centres, batch, num_slots, dim},
                           norms.data(), mask, live, cluster, distance},
        norms.data());
  });
}

const char* weighted_kmeans_update(
    int type, uint64_t seed, const void* points, int64_t batch, int64_t num_tokens, int64_t dim, const float* mass,
    const int64_t* cluster, const float* distance, const bool* live, int64_t num_slots, int64_t* repaired,
    float* centres) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    std::vector<int64_t> nearest(batch * num_slots, INT64_MIN), taker(batch * num_slots, INT64_MIN);
    const Sequences<const T> x{static_cast<const T*>(points), batch, num_tokens, dim};
    weighted_kmeans_update(
        kLaunch,
        Repair{batch, num_tokens, num_slots, mass, distance, live, cluster, nearest.data(), taker.data(), repaired},
        MergeSlots<T, float>{x, mass, repaired, num_slots, centres, nullptr, nullptr});
  });
}

}  // extern "C"
