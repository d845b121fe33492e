"""What a target's attention reads of a long prompt: all of it, a window, merged entries or pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import torch
from torch import Tensor

from qm_spec.compression.rotary import Rotary
from qm_spec.drafter.anchors import engine_steps

# The first tokens take much of the attention of any query, and stay as they are.
SINKS = 4
PAGE = 16
# Prompt positions, the last ones, whose queries a memory is fitted to.
SAMPLED = 256
RIDGE = 1e-3
MASS_STEPS = 50
LEARNING_STEPS = 100
# Of entries and masses, in units of their own standard deviation.
LEARNING_RATE = 0.02


@dataclass(frozen=True)
class Layer:
    """The prompt in one layer, G key/value heads with R query heads each.

    Attributes:
        keys, values: `[G, N, D]` of N prompt tokens, the keys rotated.
        queries: `[G, S * R, D]` of sampled positions, rotated to position N, as if asked now.
        rotary: of the target.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    rotary: Rotary

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return float(self.keys.shape[-1]) ** -0.5

    @cached_property
    def plain_keys(self) -> Tensor:
        """`[G, N, D]` keys with their rotation taken back."""
        return self.rotary.rotate(self.keys, -torch.arange(self.keys.shape[1]))

    @cached_property
    def sampled_probabilities(self) -> Tensor:
        """`[G, S * R, N]` attention of the sampled queries over the whole prompt."""
        return (self.queries @ self.keys.transpose(1, 2) * self.scale).softmax(-1)


