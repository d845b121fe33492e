"""Cases of `draft_tokens` and `append_states_`: a prior with random weights; shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.config import MergeConfig
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.ops.append_kv import append_kv_reference
from qm_spec.ops.append_states import StateWeights, append_states_
from qm_spec.ops.draft_layer import NUM_AUX_STATES
from qm_spec.ops.draft_tokens import DenseLayer, DraftWeights, draft_steps, draft_tokens
from qm_spec.ops.entries import gather_entries
from qm_spec.ops.merge_groups import merge_groups_reference
from qm_spec.ops.page import slot_elements


@dataclass(frozen=True)
class PriorSizes:
    """Of a prior and its target's vocabulary; as defaults those of the shipped pair.

    With a draft vocabulary the head has rows for so many of the tokens.
    """

    hidden: int = 192
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 768
    vocabulary: int = 4096
    draft_vocabulary: int | None = None

    @property
    def head_rows(self) -> int:
        """Tokens that may be drafted."""
        return self.draft_vocabulary or self.vocabulary

    @property
    def num_weights(self) -> int:
        """Weights that every draft step multiplies with; the first one needs no keys and values."""
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = 2 * self.hidden + 3 * query_size + 3 * self.intermediate + 2 * kv_size + self.head_rows
        return self.hidden * rows

    @property
    def reading_weights(self) -> int:
        """Weights that every step multiplies the target's states with: fusion, keys and values."""
        return self.hidden * (NUM_AUX_STATES * self.hidden + 3 * self.num_kv_heads * self.head_dim)


@dataclass
class DraftCase:
    """The arguments of `draft_tokens` but for K and what to sample with."""

    cache: Tensor
    block_table: Tensor
    num_tokens: Tensor
    state: Tensor
    next_ids: Tensor
    weights: DraftWeights
    eps: float = 1e-6
    config: MergeConfig = field(default_factory=MergeConfig)

    def draft(self, num_drafts: int, temperature: Tensor | None = None, uniform: Tensor | None = None) -> Any:
        """Run the operator, by whichever path the dispatcher takes."""
        return draft_tokens(
            num_drafts=num_drafts,
            temperature=temperature,
            uniform=uniform,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
        )

    def arguments(
        self, num_drafts: int, temperature: Tensor | None = None, uniform: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Return the operator's arguments as it is registered."""
        inputs = (self.cache, self.block_table, self.num_tokens, self.state, self.next_ids, list(self.weights))
        return *inputs, num_drafts, self.eps, self.config.pack(), temperature, uniform

    def replay(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits `[B, K, Vd]` of draft steps fed with `ids` `[B, K]`, by the reference in `dtype`."""
        floats = (weight.to(dtype) for weight in self.weights[:-1])
        weights = DraftWeights._make([*floats, self.weights.token_ids])
        layer = DenseLayer(weights, self.eps)
        entries = gather_entries(self.cache, self.block_table, self.num_tokens, layer.head_dim, self.config)
        logits: list[Tensor] = []

        def take(step_logits: Tensor) -> Tensor:
            logits.append(step_logits)
            return ids[:, len(logits) - 1]

        draft_steps(
            layer,
            lambda token_ids: F.embedding(token_ids, weights.embedding),
            lambda hidden: F.linear(hidden, weights.head),
            take,
            entries,
            self.num_tokens,
            self.state.to(dtype),
            self.next_ids,
            ids.shape[1],
        )
        return torch.stack(logits, 1)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of the head of token ids that may be drafted."""
        return torch.searchsorted(self.weights.token_ids, ids) if len(self.weights.token_ids) else ids

    def request(self, number: int) -> DraftCase:
        """Return the case of one request alone."""
        one = slice(number, number + 1)
        return DraftCase(
            self.cache,
            self.block_table[one],
            self.num_tokens[one],
            self.state[one],
            self.next_ids[one],
            self.weights,
            self.eps,
            self.config,
        )


@dataclass
class StatesCase:
    """The arguments of `append_states_`."""

    cache: Tensor
    aux_states: Tensor
    next_ids: Tensor
    slots: Tensor
    weights: StateWeights
    eps: float = 1e-6
    norm_aux_states: bool = True

    def append(self) -> Tensor:
        """Run the operator, by whichever path the dispatcher takes."""
        return append_states_(**{name: getattr(self, name) for name in self.__dataclass_fields__})

    def arguments(self) -> tuple[Any, ...]:
        """Return the operator's arguments as it is registered."""
        inputs = self.cache, self.aux_states, self.next_ids, self.slots, list(self.weights)
        return *inputs, self.eps, self.norm_aux_states


def make_states_case(
    num_tokens: int, sizes: PriorSizes | None = None, dtype: torch.dtype = torch.float32, page_size: int = 16
) -> StatesCase:
    """Make a step of so many tokens in an empty cache, from torch's global generator."""
    sizes = sizes or PriorSizes()
    drafting, hidden = random_weights(sizes, dtype), sizes.hidden
    fc = (torch.randn(hidden, NUM_AUX_STATES * hidden) * (NUM_AUX_STATES * hidden) ** -0.5).to(dtype)
    own = (getattr(drafting, name) for name in StateWeights._fields[2:])
    elements = slot_elements(sizes.head_dim, dtype)
    # The states of a target grow from layer to layer.
    scale = torch.tensor([0.1, 3.0, 40.0]).repeat_interleave(hidden)
    return StatesCase(
        cache=torch.zeros(2 + num_tokens // page_size, sizes.num_kv_heads, page_size, elements, dtype=dtype),
        aux_states=(torch.randn(num_tokens, NUM_AUX_STATES * hidden) * scale).to(dtype),
        next_ids=torch.randint(0, sizes.vocabulary, (num_tokens,)),
        slots=page_size + torch.arange(num_tokens),
        weights=StateWeights(drafting.embedding, fc, *own),
    )


def random_weights(sizes: PriorSizes, dtype: torch.dtype) -> DraftWeights:
    """Make weights that keep the size of what they multiply, from torch's global generator."""
    hidden, middle = sizes.hidden, sizes.intermediate
    query_size, kv_size = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns) * scale * columns**-0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(hidden)).to(dtype)

    heads = torch.arange(1, sizes.num_heads + 1)
    return DraftWeights(
        embedding=torch.randn(sizes.vocabulary, hidden).to(dtype),
        # Logits of a model that is sure of some tokens.
        head=matrix(sizes.head_rows, hidden, 3.0),
        embed_norm=norm(),
        state_norm=norm(),
        in_proj=matrix(hidden, 2 * hidden),
        q_proj=matrix(query_size, 2 * hidden),
        k_proj=matrix(kv_size, hidden),
        v_proj=matrix(kv_size, hidden),
        next_proj=matrix(kv_size, hidden),
        o_proj=matrix(hidden, query_size),
        mlp_norm=norm(),
        gate_proj=matrix(middle, hidden),
        up_proj=matrix(middle, hidden),
        down_proj=matrix(hidden, middle),
        norm=norm(),
        slopes=(2.0 ** (-8.0 * heads / sizes.num_heads)).to(dtype),
        far_bias=torch.randn(sizes.num_heads).to(dtype),
        token_ids=torch.randperm(sizes.vocabulary)[: sizes.draft_vocabulary or 0].sort().values,
    )


def random_prior(sizes: PriorSizes, merge: MergeConfig, *, next_token_values: bool = True) -> QuickMergePrior:
    """Return a prior of these sizes, frozen, with random weights from torch's global generator."""
    config = QuickMergeConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocabulary,
        next_token_values=next_token_values,
        quickmerge=merge.to_dict(),
    )
    prior = QuickMergePrior(config).eval().requires_grad_(False)
    for parameter in prior.layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior


