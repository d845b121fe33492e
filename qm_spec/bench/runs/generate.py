"""Offline generation: a file of prompts in, a file of outputs in the same order out, speculation and Ray in between."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qm_spec.bench.engine.jobs import Event, run_jobs, share_jobs
from qm_spec.bench.engine.process import ENGINE_COMMAND
from qm_spec.bench.engine.ray_runner import RayRunner
from qm_spec.bench.engine.shards import (
    EngineSpec,
    RequestResult,
    ShardResult,
    ShardSpec,
    TokenPrompt,
    split_shard,
)
from qm_spec.bench.engine.store import ShardStore
from qm_spec.bench.environment import default_device
from qm_spec.bench.methods import OURS, find_method
from qm_spec.bench.settings import FIND_DRAFT, GenerationSettings
from qm_spec.bench.workloads.prompts import tokenize_prompts
from qm_spec.data.json_lines import read_rows
from qm_spec.data.prompt_rows import prompt_from_row
from qm_spec.discovery import check_drafter, find_drafter
from qm_spec.drafter.suffix_index import MOST_LIKELY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts that reach the disk together: several rounds of those in flight, so that few engines run dry.
_ROUNDS_PER_SHARD = 8
_MIN_SHARD = 16


class Generation:
    """Reads the prompts, so that a broken file is refused before an engine starts, and generates.

    A row that holds no prompt, or one that the target has no room for, gets a row with an `error` in its place, and
    so do prompts whose engine fails.

    Attributes:
        num_errors: rows with an error so far.

    Raises:
        ValueError: a line of the input is not a JSON object, or the drafter does not fit.
        FileNotFoundError: there is no drafter.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.settings = settings
        ray = settings.ray
        self._device = default_device() if ray is None else "cuda" if ray.num_gpus else "cpu"
        drafter = None
        if find_method(settings.method).drafter == OURS:
            drafter = find_drafter(settings.target) if settings.draft == FIND_DRAFT else Path(settings.draft)
            check_drafter(drafter, settings.target, settings.num_speculative_tokens)
        self._tokenizer = AutoTokenizer.from_pretrained(settings.target)
        config = AutoConfig.from_pretrained(settings.target).get_text_config()
        self._limit: int | None = getattr(config, "max_position_embeddings", None)
        # One of the two for every row of the input.
        self._ids: list[str] = []
        self._errors: dict[int, str] = {}
        prompts: list[TokenPrompt] = []
        for place, (number, row) in enumerate(read_rows(settings.input)):
            self._ids.append(str(row.get("id", number)))
            try:
                token_ids = self._token_ids(row, number, self._tokenizer)
            except ValueError as error:
                self._errors[place] = str(error)
            else:
                prompts.append(TokenPrompt(str(place), token_ids))
        self._shards = self._split(prompts, drafter) if prompts else []

    @property
    def num_errors(self) -> int:
        """Rows that have no output."""
        return len(self._errors)

    @property
    def num_rows(self) -> int:
        """Rows of the input."""
        return len(self._ids)

    def _token_ids(self, row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        prompt = prompt_from_row(row, number, f"{self.settings.input}:{number}")
        if prompt is None:
            raise ValueError("the conversation must have a turn of the person, got none")
        (tokenized,) = tokenize_prompts([prompt], tokenizer)
        length, max_tokens = len(tokenized.token_ids), self.settings.max_tokens
        if not length:
            raise ValueError("the prompt must have a token, got none")
        if self._limit is not None and length + max_tokens > self._limit:
            raise ValueError(
                f"prompt and max_tokens must fit the target's {self._limit} tokens, got {length} + {max_tokens}"
            )
        return tokenized.token_ids

    def _split(self, prompts: Sequence[TokenPrompt], drafter: Path | None) -> list[ShardSpec]:
        """Return shards that do not depend on the number of actors, so that another number can resume."""
        settings = self.settings
        depth = settings.num_speculative_tokens
        needed = max(len(prompt.token_ids) for prompt in prompts) + settings.max_tokens + (depth or MOST_LIKELY) + 1
        engine = EngineSpec(
            # An actor need not run in this process's folder.
            target=str(settings.target.absolute()),
            speculative_config=find_method(settings.method).speculative_config(depth, drafter),
            dtype=settings.dtype,
            max_model_len=min(needed, self._limit or needed),
            max_num_seqs=settings.concurrency,
            enforce_eager=self._device == "cpu",
            seed=settings.seed,
        )
        whole = ShardSpec(
            engine=engine,
            prompts=tuple(prompts),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            concurrency=settings.concurrency,
            seed=settings.seed,
            repeats=1,
            stop_at_eos=True,
            warm_up=False,
        )
        return split_shard(whole, math.ceil(len(prompts) / max(_MIN_SHARD, _ROUNDS_PER_SHARD * settings.concurrency)))

    def run(self, on_progress: Callable[[int, int], None], engine_command: Sequence[str] = ENGINE_COMMAND) -> Path:
        """Generate, and write the output when every row has its answer.

        Until then finished shards lie in the folder `OUTPUT.parts`, from which `resume` goes on; it stays, with the
        engines' logs, if there were errors of engines.

        Args:
            on_progress: called with the rows that are done and those of the input.
        """
        settings = self.settings
        parts = settings.output.with_name(f"{settings.output.name}.parts")
        store = ShardStore(parts / "shards", resume=settings.resume)
        (parts / "logs").mkdir(exist_ok=True)
        method, device = settings.method, self._device
        stored = [store.load(method, device, shard) for shard in self._shards]
        results = [found[0] if found else None for found in stored]
        missing = [number for number, result in enumerate(results) if result is None]
        num_jobs = settings.ray.num_actors if settings.ray else 1
        jobs, places = share_jobs(self._shards, missing, num_jobs, method, device)
        finished = self.num_errors + sum(len(one.passes[0].requests) for one in results if one)
        under_way: dict[int, int] = {}
        engine_failed = False

        def on_event(job: int, event: Event) -> None:
            nonlocal engine_failed
            if event["event"] == "progress":
                under_way[places[job][event["shard"]]] = event["done"]
            elif event["event"] == "result":
                number = places[job][event["shard"]]
                results[number] = result = ShardResult.from_json(event["result"])
                store.save(method, device, self._shards[number], [result])
                under_way[number] = len(result.passes[0].requests)
            elif event["event"] == "failed":
                engine_failed = True
                for number in (places[job][shard] for shard in event["shards"]):
                    for prompt in self._shards[number].prompts:
                        self._errors[int(prompt.prompt_id)] = event["error"].partition("\n")[0]
            on_progress(finished + sum(under_way.values()), self.num_rows)

        if settings.ray is None:
            run_jobs(jobs, parts / "logs", on_event, engine_command)
        elif jobs:
            with RayRunner(settings.ray) as runner:
                runner.run_jobs(jobs, parts / "logs", on_event, engine_command)
        self._write(results)
        if not engine_failed:
            shutil.rmtree(parts)
        return settings.output

    def _write(self, results: Sequence[ShardResult | None]) -> None:
        found = {
            int(request.prompt_id): (prompt, request)
            for shard, result in zip(self._shards, results, strict=True)
            if result is not None
            for prompt, request in zip(shard.prompts, result.passes[0].requests, strict=True)
        }
        output = self.settings.output
        partial = output.with_name(f"{output.name}.partial")
        with partial.open("w", encoding="utf-8") as stream:
            for place, row_id in enumerate(self._ids):
                answer = self._answer(*found[place]) if place in found else {"error": self._errors[place]}
                stream.write(json.dumps({"id": row_id, **answer}, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(output)

    def _answer(self, prompt: TokenPrompt, request: RequestResult) -> dict[str, Any]:
        token_ids = list(request.token_ids)
        stopped = len(token_ids) < self.settings.max_tokens or token_ids[-1] == self._tokenizer.eos_token_id
        return {
            "text": self._tokenizer.decode(token_ids, skip_special_tokens=True),
            "finish_reason": "stop" if stopped else "length",
            "num_prompt_tokens": len(prompt.token_ids),
            "num_output_tokens": len(token_ids),
            "num_steps": request.num_steps,
            "num_drafts": request.counts.drafts,
            "num_accepted_tokens": request.counts.accepted_tokens,
            "acceptance_rate": request.counts.acceptance_rate,
            "acceptance_length": request.counts.acceptance_length,
        }
