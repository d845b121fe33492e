"""A command in a process that is killed at its n-th file operation: a random moment that comes again with its seed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Audit events of Python's, each raised before what it names. Behind "open" a file is empty or half written, before
# "os.rename" it is whole under its passing name.
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


def die_at(moment: int, folder: str) -> None:
    """Let this process be killed right before the so-manieth operation on files below a folder, counted from 1."""
    left = moment

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in OPERATIONS and any(isinstance(one, (str, os.PathLike)) and folder in str(one) for one in arguments):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def run_until(moment: int, folder: Path, run: Callable[[], object]) -> bool:
    """Run in a child of this process that may be killed; return whether it was."""

    def watched() -> None:
        die_at(moment, str(folder))
        run()

    child = multiprocessing.get_context("fork").Process(target=watched)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "it ended by a fault of its own"
    return child.exitcode != 0


def wait_for_end(pids: list[int]) -> None:
    """Wait for processes whose parent is gone: they end by themselves."""
    deadline = time.monotonic() + 60
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < deadline, f"process {pid} outlives who started it"
            time.sleep(0.01)


def stamps(folder: Path, pattern: str) -> dict[Path, tuple[int, int]]:
    """Return what tells for each finished file whether it was written again."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob(pattern)}
