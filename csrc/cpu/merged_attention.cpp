// merged_attention: the newest rows of each request over its raw and merged entries. Scores are q k / sqrt(d) plus
// -slope_h * distance (raw, causal) or far_bias_h + log(min(count, group_size)) (merged); out = softmax(scores) v, the
// log-sum-exp of the scores, and the entropy of the softmax. Reference in qm_spec/ops/merged_attention.py.
//
// First each request's entries are listed, by a walk that reads the states of one head. A split is 256 of them for one
// KV head, for all rows and query heads together: softmax in one pass with a running maximum, keys and values read where
// they stand. Splits are joined by their log-sum-exp, in the same order for any number of threads.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "csrc/cpu/convert.h"
#include "csrc/cpu/entries.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/vec.h"

namespace qm_spec {
namespace {

constexpr int64_t kSplitEntries = 256;
constexpr int64_t kBlock = 64;
// Room that every request's list begins with: as many as 256k tokens leave.
constexpr int64_t kFirstEntries = 832;
// Multiplications that one thread should have to do before another is woken.
constexpr int64_t kGrainProducts = 400'000;

// What one request attends with and to.
struct Request {
  int64_t num_tokens, last_row, num_rows;  // rows computed: the newest ones
  int64_t num_entries = 0;
  // Of each entry, for the first KV head; longer than there are entries.
  std::vector<const char*> slots;
  std::vector<int32_t> positions;  // -1 where merged

  int64_t num_splits() const { return std::max<int64_t>(1, (num_entries + kSplitEntries - 1) / kSplitEntries); }
  void add(const PagedCache& cache, const EntryRun& run) {
    if (num_entries + run.length > static_cast<int64_t>(slots.size())) {
      slots.resize(std::max(kFirstEntries, 2 * (num_entries + run.length)));
      positions.resize(slots.size());
    }
    const char* slot = cache.key(run.page, 0, run.slot);
    const char** to = slots.data() + num_entries;
    int32_t* position = positions.data() + num_entries;
    const int32_t first = static_cast<int32_t>(run.position), step = run.position >= 0;
    for (int64_t i = 0; i < run.length; ++i) {
      to[i] = slot + i * cache.slot_stride_bytes();
      position[i] = first + static_cast<int32_t>(i) * step;
    }
    num_entries += run.length;
  }
};

// The query rows of one request and KV head, as floats and divided by sqrt(d). Row r * heads + h is query head h of
// the request's r-th newest row.
struct Queries {
  int64_t rows, heads, width;
  int64_t newest;  // position of the newest row
  const float *q, *slopes, *far_bias;
};

// A softmax over some of the entries, for each query row.
struct Partial {
  Partial(int64_t rows, int64_t width) : scratch(rows * (width + 3)), rows(rows), width(width) {
    most = scratch.get(), total = most + rows, weighted = total + rows, sum = weighted + rows;
    std::fill(most, total, -INFINITY);
    std::fill(total, sum + rows * width, 0.0f);
  }

  Scratch scratch;
  int64_t rows, width;
  float* most;      // the largest score
  float* total;     // sum of p = e^(score - most)
  float* weighted;  // sum of p (score - most)
  float* sum;       // sum of p v
};

// Make row `r` relative to a larger score.
template <class Vec>
QM_INLINE void raise(Partial& part, int64_t r, float most) {
  if (part.total[r] > 0.0f && part.most[r] < most) {
    const float by = part.most[r] - most, scale = fast_exp(by);
    part.weighted[r] = scale * (part.weighted[r] + by * part.total[r]);
    part.total[r] *= scale;
    for (int64_t c = r * part.width; c < (r + 1) * part.width; c += kLanes)
      store(scale * load<Vec>(part.sum + c), part.sum + c);
  }
  part.most[r] = most;
}

// Add the entries of `part`, which is changed, to those of `into`.
template <class Vec>
QM_INLINE void join(Partial& part, Partial& into) {
  for (int64_t r = 0; r < part.rows; ++r) {
    const float most = std::max(part.most[r], into.most[r]);
    raise<Vec>(part, r, most);
    raise<Vec>(into, r, most);
    into.total[r] += part.total[r];
    into.weighted[r] += part.weighted[r];
    for (int64_t c = r * part.width; c < (r + 1) * part.width; c += kLanes)
      store(load<Vec>(into.sum + c) + load<Vec>(part.sum + c), into.sum + c);
  }
}

// A block of entries of one KV head.
struct Block {
  Block(int64_t rows, int64_t head_dim, int64_t width)
      : scratch((rows + 1) * kBlock + 2 * width), padded(head_dim == width ? 0 : 2 * width * kBlock) {
    scores = scratch.get(), log_count = scores + kBlock * rows, nothing = log_count + kBlock;
    std::fill(nothing, nothing + 2 * width, 0.0f);
  }

