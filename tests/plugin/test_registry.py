"""vLLM's registry of speculative methods, which no release has: a double of what eagle-harness registers with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.tiny_pair import write_drafter, write_target
from vllm.engine.arg_utils import EngineArgs

from qm_spec.integrations.vllm_plugin import compat, register, registry, request
from qm_spec.integrations.vllm_plugin.patches.v2_speculator import SPECULATOR

pytestmark = pytest.mark.vllm

MODULE = "vllm.v1.spec_decode.registry"


@dataclass
class SpeculativeMethodSpec:
    """The double's; a method is described by these."""

    speculator_cls: str
    configure: Callable[[Any], None]
    uses_target_hidden_states: bool
    uses_aux_hidden_states: bool
    num_lookahead_tokens: Callable[[Any], int]
    linear_attn_verify_extension: Any


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The methods of a vLLM with a registry."""
    known: dict[str, Any] = {}
    module: Any = ModuleType(MODULE)
    module.SpeculativeMethodSpec = SpeculativeMethodSpec
    module.register_speculative_method = known.__setitem__
    monkeypatch.setitem(sys.modules, MODULE, module)
    registry.is_registered.cache_clear()
    yield known
    registry.is_registered.cache_clear()


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[compat.Patch]:
    """The patches that registering puts in force; none of them is."""
    seen: list[compat.Patch] = []
    monkeypatch.setattr(compat, "apply", lambda patch: seen.append(patch) or True)
    return seen


def test_where_vllm_has_a_registry_our_method_stands_in_it_and_the_runner_is_not_patched(
    methods: dict[str, Any], applied: list[compat.Patch]
) -> None:
    register.register()
    register.register()
    assert list(methods) == ["qm_spec"]
    assert SPECULATOR not in applied
    method = methods["qm_spec"]
    module, _, name = method.speculator_cls.partition(":")
    assert getattr(import_module(module), name).__name__ == "QuickMergeSpeculator"
    assert method.uses_aux_hidden_states
    assert method.num_lookahead_tokens(SimpleNamespace(num_speculative_tokens=5)) == 5


def test_a_vllm_without_a_registry_is_patched(applied: list[compat.Patch]) -> None:
    register.register()
    assert SPECULATOR in applied


def test_a_registry_that_takes_other_fields_is_left_alone(
    methods: dict[str, Any], applied: list[compat.Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "configure" in [field.name for field in fields(SpeculativeMethodSpec)]
    monkeypatch.setattr(sys.modules[MODULE], "SpeculativeMethodSpec", lambda *, speculator_cls: speculator_cls)
    register.register()
    assert not methods
    assert SPECULATOR in applied


@pytest.mark.parametrize(("runs_v2", "method"), [(True, "qm_spec"), (False, "eagle3")])
def test_the_v2_runner_is_asked_for_the_registered_method(
    runs_v2: bool, method: str, methods: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_target(tmp_path / "target")
    drafter = write_drafter(tmp_path / "drafter", target, num_speculative_tokens=3)
    monkeypatch.setattr(request, "_runs_v2", lambda: runs_v2)
    args = EngineArgs(model=str(target), spec_model=str(drafter))
    asked = request.find_request(args)
    assert asked is not None
    model = SimpleNamespace(architecture="LlamaForCausalLM", model=str(target), revision=None, get_vocab_size=lambda: 8)
    parallel: Any = SimpleNamespace(
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        pipeline_parallel_size=1,
        tensor_parallel_size=1,
        world_size=1,
    )
    assert request.resolve(asked, args, model, parallel)["method"] == method
