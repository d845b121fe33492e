// What other operators call of append_kv_.
#pragma once

#include "csrc/cpu/kernel.h"

namespace qm_spec {

// Write keys and values [T, G, d] of T rows into their slots [T] of the cache; a negative slot is padding.
void append_kv(Tensor cache, Tensor key, Tensor value, Tensor slots);

}  // namespace qm_spec
