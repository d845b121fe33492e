"""The kinds of dependent documents by name."""

from __future__ import annotations

from qm_spec.training.dependent.kind import Kind
from qm_spec.training.dependent.quotation import Quotation
from qm_spec.training.dependent.records import Records
from qm_spec.training.dependent.secrets import MultiKey, Needle
from qm_spec.training.dependent.variables import Variables
from qm_spec.training.dependent.words import Words

_CLASSES: dict[str, type[Kind]] = {
    "quotation": Quotation,
    "records": Records,
    "needle": Needle,
    "multi_key": MultiKey,
    "variables": Variables,
    "words": Words,
}
KINDS = tuple(_CLASSES)


def kind_class(kind: str) -> type[Kind]:
    """Return the class of a kind.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _CLASSES:
        raise ValueError(f"generate: kind must be one of {', '.join(sorted(KINDS))}, got {kind!r}")
    return _CLASSES[kind]
