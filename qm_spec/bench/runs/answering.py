"""A data set of a target's own answers: prompts in, shards of token ids out, through vLLM or transformers."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qm_spec.bench.engine.jobs import Event, run_jobs, share_jobs
from qm_spec.bench.engine.process import ENGINE_COMMAND
from qm_spec.bench.engine.ray_runner import RayRunner
from qm_spec.bench.engine.shards import EngineSpec, ShardResult, ShardSpec, TokenPrompt, split_shard
from qm_spec.bench.engine.transformers_worker import TRANSFORMERS_COMMAND
from qm_spec.bench.environment import default_device
from qm_spec.bench.methods import REFERENCE_METHOD
from qm_spec.bench.settings import AnswerSettings
from qm_spec.bench.workloads.prompts import sha256_of
from qm_spec.data.chat import chat_token_ids, write_chat
from qm_spec.data.json_lines import Row, find_row_files, read_rows, write_rows
from qm_spec.data.prompt_rows import Prompt, own_id, prompt_from_row
from qm_spec.discovery import target_fingerprint
from qm_spec.provenance import FILE as PROVENANCE
from qm_spec.provenance import command, git_commit, versions, write_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts that reach the disk together, a few rounds of those in flight. It is no setting, so that every number of
# requests in flight and of actors can go on with what another one began.
SHARD_SIZE = 256


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        done: prompts that are answered, those of an earlier run among them.
        total: all prompts.
        tokens_per_s: output tokens of this run's finished answers per second since its first engine was ready.
        left_s: seconds that the rest will take at this run's rate; None before its first answer.
    """

    done: int
    total: int
    tokens_per_s: float
    left_s: float | None


@dataclass
class _Meter:
    """Counts of a run, by its shards' numbers."""

    earlier: int
    total: int
    clock: Callable[[], float] = time.monotonic
    begin: float | None = None
    done: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def start(self) -> None:
        self.begin = self.clock() if self.begin is None else self.begin

    def read(self) -> Progress:
        elapsed_s = self.clock() - self.begin if self.begin is not None else 0.0
        here = sum(self.done.values())
        left = self.total - self.earlier - here
        return Progress(
            self.earlier + here,
            self.total,
            sum(self.tokens.values()) / elapsed_s if elapsed_s else 0.0,
            left * elapsed_s / here if here else None,
        )


