"""One engine, one setting, some prompts: what is asked for and what comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from qm_spec.bench.engine.metrics import DraftCounts


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the target's token ids.

    Args:
        category: task that it belongs to, None where the prompts have none.
        arrival_s: second of the trace at which it is handed in, None for "as soon as there is room".
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    category: str | None = None
    arrival_s: float | None = None


@dataclass(frozen=True)
class EngineSpec:
    """What decides a vLLM engine; shards with equal specs may share one.

    Args:
        target: folder of the target model.
        speculative_config: vLLM's own setting of that name, None for plain decoding.
        dtype: vLLM's `dtype`, "auto" included.
        max_model_len: longest sequence in tokens, prompt and output; None for the model's own limit.
        max_num_seqs: most requests in one step.
        enforce_eager: run without compiled or captured graphs.
        seed: of the engine; each request has its own (see `ShardSpec`).
        kv_cache_bytes: size of the KV cache; None leaves it to vLLM.
        gpu_memory_share: of a GPU's memory, for an engine that others share it with; None leaves it to vLLM.
    """

    target: str
    speculative_config: dict[str, Any] | None
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    enforce_eager: bool
    seed: int
    kv_cache_bytes: int | None = None
    gpu_memory_share: float | None = None


@dataclass(frozen=True)
class ShardSpec:
    """A measurement that one call of `evaluate_shard` makes.

    Args:
        engine: the engine that it runs on.
        prompts: decoded in this order.
        max_tokens: output tokens of every prompt; end-of-text tokens do not stop it unless `stop_at_eos`.
        temperature: 0 for greedy decoding.
        concurrency: requests kept in flight.
        seed: request i samples with `seed + i`, whatever the method and the pass.
        repeats: measured passes over all prompts; 0 for a warm-up alone.
        stop_at_eos: end an output at an end-of-text token, too.
        warm_up: decode a few tokens first, which are not measured.
    """

    engine: EngineSpec
    prompts: tuple[TokenPrompt, ...]
    max_tokens: int
    temperature: float
    concurrency: int
    seed: int
    repeats: int
    stop_at_eos: bool = False
    warm_up: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ShardSpec:
        """Return the spec that `to_json` wrote."""
        prompts = tuple(TokenPrompt(**{**row, "token_ids": tuple(row["token_ids"])}) for row in fields["prompts"])
        return cls(**{**fields, "engine": EngineSpec(**fields["engine"]), "prompts": prompts})


def split_shard(spec: ShardSpec, num_parts: int) -> list[ShardSpec]:
    """Cut a shard's prompts into contiguous parts that one engine each measures.

    The parts' sizes differ by at most one, and every request keeps its own sampling seed. Times of arrival begin at 0
    in each part, so each engine sees the traffic of the trace.

    Args:
        num_parts: how many; as many as there are prompts if that is less.

    Raises:
        ValueError: `num_parts` is below 1.
    """
    if num_parts < 1:
        raise ValueError(f"split_shard: num_parts must be at least 1, got {num_parts}")
    num_parts = min(num_parts, len(spec.prompts))
    bounds = [number * len(spec.prompts) // num_parts for number in range(num_parts + 1)]
    return [
        replace(spec, prompts=_from_start(spec.prompts[begin:end]), seed=spec.seed + begin)
        for begin, end in pairwise(bounds)
    ]


def _from_start(prompts: tuple[TokenPrompt, ...]) -> tuple[TokenPrompt, ...]:
    begin = min((one.arrival_s for one in prompts if one.arrival_s is not None), default=0.0)
    return tuple(one if one.arrival_s is None else replace(one, arrival_s=one.arrival_s - begin) for one in prompts)


@dataclass(frozen=True)
class RequestResult:
    """One prompt's output.

    Args:
        token_ids: the output.
        num_steps: engine steps that yielded some of them.
        ttft_s: seconds from handing in the request to its first token.
        tpot_s: seconds per further token; None for a single token.
        counts: what vLLM counted for this request.
        arrival_s: when it was handed in, in seconds of its pass.
        finish_reason: vLLM's own: "stop" at an end-of-text token, "length" at the limit; None where it was not asked.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    num_steps: int
    ttft_s: float
    tpot_s: float | None
    counts: DraftCounts = field(default_factory=DraftCounts)
    arrival_s: float | None = None
    finish_reason: str | None = None

    @property
    def latency_s(self) -> float:
        """Seconds from handing in the request to its last token."""
        return self.ttft_s + (self.tpot_s or 0.0) * (len(self.token_ids) - 1)


@dataclass(frozen=True)
class PassResult:
    """All prompts decoded once.

    Args:
        elapsed_s: wall time of the engine; a sum of engine seconds once shards are merged.
        counts: what vLLM counted during the pass.
        requests: in the order of the prompts.
    """

    elapsed_s: float
    counts: DraftCounts
    requests: tuple[RequestResult, ...]

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all outputs."""
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def num_steps(self) -> int:
        """Steps of all requests; requests of one batch count each their own."""
        return sum(request.num_steps for request in self.requests)

    @property
    def output_tokens_per_s(self) -> float:
        """Throughput over all requests."""
        return self.num_output_tokens / self.elapsed_s

    @property
    def outputs(self) -> list[tuple[int, ...]]:
        """Token ids of every request."""
        return [request.token_ids for request in self.requests]


@dataclass(frozen=True)
class ShardResult:
    """What `evaluate_shard` measured.

    Args:
        device: vLLM's device type, such as "cpu" or "cuda".
        dtype: of the target's weights as the engine resolved it, such as "float32".
        passes: one per repeat.
    """

    device: str
    dtype: str
    passes: tuple[PassResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ShardResult:
        """Return the result that `to_json` wrote."""
        return cls(fields["device"], fields["dtype"], tuple(_pass_from_json(row) for row in fields["passes"]))


def _pass_from_json(fields: dict[str, Any]) -> PassResult:
    requests = tuple(
        RequestResult(**{**row, "token_ids": tuple(row["token_ids"]), "counts": _counts_from_json(row["counts"])})
        for row in fields["requests"]
    )
    return PassResult(fields["elapsed_s"], _counts_from_json(fields["counts"]), requests)


def _counts_from_json(fields: dict[str, Any]) -> DraftCounts:
    return DraftCounts(**{**fields, "accepted_per_position": tuple(fields["accepted_per_position"])})
