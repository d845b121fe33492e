"""Merging of keys and values: one assignment, found on the keys, for both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qm_spec.compression.rotary import Rotary
from qm_spec.quickmerge import Grouping, TokenSelection, group_by_cosine, group_by_kmeans, merge_groups
from qm_spec.quickmerge.grouping import GROUPINGS
from qm_spec.quickmerge.inputs import check_choice
from qm_spec.quickmerge.saliency import make_saliency

KEY_SALIENCIES = ("entropy", "inverse_entropy", "norm")


@dataclass(frozen=True)
class KeyValueEntries:
    """Entries of an attention memory; R rows, one for each head of each sequence.

    Attributes:
        keys: `[R, N, d]`, rotated where the model rotates them.
        values: `[R, N, d']`.
        mass: `[R, N]` float32, weight in a merge; 0 where an entry was never weighed.
        size: `[R, N]` float32, tokens in each entry; 0 where a slot is empty.
        position: `[R, N]` integers, of the token at whose place an entry stands.
    """

    keys: Tensor
    values: Tensor
    mass: Tensor
    size: Tensor
    position: Tensor


@dataclass(frozen=True)
class KeyValueMerger:
    """Merge entries to a budget, keys and values alike.

    Every head merges by its own keys, since attention never mixes heads. Saliency and grouping look
    at the keys as they are before rotation, so that tokens are told apart by what they hold, not by
    where they stand. Averaging keys rotated at different positions would blur them: they are turned
    back, averaged, and turned to the place of the merged entry, its salient token's.

    Args:
        saliency: `norm` (default: of the seeds' scorers the one that costs the reference target
            least; it says little where a model normalises its keys, as Qwen3 does), `entropy` or
            `inverse_entropy`.
        grouping: `cosine` or `kmeans`.
        temperature: tau of the selection.
        epsilon: mass of a token that is not selected at all. At 1e-5 (the `quickmergepp` code) the
            salient token rules a merged entry, which is best where an entry weighs like one token
            in attention. Where it weighs like all it holds it must also be their mean: take 0.01.
        rotary: how the keys are rotated; None merges them as they are.

    Raises:
        ValueError: a setting is out of range.

    Source: QuickMerge++, arXiv 2508.13204; heads and rotation are ours.
    """

    saliency: str = "norm"
    grouping: str = "cosine"
    temperature: float = 0.1
    epsilon: float = 1e-5
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        check_choice("KeyValueMerger", "saliency", self.saliency, KEY_SALIENCIES)
        check_choice("KeyValueMerger", "grouping", self.grouping, GROUPINGS)
        TokenSelection(self.temperature, self.epsilon)

    def __call__(self, entries: KeyValueEntries, mergeable: Tensor, budget: Tensor) -> tuple[KeyValueEntries, Tensor]:
        """Merge the mergeable entries of each row; the others stay as they are, before or behind them.

        Args:
            entries: what there is.
            mergeable: `[R, N]` bool, one run in each row; False at empty slots, at the entries in
                front of the run, which stay, and behind it.
            budget: `[R]` int64, entries that the mergeable ones become; at least 1 where there are any.

        Returns:
            the entries, `[R, K]` with K those of the longest row and empty slots in front of the
            shorter ones; and `[R, N]` int64, the slot of each entry, -1 where it was empty.
            Entries that nothing joined are the same bit by bit.
        """
        content = entries.keys.float()
        if self.rotary is not None:
            content = self.rotary.rotate(entries.keys, -entries.position)
        grouping, mass = self.group(content, entries, mergeable, budget)
        # Entries outside the run are alone in their group, where any positive mass will do.
        weight = torch.where(mergeable, mass, 1.0)
        place = grouping.place.clamp_max(mass.shape[1] - 1)
        position = entries.position.gather(1, place).masked_fill(~grouping.live, 0)
        keys, _, _ = merge_groups(content, weight, grouping)
        if self.rotary is not None:
            keys = self.rotary.rotate(keys, position)
        values, _, _ = merge_groups(entries.values, weight, grouping)
        alone = _count(grouping, torch.ones_like(mass)) == 1
        index = place.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        # Turning back and forth rounds; what nothing joined is copied.
        keys = torch.where(alone.unsqueeze(-1), entries.keys.gather(1, index), keys.to(entries.keys.dtype))
        keys = keys.masked_fill(~grouping.live.unsqueeze(-1), 0.0)
        merged = KeyValueEntries(keys, values, _count(grouping, mass), _count(grouping, entries.size), position)
        return merged, grouping.cluster

    def group(
        self, content: Tensor, entries: KeyValueEntries, mergeable: Tensor, budget: Tensor
    ) -> tuple[Grouping, Tensor]:
        """Return the groups of all entries, those that stay alone in theirs, and each entry's mass.

        Args:
            content: `[R, N, d]` float32, keys before rotation.
            entries: what there is.
            mergeable: see `__call__`.
            budget: see `__call__`.
        """
        count = mergeable.sum(-1)
        budget = torch.minimum(budget, count)
        selection = TokenSelection(self.temperature, self.epsilon)(
            self.score(content, mergeable), budget, mergeable, sample=False
        )
        group = group_by_kmeans if self.grouping == "kmeans" else group_by_cosine
        merging = group(content, selection, mergeable)
        # A merged entry keeps the mass that its tokens brought with them.
        mass = torch.where((entries.mass == 0) & mergeable, selection.mass, entries.mass)
        return _among_the_others(merging, entries.size > 0, mergeable, count - budget), mass

    def score(self, content: Tensor, mergeable: Tensor) -> Tensor:
        """Return the saliency `[R, N]` float32 of keys before rotation; higher = keep."""
        return make_saliency(self.saliency, content.shape[-1], num_layers=1, causal=False)(content, mergeable)


def _among_the_others(merging: Grouping, full: Tensor, mergeable: Tensor, merged_away: Tensor) -> Grouping:
    """Set the groups of the mergeable entries between the entries that stay, all moved to the right end.

    Of 7 entries, the first slot empty, the run in brackets, 2 entries kept of the 3 in it:

        before   .  a [b c d] e f
        after       .  a [b d] e f
    """
    num_rows, num_entries = full.shape
    after = full.sum(-1) - merged_away
    num_slots = int(after.max())
    empty = (num_slots - after).unsqueeze(-1)
    in_front = (full & ~mergeable & (mergeable.cumsum(-1) == 0)).sum(-1, keepdim=True)
    # Entries that stay keep their order: those behind the run follow its groups.
    order = full.cumsum(-1) - 1
    behind = order - merged_away.unsqueeze(-1)
    in_front_of_run = order < in_front
    cluster = torch.where(mergeable, merging.cluster + in_front, torch.where(in_front_of_run, order, behind)) + empty
    cluster = cluster.masked_fill(~full, -1)

    # Every entry that stays is the place of its group, and each group's salient token of its own.
    index = torch.arange(num_entries, device=full.device).expand(num_rows, -1)
    stays = full & ~mergeable
    place = torch.full((num_rows, num_slots + 1), num_entries, device=full.device)
    place = place.scatter(1, torch.where(stays, cluster, num_slots), torch.where(stays, index, num_entries))
    slot = torch.arange(merging.place.shape[1], device=full.device) + in_front + empty
    slot = torch.where(merging.live, slot, num_slots)
    place = place.scatter(1, slot, merging.place)[:, :num_slots]
    live = torch.arange(num_slots, device=full.device) >= empty
    return Grouping(cluster, place, live)


def _count(grouping: Grouping, amount: Tensor) -> Tensor:
    """Sum `amount` `[R, N]` over the members of each group, `[R, K]`."""
    num_slots = grouping.live.shape[1]
    label = grouping.cluster.masked_fill(grouping.cluster < 0, num_slots)
    return amount.new_zeros(len(label), num_slots + 1).scatter_add(1, label, amount)[:, :num_slots]
