"""The methods that QuickMerge++ is held against, ToMe aside."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.bench.reduction.result import Reducer, average, last_layer, prune
from qm_spec.quickmerge import Grouping, MergedTokens, Selection, group_by_cosine, group_by_kmeans

# Attention sinks: the first tokens, which take much of a causal model's attention whatever they say.
NUM_SINKS = 4


def uniform_pooling(tokens: Tensor, keep: int) -> MergedTokens:
    """Average adjacent tokens, K runs whose lengths differ by at most one; a run stands at its last token.

    Arguments and errors: see `Reducer`.
    """
    tokens, keep = last_layer("uniform_pooling", tokens, keep)
    num_tokens = tokens.shape[1]
    cluster = torch.arange(num_tokens, device=tokens.device) * keep // num_tokens
    # The last token of run k is the last i with i * K < (k + 1) * N.
    place = (torch.arange(1, keep + 1, device=tokens.device) * num_tokens - 1) // keep
    return average(tokens, _grouping(cluster.expand(len(tokens), -1), place.expand(len(tokens), -1)))


def kmeans(tokens: Tensor, keep: int) -> MergedTokens:
    """Average the clusters of k-means, unweighted, that begins at evenly spaced tokens.

    Five iterations; a cluster stands at its last token. Arguments and errors: see `Reducer`.
    """
    tokens, keep = last_layer("kmeans", tokens, keep)
    num_tokens = tokens.shape[1]
    seeds = (2 * torch.arange(keep, device=tokens.device) + 1) * num_tokens // (2 * keep)
    return average(tokens, group_by_kmeans(tokens, _select(tokens, seeds.expand(len(tokens), -1)), causal=True))


def norm_pruning(tokens: Tensor, keep: int) -> MergedTokens:
    """Keep the K tokens of the largest norm (ties: the earlier) and drop the others.

    Arguments and errors: see `Reducer`.
    """
    tokens, keep = last_layer("norm_pruning", tokens, keep)
    norms = tokens.float().norm(dim=-1)
    return prune(tokens, norms.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(dim=-1).values)


def sink_and_window(tokens: Tensor, keep: int) -> MergedTokens:
    """Keep the first 4 tokens (at most half of K) and the newest ones, drop those between.

    Arguments and errors: see `Reducer`.

    Source: StreamingLLM, arXiv 2309.17453.
    """
    tokens, keep = last_layer("sink_and_window", tokens, keep)
    sinks, index = min(NUM_SINKS, keep // 2), torch.arange(keep, device=tokens.device)
    index = torch.where(index < sinks, index, index + tokens.shape[1] - keep)
    return prune(tokens, index.expand(len(tokens), -1))


class Random:
    """Draw K tokens at random, another draw at each call, and drop the others or merge them into these.

    Args:
        merge: let every other token join the drawn one nearest by cosine; else drop it.
        seed: of the draws.
    """

    def __init__(self, merge: bool, seed: int = 0) -> None:
        self.merge = merge
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, tokens: Tensor, keep: int) -> MergedTokens:
        """Reduce; arguments and errors: see `Reducer`."""
        tokens, keep = last_layer("Random", tokens, keep)
        draw = torch.rand(tokens.shape[:2], generator=self.generator).argsort(dim=-1)
        index = draw[:, :keep].sort(dim=-1).values.to(tokens.device)
        if not self.merge:
            return prune(tokens, index)
        return average(tokens, group_by_cosine(tokens, _select(tokens, index)))


class KeepRecent:
    """Keep the sinks and the newest tokens as they are, half of K in all, and reduce those between to the rest.

    Args:
        reducer: of the tokens between.

    Source: ours; the drafter's merged cache has such a window too.
    """

    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def __call__(self, tokens: Tensor, keep: int) -> MergedTokens:
        """Reduce; arguments and errors: see `Reducer`."""
        last, keep = last_layer("KeepRecent", tokens, keep)
        num_tokens = last.shape[1]
        if keep < 2 or keep == num_tokens:
            return self.reducer(tokens, keep)
        raw = keep // 2
        sinks = min(NUM_SINKS, raw // 2)
        end = num_tokens - (raw - sinks)
        head, tail = _whole(last[:, :sinks], 0), _whole(last[:, end:], end)
        middle = self.reducer(tokens[..., sinks:end, :], keep - raw)
        middle_cluster = torch.where(middle.cluster < 0, -1, middle.cluster + sinks)

        def join(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in (head, middle, tail)], dim=1)

        return MergedTokens(
            tokens=join("tokens"),
            live=join("live"),
            size=join("size"),
            mass=join("mass"),
            place=torch.cat([head.place, middle.place + sinks, tail.place], dim=1),
            cluster=torch.cat([head.cluster, middle_cluster, tail.cluster + sinks + keep - raw], dim=1),
            mask=join("mask"),
        )


def _whole(tokens: Tensor, offset: int) -> MergedTokens:
    """Return all tokens as they are, at places that begin at `offset`."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    kept = prune(tokens, index)
    return MergedTokens(kept.tokens, kept.live, kept.size, kept.mass, index + offset, index, kept.mask)


def _grouping(cluster: Tensor, place: Tensor) -> Grouping:
    return Grouping(cluster, place, torch.ones_like(place, dtype=torch.bool))


def _select(tokens: Tensor, index: Tensor) -> Selection:
    """Return a selection of the tokens at `index`, all of the same mass."""
    mass = torch.ones(tokens.shape[:2], device=tokens.device)
    mask = torch.zeros_like(mass).scatter(1, index, 1.0)
    return Selection(index.contiguous(), torch.ones_like(index, dtype=torch.bool), mask, mass)
