"""The QuickMerge prior as the drafter of a transformers model, over a merged cache of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qm_spec.config import MergeConfig
from qm_spec.decoding.seeding import seeded
from qm_spec.discovery import check_drafter, find_drafter
from qm_spec.drafter.head import draft_head
from qm_spec.drafter.loops.gathered import DraftLoop
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.ops.page import slot_elements

# Page 0 is the null page of the operators.
_NULL_PAGES = 1


class PriorDrafter:
    """Drafts by the prior, with the target's embedding and vocabulary head.

    Args:
        prior: of this target; moved to its device and dtype.
        target: a causal LM of transformers.

    Raises:
        ValueError: the prior's sizes are not the target's.
    """

    def __init__(self, prior: QuickMergePrior, target: PreTrainedModel) -> None:
        _check_sizes(prior.config, target)
        embedding = target.get_input_embeddings()
        self.module = prior.to(embedding.weight.device, embedding.weight.dtype)
        self.target = target
        self.head = draft_head(self.module, target)

    @property
    def max_draft_len(self) -> int:
        """The deepest draft for which only verified tokens are merged."""
        return self.module.config.merge.max_speculative_tokens

    def start(self, batch: int, capacity: int, hidden_states: Tensor | None) -> PriorRun:
        """Begin a call with at most `capacity` tokens per row; encoder states have no place here."""
        return PriorRun(self, batch, capacity)


class PriorRun:
    """The merged cache of one call: a fixed share of pages for each row."""

    def __init__(self, drafter: PriorDrafter, batch: int, capacity: int) -> None:
        layer, merge = drafter.module.layer, drafter.module.config.merge
        target = drafter.target
        self.loop = DraftLoop(layer, target.get_input_embeddings(), drafter.head.vocabulary_logits, merge)
        self.page_size = merge.group_size
        columns = -(-capacity // self.page_size)
        weight = layer.slopes
        shape = (_NULL_PAGES + batch * columns, layer.num_kv_heads, self.page_size)
        self.cache = weight.new_zeros(*shape, slot_elements(layer.head_dim, weight.dtype))
        pages = torch.arange(batch * columns, dtype=torch.int32, device=weight.device)
        self.block_table = pages.view(batch, columns) + _NULL_PAGES
        self.num_tokens = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        self.state = weight.new_zeros(batch, drafter.module.config.hidden_size)

    def remember(self, token_ids: Tensor, states: Tensor, counts: Tensor) -> None:
        """Take over the target's states of newly verified tokens.

        The newest one waits for `draft`, which knows the token that follows it.

        Args:
            token_ids: `[B, n]`.
            states: `[B, n, 3 D]`.
            counts: `[B]` int64, at least 1: the first so many of each row are verified.
        """
        fused = self.loop.layer.fuse(states)
        column = torch.arange(states.shape[1], device=states.device)
        followed = column < counts.unsqueeze(1) - 1
        slots = torch.where(followed, self._slots(self.num_tokens.unsqueeze(1) + column * followed), -1)
        next_ids = token_ids.roll(-1, 1)
        self.loop.remember(self.cache, fused.flatten(0, 1), next_ids.flatten(), slots.flatten())
        self.state = fused[torch.arange(len(counts), device=counts.device), counts - 1]
        self.num_tokens = self.num_tokens + counts.int()

    def draft(self, next_ids: Tensor, num_drafts: int, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `[B, K]` drafted tokens after `next_ids` `[B]`, the token that follows the verified ones."""
        self.loop.remember(self.cache, self.state, next_ids, self._slots(self.num_tokens.unsqueeze(1) - 1).squeeze(1))
        return self.loop.draft(self.cache, self.block_table, self.num_tokens, self.state, next_ids, num_drafts, sample)

    def _slots(self, position: Tensor) -> Tensor:
        """Return the slots `[B, n]` of positions `[B, n]`."""
        page = self.block_table.long().gather(1, position.long() // self.page_size)
        return page * self.page_size + position % self.page_size

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        self.block_table, self.num_tokens = self.block_table[rows], self.num_tokens[rows]
        self.state = self.state[rows]


def load_prior(
    target: PreTrainedModel,
    drafter: str | PathLike[str] | QuickMergePrior | None,
    quickmerge_dim: int | None,
    seed: int,
) -> QuickMergePrior:
    """Return the prior that a user means: the one given, the target's own, or an untrained one with a warning.

    Args:
        target: a causal LM of transformers; its own drafter is looked for by the folder or hub id it came from.
        drafter: a drafter folder, a prior, or None to look for one.
        quickmerge_dim: of an untrained prior.
        seed: of an untrained prior.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: not a drafter, or another target's.
    """
    if isinstance(drafter, QuickMergePrior):
        return drafter
    origin, revision = target.name_or_path, getattr(target.config, "_commit_hash", None)
    if drafter is not None:
        folder = Path(drafter).expanduser()
        if origin:
            check_drafter(folder, origin, revision=revision)
        return QuickMergePrior.from_pretrained(folder)
    try:
        if not origin:
            raise FileNotFoundError("the target was not loaded from a folder or hub id, so it has no drafter")
        folder = find_drafter(origin, revision)
    except FileNotFoundError as error:
        warnings.warn(
            f"create_speculative_decoder: drafting with an untrained prior, which is right but slow: {error}\n"
            "Train one with `qm-spec train --target TARGET --data PATH --out DIR` and pass drafter=DIR.",
            stacklevel=3,
        )
        with seeded(seed):
            return QuickMergePrior(untrained_config(target, quickmerge_dim))
    check_drafter(folder, origin, revision=revision)
    return QuickMergePrior.from_pretrained(folder)


def untrained_config(target: PreTrainedModel, quickmerge_dim: int | None = None) -> QuickMergeConfig:
    """Return the sizes of a prior for a target that has none.

    Args:
        target: its widths and head layout are taken over.
        quickmerge_dim: width of a merged token, over all key/value heads; the target's when None.

    Raises:
        ValueError: the width does not split into the target's key/value heads.
    """
    sizes = target.config.get_text_config()
    layers, heads = sizes.num_hidden_layers, sizes.num_attention_heads
    groups = getattr(sizes, "num_key_value_heads", None) or heads
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    if quickmerge_dim is not None:
        if quickmerge_dim < 1 or quickmerge_dim % groups:
            raise ValueError(
                f"create_speculative_decoder: quickmerge_dim must be a multiple of the target's {groups} key/value "
                f"heads, got {quickmerge_dim}"
            )
        head_dim = quickmerge_dim // groups
    return QuickMergeConfig(
        eagle_aux_hidden_state_layer_ids=[max(1, layers // 3), max(1, 2 * layers // 3), max(1, layers - 1)],
        quickmerge=MergeConfig().to_dict(),
        vocab_size=target.get_output_embeddings().weight.shape[0],
        hidden_size=sizes.hidden_size,
        intermediate_size=getattr(sizes, "intermediate_size", None) or 4 * sizes.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
    )


def _check_sizes(config: QuickMergeConfig, target: PreTrainedModel) -> None:
    sizes = target.config.get_text_config()
    expected = {"hidden_size": sizes.hidden_size, "vocab_size": target.get_output_embeddings().weight.shape[0]}
    found = {name: getattr(config, name) for name in expected}
    layers = config.eagle_aux_hidden_state_layer_ids
    if found != expected or len(layers) != 3 or not all(0 <= layer <= sizes.num_hidden_layers for layer in layers):
        raise ValueError(
            f"create_speculative_decoder: the drafter must be one of this target, with {expected} and three layers of "
            f"0..{sizes.num_hidden_layers}, got {found} and layers {layers}; "
            "train one for it: qm-spec train --target TARGET --data PATH --out DIR"
        )
