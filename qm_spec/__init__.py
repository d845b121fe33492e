"""QuickMerge++ speculative decoding for vLLM."""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qm_spec.compression.diffusion import create_diffusion_pipeline
    from qm_spec.compression.llm import create_llm_pipeline
    from qm_spec.compression.multimodal import create_multimodal_pipeline
    from qm_spec.decoding.decoder import create_speculative_decoder
    from qm_spec.quickmerge import (
        BidirectionalARAlignment,
        DifferentiableTokenMerging,
        EntropyAwareSaliency,
        NormBasedFidelityConstraint,
        QuickMergePP,
        quickmerge_inference,
    )

__version__ = "0.1.0"

__all__ = [
    "BidirectionalARAlignment",
    "DifferentiableTokenMerging",
    "EntropyAwareSaliency",
    "NormBasedFidelityConstraint",
    "QuickMergePP",
    "create_diffusion_pipeline",
    "create_llm_pipeline",
    "create_multimodal_pipeline",
    "create_speculative_decoder",
    "quickmerge_inference",
    "speculative_config",
]


_HOMES = {
    "create_diffusion_pipeline": "qm_spec.compression.diffusion",
    "create_llm_pipeline": "qm_spec.compression.llm",
    "create_multimodal_pipeline": "qm_spec.compression.multimodal",
    "create_speculative_decoder": "qm_spec.decoding.decoder",
}


def __getattr__(name: str) -> Any:
    # vLLM imports the package in every process, most of which need no compressor.
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "qm_spec.quickmerge")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def speculative_config(target: str | PathLike[str], num_speculative_tokens: int | None = None) -> dict[str, Any]:
    """Return the `speculative_config` with which vLLM drafts for a target by its QuickMerge drafter.

    Example: `LLM(model=TARGET, speculative_config=qm_spec.speculative_config(TARGET))`

    Args:
        target: folder of the target, or a hub id that transformers can find.
        num_speculative_tokens: K, drafted tokens per step; None takes the drafter's own, and where a CPU looks up what
            repeats in a text, up to 16 tokens of that.

    Raises:
        FileNotFoundError: the target has no drafter; the message says where it was looked for and
            how to train one.
        TypeError: K is not an integer.
        ValueError: the drafter is another target's or broken, or K is out of range.
    """
    # Nothing but torch is needed to import the package.
    from qm_spec.discovery import check_drafter, find_drafter, vllm_settings

    drafter = find_drafter(str(target))
    check_drafter(drafter, str(target), num_speculative_tokens)
    return vllm_settings(drafter, num_speculative_tokens)
