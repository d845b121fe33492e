"""A comparison of speculation methods on the same prompts: planned, measured here or by Ray actors, and recorded."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qm_spec.discovery import check_drafter, find_drafter
from qm_spec.evaluation.environment import default_device, describe_environment
from qm_spec.evaluation.jobs import EngineJob, Event, run_jobs
from qm_spec.evaluation.methods import DEFAULT_SPECULATIVE_TOKENS, speculative_config
from qm_spec.evaluation.plan import Measurement
from qm_spec.evaluation.process import ENGINE_COMMAND
from qm_spec.evaluation.prompts import cut_prompts, sha256_of
from qm_spec.evaluation.ray_runner import RayRunner
from qm_spec.evaluation.recommend import Recommendation, recommend
from qm_spec.evaluation.results import SCHEMA_VERSION, run_record, write_results
from qm_spec.evaluation.settings import (
    BUILTIN,
    DRAFTER_METHODS,
    FIND_DRAFT,
    PLAIN_METHODS,
    REFERENCE_METHOD,
    UNCOMPILED_METHOD,
    BenchmarkSettings,
    Sweep,
)
from qm_spec.evaluation.shards import EngineSpec, ShardResult, ShardSpec, TokenPrompt
from qm_spec.evaluation.statistics import NOISY_SPREAD
from qm_spec.evaluation.store import ShardStore
from qm_spec.evaluation.workloads import WORKLOADS, load_workload, workload_path
from qm_spec.ops.backend import backend
from qm_spec.provenance import command, git_commit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILTIN_PROMPTS = 8
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]

# Called with the engine's name, what it is doing, and the requests that are finished and expected.
ProgressCallback = Callable[[str, str, int, int], None]


class Benchmark:
    """Prepares a comparison, so that bad input is refused before an engine starts, and runs it.

    Attributes:
        results: what `results.json` holds so far.
        recommendation: what to serve with, after a finished sweep.
        notes: sentences about the results that a reader must know.

    Raises:
        FileNotFoundError: a drafter or a workload's file is missing.
        ValueError: a prompt is too short or too long, a row of prompts is malformed, or the drafter
            does not fit.
    """

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings = settings
        ray = settings.ray
        self.device = default_device() if ray is None else "cuda" if ray.num_gpus else "cpu"
        self.dtype = "float32" if (settings.dtype, self.device) == ("auto", "cpu") else settings.dtype
        self.notes: list[str] = []
        if settings.adds_reference:
            self.notes.append(f"{REFERENCE_METHOD} runs as well: speedup and lossless are relative to it")
        if self.device == "cpu" and max(settings.temperatures) > 0 and "ngram" in settings.methods:
            self.notes.append(
                "vLLM 0.32 verifies ngram's drafts on the CPU with uninitialised temperatures (vllm issue 55005): "
                "at a temperature above 0 its output is not the target's, nor is its acceptance"
            )
        operators = backend(self.device)
        if UNCOMPILED_METHOD in settings.methods and operators == "reference":
            self.notes.append(f"the kernels were not built, so qm_spec is the same as {UNCOMPILED_METHOD}")
        self.drafter: Path | None = None
        if set(settings.methods) & set(DRAFTER_METHODS):
            named = settings.draft
            self.drafter = find_drafter(settings.target) if named == FIND_DRAFT else Path(named)
        self.depths = tuple(
            check_drafter(self.drafter, settings.target, depth) if self.drafter else depth or DEFAULT_SPECULATIVE_TOKENS
            for depth in settings.depths
        )
        self.model_length = _model_length(settings.target)
        self._left_out: list[dict[str, Any]] = []
        self.shard_prompts = self._prompts()
        self.results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "environment": {**describe_environment(), "dtype": self.dtype, "operators": operators},
            "command": command(),
            "provenance": {
                "commit": git_commit(),
                "seed": settings.seed,
                "prompts": settings.prompts if settings.prompts in WORKLOADS else Path(settings.prompts).name,
                "prompts_sha256": self._prompts_hash(),
                "prompt_ids": [prompt.prompt_id for prompt in self.shard_prompts[0]],
                "repeats": settings.repeats,
            },
            "runs": [],
            "failures": list(self._left_out),
        }
        self.recommendation: Recommendation | None = None
        self._measurements = self._plan()
        self._recorded: dict[int, dict[str, Any]] = {}

    def _prompts(self) -> list[tuple[TokenPrompt, ...]]:
        from transformers import AutoTokenizer

        settings = self.settings
        workload_path(settings.prompts, settings.data)
        tokenizer = AutoTokenizer.from_pretrained(settings.target)
        return [self._fitting(self._load(tokenizer, length)) for length in settings.prompt_lengths]

    def _load(self, tokenizer: PreTrainedTokenizerBase, length: int | None) -> tuple[TokenPrompt, ...]:
        settings = self.settings
        num_prompts = settings.num_prompts
        if num_prompts is None and settings.prompts == BUILTIN:
            num_prompts = _BUILTIN_PROMPTS
        prompts = load_workload(
            settings.prompts,
            tokenizer,
            data=settings.data,
            num_prompts=num_prompts,
            num_tokens=length,
            seed=settings.seed,
        )
        return cut_prompts(prompts, length)

    def _fitting(self, prompts: tuple[TokenPrompt, ...]) -> tuple[TokenPrompt, ...]:
        """Return the prompts that the target has room for, and refuse or name the others."""
        settings, limit = self.settings, self.model_length
        if limit is None:
            return prompts
        most = limit - settings.max_tokens
        fitting = tuple(one for one in prompts if len(one.token_ids) <= most)
        for prompt in (one for one in prompts if len(one.token_ids) > most):
            error = (
                f"prompt and max_tokens must fit the target's {limit} tokens, got {len(prompt.token_ids)} + "
                f"{settings.max_tokens} in prompt {prompt.prompt_id}"
            )
            if not settings.skip_long:
                raise ValueError(
                    f"prompts: {error}; lower context_lengths or max_tokens, or leave such prompts out with skip_long"
                )
            self._left_out.append({"method": "all", "prompt_id": prompt.prompt_id, "error": error})
        if not fitting:
            raise ValueError(f"prompts: none of {len(prompts)} fits the target's {limit} tokens; lower max_tokens")
        if len(fitting) < len(prompts):
            self.notes.append(
                f"{len(prompts) - len(fitting)} of {len(prompts)} prompts do not fit the target's {limit} tokens and "
                "are left out; the results list them under failures"
            )
        return fitting

    def _prompts_hash(self) -> str:
        path = workload_path(self.settings.prompts, self.settings.data)
        if path is not None and path.is_file():
            return sha256_of(path)
        token_ids = [[prompt.token_ids for prompt in prompts] for prompts in self.shard_prompts]
        return hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()

    def _plan(self) -> list[Measurement]:
        """Return all runs in the order of the results, those of one engine together."""
        settings = self.settings
        measurements: list[Measurement] = []
        references: list[Measurement] = []
        for method in settings.ordered_methods:
            drafter = self.drafter if method in DRAFTER_METHODS else None
            plain = method in PLAIN_METHODS
            for depth in (0,) if plain else self.depths:
                several = not plain and len(self.depths) > 1
                planned = [
                    Measurement(
                        f"{method} K={depth}" if several else method, method, drafter, shard, length is not None
                    )
                    for shard, length in self._shards(method, depth)
                ]
                references = references or planned
                for one, reference in zip(planned, references, strict=True):
                    one.reference = reference
                    one.split(settings.ray.num_actors if settings.ray else 1)
                measurements += planned
        return measurements

    def _shards(self, method: str, depth: int) -> list[tuple[ShardSpec, int | None]]:
        """Return what one engine measures, each with the length that its prompts were cut to."""
        settings = self.settings
        longest = max(len(prompt.token_ids) for prompts in self.shard_prompts for prompt in prompts)
        # Room for a last draft past the last token, where the model has it; the same for every method.
        needed = longest + settings.max_tokens + max(self.depths) + 1
        engine = EngineSpec(
            # An actor need not run in this process's folder.
            target=str(settings.target.absolute()),
            speculative_config=speculative_config(method, depth, self.drafter),
            dtype=self.dtype,
            max_model_len=min(needed, self.model_length or needed),
            max_num_seqs=max(settings.concurrencies),
            # Compiling takes longer than a measurement on CPU; GPU users serve with graphs.
            enforce_eager=self.device == "cpu",
            seed=settings.seed,
        )
        return [
            (
                ShardSpec(
                    engine=engine,
                    prompts=prompts,
                    max_tokens=settings.max_tokens,
                    temperature=temperature,
                    concurrency=concurrency,
                    seed=settings.seed,
                    repeats=settings.repeats,
                ),
                length,
            )
            for temperature in settings.temperatures
            for concurrency in settings.concurrencies
            for prompts, length in zip(self.shard_prompts, settings.prompt_lengths, strict=True)
        ]

    def run(self, on_progress: ProgressCallback, engine_command: Sequence[str] = ENGINE_COMMAND) -> dict[str, Any]:
        """Measure every method and return the results; they are on disk after each setting.

        A method whose engine fails is listed under `failures`, and the others go on. An interruption
        ends the engines and keeps what was measured; the plots are drawn of what there is.
        """
        out = self.settings.out
        (out / "logs").mkdir(parents=True, exist_ok=True)
        for name in ("acceptance.png", "speedup.png"):
            (out / name).unlink(missing_ok=True)
        store = ShardStore(out / "shards", resume=self.settings.resume)
        self._take_stored(store)
        write_results(out, self.results)
        jobs, places = self._jobs()
        on_event = _Listener(self, jobs, places, store, on_progress)
        try:
            if self.settings.ray is None:
                run_jobs(jobs, out / "logs", on_event, engine_command)
            else:
                with RayRunner(self.settings.ray) as runner:
                    self.results["environment"]["ray"] = runner.describe()
                    runner.run_jobs(jobs, out / "logs", on_event, engine_command)
        finally:
            self._plot()
        if self.settings.sweep != Sweep():
            self._recommend()
        return self.results

    def _recommend(self) -> None:
        """Add to the results what a server should be given."""
        engines = {
            (one.method, (engine.speculative_config or {}).get("num_speculative_tokens", 0)): engine
            for one in self._measurements
            for engine in (one.shard.engine,)
        }
        found = recommend(self.results, str(self.settings.target), engines)
        if found is not None:
            self.recommendation = found
            self.results["recommendation"] = found.to_json()
            write_results(self.settings.out, self.results)

    def _plot(self) -> None:
        """Draw the runs at the first values of what is swept; the plots' own axis is the context."""
        settings = self.settings
        first = (settings.temperatures[0], settings.concurrencies[0])
        runs = [
            run
            for run in self.results["runs"]
            if (run["temperature"], run["concurrency"]) == first
            and run["num_speculative_tokens"] in (0, self.depths[0])
        ]
        if runs:
            from qm_spec.evaluation.plots import write_plots

            write_plots(runs, settings.out)

    def _take_stored(self, store: ShardStore) -> None:
        for one in self._measurements:
            for number, part in enumerate(one.parts):
                stored = store.load(one.method, self.device, part)
                if stored is not None:
                    one.results[number] = stored
        num_stored = sum(len(one.results) for one in self._measurements)
        if num_stored:
            total = sum(len(one.parts) for one in self._measurements)
            self.notes.append(f"{num_stored} of {total} shards were measured by an earlier run and are kept")
        self._record_ready()

    def _jobs(self) -> tuple[list[EngineJob], list[list[_Place]]]:
        """Return what is left to do: for each engine and part of the prompts one job, and what its shards are."""
        found: dict[tuple[str, int], list[_Place]] = defaultdict(list)
        for one in self._measurements:
            for number in range(len(one.parts)):
                if number not in one.results:
                    found[one.engine_name, number].append((one, number))
        jobs = [
            EngineJob(
                name=engine_name.replace(" ", "-") + (f".{part}" if self.settings.ray else ""),
                method=places[0][0].method,
                device=self.device,
                shards=tuple(one.parts[number] for one, number in places),
            )
            for (engine_name, part), places in found.items()
        ]
        return jobs, list(found.values())

    def take(self, place: _Place, result: ShardResult) -> None:
        """Keep the result of a part, and record the run that it completes."""
        one, number = place
        one.results[number] = result
        self._record_ready()
        write_results(self.settings.out, self.results)

    def give_up(self, places: Sequence[_Place], error: str) -> None:
        """List parts under the failures, and record the runs that do without them."""
        for one, number in places:
            one.failed.add(number)
        one = places[0][0]
        failure: dict[str, Any] = {"method": one.engine_name, "error": error.partition("\n")[0]}
        if self.settings.ray:
            failure["prompt_ids"] = sorted({p.prompt_id for one, number in places for p in one.parts[number].prompts})
        self.results["failures"].append(failure)
        self.notes.append(f"{one.engine_name} failed: {error}")
        self._record_ready()
        write_results(self.settings.out, self.results)

    def _record_ready(self) -> None:
        for number, one in enumerate(self._measurements):
            if number not in self._recorded and one.ready:
                self._recorded[number] = self._record(one)
        self.results["runs"] = [self._recorded[number] for number in sorted(self._recorded)]

    def _record(self, one: Measurement) -> dict[str, Any]:
        shard, result = one.measured()
        common, reference = one.beside_reference() or (None, None)
        run = run_record(
            one.method,
            shard,
            result,
            reference,
            target=_shown(self.settings.target),
            draft=_shown(one.drafter) if one.drafter else None,
            context_cut=one.context_cut,
            common=common,
        )
        if run["repeats_identical"] is False:
            self.notes.append(
                f"{one.engine_name} at {run['context_tokens']} tokens of context put out different tokens when "
                "repeated; its numbers are those of the median pass"
            )
        speeds = run["output_tokens_per_s_per_pass"]
        if max(speeds) > NOISY_SPREAD * min(speeds):
            self.notes.append(
                f"{one.engine_name} at {run['context_tokens']} tokens of context ran at {min(speeds):.1f} to "
                f"{max(speeds):.1f} tokens/s; the machine was busy, so its speedup is uncertain"
            )
        self.results["environment"]["dtype"] = run["dtype"]
        return run


