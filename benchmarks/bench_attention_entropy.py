"""Time of `attention_entropy`, from groups of a page to a long sequence."""

import torch
from cases import CASES, Sizes
from kernels import program

PLAN = [
    (CASES["attention_entropy"], sizes, dtype)
    for sizes, dtype in (
        (Sizes(1, 2048, 512, 1), torch.float32),
        (Sizes(1, 2048, 512, 1), torch.bfloat16),
        (Sizes(4, 2048, 64, 1), torch.float32),
        (Sizes(4, 256, 128, 1), torch.float32),
        (Sizes(512, 16, 64, 1), torch.float32),
    )
]

if __name__ == "__main__":
    program(["attention_entropy"])
