// The kernels of csrc/cuda, built for the CPU: what their host side does, for plain arrays, called through ctypes.
#include "cuda_on_cpu.h"

#include "csrc/cuda/append_kv.cuh"
#include "csrc/cuda/merge_groups.cuh"
#include "csrc/cuda/merged_attention.cuh"
#include "faults.h"

namespace {

using namespace qm_spec;

// A tensor as Python hands it over; strides in elements.
struct Array {
  void* data;
  int64_t size[4], stride[4];
};

// A packed MergeConfig.
struct Config {
  const int64_t* packed;
  int64_t size;

  MergeConfig read() const { return MergeConfig({packed, packed + size}); }
};

thread_local std::string error;

template <typename T>
bool starts_at_fours(const Array& array, int dimensions) {
  bool result = reinterpret_cast<uintptr_t>(array.data) % (4 * sizeof(T)) == 0;
  for (int i = 0; i + 1 < dimensions; ++i) result = result && array.stride[i] % 4 == 0;
  return result;
}

template <typename T>
Cache<T> cache_view(const Array& cache, int64_t head_dim) {
  return {static_cast<T*>(cache.data), cache.size[0], cache.size[1], cache.size[2], head_dim,
          cache.stride[0], cache.stride[1], cache.stride[2], starts_at_fours<T>(cache, 4)};
}

template <typename T>
Rows<const T> rows_view(const Array& rows) {
  return {static_cast<const T*>(rows.data), rows.stride[0], rows.stride[1], starts_at_fours<T>(rows, 3)};
}

Integers integers(const Array& array) { return {static_cast<const int32_t*>(array.data), array.stride[0]}; }

BlockTable table_view(const Array& table) {
  return {static_cast<const int32_t*>(table.data), table.size[0], table.size[1], table.stride[0], table.stride[1]};
}

// Run with the element type: 0 float32, 1 float16, 2 bfloat16. Returns the error, or null.
template <class Run>
const char* dispatch(int type, uint64_t seed, Run&& run) {
  cuda_on_cpu::Machine::get().seed(seed);
  cuda_on_cpu::Machine::get().launches.clear();
  try {
    if (type == 0) run(static_cast<float*>(nullptr));
    if (type == 1) run(static_cast<__half*>(nullptr));
    if (type == 2) run(static_cast<__nv_bfloat16*>(nullptr));
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}

// Launch a kernel by its mangled name, which holds its own and its type's; false if it is not of this type.
template <typename T>
bool launch_as(const char* type, const std::string& name, dim3 grid, dim3 block, size_t shared_bytes, void** arguments) {
  const cuda_on_cpu::Launcher launch;
  const auto is = [&](const char* kernel) { return name.find(std::string(kernel) + "I" + type + "E") != name.npos; };
  const auto& merge = *static_cast<const Merge<T>*>(arguments[0]);
  const auto& attention = *static_cast<const Attention<T>*>(arguments[0]);
  if (is("append_kv_kernel")) {
    launch(append_kv_kernel<T>, grid, block, shared_bytes, *static_cast<const Append<T>*>(arguments[0]));
  } else if (is("merge_levels_kernel")) {
    launch(merge_levels_kernel<T>, grid, block, shared_bytes, merge);
  } else if (is("merge_spans_kernel")) {
    launch(merge_spans_kernel<T>, grid, block, shared_bytes, merge, *static_cast<const int*>(arguments[1]));
  } else if (is("attend_kernel")) {
    launch(attend_kernel<T>, grid, block, shared_bytes, attention);
  } else if (is("combine_kernel")) {
    launch(combine_kernel<T>, grid, block, shared_bytes, attention);
  } else {
    return false;
  }
  return true;
}

}  // namespace

extern "C" {

// For host.cpp; returns the error, or null.
const char* launch(
    const char* name, const unsigned* grid, const unsigned* block, uint64_t shared_bytes, void** arguments) {
  const dim3 blocks(grid[0], grid[1], grid[2]), threads(block[0], block[1], block[2]);
  try {
    if (!launch_as<float>("f", name, blocks, threads, shared_bytes, arguments) &&
        !launch_as<__half>("6__half", name, blocks, threads, shared_bytes, arguments) &&
        !launch_as<__nv_bfloat16>("13__nv_bfloat16", name, blocks, threads, shared_bytes, arguments))
      throw std::runtime_error(std::string("there is no emulated kernel ") + name);
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}

// Of the last call.
const char* launches() { return cuda_on_cpu::Machine::get().launches.c_str(); }

const char* fault(int type, uint64_t seed, const Array* out, int number) {
  return dispatch(type, seed, [&](auto*) { faults::run(number, static_cast<float*>(out->data)); });
}

const char* append_kv(int type, uint64_t seed, const Array* cache, const Array* key, const Array* value,
                      const Array* slots) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    append_kv(
        cuda_on_cpu::Launcher(),
        Append<T>{cache_view<T>(*cache, key->size[2]), rows_view<T>(*key), rows_view<T>(*value),
                  static_cast<const int64_t*>(slots->data), slots->stride[0], slots->size[0]});
  });
}

const char* merge_groups(int type, uint64_t seed, const Array* cache, const Array* table, const Array* frontier,
                         int64_t head_dim, const Config* config) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    merge_groups(
        cuda_on_cpu::Launcher(), Merge<T>{cache_view<T>(*cache, head_dim), table_view(*table), integers(*frontier),
                                          config->read()});
  });
}

// `num_splits` 0: what the host side would choose.
const char* merged_attention(int type, uint64_t seed, const Array* query, const Array* cache, const Array* table,
                             const Array* seq_lens, const Array* query_start_loc, const Array* slopes,
                             const Array* far_bias, int64_t max_rows, const Config* config, const Array* output,
                             const Array* lse, const Array* entropy, int num_splits) {
  return dispatch(type, seed, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    Attention<T> to{};
    to.cache = cache_view<T>(*cache, query->size[2]);
    to.table = table_view(*table);
    to.seq_lens = integers(*seq_lens);
    to.query_start_loc = integers(*query_start_loc);
    to.config = config->read();
    to.query = static_cast<const T*>(query->data);
    to.output = static_cast<T*>(output->data);
    to.query_row_stride = query->stride[0];
    to.query_head_stride = query->stride[1];
    to.output_row_stride = output->stride[0];
    to.output_head_stride = output->stride[1];
    to.num_rows = query->size[0];
    to.num_heads = query->size[1];
    to.max_rows = smaller(max_rows, to.num_rows);
    to.slopes = static_cast<const float*>(slopes->data);
    to.far_bias = static_cast<const float*>(far_bias->data);
    to.lse = static_cast<float*>(lse->data);
    to.entropy = static_cast<float*>(entropy->data);
    const int64_t tiles = num_query_tiles(to.max_rows, to.heads_per_group());
    to.num_splits = num_splits > 0 ? num_splits
                                   : choose_splits(to.table.num_columns * to.cache.page_size / to.config.group_size,
                                                   to.table.num_requests * to.cache.num_heads * tiles);
    // As torch's memory is: not written yet.
    const int64_t parts = to.table.num_requests * to.max_rows * to.num_heads * to.num_splits;
    std::vector<float> values(parts * to.cache.head_dim, NAN);
    std::vector<Stats> stats(parts, {NAN, NAN, NAN});
    to.partial_values = values.data();
    to.partial_stats = stats.data();
    merged_attention(cuda_on_cpu::Launcher(), to);
  });
}

}  // extern "C"
