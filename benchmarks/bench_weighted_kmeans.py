"""Time of one iteration of `weighted_kmeans`: assignment and update."""

import torch
from cases import CASES, Sizes
from kernels import program

PLAN = [
    (CASES[name], sizes, dtype)
    for name in ("weighted_kmeans_assign", "weighted_kmeans_update")
    for sizes, dtype in (
        (Sizes(1, 2048, 512, 256), torch.float32),
        (Sizes(1, 2048, 512, 256), torch.bfloat16),
        (Sizes(8, 256, 128, 64), torch.float32),
    )
]

if __name__ == "__main__":
    program(["weighted_kmeans"])
