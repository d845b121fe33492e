"""Time of an engine step by its roofline: every part takes its bytes or its operations, whichever take longer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qm_spec.simulation.hardware import DTYPE_BYTES, Hardware
from qm_spec.simulation.shapes import EAGLE3, DrafterShape, TargetShape

# vLLM's default share of the memory that it fills.
MEMORY_FILLED = 0.9
# Tokens of prompts in one step; vLLM's own default depends on the machine.
PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class StepTime:
    """Seconds of one engine step by what they are spent on.

    Args:
        weights_s: the target's layers without attention.
        attention_s: the target's keys and values, read once per request whatever the number of rows.
        head_s: the target's vocabulary head.
        communication_s: exchanges of a tensor-parallel group.
        draft_s: everything that drafts, overheads left out.
        overhead_s: the host's at every step.
        speculation_overhead_s: what the host adds at a step that drafts.
    """

    weights_s: float
    attention_s: float
    head_s: float
    communication_s: float
    draft_s: float
    overhead_s: float
    speculation_overhead_s: float

    @property
    def speculation_s(self) -> float:
        """What a step without a draft would not have."""
        return self.draft_s + self.speculation_overhead_s

    @property
    def total_s(self) -> float:
        """The whole step."""
        target_s = self.weights_s + self.attention_s + self.head_s + self.communication_s
        return target_s + self.overhead_s + self.speculation_s


@dataclass(frozen=True)
class CostModel:
    """Times and bytes of a target and its drafter on a group of equal devices.

    Left out, because they are small beside the rest: activations, norms, sampling on the device, writing keys
    and values, merging, and looking embeddings up. Kernels do not overlap with each other or with the host.

    Args:
        hardware: of each device.
        target: the model that is served.
        drafter: None where drafting costs the device nothing, as with n-grams.
        dtype: of weights and arithmetic. Keys and values have the same, but two bytes at least.
        tensor_parallel: devices that share each matrix and the heads.

    Raises:
        ValueError: the device has no rate of this dtype, or the group does not fit the heads or the links.
    """

    hardware: Hardware
    target: TargetShape
    drafter: DrafterShape | None = None
    dtype: str = "bfloat16"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        self.hardware.attainable_flops_per_s(self.dtype)
        if self.tensor_parallel < 1 or self.target.num_heads % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel: must divide the target's {self.target.num_heads} heads, got {self.tensor_parallel}"
            )
        if self.tensor_parallel > 1 and self.hardware.interconnect_bytes_per_s is None:
            raise ValueError(
                f"tensor_parallel: {self.hardware.name} has no interconnect_bytes_per_s, so it cannot be "
                f"{self.tensor_parallel}; add it to the hardware file, or leave it 1"
            )

    @property
    def _weight_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def _kv_bytes(self) -> int:
        return max(2, DTYPE_BYTES[self.dtype])

    def _kv_ranks(self, num_kv_heads: int) -> int:
        # Beyond the number of heads, ranks hold copies.
        return min(self.tensor_parallel, num_kv_heads)

    def _roofline_s(self, moved_bytes: float, flops: float) -> float:
        hardware = self.hardware
        return max(moved_bytes / hardware.attainable_bytes_per_s, flops / hardware.attainable_flops_per_s(self.dtype))

    def _matrix_s(self, weights: float, rows: float) -> float:
        share = weights / self.tensor_parallel
        return self._roofline_s(share * self._weight_bytes, 2 * share * rows)

    def _exchange_s(self, rows: float, times: float) -> float:
        """Seconds of so many ring all-reduces of the hidden states of `rows`."""
        ranks, rate = self.tensor_parallel, self.hardware.interconnect_bytes_per_s
        if ranks == 1 or rate is None:
            return 0.0
        moved_bytes = 2 * (ranks - 1) / ranks * rows * self.target.hidden_size * self._kv_bytes
        return times * (moved_bytes / rate + self.hardware.interconnect_latency_s)

    def step(self, batch: int, context: int, num_speculative_tokens: int = 0, draft_share: float = 1.0) -> StepTime:
        """Return the time of one decode step.

        Args:
            batch: requests in the step, from 1.
            context: tokens behind each of them, from 0.
            num_speculative_tokens: K; 0 decodes plainly.
            draft_share: share of the requests' steps that carry a draft, 0..1.

        Raises:
            ValueError: an argument is out of range.
        """
        if batch < 1 or context < 0 or num_speculative_tokens < 0 or not 0 <= draft_share <= 1:
            raise ValueError(
                "step: batch must be at least 1, context and num_speculative_tokens at least 0, draft_share in 0..1, "
                f"got {batch}, {context}, {num_speculative_tokens} and {draft_share}"
            )
        target, hardware = self.target, self.hardware
        rows = batch * (1 + draft_share * num_speculative_tokens)
        ranks = self._kv_ranks(target.num_kv_heads)
        drafts = draft_share if num_speculative_tokens else 0.0
        passes_s = num_speculative_tokens * hardware.draft_overhead_s if self.drafter is not None else 0.0
        return StepTime(
            weights_s=self._matrix_s(target.num_layers * target.layer_weights, rows),
            attention_s=self._roofline_s(
                batch * context * target.kv_elements * self._kv_bytes / ranks,
                4 * target.num_layers * target.num_heads * target.head_dim * rows * context / self.tensor_parallel,
            ),
            head_s=self._matrix_s(target.head_weights, rows),
            communication_s=self._exchange_s(rows, 2 * target.num_layers),
            draft_s=drafts * self.draft_s(batch, context, num_speculative_tokens),
            overhead_s=self._target_overhead_s,
            speculation_overhead_s=drafts * (hardware.speculation_overhead_s + passes_s),
        )

    @property
    def _target_overhead_s(self) -> float:
        return self.hardware.step_overhead_s + self.target.num_layers * self.hardware.layer_overhead_s

    def draft_s(self, batch: int, context: int, num_speculative_tokens: int) -> float:
        """Return the seconds of drafting for a step, overheads left out.

        Both drafters first read the states of all verified rows. Ours then makes K passes over its merged
        entries. EAGLE-3's first pass is part of that reading, and each of its passes attends to all tokens.
        """
        drafter, depth = self.drafter, num_speculative_tokens
        if drafter is None or depth == 0:
            return 0.0
        rows = batch * (1 + depth)
        merged = drafter.kind != EAGLE3
        passes = depth if merged else depth - 1
        whole_pass = (
            self._matrix_s(drafter.layer_weights, batch)
            + self._draft_attention_s(drafter, batch, context, batch)
            + self._exchange_s(batch, 2)
        )
        update = self._matrix_s(drafter.update_weights, rows)
        if not merged:
            update += self._draft_attention_s(drafter, batch, context, rows) + self._exchange_s(rows, 2)
        return update + passes * whole_pass + depth * self._matrix_s(drafter.head_weights, batch)

    def _draft_attention_s(self, drafter: DrafterShape, batch: int, context: int, rows: float) -> float:
        entries = _entries(drafter, context)
        return self._roofline_s(
            batch * entries * drafter.kv_bytes(self._kv_bytes) / self._kv_ranks(drafter.num_kv_heads),
            4 * drafter.num_heads * drafter.head_dim * rows * entries / self.tensor_parallel,
        )

    def prefill_s(self, num_tokens: int, speculative: bool = False) -> float:
        """Return the seconds of reading a prompt by itself, up to its first output token.

        Chunks are of `PREFILL_CHUNK` tokens; each reads the weights and costs the host one step.

        Args:
            num_tokens: of the prompt, from 1.
            speculative: whether the drafter reads it too.

        Raises:
            ValueError: there are no tokens.
        """
        if num_tokens < 1:
            raise ValueError(f"prefill_s: num_tokens must be at least 1, got {num_tokens}")
        target, drafter = self.target, self.drafter if speculative else None
        seconds = self._matrix_s(target.head_weights, 1)
        for begin in range(0, num_tokens, PREFILL_CHUNK):
            rows = min(PREFILL_CHUNK, num_tokens - begin)
            # Half of a chunk's own tokens lie before a token of it, on average.
            attended, end = begin + rows / 2, begin + rows
            seconds += self._target_overhead_s
            seconds += self._matrix_s(target.num_layers * target.layer_weights, rows)
            seconds += self._exchange_s(rows, 2 * target.num_layers)
            seconds += self._roofline_s(
                end * target.kv_elements * self._kv_bytes / self._kv_ranks(target.num_kv_heads),
                4 * target.num_layers * target.num_heads * target.head_dim * rows * attended / self.tensor_parallel,
            )
            if drafter is not None:
                seconds += self._matrix_s(drafter.update_weights, rows)
                if drafter.kind == EAGLE3:
                    seconds += self._roofline_s(
                        end * drafter.kv_bytes(self._kv_bytes) / self._kv_ranks(drafter.num_kv_heads),
                        4 * drafter.num_heads * drafter.head_dim * rows * attended / self.tensor_parallel,
                    )
        return seconds

    def request_bytes(self, num_tokens: int, speculative: bool) -> float:
        """Return the bytes per device that a request's keys and values take, the drafter's included if it drafts."""
        found = self.target.kv_elements * self._kv_bytes / self._kv_ranks(self.target.num_kv_heads)
        if speculative and self.drafter is not None:
            found += self.drafter.kv_bytes(self._kv_bytes) / self._kv_ranks(self.drafter.num_kv_heads)
        return num_tokens * found

    def capacity(self, num_tokens: int, speculative: bool) -> int:
        """Return how many requests of so many tokens fit beside the weights; 0 where none does.

        Args:
            num_tokens: of each request, from 1.
            speculative: whether the drafter and its keys and values lie there too.
        """
        weights = self.target.stored_weights
        if speculative and self.drafter is not None:
            weights += self.drafter.stored_weights
        free = MEMORY_FILLED * self.hardware.memory_bytes - weights * self._weight_bytes / self.tensor_parallel
        return max(0, int(free // self.request_bytes(num_tokens, speculative)))


@lru_cache(maxsize=4096)
def _entries(drafter: DrafterShape, context: int) -> int:
    return drafter.attended(context)
