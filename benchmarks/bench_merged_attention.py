"""Time of `merged_attention` from 1k to 128k tokens, against full attention over all of them.

Lengths are compared within one column: all warm or all cold. A request of 4k tokens stays in the caches while slow
alternatives run beside it, one of 128k does not.
"""

import torch
from kernels import program
from paged_cases import PagedSizes, attention_case

CONTEXTS = [1 << power for power in (10, 12, 14, 16, 17)]
PLAN = [
    *((attention_case("sdpa"), PagedSizes(num_tokens), torch.bfloat16) for num_tokens in CONTEXTS),
    *((attention_case("paged"), PagedSizes(num_tokens, num_rows=5), torch.bfloat16) for num_tokens in CONTEXTS),
    (attention_case("sdpa"), PagedSizes(1 << 17), torch.float32),
]

if __name__ == "__main__":
    program(["merged_attention"])