@dataclass(frozen=True)
class Memory:
    """What rows see of the prompt in one layer.

    Attributes:
        keys, values: `[G, M, D]` entries.
        bias: `[G, M]` added to their scores, or None.
        visible: from `[G, R, T, D]` queries to `[G, 1, T, M]` booleans, or None if all rows see all.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    visible: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Split:
    """How a prompt of N tokens is cut: sinks, then groups of almost equal size, then `near` raw tokens."""

    num_tokens: int
    near: int
    groups: int

    @classmethod
    def for_budget(cls, num_tokens: int, budget: int) -> Split:
        """Return the split of `budget` entries, one per group, of which half are the window."""
        return cls(num_tokens, budget // 2, budget - budget // 2 - SINKS)

    @property
    def far(self) -> slice:
        """The positions in groups."""
        return slice(SINKS, self.num_tokens - self.near)

    @cached_property
    def owner(self) -> Tensor:
        """`[F]` group of each far position."""
        count = self.num_tokens - self.near - SINKS
        return torch.arange(count) * self.groups // count

    @cached_property
    def sizes(self) -> Tensor:
        """`[groups]` tokens of each group."""
        return self.owner.bincount(minlength=self.groups)

    @cached_property
    def members(self) -> tuple[Tensor, Tensor]:
        """`[groups, size]` positions, and whether they belong to the group: the smaller ones are padded."""
        offset = torch.arange(int(self.sizes.max()))
        start = self.sizes.cumsum(0) - self.sizes
        inside = offset < self.sizes[:, None]
        return SINKS + (start[:, None] + offset).where(inside, start[:, None]), inside

    def sums(self, states: Tensor) -> Tensor:
        """Add `[G, F, D]` over each group, to `[G, groups, D]`."""
        empty = states.new_zeros(states.shape[0], self.groups, states.shape[2])
        return empty.index_add(1, self.owner, states)


def everything(layer: Layer) -> Memory:
    """Return the prompt as it is."""
    return Memory(layer.keys, layer.values)


def window(layer: Layer, budget: int) -> Memory:
    """Return sinks and the newest tokens, `budget` together."""
    n = layer.keys.shape[1]
    if n <= budget:
        return everything(layer)
    return _taken(layer, torch.cat([torch.arange(SINKS), torch.arange(n - budget + SINKS, n)]))


def mean(layer: Layer, split: Split) -> Memory:
    """Merge each group to its mean key, unrotated and turned to its mean position, mean value and log(size)."""
    far, sizes = split.far, split.sizes[:, None]
    place = torch.arange(far.start, far.stop).view(1, -1, 1).float()
    position = (split.sums(place) / sizes)[0, :, 0]
    keys = layer.rotary.rotate(split.sums(layer.plain_keys[:, far]) / sizes, position)
    values = split.sums(layer.values[:, far]) / sizes
    return _between(layer, far, keys, values, split.sizes.float().log().expand(len(keys), -1))


def real(layer: Layer, split: Split) -> Memory:
    """Keep of each group the entry whose attention to its own group has the highest entropy."""
    places, inside = split.members
    grouped = layer.plain_keys[:, places]
    scores = (grouped @ grouped.transpose(-1, -2) * layer.scale).masked_fill(~inside[:, None], float("-inf"))
    entropy = torch.special.entr(scores.softmax(-1)).sum(-1).masked_fill(~inside, -1)
    return _kept(layer, split.far, places[torch.arange(split.groups), entropy.argmax(-1)])


def attended(layer: Layer, split: Split) -> Memory:
    """Keep as many entries as there are groups: those that the sampled queries attend to most."""
    mass = layer.sampled_probabilities[:, :, split.far].sum(1)
    return _kept(layer, split.far, mass.topk(split.groups).indices.sort().values + SINKS)


def fitted(layer: Layer, split: Split, base: Callable[[Layer, Split], Memory]) -> Memory:
    """Take a rule's far keys; fit their masses, then their values, to the attention of the sampled queries.

    Masses are non-negative least squares (multiplicative updates), so that the far keys' sum of exponentials is met.
    Values are least squares of the whole output, drawn by a ridge towards the rule's own.

    Source: Attention Matching, arXiv 2602.16284.
    """
    memory, exact = base(layer, split), layer.sampled_probabilities
    far = slice(SINKS, SINKS + split.groups)
    keys, values = memory.keys[:, far], memory.values[:, far]
    start = torch.zeros(keys.shape[:2]) if memory.bias is None else memory.bias[:, far]
    # In units of each query's whole mass.
    total = (layer.queries @ layer.keys.transpose(1, 2) * layer.scale).logsumexp(-1, keepdim=True)
    parts = (layer.queries @ keys.transpose(1, 2) * layer.scale - total).exp()
    wanted = exact[:, :, split.far].sum(-1, keepdim=True)
    weight = start.exp().unsqueeze(-1)
    aim, least = parts.transpose(1, 2) @ wanted, torch.finfo(torch.float32).tiny
    for _ in range(MASS_STEPS):
        weight = weight * aim / (parts.transpose(1, 2) @ (parts @ weight)).clamp(min=least)
    parts = parts * weight.transpose(1, 2)
    mass = 1 - wanted + parts.sum(-1, keepdim=True)
    raw = exact.clone()
    raw[:, :, split.far] = 0
    missed = exact @ layer.values - (raw @ layer.values + parts @ values) / mass
    parts = parts / mass
    gram = parts @ parts.transpose(1, 2)
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(gram.shape[-1])
    values = values + parts.transpose(1, 2) @ torch.linalg.solve(gram + ridge, missed)
    bias = weight.squeeze(-1).clamp(min=least).log()
    return _between(layer, split.far, keys, values, bias)


def learned(layer: Layer, split: Split) -> Memory:
    """Move the entries of `attended`, fitted, by Adam to where the sampled queries' output is met best.

    Keys, values and masses move together, in each layer for itself. Least squares cannot move keys.
    """
    memory, far = fitted(layer, split, attended), slice(SINKS, SINKS + split.groups)
    exact = layer.sampled_probabilities @ layer.values
    with torch.inference_mode(False), torch.enable_grad():
        # What inference has made takes part in no gradient.
        assert memory.bias is not None
        queries, exact, raw_keys, raw_values, raw_bias = (
            one.clone() for one in (layer.queries, exact, memory.keys, memory.values, memory.bias)
        )
        start = [one[:, far] for one in (raw_keys, raw_values, raw_bias)]
        scales = [one.std() for one in start]
        moves = [torch.zeros_like(one, requires_grad=True) for one in start]
        optimiser = torch.optim.Adam(moves, LEARNING_RATE)
        for _ in range(LEARNING_STEPS):
            keys, values, bias = (
                torch.cat([raw[:, :SINKS], first + scale * move, raw[:, far.stop :]], 1)
                for raw, first, scale, move in zip((raw_keys, raw_values, raw_bias), start, scales, moves, strict=True)
            )
            scores = queries @ keys.transpose(1, 2) * layer.scale + bias.unsqueeze(1)
            loss = (scores.softmax(-1) @ values - exact).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        moved = [first + scale * move.detach() for first, scale, move in zip(start, scales, moves, strict=True)]
    return _between(layer, split.far, *moved)


def pages(layer: Layer, split: Split, picked: int, indexed: bool) -> Memory:
    """Return the prompt, of which each row sees sinks, a window and the pages that its own query picks.

    Args:
        layer: the prompt.
        split: its groups are the pages.
        picked: how many pages a row sees.
        indexed: pick by the pages' merged keys; otherwise by the exact attention to all keys.
    """
    far = split.far
    index = mean(layer, split).keys[:, SINKS : SINKS + split.groups] if indexed else layer.keys

    def visible(queries: Tensor) -> Tensor:
        scores = (queries @ index[:, None].transpose(-1, -2) * layer.scale).softmax(-1).sum(1)
        if not indexed:
            scores = split.sums(scores[..., far].transpose(1, 2)).transpose(1, 2)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(picked).indices, True)
        seen = torch.ones(*scores.shape[:2], split.num_tokens, dtype=torch.bool)
        seen[..., far] = chosen[..., split.owner]
        return seen.unsqueeze(1)

    return Memory(layer.keys, layer.values, visible=visible)


def paging(num_tokens: int, budget: int, indexed: bool) -> tuple[Split, int]:
    """Return the pages for a budget of entries that a row reads, half of them window, and how many it picks.

    An index is read, too: a merged key counts as half an entry. Its pages have the size that leaves most entries to
    be picked; the number is 0 where the index alone takes the budget. Picking by exact attention reads all keys, and
    is counted as if it read none.
    """
    near, found = budget // 2, []
    for size in range(PAGE, 8 * PAGE + 1, PAGE) if indexed else (PAGE,):
        count = -(-(num_tokens - near - SINKS) // size)
        left = budget - near - SINKS - (count // 2 if indexed else 0)
        picked = min(count, max(0, left // size))
        found.append((picked * size, Split(num_tokens, near, count), picked))
    _, split, picked = max(found, key=lambda one: one[0])
    return split, picked


Rule = Callable[[Layer], Memory]
MERGES: dict[str, Callable[..., Memory]] = {
    "mean": mean,
    "real": real,
    "attended": attended,
    "mean, fitted": partial(fitted, base=mean),
    "attended, fitted": partial(fitted, base=attended),
    "learned": learned,
}
PAGED = {"pages": False, "indexed pages": True}
RULES = ("window", *MERGES, *PAGED)


def rule(name: str, num_tokens: int, budget: int) -> Rule | None:
    """Return one of `RULES` at a budget of entries per layer and key/value head, the same bytes for all.

    Returns:
        None where the budget does not suffice for a single page.
    """
    if name == "window" or num_tokens <= budget:
        return partial(window, budget=budget)
    if name not in PAGED:
        return partial(MERGES[name], split=Split.for_budget(num_tokens, budget))
    split, picked = paging(num_tokens, budget, PAGED[name])
    return partial(pages, split=split, picked=picked, indexed=PAGED[name]) if picked else None


def attend(queries: Tensor, memory: Memory, keys: Tensor, values: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
    """Attend from T rows to a memory, to the tokens between it and the row, and to the row itself.

    Args:
        queries: `[G, R, T, D]`.
        memory: of the prompt.
        keys, values: `[G, T, D]` of the rows' tokens as the whole model made them; row t sees those before t.
        own: keys and values `[G, T, D]` that the rows made.

    Returns:
        `[G, R, T, D]`.
    """
    scale, t, m = queries.shape[-1] ** -0.5, queries.shape[2], memory.keys.shape[1]
    far = queries @ memory.keys[:, None].transpose(-1, -2) * scale
    if memory.bias is not None:
        far = far + memory.bias[:, None, None]
    if memory.visible is not None:
        far = far.masked_fill(~memory.visible(queries), float("-inf"))
    before = torch.ones(t, t, dtype=torch.bool).tril(-1)
    near = (queries @ keys[:, None].transpose(-1, -2) * scale).masked_fill(~before, float("-inf"))
    self_score = (queries * own[0][:, None]).sum(-1, keepdim=True) * scale
    weights = torch.cat([far, near, self_score], -1).softmax(-1)
    seen = weights[..., :m] @ memory.values[:, None] + weights[..., m:-1] @ values[:, None]
    return seen + weights[..., -1:] * own[1][:, None]


def _taken(layer: Layer, places: Tensor) -> Memory:
    return Memory(layer.keys[:, places], layer.values[:, places])


def _kept(layer: Layer, far: slice, places: Tensor) -> Memory:
    """Keep the entries of a far stretch at `places`, `[G, m]`, and all outside it."""
    index = places.unsqueeze(-1).expand(-1, -1, layer.keys.shape[-1])
    keys, values = layer.keys.gather(1, index), layer.values.gather(1, index)
    return Memory(_joined(layer.keys, far, keys), _joined(layer.values, far, values))


def _between(layer: Layer, far: slice, keys: Tensor, values: Tensor, bias: Tensor) -> Memory:
    raw = torch.zeros(len(keys), layer.keys.shape[1], 1)
    merged = _joined(raw, far, bias.unsqueeze(-1)).squeeze(-1)
    return Memory(_joined(layer.keys, far, keys), _joined(layer.values, far, values), merged)


def _joined(states: Tensor, far: slice, entries: Tensor) -> Tensor:
    return torch.cat([states[:, : far.start], entries, states[:, far.stop :]], 1)


def walk(agree: Sequence[bool], num_drafts: int) -> list[tuple[int, int]]:
    """Return where each step of a walk along an answer begins, and how many tokens it writes.

    A step accepts drafts up to the first wrong one, and writes one more. Steps that the answer's end would cut short
    are left out.
    """
    accepted = [0] * (len(agree) + 1)
    for place in reversed(range(len(agree))):
        accepted[place] = accepted[place + 1] + 1 if agree[place] else 0
    taken = engine_steps([min(number, num_drafts) for number in accepted[: max(0, len(agree) - num_drafts)]])
    written = [number + 1 for number in taken]
    return list(zip(accumulate(written, initial=0), written, strict=False))
