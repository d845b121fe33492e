// merge_groups_: merge every group that has grown old where it stands in its page; reference, with the formulas, in
// qm_spec/ops/merge_groups.py and merge_entries.py. Source: QuickMerge++, arXiv 2508.13204.
//
// First the work of each request is listed, by a walk over spans that reads states only. Then it is done: a group
// takes all its levels at once, in the first-level cache, and is rounded to the cache's type between them, as if each
// had been stored; so the result does not depend on when a group is visited.
#include <algorithm>
#include <array>
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

// One group taken from a level to another, or, where `tail` is a place, the entry of a span joined by that of the next,
// whose last group is marked.
struct Step {
  Place head, tail, last;
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
      cut();
    }
    if (parts.back() < size()) parts.push_back(size());
  }

  int64_t size() const { return static_cast<int64_t>(steps.size()); }

  std::vector<Step> steps;
  // Where parts that have nothing to do with each other begin, and the end.
  std::vector<int64_t> parts{0};
  // Pairs of spans larger than a part, which need the parts and the pairs before them.
  std::vector<Step> large;

 private:
  int64_t level_of(int64_t log2) const { return config_.schedule_levels + log2; }

  void cut() {
    if (parts.back() + kGrainGroups <= size()) parts.push_back(size());
  }

  // List what makes the 2^log2 groups from `group` on one span. Returns its level; -1 if they cannot be one.
  int64_t visit(int64_t group, int64_t log2) {
    const SlotState first = groups_.first_state(group);
    const int64_t level = RequestGroups::level(first, config_);
    if (log2 == 0) {
      if (group + kGrainGroups < due_[1]) groups_.prefetch(group + kGrainGroups);
      const Place at = groups_.place(group);
      // The null page is nobody's.
      if (at.page == 0) return -1;
      int64_t due = level;
      while (due < config_.schedule_levels && group < due_[due + 1]) ++due;
      if (due > level) steps.push_back({at, {-1, -1}, {-1, -1}, level, due});
      return due;
    }
    if (level >= level_of(log2) && groups_.is_span(group, log2)) return level;
    const int64_t half = int64_t{1} << (log2 - 1), from = level_of(log2 - 1);
    const bool is_large = 2 * half > kGrainGroups;
    const int64_t head = visit(group, log2 - 1);
    if (is_large) cut();
    const int64_t tail = visit(group + half, log2 - 1);
    if (head != from || tail != from) return -1;
    (is_large ? large : steps)
        .push_back(
            {groups_.place(group), groups_.place(group + half), groups_.place(group + 2 * half - 1), from, from + 1});
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
        scratch(4 * most * width + most * most + 5 * most),
        cluster(most),
        centre(most + 1),
        other(most + 1),
        begin(most),
        member(most) {
    float* next = scratch.get();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    keys = take(most * width), values = take(most * width);
    new_keys = take(most * width), new_values = take(most * width);
    gram = take(most * most);
    mass = take(most), count = take(most), new_mass = take(most), new_count = take(most), weight = take(most);
    // Products of four with four may take rows behind the last entry.
    std::fill(keys, next, 0.0f);
  }

  const int64_t width, most;
  Scratch scratch;
  float *keys, *values, *new_keys, *new_values, *gram, *mass, *count, *new_mass, *new_count, *weight;
  std::vector<int32_t> cluster, centre, other, begin, member;
};

const IntVec kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// gram[i, j] = key i . key j of `num` entries; rows are to_lanes(num) apart, lanes from `num` on hold anything.
QM_INLINE void gram_matrix(Entries& e, int64_t num) {
  const int64_t lanes = to_lanes(num);
  const auto rows = [&](int64_t i) __attribute__((always_inline)) {
    const float* first = e.keys + i * e.width;
    return std::array<const float*, 4>{first, first + e.width, first + 2 * e.width, first + 3 * e.width};
  };
  alignas(64) float block[16];
  const auto copy = [&](float* to) __attribute__((always_inline)) {
    for (int64_t r = 0; r < 4; ++r) std::memcpy(to + r * lanes, block + 4 * r, 4 * sizeof(float));
  };
  for (int64_t i = 0; i < num; i += 4) {
    multiply_4x4<true>(rows(i).data(), rows(i).data(), e.width, block);
    copy(e.gram + i * lanes + i);
    for (int64_t j = i + 4; j < num; j += 4) {
      multiply_4x4<false>(rows(i).data(), rows(j).data(), e.width, block);
      copy(e.gram + i * lanes + j);
      transpose_4x4(block, e.gram + j * lanes + i, lanes);
    }
  }
}

