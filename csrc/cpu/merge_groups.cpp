// merge_groups_: merge every group that has grown old where it stands in its page; reference, with the formulas, in
// qm_spec/ops/merge_groups.py and merge_entries.py. Source: QuickMerge++, arXiv 2508.13204.
//
// First the work of each request is listed, by a walk over spans that reads states only. Then it is done: a group
// takes all its levels at once, in the first-level cache, and is rounded to the cache's type between them, as if each
// had been stored; so the result does not depend on when a group is visited.
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
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

// Rows of elements, in their slots or in scratch memory.
struct Rows {
  char* first;
  int64_t stride;  // bytes

  template <class S>
  S* at(int64_t i) const {
    return reinterpret_cast<S*>(first + i * stride);
  }
};

// The entries of one group while it is merged. Rows in scratch memory are padded to whole vectors.
struct Entries {
  Entries(int64_t group_size, int64_t width)
      : width(width),
        most(to_lanes(group_size)),
        scratch(4 * most * width + 2 * most * most + 6 * most),
        cluster(most),
        order(most),
        centre(most + 1),
        other(most + 1),
        joined(most),
        next(most) {
    float* next = scratch.get();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    for (float** rows : {&key_rows[0], &key_rows[1], &value_rows[0], &value_rows[1]}) *rows = take(most * width);
    gram = take(most * most), blocks = take(most * most);
    mass = take(most), count = take(most), new_mass = take(most), new_count = take(most), weight = take(most);
    live = take(most);
    // The lanes behind the last entry hold anything, but nothing slow.
    std::fill(gram, next, 0.0f);
  }

  const int64_t width, most;
  Scratch scratch;
  // Where they are now, and where the entries of even and odd levels are put.
  Rows keys, values;
  float *key_rows[2], *value_rows[2];
  float *gram, *blocks, *mass, *count, *new_mass, *new_count, *weight;
  float* live;  // 1, and 0 of an entry that is dropped
  std::vector<int32_t> cluster, order, centre, other;
  // The first entry that joins each centre, and the next one that joins the same; -1: none.
  std::vector<int32_t> joined, next;

  // Rows of elements of type S for the entries of a level.
  template <class S>
  Rows scratch_rows(float* const* rows, int64_t level) const {
    return {reinterpret_cast<char*>(rows[level % 2]), width * int64_t{sizeof(S)}};
  }
};

// Four rows of a list of `count`; behind its end the last one again.
template <class S, class Row>
QM_INLINE std::array<const S*, 4> four_rows(const Entries& e, int64_t i, int64_t count, Row row) {
  std::array<const S*, 4> rows;
  for (int64_t r = 0; r < 4; ++r) rows[r] = e.keys.at<S>(row(std::min(i + r, count - 1)));
  return rows;
}

// gram[i, j] = key i . key j of `num` entries; rows are to_lanes(num) apart, lanes from `num` on hold anything.
template <class Vec, class S>
QM_INLINE void gram_matrix(Entries& e, int64_t num) {
  const int64_t lanes = to_lanes(num);
  const auto rows = [&](int64_t i) __attribute__((always_inline)) {
    return four_rows<S>(e, i, num, [](int64_t row) { return row; });
  };
  const auto block = [&](int64_t i, int64_t j) { return e.blocks + (i * lanes / 4 + j) * 4; };
  for (int64_t i = 0; i < num; i += 4) {
    store(multiply_4x4<Vec, true>(rows(i).data(), rows(i).data(), e.width), block(i, i));
    for (int64_t j = i + 4; j < num; j += 4) {
      const Vec products = multiply_4x4<Vec, false>(rows(i).data(), rows(j).data(), e.width);
      store(products, block(i, j));
      store(transposed_4x4(products), block(j, i));
    }
  }
  for (int64_t i = 0; i < num; i += 4)
    for (int64_t j = 0; j < lanes; j += kLanes) {
      Vec four[4] = {load<Vec>(block(i, j)), load<Vec>(block(i, j + 4)), load<Vec>(block(i, j + 8)),
                     load<Vec>(block(i, j + 12))};
      transpose_quarters(four);
      for (int64_t r = 0; r < 4; ++r) store(four[r], e.gram + (i + r) * lanes + j);
    }
}

