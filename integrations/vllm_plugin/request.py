"""A user's request for qm_spec: how it is recognised, what is refused, and what vLLM gets instead."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from qm_spec.config import ARCHITECTURE
from qm_spec.discovery import check_drafter, find_drafter, is_drafter, vllm_settings
from qm_spec.discovery.files import shown
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.integrations.vllm_plugin import compat
from qm_spec.integrations.vllm_plugin.aux_states import require_aux_hidden_states, require_first_state
from qm_spec.integrations.vllm_plugin.lookup import lookup_length, most_drafts
from qm_spec.integrations.vllm_plugin.registry import METHOD, is_registered
from qm_spec.integrations.vllm_plugin.sharing import response_bytes

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.plugins.qm_spec")

# The most memory of a GPU that the distributions of drafts may take unasked, counted in float32: with 4 drafts over a
# vocabulary of 128k it is 0.5 GiB for 256 requests, and 2 for 1024.
MOST_DISTRIBUTION_BYTES = 4 << 30


def is_our_model(drafter: ModelConfig | None) -> TypeGuard[ModelConfig]:
    """Tell whether a draft model is a QuickMerge drafter, by its class."""
    return drafter is not None and ARCHITECTURE in drafter.architectures


def find_request(args: EngineArgs) -> dict[str, Any] | None:
    """Return the merged speculative settings if they ask for a QuickMerge drafter, else None.

    They do when the model is the word `qm_spec` or a folder with a QuickMerge drafter. A setting
    that is given twice is not ours to judge: vLLM refuses it.
    """
    settings = _given_settings(args)
    model = settings.get("model")
    if model == METHOD or (isinstance(model, str | Path) and is_drafter(model)):
        return settings
    return None


def missing_folder(args: EngineArgs) -> Path | None:
    """Return the absolute path of a draft model that nothing stands at, None where there is something or no path."""
    model = _given_settings(args).get("model")
    if isinstance(model, str | Path) and os.path.isabs(model) and not os.path.exists(model):
        return Path(model)
    return None


def _given_settings(args: EngineArgs) -> dict[str, Any]:
    """Return the speculative settings of both ways to give them; none at all where one is given twice."""
    given = args.speculative_config or {}
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    flags = {
        "method": args.spec_method,
        "model": args.spec_model,
        "num_speculative_tokens": args.spec_tokens,
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    return {} if flags.keys() & settings.keys() else settings | flags


def resolve(
    request: dict[str, Any],
    args: EngineArgs,
    target_model_config: ModelConfig,
    target_parallel_config: ParallelConfig,
) -> dict[str, Any]:
    """Return the settings with method, path and depth filled in, after every check.

    Raises:
        RuntimeError: this vLLM is not supported.
        FileNotFoundError: no drafter, or files are missing.
        TypeError, ValueError: the drafter, the depth, the target or the set-up does not fit.
    """
    from vllm.config.load import LoadConfig
    from vllm.platforms import current_platform

    compat.require_supported()
    method = request.get("method")
    if method not in (None, "eagle3"):
        raise ValueError(f"qm_spec: a QuickMerge drafter runs as method 'eagle3', got {method!r}; leave the method out")
    compat.require_runner(_runs_v2())
    response_bytes()
    _require_fitting_setup(args, target_parallel_config)
    require_aux_hidden_states(target_model_config.architecture)
    target, revision = target_model_config.model, target_model_config.revision
    named = request["model"]
    drafter = find_drafter(target, revision) if named == METHOD else Path(named)
    asked = request.get("num_speculative_tokens")
    depth = check_drafter(drafter, target, asked, revision)
    config = QuickMergeConfig.from_pretrained(drafter)
    require_first_state(target_model_config.architecture, config.eagle_aux_hidden_state_layer_ids)
    _require_fitting_heads(config.num_key_value_heads, target_parallel_config.tensor_parallel_size)
    of_prior = depth
    # Lookup may draft more than the prior where the number may differ between requests: on a CPU with the V1 runner,
    # and where V2 decides what to verify. With LoRA vLLM wants the most tokens for all requests to fit into one step.
    numbers_vary = request.get("enable_adaptive_verification") if _runs_v2() else current_platform.is_cpu()
    if asked is None and numbers_vary and not args.enable_lora:
        depth = most_drafts(config)
    logger.info(
        "qm_spec: drafter %s, up to %d tokens per step%s",
        shown(drafter),
        depth,
        f", {of_prior} by the prior and {depth} copied by lookup" if lookup_length(config) else "",
    )
    settings = {**request, **vllm_settings(drafter, depth)}
    if _runs_v2() and is_registered():
        settings["method"] = METHOD
    if _may_draw(request):
        num_bytes = _most_requests(args, target_parallel_config) * depth * target_model_config.get_vocab_size() * 4
        settings["draft_sample_method"] = _draft_sample_method(num_bytes)
    # A drafter is always safetensors, whatever holds the target (GGUF, shards, a tensorizer's file); "auto" would take
    # another file that lies beside the one that was checked.
    if args.load_format != "dummy":
        settings.setdefault("draft_load_config", LoadConfig(load_format="safetensors"))
    if "disable_eagle_block_drop" in request:
        settings["disable_eagle_block_drop"] = request["disable_eagle_block_drop"]
    return settings


def _may_draw(request: dict[str, Any]) -> bool:
    """Tell whether drafts may be drawn from distributions, where the user does not say how they are chosen."""
    return (
        "draft_sample_method" not in request
        and request.get("rejection_sample_method", "standard") == "standard"
        and not request.get("use_local_argmax_reduction")
    )


def _draft_sample_method(num_bytes: int) -> str:
    """Return how drafts are chosen at a temperature above 0: drawn, where there is memory for their distributions.

    Drawn ones are accepted far more often than the most likely tokens. On a CPU distributions are kept for a step's
    requests only; on a GPU for all that there may be, which takes memory from the pages.

    Args:
        num_bytes: of all distributions, in float32.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "probabilistic"
    fits = num_bytes <= MOST_DISTRIBUTION_BYTES
    logger.info(
        "qm_spec: at a temperature above 0 drafts are %s: their distributions take up to %.2f GiB, and %s %.0f; "
        "draft_sample_method decides otherwise",
        "drawn" if fits else "the most likely tokens",
        num_bytes / 2**30,
        "may take" if fits else "take no more unasked than",
        MOST_DISTRIBUTION_BYTES / 2**30,
    )
    return "probabilistic" if fits else "greedy"


