// A parallel loop whose errors stay sentences: torch's stable one replaces them by "API call failed".
#pragma once

#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>

#include "csrc/cpu/kernel.h"

namespace qm_spec {

// Call `body(first, last)` for parts of [0, count), of at least `grain` each where several threads take part.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  std::mutex mutex;
  std::string message;
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(mutex);
      message = error.what();
    }
  });
  if (!message.empty()) throw std::runtime_error(message);
}

}  // namespace qm_spec
