"""The end of `min_tokens` behind accepted drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch


def with_drafts_counted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `Sampler.apply_logits_processors` that masks no stop token of the token behind enough drafts.

    vLLM's own counts the tokens before the step alone. A request that comes to its `min_tokens` within a step then has
    another token than the target's where that is a stop token.
    """

    @wraps(original)
    def apply_logits_processors(self: Any, logits: Tensor, sampling_metadata: Any, predict_bonus_token: bool) -> Tensor:
        if predict_bonus_token and logits.device.type == "cpu":
            sampling_metadata = _with_drafts(sampling_metadata)
        return original(self, logits, sampling_metadata, predict_bonus_token)

    return apply_logits_processors


def _with_drafts(sampling_metadata: Any) -> Any:
    """Return the metadata with masks that are true behind all drafts, itself where they are."""
    given = sampling_metadata.logitsprocs.non_argmax_invariant
    behind = [_behind(processor, sampling_metadata.spec_token_ids or ()) for processor in given]
    if all(one is other for one, other in zip(given, behind, strict=True)):
        return sampling_metadata
    processors = copy(sampling_metadata.logitsprocs)
    processors.non_argmax_invariant = behind
    return replace(sampling_metadata, logitsprocs=processors)


def _behind(processor: Any, drafts: Sequence[Sequence[int]]) -> Any:
    """Return a processor of `min_tokens` that leaves out requests whose drafts reach it, any other one as it is."""
    reached = [
        row
        for row, (min_tokens, written, *_) in getattr(processor, "min_toks", {}).items()
        if row < len(drafts) and len(written) + len(drafts[row]) >= min_tokens
    ]
    if not reached:
        return processor
    behind = copy(processor)
    behind.logits_slice = _without(processor.logits_slice, reached)
    behind.restore_logits_slice = _without(processor.restore_logits_slice, reached)
    return behind


def _without(places: tuple[Tensor, Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return pairs of row and token, `[n]` each, without those of some rows."""
    kept = ~torch.isin(places[0], torch.tensor(rows, dtype=places[0].dtype))
    return places[0][kept], places[1][kept]


MIN_TOKENS = Patch(
    target="vllm.v1.sample.sampler:Sampler.apply_logits_processors",
    parameters=("self", "logits", "sampling_metadata", "predict_bonus_token"),
    replacement=with_drafts_counted,
    why="a request with min_tokens has the target's tokens where its drafts reach that number",
    how="masks no stop token of the token behind enough drafts; on a CPU, applied when our model is built",
    upstream="none",
    delete_when="vLLM counts drafts before it masks stop tokens of the token behind them",
)
