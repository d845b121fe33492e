"""Answers of a target as token ids: the data set that `qm-spec data` writes and `qm-spec train` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qm_spec.data.json_lines import OnSkip, read_rows, say_nothing
from qm_spec.provenance import FILE as PROVENANCE

SHARD_PATTERN = "answers-*.jsonl.xz"


@dataclass(frozen=True)
class Answered:
    """A prompt and what a target answered.

    Args:
        prompt_token_ids: the prompt, what the chat template adds included.
        output_token_ids: the answer as generated, its end token included where it came to an end.
        category: task that the prompt belongs to, None where its file names none.
    """

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    category: str | None = None


def find_answer_files(paths: Iterable[Path]) -> list[Path]:
    """List the files of answers: those named, and for each folder its shards in their order.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no shard.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"data: {path} does not exist; pass a folder that qm-spec data wrote, or a file")
        found = [path] if path.is_file() else sorted(path.glob(SHARD_PATTERN))
        if not found:
            raise FileNotFoundError(f"data: {path} must hold {SHARD_PATTERN}, found none; make them with qm-spec data")
        files.extend(found)
    return files


def read_answers(
    paths: Sequence[Path],
    *,
    vocab_size: int | None = None,
    fingerprint: str | None = None,
    skip_bad_lines: bool = False,
    on_skip: OnSkip = say_nothing,
) -> Iterator[Answered]:
    """Yield the answers of data sets; an empty answer is left out.

    The paths and the data sets' records are looked at before the first answer is asked for.

    Args:
        paths: folders that `qm-spec data` wrote, and files of their rows, `.jsonl` packed or not.
        vocab_size: of the target; None takes any token id.
        fingerprint: `target_fingerprint` of the target; None takes any data set. One without a record is not checked.
        skip_bad_lines: leave lines out that hold no answer, instead of refusing the file.
        on_skip: takes the message about each row that is left out.

    Raises:
        FileNotFoundError: see `find_answer_files`.
        ValueError: a line holds no answer (the message has its number), or the answers are another target's.
    """
    files = find_answer_files(paths)
    if fingerprint is not None:
        for folder in dict.fromkeys(file.parent for file in files):
            _check_fingerprint(folder, fingerprint)
    return _read(files, vocab_size, skip_bad_lines, on_skip)


def _check_fingerprint(folder: Path, fingerprint: str) -> None:
    file = folder / PROVENANCE
    if not file.is_file():
        return
    stages = json.loads(file.read_text(encoding="utf-8")).get("stages") or [{}]
    made_by = stages[-1].get("target_fingerprint")
    if made_by not in (None, fingerprint):
        raise ValueError(
            f"data: {folder} must hold answers of the target {fingerprint}, got those of {made_by}: its architecture "
            "or its tokenizer differs; make the data set with qm-spec data for this target"
        )


def _read(files: Sequence[Path], vocab_size: int | None, skip_bad_lines: bool, on_skip: OnSkip) -> Iterator[Answered]:
    for file in files:
        for number, row in read_rows(file, on_skip if skip_bad_lines else None):
            place = f"{file}:{number}"
            try:
                answered = answer_from_row(row, place)
            except ValueError as error:
                if not skip_bad_lines:
                    raise
                on_skip(str(error))
                continue
            if not answered.output_token_ids:
                on_skip(f"{place} has an empty answer")
                continue
            largest = max(answered.prompt_token_ids + answered.output_token_ids)
            # Never left out line by line: small ids of another tokenizer would pass for answers.
            if vocab_size is not None and largest >= vocab_size:
                raise ValueError(
                    f"data: {place} must hold token ids below the target's {vocab_size}, got {largest}: the answers "
                    "were made with another tokenizer; make the data set with qm-spec data for this target"
                )
            yield answered


def answer_from_row(row: dict[str, Any], place: str) -> Answered:
    """Return the answer that a row holds.

    Raises:
        ValueError: the row has no lists of token ids, or no prompt.
    """
    ids = {}
    for name in ("prompt_token_ids", "output_token_ids"):
        values = row.get(name)
        if not isinstance(values, list) or not all(type(one) is int and one >= 0 for one in values):
            given = f"only {sorted(row)}" if name not in row else repr(values)[:60]
            raise ValueError(f"data: {place} must have {name}, a list of token ids, got {given}")
        ids[name] = tuple(values)
    if not ids["prompt_token_ids"]:
        raise ValueError(f"data: {place} must have a prompt of at least one token, got none")
    category = row.get("category")
    return Answered(**ids, category=category if isinstance(category, str) else None)
