"""The V1 runner's way to the drafter: a step and its requests come from vLLM's proposer, and drafts go back to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size

from qm_spec.integrations.vllm_plugin.session import Drafts, DraftSession, plain_weights
from qm_spec.ops import backend


def session_of(proposer: Any) -> DraftSession | None:
    """Return the session of a proposer with our model, None of another."""
    session = getattr(proposer.model, "session", None)
    return session if isinstance(session, DraftSession) else None


def can_draft(proposer: Any) -> bool:
    """Tell whether our loop can draft for this proposer; if not, vLLM's own loop does.

    Multimodal rotary positions do not matter to ours, token ids of another vocabulary do.
    """
    return (
        session_of(proposer) is not None
        and obstacle(proposer.model, proposer.vllm_config, proposer.device.type) is None
        and not proposer.use_heterogeneous_vocab
        and not proposer.supports_mm_inputs
    )


def obstacle(model: Any, vllm_config: Any, device: str) -> str | None:
    """Return why vLLM's own loop must draft, None where ours can.

    Ours runs on one rank, on the CPU, and on a GPU with compiled kernels and a target of plain weights. Ranks of data
    parallelism run vLLM's loop, in which they wait for each other.

    Args:
        model: the drafter, with the target's embedding and head in place.
        vllm_config: of the engine.
        device: its type.
    """
    if get_tensor_model_parallel_world_size() > 1:
        return "there are several ranks of tensor parallelism"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "there are several ranks of data parallelism"
    if device == "cpu":
        return None
    if device != "cuda":
        return f"there is none for {device}"
    if backend.backend("cuda") != "compiled":
        return "there are no compiled kernels"
    if plain_weights(model) is None:
        return "the target's embedding or head is quantised, scaled or carries LoRA"
    return None


def no_drafts(num_requests: int, num_drafts: int, device: torch.device) -> Drafts:
    """Return empty lists on a CPU, and zeros `[B, K]` elsewhere, where vLLM takes no fewer than K."""
    if device.type == "cpu":
        return Drafts([[] for _ in range(num_requests)], None)
    return Drafts(torch.zeros((num_requests, num_drafts), dtype=torch.int64, device=device), None)


@dataclass(frozen=True)
class PendingDrafts:
    """Drafts that are made when they are asked for: by then the tokens of the step are on their way to the user.

    What `draft` reads stays as it is until the next step begins.
    """

    draft: Callable[[], Drafts]
