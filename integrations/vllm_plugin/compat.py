"""All that is known of vLLM's versions: the supported ones, and how its code is patched.

A patch is a last resort. To add one: a file in `patches/` with a function that takes the original callable and returns
its replacement, and its `Patch`; `apply` it where it is needed.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from qm_spec import provenance

logger = logging.getLogger("vllm.plugins.qm_spec")

OLDEST = (0, 32)
NEWEST = (0, 33)


@dataclass(frozen=True)
class Patch:
    """One replaced method or function of vLLM.

    Attributes:
        target: `module:Class.method` or `module:function`.
        parameters: the method's parameter names; with others it is not touched.
        replacement: called with the original, returns what takes its place.
        why: what it gives a user.
        how: what the replacement does.
        upstream: the issue that would make it needless, or `none`.
        delete_when: the event after which it must go.
        later: parameters that a later supported version has behind those; the replacement passes them on.
    """

    target: str
    parameters: tuple[str, ...]
    replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
    why: str
    how: str
    upstream: str
    delete_when: str
    later: tuple[str, ...] = ()


def vllm_version() -> str:
    """Return the running vLLM's version text."""
    import vllm

    return str(vllm.__version__)


def is_supported(version: str) -> bool:
    """Say whether a vLLM version, by its first two numbers, is one that qm_spec was tested with."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return False
    return OLDEST <= release[:2] <= NEWEST


def supports() -> str:
    """Say which versions of vLLM this qm_spec supports."""
    version = provenance.versions().get("qm_spec", "(not installed)")
    return f"qm_spec {version} supports vLLM {_dotted(OLDEST)} to {_dotted(NEWEST)}"


def how_to_install() -> str:
    """Say how a supported vLLM comes to be."""
    return f"install vllm=={_dotted(NEWEST)}.*"


def get_kv_cache_groups(vllm_config: Any, specs: dict[str, Any]) -> list[Any]:
    """Return vLLM's groups of layers with these cache specs, which it may change."""
    module = _import("vllm.v1.core.kv_cache_planning") or _import("vllm.v1.core.kv_cache_utils")
    groups: list[Any] = module.get_kv_cache_groups(vllm_config, specs)
    return groups


def method_registry() -> Any:
    """Return vLLM's module that registers speculative methods, None where it has none."""
    return _import("vllm.v1.spec_decode.registry")


def require_supported() -> None:
    """Refuse a vLLM that qm_spec was not tested with; call it only when our method is asked for.

    Raises:
        RuntimeError: the running vLLM is older or newer.
    """
    version = vllm_version()
    if not is_supported(version):
        raise RuntimeError(f"{supports()}, found {version}; {how_to_install()}")


def require_runner(uses_v2: bool) -> None:
    """Refuse vLLM's V1 runner on ROCm: after a first draft it takes the metadata of vLLM's own backends only.

    Raises:
        ValueError: it would run.
    """
    from vllm.platforms import current_platform

    if current_platform.is_rocm() and not uses_v2:
        raise ValueError(
            "qm_spec: on ROCm vLLM's V1 runner takes no drafter with an attention backend of its own, and it would end "
            "at the first draft; use the V2 runner (VLLM_USE_V2_MODEL_RUNNER=1), which needs Triton"
        )


def in_force(patch: Patch) -> bool:
    """Tell whether a patch has been put in force."""
    owner, name = _owner(patch)
    declared = inspect.getattr_static(owner, name, None)
    return getattr(getattr(declared, "__func__", declared), "_qm_spec_patch", None) == patch.target


def _owner(patch: Patch) -> tuple[Any, str]:
    """Return the module or class that holds what is patched, None where there is none, and the name in it."""
    module_name, _, path = patch.target.partition(":")
    class_name, _, name = path.rpartition(".")
    owner = _import(module_name)
    return (getattr(owner, class_name, None) if class_name else owner), name


def apply(patch: Patch) -> bool:
    """Put a patch in force once; return whether it is in force.

    A method that is not there, or has other parameters than the patch was written for, is left
    alone with a warning: this may be a vLLM whose user never asks for qm_spec.
    """
    owner, name = _owner(patch)
    declared = inspect.getattr_static(owner, name, None)
    if declared is None:
        return _skip(patch, "there is no such method")
    kind = type(declared) if isinstance(declared, staticmethod | classmethod) else None
    original = declared.__func__ if kind else declared
    if not callable(original):
        return _skip(patch, "it is no method")
    if getattr(original, "_qm_spec_patch", None) == patch.target:
        return True
    parameters = tuple(inspect.signature(original).parameters)
    if parameters not in (patch.parameters, patch.parameters + patch.later):
        return _skip(patch, f"its parameters are {parameters}, expected {patch.parameters}")
    replaced: Any = patch.replacement(original)
    replaced._qm_spec_patch = patch.target
    setattr(owner, name, kind(replaced) if kind else replaced)
    return True


def _import(module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None


def _skip(patch: Patch, reason: str) -> bool:
    logger.warning(
        "qm_spec: %s is not patched (%s), so this is lost: %s. vLLM here is %s, qm_spec supports %s to %s.",
        patch.target,
        reason,
        patch.why,
        vllm_version(),
        _dotted(OLDEST),
        _dotted(NEWEST),
    )
    return False


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
