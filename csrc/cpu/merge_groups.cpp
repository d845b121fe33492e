// merge_groups_: merge every group that has grown old where it stands in its page; reference, with the formulas, in
// qm_spec/ops/merge_groups.py and merge_entries.py. Source: QuickMerge++, arXiv 2508.13204.
//
// First the work of each request is listed, by a walk over spans that reads states only. Then it is done: a group
// takes all its levels at once, in the first-level cache, and is rounded to the cache's type between them, as if each
// had been stored; so the result does not depend on when a group is visited.
#include <algorithm>
#include <cmath>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "csrc/cpu/entries.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

// Groups of one head that one thread should have to merge before another is woken.
constexpr int64_t kGrainGroups = 16;

struct Rule {
  const MergeConfig& config;
  bool inverse;
  float temperature, epsilon;
};

// One group taken from a level to another, or, where `tail` is a place, the entry of a span joined by that of the next.
struct Step {
  Place head, tail;
  int64_t from, to;
};

// The work of one request.
class Plan {
 public:
  Plan(const PagedCache& cache, const MergeConfig& config, Integers pages, int64_t columns, int64_t frontier)
      : config_(config), groups_(cache, config, pages) {
    const int64_t num_groups = columns * (cache.page_size / config.group_size);
    for (int64_t level = 0; level <= config.num_levels; ++level)
      due_.push_back(level == 0 ? 0 : std::min(config.groups_due(level, frontier), num_groups));
    const int64_t most_log2 = config.span_log2(config.num_levels);
    for (int64_t group = 0; group < due_[1];) {
      int64_t log2 = most_log2;
      while (log2 > 0 && (group % (int64_t{1} << log2) || group + (int64_t{1} << log2) > due_[level_of(log2)])) --log2;
      visit(group, log2);
      group += int64_t{1} << log2;
      if (parts.back() + kGrainGroups <= size()) parts.push_back(size());
    }
    if (parts.back() < size()) parts.push_back(size());
  }

  int64_t size() const { return static_cast<int64_t>(steps.size()); }

  std::vector<Step> steps;
  // Where parts that have nothing to do with each other begin, and the end.
  std::vector<int64_t> parts{0};

 private:
  int64_t level_of(int64_t log2) const { return config_.schedule_levels + log2; }

  // List what makes the 2^log2 groups from `group` on one span. Returns its level; -1 if they cannot be one.
  int64_t visit(int64_t group, int64_t log2) {
    const SlotState first = groups_.first_state(group);
    const int64_t level = RequestGroups::level(first, config_);
    if (log2 == 0) {
      const Place at = groups_.place(group);
      // The null page is nobody's.
      if (at.page == 0) return -1;
      int64_t due = level;
      while (due < config_.schedule_levels && group < due_[due + 1]) ++due;
      if (due > level) steps.push_back({at, {-1, -1}, level, due});
      return due;
    }
    if (level >= level_of(log2) && groups_.is_span(group, log2)) return level;
    const int64_t half = int64_t{1} << (log2 - 1), from = level_of(log2 - 1);
    const int64_t head = visit(group, log2 - 1), tail = visit(group + half, log2 - 1);
    if (head != from || tail != from) return -1;
    steps.push_back({groups_.place(group), groups_.place(group + half), from, from + 1});
    return from + 1;
  }

  const MergeConfig& config_;
  RequestGroups groups_;
  std::vector<int64_t> due_;  // groups old enough for each level
};

// The entries of one group while it is merged, as floats; rows are padded to whole vectors.
struct Entries {
  Entries(int64_t group_size, int64_t head_dim)
      : width(to_lanes(head_dim)),
        most(to_lanes(group_size)),
        scratch(5 * most * width + most * most + 5 * most),
        cluster(most),
        centre(most) {
    float* next = scratch.get();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    keys = take(most * width), values = take(most * width);
    new_keys = take(most * width), new_values = take(most * width);
    columns = take(most * width), gram = take(most * most);
    mass = take(most), count = take(most), new_mass = take(most), new_count = take(most), weight = take(most);
  }

  const int64_t width, most;
  Scratch scratch;
  float *keys, *values, *new_keys, *new_values, *columns, *gram, *mass, *count, *new_mass, *new_count, *weight;
  std::vector<int32_t> cluster, centre;
};

