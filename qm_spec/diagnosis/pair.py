"""Whether a target can be read, and whether a drafter fits it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qm_spec.diagnosis.finding import Finding, taken_warnings
from qm_spec.diagnosis.summary import DrafterSummary
from qm_spec.discovery import check_drafter, find_drafter, target_fingerprint
from qm_spec.discovery.files import read_json, shown, target_file
from qm_spec.integrations.vllm_plugin.aux_states import hands_out_states


def check_target(target: str) -> Iterator[Finding]:
    """Read a target's config and tokenizer, and the source of its class in vLLM where that is installed."""
    fingerprint = target_fingerprint(target)
    config = read_json(target_file(target, "config.json"))
    yield Finding("ok", "target", f"{shown(target)}: {shown(config.get('model_type'))}, fingerprint {fingerprint}")
    for architecture in config.get("architectures") or ():
        if hands_out_states(architecture) is False:
            found = f"vLLM's {shown(architecture)} seems to hand out no hidden states (SupportsEagle3)"
            yield Finding("warning", "target", found, "if the engine refuses it, serve it without a drafter")


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
        yield Finding("warning", "drafter", f"{shown(folder)} is untrained, so few of its drafts are accepted", remedy)
    if target is None:
        found = f"{shown(folder)} is sound, of the target with fingerprint {shown(summary.target_fingerprint)}"
        yield Finding("ok", "drafter", found, "--target T says whether it fits T")
        return
    with taken_warnings() as said:
        depth = check_drafter(folder, target)
    yield from (Finding("warning", "drafter", text) for text in said)
    yield Finding("ok", "drafter", f"{shown(folder)} fits, K {depth}")
