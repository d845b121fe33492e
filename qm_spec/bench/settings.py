"""What commands that run engines are asked to do, validated before anything starts; help makes a field an option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Option

from qm_spec.bench.methods import BASELINE, METHODS, NOISE_METHOD, REFERENCE_METHOD, find_method
from qm_spec.pairs import NOVELS

DEFAULT_METHODS = (REFERENCE_METHOD, NOISE_METHOD, "ngram", "qm_spec")
DTYPES = ("auto", "bfloat16", "float16", "float32")
FIND_DRAFT = "qm_spec"
BUILTIN = "builtin"
# The state of an engine that has not been started, in reports of progress.
WAITING = "waiting"
Draft = Annotated[str, Option(metavar="DIR|qm_spec", help="Drafter folder, or qm_spec to find the target's own.")]
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


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """One comparison of methods on one target.

    Args:
        methods: names out of `METHODS` or `baselines`, each once; a baseline that is not named runs as well.
        baselines: drafters' folders by method: `eagle3`, `eagle3-window`, or a name that is no other method's.
        context_lengths: prompt lengths in tokens to cut to, one run each; None for 256 with the
            built-in prompts and for whole prompts from a file.
        sweep: settings of which several values are measured.
        ray: actors with one engine at a time; None for all engines on this machine, prompt by prompt in turn.

    Raises:
        ValueError: a value is out of range.
        FileNotFoundError: the target is not there.
    """

    target: Annotated[
        Path, Option(metavar="DIR", help="Folder of the target model.", show_default="the shipped pair's")
    ] = NOVELS / "target"
    draft: Draft = FIND_DRAFT
    methods: tuple[str, ...] = DEFAULT_METHODS
    baselines: Mapping[str, Path] = field(default_factory=dict)
    num_speculative_tokens: Annotated[
        int | None,
        Option(metavar="K", help="Drafted tokens per step of every method.", show_default="each method's own number"),
    ] = None
    prompts: Annotated[
        str,
        Option(
            "--benchmark",
            "--prompts",
            metavar="NAME|FILE",
            help="builtin, spec_bench, mt_bench, gsm8k, humaneval, sharegpt, documents (generated), books, or a file "
            "of rows with 'text', 'prompt' or OpenAI 'messages'.",
        ),
    ] = BUILTIN
    data: Annotated[
        Path | None, Option(metavar="DIR", help="Folder of the benchmarks' files.", show_default="$QM_SPEC_DATA")
    ] = None
    num_prompts: Annotated[
        int | None, Option(metavar="N", help="So many of them.", show_default="8 built-in ones, or the whole file")
    ] = None
    per_category: Annotated[
        int | None,
        Option(metavar="N", help="The first N of each category instead; then there is a table by category."),
    ] = None
    skip_long: Annotated[
        bool, Option("--skip-long", help="Leave prompts out that the target has no room for, and name them.")
    ] = False
    max_tokens: Annotated[int, Option(metavar="M", help="Output tokens per prompt.")] = 128
    stop_at_eos: Annotated[
        bool,
        Option("--stop-at-eos", help="End an answer at an end-of-text token, as a server does; else all have M."),
    ] = False
    temperature: Annotated[float, Option(metavar="T", help="0 decodes greedily.")] = 0.0
    concurrency: Annotated[int, Option(metavar="C", help="Requests kept in flight by each engine.")] = 1
    context_lengths: tuple[int, ...] | None = None
    sweep: Sweep = field(default_factory=Sweep)
    seed: Annotated[int, Option(metavar="S", help="Of sampling.")] = 0
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the results.")] = Path("results/spec")
    dtype: Annotated[str, Option(help="auto (float32 on CPU, the model's on GPU), bfloat16, float16 or float32.")] = (
        "auto"
    )
    repeats: Annotated[int, Option(help="Measured passes, each with new engines; medians are reported.")] = 3
    engines_at_once: Annotated[
        int | None,
        Option(
            metavar="N",
            help="Engines that are alive together, plain decoding's included; more methods run in groups, each with "
            "plain decoding of its own.",
            show_default="as many as fit the free memory",
        ),
    ] = None
    resume: Annotated[
        bool, Option("--resume", help="Keep what an interrupted run of the same command has measured.")
    ] = False
    ray: RaySettings | None = None

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


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What to generate.

    Args:
        ray: None for one engine on this machine.

    Raises:
        ValueError: a value is out of range.
        FileNotFoundError: the target or the input is not there.
    """

    target: Annotated[Path, Option(help="Folder of a transformers causal LM; it is not changed.")]
    input: Annotated[Path, Option(metavar="FILE", help="Rows with 'text', 'prompt' or OpenAI 'messages'.")]
    output: Annotated[Path, Option(metavar="FILE", help="One JSON line for each row, in the same order.")]
    method: Annotated[str, Option(help="qm_spec, qm_spec-lookup, ngram, or none for plain decoding.")] = "qm_spec"
    draft: Draft = FIND_DRAFT
    num_speculative_tokens: Annotated[
        int | None, Option(metavar="K", help="Drafted tokens per step.", show_default="the drafter's, or 4")
    ] = None
    max_tokens: Annotated[int, Option(help="Most output tokens; an end-of-text token ends sooner.")] = 256
    temperature: Annotated[float, Option(help="0 decodes greedily.")] = 0.0
    concurrency: Annotated[int, Option(help="Requests kept in flight by each engine.")] = 8
    seed: Annotated[int, Option(help="Of sampling; row i takes seed + i.")] = 0
    dtype: Annotated[str, Option(help="auto (the model's own), bfloat16, float16 or float32.")] = "auto"
    resume: Annotated[bool, Option("--resume", help="Keep what an interrupted run has generated.")] = False
    ray: RaySettings | None = None

    def __post_init__(self) -> None:
        served = [one.name for one in METHODS.values() if one.served and one.drafter != BASELINE]
        for name, choices in (("method", served), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(sorted(choices))}, got {getattr(self, name)}")
        if missing := METHODS[self.method].missing:
            raise ValueError(f"method: {missing}")
        for name in ("num_speculative_tokens", "max_tokens", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: must be 0 (greedy) or above, got {self.temperature}")
        if self.seed < 0:
            raise ValueError(f"seed: must be 0 or above, got {self.seed}")
        if not (self.target / "config.json").is_file():
            raise FileNotFoundError(f"target: {self.target} is not a folder with a config.json")
        if not self.input.is_file():
            raise FileNotFoundError(f"input: {self.input} does not exist; pass a JSON-lines file of prompts")


@dataclass(frozen=True)
class AnswerSettings:
    """What to answer, and how.

    Args:
        prompts: files of rows, in the shapes that `prompt_from_row` reads, and folders of them.
        ray: None for one engine on this machine.

    Raises:
        ValueError: a value is out of range.
        FileNotFoundError: the target is not there.
    """

    target: Annotated[Path, Option(metavar="DIR", help="Folder of the target model.")]
    prompts: tuple[Path, ...]
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the data set.")]
    max_tokens: Annotated[int, Option(help="Most tokens of an answer; an end-of-text token ends sooner.")] = 256
    temperature: Annotated[float, Option(help="Of the sampled answers.")] = 1.0
    greedy_share: Annotated[
        float, Option(help="Of the prompts, chosen by a hash: answered greedily, the others sampled.")
    ] = 0.5
    concurrency: Annotated[int, Option(help="Requests kept in flight by each engine.")] = 64
    seed: Annotated[int, Option(help="Of sampling; sampled answer i takes seed + i.")] = 0
    dtype: Annotated[str, Option(help="auto (the model's own), bfloat16, float16 or float32.")] = "auto"
    plain_text: Annotated[
        bool, Option("--plain-text", help="Go on with the prompts' text, without the chat template.")
    ] = False
    skip_bad_lines: Annotated[
        bool, Option("--skip-bad-lines", help="Leave lines out that hold no prompt, and name them.")
    ] = False
    resume: Annotated[bool, Option("--resume", help="Go on with what an interrupted run has answered.")] = False
    ray: RaySettings | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.greedy_share <= 1:
            raise ValueError(f"greedy_share: must be in 0..1, got {self.greedy_share}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature: must be above 0, got {self.temperature}; answer all greedily with greedy_share 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed: must be 0 or above, got {self.seed}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(sorted(DTYPES))}, got {self.dtype}")
        if not (self.target / "config.json").is_file():
            raise FileNotFoundError(f"target: {self.target} is not a folder with a config.json")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: {self.out} is a file; pass a folder for the data set")
