"""Merging within a group: salient entries stay, the others join the nearest of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qm_spec.config import SALIENCIES, MergeConfig
from qm_spec.ops.attention_entropy import attention_entropy


def saliency_mass(keys: Tensor, config: MergeConfig) -> Tensor:
    """Weigh the tokens of each group by their attention entropy among the group's keys.

    `s` is the entropy scaled to 0..1 within the group (0.5 where all are alike),
    `pi = softmax(s / tau)` and `m = pi s + (1 - pi) eps`. There is no Gumbel noise: the mass is a
    function of the group's content alone, so whoever merges a shared page gets the same result.

    Args:
        keys: `[..., M, d]`.
        config: saliency, temperature and epsilon are used.

    Returns:
        `[..., M]` float32, positive; higher = keep.

    Source: QuickMerge++, arXiv 2508.13204.
    """
    entropy = SALIENCIES[config.saliency] * attention_entropy(keys)
    low, high = entropy.amin(-1, keepdim=True), entropy.amax(-1, keepdim=True)
    spread = high - low
    saliency = torch.where(spread > 1e-6, (entropy - low) / spread.clamp_min(1e-6), 0.5)
    pi = torch.softmax(saliency / config.temperature, dim=-1)
    return pi * saliency + (1 - pi) * config.epsilon


@dataclass(frozen=True)
class Merged:
    """Groups after a merge: R entries each, and where every former entry went.

    Attributes:
        keys: `[..., R, d]`.
        values: `[..., R, d]`.
        mass: `[..., R]` float32.
        count: `[..., R]` float32, tokens per entry.
        cluster: `[..., R0]` int64, 0..R-1.
    """

    keys: Tensor
    values: Tensor
    mass: Tensor
    count: Tensor
    cluster: Tensor


def merge_entries(keys: Tensor, values: Tensor, mass: Tensor, count: Tensor, keep: int) -> Merged:
    """Merge the entries of each group to `keep` entries.

    The `keep` entries of the highest mass stay at their place in order (ties: the earlier one).
    Every other entry joins the one whose key is nearest by cosine similarity. Keys and values of a
    cluster become their mean weighted by mass; masses and counts add up. Differentiable in keys,
    values and mass; the assignment is discrete.

    Args:
        keys: `[..., R0, d]`.
        values: `[..., R0, d]`.
        mass: `[..., R0]` float32, positive; 0 leaves an entry, whose key and value must be finite, out of the means.
        count: `[..., R0]` float32.
        keep: R, 0..R0; 0 drops the group.

    Returns:
        See `Merged`; keys and values in the input's dtype.

    Raises:
        ValueError: `keep` is not in 0..R0.

    Source: QuickMerge++, arXiv 2508.13204: `x_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j`.
    """
    num_entries = keys.shape[-2]
    if not 0 <= keep <= num_entries:
        raise ValueError(f"merge_entries: keep must be in 0..{num_entries}, got {keep}")
    if keep == 0:
        nowhere = torch.full_like(mass, -1, dtype=torch.int64)
        return Merged(keys[..., :0, :], values[..., :0, :], mass[..., :0], count[..., :0], nowhere)
    order = mass.detach().argsort(dim=-1, descending=True, stable=True)
    salient = order[..., :keep].sort(dim=-1).values
    unit = torch.nn.functional.normalize(keys.detach().float(), dim=-1)
    centres = unit.gather(-2, salient.unsqueeze(-1).expand(*salient.shape, unit.shape[-1]))
    cluster = (unit @ centres.mT).argmax(-1)
    cluster.scatter_(-1, salient, torch.arange(keep, device=keys.device).expand_as(salient))
    member = torch.nn.functional.one_hot(cluster, keep).to(mass.dtype)
    merged_mass = (member * mass.unsqueeze(-1)).sum(-2)
    # Of a cluster all of whose entries have no mass nothing is left: zeros without a mass.
    total = merged_mass.where(merged_mass > 0, 1.0)
    weights = (member * mass.unsqueeze(-1) / total.unsqueeze(-2)).mT
    merged_keys = (weights @ keys.float()).to(keys.dtype)
    merged_values = (weights @ values.float()).to(values.dtype)
    merged_count = (member * count.unsqueeze(-1)).sum(-2)
    return Merged(merged_keys, merged_values, merged_mass, merged_count, cluster)
