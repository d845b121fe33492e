"""Which drafter belongs to a target: fingerprint, search, and the checks before an engine starts."""

from qm_spec.discovery.checks import check_drafter, is_drafter, vllm_settings
from qm_spec.discovery.fingerprint import target_fingerprint
from qm_spec.discovery.search import find_drafter

__all__ = [
    "check_drafter",
    "find_drafter",
    "is_drafter",
    "target_fingerprint",
    "vllm_settings",
]
