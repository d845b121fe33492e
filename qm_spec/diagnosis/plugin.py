"""Whether vLLM is there, is one that qm_spec supports, and loads qm_spec as its plug-in."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
from collections.abc import Iterator
from importlib.util import find_spec

from qm_spec import provenance
from qm_spec.diagnosis.finding import Finding

_GROUP, _NAME = "vllm.general_plugins", "qm_spec"


def check_vllm() -> Iterator[Finding]:
    """Look at vLLM's version without importing it."""
    from qm_spec.integrations.vllm_plugin import compat

    version = provenance.versions().get("vllm")
    if find_spec("vllm") is None:
        remedy = f"{compat.how_to_install()}; for a CPU: make install in a checkout of qm_spec"
        yield Finding("problem", "vLLM", "is not installed", remedy)
    elif version is None:
        yield Finding("warning", "vLLM", "does not state its version", f"{compat.supports()}: see that it is one")
    elif not compat.is_supported(version):
        yield Finding("problem", "vLLM", f"{version} is installed, {compat.supports()}", compat.how_to_install())
    else:
        yield Finding("ok", "vLLM", version)


def check_plugin() -> Iterator[Finding]:
    """Look for what vLLM needs to load qm_spec: the entry point, what it names, and leave by `VLLM_PLUGINS`."""
    found = importlib.metadata.entry_points(group=_GROUP, name=_NAME)
    if not found:
        remedy = "pip install --no-build-isolation -e . in a checkout of qm_spec; a path to it is not enough"
        yield Finding("problem", "plug-in", f"no entry point {_NAME} in {_GROUP}, so vLLM does not find it", remedy)
        return
    for entry in found:
        entry.load()
    # As vLLM reads it: names between commas, without trimming.
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _NAME not in allowed.split(","):
        names = dict.fromkeys([*filter(None, map(str.strip, allowed.split(","))), _NAME])
        remedy = f"export VLLM_PLUGINS={shlex.quote(','.join(names))}, or unset it"
        yield Finding("problem", "plug-in", f"VLLM_PLUGINS={allowed} keeps vLLM from loading {_NAME}", remedy)
    else:
        yield Finding("ok", "plug-in", "vLLM loads it")
