// draft_tokens: all K draft steps of the prior over the merged cache. One step of B requests, from the state
// f [B, D] and the token's embedding e [B, D]:
//
//   x = [norm(e); norm(f)]                               [B, 2 D]
//   a = attention of W_q x to the request's entries and to the tokens drafted before   [B, H d]
//   s = f + W_in x + W_o a,   s = s + W_down(silu(W_gate norm(s)) * W_up norm(s))      [B, D]
//   logits = W_head norm(s)                              [B, Vd], of the tokens that may be drafted
//
// The next step has f = s and the target's id of the token chosen from the logits; its key is W_k norm(f), its value
// W_v norm(f) + W_next norm(e).
// Source: ours; reference in qm_spec/ops/draft_tokens.py.
//
// All numbers between the weights are float32. Each product is one parallel region over the rows of its weight.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/cpu/convert.h"
#include "csrc/cpu/draft_attention.h"
#include "csrc/cpu/linear.h"
#include "csrc/cpu/math.h"
#include "csrc/cpu/vector.h"

namespace qm_spec {
namespace {

constexpr char kOp[] = "draft_tokens";
// Below it a request drafts greedily.
constexpr float kLeastTemperature = 1e-5f;
// Additions of attention that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

// gate = silu(gate) * up
QM_MULTIVERSION void gate_by_silu(const float* up, int64_t count, float* gate) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
}

QM_MULTIVERSION void scale(float factor, int64_t count, float* x) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

QM_MULTIVERSION float largest_of(const float* x, int64_t count) {
  float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// out = exp(factor * (x - largest)); returns their sum.
QM_MULTIVERSION double exponentials(const float* x, float largest, float factor, int64_t count, float* out) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    out[i] = fast_exp((x[i] - largest) * factor);
    sum += static_cast<double>(out[i]);
  }
  return sum;
}

// The first of the largest.
int64_t argmax(const float* x, int64_t count) {
  const float* found = std::find(x, x + count, largest_of(x, count));
  return found == x + count ? 0 : found - x;
}

// The first token up to which the probabilities add to more than a share `uniform` of them all.
int64_t sample(const float* probs, int64_t count, double total, double uniform) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(probs[i]);
    if (sum > uniform * total) return i;
  }
  return count - 1;
}

// The weights in the order of `DraftWeights` in qm_spec/ops/draft_tokens.py.
struct Weights {
  explicit Weights(const std::vector<Tensor>& all)
      : embedding(at(all, 0)),
        head(at(all, 1), kOp),
        embed_norm(at(all, 2), kOp),
        state_norm(at(all, 3), kOp),
        in_proj(at(all, 4), kOp),
        q_proj(at(all, 5), kOp),
        k_proj(at(all, 6), kOp),
        v_proj(at(all, 7), kOp),
        next_proj(at(all, 8), kOp),
        o_proj(at(all, 9), kOp),
        mlp_norm(at(all, 10), kOp),
        gate_proj(at(all, 11), kOp),
        up_proj(at(all, 12), kOp),
        down_proj(at(all, 13), kOp),
        norm(at(all, 14), kOp),
        slopes(at(all, 15), kOp),
        far_bias(at(all, 16), kOp),
        num_token_ids(at(all, 17).numel()),
        token_ids(integers(at(all, 17), kOp)) {
    STD_TORCH_CHECK(
        num_token_ids == 0 || num_token_ids == head.rows,
        kOp, ": token_ids must name each of the head's ", head.rows, " rows, got ", num_token_ids);
  }

  static const Tensor& at(const std::vector<Tensor>& all, size_t i) { return one_of(all, i, 18, kOp); }

  // The target's token id of a row of the head.
  int64_t token_id(int64_t row) const { return num_token_ids > 0 ? token_ids[row] : row; }

  const Tensor& embedding;
  Matrix head;
  Vector embed_norm, state_norm;
  Matrix in_proj, q_proj, k_proj, v_proj, next_proj, o_proj;
  Vector mlp_norm;
  Matrix gate_proj, up_proj, down_proj;
  Vector norm, slopes, far_bias;
  int64_t num_token_ids;
  Integers token_ids;
};

