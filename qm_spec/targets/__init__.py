"""Known target models: the table of them, and how one comes onto this machine as a Hugging Face folder."""

from qm_spec.targets.fetch import fetch_target
from qm_spec.targets.known import KNOWN_TARGETS, KnownTarget, known_target

__all__ = ["KNOWN_TARGETS", "KnownTarget", "fetch_target", "known_target"]
