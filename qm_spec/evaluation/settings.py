"""What a benchmark is asked to do, validated before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

REFERENCE_METHOD = "none"
# Plain decoding measured a second time: what differs between the two is the noise floor.
NOISE_METHOD = "none-again"
WINDOW_METHOD = "qm_spec-window"
# The drafter on the PyTorch references, without the compiled operators.
UNCOMPILED_METHOD = "qm_spec-reference"
DRAFTER_METHODS = ("qm_spec", WINDOW_METHOD, UNCOMPILED_METHOD)
METHODS = (REFERENCE_METHOD, "ngram", *DRAFTER_METHODS)
DTYPES = ("auto", "bfloat16", "float16", "float32")
FIND_DRAFT = "qm_spec"
BUILTIN = "builtin"
# Cut from running text, so the built-in prompts have no length of their own.
BUILTIN_CONTEXT_TOKENS = 256


@dataclass(frozen=True)
class BenchmarkSettings:
    """One comparison of methods on one target.

    Args:
        target: folder of the target model.
        out: folder of the results.
        draft: "qm_spec" for the drafter that belongs to the target, or a drafter's folder.
        methods: names out of `METHODS`, each once.
        num_speculative_tokens: K; None for the drafter's own number.
        prompts: "builtin" or a JSON-lines file.
        num_prompts: the first so many of them; None for 8 built-in ones or a whole file.
        max_tokens: output tokens of each prompt.
        temperature: 0 for greedy decoding.
        concurrency: requests kept in flight.
        context_lengths: prompt lengths in tokens to cut to, one run each; None for 256 with the
            built-in prompts and for whole prompts from a file.
        seed: of sampling.
        dtype: "auto" is float32 on CPU, where token identity is meaningful, and the model's own on GPU.
        repeats: measured passes, of which the median is reported.

    Raises:
        ValueError: a value is out of range.
        FileNotFoundError: the target or the file of prompts is not there.
    """

    target: Path
    out: Path
    draft: str = FIND_DRAFT
    methods: tuple[str, ...] = METHODS
    num_speculative_tokens: int | None = None
    prompts: str = BUILTIN
    num_prompts: int | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    concurrency: int = 1
    context_lengths: tuple[int, ...] | None = None
    seed: int = 0
    dtype: str = "auto"
    repeats: int = 3

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            given = ", ".join(unknown) or "none at all"
            raise ValueError(f"methods: must be some of {', '.join(sorted(METHODS))}, got {given}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods: each may be named once, got {', '.join(self.methods)}")
        counts = ("num_speculative_tokens", "num_prompts", "max_tokens", "concurrency", "repeats")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: must be 0 (greedy) or above, got {self.temperature}")
        if self.seed < 0:
            raise ValueError(f"seed: must be 0 or above, got {self.seed}")
        lengths = self.context_lengths
        if lengths is not None and (not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths)):
            raise ValueError(f"context_lengths: must be different numbers of tokens from 1, got {list(lengths)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if not (self.target / "config.json").is_file():
            raise FileNotFoundError(
                f"target: {self.target} is not a folder with a config.json; pass the folder of a model "
                "in Hugging Face format"
            )
        if self.prompts != BUILTIN and not Path(self.prompts).is_file():
            raise FileNotFoundError(
                f"prompts: {self.prompts} does not exist; pass {BUILTIN} or a JSON-lines file of prompts"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: {self.out} is a file; pass a folder for the results")

    @property
    def ordered_methods(self) -> tuple[str, ...]:
        """The methods to run: the reference first, and added where another is to be compared with it."""
        return (REFERENCE_METHOD, *(name for name in self.methods if name != REFERENCE_METHOD))

    @property
    def adds_reference(self) -> bool:
        """Whether `ordered_methods` holds a reference that was not asked for."""
        return REFERENCE_METHOD not in self.methods

    @property
    def prompt_lengths(self) -> tuple[int | None, ...]:
        """Tokens to cut the prompts to, one per run; None leaves them whole."""
        if self.context_lengths is not None:
            return self.context_lengths
        return (BUILTIN_CONTEXT_TOKENS,) if self.prompts == BUILTIN else (None,)
