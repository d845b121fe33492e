"""QuickMerge++ at work: speculative decoding of Hugging Face models, and compression of other models' tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qm_spec.pipelines.decoder import create_speculative_decoder
    from qm_spec.pipelines.diffusion import create_diffusion_pipeline
    from qm_spec.pipelines.llm import create_llm_pipeline
    from qm_spec.pipelines.multimodal import create_multimodal_pipeline

__all__ = [
    "create_diffusion_pipeline",
    "create_llm_pipeline",
    "create_multimodal_pipeline",
    "create_speculative_decoder",
]

_HOMES = {
    "create_diffusion_pipeline": "diffusion",
    "create_llm_pipeline": "llm",
    "create_multimodal_pipeline": "multimodal",
    "create_speculative_decoder": "decoder",
}


def __getattr__(name: str) -> Any:
    # The decoder needs transformers, which the others do without.
    if name in _HOMES:
        return getattr(import_module(f"qm_spec.pipelines.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