std::tuple<Tensor, Tensor> draft_tokens(
    Tensor cache, Tensor block_table, Tensor num_tokens, Tensor state, Tensor next_ids, std::vector<Tensor> weights,
    int64_t num_drafts, double epsilon, std::vector<int64_t> packed, std::optional<Tensor> temperature,
    std::optional<Tensor> uniform) {
  state = torch::stable::contiguous(state);
  const Weights w(weights);
  const float eps = static_cast<float>(epsilon);
  const int64_t batch = state.size(0), hidden = state.size(1), vocabulary = w.head.rows;
  const int64_t num_groups = cache.size(1), num_heads = weights[15].numel(), heads_per_group = num_heads / num_groups;
  const int64_t kv_size = w.k_proj.rows, dim = kv_size / num_groups, query_size = num_heads * dim;
  const int64_t middle = w.gate_proj.rows;
  const PagedCache pages(cache, dim, kOp);
  const MergeConfig config(packed);
  const Integers lengths = integers(num_tokens, kOp), first_ids = integers(next_ids, kOp);

  Tensor ids = torch::stable::new_empty(state, {batch, num_drafts}, ScalarType::Long);
  Tensor probs = torch::stable::new_empty(
      state, {batch, temperature.has_value() ? num_drafts : 0, vocabulary}, ScalarType::Float);
  int64_t* ids_out = static_cast<int64_t*>(ids.data_ptr());
  float* probs_out = static_cast<float*>(probs.data_ptr());

  std::vector<std::optional<DraftMemory>> memory(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      STD_TORCH_CHECK(
          lengths[b] >= 0 && lengths[b] <= block_table.size(1) * pages.page_size,
          kOp, ": num_tokens must be in 0..", block_table.size(1) * pages.page_size, ", got ", lengths[b]);
      memory[b].emplace(pages, config, integers(block_table, kOp, b), lengths[b]);
    }
  });
  int64_t most_entries = 0;
  for (const auto& one : memory) most_entries = std::max(most_entries, one->num_entries());

  const Scratch state_scratch(batch * hidden), input_scratch(batch * 2 * hidden), query_scratch(batch * query_size),
      attended_scratch(batch * query_size), change_scratch(batch * hidden), gate_scratch(batch * middle),
      up_scratch(batch * middle), logits_scratch(batch * vocabulary), row_scratch(hidden),
      following_scratch(w.next_proj.rows > 0 ? batch * kv_size : 0),
      drafted_scratch(2 * (num_drafts - 1) * batch * kv_size);
  float *f = state_scratch.get(), *x = input_scratch.get(), *query = query_scratch.get(),
        *attended = attended_scratch.get(), *change = change_scratch.get(), *gate = gate_scratch.get(),
        *up = up_scratch.get(), *logits = logits_scratch.get();
  // [K - 1, B, G d] each.
  float* drafted_keys = drafted_scratch.get();
  float* drafted_values = drafted_keys + (num_drafts - 1) * batch * kv_size;
  const FloatRows embedding(w.embedding, kOp), states(state, kOp);
  for (int64_t b = 0; b < batch; ++b) std::copy_n(states.read(b * hidden, hidden, f + b * hidden), hidden, f + b * hidden);

  for (int64_t step = 0; step < num_drafts; ++step) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t id = step == 0 ? first_ids[b] : ids_out[b * num_drafts + step - 1];
      STD_TORCH_CHECK(
          id >= 0 && id < w.embedding.size(0),
          kOp, ": token ids must be in 0..", w.embedding.size(0) - 1, ", got ", id);
      const float* row = embedding.read(id * hidden, hidden, row_scratch.get());
      rms_norm(row, w.embed_norm.data(), hidden, eps, x + b * 2 * hidden);
      rms_norm(f + b * hidden, w.state_norm.data(), hidden, eps, x + b * 2 * hidden + hidden);
    }
    if (step == 0) {
      multiply({{&w.q_proj, x, 2 * hidden, query}, {&w.in_proj, x, 2 * hidden, change}}, batch);
    } else {
      const int64_t own = (step - 1) * batch * kv_size;
      multiply(
          {{&w.q_proj, x, 2 * hidden, query},
           {&w.in_proj, x, 2 * hidden, change},
           {&w.k_proj, x + hidden, 2 * hidden, drafted_keys + own},
           {&w.v_proj, x + hidden, 2 * hidden, drafted_values + own}},
          batch);
      if (w.next_proj.rows > 0) {
        multiply({{&w.next_proj, x, 2 * hidden, following_scratch.get()}}, batch);
        add(drafted_values + own, following_scratch.get(), batch * kv_size, drafted_values + own);
      }
    }
    add(f, change, batch * hidden, f);
    scale(1.0f / std::sqrt(static_cast<float>(dim)), batch * query_size, query);

    const int64_t grain = std::max<int64_t>(1, kGrain / ((most_entries + step + 1) * dim));
    torch::stable::parallel_for(0, batch * num_heads, grain, [&](int64_t first, int64_t last) {
      const Scratch scores(most_entries + step);
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / num_heads, head = task % num_heads, group = head / heads_per_group;
        const int64_t own = b * kv_size + group * dim;
        memory[b]->attend(
            query + task * dim, group, w.slopes[head], w.far_bias[head], step, drafted_keys + own, drafted_values + own,
            batch * kv_size, scores.get(), attended + task * dim);
      }
    });

    multiply({{&w.o_proj, attended, query_size, change}}, batch);
    add(f, change, batch * hidden, f);
    for (int64_t b = 0; b < batch; ++b) rms_norm(f + b * hidden, w.mlp_norm.data(), hidden, eps, x + b * hidden);
    multiply({{&w.gate_proj, x, hidden, gate}, {&w.up_proj, x, hidden, up}}, batch);
    gate_by_silu(up, batch * middle, gate);
    multiply({{&w.down_proj, gate, middle, change}}, batch);
    add(f, change, batch * hidden, f);
    for (int64_t b = 0; b < batch; ++b) rms_norm(f + b * hidden, w.norm.data(), hidden, eps, x + b * hidden);
    multiply({{&w.head, x, hidden, logits}}, batch);

    torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / vocabulary), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const float* row = logits + b * vocabulary;
        int64_t* id = ids_out + b * num_drafts + step;
        if (!temperature.has_value()) {
          *id = w.token_id(argmax(row, vocabulary));
          continue;
        }
        const float t = static_cast<const float*>(temperature->data_ptr())[b];
        float* p = probs_out + (b * num_drafts + step) * vocabulary;
        const bool greedy = t < kLeastTemperature;
        const double total = exponentials(row, largest_of(row, vocabulary), greedy ? 1.0f : 1.0f / t, vocabulary, p);
        const double* u = static_cast<const double*>(uniform->data_ptr());
        *id = w.token_id(
            greedy ? argmax(row, vocabulary) : sample(p, vocabulary, total, u[b * num_drafts + step]));
        scale(static_cast<float>(1.0 / total), vocabulary, p);
      }
    });
  }
  return {ids, probs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) {
  m.impl("draft_tokens", TORCH_BOX(&draft_tokens));
}

}  // namespace qm_spec
