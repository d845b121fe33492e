// Runs CUDA kernels on the CPU: enough of CUDA for csrc/cuda/*.cuh, on one thread.
//
// Every CUDA thread is a fibre that runs until it comes to a barrier or to an exchange within its warp. Several blocks
// are under way at once, and a seed decides which fibre goes on: a kernel that lacks a barrier gives another result
// for another seed. Shared memory begins as NaN, so what is read before it was written shows. A barrier that some
// threads never come to, lanes of a warp at different instructions, too much shared memory, and, if it is built with
// -fsanitize=alignment and linked without, an access that is not aligned are errors.
//
// What it does not show: a race that needs a switch elsewhere than at a barrier or exchange, weak memory order, and
// anything of the hardware's own: speed, occupancy, coalescing.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __shared__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Of the fibre that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardFloats = 64;
// The most that one block may have on the GPUs that are built for.
constexpr size_t kMostSharedBytes = 160 * 1024;

enum class State { kRunnable, kAtWarp, kAtBlock, kDone };

struct Block;

struct Fibre {
  Block* block;
  int thread;
  State state;
  const char* at = "";     // the instruction it waits at
  uint64_t exchanges = 0;  // how often it has met its warp
  bool is_started = false;
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct Block {
  dim3 index;
  std::vector<float> shared;
  std::vector<Fibre*> fibres;
  // Of every lane's value, for two exchanges: a lane may be one ahead of another.
  std::vector<uint32_t> exchanged;
  int num_alive;
  size_t warp;  // that goes on
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // Run a kernel's grid; `body` is what one thread does.
  void run(dim3 grid, dim3 block_dim, size_t shared_bytes, std::function<void()> body) {
    const int64_t num_blocks = int64_t{grid.x} * grid.y * grid.z;
    check(num_blocks > 0 && grid.y < 65536 && grid.z < 65536, "a grid has 1..2^31 - 1 x 65535 x 65535 blocks");
    check(block_dim.x > 0 && block_dim.x <= 1024 && block_dim.x % kWarp == 0, "a block has whole warps, at most 32");
    check(shared_bytes <= kMostSharedBytes, "too much shared memory");
    body_ = std::move(body);
    gridDim = grid;
    blockDim = block_dim;
    shared_bytes_ = shared_bytes;
    std::vector<int64_t> waiting(num_blocks);
    for (int64_t i = 0; i < num_blocks; ++i) waiting[i] = i;
    std::shuffle(waiting.begin(), waiting.end(), random_);
    std::vector<std::unique_ptr<Block>> running;
    while (!waiting.empty() || !running.empty()) {
      while (!waiting.empty() && running.size() < kBlocksAtOnce) {
        running.push_back(start(waiting.back()));
        waiting.pop_back();
      }
      const size_t chosen = random_() % running.size();
      step(*running[chosen]);
      if (running[chosen]->num_alive == 0) {
        finish(*running[chosen]);
        running.erase(running.begin() + static_cast<int64_t>(chosen));
      }
    }
    for (const dim3& size : {grid, block_dim})
      launches += std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z) + " ";
    launches += std::to_string(shared_bytes) + "\n";
  }

  void seed(uint64_t seed) { random_.seed(seed); }
  // A line for each launch: grid, block, bytes of shared memory.
  std::string launches;

  // Called by a fibre: it goes on when all of its block, or of its warp, have come here.
  void wait(State state, const char* at) {
    running_->state = state;
    running_->at = at;
    if (_setjmp(running_->jump) == 0) _longjmp(home_, 1);
  }
  // Called by a fibre, which does not go on.
  void stop(const char* why) {
    stopped_ = why;
    _longjmp(home_, 1);
  }
  // Called by a fibre: every lane's word, once all lanes have come here.
  const uint32_t* exchange(uint32_t word, const char* at) {
    Block& block = *running_->block;
    const int first = running_->thread / kWarp * kWarp;
    uint32_t* words = block.exchanged.data() + (running_->exchanges++ % 2) * block.fibres.size() + first;
    words[running_->thread - first] = word;
    wait(State::kAtWarp, at);
    return words;
  }
  float* shared() { return running_->block->shared.data(); }

 private:
  static constexpr size_t kBlocksAtOnce = 3;

  static void check(bool holds, const std::string& message) {
    if (!holds) throw std::runtime_error("cuda_on_cpu: " + message);
  }

