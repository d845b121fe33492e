"""Finished shards on disk, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qm_spec.bench.engine.shards import ShardResult, ShardSpec


class ShardStore:
    """One file per finished shard and pass, named by all that was asked for.

    Args:
        folder: made where it is missing.
        resume: keep what an earlier run left there, else remove it.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self._folder = folder
        if not resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, method: str, device: str, spec: ShardSpec, number: int) -> Path:
        asked = json.dumps([method, device, spec.to_json(), number], sort_keys=True)
        return self._folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"

    def load(self, method: str, device: str, spec: ShardSpec, number: int = 0) -> list[ShardResult] | None:
        """Return what `save` kept for the same arguments, None where there is nothing."""
        file = self._file(method, device, spec, number)
        if not file.exists():
            return None
        return [ShardResult.from_json(fields) for fields in json.loads(file.read_text(encoding="utf-8"))]

    def save(self, method: str, device: str, spec: ShardSpec, results: Sequence[ShardResult], number: int = 0) -> None:
        """Keep results that belong together; their file appears whole or not at all.

        Args:
            results: the shard's, and where it was measured in turn with plain decoding, that one's.
            number: of the pass, where passes are kept one by one.
        """
        file = self._file(method, device, spec, number)
        partial = file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            json.dump([result.to_json() for result in results], stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