// gram[i, j] = keys[i] . keys[j] of `num` entries; rows are to_lanes(num) apart.
QM_INLINE void gram_matrix(Entries& e, int64_t num) {
  const int64_t lanes = to_lanes(num);
  std::fill(e.keys + num * e.width, e.keys + lanes * e.width, 0.0f);
  for (int64_t j = 0; j < lanes; j += kLanes) {
    transpose_16(e.keys + j * e.width, e.width, e.columns);
    multiply(e.keys, num, e.width, e.columns, kLanes, e.width, false, e.gram + j, lanes);
  }
}

// Mass of each token from the entropy of its attention among the group's keys, as in `saliency_mass`.
QM_INLINE void saliency_mass(Entries& e, int64_t num, int64_t head_dim, const Rule& rule) {
  const int64_t lanes = to_lanes(num);
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  float low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Vec most = load(e.gram + i);
    for (int64_t j = 1; j < num; ++j) {
      const Vec score = load(e.gram + j * lanes + i);
      most = score > most ? score : most;
    }
    Vec total{}, weighted{};
    for (int64_t j = 0; j < num; ++j) {
      const Vec z = (load(e.gram + j * lanes + i) - most) * scale, p = exp(z);
      total += p;
      weighted += z * p;
    }
    const Vec entropy = log(total) - weighted / total;
    store(rule.inverse ? -entropy : entropy, e.mass + i);
  }
  for (int64_t i = 0; i < num; ++i) low = std::min(low, e.mass[i]), high = std::max(high, e.mass[i]);
  const float spread = high - low;
  const bool alike = !(spread > 1e-6f);
  float total = 0.0f;
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Vec s = alike ? all(0.5f) : (load(e.mass + i) - low) / spread;
    store(s, e.mass + i);
    store(exp((s - (alike ? 0.5f : 1.0f)) / rule.temperature), e.weight + i);
  }
  for (int64_t i = 0; i < num; ++i) total += e.weight[i];
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Vec pi = load(e.weight + i) / total;
    store(pi * load(e.mass + i) + (1.0f - pi) * rule.epsilon, e.mass + i);
  }
}

// cluster[i] of `num` entries: the `keep` of the highest mass stay in order (ties: the earlier), the others join the
// one of the nearest key by cosine similarity.
QM_INLINE void assign(Entries& e, int64_t num, int64_t keep) {
  int32_t *cluster = e.cluster.data(), *centre = e.centre.data();
  if (keep == 1) {
    std::fill(cluster, cluster + num, 0);
    return;
  }
  const int64_t lanes = to_lanes(num);
  int32_t* rank = cluster;
  std::fill(rank, rank + lanes, 0);
  for (int32_t j = 0; j < num; ++j) {
    const float other = e.mass[j];
#pragma omp simd
    for (int32_t i = 0; i < lanes; ++i)
      rank[i] += static_cast<int32_t>(other > e.mass[i]) | (static_cast<int32_t>(other == e.mass[i]) & (j < i));
  }
  // Never more than `keep`, whatever a mass of stale bytes compares to.
  int32_t kept = 0;
  for (int32_t i = 0; i < num; ++i)
    if (rank[i] < keep && kept < keep) centre[kept++] = i;
  float* best = e.weight;
  std::fill(best, best + lanes, -INFINITY);
  std::fill(cluster, cluster + lanes, 0);
  for (int32_t k = 0; k < kept; ++k) {
    const float* products = e.gram + centre[k] * lanes;
    // The norm of the entry that looks for a centre changes nothing about which is nearest.
    const float scale = 1.0f / std::max(std::sqrt(products[centre[k]]), 1e-12f);
#pragma omp simd
    for (int32_t i = 0; i < lanes; ++i) {
      const float similarity = products[i] * scale;
      cluster[i] = similarity > best[i] ? k : cluster[i];
      best[i] = similarity > best[i] ? similarity : best[i];
    }
  }
  for (int32_t k = 0; k < kept; ++k) cluster[centre[k]] = k;
}

