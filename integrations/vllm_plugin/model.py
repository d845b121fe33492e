"""The QuickMerge++ prior as vLLM's EAGLE-3 draft model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.utils import maybe_prefix, process_eagle_weight

from qm_spec.discovery.files import shown
from qm_spec.drafter.head import spread
from qm_spec.drafter.layer import PriorLayer, plain_linear
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.integrations.vllm_plugin import compat, seeds
from qm_spec.integrations.vllm_plugin.adaptive import adapts
from qm_spec.integrations.vllm_plugin.attention import MergedAttention, QuickMergeBackend
from qm_spec.integrations.vllm_plugin.lookup import lookup_length
from qm_spec.integrations.vllm_plugin.metrics import open_file
from qm_spec.integrations.vllm_plugin.patches.cpu_expansion import CPU_EXPANSION
from qm_spec.integrations.vllm_plugin.patches.cpu_no_drafts import CPU_NO_DRAFTS
from qm_spec.integrations.vllm_plugin.patches.cpu_seeds import CPU_SEEDS
from qm_spec.integrations.vllm_plugin.patches.draft_loop import DRAFT_LOOP
from qm_spec.integrations.vllm_plugin.patches.drafts_after_step import DRAFTS_AFTER_STEP
from qm_spec.integrations.vllm_plugin.patches.min_tokens import MIN_TOKENS
from qm_spec.integrations.vllm_plugin.patches.request_states import REQUEST_STATES
from qm_spec.integrations.vllm_plugin.patches.seed_numbers import SEED_NUMBERS, SEEDED_ROWS
from qm_spec.integrations.vllm_plugin.report import Report
from qm_spec.integrations.vllm_plugin.session import DraftSession
from qm_spec.integrations.vllm_plugin.status import tell_status
from qm_spec.integrations.vllm_plugin.target_head import DraftRows, plain_head
from qm_spec.ops.draft_layer import NUM_AUX_STATES

logger = logging.getLogger("vllm.plugins.qm_spec")

_PARALLEL = {
    "column": partial(ColumnParallelLinear, gather_output=False),
    "row": RowParallelLinear,
    "none": ReplicatedLinear,
}


# Holds the tokens that a checkpoint's `d2t` names.
_TOKEN_IDS = "draft_rows.token_ids"


def drafter_config(vllm_config: VllmConfig) -> QuickMergeConfig:
    """Return the config of an engine's drafter, which vLLM has wrapped in one for EAGLE."""
    wrapped = vllm_config.speculative_config.draft_model_config.hf_config
    return QuickMergeConfig.from_dict(wrapped.model.to_dict())


def _parallel_linear(inputs: int, outputs: int, split: str, name: str) -> nn.Module:
    return _PARALLEL[split](inputs, outputs, bias=False, return_bias=False, prefix=name)


def _make_report(session: DraftSession, vllm_config: VllmConfig) -> Report:
    """Return what tells of an engine's drafting, where vLLM tells of the rest: on its first rank."""
    from vllm import envs

    drafter, parallel = vllm_config.speculative_config.draft_model_config, vllm_config.parallel_config
    folder = getattr(drafter.hf_config, "qm_spec_metrics", None)
    if get_tensor_model_parallel_rank() > 0:
        folder = None
    # As vLLM labels its own.
    labels = {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(parallel.data_parallel_index),
    }
    return Report(
        session.counters,
        shown(drafter.model),
        logs=folder is not None,
        file=open_file(folder, labels),
        interval_s=envs.VLLM_LOG_STATS_INTERVAL,
    )


