"""Whether a target architecture hands out the hidden states that the drafter reads."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

_INTERFACE = "SupportsEagle3"
_MODELS = "vllm.model_executor.models"


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


def require_first_state(architecture: str, layers: Sequence[int]) -> None:
    """Refuse a drafter that reads layer 0, the embedding, of a target that cannot hand it out.

    DeepSeek's forward adds a residual to each state that is asked for, and in front of layer 0 there is none yet: vLLM
    ends with a `TypeError` when all weights are loaded. The backend of transformers' own models asks for the layer in
    front of each, and ends with a `KeyError`. We cannot read the embedding in its place, as vLLM's own draft
    loops do not tell a drafter the tokens that its states belong to. The forward is looked for in the sources of the
    class, of its bases, and of the classes that it names as its language model, so that heirs are found, and a vLLM
    that asks for the residual is not refused.

    Args:
        architecture: a key of vLLM's `ModelRegistry`.
        layers: target layers whose input states the drafter reads.

    Raises:
        ValueError: layer 0 is among them and cannot be had.
    """
    from vllm import ModelRegistry

    if 0 not in layers:
        return
    waiting: list[str] = [architecture]
    seen: set[str] = set()
    while waiting:
        registered = ModelRegistry.models.get(name := waiting.pop())
        if name in seen or not hasattr(registered, "module_name"):
            continue
        seen.add(name)
        for _, source, node in lineage(registered.module_name, registered.class_name):
            if any(_adds_missing_residual(part) or _names_the_layer_before(part) for part in ast.walk(source)):
                others = [2 if 1 in layers else 1, *(layer for layer in layers if layer)]
                raise ValueError(
                    f"qm_spec: the drafter reads layer 0 of the target, the embedding, which vLLM's {architecture} "
                    "cannot hand out; train the drafter anew with other layers, such as --aux-layers "
                    f"{','.join(map(str, sorted(others)))}"
                )
            texts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
            waiting += [text for text in texts if isinstance(text, str) and text in ModelRegistry.models]


def _adds_missing_residual(node: ast.AST) -> bool:
    """Tell whether a function begins without residual and adds it to the state of any layer, unasked."""
    if not isinstance(node, ast.FunctionDef):
        return False
    begins = (
        isinstance(part, ast.Assign)
        and isinstance(part.value, ast.Constant)
        and part.value.value is None
        and _names(part.targets[0]) == {"residual"}
        for part in ast.walk(node)
    )
    loops = [part for part in ast.walk(node) if isinstance(part, ast.For)]
    asked = [part for loop in loops for part in ast.walk(loop) if isinstance(part, ast.If)]
    states = [part for part in asked if "aux_hidden_state_layers" in _names(part.test)]
    return any(begins) and any(_adds_residual(part) for state in states for part in state.body)


def _names_the_layer_before(node: ast.AST) -> bool:
    """Tell whether a setter of the layers to be read looks up the layer in front of each."""
    if not isinstance(node, ast.FunctionDef) or node.name != "set_aux_hidden_state_layers":
        return False
    keys = (part.slice for part in ast.walk(node) if isinstance(part, ast.Subscript))
    return any(isinstance(key, ast.BinOp) and isinstance(key.op, ast.Sub) for key in keys)


def _adds_residual(node: ast.AST) -> bool:
    if isinstance(node, ast.If | ast.IfExp) and "residual" in _names(node.test):
        return False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and "residual" in _names(node):
        return True
    return any(map(_adds_residual, ast.iter_child_nodes(node)))


def _names(node: ast.AST) -> set[str]:
    """Return the names and attributes in an expression."""
    parts = list(ast.walk(node))
    return {part.id for part in parts if isinstance(part, ast.Name)} | {
        part.attr for part in parts if isinstance(part, ast.Attribute)
    }


def declares_interface(module_name: str, class_name: str) -> bool:
    """Say whether a class or one of its bases names `SupportsEagle3`, by reading source files only."""
    return any(_INTERFACE in (name, *_bases(node)) for name, _, node in lineage(module_name, class_name))


def hands_out_states(architecture: str) -> bool | None:
    """Say by source files only whether a target's class in vLLM names `SupportsEagle3`; vLLM is not imported.

    False is no proof, as a class may have it by other ways. None where there is no vLLM, or it does not know the
    architecture.
    """
    registry = _source_file(f"{_MODELS}.registry")
    if registry is None:
        return None
    for node in ast.walk(ast.parse(registry.read_text(encoding="utf-8"))):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and key.value == architecture and isinstance(value, ast.Tuple):
                module, name = ast.literal_eval(value)
                return declares_interface(f"{_MODELS}.{module}", name)
    return None


def lineage(module_name: str, class_name: str) -> Iterator[tuple[str, ast.Module, ast.ClassDef]]:
    """Yield a class and its bases, each with the source file that it stands in, by reading source files only."""
    file = _source_file(module_name)
    if file is None:
        return
    package = module_name if file.name == "__init__.py" else module_name.rpartition(".")[0]
    source = ast.parse(file.read_text(encoding="utf-8"))
    for node in source.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            yield class_name, source, node
            for base in _bases(node):
                yield from lineage(module_name, base)
            return
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == class_name:
                    origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    yield from lineage(origin, alias.name)
                    return


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


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