// Take `num` entries to `keep`: keys and values become the mean of each cluster weighted by mass, masses and counts
// add up.
template <class T>
QM_INLINE void merge(Entries& e, int64_t num, int64_t keep) {
  assign(e, num, keep);
  const int32_t* cluster = e.cluster.data();
  std::fill(e.new_mass, e.new_mass + keep, 0.0f);
  std::fill(e.new_count, e.new_count + keep, 0.0f);
  for (int64_t i = 0; i < num; ++i) {
    e.new_mass[cluster[i]] += e.mass[i];
    e.new_count[cluster[i]] += e.count[i];
  }
  // Divided first, so that an entry by itself is copied bit by bit.
  for (int64_t i = 0; i < num; ++i) e.weight[i] = e.mass[i] / e.new_mass[cluster[i]];
  const auto mean = [&](const float* rows, float* out) __attribute__((always_inline)) {
    std::fill(out, out + keep * e.width, 0.0f);
    for (int64_t i = 0; i < num; ++i) {
      float* to = out + cluster[i] * e.width;
      for (int64_t c = 0; c < e.width; c += kLanes)
        store(load(to + c) + e.weight[i] * load(rows + i * e.width + c), to + c);
    }
    for (int64_t c = 0; c < keep * e.width; c += kLanes)
      store(rounded_to(load(out + c), static_cast<const T*>(nullptr)), out + c);
  };
  mean(e.keys, e.new_keys);
  mean(e.values, e.new_values);
  std::swap(e.keys, e.new_keys);
  std::swap(e.values, e.new_values);
  std::swap(e.mass, e.new_mass);
  std::swap(e.count, e.new_count);
}

// The slots of one head of a group.
struct Slots {
  char* first;
  int64_t stride, value_offset, state_offset;

  char* key(int64_t i) const { return first + i * stride; }
  char* value(int64_t i) const { return key(i) + value_offset; }
  void prefetch(int64_t num) const {
    for (int64_t i = 0; i < num; ++i)
      for (int64_t byte = 0; byte < state_offset; byte += 64) __builtin_prefetch(key(i) + byte, 1);
  }
  SlotState state(int64_t i) const { return read_bytes<SlotState>(key(i) + state_offset); }
  void set_state(int64_t i, const SlotState& state) const { std::memcpy(key(i) + state_offset, &state, sizeof state); }
};

template <class T>
QM_INLINE void merge_group_of(const Slots& slots, int64_t head_dim, int64_t from, int64_t to, const Rule& rule, Entries& e) {
  int64_t num = rule.config.held(from);
  const int64_t left = rule.config.held(to);
  if (left > 0) {
    for (int64_t i = 0; i < num; ++i) {
      load_row(reinterpret_cast<const T*>(slots.key(i)), head_dim, e.keys + i * e.width);
      load_row(reinterpret_cast<const T*>(slots.value(i)), head_dim, e.values + i * e.width);
      const SlotState state = slots.state(i);
      e.mass[i] = state.mass, e.count[i] = state.count;
    }
    for (int64_t level = from + 1; level <= to; ++level) {
      const int64_t keep = rule.config.held(level);
      // Scores for the entropy, similarities for the assignment.
      if (level == 1 || keep > 1) gram_matrix(e, num);
      if (level == 1) saliency_mass(e, num, head_dim, rule);
      merge<T>(e, num, keep);
      num = keep;
    }
  }
  for (int64_t i = 0; i < rule.config.group_size; ++i) {
    SlotState state{};
    if (i < left) {
      store_row(e.keys + i * e.width, head_dim, reinterpret_cast<T*>(slots.key(i)));
      store_row(e.values + i * e.width, head_dim, reinterpret_cast<T*>(slots.value(i)));
      state.mass = e.mass[i], state.count = e.count[i];
    }
    if (i == 0) state.level = static_cast<float>(to);
    slots.set_state(i, state);
  }
}

// One entry joins another: the mean weighted by mass.
template <class T>
QM_INLINE void merge_pair_of(const Slots& head, const Slots& tail, int64_t head_dim, int64_t to) {
  const SlotState a = head.state(0), b = tail.state(0);
  const float mass = a.mass + b.mass, first = a.mass / mass, second = b.mass / mass;
  const auto mean = [&](char* into, const char* other) __attribute__((always_inline)) {
    T *x = reinterpret_cast<T*>(into);
    const T* y = reinterpret_cast<const T*>(other);
    float row[kLanes], other_row[kLanes];
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      const int64_t part = std::min(kLanes, head_dim - c);
      load_row(x + c, part, row);
      load_row(y + c, part, other_row);
      store(first * load(row) + second * load(other_row), row);
      store_row(row, part, x + c);
    }
  };
  mean(head.key(0), tail.key(0));
  mean(head.value(0), tail.value(0));
  head.set_state(0, {mass, a.count + b.count, static_cast<float>(to), 0.0f});
  tail.set_state(0, {0.0f, 0.0f, static_cast<float>(to), 0.0f});
}

QM_MULTIVERSION void merge_group(
    const Slots& slots, ScalarType type, int64_t head_dim, int64_t from, int64_t to, const Rule& rule, Entries& e) {
  if (type == ScalarType::Float) merge_group_of<float>(slots, head_dim, from, to, rule, e);
  if (type == ScalarType::BFloat16) merge_group_of<BFloat16>(slots, head_dim, from, to, rule, e);
  if (type == ScalarType::Half) merge_group_of<Float16>(slots, head_dim, from, to, rule, e);
}