// The part of the same that the assignment needs: the products of centres with other entries and with themselves.
template <class Vec, class S>
QM_INLINE void centre_products(Entries& e, int64_t num, int64_t keep) {
  const int64_t lanes = to_lanes(num), rest = num - keep;
  const int32_t *centre = e.centre.data(), *other = e.other.data();
  const auto rows = [&](const int32_t* list, int64_t i, int64_t count) __attribute__((always_inline)) {
    return four_rows<S>(e, i, count, [list](int64_t row) { return list[row]; });
  };
  float block[16];
  for (int64_t i = 0; i < keep; i += 4) {
    const auto centres = rows(centre, i, keep);
    store(multiply_4x4<Vec, true>(centres.data(), centres.data(), e.width), block);
    for (int64_t r = i; r < std::min(i + 4, keep); ++r) e.gram[centre[r] * (lanes + 1)] = block[5 * (r - i)];
    for (int64_t j = 0; j < rest; j += 4) {
      store(multiply_4x4<Vec, false>(centres.data(), rows(other, j, rest).data(), e.width), block);
      for (int64_t r = i; r < std::min(i + 4, keep); ++r)
        for (int64_t c = j; c < std::min(j + 4, rest); ++c)
          e.gram[centre[r] * lanes + other[c]] = block[4 * (r - i) + c - j];
    }
  }
}

// Saliency of each token, in the place of its mass, from the entropy of its attention among the group's keys.
template <class Vec>
QM_INLINE void entropies(Entries& e, int64_t num, int64_t head_dim, float sign) {
  const int64_t lanes = to_lanes(num);
  constexpr float kLog2 = 0.693147181f;
  // To the base 2.
  const float scale = 1.0f / (kLog2 * std::sqrt(static_cast<float>(head_dim)));
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Vec most = load<Vec>(e.gram + i);
    for (int64_t j = 1; j < num; ++j) most = larger(load<Vec>(e.gram + j * lanes + i), most);
    most *= scale;
    Vec total{}, weighted{};
    for (int64_t j = 0; j < num; ++j) {
      const Vec z = load<Vec>(e.gram + j * lanes + i) * scale - most, p = exp2_of_negative(z);
      total += p;
      weighted += z * p;
    }
    const Vec entropy = log(total) - weighted / total * kLog2;
    store(sign * entropy, e.mass + i);
  }
}

// Mass of each token from its entropy, as in `saliency_mass`.
template <class Vec>
QM_INLINE void saliency_mass(Entries& e, int64_t num, const MergeConfig& config) {
  const int64_t lanes = to_lanes(num);
  Vec lows = all<Vec>(INFINITY), highs = all<Vec>(-INFINITY);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Vec entropy = load<Vec>(e.mass + i);
    const Ints<Vec> live = lane_numbers<Vec>() < static_cast<int32_t>(num - i);
    lows = smaller(select(live, entropy, all<Vec>(INFINITY)), lows);
    highs = larger(select(live, entropy, all<Vec>(-INFINITY)), highs);
  }
  const float low = smallest(lows), spread = largest(highs) - low;
  const bool alike = !(spread > 1e-6f);
  const float slope = 1.0f / spread, steepness = 1.0f / config.temperature;
  Vec total{};
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Vec s = alike ? all<Vec>(0.5f) : (load<Vec>(e.mass + i) - low) * slope;
    const Vec p = exp((s - (alike ? 0.5f : 1.0f)) * steepness);
    store(s, e.mass + i);
    store(p, e.weight + i);
    total += select(lane_numbers<Vec>() < static_cast<int32_t>(num - i), p, Vec{});
  }
  const float share = 1.0f / sum(total);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Vec pi = load<Vec>(e.weight + i) * share;
    const Vec mass = pi * load<Vec>(e.mass + i) + (1.0f - pi) * config.epsilon;
    // Keys too large for their products leave no number either, which times 0 is not 0.
    store(select(load<Vec>(e.live + i) + mass * 0.0f > 0.0f, mass, Vec{}), e.mass + i);
  }
}

// List the `keep` entries of the highest mass, in order (ties: the earlier), and the others.
template <class Vec>
QM_INLINE void choose(Entries& e, int64_t num, int64_t keep) {
  const int64_t lanes = to_lanes(num);
  // Masses are positive, so their bits are in the same order, and those of stale bytes in some order too.
  int32_t *order = e.order.data(), *rank = e.cluster.data();
  for (int64_t i = 0; i < lanes; i += kLanes)
    write_bytes(read_bytes<Bits<Vec>>(e.mass + i) & 0x7fffffffu, order + i);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const Ints<Vec> own = read_bytes<Ints<Vec>>(order + i), number = lane_numbers<Vec>() + static_cast<int32_t>(i);
    Ints<Vec> before{};
    for (int32_t j = 0; j < num; ++j) {
      const Ints<Vec> bound = select(number > j, own - 1, own);
      before = select(order[j] > bound, before + 1, before);
    }
    write_bytes(before, rank + i);
  }
  int32_t *centre = e.centre.data(), *other = e.other.data();
  for (int32_t i = 0; i < num; ++i) {
    const bool stays = rank[i] < keep;
    *centre = *other = i;
    centre += stays, other += !stays;
  }
}

