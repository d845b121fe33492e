// append_states_: the target's states of T tokens, fused, and their keys and values in the cache. For each token, from
// the target's states a [A] and the embedding e [D] of the token behind it:
//
//   f = W_fc norm(a)            [D], the norm of each D numbers of a for themselves, where there is one
//   key = W_k norm(f),  value = W_v norm(f) + W_next norm(e)
//
// Source: ours; reference in qm_spec/ops/append_states.py. All numbers between the weights are float32.
#include <algorithm>
#include <vector>

#include "csrc/cpu/append_kv.h"
#include "csrc/cpu/linear.h"
#include "csrc/cpu/page.h"
#include "csrc/cpu/vector.h"

namespace qm_spec {
namespace {

constexpr char kOp[] = "append_states_";
// Of the norm of the target's states, whose sizes differ from layer to layer.
constexpr float kStateEpsilon = 1e-6f;

// The weights in the order of `StateWeights` in qm_spec/ops/append_states.py.
struct Weights {
  explicit Weights(const std::vector<Tensor>& all)
      : embedding(at(all, 0)),
        fc(at(all, 1), kOp),
        embed_norm(at(all, 2), kOp),
        state_norm(at(all, 3), kOp),
        k_proj(at(all, 4), kOp),
        v_proj(at(all, 5), kOp),
        next_proj(at(all, 6), kOp) {}

  static const Tensor& at(const std::vector<Tensor>& all, size_t i) { return one_of(all, i, 7, kOp); }

  const Tensor& embedding;
  Matrix fc;
  Vector embed_norm, state_norm;
  Matrix k_proj, v_proj, next_proj;
};

Tensor append_states(
    Tensor cache, Tensor aux_states, Tensor next_ids, Tensor slots, std::vector<Tensor> weights, double epsilon,
    bool norm_aux_states) {
  aux_states = torch::stable::contiguous(aux_states);
  const Weights w(weights);
  const float eps = static_cast<float>(epsilon);
  const int64_t rows = aux_states.size(0), width = aux_states.size(1), hidden = w.fc.rows;
  const int64_t groups = cache.size(1), kv_size = w.k_proj.rows;
  const bool tells_next = w.next_proj.rows > 0;
  const FloatRows embedding(w.embedding, kOp), read_states(aux_states, kOp);
  const Integers following = integers(next_ids, kOp);

  Tensor fused = torch::stable::new_empty(aux_states, {rows, hidden});
  Tensor keys = torch::stable::new_empty(aux_states, {rows, groups, kv_size / groups}, ScalarType::Float);
  Tensor values = torch::stable::new_empty(aux_states, {rows, groups, kv_size / groups}, ScalarType::Float);
  float* key = static_cast<float*>(keys.data_ptr());
  float* value = static_cast<float*>(values.data_ptr());

  const Scratch aux_scratch(rows * width), state_scratch(rows * hidden), input_scratch(rows * 2 * hidden),
      next_scratch(tells_next ? rows * kv_size : 0), row_scratch(std::max(width, hidden));
  float *aux = aux_scratch.get(), *f = state_scratch.get(), *x = input_scratch.get(), *next = next_scratch.get();
  for (int64_t t = 0; t < rows; ++t) {
    const float* row = read_states.read(t * width, width, row_scratch.get());
    for (int64_t first = 0; first < width; first += hidden) {
      float* out = aux + t * width + first;
      if (norm_aux_states) {
        rms_norm(row + first, nullptr, hidden, kStateEpsilon, out);
      } else {
        std::copy_n(row + first, hidden, out);
      }
    }
  }
  multiply({{&w.fc, aux, width, f}}, rows);

  FloatRowsOut(fused, kOp).write(0, rows * hidden, f);
  for (int64_t t = 0; t < rows; ++t) {
    rms_norm(f + t * hidden, w.state_norm.data(), hidden, eps, x + t * 2 * hidden + hidden);
    if (!tells_next) continue;
    STD_TORCH_CHECK(
        following[t] >= 0 && following[t] < w.embedding.size(0),
        kOp, ": token ids must be in 0..", w.embedding.size(0) - 1, ", got ", following[t]);
    const float* row = embedding.read(following[t] * hidden, hidden, row_scratch.get());
    rms_norm(row, w.embed_norm.data(), hidden, eps, x + t * 2 * hidden);
  }
  if (tells_next) {
    multiply(
        {{&w.k_proj, x + hidden, 2 * hidden, key},
         {&w.v_proj, x + hidden, 2 * hidden, value},
         {&w.next_proj, x, 2 * hidden, next}},
        rows);
    add(value, next, rows * kv_size, value);
  } else {
    multiply({{&w.k_proj, x + hidden, 2 * hidden, key}, {&w.v_proj, x + hidden, 2 * hidden, value}}, rows);
  }
  append_kv(cache, keys, values, slots);
  return fused;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("append_states_", TORCH_BOX(&append_states));
}

}  // namespace qm_spec
