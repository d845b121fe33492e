"""Time of `merge_groups_`: a raw prefill to all its levels, and a decode step where nothing is due."""

import torch
from kernels import program
from paged_cases import PagedSizes, merge_again_case, merge_case

PLAN = [
    *(
        (merge_case(), PagedSizes(num_tokens), dtype)
        for num_tokens, dtype in ((4096, torch.bfloat16), (65536, torch.bfloat16), (65536, torch.float32))
    ),
    *((merge_again_case(), PagedSizes(num_tokens), torch.bfloat16) for num_tokens in (1024, 16384, 131072)),
]

if __name__ == "__main__":
    program(["merge_groups"])