def _most_requests(args: EngineArgs, parallel: ParallelConfig) -> int:
    """Return how many requests a step may have; where the user does not say, what vLLM will settle on at most."""
    if args.max_num_seqs is not None:
        return args.max_num_seqs
    _, by_context = args.get_batch_defaults(parallel.world_size)
    most: int = max(by_context.values())
    return 2 * most if args.performance_mode == "throughput" else most


def _runs_v2() -> bool:
    """Tell whether vLLM will take its V2 runner: where it is asked for, else where there is Triton."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    asked: bool | None = envs.VLLM_USE_V2_MODEL_RUNNER
    return bool(HAS_TRITON) if asked is None else asked


def _require_fitting_setup(args: EngineArgs, parallel: ParallelConfig) -> None:
    if args.kv_transfer_config is not None or args.kv_offloading_size is not None:
        raise ValueError(
            "qm_spec: a KV connector (--kv-transfer-config, --kv-offloading-size) cannot be used with a "
            "QuickMerge drafter, because merging in place changes pages that a connector assumes immutable; "
            "drop one of the two"
        )
    for option in (
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "pipeline_parallel_size",
    ):
        size = getattr(parallel, option)
        if size > 1:
            raise ValueError(
                f"qm_spec: {option} must be 1 with a QuickMerge drafter, got {size}; "
                "use --tensor-parallel-size or --data-parallel-size"
            )


def _require_fitting_heads(num_kv_heads: int, ranks: int) -> None:
    if max(num_kv_heads, ranks) % min(num_kv_heads, ranks):
        raise ValueError(
            f"qm_spec: tensor_parallel_size must divide the drafter's {num_kv_heads} key/value heads or be a multiple "
            f"of them, got {ranks}; use another --tensor-parallel-size"
        )
