"""An engine's counters on the server's `/metrics`.

The engine and the server are processes of their own, and vLLM's way between them carries vLLM's numbers only. So they
share a folder: the engine writes files in prometheus_client's multi-process format, and the server's registry reads
them. Where vLLM itself is in that mode (several API servers, or `PROMETHEUS_MULTIPROC_DIR` set), it is that folder.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

from qm_spec.integrations.vllm_plugin.counters import METRICS, Counters

logger = logging.getLogger("vllm.plugins.qm_spec")

PREFIX = "qm_spec:"
# Many times what the numbers take.
_FILE_BYTES = 2**16
_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that this process's registry reads until it ends."""
    from prometheus_client import REGISTRY, multiprocess

    folder = tempfile.TemporaryDirectory(prefix="qm_spec_metrics_")
    multiprocess.MultiProcessCollector(REGISTRY, path=folder.name)
    return folder


def shared_folder() -> str:
    """Return the folder that `/metrics` of this process reads, for engines that it starts."""
    return os.environ.get(_VARIABLE) or _own_folder().name


class MetricsFile:
    """Counters of one engine, as the server reads them.

    Args:
        folder: see `shared_folder`.
        labels: of all its numbers, such as the name of the model.
    """

    def __init__(self, folder: str, labels: Mapping[str, str]) -> None:
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        # The part before the first underscore is the type of all numbers in it.
        file = Path(folder) / f"counter_qmspec{uuid.uuid4().hex}.db"
        # A disk that is full must say so here: to write into the mapping would end the process.
        file.write_bytes(bytes(_FILE_BYTES))
        self._file = MmapedDict(str(file))
        self._keys = {}
        for metric in METRICS:
            for kind in metric.kinds:
                own = {**labels, metric.label: kind} if metric.label else dict(labels)
                name = f"{PREFIX}{metric.name}"
                key = mmap_key(name, f"{name}_total", [*own], [*own.values()], metric.help)
                self._keys[metric.name, kind] = key

    def write(self, counters: Counters) -> None:
        """Write how far the counters are."""
        for place, key in self._keys.items():
            self._file.write_value(key, float(counters[place]), 0.0)


def open_file(folder: str | None, labels: Mapping[str, str]) -> MetricsFile | None:
    """Return the engine's file; None where the server's folder is not here, as on another machine, or is full."""
    # A server of several processes settles its folder after it has made the engine's configuration.
    folder = folder and (os.environ.get(_VARIABLE) or folder)
    if not folder or not Path(folder).is_dir():
        return None
    try:
        return MetricsFile(folder, labels)
    except OSError as error:
        logger.warning("qm_spec: /metrics will not have this engine's counters: %s", error)
        return None
