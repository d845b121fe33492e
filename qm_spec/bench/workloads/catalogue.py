"""Benchmarks by name: local files of published prompts, generated documents, books and traces."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qm_spec.bench.engine.shards import TokenPrompt
from qm_spec.bench.settings import BUILTIN
from qm_spec.bench.workloads.generated import KINDS
from qm_spec.bench.workloads.long_documents import DocumentWriter, book_prompts, generated_prompts
from qm_spec.bench.workloads.prompts import BUILTIN_FILE, read_prompts, tokenize_prompts
from qm_spec.data.prompt_rows import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA_VARIABLE = "QM_SPEC_DATA"
DOCUMENTS = "documents"
BOOKS = "books"

_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
# Spec-Bench's 13 categories, by the tasks of its leaderboard that they belong to, in its order.
SPEC_BENCH_TASKS = {
    **dict.fromkeys(_MT_BENCH, "Multi-turn Conversation"),
    "translation": "Translation",
    "summarization": "Summarization",
    "qa": "Question Answering",
    "math_reasoning": "Mathematical Reasoning",
    "rag": "Retrieval-aug. Generation",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Published:
    """A benchmark that comes as a file.

    Args:
        names: of the file below the folder of data, most likely first.
        origin: where its authors publish it.
    """

    names: tuple[str, ...]
    origin: str


_PUBLISHED = {
    "gsm8k": _Published(
        ("gsm8k_test.jsonl", "gsm8k/test.jsonl"),
        "grade_school_math/data/test.jsonl of github.com/openai/grade-school-math",
    ),
    "humaneval": _Published(
        ("HumanEval.jsonl.gz", "HumanEval.jsonl"), "data/HumanEval.jsonl.gz of github.com/openai/human-eval"
    ),
    "mt_bench": _Published(
        ("mt_bench.jsonl", "mt_bench/question.jsonl"),
        "fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat",
    ),
    "sharegpt": _Published(
        ("ShareGPT_V3_unfiltered_cleaned_split.json", "sharegpt.json", "sharegpt.jsonl"),
        "ShareGPT_V3_unfiltered_cleaned_split.json of the data set anon8231489123/ShareGPT_Vicuna_unfiltered",
    ),
    "spec_bench": _Published(
        ("spec_bench.jsonl", "spec_bench/question.jsonl"),
        "data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench",
    ),
}
_BOOK_FOLDERS = ("books", "pg19")

WORKLOADS = tuple(sorted((BUILTIN, BOOKS, DOCUMENTS, *_PUBLISHED)))


def workload_path(source: str, data: Path | None = None) -> Path | None:
    """Return the file or folder that a workload is read from, None for generated documents.

    Args:
        source: a name out of `WORKLOADS`, a file of prompts, or a folder of books.
        data: folder of published files; None for the one that the environment variable QM_SPEC_DATA names.

    Raises:
        FileNotFoundError: it is not there; the message says what was looked for and where to put it.
        ValueError: `source` is neither a name nor a path that exists.
    """
    if source == DOCUMENTS:
        return None
    if source == BUILTIN:
        return BUILTIN_FILE
    if source == BOOKS:
        origin = "books as plain text, one .txt file each, such as the test split of PG-19,"
        return _find(source, _BOOK_FOLDERS, origin, data)
    if source in _PUBLISHED:
        return _find(source, _PUBLISHED[source].names, _PUBLISHED[source].origin, data)
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"workload: must be one of {', '.join(WORKLOADS)}, a file of prompts (.jsonl, .jsonl.gz, .json) or a "
            f"folder of books (.txt), got {source}, which does not exist"
        )
    return path


def _find(source: str, names: Sequence[str], origin: str, data: Path | None) -> Path:
    given = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if given is None:
        raise FileNotFoundError(
            f"workload {source}: no folder of data is known; pass one with --data or set {DATA_VARIABLE}, and put "
            f"{origin} there as {names[0]} (nothing is downloaded)"
        )
    for name in names:
        if (given / name).exists():
            return given / name
    raise FileNotFoundError(
        f"workload {source}: looked for {' and '.join(names)} in {given}, found none; put {origin} there as "
        f"{names[0]} (nothing is downloaded)"
    )


def load_workload(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Path | None = None,
    num_prompts: int | None = None,
    per_category: int | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
) -> list[TokenPrompt]:
    """Return a workload's prompts as token ids, each with its category and time of arrival where it has them.

    Questions go through the tokenizer's chat template; where it has none they are plain text. Of conversations in
    several turns the first is taken.

    Args:
        source, data: see `workload_path`.
        num_prompts: of a published benchmark so many evenly spaced rows, so that every task has its share; of
            anything else the first so many. None for all, and for one generated document of each kind.
        per_category: of a file the first so many rows of each category instead, one category after the other in turn,
            so that what disturbs a part of a measurement disturbs all of them.
        num_tokens: length of generated documents and of the beginnings of books; other prompts stay whole.
        seed: of generated documents.

    Raises:
        FileNotFoundError, ValueError: see `workload_path`; or there are fewer prompts than asked for, or generated
            documents without a length, or a category is too small.
    """
    path = workload_path(source, data)
    if per_category is not None and (path is None or path.is_dir()):
        raise ValueError(f"workload {source}: per_category needs a file of prompts with categories; pass num_prompts")
    if path is None:
        if num_tokens is None:
            raise ValueError(f"workload {DOCUMENTS}: needs a length in tokens, got none; pass context_lengths")
        return generated_prompts(tokenizer, num_prompts or len(KINDS), num_tokens, seed)
    if path.is_dir():
        return book_prompts(path, tokenizer, num_prompts, num_tokens)
    if per_category is not None:
        return _tokenized(_of_each_category(read_prompts(path), per_category, source), tokenizer, seed)
    if source not in _PUBLISHED:
        return _tokenized(read_prompts(path, num_prompts), tokenizer, seed)
    return _tokenized(_spread(read_prompts(path), num_prompts, source), tokenizer, seed)


def _of_each_category(prompts: Sequence[Prompt], wanted: int, source: str) -> list[Prompt]:
    by_category: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    small = {name or "(none)": len(some) for name, some in by_category.items() if len(some) < wanted}
    if small:
        listed = ", ".join(f"{name} {size}" for name, size in sorted(small.items()))
        raise ValueError(
            f"workload {source}: every category must hold at least {wanted} prompts, got {listed}; lower per_category"
        )
    return [some[number] for number in range(wanted) for some in by_category.values()]


def _spread(prompts: Sequence[_T], num_prompts: int | None, source: str) -> list[_T]:
    wanted = num_prompts or len(prompts)
    if wanted > len(prompts):
        raise ValueError(
            f"workload {source}: must hold at least {wanted} prompts, got {len(prompts)}; lower num_prompts"
        )
    return [prompts[number * len(prompts) // wanted] for number in range(wanted)]


def _tokenized(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[TokenPrompt]:
    """Tokenize prompts; a trace's rows without a text get generated documents, and its times begin at 0."""
    begin = min((prompt.arrival_s for prompt in prompts if prompt.arrival_s is not None), default=0.0)
    prompts = [
        prompt if prompt.arrival_s is None else replace(prompt, arrival_s=prompt.arrival_s - begin)
        for prompt in prompts
    ]
    if all(prompt.num_tokens is None for prompt in prompts):
        return tokenize_prompts(prompts, tokenizer)
    writer = DocumentWriter(tokenizer)
    return [
        tokenize_prompts([prompt], tokenizer)[0]
        if prompt.num_tokens is None
        else TokenPrompt(
            prompt.prompt_id,
            writer.write(KINDS[number % len(KINDS)], prompt.num_tokens, seed + number),
            prompt.category,
            prompt.arrival_s,
        )
        for number, prompt in enumerate(prompts)
    ]
