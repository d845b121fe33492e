"""What a benchmark is asked to do, validated before anything is started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qm_spec.bench.methods import BASELINE, METHODS, NOISE_METHOD, REFERENCE_METHOD, find_method

DEFAULT_METHODS = (REFERENCE_METHOD, NOISE_METHOD, "ngram", "qm_spec")
DTYPES = ("auto", "bfloat16", "float16", "float32")
FIND_DRAFT = "qm_spec"
BUILTIN = "builtin"
# The state of an engine that has not been started, in reports of progress.
WAITING = "waiting"
# Cut from running text, so the built-in prompts have no length of their own.
BUILTIN_CONTEXT_TOKENS = 256


@dataclass(frozen=True)
class Sweep:
    """Values to measure instead of a setting's single one, in every combination; empty for the single one."""

    num_speculative_tokens: tuple[int, ...] = ()
    temperature: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()
    context_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class RaySettings:
    """Actors that share the work, each with one engine at a time.

    Args:
        num_actors: how many.
        address: of an existing cluster; None starts one on this machine.
        num_cpus: cores that an actor reserves, which are also its engine's threads.
        num_gpus: GPUs that an actor reserves; its engine runs on the CPU if 0.
        max_tries: times that a shard is tried before it is given up.

    Raises:
        ValueError: a value is out of range.
    """

    num_actors: int
    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_tries: int = 3

    def __post_init__(self) -> None:
        for name in ("num_actors", "max_tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"ray: {name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.num_cpus) and self.num_cpus > 0):
            raise ValueError(f"ray: num_cpus must be above 0, got {self.num_cpus}")
        if not (math.isfinite(self.num_gpus) and self.num_gpus >= 0):
            raise ValueError(f"ray: num_gpus must be 0 (the CPU) or above, got {self.num_gpus}")