class Answering:
    """Reads the prompts, so that a broken file is refused before an engine starts, and lets the target answer them.

    The prompts are answered in the order of a hash of their tokens, greedy and sampled ones in shards of their own
    that take turns: what an interrupted run leaves is a mixture of all files and of both.

    Attributes:
        skipped: a message for each row that is left out before an engine starts.
        num_duplicates: prompts that stood there before.
        num_prompts: prompts to answer.
        engine: "vllm", or "transformers" where that is missing.
        failures: messages about the engines that ended early.

    Raises:
        ValueError: a line holds no prompt, the target has no chat template, no prompt is left, or `out` holds another
            data set.
        FileNotFoundError: a file of prompts is not there.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.settings = settings
        self.skipped: list[str] = []
        self.num_duplicates = 0
        self.failures: list[str] = []
        self.engine = "vllm" if find_spec("vllm") else "transformers"
        ray = settings.ray
        self._device = default_device() if ray is None else "cuda" if ray.num_gpus else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(settings.target)
        if not (settings.plain_text or self._tokenizer.chat_template):
            raise ValueError(
                f"target: {settings.target} must have a chat template, its tokenizer has none; put it there as "
                "chat_template.jinja, or pass --plain-text to let the target go on with the prompts' text"
            )
        config = AutoConfig.from_pretrained(settings.target).get_text_config()
        self._limit: int | None = getattr(config, "max_position_embeddings", None)
        files = find_row_files(settings.prompts)
        prompts = self._read(files)
        self.num_prompts = len(prompts)
        if not prompts:
            reasons = "; ".join(self.skipped[:3]) or "the files have no rows"
            raise ValueError(f"prompts: at least one must be left to answer, got none: {reasons}")
        self._shards = self._split(prompts)
        self._stage = self._described(files)
        self._check_out()

    def _read(self, files: Sequence[Path]) -> list[TokenPrompt]:
        """Return the prompts in the order of their hashes."""
        found: dict[bytes, TokenPrompt] = {}
        seen: Counter[str] = Counter()
        on_bad = self.skipped.append if self.settings.skip_bad_lines else None
        for file in files:
            for number, row in read_rows(file, on_bad):
                place = f"{file}:{number}"
                try:
                    prompt = prompt_from_row(row, number, place)
                except ValueError as error:
                    if on_bad is None:
                        raise
                    on_bad(str(error))
                    continue
                try:
                    token_ids = self._token_ids(prompt, self._tokenizer)
                except ValueError as error:
                    self.skipped.append(f"{place}: {error}")
                    continue
                assert prompt is not None
                digest = hashlib.sha256(np.asarray(token_ids, dtype=np.int64).tobytes()).digest()
                if digest in found:
                    self.num_duplicates += 1
                    continue
                name = own_id(row) or f"{file.name}:{number}"
                seen[name] += 1
                prompt_id = name if seen[name] == 1 else f"{name}#{seen[name]}"
                found[digest] = TokenPrompt(prompt_id, token_ids, prompt.category)
        ordered = sorted(found.items())
        self._num_greedy = sum(self._is_greedy(digest) for digest, _ in ordered)
        # Python's sort is stable: within each half the order of the hashes stays.
        return [prompt for _, prompt in sorted(ordered, key=lambda one: not self._is_greedy(one[0]))]

    def _is_greedy(self, digest: bytes) -> bool:
        # The last bytes: the first ones decide the order.
        return int.from_bytes(digest[-8:], "big") < self.settings.greedy_share * 2**64

    def _token_ids(self, prompt: Prompt | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        if prompt is None:
            raise ValueError("the conversation must have a turn that asks, got none")
        messages, text = prompt.messages, prompt.text
        if messages is None and text is None:
            raise ValueError("the prompt must have a text, got only a length")
        if self.settings.plain_text:
            text = text or "\n\n".join(str(one["content"]) for one in messages or ())
            token_ids = tuple(tokenizer(text, verbose=False)["input_ids"])
        else:
            written = write_chat(messages or ({"role": "user", "content": text},), tokenizer, ask=True)
            token_ids = tuple(chat_token_ids(written, tokenizer))
        length, max_tokens = len(token_ids), self.settings.max_tokens
        if not length:
            raise ValueError("the prompt must have a token, got none")
        if self._limit is not None and length + max_tokens > self._limit:
            raise ValueError(
                f"prompt and max_tokens must fit the target's {self._limit} tokens, got {length} + {max_tokens}"
            )
        return token_ids

    def _split(self, prompts: Sequence[TokenPrompt]) -> list[ShardSpec]:
        """Return shards of greedy and of sampled requests, in turns."""
        settings = self.settings
        engine = EngineSpec(
            # An actor need not run in this process's folder.
            target=str(settings.target.absolute()),
            speculative_config=None,
            dtype=settings.dtype,
            max_model_len=max(len(prompt.token_ids) for prompt in prompts) + settings.max_tokens,
            max_num_seqs=settings.concurrency,
            enforce_eager=self._device == "cpu",
            seed=settings.seed,
        )
        placed: list[tuple[float, ShardSpec]] = []
        halves = ((0.0, prompts[: self._num_greedy]), (settings.temperature, prompts[self._num_greedy :]))
        for temperature, part in halves:
            if not part:
                continue
            whole = ShardSpec(
                engine=engine,
                prompts=tuple(part),
                max_tokens=settings.max_tokens,
                # A step with sampled requests draws random numbers for all of its requests and the whole vocabulary.
                temperature=temperature,
                concurrency=settings.concurrency,
                seed=settings.seed,
                repeats=1,
                stop_at_eos=True,
                warm_up=False,
            )
            shards = split_shard(whole, math.ceil(len(part) / SHARD_SIZE))
            placed += [((number + 0.5) / len(shards), shard) for number, shard in enumerate(shards)]
        return [shard for _, shard in sorted(placed, key=lambda one: (one[0], one[1].temperature))]

    def _described(self, files: Sequence[Path]) -> dict[str, Any]:
        settings = self.settings
        return {
            "stage": "answers",
            "command": command(),
            "commit": git_commit(),
            "versions": versions(),
            "engine": self.engine,
            "target": settings.target.name,
            "target_fingerprint": target_fingerprint(settings.target),
            "inputs": [{"file": file.name, "sha256": sha256_of(file)} for file in files],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "greedy_share": settings.greedy_share,
            "seed": settings.seed,
            "dtype": settings.dtype,
            "plain_text": settings.plain_text,
            "num_prompts": self.num_prompts,
            "num_greedy": self._num_greedy,
            "num_duplicates": self.num_duplicates,
            "num_shards": len(self._shards),
            "skipped": self.skipped,
        }

    def _check_out(self) -> None:
        """Refuse to write over answers, and to go on with those of other settings."""
        out = self.settings.out
        # A run that was ended before its record was whole leaves half of one.
        if not out.exists() or all(file.name == f"{PROVENANCE}.partial" for file in out.iterdir()):
            return
        file = out / PROVENANCE
        if not file.is_file():
            raise ValueError(f"out: {out} must be empty or a data set, got a folder of other files; pass another")
        if not self.settings.resume:
            raise ValueError(f"out: {out} holds answers; go on with them by --resume, or pass another folder")
        earlier = json.loads(file.read_text(encoding="utf-8"))["stages"][-1]
        deciding = (
            *("target_fingerprint", "inputs", "max_tokens", "temperature", "greedy_share", "seed", "dtype"),
            *("plain_text", "num_prompts", "num_shards"),
        )
        for name in deciding:
            if earlier.get(name) != self._stage[name]:
                raise ValueError(
                    f"out: {out} was begun with {name} {earlier.get(name)}, got {self._stage[name]}; give the same "
                    "settings and prompts to go on, or another folder"
                )

    def _file(self, number: int) -> Path:
        return self.settings.out / f"answers-{number:05d}.jsonl.xz"

    def run(
        self, on_progress: Callable[[Progress], None], engine_command: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Answer the prompts that have no answer yet; a shard is on the disk whole or not at all.

        Args:
            on_progress: told of each finished answer.
            engine_command: of the engines; None for vLLM's or transformers'.

        Returns:
            What stands in the data set's record: its settings and counts.

        Raises:
            OSError: a shard cannot be written; those before it stay.
        """
        settings, shards = self.settings, self._shards
        engine_command = engine_command or (ENGINE_COMMAND if self.engine == "vllm" else TRANSFORMERS_COMMAND)
        logs = settings.out / "logs"
        # What stands there from an earlier run stays until this one has come to an end.
        earlier = settings.out if (settings.out / PROVENANCE).is_file() else None
        if earlier is None:
            # Before anything else: a folder without a record would be taken for somebody else's.
            write_stage(settings.out, self._stage)
        logs.mkdir(exist_ok=True)
        missing = [number for number in range(len(shards)) if not self._file(number).exists()]
        num_jobs = settings.ray.num_actors if settings.ray else 1
        jobs, places = share_jobs(shards, missing, num_jobs, REFERENCE_METHOD, self._device)
        meter = _Meter(self.num_prompts - sum(len(shards[one].prompts) for one in missing), self.num_prompts)

        def on_event(job: int, event: Event) -> None:
            if event["event"] == "ready":
                meter.start()
            elif event["event"] == "progress":
                number = places[job][event["shard"]]
                meter.done[number], meter.tokens[number] = event["done"], event["num_tokens"]
            elif event["event"] == "result":
                number = places[job][event["shard"]]
                result = ShardResult.from_json(event["result"])
                self._save(number, self._rows(shards[number], result))
                meter.done[number] = len(shards[number].prompts)
                meter.tokens[number] = result.passes[0].num_output_tokens
            elif event["event"] == "failed":
                self.failures.append(event["error"])
            on_progress(meter.read())

        try:
            if settings.ray is None:
                run_jobs(jobs, logs, on_event, engine_command)
            elif jobs:
                with RayRunner(settings.ray) as runner:
                    runner.run_jobs(jobs, logs, on_event, engine_command)
        except KeyboardInterrupt:
            self._record(earlier)
            raise
        self._record(earlier)
        if not self.failures:
            shutil.rmtree(logs)
        return self._stage

    def _record(self, earlier: Path | None) -> None:
        """Write the counts of what is on the disk, whichever run wrote it, behind the earlier runs' records."""
        self._stage.update(self._counts())
        write_stage(self.settings.out, self._stage, earlier)

    def _rows(self, shard: ShardSpec, result: ShardResult) -> list[Row]:
        rows = []
        for place, (prompt, request) in enumerate(zip(shard.prompts, result.passes[0].requests, strict=True)):
            token_ids = list(request.token_ids)
            if self._tokenizer.decode(token_ids, skip_special_tokens=True).strip():
                rows.append(
                    {
                        "id": prompt.prompt_id,
                        "category": prompt.category,
                        "prompt_token_ids": list(prompt.token_ids),
                        "output_token_ids": token_ids,
                        "finish_reason": request.finish_reason,
                        "temperature": shard.temperature,
                        "seed": shard.seed + place if shard.temperature else None,
                    }
                )
        return rows

    def _save(self, number: int, rows: Sequence[Row]) -> None:
        try:
            write_rows(self._file(number), rows)
        except OSError as error:
            finished = sum(self._file(one).exists() for one in range(len(self._shards)))
            raise OSError(
                error.errno,
                f"{self._file(number)} could not be written ({error.strerror}); the {finished} finished shards of "
                f"{len(self._shards)} stay: make room and go on with --resume",
            ) from error

    def _counts(self) -> dict[str, Any]:
        counts = Counter[str]()
        empty: list[str] = []
        for number, shard in enumerate(self._shards):
            if not self._file(number).exists():
                continue
            counts["finished_shards"] += 1
            rows = [row for _, row in read_rows(self._file(number))]
            answered = {row["id"] for row in rows}
            empty += [prompt.prompt_id for prompt in shard.prompts if prompt.prompt_id not in answered]
            counts["num_answers"] += len(rows)
            counts["num_answer_tokens"] += sum(len(row["output_token_ids"]) for row in rows)
            counts["num_cut_at_max_tokens"] += sum(row["finish_reason"] == "length" for row in rows)
        names = ("finished_shards", "num_answers", "num_answer_tokens", "num_cut_at_max_tokens")
        return {**{name: counts[name] for name in names}, "empty_answers": empty}
