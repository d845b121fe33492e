"""A finding of `qm-spec doctor`: a line for people, a record for machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        level: `problem` where qm_spec does not run so, `warning` where it runs and something is lost.
        about: what was looked at, in a word or two.
        found: how it is.
        remedy: what to do; None where nothing is to be done, or `found` says it.
    """

    level: Level
    about: str
    found: str
    remedy: str | None = None

    def line(self) -> str:
        """Return the finding as one line, whatever is in its texts."""
        text = " ".join("; ".join(filter(None, (self.found, self.remedy))).split())
        return f"{self.level:<9}{self.about:<15}{text if text.isprintable() else repr(text)}"


def examine(about: str, check: Callable[[], Iterable[Finding]], remedy: str) -> list[Finding]:
    """Return what a check finds; what it raises is a problem, so that the checks behind it still run.

    Args:
        about: what is looked at.
        check: called once.
        remedy: for what the package raises without a way out, such as an error of another library.
    """
    found: list[Finding] = []
    try:
        found.extend(check())
    # What a broken installation raises is anything.
    except Exception as error:
        found.append(_problem(about, error, remedy))
    return found


@contextmanager
def taken_warnings() -> Iterator[list[str]]:
    """Take what the package's loggers warn of meanwhile, in place of their handlers."""
    said: list[str] = []

    class Taker(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().removeprefix("qm_spec: "))

    logger, taker = logging.getLogger("qm_spec"), Taker(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(taker)
    try:
        yield said
    finally:
        logger.removeHandler(taker)
        logger.propagate = propagate


def _problem(about: str, error: Exception, remedy: str) -> Finding:
    if isinstance(error, ModuleNotFoundError):
        return Finding("problem", about, f"cannot be checked without {error.name}", "pip install 'qm_spec[models]'")
    if isinstance(error, PermissionError):
        return Finding("problem", about, str(error), "give this user the right to read it")
    # Errors of our own end with the way out.
    if type(error) in (FileNotFoundError, TypeError, ValueError):
        return Finding("problem", about, str(error).removeprefix(f"{about}: "))
    return Finding("problem", about, f"{type(error).__name__}: {error}", remedy)
