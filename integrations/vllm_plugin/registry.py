"""vLLM's registry of speculative methods, where it has one: 0.32 and 0.33 have none.

What is known of it is how eagle-harness 0.1.3 registers itself with a vLLM of its own. A registry that takes other
fields is left alone, and `patches/v2_speculator.py` does its work.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from qm_spec.integrations.vllm_plugin import compat

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

logger = logging.getLogger("vllm.plugins.qm_spec")

METHOD = "qm_spec"
SPECULATOR_CLASS = "qm_spec.integrations.vllm_plugin.speculator:QuickMergeSpeculator"


@functools.cache
def is_registered() -> bool:
    """Register our method once; return whether vLLM now knows it, so that its V2 runner makes our speculator."""
    registry = compat.method_registry()
    if registry is None:
        return False
    try:
        method = registry.SpeculativeMethodSpec(
            speculator_cls=SPECULATOR_CLASS,
            configure=_leave,
            uses_target_hidden_states=True,
            uses_aux_hidden_states=True,
            num_lookahead_tokens=_num_lookahead_tokens,
            linear_attn_verify_extension=None,
        )
        registry.register_speculative_method(METHOD, method)
    except (AttributeError, TypeError, ValueError):
        logger.warning(
            "qm_spec: vLLM's registry of speculative methods is not the one that is known, so it is not used",
            exc_info=True,
        )
        return False
    return True


def _leave(config: SpeculativeConfig) -> None:
    """Leave a configuration as `patches/resolution.py` has filled it in."""


def _num_lookahead_tokens(config: SpeculativeConfig) -> int:
    """Return K: the slots that vLLM keeps behind a request's tokens, for those to be verified."""
    return int(config.num_speculative_tokens)
