// merged_attention: the newest rows of each request over its raw and merged entries; query [T, H, d], cache
// [pages, G, P, C] to output [T, H, d], log-sum-exp [T, H] and attention entropy [T, H].
//
//   score = q k / sqrt(d) + -slope_h * distance (raw, causal) or far_bias_h + log(min(count, group_size)) (merged)
//   output = softmax(score) v,  lse = log sum e^score,  entropy = lse - sum softmax(score) score
//
// Source: ours; ToMe's proportional attention (arXiv 2210.09461) for log count; reference in
// qm_spec/ops/merged_attention.py.
//
// Few queries, long memory: a request's groups are dealt out to splits in turn, every split attends to its own, and a
// second kernel brings the splits together by their log-sum-exps. Grids depend on shapes alone.
#pragma once

#include "csrc/cuda/groups.cuh"

namespace qm_spec {

// Running sums over entries with z = score - largest: sum e^z and sum z e^z.
struct Stats {
  float largest, sum, weighted;

  // Bring the sums to a larger `largest`; returns what they were multiplied by.
  __device__ float rise(float to) {
    if (sum == 0.0f) {
      largest = to;
      return 0.0f;
    }
    const float fall = largest - to, factor = expf(fall);
    weighted = factor * (weighted + fall * sum);
    sum *= factor;
    largest = to;
    return factor;
  }
};

// What merged_attention works on.
template <typename T>
struct Attention {
  Cache<T> cache;
  BlockTable table;
  Integers seq_lens, query_start_loc;
  MergeConfig config;
  const T* query;
  T* output;
  int64_t query_row_stride, query_head_stride;
  int64_t output_row_stride, output_head_stride;
  int64_t num_rows, num_heads, max_rows;  // max_rows at most num_rows
  const float *slopes, *far_bias;         // [H] each
  float *lse, *entropy;                   // [T, H] each
  // Scratch, for each of B requests, max_rows rows, H heads and the splits: d sums of weighted values, and `Stats`.
  float* partial_values;
  Stats* partial_stats;
  int num_splits;

  __host__ __device__ int64_t heads_per_group() const { return num_heads / cache.num_heads; }
  // Where the scratch of a row's splits begins; age 0 is the request's newest row.
  __device__ int64_t partial(int64_t request, int64_t age, int64_t head) const {
    return ((request * max_rows + age) * num_heads + head) * num_splits;
  }
};

namespace {

// Query vectors, rows times heads of one KV head, that a block computes; entries that it holds at a time, a lane each.
constexpr int kQueries = 16;
constexpr int kEntries = kWarp;
constexpr int64_t kMostDim = 256;
constexpr int kCombineThreads = 256;
// Blocks of a launch, if there are groups enough.
constexpr int64_t kAttentionBlocks = 1024;
constexpr int64_t kMostSplits = 64;

// The block's shared memory.
struct Shared {
  float* query;         // [kQueries][d]
  float* rows;          // [kEntries][d + 4], keys, then values; a multiple of four floats, spread over the banks
  float* weight;        // [kEntries][kQueries]
  float* factor;        // [kQueries], by which what was summed before shrinks
  Stats* stats;         // [kQueries]
  int64_t* group_base;  // [threads], the slot of the group's first entry, in elements of the cache
  int64_t* entry_base;  // [kEntries], -1 where there is no entry
  int* group_end;       // [threads], entries up to the end of the group
  int* warp_total;      // [warps]
  int* group_position;  // [threads], of the first token, or -1 where merged
  int* entry_position;  // [kEntries], or -1 where merged
  float* entry_log_count;  // [kEntries], log of the tokens that a merged entry stands for