// cluster[i] of `num` entries: those listed stay, the others join the one of the nearest key by cosine similarity.
template <class Vec>
QM_INLINE void assign(Entries& e, int64_t num, int64_t keep) {
  const int64_t lanes = to_lanes(num);
  int32_t *cluster = e.cluster.data(), *centre = e.centre.data();
  // The norm of the entry that looks for a centre changes nothing about which is nearest.
  float* scale = e.weight;
  for (int64_t k = 0; k < keep; ++k) scale[k] = e.gram[centre[k] * (lanes + 1)];
  for (int64_t k = 0; k < keep; k += kLanes)
    store(1.0f / larger(sqrt(load<Vec>(scale + k)), all<Vec>(1e-12f)), scale + k);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Vec best = all<Vec>(-INFINITY);
    Ints<Vec> nearest{};
    for (int32_t k = 0; k < keep; ++k) {
      const Vec similarity = load<Vec>(e.gram + centre[k] * lanes + i) * scale[k];
      const Ints<Vec> nearer = similarity > best;
      nearest = select(nearer, Ints<Vec>{} + k, nearest);
      best = select(nearer, similarity, best);
    }
    write_bytes(nearest, cluster + i);
  }
  for (int32_t k = 0; k < keep; ++k) cluster[centre[k]] = k;
}

// All entries of the group are one cluster.
QM_INLINE void join_all(Entries& e, int64_t num) {
  e.centre[0] = 0;
  for (int32_t i = 1; i < num; ++i) e.other[i - 1] = i;
  std::fill_n(e.cluster.data(), num, 0);
}

// List who joins each centre, and add up the masses and counts of each cluster.
QM_INLINE void divide(Entries& e, int64_t num, int64_t keep) {
  const int32_t *cluster = e.cluster.data(), *centre = e.centre.data(), *other = e.other.data();
  for (int64_t k = 0; k < keep; ++k) {
    e.new_mass[k] = e.mass[centre[k]], e.new_count[k] = e.count[centre[k]];
    e.joined[k] = -1;
  }
  for (int64_t j = num - keep; j-- > 0;) {
    const int32_t i = other[j], k = cluster[i];
    e.new_mass[k] += e.mass[i], e.new_count[k] += e.count[i];
    e.next[i] = std::exchange(e.joined[k], i);
  }
}

// An entry's share of its cluster, of which all may have been dropped.
QM_INLINE float share_of(float mass, float total) { return mass / (total > 0.0f ? total : 1.0f); }

// kParts vectors' worth of the means of keys and values of each cluster, from column `c` on. Values are of type V.
template <class Vec, class T, class S, class V, int kParts>
QM_INLINE void means(Entries& e, const Rows& new_keys, const Rows& new_values, int64_t keep, int64_t c) {
  constexpr int64_t kColumns = sizeof(Vec) / sizeof(S);
  using Part = Floats<Vec, S>;
  for (int64_t k = 0; k < keep; ++k) {
    Part key_sum[kParts], value_sum[kParts];
    int32_t i = e.centre[k];
    const S* key = e.keys.at<S>(i) + c;
    const V* value = e.values.at<V>(i) + c;
    // Divided first, so that an entry by itself is copied bit by bit.
    float weight = share_of(e.mass[i], e.new_mass[k]);
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      key_sum[p].set(weight, Part(key + p * kColumns));
      value_sum[p].set(weight, Part(value + p * kColumns));
    }
    for (i = e.joined[k]; i >= 0; i = e.next[i]) {
      key = e.keys.at<S>(i) + c, value = e.values.at<V>(i) + c, weight = share_of(e.mass[i], e.new_mass[k]);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        key_sum[p].add(weight, Part(key + p * kColumns));
        value_sum[p].add(weight, Part(value + p * kColumns));
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      key_sum[p].template store_rounded<T>(new_keys.at<S>(k) + c + p * kColumns);
      value_sum[p].template store_rounded<T>(new_values.at<S>(k) + c + p * kColumns);
    }
  }
}