// The part of the same that the assignment needs: the products of centres with other entries and with themselves.
QM_INLINE void centre_products(Entries& e, int64_t num, int64_t keep) {
  const int64_t lanes = to_lanes(num), rest = num - keep;
  const int32_t *centre = e.centre.data(), *other = e.other.data();
  // What is left of a block repeats its last entry.
  const auto rows = [&](const int32_t* list, int64_t i, int64_t count) __attribute__((always_inline)) {
    std::array<const float*, 4> row;
    for (int64_t r = 0; r < 4; ++r) row[r] = e.keys + list[std::min(i + r, count - 1)] * e.width;
    return row;
  };
  alignas(64) float block[16];
  for (int64_t i = 0; i < keep; i += 4) {
    const auto centres = rows(centre, i, keep);
    multiply_4x4<true>(centres.data(), centres.data(), e.width, block);
    for (int64_t r = i; r < std::min(i + 4, keep); ++r) e.gram[centre[r] * (lanes + 1)] = block[5 * (r - i)];
    for (int64_t j = 0; j < rest; j += 4) {
      multiply_4x4<false>(centres.data(), rows(other, j, rest).data(), e.width, block);
      for (int64_t r = i; r < std::min(i + 4, keep); ++r)
        for (int64_t c = j; c < std::min(j + 4, rest); ++c)
          e.gram[centre[r] * lanes + other[c]] = block[4 * (r - i) + c - j];
    }
  }
}

// Mass of each token from the entropy of its attention among the group's keys, as in `saliency_mass`.
QM_INLINE void saliency_mass(Entries& e, int64_t num, int64_t head_dim, const Rule& rule) {
  const int64_t lanes = to_lanes(num);
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  Vec lows = all(INFINITY), highs = all(-INFINITY);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Vec most = load(e.gram + i);
    for (int64_t j = 1; j < num; ++j) {
      const Vec score = load(e.gram + j * lanes + i);
      most = score > most ? score : most;
    }
    Vec total{}, weighted{};
    for (int64_t j = 0; j < num; ++j) {
      const Vec z = (load(e.gram + j * lanes + i) - most) * scale, p = exp_of_negative(z);
      total += p;
      weighted += z * p;
    }
    Vec entropy = log(total) - weighted / total;
    entropy = rule.inverse ? -entropy : entropy;
    store(entropy, e.mass + i);
    const IntVec live = kLane < static_cast<int32_t>(num - i);
    lows = live & (entropy < lows) ? entropy : lows;
    highs = live & (entropy > highs) ? entropy : highs;
  }
  const float low = smallest(lows), spread = largest(highs) - low;
  const bool alike = !(spread > 1e-6f);
  const float slope = 1.0f / spread, steepness = 1.0f / rule.temperature;
  Vec total{};
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Vec s = alike ? all(0.5f) : (load(e.mass + i) - low) * slope;
    const Vec p = exp((s - (alike ? 0.5f : 1.0f)) * steepness);
    store(s, e.mass + i);
    store(p, e.weight + i);
    total += kLane < static_cast<int32_t>(num - i) ? p : Vec{};
  }
  const float share = 1.0f / sum(total);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Vec pi = load(e.weight + i) * share;
    store(pi * load(e.mass + i) + (1.0f - pi) * rule.epsilon, e.mass + i);
  }
}

// List the `keep` entries of the highest mass, in order (ties: the earlier), and the others.
QM_INLINE void choose(Entries& e, int64_t num, int64_t keep) {
  const int64_t lanes = to_lanes(num);
  // Masses are positive, so their bits are in the same order, and those of stale bytes in some order too.
  int32_t *order = e.begin.data(), *rank = e.cluster.data();
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const BitVec bits = read_bytes<BitVec>(e.mass + i) & 0x7fffffffu;
    std::memcpy(order + i, &bits, sizeof bits);
  }
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const IntVec own = read_bytes<IntVec>(order + i), number = kLane + static_cast<int32_t>(i);
    IntVec before{};
    for (int32_t j = 0; j < num; ++j) before -= order[j] > own + (j < number);
    std::memcpy(rank + i, &before, sizeof before);
  }
  int32_t *centre = e.centre.data(), *other = e.other.data();
  for (int32_t i = 0; i < num; ++i) {
    const bool stays = rank[i] < keep;
    *centre = *other = i;
    centre += stays, other += !stays;
  }
}