# A run, and the number of one of its parts.
_Place = tuple[Measurement, int]


class _Listener:
    """Takes what happens in jobs: keeps results, and sums progress over the jobs of each engine.

    Args:
        places: by job, what each of its shards is.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        jobs: Sequence[EngineJob],
        places: Sequence[Sequence[_Place]],
        store: ShardStore,
        on_progress: ProgressCallback,
    ) -> None:
        self._benchmark = benchmark
        self._jobs = jobs
        self._places = places
        self._store = store
        self._on_progress = on_progress
        # Finished requests by job and shard, and jobs that go on, by engine.
        self._done: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
        self._expected: dict[str, int] = defaultdict(int)
        self._open: dict[str, int] = defaultdict(int)
        for job, shards in zip(jobs, places, strict=True):
            name = shards[0][0].engine_name
            self._expected[name] += sum(shard.repeats * len(shard.prompts) for shard in job.shards)
            self._open[name] += len(shards)

    def __call__(self, number: int, event: Event) -> None:
        places = self._places[number]
        name = places[0][0].engine_name
        kind = event["event"]
        if kind == "starting":
            self._report(name, "starting the engine")
        elif kind == "ready":
            self._report(name, "warming up")
        elif kind == "progress":
            self._done[name][number, event["shard"]] = event["done"]
            one, _ = places[event["shard"]]
            context = len(one.shard.prompts[0].token_ids) if one.context_cut else None
            self._report(name, f"decoding at {context} tokens of context" if context else "decoding")
        elif kind == "retried":
            self._benchmark.notes.append(f"{name}: handed to another actor, since {event['error']}")
            self._report(name, "trying again")
        elif kind == "failed":
            self._open[name] -= len(event["shards"])
            self._benchmark.give_up([places[shard] for shard in event["shards"]], event["error"])
            self._report(name, "failed")
        else:
            self._take(number, event["shard"], ShardResult.from_json(event["result"]))

    def _take(self, number: int, shard_number: int, result: ShardResult) -> None:
        job, place = self._jobs[number], self._places[number][shard_number]
        shard, name = job.shards[shard_number], place[0].engine_name
        self._store.save(job.method, job.device, shard, result)
        self._benchmark.take(place, result)
        self._done[name][number, shard_number] = shard.repeats * len(shard.prompts)
        self._open[name] -= 1
        self._report(name, "decoding" if self._open[name] else "done")

    def _report(self, name: str, state: str) -> None:
        self._on_progress(name, state, sum(self._done[name].values()), self._expected[name])


def _model_length(target: Path) -> int | None:
    """Return the longest sequence of a model in tokens, or None where its config names none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _shown(path: Path) -> str:
    """Return a path below the package's own root without the root, which differs from machine to machine."""
    resolved = path.resolve()
    return str(resolved.relative_to(_PACKAGE_ROOT) if resolved.is_relative_to(_PACKAGE_ROOT) else path)
