"""Time of `append_kv_`: the keys and values of a prefill, and of a decode step."""

import torch
from kernels import program
from paged_cases import PagedSizes, append_case

PLAN = [
    (append_case(), PagedSizes(num_tokens, page_size=page_size), dtype)
    for num_tokens, page_size, dtype in (
        (8, 128, torch.bfloat16),
        (4096, 128, torch.bfloat16),
        (65536, 128, torch.bfloat16),
        (65536, 16, torch.bfloat16),
        (65536, 128, torch.float32),
    )
]

if __name__ == "__main__":
    program(["append_kv"])