// cluster[i] of `num` entries: those listed stay, the others join the one of the nearest key by cosine similarity.
QM_INLINE void assign(Entries& e, int64_t num, int64_t keep) {
  const int64_t lanes = to_lanes(num);
  int32_t *cluster = e.cluster.data(), *centre = e.centre.data();
  // The norm of the entry that looks for a centre changes nothing about which is nearest.
  float* scale = e.weight;
  for (int64_t k = 0; k < keep; ++k) scale[k] = e.gram[centre[k] * (lanes + 1)];
  for (int64_t k = 0; k < keep; k += kLanes) {
    const Vec norm = sqrt(load(scale + k));
    store(1.0f / (norm > 1e-12f ? norm : all(1e-12f)), scale + k);
  }
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Vec best = all(-INFINITY);
    IntVec nearest{};
    for (int32_t k = 0; k < keep; ++k) {
      const Vec similarity = load(e.gram + centre[k] * lanes + i) * scale[k];
      const IntVec nearer = similarity > best;
      nearest = nearer ? IntVec{} + k : nearest;
      best = nearer ? similarity : best;
    }
    std::memcpy(cluster + i, &nearest, sizeof nearest);
  }
  for (int32_t k = 0; k < keep; ++k) cluster[centre[k]] = k;
}

// List the members of each cluster in order, add up their masses and counts, and set weight[i] to the share of entry i
// in the mass of its cluster.
QM_INLINE void divide(Entries& e, int64_t num, int64_t keep) {
  const int32_t* cluster = e.cluster.data();
  int32_t* begin = e.begin.data();
  for (int64_t i = 0; i < keep; i += kLanes) {
    const IntVec number = kLane + static_cast<int32_t>(i);
    Vec mass{}, count{};
    IntVec before{};
    for (int64_t j = 0; j < num; ++j) {
      const IntVec mine = number == cluster[j];
      mass = mine ? mass + e.mass[j] : mass;
      count = mine ? count + e.count[j] : count;
      before -= cluster[j] < number;
    }
    store(mass, e.new_mass + i);
    store(count, e.new_count + i);
    std::memcpy(begin + i, &before, sizeof before);
  }
  for (int32_t i = 0; i < num; ++i) {
    e.member[begin[cluster[i]]++] = i;
    e.weight[i] = e.new_mass[cluster[i]];
  }
  // Divided first, so that an entry by itself is copied bit by bit.
  for (int64_t i = 0; i < num; i += kLanes) store(load(e.mass + i) / load(e.weight + i), e.weight + i);
}

// Rows of elements as floats or as they lie in their slots.
template <class V>
struct Rows {
  const char* first;
  int64_t stride_bytes;
  const V* operator[](int64_t i) const { return reinterpret_cast<const V*>(first + i * stride_bytes); }
};

// kVectors of the means of keys and values of each cluster, from column `c` on.
template <class T, int kVectors, class V>
QM_INLINE void means(Entries& e, const Rows<V>& values, int64_t keep, int64_t c) {
  const int32_t* member = e.member.data();
  for (int64_t k = 0; k < keep; ++k) {
    const int32_t* end = e.member.data() + e.begin[k];
    Vec key_sum[kVectors], value_sum[kVectors];
    const float* key = e.keys + *member * e.width + c;
    const V* value = values[*member] + c;
    float weight = e.weight[*member];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      key_sum[v] = weight * load(key + v * kLanes);
      value_sum[v] = weight * load(value + v * kLanes);
    }
    for (++member; member < end; ++member) {
      key = e.keys + *member * e.width + c, value = values[*member] + c, weight = e.weight[*member];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        key_sum[v] += weight * load(key + v * kLanes);
        value_sum[v] += weight * load(value + v * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t to = k * e.width + c + v * kLanes;
      store(rounded_to(key_sum[v], static_cast<const T*>(nullptr)), e.new_keys + to);
      store(rounded_to(value_sum[v], static_cast<const T*>(nullptr)), e.new_values + to);
    }
  }
}

