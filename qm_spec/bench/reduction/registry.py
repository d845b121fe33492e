"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from qm_spec.bench.reduction.baselines import (
    KeepRecent,
    Random,
    kmeans,
    norm_pruning,
    sink_and_window,
    uniform_pooling,
)
from qm_spec.bench.reduction.bipartite import bipartite_matching
from qm_spec.bench.reduction.result import Reducer, last_layer
from qm_spec.quickmerge import DifferentiableTokenMerging, MergedTokens
from qm_spec.quickmerge.budget import fixed_budget
from qm_spec.quickmerge.inputs import full_mask
from qm_spec.quickmerge.saliency import make_saliency


class QuickMerge:
    """QuickMerge++ without noise: saliency, selection, grouping, mean weighted by mass.

    Args:
        saliency: `entropy`, `inverse_entropy` or `norm`.
        grouping: `cosine` or `kmeans`.
        causal: a merged token stands at or after all its members; entropy is over earlier tokens.

    Source: QuickMerge++, arXiv 2508.13204. The entropy is the mean over the layers that are given; of
    `[B, N, D]` it is that of the tokens alone.
    """

    def __init__(self, saliency: str = "entropy", grouping: str = "cosine", causal: bool = False) -> None:
        self.saliency = saliency
        self.causal = causal
        self.merging = DifferentiableTokenMerging(grouping=grouping, causal=causal).eval()

    def __call__(self, tokens: Tensor, keep: int) -> MergedTokens:
        """Reduce; arguments and errors: see `Reducer`."""
        last, keep = last_layer("QuickMerge", tokens, keep)
        saliency = make_saliency(self.saliency, last.shape[-1], num_layers=1, causal=self.causal)(tokens)
        budget = fixed_budget(keep, full_mask("QuickMerge", last, None))
        return self.merging.merge(last, saliency, budget, num_slots=keep)


@dataclass(frozen=True)
class Method:
    """A token reduction method.

    Attributes:
        name: as it stands in tables and on command lines.
        merges: every token joins a group; else tokens are dropped.
        about: one line.
        make: the reducer, from the seed of its draws (unused where nothing is random).
    """

    name: str
    merges: bool
    about: str
    make: Callable[[int], Reducer]


_LIST = (
    Method("quickmerge", True, "entropy saliency, grouping by cosine", lambda _: QuickMerge()),
    Method("quickmerge-inverse", True, "low entropy is salient", lambda _: QuickMerge("inverse_entropy")),
    Method("quickmerge-norm", True, "large norm is salient", lambda _: QuickMerge("norm")),
    Method("quickmerge-kmeans", True, "k-means weighted by mass", lambda _: QuickMerge(grouping="kmeans")),
    Method("quickmerge-causal", True, "tokens join later ones only", lambda _: QuickMerge(causal=True)),
    Method("quickmerge-recent", True, "half of K keeps sinks and newest", lambda _: KeepRecent(QuickMerge())),
    Method("tome", True, "bipartite soft matching", lambda _: bipartite_matching),
    Method("kmeans", True, "k-means from evenly spaced tokens", lambda _: kmeans),
    Method("uniform", True, "means of adjacent tokens", lambda _: uniform_pooling),
    Method("uniform-recent", True, "half of K keeps sinks and newest", lambda _: KeepRecent(uniform_pooling)),
    Method("random-merge", True, "the others join random tokens by cosine", lambda seed: Random(True, seed)),
    Method("random", False, "random tokens", lambda seed: Random(False, seed)),
    Method("topk-norm", False, "tokens of the largest norm", lambda _: norm_pruning),
    Method("window", False, "sinks and newest tokens", lambda _: sink_and_window),
)
METHODS = {method.name: method for method in _LIST}


def find_methods(names: Iterable[str]) -> list[Method]:
    """Return the methods of these names, in their order.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    names = list(names)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"methods: must be of {', '.join(METHODS)}; got {', '.join(unknown) or 'none'}")
    return [METHODS[name] for name in names]