  Scratch scratch, padded;
  float* scores;     // [rows, kBlock], then e^(score - most)
  float* log_count;  // -inf where nothing is
  float* nothing;    // key and value of no entry
  int32_t position[kBlock];
  const char* slot[kBlock];
};

// Fetch entries of one head into the second-level cache: those of old spans lie pages apart, where no hardware looks
// ahead, and at the same place of their pages, which is a few of them in the first-level cache.
QM_INLINE void prefetch(const PagedCache& cache, const Request& request, int64_t head, int64_t first, int64_t end) {
  const int64_t offset = head * cache.head_stride_bytes(), bytes = cache.slot_bytes();
  for (int64_t i = first; i < end; ++i)
    for (int64_t byte = offset; byte < offset + bytes; byte += 64) __builtin_prefetch(request.slots[i] + byte, 0, 2);
}

// List `num` entries from the request's `first` one on; up to a whole vector they are followed by nothing.
template <class Vec>
QM_INLINE void list(
    const PagedCache& cache, const MergeConfig& config, const Request& request, int64_t head, int64_t first,
    int64_t num, Block& block) {
  const int64_t offset = head * cache.head_stride_bytes();
  const char* nothing = reinterpret_cast<const char*>(block.nothing);
  for (int64_t i = 0; i < num; ++i) {
    block.slot[i] = request.slots[first + i] + offset;
    block.position[i] = request.positions[first + i];
    block.log_count[i] = block.position[i] < 0 ? bounded_count(cache.state(block.slot[i]).count, config) : 1.0f;
    // An empty slot may hold NaN, which a weight of 0 would not silence.
    if (!(block.log_count[i] > 0.0f)) block.slot[i] = nothing;
  }
  for (int64_t i = num; i < to_lanes(num); ++i)
    block.slot[i] = nothing, block.position[i] = -1, block.log_count[i] = 0.0f;
  for (int64_t i = 0; i < num; i += kLanes) {
    const Vec count = load<Vec>(block.log_count + i);
    store(select(count > 0.0f, log(count), all<Vec>(-INFINITY)), block.log_count + i);
  }
}

// Where rows are not whole vectors, copy them to where they are. Returns the bytes from a key to its value.
QM_INLINE int64_t pad_rows(const PagedCache& cache, int64_t num, int64_t width, Block& block) {
  const int64_t row = cache.head_dim * cache.element_bytes, padded = width * cache.element_bytes;
  if (row == padded) return row;
  char* to = reinterpret_cast<char*>(block.padded.get());
  for (int64_t i = 0; i < to_lanes(num); ++i, to += 2 * padded) {
    std::memcpy(to, block.slot[i], row);
    std::memset(to + row, 0, padded - row);
    std::memcpy(to + padded, block.slot[i] + row, row);
    std::memset(to + padded + row, 0, padded - row);
    block.slot[i] = to;
  }
  return padded;
}

// Call `run(r, rows)` for parts of `num_rows` rows, with `rows` 4, 2 or 1 as a constant: their sums stay in registers.
template <class Run>
QM_INLINE void by_rows(int64_t num_rows, const Run& run) {
  int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4) run(r, std::integral_constant<int, 4>());
  for (; r + 2 <= num_rows; r += 2) run(r, std::integral_constant<int, 2>());
  if (r < num_rows) run(r, std::integral_constant<int, 1>());
}

// scores[r, lane] += query row r . some columns of the keys, for kRows rows.
template <int kRows, class Vec, class T>
QM_INLINE void score(const float* query, int64_t width, const Columns<Vec, T>& keys, float* scores) {
  Vec sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = load<Vec>(scores + r * kBlock);
#pragma GCC unroll 16
  for (int c = 0; c < Columns<Vec, T>::kCount; ++c)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] += query[r * width + c] * keys.column[c];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store(sums[r], scores + r * kBlock);
}

