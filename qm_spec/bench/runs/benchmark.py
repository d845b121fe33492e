"""A comparison of speculation methods on the same prompts: planned, measured here or by Ray actors, and recorded."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qm_spec.bench.engine.capacity import GIB, engine_bytes, engines_at_once, free_bytes, kv_cache_bytes
from qm_spec.bench.engine.jobs import EngineJob, Event, take_turns
from qm_spec.bench.engine.process import ENGINE_COMMAND
from qm_spec.bench.engine.ray_runner import RayRunner
from qm_spec.bench.engine.shards import EngineSpec, ShardResult, ShardSpec, TokenPrompt
from qm_spec.bench.engine.store import ShardStore
from qm_spec.bench.environment import KV_CACHE_GIB, default_device, describe_environment
from qm_spec.bench.methods import (
    BASELINE,
    OURS,
    REFERENCE_METHOD,
    Method,
    check_baseline,
    find_method,
)
from qm_spec.bench.report.recommend import Recommendation, recommend
from qm_spec.bench.results.doubts import doubts
from qm_spec.bench.results.file import SCHEMA_VERSION, write_results
from qm_spec.bench.results.records import run_record
from qm_spec.bench.runs.plan import Measurement, Round, plan_rounds
from qm_spec.bench.settings import BUILTIN, FIND_DRAFT, WAITING, BenchmarkSettings, Sweep
from qm_spec.bench.workloads.catalogue import WORKLOADS, load_workload, workload_path
from qm_spec.bench.workloads.prompts import cut_prompts, sha256_of
from qm_spec.discovery import check_drafter, find_drafter, is_drafter
from qm_spec.ops.backend import backend
from qm_spec.provenance import command, git_commit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILTIN_PROMPTS = 8
# Room in the engine for a draft past the last token, where methods choose its length themselves.
_MOST_DRAFTED = 32
_GPU_SHARE = 0.9
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]

# Called with the engine's name, what it is doing, and the requests that are finished and expected.
ProgressCallback = Callable[[str, str, int, int], None]


class Benchmark:
    """Prepares a comparison, so that bad input is refused before an engine starts, and runs it.

    Args:
        prompts: what is decoded, for each of the settings' prompt lengths; None for the settings' workload, whose name
            they else have.

    Attributes:
        results: what `results.json` holds so far.
        recommendation: what to serve with, after a finished sweep.
        notes: sentences about the results that a reader must know.

    Raises:
        FileNotFoundError: a drafter or a workload's file is missing.
        ValueError: a prompt is too short or too long, a row of prompts is malformed, or a drafter does not fit.
    """

    def __init__(self, settings: BenchmarkSettings, prompts: Sequence[tuple[TokenPrompt, ...]] | None = None) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.settings = settings
        ray = settings.ray
        self.device = default_device() if ray is None else "cuda" if ray.num_gpus else "cpu"
        self._config = AutoConfig.from_pretrained(settings.target).get_text_config()
        self.dtype = "float32" if (settings.dtype, self.device) == ("auto", "cpu") else settings.dtype
        self.methods = [find_method(name) for name in settings.ordered_methods]
        self.notes = list(self._notes_on_settings())
        self._drafters = self._find_drafters()
        self.model_length: int | None = getattr(self._config, "max_position_embeddings", None)
        self._left_out: list[dict[str, Any]] = []
        given = prompts is not None
        if prompts is None:
            workload_path(settings.prompts, settings.data)
            tokenizer = AutoTokenizer.from_pretrained(settings.target)
            prompts = [self._load(tokenizer, length) for length in settings.prompt_lengths]
        self.shard_prompts = [self._fitting(some) for some in prompts]
        self.results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "environment": {**describe_environment(), "dtype": self.dtype, "operators": backend(self.device)},
            "command": command(),
            "provenance": {
                "commit": git_commit(),
                "seed": settings.seed,
                "prompts": settings.prompts if given or settings.prompts in WORKLOADS else Path(settings.prompts).name,
                "prompts_sha256": self._prompts_hash(given),
                "prompt_ids": [prompt.prompt_id for prompt in self.shard_prompts[0]],
                "repeats": settings.repeats,
                "in_turns": ray is None,
            },
            "runs": [],
            "failures": list(self._left_out),
        }
        self.recommendation: Recommendation | None = None
        self._measurements = self._plan()
        self._recorded: dict[int, dict[str, Any]] = {}
        self._failed_engines: set[str] = set()

    @property
    def _weights_dtype(self) -> str:
        """The dtype that engines resolve "auto" to, as far as the config tells."""
        stored = str(getattr(self._config, "dtype", None) or "float32").removeprefix("torch.")
        return stored if self.dtype == "auto" else self.dtype

    def _notes_on_settings(self) -> Iterator[str]:
        settings = self.settings
        if settings.adds_reference:
            yield f"{REFERENCE_METHOD} runs as well: speedup and lossless are relative to it"
        if settings.repeats == 1:
            yield "one pass: nothing will show how much of a difference is the machine's; --repeats 3 would"
        if self.device == "cpu" and max(settings.temperatures) > 0:
            # What is drafted by ours is repaired.
            foreign = [
                one.name
                for one in self.methods
                if not (one.is_plain or one.drafter == OURS)
                and not (one.drafter == BASELINE and is_drafter(settings.baselines[one.name]))
            ]
            if foreign:
                yield (
                    f"vLLM 0.32 verifies drafts of {', '.join(foreign)} on the CPU with uninitialised temperatures "
                    "(vllm issue 55005): at a temperature above 0 the output is not the target's, nor is the acceptance"
                )
        uncompiled = [one.name for one in self.methods if one.environment.get("QM_SPEC_BACKEND") == "reference"]
        if uncompiled and backend(self.device) == "reference":
            yield f"the kernels were not built, so qm_spec is the same as {', '.join(uncompiled)}"
        if settings.ray is not None:
            yield "with Ray each engine measures by itself, not in turn: what an actor's machine does meanwhile counts"

    def _find_drafters(self) -> dict[str, Path]:
        """Return the checked drafters' folders by the methods that need one."""
        settings = self.settings
        found: dict[str, Path] = {}
        named = [one for one in self.methods if one.drafter == OURS]
        if named:
            target = settings.target
            ours = find_drafter(target) if settings.draft == FIND_DRAFT else Path(settings.draft)
            for depth in settings.depths:
                check_drafter(ours, target, depth)
            found = {one.name: ours for one in named}
        for one in self.methods:
            if one.drafter == BASELINE:
                found[one.name] = settings.baselines[one.name]
                for depth in settings.depths:
                    check_baseline(one.name, found[one.name], settings.target, depth)
        return found

    def _load(self, tokenizer: PreTrainedTokenizerBase, length: int | None) -> tuple[TokenPrompt, ...]:
        settings = self.settings
        num_prompts = settings.num_prompts
        if num_prompts is None and settings.per_category is None and settings.prompts == BUILTIN:
            num_prompts = _BUILTIN_PROMPTS
        prompts = load_workload(
            settings.prompts,
            tokenizer,
            data=settings.data,
            num_prompts=num_prompts,
            per_category=settings.per_category,
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

    def _prompts_hash(self, given: bool) -> str:
        path = None if given else workload_path(self.settings.prompts, self.settings.data)
        if path is not None and path.is_file():
            return sha256_of(path)
        token_ids = [[prompt.token_ids for prompt in prompts] for prompts in self.shard_prompts]
        return hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()

    def _plan(self) -> list[Measurement]:
        """Return all runs in the order of the results, those of one engine together."""
        settings = self.settings
        measurements: list[Measurement] = []
        references: list[Measurement] = []
        for method in self.methods:
            for depth in (None,) if method.is_plain else settings.depths:
                several = not method.is_plain and len(settings.depths) > 1
                name = f"{method.name} K={depth}" if several else method.name
                planned = [
                    Measurement(name, method.name, self._drafters.get(method.name), shard, length is not None)
                    for shard, length in self._shards(method, depth)
                ]
                references = references or planned
                for one, reference in zip(planned, references, strict=True):
                    one.reference = reference
                    if settings.ray is None:
                        one.split_for_turns()
                    else:
                        one.split_for_actors(settings.ray.num_actors)
                measurements += planned
        return measurements

    def _shards(self, method: Method, depth: int | None) -> list[tuple[ShardSpec, int | None]]:
        """Return what one engine measures, each with the length that its prompts were cut to."""
        settings = self.settings
        lengths = [len(prompt.token_ids) for prompts in self.shard_prompts for prompt in prompts]
        # Room for a last draft past the last token, where the model has it; the same for every method.
        further = settings.max_tokens + max(depth or _MOST_DRAFTED for depth in settings.depths) + 1
        needed = max(lengths) + further
        most = max(settings.concurrencies)
        engine = EngineSpec(
            # An actor need not run in this process's folder.
            target=str(settings.target.absolute()),
            speculative_config=method.speculative_config(depth, self._drafters.get(method.name)),
            dtype=self.dtype,
            max_model_len=min(needed, self.model_length or needed),
            max_num_seqs=most,
            # Compiling takes longer than a measurement on CPU; GPU users serve with graphs.
            enforce_eager=self.device == "cpu",
            seed=settings.seed,
            kv_cache_bytes=kv_cache_bytes(self._config, lengths, most, further, self._weights_dtype),
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
                    stop_at_eos=settings.stop_at_eos,
                ),
                length,
            )
            for temperature in settings.temperatures
            for concurrency in settings.concurrencies
            for prompts, length in zip(self.shard_prompts, settings.prompt_lengths, strict=True)
        ]

    def run(self, on_progress: ProgressCallback, engine_command: Sequence[str] = ENGINE_COMMAND) -> dict[str, Any]:
        """Measure every method and return the results; they are on disk after each pass over a setting.

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
        try:
            if self.settings.ray is None:
                self._run_in_turns(store, on_progress, engine_command)
            else:
                jobs, places = self._jobs()
                on_event = _ActorListener(self, jobs, places, store, on_progress)
                with RayRunner(self.settings.ray) as runner:
                    self.results["environment"]["ray"] = runner.describe()
                    runner.run_jobs(jobs, out / "logs", on_event, engine_command)
        finally:
            self._record(self._measurements)
            self.notes += [*self._notes_on_ends(), *doubts(self.results["runs"])]
            self._plot()
        if self.settings.sweep != Sweep():
            self._recommend()
        return self.results

    def _run_in_turns(self, store: ShardStore, on_progress: ProgressCallback, engine_command: Sequence[str]) -> None:
        engines: dict[str, list[Measurement]] = {}
        for one in self._measurements:
            engines.setdefault(one.engine_name, []).append(one)
        rounds = plan_rounds(engines, self.settings.repeats, self._engines_at_once(len(engines)))
        progress = _Progress(on_progress)
        for planned in rounds:
            for setting, part in planned.turns:
                for name in planned.engines:
                    if part is not None:
                        progress.expect(name, len(engines[name][setting].parts[part].prompts))
        progress.announce()
        for planned in rounds:
            self._run_round(planned, engines, store, progress, engine_command)

    def _run_round(
        self,
        planned: Round,
        engines: Mapping[str, Sequence[Measurement]],
        store: ShardStore,
        progress: _Progress,
        engine_command: Sequence[str],
    ) -> None:
        """Let the engines of a round take turns, and record each setting when its last part is decoded."""
        names = [name for name in planned.engines if name not in self._failed_engines]
        if not names:
            return
        jobs = [self._turns_job(engines[name], planned, len(names)) for name in names]

        def on_event(job: int, event: Event) -> None:
            name, kind = names[job], event["event"]
            if kind == "starting":
                progress.report(name, "starting the engine")
            elif kind == "ready":
                progress.report(name, "ready")
            elif kind == "progress":
                setting, part = planned.turns[event["shard"]]
                if part is not None:
                    where = _conditions(engines[name][setting], self.settings)
                    state = f"pass {planned.number + 1} of {self.settings.repeats}{where}"
                    progress.report(name, state, event["done"])
            elif kind == "result":
                setting, part = planned.turns[event["shard"]]
                if part is not None:
                    progress.settle(name, len(engines[name][setting].parts[part].prompts))
            elif kind == "failed":
                self._failed_engines.add(name)
                self._fail(name, event["error"])
                progress.report(name, "failed")

        logs = self.settings.out / "logs"
        # Round by round the other way, so that a prompt's passes differ in who comes first.
        backwards = planned.number % 2 == 1
        with closing(take_turns(jobs, logs, on_event, engine_command, backwards=backwards)) as turns:
            for number, results in turns:
                setting, part = planned.turns[number]
                if part is None:
                    continue
                key = (part, planned.number)
                plain = next((result for job, result in results.items() if names[job] == planned.engines[0]), None)
                for job, result in results.items():
                    one = engines[names[job]][setting]
                    # Plain decoding runs once more beside each group; its own run is the first.
                    if key not in one.results or one.reference is not one:
                        one.take_turn(key, result, plain)
                        kept = [result] if plain is None else [result, plain]
                        store.save(one.method, self.device, one.parts[part], kept, planned.number)
                if number + 1 == len(planned.turns) or planned.turns[number + 1][0] != setting:
                    self._record([engines[name][setting] for name in names])

    def _turns_job(self, measured: Sequence[Measurement], planned: Round, num_engines: int) -> EngineJob:
        share = _GPU_SHARE / num_engines if self.device == "cuda" else None
        shards = [
            measured[setting].warm_up if part is None else measured[setting].parts[part]
            for setting, part in planned.turns
        ]
        return EngineJob(
            name=measured[0].engine_name.replace(" ", "-"),
            method=measured[0].method,
            device=self.device,
            shards=tuple(replace(one, engine=replace(one.engine, gpu_memory_share=share)) for one in shards),
            as_served=True,
        )

    def _engines_at_once(self, num_engines: int) -> int | None:
        """Return how many engines may be alive together, and say so where that is not all of them."""
        most = self.settings.engines_at_once
        if most is None:
            asked = os.environ.get(KV_CACHE_GIB) if self.device == "cpu" else None
            kv_bytes = int(asked) * GIB if asked else self._measurements[0].shard.engine.kv_cache_bytes
            each = engine_bytes(self.settings.target, self._config, self._weights_dtype, kv_bytes, self.device)
            most = engines_at_once(each, self.device)
            if most is not None and most < num_engines:
                self.notes.append(
                    f"{num_engines} engines of about {each / GIB:.1f} GiB do not fit the free "
                    f"{(free_bytes(self.device) or 0) / GIB:.1f} GiB together: they run in groups of {most}, each with "
                    f"its own {REFERENCE_METHOD}"
                )
        return most

    def _notes_on_ends(self) -> Iterator[str]:
        """Say how many outputs go on where a served answer would have ended."""
        ends = getattr(self._config, "eos_token_id", None)
        ends = set(ends if isinstance(ends, list) else [ends])
        outputs = [
            request.token_ids
            for one in self._measurements
            if one.reference is one and not self.settings.stop_at_eos
            for turn in one.turns()
            for request in turn.median_pass.requests
        ]
        beyond = sum(bool(ends & set(token_ids[:-1])) for token_ids in outputs)
        if beyond:
            yield (
                f"{beyond} of {len(outputs)} outputs of {REFERENCE_METHOD} go on behind an end-of-text token, "
                "which no server does; what follows it often repeats itself, which flatters lookup. --stop-at-eos ends "
                "them there"
            )

    def _recommend(self) -> None:
        """Add to the results what a server should be given."""
        engines = {
            (one.method, self._recorded[number]["num_speculative_tokens"]): one.shard.engine
            for number, one in enumerate(self._measurements)
            if number in self._recorded
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
        seen: dict[str, str] = {}
        runs = [
            self._recorded[number]
            for number, one in enumerate(self._measurements)
            if number in self._recorded
            and (one.shard.temperature, one.shard.concurrency) == first
            and seen.setdefault(one.method, one.engine_name) == one.engine_name
        ]
        if runs:
            from qm_spec.bench.report.render import write_plots

            write_plots({**self.results, "runs": runs}, settings.out)

    def _take_stored(self, store: ShardStore) -> None:
        found = total = 0
        in_turns = self.settings.ray is None
        for one in self._measurements:
            for part, spec in enumerate(one.parts):
                # An actor's passes are kept together.
                for number in range(self.settings.repeats if in_turns else 1):
                    total += 1
                    stored = store.load(one.method, self.device, spec, number)
                    if stored is None:
                        continue
                    found += 1
                    if in_turns:
                        one.take_turn((part, number), stored[0], stored[1] if len(stored) > 1 else None)
                    else:
                        one.take(part, stored[0])
        if found:
            self.notes.append(f"{found} of {total} parts were measured by an earlier run and are kept")
        self._record(self._measurements)

    def _jobs(self) -> tuple[list[EngineJob], list[list[_Place]]]:
        """Return what is left to do: for each engine and part of the prompts one job, and what its shards are."""
        found: dict[tuple[str, int], list[_Place]] = defaultdict(list)
        for one in self._measurements:
            for number in range(len(one.parts)):
                if (number, 0) not in one.results:
                    found[one.engine_name, number].append((one, number))
        jobs = [
            EngineJob(
                name=f"{engine_name.replace(' ', '-')}.{part}",
                method=places[0][0].method,
                device=self.device,
                shards=tuple(one.parts[number] for one, number in places),
                as_served=True,
            )
            for (engine_name, part), places in found.items()
        ]
        return jobs, list(found.values())

    def take(self, place: _Place, result: ShardResult) -> None:
        """Keep what an actor measured of a part, and record the runs that it completes."""
        one, part = place
        one.take(part, result)
        self._record(self._measurements)

    def give_up(self, places: Sequence[_Place], error: str) -> None:
        """List parts under the failures, and record the runs that do without them."""
        for one, part in places:
            one.failed.add(part)
        lost = sorted({p.prompt_id for one, part in places for p in one.parts[part].prompts})
        self._fail(places[0][0].engine_name, error, prompt_ids=lost)
        self._record(self._measurements)

    def _fail(self, name: str, error: str, **more: Any) -> None:
        self.results["failures"].append({"method": name, "error": error.partition("\n")[0], **more})
        self.notes.append(f"{name} failed: {error}")

    def _record(self, measurements: Sequence[Measurement]) -> None:
        """Make the records of what can be reported and write the results."""
        places = {id(one): number for number, one in enumerate(self._measurements)}
        for one in measurements:
            if self.settings.ray is not None:
                if not one.is_settled or (one.reference is not None and not one.reference.is_settled):
                    continue
                one.take_plain_from_reference()
            turns = one.turns()
            if turns:
                self._recorded[places[id(one)]] = run_record(
                    one.method,
                    one.shard,
                    turns,
                    target=_shown(self.settings.target),
                    draft=_shown(one.drafter) if one.drafter else None,
                    dtype=one.dtype,
                    context_cut=one.context_cut,
                )
                self.results["environment"]["dtype"] = one.dtype
        self.results["runs"] = [self._recorded[number] for number in sorted(self._recorded)]
        write_results(self.settings.out, self.results)


# A run, and the number of one of its parts.
_Place = tuple[Measurement, int]


class _Progress:
    """Sums finished requests over the shards of each engine.

    Args:
        on_progress: is told what each engine does.
    """

    def __init__(self, on_progress: ProgressCallback) -> None:
        self._on_progress = on_progress
        self._expected: dict[str, int] = defaultdict(int)
        self._settled: dict[str, int] = defaultdict(int)
        self._under_way: dict[str, int] = defaultdict(int)
        self._states: dict[str, str] = {}

    def expect(self, name: str, num_requests: int) -> None:
        """Add requests that an engine is to finish."""
        self._expected[name] += num_requests

    def announce(self) -> None:
        """Report every engine before the first one starts, so that all that is to be done is known."""
        for name in self._expected:
            self.report(name, WAITING)

    def report(self, name: str, state: str, under_way: int = 0) -> None:
        """Say what an engine does, and how many requests of its present shard are finished."""
        self._under_way[name] = under_way
        self._states[name] = state
        self._say(name)

    def settle(self, name: str, num_requests: int) -> None:
        """Count the requests of an engine's present shard as finished."""
        self._settled[name] += num_requests
        self._under_way[name] = 0
        if self._settled[name] == self._expected[name]:
            self._states[name] = "done"
        self._say(name)

    def _say(self, name: str) -> None:
        done = self._settled[name] + self._under_way[name]
        self._on_progress(name, self._states[name], done, self._expected[name])


