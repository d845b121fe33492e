"""The entry point of group `vllm.general_plugins`."""

from __future__ import annotations

import logging

# Below `vllm`, so that its handlers and level are used, without importing vLLM here.
logger = logging.getLogger("vllm.plugins.qm_spec")

MODEL_CLASS = "qm_spec.integrations.vllm_plugin.model:QuickMergeForCausalLM"


def register() -> None:
    """Tell vLLM of our draft model, and make its arguments know `qm_spec`.

    vLLM calls this in each of its processes, also for users who never ask for us, and does not
    catch what it raises: an error here would stop all of them. So it is logged, and vLLM goes on
    without us. Running twice changes nothing.
    """
    try:
        _register()
    except Exception:
        logger.exception("qm_spec: registering failed, so vLLM runs without qm_spec")


def _register() -> None:
    from vllm import ModelRegistry

    from qm_spec.config import ARCHITECTURE
    from qm_spec.integrations.vllm_plugin import compat
    from qm_spec.integrations.vllm_plugin.patches.flag import SPECULATIVE_MODEL_FLAG
    from qm_spec.integrations.vllm_plugin.patches.resolution import RESOLVE_DRAFTER
    from qm_spec.integrations.vllm_plugin.patches.v2_speculator import SPECULATOR
    from qm_spec.integrations.vllm_plugin.registry import is_registered

    # What the package itself says would reach no handler of vLLM's.
    logging.getLogger("qm_spec").parent = logger
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    # A flag whose value nothing resolves would end in a puzzling error of vLLM's.
    if compat.apply(RESOLVE_DRAFTER):
        compat.apply(SPECULATIVE_MODEL_FLAG)
    if not is_registered():
        compat.apply(SPECULATOR)
