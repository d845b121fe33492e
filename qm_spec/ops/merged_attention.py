"""`merged_attention`: a few query rows per request over raw window and merged entries."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.ops.entries import entry_bias, gather_entries
from qm_spec.ops.page import check_page

torch.library.define(
    "qm_spec::merged_attention",
    "(Tensor query, Tensor cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor slopes, "
    "Tensor far_bias, int max_rows, int[] config) -> (Tensor, Tensor, Tensor)",
)


def merged_attention_reference(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    slopes: Tensor,
    far_bias: Tensor,
    max_rows: int,
    packed: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `merged_attention` in plain PyTorch."""
    config = MergeConfig.unpack(packed)
    num_rows, num_heads, head_dim = query.shape
    out = torch.zeros_like(query)
    lse = query.new_full((num_rows, num_heads), float("-inf"), dtype=torch.float32)
    entropy = query.new_zeros((num_rows, num_heads), dtype=torch.float32)
    num_requests = len(seq_lens)
    starts, ends = query_start_loc[:-1].long(), query_start_loc[1:].long()
    # Row r of the result is the request's r-th newest row; a request with fewer rows has padding.
    age = torch.arange(min(max_rows, num_rows), device=query.device)
    row = ends.unsqueeze(1) - 1 - age
    exists = row >= starts.unsqueeze(1)
    if num_requests == 0 or not bool(exists.any()):
        return out, lse, entropy
    # A request without rows is padding: its length and table are not to be trusted.
    lengths = torch.where(ends > starts, seq_lens.long(), 0)
    entries = gather_entries(cache, block_table, lengths, head_dim, config)
    position = lengths.unsqueeze(1) - 1 - age
    bias = entry_bias(entries, position, slopes.float(), far_bias.float())
    heads_per_group = num_heads // cache.shape[1]
    q = query[row.clamp_min(0)].transpose(1, 2).float()
    k = entries.keys.repeat_interleave(heads_per_group, 1).float()
    v = entries.values.repeat_interleave(heads_per_group, 1).float()
    scores = q @ k.mT * head_dim**-0.5 + bias
    row_lse = scores.logsumexp(-1)
    weights = torch.softmax(scores, dim=-1)
    # log 0 = -inf meets weight 0 at masked entries: their term is 0, not NaN.
    row_entropy = row_lse - (weights * scores.masked_fill(weights == 0, 0)).sum(-1)
    batch, kept = exists.nonzero(as_tuple=True)
    target = row[batch, kept]
    out[target] = (weights @ v).to(query.dtype).transpose(1, 2)[batch, kept]
    lse[target] = row_lse.transpose(1, 2)[batch, kept]
    entropy[target] = row_entropy.transpose(1, 2)[batch, kept]
    return out, lse, entropy


torch.library.impl("qm_spec::merged_attention", "default", merged_attention_reference)


@torch.library.register_fake("qm_spec::merged_attention")
def _merged_attention_fake(query: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    per_row = query.new_empty(query.shape[:2], dtype=torch.float32)
    return torch.empty_like(query), per_row, torch.empty_like(per_row)


def merged_attention(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    slopes: Tensor,
    far_bias: Tensor,
    max_rows: int,
    config: MergeConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from the newest rows of each request to its raw and merged entries.

    Scores are `q k / sqrt(d)` plus `-slope * distance` at raw entries (causal) or
    `far_bias + log(min(count, group_size))` at merged ones.

    Args:
        query: `[T, H, d]`, the rows of all requests one after the other.
        cache: `[pages, G, P, C]`.
        block_table: `[B, columns]` int32.
        seq_lens: `[B]` int32, tokens of each request, its rows included.
        query_start_loc: `[B + 1]` int32, where each request's rows begin.
        slopes: `[H]` float32, per token of distance.
        far_bias: `[H]` float32.
        max_rows: rows computed per request, the newest ones; only those are sampled from.
        config: group size, schedule and doublings.

    Returns:
        output `[T, H, d]` in the query's dtype, log-sum-exp `[T, H]` float32 and attention entropy
        `[T, H]` float32 in nats; rows that were not computed hold 0, -inf and 0.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if query.ndim != 3 or query.shape[1] % cache.shape[1]:
        raise ValueError(
            f"merged_attention: query must be [T, H, d] with H a multiple of {cache.shape[1]}, got {list(query.shape)}"
        )
    if slopes.shape != query.shape[1:2] or far_bias.shape != query.shape[1:2]:
        raise ValueError(
            f"merged_attention: slopes and far_bias must be [{query.shape[1]}], "
            f"got {list(slopes.shape)} and {list(far_bias.shape)}"
        )
    if len(query_start_loc) != len(seq_lens) + 1:
        raise ValueError(
            f"merged_attention: query_start_loc must be [{len(seq_lens) + 1}], got {list(query_start_loc.shape)}"
        )
    check_page(cache, query.shape[-1])
    return torch.ops.qm_spec.merged_attention(
        query, cache, block_table, seq_lens, query_start_loc, slopes, far_bias, max_rows, config.pack()
    )
