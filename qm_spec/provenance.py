"""The record that stands beside every trained or measured result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

FILE = "provenance.json"
_PACKAGES = ("qm_spec", "torch", "transformers", "vllm")


def git_commit() -> str | None:
    """Return the source tree's commit, with `+changes` when it is not clean, or None outside git."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """Return the command line as it was typed, the program by its base name."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def conditions() -> dict[str, Any]:
    """Return what a measurement's record begins with: command, commit and versions."""
    return {"command": command(), "commit": git_commit(), "versions": versions()}


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, a row of its tables to a line; a reader sees the whole old file or the whole new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    text = _lines(record, "\n")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _holds_rows(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_rows, value.values()))
    return isinstance(value, list) and any(isinstance(item, dict) or _holds_rows(item) for item in value)


def _lines(value: Any, margin: str) -> str:
    inner = margin + " "
    if isinstance(value, dict) and (margin == "\n" or _holds_rows(value)):
        parts = [f"{json.dumps(key)}: {_lines(item, inner)}" for key, item in value.items()]
        return "{" + inner + ("," + inner).join(parts) + margin + "}"
    if isinstance(value, (list, tuple)) and _holds_rows(list(value)):
        return "[" + inner + ("," + inner).join(_lines(item, inner) for item in value) + margin + "]"
    return json.dumps(value)


def write_stage(folder: Path, stage: dict[str, Any], init_from: Path | None = None) -> None:
    """Write `folder/provenance.json`: the stages of the model that this one went on from, then `stage`."""
    stages: list[dict[str, Any]] = []
    if init_from is not None and (init_from / FILE).is_file():
        stages = json.loads((init_from / FILE).read_text())["stages"]
    write_record(folder / FILE, {"stages": [*stages, stage]})