// Products of all query rows with the keys of the sixteen entries from `first` on.
template <class Vec, class T>
QM_INLINE void score_all(const Queries& queries, int64_t first, Block& block) {
  for (int64_t r = 0; r < queries.rows; ++r) store(Vec{}, block.scores + r * kBlock + first);
  for (int64_t c = 0; c < queries.width; c += Columns<Vec, T>::kCount) {
    const Columns<Vec, T> keys(block.slot + first, c * sizeof(T));
    by_rows(queries.rows, [&](int64_t r, auto rows) __attribute__((always_inline)) {
      score<rows.value>(
          queries.q + r * queries.width + c, queries.width, keys, block.scores + r * kBlock + first);
    });
  }
}

// sum[r, lane] += weights[r, entry] * value of entry, for kRows rows and sixteen columns, `offset` bytes behind the
// beginnings of the entries.
template <class Vec, class T, int kRows>
QM_INLINE void add_values(
    const float* weights, const char* const* slots, int64_t num, int64_t offset, int64_t width, float* sum) {
  Vec sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = load<Vec>(sum + r * width);
  for (int64_t i = 0; i < num; ++i) {
    const Vec value = load<Vec>(reinterpret_cast<const T*>(slots[i] + offset));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] += weights[r * kBlock + i] * value;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store(sums[r], sum + r * width);
}

// The same for all query rows and columns.
template <class Vec, class T>
QM_INLINE void add_all_values(const Block& block, int64_t num, int64_t offset, Partial& part) {
  for (int64_t c = 0; c < part.width; c += kLanes, offset += kLanes * sizeof(T)) {
    by_rows(part.rows, [&](int64_t r, auto rows) __attribute__((always_inline)) {
      add_values<Vec, T, rows.value>(
          block.scores + r * kBlock, block.slot, num, offset, part.width, part.sum + r * part.width + c);
    });
  }
}

// Scores of query row `r` to `num` entries: bias added, returns the largest.
template <class Vec>
QM_INLINE float add_bias(const Queries& queries, int64_t r, int64_t num, Block& block) {
  const float slope = queries.slopes[r % queries.heads], far = queries.far_bias[r % queries.heads];
  const int32_t own = static_cast<int32_t>(queries.newest - r / queries.heads);
  float* scores = block.scores + r * kBlock;
  Vec most = all<Vec>(-INFINITY);
  for (int64_t i = 0; i < num; i += kLanes) {
    const Ints<Vec> position = read_bytes<Ints<Vec>>(block.position + i), distance = own - position;
    const Vec near = select(distance < 0, all<Vec>(-INFINITY), -slope * converted<float>(distance));
    const Vec score = load<Vec>(scores + i) + select(position < 0, far + load<Vec>(block.log_count + i), near);
    store(score, scores + i);
    most = larger(score, most);
  }
  return largest(most);
}

template <class Vec, class T>
QM_INLINE void attend_to(
    const PagedCache& cache, const MergeConfig& config, const Request& request, int64_t head, int64_t split,
    const Queries& queries, Block& block, Partial& part) {
  const int64_t rows = queries.rows, end = std::min(request.num_entries, (split + 1) * kSplitEntries);
  for (int64_t first = split * kSplitEntries; first < end; first += kBlock) {
    const int64_t num = std::min(kBlock, end - first), next = std::min(first + kBlock, request.num_entries);
    prefetch(cache, request, head, next, std::min(next + kBlock, request.num_entries));
    list<Vec>(cache, config, request, head, first, num, block);
    const int64_t value = pad_rows(cache, num, queries.width, block);
    for (int64_t i = 0; i < num; i += kLanes) score_all<Vec, T>(queries, i, block);
    for (int64_t r = 0; r < rows; ++r) {
      const float most = std::max(part.most[r], add_bias<Vec>(queries, r, num, block));
      raise<Vec>(part, r, most);
      // Nothing is visible yet: any finite number keeps e^(-inf - most) at 0.
      const float reference = most == -INFINITY ? 0.0f : most;
      float* scores = block.scores + r * kBlock;
      Vec total{}, weighted{};
      for (int64_t i = 0; i < num; i += kLanes) {
        const Vec z = load<Vec>(scores + i) - reference, p = exp(z);
        total += p;
        // 0 times -inf is not 0.
        weighted += p * larger(z, all<Vec>(-100.0f));
        store(p, scores + i);
      }
      part.total[r] += sum(total);
      part.weighted[r] += sum(weighted);
    }
    add_all_values<Vec, T>(block, num, value, part);
  }
}