  std::unique_ptr<Block> start(int64_t number) {
    auto block = std::make_unique<Block>();
    const unsigned i = static_cast<unsigned>(number);
    block->index = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    // All bits set: NaN as a float, and far out of range as an index.
    block->shared.resize(shared_bytes_ / sizeof(float) + kGuardFloats);
    std::memset(block->shared.data(), 0xff, block->shared.size() * sizeof(float));
    block->exchanged.resize(2 * blockDim.x);
    block->num_alive = static_cast<int>(blockDim.x);
    block->warp = random_() % (blockDim.x / kWarp);
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
      if (idle_.empty()) idle_.push_back(std::make_unique<Fibre>());
      Fibre* fibre = idle_.back().release();
      idle_.pop_back();
      fibre->block = block.get();
      fibre->thread = static_cast<int>(thread);
      fibre->state = State::kRunnable;
      fibre->exchanges = 0;
      fibre->is_started = false;
      block->fibres.push_back(fibre);
    }
    return block;
  }

  void finish(Block& block) {
    for (size_t i = 0; i < kGuardFloats; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &block.shared[shared_bytes_ / sizeof(float) + i], sizeof bits);
      check(bits == 0xffffffffu, "a block wrote behind its shared memory");
    }
    for (Fibre* fibre : block.fibres) idle_.emplace_back(fibre);
  }

  // Let the lanes of a warp that can go on do so, in an order of the seed's; then open the barriers that all have come
  // to. The same warp is chosen again and again for a while, so that some are far ahead of others.
  void step(Block& block) {
    const size_t num_warps = block.fibres.size() / kWarp;
    if (random_() % 8 == 0) block.warp = random_() % num_warps;
    std::vector<Fibre*> order = runnable(block, block.warp);
    for (size_t tried = 1; order.empty() && tried < num_warps; ++tried) {
      block.warp = (block.warp + 1) % num_warps;
      order = runnable(block, block.warp);
    }
    check(!order.empty(), "threads wait at " + waiting_at(block) + " for others that never come");
    std::shuffle(order.begin(), order.end(), random_);
    for (Fibre* fibre : order) resume(fibre);
    open(block, block.warp * kWarp, (block.warp + 1) * kWarp, State::kAtWarp);
    open(block, 0, block.fibres.size(), State::kAtBlock);
  }

  static std::vector<Fibre*> runnable(const Block& block, size_t warp) {
    std::vector<Fibre*> result;
    for (size_t i = warp * kWarp; i < (warp + 1) * kWarp; ++i)
      if (block.fibres[i]->state == State::kRunnable) result.push_back(block.fibres[i]);
    return result;
  }

  // Let fibres first..last go on if all of them wait at the same instruction.
  static void open(Block& block, size_t first, size_t last, State state) {
    for (size_t i = first; i < last; ++i) {
      if (block.fibres[i]->state != state) return;
      check(std::strcmp(block.fibres[i]->at, block.fibres[first]->at) == 0, "lanes are at different instructions");
    }
    for (size_t i = first; i < last; ++i) block.fibres[i]->state = State::kRunnable;
  }

  static std::string waiting_at(const Block& block) {
    for (const Fibre* fibre : block.fibres)
      if (fibre->state == State::kAtWarp || fibre->state == State::kAtBlock) return fibre->at;
    return "nothing";
  }

  void resume(Fibre* fibre) {
    running_ = fibre;
    threadIdx = dim3(static_cast<unsigned>(fibre->thread), 0, 0);
    blockIdx = fibre->block->index;
    // After the first time a jump does, which, unlike a change of context, needs no call to the system.
    if (_setjmp(home_) == 0) {
      if (fibre->is_started) _longjmp(fibre->jump, 1);
      fibre->is_started = true;
      getcontext(&fibre->context);
      fibre->context.uc_stack.ss_sp = fibre->stack.get();
      fibre->context.uc_stack.ss_size = kStackBytes;
      fibre->context.uc_link = nullptr;
      makecontext(&fibre->context, &Machine::main, 0);
      setcontext(&fibre->context);
    }
    if (stopped_ != nullptr) throw std::runtime_error(std::string("cuda_on_cpu: ") + std::exchange(stopped_, nullptr));
  }

  static void main() {
    Machine& machine = get();
    machine.body_();
    machine.running_->state = State::kDone;
    --machine.running_->block->num_alive;
    _longjmp(machine.home_, 1);
  }

  std::function<void()> body_;
  size_t shared_bytes_ = 0;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Fibre>> idle_;
  Fibre* running_ = nullptr;
  jmp_buf home_;
  const char* stopped_ = nullptr;
};

// Launches as the host side of a kernel does.
struct Launcher {
  template <class... Parameters>
  void operator()(
      void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Parameters... arguments) const {
    Machine::get().run(grid, block, shared_bytes, [=] { kernel(arguments...); });
  }
};

template <class Value>
uint32_t to_word(Value value) {
  static_assert(sizeof(Value) == sizeof(uint32_t));
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

template <class Value>
Value from_word(uint32_t word) {
  Value value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

}  // namespace cuda_on_cpu

// What the compiler calls at an access that is not aligned; the rest of its library is not needed.
extern "C" __attribute__((weak, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(void*, uintptr_t) {
  cuda_on_cpu::Machine::get().stop("an access is not aligned to its type");
}

inline void __syncthreads() { cuda_on_cpu::Machine::get().wait(cuda_on_cpu::State::kAtBlock, "__syncthreads"); }
inline void __syncwarp() { cuda_on_cpu::Machine::get().exchange(0, "__syncwarp"); }

template <class Value>
Value __shfl_sync(unsigned, Value value, int source) {
  return cuda_on_cpu::from_word<Value>(
      cuda_on_cpu::Machine::get().exchange(cuda_on_cpu::to_word(value), "__shfl_sync")[source % cuda_on_cpu::kWarp]);
}
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return cuda_on_cpu::from_word<Value>(
      cuda_on_cpu::Machine::get().exchange(cuda_on_cpu::to_word(value), "__shfl_xor_sync")[cuda_on_cpu::lane() ^ mask]);
}
template <class Value>
Value __shfl_up_sync(unsigned, Value value, int offset) {
  const int lane = cuda_on_cpu::lane(), source = lane < offset ? lane : lane - offset;
  return cuda_on_cpu::from_word<Value>(
      cuda_on_cpu::Machine::get().exchange(cuda_on_cpu::to_word(value), "__shfl_up_sync")[source]);
}
inline unsigned __ballot_sync(unsigned, bool holds) {
  const uint32_t* words = cuda_on_cpu::Machine::get().exchange(holds, "__ballot_sync");
  unsigned result = 0;
  for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) result |= words[lane] << lane;
  return result;
}
inline bool __any_sync(unsigned mask, bool holds) { return __ballot_sync(mask, holds) != 0; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

namespace qm_spec {
inline float* shared_memory() { return cuda_on_cpu::Machine::get().shared(); }
}  // namespace qm_spec
