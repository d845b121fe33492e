"""A user's request for qm_spec: how it is recognised, what is refused, and what vLLM gets instead."""

from __future__ import annotations

import argparse
import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from qm_spec.config import ARCHITECTURE
from qm_spec.discovery import check_drafter, find_drafter, is_drafter, vllm_settings
from qm_spec.discovery.files import shown
from qm_spec.drafter.config import QuickMergeConfig
from qm_spec.integrations.vllm_plugin import compat
from qm_spec.integrations.vllm_plugin.aux_states import require_aux_hidden_states, require_first_state
from qm_spec.integrations.vllm_plugin.lookup import most_drafts
from qm_spec.integrations.vllm_plugin.metrics import shared_folder

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.plugins.qm_spec")

METHOD = "qm_spec"
WORKER_EXTENSION = "qm_spec.integrations.vllm_plugin.worker.QuickMergeWorkerExtension"
FLAG = "--speculative-model"


def with_flag(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `EngineArgs.add_cli_args` with the flag `--speculative-model`."""

    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        if FLAG not in parser._option_string_actions:
            group = parser.add_argument_group("qm_spec", "Speculative decoding with a QuickMerge drafter.")
            # The default stays that of --spec-model, which has the same destination.
            action = group.add_argument(
                FLAG,
                dest="spec_model",
                default=argparse.SUPPRESS,
                metavar="qm_spec|DRAFT_DIR",
                help="'qm_spec' finds the QuickMerge drafter of the served model; a folder names one.",
            )
            _keep_abbreviations(parser, action)
        return parser

    return add_cli_args


def _keep_abbreviations(parser: argparse.ArgumentParser, ours: argparse.Action) -> None:
    """Leave abbreviations that meant another flag before ours what they were: `--speculative` is one of vLLM's."""
    find = parser._get_option_tuples

    def find_others_first(option_string: str) -> list[Any]:
        found = find(option_string)
        return [match for match in found if match[0] is not ours] or found

    parser._get_option_tuples = find_others_first  # type: ignore[method-assign]


def with_resolution(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `EngineArgs.create_speculative_config` that knows `qm_spec` and QuickMerge folders."""

    @functools.wraps(original)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        request = find_request(self)
        if request is None:
            return _not_ours(original(self, target_model_config, target_parallel_config))
        settings = resolve(request, self, target_model_config, target_parallel_config)
        # vLLM writes into the arguments it is given; a second engine config from them must work.
        resolved = copy.copy(self)
        resolved.speculative_config = settings
        resolved.spec_method = resolved.spec_model = resolved.spec_tokens = None
        # A drafter needs no code of its own and is stored in one format, whatever its target is allowed and stored in.
        as_drafters = copy.copy(target_model_config)
        as_drafters.trust_remote_code, as_drafters.config_format = False, "auto"
        config = original(resolved, as_drafters, target_parallel_config)
        if config is not None:
            config.target_model_config = target_model_config
            drafter = config.draft_model_config
            if request.get("num_speculative_tokens") is not None:
                # A number that the user names is the prior's as well, whatever the drafter's own.
                drafter.hf_config.model.num_speculative_tokens = config.num_speculative_tokens
            # Otherwise the V1 runner drafts for nobody while one request is within K tokens of its end; drafts take no
            # room in the pages, and the scheduler cuts those behind the end.
            drafter.max_model_len = target_model_config.max_model_len + config.num_speculative_tokens
            if not self.disable_log_stats:
                # With the draft model it reaches the engine, wherever that runs.
                drafter.hf_config.qm_spec_metrics = shared_folder()
            if not target_parallel_config.worker_extension_cls:
                target_parallel_config.worker_extension_cls = WORKER_EXTENSION
        return config

    return create_speculative_config


def _not_ours(config: SpeculativeConfig | None) -> SpeculativeConfig | None:
    """Return a configuration that was not ours to resolve, unless its draft model is: then nothing has checked it."""
    drafter = None if config is None else config.draft_model_config
    if _is_our_model(drafter):
        raise ValueError(
            f"qm_spec: a QuickMerge drafter must be a local folder, so that it is checked before it is loaded, got "
            f"{shown(drafter.model)}; download it (hf download {shown(drafter.model)} --local-dir DIR) and name DIR"
        )
    return config


def _is_our_model(drafter: ModelConfig | None) -> TypeGuard[ModelConfig]:
    return drafter is not None and ARCHITECTURE in drafter.architectures


def with_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the V2 runner's `init_speculator` that takes ours where the draft model is ours."""

    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: Any, req_states: Any) -> Any:
        drafter = vllm_config.speculative_config.draft_model_config
        if not _is_our_model(drafter):
            return original(vllm_config, device, req_states)
        from qm_spec.integrations.vllm_plugin.speculator import QuickMergeSpeculator

        return QuickMergeSpeculator(vllm_config, device)

    return init_speculator


def find_request(args: EngineArgs) -> dict[str, Any] | None:
    """Return the merged speculative settings if they ask for a QuickMerge drafter, else None.

    They do when the model is the word `qm_spec` or a folder with a QuickMerge drafter. A setting
    that is given twice is not ours to judge: vLLM refuses it.
    """
    given = args.speculative_config or {}
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    flags = {
        "method": args.spec_method,
        "model": args.spec_model,
        "num_speculative_tokens": args.spec_tokens,
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    if flags.keys() & settings.keys():
        return None
    settings |= flags
    model = settings.get("model")
    if model == METHOD or (isinstance(model, str | Path) and is_drafter(model)):
        return settings
    return None


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
    # With LoRA vLLM wants the most tokens for all requests to fit into one step; with the V2 runner all requests have
    # as many drafts, and none of them are looked up.
    if asked is None and current_platform.is_cpu() and not args.enable_lora and not _runs_v2():
        depth = most_drafts(config)
    logger.info("qm_spec: drafter %s, up to %d tokens per step", shown(drafter), depth)
    settings = {**request, **vllm_settings(drafter, depth)}
    # At a temperature above 0 drafts that are drawn are kept far more often than the most likely tokens. Distributions
    # take memory for all requests, K and the vocabulary, so on a GPU, where it is dear, this is the user's choice.
    if current_platform.is_cpu() and request.get("rejection_sample_method", "standard") == "standard":
        settings.setdefault("draft_sample_method", "probabilistic")
    # A drafter is always safetensors, whatever holds the target (GGUF, shards, a tensorizer's file); "auto" would take
    # another file that lies beside the one that was checked.
    if args.load_format != "dummy":
        settings.setdefault("draft_load_config", LoadConfig(load_format="safetensors"))
    if "disable_eagle_block_drop" in request:
        settings["disable_eagle_block_drop"] = request["disable_eagle_block_drop"]
    return settings


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
