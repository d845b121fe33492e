"""The record that stands beside every trained or measured result."""

from __future__ import annotations

import importlib.metadata
import json
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


def write_stage(folder: Path, stage: dict[str, Any], init_from: Path | None = None) -> None:
    """Write `folder/provenance.json`: the stages of the model that this one went on from, then `stage`."""
    stages: list[dict[str, Any]] = []
    if init_from is not None and (init_from / FILE).is_file():
        stages = json.loads((init_from / FILE).read_text())["stages"]
    # A full disk must not cost the record that stands there.
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps({"stages": [*stages, stage]}, indent=1) + "\n")
    partial.replace(folder / FILE)
