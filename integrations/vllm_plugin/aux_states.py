"""Whether a target architecture hands out the hidden states that the drafter reads."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

_INTERFACE = "SupportsEagle3"


def require_aux_hidden_states(architecture: str) -> None:
    """Refuse a target whose class in vLLM does not implement `SupportsEagle3`.

    vLLM itself finds out when all weights are loaded. Its registry does not record the interface, and
    importing a model class may initialise CUDA in a process that is to fork, so the class's source is
    read first; the class is imported only when the source does not say yes.

    Args:
        architecture: a key of vLLM's `ModelRegistry`; an unknown one is left for vLLM to refuse.

    Raises:
        ValueError: the target has no auxiliary hidden states.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_eagle3

    registered = ModelRegistry.models.get(architecture)
    if registered is None:
        return
    module_name = getattr(registered, "module_name", None)
    if module_name is not None and declares_interface(module_name, registered.class_name):
        return
    if not supports_eagle3(registered.load_model_cls()):
        raise ValueError(
            f"qm_spec: vLLM's {architecture} gives out no auxiliary hidden states ({_INTERFACE}), which the "
            "drafter reads; serve this target without --speculative-model, or with --spec-method ngram"
        )


def declares_interface(module_name: str, class_name: str) -> bool:
    """Say whether a class or one of its bases names `SupportsEagle3`, by reading source files only."""
    if class_name == _INTERFACE:
        return True
    source = _source_file(module_name)
    if source is None:
        return False
    package = module_name if source.name == "__init__.py" else module_name.rpartition(".")[0]
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            return any(declares_interface(module_name, base) for base in bases)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == class_name:
                    origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    return declares_interface(origin, alias.name)
    return False


def _source_file(module_name: str) -> Path | None:
    """Find a module's file by its name alone: `find_spec` of a submodule would import its packages."""
    top, *rest = module_name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        path = Path(location).joinpath(*rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