QM_MULTIVERSION void merge_pair(const Slots& head, const Slots& tail, ScalarType type, int64_t head_dim, int64_t to) {
  if (type == ScalarType::Float) merge_pair_of<float>(head, tail, head_dim, to);
  if (type == ScalarType::BFloat16) merge_pair_of<BFloat16>(head, tail, head_dim, to);
  if (type == ScalarType::Half) merge_pair_of<Float16>(head, tail, head_dim, to);
}

// Do the work of requests that share no group.
void run(const PagedCache& cache, const Rule& rule, const std::vector<const Plan*>& plans) {
  struct Task {
    const Step *begin, *end;
  };
  std::vector<Task> tasks;
  int64_t num_steps = 0;
  for (const Plan* plan : plans) {
    for (size_t part = 0; part + 1 < plan->parts.size(); ++part)
      tasks.push_back({plan->steps.data() + plan->parts[part], plan->steps.data() + plan->parts[part + 1]});
    num_steps += plan->size();
  }
  if (tasks.empty()) return;
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t grain = std::max<int64_t>(1, kGrainGroups * num_tasks / num_steps);
  const int64_t row = cache.head_dim * cache.element_bytes;
  // All parts of a head one after the other: the heads of a slot may lie side by side in memory.
  parallel(num_tasks * cache.num_heads, grain, [&](int64_t first, int64_t last) {
    Entries entries(rule.config.group_size, cache.head_dim);
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task % cache.num_heads;
      const auto slots = [&](const Place& at) {
        return Slots{cache.key(at.page, head, at.slot), cache.slot_stride_bytes(), row, 2 * row};
      };
      const Task& part = tasks[task / cache.num_heads];
      for (const Step* step = part.begin; step < part.end; ++step) {
        if (step + 1 < part.end && step[1].tail.page < 0) slots(step[1].head).prefetch(rule.config.held(step[1].from));
        if (step->tail.page < 0) {
          merge_group(slots(step->head), cache.type, cache.head_dim, step->from, step->to, rule, entries);
        } else {
          merge_pair(slots(step->head), slots(step->tail), cache.type, cache.head_dim, step->to);
        }
      }
    }
  });
}

void merge_groups(
    Tensor cache_tensor, Tensor block_table, Tensor frontier_tensor, int64_t head_dim, int64_t window,
    int64_t group_size, std::vector<int64_t> schedule, std::string saliency, double temperature, double epsilon,
    int64_t doublings) {
  const char* op = "merge_groups_";
  const PagedCache cache(cache_tensor, head_dim, op);
  const MergeConfig config(window, group_size, schedule, doublings);
  STD_TORCH_CHECK(
      cache.page_size % group_size == 0,
      op, ": group_size ", group_size, " must divide the page size ", cache.page_size);
  const Rule rule{
      config, saliency == "inverse_entropy", static_cast<float>(temperature), static_cast<float>(epsilon)};
  const Integers frontier = integers(frontier_tensor, op);

  // Requests may share pages. In each round those work that share no group with one before them; the others list
  // their work again afterwards, so the result is that of one request after the other.
  std::vector<int64_t> waiting;
  for (int64_t request = 0; request < frontier_tensor.size(0); ++request) waiting.push_back(request);
  while (!waiting.empty()) {
    std::vector<std::unique_ptr<Plan>> plans(waiting.size());
    parallel(static_cast<int64_t>(waiting.size()), 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        plans[i] = std::make_unique<Plan>(
            cache, config, integers(block_table, op, waiting[i]), block_table.size(1), frontier[waiting[i]]);
    });
    std::vector<const Plan*> now;
    std::vector<int64_t> later;
    std::unordered_map<int64_t, size_t> owner;
    for (size_t i = 0; i < waiting.size(); ++i) {
      bool shared = false;
      for (const Step& step : plans[i]->steps) {
        if (waiting.size() == 1) break;
        for (const Place& at : {step.head, step.tail})
          if (at.page >= 0) shared |= owner.emplace(at.page * cache.page_size + at.slot, i).first->second != i;
      }
      if (shared) {
        later.push_back(waiting[i]);
      } else {
        now.push_back(plans[i].get());
      }
    }
    run(cache, rule, now);
    waiting = later;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) { m.impl("merge_groups_", TORCH_BOX(&merge_groups)); }

}  // namespace qm_spec
