"""Whether a target can be read, and whether a drafter fits it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qm_spec.diagnosis.finding import Finding
from qm_spec.diagnosis.summary import DrafterSummary
from qm_spec.discovery import check_drafter, find_drafter, target_fingerprint
from qm_spec.discovery.files import read_json, shown, target_file


def check_target(target: str) -> Iterator[Finding]:
    """Read a target's config and tokenizer."""
    fingerprint = target_fingerprint(target)
    model_type = read_json(target_file(target, "config.json")).get("model_type")
    yield Finding("ok", "target", f"{shown(target)}: {shown(model_type)}, fingerprint {fingerprint}")


def check_pair(target: str | None, drafter: Path | None) -> Iterator[Finding]:
    """Look for a target's drafter where none is given, and check it as an engine does at its start.

    Args:
        target: a local folder or a hub id; None checks what can be checked without it.
        drafter: its folder; None takes what the name `qm_spec` finds.
    """
    folder = drafter if drafter is not None or target is None else find_drafter(target)
    if folder is None:
        return
    summary = DrafterSummary.of(folder)
    if summary.is_untrained:
        remedy = "train one: qm-spec train --help"
        yield Finding("warning", "drafter", f"{shown(folder)} is untrained, so its drafts are rejected", remedy)
    if target is None:
        found = f"{shown(folder)} is sound, of the target with fingerprint {shown(summary.target_fingerprint)}"
        yield Finding("ok", "drafter", found, "--target T says whether it fits T")
        return
    with _warnings() as said:
        depth = check_drafter(folder, target)
    yield from (Finding("warning", "drafter", text) for text in said)
    yield Finding("ok", "drafter", f"{shown(folder)} fits, K {depth}")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Take what the package's loggers warn of, in place of their handlers."""
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
