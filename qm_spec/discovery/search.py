"""Where the drafter of a target is looked for."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from qm_spec.discovery.files import read_json, shown, target_file
from qm_spec.discovery.fingerprint import target_fingerprint
from qm_spec.pairs import ZOO


def drafter_home() -> Path:
    """Return the folder of the user's own drafters: `$QM_SPEC_HOME`, else `~/.cache/qm_spec`."""
    return Path(os.environ.get("QM_SPEC_HOME") or "~/.cache/qm_spec").expanduser()


def drafter_place(target: str | Path, revision: str | None = None) -> Path:
    """Return where a drafter goes so that the name `qm_spec` finds it: beside a folder, by fingerprint for a hub id.

    Args:
        target: a local folder, or a hub id that transformers can find.
        revision: of the hub id.

    Raises:
        FileNotFoundError: the target has no config.json or no tokenizer.
    """
    folder = Path(target).expanduser()
    return folder / "qm_spec" if folder.is_dir() else drafter_home() / target_fingerprint(target, revision)


def find_drafter(target: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a target's drafter.

    Looked for, in this order: `TARGET/qm_spec/`, `$QM_SPEC_HOME/<fingerprint>/`, and the shipped
    pairs, `zoo/*/drafter`, by the fingerprint in their config. The first folder with a config.json
    is taken; whether it is sound is `check_drafter`'s question.

    Args:
        target: a local folder, or a hub id that transformers can find.
        revision: of the hub id.

    Raises:
        FileNotFoundError: the target is incomplete, or it has no drafter in any of the three places.
    """
    fingerprint = target_fingerprint(target, revision)
    beside_target = _beside_target(target, revision)
    if beside_target is not None:
        return beside_target
    at_home = drafter_home() / fingerprint
    if (at_home / "config.json").is_file():
        return at_home
    shipped = sorted(ZOO.glob("*/drafter/config.json"))
    for config in shipped:
        if read_json(config).get("target_fingerprint") == fingerprint:
            return config.parent
    command = ["qm-spec", "train", "--target", str(target), "--data", "PATH", "--out", str(at_home)]
    names = ", ".join(config.parents[1].name for config in shipped)
    raise FileNotFoundError(
        f"no drafter for the target {shown(target)} (fingerprint {fingerprint}). Looked in:\n"
        f"  {shown(Path(target) / 'qm_spec')}\n"
        f"  {shown(at_home)}\n"
        f"  {ZOO / '*' / 'drafter'} ({f'for other targets: {names}' if names else 'none shipped'})\n"
        f"Train one: {shown(shlex.join(command))}"
    )


def _beside_target(target: str | Path, revision: str | None) -> Path | None:
    try:
        config = target_file(target, "qm_spec/config.json", revision)
        if not Path(target).expanduser().is_dir():
            # A hub repository comes file by file; vLLM loads the folder.
            target_file(target, "qm_spec/model.safetensors", revision)
    except FileNotFoundError:
        return None
    return config.parent
