"""Verification that keeps the target's distribution on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch


def with_expansion(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `expand_batch_to_tokens` with a CPU path that writes what it returns.

    vLLM's own leaves the result uninitialised there for every type but int64, and divides the
    logits of sampled requests by it.
    """

    @wraps(original)
    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        values = x.masked_fill(x == replace_from, replace_to)
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1, dtype=torch.int64))
        return values.repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


CPU_EXPANSION = Patch(
    target="vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
    parameters=("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
    replacement=with_expansion,
    why="sampling (temperature above 0) keeps the target's distribution on a CPU",
    how="expands temperature, top-k and top-p in torch on the CPU, where vLLM's kernel drops its result; "
    "applied when our model is built",
    upstream="vllm-project/vllm issue 55005",
    delete_when="the oldest supported vLLM has that issue fixed",
)
