"""Time of `gumbel_softmax`: saliencies of a batch, and many rows."""

import torch
from cases import CASES, Sizes
from kernels import program

PLAN = [
    (CASES["gumbel_softmax"], sizes, dtype)
    for sizes, dtype in (
        (Sizes(1, 2048, 512, 1), torch.float32),
        (Sizes(1, 2048, 512, 1), torch.bfloat16),
        (Sizes(1, 8, 2048, 1), torch.float32),
    )
]

if __name__ == "__main__":
    program(["gumbel_softmax"])