// Take the entries to `keep`: keys and values become the mean of each cluster weighted by mass.
template <class T, class V>
QM_INLINE void merge(Entries& e, const Rows<V>& values, int64_t keep) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= e.width; c += 4 * kLanes) means<T, 4>(e, values, keep, c);
  for (; c < e.width; c += kLanes) means<T, 1>(e, values, keep, c);
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
  void prefetch(int64_t from, int64_t to) const {
    for (int64_t i = from; i < to; ++i)
      for (int64_t byte = 0; byte < state_offset; byte += 64) __builtin_prefetch(key(i) + byte, 1);
  }
  SlotState state(int64_t i) const { return read_bytes<SlotState>(key(i) + state_offset); }
  void set_state(int64_t i, const SlotState& state) const { std::memcpy(key(i) + state_offset, &state, sizeof state); }
};

template <class T>
QM_INLINE void read_entries(const Slots& slots, int64_t num, int64_t head_dim, Entries& e) {
  for (int64_t i = 0; i < num; ++i) {
    load_row(reinterpret_cast<const T*>(slots.key(i)), head_dim, e.keys + i * e.width);
    // Whole vectors of values are read where they stand, once.
    if (head_dim < e.width) load_row(reinterpret_cast<const T*>(slots.value(i)), head_dim, e.values + i * e.width);
    const SlotState state = slots.state(i);
    e.mass[i] = state.mass, e.count[i] = state.count;
  }
}

template <class T>
QM_INLINE void write_entries(
    const Entries& e, int64_t num, int64_t head_dim, int64_t group_size, int64_t level, const Slots& slots) {
  for (int64_t i = 0; i < num; ++i) {
    store_row(e.keys + i * e.width, head_dim, reinterpret_cast<T*>(slots.key(i)));
    store_row(e.values + i * e.width, head_dim, reinterpret_cast<T*>(slots.value(i)));
    slots.set_state(i, {e.mass[i], e.count[i], i == 0 ? static_cast<float>(level) : 0.0f, 0.0f});
  }
  for (int64_t i = num; i < group_size; ++i)
    slots.set_state(i, {0.0f, 0.0f, i == 0 ? static_cast<float>(level) : 0.0f, 0.0f});
}

// Groups merged side by side: one waits for its numbers while another is computed.
constexpr int64_t kBatch = 4;

struct Batch {
  Batch(int64_t group_size, int64_t head_dim) {
    for (int64_t b = 0; b < kBatch; ++b) entries.emplace_back(group_size, head_dim);
  }

  int64_t size = 0, from = 0, to = 0;
  Slots slots[kBatch];
  // Those of a later batch, to be fetched meanwhile.
  int64_t num_later = 0;
  Slots later[kBatch];
  std::vector<Entries> entries;
};

template <class T>
QM_INLINE void merge_batch_of(Batch& batch, int64_t head_dim, const Rule& rule) {
  const int64_t left = rule.config.held(batch.to);
  int64_t num = rule.config.held(batch.from);
  Entries* e = batch.entries.data();
  for (int64_t b = 0; left > 0 && b < batch.size; ++b) read_entries<T>(batch.slots[b], num, head_dim, e[b]);
  for (int64_t level = batch.from + 1; left > 0 && level <= batch.to; ++level) {
    const int64_t keep = rule.config.held(level);
    if (level == 1) {
      // Scores for the entropy, and similarities for the assignment.
      for (int64_t b = 0; b < batch.size; ++b) gram_matrix(e[b], num);
      for (int64_t b = 0; b < batch.size; ++b) saliency_mass(e[b], num, head_dim, rule);
    }
    if (keep > 1) {
      for (int64_t b = 0; b < batch.size; ++b) choose(e[b], num, keep);
      for (int64_t b = 0; level > 1 && b < batch.size; ++b) centre_products(e[b], num, keep);
      for (int64_t b = 0; b < batch.size; ++b) assign(e[b], num, keep);
    } else {
      for (int64_t b = 0; b < batch.size; ++b) std::fill_n(e[b].cluster.data(), num, 0);
    }
    for (int64_t b = 0; b < batch.size; ++b) divide(e[b], num, keep);
    // A part at each level, so that memory is never waited for.
    const int64_t slots = rule.config.held(batch.from), levels = batch.to - batch.from, done = level - batch.from;
    for (int64_t b = 0; b < batch.num_later; ++b)
      batch.later[b].prefetch(slots * (done - 1) / levels, slots * done / levels);
    for (int64_t b = 0; b < batch.size; ++b) {
      const Rows<float> values{reinterpret_cast<const char*>(e[b].values), e[b].width * int64_t{sizeof(float)}};
      const Rows<T> in_slots{batch.slots[b].value(0), batch.slots[b].stride};
      if (level == batch.from + 1 && head_dim == e[b].width) {
        merge<T>(e[b], in_slots, keep);
      } else {
        merge<T>(e[b], values, keep);
      }
    }
    num = keep;
  }
  for (int64_t b = 0; b < batch.size; ++b)
    write_entries<T>(e[b], left, head_dim, rule.config.group_size, batch.to, batch.slots[b]);
}