class _ActorListener:
    """Takes what happens in the jobs of actors: keeps results, and reports progress.

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
        # Finished requests by job and shard, and shards that are left, by engine.
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
            self._report(name, f"decoding{_conditions(one, self._benchmark.settings)}")
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
        self._store.save(job.method, job.device, shard, [result])
        self._benchmark.take(place, result)
        self._done[name][number, shard_number] = shard.repeats * len(shard.prompts)
        self._open[name] -= 1
        self._report(name, "decoding" if self._open[name] else "done")

    def _report(self, name: str, state: str) -> None:
        self._on_progress(name, state, sum(self._done[name].values()), self._expected[name])


def _conditions(one: Measurement, settings: BenchmarkSettings) -> str:
    """Say which of several settings a measurement is of."""
    parts = []
    if one.context_cut:
        parts.append(f"{len(one.shard.prompts[0].token_ids)} tokens of context")
    if len(settings.temperatures) > 1:
        parts.append(f"temperature {one.shard.temperature:g}")
    if len(settings.concurrencies) > 1:
        parts.append(f"concurrency {one.shard.concurrency}")
    return f" at {', '.join(parts)}" if parts else ""


def _shown(path: Path) -> str:
    """Return a path below the package's own root without the root, which differs from machine to machine."""
    resolved = path.resolve()
    return str(resolved.relative_to(_PACKAGE_ROOT) if resolved.is_relative_to(_PACKAGE_ROOT) else path)
