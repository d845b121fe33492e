"""All that is known of vLLM's versions: the supported ones, and every patch of its code.

A patch is a last resort. To add one: write a function that takes the original callable and returns
its replacement, name it in a `Patch` below, and call `apply` where it is needed.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from qm_spec import provenance

logger = logging.getLogger("vllm.plugins.qm_spec")

OLDEST = (0, 32)
NEWEST = (0, 33)


@dataclass(frozen=True)
class Patch:
    """One replaced method or function of vLLM.

    Attributes:
        target: `module:Class.method` or `module:function`.
        parameters: the method's parameter names; with others it is not touched.
        replacement: `module:function`, called with the original, returns what takes its place.
        why: what it gives a user.
        how: what the replacement does.
        upstream: the issue that would make it needless, or `none`.
        delete_when: the event after which it must go.
    """

    target: str
    parameters: tuple[str, ...]
    replacement: str
    why: str
    how: str
    upstream: str
    delete_when: str


SPECULATIVE_MODEL_FLAG = Patch(
    target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
    parameters=("parser",),
    replacement="qm_spec.integrations.vllm_plugin.request:with_flag",
    why="`vllm serve TARGET --speculative-model qm_spec`; vLLM has renamed the flag to --spec-model",
    how="adds --speculative-model to each parser that lacks it, with the destination of --spec-model",
    upstream="none",
    delete_when="vLLM has a flag --speculative-model again",
)

RESOLVE_DRAFTER = Patch(
    target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    parameters=("self", "target_model_config", "target_parallel_config"),
    replacement="qm_spec.integrations.vllm_plugin.request:with_resolution",
    why="`qm_spec` as a draft model means the drafter of this target, and a wrong one is refused early",
    how="fills in method, path and depth on a copy of the arguments; other methods pass untouched",
    upstream="none",
    delete_when="vLLM has a registry of speculative methods that may resolve their own settings",
)

SPECULATOR = Patch(
    target="vllm.v1.worker.gpu.spec_decode:init_speculator",
    parameters=("vllm_config", "device", "req_states"),
    replacement="qm_spec.integrations.vllm_plugin.request:with_speculator",
    why="with the V2 runner a prompt costs keys and values only, and all drafts of a step one call",
    how="takes our speculator where the draft model is ours; applied before the runner takes the function's name",
    upstream="none",
    delete_when="vLLM has a registry of speculators",
)

DRAFT_LOOP = Patch(
    target="vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.propose",
    parameters=(
        "self",
        "num_speculative_tokens",
        "target_token_ids",
        "target_positions",
        "target_hidden_states",
        "next_token_ids",
        "token_indices_to_sample",
        "common_attn_metadata",
        "sampling_metadata",
        "mm_embed_inputs",
        "num_rejected_tokens_gpu",
        "slot_mappings",
    ),
    replacement="qm_spec.integrations.vllm_plugin.proposer:with_draft_loop",
    why="a draft step costs its arithmetic; vLLM's loop adds milliseconds of metadata to each on a CPU",
    how="drafts all K tokens in one call for our model and is applied when that is built; others keep vLLM's",
    upstream="none",
    delete_when="vLLM lets a draft model bring its own loop",
)

DRAFTS_AFTER_STEP = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.take_draft_token_ids",
    parameters=("self",),
    replacement="qm_spec.integrations.vllm_plugin.proposer:with_pending_drafts",
    why="tokens go out before those behind them are drafted: the first one does not wait until the prior has read the "
    "prompt too",
    how="drafts when the engine asks for drafts, which it does after it has handed out the step's tokens; on a CPU",
    upstream="none",
    delete_when="vLLM drafts after it has handed out a step's tokens",
)

REQUEST_STATES = Patch(
    target="vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.prepare_next_token_ids_padded",
    parameters=("self", "sampled_token_ids", "requests", "gpu_input_batch", "discard_request_mask"),
    replacement="qm_spec.integrations.vllm_plugin.proposer:with_request_states",
    why="suffix lookup (lookup_length), for which a request's earlier tokens must be found again, and drafting only "
    "where it pays (QM_SPEC_ADAPT), for which each request's acceptance is followed; on a CPU also the right token "
    "behind a piece of a prompt",
    how="tells our session which requests the rows are, which `propose` is not told; on a CPU, and where lookup is on",
    upstream="none",
    delete_when="vLLM tells a proposer's `propose` the requests of the batch",
)

CPU_EXPANSION = Patch(
    target="vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
    parameters=("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
    replacement="qm_spec.integrations.vllm_plugin.verification:with_expansion",
    why="sampling (temperature above 0) keeps the target's distribution on a CPU",
    how="expands temperature, top-k and top-p in torch on the CPU, where vLLM's kernel drops its result; "
    "applied when our model is built",
    upstream="vllm-project/vllm issue 55005",
    delete_when="the oldest supported vLLM has that issue fixed",
)

CPU_SEEDS = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
    parameters=("self", "grammar_output"),
    replacement="qm_spec.integrations.vllm_plugin.verification:with_seeds_of_read_prompts",
    why="a request with a seed may have a long prompt on a CPU, and has the same sample however it is read",
    how="hides the generators of requests whose prompts are read in pieces until the last piece; vLLM draws and takes "
    "the draw back, which ends the engine on a CPU. Applied when our model is built, and by our benchmarks",
    upstream="none",
    delete_when="vLLM does not turn back a CPU's generators",
)

SEED_NUMBERS = Patch(
    target="vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
    parameters=("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
    replacement="qm_spec.integrations.vllm_plugin.seeds:with_numbers",
    why="a request with a seed has the same sample whatever is drafted for it, so drafts may follow the load",
    how="gives each token of a seeded request the number of its position, as plain decoding does; on a CPU, applied "
    "when our model is built",
    upstream="none",
    delete_when="vLLM's verification keeps a seed's sample whatever is drafted",
)

SEEDED_ROWS = Patch(
    target="vllm.v1.sample.rejection_sampler:rejection_sample",
    parameters=(
        "draft_token_ids",
        "num_draft_tokens",
        "max_spec_len",
        "cu_num_draft_tokens",
        "draft_probs",
        "target_logits",
        "bonus_token_ids",
        "sampling_metadata",
        "synthetic_mode",
        "synthetic_conditional_rates",
        "use_fp64_gumbel",
    ),
    replacement="qm_spec.integrations.vllm_plugin.seeds:with_numbered_rows",
    why="a request with a seed has the same sample whatever is drafted for it, so drafts may follow the load",
    how="samples the target's tokens of seeded requests by those numbers and accepts the drafts that equal them; "
    "applied when our model is built",
    upstream="none",
    delete_when="with SEED_NUMBERS",
)


def vllm_version() -> str:
    """Return the running vLLM's version text."""
    import vllm

    return str(vllm.__version__)