def make_case(
    lengths: Sequence[int],
    sizes: PriorSizes | None = None,
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
    config: MergeConfig | None = None,
    stale: Callable[[Tensor], Tensor] = lambda cache: cache.fill_(float("nan")),
) -> DraftCase:
    """Fill and merge a cache for requests of these many tokens, from torch's global generator.

    Args:
        lengths: tokens of each request; 0 for padding.
        sizes: of the prior.
        dtype: of cache, weights and state.
        page_size: P.
        config: of the merged cache.
        stale: fills the cache with what its previous owners left.
    """
    sizes, config = sizes or PriorSizes(), config or MergeConfig()
    batch, groups, head_dim = len(lengths), sizes.num_kv_heads, sizes.head_dim
    # A spare column, whose page nobody wrote.
    columns = max(-(-length // page_size) for length in lengths) + 1
    num_pages = batch * columns + 1
    cache = stale(torch.empty(num_pages, groups, page_size, slot_elements(head_dim, dtype), dtype=dtype))
    table = (torch.randperm(num_pages - 1) + 1).int().view(batch, columns)
    for pages, length in zip(table, lengths, strict=True):
        position = torch.arange(length)
        slots = pages[position // page_size].long() * page_size + position % page_size
        rows = torch.randn(2, length, groups, head_dim).to(dtype)
        append_kv_reference(cache, rows[0], rows[1], slots)
    num_tokens = torch.tensor(lengths, dtype=torch.int32)
    merge_groups_reference(cache, table, num_tokens, head_dim, config.pack())
    state = torch.randn(batch, sizes.hidden).to(dtype)
    next_ids = torch.randint(0, sizes.vocabulary, (batch,))
    return DraftCase(cache, table, num_tokens, state, next_ids, random_weights(sizes, dtype), config=config)