// Add the entries of one split to `part`.
template <class Vec>
QM_INLINE void attend(
    const PagedCache& cache, const MergeConfig& config, const Request& request, int64_t head, int64_t split,
    const Queries& queries, Block& block, Partial& part) {
  if (cache.type == ScalarType::Float)
    attend_to<Vec, float>(cache, config, request, head, split, queries, block, part);
  if (cache.type == ScalarType::BFloat16)
    attend_to<Vec, BFloat16>(cache, config, request, head, split, queries, block, part);
  if (cache.type == ScalarType::Half)
    attend_to<Vec, Float16>(cache, config, request, head, split, queries, block, part);
}

// Where each row's results go.
struct Output {
  FloatRowsOut out;
  int64_t row_stride, head_stride, num_heads;
  float *lse, *entropy;

  void write(const Partial& part, const Request& request, int64_t first_head, int64_t heads, int64_t head_dim) const {
    std::vector<float> mean(head_dim);
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t row = request.last_row - r / heads, head = first_head + r % heads;
      const float total = part.total[r], log_total = std::log(total);
      // A row that sees nothing is left as one that was not computed.
      for (int64_t c = 0; c < head_dim; ++c) mean[c] = total > 0.0f ? part.sum[r * part.width + c] / total : 0.0f;
      out.write(row * row_stride + head * head_stride, head_dim, mean.data());
      lse[row * num_heads + head] = total > 0.0f ? part.most[r] + log_total : -INFINITY;
      entropy[row * num_heads + head] = total > 0.0f ? std::max(0.0f, log_total - part.weighted[r] / total) : 0.0f;
    }
  }
};

std::vector<Request> list_requests(
    const PagedCache& cache, const MergeConfig& config, const Tensor& block_table, const Tensor& seq_lens,
    const Tensor& query_start_loc, int64_t num_rows, int64_t max_rows) {
  const char* op = "merged_attention";
  const Integers length = integers(seq_lens, op), start = integers(query_start_loc, op);
  std::vector<Request> requests;
  std::vector<int64_t> numbers;
  for (int64_t b = 0; b < seq_lens.size(0); ++b) {
    const int64_t first = start[b], end = start[b + 1];
    STD_TORCH_CHECK(
        first >= 0 && end <= num_rows, op, ": query_start_loc must be in 0..", num_rows, ", got ", first, " and ", end);
    // A request without rows is padding: its length and table are not to be trusted.
    if (std::min(end - first, max_rows) <= 0) continue;
    requests.emplace_back();
    requests.back().num_tokens = std::min(length[b], block_table.size(1) * cache.page_size);
    requests.back().last_row = end - 1;
    requests.back().num_rows = std::min(end - first, max_rows);
    numbers.push_back(b);
  }
  parallel(static_cast<int64_t>(requests.size()), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Request& request = requests[i];
      const RequestGroups groups(cache, config, integers(block_table, op, numbers[i]));
      walk_entries(groups, config, request.num_tokens, [&](const EntryRun& run) { request.add(cache, run); });
    }
  });
  return requests;
}

