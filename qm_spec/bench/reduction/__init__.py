"""Token reduction methods under comparison, each called the same way: `reduce(tokens, keep)`.

A method that merges puts every token into a group; one that prunes drops tokens. Both return
`qm_spec.quickmerge.MergedTokens`: a dropped token has cluster -1, so the sizes of a merging method sum
to N and those of a pruning one to K.

Letters: L layers, B sequences, N tokens, K tokens kept, D embedding.
"""

from qm_spec.bench.reduction.bipartite import bipartite_matching
from qm_spec.bench.reduction.error import nearest_error, rebuild_error
from qm_spec.bench.reduction.registry import METHODS, Method, find_methods
from qm_spec.bench.reduction.result import Reducer

__all__ = [
    "METHODS",
    "Method",
    "Reducer",
    "bipartite_matching",
    "find_methods",
    "nearest_error",
    "rebuild_error",
]
