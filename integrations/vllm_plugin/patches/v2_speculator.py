"""The V2 runner's speculator for our model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qm_spec.integrations.vllm_plugin.compat import Patch
from qm_spec.integrations.vllm_plugin.request import is_our_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def with_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the V2 runner's `init_speculator` that takes ours where the draft model is ours."""

    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: Any, req_states: Any) -> Any:
        drafter = vllm_config.speculative_config.draft_model_config
        if not is_our_model(drafter):
            return original(vllm_config, device, req_states)
        from qm_spec.integrations.vllm_plugin.speculator import QuickMergeSpeculator

        return QuickMergeSpeculator(vllm_config, device, req_states)

    return init_speculator


SPECULATOR = Patch(
    target="vllm.v1.worker.gpu.spec_decode:init_speculator",
    parameters=("vllm_config", "device", "req_states"),
    replacement=with_speculator,
    why="with the V2 runner a prompt costs keys and values only, and all drafts of a step one call",
    how="takes our speculator where the draft model is ours; applied before the runner takes the function's name",
    upstream="none",
    delete_when="vLLM has a registry of speculators",
)