  static int64_t num_bytes(int64_t dim, int64_t threads) {
    const int64_t floats = kQueries * dim + kEntries * (dim + 4) + kEntries * kQueries + kQueries;
    return 4 * floats + static_cast<int64_t>(sizeof(Stats)) * kQueries + 8 * (threads + kEntries) +
           4 * (2 * threads + threads / kWarp + 2 * kEntries);
  }
  __device__ Shared(float* memory, int64_t dim, int64_t threads) {
    query = memory;
    rows = query + kQueries * dim;
    weight = rows + kEntries * (dim + 4);
    factor = weight + kEntries * kQueries;
    stats = reinterpret_cast<Stats*>(factor + kQueries);
    group_base = reinterpret_cast<int64_t*>(stats + kQueries);
    entry_base = group_base + threads;
    group_end = reinterpret_cast<int*>(entry_base + kEntries);
    warp_total = group_end + threads;
    group_position = warp_total + threads / kWarp;
    entry_position = group_position + threads;
    entry_log_count = reinterpret_cast<float*>(entry_position + kEntries);
  }
};

// The block's part of the work.
struct Part {
  int64_t request, head;    // KV head
  int64_t num_tokens, end;  // of the request; `end` is behind its newest row
  int64_t num_groups;       // of the request, the last one perhaps not full
  int64_t first_query;      // query vector v is of row end - 1 - v / (H / G) and of that KV head's head v % (H / G)
  int num_queries, split;
};

// Entries of a group, 0 where it holds nothing. Groups that begin behind the request's last token are never asked for:
// a page that was not filled yet holds its previous owner's levels.
template <typename T>
__device__ int entries_of(const Attention<T>& to, Place at, int64_t first_token, int64_t num_tokens, int level) {
  const MergeConfig& config = to.config;
  // Of a span only the first group holds an entry.
  if (level > config.schedule_levels && !(to.cache.state(at.page, 0, at.slot)->count > 0.0f)) return 0;
  return static_cast<int>(smaller<int64_t>(config.held(level), num_tokens - first_token));
}

// List the groups of this thread's turn and count the entries up to each; returns the entries of all.
template <typename T>
__device__ int list_groups(const Attention<T>& to, const Shared& shared, const Part& part, int64_t turn) {
  const int64_t group = turn * to.num_splits + part.split, first_token = group * to.config.group_size;
  int num_entries = 0;
  if (group < part.num_groups) {
    const Place at = place_of(to.cache, to.table, to.config, part.request, group);
    if (to.cache.holds(at.page)) {
      const int level = level_at(to.cache, at, to.config);
      num_entries = entries_of(to, at, first_token, part.num_tokens, level);
      shared.group_base[threadIdx.x] = to.cache.slot(at.page, part.head, at.slot) - to.cache.data;
      shared.group_position[threadIdx.x] = level == 0 ? static_cast<int>(first_token) : -1;
    }
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  int sum = num_entries;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == kWarp - 1) shared.warp_total[warp] = sum;
  __syncthreads();
  int total = 0;
  for (int other = 0; other < num_warps; ++other) {
    if (other == warp) sum += total;
    total += shared.warp_total[other];
  }
  shared.group_end[threadIdx.x] = sum;
  return total;
}

// Find entry `number` of the listed groups: its slot, and what its scores get.
template <typename T>
__device__ void find_entry(const Attention<T>& to, const Shared& shared, int number, int total) {
  const int lane = threadIdx.x % kWarp;
  int64_t base = -1;
  int position = -1;
  float log_count = 0.0f;
  if (number < total) {
    // The first group that ends behind it.
    int low = 0, high = blockDim.x - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared.group_end[middle] > number) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int offset = number - (low == 0 ? 0 : shared.group_end[low - 1]);
    base = shared.group_base[low] + offset * to.cache.slot_stride;
    if (shared.group_position[low] >= 0) {
      position = shared.group_position[low] + offset;
    } else {
      const float count = reinterpret_cast<const SlotState*>(to.cache.data + base + 2 * to.cache.head_dim)->count;
      // A span of groups counts as one group. Stale bytes, not a number, infinite or 0, are no entry.
      if (count > 0.0f && count <= FLT_MAX) {
        log_count = logf(fminf(count, static_cast<float>(to.config.group_size)));
      } else {
        base = -1;
      }
    }
  }
  shared.entry_base[lane] = base;
  shared.entry_position[lane] = position;
  shared.entry_log_count[lane] = log_count;
}

// Read the entries' keys (`offset` 0) or values (d); 0 where there is no entry.
template <typename T>
__device__ void read_entries(const Attention<T>& to, const Shared& shared, int64_t offset) {
  const int dim = static_cast<int>(to.cache.head_dim), fours = dim / 4;
  for (int i = threadIdx.x; i < kEntries * fours; i += blockDim.x) {
    const int entry = i / fours, column = i % fours * 4;
    const int64_t base = shared.entry_base[entry];
    float4 row = {0.0f, 0.0f, 0.0f, 0.0f};
    if (base >= 0) {
      const Four<T> four = load_four(to.cache.data + base + offset + column, to.cache.aligned);
      row = {to_float(four.x[0]), to_float(four.x[1]), to_float(four.x[2]), to_float(four.x[3])};
    }
    *reinterpret_cast<float4*>(shared.rows + entry * (dim + 4) + column) = row;
  }
}

// Turn the queries' scores of the entries into weights; a warp takes a query at a time, a lane an entry.
template <typename T>
__device__ void weigh_entries(const Attention<T>& to, const Shared& shared, const Part& part) {
  const int dim = static_cast<int>(to.cache.head_dim), lane = threadIdx.x % kWarp;
  const float scale = 1.0f / sqrtf(static_cast<float>(dim));
  const float* row = shared.rows + lane * (dim + 4);
  for (int i = threadIdx.x / kWarp; i < part.num_queries; i += blockDim.x / kWarp) {
    float dot = 0.0f;
    for (int c = 0; c < dim; c += 4) {
      const float4 q = *reinterpret_cast<const float4*>(shared.query + i * dim + c);
      const float4 k = *reinterpret_cast<const float4*>(row + c);
      dot += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
    }
    const int64_t number = part.first_query + i, heads = to.heads_per_group();
    const int64_t head = part.head * heads + number % heads;
    const int64_t distance = part.num_tokens - 1 - number / heads - shared.entry_position[lane];
    const bool is_raw = shared.entry_position[lane] >= 0;
    const bool is_seen = shared.entry_base[lane] >= 0 && !(is_raw && distance < 0);
    const float bias = is_raw ? -to.slopes[head] * static_cast<float>(distance)
                              : to.far_bias[head] + shared.entry_log_count[lane];
    const float score = is_seen ? dot * scale + bias : -INFINITY;

    Stats stats = shared.stats[i];
    const float largest = fmaxf(stats.largest, warp_max(score));
    const float z = score - largest, weight = is_seen ? expf(z) : 0.0f;
    const float sum = warp_sum(weight), weighted = warp_sum(weight == 0.0f ? 0.0f : z * weight);
    shared.weight[lane * kQueries + i] = weight;
    // All lanes have read the stats: the sums came through them.
    if (lane == 0) {
      shared.factor[i] = stats.rise(largest);
      stats.sum += sum;
      stats.weighted += weighted;
      shared.stats[i] = stats;
    }
  }
}

// Grid (splits * tiles of queries, G, B); at least d threads, a column each for the values.
template <typename T>
__global__ void attend_kernel(Attention<T> to) {
  const int dim = static_cast<int>(to.cache.head_dim), thread = threadIdx.x;
  Part part;
  part.request = blockIdx.z;
  part.head = blockIdx.y;
  part.split = blockIdx.x % to.num_splits;
  part.first_query = int64_t{blockIdx.x} / to.num_splits * kQueries;
  part.end = to.query_start_loc[part.request + 1];
  // A request without rows is padding: its length and its table are not to be trusted.
  const int64_t num_rows = smaller(part.end - to.query_start_loc[part.request], to.max_rows);
  if (num_rows * to.heads_per_group() <= part.first_query) return;
  part.num_queries =
      static_cast<int>(smaller<int64_t>(kQueries, num_rows * to.heads_per_group() - part.first_query));
  part.num_tokens = to.seq_lens[part.request];
  // No table column past the request's own pages is read.
  part.num_groups = smaller(
      divide_up(part.num_tokens, to.config.group_size),
      to.table.num_columns * (to.cache.page_size / to.config.group_size));

  const Shared shared(shared_memory(), dim, blockDim.x);
  for (int i = thread; i < kQueries * dim; i += blockDim.x) {
    const int64_t number = part.first_query + i / dim, heads = to.heads_per_group();
    const int64_t row = part.end - 1 - number / heads, head = part.head * heads + number % heads;
    shared.query[i] = i / dim < part.num_queries
                          ? to_float(to.query[row * to.query_row_stride + head * to.query_head_stride + i % dim])
                          : 0.0f;
  }
  for (int i = thread; i < kQueries; i += blockDim.x) shared.stats[i] = {-INFINITY, 0.0f, 0.0f};
  for (int i = thread; i < kEntries * kQueries; i += blockDim.x) shared.weight[i] = 0.0f;
  for (int i = thread; i < kQueries; i += blockDim.x) shared.factor[i] = 0.0f;
  float values[kQueries] = {};

  for (int64_t turn = 0; turn * to.num_splits + part.split < part.num_groups; turn += blockDim.x) {
    const int total = list_groups(to, shared, part, turn + thread);
    for (int first = 0; first < total; first += kEntries) {
      // The lists are complete, and nobody reads the entries before.
      __syncthreads();
      if (thread < kWarp) find_entry(to, shared, first + thread, total);
      __syncthreads();
      read_entries(to, shared, 0);
      __syncthreads();
      weigh_entries(to, shared, part);
      __syncthreads();
      read_entries(to, shared, dim);
      __syncthreads();
      if (thread < dim) {
#pragma unroll
        for (int i = 0; i < kQueries; ++i) values[i] *= shared.factor[i];
        for (int entry = 0; entry < kEntries; ++entry) {
          const float value = shared.rows[entry * (dim + 4) + thread];
#pragma unroll
          for (int i = 0; i < kQueries; i += 4) {
            const float4 weight = *reinterpret_cast<const float4*>(shared.weight + entry * kQueries + i);
            values[i] += weight.x * value;
            values[i + 1] += weight.y * value;
            values[i + 2] += weight.z * value;
            values[i + 3] += weight.w * value;
          }
        }
      }
    }
    // The next lists overwrite these.
    __syncthreads();
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    if (i >= part.num_queries) break;
    const int64_t number = part.first_query + i, heads = to.heads_per_group();
    const int64_t at = to.partial(part.request, number / heads, part.head * heads + number % heads) + part.split;
    if (thread == 0) to.partial_stats[at] = shared.stats[i];
    if (thread < dim) to.partial_values[at * dim + thread] = values[i];
  }
}

// The request that a row belongs to, or -1.
template <typename T>
__device__ int64_t request_of(const Attention<T>& to, int64_t row) {
  // The first start behind the row.
  int64_t low = 0, high = to.table.num_requests + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (to.query_start_loc[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low > to.table.num_requests ? -1 : low - 1;
}

// Bring the splits of every row together, and fill the rows that were not computed. Grid (T); a warp takes a head at a
// time.
template <typename T>
__global__ void combine_kernel(Attention<T> to) {
  const int dim = static_cast<int>(to.cache.head_dim), lane = threadIdx.x % kWarp;
  const int64_t row = blockIdx.x, request = request_of(to, row);
  const int64_t age = request < 0 ? -1 : to.query_start_loc[request + 1] - 1 - row;
  const int num_splits = age >= 0 && age < to.max_rows ? to.num_splits : 0;
  for (int64_t head = threadIdx.x / kWarp; head < to.num_heads; head += blockDim.x / kWarp) {
    const int64_t first = num_splits == 0 ? 0 : to.partial(request, age, head);
    const Stats* partial = to.partial_stats + first;
    float largest = -INFINITY;
    for (int split = lane; split < num_splits; split += kWarp) largest = fmaxf(largest, partial[split].largest);
    largest = warp_max(largest);
    float values[kMostDim / kWarp] = {}, sum = 0.0f, weighted = 0.0f;
    for (int split = 0; split < num_splits; ++split) {
      Stats stats = partial[split];
      const float factor = stats.rise(largest);
      sum += stats.sum;
      weighted += stats.weighted;
#pragma unroll
      for (int i = 0; i < kMostDim / kWarp; ++i) {
        const int column = i * kWarp + lane;
        if (column < dim) values[i] += factor * to.partial_values[(first + split) * dim + column];
      }
    }
    const bool is_empty = sum == 0.0f;
    T* output = to.output + row * to.output_row_stride + head * to.output_head_stride;
#pragma unroll
    for (int i = 0; i < kMostDim / kWarp; ++i) {
      const int column = i * kWarp + lane;
      if (column < dim) store(output + column, is_empty ? 0.0f : values[i] / sum);
    }
    if (lane == 0) {
      to.lse[row * to.num_heads + head] = is_empty ? -INFINITY : largest + logf(sum);
      to.entropy[row * to.num_heads + head] = is_empty ? 0.0f : logf(sum) - weighted / sum;
    }
  }
}

}  // namespace

// Query vectors of each KV head, in tiles.
inline int64_t num_query_tiles(int64_t max_rows, int64_t heads_per_group) {
  return divide_up<int64_t>(max_rows * heads_per_group, kQueries);
}

// Parts that each request's groups are dealt out to, from shapes alone.
inline int choose_splits(int64_t num_groups, int64_t blocks_per_split) {
  const int64_t wanted = divide_up(kAttentionBlocks, larger<int64_t>(1, blocks_per_split));
  // A warp lists 32 groups at once, so fewer than that are not worth a split.
  const int64_t most = smaller(kMostSplits, divide_up<int64_t>(num_groups, kWarp));
  return static_cast<int>(larger<int64_t>(1, smaller(wanted, most)));
}

template <typename T, class Launch>
void merged_attention(const Launch& launch, const Attention<T>& to) {
  if (to.num_rows == 0 || to.num_heads == 0) return;
  const int64_t tiles = num_query_tiles(to.max_rows, to.heads_per_group());
  const int64_t threads = divide_up<int64_t>(to.cache.head_dim, kWarp) * kWarp;
  if (tiles > 0 && to.table.num_requests > 0)
    launch(
        attend_kernel<T>,
        dim3(static_cast<unsigned>(tiles * to.num_splits), static_cast<unsigned>(to.cache.num_heads),
             static_cast<unsigned>(to.table.num_requests)),
        dim3(static_cast<unsigned>(threads)), static_cast<size_t>(Shared::num_bytes(to.cache.head_dim, threads)), to);
  launch(combine_kernel<T>, dim3(static_cast<unsigned>(to.num_rows)), dim3(kCombineThreads), size_t{0}, to);
}

}  // namespace qm_spec
