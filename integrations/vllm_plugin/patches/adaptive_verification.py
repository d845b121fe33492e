"""The costs and chances that the V2 runner's adaptive verification knows, for the speculator to read."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from qm_spec.integrations.vllm_plugin.compat import Patch

# By the identity of the runner's requests, which a manager keeps alive.
_managers: WeakValueDictionary[int, Any] = WeakValueDictionary()


def with_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's `maybe_create_adaptive_verification_manager` that remembers what it makes."""

    @wraps(original)
    def replaced(*, req_states: Any, **settings: Any) -> Any:
        manager = original(req_states=req_states, **settings)
        if manager is not None:
            _managers[id(req_states)] = manager
        return manager

    return replaced


def expected_gain(req_states: Any, input_batch: Any) -> float | None:
    """Return how many tokens per second a step was expected to bring with its drafts, over those of one without.

    vLLM has measured at start what steps cost by their rows, and drafting by its requests. Chances of drafts are its
    own estimates, which learn from what is accepted. Nothing waits for the device, and all ranks get the same number.

    Args:
        req_states: the runner's requests.
        input_batch: the step's, trimmed to the drafts that are worth verifying.

    Returns:
        None without adaptive verification, where prompts are read, and where no drafts were verified or trimmed.
    """
    manager = _managers.get(id(req_states))
    if manager is None or manager.cost_tables is None:
        return None
    if input_batch.has_prefill or input_batch.num_draft_tokens_per_req is None:
        return None
    draft_ms, verify_ms = manager.cost_tables
    num_reqs, num_drafts = input_batch.num_reqs, input_batch.num_draft_tokens
    confidences = manager._stale_confidences[manager._stale_idx].np[input_batch.idx_mapping_np]  # noqa: SLF001
    chances = np.sort(np.cumprod(confidences, axis=1), axis=None)[::-1]
    tokens = 1 + chances[:num_drafts].sum() / num_reqs
    return float(tokens * verify_ms[num_reqs] / (draft_ms[num_reqs] + verify_ms[num_reqs + num_drafts]))


ADAPTIVE_VERIFICATION = Patch(
    target="vllm.v1.worker.gpu.model_runner:maybe_create_adaptive_verification_manager",
    parameters=(
        "enable_adaptive_verification",
        "attn_groups",
        "req_states",
        "query_start_loc",
        "num_bonus_tokens",
        "max_total_logits",
        "vllm_config",
        "target_layer_names",
        "additional_attn_cg_support",
    ),
    replacement=with_manager,
    why="with adaptive verification, batches so large that drafting costs more than it brings draft nothing",
    how="remembers the manager, whose measured costs and chances our speculator reads; the manager stays as it is",
    upstream="none",
    delete_when="vLLM hands a speculator the costs of a step",
)
