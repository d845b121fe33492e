"""What a path given as `--data` holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qm_spec.data.answers import SHARD_PATTERN
from qm_spec.data.json_lines import ROW_SUFFIXES, read_rows

DataKind = Literal["answers", "conversations", "text"]


def data_kind(path: Path) -> DataKind:
    """Return which reader a path is for, told by its first row.

    Answers are for `read_answers`, conversations for `read_conversations`; a folder without shards of answers, a file
    that has no rows and rows of another shape are text.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the first row is not a JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"data: {path} does not exist; pass a text file, a file of rows or a folder of them")
    if path.is_dir():
        return "answers" if any(path.glob(SHARD_PATTERN)) else "text"
    _, row = next(read_rows(path), (0, {})) if path.name.endswith(ROW_SUFFIXES) else (0, {})
    if "output_token_ids" in row:
        return "answers"
    return "conversations" if "text" not in row and ("messages" in row or "conversations" in row) else "text"