// One entry joins another: the mean weighted by mass.
template <class T>
QM_INLINE void merge_pair_of(
    const Slots& head, const Slots& tail, const Slots& last, int64_t head_dim, int64_t to) {
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
  last.set_state(0, {0.0f, 0.0f, static_cast<float>(to), 0.0f});
}

QM_MULTIVERSION void merge_batch(Batch& batch, ScalarType type, int64_t head_dim, const Rule& rule) {
  if (type == ScalarType::Float) merge_batch_of<float>(batch, head_dim, rule);
  if (type == ScalarType::BFloat16) merge_batch_of<BFloat16>(batch, head_dim, rule);
  if (type == ScalarType::Half) merge_batch_of<Float16>(batch, head_dim, rule);
}

QM_MULTIVERSION void merge_pair(
    const Slots& head, const Slots& tail, const Slots& last, ScalarType type, int64_t head_dim, int64_t to) {
  if (type == ScalarType::Float) merge_pair_of<float>(head, tail, last, head_dim, to);
  if (type == ScalarType::BFloat16) merge_pair_of<BFloat16>(head, tail, last, head_dim, to);
  if (type == ScalarType::Half) merge_pair_of<Float16>(head, tail, last, head_dim, to);
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
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t grain = std::max<int64_t>(1, kGrainGroups * num_tasks / std::max<int64_t>(1, num_steps));
  const int64_t row = cache.head_dim * cache.element_bytes;
  const auto slots_of = [&](const Place& at, int64_t head) {
    return Slots{cache.key(at.page, head, at.slot), cache.slot_stride_bytes(), row, 2 * row};
  };
  const auto join = [&](const Step& pair, int64_t head) {
    merge_pair(
        slots_of(pair.head, head), slots_of(pair.tail, head), slots_of(pair.last, head), cache.type, cache.head_dim,
        pair.to);
  };
  // All parts of a head one after the other: the heads of a slot may lie side by side in memory.
  parallel(num_tasks * cache.num_heads, grain, [&](int64_t first, int64_t last) {
    Batch batch(rule.config.group_size, cache.head_dim);
    std::vector<const Step*> pairs;
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task % cache.num_heads;
      const auto slots = [&](const Place& at) { return slots_of(at, head); };
      const auto flush = [&] {
        if (batch.size > 0) merge_batch(batch, cache.type, cache.head_dim, rule);
        batch.size = batch.num_later = 0;
        for (const Step* pair : pairs) join(*pair, head);
        pairs.clear();
      };
      const Task& part = tasks[task / cache.num_heads];
      const Step* later = part.begin;
      for (int64_t groups = 0; later < part.end && (later->tail.page >= 0 || groups++ < kBatch);) ++later;
      for (const Step* step = part.begin; step < part.end; ++step) {
        // A pair needs the groups and the pairs before it, and no group needs a pair.
        if (step->tail.page >= 0) {
          pairs.push_back(step);
          continue;
        }
        if (batch.size == kBatch || (batch.size > 0 && (batch.from != step->from || batch.to != step->to))) flush();
        batch.from = step->from, batch.to = step->to;
        batch.slots[batch.size++] = slots(step->head);
        if (later == part.end) continue;
        batch.later[batch.num_later++] = slots(later->head);
        do ++later;
        while (later < part.end && later->tail.page >= 0);
      }
      flush();
    }
  });
  parallel(static_cast<int64_t>(plans.size()) * cache.num_heads, kGrainGroups, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
      for (const Step& pair : plans[task / cache.num_heads]->large) join(pair, task % cache.num_heads);
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
      for (const auto* steps : {&plans[i]->steps, &plans[i]->large}) {
        if (waiting.size() == 1) break;
        for (const Step& step : *steps)
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
