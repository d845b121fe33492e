"""The small draft model of a bare module: it reads compressed encoder states, then the tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qm_spec.decoding.seeding import seeded
from qm_spec.quickmerge.ar_prior import AutoregressivePrior, PriorCache
from qm_spec.quickmerge.facade import QuickMergePP

_HEADS = 8


class MemoryDraftModel(nn.Module):
    """Predicts the next token from the compressed memory and the tokens so far.

    Encoder states are projected to `quickmerge_dim` and compressed by QuickMerge++ to `k_max` tokens.
    The compressor's own autoregressive prior reads them, then the tokens' embeddings, and a head maps
    its predictions to the vocabulary.

    Train it like any language model, on what the target writes, with `model(input_ids, hidden_states)`
    as logits; save it with `state_dict`.

    Args:
        vocab_size: V.
        dim: D, width of the encoder states.
        quickmerge_dim: width of merged tokens and of the model.
        k_max: merged tokens at most.
        num_layers: of the prior.
        seed: of the initial weights.

    Raises:
        ValueError: a size is below 1.

    Source: QuickMerge++, arXiv 2508.13204 for compression and prior; reading tokens behind it is ours.
    """

    def __init__(
        self, vocab_size: int, dim: int, quickmerge_dim: int = 64, k_max: int = 32, num_layers: int = 2, seed: int = 0
    ) -> None:
        sizes = {"vocab_size": vocab_size, "dim": dim, "quickmerge_dim": quickmerge_dim, "k_max": k_max}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"MemoryDraftModel: {name} must be an integer of at least 1, got {size!r}")
        super().__init__()
        self.dim = dim
        self.vocab_size = vocab_size
        with seeded(seed):
            self.project = nn.Linear(dim, quickmerge_dim)
            self.compressor = QuickMergePP(dim=quickmerge_dim, k_max=k_max, prior_layers=num_layers, prior_heads=_HEADS)
            self.embed = nn.Embedding(vocab_size, quickmerge_dim)
            self.head = nn.Linear(quickmerge_dim, vocab_size)

    @property
    def prior(self) -> AutoregressivePrior:
        """The compressor's own prior."""
        return self.compressor.alignment.prior

    def compress(self, hidden_states: Tensor | None) -> Tensor | None:
        """Return the memory `[B, min(k_max, S), quickmerge_dim]` of encoder states, None of None.

        Args:
            hidden_states: `[B, S, D]`, or `[L, B, S, D]` of several layers.
        """
        if hidden_states is None:
            return None
        memory, _ = self.compressor.compress(self.project(hidden_states.to(self.project.weight.dtype)))
        return memory

    def forward(self, input_ids: Tensor, hidden_states: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]`: row t is of token t + 1.

        Args:
            input_ids: `[B, T]` int64.
            hidden_states: `[B, S, D]` or `[L, B, S, D]`, or None.
        """
        tokens = self.embed(input_ids)
        memory = self.compress(hidden_states)
        if memory is not None:
            tokens = torch.cat([memory, tokens], 1)
        return self.head(self.prior(tokens)[:, -input_ids.shape[1] :])


class MemoryDrafter:
    """Drafts by a `MemoryDraftModel`.

    Args:
        model: moved to the target's device.
        device: of the target.
    """

    def __init__(self, model: MemoryDraftModel, device: torch.device) -> None:
        self.module = model.to(device)

    @property
    def max_draft_len(self) -> int | None:
        """None: any depth will do."""
        return None

    def start(self, batch: int, capacity: int, hidden_states: Tensor | None) -> MemoryRun:
        """Begin a call with at most `capacity` tokens per row."""
        return MemoryRun(self.module, batch, capacity, hidden_states)


class MemoryRun:
    """The sequences of one call's rows and the prior's cache of what all rows have passed.

    Rows accept different numbers of tokens. The prior's cache holds the memory and the tokens before
    the shortest row's end; what longer rows have beyond it is read again, with padding behind it,
    which a causal model never looks at.
    """

    def __init__(self, model: MemoryDraftModel, batch: int, capacity: int, hidden_states: Tensor | None) -> None:
        device = model.embed.weight.device
        self.model = model
        self.tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.num_cached = 0
        self.past: PriorCache | None = None
        memory = model.compress(hidden_states)
        self.memory_length = 0 if memory is None else memory.shape[1]
        if memory is not None:
            self.past = model.prior.prefill(memory)[1]

    def remember(self, token_ids: Tensor, states: Tensor, counts: Tensor) -> None:
        """Take over newly verified tokens.

        Args:
            token_ids: `[B, n]`.
            states: not used; a bare module gives none.
            counts: `[B]` int64, the first so many of each row are verified.
        """
        row, column = (torch.arange(token_ids.shape[1], device=counts.device) < counts.unsqueeze(1)).nonzero(
            as_tuple=True
        )
        self.tokens[row, self.lengths[row] + column] = token_ids[row, column]
        self.lengths = self.lengths + counts

    def draft(self, next_ids: Tensor, num_drafts: int, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `[B, K]` drafted tokens after `next_ids` `[B]`, the token that follows the verified ones."""
        rows = torch.arange(len(next_ids), device=next_ids.device)
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        spare = self.tokens.new_zeros(len(rows), max(0, longest + num_drafts - self.tokens.shape[1]))
        tokens = torch.cat([self.tokens, spare], 1)
        tokens[rows, self.lengths] = next_ids
        drafted = []
        for step in range(num_drafts):
            begin = self.num_cached
            predicted, past = self._run(self.model.embed(tokens[:, begin : longest + 1 + step]))
            if step == 0:
                # All rows have verified their tokens up to the shortest one's next.
                self.num_cached = shortest + 1
                self.past = _cut(past, self.memory_length + self.num_cached)
            newest = predicted[rows, self.lengths + step - begin]
            drafted.append(sample(self.model.head(newest)))
            if step + 1 < num_drafts:
                tokens[rows, self.lengths + 1 + step] = drafted[-1]
        return torch.stack(drafted, 1)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]
        if self.past is not None:
            keys, values = (tuple(one[rows] for one in part) for part in (self.past.keys, self.past.values))
            self.past = PriorCache(keys, values)

    def _run(self, embedded: Tensor) -> tuple[Tensor, PriorCache]:
        if self.past is None:
            return self.model.prior.prefill(embedded)
        return self.model.prior.step(embedded, self.past)


def _cut(past: PriorCache, num_tokens: int) -> PriorCache:
    """Return the cache of the first `num_tokens` tokens."""
    keys, values = (tuple(one[:, :, :num_tokens] for one in part) for part in (past.keys, past.values))
    return PriorCache(keys, values)