@dataclass(frozen=True)
class BenchmarkSettings:
    """One comparison of methods on one target.

    Args:
        target: folder of the target model.
        out: folder of the results.
        draft: "qm_spec" for the drafter that belongs to the target, or a drafter's folder.
        methods: names out of `METHODS` or `baselines`, each once; a baseline that is not named runs as well.
        baselines: drafters' folders by method: `eagle3`, `eagle3-window`, or a name that is no other method's.
        num_speculative_tokens: K of every method; None for each method's own.
        prompts: a workload's name, or a file; see `qm_spec.bench.workloads.catalogue`.
        data: folder of the files that workloads are read from.
        num_prompts: so many of them; None for 8 built-in ones or a whole file.
        per_category: the first so many of each category instead.
        max_tokens: output tokens of each prompt.
        stop_at_eos: end an output at an end-of-text token, as a server does; else all have `max_tokens`.
        temperature: 0 for greedy decoding.
        concurrency: requests kept in flight.
        context_lengths: prompt lengths in tokens to cut to, one run each; None for 256 with the
            built-in prompts and for whole prompts from a file.
        seed: of sampling.
        dtype: "auto" is float32 on CPU, where token identity is meaningful, and the model's own on GPU.
        repeats: measured passes, each with new engines; of each prompt the median is reported.
        sweep: settings of which several values are measured.
        ray: actors with one engine at a time; None for all engines on this machine, prompt by prompt in turn.
        engines_at_once: engines that are alive together, plain decoding's included; None for as many as fit the memory.
        resume: keep what an earlier run left in `out`.
        skip_long: leave prompts out, and name them, that are too long for the target, instead of refusing to start.

    Raises:
        ValueError: a value is out of range.
        FileNotFoundError: the target is not there.
    """

    target: Path
    out: Path
    draft: str = FIND_DRAFT
    methods: tuple[str, ...] = DEFAULT_METHODS
    baselines: Mapping[str, Path] = field(default_factory=dict)
    num_speculative_tokens: int | None = None
    prompts: str = BUILTIN
    data: Path | None = None
    num_prompts: int | None = None
    per_category: int | None = None
    max_tokens: int = 128
    stop_at_eos: bool = False
    temperature: float = 0.0
    concurrency: int = 1
    context_lengths: tuple[int, ...] | None = None
    seed: int = 0
    dtype: str = "auto"
    repeats: int = 3
    sweep: Sweep = field(default_factory=Sweep)
    ray: RaySettings | None = None
    engines_at_once: int | None = None
    resume: bool = False
    skip_long: bool = False

    def __post_init__(self) -> None:
        self._check_methods()
        if self.num_prompts is not None and self.per_category is not None:
            raise ValueError(
                f"per_category: must come without num_prompts, got {self.per_category} and {self.num_prompts}; "
                "leave one out"
            )
        if self.engines_at_once is not None and self.engines_at_once < 2:
            raise ValueError(
                f"engines_at_once: must be at least 2, {REFERENCE_METHOD} and one to compare with it, got "
                f"{self.engines_at_once}"
            )
        counts = {
            "num_speculative_tokens": self.depths,
            "num_prompts": (self.num_prompts,),
            "per_category": (self.per_category,),
            "max_tokens": (self.max_tokens,),
            "concurrency": self.concurrencies,
            "repeats": (self.repeats,),
        }
        for name, values in counts.items():
            for value in values:
                if value is not None and value < 1:
                    raise ValueError(f"{name}: must be at least 1, got {value}")
        for temperature in self.temperatures:
            if not (math.isfinite(temperature) and temperature >= 0):
                raise ValueError(f"temperature: must be 0 (greedy) or above, got {temperature}")
        if self.seed < 0:
            raise ValueError(f"seed: must be 0 or above, got {self.seed}")
        lengths = self.sweep.context_lengths or self.context_lengths
        if lengths is not None and (not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths)):
            raise ValueError(f"context_lengths: must be different numbers of tokens from 1, got {list(lengths)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if not (self.target / "config.json").is_file():
            raise FileNotFoundError(
                f"target: {self.target} is not a folder with a config.json; pass the folder of a model "
                "in Hugging Face format"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: {self.out} is a file; pass a folder for the results")

    def _check_methods(self) -> None:
        taken = sorted(name for name in self.baselines if name in METHODS and METHODS[name].drafter != BASELINE)
        if taken:
            raise ValueError(f"baseline: must not have the name of another method, got {', '.join(taken)}; rename it")
        unknown = sorted(set(self.methods) - {*METHODS, *self.baselines})
        if unknown or not self.methods:
            given = ", ".join(unknown) or "none at all"
            raise ValueError(f"methods: must be some of {', '.join(sorted(METHODS))}, got {given}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods: each may be named once, got {', '.join(self.methods)}")
        for name in self.ordered_methods:
            method = find_method(name)
            if method.drafter == BASELINE and name not in self.baselines:
                raise ValueError(f"methods: {name} needs its drafter's folder; pass --baseline {name}=DIR")
            if method.missing:
                raise ValueError(f"methods: {method.missing}")

    @property
    def ordered_methods(self) -> tuple[str, ...]:
        """The methods to run: the reference first, and added where another is to be compared with it."""
        asked = dict.fromkeys((*self.methods, *self.baselines))
        return (REFERENCE_METHOD, *(name for name in asked if name != REFERENCE_METHOD))

    @property
    def adds_reference(self) -> bool:
        """Whether `ordered_methods` holds a reference that was not asked for."""
        return REFERENCE_METHOD not in self.methods

    @property
    def depths(self) -> tuple[int | None, ...]:
        """Numbers of drafted tokens; None for each method's own."""
        return self.sweep.num_speculative_tokens or (self.num_speculative_tokens,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures, one run each."""
        return self.sweep.temperature or (self.temperature,)

    @property
    def concurrencies(self) -> tuple[int, ...]:
        """Numbers of requests in flight, one run each."""
        return self.sweep.concurrency or (self.concurrency,)

    @property
    def prompt_lengths(self) -> tuple[int | None, ...]:
        """Tokens to cut the prompts to, one per run; None leaves them whole."""
        lengths = self.sweep.context_lengths or self.context_lengths
        if lengths is not None:
            return lengths
        return (BUILTIN_CONTEXT_TOKENS,) if self.prompts == BUILTIN else (None,)
