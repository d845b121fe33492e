"""Time of `saliency_merge`: a long sequence, and a batch of short ones."""

import torch
from cases import CASES, Sizes
from kernels import program

PLAN = [
    (CASES["saliency_merge"], sizes, dtype)
    for sizes, dtype in (
        (Sizes(1, 2048, 512, 256), torch.float32),
        (Sizes(1, 2048, 512, 256), torch.bfloat16),
        (Sizes(8, 256, 128, 64), torch.float32),
        (Sizes(1, 2048, 512, 1), torch.float32),
    )
]

if __name__ == "__main__":
    program(["saliency_merge"])