def is_supported(version: str) -> bool:
    """Say whether a vLLM version, by its first two numbers, is one that qm_spec was tested with."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return False
    return OLDEST <= release[:2] <= NEWEST


def get_kv_cache_groups(vllm_config: Any, specs: dict[str, Any]) -> list[Any]:
    """Return vLLM's groups of layers with these cache specs, which it may change."""
    module = _import("vllm.v1.core.kv_cache_planning") or _import("vllm.v1.core.kv_cache_utils")
    groups: list[Any] = module.get_kv_cache_groups(vllm_config, specs)
    return groups


def require_supported() -> None:
    """Refuse a vLLM that qm_spec was not tested with; call it only when our method is asked for.

    Raises:
        RuntimeError: the running vLLM is older or newer.
    """
    version = vllm_version()
    if not is_supported(version):
        raise RuntimeError(
            f"qm_spec {provenance.versions().get('qm_spec', '(not installed)')} supports vLLM "
            f"{_dotted(OLDEST)} to {_dotted(NEWEST)}, found {version}; install vllm=={_dotted(NEWEST)}.*"
        )


def require_runner(uses_v2: bool) -> None:
    """Refuse vLLM's V1 runner on ROCm: after a first draft it takes the metadata of vLLM's own backends only.

    Raises:
        ValueError: it would run.
    """
    from vllm.platforms import current_platform

    if current_platform.is_rocm() and not uses_v2:
        raise ValueError(
            "qm_spec: on ROCm vLLM's V1 runner takes no drafter with an attention backend of its own, and it would end "
            "at the first draft; use the V2 runner (VLLM_USE_V2_MODEL_RUNNER=1), which needs Triton"
        )


def apply(patch: Patch) -> bool:
    """Put a patch in force once; return whether it is in force.

    A method that is not there, or has other parameters than the patch was written for, is left
    alone with a warning: this may be a vLLM whose user never asks for qm_spec.
    """
    module_name, _, path = patch.target.partition(":")
    class_name, _, name = path.rpartition(".")
    owner = _import(module_name)
    if class_name:
        owner = getattr(owner, class_name, None)
    declared = inspect.getattr_static(owner, name, None)
    if declared is None:
        return _skip(patch, "there is no such method")
    kind = type(declared) if isinstance(declared, staticmethod | classmethod) else None
    original = declared.__func__ if kind else declared
    if not callable(original):
        return _skip(patch, "it is no method")
    if getattr(original, "_qm_spec_patch", None) == patch.target:
        return True
    parameters = tuple(inspect.signature(original).parameters)
    if parameters != patch.parameters:
        return _skip(patch, f"its parameters are {parameters}, expected {patch.parameters}")
    maker_module, _, maker = patch.replacement.partition(":")
    replaced = getattr(importlib.import_module(maker_module), maker)(original)
    replaced._qm_spec_patch = patch.target
    setattr(owner, name, kind(replaced) if kind else replaced)
    return True


def _import(module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None


def _skip(patch: Patch, reason: str) -> bool:
    logger.warning(
        "qm_spec: %s is not patched (%s), so this is lost: %s. vLLM here is %s, qm_spec supports %s to %s.",
        patch.target,
        reason,
        patch.why,
        vllm_version(),
        _dotted(OLDEST),
        _dotted(NEWEST),
    )
    return False


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