class QuickMergeModel(nn.Module):
    """The prior with its attention layer; vLLM puts the target's embedding into `embed_tokens`."""

    def __init__(self, config: QuickMergeConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        shards = get_tensor_model_parallel_world_size()
        # On one rank plain layers do: vLLM's may repack their weights, and the draft loop reads them.
        linear = plain_linear if shards == 1 else _parallel_linear
        self.layer = PriorLayer(config, linear, shards, prefix=f"{prefix}.layer.")
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        # vLLM reads one layer number from the name; it must lie beyond the target's layers.
        number = vllm_config.model_config.get_total_num_hidden_layers()
        self.attn = MergedAttention(
            self.layer.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.layer.num_kv_heads,
            # The target's cache settings (sliding window, fp8) are not ours.
            cache_config=None,
            prefix=f"{prefix}.layers.{number}.attn",
            attn_backend=QuickMergeBackend,
            merge=config.merge,
            max_rows=vllm_config.speculative_config.num_speculative_tokens + 1,
        )
        self.attn.impl.slopes = self.layer.slopes
        self.attn.impl.far_bias = self.layer.far_bias

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the target's embeddings `[T, D]`."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one draft step over all rows; `positions` are not used, see the attention layer."""
        embedding = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        query, residual = self.layer.query(embedding, hidden_states)
        key, value = self.layer.keys_values(hidden_states, embedding)
        attended = self.attn(query.flatten(1), key.flatten(1), value.flatten(1))
        return self.layer.finish(attended.view(query.shape), residual)


class QuickMergeForCausalLM(Eagle3LlamaForCausalLM):
    """What vLLM's EAGLE-3 proposers load; the base class is what they check for."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # A config that was built by hand has not been through our patches, which check this first.
        compat.require_supported()
        compat.require_runner(vllm_config.use_v2_model_runner)
        nn.Module.__init__(self)
        self.config = drafter_config(vllm_config)
        self.model = QuickMergeModel(self.config, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        # vLLM's own name for a draft vocabulary; ours gives out logits and ids of the target's.
        self.draft_id_to_target_id = None
        sizes = self.config.draft_vocab_size, self.config.vocab_size, self.config.hidden_size
        self.draft_rows = DraftRows(*sizes) if self.config.draft_vocab_size < self.config.vocab_size else None
        self.use_parallel_drafting = False
        compat.apply(DRAFT_LOOP)
        on_cpu, most = vllm_config.device_config.device_type == "cpu", vllm_config.num_speculative_tokens
        # Lists of different lengths on a CPU, or drafts that are not verified with the V2 runner.
        numbers_vary = on_cpu and not vllm_config.use_v2_model_runner
        numbers_vary |= vllm_config.speculative_config.enable_adaptive_verification
        # A GPU's step is still running when drafting begins, and other schedulers ask for drafts at other times.
        one_at_a_time = vllm_config.parallel_config.pipeline_parallel_size == 1
        one_at_a_time = one_at_a_time and not vllm_config.scheduler_config.async_scheduling
        self.drafts_after_step = on_cpu and one_at_a_time and compat.apply(DRAFTS_AFTER_STEP)
        self.session = DraftSession(
            self,
            vllm_config,
            # Lookup may draft more than the prior, where the number may differ between requests.
            num_drafts=min(self.config.num_speculative_tokens, most) if numbers_vary else most,
            most_drafts=most,
            lookup_length=lookup_length(self.config),
            adapts=adapts(),
            seeds_by_position=(
                on_cpu
                and not vllm_config.model_config.use_fp64_gumbel
                and seeds.supported()
                and compat.apply(SEEDED_ROWS)
                and compat.apply(SEED_NUMBERS)
            ),
        )
        # On a CPU also for the tokens behind pieces of prompts.
        if on_cpu or self.session.lookup_length:
            compat.apply(REQUEST_STATES)
        self.session.report = _make_report(self.session, vllm_config)
        self.model.attn.at_start = partial(tell_status, self, vllm_config)
        compat.apply(CPU_EXPANSION)
        compat.apply(CPU_NO_DRAFTS)
        compat.apply(MIN_TOKENS)
        compat.apply(CPU_SEEDS)

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """Fuse the target's auxiliary states: `[T, 3 D]` to `[T, D]`.

        Raises:
            ValueError: the target has handed out more or fewer than three.
        """
        expected = NUM_AUX_STATES * self.config.hidden_size
        if hidden_states.shape[-1] != expected:
            raise ValueError(
                f"qm_spec: the target must hand out {expected} numbers a token, the states in front of its layers "
                f"{self.config.eagle_aux_hidden_state_layer_ids}, got {hidden_states.shape[-1]}; train the drafter "
                "anew with layers that vLLM's class of this target hands out (--aux-layers)"
            )
        return self.model.layer.fuse(hidden_states)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return logits `[T, V]` of the target's vocabulary, -inf for what is not in the draft vocabulary."""
        rows = self.draft_rows
        if rows is None:
            return super().compute_logits(hidden_states)
        head = plain_head(self)
        if head is None:
            logits = self.logits_processor(self.lm_head, hidden_states)[..., rows.token_ids]
        else:
            logits = F.linear(hidden_states, rows.gather(head))
        return spread(logits, rows.token_ids, self.config.vocab_size, float("-inf"))

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """Return the target's ids `[T]` of the best tokens."""
        return self.compute_logits(hidden_states).argmax(-1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a drafter's `model.safetensors`.

        Raises:
            ValueError: a tensor is missing, unknown or of the wrong shape.
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        not_finite = []
        for name, weight in weights:
            own = _TOKEN_IDS if name == "d2t" else name if name.startswith("lm_head.") else f"model.{name}"
            if own not in parameters:
                raise ValueError(
                    f"qm_spec: the drafter's weights hold {name!r}, which the prior does not have; "
                    "the checkpoint was made by another version: train it anew with qm-spec train"
                )
            process_eagle_weight(self, name)
            self._load(parameters[own], name, weight)
            loaded.add(own)
            if not weight.isfinite().all():
                not_finite.append(name)
        shared = {name for name in parameters if name.startswith(("model.embed_tokens.", "lm_head."))}
        missing = sorted("d2t" if name == _TOKEN_IDS else name for name in set(parameters) - loaded - shared)
        if missing:
            raise ValueError(f"qm_spec: the drafter's weights lack {missing}; copy the folder again or train it anew")
        if not_finite:
            logger.warning(
                "qm_spec: the drafter's weights hold values that are not finite, in %s: outputs stay right, but "
                "hardly a draft will be accepted; copy the folder again or train it anew",
                ", ".join(not_finite),
            )
        # The target's embedding and head replace ours after loading.
        return loaded | shared

    def _load(self, parameter: nn.Parameter, name: str, weight: Tensor) -> None:
        shards, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if name.endswith((".slopes", ".far_bias")):
            weight = weight.chunk(shards)[rank]
        elif (
            name.endswith((".k_proj.weight", ".v_proj.weight", ".next_proj.weight"))
            and self.config.num_key_value_heads < shards
        ):
            # Fewer key/value heads than ranks: every rank gets the one that its query heads read.
            heads = weight.unflatten(0, (self.config.num_key_value_heads, -1))
            weight = heads.repeat_interleave(shards // self.config.num_key_value_heads, 0).flatten(0, 1)
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        try:
            loader(parameter, weight)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"qm_spec: {name} has shape {list(weight.shape)}, the config asks for {list(parameter.shape)}; "
                "config.json and model.safetensors are not of one drafter"
            ) from error
