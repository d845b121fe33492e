"""Steps without any draft token on a CPU, whatever their requests ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch


def with_no_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `apply_sampling_constraints` that leaves `[0, V]` logits as they are.

    vLLM's own takes the largest top-k of the draft tokens' rows on a CPU, which is an error where there are none. Each
    step that only reads prompts has none.
    """

    @wraps(original)
    def apply_sampling_constraints(logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: Any) -> Tensor:
        if logits.shape[0] == 0:
            return logits
        return original(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_sampling_constraints


CPU_NO_DRAFTS = Patch(
    target="vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
    parameters=("logits", "cu_num_draft_tokens", "sampling_metadata"),
    replacement=with_no_rows,
    why="a request with top_k and without top_p does not end the engine on a CPU",
    how="leaves the logits of a step without draft tokens as they are; applied when our model is built",
    upstream="none",
    delete_when="vLLM's apply_top_k_only takes logits without rows",
)