// Take the entries to the `keep` of a level: keys and values become the mean of each cluster weighted by mass.
template <class Vec, class T, class S, class V>
QM_INLINE void merge(Entries& e, int64_t level, int64_t keep) {
  constexpr int64_t kColumns = sizeof(Vec) / sizeof(S);
  // Sums of keys and of values that stay in registers.
  constexpr int kParts = (kIsPair<Vec> ? 2 : 4) * sizeof(S) / sizeof(float);
  const Rows keys = e.scratch_rows<S>(e.key_rows, level), values = e.scratch_rows<S>(e.value_rows, level);
  int64_t c = 0;
  for (; c + kParts * kColumns <= e.width; c += kParts * kColumns)
    means<Vec, T, S, V, kParts>(e, keys, values, keep, c);
  for (; c < e.width; c += kColumns) means<Vec, T, S, V, 1>(e, keys, values, keep, c);
  e.keys = keys, e.values = values;
  std::swap(e.mass, e.new_mass);
  std::swap(e.count, e.new_count);
}

// The slots of one head of a group.
struct Slots {
  char* first;
  int64_t stride, value_offset, state_offset;

  char* key(int64_t i) const { return first + i * stride; }
  char* value(int64_t i) const { return key(i) + value_offset; }
  // Inlined by force: GCC drops calls of a function that does nothing but prefetch.
  QM_INLINE void prefetch(int64_t from, int64_t to) const {
    for (int64_t i = from; i < to; ++i)
      for (int64_t byte = 0; byte < state_offset; byte += 64) __builtin_prefetch(key(i) + byte, 1);
  }
  SlotState state(int64_t i) const { return read_bytes<SlotState>(key(i) + state_offset); }
  void set_state(int64_t i, const SlotState& state) const { std::memcpy(key(i) + state_offset, &state, sizeof state); }
};

// Whether `count` elements side by side are all finite: only those times 0 are 0.
template <class Vec, class T>
QM_INLINE bool are_finite(const T* x, int64_t count) {
  Vec zeros{};
  float part[kLanes];
  for (int64_t c = 0; c < count; c += kLanes) {
    load_row<Vec>(x + c, std::min(kLanes, count - c), part);
    zeros += load<Vec>(part) * 0.0f;
  }
  return sum(zeros) == 0.0f;
}

// Make zeros of an entry that is not finite, and return whether it was: what is merged stays so.
template <class Vec, class T>
QM_INLINE bool keep_finite(const Slots& slots, int64_t i, int64_t head_dim) {
  // Key and value stand side by side.
  const bool finite = std::isfinite(slots.state(i).mass) &&
                      are_finite<Vec>(reinterpret_cast<const T*>(slots.key(i)), 2 * head_dim);
  if (!finite) std::memset(slots.key(i), 0, slots.state_offset);
  return finite;
}

// Rows of whole vectors are read where they stand, keys only if they are of the type that is computed with.
template <class Vec, class T, class S>
QM_INLINE void read_entries(const Slots& slots, int64_t num, int64_t head_dim, int64_t level, Entries& e) {
  const bool whole = head_dim == e.width;
  e.keys = whole && std::is_same_v<T, S> ? Rows{slots.key(0), slots.stride} : e.scratch_rows<S>(e.key_rows, level);
  e.values = whole ? Rows{slots.value(0), slots.stride} : e.scratch_rows<S>(e.value_rows, level);
  for (int64_t i = 0; i < num; ++i) {
    e.live[i] = keep_finite<Vec, T>(slots, i, head_dim);
    const T *key = reinterpret_cast<const T*>(slots.key(i)), *value = reinterpret_cast<const T*>(slots.value(i));
    if (!whole || !std::is_same_v<T, S>) load_row<Vec>(key, head_dim, e.keys.at<S>(i));
    if (!whole) load_row<Vec>(value, head_dim, e.values.at<S>(i));
    const SlotState state = slots.state(i);
    e.mass[i] = e.live[i] > 0.0f ? state.mass : 0.0f, e.count[i] = state.count;
  }
}

template <class Vec, class T, class S>
QM_INLINE void write_entries(
    const Entries& e, int64_t num, int64_t head_dim, int64_t group_size, int64_t level, const Slots& slots) {
  for (int64_t i = 0; i < num; ++i) {
    store_row<Vec>(e.keys.at<S>(i), head_dim, reinterpret_cast<T*>(slots.key(i)));
    store_row<Vec>(e.values.at<S>(i), head_dim, reinterpret_cast<T*>(slots.value(i)));
    slots.set_state(i, {e.mass[i], e.count[i], i == 0 ? static_cast<float>(level) : 0.0f, 0.0f});
  }
  for (int64_t i = num; i < group_size; ++i)
    slots.set_state(i, {0.0f, 0.0f, i == 0 ? static_cast<float>(level) : 0.0f, 0.0f});
}

