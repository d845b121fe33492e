"""Finished shards on disk, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from qm_spec.evaluation.shards import ShardResult, ShardSpec


class ShardStore:
    """One file per finished shard, named by all that was asked for.

    Args:
        folder: made where it is missing.
        resume: keep what an earlier run left there, else remove it.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self._folder = folder
        if not resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, method: str, device: str, spec: ShardSpec) -> Path:
        asked = json.dumps([method, device, spec.to_json()], sort_keys=True)
        return self._folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"

    def load(self, method: str, device: str, spec: ShardSpec) -> ShardResult | None:
        """Return what `save` kept for the same arguments, None where there is nothing."""
        file = self._file(method, device, spec)
        return ShardResult.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def save(self, method: str, device: str, spec: ShardSpec, result: ShardResult) -> None:
        """Keep a result; its file appears whole or not at all."""
        file = self._file(method, device, spec)
        partial = file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            json.dump(result.to_json(), stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
