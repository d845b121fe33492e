"""Time of `cosine_similarity`."""

import torch
from cases import CASES, Sizes
from kernels import program

PLAN = [
    (CASES["cosine_similarity"], sizes, dtype)
    for sizes, dtype in (
        (Sizes(1, 2048, 512, 1), torch.float32),
        (Sizes(1, 2048, 512, 1), torch.bfloat16),
        (Sizes(4, 256, 128, 1), torch.float32),
    )
]

if __name__ == "__main__":
    program(["cosine_similarity"])
