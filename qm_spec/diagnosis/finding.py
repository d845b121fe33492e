"""A finding of `qm-spec doctor`: a line for people, a record for machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def _problem(about: str, error: Exception, remedy: str) -> Finding:
    if isinstance(error, ModuleNotFoundError):
        return Finding("problem", about, f"cannot be checked without {error.name}", "pip install 'qm_spec[models]'")
    if isinstance(error, PermissionError):
        return Finding("problem", about, str(error), "give this user the right to read it")
    # Errors of our own end with the way out.
    if type(error) in (FileNotFoundError, TypeError, ValueError):
        return Finding("problem", about, str(error))
    return Finding("problem", about, f"{type(error).__name__}: {error}", remedy)
