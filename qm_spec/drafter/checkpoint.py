"""Drafter folders of either kind."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch

from qm_spec.config import ARCHITECTURE
from qm_spec.drafter import eagle3
from qm_spec.drafter.eagle3 import Eagle3Drafter
from qm_spec.drafter.prior import QuickMergePrior

_CLASSES: dict[str, type[QuickMergePrior] | type[Eagle3Drafter]] = {
    ARCHITECTURE: QuickMergePrior,
    eagle3.ARCHITECTURE: Eagle3Drafter,
    eagle3.SINKS_ARCHITECTURE: Eagle3Drafter,
}


def load_drafter(folder: str | PathLike[str]) -> QuickMergePrior | Eagle3Drafter:
    """Load the drafter in `folder`, ours or EAGLE-3, in float32.

    Raises:
        FileNotFoundError: there is no config.json or no weights.
        ValueError: it holds a model of another architecture.
    """
    names = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or ["none"]
    if names[0] not in _CLASSES:
        raise ValueError(f"load_drafter: {folder} must hold one of {sorted(_CLASSES)}, got {names[0]}")
    return _CLASSES[names[0]].from_pretrained(folder, dtype=torch.float32)
