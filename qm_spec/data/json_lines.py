"""Rows of files of JSON lines and JSON lists, packed or not."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]
# Takes the message about a row that is left out.
OnSkip = Callable[[str], None]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".json.gz", ".json.xz")


def say_nothing(message: str) -> None:
    """Be an `OnSkip` that drops the message."""


def find_row_files(paths: Iterable[Path]) -> list[Path]:
    """List `paths`, and for each folder the files of rows below it, sorted.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"data: {path} does not exist; pass a file of JSON lines or a folder of them")
        found = [path] if path.is_file() else [one for one in path.rglob("*") if one.name.endswith(ROW_SUFFIXES)]
        if not found:
            raise FileNotFoundError(f"data: {path} must hold a file of {', '.join(ROW_SUFFIXES)}, found none")
        files.extend(sorted(found))
    return files


def read_rows(file: Path, on_bad: OnSkip | None = None) -> Iterator[tuple[int, Row]]:
    """Yield the objects of a JSON-lines file or, for `.json`, of a JSON list, each with its number from 1.

    Args:
        file: packed where it ends with `.gz` or `.xz`; blank lines do not count.
        on_bad: takes the message about a line that is not a JSON object, which is left out; None raises it.

    Raises:
        ValueError: a line is not a JSON object (the message has its number), or the file is cut off.
    """
    for number, value in _values(file, on_bad):
        if isinstance(value, dict):
            yield number, value
            continue
        message = f"{file}:{number} must be a JSON object, got {type(value).__name__}"
        if on_bad is None:
            raise ValueError(message)
        on_bad(message)


def _values(file: Path, on_bad: OnSkip | None) -> Iterator[tuple[int, Any]]:
    packed = file.suffix in _OPENERS
    opened = _OPENERS[file.suffix] if packed else open
    with opened(file, "rb") as stream:
        lines = _numbered(stream, file)
        if (file.with_suffix("") if packed else file).suffix == ".json":
            yield from enumerate(_list(b"".join(line for _, line in lines), file), 1)
            return
        for number, line in lines:
            if not line.strip():
                continue
            try:
                yield number, _parsed(line, f"{file}:{number}")
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))


def _numbered(stream: IO[bytes], file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            yield number, line
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file} must be a whole {file.suffix} file, got one that breaks off behind line {number} ({error}); "
            "copy or download it again"
        ) from error


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        given = text.decode(errors="replace").strip()[:60]
        raise ValueError(f"{place} must be a JSON object, got {given!r} ({error})") from error


def _list(text: bytes, file: Path) -> list[Any]:
    rows = _parsed(text, str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file} must be a list of objects, got {type(rows).__name__}; or name it .jsonl")
    return rows


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows as lines of JSON, packed where the name ends with `.gz` or `.xz`; it appears whole or not at all.

    Raises:
        OSError: there is no room, for one; what was begun is removed.
    """
    partial = file.with_name(f"{file.name}.partial")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        with partial.open("wb") as stream:
            stream.write(_PACKERS[file.suffix](lines) if file.suffix in _PACKERS else lines)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
