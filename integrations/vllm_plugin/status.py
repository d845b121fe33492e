"""One line in vLLM's log at the engine's start: what drafts, how, and what is lost."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from qm_spec.bench.environment import multiplies_16_bits
from qm_spec.discovery.files import shown
from qm_spec.integrations.vllm_plugin.cuda_graphs import graph_sizes
from qm_spec.integrations.vllm_plugin.proposer import obstacle
from qm_spec.integrations.vllm_plugin.sharing import VARIABLE as SHARING
from qm_spec.integrations.vllm_plugin.sharing import response_bytes
from qm_spec.ops import backend

logger = logging.getLogger("vllm.plugins.qm_spec")


@dataclass(frozen=True)
class Status:
    """What an engine's log says about its drafter.

    Attributes:
        facts: by name, in the order of the line.
        losses: what is not as good as it could be, each with the way out.
    """

    facts: dict[str, str]
    losses: tuple[str, ...]

    def tell(self) -> None:
        """Write the line: as a warning if anything is lost."""
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        logger.log(logging.WARNING if self.losses else logging.INFO, "qm_spec: %s", "; ".join((facts, *self.losses)))


def tell_status(model: Any, vllm_config: Any) -> None:
    """Write the line of an engine whose weights are loaded and whose cache is there.

    Args:
        model: `QuickMergeForCausalLM`.
        vllm_config: of the engine.
    """
    try:
        status_of(model, vllm_config).tell()
    except Exception:
        logger.warning("qm_spec: drafting is set up, but what is drafted with could not be told", exc_info=True)


def status_of(model: Any, vllm_config: Any) -> Status:
    """Return what there is to say of an engine; see `tell_status`."""
    session, config, device = model.session, model.config, vllm_config.device_config.device_type
    v2, drafter = vllm_config.use_v2_model_runner, vllm_config.speculative_config.draft_model_config
    losses = []

    kernels = backend.backend(device)
    if kernels != "compiled":
        graphless = ", without CUDA graphs" if device == "cuda" else ""
        way_out = backend.how_to_build(device)
        losses.append(f"no compiled kernels for {device}, so slower PyTorch references draft{graphless}: {way_out}")

    dtype = vllm_config.model_config.dtype
    if device == "cpu" and dtype != torch.float32 and not multiplies_16_bits():
        losses.append(
            f"this processor has neither AVX512-BF16 nor AMX, and vLLM multiplies {str(dtype).removeprefix('torch.')} "
            "slowly here: "
            "prompts, and steps with drafts, take several times as long as in float32 (--dtype float32)"
        )

    if v2:
        reason = None if session.captures is not None else "vLLM did not take our speculator"
    else:
        reason = obstacle(model, vllm_config, device)
    if reason is not None:
        losses.append(
            f"vLLM's own loop drafts, slower and without lookup, because {reason}: ours drafts on one rank, on a GPU "
            "with compiled kernels, and with the V2 runner"
        )

    if v2:
        graphs = "full" if session.captures else "none"
    elif device == "cuda" and reason is None:
        sizes = graph_sizes(vllm_config)
        graphs = f"up to {sizes[-1]} requests" if sizes else "none"
    else:
        graphs = "none"

    lookup = f"from {session.lookup_length} tokens" if session.lookup_length else "off"
    if session.lookup_length and reason is not None:
        lookup = "not here"
    shared = response_bytes() >> 20
    if session.responses is not None and not v2 and reason is None:
        lookup += f" and in {shared} MiB of shared answers"
    elif shared:
        losses.append(f"{SHARING} is set, but no answers are shared: that takes the V1 runner, our loop and lookup")
    pays = vllm_config.speculative_config.enable_adaptive_verification if v2 else session.adapts and device == "cpu"
    groups = model.model.attn.count_groups
    without, with_ours = groups() if groups is not None else ("unknown", "unknown")
    depth = f"{session.num_drafts}"
    if session.most_drafts > session.num_drafts:
        depth += f" (by lookup up to {session.most_drafts})"
    facts = {
        "target": shown(vllm_config.model_config.model),
        "drafter": shown(drafter.model),
        "runner": "V2" if v2 else "V1",
        "loop": "ours" if reason is None else "vLLM's",
        "kernels": f"{kernels} ({device})",
        "graphs": graphs,
        "lookup": lookup,
        "K": depth,
        "drafts": "where they pay" if pays else "in every step",
        "KV groups": f"{without}, with the drafter {with_ours}",
        "draft vocabulary": f"{config.draft_vocab_size} of {config.vocab_size}",
        # Beside any drafter, request by request.
        "refused by vLLM": "min_p and logit_bias",
    }
    return Status(facts, tuple(losses))
