"""`qm_spec` and drafter folders in vLLM's arguments."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qm_spec.discovery.files import shown
from qm_spec.integrations.vllm_plugin.compat import Patch
from qm_spec.integrations.vllm_plugin.metrics import shared_folder
from qm_spec.integrations.vllm_plugin.request import find_request, is_our_model, missing_folder, resolve

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

WORKER_EXTENSION = "qm_spec.integrations.vllm_plugin.worker.QuickMergeWorkerExtension"


def with_resolution(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `EngineArgs.create_speculative_config` that knows `qm_spec` and QuickMerge folders."""

    @functools.wraps(original)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        request = find_request(self)
        if request is None:
            # Asked first: vLLM writes into the arguments.
            folder = missing_folder(self)
            try:
                return _not_ours(original(self, target_model_config, target_parallel_config))
            except ValueError as error:
                if folder is None:
                    raise
                # What is printed last is what is read. vLLM's own says to name a repository.
                raise ValueError(
                    f"qm_spec: the draft model {shown(folder)} does not exist; restore that folder, name another one "
                    "(qm-spec doctor --target TARGET shows which drafters are found), or leave the draft model out to "
                    "serve without drafts"
                ) from error
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
    if config is not None and is_our_model(drafter := config.draft_model_config):
        raise ValueError(
            f"qm_spec: a QuickMerge drafter must be a local folder, so that it is checked before it is loaded, got "
            f"{shown(drafter.model)}; download it (hf download {shown(drafter.model)} --local-dir DIR) and name DIR"
        )
    return config


RESOLVE_DRAFTER = Patch(
    target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    parameters=("self", "target_model_config", "target_parallel_config"),
    replacement=with_resolution,
    why="`qm_spec` as a draft model means the drafter of this target, and a wrong one is refused early",
    how="fills in method, path and depth on a copy of the arguments; other methods pass untouched",
    upstream="none",
    delete_when="vLLM has a registry of speculative methods that may resolve their own settings",
)