std::tuple<Tensor, Tensor, Tensor> merged_attention(
    Tensor query, Tensor cache_tensor, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor slopes,
    Tensor far_bias, int64_t max_rows, std::vector<int64_t> packed) {
  const char* op = "merged_attention";
  const int64_t num_rows = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  const PagedCache cache(cache_tensor, head_dim, op);
  const MergeConfig config(packed);
  STD_TORCH_CHECK(
      cache.page_size % config.group_size == 0,
      op, ": group_size ", config.group_size, " must divide the page size ", cache.page_size);
  Tensor result = torch::stable::empty_like(query);
  // Rows are written whole; a result with other strides is copied at the end.
  Tensor out = num_rows == 0 || result.stride(2) == 1 ? result : torch::stable::new_empty(query, query.sizes());
  Tensor lse = torch::stable::new_empty(query, {num_rows, num_heads}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(query, {num_rows, num_heads}, ScalarType::Float);
  if (query.stride(2) != 1) query = torch::stable::contiguous(query);
  slopes = torch::stable::contiguous(slopes);
  far_bias = torch::stable::contiguous(far_bias);
  std::vector<float> slope_scratch(num_heads), far_scratch(num_heads);
  const float* slope = FloatRows(slopes, op).read(0, num_heads, slope_scratch.data());
  const float* far = FloatRows(far_bias, op).read(0, num_heads, far_scratch.data());

  const std::vector<Request> requests =
      list_requests(cache, config, block_table, seq_lens, query_start_loc, num_rows, max_rows);
  const Output output{
      FloatRowsOut(out, op), out.stride(0), out.stride(1), num_heads, static_cast<float*>(lse.data_ptr()),
      static_cast<float*>(entropy.data_ptr())};
  int64_t computed = 0, num_products = 0;
  for (const Request& request : requests) {
    computed += request.num_rows;
    num_products += request.num_rows * request.num_entries * num_heads * head_dim * 2;
  }
  if (computed < num_rows) {
    torch::stable::zero_(out);
    std::fill(output.lse, output.lse + num_rows * num_heads, -INFINITY);
    std::fill(output.entropy, output.entropy + num_rows * num_heads, 0.0f);
  }

  const FloatRows rows(query, op);
  const int64_t heads = num_heads / cache.num_heads, width = to_lanes(head_dim);
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  // The splits of one KV head are one task, or, where that leaves threads idle, a task each.
  struct Task {
    const Request* request;
    int64_t head, first, last;
    std::unique_ptr<Partial> part;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> begin{0};  // the first task of each request and head, and the end
  const bool apart = requests.size() * cache.num_heads < torch::stable::get_num_threads();
  for (const Request& request : requests) {
    const int64_t num_splits = request.num_splits();
    for (int64_t head = 0; head < cache.num_heads; ++head) {
      for (int64_t first = 0; first < num_splits; first += apart ? 1 : num_splits)
        tasks.push_back({&request, head, first, apart ? first + 1 : num_splits, nullptr});
      begin.push_back(static_cast<int64_t>(tasks.size()));
    }
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t per_task = std::max<int64_t>(1, num_products / std::max<int64_t>(1, num_tasks));
  const int64_t grain = (kGrainProducts + per_task - 1) / per_task;
  parallel(num_tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Task& task = tasks[i];
      const Request& request = *task.request;
      const int64_t num = request.num_rows * heads, first_head = task.head * heads;
      const Scratch scratch(num * width + head_dim);
      float *q = scratch.get(), *row = q + num * width;
      std::fill(q, q + num * width, 0.0f);
      for (int64_t r = 0; r < num; ++r) {
        const int64_t at =
            (request.last_row - r / heads) * query.stride(0) + (first_head + r % heads) * query.stride(1);
        const float* from = rows.read(at, head_dim, row);
        for (int64_t c = 0; c < head_dim; ++c) q[r * width + c] = from[c] * scale;
      }
      const Queries queries{num, heads, width, request.num_tokens - 1, q, slope + first_head, far + first_head};
      Block block(num, head_dim, width);
      const int64_t first_entry = task.first * kSplitEntries;
      prefetch(cache, request, task.head, first_entry, std::min(first_entry + kBlock, request.num_entries));
      for (int64_t split = task.first; split < task.last; ++split) {
        auto part = std::make_unique<Partial>(num, width);
        QM_DISPATCH(attend, cache, config, request, task.head, split, queries, block, *part);
        if (task.part) {
          QM_DISPATCH(join, *part, *task.part);
        } else {
          task.part = std::move(part);
        }
      }
    }
  });
  const int64_t num_pairs = static_cast<int64_t>(begin.size()) - 1;
  parallel(num_pairs, std::max<int64_t>(8, grain), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Task& task = tasks[begin[i]];
      for (int64_t j = begin[i] + 1; j < begin[i + 1]; ++j) QM_DISPATCH(join, *tasks[j].part, *task.part);
      output.write(*task.part, *task.request, task.head * heads, heads, head_dim);
    }
  });
  if (out.get() != result.get()) torch::stable::copy_(result, out);
  return {result, lse, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qm_spec, CPU, m) { m.impl("merged_attention", TORCH_BOX(&merged_attention)); }

}  // namespace qm_spec