// Groups merged side by side: one waits for its numbers while another is computed. More than these, with those that are
// being fetched, are too many for the first-level cache.
constexpr int64_t kBatch = 2;

struct Batch {
  Batch(int64_t group_size, int64_t width) {
    for (int64_t b = 0; b < kBatch; ++b) entries.emplace_back(group_size, width);
  }

  int64_t size = 0, from = 0, to = 0;
  Slots slots[kBatch];
  // Those of a later batch, to be fetched meanwhile.
  int64_t num_later = 0;
  Slots later[kBatch];
  std::vector<Entries> entries;
};

// T: of the cache; S: of the rows between levels, and of the factors of products.
template <class Vec, class T, class S>
QM_INLINE void merge_batch_of(Batch& batch, int64_t head_dim, const MergeConfig& config) {
  const int64_t left = config.held(batch.to);
  int64_t num = config.held(batch.from);
  Entries* e = batch.entries.data();
  // A few slots before each piece of work, of which a level has four at least: many at once would wait for each other.
  const int64_t slots = num, pieces = 4 * (batch.to - batch.from), at_once = (slots + pieces - 1) / pieces;
  int64_t fetched[kBatch] = {};
  const auto fetch = [&](int64_t b) __attribute__((always_inline)) {
    if (b >= batch.num_later || fetched[b] >= slots) return;
    batch.later[b].prefetch(fetched[b], std::min(slots, fetched[b] + at_once));
    fetched[b] += at_once;
  };
  for (int64_t b = 0; left > 0 && b < batch.size; ++b)
    read_entries<Vec, T, S>(batch.slots[b], num, head_dim, batch.from, e[b]);
  for (int64_t level = batch.from + 1; left > 0 && level <= batch.to; ++level) {
    const int64_t keep = config.held(level);
    if (level == 1) {
      // Scores for the entropy, and similarities for the assignment.
      for (int64_t b = 0; b < batch.size; ++b) fetch(b), gram_matrix<Vec, S>(e[b], num);
      for (int64_t b = 0; b < batch.size; ++b) fetch(b), entropies<Vec>(e[b], num, head_dim, config.entropy_sign);
      for (int64_t b = 0; b < batch.size; ++b) fetch(b), saliency_mass<Vec>(e[b], num, config);
    }
    if (keep > 1) {
      for (int64_t b = 0; b < batch.size; ++b) fetch(b), choose<Vec>(e[b], num, keep);
      for (int64_t b = 0; level > 1 && b < batch.size; ++b) fetch(b), centre_products<Vec, S>(e[b], num, keep);
      for (int64_t b = 0; b < batch.size; ++b) fetch(b), assign<Vec>(e[b], num, keep);
    } else {
      for (int64_t b = 0; b < batch.size; ++b) fetch(b), join_all(e[b], num);
    }
    for (int64_t b = 0; b < batch.size; ++b) fetch(b), divide(e[b], num, keep);
    for (int64_t b = 0; b < batch.size; ++b) {
      fetch(b);
      if (level == batch.from + 1 && head_dim == e[b].width) {
        merge<Vec, T, S, T>(e[b], level, keep);
      } else {
        merge<Vec, T, S, S>(e[b], level, keep);
      }
    }
    num = keep;
  }
  for (int64_t b = 0; b < batch.size; ++b)
    write_entries<Vec, T, S>(e[b], left, head_dim, config.group_size, batch.to, batch.slots[b]);
}

