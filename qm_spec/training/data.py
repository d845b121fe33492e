"""Text files as windows of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qm_spec.data.json_lines import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
TEXT_SUFFIXES = (*LINES_SUFFIXES, ".md", ".py", ".txt")


def find_files(paths: Iterable[Path]) -> list[Path]:
    """List the text files below `paths`, sorted, folders searched recursively.

    Raises:
        FileNotFoundError: a path does not exist, or no text file is below any of them.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"data: {path} does not exist; pass a text file or a folder of them")
        found = [path] if path.is_file() else [f for f in path.rglob("*") if f.name.endswith(TEXT_SUFFIXES)]
        files.extend(sorted(found))
    if not files:
        raise FileNotFoundError(f"data: no {', '.join(TEXT_SUFFIXES)} file below {', '.join(map(str, paths))}")
    return files


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """Yield one document per text file, and one per line of JSON lines, packed or not (its `text` field).

    Raises:
        ValueError: a line is not a JSON object with a `text`; the message has its number.
    """
    for file in files:
        if not file.name.endswith(LINES_SUFFIXES):
            yield file.read_text(encoding="utf-8", errors="replace")
            continue
        for number, row in read_rows(file):
            if "text" not in row:
                raise ValueError(f"data: {file}:{number} has no 'text' field, only {sorted(row)}")
            yield row["text"]


def sha256_of(files: Iterable[Path]) -> str:
    """Hash names and contents of `files`, in order, as 64 hex digits."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """Concatenate the documents' token ids, each followed by the end-of-text id: `[N]` int32."""
    parts = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        parts.append(np.asarray(ids, dtype=np.int32))
    return np.concatenate(parts)


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of `length` tokens that do not overlap; the tail is dropped.

    Each item is `{"input_ids": [length] int64, "labels": [length] int64}`.

    Raises:
        ValueError: there are fewer tokens than one window.
    """

    def __init__(self, token_ids: np.ndarray, length: int) -> None:
        if len(token_ids) < length:
            raise ValueError(
                f"data: {len(token_ids)} tokens do not fill a window of {length}; add text or lower the length"
            )
        self.token_ids = token_ids[: len(token_ids) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.token_ids[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}
