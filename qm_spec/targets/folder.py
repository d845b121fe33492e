"""The folder of a fetched target: its record, which says what belongs to it, and whether all of that is there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qm_spec import provenance
from qm_spec.discovery import target_fingerprint
from qm_spec.discovery.files import read_json
from qm_spec.targets.known import KnownTarget


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_disk_full(error: Exception | str) -> bool:
    """Say whether an error, of whatever library, or what a program printed tells of a full disk."""
    return "No space left" in str(error)


def write_record(folder: Path, target: KnownTarget, origin: dict[str, Any]) -> str:
    """Write the record of a complete folder, `provenance.json`, and return the target's fingerprint.

    Args:
        folder: holds the model's files and nothing else.
        target: what they are.
        origin: where they come from.

    Raises:
        ValueError: the folder holds no weights, or no config.json or tokenizer that can be read.
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{target.name}: expected weights as *.safetensors from {target.hub}, got none")
    try:
        fingerprint = target_fingerprint(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{target.name}: what was fetched is incomplete: {error}") from error
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != provenance.FILE)
    stage = {
        "target": target.name,
        "hub": target.hub,
        "licence": target.licence,
        **origin,
        "fingerprint": fingerprint,
        "versions": provenance.versions(),
        "sha256": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }
    provenance.write_stage(folder, stage)
    return fingerprint


def is_complete(folder: Path, target: KnownTarget) -> bool:
    """Say whether a folder holds this target as it was fetched; what else lies in it does not matter.

    False means that there is nothing yet: no such folder, or an empty one.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: it was fetched, and a file of it is missing or changed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    hashes = _recorded_hashes(folder, target)
    if hashes is None:
        raise FileExistsError(
            f"{folder} is there already and is no {target.name} that was fetched; "
            "move it away, or choose another folder: --out DIR"
        )
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file() or sha256(file) != expected:
            state = "is not what was fetched" if file.is_file() else "is missing"
            raise ValueError(f"{folder} is damaged: {name} {state}; move the folder away and fetch it again")
    return True


def _recorded_hashes(folder: Path, target: KnownTarget) -> dict[str, str] | None:
    try:
        [stage] = read_json(folder / provenance.FILE)["stages"]
        return dict(stage["sha256"]) if stage["target"] == target.name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
