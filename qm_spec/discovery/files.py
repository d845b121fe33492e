"""Files of a target (a folder or a hub id), the JSON in them, and folders that are there for a while."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def shown(value: object) -> str:
    """Return a name for a message: as it is, or quoted and escaped where it could break the line or a terminal."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def target_file(target: str | Path, name: str, revision: str | None = None) -> Path:
    """Return the path of one file of a target.

    Args:
        target: a local folder, or a hub id, whose files come from transformers' cache or the hub.
        name: path inside the target, e.g. `config.json`.
        revision: of the hub id; a folder has none.

    Raises:
        FileNotFoundError: the target has no such file.
    """
    folder = Path(target).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{shown(folder)} holds no {name}")
        return folder / name
    from transformers.utils import cached_file

    try:
        found = cached_file(str(target), name, revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"{shown(target)} is no folder here, and as a hub id it gave no {name}: {error}"
        ) from error
    return Path(found)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{shown(file)} is not readable JSON ({error}); copy or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{shown(file)} must hold a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder that is gone again afterwards; what a killed process left under its name goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
