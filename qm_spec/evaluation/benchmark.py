"""A comparison of speculation methods: one engine process each, one after the other, same prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qm_spec.discovery import check_drafter, find_drafter
from qm_spec.evaluation.environment import default_device, describe_environment
from qm_spec.evaluation.methods import (
    DEFAULT_SPECULATIVE_TOKENS,
    method_environment,
    speculative_config,
    without_far_memory,
)
from qm_spec.evaluation.process import ENGINE_COMMAND, EngineError, run_engine
from qm_spec.evaluation.prompts import cut_prompts, prompts_file, read_prompts, sha256_of, tokenize_prompts
from qm_spec.evaluation.results import SCHEMA_VERSION, run_record, write_results
from qm_spec.evaluation.settings import (
    BUILTIN,
    DRAFTER_METHODS,
    FIND_DRAFT,
    REFERENCE_METHOD,
    UNCOMPILED_METHOD,
    WINDOW_METHOD,
    BenchmarkSettings,
)
from qm_spec.evaluation.shards import EngineSpec, ShardResult, ShardSpec, TokenPrompt
from qm_spec.ops.backend import backend
from qm_spec.provenance import command, git_commit

# Slowest to fastest pass; a quiet machine stays well below.
NOISY_SPREAD = 1.2

_BUILTIN_PROMPTS = 8
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]

# Called with the method, what it is doing, and the requests that are finished and expected.
ProgressCallback = Callable[[str, str, int, int], None]


class Benchmark:
    """Prepares a comparison, so that bad input is refused before an engine starts, and runs it.

    Attributes:
        results: what `results.json` holds so far.
        notes: sentences about the results that a reader must know.

    Raises:
        FileNotFoundError: a drafter is missing.
        ValueError: a prompt is too short or too long, a row of prompts is malformed, or the drafter
            does not fit.
    """

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings = settings
        self.device = default_device()
        self.dtype = "float32" if (settings.dtype, self.device) == ("auto", "cpu") else settings.dtype
        self.notes: list[str] = []
        if settings.adds_reference:
            self.notes.append(f"{REFERENCE_METHOD} runs as well: speedup and lossless are relative to it")
        if self.device == "cpu" and settings.temperature > 0 and "ngram" in settings.methods:
            self.notes.append(
                "vLLM 0.32 verifies ngram's drafts on the CPU with uninitialised temperatures (vllm issue 55005): "
                "at a temperature above 0 its output is not the target's, nor is its acceptance"
            )
        operators = backend(self.device)
        if UNCOMPILED_METHOD in settings.methods and operators == "reference":
            self.notes.append(f"the kernels were not built, so qm_spec is the same as {UNCOMPILED_METHOD}")
        self.drafter: Path | None = None
        self.num_speculative_tokens = settings.num_speculative_tokens or DEFAULT_SPECULATIVE_TOKENS
        if set(settings.methods) & set(DRAFTER_METHODS):
            named = settings.draft
            self.drafter = find_drafter(settings.target) if named == FIND_DRAFT else Path(named)
            self.num_speculative_tokens = check_drafter(self.drafter, settings.target, settings.num_speculative_tokens)
        self.model_length = _model_length(settings.target)
        self.shard_prompts = self._prompts()
        self.results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "environment": {**describe_environment(), "dtype": self.dtype, "operators": operators},
            "command": command(),
            "provenance": {
                "commit": git_commit(),
                "seed": settings.seed,
                "prompts": BUILTIN if settings.prompts == BUILTIN else Path(settings.prompts).name,
                "prompts_sha256": sha256_of(prompts_file(settings.prompts)),
                "prompt_ids": [prompt.prompt_id for prompt in self.shard_prompts[0]],
                "repeats": settings.repeats,
            },
            "runs": [],
            "failures": [],
        }

    def _prompts(self) -> list[tuple[TokenPrompt, ...]]:
        from transformers import AutoTokenizer

        settings = self.settings
        num_prompts = settings.num_prompts
        if num_prompts is None and settings.prompts == BUILTIN:
            num_prompts = _BUILTIN_PROMPTS
        prompts = read_prompts(prompts_file(settings.prompts), num_prompts)
        whole = tokenize_prompts(prompts, AutoTokenizer.from_pretrained(settings.target))
        limit = self.model_length
        cut = [cut_prompts(whole, length) for length in settings.prompt_lengths]
        for prompt in (prompt for one in cut for prompt in one):
            needed = len(prompt.token_ids) + settings.max_tokens
            if limit is not None and needed > limit:
                raise ValueError(
                    f"prompts: prompt and max_tokens must fit the target's {limit} tokens, got "
                    f"{len(prompt.token_ids)} + {settings.max_tokens} in prompt {prompt.prompt_id}; "
                    "lower context_lengths or max_tokens"
                )
        return cut

    def _shards(self, method: str, drafter: Path | None) -> list[ShardSpec]:
        settings = self.settings
        longest = max(len(prompt.token_ids) for prompts in self.shard_prompts for prompt in prompts)
        # Room for a last draft past the last token, where the model has it.
        needed = longest + settings.max_tokens + self.num_speculative_tokens + 1
        engine = EngineSpec(
            target=str(settings.target),
            speculative_config=speculative_config(method, self.num_speculative_tokens, drafter),
            dtype=self.dtype,
            max_model_len=min(needed, self.model_length or needed),
            max_num_seqs=settings.concurrency,
            # Compiling takes longer than a measurement on CPU; GPU users serve with graphs.
            enforce_eager=self.device == "cpu",
            seed=settings.seed,
        )
        return [
            ShardSpec(
                engine=engine,
                prompts=prompts,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                concurrency=settings.concurrency,
                seed=settings.seed,
                repeats=settings.repeats,
            )
            for prompts in self.shard_prompts
        ]

    def run(self, on_progress: ProgressCallback, engine_command: Sequence[str] = ENGINE_COMMAND) -> dict[str, Any]:
        """Measure every method and return the results; they are on disk after each setting.

        A method whose engine fails is listed under `failures`, and the others go on. An interruption
        ends the engine and keeps what was measured; the plots are drawn of what there is.
        """
        settings = self.settings
        (settings.out / "logs").mkdir(parents=True, exist_ok=True)
        for name in ("acceptance.png", "speedup.png"):
            (settings.out / name).unlink(missing_ok=True)
        write_results(settings.out, self.results)
        references: dict[int, ShardResult] = {}
        try:
            for method in settings.ordered_methods:
                with tempfile.TemporaryDirectory(prefix="qm_spec-") as folder:
                    self._measure(method, Path(folder), references, on_progress, engine_command)
        finally:
            if self.results["runs"]:
                from qm_spec.evaluation.plots import write_plots

                write_plots(self.results["runs"], settings.out)
        return self.results

    def _measure(
        self,
        method: str,
        folder: Path,
        references: dict[int, ShardResult],
        on_progress: ProgressCallback,
        engine_command: Sequence[str],
    ) -> None:
        settings = self.settings
        drafter = used = self.drafter if method in DRAFTER_METHODS else None
        if method == WINDOW_METHOD and drafter is not None:
            used = without_far_memory(drafter, folder / "drafter")
        shards = self._shards(method, used)
        per_shard = settings.repeats * len(shards[0].prompts)
        total = per_shard * len(shards)

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "ready":
                on_progress(method, "warming up", 0, total)
            elif event["event"] == "progress":
                context = settings.prompt_lengths[event["shard"]]
                state = f"decoding at {context} tokens of context" if context else "decoding"
                on_progress(method, state, per_shard * event["shard"] + event["done"], total)
            else:
                number, result = event["shard"], ShardResult.from_json(event["result"])
                if method == REFERENCE_METHOD:
                    references[number] = result
                self._keep(method, drafter, number, shards[number], result, references.get(number))

        on_progress(method, "starting the engine", 0, total)
        try:
            run_engine(
                shards,
                folder,
                settings.out / "logs" / f"{method}.log",
                method_environment(method, self.device),
                on_event,
                engine_command,
            )
            on_progress(method, "done", total, total)
        except EngineError as error:
            self.results["failures"].append({"method": method, "error": str(error).partition("\n")[0]})
            self.notes.append(f"{method} failed: {error}")
            write_results(settings.out, self.results)
            on_progress(method, "failed", 0, total)

    def _keep(
        self,
        method: str,
        drafter: Path | None,
        number: int,
        shard: ShardSpec,
        result: ShardResult,
        reference: ShardResult | None,
    ) -> None:
        run = run_record(
            method,
            shard,
            result,
            reference,
            target=_shown(self.settings.target),
            draft=_shown(drafter) if drafter else None,
            context_cut=self.settings.prompt_lengths[number] is not None,
        )
        if run["repeats_identical"] is False:
            self.notes.append(
                f"{method} at {run['context_tokens']} tokens of context put out different tokens when "
                "repeated; its numbers are those of the median pass"
            )
        speeds = run["output_tokens_per_s_per_pass"]
        if max(speeds) > NOISY_SPREAD * min(speeds):
            self.notes.append(
                f"{method} at {run['context_tokens']} tokens of context ran at {min(speeds):.1f} to "
                f"{max(speeds):.1f} tokens/s; the machine was busy, so its speedup is uncertain"
            )
        self.results["environment"]["dtype"] = run["dtype"]
        self.results["runs"].append(run)
        write_results(self.settings.out, self.results)


def _model_length(target: Path) -> int | None:
    """Return the longest sequence of a model in tokens, or None where its config names none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _shown(path: Path) -> str:
    """Return a path below the package's own root without the root, which differs from machine to machine."""
    resolved = path.resolve()
    return str(resolved.relative_to(_PACKAGE_ROOT) if resolved.is_relative_to(_PACKAGE_ROOT) else path)