// One entry joins another: the mean weighted by mass.
template <class Vec, class T>
QM_INLINE void merge_pair_of(
    const Slots& head, const Slots& tail, const Slots& last, int64_t head_dim, int64_t to) {
  const SlotState a = head.state(0), b = tail.state(0);
  const float head_mass = keep_finite<Vec, T>(head, 0, head_dim) ? a.mass : 0.0f;
  const float tail_mass = keep_finite<Vec, T>(tail, 0, head_dim) ? b.mass : 0.0f;
  const float mass = head_mass + tail_mass, first = share_of(head_mass, mass), second = share_of(tail_mass, mass);
  const auto mean = [&](char* into, const char* other) __attribute__((always_inline)) {
    T *x = reinterpret_cast<T*>(into);
    const T* y = reinterpret_cast<const T*>(other);
    float row[kLanes], other_row[kLanes];
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      const int64_t part = std::min(kLanes, head_dim - c);
      load_row<Vec>(x + c, part, row);
      load_row<Vec>(y + c, part, other_row);
      store(first * load<Vec>(row) + second * load<Vec>(other_row), row);
      store_row<Vec>(row, part, x + c);
    }
  };
  mean(head.key(0), tail.key(0));
  mean(head.value(0), tail.value(0));
  head.set_state(0, {mass, a.count + b.count, static_cast<float>(to), 0.0f});
  tail.set_state(0, {0.0f, 0.0f, static_cast<float>(to), 0.0f});
  last.set_state(0, {0.0f, 0.0f, static_cast<float>(to), 0.0f});
}

template <class Vec>
QM_INLINE void merge_batch(Batch& batch, ScalarType type, int64_t head_dim, const MergeConfig& config) {
  if (type == ScalarType::Float) merge_batch_of<Vec, float, float>(batch, head_dim, config);
  if (type == ScalarType::BFloat16) merge_batch_of<Vec, BFloat16, float>(batch, head_dim, config);
  if (type == ScalarType::Half) merge_batch_of<Vec, Float16, float>(batch, head_dim, config);
}

#if QM_HAS_SETS
// Products of bfloat16 as they stand, two to a lane; every processor that has them has the rest of the set.
__attribute__((target("arch=x86-64-v4,avx512bf16"))) void merge_batch_of_pairs(
    Batch& batch, int64_t head_dim, const MergeConfig& config) {
  merge_batch_of<SixteenVec, BFloat16, BFloat16>(batch, head_dim, config);
}

bool has_products_of_pairs() {
  return kWidestSet == InstructionSet::kAvx512 && __builtin_cpu_supports("avx512bf16");
}
#else
void merge_batch_of_pairs(Batch&, int64_t, const Rule&) {}

bool has_products_of_pairs() { return false; }
#endif

template <class Vec>
QM_INLINE void merge_pair(
    const Slots& head, const Slots& tail, const Slots& last, ScalarType type, int64_t head_dim, int64_t to) {
  if (type == ScalarType::Float) merge_pair_of<Vec, float>(head, tail, last, head_dim, to);
  if (type == ScalarType::BFloat16) merge_pair_of<Vec, BFloat16>(head, tail, last, head_dim, to);
  if (type == ScalarType::Half) merge_pair_of<Vec, Float16>(head, tail, last, head_dim, to);
}

// Do the work of requests that share no group.
void run(const PagedCache& cache, const MergeConfig& config, const std::vector<const Plan*>& plans) {
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
    QM_DISPATCH(
        merge_pair, slots_of(pair.head, head), slots_of(pair.tail, head), slots_of(pair.last, head), cache.type,
        cache.head_dim, pair.to);
  };
  static const bool has_pairs = has_products_of_pairs();
  const bool in_pairs = has_pairs && cache.type == ScalarType::BFloat16;
  // All parts of a head one after the other: the heads of a slot may lie side by side in memory.
  parallel(num_tasks * cache.num_heads, grain, [&](int64_t first, int64_t last) {
    // Whole vectors, of pairs or of floats.
    Batch batch(config.group_size, in_pairs ? 2 * to_lanes((cache.head_dim + 1) / 2) : to_lanes(cache.head_dim));
    std::vector<const Step*> pairs;
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task % cache.num_heads;
      const auto slots = [&](const Place& at) { return slots_of(at, head); };
      const auto flush = [&] {
        if (batch.size > 0 && in_pairs) {
          merge_batch_of_pairs(batch, cache.head_dim, config);
        } else if (batch.size > 0) {
          QM_DISPATCH(merge_batch, batch, cache.type, cache.head_dim, config);
        }
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
    Tensor cache_tensor, Tensor block_table, Tensor frontier_tensor, int64_t head_dim, std::vector<int64_t> packed) {
  const char* op = "merge_groups_";
  const PagedCache cache(cache_tensor, head_dim, op);
  const MergeConfig config(packed);
  STD_TORCH_CHECK(
      cache.page_size % config.group_size == 0,
      op, ": group_size ", config.group_size, " must divide the page size ", cache.page_size);
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
    run(cache, config, now);
    waiting = later;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) { m.impl("merge_groups_", TORCH_BOX(&merge_groups)); }

}  // namespace qm_spec
