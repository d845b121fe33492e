"""Answers through transformers where vLLM is not installed; run as a module, it is the process of one engine.

It takes the jobs and tells the events of `qm_spec.bench.engine.worker`, in batches of `concurrency` requests.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.bench.engine.process import end_with_parent
from qm_spec.bench.engine.shards import EngineSpec, PassResult, RequestResult, ShardResult, ShardSpec, TokenPrompt
from qm_spec.bench.engine.worker import OnProgress, main

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

TRANSFORMERS_COMMAND = (sys.executable, "-m", "qm_spec.bench.engine.transformers_worker")


@dataclass
class SeededNoise:
    """A logits processor by which greedy decoding samples: the argmax of logits with Gumbel noise is a sample.

    Each request draws from a generator of its own, so its noise does not depend on the others of its batch.

    Args:
        temperature: above 0.
        generators: on the CPU, one for each request of the batch.
    """

    temperature: float
    generators: Sequence[torch.Generator]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `[B, V]` float32: the logits `scores` over the temperature, with noise."""
        import torch

        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            # Minus the logarithm of an exponential number is a Gumbel number.
            row.exponential_(generator=generator).log_().neg_()
        return scores.float() / self.temperature + noise.to(scores.device)


def open_target(spec: EngineSpec) -> PreTrainedModel:
    """Return the target in its dtype, on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(spec.target, dtype=spec.dtype).to(device).eval()


def answer_shard(spec: ShardSpec, target: PreTrainedModel, on_progress: OnProgress) -> ShardResult:
    """Answer a shard's prompts; what comes back has no times of single tokens."""
    begin = time.perf_counter()
    results: dict[int, RequestResult] = {}
    num_tokens = 0
    # Of like lengths, so that little is padded.
    numbers = iter(sorted(range(len(spec.prompts)), key=lambda number: len(spec.prompts[number].token_ids)))
    while batch := list(islice(numbers, spec.concurrency)):
        started = time.perf_counter()
        prompts = [spec.prompts[number] for number in batch]
        outputs = _generate(spec, target, prompts, [spec.seed + number for number in batch])
        elapsed_s = time.perf_counter() - started
        for number, prompt, (token_ids, reason) in zip(batch, prompts, outputs, strict=True):
            num_steps = len(token_ids)
            results[number] = RequestResult(
                prompt.prompt_id, token_ids, num_steps, elapsed_s, None, finish_reason=reason
            )
            num_tokens += num_steps
        on_progress(len(results), len(spec.prompts), num_tokens)
    ordered = tuple(results[number] for number in range(len(spec.prompts)))
    dtype = str(target.dtype).removeprefix("torch.")
    return ShardResult(
        target.device.type, dtype, (PassResult(time.perf_counter() - begin, DraftCounts(), ordered),) * spec.repeats
    )


def _generate(
    spec: ShardSpec, target: PreTrainedModel, prompts: Sequence[TokenPrompt], seeds: Sequence[int]
) -> list[tuple[tuple[int, ...], str]]:
    """Return each prompt's output, its end token included, and why it ended."""
    import torch
    from transformers import GenerationConfig

    length = max(len(prompt.token_ids) for prompt in prompts)
    token_ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, length - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, length - len(prompt.token_ids) :] = 1
    ends = target.generation_config.eos_token_id if spec.stop_at_eos else None
    # A config of its own, without the penalties and sampling settings that a model may bring.
    config = GenerationConfig(
        max_new_tokens=spec.max_tokens, do_sample=False, use_cache=True, eos_token_id=ends, pad_token_id=0
    )
    processors: list[Any] = []
    if spec.temperature:
        processors.append(SeededNoise(spec.temperature, [torch.Generator().manual_seed(seed) for seed in seeds]))
    with torch.inference_mode():
        output = target.generate(
            token_ids.to(target.device),
            attention_mask=mask.to(target.device),
            generation_config=config,
            logits_processor=processors,
        )
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return [_until_end(row, stops) for row in output[:, length:].tolist()]


def _until_end(token_ids: Sequence[int], stops: set[int]) -> tuple[tuple[int, ...], str]:
    for place, token_id in enumerate(token_ids):
        if token_id in stops:
            return tuple(token_ids[: place + 1]), "stop"
    return tuple(token_ids), "length"


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]), open_target, answer_shard)
